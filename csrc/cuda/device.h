// What every kernel file starts with: CUDA, or its emulation on a processor, and what both are used for.
#pragma once

#if defined(FK_EMULATE)
#include "host/emulation.h"
#else
#include "ptx.h"
#endif

#include "params.h"

namespace flamingo_kernels {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(f16 value) { return f16_to_float(value.bits); }
__device__ inline float to_float(bf16 value) { return bf16_to_float(value.bits); }

template <class T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) { return value; }
template <>
__device__ inline f16 from_float<f16>(float value) { return {float_to_f16(value)}; }
template <>
__device__ inline bf16 from_float<bf16>(float value) { return {float_to_bf16(value)}; }

constexpr float kInfinity = __builtin_huge_valf();

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sum over the lanes of a warp, the same bits in all of them.
__device__ inline float warp_sum(float value) {
  for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// Calls a function with a value of an element type: by_type(dtype, [&](auto type) { using T = decltype(type); ... }).
template <class Function>
void by_type(DType dtype, Function function) {
  if (dtype == DType::f32) function(float());
  if (dtype == DType::bf16) function(bf16());
  if (dtype == DType::f16) function(f16());
}

}  // namespace flamingo_kernels
