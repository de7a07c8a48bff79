// A linear layer of few rows, with a norm before it and what may follow it:
//
//   y = residual + tanh(gate) * act(weight norm(x) + bias)
//
// With a second weight, as gated linear units have it, act(gate_proj norm(x) + bias) * (weight norm(x) + bias) stands
// in the place of act(...). Oracle: ops/linear/reference.py.
//
// A block computes 16 outputs of up to 16 rows, and its warps divide the columns among them. Weights go from memory
// into the registers of mma, 16 bytes a lane: any order of columns is right if weights and x have the same. Weights of
// int8 become numbers of x's dtype there, which is exact, and their scale meets the sum. Every block norms x again.
// What follows the sum is in float32 and rounded once.
//
// Bytes: every weight once from memory, and for each further 16 rows from the cache. FLOPs: 2 a weight and row.
#include <type_traits>

#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kOutputs = 16;  // of a block

template <class T>
constexpr int kChunk = 4096 / sizeof(T);  // columns of x that a block keeps, and of a sum before it is added to others
template <class T>
constexpr int kPitch = kChunk<T> + 16 / sizeof(T);  // rows begin in different banks
template <class W>
constexpr int kTaken = 16 / sizeof(W);  // columns of a row of weights that a lane takes at once, a quarter of a warp's

// What a block computes.
struct Place {
  int64_t row, output;  // the first

  __device__ Place(const Linear& params, int rows) {
    const unsigned row_blocks = divide_up(params.rows, rows);
    row = int64_t(blockIdx.x % row_blocks) * rows, output = int64_t(blockIdx.x / row_blocks) * kOutputs;
  }
};

// The mean of a row, or 0 for an RMSNorm, and one over the root of the mean square around it; by a warp.
__device__ inline void moments(float& mean, float& rstd, const Linear& params, int64_t row) {
  float values[kVector], sum = 0, squares = 0;
  for (int64_t at = lane() * kVector; at < params.in && !params.norm.rms; at += 32 * kVector) {
    load(values, params.x, row, {at, params.in});
    for (float value : values) sum += value;
  }
  const float center = warp_sum(sum) / params.in;
  for (int64_t at = lane() * kVector; at < params.in; at += 32 * kVector) {
    load(values, params.x, row, {at, params.in});
    for (int i = 0; i < kVector && at + i < params.in; ++i) squares += (values[i] - center) * (values[i] - center);
  }
  mean = center, rstd = 1 / sqrtf(warp_sum(squares) / params.in + params.norm.eps);
}

__device__ inline void apply_norm(float (&values)[kVector], const Norm& norm, Columns columns, float mean, float rstd) {
  float weight[kVector], bias[kVector] = {};
  load(weight, norm.weight, columns);
  if (norm.bias.data) load(bias, norm.bias, columns);
  for (int i = 0; i < kVector; ++i) values[i] = (values[i] - mean) * rstd * weight[i] + bias[i];
}

// Fills a chunk of x [rows, kChunk], normed where there is a norm; 0 beyond its ends.
template <class T>
__device__ inline void load_inputs(
    T* inputs, const Linear& params, Place place, int rows, int64_t chunk, const float* mean, const float* rstd) {
  for (int i = threadIdx.x * kVector; i < rows * kChunk<T>; i += kThreads * kVector) {
    const int row = i / kChunk<T>, column = i % kChunk<T>;
    const Columns columns = {chunk + column, params.in};
    float values[kVector] = {};
    if (place.row + row < params.rows) {
      load(values, params.x, place.row + row, columns);
      if (params.norm.weight.data) apply_norm(values, params.norm, columns, mean[row], rstd[row]);
    }
    store_typed<T, true>(inputs + row * kPitch<T> + column, values, columns);
  }
}

// What a lane takes of a row of weights, as words of T for mma; 0 beyond the end.
template <class T, class W, bool wide>
__device__ inline void load_weights(uint4 (&words)[sizeof(T) / sizeof(W)], const W* row, Columns columns) {
  W weights[kTaken<W>] = {};
  if constexpr (wide) {
    uint4 loaded = {};
    if (columns.inside()) loaded = load_128(row + columns.first);
    memcpy(weights, &loaded, sizeof loaded);
  } else {
    for (int i = 0; i < kTaken<W>; ++i)
      if (columns.first + i < columns.count) weights[i] = row[columns.first + i];
  }
  T elements[kTaken<W>];
  for (int i = 0; i < kTaken<W>; ++i)
    if constexpr (std::is_same_v<T, W>)
      elements[i] = weights[i];
    else
      elements[i] = from_float<T>(weights[i]);
  memcpy(words, elements, sizeof words);
}

