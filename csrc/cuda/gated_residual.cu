// The gated residual: z = x + tanh(gate) * y, and backwards dy = tanh(gate) * dz, dgate = tanh'(gate) * sum(dz * y).
// dx is dz itself. Oracle: ops/gated_residual/reference.py and autograd through it.
//
// Forward, a thread takes 8 columns of a few rows. Backward, a block takes the columns of its threads through one
// part of the rows and writes one partial sum of dgate for each gate; `sum_partials` adds these in order.
//
// Bytes: x and y read once and z written once; dz and y read once and dy written once. FLOPs: 2 and 3 an element.
#include <algorithm>

#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kRows = 4;  // of a thread, so that tanh of a gate is not half of the work

// tanh(gate) of the thread's columns.
__device__ void load_tanh(float (&values)[kVector], const GatedResidual& params, Columns columns) {
  if (params.per_channel) load(values, params.gate, columns);
  const float one = params.per_channel ? 0.0f : tanhf(element(params.gate, 0));
  for (float& value : values) value = params.per_channel ? tanhf(value) : one;
}

// d tanh(a) / da = 1 - tanh(a)^2, computed so that nothing cancels where tanh is near 1.
__device__ float tanh_derivative(float a) {
  const float t = expf(-2 * fabsf(a));
  return 4 * t / ((1 + t) * (1 + t));
}

// The sum over the threads of a block, the same bits in all of them; `scratch` holds a float a warp.
__device__ float block_sum(float value, float* scratch) {
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
__device__ void sum_over_rows(float (&sums)[kVector], float* scratch) {
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

// Writes what a block adds to the gradient of the gate, from sums of dz * y: a number for each of its columns, or one
// where all columns have one gate.
__device__ void store_gate_partial(
    const GatedResidual& params, float (&sums)[kVector], Columns columns, float* scratch) {
  sum_over_rows(sums, scratch);
  if (params.per_channel) {
    for (int i = 0; i < kVector; ++i)
      if (const int64_t column = columns.first + i; threadIdx.y == 0 && column < columns.count)
        params.dgate[blockIdx.x * columns.count + column] = sums[i] * tanh_derivative(element(params.gate, column));
    return;
  }
  float own = 0;
  for (float sum : sums) own += sum;
  const float total = block_sum(own, scratch) * tanh_derivative(element(params.gate, 0));
  if (threadIdx.x == 0 && threadIdx.y == 0) params.dgate[blockIdx.x * gridDim.y + blockIdx.y] = total;
}

template <class T, bool wide>
__global__ void __launch_bounds__(kThreads) gated_residual_fwd_kernel(GatedResidual params) {
  const Columns columns = {(int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVector, params.columns};
  const int64_t first = int64_t(blockIdx.x) * blockDim.y * kRows + threadIdx.y;
  if (!columns.inside()) return;
  float tanh_gate[kVector];
  load_tanh(tanh_gate, params, columns);
  for (int64_t row = first; row < min(first + blockDim.y * kRows, params.rows); row += blockDim.y) {
    float x[kVector], y[kVector];
    load<T, wide>(x, params.x, row, columns);
    load<T, wide>(y, params.y, row, columns);
    for (int i = 0; i < kVector; ++i) x[i] += tanh_gate[i] * y[i];
    store<T, wide>(params.z, row, columns, x);
  }
}

template <class T, bool wide>
__global__ void __launch_bounds__(kThreads) gated_residual_bwd_kernel(GatedResidual params) {
  const Columns columns = {(int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVector, params.columns};
  const int64_t first = blockIdx.x * params.part_rows, end = min(first + params.part_rows, params.rows);
  float tanh_gate[kVector], dgate[kVector] = {};
  load_tanh(tanh_gate, params, columns);
  for (int64_t row = first + threadIdx.y; columns.inside() && row < end; row += blockDim.y) {
    float dz[kVector], y[kVector];
    load<T, wide>(dz, params.dz, row, columns);
    load<T, wide>(y, params.y, row, columns);
    for (int i = 0; i < kVector; ++i) {
      dgate[i] += dz[i] * y[i];
      dz[i] *= tanh_gate[i];
    }
    store<T, wide>(params.dy, row, columns, dz);
  }
  store_gate_partial(params, dgate, columns, static_cast<float*>(shared_memory()));
}

// How the threads of a block share rows: some side by side, each with kVector columns.
dim3 make_block(int64_t columns) {
  unsigned width = 32;
  while (width < kThreads && width * kVector < columns) width *= 2;
  return dim3(width, kThreads / width);
}

}  // namespace

namespace kernels {

void gated_residual_fwd(const GatedResidual& params, Stream stream) {
  const dim3 block = make_block(params.columns);
  const dim3 grid = make_grid(divide_up(params.rows, block.y * kRows), divide_up(params.columns, block.x * kVector));
  by_layout({params.x, params.y, params.z}, [&](auto type, auto wide) {
    launch(stream, gated_residual_fwd_kernel<decltype(type), wide()>, grid, block, 0, params);
  });
}

// Cuts rows into parts of a multiple of block.y rows each: at most four blocks a multiprocessor.
Division divide_gated_residual_bwd(int64_t rows, int64_t columns) {
  const dim3 block = make_block(columns);
  const int64_t blocks = divide_up(columns, block.x * kVector), steps = divide_up(rows, block.y);
  const int64_t most = std::max<int64_t>(1, 4 * multiprocessors() / blocks);
  const int64_t part_rows = block.y * std::max<int64_t>(1, divide_up(steps, most));
  return {divide_up(rows, part_rows), part_rows, blocks};
}

void gated_residual_bwd(const GatedResidual& params, Stream stream) {
  const dim3 block = make_block(params.columns);
  const dim3 grid = make_grid(params.parts, divide_up(params.columns, block.x * kVector));
  by_layout({params.dz, params.y, params.dy}, [&](auto type, auto wide) {
    const size_t shared = kThreads * kVector * sizeof(float);
    launch(stream, gated_residual_bwd_kernel<decltype(type), wide()>, grid, block, shared, params);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
