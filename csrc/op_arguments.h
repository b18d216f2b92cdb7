// What an op was given, as pointers, and its checks. bindings.cpp has the ops.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace dwl {

// To a kernel a null pointer is a tensor that is absent, so those of empty tensors, which PyTorch
// makes null, point here.
inline std::max_align_t nothing;

template <typename T>
const T* data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.numel() == 0 ? &nothing : tensor.const_data_ptr());
}
template <typename T>
const T* data(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}
// Where a gradient goes; null where it is not wanted.
template <typename T>
T* output(const at::Tensor& tensor, bool wanted) {
  if (!wanted) return nullptr;
  return static_cast<T*>(tensor.numel() == 0 ? &nothing : tensor.mutable_data_ptr());
}

inline void check(const std::optional<at::Tensor>& tensor, const char* name, at::IntArrayRef sizes,
                  at::ScalarType dtype) {
  if (!tensor.has_value()) return;
  TORCH_CHECK(tensor->device().is_cpu() && tensor->is_contiguous() && tensor->sizes() == sizes &&
                  tensor->scalar_type() == dtype,
              name, ": wanted a contiguous CPU tensor of ", dtype, " ", sizes, ", got ",
              tensor->scalar_type(), " ", tensor->sizes(), " on ", tensor->device());
}

// The temperatures of rows that are not padding are positive, or NaN.
template <typename T>
void check_tau(const at::Tensor& tau, const std::optional<at::Tensor>& active) {
  const T* value = data<T>(tau);
  const bool* counts = data<bool>(active);
  for (int64_t i = 0; i < tau.size(0); ++i) {
    const bool wrong = value[i] <= 0 && (counts == nullptr || counts[i]);
    TORCH_CHECK_VALUE(!wrong, "tau is ", value[i], " in row ", i, "; wanted a positive number");
  }
}

// Ids of rows that are not padding lie in [least, end).
inline void check_ids(const at::Tensor& ids, const char* name,
                      const std::optional<at::Tensor>& active, int64_t end, int64_t least = 0) {
  const int64_t* id = data<int64_t>(ids);
  const bool* counts = data<bool>(active);
  const int64_t rows = ids.size(0), width = rows == 0 ? 0 : ids.numel() / rows;
  int64_t wrong = rows;
#pragma omp parallel for num_threads(at::get_num_threads()) \
    reduction(min : wrong) if (ids.numel() > 1 << 15)
  for (int64_t i = 0; i < rows; ++i) {
    if (counts != nullptr && !counts[i]) continue;
    int64_t outside = 0;  // as wide as ids: compilers do not vectorise a bool beside them
    for (int64_t j = i * width; j < (i + 1) * width; ++j) outside |= id[j] < least || id[j] >= end;
    if (outside) wrong = std::min(wrong, i);
  }
  TORCH_CHECK_INDEX(wrong == rows, name, " out of range in row ", wrong);
}

}  // namespace dwl
