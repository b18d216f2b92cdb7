// What the kernels of shared candidates and of candidates per row share: one row of logits, from
// products to probabilities.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace dwl {

// While it lives, results of this thread that are too small for all their digits are 0. Some
// processors take a hundred times as long for them, and logits far apart make many.
class FlushToZero {
#ifdef __SSE__
 public:
  FlushToZero() { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
#else
 public:
  FlushToZero() {}  // not trivial, so that nobody finds it unused
#endif
};

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// e^x for x < 88 to one unit in the last place, in a form that compilers vectorise: x = n ln 2 + r,
// a polynomial for e^r times 2^n. 0 below -87, also for -inf; NaN stays NaN.
inline float exp_below_one(float x) {
  // 1.5 * 2^23 + 127: adding it rounds to an integer, and leaves the exponent bits of 2^n in front.
  constexpr float kRound = 12583039.0f;
  const float t = x * 1.44269504f + kRound;
  const float n = t - kRound;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.3814540026e-3f;
  p = p * r + 8.3687451126e-3f;
  p = p * r + 4.1668390787e-2f;
  p = p * r + 1.6666520399e-1f;
  p = p * r + 4.9999993432e-1f;
  p = p * r * r + r + 1.0f;
  const float power = std::bit_cast<float>(std::bit_cast<uint32_t>(t) << 23);
  return x < -87.0f ? 0.0f : p * power;
}
inline double exp_below_one(double x) {
  return std::exp(x);
}

template <typename T>
T larger(T a, T b) {  // NaN where one is
  return a > b || a != a ? a : b;
}

// The largest of n numbers, NaN where one is.
template <typename T>
T row_max(const T* s, int64_t n) {
  // As wide as T: compilers do not vectorise a bool beside it.
  std::conditional_t<sizeof(T) == 4, int32_t, int64_t> nan = 0;
  T top = -kInfinity<T>;
#pragma omp simd reduction(max : top) reduction(| : nan)
  for (int64_t j = 0; j < n; ++j) {
    top = s[j] > top ? s[j] : top;
    nan |= s[j] != s[j];
  }
  return nan ? std::numeric_limits<T>::quiet_NaN() : top;
}

// 1 / x in two terms, with which a product is as exact as a division. Neither is negative, so that
// an infinite factor stays infinite.
template <typename T>
struct Inverse {
  T high = 1, low = 0;
  Inverse() = default;
  explicit Inverse(T x) : high(T(1) / x) {
    const T less = high * (1 - std::numeric_limits<T>::epsilon());
    const T rest = std::fma(-less, x, T(1)) / x;
    if (std::isfinite(rest)) high = less, low = rest;
  }
};

// s <- s / tau + bias + shift, bias [n] or null. Logits are rounded here, before their maximum is
// subtracted: at 1e38 an exact product, as a fused instruction subtracts from, is far from it.
template <typename T>
void row_logits(T* s, Inverse<T> tau, const T* bias, T shift, int64_t n) {
  if (bias == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) s[j] = s[j] * tau.high + (s[j] * tau.low + shift);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      s[j] = s[j] * tau.high + (s[j] * tau.low + (bias[j] + shift));
    }
  }
}

// exp(z - m) of a row that is -inf throughout is 0, not NaN.
template <typename T>
T finite_reference(T m) {
  return m == -kInfinity<T> ? T(0) : m;
}

// z <- exp(z - m), which no z exceeds; returns the sum.
template <typename T>
T row_exp(T* z, T m, int64_t n) {
  const T reference = finite_reference(m);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    z[j] = exp_below_one(z[j] - reference);
    sum += z[j];
  }
  return sum;
}

// What exp(z - from) has to be multiplied by to be exp(z - to), where `to` is no smaller.
template <typename T>
T between(T from, T to) {
  return from == to ? T(1) : exp_below_one(from - to);
}

// Asks the caches for n numbers that are needed soon.
template <typename T>
void prefetch(const T* values, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(values);
  for (int64_t offset = 0; offset < n * int64_t(sizeof(T)); offset += 64) {
    __builtin_prefetch(bytes + offset);
  }
}

template <typename T, typename S>
T dot(const S* a, const S* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += static_cast<T>(a[k]) * static_cast<T>(b[k]);
  return sum;
}

// to += a x, nothing where a is 0, whatever x holds.
template <typename T, typename S>
void add_scaled(T a, const S* x, int64_t n, T* to) {
  if (a == 0) return;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) to[k] += a * static_cast<T>(x[k]);
}

// A row, beside its logits.
template <typename T>
struct Row {
  T tau;
  Inverse<T> inverse;       // 1 / tau
  T coefficient;            // a_i / r_i
  T z_positive;             // corrected by log-Q unless refined
  const T* positive_log_q;  // [1], or null
  int64_t count;            // n_i of the refined correction
  bool refined;
};

// What a row's logits say: the loss and the factors of its gradients.
template <typename T>
struct RowResult {
  T loss;      // r_i l_i
  T total;     // sum_i of e, with that of the positive where it competes
  T scale;     // a_i / (tau_i sum_i): times e_ij it is dL/ds_ij
  T positive;  // dL/dz_i+ / tau_i
  T log_sum_exp;
  T log_probability;
};

// The result of a row with e_j = exp(z_j - m) of its candidates, and their sum. No candidate's
// logit exceeds m, nor does the positive's where it competes; where one is NaN, m is. Where the
// result has `scale` 0, as for a row of weight zero, e has to be taken as 0 too: it may be NaN.
template <typename T>
RowResult<T> finish_row(const Row<T>& row, T m, double sum) {
  const double z_positive = row.z_positive, top = m;
  double a = row.coefficient;
  double loss, total, d_positive, log_sum_exp, log_probability;
  if (row.refined) {
    double lse = std::isinf(m) ? top : top + std::log(sum);
    if (row.positive_log_q != nullptr) lse += std::log1p(-std::exp(double(*row.positive_log_q)));
    double r = 1 / (1 + std::exp(z_positive - (lse - std::log(double(row.count)))));
    if (lse == -kInfinity<double>) r = 0;
    loss = r == 0 ? 0 : r * (lse - z_positive);
    log_sum_exp = lse, log_probability = z_positive - lse;
    if (a != 0) a *= r;  // r may be NaN
    d_positive = -a;
    total = std::isinf(m) ? 1 : sum;
  } else if (top == kInfinity<double> && z_positive < top) {
    // An infinite candidate; its e, inf - inf, is NaN.
    loss = log_sum_exp = kInfinity<double>;
    log_probability = -loss;
    d_positive = -a;
    total = 1;
  } else {
    // Where the positive leads, also where it is infinite or alone, log1p keeps the digits of a
    // small loss.
    total = sum + (z_positive == top ? 1 : std::exp(z_positive - top));
    loss = z_positive == top ? std::log1p(sum) : std::log(total) + (top - z_positive);
    d_positive = -a * (sum / total);
    log_sum_exp = std::isinf(top) ? top : top + std::log(total);
    log_probability = -loss;
  }
  RowResult<T> result{static_cast<T>(loss),        static_cast<T>(total),          0, 0,
                      static_cast<T>(log_sum_exp), static_cast<T>(log_probability)};
  if (a != 0) {
    if (top != -kInfinity<double>) result.scale = static_cast<T>(a / (row.tau * total));
    result.positive = static_cast<T>(d_positive / row.tau);
  }
  return result;
}

}  // namespace dwl
