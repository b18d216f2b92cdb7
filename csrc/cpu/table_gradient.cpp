// The gradient of a table: a row's is the sum, over the places where it was drawn, of coefficient
// times query. The places are listed as entries, in buckets of neighbouring rows of the table, as
// many as stay in a core's cache while they are summed. A thread takes a bucket and adds its
// entries up where the sums lie, in their order: no sort within a bucket, no atomics, no order that
// changes from run to run. The entries of a bucket are in the order of the queries, which are
// therefore read from front to back.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "../per_row_softmax.h"
#include "registers.h"
#include "row.h"

namespace dwl {
namespace {

constexpr int64_t kAhead = 8;              // entries between the fetch of a query and its use
constexpr int64_t kWritesAhead = 16;       // entries between the fetch of memory and its write
constexpr int64_t kBucketBytes = 1 << 17;  // of sums
constexpr int64_t kMostBuckets = 1 << 11;  // so many streams of writes stay within the TLB
constexpr int kMostMarked = 16;            // bits of a bucket's rows that are marked one by one
constexpr int64_t kBucketsOfThread = 8;    // at least, where the table has so many rows

// Where it comes from and where it goes: a row of the source, and in the last bits a slot, the row
// of the table counted from the first of its bucket. I is 32 bits wide where that holds both:
// entries are what is moved.
template <typename T, typename I>
struct Entry {
  I row_and_slot;
  T coefficient;

  Entry() = default;
  Entry(int64_t row, int64_t id, int shift, T a)
      : row_and_slot(static_cast<I>(row) << shift | (static_cast<I>(id) & mask(shift))),
        coefficient(a) {}
  int64_t row(int shift) const { return row_and_slot >> shift; }
  int64_t slot(int shift) const { return row_and_slot & mask(shift); }

 private:
  static I mask(int shift) { return (I(1) << shift) - 1; }
};

template <typename Work>
void in_parallel(int64_t count, int team, const Work& work) {
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (int64_t k = 0; k < count; ++k) work(k);
}

// The threads that work, and the table in buckets of 2^shift rows.
struct Layout {
  int team = 1, shift = 0;
  int64_t buckets = 0;

  template <typename T, typename S>
  Layout(const TableGradient<T, S>& p, int threads) {
    int64_t most = 0;
    for (int k = 0; k < p.num_pieces; ++k) most += p.rows * p.pieces[k].width;
    team = static_cast<int>(std::clamp<int64_t>(most / 4096, 1, threads));
    while (shift < kMostMarked && (p.dim * int64_t(sizeof(T)) << (shift + 1)) <= kBucketBytes)
      ++shift;
    const auto count = [&] { return p.table_rows == 0 ? 0 : ((p.table_rows - 1) >> shift) + 1; };
    while (shift > 0 && count() < kBucketsOfThread * team) --shift;
    while (count() > kMostBuckets) ++shift;
    const int row_bits = static_cast<int>(std::bit_width(static_cast<uint64_t>(p.rows)));
    shift = std::min(shift, 64 - row_bits);  // a row and a slot are one word
    buckets = count();
  }
};

template <typename T, typename I>
class Buckets {
 public:
  template <typename S>
  Buckets(const TableGradient<T, S>& p, const Layout& layout)
      : team_(layout.team), count_(layout.buckets) {
    // Twice through the places: how many a thread has of each piece and bucket, then where they go.
    const auto visit = [&](int64_t part, int k, const auto& take) {
      const Places<T> piece = p.pieces[k];  // in registers, whatever `take` writes to
      const int shift = layout.shift;
      for (int64_t r = p.rows * part / team_; r < p.rows * (part + 1) / team_; ++r) {
        for (int64_t at = r * piece.width; at < (r + 1) * piece.width; ++at) {
          const T coefficient = piece.coefficient != nullptr ? piece.coefficient[at] : T(1);
          const int64_t id = piece.ids[at];
          if (coefficient == 0 || id < 0 || id >= p.table_rows) continue;
          take(id >> shift, Entry<T, I>(r, id, shift, coefficient));
        }
      }
    };
    std::vector<int64_t> places(size_t(p.num_pieces) * team_ * count_);
    const auto places_of = [&](int64_t part, int k) {
      return places.data() + (k * team_ + part) * count_;
    };
    in_parallel(team_, team_, [&](int64_t part) {
      for (int k = 0; k < p.num_pieces; ++k) {
        int64_t* own = places_of(part, k);
        visit(part, k, [own](int64_t bucket, const Entry<T, I>&) { ++own[bucket]; });
      }
    });
    starts_.reserve(count_ + 1);
    int64_t sum = 0;
    for (int64_t bucket = 0; bucket < count_; ++bucket) {
      starts_.push_back(sum);
      for (int64_t list = 0; list < p.num_pieces * team_; ++list) {
        sum += std::exchange(places[list * count_ + bucket], sum);
      }
    }
    starts_.push_back(sum);
    entries_.reset(new Entry<T, I>[sum + kWritesAhead]);
    in_parallel(team_, team_, [&](int64_t part) {
      Entry<T, I>* to = entries_.get();
      for (int k = 0; k < p.num_pieces; ++k) {
        int64_t* own = places_of(part, k);
        visit(part, k, [own, to](int64_t bucket, const Entry<T, I>& entry) {
          Entry<T, I>* at = to + own[bucket]++;
          *at = entry;
          __builtin_prefetch(at + kWritesAhead, 1);
        });
      }
    });
  }

