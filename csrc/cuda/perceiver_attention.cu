// Perceiver attention: the rows (latents) of a clip attend to two segments of keys, read where they lie: the visible
// ones of its media, and its latents; forward and backward.
// Oracle: ops/perceiver_attention/reference.py and autograd through it.
//
// Forward, a block takes a tile of rows of one head through the keys. Where there are too few blocks to fill the device
// the keys of a clip are cut into parts, each with a softmax of its own, which a second kernel combines in order.
// Backward, a block takes a tile of rows through the keys for dq, again in parts, whose dq `sum_partials` adds in
// order. Where its tile holds all rows, and no other head shares the keys, it writes dk and dv on the way; elsewhere a
// second kernel owns a tile of keys and goes through the rows. Keys that are not visible get gradients of 0.
//
// Bytes: forward q and every visible key and value read once from memory, out written once; backward the first way q,
// dout, out, k, v read and dq, dk, dv written once, the second way q, dout, k, v twice. FLOPs a row and visible key: 4
// d forward, 10 d the first way, 14 d the second.
#include "attention.h"
#include "kernels.h"

namespace flamingo_kernels {

// The two segments stand where masked cross-attention has media: every row sees both.
__device__ inline Range load_span(const PerceiverAttention&, int64_t, int64_t) { return {0, 2}; }

// Heads first, which lie side by side in memory, then the tiles of rows that read the same keys.
template <int tile>
__device__ inline Place place_of_rows(const PerceiverAttention& params) {
  const int tiles = divide_up(params.length, tile), group = params.heads / params.kv_heads;
  const int head = blockIdx.x % params.heads, at = blockIdx.x / params.heads, rest = at / tiles;
  return {rest / params.parts, head, head / group, at % tiles, int(rest % params.parts)};
}

// Tiles of the media, all S of them, and then of the latents.
template <int tile>
__device__ inline Place place_of_keys(const PerceiverAttention& params) {
  const int kv_head = blockIdx.x % params.kv_heads, at = blockIdx.x / params.kv_heads;
  const int tiles = divide_up(params.keys[0], tile) + divide_up(params.keys[1], tile);
  return {at / tiles, 0, kv_head, at % tiles, 0};
}

// How many keys of a segment of a clip are visible.
__device__ inline int visible_keys(const PerceiverAttention& params, int64_t clip, int segment) {
  const int all = params.keys[segment];
  return segment == 0 && params.media_lengths ? min(max(params.media_lengths[clip], 0), all) : all;
}

template <int tile>
__device__ inline Range key_tiles(const PerceiverAttention& params, const Place& place, Range) {
  return {0, int(divide_up(visible_keys(params, place.batch, 0), tile) + divide_up(params.keys[1], tile))};
}

// A tile of keys where the first `media_tiles` tiles are those of the media.
template <class T>
__device__ inline Keys<T> keys_of_segment(
    const PerceiverAttention& params, int64_t clip, int64_t kv_head, int tile, int media_tiles) {
  const int segment = tile < media_tiles ? 0 : 1, first = (tile - segment * media_tiles) * kTile<T>;
  const int size = params.keys[segment], visible = visible_keys(params, clip, segment);
  return {
      rows_of<const T>(params.k[segment], clip, kv_head, first, params.head_dim),
      rows_of<const T>(params.v[segment], clip, kv_head, first, params.head_dim),
      segment,
      first,
      min(size - first, kTile<T>),
      max(min(visible - first, kTile<T>), 0)};
}

template <class T>
__device__ inline Keys<T> keys_of(const PerceiverAttention& params, int64_t clip, int64_t kv_head, int tile) {
  return keys_of_segment<T>(params, clip, kv_head, tile, divide_up(visible_keys(params, clip, 0), kTile<T>));
}

template <class T>
__device__ inline Keys<T> owned_keys(const PerceiverAttention& params, const Place& place) {
  return keys_of_segment<T>(params, place.batch, place.kv_head, place.tile, divide_up(params.keys[0], kTile<T>));
}

template <class T>
__device__ inline KeyGradients<T> gradients_of(
    const PerceiverAttention& params, int64_t clip, int64_t kv_head, const Keys<T>& keys) {
  return {
      rows_of<T>(params.dk[keys.medium], clip, kv_head, keys.first, params.head_dim),
      rows_of<T>(params.dv[keys.medium], clip, kv_head, keys.first, params.head_dim)};
}

template <int tile>
__device__ inline Range visiting_rows(const PerceiverAttention& params, int64_t, int, int) {
  return {0, int(params.length)};
}

template <int n>
__device__ inline void start_dv(const PerceiverAttention&, const Place&, float (&)[n][4]) {}

template <class T, int columns, int rows>
__device__ inline void finish_fwd(
    const PerceiverAttention&, const Place&, const Spans<rows>&, OnlineSoftmax<columns>&) {}

// No row visits the media tiles that hold no visible key: their gradients are 0.
template <class T>
__device__ inline void finish_bwd(const PerceiverAttention& params, const Place& place) {
  const int first = divide_up(visible_keys(params, place.batch, 0), kTile<T>) * kTile<T>;
  for (int64_t key = first + place.part; key < params.keys[0]; key += params.parts)
    for (int column = threadIdx.x; column < params.head_dim; column += kThreads<T>)
      for (const Rows& gradient : {params.dk[0], params.dv[0]})
        rows_of<T>(gradient, place.batch, place.kv_head, key, params.head_dim).data[column] = from_float<T>(0);
}

namespace {

template <class T, int columns>
__global__ void __launch_bounds__(kThreads<T>, kForwardBlocks<columns>)
    perceiver_attention_fwd_kernel(PerceiverAttention params) {
  attention_fwd<T, columns>(params);
}

template <class T, int columns, bool whole>
__global__ void __launch_bounds__(kThreads<T>, kRowsBlocks<columns>)
    perceiver_attention_bwd_rows_kernel(PerceiverAttention params) {
  attention_bwd_rows<T, columns, whole>(params);
}

template <class T, int columns>
__global__ void __launch_bounds__(kThreads<T>, kKeysBlocks)
    perceiver_attention_bwd_keys_kernel(PerceiverAttention params) {
  attention_bwd_keys<T, columns, false>(params);
}

struct Combine {
  PerceiverAttention whole;
  const float *out, *row_max, *row_sum;  // of the parts: [parts, N, R, H, d] and [parts, N, H, R]
};

constexpr unsigned kCombineThreads = 128;

// A warp combines the parts of one row of a head. A part without keys has the weight 0, and its out is never read.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) perceiver_attention_fwd_combine_kernel(Combine c) {
  const PerceiverAttention& params = c.whole;
  const int64_t rows = params.batch * params.heads * params.length;
  const int64_t at = int64_t(blockIdx.x) * (kCombineThreads / 32) + threadIdx.x / 32;
  if (at >= rows) return;
  float row_max = -kInfinity, row_sum = 0;
  for (int part = 0; part < params.parts; ++part) row_max = fmaxf(row_max, c.row_max[part * rows + at] * params.sign);
  const auto rescaled_sum = [&](int part) {
    const float alpha = scaled_exp2(c.row_max[part * rows + at] * params.sign, row_max, params.scale_log2);
    return c.row_sum[part * rows + at] * alpha;
  };
  for (int part = 0; part < params.parts; ++part) row_sum += rescaled_sum(part);
  const int64_t row = at % params.length, head = at / params.length % params.heads,
                clip = at / params.length / params.heads;
  const int64_t from = ((clip * params.length + row) * params.heads + head) * params.head_dim;
  const HeadRows<T> to = rows_of<T>(params.out, clip, head, row, params.head_dim);
  for (int column = lane(); column < params.head_dim; column += 32) {
    float acc = 0;
    for (int part = 0; part < params.parts; ++part) {
      const float weight = rescaled_sum(part);
      if (weight != 0) acc += weight * c.out[part * rows * params.head_dim + from + column];
    }
    to.data[column] = from_float<T>(acc / row_sum);
  }
  if (lane() == 0) params.row_max[at] = row_max * params.sign, params.row_sum[at] = row_sum;
}

int64_t count_row_tiles(const PerceiverAttention& params) {
  return params.batch * params.heads * divide_up(params.length, tile_rows(params.dtype));
}

}  // namespace

