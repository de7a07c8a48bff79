// Kernels for test_emulation.py: right ones, and with -DPLANT_<FAULT> each of them wrong in one place.
#include <cstring>

#include "device.h"

using namespace flamingo_kernels;

struct Product {  // c[16, 8] = a[16, 16] b[8, 16]^T in bfloat16, and its sum
  const uint16_t *a, *b;
  float *c, *total;
};

// Operands go through shared memory by cp.async and ldmatrix; two warps make the same product and add their sums.
__global__ void product_kernel(Product p) {
  uint16_t* tile = static_cast<uint16_t*>(shared_memory());  // a [16, 16], b [8, 16]
  float* sums = reinterpret_cast<float*>(tile + 24 * 16);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < 48) {
    const uint16_t* from = threadIdx.x < 32 ? p.a + threadIdx.x * 8 : p.b + (threadIdx.x - 32) * 8;
    copy_async(tile + threadIdx.x * 8, from, 16);
  }
  commit_copies();
#if !defined(PLANT_NO_WAIT) && !defined(PLANT_LATE_WAIT)
  wait_for_copies<0>();
#endif
#ifndef PLANT_NO_BARRIER
  __syncthreads();
#endif
  uint32_t a[4], b[4];
#ifdef PLANT_WRONG_FRAGMENT
  load_matrices<false>(a, tile + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
#else
  load_matrices<false>(a, tile + lane % 16 * 16 + lane / 16 * 8);
#endif
#ifdef PLANT_BEYOND
  load_matrices<false>(b, tile + 16 * 16 + lane % 8 * 1600 + lane / 8 % 2 * 8);
#else
  load_matrices<false>(b, tile + 16 * 16 + lane % 8 * 16 + lane / 8 % 2 * 8);
#endif
  float c[4] = {};
  const uint32_t right[2] = {b[0], b[1]};
#ifdef PLANT_DIVERGED
  if (lane < 16)
#endif
    mma_bf16(c, a, right);
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    if (warp == 0) p.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
    sum += c[i];
  }
  sum = warp_sum(sum);
  if (lane == 0) sums[warp] = sum;
#ifdef PLANT_OVERRUN
  sums[2 + warp] = sum;
#endif
#ifndef PLANT_NO_SECOND_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x == 0) *p.total = sums[0] + sums[1];
#ifdef PLANT_LATE_WAIT
  wait_for_copies<0>();
#endif
}

struct Values {
  float* values;
  int count;
};

// Each thread takes its left neighbour's value; those beyond the end leave before the barrier.
__global__ void shift_kernel(Values p) {
  float* shared = static_cast<float*>(shared_memory());
  const int i = threadIdx.x;
  if (i >= p.count) return;
  shared[i] = p.values[i];
#ifndef PLANT_NO_BARRIER
  __syncthreads();
#endif
  p.values[i] = shared[(i + p.count - 1) % p.count];
}

// 8 bytes past an address of 16.
__global__ void unaligned_kernel(Values p) { store_128(p.values, load_128(p.values + 2)); }

static char message[256];

template <class Params>
static const char* run(
    void (*kernel)(Params), int threads, size_t shared, const Params& params, int64_t blocks = 1) {
  try {
    launch(nullptr, kernel, make_grid(blocks), dim3(threads), shared, params);
    return "";
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
}

extern "C" const char* product(const uint16_t* a, const uint16_t* b, float* c, float* total) {
  return run(product_kernel, 64, 24 * 16 * 2 + 2 * sizeof(float), Product{a, b, c, total});
}
extern "C" const char* shift(float* values, int count) {
  return run(shift_kernel, 256, count * sizeof(float), Values{values, count});
}
extern "C" const char* unaligned(float* values) { return run(unaligned_kernel, 1, 0, Values{values, 4}); }
extern "C" const char* crowded(int64_t blocks) { return run(shift_kernel, 1, 0, Values{nullptr, 0}, blocks); }
