// Masked cross-attention: every text row attends to the media that its span names, forward and backward.
// Oracle: ops/masked_cross_attention/reference.py and autograd through it.
//
// Forward, a block owns a tile of rows of one head, and visits the media that they see. Backward there are two ways.
//
// one shot    Every row sees one medium, whose keys are one tile. A block owns a medium of one head and goes through
//             the rows that see it. They see no other, so it computes their softmax again, reads neither out nor what
//             the forward pass kept of the softmax, and writes their dq, once.
// spans       One kernel owns tiles of rows and visits the keys they see, for dq; another owns tiles of keys and visits
//             the rows that see them, for dk and dv.
//
// Where there are too few keys to fill the device, their rows are cut into parts, whose dk and dv `sum_partials` adds
// in order.
//
// Bytes: forward q, k, v read once from memory (tiles of keys again from the cache) and out written once; one shot q,
// dout, k, v read and dq, dk, dv written once; spans q, dout, k, v twice and out once. FLOPs a row and visible key:
// 4 d forward, 10 d one shot, 14 d spans.
#include "attention.h"
#include "kernels.h"

namespace flamingo_kernels {

__device__ inline Range load_span(const MaskedCrossAttention& params, int64_t batch, int64_t row) {
  const int64_t at = batch * params.length + row;
  return {max(params.lo[at], 0), min(params.hi[at], int(params.media))};
}

// Heads first, which lie side by side in memory, then tiles from the end of the text, where rows may see the most.
template <int tile>
__device__ inline Place place_of_rows(const MaskedCrossAttention& params) {
  const int tiles = divide_up(params.length, tile), group = params.heads / params.kv_heads;
  const int head = blockIdx.x % params.heads, at = blockIdx.x / params.heads;
  return {at / tiles, head, head / group, tiles - 1 - at % tiles, 0};
}

// Heads first, then parts; the first media, which most rows see, come first.
template <int tile>
__device__ inline Place place_of_keys(const MaskedCrossAttention& params) {
  const int kv_head = blockIdx.x % params.kv_heads, at = blockIdx.x / params.kv_heads;
  const int part = at % params.parts, rest = at / params.parts;
  return {rest % params.batch, 0, kv_head, int(rest / params.batch), part};
}

template <int tile>
__device__ inline Range key_tiles(const MaskedCrossAttention& params, const Place&, Range media) {
  const int each = divide_up(params.latents, tile);
  return {media.begin * each, media.end * each};
}

// The latents of a medium from `first` on.
template <class T>
__device__ inline HeadRows<T> latents_of(
    const Media& media, int64_t batch, int64_t kv_head, int64_t medium, int64_t first, int columns) {
  T* data = static_cast<T*>(media.data) + batch * media.batch + medium * media.medium;
  return {data + first * media.latent + kv_head * media.head, media.latent, columns, media.wide};
}

template <class T>
__device__ inline Keys<T> keys_of(const MaskedCrossAttention& params, int64_t batch, int64_t kv_head, int tile) {
  const int each = divide_up(params.latents, kTile<T>), medium = tile / each, first = tile % each * kTile<T>;
  const int count = min(int(params.latents) - first, kTile<T>);
  return {
      latents_of<const T>(params.k, batch, kv_head, medium, first, params.head_dim),
      latents_of<const T>(params.v, batch, kv_head, medium, first, params.head_dim),
      medium,
      first,
      count,
      count};
}

template <class T>
__device__ inline Keys<T> owned_keys(const MaskedCrossAttention& params, const Place& place) {
  return keys_of<T>(params, place.batch, place.kv_head, place.tile);
}

template <class T>
__device__ inline KeyGradients<T> gradients_of(
    const MaskedCrossAttention& params, int64_t batch, int64_t kv_head, const Keys<T>& keys) {
  return {
      latents_of<T>(params.dk, batch, kv_head, keys.medium, keys.first, params.head_dim),
      latents_of<T>(params.dv, batch, kv_head, keys.medium, keys.first, params.head_dim)};
}

// The same in contiguous [parts, B, M, R, Hkv, d].
__device__ inline KeyGradients<float> partial_gradients_of(
    const MaskedCrossAttention& params, const Place& place, int64_t medium, int64_t first) {
  const int64_t row = ((place.part * params.batch + place.batch) * params.media + medium) * params.latents + first;
  const int64_t at = (row * params.kv_heads + place.kv_head) * params.head_dim,
                stride = params.kv_heads * params.head_dim;
  return {
      {params.partial_dk + at, stride, int(params.head_dim), false},
      {params.partial_dv + at, stride, int(params.head_dim), false}};
}

// One part of the rows from the first to the last that see a medium.
template <int tile>
__device__ inline Range visiting_rows(const MaskedCrossAttention& params, int64_t batch, int medium, int part) {
  const int64_t at = batch * params.media + medium;
  const int begin = max(params.start[at], 0), end = min(params.stop[at], int(params.length));
  const int each = divide_up(divide_up(end - begin, params.parts), tile) * tile;
  return {begin + part * each, min(begin + (part + 1) * each, end)};
}

// Rows whose span ends at -1 get the mean of all values of their sequence.
template <class T, int columns, int rows>
__device__ inline void finish_fwd(
    const MaskedCrossAttention& params, const Place& place, const Spans<rows>& spans, OnlineSoftmax<columns>& softmax) {
  const uint64_t averaging = params.averages ? spans.averaging() : 0;
  if (!averaging) return;
  float* mean = static_cast<float*>(shared_memory());
  __syncthreads();  // no warp needs its tiles any more
  for (int column = threadIdx.x; column < params.head_dim; column += kThreads<T>) {
    float sum = 0;
    for (int64_t medium = 0; medium < params.media; ++medium) {
      const auto values = latents_of<const T>(params.v, place.batch, place.kv_head, medium, 0, params.head_dim);
      for (int64_t latent = 0; latent < params.latents; ++latent)
        sum += to_float(values.data[latent * values.stride + column]);
    }
    mean[column] = sum / (params.media * params.latents);
  }
  __syncthreads();
  const RowMask mask(averaging);
  for (int j = 0; j < columns / 8; ++j)
    for (int i = 0; i < 4; ++i)
      if (mask[i / 2] && fragment_column(j, i) < params.head_dim) softmax.acc[j][i] = mean[fragment_column(j, i)];
}

// Rows that average all values add the same to the dv of each.
template <int n>
__device__ inline void start_dv(const MaskedCrossAttention& params, const Place& place, float (&dv)[n][4]) {
  if (!params.averages || place.part != 0) return;
  const float* averaged_dv = params.averaged_dv + (place.batch * params.kv_heads + place.kv_head) * params.head_dim;
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; ++i)
      dv[j][i] = fragment_column(j, i) < params.head_dim ? averaged_dv[fragment_column(j, i)] : 0.0f;
}