namespace kernels {

constexpr int kLeastKeys = 256;  // of a part: with fewer, what a part reads and writes besides outweighs its keys

int64_t count_perceiver_attention_parts(const PerceiverAttention& params) {
  return count_parts(count_row_tiles(params), (params.keys[0] + params.keys[1]) / kLeastKeys);
}

bool is_whole(const PerceiverAttention& params) {
  return params.heads == params.kv_heads && params.length <= tile_rows(params.dtype);
}

void perceiver_attention_fwd(const PerceiverAttention& params, float* partial_softmax, Stream stream) {
  by_tile(params, [&](auto type, auto columns) {
    using T = decltype(type);
    PerceiverAttention parts = params;
    const int64_t rows = params.parts * params.batch * params.heads * params.length;
    if (params.parts > 1) parts.row_max = partial_softmax, parts.row_sum = partial_softmax + rows;
    const auto kernel = perceiver_attention_fwd_kernel<T, columns()>;
    const dim3 grid = make_grid(params.parts * count_row_tiles(params));
    launch(stream, kernel, grid, dim3(kThreads<T>), kForwardBytes<T, columns()>, parts);
    if (params.parts == 1) return;
    const dim3 warps = make_grid(divide_up(params.batch * params.heads * params.length, kCombineThreads / 32));
    const Combine combine = {params, params.partial_rows, parts.row_max, parts.row_sum};
    launch(stream, perceiver_attention_fwd_combine_kernel<T>, warps, dim3(kCombineThreads), 0, combine);
  });
}

void perceiver_attention_bwd(const PerceiverAttention& params, Stream stream) {
  by_tile(params, [&](auto type, auto columns) {
    using T = decltype(type);
    constexpr size_t shared = kBackwardBytes<T, columns(), true>, less = kBackwardBytes<T, columns(), false>;
    const dim3 block(kThreads<T>), rows = make_grid(params.parts * count_row_tiles(params));
    if (params.whole)
      return launch(stream, perceiver_attention_bwd_rows_kernel<T, columns(), true>, rows, block, shared, params);
    launch(stream, perceiver_attention_bwd_rows_kernel<T, columns(), false>, rows, block, less, params);
    PerceiverAttention by_keys = params;
    by_keys.parts = 1;
    const int64_t tiles = divide_up(params.keys[0], kTile<T>) + divide_up(params.keys[1], kTile<T>);
    const dim3 keys = make_grid(params.batch * params.kv_heads * tiles);
    launch(stream, perceiver_attention_bwd_keys_kernel<T, columns()>, keys, block, shared, by_keys);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
