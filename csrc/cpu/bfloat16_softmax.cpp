// The CPU kernel of shared candidates in bfloat16. What sampled_softmax.cpp says of blocks, parts
// and references holds here; products multiply bfloat16 and sum in float32, everything between them
// is float32. A tile lies the other way round, a candidate per line and the rows of the block side
// by side, so that each operand is one that the products take as it is:
//
//   S^T  [n, b]  = C [n, D] q^T [D, b]       C is the input itself, q^T made once per block
//   dq^T [D, b] += C^T [D, n] e^T [n, b]     C^T made once per call
//   dc   [n, D] += e^T [n, b] q' [b, D]      q' = diag(a / (tau total)) q, straight in the output
//
// and the maxima and sums of the rows stand side by side in vectors. e^T is rounded to bfloat16
// twice where it is made: in pairs of candidates, as the second operand of a product, for one tile;
// in lines, as the first, for the block. The reference follows the largest logit only where that is
// kSlack above it, so that it rarely moves: dq^T and q' stay as they are when it does not.

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "../bfloat16_products.h"
#include "block_kernel.h"

namespace dwl {
namespace {

// Tiles and blocks are padded to multiples of the grain: every other shape of a product would have
// to be compiled.
constexpr Cut kCut{.tile = 256, .most_rows = 128, .least_rows = 64, .blocks = 16, .grain = 32};
constexpr float kSlack =
    4;  // nats: more would cost the scales of the rows digits when they are tiny

int64_t padded(int64_t count) {
  return (count + kCut.grain - 1) / kCut.grain * kCut.grain;
}

// The upper half is the number rounded to bfloat16, to nearest, ties to even.
inline uint32_t rounded(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
}
inline uint32_t pair(uint32_t first, uint32_t second) {
  return first >> 16 | (second & 0xffff0000);
}

// Two lines of n floats to bfloat16: in pairs, and each for itself. n is a multiple of the grain.
void round_lines(const float* a, const float* b, int64_t n, uint32_t* pairs, BFloat16* to_a,
                 BFloat16* to_b) {
#pragma omp simd
  for (int64_t r = 0; r < n; ++r) {
    const uint32_t first = rounded(a[r]), second = rounded(b[r]);
    pairs[r] = pair(first, second);
    to_a[r].bits = static_cast<uint16_t>(first >> 16);
    to_b[r].bits = static_cast<uint16_t>(second >> 16);
  }
}

#ifdef __AVX512BW__
// The same by an instruction made for it, a third of the work.
__attribute__((target("avx512bf16"))) void round_lines_at_once(const float* a, const float* b,
                                                               int64_t n, uint32_t* pairs,
                                                               BFloat16* to_a, BFloat16* to_b) {
  alignas(64) uint16_t order[32];
  for (uint16_t k = 0; k < 16; ++k) order[2 * k] = k, order[2 * k + 1] = 16 + k;
  const __m512i pairing = _mm512_load_si512(order);
  for (int64_t r = 0; r < n; r += 16) {
    const auto both =
        std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(b + r), _mm512_loadu_ps(a + r)));
    _mm512_storeu_si512(pairs + r, _mm512_permutexvar_epi16(pairing, both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_a + r), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_b + r), _mm512_extracti64x4_epi64(both, 1));
  }
}
const auto best_round_lines =
    __builtin_cpu_supports("avx512bf16") ? round_lines_at_once : round_lines;
#else
const auto best_round_lines = round_lines;
#endif

struct Lanes {  // [b] of the rows of a block
  Buffer<float> high, low, shift, top, sum, scale, e0, e1;
  void allocate(int64_t size) {
    for (Buffer<float>* one : {&high, &low, &shift, &top, &sum, &scale, &e0, &e1}) {
      *one = buffer<float>(size);
    }
  }
};

