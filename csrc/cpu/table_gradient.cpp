// The gradient of a table: a row's is the sum, over the places where it was drawn, of coefficient
// times query. The places are listed as entries, sorted by id with a stable radix sort, and cut
// into ranges of whole ids, one per thread. A thread sums an id's entries in their order and writes
// the row once: no atomics, no order that changes from run to run.

#include <algorithm>
#include <bit>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "../per_row_softmax.h"
#include "row.h"

namespace dwl {
namespace {

constexpr int64_t kAhead = 8;  // entries between the fetch of a source row and its use

// I is 32 bits wide where that holds all ids and rows: the entries are what the sort moves.
template <typename T, typename I>
struct Entry {
  I id;
  I row;  // of the source
  T coefficient;
};

template <typename Work>
void in_parallel(int team, const Work& work) {
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int part = 0; part < team; ++part) work(part);
}

// Turns counts [team, buckets] into the places where each thread's first entry of a bucket goes.
void to_offsets(std::vector<int64_t>& counts, int team, int64_t buckets) {
  int64_t sum = 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    for (int part = 0; part < team; ++part) {
      sum += std::exchange(counts[part * buckets + bucket], sum);
    }
  }
}

template <typename T, typename I>
class Entries {
 public:
  Entries(const TableGradient<T>& p, int threads) {
    int64_t most = 0;
    for (int k = 0; k < p.num_pieces; ++k) most += p.rows * p.pieces[k].width;
    team_ = static_cast<int>(std::clamp<int64_t>(most / 4096, 1, threads));
    // Twice through the places: how many of each piece a thread has, then where they go.
    std::vector<int64_t> starts(size_t(team_) * p.num_pieces);
    const auto visit = [&](int part, int k, const auto& take) {
      const Places<T>& piece = p.pieces[k];
      for (int64_t r = p.rows * part / team_; r < p.rows * (part + 1) / team_; ++r) {
        for (int64_t at = r * piece.width; at < (r + 1) * piece.width; ++at) {
          const T coefficient = piece.coefficient != nullptr ? piece.coefficient[at] : T(1);
          const int64_t id = piece.ids[at];
          if (coefficient == 0 || id < 0 || id >= p.table_rows) continue;
          take(Entry<T, I>{static_cast<I>(id), static_cast<I>(r), coefficient});
        }
      }
    };
    in_parallel(team_, [&](int part) {
      for (int k = 0; k < p.num_pieces; ++k) {
        int64_t count = 0;
        visit(part, k, [&](const Entry<T, I>&) { ++count; });
        starts[part * p.num_pieces + k] = count;
      }
    });
    for (int64_t count : starts) size_ += count;
    to_offsets(starts, team_, p.num_pieces);
    entries_.reset(new Entry<T, I>[size_]);
    in_parallel(team_, [&](int part) {
      for (int k = 0; k < p.num_pieces; ++k) {
        Entry<T, I>* to = entries_.get() + starts[part * p.num_pieces + k];
        visit(part, k, [&](const Entry<T, I>& entry) { *to++ = entry; });
      }
    });
    team_ = static_cast<int>(std::clamp<int64_t>(size_ / 4096, 1, team_));
    sort(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(p.table_rows - 1, 0))));
  }

  int team() const { return team_; }
  int64_t size() const { return size_; }
  const Entry<T, I>& operator[](int64_t k) const { return entries_[k]; }

  // The first entry of a thread: about its share, but never in the middle of an id.
  int64_t first(int part) const {
    int64_t k = size_ * part / team_;
    while (k > 0 && k < size_ && entries_[k].id == entries_[k - 1].id) ++k;
    return k;
  }

 private:
  // Least significant digit first, each pass stable.
  void sort(int bits) {
    const int passes = (bits + 10) / 11;  // 2^11 streams of writes stay within the TLB
    if (passes == 0) return;
    const int width = (bits + passes - 1) / passes;
    const int64_t buckets = int64_t(1) << width;
    std::vector<int64_t> to(size_t(team_) * buckets);
    std::unique_ptr<Entry<T, I>[]> sorted(new Entry<T, I>[size_]);
    for (int pass = 0; pass < passes; ++pass) {
      std::fill(to.begin(), to.end(), 0);
      // Everything the inner loops use is their own: they write, and the compiler must not suspect
      // that they write to what they read.
      const auto visit = [this, shift = pass * width, mask = buckets - 1](int part, auto take) {
        const Entry<T, I>* entry = entries_.get() + size_ * part / team_;
        const Entry<T, I>* end = entries_.get() + size_ * (part + 1) / team_;
        const int by = shift;
        const int64_t digits = mask;
        for (; entry != end; ++entry) take(static_cast<int64_t>(entry->id >> by) & digits, *entry);
      };
      in_parallel(team_, [&](int part) {
        int64_t* count = to.data() + part * buckets;
        visit(part, [count](int64_t digit, const Entry<T, I>&) { ++count[digit]; });
      });
      to_offsets(to, team_, buckets);
      in_parallel(team_, [&](int part) {
        int64_t* place = to.data() + part * buckets;
        Entry<T, I>* target = sorted.get();
        visit(part, [place, target](int64_t digit, const Entry<T, I>& entry) {
          target[place[digit]++] = entry;
        });
      });
      std::swap(sorted, entries_);
    }
  }

  int team_ = 1;
  int64_t size_ = 0;
  std::unique_ptr<Entry<T, I>[]> entries_;
};

