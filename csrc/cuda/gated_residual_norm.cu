// The gated residual with a norm: z = x + tanh(gate) * y and n = norm(z), and backwards
//
//   dx = dz + rstd * (weight * dn - mean(weight * dn) - zhat * mean(weight * dn * zhat)),  zhat = (z - mean) * rstd
//   dy = tanh(gate) * dx,  dgate = tanh'(gate) * sum(dx * y),  dweight = sum(dn * zhat),  dbias = sum(dn)
//
// where an RMSNorm subtracts neither mean nor mean(weight * dn). Oracle: ops/gated_residual_norm/reference.py and
// autograd through it.
//
// Forward, a block takes one row, which stays in its shared memory. Backward, a block takes one part of the rows, row
// after row, and keeps the sums of its columns in registers. Rows too wide for that are cut into blocks of
// columns, and another kernel makes their two means first.
//
// Bytes: x and y read once, z and n written once; dz, dn, y and z read once (cut rows: dn and z twice), dx and dy
// written once. FLOPs: 11 and 17 an element.
#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr unsigned kThreads = 256;      // forward, and for a block of columns of a cut row
constexpr unsigned kMostThreads = 512;  // for a whole row backward
constexpr unsigned kScratch = 32;       // floats, for the sums of a block

// The mean of a row, 0 for an RMSNorm, and one over its standard deviation.
struct Moments {
  float mean, rstd;
};

// Subtracts the mean from a row.
__device__ Moments centre(float* row, const GatedResidualNorm& params, float* scratch) {
  const int64_t columns = params.residual.columns;
  float sum = 0, error = 0, squares = 0;
  if (!params.rms) {
    for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) sum += row[i];
    sum = block_sum(sum, scratch);
  }
  const float first_mean = sum / columns;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
    row[i] -= first_mean;
    error += row[i];
    squares += row[i] * row[i];
  }
  // a large mean loses the low bits of its sum: the mean of the differences corrects it
  error = params.rms ? 0.0f : block_sum(error, scratch) / columns;
  // fused, as the square of the error may overflow where the squares have: of infinities there is no difference
  const float variance = fmaf(-error, error, block_sum(squares, scratch) / columns);
  for (int64_t i = threadIdx.x; !params.rms && i < columns; i += blockDim.x) row[i] -= error;
  return {first_mean + error, 1 / sqrtf(variance + params.eps)};
}

template <class T, bool wide>
__global__ void __launch_bounds__(kThreads) gated_residual_norm_fwd_kernel(GatedResidualNorm params) {
  float* scratch = static_cast<float*>(shared_memory());
  float* z = scratch + kScratch;  // the row
  const int64_t row = blockIdx.x;
  Columns columns = {threadIdx.x * kVector, params.residual.columns};
  for (; columns.inside(); columns.first += blockDim.x * kVector) {
    float x[kVector], y[kVector], tanh_gate[kVector];
    load<T, wide>(x, params.residual.x, row, columns);
    load<T, wide>(y, params.residual.y, row, columns);
    load_tanh(tanh_gate, params.residual, columns);
    for (int i = 0; i < kVector; ++i) {
      x[i] = rounded<T>(params.residual.z, x[i] + tanh_gate[i] * y[i]);
      if (columns.first + i < columns.count) z[columns.first + i] = x[i];
    }
    store<T, wide>(params.residual.z, row, columns, x);
  }
  __syncthreads();
  const Moments moments = centre(z, params, scratch);
  __syncthreads();
  if (threadIdx.x == 0) params.mean[row] = moments.mean, params.rstd[row] = moments.rstd;
  for (columns.first = threadIdx.x * kVector; columns.inside(); columns.first += blockDim.x * kVector) {
    float n[kVector], weight[kVector], bias[kVector] = {};
    load(weight, params.weight, columns);
    if (params.bias.data) load(bias, params.bias, columns);
    for (int i = 0; i < kVector; ++i)
      n[i] = columns.first + i < columns.count ? z[columns.first + i] * moments.rstd * weight[i] + bias[i] : 0.0f;
    store<T, wide>(params.n, row, columns, n);
  }
}

// zhat and dn of the thread's columns.
template <class T, bool wide>
__device__ void load_zhat_dn(
    float (&zhat)[kVector], float (&dn)[kVector], const GatedResidualNorm& params, int64_t row, Columns columns) {
  load<T, wide>(zhat, params.residual.z, row, columns);
  load<T, wide>(dn, params.dn, row, columns);
  for (int i = 0; i < kVector; ++i)
    zhat[i] = columns.first + i < columns.count ? (zhat[i] - params.mean[row]) * params.rstd[row] : 0.0f;
}

