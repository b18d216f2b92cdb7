// How the threads of a call share rows and candidates. A worker has a part of the candidates, which
// it takes in tiles, and with the others of its group a range of rows, taken in blocks. All groups
// have the same number of blocks, so that everybody waits for everybody by one barrier.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "ahead.h"
#include "row.h"

namespace dwl {

// How a kernel cuts its problem. e of a block has to be small beside the logits of the problem, 3%
// of them in float32: so where rows are few, blocks are shorter.
struct Cut {
  int64_t tile;        // candidates at once, at most
  int64_t most_rows;   // of a block
  int64_t least_rows;  // of a block, where there are so many
  int64_t blocks;      // at least, where that leaves them as many rows
  int64_t grain;       // tiles and parts are multiples of so many candidates
};

constexpr int64_t kPart = 1024;  // candidates that are worth a thread of their own
constexpr int64_t kNoItem = -1;  // the id of what is no item: it is nobody's hit

// Uninitialised memory from a cache line on: a product is bitwise the same from run to run only
// where its matrices are aligned alike.
struct FreeAligned {
  template <typename T>
  void operator()(T* memory) const {
    ::operator delete[](memory, std::align_val_t{64});
  }
};
template <typename T>
using Buffer = std::unique_ptr<T[], FreeAligned>;
template <typename T>
Buffer<T> buffer(int64_t size) {
  return Buffer<T>(new (std::align_val_t{64}) T[size]);
}

// Candidates by id: entries in buckets by a hash of the id, in the order of the candidates.
class IdIndex {
 public:
  struct Entry {
    int64_t id, candidate;
  };
  // What follows of a bucket; visit() advances it.
  struct Hits {
    const Entry *next, *end;
  };

  IdIndex(const int64_t* ids, int64_t n) {
    if (ids == nullptr) return;
    bits_ = std::max(1, static_cast<int>(std::bit_width(static_cast<uint64_t>(n))));
    starts_.resize((size_t(1) << bits_) + 1);
    for (int64_t j = 0; j < n; ++j) starts_[bucket(ids[j]) + 1] += ids[j] != kNoItem;
    for (size_t k = 1; k < starts_.size(); ++k) starts_[k] += starts_[k - 1];
    entries_.resize(starts_.back());
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t j = 0; j < n; ++j) {
      if (ids[j] != kNoItem) entries_[next[bucket(ids[j])]++] = {ids[j], j};
    }
  }
  // Where the candidates of this id are, from candidate `first` on; others lie between them.
  Hits find(int64_t id, int64_t first) const {
    if (entries_.empty()) return {};
    const size_t k = bucket(id);
    const Entry *begin = entries_.data() + starts_[k], *end = entries_.data() + starts_[k + 1];
    return {std::lower_bound(begin, end, first,
                             [](const Entry& entry, int64_t j) { return entry.candidate < j; }),
            end};
  }
  // Calls take(candidate) for the hits before candidate `last`.
  template <typename Take>
  static void visit(Hits& hits, int64_t id, int64_t last, Take take) {
    for (; hits.next != hits.end && hits.next->candidate < last; ++hits.next) {
      if (hits.next->id == id) take(hits.next->candidate);
    }
  }

 private:
  size_t bucket(int64_t id) const {
    return (static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> (64 - bits_);
  }

  int bits_ = 1;
  std::vector<int64_t> starts_;
  std::vector<Entry> entries_;
};

// The rows of a problem that are no padding.
template <typename Problem>
std::vector<int64_t> active_rows(const Problem& p) {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (p.is_active(i)) rows.push_back(i);
  }
  return rows;
}

// What a worker tells the others of its group about a block of rows.
template <typename T>
struct Report {
  std::vector<T> m;            // [b] largest logits of its candidates, and of the positive
  std::vector<double> sum;     // [b] of e over its candidates, with the reference m
  std::vector<int64_t> ahead;  // [b] how many of its candidates are not below the positive
  Buffer<T> dq;                // [b, D] e c over its candidates, with the reference m
};

// What a kernel has beside this it adds, and allocates before its threads start.
template <typename T>
struct Worker {
  int group, part;
  int64_t first, last;                // its candidates
  int64_t tile;                       // at most so many at once
  int64_t tiles;                      // how many that makes
  std::vector<int64_t> row;           // [b] the rows of the block
  std::vector<Row<T>> rows;           // [b]
  std::vector<Mark<T>> marks;         // [b] of their positives, where ranks are wanted
  std::vector<T> m;                   // [b] largest logits of all
  std::vector<RowResult<T>> results;  // [b]
  std::vector<T> reference;           // [tiles, b] what e is relative to
  // By turns, so that a worker may begin a block before the others have read the last report.
  Report<T> reports[2];

