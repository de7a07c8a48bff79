// A linear layer of few rows, with a norm before it and what may follow it:
//
//   y = residual + tanh(gate) * act(weight norm(x) + bias)
//
// With a second weight, as gated linear units have it, act(gate_proj norm(x) + bias) * (weight norm(x) + bias) stands
// in the place of act(...). Oracle: ops/linear/reference.py.
//
// A block computes 16 outputs of up to 16 rows, and its warps divide the columns among them. Weights go from memory
// into the registers of mma, 16 bytes a lane: any order of columns is right if weights and x have the same. Weights of
// int8 become numbers of x's dtype there, which is exact, and their scale meets the sum. A lane has 8 loads of weights
// under way; the first are on their way while the block norms x, which every block does again, and keeps it in shared
// memory. What follows the sum is in float32 and rounded once.
//
// Bytes: every weight once from memory, and for each further 16 rows from the cache. FLOPs: 2 a weight and row.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kOutputs = 16;         // of a block
constexpr int kMostBytes = 1 << 16;  // of x that a block keeps

template <class W>
constexpr int kTaken = 16 / sizeof(W);  // columns of a row of weights that a lane takes at once, a quarter of a warp's
template <class W>
constexpr int kRound = kWarps * 4 * kTaken<W>;  // columns that a block takes at once
template <class W>
constexpr int kRounds = sizeof(W) == 1 ? 2 : 4;  // loads of each of its two rows that a lane has under way
template <class W>
constexpr int kSpan = kRounds<W> * kRound<W>;  // columns of a sum before it is added to others
template <class W>
constexpr int kPad = sizeof(W) == 1 ? 8 : 32;  // elements between rows of x, so that they lie in different banks

// X is the dtype that x, the norm and the residual have, all of them in whole vectors; or Mixed, where each says at run
// time what it has.
template <class X>
constexpr bool is_plain = !std::is_same_v<X, Mixed>;

template <class X, class... From>
__device__ inline void load_vector(float (&values)[kVector], const From&... from) {
  if constexpr (is_plain<X>)
    load<X, true>(values, from...);
  else
    load(values, from...);
}

// What a block computes, and where it keeps what for it.
template <class T, int most_rows>
struct Place {
  int64_t row, output;  // the first
  int rows;
  int pitch;      // elements from a row of `x` to the next
  float* sums;    // [2, warps, most rows, outputs]
  float* of_row;  // [2, warps]
  T* x;           // [rows, pitch]

  __device__ Place(const Linear& params, int pad) {
    row = int64_t(blockIdx.x) * most_rows, output = int64_t(blockIdx.y) * kOutputs;
    rows = most_rows == 1 ? 1 : min(int64_t(most_rows), params.rows - row), pitch = params.chunk + pad;
    sums = static_cast<float*>(shared_memory()), of_row = sums + 2 * kWarps * most_rows * kOutputs;
    x = reinterpret_cast<T*>(of_row + 2 * kWarps);
  }
};

template <class T, int most_rows>
size_t count_shared_bytes(int64_t rows, int64_t pitch) {
  return kWarps * (most_rows * 2 * kOutputs + 2) * sizeof(float) + rows * pitch * sizeof(T);
}

// The sum over all columns of a row of what `term` makes of one of them; a block's threads take 8 at a time.
template <class X, class Load, class Term>
__device__ inline float sum_columns(float* sums, int columns, Load load, Term term) {
  float own = 0;
#pragma unroll 1
  for (int at = threadIdx.x * kVector; at < columns; at += kThreads * kVector) {
    float values[kVector];
    load(values, Columns{at, columns});
    for (int i = 0; i < kVector; ++i)
      if (is_plain<X> || at + i < columns) own += term(values[i]);
  }
  own = warp_sum(own);
  if (lane() == 0) sums[warp()] = own;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < kWarps; ++i) total += sums[i];
  return total;
}

