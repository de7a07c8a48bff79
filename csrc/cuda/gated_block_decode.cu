// The attention of a gated cross-attention block for one token of each text, over cached media keys and values:
//
//   q = norm(x) to_q^T
//   z = x + tanh(gate) * attention(q, k, v) to_out^T
//   out = z + tanh(ff_gate) * act(norm(z) up^T) down^T
//
// Oracle: ops/gated_block_decode/reference.py. The four linear layers, with what surrounds them, are launches of
// linear.cu; this is what happens between the first and the second.
//
// A warp owns a head of a text and one of the splits into which the visible keys are cut. A lane has the score of a
// key, then some columns of the values. Warps of a block have neighbouring heads, which may share keys. Each split has
// a softmax of its own; a second kernel merges them in order. How many there are depends on shapes and the device
// alone, so that a CUDA graph may capture a step; which keys each has, on what the text sees.
//
// Bytes: what a text sees of k and v once, from the cache where texts share it; partial results of the splits twice.
// FLOPs: 4 d a key and head.
#include <algorithm>

#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kMostColumns = 128, kColumns = kMostColumns / 32;  // of a head, of a lane: 32 apart

// What a warp computes.
struct Place {
  int64_t text, head, split;
  __device__ int64_t row(const DecodeAttention& params) const { return text * params.heads + head; }
  __device__ int64_t partial(const DecodeAttention& params) const {
    return split * params.batch * params.heads + row(params);
  }
};

// Keys counted through all media.
struct Keys {
  int64_t begin, end;
};

__device__ inline bool averages(const DecodeAttention& params, int64_t text) { return params.hi[text] < 0; }

__device__ inline Keys visible_keys(const DecodeAttention& params, int64_t text) {
  if (averages(params, text)) return {0, params.media * params.latents};
  const int64_t begin = max(params.lo[text], 0), end = min(int64_t(params.hi[text]), params.media);
  return {begin * params.latents, max(begin, end) * params.latents};
}

__device__ inline Keys keys_of_split(const DecodeAttention& params, Place place) {
  const Keys all = visible_keys(params, place.text);
  const int64_t size = divide_up(divide_up(all.end - all.begin, params.splits), 32) * 32;
  const int64_t begin = min(all.begin + place.split * size, all.end);
  return {begin, min(begin + size, all.end)};
}

__device__ inline void apply_norm(float (&q)[kColumns], const Norm& norm, int columns) {
  float sum = 0, squares = 0;
  for (float value : q) sum += value;  // 0 beyond the end
  const float mean = norm.rms ? 0.0f : warp_sum(sum) / columns;
  for (int i = 0; i < kColumns; ++i)
    if (lane() + 32 * i < columns) squares += (q[i] - mean) * (q[i] - mean);
  const float rstd = 1 / sqrtf(warp_sum(squares) / columns + norm.eps);
  for (int i = 0; i < kColumns; ++i)
    if (const int column = lane() + 32 * i; column < columns)
      q[i] = (q[i] - mean) * rstd * element(norm.weight, column) + (norm.bias.data ? element(norm.bias, column) : 0);
}

// The query of a head, normed where there is a norm, times what makes scores powers of 2; 0 beyond the end.
template <class T>
__device__ inline void load_query(float* query, const DecodeAttention& params, Place place) {
  const T* from = static_cast<const T*>(params.q) + place.row(params) * params.head_dim;
  const int columns = params.head_dim;
  float q[kColumns];
  for (int i = 0; i < kColumns; ++i) q[i] = lane() + 32 * i < columns ? to_float(from[lane() + 32 * i]) : 0.0f;
  if (params.q_norm.weight.data) apply_norm(q, params.q_norm, columns);
  for (int i = 0; i < kColumns; ++i) query[lane() + 32 * i] = q[i] * params.scale * kLog2E;
  __syncwarp();
}

template <class T, bool wide>
__device__ inline float score_of(const float* query, const T* key, int64_t columns) {
  float score = 0;
#pragma unroll(wide ? 4 : 1)
  for (int i = 0; i < columns; i += kVector) {
    float values[kVector];
    load_typed<T, wide>(values, key + i, {i, columns});
    for (int j = 0; j < kVector; ++j) score += values[j] * query[i + j];
  }
  return score;
}

// Where the latents of a medium begin, from one on.
template <class T>
__device__ inline const T* latents_of(
    const Media& media, const DecodeAttention& params, Place place, int64_t medium, int64_t latent) {
  const int64_t kv_head = place.head * params.kv_heads / params.heads;
  return static_cast<const T*>(media.data) + place.text / params.texts * media.batch + medium * media.medium +
      latent * media.latent + kv_head * media.head;
}

// The softmax of some keys: sum of e^(score - row_max) times their values, and of e^(score - row_max) alone.
struct Partial {
  float acc[kColumns] = {}, row_max = -kInfinity, row_sum = 0;
};

