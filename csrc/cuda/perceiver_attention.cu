// Perceiver attention: the rows (latents) of a clip attend to its media keys, as far as they are real, and to its
// latent keys, two segments that are read where they lie; forward and backward.
// Oracle: ops/perceiver_attention/reference.py and autograd through it.
//
// Forward, a block takes a tile of rows of one head through the keys. Where there are too few blocks to fill the device
// the keys of a clip are cut into parts, each with a softmax of its own, which a second kernel combines in order.
// Backward, a block takes a tile of rows through the keys for dq, again in parts, whose dq `sum` adds in order. Where
// its tile holds all rows, and no other head shares the keys, it writes dk and dv on the way; elsewhere a second kernel
// has a tile of keys and goes through the rows. Keys that are not real get gradients of 0.
//
// Bytes: forward q and every real key and value read once from memory, out written once; backward the first way q,
// dout, out, k, v read and dq, dk, dv written once, the second way q, dout, k, v twice. FLOPs a row and real key: 4 d
// forward, 10 d the first way, 14 d the second.
#include "attention.h"
#include "kernels.h"

namespace flamingo_kernels {

// The two segments stand where masked cross-attention has media: every row sees both.
__device__ inline Range span_of(const PerceiverAttention&, int64_t, int64_t) { return {0, 2}; }

// Heads first, which lie side by side in memory, then the tiles of rows that read the same keys.
template <int tile>
__device__ inline Place place_of_rows(const PerceiverAttention& p) {
  const int tiles = divide_up(p.length, tile), group = p.heads / p.kv_heads;
  const int head = blockIdx.x % p.heads, at = blockIdx.x / p.heads, of_clip = at / tiles;
  return {of_clip / p.parts, head, head / group, at % tiles, int(of_clip % p.parts)};
}

// Tiles of the media, all S of them, and then of the latents.
template <int tile>
__device__ inline Place place_of_keys(const PerceiverAttention& p) {
  const int kv_head = blockIdx.x % p.kv_heads, at = blockIdx.x / p.kv_heads;
  const int tiles = divide_up(p.keys[0], tile) + divide_up(p.keys[1], tile);
  return {at / tiles, 0, kv_head, at % tiles, 0};
}

// How many of the media keys of a clip are real.
__device__ inline int length_of(const PerceiverAttention& p, int64_t clip) {
  const int all = p.keys[0];
  return p.media_lengths ? min(max(p.media_lengths[clip], 0), all) : all;
}

template <int tile>
__device__ inline Range key_tiles(const PerceiverAttention& p, const Place& place, Range) {
  return {0, int(divide_up(length_of(p, place.batch), tile) + divide_up(p.keys[1], tile))};
}

// A tile of keys where the first `media_tiles` tiles are those of the media.
template <class T>
__device__ inline Keys<T> keys_of_segment(
    const PerceiverAttention& p, int64_t clip, int64_t kv_head, int tile, int media_tiles) {
  const int segment = tile < media_tiles ? 0 : 1, first = (tile - segment * media_tiles) * kTile<T>;
  const int size = p.keys[segment], real = segment ? size : length_of(p, clip);
  return {
      rows_from<const T>(p.k[segment], clip, kv_head, first, p.head_dim),
      rows_from<const T>(p.v[segment], clip, kv_head, first, p.head_dim),
      segment,
      first,
      min(size - first, kTile<T>),
      max(min(real - first, kTile<T>), 0)};
}

template <class T>
__device__ inline Keys<T> keys_of(const PerceiverAttention& p, int64_t clip, int64_t kv_head, int tile) {
  return keys_of_segment<T>(p, clip, kv_head, tile, divide_up(length_of(p, clip), kTile<T>));
}

template <class T>
__device__ inline Keys<T> owned_keys(const PerceiverAttention& p, const Place& place) {
  return keys_of_segment<T>(p, place.batch, place.kv_head, place.tile, divide_up(p.keys[0], kTile<T>));
}

template <class T>
__device__ inline KeyGradients<T> gradients_of(
    const PerceiverAttention& p, int64_t clip, int64_t kv_head, const Keys<T>& keys) {
  return {
      rows_from<T>(p.dk[keys.medium], clip, kv_head, keys.first, p.head_dim),
      rows_from<T>(p.dv[keys.medium], clip, kv_head, keys.first, p.head_dim)};
}

template <int tile>
__device__ inline Range rows_of(const PerceiverAttention& p, int64_t, int, int) {
  return {0, int(p.length)};
}

template <int n>
__device__ inline void first_gradients(const PerceiverAttention&, const Place&, float (&)[n][4]) {}

template <class T, int columns, int rows>
__device__ inline void finish(const PerceiverAttention&, const Place&, const Spans<rows>&, OnlineSoftmax<columns>&) {}

// The media tiles that hold no real key have no visitor: their gradients are 0.
template <class T>
__device__ inline void finish(const PerceiverAttention& p, const Place& place) {
  const int first = divide_up(length_of(p, place.batch), kTile<T>) * kTile<T>;
  for (int64_t key = first + place.part; key < p.keys[0]; key += p.parts)
    for (int column = threadIdx.x; column < p.head_dim; column += kThreads<T>)
      for (const Rows& gradient : {p.dk[0], p.dv[0]})
        rows_from<T>(gradient, place.batch, place.kv_head, key, p.head_dim).data[column] = from_float<T>(0);
}

namespace {

struct Combine {
  PerceiverAttention whole;
  const float *out, *softmax_max, *softmax_sum;  // of the parts: [parts, N, R, H, d] and [parts, N, H, R]
};

constexpr unsigned kCombineThreads = 128;

// A warp combines the parts of one row of a head. A part without keys has no average.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(Combine c) {
  const PerceiverAttention& p = c.whole;
  const int64_t numbers = p.batch * p.heads * p.length;
  const int64_t at = int64_t(blockIdx.x) * (kCombineThreads / 32) + threadIdx.x / 32;
  if (at >= numbers) return;
  float highest = -kInfinity, total = 0;
  for (int part = 0; part < p.parts; ++part) highest = fmaxf(highest, c.softmax_max[part * numbers + at] * p.sign);
  const auto weight_of = [&](int part) {
    const float own = c.softmax_max[part * numbers + at] * p.sign;
    return c.softmax_sum[part * numbers + at] * power_below(own, highest, p.base2_scale);
  };
  for (int part = 0; part < p.parts; ++part) total += weight_of(part);
  const int64_t row = at % p.length, head = at / p.length % p.heads, clip = at / p.length / p.heads;
  const int64_t from = ((clip * p.length + row) * p.heads + head) * p.head_dim;
  const HeadRows<T> to = rows_from<T>(p.out, clip, head, row, p.head_dim);
  for (int column = lane(); column < p.head_dim; column += 32) {
    float sum = 0;
    for (int part = 0; part < p.parts; ++part) {
      const float weight = weight_of(part);
      if (weight != 0) sum += weight * c.out[part * numbers * p.head_dim + from + column];
    }
    to.data[column] = from_float<T>(sum / total);
  }
  if (lane() == 0) p.softmax_max[at] = highest * p.sign, p.softmax_sum[at] = total;
}

int64_t tiles_of_rows(const PerceiverAttention& p) {
  return p.batch * p.heads * divide_up(p.length, tile_of(p.dtype));
}

}  // namespace