// No block visits the rows that see no medium, so each clears dq of those in its slice of the text.
template <class T>
__device__ inline void finish_bwd(const MaskedCrossAttention& params, const Place& place) {
  const int64_t slices = params.media * params.parts, slice = place.tile * params.parts + place.part;
  const int64_t each = divide_up(params.length, slices), end = min((slice + 1) * each, params.length);
  const int group = params.heads / params.kv_heads, columns = group * params.head_dim;
  for (int64_t row = slice * each; row < end; ++row) {
    const Range span = load_span(params, place.batch, row);
    if (span.begin < span.end) continue;
    for (int i = threadIdx.x; i < columns; i += kThreads<T>) {
      const int64_t head = place.kv_head * group + i / params.head_dim;
      rows_of<T>(params.dq, place.batch, head, row, params.head_dim).data[i % params.head_dim] = from_float<T>(0);
    }
  }
}

namespace {

template <class T, int columns>
__global__ void __launch_bounds__(kThreads<T>, kForwardBlocks<columns>)
    masked_cross_attention_fwd_kernel(MaskedCrossAttention params) {
  attention_fwd<T, columns>(params);
}

template <class T, int columns>
__global__ void __launch_bounds__(kThreads<T>, kRowsBlocks<columns>)
    masked_cross_attention_bwd_rows_kernel(MaskedCrossAttention params) {
  attention_bwd_rows<T, columns, false>(params);
}

template <class T, int columns, bool one_shot>
__global__ void __launch_bounds__(kThreads<T>, kKeysBlocks)
    masked_cross_attention_bwd_keys_kernel(MaskedCrossAttention params) {
  attention_bwd_keys<T, columns, one_shot>(params);
}

// The sum of dout over the rows that average all values, divided by the number of values.
template <class T>
__global__ void __launch_bounds__(128) masked_cross_attention_bwd_averaged_dv_kernel(MaskedCrossAttention params) {
  const int64_t batch = blockIdx.x / params.kv_heads, kv_head = blockIdx.x % params.kv_heads,
                group = params.heads / params.kv_heads;
  for (int column = threadIdx.x; column < params.head_dim; column += blockDim.x) {
    float sum = 0;
    for (int64_t row = 0; row < params.length; ++row) {
      if (load_span(params, batch, row).end >= 0) continue;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        sum += to_float(rows_of<const T>(params.dout, batch, head, row, params.head_dim).data[column]);
    }
    params.averaged_dv[blockIdx.x * params.head_dim + column] = sum / (params.media * params.latents);
  }
}

int64_t count_key_tiles(const MaskedCrossAttention& params) {
  return params.batch * params.kv_heads * params.media * divide_up(params.latents, tile_rows(params.dtype));
}

}  // namespace

