// The gated residual with a norm: z = x + tanh(gate) * y and n = norm(z), and backwards
//
//   dx = dz + rstd * (weight * dn - mean(weight * dn) - zhat * mean(weight * dn * zhat)),  zhat = (z - mean) * rstd
//   dy = tanh(gate) * dx,  dgate = tanh'(gate) * sum(dx * y),  dweight = sum(dn * zhat),  dbias = sum(dn)
//
// where an RMSNorm subtracts neither mean nor mean(weight * dn). Oracle: ops/gated_residual_norm/reference.py and
// autograd through it.
//
// Forward, a block takes one row, which stays in its shared memory. Backward, a block takes a part of the rows, one
// after the other, and keeps the sums of its columns in registers. Rows too wide for that are cut into blocks of
// columns, and another kernel makes their two means first.
//
// Bytes: x and y read once, z and n written once; dz, dn, y and z read once (cut rows: dn and z twice), dx and dy
// written once. FLOPs: about 9 and 17 an element.
#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr unsigned kThreads = 256;      // forward, and for a block of columns of a cut row
constexpr unsigned kMostThreads = 512;  // for a whole row backward
constexpr unsigned kScratch = 32;       // floats, for the sums of a block

// The mean of the row (0 for an RMSNorm), which is taken off it, and one over its standard deviation.
struct Moments {
  float mean, rstd;
};

__device__ Moments centre(float* row, const GatedResidualNorm& p, float* scratch) {
  const int64_t columns = p.residual.columns;
  float sum = 0, rest = 0, squares = 0;
  if (!p.rms) {
    for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) sum += row[i];
    sum = block_sum(sum, scratch);
  }
  const float rough = sum / columns;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
    row[i] -= rough;
    rest += row[i];
    squares += row[i] * row[i];
  }
  // what the rough mean missed: a large mean loses the low bits of its sum
  rest = p.rms ? 0.0f : block_sum(rest, scratch) / columns;
  const float variance = block_sum(squares, scratch) / columns - rest * rest;
  for (int64_t i = threadIdx.x; !p.rms && i < columns; i += blockDim.x) row[i] -= rest;
  return {rough + rest, 1 / sqrtf(variance + p.eps)};
}

template <class T, bool wide>
__global__ void __launch_bounds__(kThreads) gated_residual_norm_fwd_kernel(GatedResidualNorm p) {
  float* scratch = static_cast<float*>(shared_memory());
  float* sums = scratch + kScratch;  // the row
  const int64_t row = blockIdx.x;
  Columns columns = {threadIdx.x * kVector, p.residual.columns};
  for (; columns.inside(); columns.first += blockDim.x * kVector) {
    float x[kVector], y[kVector], factor[kVector];
    load<T, wide>(x, p.residual.x, row, columns);
    load<T, wide>(y, p.residual.y, row, columns);
    load_tanh(factor, p.residual, columns);
    for (int i = 0; i < kVector; ++i) {
      x[i] = rounded<T>(p.residual.z, x[i] + factor[i] * y[i]);
      if (columns.first + i < columns.count) sums[columns.first + i] = x[i];
    }
    store<T, wide>(p.residual.z, row, columns, x);
  }
  __syncthreads();
  const Moments moments = centre(sums, p, scratch);
  __syncthreads();
  if (threadIdx.x == 0) p.mean[row] = moments.mean, p.rstd[row] = moments.rstd;
  for (columns.first = threadIdx.x * kVector; columns.inside(); columns.first += blockDim.x * kVector) {
    float n[kVector], weight[kVector], bias[kVector] = {};
    load(weight, p.weight, columns);
    if (p.bias.data) load(bias, p.bias, columns);
    for (int i = 0; i < kVector; ++i)
      n[i] = columns.first + i < columns.count ? sums[columns.first + i] * moments.rstd * weight[i] + bias[i] : 0.0f;
    store<T, wide>(p.n, row, columns, n);
  }
}

// zhat of the thread's columns, and with it the share that the norm adds to the two means.
template <class T, bool wide>
__device__ void load_normed(
    float (&zhat)[kVector], float (&dn)[kVector], const GatedResidualNorm& p, int64_t row, Columns columns) {
  load<T, wide>(zhat, p.residual.z, row, columns);
  load<T, wide>(dn, p.dn, row, columns);
  for (int i = 0; i < kVector; ++i)
    zhat[i] = columns.first + i < columns.count ? (zhat[i] - p.mean[row]) * p.rstd[row] : 0.0f;
}

