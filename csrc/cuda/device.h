// What every kernel file starts with: CUDA, or its emulation on a processor, and what both are used for.
#pragma once

#if defined(FK_EMULATE)
#include "host/emulation.h"
#else
#include "ptx.h"
#endif

#include <stdexcept>
#include <string>

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
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline f16 from_float<f16>(float value) {
  return {float_to_f16(value)};
}
template <>
__device__ inline bf16 from_float<bf16>(float value) {
  return {float_to_bf16(value)};
}

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) { mma_bf16(c, a, b); }
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) { mma_f16(c, a, b); }

constexpr float kInfinity = __builtin_huge_valf();

// Of a thread in a block of one dimension.
__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of so many blocks. CUDA would drop those beyond its limits, and their results.
inline dim3 make_grid(int64_t x, int64_t y = 1) {
  if (x > INT32_MAX || y > 65535)
    throw std::length_error(
        "flamingo_kernels: a grid of " + std::to_string(x) + " x " + std::to_string(y) +
        " blocks is above 2147483647 x 65535; cut the tensors.");
  return dim3(unsigned(x), unsigned(y));
}

// The sum over the lanes of a warp, the same bits in all of them.
__device__ inline float warp_sum(float value) {
  for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int mask = 16; mask; mask /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, mask));
  return value;
}

__device__ inline int warp_min(int value) {
  for (int mask = 16; mask; mask /= 2) value = min(value, __shfl_xor_sync(0xffffffffu, value, mask));
  return value;
}

constexpr float kLog2E = 1.4426950408889634f;

// 2 ** (scale * (score - row_max)); 0 where both are -inf, as in a row that has seen nothing yet. The scale comes after
// the subtraction, so that the largest score has the weight 1, however large it is.
__device__ inline float scaled_exp2(float score, float row_max, float scale = 1) {
  return exp2f((score - (row_max == -kInfinity ? 0.0f : row_max)) * scale);
}

// Calls a function with a value of an element type: by_type(dtype, [&](auto type) { using T = decltype(type); ... }).
template <class Function>
void by_type(DType dtype, Function function) {
  if (dtype == DType::f32) function(float());
  if (dtype == DType::bf16) function(bf16());
  if (dtype == DType::f16) function(f16());
}

}  // namespace flamingo_kernels