struct NarrowWorker : Worker<float> {
  Lanes lanes;
  std::vector<char> has_nan;       // [b] whether some e is NaN
  Buffer<float> s;                 // [tile, b]
  Buffer<BFloat16> e;              // [tiles, tile, b], or of one tile
  Buffer<uint32_t> pairs;          // [tile / 2, b] e of two candidates
  Buffer<uint32_t> query, scaled;  // [D / 2, b] of two dimensions; [b / 2, D] of two rows
  Buffer<float> dq;                // [D, b]
  Buffer<BFloat16> edge;           // [tile, D] of candidates and padding, where they end in a tile
  Buffer<float> d_edge;            // its gradient
};

class NarrowKernel : public BlockKernel<float, BFloat16, NarrowWorker> {
  using Part = NarrowWorker;

 public:
  NarrowKernel(const Problem<float, BFloat16>& p, const Gradients<float>& out, int threads)
      : BlockKernel(p, out, threads, kCut),
        lanes_(padded(team_.block())),
        transposed_(buffer<BFloat16>(out.query == nullptr ? 0 : p.dim * padded(p.candidates))),
        zeros_(buffer<BFloat16>(p.dim)) {
    std::fill_n(zeros_.get(), p.dim, BFloat16{});
    for (Part& w : team_.workers()) {
      w.lanes.allocate(lanes_);
      w.has_nan.resize(lanes_);
      w.s = buffer<float>(w.tile * lanes_);
      const int64_t kept = candidate_gradient_ ? w.tiles : std::min<int64_t>(w.tiles, 1);
      w.e = buffer<BFloat16>(kept * w.tile * lanes_);
      w.pairs = buffer<uint32_t>(w.tile / 2 * lanes_);
      w.query = buffer<uint32_t>(p.dim / 2 * lanes_);
      w.scaled = buffer<uint32_t>(lanes_ / 2 * p.dim);
      w.dq = buffer<float>(p.dim * lanes_);
      if ((w.last - w.first) % kCut.grain == 0) continue;
      w.edge = buffer<BFloat16>(w.tile * p.dim);
      w.d_edge = buffer<float>(w.tile * p.dim);
    }
  }

 private:
  void enter(Part& w) override;
  void leave(Part&) override { release_bfloat16_products(); }
  void exponentials(Part& w, int64_t round) override;
  void products(Part& w, int64_t round) override;
  void begin_block(Part& w, int64_t round);
  void logits(Part& w, int64_t j0, int64_t j1);
  void move_references(Part& w, int64_t round, int64_t tile);
  void round_exponentials(Part& w, int64_t j0, int64_t width, BFloat16* e);
  void look_at_sums(Part& w, int64_t width, float* reference);
  void scale_queries(Part& w);
  void add_d_log_q(Part& w, int64_t j0, int64_t width, const BFloat16* e);

  // Candidates [j0, j1), with padding where they end.
  const BFloat16* candidates(const Part& w, int64_t j0, int64_t j1) const {
    return (j1 - j0) % kCut.grain == 0 ? p_.candidate + j0 * p_.dim : w.edge.get();
  }
  BFloat16* e_of(Part& w, int64_t tile) {  // [width, b]
    return w.e.get() + (candidate_gradient_ ? tile * w.tile * lanes_ : 0);
  }

  const int64_t lanes_;          // rows of a block with padding
  Buffer<BFloat16> transposed_;  // by tiles, [D, width] each
  Buffer<BFloat16> zeros_;       // [D]
};

// The groups share the transposed candidates, and the work.
void NarrowKernel::enter(Part& w) {
  const int64_t d = p_.dim;
  int64_t tile = 0;
  for (int64_t j0 = w.first; j0 < w.last; j0 += w.tile, ++tile) {
    const int64_t j1 = std::min(j0 + w.tile, w.last), width = padded(j1 - j0);
    if (width != j1 - j0) {
      std::copy_n(p_.candidate + j0 * d, (j1 - j0) * d, w.edge.get());
      std::fill_n(w.edge.get() + (j1 - j0) * d, (width - (j1 - j0)) * d, BFloat16{});
    }
    if (out_.query == nullptr || tile % team_.groups() != w.group) continue;
    const BFloat16* from = candidates(w, j0, j1);
    BFloat16* to = transposed_.get() + j0 * d;
    for (int64_t k = 0; k < d; ++k, to += width) {
      for (int64_t j = 0; j < width; ++j) to[j] = from[j * d + k];
    }
  }
}

