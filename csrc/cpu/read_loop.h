// Reads memory and does next to nothing else: what bounds a kernel that must read as much. For benchmarks.
//
// Oracle: tests/flamingo_kernels/_backends/test_read_loop.py. Every byte is read once, one operation a vector.
#pragma once

#include "params.h"
#include "simd.h"

namespace flamingo_kernels::FK_ISA::read_loop {

using Params = ReadLoop;

constexpr int64_t block = 1 << 18;  // bytes of a task
constexpr int64_t line = 64;
constexpr int64_t streams = 4;    // lines that are read side by side
constexpr int64_t ahead = 4096;  // bytes from what is read to what is asked for

struct Forward {
  Forward(Scratch&, const Params&) {}

  static int64_t tasks(const Params& params) { return params.bytes / block; }

  void run(const Params& params, int64_t task) {
    const char* data = (const char*)params.data + task * block;
    uint32_t& sum = params.sums[task];
    if (params.way == ReadLoop::plain) sum = add<ReadLoop::plain>(data);
    if (params.way == ReadLoop::prefetched) sum = add<ReadLoop::prefetched>(data);
    if (params.way == ReadLoop::streamed) sum = add<ReadLoop::streamed>(data);
  }

 private:
  // The sum of a block as numbers of 32 bits.
  template <ReadLoop::Way way>
  static FK_INLINE uint32_t add(const char* data) {
    constexpr int64_t vectors = streams * line / (4 * width);
    Bits sums[vectors] = {};
    for (int64_t i = 0; i < block; i += streams * line) {
      for (int64_t j = 0; j < streams * line; j += line) {
        if constexpr (way == ReadLoop::prefetched) __builtin_prefetch(data + i + j + ahead);
        if constexpr (way == ReadLoop::streamed) __builtin_prefetch(data + i + j + ahead, 0, 0);  // past the caches
      }
#pragma GCC unroll 16
      for (int64_t j = 0; j < vectors; ++j) sums[j] += read<Bits>(data + i + j * 4 * width);
    }
    uint32_t sum = 0;
    for (const Bits& each : sums)
      for (int lane = 0; lane < width; ++lane) sum += each[lane];
    return sum;
  }
};

}  // namespace flamingo_kernels::FK_ISA::read_loop