template <typename T, typename S, typename I>
void sum_by_id(const TableGradient<T>& p, int threads,
               const std::function<TableRows<S>(int64_t)>& allocate) {
  const Entries<T, I> entries(p, threads);
  const int team = entries.team();
  const int64_t size = entries.size(), dim = p.dim;
  const auto begins = [&](int64_t k) { return k == 0 || entries[k].id != entries[k - 1].id; };
  std::vector<int64_t> ranks(team + 1);  // how many ids come before a thread's
  in_parallel(team, [&](int part) {
    const int64_t last = entries.first(part + 1);
    for (int64_t k = entries.first(part); k < last; ++k) ranks[part + 1] += begins(k);
  });
  for (int part = 0; part < team; ++part) ranks[part + 1] += ranks[part];

  const TableRows<S> out = allocate(ranks[team]);
  const bool dense = !out.compact;
  std::unique_ptr<T[]> sums(new T[size_t(team) * dim]);
  in_parallel(team, [&](int part) {
    T* sum = sums.get() + part * dim;
    const int64_t last = entries.first(part + 1);
    int64_t k = entries.first(part), rank = ranks[part];
    // The dense rows of a thread start at its first id, those of the first thread at 0.
    int64_t row = k == 0 ? 0 : k < size ? int64_t(entries[k].id) : p.table_rows;
    while (k < last) {
      const int64_t id = entries[k].id;
      std::fill(sum, sum + dim, T(0));
      for (; k < last && entries[k].id == static_cast<I>(id); ++k) {
        if (k + kAhead < last) prefetch(p.source + int64_t(entries[k + kAhead].row) * dim, dim);
        const T coefficient = entries[k].coefficient;
        const T* source = p.source + int64_t(entries[k].row) * dim;
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) sum[d] += coefficient * source[d];
      }
      if (dense) std::fill(out.values + row * dim, out.values + id * dim, S{});
      S* to = out.values + (dense ? id : rank) * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<S>(sum[d]);
      if (!dense) out.ids[rank] = id;
      ++rank;
      row = id + 1;
    }
    const int64_t end = last < size ? int64_t(entries[last].id) : p.table_rows;
    if (dense && row < end) std::fill(out.values + row * dim, out.values + end * dim, S{});
  });
}

}  // namespace

template <typename T, typename S>
void table_gradient_cpu(const TableGradient<T>& p, int threads,
                        const std::function<TableRows<S>(int64_t)>& allocate) {
  constexpr int64_t kNarrow = std::numeric_limits<uint32_t>::max();
  if (p.table_rows <= kNarrow && p.rows <= kNarrow) {
    sum_by_id<T, S, uint32_t>(p, threads, allocate);
  } else {
    sum_by_id<T, S, int64_t>(p, threads, allocate);
  }
}

template void table_gradient_cpu(const TableGradient<float>&, int,
                                 const std::function<TableRows<float>(int64_t)>&);
template void table_gradient_cpu(const TableGradient<float>&, int,
                                 const std::function<TableRows<BFloat16>(int64_t)>&);
template void table_gradient_cpu(const TableGradient<double>&, int,
                                 const std::function<TableRows<double>(int64_t)>&);

}  // namespace dwl