void NarrowKernel::begin_block(Part& w, int64_t round) {
  const int64_t rows = static_cast<int64_t>(w.row.size()), d = p_.dim;
  Report<float>& report = w.report(round);
  Lanes& lanes = w.lanes;
  for (int64_t r = 0; r < lanes_; ++r) {
    const bool is_row = r < rows;
    w.has_nan[r] = false;
    lanes.high[r] = is_row ? w.rows[r].inverse.high : 0;
    // Never 0, which times the -inf of a pair that does not compete were NaN.
    lanes.low[r] = std::max(is_row ? w.rows[r].inverse.low : 0, std::numeric_limits<float>::min());
    lanes.shift[r] = !is_row ? -kInfinity<float> : p_.shift != nullptr ? p_.shift[w.row[r]] : 0;
    const BFloat16* query = p_.query + (is_row ? w.row[r] * d : 0);
    for (int64_t k = 0; k < d / 2; ++k) {
      const uint32_t two = query[2 * k].bits | uint32_t(query[2 * k + 1].bits) << 16;
      w.query[k * lanes_ + r] = is_row ? two : 0;
    }
    if (!is_row) continue;
    report.m[r] = p_.refined ? -kInfinity<float> : w.rows[r].z_positive;
    report.sum[r] = 0;
  }
  std::fill_n(w.dq.get(), d * lanes_, 0.0f);
}

// s = the logits of the block with candidates [j0, j1), -inf where one is excluded, and their
// maxima, which do not see NaN.
void NarrowKernel::logits(Part& w, int64_t j0, int64_t j1) {
  const int64_t n = lanes_, width = padded(j1 - j0);
  float* const s = w.s.get();
  bfloat16_product(width, n, p_.dim, candidates(w, j0, j1), p_.dim, w.query.get(), n, s, n, false);
  exclude_pairs(w, j0, j1, [&](size_t r, int64_t j) { s[(j - j0) * n + r] = -kInfinity<float>; });
  std::fill_n(s + (j1 - j0) * n, (width - (j1 - j0)) * n, -kInfinity<float>);
  const float *high = w.lanes.high.get(), *low = w.lanes.low.get(), *shift = w.lanes.shift.get();
  float* top = w.lanes.top.get();
  std::fill_n(top, n, -kInfinity<float>);
  for (int64_t j = 0; j < width; j += 4) {
    float *s0 = s + j * n, *s1 = s0 + n, *s2 = s1 + n, *s3 = s2 + n, bias[4] = {};
    for (int64_t k = 0; k < 4 && !bias_.empty() && j0 + j + k < j1; ++k) {
      bias[k] = bias_[j0 + j + k];
      if (!std::isinf(bias[k])) continue;
      // What does not compete stays out: -inf + inf were NaN.
      float* line = s0 + k * n;
      for (int64_t r = 0; r < n; ++r) {
        const bool out = bias[k] < 0 || line[r] == -kInfinity<float>;
        line[r] = out ? -kInfinity<float> : line[r] + bias[k];
      }
      bias[k] = 0;
    }
#pragma omp simd
    for (int64_t r = 0; r < n; ++r) {
      const float z0 = s0[r] * high[r] + (s0[r] * low[r] + (bias[0] + shift[r]));
      const float z1 = s1[r] * high[r] + (s1[r] * low[r] + (bias[1] + shift[r]));
      const float z2 = s2[r] * high[r] + (s2[r] * low[r] + (bias[2] + shift[r]));
      const float z3 = s3[r] * high[r] + (s3[r] * low[r] + (bias[3] + shift[r]));
      const float first = z0 > z1 ? z0 : z1, second = z2 > z3 ? z2 : z3;
      const float most = first > second ? first : second;
      s0[r] = z0, s1[r] = z1, s2[r] = z2, s3[r] = z3;
      top[r] = most > top[r] ? most : top[r];
    }
  }
}

