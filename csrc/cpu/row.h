// What the CPU kernels share: one row of logits, from products to probabilities.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace dwl {

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// exp(min(x, 80)) to one unit in the last place, in a form that compilers vectorise:
// x = n ln 2 + r, a polynomial for exp(r), and n added to the exponent bits.
inline float bounded_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x > 80.0f ? 80.0f : x;
  const float t = x * 1.44269504f + kRound;
  const float n = t - kRound;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t power, bits;
  std::memcpy(&power, &t, sizeof power);
  std::memcpy(&bits, &p, sizeof bits);
  bits += static_cast<int32_t>(static_cast<uint32_t>(power) << 23);
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return x < -87.0f ? 0.0f : result;  // also exp(-inf); NaN stays NaN
}
inline double bounded_exp(double x) {
  return std::exp(x);
}

template <typename T>
T row_max(const T* s, int64_t n) {
  T top = -kInfinity<T>;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = s[j] > top ? s[j] : top;
  return top;
}

// s <- exp(s scale + bias - m), bias [n] or null; returns the sum.
template <typename T>
T row_exp(T* s, T scale, const T* bias, T m, int64_t n) {
  const auto each = [&](auto bias_of) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const T e = bounded_exp(s[j] * scale + (bias_of(j) - m));
      s[j] = e;
      sum += e;
    }
    return sum;
  };
  if (bias != nullptr) return each([bias](int64_t j) { return bias[j]; });
  return each([](int64_t) { return T(0); });
}

template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}

// A row, beside its logits.
template <typename T>
struct Row {
  T tau;
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
};

// exp(z - m) of a row that is -inf throughout is 0, not NaN.
template <typename T>
T finite_reference(T m) {
  return m == -kInfinity<T> ? T(0) : m;
}

// The result of a row whose candidates have e_j = exp(z_j - m), with their sum. Where it says
// `scale` 0, as for a row of weight zero, e has to be taken as 0 too: it may have overflowed.
template <typename T>
RowResult<T> finish_row(const Row<T>& row, T m, double sum) {
  const T z_positive = row.z_positive;
  const bool infinite = std::isinf(m);
  double a = row.coefficient;
  double loss, d_positive, total;
  if (row.refined) {
    double lse = infinite ? m : m + std::log(sum);
    if (row.positive_log_q != nullptr) lse += std::log1p(-std::exp(double(*row.positive_log_q)));
    double r = 1 / (1 + std::exp(double(z_positive) - (lse - std::log(double(row.count)))));
    if (lse == -kInfinity<double>) r = 0;
    loss = r == 0 ? 0 : r * (lse - z_positive);
    a *= r;
    d_positive = -a;
    total = sum;
  } else {
    // Where the positive leads, log1p keeps the digits of a small loss.
    const double e_positive = std::exp(double(z_positive) - m);
    total = sum + e_positive;
    if (infinite) {
      loss = double(m) - z_positive;
      d_positive = a * std::expm1(-loss);
    } else {
      loss = z_positive >= m ? std::log1p(sum) : std::log(total) + (double(m) - double(z_positive));
      d_positive = -a * (sum / total);
    }
  }
  RowResult<T> result{static_cast<T>(loss), static_cast<T>(total), 0, 0};
  if (a != 0) {
    result.scale = static_cast<T>(a / (row.tau * (infinite ? 1.0 : total)));
    result.positive = static_cast<T>(d_positive / row.tau);
  }
  return result;
}

}  // namespace dwl
