// y = residual + tanh(gate) * act(x @ (scale * weight).T + bias), for weights of 8 bits and many rows of x.
//
// Oracle: flamingo_kernels/ops/linear/reference.py. 2 operations a weight and a row; reads in * out bytes of weights
// for each `block_rows` rows of x. Each row of x is rounded to integers of its own scale, of 8 bits where the processor
// multiplies those: 1/254 of the row's largest number. Where that is too coarse for a row, each is two columns of 8
// bits, with an error a hundredth of that. On tile registers few rows, too: there a second column costs nothing.
//
// A task owns a block of outputs and of rows: it multiplies a piece of their weights, as words, by panels of x, and
// turns the sums into rows of y. Tiles read whole blocks of weights where they are; others are brought to the cache.
#pragma once

#include <type_traits>

#include "linear.h"

namespace flamingo_kernels::FK_ISA::linear_int8 {

using Params = Linear;
using linear::smaller;

using Dot = std::conditional_t<has_tiles, Int8Tiles, std::conditional_t<has_quads, Quads, IntegerPairs>>;
using Element = Dot::Element;
constexpr bool in_quads = std::is_same_v<Dot, Quads>;

constexpr int64_t block_outputs = 64;
constexpr int64_t block_rows = 256;
constexpr int64_t piece_words = 128;  // of a row of the weight in a piece
constexpr int64_t panel = has_tiles ? 2 * tile_side : tile_vectors * width;  // columns of x that are multiplied at once
constexpr int64_t sums_row = block_rows + 16;  // a skew, so that rows do not fall into the same cache sets

constexpr int32_t fine_step = 128;  // of the first column of a row, in steps of the second
constexpr float most_of_two = 127 * fine_step;

FK_INLINE int64_t count_words(const Params& params) { return words<Dot>(params.in); }
FK_INLINE int64_t count_blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
FK_INLINE bool is_fine(const Params& params) { return Dot::lanes == 4 && params.fine; }
FK_INLINE int64_t count_columns(const Params& params) { return is_fine(params) ? 2 * params.rows : params.rows; }

// The largest magnitude and the root of the mean square of each row of x, in the place of its scale and offset.
template <class T>
struct Spread {
  static constexpr int64_t rows_of_a_task = 16;

  Spread(Scratch&, const Params&) {}
  static int64_t tasks(const Params& params) { return count_blocks(params.rows, rows_of_a_task); }

  void run(const Params& params, int64_t task) {
    for (int64_t row = task * rows_of_a_task; row < smaller((task + 1) * rows_of_a_task, params.rows); ++row) {
      const T* from = (const T*)params.x.data + row * params.x.row;
      const float largest = largest_magnitude(from, params.in);
      const float unit = 1 / largest;  // squares of shares do not overflow
      Floats squares = {};
      for (int64_t k = 0; k < params.in; k += width) {
        const Floats share = load(from + k, params.in - k) * unit;
        squares += share * share;
      }
      params.x_scale[row] = largest;
      params.x_offset[row] = largest * __builtin_sqrtf(sum(squares) / params.in);
    }
  }
};

// The columns of x as panels of [words][columns of the panel], zeros behind the last element and column.
template <class T>
struct Pack {
  Element* columns;

  Pack(Scratch& scratch, const Params& params)
      : columns((Element*)scratch.take(width * round_up(count_words(params), width))) {}

  static int64_t tasks(const Params& params) { return count_blocks(count_columns(params), panel); }

