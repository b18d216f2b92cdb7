// What a block of the CUDA kernel owns: the numbers of a row, the shape of its tiles, and what lies
// in shared memory. `Program` and all phases are written over a `Shape`.
#pragma once

#include <type_traits>

#include "fragments.cuh"

namespace dwl {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kLimit = 0x1p100f;   // of a row's total: above, its reference was too low
constexpr float kRaise = 64;         // of a reference, in powers of two: 44 nats
constexpr float kExactly = 0x1p16f;  // a reference moves by less in whole powers of two
constexpr int64_t kNoItem = -1;      // the id of a row whose positive is no item
// A reference must not be infinite: inf - inf is NaN.
template <class Number>
constexpr Number kFinite = sizeof(Number) == 8 ? Number(1.7e308) : Number(3.4e38);
constexpr int kHeadroom = 14;  // float16 ends at 2^16: terms start at 2^14 there

// What phase 1 leaves to phase 2 of each row; it streams beside the embeddings.
template <class Number>
struct alignas(16) RowNumbers {
  Number scale, statistic, coefficient, positive;
};

// Numbers [BM] of a part, before the sums.
enum PartArray { kReference, kTotal, kHits, kZPositive, kNumPartArrays };
enum Integers { kId, kOwn, kNumIntegers };

// A block of WARPS warps owns BM rows of one side; BN of the other side pass at a time. Each team
// of TEAM warps owns 16 MT rows: a warp computes a part of their logits, COLUMNS of each block that
// passes, and sums a part of the columns of the embeddings, SUM_D, for which the warps of a team
// exchange their logits. Rows of shared memory are PAD elements longer than BLOCK_D: 8 avoid
// bank conflicts.
template <class Math, int BLOCK_D_, int BN_, int MT_, int WARPS_, int TEAM_, int PAD>
struct Shape {
  using M = Math;
  static constexpr int BLOCK_D = BLOCK_D_, BN = BN_, MT = MT_, WARPS = WARPS_, TEAM = TEAM_;
  static constexpr int THREADS = 32 * WARPS, BM = 16 * MT * WARPS / TEAM, STRIDE = BLOCK_D + PAD;
  static constexpr int COLUMNS = BN / TEAM, SUM_D = BLOCK_D / TEAM;
  // Columns whose sums fit the registers; wider float64 embeddings take several passes.
  static constexpr bool WIDE = sizeof(typename M::Number) == 8 && BLOCK_D > 96;
  static constexpr int ACC_D = !WIDE ? SUM_D : BLOCK_D % 96 == 0 ? 96 : 64;
  // What a block leaves of a tile, or of its part: four numbers and the sums of each row.
  static constexpr int PART = BM * (BLOCK_D + kNumPartArrays);
  static_assert(BLOCK_D % 16 == 0 && SUM_D % ACC_D == 0 && ACC_D % 16 == 0 && COLUMNS % 16 == 0);
  static_assert(WARPS % TEAM == 0);

  struct Alone {};
  struct alignas(16) Exchange {
    typename M::A exchanged[WARPS / TEAM][BN / M::K][MT][32];  // what `next_a` made
    typename M::Number joined[TEAM][BM];
  };

  struct alignas(16) Shared : std::conditional_t<TEAM == 1, Alone, Exchange> {
    typename M::Element owned[BM * STRIDE];
    typename M::Element streamed[2][BN * STRIDE];
    RowNumbers<typename M::Number> rows[2][BN];
    typename M::Number log_q[2][BN];
    int64_t integers[2][kNumIntegers][BN];
    typename M::Number z_positive[BM];
    int64_t id[BM];  // of the owned rows
    int own[BM];     // rows: the place of the positive, -1 for none
  };
};

}  // namespace dwl
