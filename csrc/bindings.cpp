// The schemas of the native ops, and the checks of what they are given: whatever it is, an op
// raises or is right. The Python side has validated the problem with errors that name its own
// arguments.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "bfloat16_products.h"
#include "op_arguments.h"
#include "per_row_softmax.h"
#include "rank_targets.h"
#include "sampled_softmax.h"
#include "spare_memory.h"

namespace {

using at::Tensor;
using dwl::check;
using dwl::check_ids;
using dwl::check_tau;
using dwl::data;
using dwl::output;
using std::optional;

constexpr const char* kDtypes = "wanted float32, bfloat16 or float16 in float32, or float64";

// What the rows know: log-sum-exp, log-probability and rank; nothing where that is not wanted.
struct Known {
  Known(const Tensor& tau, bool want)
      : wanted(want),
        log_sum_exp(tau.new_zeros({want ? tau.size(0) : 0})),
        log_probability(tau.new_zeros({want ? tau.size(0) : 0})),
        rank(tau.new_zeros({want ? tau.size(0) : 0}, at::kLong)) {}

  template <typename T, typename Gradients>
  void put(Gradients& gradients) const {
    gradients.log_sum_exp = output<T>(log_sum_exp, wanted);
    gradients.log_probability = output<T>(log_probability, wanted);
    gradients.rank = output<int64_t>(rank, wanted);
  }

