// y = residual + tanh(gate) * act(x @ weight.T + bias) * factor, for few rows of x.
//
// Oracle: flamingo_kernels/ops/linear/reference.py. Reads every weight once: in * out elements, at the speed of the
// memory; 2 FLOPs a weight and a row. Weights of 8 bits with a scale an output meet x in 16 bits with a scale a row,
// whose error is a hundredth of theirs. A task owns a block of outputs. It goes through their weights in short pieces,
// so that the rows of x that meet them stay in the cache, and asks for the next piece while it multiplies one. A row of
// x is added up in one order, however many rows there are.
#pragma once

#include <type_traits>

#include "activation.h"
#include "gemm.h"
#include "integers.h"
#include "params.h"

namespace flamingo_kernels::FK_ISA::linear {

using Params = Linear;

constexpr int64_t most_rows = 16;       // of x, in one pass over the weights
constexpr int64_t block_outputs = 32;   // of a task
constexpr int64_t piece_vectors = 32;   // of a weight's row in a piece; short sums, which are added up
constexpr int64_t weights_at_once = 4;  // rows of the weight that are multiplied by all rows of x while in the cache
constexpr int64_t group = 4;            // rows of x that a weight in a register is multiplied by

// How a vector of weights meets one of x: both as floats, or as pairs of bfloat16 where the processor multiplies those,
// or as pairs of 16-bit integers.
template <class T>
struct InFloats : FloatSums {
  using Element = float;
  static constexpr int64_t step = width;
  static FK_INLINE Floats load_weights(const T* from) { return load(from); }
  static FK_INLINE Floats load_weights(const T* from, int64_t left) { return load(from, left); }
  static FK_INLINE Floats dot(Floats sum, Floats a, Floats b) { return Single::dot(sum, a, b); }
};

struct InPairs : FloatSums {
  using Element = BFloat16;
  static constexpr int64_t step = 2 * width;
  static FK_INLINE Floats load_weights(const BFloat16* from) { return read<Floats>(from); }
  static FK_INLINE Floats load_weights(const BFloat16* from, int64_t left) { return load_words<Pairs>(from, left); }
  static FK_INLINE Floats dot(Floats sum, Floats a, Floats b) { return Pairs::dot(sum, a, b); }
};

struct InIntegers : IntegerPairs {
  static constexpr int64_t step = 2 * width;
  static FK_INLINE Floats load_weights(const int8_t* from) { return (Floats)widen(read<Int8s>(from)); }
  static FK_INLINE Floats load_weights(const int8_t* from, int64_t left) {
    int8_t padded_weights[step] = {};
    for (int64_t i = 0; i < left; ++i) padded_weights[i] = from[i];
    return load_weights(padded_weights);
  }
};

// Fours of 8-bit integers, where those of the weight are 128 more, as the instruction wants them without a sign.
// Padding meets zeros of x.
struct InQuads {
  using Element = int8_t;
  static constexpr int64_t step = 4 * width;
  static FK_INLINE Floats load_weights(const int8_t* from) { return (Floats)(read<Bits>(from) ^ 0x80808080); }
  static FK_INLINE Floats load_weights(const int8_t* from, int64_t left) {
    int8_t padded_weights[step] = {};
    for (int64_t i = 0; i < left; ++i) padded_weights[i] = from[i];
    return load_weights(padded_weights);
  }
  static FK_INLINE Floats dot(Floats sum, Floats a, Floats b) { return (Floats)add_quads((Ints)sum, (Bits)a, (Bits)b); }
  static FK_INLINE Floats close(Floats sum) { return __builtin_convertvector((Ints)sum, Floats); }
};

template <class Dot>
constexpr bool has_integers = std::is_same_v<Dot, InIntegers> || std::is_same_v<Dot, InQuads>;

// T is the type of x, and W that of the weights.
template <class T, class W>
using DotOf = std::conditional_t<
    std::is_same_v<W, int8_t>, InIntegers,
    std::conditional_t<std::is_same_v<T, BFloat16> && has_pairs, InPairs, InFloats<T>>>;

constexpr int power_of_two(int count) { return count <= 1 ? 1 : 2 * power_of_two((count + 1) / 2); }

FK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FK_INLINE int64_t count_groups(const Params& params) { return (params.rows + group - 1) / group; }

// Elements of a packed row: whole vectors.
template <class Dot>
FK_INLINE int64_t packed_row(const Params& params) {
  return round_up(params.in, Dot::step);
}

// Whether x is what packing would make of it.
template <class T, class Dot>
FK_INLINE bool is_packed(const Params& params) {
  return std::is_same_v<T, typename Dot::Element> && params.rows == 1 && params.in % Dot::step == 0;
}

// The rows of x, a group as [vectors][rows of the group][elements of a vector], zeros behind the last element: what
// meets a vector of weights lies side by side.
template <class T, class W, class Dot = DotOf<T, W>>
struct Pack {
  using Element = typename Dot::Element;

