// Memory of large outputs, which the next call takes over when the last tensor in it is gone.
#pragma once

#include <ATen/core/Tensor.h>

namespace dwl {

// As `like.new_empty(sizes, dtype)`. New memory comes from the system page by page, and each is
// cleared, which for the gradient of a table is a good part of a step. One block of at most 256 MB
// is kept.
at::Tensor new_large(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace dwl
