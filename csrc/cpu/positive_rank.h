// How many candidates of a row are ahead of its positive, counted where the logits of a tile lie.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../sampled_softmax.h"
#include "ahead.h"

namespace dwl {

template <typename T>
class PositiveRank {
 public:
  PositiveRank(const Problem<T>& p, bool wanted) : p_(p) {
    for (int64_t j = 0; wanted && j < p.candidates; ++j) {
      longest_ = std::max(longest_, finite_length(p.candidate + j * p.dim, p.dim));
      const double log_q = std::abs(log_q_of(j));
      if (std::isfinite(log_q)) most_log_q_ = std::max(most_log_q_, log_q);
    }
  }

  // The logit of the positive of row i.
  Mark<T> mark(int64_t i) const {
    const T *query = p_.query + i * p_.dim, *positive = p_.positive_of(i);
    double z = exact_dot(query, positive, p_.dim) / p_.tau[i];
    double most = finite_length(score(i), p_.dim) * longest_;
    most += finite_length(query, p_.dim) * finite_length(positive, p_.dim);
    most = most / p_.tau[i] + most_log_q_ + std::abs(shift(i));
    if (!p_.refined && p_.positive_log_q != nullptr) z -= p_.positive_log_q[i];
    return {z, bounds_of<T>(z, most, p_.dim)};
  }

  // Of the logits s [width] of candidates from j0 on, -inf where one is excluded.
  int64_t ahead(int64_t i, const Mark<T>& mark, int64_t j0, const T* s, int64_t width) const {
    return count_ahead(s, width, mark.bounds, [&](int64_t j) {
      const double product = exact_dot(score(i), p_.candidate + (j0 + j) * p_.dim, p_.dim);
      return product / p_.tau[i] - log_q_of(j0 + j) + shift(i) < mark.score;
    });
  }

 private:
  double log_q_of(int64_t j) const {
    return p_.candidate_log_q != nullptr ? double(p_.log_q(j)) : 0;
  }
  double shift(int64_t i) const { return p_.shift != nullptr ? double(p_.shift[i]) : 0; }
  const T* score(int64_t i) const {
    return (p_.score != nullptr ? p_.score : p_.query) + i * p_.dim;
  }

  const Problem<T>& p_;
  double longest_ = 0, most_log_q_ = 0;
};

}  // namespace dwl