namespace kernels {

bool is_one_shot(DType dtype, bool immediate, int64_t latents) { return immediate && latents <= tile_rows(dtype); }

void masked_cross_attention_fwd(const MaskedCrossAttention& params, Stream stream) {
  by_tile(params, [&](auto type, auto columns) {
    using T = decltype(type);
    const dim3 grid = make_grid(params.batch * params.heads * divide_up(params.length, kTile<T>));
    const auto kernel = masked_cross_attention_fwd_kernel<T, columns()>;
    launch(stream, kernel, grid, dim3(kThreads<T>), kForwardBytes<T, columns()>, params);
  });
}

int64_t count_masked_cross_attention_bwd_parts(const MaskedCrossAttention& params) {
  return count_parts(count_key_tiles(params), divide_up(params.length, params.media * tile_rows(params.dtype)));
}

void masked_cross_attention_bwd(const MaskedCrossAttention& params, Stream stream) {
  by_tile(params, [&](auto type, auto columns) {
    using T = decltype(type);
    const dim3 block(kThreads<T>);
    if (params.averages)
      launch(
          stream, masked_cross_attention_bwd_averaged_dv_kernel<T>, make_grid(params.batch * params.kv_heads),
          dim3(128), 0, params);
    if (!params.one_shot) {
      MaskedCrossAttention by_rows = params;
      by_rows.parts = 1;
      const auto kernel = masked_cross_attention_bwd_rows_kernel<T, columns()>;
      const dim3 grid = make_grid(params.batch * params.heads * divide_up(params.length, kTile<T>));
      launch(stream, kernel, grid, block, kBackwardBytes<T, columns(), false>, by_rows);
    }
    const auto kernel = params.one_shot ? masked_cross_attention_bwd_keys_kernel<T, columns(), true>
                                        : masked_cross_attention_bwd_keys_kernel<T, columns(), false>;
    launch(
        stream, kernel, make_grid(params.parts * count_key_tiles(params)), block, kBackwardBytes<T, columns(), true>,
        params);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
