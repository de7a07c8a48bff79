// The attention of a gated cross-attention block for one token of each text, over cached media keys and values:
//
//   q = norm(x) to_q^T
//   z = x + tanh(gate) * attention(q, k, v) to_out^T
//   out = z + tanh(ff_gate) * act(norm(z) up^T) down^T
//
// Oracle: ops/gated_block_decode/reference.py. The four linear layers, with what surrounds them, are launches of
// linear.cu; this is what happens between the first and the second.
//
// A block has a head of a text, and one of the splits into which many visible keys are cut. Its warps take 32 keys in
// turn: a lane has the score of a key, then neighbouring columns of the values. Each warp has a softmax of its own, and
// the block merges them in order; where there are several splits, a second kernel merges those. How many there are
// depends on shapes and the device alone, so that a CUDA graph may capture a step; which keys each has, on what the
// text sees.
//
// Bytes: what a text sees of k and v once, from the cache where texts share it; partial results of the splits twice.
// FLOPs: 4 d a key and head.
#include <algorithm>

#include "kernels.h"
#include "rows.h"

namespace flamingo_kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostColumns = 128;
constexpr int kKeysOfSplit = 1024;  // at least, where a text sees all

// What a block computes.
struct Place {
  int text, head, split;
  __device__ int row(const DecodeAttention& params) const { return text * params.heads + head; }
  __device__ int64_t partial(const DecodeAttention& params) const {
    return int64_t(split) * params.batch * params.heads + row(params);
  }
};

// Keys counted through all media.
struct Keys {
  int begin, end;
};

__device__ inline bool averages(const DecodeAttention& params, int text) { return params.hi[text] < 0; }

__device__ inline Keys visible_keys(const DecodeAttention& params, int text) {
  if (averages(params, text)) return {0, params.media * params.latents};
  const int begin = max(params.lo[text], 0), end = min(params.hi[text], params.media);
  return {begin * params.latents, max(begin, end) * params.latents};
}

__device__ inline Keys keys_of_split(const DecodeAttention& params, Place place) {
  const Keys all = visible_keys(params, place.text);
  const int tiles = (all.end - all.begin + 31) / 32, size = (tiles + params.splits - 1) / params.splits * 32;
  const int begin = min(all.begin + place.split * size, all.end);
  return {begin, min(begin + size, all.end)};
}

// What a warp keeps while it goes through keys, and then leaves for the block.
struct Shared {
  alignas(16) float query[kMostColumns];  // 0 beyond the end
  struct OfWarp {
    alignas(16) float p[32];
    int64_t values[32];  // where the values of each key begin
    float acc[kMostColumns], row_max, row_sum;
  } warps[kWarps];
};

__device__ inline void apply_norm(float (&q)[4], const Norm& norm, int columns) {
  float sum = 0, squares = 0;
  for (float value : q) sum += value;  // 0 beyond the end
  const float mean = norm.rms ? 0.0f : warp_sum(sum) / columns;
  for (int i = 0; i < 4; ++i)
    if (lane() + 32 * i < columns) squares += (q[i] - mean) * (q[i] - mean);
  const float rstd = 1 / sqrtf(warp_sum(squares) / columns + norm.eps);
  for (int i = 0; i < 4; ++i)
    if (const int column = lane() + 32 * i; column < columns)
      q[i] = (q[i] - mean) * rstd * element(norm.weight, column) + (norm.bias.data ? element(norm.bias, column) : 0);
}

// The query, normed where there is a norm, times what makes scores powers of 2; 0 beyond the end. By the first warp.
template <class T>
__device__ inline void load_query(float* query, const DecodeAttention& params, Place place) {
  const T* from = static_cast<const T*>(params.q) + int64_t(place.row(params)) * params.head_dim;
  const int columns = params.head_dim;
  float q[4];
  for (int i = 0; i < 4; ++i) q[i] = lane() + 32 * i < columns ? to_float(from[lane() + 32 * i]) : 0.0f;
  if (params.q_norm.weight.data) apply_norm(q, params.q_norm, columns);
  for (int i = 0; i < 4; ++i) query[lane() + 32 * i] = q[i] * params.scale * kLog2E;
}