// Norms a row: `load` gives 8 of its columns, and `store` takes them. The same bits, wherever they come from.
template <class X, class Load, class Store>
__device__ inline void norm_row(const Norm& norm, int columns, float* sums, Load load, Store store) {  // [2, warps]
  float mean = 0;
  if (!norm.rms) mean = sum_columns<X>(sums, columns, load, [](float value) { return value; }) / columns;
  const auto square = [&](float value) { return (value - mean) * (value - mean); };
  const float variance = sum_columns<X>(sums + kWarps, columns, load, square) / columns;
  const float rstd = 1 / sqrtf(variance + norm.eps);
#pragma unroll 1
  for (int at = threadIdx.x * kVector; at < columns; at += kThreads * kVector) {
    const Columns place = {at, columns};
    float values[kVector], weight[kVector], bias[kVector] = {};
    load_vector<X>(weight, norm.weight, place);
    if (norm.bias.data) load_vector<X>(bias, norm.bias, place);
    load(values, place);
    for (int i = 0; i < kVector; ++i) values[i] = (values[i] - mean) * rstd * weight[i] + bias[i];
    store(values, place);
  }
}

// Norms every row of x on its own.
template <class T, class X>
__global__ void __launch_bounds__(kThreads) linear_norm_kernel(Linear params) {
  const int64_t row = blockIdx.x;
  norm_row<X>(
      params.norm, params.in, static_cast<float*>(shared_memory()),
      [&](float (&values)[kVector], Columns columns) { load_vector<X>(values, params.x, row, columns); },
      [&](const float (&values)[kVector], Columns columns) {
        T* to = static_cast<T*>(params.normed.data) + row * params.normed.row + columns.first;
        store_typed<T, is_plain<X>>(to, values, columns);
      });
}

// Starts to fill a chunk of x; what is beyond the last column becomes 0.
template <class X, class T, int most_rows>
__device__ inline void copy_x(const Linear& params, const Place<T, most_rows>& place, int chunk) {
#pragma unroll 1
  for (int row = 0; row < place.rows; ++row)
#pragma unroll 1
    for (int column = threadIdx.x * kVector; column < params.chunk; column += kThreads * kVector) {
      T* to = place.x + row * place.pitch + column;
      const Columns columns = {chunk + column, params.in};
      if constexpr (is_plain<X>) {
        const T* from = static_cast<const T*>(params.x.data) + (place.row + row) * params.x.row;
        copy_async(to, from + (columns.inside() ? columns.first : 0), columns.inside() ? 16 : 0);
      } else {
        float values[kVector] = {};
        if (columns.inside()) load_vector<X>(values, params.x, place.row + row, columns);
        store_typed<T, true>(to, values, columns);
      }
    }
  commit_copies();
}

// Waits for the chunk, and norms it where there is a norm: all columns are in one chunk then.
template <class X, class T, int most_rows>
__device__ inline void finish_x(const Linear& params, const Place<T, most_rows>& place) {
  wait_for_copies<0>();
  __syncthreads();
  if constexpr (is_plain<X> && most_rows == 1) {
    if (!params.norm.weight.data) return;
    norm_row<X>(
        params.norm, params.in, place.of_row,
        [&](float (&values)[kVector], Columns at) { load_typed<T, true>(values, place.x + at.first, at); },
        [&](const float (&values)[kVector], Columns at) { store_typed<T, true>(place.x + at.first, values, at); });
    __syncthreads();
  }
}

// The rows of weights of a lane, as mma has them: those beyond the last output are the last one's, and dropped.
template <class W>
struct WeightRows {
  const W *upper, *lower;

  __device__ WeightRows(const Weights& weights, const Linear& params, int64_t output)
      : upper(row(weights, params, output + lane() / 4)), lower(row(weights, params, output + lane() / 4 + 8)) {}

 private:
  __device__ static const W* row(const Weights& weights, const Linear& params, int64_t output) {
    return static_cast<const W*>(weights.data) + min(output, params.out - 1) * weights.row;
  }
};

// What a lane takes of a row of weights at once; 0 beyond the end.
template <class W, bool wide>
__device__ inline uint4 load_weights(const W* row, Columns columns) {
  uint4 loaded = {};
  if constexpr (wide) {
    if (columns.inside()) loaded = load_128(row + columns.first);
  } else {
    W weights[kTaken<W>] = {};
    for (int i = 0; i < kTaken<W>; ++i)
      if (columns.first + i < columns.count) weights[i] = row[columns.first + i];
    memcpy(&loaded, weights, sizeof loaded);
  }
  return loaded;
}

// A lane's weights of a span, on their way or there.
template <class W, bool wide>
struct LoadedWeights {
  uint4 upper[kRounds<W>], lower[kRounds<W>];

