// Rows of matrices in vectors of 8 elements, as floats; for the kernels that read each element once.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "device.h"
#include "kernels.h"

namespace flamingo_kernels {

constexpr int kVector = 8;  // elements that a thread takes at once: 16 bytes where they have 16 bits

// The element type of matrices that do not agree on one: each says its own at run time.
struct Mixed {};

// What neighbouring threads take of a row, and what is beyond its end.
struct Columns {
  int64_t first, count;  // first of the thread's, count of the row
  __device__ bool inside() const { return first < count; }
};

template <class T, bool wide>
__device__ inline void load_typed(float (&values)[kVector], const T* at, Columns columns) {
  if constexpr (wide) {
    constexpr int loads = kVector * sizeof(T) / 16;
    uint4 words[loads];
    for (int i = 0; i < loads; ++i) words[i] = load_128(at + i * (kVector / loads));
    T elements[kVector];
    memcpy(elements, words, sizeof words);
    for (int i = 0; i < kVector; ++i) values[i] = to_float(elements[i]);
  } else {
    for (int i = 0; i < kVector; ++i) values[i] = columns.first + i < columns.count ? to_float(at[i]) : 0.0f;
  }
}

template <class T, bool wide>
__device__ inline void store_typed(T* at, const float (&values)[kVector], Columns columns) {
  if constexpr (wide) {
    constexpr int stores = kVector * sizeof(T) / 16;
    T elements[kVector];
    for (int i = 0; i < kVector; ++i) elements[i] = from_float<T>(values[i]);
    uint4 words[stores];
    memcpy(words, elements, sizeof words);
    for (int i = 0; i < stores; ++i) store_128(at + i * (kVector / stores), words[i]);
  } else {
    for (int i = 0; i < kVector; ++i)
      if (columns.first + i < columns.count) at[i] = from_float<T>(values[i]);
  }
}

// Calls a function with T, or where T is Mixed with the type that a matrix says it has.
template <class T, class Function>
__device__ inline void with_type(DType dtype, Function function) {
  if constexpr (!std::is_same_v<T, Mixed>)
    function(T());
  else if (dtype == DType::f32)
    function(float());
  else if (dtype == DType::bf16)
    function(bf16());
  else
    function(f16());
}

template <class T, bool wide>
__device__ inline void load(float (&values)[kVector], const Matrix& matrix, int64_t row, Columns columns) {
  with_type<T>(matrix.dtype, [&](auto type) {
    using Element = decltype(type);
    load_typed<Element, wide>(values, (const Element*)matrix.data + row * matrix.row + columns.first, columns);
  });
}

template <class T, bool wide>
__device__ inline void store(const Matrix& matrix, int64_t row, Columns columns, const float (&values)[kVector]) {
  with_type<T>(matrix.dtype, [&](auto type) {
    using Element = decltype(type);
    store_typed<Element, wide>((Element*)matrix.data + row * matrix.row + columns.first, values, columns);
  });
}

// A value as the matrix holds it.
template <class T>
__device__ inline float rounded(const Matrix& matrix, float value) {
  with_type<T>(matrix.dtype, [&](auto type) { value = to_float(from_float<decltype(type)>(value)); });
  return value;
}

__device__ inline float element(const Vector& vector, int64_t i) {
  float value;
  with_type<Mixed>(vector.dtype, [&](auto type) { value = to_float(((const decltype(type)*)vector.data)[i]); });
  return value;
}

// The thread's elements of a vector of parameters; 0 beyond the end.
__device__ inline void load(float (&values)[kVector], const Vector& vector, Columns columns) {
  for (int i = 0; i < kVector; ++i)
    values[i] = columns.first + i < columns.count ? element(vector, columns.first + i) : 0.0f;
}

// tanh(gate) of the thread's columns.
__device__ inline void load_tanh(float (&values)[kVector], const GatedResidual& params, Columns columns) {
  if (params.per_channel) load(values, params.gate, columns);
  const float one = params.per_channel ? 0.0f : tanhf(element(params.gate, 0));
  for (float& value : values) value = params.per_channel ? tanhf(value) : one;
}

// d tanh(a) / da = 1 - tanh(a)^2, computed so that nothing cancels where tanh is near 1.
__device__ inline float tanh_derivative(float a) {
  const float t = expf(-2 * fabsf(a));
  return 4 * t / ((1 + t) * (1 + t));
}

// The sum over the threads of a block, the same bits in all of them; `scratch` holds a float a warp.
__device__ inline float block_sum(float value, float* scratch) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / 32;
  value = warp_sum(value);
  if (thread % 32 == 0) scratch[thread / 32] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < warps; ++warp) total += scratch[warp];
  __syncthreads();  // the scratch is free again
  return total;
}