// The means of weight * dn and of weight * dn * zhat over a row that is cut: a warp takes one row.
template <class T, bool wide>
__global__ void __launch_bounds__(kThreads) gated_residual_norm_means_kernel(GatedResidualNorm p) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.residual.rows) return;
  float outer = 0, along = 0;
  Columns columns = {threadIdx.x * kVector, p.residual.columns};
  for (; columns.inside(); columns.first += blockDim.x * kVector) {
    float zhat[kVector], dn[kVector], weight[kVector];
    load_normed<T, wide>(zhat, dn, p, row, columns);
    load(weight, p.weight, columns);
    for (int i = 0; i < kVector; ++i) {
      outer += weight[i] * dn[i];
      along += weight[i] * dn[i] * zhat[i];
    }
  }
  outer = warp_sum(outer), along = warp_sum(along);
  if (threadIdx.x != 0) return;
  p.means[row] = outer / columns.count;
  p.means[p.residual.rows + row] = along / columns.count;
}

template <class T, bool wide, unsigned threads>
__global__ void __launch_bounds__(threads) gated_residual_norm_bwd_kernel(GatedResidualNorm p) {
  float* scratch = static_cast<float*>(shared_memory());
  const Columns columns = {(int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVector, p.residual.columns};
  const int64_t first = blockIdx.x * p.residual.part_rows, end = min(first + p.residual.part_rows, p.residual.rows);
  float factor[kVector], weight[kVector], dgate[kVector] = {}, dweight[kVector] = {}, dbias[kVector] = {};
  load_tanh(factor, p.residual, columns);
  load(weight, p.weight, columns);
  for (int64_t row = first; row < end; ++row) {
    float zhat[kVector] = {}, dn[kVector] = {}, y[kVector] = {}, dz[kVector] = {};
    if (columns.inside()) {
      load_normed<T, wide>(zhat, dn, p, row, columns);
      load<T, wide>(y, p.residual.y, row, columns);
      load<T, wide>(dz, p.residual.dz, row, columns);
    }
    float outer = 0, along = 0;
    for (int i = 0; i < kVector; ++i) {
      dweight[i] += dn[i] * zhat[i];
      dbias[i] += dn[i];
      dn[i] *= weight[i];
      outer += dn[i];
      along += dn[i] * zhat[i];
    }
    outer = p.means ? p.means[row] : block_sum(outer, scratch) / columns.count;
    along = p.means ? p.means[p.residual.rows + row] : block_sum(along, scratch) / columns.count;
    for (int i = 0; i < kVector; ++i) {
      dz[i] += ((p.rms ? dn[i] : dn[i] - outer) - zhat[i] * along) * p.rstd[row];
      dgate[i] += dz[i] * y[i];
    }
    if (!columns.inside()) continue;
    store<T, wide>(p.dx, row, columns, dz);
    for (int i = 0; i < kVector; ++i) dz[i] *= factor[i];
    store<T, wide>(p.residual.dy, row, columns, dz);
  }
  store_gate_partial(p.residual, dgate, columns, scratch);
  store_partial(p.dweight, dweight, columns);
  store_partial(p.dbias, dbias, columns);
}

unsigned threads_of(int64_t columns) {
  const unsigned width = width_of(columns, kMostThreads);
  return width * kVector < columns ? kThreads : width;
}

}  // namespace

namespace kernels {

void gated_residual_norm_fwd(const GatedResidualNorm& p, Stream stream) {
  const size_t shared = (kScratch + p.residual.columns) * sizeof(float);
  by_layout({p.residual.x, p.residual.y, p.residual.z, p.n}, [&](auto type, auto wide) {
    const dim3 grid = grid_of(p.residual.rows), block(width_of(p.residual.columns, kThreads));
    launch(stream, gated_residual_norm_fwd_kernel<decltype(type), wide()>, grid, block, shared, p);
  });
}

Division divide_gated_residual_norm_bwd(int64_t rows, int64_t columns) {
  const unsigned threads = threads_of(columns);
  const int64_t blocks = divide_up(columns, threads * kVector);
  return divide_rows(rows, 1, multiprocessors() * (kMostThreads / threads) / blocks, blocks);
}

void gated_residual_norm_bwd(const GatedResidualNorm& p, Stream stream) {
  const unsigned threads = threads_of(p.residual.columns);
  const dim3 grid = grid_of(p.residual.parts, divide_up(p.residual.columns, threads * kVector));
  const auto matrices = {p.residual.z, p.residual.y, p.residual.dz, p.dn, p.dx, p.residual.dy};
  by_layout(matrices, [&](auto type, auto wide) {
    using T = decltype(type);
    if (p.means) {
      const dim3 block(32, kThreads / 32), programs = grid_of(divide_up(p.residual.rows, block.y));
      launch(stream, gated_residual_norm_means_kernel<T, wide()>, programs, block, 0, p);
    }
    const auto kernel = threads > kThreads ? gated_residual_norm_bwd_kernel<T, wide(), kMostThreads>
                                           : gated_residual_norm_bwd_kernel<T, wide(), kThreads>;
    launch(stream, kernel, grid, dim3(threads), kScratch * sizeof(float), p);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
