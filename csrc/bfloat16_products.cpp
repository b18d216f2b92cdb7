// Products through oneDNN, in the layout that PyTorch's attention on CPUs uses: on the matrix
// registers of a processor with AMX, else with the dot products of AVX512-BF16.

#include "bfloat16_products.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <exception>

namespace dwl {

bool float32_may_be_bfloat16() {
  try {
    return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM;
  } catch (const std::exception&) {  // set by PyTorch's old functions and otherwise by its new ones
    return false;
  }
}

#ifdef CPUBLAS_BRGEMM_BF16BF16F32

using at::native::cpublas::brgemm;

// PyTorch does not say which processors can, so it is tried.
bool has_bfloat16_products() {
  static const bool can = [] {
    try {
      alignas(64) const at::BFloat16 a[16 * 16] = {}, b[16 * 16] = {};
      alignas(64) float c[16 * 16];
      brgemm(16, 16, 16, 16, 16, 16, false, a, b, c);
      release_bfloat16_products();
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return at::globalContext().userEnabledMkldnn() && can;
}

void bfloat16_product(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                      const uint32_t* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
         reinterpret_cast<const at::BFloat16*>(b), c);
}

void release_bfloat16_products() {
  at::native::cpublas::brgemm_release();
}

#else

bool has_bfloat16_products() {
  return false;
}
void bfloat16_product(int64_t, int64_t, int64_t, const BFloat16*, int64_t, const uint32_t*, int64_t,
                      float*, int64_t, bool) {}
void release_bfloat16_products() {}

#endif

}  // namespace dwl