  // [b] those to come, of each kind of ids.
  std::vector<IdIndex::Hits> hits[2];

  Report<T>& report(int64_t round) { return reports[round % 2]; }
  const Report<T>& report(int64_t round) const { return reports[round % 2]; }
};

// W is the kernel's Worker<T>.
template <typename T, typename W>
class Team {
 public:
  // Everything is allocated here, because an exception must not leave a parallel region.
  Team(std::vector<int64_t> rows, int64_t candidates, int64_t dim, int threads, Cut cut, bool dq)
      : rows_(std::move(rows)) {
    const int64_t num_rows = static_cast<int64_t>(rows_.size());
    parts_ = static_cast<int>(std::clamp<int64_t>(candidates / kPart, 1, threads));
    while (threads % parts_ != 0) --parts_;
    groups_ = static_cast<int>(std::clamp<int64_t>(num_rows / 16, 1, threads / parts_));
    const int64_t most = std::clamp<int64_t>(num_rows / cut.blocks, cut.least_rows, cut.most_rows);
    const int64_t group_rows = (num_rows + groups_ - 1) / groups_;
    rounds_ = (group_rows + most - 1) / most;
    block_ = rounds_ == 0 ? 0 : (group_rows + rounds_ - 1) / rounds_;
    workers_.resize(groups_ * parts_);
    for (int k = 0; k < size(); ++k) {
      W& w = workers_[k];
      w.group = k / parts_;
      w.part = k % parts_;
      const auto bound = [&](int64_t part) {
        return part == parts_ ? candidates : candidates * part / parts_ / cut.grain * cut.grain;
      };
      w.first = bound(w.part);
      w.last = bound(w.part + 1);
      w.tiles = (w.last - w.first + cut.tile - 1) / cut.tile;
      // Of about equal size.
      const int64_t even = w.tiles == 0 ? 0 : (w.last - w.first + w.tiles - 1) / w.tiles;
      w.tile = (even + cut.grain - 1) / cut.grain * cut.grain;
      w.reference.resize(w.tiles * block_);
      w.row.reserve(block_);
      w.rows.resize(block_);
      w.marks.resize(block_);
      w.m.resize(block_);
      for (auto& hits : w.hits) hits.resize(block_);
      w.results.resize(block_);
      for (Report<T>& report : w.reports) {
        report.m.resize(block_);
        report.sum.resize(block_);
        report.ahead.resize(block_);
        if (dq) report.dq = buffer<T>(block_ * dim);
      }
    }
  }

  int size() const { return groups_ * parts_; }
  int parts() const { return parts_; }
  int groups() const { return groups_; }
  int64_t rounds() const { return rounds_; }
  int64_t block() const { return block_; }
  const std::vector<int64_t>& rows() const { return rows_; }
  std::vector<W>& workers() { return workers_; }
  W& mate(const W& w, int part) { return workers_[w.group * parts_ + part]; }

  // Runs a phase on all workers; inside a parallel region. A team of threads may come out smaller
  // than asked for: the workers are dealt out, not assumed. Each stays with its thread, so nobody
  // waits here.
  template <typename Phase>
  void each(Phase phase) {
    const int team = size();
#pragma omp for schedule(static, 1) nowait
    for (int k = 0; k < team; ++k) phase(workers_[k]);
  }

  void take_block(W& w, int64_t round) {
    const int64_t num_rows = static_cast<int64_t>(rows_.size());
    const int64_t start = num_rows * w.group / groups_;
    const int64_t count = num_rows * (w.group + 1) / groups_ - start;
    w.row.assign(rows_.begin() + start + count * round / rounds_,
                 rows_.begin() + start + count * (round + 1) / rounds_);
  }

  // Calls visit(first candidate, past the last one, tile) for the tiles of a worker.
  template <typename Visit>
  void for_tiles(W& w, Visit visit) {
    if (w.row.empty()) return;
    int64_t tile = 0;
    for (int64_t j = w.first; j < w.last; j += w.tile, ++tile) {
      visit(j, std::min(j + w.tile, w.last), tile);
    }
  }

  // [b] what e of a tile is relative to, in each row.
  T* reference(W& w, int64_t tile) { return w.reference.data() + tile * block_; }

 private:
  std::vector<int64_t> rows_;  // the active ones
  int parts_, groups_;         // of the candidates, of the rows
  int64_t rounds_, block_;     // blocks that a group takes, rows of the longest
  std::vector<W> workers_;     // [groups, parts]
};

}  // namespace dwl
