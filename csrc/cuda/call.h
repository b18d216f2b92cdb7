// What the host passes to the CUDA kernel, as plain structs that Python fills through ctypes: every
// field takes 8 bytes. Letters as in dwl_kernels/backends/reference/. Free of PyTorch and of
// CUDA.
#pragma once

#include <cstdint>

namespace dwl {

// A place is a position in the order in which rows or candidates stream, padding left out.
struct Side {
  const void* embedding;  // [length, D] dense, row-major
  const int64_t* order;  // [length] the row of `embedding` at each place, or null: the place itself
  const int64_t* count;  // [1] how many places there are, or null: length
  int64_t length;
};

// Arrays of rows and candidates are in the order of places. "N" is the accumulation type, float or
// double; "or null" marks what may be absent.
struct Call {
  int64_t dim;                   // D
  Side row;                      // the queries
  Side candidate;                // in a batch, place i is the positive of the row at place i
  const void* positive;          // [B, D] by row of the queries, or null: a candidate, own(place)
  const int64_t* own;            // [B] own(place), or null: the same place (in-batch)
  const void* tau;               // [B] N
  const void* coefficient;       // [B] N, a_i / r_i: what row i weighs in the gradients
  const void* positive_log_q;    // [B] N, nats, or null
  const void* candidate_log_q;   // [N] N, nats, or null
  const int64_t* row_ids;        // [B], or null; a candidate of the same id is a hit
  const int64_t* candidate_ids;  // [N], none of them -1
  const int64_t* removed;        // [1] candidates of log-Q +inf, no row's hits; or null: none
  const void* narrowing;         // [1] N, power of two that lifts a p / tau into float16, or null
  int64_t refined;               // correction of arXiv 2507.09331 instead of the standard one

  // Results, by row of the embeddings; null where not wanted.
  void* row_loss;        // [B] N, r_i l_i
  void* tau_gradient;    // [B] N
  void* query_gradient;  // [B, D] G: as the embeddings, but float for float16
  void* positive_gradient;
  void* candidate_gradient;        // [N, D] G
  void* candidate_log_q_gradient;  // [N] N

  void* space;  // N, dwl_space() of them
};

}  // namespace dwl