  __device__ void load(const WeightRows<W>& rows, int span, int in) {
    const int first = span + (warp() * 4 + lane() % 4) * kTaken<W>;
#pragma unroll
    for (int n = 0; n < kRounds<W>; ++n) {
      const Columns columns = {first + n * kRound<W>, in};
      upper[n] = load_weights<W, wide>(rows.upper, columns), lower[n] = load_weights<W, wide>(rows.lower, columns);
    }
  }
};

// The same numbers as words of T, for mma.
template <class T, class W>
__device__ inline void convert(uint4 (&words)[sizeof(T) / sizeof(W)], uint4 loaded) {
  W weights[kTaken<W>];
  T elements[kTaken<W>];
  memcpy(weights, &loaded, sizeof loaded);
  for (int i = 0; i < kTaken<W>; ++i)
    if constexpr (std::is_same_v<T, W>)
      elements[i] = weights[i];
    else
      elements[i] = from_float<T>(weights[i]);
  memcpy(words, elements, sizeof words);
}

// Adds the products of a span, 16 outputs and 8 rows of x a tile, as mma spreads them: short sums, so that a long one
// keeps its precision. Rows of x that are not there are the last one's, and dropped.
template <class T, class W, bool wide, int most_rows, int tiles>
__device__ inline void multiply(
    float (&sums)[tiles][4], const Place<T, most_rows>& place, const LoadedWeights<W, wide>& loaded, int column) {
  constexpr int words = sizeof(T) / sizeof(W);
  const int first = column + (warp() * 4 + lane() % 4) * kTaken<W>;
  float c[tiles][4] = {};
#pragma unroll
  for (int n = 0; n < kRounds<W>; ++n) {
    uint4 u[words], l[words];
    convert<T, W>(u, loaded.upper[n]), convert<T, W>(l, loaded.lower[n]);
    for (int i = 0; i < words; ++i)
      for (int t = 0; t < tiles; ++t) {
        const int row = min(t * 8 + lane() / 4, place.rows - 1);
        const uint4 x = load_128(place.x + row * place.pitch + first + n * kRound<W> + i * 8);
        mma(c[t], {u[i].x, l[i].x, u[i].y, l[i].y}, {x.x, x.y}, T());
        mma(c[t], {u[i].z, l[i].z, u[i].w, l[i].w}, {x.z, x.w}, T());
      }
  }
  for (int t = 0; t < tiles; ++t)
    for (int i = 0; i < 4; ++i) sums[t][i] += c[t][i];
}

// The same of float32, exactly.
template <class W, int most_rows, int tiles>
__device__ inline void multiply_exactly(
    float (&sums)[tiles][4], const Place<float, most_rows>& place, const WeightRows<W>& rows, int span, int column, int in) {
  float c[tiles][4] = {};
  for (int n = 0; n < kRounds<W>; ++n) {
    const int first = n * kRound<W> + warp() * 4 * kTaken<W>;
    for (int k = first; k < min(first + 4 * kTaken<W>, in - span); ++k)
      for (int t = 0; t < tiles; ++t)
        for (int i = 0; i < 4; ++i) {
          const int row = min(t * 8 + lane() % 4 * 2 + i % 2, place.rows - 1);
          const float x = place.x[row * place.pitch + column + k];
          c[t][i] = fmaf((i < 2 ? rows.upper : rows.lower)[span + k], x, c[t][i]);  // alike for any number of tiles
        }
  }
  for (int t = 0; t < tiles; ++t)
    for (int i = 0; i < 4; ++i) sums[t][i] += c[t][i];
}

// Leaves a warp's sums for `add_warps`.
template <int rows, int tiles>
__device__ inline void store_sums(const float (&sums)[tiles][4], float* all) {  // [warps, rows, outputs]
  for (int t = 0; t < tiles; ++t)
    for (int i = 0; i < 4; ++i) {
      const int row = t * 8 + lane() % 4 * 2 + i % 2, output = lane() / 4 + i / 2 * 8;
      if (row < rows) all[(warp() * rows + row) * kOutputs + output] = sums[t][i];
    }
}

// The sum over the warps for the output threadIdx.x % kOutputs of the row threadIdx.x / kOutputs.
template <int rows>
__device__ inline float add_warps(const float* all) {
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += all[w * rows * kOutputs + threadIdx.x];
  return total;
}