// The references of a tile: those of the one before, moved where a logit is far above them. The
// sums and dq move along.
void NarrowKernel::move_references(Part& w, int64_t round, int64_t tile) {
  const int64_t rows = static_cast<int64_t>(w.row.size());
  Report<float>& report = w.report(round);
  float* factor = w.lanes.scale.get();
  std::fill_n(factor, lanes_, 1.0f);
  bool moves = false;
  for (int64_t r = 0; r < rows; ++r) {
    const float before = report.m[r], top = w.lanes.top[r];
    if (top > before + kSlack) {
      report.m[r] = top;
      factor[r] = between(before, top);
      report.sum[r] *= factor[r];
      moves = true;
    }
    team_.reference(w, tile)[r] = report.m[r];
  }
  for (int64_t k = 0; k < p_.dim && moves && tile > 0; ++k) {
    float* dq = w.dq.get() + k * lanes_;
#pragma omp simd
    for (int64_t r = 0; r < lanes_; ++r) dq[r] *= factor[r];
  }
}

// e of a tile, rounded, and the sums of the rows. Meanwhile the caches are asked for what the
// product that follows needs, and the tile after it: in one go that would have to be waited for.
void NarrowKernel::round_exponentials(Part& w, int64_t j0, int64_t width, BFloat16* e) {
  const int64_t n = lanes_, d = p_.dim, next = std::min(j0 + w.tile, w.last);
  float *sum = w.lanes.sum.get(), *e0 = w.lanes.e0.get(), *e1 = w.lanes.e1.get();
  const float* reference = w.lanes.top.get();
  std::fill_n(sum, n, 0.0f);
  for (int64_t j = 0; j < width; j += 2) {
    const float *z0 = w.s.get() + j * n, *z1 = z0 + n;
    if (out_.query != nullptr) prefetch(transposed_.get() + (j0 + j) * d, 2 * d);
    const int64_t left = std::min<int64_t>(w.last - next - j, 2);
    if (left > 0) prefetch(p_.candidate + (next + j) * d, left * d);
#pragma omp simd
    for (int64_t r = 0; r < n; ++r) {
      e0[r] = exp_below_one(z0[r] - reference[r]);
      e1[r] = exp_below_one(z1[r] - reference[r]);
      sum[r] += e0[r] + e1[r];
    }
    best_round_lines(e0, e1, n, w.pairs.get() + j / 2 * n, e + j * n, e + (j + 1) * n);
  }
}

// Where a sum is NaN, so may be a logit, and then the reference has to be.
void NarrowKernel::look_at_sums(Part& w, int64_t width, float* reference) {
  for (int64_t r = 0; r < lanes_; ++r) {
    if (std::isfinite(w.lanes.sum[r])) continue;
    w.has_nan[r] = true;
    const bool is_row = r < static_cast<int64_t>(w.row.size());
    for (int64_t j = 0; j < width && is_row; ++j) {
      const float z = w.s[j * lanes_ + r];
      if (z != z) reference[r] = z;
    }
  }
}

void NarrowKernel::exponentials(Part& w, int64_t round) {
  const int64_t rows = static_cast<int64_t>(w.row.size()), d = p_.dim, n = lanes_;
  Report<float>& report = w.report(round);
  begin_block(w, round);
  team_.for_tiles(w, [&](int64_t j0, int64_t j1, int64_t tile) {
    const int64_t width = padded(j1 - j0);
    logits(w, j0, j1);
    move_references(w, round, tile);
    std::fill_n(w.lanes.top.get(), n, 0.0f);
    float* reference = team_.reference(w, tile);
    for (int64_t r = 0; r < rows; ++r) w.lanes.top[r] = finite_reference(reference[r]);
    round_exponentials(w, j0, width, e_of(w, tile));
    look_at_sums(w, width, reference);
    for (int64_t r = 0; r < rows; ++r) {
      report.m[r] = reference[r];
      report.sum[r] += w.lanes.sum[r];
    }
    if (out_.query == nullptr) return;
    bfloat16_product(d, n, width, transposed_.get() + j0 * d, width, w.pairs.get(), n, w.dq.get(),
                     n, true);
  });
  constexpr int64_t kLine = 16;  // numbers in a cache line
  for (int64_t r0 = 0; r0 < rows && out_.query != nullptr; r0 += kLine) {
    for (int64_t k = 0; k < d; ++k) {
      for (int64_t r = r0; r < std::min(r0 + kLine, rows); ++r) {
        report.dq[r * d + k] = w.dq[k * n + r];
      }
    }
  }
}

