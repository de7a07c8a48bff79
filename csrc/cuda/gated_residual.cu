// The gated residual: z = x + tanh(gate) * y, and backwards dy = tanh(gate) * dz, dgate = tanh'(gate) * sum(dz * y).
// dx is dz itself. Oracle: ops/gated_residual/reference.py and autograd through it.
//
// Forward, a thread takes 8 columns of a few rows. Backward, a block takes the columns of its threads through one
// part of the rows and writes one partial sum of dgate for each gate; `sum_partials` adds these in order.
//
// Bytes: x and y read once and z written once; dz and y read once and dy written once. FLOPs: 2 and 3 an element.
#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kRows = 4;  // of a thread, so that tanh of a gate is not half of the work

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

dim3 make_block(int64_t columns) {
  const unsigned width = threads_across(columns, kThreads);
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

Division divide_gated_residual_bwd(int64_t rows, int64_t columns) {
  const dim3 block = make_block(columns);
  const int64_t blocks = divide_up(columns, block.x * kVector);
  return divide_rows(rows, block.y, 4 * multiprocessors() / blocks, blocks);
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