  bool wanted;
  Tensor log_sum_exp, log_probability, rank;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sampled_softmax(
    const Tensor& query, const optional<Tensor>& positive, const Tensor& candidates,
    const optional<Tensor>& target, const Tensor& tau, const Tensor& coefficient,
    const optional<Tensor>& positive_log_q, const optional<Tensor>& candidate_log_q,
    const optional<Tensor>& score, const optional<Tensor>& shift, at::TensorList row_ids,
    at::TensorList candidate_ids, const optional<Tensor>& skip_below,
    const optional<Tensor>& active, bool refined, bool want_query, bool want_positive,
    bool want_candidates, bool want_log_q, bool want_statistics) {
  TORCH_CHECK(query.dim() == 2 && candidates.dim() == 2, "query and candidates must be matrices");
  const int64_t rows = query.size(0), n = candidates.size(0), dim = query.size(1);
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 1;  // of the BLAS interface
  TORCH_CHECK(n <= kMost && dim < kMost, "more than 2^31 - 2 candidates or dimensions");
  TORCH_CHECK(dim > 0, "query has embeddings of size 0; wanted at least 1");
  TORCH_CHECK(!positive.has_value() || !target.has_value(),
              "the positives are given, or are candidates: wanted positive or target, not both");
  TORCH_CHECK(row_ids.size() == candidate_ids.size() && row_ids.size() <= 2,
              "wanted row_ids and candidate_ids of at most two kinds");
  TORCH_CHECK(positive.has_value() || target.has_value() || n >= rows,
              "in-batch: the first candidates are the positives");
  TORCH_CHECK(positive.has_value() || !want_positive, "the positive is a candidate");
  TORCH_CHECK(candidate_log_q.has_value() || !want_log_q, "no candidate_log_q to differentiate");
  const auto dtype = tau.scalar_type(), stored = query.scalar_type();
  TORCH_CHECK(dtype == stored
                  ? dtype == at::kFloat || dtype == at::kDouble
                  : dtype == at::kFloat && (stored == at::kBFloat16 || stored == at::kHalf),
              kDtypes, "; got ", stored, " in ", dtype);
  check(query, "query", {rows, dim}, stored);
  check(positive, "positive", {rows, dim}, stored);
  check(candidates, "candidates", {n, dim}, stored);
  check(target, "target", {rows}, at::kLong);
  check(tau, "tau", {rows}, dtype);
  check(coefficient, "coefficient", {rows}, dtype);
  check(positive_log_q, "positive_log_q", {rows}, dtype);
  check(candidate_log_q, "candidate_log_q", {n}, dtype);
  check(score, "score", {rows, dim}, stored);
  check(shift, "shift", {rows}, dtype);
  for (const Tensor& ids : row_ids) check(ids, "row_ids", {rows}, at::kLong);
  for (const Tensor& ids : candidate_ids) check(ids, "candidate_ids", {n}, at::kLong);
  check(skip_below, "skip_below", {rows}, dtype);
  check(active, "active", {rows}, at::kBool);
  if (target.has_value()) check_ids(*target, "target", active, n);

  // Products of bfloat16 for embeddings of bfloat16, and where PyTorch's own products of float32
  // may be rounded so, but not where scores are compared or were scaled in float32.
  const bool narrow =
      (stored == at::kBFloat16 || (stored == at::kFloat && dwl::float32_may_be_bfloat16())) &&
      dim % 2 == 0 && !score.has_value() && !want_statistics && dwl::has_bfloat16_products();
  const auto computed_in = narrow ? at::kBFloat16 : dtype;
  const Tensor own_query = query.to(computed_in), own_candidates = candidates.to(computed_in);
  const auto own_positive = positive.has_value() ? optional(positive->to(computed_in)) : positive;
  const auto own_score = score.has_value() ? optional(score->to(computed_in)) : score;

  const Tensor row_loss = tau.new_zeros({rows});
  // Padded rows are never written, so their gradients start as zeros.
  const auto gradient = [&](bool wanted, int64_t size) {
    if (!wanted) return tau.new_empty({0});
    return active.has_value() ? tau.new_zeros({size, dim}) : tau.new_empty({size, dim});
  };
  const Tensor d_query = gradient(want_query, rows), d_positive = gradient(want_positive, rows);
  const Tensor d_candidates = gradient(want_candidates, n);
  const Tensor d_log_q = tau.new_empty({want_log_q ? n : 0});
  const Known known(tau, want_statistics);

  const auto solve = [&](auto computes, auto stores, auto kernel) {
    using T = decltype(computes);
    using S = decltype(stores);
    check_tau<T>(tau, active);
    dwl::Problem<T, S> problem{};
    problem.rows = rows;
    problem.candidates = n;
    problem.dim = dim;
    problem.query = data<S>(own_query);
    problem.positive = data<S>(own_positive);
    problem.candidate = data<S>(own_candidates);
    problem.target = data<int64_t>(target);
    problem.tau = data<T>(tau);
    problem.coefficient = data<T>(coefficient);
    problem.positive_log_q = data<T>(positive_log_q);
    problem.candidate_log_q = data<T>(candidate_log_q);
    problem.score = data<S>(own_score);
    problem.shift = data<T>(shift);
    for (size_t k = 0; k < row_ids.size(); ++k) problem.row_ids[k] = data<int64_t>(row_ids[k]);
    for (size_t k = 0; k < row_ids.size(); ++k)
      problem.candidate_ids[k] = data<int64_t>(candidate_ids[k]);
    problem.skip_below = data<T>(skip_below);
    problem.active = data<bool>(active);
    problem.refined = refined;
    dwl::Gradients<T> gradients{};
    gradients.row_loss = output<T>(row_loss, true);
    gradients.query = output<T>(d_query, want_query);
    gradients.positive = output<T>(d_positive, want_positive);
    gradients.candidate = output<T>(d_candidates, want_candidates);
    gradients.candidate_log_q = output<T>(d_log_q, want_log_q);
    known.put<T>(gradients);
    kernel(problem, gradients, at::get_num_threads());
  };
  if (narrow) {
    solve(float{}, dwl::BFloat16{}, dwl::sampled_softmax_bfloat16);
  } else if (dtype == at::kFloat) {
    solve(float{}, float{}, dwl::sampled_softmax_cpu<float>);
  } else {
    solve(double{}, double{}, dwl::sampled_softmax_cpu<double>);
  }
  return {row_loss,
          d_query,
          d_positive,
          d_candidates,
          d_log_q,
          known.log_sum_exp,
          known.log_probability,
          known.rank};
}

// Calls solve(T{}, S{}) for the dtype that computes and the one that stores the table.
template <typename Solve>
void dispatch(at::ScalarType computes, at::ScalarType stores, const Solve& solve) {
  if (computes == at::kFloat && stores == at::kFloat) {
    solve(float{}, float{});
  } else if (computes == at::kFloat && stores == at::kBFloat16) {
    solve(float{}, dwl::BFloat16{});
  } else if (computes == at::kFloat && stores == at::kHalf) {
    solve(float{}, dwl::Float16{});
  } else {
    TORCH_CHECK(computes == at::kDouble && stores == at::kDouble, kDtypes, "; got ", stores, " in ",
                computes);
    solve(double{}, double{});
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> indexed_softmax(
    const Tensor& query, const Tensor& table, const optional<Tensor>& positive,
    const optional<Tensor>& positive_ids, const Tensor& candidate_ids, const Tensor& tau,
    const Tensor& coefficient, const optional<Tensor>& positive_log_q,
    const optional<Tensor>& candidate_log_q, const optional<Tensor>& active, bool refined,
    bool want_query, bool want_table, bool want_statistics) {
  TORCH_CHECK(query.dim() == 2 && table.dim() == 2 && candidate_ids.dim() == 2,
              "query, table and candidate_ids must be matrices");
  const int64_t rows = query.size(0), dim = query.size(1), n = candidate_ids.size(1);
  TORCH_CHECK(dim > 0, "query has embeddings of size 0; wanted at least 1");
  const auto dtype = query.scalar_type();
  check(query, "query", {rows, dim}, dtype);
  check(table, "table", {table.size(0), dim}, table.scalar_type());
  TORCH_CHECK(positive.has_value() != positive_ids.has_value(), "wanted positive or positive_ids");
  check(positive, "positive", {rows, dim}, table.scalar_type());
  check(positive_ids, "positive_ids", {rows}, at::kLong);
  check(candidate_ids, "candidate_ids", {rows, n}, at::kLong);
  check(tau, "tau", {rows}, dtype);
  check(coefficient, "coefficient", {rows}, dtype);
  check(positive_log_q, "positive_log_q", {rows}, dtype);
  check(candidate_log_q, "candidate_log_q", {rows, n}, dtype);
  check(active, "active", {rows}, at::kBool);
  if (positive_ids.has_value()) check_ids(*positive_ids, "positive_ids", active, table.size(0));
  check_ids(candidate_ids, "candidate_ids", active, table.size(0), -1);

  const Tensor row_loss = query.new_zeros({rows});
  // Padded rows are never written, so their gradients start as zeros.
  const auto gradient = [&](bool wanted, at::IntArrayRef sizes) {
    if (!wanted) return query.new_empty({0});
    return active.has_value() ? query.new_zeros(sizes) : query.new_empty(sizes);
  };
  const Tensor d_query = gradient(want_query, {rows, dim});
  const Tensor d_positive = gradient(want_table, {rows});
  const Tensor d_candidates = gradient(want_table, {rows, n});
  const Known known(tau, want_statistics);
  dispatch(dtype, table.scalar_type(), [&](auto computes, auto stores) {
    using T = decltype(computes);
    using S = decltype(stores);
    check_tau<T>(tau, active);
    dwl::PerRowProblem<T, S> problem{};
    problem.rows = rows;
    problem.candidates = n;
    problem.dim = dim;
    problem.query = data<T>(query);
    problem.table = data<S>(table);
    problem.positive = data<S>(positive);
    problem.positive_ids = data<int64_t>(positive_ids);
    problem.candidate_ids = data<int64_t>(candidate_ids);
    problem.tau = data<T>(tau);
    problem.coefficient = data<T>(coefficient);
    problem.positive_log_q = data<T>(positive_log_q);
    problem.candidate_log_q = data<T>(candidate_log_q);
    problem.active = data<bool>(active);
    problem.refined = refined;
    dwl::PerRowGradients<T> gradients{};
    gradients.row_loss = output<T>(row_loss, true);
    gradients.query = output<T>(d_query, want_query);
    gradients.positive = output<T>(d_positive, want_table);
    gradients.candidate = output<T>(d_candidates, want_table);
    known.put<T>(gradients);
    dwl::per_row_softmax_cpu<T, S>(problem, gradients, at::get_num_threads());
  });
  return {row_loss,  d_query, d_positive, d_candidates, known.log_sum_exp, known.log_probability,
          known.rank};
}

// (values, ids): the whole gradient and no ids, or, compact, its rows that have a place.
std::tuple<Tensor, Tensor> table_gradient(const Tensor& source, at::TensorList ids,
                                          at::TensorList coefficients, int64_t table_rows,
                                          bool compact) {
  TORCH_CHECK(source.dim() == 2, "source must be a matrix");
  TORCH_CHECK(table_rows >= 0, "table_rows is ", table_rows, "; wanted at least 0");
  TORCH_CHECK(!ids.empty(), "ids is an empty list; wanted at least one tensor");
  TORCH_CHECK(coefficients.empty() || coefficients.size() == ids.size(),
              "wanted coefficients for all ids, or for none");
  const int64_t rows = source.size(0), dim = source.size(1);
  const auto dtype = source.scalar_type(), computes = dtype == at::kDouble ? dtype : at::kFloat;
  check(source, "source", {rows, dim}, dtype);
  for (size_t k = 0; k < ids.size(); ++k) {
    TORCH_CHECK(ids[k].dim() == 2, "ids must be matrices");
    check(ids[k], "ids", {rows, ids[k].size(1)}, at::kLong);
    if (!coefficients.empty()) {
      check(coefficients[k], "coefficients", ids[k].sizes(), computes);
    }
  }
  Tensor values, distinct;
  dispatch(computes, dtype, [&](auto sums, auto stores) {
    using T = decltype(sums);
    using S = decltype(stores);
    std::vector<dwl::Places<T>> pieces(ids.size());
    for (size_t k = 0; k < ids.size(); ++k) {
      pieces[k].width = ids[k].size(1);
      pieces[k].ids = data<int64_t>(ids[k]);
      if (!coefficients.empty()) pieces[k].coefficient = data<T>(coefficients[k]);
    }
    dwl::TableGradient<T, S> problem{};
    problem.rows = rows;
    problem.dim = dim;
    problem.table_rows = table_rows;
    problem.source = data<S>(source);
    problem.pieces = pieces.data();
    problem.num_pieces = static_cast<int>(pieces.size());
    problem.compact = compact;
    dwl::table_gradient_cpu<T, S>(problem, at::get_num_threads(), [&](int64_t count) {
      values = dwl::new_large(source, {count, dim}, dtype);
      distinct = source.new_empty({compact ? count : 0}, at::kLong);
      return dwl::TableRows<S>{output<S>(values, true), output<int64_t>(distinct, compact)};
    });
  });
  return {values, distinct};
}

Tensor rank_targets(const Tensor& query, const Tensor& table, const Tensor& target,
                    const Tensor& padded, const Tensor& nowhere, const optional<Tensor>& bias,
                    const optional<Tensor>& offsets, const optional<Tensor>& seen) {
  TORCH_CHECK(query.dim() == 2 && table.dim() == 2, "query and table must be matrices");
  const int64_t rows = query.size(0), dim = query.size(1), items = table.size(0);
  TORCH_CHECK(dim > 0 && items > 0, "query and table have no embeddings");
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 1;  // of the BLAS interface
  TORCH_CHECK(dim < kMost, "more than 2^31 - 2 dimensions");
  const auto dtype = query.scalar_type();
  check(query, "query", {rows, dim}, dtype);
  check(table, "table", {items, dim}, table.scalar_type());
  check(target, "target", {rows}, at::kLong);
  check(padded, "padded", {rows}, at::kBool);
  check(nowhere, "nowhere", {rows}, at::kBool);
  check(bias, "bias", {items}, dtype);
  TORCH_CHECK(offsets.has_value() == seen.has_value(), "wanted offsets and seen, or none of them");
  for (int64_t i = 0; i < rows; ++i) {
    const bool counts = !data<bool>(padded)[i] && !data<bool>(nowhere)[i];
    const bool outside = uint64_t(data<int64_t>(target)[i]) >= uint64_t(items);
    TORCH_CHECK_INDEX(!counts || !outside, "target out of range in row ", i);
  }
  if (offsets.has_value()) {
    check(offsets, "offsets", {rows + 1}, at::kLong);
    check(seen, "seen", {seen->numel()}, at::kLong);
    const int64_t* offset = data<int64_t>(offsets);
    bool fits = offset[0] == 0 && offset[rows] == seen->numel();
    for (int64_t i = 0; i < rows; ++i) fits &= offset[i] <= offset[i + 1];
    TORCH_CHECK_VALUE(fits, "offsets must begin at 0, never fall, and end at the number of ids");
  }
  const Tensor rank = target.new_empty({rows});
  dispatch(dtype, table.scalar_type(), [&](auto computes, auto stores) {
    using T = decltype(computes);
    using S = decltype(stores);
    dwl::RankProblem<T, S> problem{};
    problem.rows = rows;
    problem.items = items;
    problem.dim = dim;
    problem.query = data<T>(query);
    problem.table = data<S>(table);
    problem.target = data<int64_t>(target);
    problem.bias = data<T>(bias);
    problem.offsets = data<int64_t>(offsets);
    problem.seen = data<int64_t>(seen);
    problem.padded = data<bool>(padded);
    problem.nowhere = data<bool>(nowhere);
    dwl::rank_targets_cpu<T, S>(problem, output<int64_t>(rank, true), at::get_num_threads());
  });
  return rank;
}

}  // namespace

TORCH_LIBRARY(dwl_kernels_native, library) {
  library.def(
      "sampled_softmax(Tensor query, Tensor? positive, Tensor candidates, Tensor? target, "
      "Tensor tau, Tensor coefficient, Tensor? positive_log_q, Tensor? candidate_log_q, "
      "Tensor? score, Tensor? shift, Tensor[] row_ids, Tensor[] candidate_ids, "
      "Tensor? skip_below, Tensor? active, bool refined, bool want_query, bool want_positive, "
      "bool want_candidates, bool want_log_q, bool want_statistics) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "indexed_softmax(Tensor query, Tensor table, Tensor? positive, Tensor? positive_ids, "
      "Tensor candidate_ids, Tensor tau, Tensor coefficient, Tensor? positive_log_q, Tensor? "
      "candidate_log_q, "
      "Tensor? active, bool refined, bool want_query, bool want_table, bool want_statistics) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "table_gradient(Tensor source, Tensor[] ids, Tensor[] coefficients, int table_rows, "
      "bool compact) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "rank_targets(Tensor query, Tensor table, Tensor target, Tensor padded, Tensor nowhere, "
      "Tensor? bias, Tensor? offsets, Tensor? seen) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(dwl_kernels_native, CPU, library) {
  library.impl("sampled_softmax", sampled_softmax);
  library.impl("indexed_softmax", indexed_softmax);
  library.impl("table_gradient", table_gradient);
  library.impl("rank_targets", rank_targets);
}