// scaled = the queries of the block times their scales, in pairs of rows. Zeros where a scale is 0,
// whatever the query holds.
void NarrowKernel::scale_queries(Part& w) {
  const int64_t d = p_.dim;
  for (int64_t r = 0; r < lanes_; r += 2) {
    const float first = w.lanes.scale[r], second = w.lanes.scale[r + 1];
    const BFloat16* a = first == 0 ? zeros_.get() : p_.query + w.row[r] * d;
    const BFloat16* b = second == 0 ? zeros_.get() : p_.query + w.row[r + 1] * d;
    uint32_t* to = w.scaled.get() + r / 2 * d;
#pragma omp simd
    for (int64_t k = 0; k < d; ++k) {
      to[k] = pair(rounded(first * float(a[k])), rounded(second * float(b[k])));
    }
  }
}

void NarrowKernel::products(Part& w, int64_t) {
  const int64_t rows = static_cast<int64_t>(w.row.size()), d = p_.dim, n = lanes_;
  float *dc = dc_of(w.group), *scale = w.lanes.scale.get();
  std::fill_n(scale, n, 0.0f);
  team_.for_tiles(w, [&](int64_t j0, int64_t j1, int64_t tile) {
    const int64_t width = padded(j1 - j0);
    const float* m = team_.reference(w, tile);
    BFloat16* e = e_of(w, tile);
    bool changed = tile == 0;
    for (int64_t r = 0; r < n; ++r) {
      const bool weighs = r < rows && w.results[r].scale != 0;  // else 0 times NaN were NaN
      const float now = weighs ? w.results[r].scale * between(m[r], w.m[r]) : 0;
      changed |= now != scale[r];
      scale[r] = now;
      for (int64_t j = 0; j < width && w.has_nan[r] && !weighs; ++j) e[j * n + r] = BFloat16{};
    }
    add_d_log_q(w, j0, j1 - j0, e);
    if (dc == nullptr) return;
    if (changed) scale_queries(w);
    // What the next tile needs comes from another cache, and a product does not look ahead.
    const int64_t next = std::min(j1 + w.tile, w.last) - j1;
    prefetch(dc + j1 * d, next * d);
    prefetch(e + w.tile * n, next * n);
    const bool whole = width == j1 - j0;
    bfloat16_product(width, d, n, e, n, w.scaled.get(), d, whole ? dc + j0 * d : w.d_edge.get(), d,
                     whole);
    if (!whole) add_scaled(1.0f, w.d_edge.get(), (j1 - j0) * d, dc + j0 * d);
  });
}

void NarrowKernel::add_d_log_q(Part& w, int64_t j0, int64_t width, const BFloat16* e) {
  float *d_log_q = d_log_q_of(w.group), *by = w.lanes.top.get();
  if (d_log_q == nullptr) return;
  std::fill_n(by, lanes_, 0.0f);
  for (size_t r = 0; r < w.row.size(); ++r) by[r] = w.lanes.scale[r] * w.rows[r].tau;
  for (int64_t j = 0; j < width; ++j, e += lanes_) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t r = 0; r < lanes_; ++r) sum += by[r] * static_cast<float>(e[r]);
    d_log_q[j0 + j] -= sum;
  }
}

}  // namespace

void sampled_softmax_bfloat16(const Problem<float, BFloat16>& problem,
                              const Gradients<float>& gradients, int threads) {
  NarrowKernel(problem, gradients, threads).run();
}

}  // namespace dwl
