// Runs the kernels of csrc/cpu on random problems, to be compiled with sanitizers: sizes from 0,
// every option, ids of -1, logits up to the largest numbers, NaN. Every array has a block of memory
// of its own, of exactly its size. What the kernels return is checked for where it was written.

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "bfloat16_products.h"
#include "per_row_softmax.h"
#include "rank_targets.h"
#include "sampled_softmax.h"

namespace {

template <typename T>
void multiply(bool ta, bool tb, int m, int n, int k, const T* a, int lda, const T* b, int ldb,
              T beta, T* c, int ldc) {
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < m; ++i) {
      T sum = beta == 0 ? 0 : beta * c[i + int64_t(j) * ldc];
      for (int l = 0; l < k; ++l) {
        sum += a[ta ? l + int64_t(i) * lda : i + int64_t(l) * lda] *
               b[tb ? j + int64_t(l) * ldb : l + int64_t(j) * ldb];
      }
      c[i + int64_t(j) * ldc] = sum;
    }
  }
}

}  // namespace

extern "C" {
void sgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k, const float*,
            const float* a, const int* lda, const float* b, const int* ldb, const float* beta,
            float* c, const int* ldc) {
  multiply(*ta == 'T', *tb == 'T', *m, *n, *k, a, *lda, b, *ldb, *beta, c, *ldc);
}
void dgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k, const double*,
            const double* a, const int* lda, const double* b, const int* ldb, const double* beta,
            double* c, const int* ldc) {
  multiply(*ta == 'T', *tb == 'T', *m, *n, *k, a, *lda, b, *ldb, *beta, c, *ldc);
}
}

namespace dwl {
bool has_bfloat16_products() {
  return true;
}
void bfloat16_product(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                      const uint32_t* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = add ? c[i * ldc + j] : 0;
      for (int64_t l = 0; l < k; ++l) {
        const uint32_t two = b[l / 2 * ldb + j];
        const uint32_t one = l % 2 == 0 ? two << 16 : two & 0xffff0000;
        sum += float(a[i * lda + l]) * std::bit_cast<float>(one);
      }
      c[i * ldc + j] = sum;
    }
  }
}
void release_bfloat16_products() {}
}  // namespace dwl

namespace {

constexpr int kThreads = 3;
std::mt19937_64 engine(7);

int64_t integer(int64_t low, int64_t high) {  // in [low, high]
  return std::uniform_int_distribution<int64_t>(low, high)(engine);
}
bool chance(double p) {
  return std::bernoulli_distribution(p)(engine);
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

// An array of exactly its size that is not null even where it is empty.
template <typename T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size), values_(new T[size]) {}
  Array(const Array&) = delete;
  ~Array() { delete[] values_; }
  T* get() const { return values_; }
  int64_t size() const { return size_; }
  T* begin() const { return values_; }
  T* end() const { return values_ + size_; }
  T& operator[](int64_t k) const { return values_[k]; }

 private:
  int64_t size_;
  T* values_;
};

// Normal numbers, `large` times as large; some are NaN or infinite where the problem is `odd`.
template <typename T>
void fill(const Array<T>& to, double large, bool odd) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::normal_distribution<double> normal;
  for (T& value : to) {
    value = static_cast<T>(large * normal(engine));
    if (odd && chance(0.01)) value = static_cast<T>(chance(0.5) ? std::nan("") : -kInfinity);
    if (odd && chance(0.01)) value = static_cast<T>(kInfinity);
  }
}
void fill_ids(const Array<int64_t>& to, int64_t low, int64_t high) {
  for (int64_t& id : to) id = integer(low, high);
}

constexpr double kUntouched = -12345;

// Rows of padding are as they were, and what the others hold was written.
template <typename T>
void expect_written(const Array<T>& values, int64_t rows, const bool* active) {
  const int64_t width = rows == 0 ? 0 : values.size() / rows;
  for (int64_t i = 0; i < rows * width; ++i) {
    const bool counts = active == nullptr || active[i / width];
    expect((values[i] == T(kUntouched)) != counts, "where the gradients were written");
  }
}

// Ranks of rows that count lie among their candidates; null: none was wanted.
void expect_ranks(const Array<int64_t>& rank, int64_t candidates, const bool* active, bool all) {
  for (int64_t i = 0; active != nullptr && i < rank.size(); ++i) {
    const bool counts = all || active[i];
    expect(counts ? rank[i] >= 1 && rank[i] <= 1 + candidates : rank[i] == -1, "the ranks");
  }
}