// The means of wdn = weight * dn and of wdn * zhat over a row that is cut: a warp takes one row.
template <class T, bool wide>
__global__ void __launch_bounds__(kThreads) gated_residual_norm_bwd_means_kernel(GatedResidualNorm params) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= params.residual.rows) return;
  float wdn = 0, wdn_zhat = 0;
  Columns columns = {threadIdx.x * kVector, params.residual.columns};
  for (; columns.inside(); columns.first += blockDim.x * kVector) {
    float zhat[kVector], dn[kVector], weight[kVector];
    load_zhat_dn<T, wide>(zhat, dn, params, row, columns);
    load(weight, params.weight, columns);
    for (int i = 0; i < kVector; ++i) {
      wdn += weight[i] * dn[i];
      wdn_zhat += weight[i] * dn[i] * zhat[i];
    }
  }
  wdn = warp_sum(wdn), wdn_zhat = warp_sum(wdn_zhat);
  if (threadIdx.x != 0) return;
  params.means[row] = wdn / columns.count;
  params.means[params.residual.rows + row] = wdn_zhat / columns.count;
}

template <class T, bool wide, unsigned threads>
__global__ void __launch_bounds__(threads) gated_residual_norm_bwd_kernel(GatedResidualNorm params) {
  float* scratch = static_cast<float*>(shared_memory());
  const Columns columns = {(int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVector, params.residual.columns};
  const int64_t first = blockIdx.x * params.residual.part_rows,
                end = min(first + params.residual.part_rows, params.residual.rows);
  float tanh_gate[kVector], weight[kVector], dgate[kVector] = {}, dweight[kVector] = {}, dbias[kVector] = {};
  load_tanh(tanh_gate, params.residual, columns);
  load(weight, params.weight, columns);
  for (int64_t row = first; row < end; ++row) {
    float zhat[kVector] = {}, dn[kVector] = {}, y[kVector] = {}, dz[kVector] = {};
    float wdn[kVector], dx[kVector], dy[kVector];
    if (columns.inside()) {
      load_zhat_dn<T, wide>(zhat, dn, params, row, columns);
      load<T, wide>(y, params.residual.y, row, columns);
      load<T, wide>(dz, params.residual.dz, row, columns);
    }
    float wdn_sum = 0, wdn_zhat_sum = 0;
    for (int i = 0; i < kVector; ++i) {
      dweight[i] += dn[i] * zhat[i];
      dbias[i] += dn[i];
      wdn[i] = weight[i] * dn[i];
      wdn_sum += wdn[i];
      wdn_zhat_sum += wdn[i] * zhat[i];
    }
    const float mean_wdn = params.means ? params.means[row] : block_sum(wdn_sum, scratch) / columns.count;
    const float mean_wdn_zhat =
        params.means ? params.means[params.residual.rows + row] : block_sum(wdn_zhat_sum, scratch) / columns.count;
    for (int i = 0; i < kVector; ++i) {
      dx[i] = dz[i] + ((params.rms ? wdn[i] : wdn[i] - mean_wdn) - zhat[i] * mean_wdn_zhat) * params.rstd[row];
      dgate[i] += dx[i] * y[i];
      dy[i] = dx[i] * tanh_gate[i];
    }
    if (!columns.inside()) continue;
    store<T, wide>(params.dx, row, columns, dx);
    store<T, wide>(params.residual.dy, row, columns, dy);
  }
  store_gate_partial(params.residual, dgate, columns, scratch);
  store_partial(params.dweight, dweight, columns);
  store_partial(params.dbias, dbias, columns);
}

unsigned count_threads(int64_t columns) {
  const unsigned width = threads_across(columns, kMostThreads);
  return width * kVector < columns ? kThreads : width;
}

}  // namespace

namespace kernels {

void gated_residual_norm_fwd(const GatedResidualNorm& params, Stream stream) {
  const size_t shared = (kScratch + params.residual.columns) * sizeof(float);
  by_layout({params.residual.x, params.residual.y, params.residual.z, params.n}, [&](auto type, auto wide) {
    const dim3 grid = make_grid(params.residual.rows), block(threads_across(params.residual.columns, kThreads));
    launch(stream, gated_residual_norm_fwd_kernel<decltype(type), wide()>, grid, block, shared, params);
  });
}

Division divide_gated_residual_norm_bwd(int64_t rows, int64_t columns) {
  const unsigned threads = count_threads(columns);
  const int64_t blocks = divide_up(columns, threads * kVector);
  return divide_rows(rows, 1, multiprocessors() * (kMostThreads / threads) / blocks, blocks);
}

void gated_residual_norm_bwd(const GatedResidualNorm& params, Stream stream) {
  const unsigned threads = count_threads(params.residual.columns);
  const dim3 grid = make_grid(params.residual.parts, divide_up(params.residual.columns, threads * kVector));
  const auto matrices = {params.residual.z, params.residual.y, params.residual.dz,
                         params.dn,         params.dx,         params.residual.dy};
  by_layout(matrices, [&](auto type, auto wide) {
    using T = decltype(type);
    if (params.means) {
      const dim3 block(32, kThreads / 32), programs = make_grid(divide_up(params.residual.rows, block.y));
      launch(stream, gated_residual_norm_bwd_means_kernel<T, wide()>, programs, block, 0, params);
    }
    const auto kernel = threads > kThreads ? gated_residual_norm_bwd_kernel<T, wide(), kMostThreads>
                                           : gated_residual_norm_bwd_kernel<T, wide(), kThreads>;
    launch(stream, kernel, grid, dim3(threads), kScratch * sizeof(float), params);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