  Pack(Scratch&, const Params&) {}
  static int64_t tasks(const Params& params) { return is_packed<T, Dot>(params) ? 0 : count_groups(params); }

  void run(const Params& params, int64_t task) {
    const int64_t first = task * group, rows = smaller(group, params.rows - first);
    Element* to = (Element*)params.packed + first * packed_row<Dot>(params);
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = (const T*)params.x.data + (first + i) * params.x.row;
      [[maybe_unused]] Integers integers;
      [[maybe_unused]] Ints sum = {};
      if constexpr (has_integers<Dot>) {
        constexpr float most = sizeof(Element) == 1 ? most_of_8_bits : most_of_16_bits;
        integers = Integers(largest_magnitude(from, params.in), most);
        params.x_scale[first + i] = integers.scale;
      }
      for (int64_t k = 0; k < packed_row<Dot>(params); k += width) {
        Element* here = to + (k / Dot::step * rows + i) * Dot::step + k % Dot::step;
        const int64_t left = params.in - k;
        if constexpr (has_integers<Dot>) {
          const Ints rounded = integers.round(left > 0 ? load(from + k, left) : Floats{});
          if constexpr (sizeof(Element) == 1)
            write(here, __builtin_convertvector(rounded, Bytes));
          else
            write(here, __builtin_convertvector(rounded, Shorts));
          sum += rounded;
        } else if constexpr (sizeof(Element) == sizeof(float))
          store(here, left > 0 ? load(from + k, left) : Floats{});
        else
          store(here, left > 0 ? load_bits(from + k, left) : Shorts{});
      }
      if constexpr (has_integers<Dot>)
        params.x_offset[first + i] = std::is_same_v<Dot, InQuads> ? offset_of(sum) : 0;
    }
  }
};

// The sums of `count` vectors' lanes, a power of two, in the first lanes and in the vectors' order. All are added in the
// order of `sum`.
template <int count>
FK_INLINE Floats add_lanes(Floats (&vectors)[count]) {
  constexpr auto lanes = std::make_integer_sequence<int, width>();
#pragma GCC unroll 4
  for (int half = count / 2; half >= 1; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      vectors[i] = interleave(vectors[i], vectors[i + half], 0, lanes) +
                   interleave(vectors[i], vectors[i + half], width / 2, lanes);
#pragma GCC unroll 4
  for (int distance = width / 2; distance >= count; distance /= 2) vectors[0] += swap_lanes(vectors[0], distance, lanes);
  return vectors[0];
}

// sums[row of x][row of the weight] += products of a piece: `outputs` rows of the weight, `rows` of x. Asks for the
// piece at `next` where there is one.
template <class Dot, class W, int outputs, int rows, bool ahead>
FK_INLINE void add_products(
    const W* weight, int64_t weight_row, const typename Dot::Element* x, int64_t length, const W* next, float* sums) {
  Floats acc[rows][outputs] = {}, weights[outputs];
  const auto multiply_vector = [&](int64_t k) {
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const Floats x_k = read<Floats>(x + k * rows + i * Dot::step);
#pragma GCC unroll 4
      for (int j = 0; j < outputs; ++j) acc[i][j] = Dot::dot(acc[i][j], weights[j], x_k);
    }
  };
  int64_t k = 0;
  for (; k + Dot::step <= length; k += Dot::step) {
#pragma GCC unroll 4
    for (int j = 0; j < outputs; ++j) {
      if constexpr (ahead) __builtin_prefetch(next + j * weight_row + k);
      weights[j] = Dot::load_weights(weight + j * weight_row + k);
    }
    multiply_vector(k);
  }
  if (k < length) {
    for (int j = 0; j < outputs; ++j) weights[j] = Dot::load_weights(weight + j * weight_row + k, length - k);
    multiply_vector(k);
  }
  constexpr int count = rows * outputs;
  Floats vectors[power_of_two(count)] = {};
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) vectors[i] = Dot::close(acc[i / outputs][i % outputs]);
  float added[width];
  store(added, add_lanes(vectors));
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) sums[i / outputs * block_outputs + i % outputs] += added[i];
}

// The same for up to four rows of the weight, as many at once as leave registers for the sums.
template <class Dot, class W, int rows, bool ahead>
__attribute__((noinline)) void add_group(
    int64_t outputs, const W* weight, int64_t weight_row, const typename Dot::Element* x, int64_t length, const W* next,
    float* sums) {
  constexpr int sums_of_a_vector = width / power_of_two(rows), at_once = sums_of_a_vector < 4 ? sums_of_a_vector : 4;
  int64_t j = 0;
  for (; j + at_once <= outputs; j += at_once)
    add_products<Dot, W, at_once, rows, ahead>(
        weight + j * weight_row, weight_row, x, length, next + j * weight_row, sums + j);
  for (; j < outputs; ++j)
    add_products<Dot, W, 1, rows, ahead>(weight + j * weight_row, weight_row, x, length, next + j * weight_row, sums + j);
}