template <class T>
__device__ inline void attend(
    Partial& partial, const DecodeAttention& params, Place place, Keys keys, const float* query, float* p) {
  const bool average = averages(params, place.text), wide = params.k.wide && params.head_dim % kVector == 0;
  for (int64_t at = keys.begin; at < keys.end;) {
    const int64_t medium = at / params.latents, latent = at % params.latents;
    const int count = min(min(params.latents - latent, keys.end - at), int64_t(32));  // none of the next medium
    const T* key = latents_of<T>(params.k, params, place, medium, latent + lane());
    float score = lane() < count ? 0.0f : -kInfinity;
    if (lane() < count && !average)
      score = wide ? score_of<T, true>(query, key, params.head_dim) : score_of<T, false>(query, key, params.head_dim);
    const float new_max = fmaxf(partial.row_max, warp_max(score)), own_p = scaled_exp2(score, new_max);
    const float alpha = scaled_exp2(partial.row_max, new_max);
    partial.row_sum = partial.row_sum * alpha + warp_sum(own_p), partial.row_max = new_max;
    p[lane()] = own_p;
    __syncwarp();
    const T* values = latents_of<T>(params.v, params, place, medium, latent);
    for (int i = 0; i < kColumns; ++i) {
      const int column = lane() + 32 * i;
      partial.acc[i] *= alpha;
#pragma unroll 8
      for (int j = 0; j < count && column < params.head_dim; ++j)
        partial.acc[i] += p[j] * to_float(values[j * params.v.latent + column]);
    }
    __syncwarp();  // p is free
    at += count;
  }
}

// Writes the attention of a head; 0 where a text sees nothing.
template <class T>
__device__ inline void store_attention(
    const DecodeAttention& params, Place place, const float (&acc)[kColumns], float row_sum) {
  const Keys keys = visible_keys(params, place.text);
  T* out = static_cast<T*>(params.out) + place.row(params) * params.head_dim;
  for (int i = 0; i < kColumns; ++i)
    if (const int column = lane() + 32 * i; column < params.head_dim)
      out[column] = from_float<T>(keys.begin < keys.end ? acc[i] / row_sum : 0.0f);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) gated_block_decode_attention_kernel(DecodeAttention params) {
  float* query = static_cast<float*>(shared_memory()) + warp() * (kMostColumns + 32);
  const int64_t unit = int64_t(blockIdx.x) * kWarps + warp(), of_text = params.splits * params.heads;
  if (unit >= params.batch * of_text) return;
  const Place place = {unit / of_text, unit % params.heads, unit % of_text / params.heads};
  load_query<T>(query, params, place);
  Partial partial;
  attend<T>(partial, params, place, keys_of_split(params, place), query, query + kMostColumns);
  if (params.splits == 1) return store_attention<T>(params, place, partial.acc, partial.row_sum);
  const int64_t to = place.partial(params);
  for (int i = 0; i < kColumns; ++i)
    if (const int column = lane() + 32 * i; column < params.head_dim)
      params.acc[to * params.head_dim + column] = partial.acc[i];
  if (lane() == 0) params.row_max[to] = partial.row_max, params.row_sum[to] = partial.row_sum;
}

// A warp merges the splits of one head of a text, in order.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) gated_block_decode_merge_kernel(DecodeAttention params) {
  const int64_t unit = int64_t(blockIdx.x) * kWarps + warp();
  if (unit >= params.batch * params.heads) return;
  Place place = {unit / params.heads, unit % params.heads, 0};
  float acc[kColumns] = {}, row_max = -kInfinity, row_sum = 0;
  for (place.split = 0; place.split < params.splits; ++place.split)
    row_max = fmaxf(row_max, params.row_max[place.partial(params)]);
  for (place.split = 0; place.split < params.splits; ++place.split) {
    const int64_t from = place.partial(params);
    const float alpha = scaled_exp2(params.row_max[from], row_max);
    row_sum += alpha * params.row_sum[from];
    for (int i = 0; i < kColumns; ++i)
      if (const int column = lane() + 32 * i; column < params.head_dim)
        acc[i] += alpha * params.acc[from * params.head_dim + column];
  }
  store_attention<T>(params, place, acc, row_sum);
}

}  // namespace

namespace kernels {

// As many as make 16 warps for each multiprocessor, of at least 64 keys where a text sees all.
int64_t count_gated_block_decode_splits(const DecodeAttention& params) {
  const int64_t wanted = 16 * multiprocessors() / (params.batch * params.heads);
  return std::max<int64_t>(1, std::min(wanted, params.media * params.latents / 64));
}

void gated_block_decode_attention(const DecodeAttention& params, Stream stream) {
  by_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t heads = params.batch * params.heads;
    const dim3 block(kThreads), grid = make_grid(divide_up(heads * params.splits, kWarps));
    const size_t shared = kWarps * (kMostColumns + 32) * sizeof(float);
    launch(stream, gated_block_decode_attention_kernel<T>, grid, block, shared, params);
    if (params.splits == 1) return;
    launch(stream, gated_block_decode_merge_kernel<T>, make_grid(divide_up(heads, kWarps)), block, 0, params);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