template <typename T>
double largest() {
  return std::sqrt(std::numeric_limits<T>::max()) / 8;
}
template <typename T>
double scale() {
  return chance(0.2) ? largest<T>() : std::pow(10, integer(-3, 3));
}

template <typename S>
constexpr bool kNarrow = std::is_same_v<S, dwl::BFloat16>;

template <typename T, typename S = T>
void shared_candidates() {
  const bool wide = chance(0.1);
  const int64_t b = wide ? integer(0, 300) : integer(0, 20),
                d = (wide ? integer(0, 3) : integer(0, 9)) * (kNarrow<S> ? 2 : 1);
  int64_t n = wide ? integer(0, 3500) : integer(0, 40);
  const int kind = static_cast<int>(integer(0, 2));  // positives given, in a batch, targets
  if (kind == 1) n += b;
  const bool odd = chance(0.2), pads = chance(0.4);

  dwl::Problem<T, S> p{};
  p.rows = b, p.candidates = n, p.dim = d, p.refined = chance(0.4);
  const double size = scale<T>();
  Array<S> query(b * d), positive(b * d), candidate(n * d), score(b * d);
  Array<T> tau(b), coefficient(b), shift(b), positive_log_q(b), candidate_log_q(n), skip_below(b);
  Array<int64_t> target(b), positive_ids(b), candidate_ids(n);
  Array<bool> active(b);
  for (const auto* one : {&query, &positive, &candidate, &score}) fill(*one, size, odd);
  for (const auto* one : {&coefficient, &shift, &positive_log_q, &candidate_log_q, &skip_below}) {
    fill(*one, 1.0, odd);
  }
  for (T& value : tau) value = static_cast<T>(std::pow(10, integer(-2, 2)));
  for (T& value : coefficient) value = chance(0.2) ? T(0) : value;
  fill_ids(target, 0, n - (n > 0));
  fill_ids(positive_ids, -2, 9);
  fill_ids(candidate_ids, -2, 9);
  for (bool& one : active) one = chance(0.6) && n > 0;
  for (int64_t i = 0; i < b && pads; ++i) {
    if (active[i]) continue;
    for (int64_t k = 0; k < d; ++k) query[i * d + k] = positive[i * d + k] = S(std::nan(""));
    for (int64_t k = 0; k < d && kind == 1; ++k) candidate[i * d + k] = S(0);
    tau[i] = 0, target[i] = -100;
  }
  p.query = query.get(), p.candidate = candidate.get(), p.tau = tau.get();
  p.coefficient = coefficient.get();
  if (kind == 0) p.positive = positive.get();
  if (kind == 2) p.target = target.get();
  if (kind == 2 && n == 0 && !pads) return;
  if (pads) p.active = active.get();
  if (!kNarrow<S> && chance(0.3)) p.score = score.get(), p.shift = shift.get();
  if (chance(0.5)) p.positive_log_q = positive_log_q.get();
  if (chance(0.5)) p.candidate_log_q = candidate_log_q.get();
  for (int kinds = integer(0, 2), kind = 0; kind < kinds; ++kind) {
    p.row_ids[kind] = positive_ids.get(), p.candidate_ids[kind] = candidate_ids.get();
  }
  if (chance(0.2)) p.skip_below = skip_below.get();

  Array<T> row_loss(b), d_query(b * d), d_positive(b * d), d_candidate(n * d), d_log_q(n);
  for (const auto* one : {&row_loss, &d_query, &d_positive, &d_candidate, &d_log_q}) {
    for (T& value : *one) value = T(kUntouched);
  }
  dwl::Gradients<T> out{};
  out.row_loss = row_loss.get();
  if (chance(0.7)) out.query = d_query.get();
  if (kind == 0 && chance(0.7)) out.positive = d_positive.get();
  if (chance(0.7)) out.candidate = d_candidate.get();
  if (p.candidate_log_q != nullptr && chance(0.7)) out.candidate_log_q = d_log_q.get();
  Array<T> log_sum_exp(b), log_probability(b);
  Array<int64_t> rank(b);
  if (!kNarrow<S> && chance(0.5)) {
    out.log_sum_exp = log_sum_exp.get(), out.log_probability = log_probability.get();
    out.rank = rank.get();
    fill_ids(rank, -1, -1);
  }
  if constexpr (kNarrow<S>) {
    dwl::sampled_softmax_bfloat16(p, out, kThreads);
  } else {
    dwl::sampled_softmax_cpu(p, out, kThreads);
  }
  expect_ranks(rank, n, out.rank == nullptr ? nullptr : active.get(), !pads);

  expect_written(row_loss, b, p.active);
  if (out.query != nullptr) expect_written(d_query, b, p.active);
  if (out.positive != nullptr) expect_written(d_positive, b, p.active);
  if (out.candidate != nullptr) expect_written(d_candidate, n, nullptr);
  if (out.candidate_log_q != nullptr) expect_written(d_log_q, n, nullptr);
}