__device__ inline float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::gelu: return 0.5f * x * erfcf(x * -0.70710678f);                               // nothing cancels
    case Activation::gelu_tanh: return x / (1 + expf(-1.59576912f * (x + 0.044715f * x * x * x)));  // (1 + tanh(u)) / 2
    case Activation::relu: return x < 0 ? 0 : x;                                                    // NaN stays
    case Activation::squared_relu: return x < 0 ? 0 : x * x;
    case Activation::silu: return x / (1 + expf(-x));
    default: return x;
  }
}

// What follows the sums of one output of a row. It is loaded before the sums are there, and used after them.
template <class X>
struct Rest {
  using Held = std::conditional_t<is_plain<X>, X, float>;  // nothing waits for what is as it was in memory

  Held bias = {}, gate_proj_bias = {}, gate = {}, residual = {};
  float scale = 1, gate_proj_scale = 1;

  Rest() = default;
  __device__ Rest(const Linear& params, int64_t row, int64_t output, bool real) {
    if (!real) return;
    if (params.weight.bias.data) bias = held(params.weight.bias, output);
    if (params.gate_proj.bias.data) gate_proj_bias = held(params.gate_proj.bias, output);
    if (params.gate.data) gate = held(params.gate, params.per_channel ? output : 0);
    if (params.residual.data)
      residual = held({params.residual.data, params.residual.dtype}, row * params.residual.row + output);
    if (params.weight.scale) scale = params.weight.scale[output];
    if (params.gate_proj.scale) gate_proj_scale = params.gate_proj.scale[output];
  }

  __device__ float finish(const Linear& params, float sum, float gate_proj_sum) const {
    float value = sum * scale + to_float(bias);
    if (params.gate_proj.data)
      value *= activate(gate_proj_sum * gate_proj_scale + to_float(gate_proj_bias), params.activation);
    else
      value = activate(value, params.activation);
    if (params.gate.data) value *= tanhf(to_float(gate));
    return params.residual.data ? value + to_float(residual) : value;
  }

 private:
  __device__ static Held held(const Vector& vector, int64_t i) {
    if constexpr (is_plain<X>)
      return static_cast<const X*>(vector.data)[i];
    else
      return element(vector, i);
  }
};

template <class T, class W, class X, int most_rows, bool wide>
__global__ void __launch_bounds__(kThreads, 2) linear_fwd_kernel(Linear params) {
  constexpr bool exact = std::is_same_v<T, float>;
  constexpr int tiles = divide_up(most_rows, 8);
  const Place<T, most_rows> place(params, kPad<W>);
  const bool glu = params.gate_proj.data;
  const WeightRows<W> rows(params.weight, params, place.output);
  const WeightRows<W> gate_proj_rows(glu ? params.gate_proj : params.weight, params, place.output);
  LoadedWeights<W, wide> loaded;
  if constexpr (!exact) loaded.load(rows, 0, params.in);
  copy_x<X>(params, place, 0);
  const int row = threadIdx.x / kOutputs;
  const int64_t output = place.output + threadIdx.x % kOutputs;
  const bool real = row < place.rows && output < params.out;
  const auto load_rest = [&] { return Rest<X>(params, place.row + row, output, real); };
  constexpr bool rest_comes_first = most_rows <= 8;  // for more rows there are no registers to keep it
  Rest<X> rest;
  if constexpr (rest_comes_first) rest = load_rest();

  float sums[tiles][4] = {}, gate_proj_sums[tiles][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < params.in; chunk += params.chunk) {
    if (chunk) {
      __syncthreads();
      copy_x<X>(params, place, chunk);
    }
    finish_x<X>(params, place);
#pragma unroll 1
    for (int column = 0; column < min(params.chunk, params.in - chunk); column += kSpan<W>) {
      const int span = chunk + column;
      if constexpr (exact) {
        multiply_exactly(sums, place, rows, span, column, params.in);
        if (glu) multiply_exactly(gate_proj_sums, place, gate_proj_rows, span, column, params.in);
      } else {
        multiply(sums, place, loaded, column);
        if (glu) {
          loaded.load(gate_proj_rows, span, params.in);
          multiply(gate_proj_sums, place, loaded, column);
        }
        loaded.load(rows, span + kSpan<W>, params.in);
      }
    }
  }
  float* const gate_proj_all = place.sums + kWarps * most_rows * kOutputs;
  store_sums<most_rows>(sums, place.sums);
  if (glu) store_sums<most_rows>(gate_proj_sums, gate_proj_all);
  __syncthreads();
  if (!real) return;
  if constexpr (!rest_comes_first) rest = load_rest();
  const float gate_proj_sum = glu ? add_warps<most_rows>(gate_proj_all) : 0.0f;
  const float value = rest.finish(params, add_warps<most_rows>(place.sums), gate_proj_sum);
  store_element<X>(params.y, place.row + row, output, value);
}

