// The gated cross-attention block for one token of each of a few sequences, over cached media keys and values:
//
//   q = norm(x) to_q^T
//   z = x + tanh(gate) * attention(q, k, v) to_out^T
//   out = z + tanh(ff_gate) * act(norm(z) up^T) down^T
//
// Oracle: ops/gated_block_decode/reference.py. Four launches: linear (norm, to_q), attention (attention, to_out, gate,
// residual), linear (norm, up, activation), linear (down, gate, residual).
//
// linear      A block computes 16 outputs of all sequences, and its warps divide the columns among them. Weights go
//             from memory into the registers of mma, 16 bytes a lane: any order of columns is right if weights and
//             inputs have the same. Every block computes the norm again.
// attention   A block owns one sequence and a slice of the outputs. Its warps take a head each, a lane a key, and then
//             an output each. Every slice computes the attention again: its keys lie in the cache by then.
//
// Bytes: every weight once; what a sequence sees of k and v once from memory. FLOPs: 2 a weight and sequence, 4 d a
// key and head.
#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kOutputs = 16;  // of a block of the linear kernel
constexpr int kStep = 32;     // columns that a warp takes at once

template <class T>
constexpr int kChunk = 4096 / sizeof(T);  // columns of the inputs that a block keeps
template <class T>
constexpr int kPitch = kChunk<T> + 16 / sizeof(T);  // rows begin in different banks

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }

// 8 elements of a row from `column` on, with 0 beyond its end.
template <class T>
__device__ inline void load_eight(float (&values)[kVector], const T* row, int64_t column, int64_t columns) {
  const bool wide = columns % kVector == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
  if (wide && column < columns)
    load_typed<T, true>(values, row + column, {column, columns});
  else
    load_typed<T, false>(values, row + column, {column, columns});
}

// The same 8 elements in their own type, for mma.
template <class T>
__device__ inline uint4 load_words(const T* row, int64_t column, int64_t columns) {
  if (columns % kVector == 0 && column < columns && reinterpret_cast<uintptr_t>(row) % 16 == 0)
    return load_128(row + column);
  T elements[kVector];
  for (int i = 0; i < kVector; ++i) elements[i] = column + i < columns ? row[column + i] : from_float<T>(0);
  uint4 words;
  memcpy(&words, elements, sizeof words);
  return words;
}

// The mean of a row and one over its standard deviation, by a warp.
template <class T>
__device__ inline void moments(float& mean, float& rstd, const T* row, int64_t columns, float eps) {
  float sum = 0, squares = 0;
  for (int64_t i = lane(); i < columns; i += 32) sum += to_float(row[i]);
  mean = warp_sum(sum) / columns;
  for (int64_t i = lane(); i < columns; i += 32) squares += (to_float(row[i]) - mean) * (to_float(row[i]) - mean);
  rstd = 1 / sqrtf(warp_sum(squares) / columns + eps);
}

// Fills a chunk of the inputs [sequences, kChunk], normed where there is a norm; 0 beyond their ends.
template <class T>
__device__ inline void load_inputs(
    T* inputs, const DecodeLinear& params, int64_t chunk, int sequences, const float* mean, const float* rstd) {
  for (int i = threadIdx.x; i < sequences * kChunk<T>; i += kThreads) {
    const int b = i / kChunk<T>;
    const int64_t column = chunk + i % kChunk<T>;
    float value = 0;
    if (b < params.batch && column < params.columns) {
      value = to_float(static_cast<const T*>(params.input)[b * params.columns + column]);
      if (params.norm_weight.data) value = (value - mean[b]) * rstd[b] * element(params.norm_weight, column);
      if (params.norm_bias.data) value += element(params.norm_bias, column);
    }
    inputs[b * kPitch<T> + i % kChunk<T>] = from_float<T>(value);
  }
}

// Adds the products of a warp's columns of a chunk: 16 outputs and 8 sequences a tile, as mma spreads them.
template <class T, int tiles>
__device__ inline void multiply_chunk(
    float (&c)[tiles][4], const T* inputs, const DecodeLinear& params, int64_t first, int64_t chunk) {
  const int group = lane() / 4, pair = lane() % 4;
  const T* upper = static_cast<const T*>(params.weight) + min(first + group, params.rows - 1) * params.columns;
  const T* lower = static_cast<const T*>(params.weight) + min(first + group + 8, params.rows - 1) * params.columns;
  const int64_t columns = min(params.columns - chunk, int64_t(kChunk<T>));
#pragma unroll 4
  for (int at = warp() * kStep + pair * kVector; at - pair * kVector < columns; at += kWarps * kStep) {
    if constexpr (sizeof(T) == 2) {
      const uint4 u = load_words(upper, chunk + at, params.columns), l = load_words(lower, chunk + at, params.columns);
      for (int t = 0; t < tiles; ++t) {
        const uint4 x = load_128(inputs + (t * 8 + group) * kPitch<T> + at);
        mma(c[t], {u.x, l.x, u.y, l.y}, {x.x, x.y}, T());
        mma(c[t], {u.z, l.z, u.w, l.w}, {x.z, x.w}, T());
      }
    } else {
      const int step = at - pair * kVector;
      for (int k = step; k < min(step + kStep, int(columns)); ++k)
        for (int t = 0; t < tiles; ++t)
          for (int i = 0; i < 4; ++i)
            c[t][i] += (i < 2 ? upper : lower)[chunk + k] * inputs[(t * 8 + pair * 2 + i % 2) * kPitch<T> + k];
    }
  }
}