template <typename T, typename S>
void candidates_per_row() {
  const int64_t b = integer(0, 60), k = integer(0, 20), d = integer(0, 20), v = integer(1, 30);
  const bool odd = chance(0.2), pads = chance(0.4);
  const double size = scale<T>();
  Array<T> query(b * d), tau(b), coefficient(b), positive_log_q(b), candidate_log_q(b * k),
      values(v * d);
  Array<S> table(v * d), positive(b * d);
  Array<int64_t> positive_ids(b), candidate_ids(b * k);
  Array<bool> active(b);
  fill(query, size, odd);
  fill(values, size, odd);
  for (int64_t i = 0; i < v * d; ++i) table[i] = static_cast<S>(values[i]);
  for (const auto* one : {&coefficient, &positive_log_q, &candidate_log_q}) fill(*one, 1.0, odd);
  for (T& value : tau) value = static_cast<T>(std::pow(10, integer(-2, 2)));
  fill_ids(positive_ids, 0, v - 1);
  fill_ids(candidate_ids, -1, v - 1);
  for (S& value : positive) value = static_cast<S>(T(0.5));
  for (bool& one : active) one = chance(0.6);
  for (int64_t i = 0; i < b && pads; ++i) {
    if (active[i]) continue;
    positive_ids[i] = int64_t(1) << 40;
    for (int64_t j = 0; j < k; ++j) candidate_ids[i * k + j] = -7;
  }
  dwl::PerRowProblem<T, S> p{};
  p.rows = b, p.candidates = k, p.dim = d, p.refined = chance(0.4);
  p.query = query.get(), p.table = table.get(), p.tau = tau.get();
  p.coefficient = coefficient.get();
  p.candidate_ids = candidate_ids.get();
  if (chance(0.7)) {
    p.positive_ids = positive_ids.get();
  } else {
    p.positive = positive.get();
  }
  if (chance(0.5)) p.positive_log_q = positive_log_q.get();
  if (chance(0.5)) p.candidate_log_q = candidate_log_q.get();
  if (pads) p.active = active.get();

  Array<T> row_loss(b), d_query(b * d), d_positive(b), d_candidate(b * k);
  for (const auto* one : {&row_loss, &d_query, &d_positive, &d_candidate}) {
    for (T& value : *one) value = T(kUntouched);
  }
  dwl::PerRowGradients<T> out{};
  out.row_loss = row_loss.get();
  if (chance(0.7)) out.query = d_query.get();
  if (chance(0.7)) out.positive = d_positive.get(), out.candidate = d_candidate.get();
  Array<T> log_sum_exp(b), log_probability(b);
  Array<int64_t> rank(b);
  if (chance(0.5)) {
    out.log_sum_exp = log_sum_exp.get(), out.log_probability = log_probability.get();
    out.rank = rank.get();
    fill_ids(rank, -1, -1);
  }
  dwl::per_row_softmax_cpu(p, out, kThreads);
  expect_ranks(rank, k, out.rank == nullptr ? nullptr : active.get(), !pads);
  expect_written(row_loss, b, p.active);
  if (out.query != nullptr) expect_written(d_query, b, p.active);
  if (out.positive == nullptr) return;
  expect_written(d_positive, b, p.active);
  expect_written(d_candidate, b, p.active);
}

