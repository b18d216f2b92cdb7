// The BLAS that PyTorch ships, found through libtorch_cpu.
#pragma once

#include <algorithm>

extern "C" {
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
            const float*, const int*, const float*, const int*, const float*, float*, const int*);
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
            const double*, const int*, const double*, const int*, const double*, double*,
            const int*);
}

namespace dwl {

// C = op(A) op(B) + beta C in the column-major order of BLAS. The leading dimension of a matrix
// without rows is 0, which BLAS refuses.
inline void gemm(char ta, char tb, int m, int n, int k, const float* a, int lda, const float* b,
                 int ldb, float beta, float* c, int ldc) {
  const float one = 1;
  lda = std::max(lda, 1), ldb = std::max(ldb, 1), ldc = std::max(ldc, 1);
  sgemm_(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}
inline void gemm(char ta, char tb, int m, int n, int k, const double* a, int lda, const double* b,
                 int ldb, double beta, double* c, int ldc) {
  const double one = 1;
  lda = std::max(lda, 1), ldb = std::max(ldb, 1), ldc = std::max(ldc, 1);
  dgemm_(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}

}  // namespace dwl
