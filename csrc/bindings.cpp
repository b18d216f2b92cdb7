// The schemas of the native ops and the checks of what it is given. The Python side has validated
// the problem; what is checked here is what would otherwise read out of bounds.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "indexed_softmax.h"
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
    const optional<Tensor>& skip_below, const optional<Tensor>& active, bool refined,
    bool want_query, bool want_positive, bool want_candidates, bool want_log_q) {
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
  check(skip_below, "skip_below", {rows}, dtype);
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
    problem.skip_below = data<T>(skip_below);
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

// Calls solve(T{}, S{}) for the dtype that computes and the one that stores the table.
template <typename Solve>
void dispatch(at::ScalarType computes, at::ScalarType stores, const Solve& solve) {
  if (computes == at::kFloat && stores == at::kFloat) {
    solve(float{}, float{});
  } else if (computes == at::kFloat && stores == at::kBFloat16) {
    solve(float{}, dwl::BFloat16{});
  } else {
    TORCH_CHECK(computes == at::kDouble && stores == at::kDouble,
                "wanted float32, bfloat16 in float32, or float64; got ", stores, " in ", computes);
    solve(double{}, double{});
  }
}

// Ids of rows that are not padding must lie inside the table.
void check_ids(const Tensor& ids, const char* name, const bool* active, int64_t table_rows) {
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t rows = ids.size(0), width = rows == 0 ? 0 : ids.numel() / rows;
  for (int64_t i = 0; i < rows; ++i, id += width) {
    if (active != nullptr && !active[i]) continue;
    bool outside = false;
    for (int64_t j = 0; j < width; ++j) outside |= uint64_t(id[j]) >= uint64_t(table_rows);
    TORCH_CHECK_INDEX(!outside, name, " out of range in row ", i);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> indexed_softmax(
    const Tensor& query, const Tensor& table, const Tensor& positive_ids,
    const Tensor& candidate_ids, const Tensor& tau, const Tensor& coefficient,
    const optional<Tensor>& positive_log_q, const optional<Tensor>& candidate_log_q,
    const optional<Tensor>& active, bool refined, bool want_query, bool want_table) {
  TORCH_CHECK(query.dim() == 2 && table.dim() == 2 && candidate_ids.dim() == 2,
              "query, table and candidate_ids must be matrices");
  const int64_t rows = query.size(0), dim = query.size(1), n = candidate_ids.size(1);
  const auto dtype = query.scalar_type();
  check(query, "query", {rows, dim}, dtype);
  check(table, "table", {table.size(0), dim}, table.scalar_type());
  check(positive_ids, "positive_ids", {rows}, at::kLong);
  check(candidate_ids, "candidate_ids", {rows, n}, at::kLong);
  check(tau, "tau", {rows}, dtype);
  check(coefficient, "coefficient", {rows}, dtype);
  check(positive_log_q, "positive_log_q", {rows}, dtype);
  check(candidate_log_q, "candidate_log_q", {rows, n}, dtype);
  check(active, "active", {rows}, at::kBool);
  check_ids(positive_ids, "positive_ids", data<bool>(active), table.size(0));
  check_ids(candidate_ids, "candidate_ids", data<bool>(active), table.size(0));

  const Tensor row_loss = query.new_zeros({rows});
  // Padded rows are never written, so their gradients start as zeros.
  const auto gradient = [&](bool wanted, at::IntArrayRef sizes) {
    if (!wanted) return query.new_empty({0});
    return active.has_value() ? query.new_zeros(sizes) : query.new_empty(sizes);
  };
  const Tensor d_query = gradient(want_query, {rows, dim});
  const Tensor d_positive = gradient(want_table, {rows});
  const Tensor d_candidates = gradient(want_table, {rows, n});
  dispatch(dtype, table.scalar_type(), [&](auto computes, auto stores) {
    using T = decltype(computes);
    using S = decltype(stores);
    dwl::IndexedProblem<T, S> problem{};
    problem.rows = rows;
    problem.candidates = n;
    problem.dim = dim;
    problem.query = query.const_data_ptr<T>();
    problem.table = static_cast<const S*>(table.const_data_ptr());
    problem.positive_ids = positive_ids.const_data_ptr<int64_t>();
    problem.candidate_ids = candidate_ids.const_data_ptr<int64_t>();
    problem.tau = tau.const_data_ptr<T>();
    problem.coefficient = coefficient.const_data_ptr<T>();
    problem.positive_log_q = data<T>(positive_log_q);
    problem.candidate_log_q = data<T>(candidate_log_q);
    problem.active = data<bool>(active);
    problem.refined = refined;
    dwl::IndexedGradients<T> gradients{};
    gradients.row_loss = row_loss.mutable_data_ptr<T>();
    gradients.query = want_query ? d_query.mutable_data_ptr<T>() : nullptr;
    gradients.positive = want_table ? d_positive.mutable_data_ptr<T>() : nullptr;
    gradients.candidate = want_table ? d_candidates.mutable_data_ptr<T>() : nullptr;
    dwl::indexed_softmax_cpu<T, S>(problem, gradients, at::get_num_threads());
  });
  return {row_loss, d_query, d_positive, d_candidates};
}

// (values, ids): the whole gradient and no ids, or, compact, its rows that have a place.
std::tuple<Tensor, Tensor> table_gradient(const Tensor& source, at::TensorList ids,
                                          at::TensorList coefficients, int64_t table_rows,
                                          at::ScalarType dtype, bool compact) {
  TORCH_CHECK(source.dim() == 2, "source must be a matrix");
  TORCH_CHECK(coefficients.empty() || coefficients.size() == ids.size(),
              "wanted coefficients for all ids, or for none");
  const int64_t rows = source.size(0), dim = source.size(1);
  check(source, "source", {rows, dim}, source.scalar_type());
  for (size_t k = 0; k < ids.size(); ++k) {
    TORCH_CHECK(ids[k].dim() == 2, "ids must be matrices");
    check(ids[k], "ids", {rows, ids[k].size(1)}, at::kLong);
    if (!coefficients.empty()) {
      check(coefficients[k], "coefficients", ids[k].sizes(), source.scalar_type());
    }
  }
  Tensor values, distinct;
  dispatch(source.scalar_type(), dtype, [&](auto computes, auto stores) {
    using T = decltype(computes);
    using S = decltype(stores);
    std::vector<dwl::Places<T>> pieces(ids.size());
    for (size_t k = 0; k < ids.size(); ++k) {
      pieces[k].width = ids[k].size(1);
      pieces[k].ids = ids[k].const_data_ptr<int64_t>();
      if (!coefficients.empty()) pieces[k].coefficient = coefficients[k].const_data_ptr<T>();
    }
    dwl::TableGradient<T> problem{};
    problem.rows = rows;
    problem.dim = dim;
    problem.table_rows = table_rows;
    problem.source = source.const_data_ptr<T>();
    problem.pieces = pieces.data();
    problem.num_pieces = static_cast<int>(pieces.size());
    dwl::table_gradient_cpu<T, S>(problem, at::get_num_threads(), [&](int64_t count) {
      values = source.new_empty({compact ? count : table_rows, dim}, dtype);
      distinct = ids[0].new_empty({compact ? count : 0});
      return dwl::TableRows<S>{static_cast<S*>(values.mutable_data_ptr()),
                               compact ? distinct.mutable_data_ptr<int64_t>() : nullptr, compact};
    });
  });
  return {values, distinct};
}

}  // namespace

TORCH_LIBRARY(dwl_kernels_native, library) {
  library.def(
      "sampled_softmax(Tensor query, Tensor? positive, Tensor candidates, Tensor? target, "
      "Tensor tau, Tensor coefficient, Tensor? positive_log_q, Tensor? candidate_log_q, "
      "Tensor? score, Tensor? shift, Tensor? positive_ids, Tensor? candidate_ids, "
      "Tensor? skip_below, Tensor? active, bool refined, bool want_query, bool want_positive, "
      "bool want_candidates, bool want_log_q) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "indexed_softmax(Tensor query, Tensor table, Tensor positive_ids, Tensor candidate_ids, "
      "Tensor tau, Tensor coefficient, Tensor? positive_log_q, Tensor? candidate_log_q, "
      "Tensor? active, bool refined, bool want_query, bool want_table) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "table_gradient(Tensor source, Tensor[] ids, Tensor[] coefficients, int table_rows, "
      "ScalarType dtype, bool compact) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(dwl_kernels_native, CPU, library) {
  library.impl("sampled_softmax", sampled_softmax);
  library.impl("indexed_softmax", indexed_softmax);
  library.impl("table_gradient", table_gradient);
}