template <class T, int columns, bool wide>
__device__ inline float score_of(const float* query, const T* key, int head_dim) {
  constexpr int kAtOnce = 64 * 2 / sizeof(T);  // columns whose loads are under way together
  float score = 0;
  for (int first = 0; first < columns; first += kAtOnce) {
    float values[kAtOnce / kVector][kVector] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; i += kVector)
      if (first + i < head_dim) load_typed<T, wide>(values[i / kVector], key + first + i, {first + i, head_dim});
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) score += values[i / kVector][i % kVector] * query[first + i];
  }
  return score;
}

// A lane's neighbouring columns of the values of a key, as they were in memory: nothing waits for them before they are
// used. 0 beyond the end.
template <class T, int count>
struct OwnColumns {
  uint32_t words[count * sizeof(T) / 4] = {};

  template <bool wide>
  __device__ void load(const T* from, int first, int head_dim) {
    if constexpr (wide) {
      if (first < head_dim) memcpy(words, __builtin_assume_aligned(from + first, sizeof words), sizeof words);
    } else {
      T values[count] = {};
      for (int i = 0; i < count; ++i)
        if (first + i < head_dim) values[i] = from[first + i];
      memcpy(words, values, sizeof words);
    }
  }

  __device__ void add_to(float (&acc)[count], float p) const {
    T values[count];
    memcpy(values, words, sizeof words);
    for (int i = 0; i < count; ++i) acc[i] += p * to_float(values[i]);
  }
};

// Where a latent of a medium begins, keys counted through all media.
__device__ inline int64_t latent_at(const Media& media, const DecodeAttention& params, Place place, int key) {
  const int64_t kv_head = place.head * params.kv_heads / params.heads;
  return place.text / params.texts * media.batch + key / params.latents * media.medium +
      key % params.latents * media.latent + kv_head * media.head;
}

// A warp's share of the keys: the sum of e^(score - row_max) times their values, and of e^(score - row_max) alone.
template <class T, int columns, bool wide>
__device__ inline void attend(Shared& shared, const DecodeAttention& params, Place place, Keys keys) {
  constexpr int own = columns / 32;  // columns of a lane
  auto& warp_shared = shared.warps[warp()];
  const bool average = averages(params, place.text);
  float acc[own] = {}, row_max = -kInfinity, row_sum = 0;
  for (int first = keys.begin + warp() * 32; first < keys.end; first += kThreads) {
    const int count = min(keys.end - first, 32);
    const int key = first + min(lane(), count - 1);
    warp_shared.values[lane()] = latent_at(params.v, params, place, key);
    __syncwarp();
    OwnColumns<T, own> values[32];  // keys beyond the last have its values, and a p of 0
    const auto load_values = [&] {
#pragma unroll
      for (int j = 0; j < 32; ++j)
        values[j].template load<wide>(
            static_cast<const T*>(params.v.data) + warp_shared.values[j], lane() * own, params.head_dim);
    };
    constexpr bool ahead = wide && sizeof(T) == 2;  // others have no registers for it
    if constexpr (ahead) load_values();
    float score = -kInfinity;
    if (lane() < count) {
      const T* k = static_cast<const T*>(params.k.data) + latent_at(params.k, params, place, key);
      score = average ? 0.0f : score_of<T, columns, wide>(shared.query, k, params.head_dim);
    }
    const float new_max = fmaxf(row_max, warp_max(score)), own_p = scaled_exp2(score, new_max);
    const float alpha = scaled_exp2(row_max, new_max);
    row_sum = row_sum * alpha + warp_sum(own_p), row_max = new_max;
    warp_shared.p[lane()] = own_p;
    for (float& sum : acc) sum *= alpha;
    __syncwarp();
    if constexpr (!ahead) load_values();
#pragma unroll
    for (int j = 0; j < 32; ++j) values[j].add_to(acc, warp_shared.p[j]);
    __syncwarp();  // p is free
  }
  for (int i = 0; i < own; ++i) warp_shared.acc[lane() * own + i] = acc[i];
  if (lane() == 0) warp_shared.row_max = row_max, warp_shared.row_sum = row_sum;
}