__device__ inline float activate(float value, Activation activation) {
  switch (activation) {
    case Activation::gelu: return 0.5f * value * (1 + erff(value * 0.70710678f));
    case Activation::squared_relu: return fmaxf(value, 0) * fmaxf(value, 0);
    case Activation::relu: return fmaxf(value, 0);
    default: return value;
  }
}

// Rounds where separate operations would, and writes one output.
template <class T>
__device__ inline void store_output(const DecodeLinear& params, int64_t b, int64_t row, float value) {
  value = to_float(from_float<T>(value));
  if (params.residual) {
    const float tanh_gate = tanhf(element(params.gate, params.per_channel ? row : 0));
    value = to_float(static_cast<const T*>(params.residual)[b * params.rows + row]) + tanh_gate * value;
  }
  static_cast<T*>(params.output)[b * params.rows + row] = from_float<T>(activate(value, params.activation));
}

// Brings the block's weights into the cache while it computes the norm.
template <class T>
__device__ inline void prefetch_weights(const DecodeLinear& params, int64_t first) {
  const char* begin = reinterpret_cast<const char*>(static_cast<const T*>(params.weight) + first * params.columns);
  const int64_t bytes = min(int64_t(kOutputs), params.rows - first) * params.columns * sizeof(T);
  for (int64_t at = threadIdx.x * 128; at < bytes; at += kThreads * 128) prefetch(begin + at);
}

template <class T, int tiles>
constexpr size_t kLinearBytes = 8 * tiles * (kPitch<T> * sizeof(T) + (kWarps * kOutputs + 2) * sizeof(float));

template <class T, int tiles>
__global__ void __launch_bounds__(kThreads, 2) gated_block_decode_linear_kernel(DecodeLinear params) {
  constexpr int sequences = 8 * tiles;
  T* inputs = static_cast<T*>(shared_memory());                            // [sequences, kPitch]
  float* sums = reinterpret_cast<float*>(inputs + sequences * kPitch<T>);  // [warps, outputs, sequences]
  float *mean = sums + kWarps * kOutputs * sequences, *rstd = mean + sequences;
  const int64_t first = int64_t(blockIdx.x) * kOutputs;
  prefetch_weights<T>(params, first);
  if (params.norm_weight.data)
    for (int b = warp(); b < params.batch; b += kWarps)
      moments(mean[b], rstd[b], static_cast<const T*>(params.input) + b * params.columns, params.columns, params.eps);

  float c[tiles][4] = {};
  for (int64_t chunk = 0; chunk < params.columns; chunk += kChunk<T>) {
    __syncthreads();
    load_inputs(inputs, params, chunk, sequences, mean, rstd);
    __syncthreads();
    multiply_chunk(c, inputs, params, first, chunk);
  }
  for (int t = 0; t < tiles; ++t)
    for (int i = 0; i < 4; ++i)
      sums[(warp() * kOutputs + lane() / 4 + i / 2 * 8) * sequences + t * 8 + lane() % 4 * 2 + i % 2] = c[t][i];
  __syncthreads();
  const int output = threadIdx.x / sequences, b = threadIdx.x % sequences;
  if (output >= kOutputs || first + output >= params.rows || b >= params.batch) return;
  float sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += sums[(w * kOutputs + output) * sequences + b];
  store_output<T>(params, b, first + output, sum);
}

// Where the latents of a medium begin.
template <class T>
__device__ inline const T* latents_of(const Media& media, int64_t b, int64_t medium, int64_t kv_head) {
  return static_cast<const T*>(media.data) + b * media.batch + medium * media.medium + kv_head * media.head;
}

