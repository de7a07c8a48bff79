// Tiles of matrices in shared memory, and products of tiles that a warp makes 16 rows at a time.
//
// A fragment is what a warp holds of 16 rows: c[j][i] is the element at row `fragment_row(i)` and column
// `fragment_column(j, i)`. That is how mma.sync spreads its results, and float32, which has no mma that is exact,
// follows it with ordinary products.
#pragma once

#include <type_traits>

#include "device.h"

namespace flamingo_kernels {

// Rows of a tile, of text or of keys. In float32 they are half as many, so that all tiles fit into shared memory.
template <class T>
constexpr int kTile = sizeof(T) == 2 ? 64 : 32;
template <class T>
constexpr int kThreads = kTile<T> * 2;  // a warp for 16 rows

__device__ inline int first_row_of_warp() { return threadIdx.x / 32 * 16; }
__device__ inline int fragment_row(int i) { return lane() / 4 + i / 2 * 8; }
__device__ inline int fragment_column(int j, int i) { return j * 8 + lane() % 4 * 2 + i % 2; }

template <class T, int columns>
struct Tile {
  static constexpr int kPitch = columns + 16 / int(sizeof(T));  // rows begin in different banks
  static constexpr int kBytes = kTile<T> * kPitch * int(sizeof(T));
  T* data;
  __device__ T* at(int row, int column) const { return data + row * kPitch + column; }
};

// Lays tiles out one behind the other in shared memory.
struct Arena {
  char* next;
  template <class Tile>
  __device__ Tile take() {
    Tile tile = {reinterpret_cast<decltype(tile.data)>(next)};
    next += Tile::kBytes;
    return tile;
  }
};

// Rows of one head in global memory, from the first row of a tile on.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;
  int columns;  // d, which a tile may exceed
  bool wide;
};

// Starts to fill a tile; rows that are not `real` (one bit each) and columns beyond d become 0.
template <class T, int columns>
__device__ inline void load(Tile<T, columns> tile, HeadRows<const T> from, uint64_t real) {
  constexpr int vector = 16 / sizeof(T), across = columns / vector;
  for (int i = threadIdx.x; i < kTile<T> * across; i += kThreads<T>) {
    const int row = i / across, column = i % across * vector;
    const bool inside = real >> row & 1 && column < from.columns;
    const T* source = inside ? from.data + row * from.stride + column : from.data;
    if (from.wide) {
      copy_async(tile.at(row, column), source, inside ? 16 : 0);
      continue;
    }
    for (int j = 0; j < vector; ++j)
      *tile.at(row, column + j) = inside && column + j < from.columns ? source[j] : from_float<T>(0);
  }
}

// The first `count` rows of a tile as bits.
__device__ inline uint64_t first_rows(int count) { return count >= 64 ? ~0ull : (1ull << max(count, 0)) - 1; }

template <class T>
__device__ inline uint32_t pack_pair(float first, float second) {
  return from_float<T>(first).bits | uint32_t(from_float<T>(second).bits) << 16;
}

// Writes a fragment into the warp's rows of a tile, rounded.
template <class T, int columns, int n>
__device__ inline void store(Tile<T, columns> tile, const float (&c)[n][4]) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; i += 2) {
      T* at = tile.at(first_row_of_warp() + fragment_row(i), fragment_column(j, i));
      if constexpr (std::is_same_v<T, float>)
        at[0] = c[j][i], at[1] = c[j][i + 1];
      else
        store_32(at, pack_pair<T>(c[j][i], c[j][i + 1]));
    }
}

// An element that this lane has stored there.
template <class T, int columns>
__device__ inline float element(Tile<T, columns> tile, int j, int i) {
  return to_float(*tile.at(first_row_of_warp() + fragment_row(i), fragment_column(j, i)));
}