// The rows of weights of a lane, as mma has them: those beyond the last output are the last one's, and dropped.
template <class W>
struct WeightRows {
  const W *upper, *lower;

  __device__ WeightRows(const Weights& weights, const Linear& params, Place place)
      : upper(row(weights, params, place.output + lane() / 4)),
        lower(row(weights, params, place.output + lane() / 4 + 8)) {}

 private:
  __device__ static const W* row(const Weights& weights, const Linear& params, int64_t output) {
    return static_cast<const W*>(weights.data) + min(output, params.out - 1) * weights.row;
  }
};

// The products of a warp's columns of a chunk: 16 outputs and 8 rows of x a tile, as mma spreads them.
template <class T, class W, bool wide, int tiles>
__device__ inline void multiply_chunk(
    float (&c)[tiles][4], const T* inputs, const Linear& params, const WeightRows<W>& rows, int64_t chunk) {
  constexpr int words = sizeof(T) / sizeof(W), step = 4 * kTaken<W>;
  const int group = lane() / 4, pair = lane() % 4, columns = min(params.in - chunk, int64_t(kChunk<T>));
#pragma unroll(wide ? 4 / words : 1)
  for (int first = warp() * step; first < columns; first += kWarps * step) {
    const int at = first + pair * kTaken<W>;
    uint4 u[words], l[words];
    load_weights<T, W, wide>(u, rows.upper, {chunk + at, params.in});
    load_weights<T, W, wide>(l, rows.lower, {chunk + at, params.in});
    for (int i = 0; i < words; ++i)
      for (int t = 0; t < tiles; ++t) {
        const uint4 x = load_128(inputs + (t * 8 + group) * kPitch<T> + at + i * 8);
        mma(c[t], {u[i].x, l[i].x, u[i].y, l[i].y}, {x.x, x.y}, T());
        mma(c[t], {u[i].z, l[i].z, u[i].w, l[i].w}, {x.z, x.w}, T());
      }
  }
}

// The same of float32, exactly.
template <class W, int tiles>
__device__ inline void multiply_chunk(
    float (&c)[tiles][4], const float* inputs, const Linear& params, const WeightRows<W>& rows, int64_t chunk) {
  constexpr int step = 4 * kTaken<W>;
  const int pair = lane() % 4, columns = min(params.in - chunk, int64_t(kChunk<float>));
  for (int first = warp() * step; first < columns; first += kWarps * step)
    for (int k = first; k < min(first + step, columns); ++k)
      for (int t = 0; t < tiles; ++t)
        for (int i = 0; i < 4; ++i) {
          const float x = inputs[(t * 8 + pair * 2 + i % 2) * kPitch<float> + k];
          c[t][i] = fmaf((i < 2 ? rows.upper : rows.lower)[chunk + k], x, c[t][i]);  // alike for any number of tiles
        }
}

template <class T, class W, int tiles>
__device__ inline void multiply(
    float (&c)[tiles][4], const T* inputs, const Linear& params, const Weights& weights, Place place, int64_t chunk) {
  const WeightRows<W> rows(weights, params, place);
  if constexpr (std::is_same_v<T, float>)
    multiply_chunk(c, inputs, params, rows, chunk);
  else if (weights.wide)
    multiply_chunk<T, W, true>(c, inputs, params, rows, chunk);
  else
    multiply_chunk<T, W, false>(c, inputs, params, rows, chunk);
}

// Adds the products of a chunk: short sums, so that a long one keeps its precision.
template <class T, int tiles>
__device__ inline void add_products(
    float (&sums)[tiles][4], const T* inputs, const Linear& params, const Weights& weights, Place place,
    int64_t chunk) {
  float c[tiles][4] = {};
  if (weights.scale)
    multiply<T, int8_t>(c, inputs, params, weights, place, chunk);
  else
    multiply<T, T>(c, inputs, params, weights, place, chunk);
  for (int t = 0; t < tiles; ++t)
    for (int i = 0; i < 4; ++i) sums[t][i] += c[t][i];
}

