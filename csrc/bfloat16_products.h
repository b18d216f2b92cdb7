// Matrix products of bfloat16 with sums in float32. bfloat16_products.cpp makes them with what
// PyTorch ships; without PyTorch a caller has to bring its own.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace dwl {

// Whether this processor has instructions for them, and PyTorch may use them now.
bool has_bfloat16_products();

// Whether PyTorch is told that its products of float32 may round to bfloat16.
bool float32_may_be_bfloat16();

// C [m, n] = A [m, k] B [k, n] (+ C where `add`), each with the stride between its rows. An element
// of `b` holds two numbers of B, those of rows 2 i and 2 i + 1 in one column, the first one below.
// Every different shape is compiled once per thread, and kept: callers must have few.
void bfloat16_product(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                      const uint32_t* b, int64_t ldb, float* c, int64_t ldc, bool add);

// To be called by every thread that multiplied, when it is done: it gives matrix registers back.
void release_bfloat16_products();

}  // namespace dwl