  int team() const { return team_; }
  int64_t count() const { return count_; }
  const Entry<T, I>* begin(int64_t bucket) const { return entries_.get() + starts_[bucket]; }
  const Entry<T, I>* end(int64_t bucket) const { return entries_.get() + starts_[bucket + 1]; }

 private:
  const int team_;
  const int64_t count_;
  std::vector<int64_t> starts_;
  std::unique_ptr<Entry<T, I>[]> entries_;
};

template <typename T, typename S, typename I>
void sum_by_id(const TableGradient<T, S>& p, const Layout& layout,
               const std::function<TableRows<S>(int64_t)>& allocate) {
  const Buckets<T, I> buckets(p, layout);
  const int64_t dim = p.dim, bucket_rows = int64_t(1) << layout.shift;
  // The slots that a bucket has, in rising order, and where each of its rows stands among them;
  // the second is empty where a bucket has too many rows for that.
  struct Present {
    std::vector<int64_t> slots;
    std::vector<int32_t> order;
    int64_t of(int64_t slot) const {
      if (!order.empty()) return order[slot];
      return std::lower_bound(slots.begin(), slots.end(), slot) - slots.begin();
    }
  };
  const auto present_in = [&](int64_t bucket) {
    Present present;
    std::vector<int64_t>& slots = present.slots;
    const Entry<T, I>*entry = buckets.begin(bucket), *end = buckets.end(bucket);
    const int shift = layout.shift;
    if (bucket_rows <= int64_t(1) << kMostMarked) {
      present.order.resize(bucket_rows);
      for (; entry != end; ++entry) present.order[entry->slot(shift)] = 1;
      for (int64_t slot = 0; slot < bucket_rows; ++slot) {
        if (present.order[slot] == 0) continue;
        present.order[slot] = static_cast<int32_t>(slots.size());
        slots.push_back(slot);
      }
    } else {
      for (; entry != end; ++entry) slots.push_back(entry->slot(shift));
      std::sort(slots.begin(), slots.end());
      slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
    }
    return present;
  };
  // How many rows come before those of a bucket.
  std::vector<int64_t> ranks(buckets.count() + 1);
  in_parallel(p.compact ? buckets.count() : 0, buckets.team(), [&](int64_t bucket) {
    ranks[bucket + 1] = static_cast<int64_t>(present_in(bucket).slots.size());
  });
  for (int64_t bucket = 0; bucket < buckets.count(); ++bucket) ranks[bucket + 1] += ranks[bucket];

  const TableRows<S> out = allocate(p.compact ? ranks.back() : p.table_rows);
  in_parallel(buckets.count(), buckets.team(), [&](int64_t bucket) {
    const int64_t first = bucket * bucket_rows;
    const int shift = layout.shift;
    int64_t rows = std::min(bucket_rows, p.table_rows - first), start = first;
    Present present;
    if (p.compact) {
      present = present_in(bucket);
      rows = static_cast<int64_t>(present.slots.size()), start = ranks[bucket];
      for (int64_t k = 0; k < rows; ++k) out.ids[start + k] = first + present.slots[k];
    }
    std::unique_ptr<T[]> own;
    T* sums;
    if constexpr (std::is_same_v<T, S>) {
      sums = out.values + start * dim;
    } else {
      own.reset(new T[rows * dim]);
      sums = own.get();
    }
    std::fill_n(sums, rows * dim, T(0));
    const Entry<T, I>* end = buckets.end(bucket);
    for (const Entry<T, I>* entry = buckets.begin(bucket); entry != end; ++entry) {
      if (end - entry > kAhead) prefetch(p.source + entry[kAhead].row(shift) * dim, dim);
      const int64_t slot = entry->slot(shift);
      T* sum = sums + (p.compact ? present.of(slot) : slot) * dim;
      add_to_arranged(entry->coefficient, p.source + entry->row(shift) * dim, dim, sum);
    }
    if constexpr (!std::is_same_v<T, S>) {
      S* to = out.values + start * dim;
      for (int64_t row = 0; row < rows; ++row)
        round_arranged(sums + row * dim, dim, to + row * dim);
    }
  });
}

}  // namespace

template <typename T, typename S>
void table_gradient_cpu(const TableGradient<T, S>& p, int threads,
                        const std::function<TableRows<S>(int64_t)>& allocate) {
  const Layout layout(p, threads);
  if (p.rows <= int64_t(std::numeric_limits<uint32_t>::max()) >> layout.shift) {
    sum_by_id<T, S, uint32_t>(p, layout, allocate);
  } else {
    sum_by_id<T, S, uint64_t>(p, layout, allocate);
  }
}

template void table_gradient_cpu(const TableGradient<float, float>&, int,
                                 const std::function<TableRows<float>(int64_t)>&);
template void table_gradient_cpu(const TableGradient<float, BFloat16>&, int,
                                 const std::function<TableRows<BFloat16>(int64_t)>&);
template void table_gradient_cpu(const TableGradient<float, Float16>&, int,
                                 const std::function<TableRows<Float16>(int64_t)>&);
template void table_gradient_cpu(const TableGradient<double, double>&, int,
                                 const std::function<TableRows<double>(int64_t)>&);

}  // namespace dwl