// c += a b, or with a^T or b^T in their place: of the product the 16 rows of this warp, and 8 n columns from `column`.
template <bool a_transposed, bool b_transposed, class T, int a_columns, int b_columns, int n>
__device__ inline void multiply(float (&c)[n][4], Tile<T, a_columns> a, Tile<T, b_columns> b, int column = 0) {
  constexpr int depth = a_transposed ? kTile<T> : a_columns;
  const int row = first_row_of_warp();
  if constexpr (std::is_same_v<T, float>) {
    constexpr int block = 8;  // sums of blocks, as one long sum would round more
#pragma unroll 1
    for (int k = 0; k < depth; k += block) {
      float left[2][block];
      for (int half = 0; half < 2; ++half)
        for (int m = 0; m < block; ++m) {
          const int at = row + fragment_row(2 * half);
          left[half][m] = a_transposed ? *a.at(k + m, at) : *a.at(at, k + m);
        }
#pragma unroll
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < 4; ++i) {
          const int at = column + fragment_column(j, i);
          float sum = 0;
          for (int m = 0; m < block; ++m) sum += left[i / 2][m] * (b_transposed ? *b.at(at, k + m) : *b.at(k + m, at));
          c[j][i] += sum;
        }
    }
  } else {
    // where ldmatrix finds the four quarters of a 16x16 block, in the order that mma takes them
    const int down = lane() % 16, right = lane() / 16 * 8;
    const int down_first = lane() / 16 * 8 + lane() % 8, right_second = lane() / 8 % 2 * 8;
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[4];
      load_matrices<a_transposed>(
          left, a_transposed ? a.at(k + down_first, row + right_second) : a.at(row + down, k + right));
      for (int j = 0; j < n; j += 2) {
        uint32_t both[4];
        load_matrices<!b_transposed>(
            both, b_transposed ? b.at(column + j * 8 + down_first, k + right_second)
                               : b.at(k + down, column + j * 8 + right));
        mma(c[j], left, {both[0], both[1]}, T());
        mma(c[j + 1], left, {both[2], both[3]}, T());
      }
    }
  }
}

// Reductions over the columns of a fragment, for its upper rows (half 0) and its lower ones (half 1).
template <int n>
__device__ inline float reduce_max(const float (&c)[n][4], int half) {
  float most = -kInfinity;
  for (int j = 0; j < n; ++j) most = fmaxf(most, fmaxf(c[j][2 * half], c[j][2 * half + 1]));
  for (int mask = 1; mask <= 2; mask *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
  return most;
}

template <class Value>
__device__ inline Value quad_sum(Value value) {
  for (int mask = 1; mask <= 2; mask *= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

template <int n>
__device__ inline float reduce_sum(const float (&c)[n][4], int half) {
  float sum = 0;
  for (int j = 0; j < n; ++j) sum += c[j][2 * half] + c[j][2 * half + 1];
  return quad_sum(sum);
}

// Lane i of each four gets the i-th word of all four: their 4x4 words, transposed.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
  for (int step = 1; step <= 2; step *= 2)
    for (int k = 0; k < 4; ++k) {
      if (k & step) continue;
      const bool upper = lane() & step;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? words[k] : words[k | step], step);
      (upper ? words[k] : words[k | step]) = received;
    }
}

// Writes 32 columns of a fragment, from `column` on, to the warp's rows of a head; of 16-bit elements each lane
// gathers 8 of one row first, so that it stores 16 bytes. Rows that are not `real` (one bit each) are left alone.
template <class T>
__device__ inline void store(HeadRows<T> to, const float (&c)[4][4], int column, uint64_t real) {
  for (int i = 0; i < 4; i += 2) {
    const int row = first_row_of_warp() + fragment_row(i);
    T* into = to.data + row * to.stride + column;
    const bool write = real >> row & 1;
    if constexpr (sizeof(T) == 2) {
      if (to.wide) {
        uint32_t words[4];
        for (int j = 0; j < 4; ++j) words[j] = pack_pair<T>(c[j][i], c[j][i + 1]);
        transpose_quad(words);
        const int first = lane() % 4 * 8;
        if (write && column + first < to.columns) store_128(into + first, {words[0], words[1], words[2], words[3]});
        continue;
      }
    }
    for (int j = 0; j < 4; ++j)
      for (int h = 0; h < 2; ++h) {
        const int at = fragment_column(j, h);
        if (write && column + at < to.columns) into[at] = from_float<T>(c[j][i + h]);
      }
  }
}

}  // namespace flamingo_kernels
