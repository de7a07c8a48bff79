// Small matrix products on packed operands, C = A B or C += A B, the only inner loops of attention.
//
// A word is 32 bits: one float (Single), or what follows each other along the summed dimension: two bfloat16 (Pairs,
// for processors with a bf16 dot product), two 16-bit integers (IntegerPairs) or four of 8 bits (Quads, likewise). A is
// read one word at a time and broadcast, in any strides; B and C are read a vector at a time, their rows padded to whole
// vectors.
//
// Tiles are pairs, and Int8Tiles quads, for processors with tile registers (tiles.h). All operands are padded to whole
// tiles, and A's words lie side by side (step 1).
#pragma once

#include "tiles.h"

namespace flamingo_kernels::FK_ISA {

// A sum in floats, and how it is added to what is in C.
struct FloatSums {
  static FK_INLINE Floats close(Floats sum) { return sum; }
  static FK_INLINE Floats add(Floats c, Floats sum) { return c + sum; }
};

// lanes: elements of a word. A product has a multiple of `depth` words, its matrices of `rows` rows.
struct Single : FloatSums {
  using Element = float;
  static constexpr int lanes = 1, depth = 1, rows = 1;
  struct Registers {};
  static FK_INLINE Floats dot(Floats sum, Floats a, Floats b) { return a * b + sum; }
};

struct Pairs : FloatSums {
  using Element = BFloat16;
  static constexpr int lanes = 2, depth = 1, rows = 1;
  struct Registers {};
  static FK_INLINE Floats dot(Floats sum, Floats a, Floats b) {
#ifdef FK_AVX512_BF16
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    Floats odd = (Floats)((Bits)a & 0xffff0000) * (Floats)((Bits)b & 0xffff0000) + sum;
    return (Floats)((Bits)a << 16) * (Floats)((Bits)b << 16) + odd;
#endif
  }
};

// The sum of a block, whose length multiply() bounds, is exact in 32 bits.
struct IntegerPairs : FloatSums {
  using Element = int16_t;
  static constexpr int lanes = 2, depth = 1, rows = 1;
  struct Registers {};
  static FK_INLINE Floats dot(Floats sum, Floats a, Floats b) {
    return (Floats)add_pairs((Ints)sum, (Int16s)a, (Int16s)b);
  }
  static FK_INLINE Floats close(Floats sum) { return __builtin_convertvector((Ints)sum, Floats); }
};

// B is signed, A is not; C holds integers.
struct Quads {
  using Element = int8_t;
  static constexpr int lanes = 4, depth = 1, rows = 1;
  struct Registers {};
  static FK_INLINE Floats dot(Floats sum, Floats a, Floats b) { return (Floats)add_quads((Ints)sum, (Bits)a, (Bits)b); }
  static FK_INLINE Floats close(Floats sum) { return sum; }
  static FK_INLINE Floats add(Floats c, Floats sum) { return (Floats)((Ints)c + (Ints)sum); }
};

struct Tiles {
  using Element = BFloat16;
  static constexpr int lanes = 2, depth = tile_side, rows = tile_side;
  using Registers = TileRegisters;
  using Products = OfBFloat16;
};

// A and B are signed; C holds integers.
struct Int8Tiles {
  using Element = int8_t;
  static constexpr int lanes = 4, depth = tile_side, rows = tile_side;
  using Registers = TileRegisters;
  using Products = OfInt8;
};

// Words that hold so many elements of the summed dimension.
template <class Dot>
constexpr int64_t words(int64_t elements) {
  return round_up(elements, Dot::lanes * Dot::depth) / Dot::lanes;
}

// The tile of C held in registers: 6 x 2 vectors fill the 16 registers of SSE and AVX2, 6 x 4 the 32 of
// AVX-512 and NEON.
constexpr int tile_rows = 6;
#if defined(__aarch64__)
constexpr int tile_vectors = 4;
#else
constexpr int tile_vectors = width == 16 ? 4 : 2;
#endif

// Rows of B and C: whole vectors, plus a skew so that rows do not fall into the same cache sets.
constexpr int64_t padded(int64_t columns) { return round_up(columns, width) + 16; }

struct Operand {  // A[i][k] = words[i * row + k * step]
  const float* words;
  int64_t row, step;
};

template <class Dot, bool accumulate, int rows, int vectors>
FK_INLINE void multiply_tile(
    int64_t depth, Operand a, const float* __restrict b, int64_t b_row, float* __restrict c, int64_t c_row) {
  Floats sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[i][j] = Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats columns[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) columns[j] = load(b + k * b_row + j * width);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      Floats value = splat(a.words[i * a.row + k * a.step]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[i][j] = Dot::dot(sum[i][j], value, columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * c_row + j * width;
      // Added last, so that a sum over many blocks rounds once a block, not once a term.
      const Floats closed = Dot::close(sum[i][j]);
      store(to, accumulate ? Dot::add(load(to), closed) : closed);
    }
}

template <class Dot, bool accumulate, int vectors>
FK_INLINE void multiply_panel(
    int64_t rows, int64_t depth, Operand a, const float* b, int64_t b_row, float* c, int64_t c_row) {
  int64_t i = 0;
  for (; i + tile_rows <= rows && rows - i != 8; i += tile_rows)  // 8 rows are two tiles of 4
    multiply_tile<Dot, accumulate, tile_rows, vectors>(
        depth, {a.words + i * a.row, a.row, a.step}, b, b_row, c + i * c_row, c_row);
  for (; i + 4 <= rows; i += 4)
    multiply_tile<Dot, accumulate, 4, vectors>(
        depth, {a.words + i * a.row, a.row, a.step}, b, b_row, c + i * c_row, c_row);
  for (; i + 2 <= rows; i += 2)
    multiply_tile<Dot, accumulate, 2, vectors>(
        depth, {a.words + i * a.row, a.row, a.step}, b, b_row, c + i * c_row, c_row);
  for (; i < rows; ++i)
    multiply_tile<Dot, accumulate, 1, vectors>(
        depth, {a.words + i * a.row, a.row, a.step}, b, b_row, c + i * c_row, c_row);
}

template <class Dot, bool accumulate>
__attribute__((noinline)) void multiply_block(
    int64_t rows, int64_t columns, int64_t depth, Operand a, const float* b, int64_t b_row, float* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + tile_vectors * width <= round_up(columns, width); j += tile_vectors * width)
    multiply_panel<Dot, accumulate, tile_vectors>(rows, depth, a, b + j, b_row, c + j, c_row);
  for (; j < columns; j += width) multiply_panel<Dot, accumulate, 1>(rows, depth, a, b + j, b_row, c + j, c_row);
}

// C[rows][columns] = or += A[rows][depth words] B[depth words][columns]; columns are rounded up to vectors.
// A long sum is made of shorter ones: its rounding errors grow with the length of each.
template <class Dot, bool accumulate>
FK_INLINE void multiply(
    int64_t rows, int64_t columns, int64_t depth, Operand a, const float* b, int64_t b_row, float* c, int64_t c_row) {
  if constexpr (Dot::depth > 1) {
    multiply_in_tiles<typename Dot::Products, accumulate>(rows, columns, depth, a.words, a.row, b, b_row, c, c_row);
  } else {
    constexpr int64_t block = 64;
    multiply_block<Dot, accumulate>(rows, columns, depth < block ? depth : block, a, b, b_row, c, c_row);
    for (int64_t k = block; k < depth; k += block)
      multiply_block<Dot, true>(
          rows, columns, depth - k < block ? depth - k : block, {a.words + k * a.step, a.row, a.step}, b + k * b_row,
          b_row, c, c_row);
  }
}

// Elements of operands as bfloat16, zeros beyond `count`.
FK_INLINE Shorts load_halves(const BFloat16* from, int64_t count) { return load_bits(from, count); }
FK_INLINE Shorts load_halves(const float* from, int64_t count) { return round_to_bf16(load(from, count)); }

FK_INLINE void store_element(float* to, Floats x) { store(to, x); }
FK_INLINE void store_element(BFloat16* to, Floats x) { store(to, round_to_bf16(x)); }

// [rows][columns] to the same rows of words: an A operand summed along its columns.
template <class Dot, class T>
FK_INLINE void pack_row(const T* from, int64_t columns, float* to) {
  for (int64_t j = 0; j < words<Dot>(columns) * Dot::lanes; j += width)
    if constexpr (Dot::lanes == 1)
      store(to + j, load(from + j, columns - j));
    else
      store((BFloat16*)to + j, load_halves(from + j, columns - j));
}

// `columns` words from rows `even` and `odd` (null: zeros).
template <class T>
FK_INLINE Floats pair_words(const T* even, const T* odd, int64_t j, int64_t columns) {
  Bits low = even ? widen(load_halves(even + j, columns - j)) : Bits{};
  Bits high = odd ? widen(load_halves(odd + j, columns - j)) : Bits{};
  return (Floats)(low | high << 16);
}

// Rows `even` and `odd` (null: zeros) to one row of words: a B operand summed along its rows.
template <class Dot, class T>
FK_INLINE void pack_rows(const T* even, const T* odd, int64_t columns, float* to) {
  for (int64_t j = 0; j < columns; j += width)
    if constexpr (Dot::lanes == 1)
      store(to + j, load(even + j, columns - j));
    else
      store(to + j, pair_words(even, odd, j, columns));
}

template <class Dot, class T>
FK_INLINE Floats load_words(const T* from, int64_t count) {
  if constexpr (Dot::lanes == 1) {
    return load(from, count);
  } else {
    if (count >= 2 * width) return read<Floats>(from);
    T padded_words[2 * width] = {};
    for (int64_t i = 0; i < count; ++i) padded_words[i] = from[i];
    return read<Floats>(padded_words);
  }
}

// [rows][columns] to [words(columns)][rows]: a B operand summed along the columns.
template <class Dot, class T>
__attribute__((noinline)) void pack_transposed(
    const T* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  constexpr int lanes = Dot::lanes;
  for (int64_t i = 0; i < rows; i += width)
    for (int64_t k = 0; k < words<Dot>(columns); k += width) {
      Floats block[width];
      for (int r = 0; r < width; ++r)
        block[r] = i + r < rows ? load_words<Dot>(from + (i + r) * stride + k * lanes, columns - k * lanes) : Floats{};
      transpose(block);
      for (int r = 0; r < width && k + r < words<Dot>(columns); ++r) store(to + (k + r) * to_row + i, block[r]);
    }
}

// The row of a matrix of `rows` rows, null beyond them.
template <class T>
FK_INLINE const T* row_or_null(const T* from, int64_t stride, int64_t i, int64_t rows) {
  return i < rows ? from + i * stride : nullptr;
}

// [rows][columns] to [words(rows)][columns]: a B operand summed along the rows.
template <class Dot, class T>
__attribute__((noinline)) void pack_matrix(
    const T* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t k = 0; k < words<Dot>(rows); ++k) {
    const int64_t i = k * Dot::lanes;
    pack_rows<Dot>(
        row_or_null(from, stride, i, rows), row_or_null(from, stride, i + 1, rows), columns, to + k * to_row);
  }
}

// [rows][columns] as an A operand summed along the rows; `to` holds its words where the matrix itself does not.
template <class Dot>
__attribute__((noinline)) Operand pack_columns(
    const typename Dot::Element* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  if constexpr (Dot::lanes == 1) {
    return {from, 1, stride};
  } else if constexpr (Dot::depth == 1) {
    pack_matrix<Dot>(from, stride, rows, columns, to, to_row);
    return {to, 1, to_row};
  } else {
    const auto row = [&](int64_t i) { return row_or_null(from, stride, i, rows); };
    for (int64_t j = 0; j < columns; j += width)
      for (int64_t k = 0; k < words<Dot>(rows); k += width) {
        Floats block[width];
        for (int r = 0; r < width; ++r)
          block[r] = pair_words(row(2 * (k + r)), row(2 * (k + r) + 1), j, round_up(columns, width));
        transpose(block);
        for (int r = 0; r < width; ++r) store(to + (j + r) * to_row + k, block[r]);
      }
    return {to, to_row, 1};
  }
}

}  // namespace flamingo_kernels::FK_ISA
