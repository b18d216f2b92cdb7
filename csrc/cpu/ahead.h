// How many scores are ahead of a target's: not lower, so that ties are, and NaN. Whether one is
// lower must not depend on where in a product it was computed, so what lies within the rounding of
// products of the target's score is computed once more, in double, as the target's was.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace dwl {

// <a, b> in double, in one order whatever the caller: not inlined, eight sums side by side.
template <typename T>
__attribute__((noinline)) double exact_dot(const T* a, const T* b, int64_t n) {
  double sum[8] = {};
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) {
    for (int l = 0; l < 8; ++l) sum[l] += static_cast<double>(a[k + l]) * b[k + l];
  }
  for (; k < n; ++k) sum[k % 8] += static_cast<double>(a[k]) * b[k];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// |a|; 0 where that is not finite: such scores are infinite, or NaN, anyway.
template <typename T>
double finite_length(const T* a, int64_t n) {
  const double square = exact_dot(a, a, n);
  return std::isfinite(square) ? std::sqrt(square) : 0;
}

// Below `low` nothing is ahead of the target, above `high` everything.
template <typename T>
struct Bounds {
  T low, high;
};

// A sum of D products, in whatever order, is wrong by at most D u |q| |c|. `most` is the largest of
// these |q| |c| and of what is added to them.
template <typename T>
Bounds<T> bounds_of(double score, double most, int64_t dim) {
  const double unit = std::numeric_limits<T>::epsilon() / 2;
  if (std::isfinite(score)) most += std::abs(score);
  const double slack = (dim + 16) * unit * most + 4 * dim * double(std::numeric_limits<T>::min());
  // Above -inf, as which scores are left out.
  return {std::max(static_cast<T>(score - slack), std::numeric_limits<T>::lowest()),
          static_cast<T>(score + slack)};
}

// What the scores of a row are compared with.
template <typename T>
struct Mark {
  double score;
  Bounds<T> bounds;

  // Whether everything is ahead of it; what is left out, as -inf, is then not below it.
  bool is_lost() const { return !(score > -std::numeric_limits<double>::infinity()); }
};

// Calls lower(j) for scores of unclear order: whether the exact one is below the target's.
template <typename T, typename Lower>
int64_t count_ahead(const T* s, int64_t n, Bounds<T> bounds, Lower lower) {
  using Count = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // compilers want one width
  const T low = bounds.low, high = bounds.high;
  Count ahead = 0, surely = 0;
#pragma omp simd reduction(+ : ahead, surely)
  for (int64_t j = 0; j < n; ++j) {
    ahead += !(s[j] < low);
    surely += !(s[j] <= high);
  }
  if (ahead == surely) return ahead;
  int64_t count = ahead;
  for (int64_t j = 0; j < n; ++j) {
    if (!(s[j] < low) && s[j] <= high) count -= lower(j);
  }
  return count;
}

}  // namespace dwl
