// CUDA's language on a processor: enough of it to run the kernels of this folder, compiled as C++, and strict.
//
// The threads of a block are fibers of one thread, and each runs until it has to wait. What a warp does together
// (shuffle, ldmatrix, mma) is done once, for all its lanes, when the last of them has arrived.
//
// What it is strict about: shared memory starts as NaN; what cp.async copies is NaN until it has been waited for, and
// all of it must be: what comes late may fall on what lies there by then; lanes must meet in the same instruction; a
// barrier that some thread never reaches is an error; wide accesses are aligned; ldmatrix and cp.async stay inside
// shared memory (AddressSanitizer sees to the rest). Blocks, warps and lanes take turns in order, in reverse or at
// random, so that results which depend on it differ.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "../params.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using std::max;
using std::memcpy;
using std::min;

namespace emulation {

// What one thread of a block sees of itself and of its block.
struct Thread {
  dim3 index;
  unsigned lane;
};
struct Block {
  dim3 index, size, grid;
  char* shared;
};
extern Thread* thread;
extern Block block;

// What the lanes of a warp wait for. An operation takes what each lane brought, in the order of lanes.
using Operation = void (*)(void* const* brought);
void meet_warp(Operation operation, void* brought);
void meet_block();  // of those that have not returned

// Fails the launch: the message of the exception that `run` throws.
void require(bool good, const char* message);
void require_shared(const void* address, size_t bytes, const char* instruction);

void copy_later(void* shared, const void* global, size_t bytes, size_t zeros);  // cp.async
void commit_copies();
void wait_for_copies(unsigned groups_left);

// Runs a kernel: all blocks, one after the other.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

inline void nothing(void* const*) {}

template <class Value>
struct Exchange {
  Value value, result;
  unsigned from;
};

template <class Value>
Value shuffle(Value value, unsigned from) {
  Exchange<Value> mine = {value, value, from};
  meet_warp(
      [](void* const* brought) {
        auto lanes = reinterpret_cast<Exchange<Value>* const*>(brought);
        for (int lane = 0; lane < 32; ++lane) lanes[lane]->result = lanes[lanes[lane]->from]->value;
      },
      &mine);
  return mine.result;
}

}  // namespace emulation

#define threadIdx (::emulation::thread->index)
#define blockIdx (::emulation::block.index)
#define blockDim (::emulation::block.size)
#define gridDim (::emulation::block.grid)

inline void __syncthreads() { emulation::meet_block(); }
inline void __syncwarp() { emulation::meet_warp(emulation::nothing, nullptr); }

inline uint32_t __ballot_sync(unsigned, int predicate) {
  struct Vote {
    int own;
    uint32_t all;
  } vote = {predicate, 0};
  emulation::meet_warp(
      [](void* const* brought) {
        auto votes = reinterpret_cast<Vote* const*>(brought);
        uint32_t all = 0;
        for (int lane = 0; lane < 32; ++lane) all |= uint32_t(votes[lane]->own != 0) << lane;
        for (int lane = 0; lane < 32; ++lane) votes[lane]->all = all;
      },
      &vote);
  return vote.all;
}

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return emulation::shuffle(value, emulation::thread->lane ^ mask);
}

namespace flamingo_kernels {

inline void* shared_memory() { return emulation::block.shared; }

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline uint16_t float_to_bf16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return float(half);
}

inline uint16_t float_to_f16(float value) {
  const _Float16 half = _Float16(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline uint4 load_128(const void* address) {
  emulation::require(uintptr_t(address) % 16 == 0, "a load of 16 bytes is not aligned");
  uint4 value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

inline void store_128(void* address, uint4 value) {
  emulation::require(uintptr_t(address) % 16 == 0, "a store of 16 bytes is not aligned");
  std::memcpy(address, &value, sizeof value);
}

inline void store_32(void* address, uint32_t value) {
  emulation::require(uintptr_t(address) % 4 == 0, "a store of 4 bytes is not aligned");
  std::memcpy(address, &value, sizeof value);
}

inline void prefetch(const void*) {}

// 16 bytes, of which the first `real` are copied and the others zero.
inline void copy_async(void* shared, const void* global, int real) {
  emulation::require(!real || uintptr_t(global) % 16 == 0, "cp.async reads from an address that is not aligned");
  emulation::require_shared(shared, 16, "cp.async");
  emulation::copy_later(shared, global, real, 16 - real);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int groups_left>
inline void wait_for_copies() {
  emulation::wait_for_copies(groups_left);
}

// ldmatrix.x4: four 8x8 matrices of 16-bit elements; lane i brings the address of row i % 8 of matrix i / 8.
template <bool transposed>
inline void load_matrices(uint32_t (&registers)[4], const void* row) {
  struct Load {
    const void* row;
    uint32_t* registers;
  } mine = {row, registers};
  emulation::require_shared(row, 16, "ldmatrix");
  emulation::meet_warp(
      [](void* const* brought) {
        auto lanes = reinterpret_cast<Load* const*>(brought);
        for (int matrix = 0; matrix < 4; ++matrix)
          for (int lane = 0; lane < 32; ++lane) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
              const int r = lane / 4, c = lane % 4 * 2 + i;
              const void* source = lanes[matrix * 8 + (transposed ? c : r)]->row;
              pair[i] = static_cast<const uint16_t*>(source)[transposed ? r : c];
            }
            std::memcpy(&lanes[lane]->registers[matrix], pair, sizeof pair);
          }
      },
      &mine);
}

// mma.sync.m16n8k16: c += a b, with a [16, 16], b [16, 8] and c [16, 8] spread over the lanes as PTX defines it.
template <float (*to_float)(uint16_t)>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Factors {
    float* c;
    const uint32_t *a, *b;
  } mine = {c, a, b};
  emulation::meet_warp(
      [](void* const* brought) {
        auto lanes = reinterpret_cast<Factors* const*>(brought);
        float left[16][16], right[16][8], sum[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int group = lane / 4, pair = lane % 4 * 2;
          for (int i = 0; i < 8; ++i)  // registers 0..3 hold [upper, lower] x [left, right] quarters
            left[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = to_float(lanes[lane]->a[i / 2] >> i % 2 * 16);
          for (int i = 0; i < 4; ++i) {
            right[pair + i % 2 + i / 2 * 8][group] = to_float(lanes[lane]->b[i / 2] >> i % 2 * 16);
            sum[group + i / 2 * 8][pair + i % 2] = lanes[lane]->c[i];
          }
        }
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) lanes[lane]->c[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      },
      &mine);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<bf16_to_float>(c, a, b);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<f16_to_float>(c, a, b);
}

inline int multiprocessors() { return 4; }  // few, so that small tests reach the paths that split their work

inline void fill(void* memory, int byte, int64_t bytes, Stream) {
  std::fill_n(static_cast<unsigned char*>(memory), bytes, byte);
}

template <class Params>
void launch(Stream, void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, const Params& params) {
  emulation::run(grid, block, shared_bytes, [&] { kernel(params); });
}

}  // namespace flamingo_kernels
