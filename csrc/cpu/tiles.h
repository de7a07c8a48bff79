// Products of bfloat16 and of 8-bit integer matrices on the tile registers of Intel AMX: eight of 16 rows of 16 words,
// where
//
//   C[16][16] += A[16][16 words] B[16 words][16]
//
// is one instruction. In bfloat16 it adds the products of a word's low halves and those of its high halves from zero,
// each in order, then the two sums to C: the twin for processors without tiles does the same, to the last bit. Products
// of integers are exact, and C holds 32-bit integers.
//
// Registers belong to a thread and start as whole tiles: operands are padded to them, with zeros along the summed
// dimension; rows and columns of C beyond the matrix are computed and mean nothing.
#pragma once

#include "simd.h"

namespace flamingo_kernels::FK_ISA {

constexpr int64_t tile_side = 16;  // rows, and words or floats of a row

#if defined(__AMX_BF16__) && !defined(FK_EMULATE)

// The registers of one thread, from here to the end of the scope.
struct TileRegisters {
  TileRegisters() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const whole;
    asm volatile("ldtilecfg %0" : : "m"(whole));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
};

// Not the compiler's intrinsics: GCC's loads do not say that they read memory, so that it moves stores past them.
template <int tile>
FK_INLINE void load_tile(const float* from, int64_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(4 * row), "i"(tile) : "memory");
}
template <int tile>
FK_INLINE void store_tile(float* to, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(4 * row), "i"(tile) : "memory");
}
template <int tile>
FK_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// The words of a product: two bfloat16, or four signed 8-bit integers.
struct OfBFloat16 {
  template <int c, int a, int b>
  static FK_INLINE void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};
struct OfInt8 {
  template <int c, int a, int b>
  static FK_INLINE void add_product() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};

#else

struct TileRegisters {};

inline thread_local float tile_registers[8][tile_side][tile_side];

template <int tile>
void load_tile(const float* from, int64_t row) {
  for (int64_t i = 0; i < tile_side; ++i)
    __builtin_memcpy(tile_registers[tile][i], from + i * row, sizeof tile_registers[tile][i]);
}
template <int tile>
void store_tile(float* to, int64_t row) {
  for (int64_t i = 0; i < tile_side; ++i)
    __builtin_memcpy(to + i * row, tile_registers[tile][i], sizeof tile_registers[tile][i]);
}
template <int tile>
void clear_tile() {
  __builtin_memset(tile_registers[tile], 0, sizeof tile_registers[tile]);
}

// The low or the high half of a word, with subnormal numbers as zero.
FK_INLINE float half_of_word(float word, bool high) {
  uint32_t bits;
  __builtin_memcpy(&bits, &word, sizeof bits);
  bits = high ? bits & 0xffff0000 : bits << 16;
  if (!(bits & 0x7f800000)) bits &= 0x80000000;
  float half;
  __builtin_memcpy(&half, &bits, sizeof half);
  return half;
}

struct OfBFloat16 {
  template <int c, int a, int b>
  static void add_product() {
    for (int64_t i = 0; i < tile_side; ++i)
      for (int64_t j = 0; j < tile_side; ++j) {
        float sums[2] = {};
        for (int64_t k = 0; k < tile_side; ++k)
          for (int half = 0; half < 2; ++half)
            sums[half] += half_of_word(tile_registers[a][i][k], half) * half_of_word(tile_registers[b][k][j], half);
        tile_registers[c][i][j] += sums[0] + sums[1];
      }
  }
};

struct OfInt8 {
  template <int c, int a, int b>
  static void add_product() {
    for (int64_t i = 0; i < tile_side; ++i)
      for (int64_t j = 0; j < tile_side; ++j) {
        int32_t sum;
        __builtin_memcpy(&sum, &tile_registers[c][i][j], sizeof sum);
        for (int64_t k = 0; k < tile_side; ++k) {
          int8_t left[4], right[4];
          __builtin_memcpy(left, &tile_registers[a][i][k], sizeof left);
          __builtin_memcpy(right, &tile_registers[b][k][j], sizeof right);
          for (int byte = 0; byte < 4; ++byte) sum += left[byte] * right[byte];
        }
        __builtin_memcpy(&tile_registers[c][i][j], &sum, sizeof sum);
      }
  }
};

#endif

// down x across tiles of C, each loaded for two products where there are two. Asks for A some tiles ahead where that is
// in memory.
template <class Products, bool accumulate, int down, int across>
FK_INLINE void multiply_tiles(
    int64_t depth, const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, bool ahead) {
  constexpr int64_t distance = 4 * tile_side;
  const float* below = a + down * tile_side * a_row;
  const auto each_of_c = [&](auto visit) {
    visit.template operator()<0>(c);
    if constexpr (across > 1) visit.template operator()<1>(c + tile_side);
    if constexpr (down > 1) visit.template operator()<2>(c + tile_side * c_row);
    if constexpr (down > 1 && across > 1) visit.template operator()<3>(c + tile_side * c_row + tile_side);
  };
  each_of_c([&]<int tile>(const float* from) {
    if constexpr (accumulate)
      load_tile<tile>(from, c_row);
    else
      clear_tile<tile>();
  });
  for (int64_t k = 0; k < depth; k += tile_side) {
    if (ahead) {
      const float* next = k + distance < depth ? a + k + distance : below + k + distance - depth;
      for (int64_t i = 0; i < down * tile_side; ++i) __builtin_prefetch(next + i * a_row, 0, 2);
    }
    load_tile<4>(a + k, a_row);
    load_tile<6>(b + k * b_row, b_row);
    Products::template add_product<0, 4, 6>();
    if constexpr (across > 1)
      load_tile<7>(b + k * b_row + tile_side, b_row), Products::template add_product<1, 4, 7>();
    if constexpr (down > 1) load_tile<5>(a + tile_side * a_row + k, a_row), Products::template add_product<2, 5, 6>();
    if constexpr (down > 1 && across > 1) Products::template add_product<3, 5, 7>();
  }
  each_of_c([&]<int tile>(float* to) { store_tile<tile>(to, c_row); });
}

// C[rows][columns] = or += A[rows][depth words] B[depth words][columns], all rounded up to whole tiles. A may be
// asked for ahead, once.
template <class Products, bool accumulate>
__attribute__((noinline)) void multiply_in_tiles(
    int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, const float* b, int64_t b_row,
    float* c, int64_t c_row, bool ahead = false) {
  constexpr int64_t two = 2 * tile_side;
  const auto strip = [&]<int down>(int64_t i) {
    const float* rows_of_a = a + i * a_row;
    float* rows_of_c = c + i * c_row;
    for (int64_t j = 0; j < columns; j += two) {
      const bool first = ahead && j == 0;
      if (j + tile_side < columns)
        multiply_tiles<Products, accumulate, down, 2>(
            depth, rows_of_a, a_row, b + j, b_row, rows_of_c + j, c_row, first);
      else
        multiply_tiles<Products, accumulate, down, 1>(
            depth, rows_of_a, a_row, b + j, b_row, rows_of_c + j, c_row, first);
    }
  };
  int64_t i = 0;
  for (; i + tile_side < rows; i += two) strip.template operator()<2>(i);
  if (i < rows) strip.template operator()<1>(i);
}

}  // namespace flamingo_kernels::FK_ISA
