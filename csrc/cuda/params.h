#pragma once
#include <cstdint>
namespace flamingo_kernels { enum class DType : int { f32, bf16, f16 }; }
