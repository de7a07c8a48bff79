// Masked cross-attention: every text row attends to the media that its span names, forward and backward.
// Oracle: ops/masked_cross_attention/reference.py and autograd through it.
//
// Forward, a block has a tile of rows of one head, and visits the media that they name. Backward there are two ways.
//
// one shot    Every row sees one medium, whose keys are one tile. A block has a medium of one head and goes through the
//             rows that see it. They see no other, so it makes their softmax anew, needs neither out nor sums that were
//             kept, and writes their dq, once.
// spans       One kernel has a tile of rows and visits the keys they see, for dq; one has a tile of keys and visits the
//             rows that see it, for dk and dv.
//
// Where there are too few keys to fill the device their rows are cut into parts, whose dk and dv `sum` adds in order.
//
// Bytes: forward q, k, v read once from memory (tiles of keys again from the cache) and out written once; one shot q,
// dout, k, v read and dq, dk, dv written once; spans q, dout, k, v twice and out once. FLOPs a row and visible key:
// 4 d forward, 10 d one shot, 14 d spans.
#include "attention.h"
#include "kernels.h"

namespace flamingo_kernels {

__device__ inline Range span_of(const MaskedCrossAttention& p, int64_t batch, int64_t row) {
  const int64_t at = batch * p.length + row;
  return {max(p.lo[at], 0), min(p.hi[at], int(p.media))};
}

// Heads first, which lie side by side in memory, then tiles from the end of the text, where rows may see the most.
template <int tile>
__device__ inline Place place_of_rows(const MaskedCrossAttention& p) {
  const int tiles = divide_up(p.length, tile), group = p.heads / p.kv_heads;
  const int head = blockIdx.x % p.heads, at = blockIdx.x / p.heads;
  return {at / tiles, head, head / group, tiles - 1 - at % tiles, 0};
}

// Heads first, then parts; the first media, which most rows see, come first.
template <int tile>
__device__ inline Place place_of_keys(const MaskedCrossAttention& p) {
  const int kv_head = blockIdx.x % p.kv_heads, at = blockIdx.x / p.kv_heads;
  const int part = at % p.parts, of_batch = at / p.parts;
  return {of_batch % p.batch, 0, kv_head, int(of_batch / p.batch), part};
}

template <int tile>
__device__ inline Range key_tiles(const MaskedCrossAttention& p, const Place&, Range media) {
  const int each = divide_up(p.latents, tile);
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
__device__ inline Keys<T> keys_of(const MaskedCrossAttention& p, int64_t batch, int64_t kv_head, int tile) {
  const int each = divide_up(p.latents, kTile<T>), medium = tile / each, first = tile % each * kTile<T>;
  const int count = min(int(p.latents) - first, kTile<T>);
  return {
      latents_of<const T>(p.k, batch, kv_head, medium, first, p.head_dim),
      latents_of<const T>(p.v, batch, kv_head, medium, first, p.head_dim), medium, first, count, count};
}

template <class T>
__device__ inline Keys<T> owned_keys(const MaskedCrossAttention& p, const Place& place) {
  return keys_of<T>(p, place.batch, place.kv_head, place.tile);
}

template <class T>
__device__ inline KeyGradients<T> gradients_of(
    const MaskedCrossAttention& p, int64_t batch, int64_t kv_head, const Keys<T>& keys) {
  return {
      latents_of<T>(p.dk, batch, kv_head, keys.medium, keys.first, p.head_dim),
      latents_of<T>(p.dv, batch, kv_head, keys.medium, keys.first, p.head_dim)};
}

// In contiguous [parts, B, M, R, Hkv, d].
__device__ inline KeyGradients<float> partial_gradients_of(
    const MaskedCrossAttention& p, const Place& place, int64_t medium, int64_t first) {
  const int64_t row = ((place.part * p.batch + place.batch) * p.media + medium) * p.latents + first;
  const int64_t at = (row * p.kv_heads + place.kv_head) * p.head_dim, stride = p.kv_heads * p.head_dim;
  return {{p.partial_dk + at, stride, int(p.head_dim), false}, {p.partial_dv + at, stride, int(p.head_dim), false}};
}

// A part of the rows from the first to the last that see a medium.
template <int tile>
__device__ inline Range rows_of(const MaskedCrossAttention& p, int64_t batch, int medium, int part) {
  const int64_t at = batch * p.media + medium;
  const int begin = max(p.start[at], 0), end = min(p.stop[at], int(p.length));
  const int each = divide_up(divide_up(end - begin, p.parts), tile) * tile;
  return {begin + part * each, min(begin + (part + 1) * each, end)};
}

// Rows whose span ends at -1 get the mean of all values of their sequence.
template <class T, int columns, int rows>
__device__ inline void finish(
    const MaskedCrossAttention& p, const Place& place, const Spans<rows>& spans, OnlineSoftmax<columns>& softmax) {
  const uint64_t averaging = p.averages ? spans.averaging() : 0;
  if (!averaging) return;
  float* mean = static_cast<float*>(shared_memory());
  __syncthreads();  // no warp needs its tiles any more
  for (int column = threadIdx.x; column < p.head_dim; column += kThreads<T>) {
    float total = 0;
    for (int64_t medium = 0; medium < p.media; ++medium) {
      const auto values = latents_of<const T>(p.v, place.batch, place.kv_head, medium, 0, p.head_dim);
      for (int64_t latent = 0; latent < p.latents; ++latent)
        total += to_float(values.data[latent * values.stride + column]);
    }
    mean[column] = total / (p.media * p.latents);
  }
  __syncthreads();
  const Here here(averaging);
  for (int j = 0; j < columns / 8; ++j)
    for (int i = 0; i < 4; ++i)
      if (here[i / 2] && fragment_column(j, i) < p.head_dim) softmax.product[j][i] = mean[fragment_column(j, i)];
}

// What dv starts with: the share that every value has in the rows that average all.
template <int n>
__device__ inline void first_gradients(const MaskedCrossAttention& p, const Place& place, float (&dv)[n][4]) {
  if (!p.averages || place.part != 0) return;
  const float* share = p.share + (place.batch * p.kv_heads + place.kv_head) * p.head_dim;
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; ++i) dv[j][i] = fragment_column(j, i) < p.head_dim ? share[fragment_column(j, i)] : 0.0f;
}

// No block has the rows that see no medium, so each clears dq of those in its slice of the text.
template <class T>
__device__ inline void finish(const MaskedCrossAttention& p, const Place& place) {
  const int64_t slices = p.media * p.parts, slice = place.tile * p.parts + place.part;
  const int64_t each = divide_up(p.length, slices), end = min((slice + 1) * each, p.length);
  const int group = p.heads / p.kv_heads, columns = group * p.head_dim;
  for (int64_t row = slice * each; row < end; ++row) {
    const Range span = span_of(p, place.batch, row);
    if (span.begin < span.end) continue;
    for (int i = threadIdx.x; i < columns; i += kThreads<T>) {
      const int64_t head = place.kv_head * group + i / p.head_dim;
      rows_from<T>(p.dq, place.batch, head, row, p.head_dim).data[i % p.head_dim] = from_float<T>(0);
    }
  }
}

namespace {

// share[b, h] = the sum of dout over the rows that average all values, divided by their number.
template <class T>
__global__ void __launch_bounds__(128) share_kernel(MaskedCrossAttention p) {
  const int64_t batch = blockIdx.x / p.kv_heads, kv_head = blockIdx.x % p.kv_heads, group = p.heads / p.kv_heads;
  for (int column = threadIdx.x; column < p.head_dim; column += blockDim.x) {
    float total = 0;
    for (int64_t row = 0; row < p.length; ++row) {
      if (span_of(p, batch, row).end >= 0) continue;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        total += to_float(rows_from<const T>(p.dout, batch, head, row, p.head_dim).data[column]);
    }
    p.share[blockIdx.x * p.head_dim + column] = total / (p.media * p.latents);
  }
}

int64_t tiles_of_keys(const MaskedCrossAttention& p) {
  return p.batch * p.kv_heads * p.media * divide_up(p.latents, tile_of(p.dtype));
}

}  // namespace

namespace kernels {

bool is_one_shot(DType dtype, bool immediate, int64_t latents) { return immediate && latents <= tile_of(dtype); }

void masked_cross_attention_fwd(const MaskedCrossAttention& p, Stream stream) {
  by_tile(p, [&](auto type, auto columns) {
    using T = decltype(type);
    const dim3 grid = grid_of(p.batch * p.heads * divide_up(p.length, kTile<T>));
    const auto kernel = attention_fwd_kernel<T, columns(), MaskedCrossAttention>;
    launch(stream, kernel, grid, dim3(kThreads<T>), kForwardBytes<T, columns()>, p);
  });
}

int64_t parts_of_masked_cross_attention_bwd(const MaskedCrossAttention& p) {
  return parts_of(tiles_of_keys(p), divide_up(p.length, p.media * tile_of(p.dtype)));
}

void masked_cross_attention_bwd(const MaskedCrossAttention& p, Stream stream) {
  by_tile(p, [&](auto type, auto columns) {
    using T = decltype(type);
    const dim3 block(kThreads<T>);
    if (p.averages) launch(stream, share_kernel<T>, grid_of(p.batch * p.kv_heads), dim3(128), 0, p);
    if (!p.one_shot) {
      MaskedCrossAttention by_rows = p;
      by_rows.parts = 1;
      const auto kernel = attention_bwd_rows_kernel<T, columns(), false, MaskedCrossAttention>;
      const dim3 grid = grid_of(p.batch * p.heads * divide_up(p.length, kTile<T>));
      launch(stream, kernel, grid, block, kBackwardBytes<T, columns(), false>, by_rows);
    }
    const auto kernel = p.one_shot ? attention_bwd_keys_kernel<T, columns(), true, MaskedCrossAttention>
                                   : attention_bwd_keys_kernel<T, columns(), false, MaskedCrossAttention>;
    launch(stream, kernel, grid_of(p.parts * tiles_of_keys(p)), block, kBackwardBytes<T, columns(), true>, p);
  });
}

}  // namespace kernels
}  // namespace flamingo_kernels