// Writes one column of the attention of a head; 0 where a text sees nothing.
template <class T>
__device__ inline void store_attention(const DecodeAttention& params, Place place, int column, float acc, float row_sum) {
  const Keys keys = visible_keys(params, place.text);
  T* out = static_cast<T*>(params.out) + int64_t(place.row(params)) * params.head_dim;
  out[column] = from_float<T>(keys.begin < keys.end ? acc / row_sum : 0.0f);
}

template <class T, int columns, bool wide>
__global__ void __launch_bounds__(kThreads) gated_block_decode_attention_kernel(DecodeAttention params) {
  Shared& shared = *static_cast<Shared*>(shared_memory());
  const int block = blockIdx.x;
  const Place place = {int(blockIdx.y), block % params.heads, block / params.heads};
  if (warp() == 0) load_query<T>(shared.query, params, place);
  __syncthreads();
  attend<T, columns, wide>(shared, params, place, keys_of_split(params, place));
  __syncthreads();
  const int column = threadIdx.x;
  if (column >= params.head_dim) return;
  float acc = 0, row_max = -kInfinity, row_sum = 0;
  for (const auto& partial : shared.warps) row_max = fmaxf(row_max, partial.row_max);
  for (const auto& partial : shared.warps) {
    const float alpha = scaled_exp2(partial.row_max, row_max);
    acc += alpha * partial.acc[column], row_sum += alpha * partial.row_sum;
  }
  if (params.splits == 1) return store_attention<T>(params, place, column, acc, row_sum);
  const int64_t to = place.partial(params);
  params.acc[to * params.head_dim + column] = acc;
  if (column == 0) params.row_max[to] = row_max, params.row_sum[to] = row_sum;
}

// A block merges the splits of one head of a text, in order.
template <class T>
__global__ void __launch_bounds__(kMostColumns) gated_block_decode_merge_kernel(DecodeAttention params) {
  const int block = blockIdx.x;
  Place place = {block / params.heads, block % params.heads, 0};
  const int column = threadIdx.x;
  if (column >= params.head_dim) return;
  float acc = 0, row_max = -kInfinity, row_sum = 0;
  for (place.split = 0; place.split < params.splits; ++place.split)
    row_max = fmaxf(row_max, params.row_max[place.partial(params)]);
  for (place.split = 0; place.split < params.splits; ++place.split) {
    const int64_t from = place.partial(params);
    const float alpha = scaled_exp2(params.row_max[from], row_max);
    row_sum += alpha * params.row_sum[from], acc += alpha * params.acc[from * params.head_dim + column];
  }
  store_attention<T>(params, place, column, acc, row_sum);
}

template <class T, int columns, bool wide>
void launch_attention(const DecodeAttention& params, Stream stream) {
  const dim3 grid = make_grid(int64_t(params.heads) * params.splits, params.batch);
  launch(
      stream, gated_block_decode_attention_kernel<T, columns, wide>, grid, dim3(kThreads), sizeof(Shared), params);
}

template <class T, int columns>
void launch_attention(const DecodeAttention& params, Stream stream) {
  const bool wide = params.k.wide && params.v.wide && params.head_dim % kVector == 0;
  wide ? launch_attention<T, columns, true>(params, stream) : launch_attention<T, columns, false>(params, stream);
}

}  // namespace

namespace kernels {

// As many as make two blocks for each multiprocessor.
int64_t count_gated_block_decode_splits(const DecodeAttention& params) {
  const int wanted = 2 * multiprocessors() / (params.batch * params.heads);
  return std::max(1, std::min(wanted, params.media * params.latents / kKeysOfSplit));
}

void gated_block_decode_attention(const DecodeAttention& params, Stream stream) {
  by_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    params.head_dim <= 64 ? launch_attention<T, 64>(params, stream) : launch_attention<T, 128>(params, stream);
    if (params.splits == 1) return;
    const dim3 grid = make_grid(int64_t(params.batch) * params.heads);
    launch(stream, gated_block_decode_merge_kernel<T>, grid, dim3(kMostColumns), 0, params);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