// The sum over the warps for the output threadIdx.x % kOutputs of the row threadIdx.x / kOutputs.
template <int tiles>
__device__ inline float add_warps(const float (&sums)[tiles][4], float* all) {  // [warps, rows, outputs]
  constexpr int rows = 8 * tiles, outputs = rows * kOutputs;
  __syncthreads();
  for (int t = 0; t < tiles; ++t)
    for (int i = 0; i < 4; ++i) {
      const int row = t * 8 + lane() % 4 * 2 + i % 2, output = lane() / 4 + i / 2 * 8;
      all[(warp() * rows + row) * kOutputs + output] = sums[t][i];
    }
  __syncthreads();
  float total = 0;
  for (int w = 0; w < kWarps && threadIdx.x < outputs; ++w) total += all[w * outputs + threadIdx.x];
  return total;
}

// Brings the block's weights into the cache while it norms x.
template <class T>
__device__ inline void prefetch_weights(const Linear& params, const Weights& weights, Place place) {
  const int64_t element = weights.scale ? 1 : sizeof(T), end = min(place.output + kOutputs, params.out);
  for (int64_t output = place.output + warp(); output < end; output += kWarps) {
    const char* row = static_cast<const char*>(weights.data) + output * weights.row * element;
    for (int64_t at = lane() * 128; at < params.in * element; at += 32 * 128) prefetch(row + at);
  }
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

// What a sum of products is with its scale and bias.
__device__ inline float complete(float sum, const Weights& weights, int64_t output) {
  if (weights.scale) sum *= weights.scale[output];
  return weights.bias.data ? sum + element(weights.bias, output) : sum;
}

__device__ inline void store_output(
    const Linear& params, int64_t row, int64_t output, float sum, float gate_proj_sum) {
  float value = complete(sum, params.weight, output);
  value = params.gate_proj.data
      ? activate(complete(gate_proj_sum, params.gate_proj, output), params.activation) * value
      : activate(value, params.activation);
  if (params.gate.data) value *= tanhf(element(params.gate, params.per_channel ? output : 0));
  if (params.residual.data) value += element(params.residual, row, output);
  store_element(params.y, row, output, value);
}

template <class T, int tiles>
constexpr size_t kSharedBytes = 8 * tiles * (kPitch<T> * sizeof(T) + (kWarps * kOutputs + 2) * sizeof(float));

template <class T, int tiles>
__global__ void __launch_bounds__(kThreads, 2) linear_fwd_kernel(Linear params) {
  constexpr int rows = 8 * tiles;
  T* inputs = static_cast<T*>(shared_memory());                      // [rows, kPitch]
  float* all = reinterpret_cast<float*>(inputs + rows * kPitch<T>);  // [warps, rows, outputs]
  float *mean = all + kWarps * rows * kOutputs, *rstd = mean + rows;
  const Place place(params, rows);
  const bool glu = params.gate_proj.data;
  prefetch_weights<T>(params, params.weight, place);
  if (glu) prefetch_weights<T>(params, params.gate_proj, place);
  for (int row = warp(); params.norm.weight.data && row < min(int64_t(rows), params.rows - place.row); row += kWarps)
    moments(mean[row], rstd[row], params, place.row + row);

  float sums[tiles][4] = {}, gate_proj_sums[tiles][4] = {};
  for (int64_t chunk = 0; chunk < params.in; chunk += kChunk<T>) {
    __syncthreads();
    load_inputs(inputs, params, place, rows, chunk, mean, rstd);
    __syncthreads();
    add_products(sums, inputs, params, params.weight, place, chunk);
    if (glu) add_products(gate_proj_sums, inputs, params, params.gate_proj, place, chunk);
  }
  const float sum = add_warps(sums, all), gate_proj_sum = glu ? add_warps(gate_proj_sums, all) : 0.0f;
  const int64_t row = place.row + threadIdx.x / kOutputs, output = place.output + threadIdx.x % kOutputs;
  if (threadIdx.x < rows * kOutputs && row < params.rows && output < params.out)
    store_output(params, row, output, sum, gate_proj_sum);
}

template <class T, int tiles>
void launch_linear(const Linear& params, Stream stream) {
  const dim3 grid = make_grid(divide_up(params.rows, 8 * tiles) * divide_up(params.out, kOutputs));
  launch(stream, linear_fwd_kernel<T, tiles>, grid, dim3(kThreads), kSharedBytes<T, tiles>, params);
}

}  // namespace

namespace kernels {

void linear_fwd(const Linear& params, Stream stream) {
  by_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    params.rows <= 8 ? launch_linear<T, 1>(params, stream) : launch_linear<T, 2>(params, stream);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