// The attention of one head, by a warp: a lane has the score of a key, then it has some columns of the values.
template <class T>
__device__ inline void attend(float* out, const DecodeAttention& params, int64_t b, int64_t head, float* q, float* p) {
  constexpr int most = 4;  // columns of a lane
  const int64_t kv_head = head * params.kv_heads / params.heads;
  const bool average = params.hi[b] < 0;  // the mean of all values
  const int64_t begin = average ? 0 : max(params.lo[b], 0),
                end = average ? params.media : min(int64_t(params.hi[b]), params.media);
  const int columns = params.head_dim;
  for (int i = lane(); i < divide_up(columns, kVector) * kVector; i += 32) {
    const float value =
        i < columns ? to_float(static_cast<const T*>(params.q)[(b * params.heads + head) * columns + i]) : 0.0f;
    q[i] = value * params.scale * kLog2E;
  }
  __syncwarp();
  float row_max = -kInfinity, row_sum = 0, acc[most] = {};
  for (int64_t medium = begin; medium < end; ++medium)
    for (int64_t first = 0; first < params.latents; first += 32) {
      const int keys = min(params.latents - first, int64_t(32));
      const T* key = latents_of<T>(params.k, b, medium, kv_head) + (first + lane()) * params.k.latent;
      float score = lane() < keys ? 0.0f : -kInfinity;
#pragma unroll 4
      for (int i = 0; i < (average || lane() >= keys ? 0 : columns); i += kVector) {
        float values[kVector];
        load_eight(values, key, i, columns);
        for (int j = 0; j < kVector; ++j) score += values[j] * q[i + j];
      }
      const float new_max = fmaxf(row_max, warp_max(score)), alpha = scaled_exp2(row_max, new_max);
      const float own_p = scaled_exp2(score, new_max);
      p[lane()] = own_p;
      row_sum = row_sum * alpha + warp_sum(own_p), row_max = new_max;
      __syncwarp();
      const T* values = latents_of<T>(params.v, b, medium, kv_head) + first * params.v.latent;
      for (int i = 0; i < most && lane() + 32 * i < columns; ++i) {
        acc[i] *= alpha;
#pragma unroll 8
        for (int j = 0; j < keys; ++j) acc[i] += p[j] * to_float(values[j * params.v.latent + lane() + 32 * i]);
      }
      __syncwarp();
    }
  for (int i = 0; i < most && lane() + 32 * i < columns; ++i)
    out[lane() + 32 * i] = to_float(from_float<T>(begin < end ? acc[i] / row_sum : 0.0f));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) gated_block_decode_attention_kernel(DecodeAttention params) {
  float* p = static_cast<float*>(shared_memory());           // [warps, 32]
  float *q = p + kWarps * 32, *attended = q + kWarps * 128;  // [warps, 128], [H d]
  const int64_t b = blockIdx.y, columns = params.out.columns;
  for (int64_t head = warp(); head < params.heads; head += kWarps)
    attend<T>(attended + head * params.head_dim, params, b, head, q + warp() * 128, p + warp() * 32);
  __syncthreads();
  const int64_t first = blockIdx.x * params.slice, end = min(first + params.slice, params.out.rows);
  for (int64_t row = first + warp(); row < end; row += kWarps) {
    float sum = 0;
    for (int64_t i = lane() * kVector; i < columns; i += 32 * kVector) {
      float values[kVector];
      load_eight(values, static_cast<const T*>(params.out.weight) + row * columns, i, columns);
      for (int j = 0; j < kVector && i + j < columns; ++j) sum += values[j] * attended[i + j];
    }
    sum = warp_sum(sum);
    if (lane() == 0) store_output<T>(params.out, b, row, sum);
  }
}

}  // namespace

namespace kernels {

void gated_block_decode_linear(const DecodeLinear& params, Stream stream) {
  by_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    const dim3 grid = make_grid(divide_up(params.rows, kOutputs));
    if (params.batch <= 8)
      return launch(stream, gated_block_decode_linear_kernel<T, 1>, grid, dim3(kThreads), kLinearBytes<T, 1>, params);
    launch(stream, gated_block_decode_linear_kernel<T, 2>, grid, dim3(kThreads), kLinearBytes<T, 2>, params);
  });
}

void gated_block_decode_attention(const DecodeAttention& params, Stream stream) {
  by_type(params.out.dtype, [&](auto type) {
    const int64_t slices = max(int64_t(1), min(params.out.rows / kWarps, multiprocessors() / params.out.batch));
    DecodeAttention sliced = params;
    sliced.slice = divide_up(divide_up(params.out.rows, slices), kWarps) * kWarps;
    const dim3 grid = make_grid(divide_up(params.out.rows, sliced.slice), params.out.batch);
    const size_t shared = (kWarps * (32 + 128) + params.out.columns) * sizeof(float);
    launch(stream, gated_block_decode_attention_kernel<decltype(type)>, grid, dim3(kThreads), shared, sliced);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