// Adds what the rows of a block's threads have summed for the same columns: the first row holds the totals after it,
// the others zeros. `scratch` holds the sums of all threads.
__device__ inline void sum_over_rows(float (&sums)[kVector], float* scratch) {
  if (blockDim.y == 1) return;
  float* own = scratch + (threadIdx.y * blockDim.x + threadIdx.x) * kVector;
  for (int i = 0; i < kVector; ++i) own[i] = sums[i];
  __syncthreads();
  for (int i = 0; i < kVector; ++i) {
    sums[i] = 0;
    for (unsigned row = 0; threadIdx.y == 0 && row < blockDim.y; ++row) sums[i] += own[row * blockDim.x * kVector + i];
  }
  __syncthreads();  // the scratch is free again
}

// Writes what a part of the rows adds to the gradient of a vector [D].
__device__ inline void store_partial(float* partials, const float (&sums)[kVector], Columns columns) {
  for (int i = 0; i < kVector; ++i)
    if (threadIdx.y == 0 && columns.first + i < columns.count)
      partials[blockIdx.x * columns.count + columns.first + i] = sums[i];
}

// The same for a gate, from sums of dz * y. Where all columns have one gate, every block writes one number.
__device__ inline void store_gate_partial(
    const GatedResidual& params, float (&sums)[kVector], Columns columns, float* scratch) {
  sum_over_rows(sums, scratch);
  if (params.per_channel) {
    for (int i = 0; i < kVector; ++i)
      if (columns.first + i < columns.count) sums[i] *= tanh_derivative(element(params.gate, columns.first + i));
    store_partial(params.dgate, sums, columns);
    return;
  }
  float own = 0;
  for (float sum : sums) own += sum;
  const float total = block_sum(own, scratch) * tanh_derivative(element(params.gate, 0));
  if (threadIdx.x == 0 && threadIdx.y == 0) params.dgate[blockIdx.x * gridDim.y + blockIdx.y] = total;
}

// How the threads of a block share rows: `width` of them side by side, each with kVector columns.
inline unsigned threads_across(int64_t columns, unsigned most) {
  unsigned width = 32;
  while (width < most && width * kVector < columns) width *= 2;
  return width;
}

// Cuts rows into at most `parts` parts, of a multiple of `step` rows each.
inline Division divide_rows(int64_t rows, int64_t step, int64_t parts, int64_t blocks) {
  const int64_t steps = divide_up(rows, step);
  const int64_t part_rows = step * std::max<int64_t>(1, divide_up(steps, std::max<int64_t>(1, parts)));
  return {divide_up(rows, part_rows), part_rows, blocks};
}

// Calls a function with an element type that all of these matrices have, or Mixed, and whether accesses are wide.
template <class Function>
void by_layout(std::initializer_list<Matrix> matrices, Function function) {
  const DType dtype = matrices.begin()->dtype;
  bool same = true, wide = true;
  for (const Matrix& matrix : matrices) same = same && matrix.dtype == dtype, wide = wide && matrix.wide;
  const auto by_width = [&](auto type) { wide ? function(type, std::true_type()) : function(type, std::false_type()); };
  if (!same) return by_width(Mixed());
  by_type(dtype, by_width);
}

}  // namespace flamingo_kernels