  void run(const Params& params, int64_t task) {
    const int64_t column_words = round_up(count_words(params), width), elements = column_words * Dot::lanes;
    const int64_t count = smaller(panel, count_columns(params) - task * panel);
    float* to = (float*)params.packed + task * count_words(params) * panel;
    for (int64_t i = 0; i < panel; i += width) {
      for (int64_t r = 0; r < width; ++r)
        if (i + r >= count)
          __builtin_memset(columns + r * elements, 0, elements * sizeof(Element));
        else if (!is_fine(params))
          round_row(params, task * panel + i + r, elements, columns + r * elements);
        else if (r % 2 == 0)
          round_finely(params, (task * panel + i + r) / 2, elements, columns + r * elements);
      for (int64_t k = 0; k < column_words; k += width) {
        Floats block[width];
        for (int r = 0; r < width; ++r) block[r] = load((const float*)columns + r * column_words + k);
        transpose(block);
        for (int r = 0; r < width && k + r < count_words(params); ++r) store(to + (k + r) * panel + i, block[r]);
      }
    }
  }

 private:
  static FK_INLINE void round_row(const Params& params, int64_t row, int64_t elements, Element* to) {
    Ints sum = {};
    constexpr float most = Dot::lanes == 4 ? most_of_8_bits : most_of_16_bits;
    each_vector(params, row, elements, most, [&](int64_t k, Ints rounded) {
      if constexpr (Dot::lanes == 2)
        write(to + k, __builtin_convertvector(rounded, Shorts));
      else
        write(to + k, __builtin_convertvector(rounded, Bytes));
      if constexpr (in_quads) sum += rounded;
    });
    params.x_offset[row] = offset_of(sum);
  }

  // As two columns: steps of 128, and what is left of them.
  static FK_INLINE void round_finely(const Params& params, int64_t row, int64_t elements, Element* to) {
    Ints sum = {};
    each_vector(params, row, elements, most_of_two, [&](int64_t k, Ints rounded) {
      if constexpr (in_quads) sum += rounded;
      const Ints coarse = (rounded + fine_step / 2) >> 7;
      write(to + k, __builtin_convertvector(coarse, Bytes));
      write(to + elements + k, __builtin_convertvector(rounded - coarse * fine_step, Bytes));
    });
    params.x_offset[row] = offset_of(sum);
  }

  template <class Visit>
  static FK_INLINE void each_vector(
      const Params& params, int64_t row, int64_t elements, float most, const Visit& visit) {
    const T* from = (const T*)params.x.data + row * params.x.row;
    const Integers integers(largest_magnitude(from, params.in), most);
    params.x_scale[row] = integers.scale;
    for (int64_t k = 0; k < elements; k += width)
      visit(k, integers.round(k < params.in ? load(from + k, params.in - k) : Floats{}));
  }
};

template <class T>
struct Forward {
  float *weights, *sums, *finished;

  Forward(Scratch& scratch, const Params&)
      : weights(scratch.take(block_outputs * piece_words)),
        sums(scratch.take(block_outputs * sums_row)),
        finished(scratch.take(width * block_outputs)) {}

  static int64_t tasks(const Params& params) {
    return count_blocks(params.out, block_outputs) * count_blocks(count_columns(params), block_rows);
  }

  void run(const Params& params, int64_t task) {
    const int64_t passes = count_blocks(count_columns(params), block_rows), first = task % passes * block_rows;
    const int64_t columns = smaller(block_rows, count_columns(params) - first);
    const int64_t begin = task / passes * block_outputs, outputs = smaller(block_outputs, params.out - begin);
    if (is_in_place(params, outputs, columns))
      multiply_in_place(params, begin, outputs, first, columns);
    else
      multiply_brought(params, begin, outputs, first, columns);
    const int64_t first_row = is_fine(params) ? first / 2 : first;
    for (int64_t i = 0; i < columns; i += width)
      finish(params, first_row + (is_fine(params) ? i / 2 : i), begin, outputs, sums + i);
  }

 private:
  // Whether tiles read a block of weights where it is: whole tiles of whole words, and so few columns that the block
  // is read once or twice.
  static FK_INLINE bool is_in_place(const Params& params, int64_t outputs, int64_t columns) {
    const bool whole = outputs % tile_side == 0 && params.in % (Dot::lanes * Dot::depth) == 0;
    const bool aligned = params.weight.row % Dot::lanes == 0 && (uintptr_t)params.weight.data % Dot::lanes == 0;
    return has_tiles && whole && aligned && columns <= 2 * panel;
  }