FK_INLINE Floats load_any(const void* from, DType dtype, int64_t i, int64_t left) {
  if (dtype == DType::f32) return load((const float*)from + i, left);
  if (dtype == DType::bf16) return load((const BFloat16*)from + i, left);
  return load((const Float16*)from + i, left);
}

FK_INLINE void store_any(const Matrix& to, int64_t row, int64_t j, Floats x, int64_t left) {
  const int64_t i = row * to.row + j;
  if (to.dtype == DType::f32) return store((float*)to.data + i, x, left);
  if (to.dtype == DType::bf16) return store((BFloat16*)to.data + i, x, left);
  return store((Float16*)to.data + i, x, left);
}

// What follows the product, for a row of a block.
FK_INLINE void finish(const Params& params, int64_t row, int64_t begin, int64_t end, const float* sums) {
  for (int64_t j = begin; j < end; j += width) {
    const int64_t left = end - j;
    Floats y = load(sums + (j - begin), left);
    if (params.weight_scale)
      y = (y - params.x_offset[row]) * (params.x_scale[row] * load(params.weight_scale + j, left));
    if (params.bias) y += load_any(params.bias, params.bias_dtype, j, left);
    y = activate(params.activation, y);
    if (params.factor.data) y *= load_any(params.factor.data, params.factor.dtype, row * params.factor.row + j, left);
    if (params.tanh_gate) y *= params.per_channel ? load(params.tanh_gate + j, left) : splat(params.tanh_gate[0]);
    const Matrix& residual = params.residual;
    if (residual.data) y += load_any(residual.data, residual.dtype, row * residual.row + j, left);
    store_any(params.y, row, j, y, left);
  }
}

template <class T, class W, class Dot = DotOf<T, W>>
struct Forward {
  using Element = typename Dot::Element;
  float* sums;

  Forward(Scratch& scratch, const Params&) : sums(scratch.take(most_rows * block_outputs)) {}

  static int64_t passes(const Params& params) { return (params.rows + most_rows - 1) / most_rows; }
  static int64_t tasks(const Params& params) {
    return (params.out + block_outputs - 1) / block_outputs * passes(params);  // those of one block in a row
  }

  void run(const Params& params, int64_t task) {
    const int64_t first = task % passes(params) * most_rows, rows = smaller(most_rows, params.rows - first);
    const int64_t begin = task / passes(params) * block_outputs, end = smaller(begin + block_outputs, params.out);
    constexpr int64_t piece = (std::is_same_v<Dot, InIntegers> ? 2 : 1) * piece_vectors * Dot::step;
    for (int64_t i = 0; i < most_rows * block_outputs; ++i) sums[i] = 0;
    for (int64_t k = 0; k < params.in; k += piece)
      for (int64_t j = begin; j < end; j += weights_at_once) {
        const bool last = j + weights_at_once >= end;
        const W* next = last ? weights(params, begin, k + piece) : weights(params, j + weights_at_once, k);
        if (last && k + piece >= params.in) next = weights(params, end, 0);
        multiply(params, smaller(weights_at_once, end - j), j, k, smaller(piece, params.in - k), first, rows, next,
                 sums + (j - begin));
      }
    for (int64_t i = 0; i < rows; ++i) finish(params, first + i, begin, end, sums + i * block_outputs);
  }

 private:
  static FK_INLINE const W* weights(const Params& params, int64_t j, int64_t k) {
    return (const W*)params.weight.data + j * params.weight.row + k;
  }

  // A piece of `outputs` rows of the weight by all rows of x, a group after the other.
  static FK_INLINE void multiply(
      const Params& params, int64_t outputs, int64_t j, int64_t k, int64_t length, int64_t first, int64_t rows,
      const W* next, float* sums) {
    for (int64_t i = 0; i < rows; i += group) {
      const int64_t rows_here = smaller(group, rows - i);
      const Element* packed = (const Element*)(is_packed<T, Dot>(params) ? params.x.data : params.packed);
      const Element* x = packed + (first + i) * packed_row<Dot>(params) + k * rows_here;
      const auto add = [&]<int n>() {
        float* to = sums + i * block_outputs;
        if (i == 0)
          add_group<Dot, W, n, true>(outputs, weights(params, j, k), params.weight.row, x, length, next, to);
        else
          add_group<Dot, W, n, false>(outputs, weights(params, j, k), params.weight.row, x, length, next, to);
      };
      if (rows_here == 4) add.template operator()<4>();
      if (rows_here == 3) add.template operator()<3>();
      if (rows_here == 2) add.template operator()<2>();
      if (rows_here == 1) add.template operator()<1>();
    }
  }
};

}  // namespace flamingo_kernels::FK_ISA::linear
