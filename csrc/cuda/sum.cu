// Adds partial results in float32 and in a fixed order. Oracle: partials.sum(0).
//
// One thread a column adds few parts, one after the other. Where there are many, each of kLanes threads adds every
// kLanes-th, so that their latencies overlap. Bytes: each partial sum read once, each total written once.
#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr unsigned kThreads = 256, kLanes = 8;

template <class T>
__global__ void __launch_bounds__(kThreads) sum_partials_kernel(Sum params) {
  float* totals = static_cast<float*>(shared_memory());  // [lanes, columns]
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  float total = 0;
  for (int64_t part = threadIdx.y; column < params.size && part < params.parts; part += blockDim.y)
    total += params.partials[part * params.size + column];
  totals[threadIdx.y * blockDim.x + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= params.size) return;
  for (unsigned lane = 1; lane < blockDim.y; ++lane) total += totals[lane * blockDim.x + threadIdx.x];
  static_cast<T*>(params.total)[column] = from_float<T>(total);
}

}  // namespace

namespace kernels {

void sum_partials(const Sum& params, Stream stream) {
  const unsigned lanes = params.parts > kLanes ? kLanes : 1;
  const dim3 block(kThreads / lanes, lanes);
  by_type(params.dtype, [&](auto type) {
    const dim3 grid = make_grid(divide_up(params.size, block.x));
    launch(stream, sum_partials_kernel<decltype(type)>, grid, block, kThreads * sizeof(float), params);
  });
}

void fill_with_nan(void* memory, int64_t bytes, Stream stream) { fill(memory, 0xff, bytes, stream); }

#if defined(FK_EMULATE)
bool emulated() { return true; }
#else
bool emulated() { return false; }
#endif

}  // namespace kernels
}  // namespace flamingo_kernels