template <typename T, typename S>
void gradient_of_a_table() {
  const int64_t r = chance(0.1) ? 3000 : integer(0, 30), d = integer(0, 9);
  const int64_t v = chance(0.3) ? int64_t(1) << integer(12, 40) : integer(0, 30);
  const bool compact = v > 30 || chance(0.5);
  Array<S> source(r * d);
  fill(source, 1.0, chance(0.2));
  const int num_pieces = static_cast<int>(integer(0, 3));
  std::vector<std::unique_ptr<Array<int64_t>>> ids;
  std::vector<std::unique_ptr<Array<T>>> coefficients;
  std::vector<dwl::Places<T>> pieces(num_pieces);
  const bool weighted = chance(0.5);
  for (auto& piece : pieces) {
    piece.width = integer(0, 5);
    ids.push_back(std::make_unique<Array<int64_t>>(r * piece.width));
    fill_ids(*ids.back(), -2, chance(0.5) ? v : std::min<int64_t>(v, 9));
    piece.ids = ids.back()->get();
    coefficients.push_back(std::make_unique<Array<T>>(r * piece.width));
    fill(*coefficients.back(), 1.0, false);
    piece.coefficient = weighted ? coefficients.back()->get() : nullptr;
  }
  const dwl::TableGradient<T, S> p{r, d, v, source.get(), pieces.data(), num_pieces, compact};
  std::unique_ptr<Array<S>> values;
  std::unique_ptr<Array<int64_t>> distinct;
  dwl::table_gradient_cpu<T, S>(p, kThreads, [&](int64_t count) {
    values = std::make_unique<Array<S>>(count * d);
    distinct = std::make_unique<Array<int64_t>>(compact ? count : 0);
    return dwl::TableRows<S>{values->get(), compact ? distinct->get() : nullptr};
  });
  for (int64_t k = 0; k < distinct->size(); ++k) {
    const int64_t id = (*distinct)[k], before = k == 0 ? -1 : (*distinct)[k - 1];
    expect(before < id && id < v, "the ids of a table's gradient");
  }
}

template <typename T, typename S>
void ranks() {
  const int64_t b = chance(0.1) ? 300 : integer(0, 20), d = integer(1, 20);
  const int64_t v = chance(0.1) ? 1500 : integer(1, 40);
  const bool odd = chance(0.2);
  const double size = scale<T>();
  Array<T> query(b * d), values(v * d), bias(v);
  Array<S> table(v * d);
  Array<int64_t> target(b), offsets(b + 1), rank(b);
  Array<bool> padded(b), nowhere(b);
  fill(query, size, odd);
  fill(values, size, odd);
  fill(bias, size, odd);
  for (int64_t i = 0; i < v * d; ++i) table[i] = static_cast<S>(values[i]);
  fill_ids(target, 0, v - 1);
  fill_ids(rank, -1, -1);
  offsets[0] = 0;
  for (int64_t i = 0; i < b; ++i) {
    offsets[i + 1] = offsets[i] + integer(0, 9);
    padded[i] = chance(0.2), nowhere[i] = !padded[i] && chance(0.2);
    if (padded[i] || nowhere[i]) target[i] = int64_t(1) << 40;
  }
  Array<int64_t> seen(offsets[b]);
  fill_ids(seen, -2, v);
  dwl::RankProblem<T, S> p{};
  p.rows = b, p.items = v, p.dim = d;
  p.query = query.get(), p.table = table.get(), p.target = target.get();
  p.padded = padded.get(), p.nowhere = nowhere.get();
  if (chance(0.5)) p.bias = bias.get();
  if (chance(0.5)) p.offsets = offsets.get(), p.seen = seen.get();
  dwl::rank_targets_cpu(p, rank.get(), kThreads);
  for (int64_t i = 0; i < b; ++i) {
    expect(padded[i] ? rank[i] == 0 : rank[i] >= 1 && rank[i] <= v + nowhere[i], "the ranks");
  }
}

}  // namespace

int main(int, char** arguments) {
  const int problems = std::atoi(arguments[1]);
  for (int k = 0; k < problems; ++k) {
    shared_candidates<float>();
    shared_candidates<double>();
    shared_candidates<float, dwl::BFloat16>();
    candidates_per_row<float, float>();
    candidates_per_row<float, dwl::BFloat16>();
    candidates_per_row<double, double>();
    ranks<float, float>();
    ranks<float, dwl::BFloat16>();
    ranks<double, double>();
    gradient_of_a_table<float, float>();
    gradient_of_a_table<float, dwl::BFloat16>();
    gradient_of_a_table<double, double>();
  }
  std::printf("%d problems of each kind\n", problems);
}