  void multiply_in_place(const Params& params, int64_t begin, int64_t outputs, int64_t first, int64_t columns) {
    if constexpr (has_tiles) {
      const int64_t depth = count_words(params), row = params.weight.row / Dot::lanes;
      const float* from = (const float*)((const int8_t*)params.weight.data + begin * params.weight.row);
      for (int64_t i = 0; i < columns; i += panel) {
        const float* x = (const float*)params.packed + (first + i) * depth;
        const int64_t wide = columns - i <= tile_side ? tile_side : panel;
        multiply_in_tiles<OfInt8, false>(outputs, wide, depth, from, row, x, panel, sums + i, sums_row, i == 0);
      }
    }
  }

  void multiply_brought(const Params& params, int64_t begin, int64_t outputs, int64_t first, int64_t columns) {
    for (int64_t k = 0; k < count_words(params) || k == 0; k += piece_words) {
      const int64_t depth = smaller(piece_words, count_words(params) - k);
      for (int64_t j = 0; j < block_outputs; ++j)
        bring(params, begin + j, k, depth, weights + j * piece_words);
      for (int64_t i = 0; i < columns; i += panel) {
        const float* x = (const float*)params.packed + (first + i) * count_words(params) + k * panel;
        const Operand a = {weights, piece_words, 1};
        if (k == 0)
          multiply<Dot, false>(outputs, panel, depth, a, x, panel, sums + i, sums_row);
        else
          multiply<Dot, true>(outputs, panel, depth, a, x, panel, sums + i, sums_row);
      }
    }
  }

  // A piece of a row of the weight, as words with zeros behind it, and behind the last row. Quads are 128 more, as
  // their instruction wants the weights without a sign.
  static FK_INLINE void bring(const Params& params, int64_t row, int64_t first_word, int64_t depth, float* to) {
    constexpr int64_t step = width * Dot::lanes;
    const int64_t begin = first_word * Dot::lanes;
    const int64_t end = row < params.out ? smaller(begin + depth * Dot::lanes, params.in) : begin;
    const int8_t* from = (const int8_t*)params.weight.data + row * params.weight.row;
    for (int64_t k = begin; k < begin + depth * Dot::lanes; k += step, to += width) {
      int8_t padded_bytes[step] = {};
      const int8_t* here = padded_bytes;
      if (k + step <= end)
        here = from + k, __builtin_prefetch(here + piece_words * Dot::lanes);
      else
        for (int64_t i = k; i < end; ++i) padded_bytes[i - k] = from[i];
      if constexpr (Dot::lanes == 2)
        write(to, widen(read<Int8s>(here)));
      else
        write(to, read<Bits>(here) ^ (in_quads ? 0x80808080 : 0));
    }
  }

  // Rows of y from up to `width` columns of sums.
  FK_INLINE void finish(const Params& params, int64_t row, int64_t begin, int64_t outputs, const float* from) {
    for (int64_t j = 0; j < outputs; j += width) {
      Floats block[width];
      for (int64_t r = 0; r < width; ++r) {
        const Floats sum = load(from + (j + r) * sums_row);
        block[r] = Dot::lanes == 2 ? sum : __builtin_convertvector((Ints)sum, Floats);
      }
      transpose(block);
      if (is_fine(params))
        for (int64_t r = 0; r < width / 2; ++r)
          store(finished + r * block_outputs + j, (float)fine_step * block[2 * r] + block[2 * r + 1]);
      else
        for (int64_t r = 0; r < width; ++r) store(finished + r * block_outputs + j, block[r]);
    }
    const int64_t most = is_fine(params) ? width / 2 : width;
    for (int64_t r = 0; r < smaller(most, params.rows - row); ++r)
      linear::finish(params, row + r, begin, begin + outputs, finished + r * block_outputs);
  }
};

}  // namespace flamingo_kernels::FK_ISA::linear_int8
