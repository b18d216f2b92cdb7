// The schema of the native op and the checks of what it is given. The Python side has validated the
// problem; what is checked here is what would otherwise read out of bounds.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "sampled_softmax.h"

namespace {

using at::Tensor;
using std::optional;

template <typename T>
const T* data(const optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

void check(const optional<Tensor>& tensor, const char* name, at::IntArrayRef sizes,
           at::ScalarType dtype) {
  if (!tensor.has_value()) return;
  TORCH_CHECK(tensor->device().is_cpu() && tensor->is_contiguous() && tensor->sizes() == sizes &&
                  tensor->scalar_type() == dtype,
              name, ": wanted a contiguous CPU tensor of ", dtype, " ", sizes, ", got ",
              tensor->scalar_type(), " ", tensor->sizes(), " on ", tensor->device());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sampled_softmax(
    const Tensor& query, const optional<Tensor>& positive, const Tensor& candidates,
    const optional<Tensor>& target, const Tensor& tau, const Tensor& coefficient,
    const optional<Tensor>& positive_log_q, const optional<Tensor>& candidate_log_q,
    const optional<Tensor>& score, const optional<Tensor>& shift,
    const optional<Tensor>& positive_ids, const optional<Tensor>& candidate_ids,
    const optional<Tensor>& active, bool refined, bool want_query, bool want_positive,
    bool want_candidates, bool want_log_q) {
  TORCH_CHECK(query.dim() == 2 && candidates.dim() == 2, "query and candidates must be matrices");
  const int64_t rows = query.size(0), n = candidates.size(0), dim = query.size(1);
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 1;  // of the BLAS interface
  TORCH_CHECK(n <= kMost && dim < kMost, "more than 2^31 - 2 candidates or dimensions");
  TORCH_CHECK(positive.has_value() || target.has_value() || n >= rows,
              "in-batch: the first candidates are the positives");
  TORCH_CHECK(positive.has_value() || !want_positive, "the positive is a candidate");
  TORCH_CHECK(candidate_log_q.has_value() || !want_log_q, "no candidate_log_q to differentiate");
  const auto dtype = query.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble, "wanted float32 or float64");
  check(query, "query", {rows, dim}, dtype);
  check(positive, "positive", {rows, dim}, dtype);
  check(candidates, "candidates", {n, dim}, dtype);
  check(target, "target", {rows}, at::kLong);
  check(tau, "tau", {rows}, dtype);
  check(coefficient, "coefficient", {rows}, dtype);
  check(positive_log_q, "positive_log_q", {rows}, dtype);
  check(candidate_log_q, "candidate_log_q", {n}, dtype);
  check(score, "score", {rows, dim}, dtype);
  check(shift, "shift", {rows}, dtype);
  check(positive_ids, "positive_ids", {rows}, at::kLong);
  check(candidate_ids, "candidate_ids", {n}, at::kLong);
  check(active, "active", {rows}, at::kBool);
  if (target.has_value() && rows > 0) {
    const auto [low, high] = target->aminmax();
    TORCH_CHECK_INDEX(low.item<int64_t>() >= 0 && high.item<int64_t>() < n, "target out of range");
  }

  const Tensor row_loss = query.new_zeros({rows});
  // Padded rows are never written, so their gradients start as zeros.
  const auto gradient = [&](bool wanted, int64_t size) {
    if (!wanted) return query.new_empty({0});
    return active.has_value() ? query.new_zeros({size, dim}) : query.new_empty({size, dim});
  };
  const Tensor d_query = gradient(want_query, rows), d_positive = gradient(want_positive, rows);
  const Tensor d_candidates = gradient(want_candidates, n);
  const Tensor d_log_q = query.new_empty({want_log_q ? n : 0});

  const auto solve = [&](auto zero) {
    using T = decltype(zero);
    const auto pointer = [](bool wanted, const Tensor& t) {
      return wanted ? t.mutable_data_ptr<T>() : nullptr;
    };
    dwl::Problem<T> problem{};
    problem.rows = rows;
    problem.candidates = n;
    problem.dim = dim;
    problem.query = query.const_data_ptr<T>();
    problem.positive = data<T>(positive);
    problem.candidate = candidates.const_data_ptr<T>();
    problem.target = data<int64_t>(target);
    problem.tau = tau.const_data_ptr<T>();
    problem.coefficient = coefficient.const_data_ptr<T>();
    problem.positive_log_q = data<T>(positive_log_q);
    problem.candidate_log_q = data<T>(candidate_log_q);
    problem.score = data<T>(score);
    problem.shift = data<T>(shift);
    problem.positive_ids = data<int64_t>(positive_ids);
    problem.candidate_ids = data<int64_t>(candidate_ids);
    problem.active = data<bool>(active);
    problem.refined = refined;
    dwl::Gradients<T> gradients{};
    gradients.row_loss = row_loss.mutable_data_ptr<T>();
    gradients.query = pointer(want_query, d_query);
    gradients.positive = pointer(want_positive, d_positive);
    gradients.candidate = pointer(want_candidates, d_candidates);
    gradients.candidate_log_q = pointer(want_log_q, d_log_q);
    dwl::sampled_softmax_cpu<T>(problem, gradients, at::get_num_threads());
  };
  if (dtype == at::kFloat) {
    solve(float{});
  } else {
    solve(double{});
  }
  return {row_loss, d_query, d_positive, d_candidates, d_log_q};
}

}  // namespace

TORCH_LIBRARY(dwl_kernels_native, library) {
  library.def(
      "sampled_softmax(Tensor query, Tensor? positive, Tensor candidates, Tensor? target, "
      "Tensor tau, Tensor coefficient, Tensor? positive_log_q, Tensor? candidate_log_q, "
      "Tensor? score, Tensor? shift, Tensor? positive_ids, Tensor? candidate_ids, Tensor? active, "
      "bool refined, bool want_query, bool want_positive, bool want_candidates, bool want_log_q) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(dwl_kernels_native, CPU, library) {
  library.impl("sampled_softmax", sampled_softmax);
}
