// The gated residual: z = x + tanh(gate) * y, and backwards dy = tanh(gate) * dz, dgate = tanh'(gate) * sum(dz * y).
// dx is dz itself. Oracle: ops/gated_residual/reference.py and autograd through it.
//
// Forward, a thread takes 8 columns of a few rows. Backward, a block takes the columns of its threads through one
// part of the rows and writes one partial sum a gate; `sum` adds these in order.
//
// Bytes: x and y read once and z written once; dz and y read once and dy written once. FLOPs: 2 and 3 an element.
#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kRows = 4;  // of a thread, so that tanh of a gate is not half of the work

template <class T, bool wide>
__global__ void __launch_bounds__(kThreads) gated_residual_fwd_kernel(GatedResidual p) {
  const Columns columns = {(int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVector, p.columns};
  const int64_t first = int64_t(blockIdx.x) * blockDim.y * kRows + threadIdx.y;
  if (!columns.inside()) return;
  float factor[kVector];
  load_tanh(factor, p, columns);
  for (int64_t row = first; row < min(first + blockDim.y * kRows, p.rows); row += blockDim.y) {
    float x[kVector], y[kVector];
    load<T, wide>(x, p.x, row, columns);
    load<T, wide>(y, p.y, row, columns);
    for (int i = 0; i < kVector; ++i) x[i] += factor[i] * y[i];
    store<T, wide>(p.z, row, columns, x);
  }
}

template <class T, bool wide>
__global__ void __launch_bounds__(kThreads) gated_residual_bwd_kernel(GatedResidual p) {
  const Columns columns = {(int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVector, p.columns};
  const int64_t first = blockIdx.x * p.part_rows, end = min(first + p.part_rows, p.rows);
  float factor[kVector], sums[kVector] = {};
  load_tanh(factor, p, columns);
  for (int64_t row = first + threadIdx.y; columns.inside() && row < end; row += blockDim.y) {
    float dz[kVector], y[kVector];
    load<T, wide>(dz, p.dz, row, columns);
    load<T, wide>(y, p.y, row, columns);
    for (int i = 0; i < kVector; ++i) {
      sums[i] += dz[i] * y[i];
      dz[i] *= factor[i];
    }
    store<T, wide>(p.dy, row, columns, dz);
  }
  store_gate_partial(p, sums, columns, static_cast<float*>(shared_memory()));
}

dim3 block_of(int64_t columns) {
  const unsigned width = width_of(columns, kThreads);
  return dim3(width, kThreads / width);
}

}  // namespace

namespace kernels {

void gated_residual_fwd(const GatedResidual& p, Stream stream) {
  const dim3 block = block_of(p.columns);
  const dim3 grid = grid_of(divide_up(p.rows, block.y * kRows), divide_up(p.columns, block.x * kVector));
  by_layout({p.x, p.y, p.z}, [&](auto type, auto wide) {
    launch(stream, gated_residual_fwd_kernel<decltype(type), wide()>, grid, block, 0, p);
  });
}

Division divide_gated_residual_bwd(int64_t rows, int64_t columns) {
  const dim3 block = block_of(columns);
  const int64_t blocks = divide_up(columns, block.x * kVector);
  return divide_rows(rows, block.y, 4 * multiprocessors() / blocks, blocks);
}

void gated_residual_bwd(const GatedResidual& p, Stream stream) {
  const dim3 block = block_of(p.columns);
  const dim3 grid = grid_of(p.parts, divide_up(p.columns, block.x * kVector));
  by_layout({p.dz, p.y, p.dy}, [&](auto type, auto wide) {
    const size_t shared = kThreads * kVector * sizeof(float);
    launch(stream, gated_residual_bwd_kernel<decltype(type), wide()>, grid, block, shared, p);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
