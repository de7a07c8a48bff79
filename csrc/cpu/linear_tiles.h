// y = residual + tanh(gate) * act(x @ weight.T + bias) * factor in bfloat16, for a few rows of x on tile registers.
//
// Oracle: flamingo_kernels/ops/linear/reference.py. Reads every weight once: 2 bytes each, at the speed of the memory;
// 2 FLOPs a weight and a row. Tiles read whole blocks of weights where they are, so nothing of them is copied, and a
// product costs as much for 16 rows of x as for one.
#pragma once

#include "linear.h"

namespace flamingo_kernels::FK_ISA::linear_tiles {

using Params = Linear;
using linear::smaller;

constexpr int64_t block_outputs = 64;          // of a task
constexpr int64_t block_rows = 64;             // of a task
constexpr int64_t panel = 2 * tile_side;       // rows of x that are multiplied at once
constexpr int64_t sums_row = block_rows + 16;  // a skew, so that rows do not fall into the same cache sets
constexpr int64_t least_rows = 5;              // fewer are as fast one by one

FK_INLINE int64_t count_words(const Params& params) { return params.in / 2; }
FK_INLINE int64_t count_blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Whether tiles can read rows of the weight where they are: whole tiles of whole words.
FK_INLINE bool fits(const Params& params) {
  const bool whole = params.in % panel == 0 && params.in > 0;
  return whole && params.weight.row % 2 == 0 && (uintptr_t)params.weight.data % 4 == 0;
}

// The rows of x as panels of [words][rows of the panel], zeros behind the last row.
struct Pack {
  Pack(Scratch&, const Params&) {}
  static int64_t tasks(const Params& params) { return count_blocks(params.rows, panel); }

  void run(const Params& params, int64_t task) {
    const BFloat16* from = (const BFloat16*)params.x.data + task * panel * params.x.row;
    float* to = (float*)params.packed + task * panel * count_words(params);
    pack_transposed<Tiles>(from, params.x.row, smaller(panel, params.rows - task * panel), params.in, to, panel);
  }
};

struct Forward {
  float *sums, *finished, *last;

  Forward(Scratch& scratch, const Params& params)
      : sums(scratch.take(block_outputs * sums_row)),
        finished(scratch.take(width * block_outputs)),
        last(scratch.take(params.out % tile_side ? tile_side * count_words(params) : 0)) {}

  static int64_t passes(const Params& params) { return count_blocks(params.rows, block_rows); }
  static int64_t tasks(const Params& params) { return count_blocks(params.out, block_outputs) * passes(params); }

  void run(const Params& params, int64_t task) {
    const int64_t first = task % passes(params) * block_rows, rows = smaller(block_rows, params.rows - first);
    const int64_t begin = task / passes(params) * block_outputs, outputs = smaller(block_outputs, params.out - begin);
    const int64_t whole = outputs / tile_side * tile_side, row = params.weight.row / 2, depth = count_words(params);
    const float* weights = (const float*)params.weight.data + begin * row;
    if (whole < outputs) bring_last(weights + whole * row, row, outputs - whole, depth);
    for (int64_t i = 0; i < rows; i += panel) {
      const float* x = (const float*)params.packed + (first + i) * depth;
      const int64_t columns = rows - i <= tile_side ? tile_side : panel;
      float* to = sums + i;
      if (whole)
        multiply_in_tiles<OfBFloat16, false>(whole, columns, depth, weights, row, x, panel, to, sums_row, i == 0);
      if (whole < outputs)
        multiply_in_tiles<OfBFloat16, false>(
            tile_side, columns, depth, last, depth, x, panel, to + whole * sums_row, sums_row);
    }
    for (int64_t i = 0; i < rows; i += width) finish(params, first + i, rows - i, begin, outputs, sums + i);
  }

 private:
  // The rows of the weight behind the last whole tile, with zeros behind them.
  FK_INLINE void bring_last(const float* from, int64_t row, int64_t rows, int64_t depth) {
    for (int64_t i = 0; i < tile_side; ++i)
      if (i < rows)
        __builtin_memcpy(last + i * depth, from + i * row, depth * sizeof(float));
      else
        __builtin_memset(last + i * depth, 0, depth * sizeof(float));
  }

  // Up to `width` rows of y.
  FK_INLINE void finish(
      const Params& params, int64_t row, int64_t rows, int64_t begin, int64_t outputs, const float* from) {
    for (int64_t j = 0; j < outputs; j += width) {
      Floats block[width];
      for (int64_t r = 0; r < width; ++r) block[r] = load(from + (j + r) * sums_row);
      transpose(block);
      for (int64_t r = 0; r < width; ++r) store(finished + r * block_outputs + j, block[r]);
    }
    for (int64_t r = 0; r < smaller(width, rows); ++r)
      linear::finish(params, row + r, begin, begin + outputs, finished + r * block_outputs);
  }
};

}  // namespace flamingo_kernels::FK_ISA::linear_tiles