template <class T, class W, class X, bool wide, int most_rows>
void launch_linear(Linear params, Stream stream) {
  constexpr int64_t span = kSpan<W>;
  const int64_t rows = std::min<int64_t>(params.rows, most_rows), most = kMostBytes / (rows * sizeof(T)) / span * span;
  params.chunk = int(std::min(divide_up(params.in, span) * span, std::max(most, span)));
  const dim3 grid = make_grid(divide_up(params.rows, most_rows), divide_up(params.out, kOutputs));
  const size_t shared = count_shared_bytes<T, most_rows>(rows, params.chunk + kPad<W>);
  launch(stream, linear_fwd_kernel<T, W, X, most_rows, wide>, grid, dim3(kThreads), shared, params);
}

template <class T, class W, class X, bool wide>
void launch_linear(const Linear& params, Stream stream) {
  if constexpr (is_plain<X>)
    if (params.rows == 1) return launch_linear<T, W, X, wide, 1>(params, stream);
  params.rows <= 8 ? launch_linear<T, W, X, wide, 8>(params, stream) : launch_linear<T, W, X, wide, 16>(params, stream);
}

// Whether x, or x and its norm, has the dtype of the products, in whole vectors.
bool is_plain_x(const Linear& params, const Norm& norm) {
  const auto is_plain_vector = [&](const Vector& vector) {
    return !vector.data || (vector.dtype == params.dtype && vector.wide);
  };
  return params.x.dtype == params.dtype && params.x.wide && is_plain_vector(norm.weight) && is_plain_vector(norm.bias);
}

// The same of all but the weights, some of which are taken one by one.
bool are_plain(const Linear& params) {
  const auto has_dtype = [&](const auto& tensor) { return !tensor.data || tensor.dtype == params.dtype; };
  return is_plain_x(params, params.norm) && has_dtype(params.weight.bias) && has_dtype(params.gate_proj.bias) &&
      has_dtype(params.gate) && has_dtype(params.residual) && has_dtype(params.y);
}

bool are_wide(const Linear& params) {
  return params.weight.wide && (params.gate_proj.wide || !params.gate_proj.data);
}

template <class T, class W>
void launch_linear(const Linear& params, Stream stream) {
  if constexpr (std::is_same_v<T, float>)
    launch_linear<T, W, Mixed, false>(params, stream);
  else if (!are_wide(params))
    launch_linear<T, W, Mixed, false>(params, stream);
  else
    are_plain(params) ? launch_linear<T, W, T, true>(params, stream) : launch_linear<T, W, Mixed, true>(params, stream);
}

template <class T>
void launch_norm(const Linear& params, Stream stream) {
  const auto launch_with = [&](auto type) {
    const size_t shared = 2 * kWarps * sizeof(float);
    launch(stream, linear_norm_kernel<T, decltype(type)>, make_grid(params.rows), dim3(kThreads), shared, params);
  };
  is_plain_x(params, params.norm) && params.normed.wide ? launch_with(T()) : launch_with(Mixed());
}

}  // namespace

namespace kernels {

// One row is normed again by every block, which takes less time than a launch.
bool norms_apart(const Linear& params) {
  const bool in_one_chunk = params.in * 2 <= kMostBytes;
  return params.norm.weight.data &&
      !(params.rows == 1 && params.dtype != DType::f32 && in_one_chunk && are_wide(params) && are_plain(params));
}

void linear_fwd(Linear params, Stream stream) {
  by_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    if (params.normed.data) {
      launch_norm<T>(params, stream);
      params.x = params.normed, params.norm = {};
    }
    params.weight.scale ? launch_linear<T, int8_t>(params, stream) : launch_linear<T, T>(params, stream);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
