// The element types that every kernel knows.
#pragma once

namespace flamingo_kernels {

enum class DType : int { f32, bf16, f16 };

}  // namespace flamingo_kernels