namespace kernels {

constexpr int kLeastKeys = 256;  // of a part: with fewer, what a part reads and writes besides outweighs its keys

int64_t parts_of_perceiver_attention(const PerceiverAttention& p) {
  return parts_of(tiles_of_rows(p), (p.keys[0] + p.keys[1]) / kLeastKeys);
}

bool is_whole(const PerceiverAttention& p) { return p.heads == p.kv_heads && p.length <= tile_of(p.dtype); }

void perceiver_attention_fwd(const PerceiverAttention& p, float* softmax_of_parts, Stream stream) {
  by_tile(p, [&](auto type, auto columns) {
    using T = decltype(type);
    PerceiverAttention parts = p;
    const int64_t numbers = p.parts * p.batch * p.heads * p.length;
    if (p.parts > 1) parts.softmax_max = softmax_of_parts, parts.softmax_sum = softmax_of_parts + numbers;
    const auto kernel = attention_fwd_kernel<T, columns(), PerceiverAttention>;
    const dim3 grid = grid_of(p.parts * tiles_of_rows(p));
    launch(stream, kernel, grid, dim3(kThreads<T>), kForwardBytes<T, columns()>, parts);
    if (p.parts == 1) return;
    const dim3 warps = grid_of(divide_up(p.batch * p.heads * p.length, kCombineThreads / 32));
    const Combine combine = {p, p.partial_rows, parts.softmax_max, parts.softmax_sum};
    launch(stream, combine_kernel<T>, warps, dim3(kCombineThreads), 0, combine);
  });
}

void perceiver_attention_bwd(const PerceiverAttention& p, Stream stream) {
  by_tile(p, [&](auto type, auto columns) {
    using T = decltype(type);
    constexpr size_t shared = kBackwardBytes<T, columns(), true>, less = kBackwardBytes<T, columns(), false>;
    const dim3 block(kThreads<T>), rows = grid_of(p.parts * tiles_of_rows(p));
    if (p.whole)
      return launch(
          stream, attention_bwd_rows_kernel<T, columns(), true, PerceiverAttention>, rows, block, shared, p);
    launch(stream, attention_bwd_rows_kernel<T, columns(), false, PerceiverAttention>, rows, block, less, p);
    PerceiverAttention by_keys = p;
    by_keys.parts = 1;
    const int64_t tiles = divide_up(p.keys[0], kTile<T>) + divide_up(p.keys[1], kTile<T>);
    const dim3 keys = grid_of(p.batch * p.kv_heads * tiles);
    launch(stream, attention_bwd_keys_kernel<T, columns(), false, PerceiverAttention>, keys, block, shared, by_keys);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
