// The bodies of the kernels of both attentions: forward, backward by rows, backward by keys.
//
//   S = scale q k^T,  P = softmax(S),  out = P v
//   dP = dout v^T,  delta = rowsum(dout out) = rowsum(P dP),  dS = P (dP - delta)
//   dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout
//
// The rows in which one key weighs more than all others take delta = rowsum(P dP), from a pass over the keys before,
// which costs 4 d more FLOPs a key. Each operator's file says its oracle, bytes and FLOPs.
//
// An operator's Params (MaskedCrossAttention, PerceiverAttention) say by overloads of these functions what there is:
//
//   load_span(params, batch, row)               the media that a row sees
//   place_of_rows(params)                       the tile of rows that a block owns
//   place_of_keys(params)                       the tile of keys that a block owns
//   key_tiles(params, place, media)             all tiles of keys that a block of rows sees
//   keys_of(params, batch, kv_head, tile)       one of these tiles
//   owned_keys(params, place)                   the tile of keys that a block owns
//   visiting_rows(params, batch, medium, part)  the rows that a block of keys goes through
//   gradients_of(params, batch, kv_head, keys)  where the gradients of a tile of keys go
//   partial_gradients_of(params, place, ...)    where a part of them goes, if the rows are cut into parts
//   finish_fwd(params, place, ...)              the output of rows that see no key
//   start_dv(params, place, dv)                 what dv starts with
//   finish_bwd(params, place)                   the gradients of rows, or keys, that no block has visited
#pragma once

#include "tiles.h"

namespace flamingo_kernels {

struct Range {
  int begin, end;
  __device__ bool holds(int i) const { return begin <= i && i < end; }
};

// What a block owns: a tile of rows of a head, or a tile of keys of one.
struct Place {
  int64_t batch;
  int head, kv_head, tile, part;
};

// A tile of keys of a medium, from `first` on, and their values. The first `visible` of its `count` keys may be seen.
template <class T>
struct Keys {
  HeadRows<const T> k, v;
  int medium, first, count, visible;
};

template <class T>
struct KeyGradients {
  HeadRows<T> dk, dv;
};

template <class T>
__device__ inline HeadRows<T> rows_of(const Rows& rows, int64_t batch, int64_t head, int64_t row, int columns) {
  T* data = static_cast<T*>(rows.data) + batch * rows.batch + head * rows.head + row * rows.row;
  return {data, rows.row, columns, rows.wide};
}

// Rows of a contiguous [B, T, H, d] in float32.
__device__ inline HeadRows<float> partial_rows_of(const Attention& params, const Place& place, int64_t row) {
  const int64_t first = ((place.part * params.batch + place.batch) * params.length + row) * params.heads + place.head;
  return {params.partial_rows + first * params.head_dim, params.heads * params.head_dim, int(params.head_dim), false};
}

// The index of a row in [B, H, T].
__device__ inline int64_t row_index(const Attention& params, int64_t batch, int64_t head, int64_t row) {
  return (batch * params.heads + head) * params.length + row;
}

// One bit for each row of a tile: whether `holds(i)` is true in the lane of row lane() + 32 i.
template <int rows, class Predicate>
__device__ inline uint64_t ballot_rows(Predicate holds) {
  uint64_t bits = 0;
  for (int i = 0; i < rows / 32; ++i) bits |= uint64_t(__ballot_sync(~0u, holds(i))) << i * 32;
  return bits;
}

// What the rows of a tile see. Every warp has all of them: lane i holds the spans of rows i and i + 32.
template <int rows>
struct Spans {
  Range media[rows / 32];

  template <class Params>
  __device__ Spans(const Params& params, int64_t batch, int64_t first, int64_t end) {
    for (int i = 0; i < rows / 32; ++i) {
      const int64_t row = first + i * 32 + lane();
      media[i] = row < end ? load_span(params, batch, row) : Range{0, 0};
    }
  }
  // The rows that see one medium, that see any, and that average all values: one bit each.
  __device__ uint64_t seeing(int medium) const {
    return ballot_rows<rows>([&](int i) { return media[i].holds(medium); });
  }
  __device__ uint64_t seeing_any() const {
    return ballot_rows<rows>([&](int i) { return media[i].begin < media[i].end; });
  }
  __device__ uint64_t averaging() const {
    return ballot_rows<rows>([&](int i) { return media[i].end < 0; });
  }
  // From the first medium that any of them sees to the last.
  __device__ Range all() const {
    Range seen = {INT32_MAX, 0};
    for (const Range& one : media)
      if (one.begin < one.end) seen = {min(seen.begin, one.begin), max(seen.end, one.end)};
    const int end = -warp_min(-seen.end);
    return {min(warp_min(seen.begin), end), end};
  }
};

// Whether the two rows of a lane's fragment are among those of `bits`. Masked results are selected, never multiplied by
// 0, because 0 * NaN is NaN.
struct RowMask {
  bool upper, lower;
  __device__ explicit RowMask(uint64_t bits)
      : upper(bits >> (first_row_of_warp() + fragment_row(0)) & 1),
        lower(bits >> (first_row_of_warp() + fragment_row(2)) & 1) {}
  __device__ bool operator[](int half) const { return half ? lower : upper; }
};

// Scores of a tile of keys, not scaled yet but with the sign of the scale; -inf for keys that are not visible.
template <class T, int columns, int n>
__device__ inline void compute_scores(
    float (&scores)[n][4], Tile<T, columns> q, Tile<T, columns> k, float sign, int visible) {
  multiply<false, true>(scores, q, k);
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; ++i) scores[j][i] = fragment_column(j, i) < visible ? scores[j][i] * sign : -kInfinity;
}

// The tiles that one of equal parts visits.
__device__ inline Range part_range(Range tiles, int part, int parts) {
  const int each = divide_up(tiles.end - tiles.begin, parts), begin = tiles.begin + part * each;
  return {begin, min(begin + each, tiles.end)};
}

// The softmax of 16 rows over the tiles of keys seen so far, and its product with their values, not divided by row_sum.
template <int columns>
struct OnlineSoftmax {
  float row_max[2] = {-kInfinity, -kInfinity}, row_sum[2] = {}, alpha[2];
  float acc[columns / 8][4] = {};

  // Takes in the scores of another tile, and puts P in their place. Rows outside the mask stay as they are.
  template <int n>
  __device__ void update(float (&scores)[n][4], float scale_log2, RowMask mask) {
    for (int half = 0; half < 2; ++half) {
      const float new_max = fmaxf(row_max[half], reduce_max(scores, half));
      alpha[half] = scaled_exp2(row_max[half], new_max, scale_log2);
      for (int j = 0; j < n; ++j)
        for (int i = 2 * half; i < 2 * half + 2; ++i) scores[j][i] = scaled_exp2(scores[j][i], new_max, scale_log2);
      const float sum = reduce_sum(scores, half);
      if (!mask[half]) continue;
      row_sum[half] = row_sum[half] * alpha[half] + sum;
      row_max[half] = new_max;
    }
  }
  // Takes in 32 columns of P v.
  __device__ void add(const float (&pv)[4][4], int column, RowMask mask) {
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 4; ++i)
        if (mask[i / 2]) acc[column / 8 + j][i] = acc[column / 8 + j][i] * alpha[i / 2] + pv[j][i];
  }
};

// The next tile of keys, from `tile` on, that a row of these sees.
template <class T, class Params, int rows>
__device__ inline int next_seen(const Params& params, const Place& place, const Spans<rows>& spans, int tile, int end) {
  while (tile < end && !spans.seeing(keys_of<T>(params, place.batch, place.kv_head, tile).medium)) ++tile;
  return tile;
}

// Multiplies the rows of a fragment that are in the mask, and makes the others 0.
template <int n>
__device__ inline void scale_rows(float (&c)[n][4], float factor, const RowMask& mask) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; ++i) c[j][i] = mask[i / 2] ? c[j][i] * factor : 0.0f;
}

// Writes a fragment to the rows of `real`.
template <class T, int n>
__device__ inline void store_fragment(HeadRows<T> to, const float (&c)[n][4], uint64_t real) {
#pragma unroll
  for (int j = 0; j < n; j += 4) {
    float four[4][4];
    memcpy(four, c[j], sizeof four);
    store(to, four, j * 8, real);
  }
}

// Writes the rows of a tile from `first` on, or this part's terms of them where the keys are cut into parts.
template <class T, int n>
__device__ inline void store_rows(
    const Attention& params, const Place& place, const Rows& to, int64_t first, const float (&c)[n][4]) {
  const uint64_t real = first_rows(min(params.length - first, int64_t(64)));
  if (params.parts > 1)
    store_fragment(partial_rows_of(params, place, first), c, real);
  else
    store_fragment(rows_of<T>(to, place.batch, place.head, first, params.head_dim), c, real);
}

// Divides acc by row_sum, and writes the rows and what the backward pass needs of their softmax.
template <class T, int columns>
__device__ inline void store_out(
    const Attention& params, const Place& place, int64_t first, const RowMask& sees, OnlineSoftmax<columns>& softmax) {
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + first_row_of_warp() + fragment_row(2 * half);
    const float row_sum = sees[half] ? softmax.row_sum[half] : 1.0f, inv_sum = 1 / row_sum;
    for (int j = 0; j < columns / 8; ++j)
      for (int i = 2 * half; i < 2 * half + 2; ++i) softmax.acc[j][i] *= inv_sum;
    if (!params.row_max || lane() % 4 || row >= params.length) continue;
    const int64_t at = row_index(params, place.part * params.batch + place.batch, place.head, row);
    params.row_max[at] = sees[half] ? softmax.row_max[half] * params.sign : 0.0f;
    params.row_sum[at] = row_sum;
  }
  store_rows<T>(params, place, params.out, first, softmax.acc);
}

// How many blocks the registers of a multiprocessor hold at least: as many as spill nothing.
template <int columns>
constexpr int kForwardBlocks = columns <= 64 ? 3 : 2;
template <int columns>
constexpr int kRowsBlocks = columns <= 64 ? 3 : 2;
constexpr int kKeysBlocks = 2;

// KiB of shared memory of a multiprocessor. On sm_86, 89 and 120, which have the least, a block may take 99.
constexpr size_t kSharedOf80 = 164, kSharedOf90 = 228;
constexpr size_t kLeastShared = 99 * 1024;

// How many blocks fit into shared memory: each takes 1 KiB more than it asks for.
__host__ __device__ constexpr int fitting(size_t shared, size_t bytes) { return int(shared * 1024 / (bytes + 1024)); }

template <class T, int columns>
constexpr size_t kForwardBytes = 3 * Tile<T, columns>::kBytes + Tile<T, kTile<T>>::kBytes;

// A block takes a tile of rows through the keys that they see. Those of the next tile are under way meanwhile.
template <class T, int columns, class Params>
__device__ __forceinline__ void attention_fwd(const Params& params) {
  static_assert(kForwardBytes<T, columns> <= kLeastShared);
  static_assert(fitting(kSharedOf80, kForwardBytes<T, columns>) >= kForwardBlocks<columns>);
  Arena arena = {static_cast<char*>(shared_memory())};
  const auto q = arena.take<Tile<T, columns>>(), k = arena.take<Tile<T, columns>>(), v = arena.take<Tile<T, columns>>();
  const auto p = arena.take<Tile<T, kTile<T>>>();
  const Place place = place_of_rows<kTile<T>>(params);
  const int64_t first = int64_t(place.tile) * kTile<T>;
  const Spans<kTile<T>> spans(params, place.batch, first, params.length);
  const Range tiles = part_range(key_tiles<kTile<T>>(params, place, spans.all()), place.part, params.parts);
  load(q, rows_of<const T>(params.q, place.batch, place.head, first, params.head_dim), spans.seeing_any());

  OnlineSoftmax<columns> softmax;
  int tile = next_seen<T>(params, place, spans, tiles.begin, tiles.end);
  Keys<T> keys = keys_of<T>(params, place.batch, place.kv_head, tile);
  if (tile < tiles.end) load(k, keys.k, first_rows(keys.visible));
  commit_copies();
  if (tile < tiles.end) load(v, keys.v, first_rows(keys.visible));
  commit_copies();
  while (tile < tiles.end) {
    const RowMask mask(spans.seeing(keys.medium));
    const int visible = keys.visible;
    tile = next_seen<T>(params, place, spans, tile + 1, tiles.end);
    keys = keys_of<T>(params, place.batch, place.kv_head, tile);
    wait_for_copies<1>();
    __syncthreads();  // k is there
    float scores[kTile<T> / 8][4] = {};
    compute_scores(scores, q, k, params.sign, visible);
    softmax.update(scores, params.scale_log2, mask);
    store(p, scores);
    wait_for_copies<0>();
    __syncthreads();  // v is there, and k is free
    if (tile < tiles.end) load(k, keys.k, first_rows(keys.visible));
    commit_copies();
#pragma unroll
    for (int column = 0; column < columns; column += 32) {
      float pv[4][4] = {};
      multiply<false, false>(pv, p, v, column);
      softmax.add(pv, column, mask);
    }
    __syncthreads();  // v is free
    if (tile < tiles.end) load(v, keys.v, first_rows(keys.visible));
    commit_copies();
  }
  wait_for_copies<0>();  // of q, where no tile was visited: finish_fwd takes its place
  finish_fwd<T>(params, place, spans, softmax);
  store_out<T>(params, place, first, RowMask(spans.seeing_any()), softmax);
}

// rowsum(a b) of the 16 rows of a warp; in double for float32: what a subtraction leaves of it must be right.
template <class T, int columns>
__device__ inline float row_dot(Tile<T, columns> a, Tile<T, columns> b, int half) {
  using Sum = std::conditional_t<std::is_same_v<T, float>, double, float>;
  const int row = first_row_of_warp() + fragment_row(2 * half);
  Sum sum = 0;
  for (int i = lane() % 4; i < columns; i += 4) sum += Sum(to_float(*a.at(row, i))) * Sum(to_float(*b.at(row, i)));
  return float(quad_sum(sum));
}

// What the backward pass needs of the two rows of a lane's fragment.
struct RowStats {
  float row_max[2], inv_sum[2], delta[2];

  // As the forward pass left them.
  __device__ void read_softmax(
      const Attention& params, int64_t batch, int64_t head, int64_t first, const RowMask& mask) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = index(params, batch, head, first, mask, half);
      row_max[half] = params.row_max[at] * params.sign, inv_sum[half] = 1 / params.row_sum[at];
    }
  }
  // As the kernel by rows left it.
  __device__ void read_delta(const Attention& params, int64_t batch, int64_t head, int64_t first, const RowMask& mask) {
    for (int half = 0; half < 2; ++half) delta[half] = params.delta[index(params, batch, head, first, mask, half)];
  }

 private:
  // A row outside the mask reads another that exists.
  __device__ static int64_t index(
      const Attention& params, int64_t batch, int64_t head, int64_t first, const RowMask& mask, int half) {
    return row_index(params, batch, head, mask[half] ? first + first_row_of_warp() + fragment_row(2 * half) : 0);
  }
};

// The rows in which one key weighs more than all others, one bit each.
template <int rows>
__device__ inline uint64_t saturated_rows(
    const Attention& params, const Place& place, int64_t first, uint64_t seeing_any) {
  return ballot_rows<rows>([&](int i) {
    const int row = i * 32 + lane();
    return seeing_any >> row & 1 && params.row_sum[row_index(params, place.batch, place.head, first + row)] < 2;
  });
}

// Puts P in the place of scores; rows outside the mask get 0.
template <int n>
__device__ inline void compute_p(float (&scores)[n][4], float scale_log2, const RowStats& stats, const RowMask& mask) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; ++i) {
      const float p = exp2f((scores[j][i] - stats.row_max[i / 2]) * scale_log2) * stats.inv_sum[i / 2];
      scores[j][i] = mask[i / 2] ? p : 0.0f;
    }
}

// The same where these keys are all that the rows see.
template <int n>
__device__ inline void compute_p_one_shot(float (&scores)[n][4], float scale_log2, const RowMask& mask) {
  RowStats stats;
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
    stats.row_max[half] = reduce_max(scores, half);
    for (int j = 0; j < n; ++j)
      for (int i = 2 * half; i < 2 * half + 2; ++i) sum += exp2f((scores[j][i] - stats.row_max[half]) * scale_log2);
    stats.inv_sum[half] = 1 / quad_sum(sum);
  }
  compute_p(scores, scale_log2, stats, mask);
}

// delta = rowsum(P dP), where these keys are all that the rows see. A lane reads the P that it has stored.
template <class T, int n>
__device__ inline void compute_delta(RowStats& stats, Tile<T, kTile<T>> p, const float (&dp)[n][4]) {
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
    for (int j = 0; j < n; ++j)
      for (int i = 2 * half; i < 2 * half + 2; ++i) sum += element(p, j, i) * dp[j][i];
    stats.delta[half] = quad_sum(sum);
  }
}

// Adds a tile's terms of rowsum(P dP) that this lane has, for the rows in the mask.
template <int n>
__device__ inline void add_delta(
    float (&delta)[2], const float (&p)[n][4], const float (&dp)[n][4], const RowMask& mask) {
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
    for (int j = 0; j < n; ++j)
      for (int i = 2 * half; i < 2 * half + 2; ++i) sum += p[j][i] * dp[j][i];
    if (mask[half]) delta[half] += sum;
  }
}

// Puts dS in the place of dP. P comes rounded from its tile, as the products take it, because registers are short.
template <class T, int n>
__device__ inline void compute_ds(float (&dp)[n][4], Tile<T, kTile<T>> p, const RowStats& stats, const RowMask& mask) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; ++i) {
      const float ds = element(p, j, i) * (dp[j][i] - stats.delta[i / 2]);
      dp[j][i] = mask[i / 2] ? ds : 0.0f;
    }
}

// dq += dS k for the rows in the mask.
template <class T, int columns>
__device__ inline void add_dq(
    float (&dq)[columns / 8][4], Tile<T, kTile<T>> ds, Tile<T, columns> k, const RowMask& mask) {
#pragma unroll
  for (int j = 0; j < columns / 8; j += 4) {
    float added[4][4] = {};
    multiply<false, false>(added, ds, k, j * 8);
    for (int m = 0; m < 4; ++m)
      for (int i = 0; i < 4; ++i) dq[j + m][i] = mask[i / 2] ? dq[j + m][i] + added[m][i] : dq[j + m][i];
  }
}

// Writes the warp's rows of factor * a b (or a^T b), with 0 for those outside `kept`; only `real` rows are written.
template <bool a_transposed, class T, int columns>
__device__ inline void store_product(
    HeadRows<T> to, Tile<T, kTile<T>> a, Tile<T, columns> b, float factor, uint64_t kept, uint64_t real) {
#pragma unroll(sizeof(T) == 2 ? columns / 32 : 1)  // registers are short in float32
  for (int column = 0; column < columns; column += 32) {
    float product[4][4] = {};
    multiply<a_transposed, false>(product, a, b, column);
    scale_rows(product, factor, RowMask(kept));
    store(to, product, column, real);
  }
}

// Writes dk and dv of the block's keys, or this part's terms of them where the rows are cut into parts.
template <class T, int columns, class Params>
__device__ inline void store_key_gradients(
    const Params& params, const Place& place, const Keys<T>& keys, float (&dk)[columns][4], float (&dv)[columns][4]) {
  const uint64_t count = first_rows(keys.count);
  const RowMask visible(first_rows(keys.visible));
  scale_rows(dk, params.scale, visible);
  scale_rows(dv, 1.0f, visible);
  if constexpr (requires { partial_gradients_of(params, place, 0, 0); }) {
    if (params.parts > 1) {
      const KeyGradients<float> to = partial_gradients_of(params, place, keys.medium, keys.first);
      store_fragment(to.dk, dk, count);
      store_fragment(to.dv, dv, count);
      return;
    }
  }
  const KeyGradients<T> to = gradients_of<T>(params, place.batch, place.kv_head, keys);
  store_fragment(to.dk, dk, count);
  store_fragment(to.dv, dv, count);
}

template <class T, int columns, bool apart>
constexpr size_t kBackwardBytes = 4 * Tile<T, columns>::kBytes + (apart ? 2 : 1) * Tile<T, kTile<T>>::kBytes;

// What a block of either backward kernel has in shared memory. `apart`: P is needed after dS is there.
template <class T, int columns>
struct BackwardTiles {
  Tile<T, columns> q, dout, k, v;
  Tile<T, kTile<T>> p, ds;
};

template <class T, int columns, bool apart>
__device__ inline BackwardTiles<T, columns> backward_tiles() {
  static_assert(kBackwardBytes<T, columns, apart> <= kLeastShared);
  Arena arena = {static_cast<char*>(shared_memory())};
  using Wide = Tile<T, columns>;
  using Square = Tile<T, kTile<T>>;
  const Wide q = arena.take<Wide>(), dout = arena.take<Wide>(), k = arena.take<Wide>(), v = arena.take<Wide>();
  const Square p = arena.take<Square>();
  return {q, dout, k, v, p, apart ? arena.take<Square>() : p};
}

// A block takes a tile of rows through the keys that they see, for dq. `whole`: no other block has rows that see these
// keys, so it writes dk and dv on the way.
template <class T, int columns, bool whole, class Params>
__device__ __forceinline__ void attention_bwd_rows(const Params& params) {
  static_assert(fitting(whole ? kSharedOf90 : kSharedOf80, kBackwardBytes<T, columns, whole>) >= kRowsBlocks<columns>);
  const auto [q, dout, k, v, p, ds] = backward_tiles<T, columns, whole>();
  const Place place = place_of_rows<kTile<T>>(params);
  const int64_t first = int64_t(place.tile) * kTile<T>;
  const Spans<kTile<T>> spans(params, place.batch, first, params.length);
  const Range all = key_tiles<kTile<T>>(params, place, spans.all()), tiles = part_range(all, place.part, params.parts);
  const uint64_t seeing_any = spans.seeing_any();

  load(q, rows_of<const T>(params.q, place.batch, place.head, first, params.head_dim), seeing_any);
  load(dout, rows_of<const T>(params.dout, place.batch, place.head, first, params.head_dim), seeing_any);
  load(k, rows_of<const T>(params.out, place.batch, place.head, first, params.head_dim), seeing_any);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  RowStats stats;
  stats.read_softmax(params, place.batch, place.head, first, RowMask(seeing_any));
  for (int half = 0; half < 2; ++half) stats.delta[half] = row_dot(dout, k, half);
  // Loads keys and values, and makes the scores of the rows that see them P.
  const auto attend = [&](float (&scores)[kTile<T> / 8][4], const Keys<T>& keys, const RowMask& mask) {
    __syncthreads();  // k and v are free
    load(k, keys.k, first_rows(keys.visible));
    load(v, keys.v, first_rows(keys.visible));
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    compute_scores(scores, q, k, params.sign, keys.visible);
    compute_p(scores, params.scale_log2, stats, mask);
  };

  // Where one key has most of a row's weight, its dP nearly cancels with delta: one from the rounded out would not do.
  if (const uint64_t saturated = saturated_rows<kTile<T>>(params, place, first, seeing_any)) {
    float delta[2] = {};
    for (int tile = all.begin; (tile = next_seen<T>(params, place, spans, tile, all.end)) < all.end; ++tile) {
      const Keys<T> keys = keys_of<T>(params, place.batch, place.kv_head, tile);
      const RowMask mask(spans.seeing(keys.medium));
      float scores[kTile<T> / 8][4] = {}, dp[kTile<T> / 8][4] = {};
      attend(scores, keys, mask);
      multiply<false, true>(dp, dout, v);
      add_delta(delta, scores, dp, mask);
    }
    const RowMask mask(saturated);
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(delta[half]);
      if (mask[half]) stats.delta[half] = sum;
    }
  }
  for (int half = 0; half < 2; ++half) {
    const int row = first_row_of_warp() + fragment_row(2 * half);
    if (!whole && place.part == 0 && lane() % 4 == 0 && first + row < params.length)
      params.delta[row_index(params, place.batch, place.head, first + row)] = stats.delta[half];
  }

  float dq[columns / 8][4] = {};
  for (int tile = tiles.begin; (tile = next_seen<T>(params, place, spans, tile, tiles.end)) < tiles.end; ++tile) {
    const Keys<T> keys = keys_of<T>(params, place.batch, place.kv_head, tile);
    const RowMask mask(spans.seeing(keys.medium));
    float scores[kTile<T> / 8][4] = {}, dp[kTile<T> / 8][4] = {};
    attend(scores, keys, mask);
    store(p, scores);
    multiply<false, true>(dp, dout, v);
    compute_ds(dp, p, stats, mask);
    store(ds, dp);
    whole ? __syncthreads() : __syncwarp();
    add_dq(dq, ds, k, mask);
    if constexpr (whole) {
      const KeyGradients<T> to = gradients_of<T>(params, place.batch, place.kv_head, keys);
      const uint64_t visible = first_rows(keys.visible), count = first_rows(keys.count);
      store_product<true>(to.dv, p, dout, 1.0f, visible, count);
      store_product<true>(to.dk, ds, q, params.scale, visible, count);
    }
  }
  scale_rows(dq, params.scale, RowMask(~0ull));
  store_rows<T>(params, place, params.dq, first, dq);
  if constexpr (whole) finish_bwd<T>(params, place);
}

// A block takes a tile of keys through the rows that see it, for dk and dv. `one_shot`: the rows see nothing else, so
// it computes their softmax again and writes their dq.
template <class T, int columns, bool one_shot, class Params>
__device__ __forceinline__ void attention_bwd_keys(const Params& params) {
  static_assert(fitting(kSharedOf90, kBackwardBytes<T, columns, true>) >= kKeysBlocks);
  const auto [q, dout, k, v, p, ds] = backward_tiles<T, columns, true>();
  const Place place = place_of_keys<kTile<T>>(params);
  const Keys<T> keys = owned_keys<T>(params, place);
  load(k, keys.k, first_rows(keys.visible));
  load(v, keys.v, first_rows(keys.visible));

  float dk[columns / 8][4] = {}, dv[columns / 8][4] = {};  // of the 16 keys of this warp
  start_dv(params, place, dv);
  const Range range =
      keys.visible > 0 ? visiting_rows<kTile<T>>(params, place.batch, keys.medium, place.part) : Range{0, 0};
  const int group = params.heads / params.kv_heads;
  for (int head = place.kv_head * group; head < (place.kv_head + 1) * group; ++head)
    for (int first = range.begin; first < range.end; first += kTile<T>) {
      const uint64_t rows = Spans<kTile<T>>(params, place.batch, first, range.end).seeing(keys.medium);
      const RowMask mask(rows);
      __syncthreads();  // q, dout, p and ds are free
      load(q, rows_of<const T>(params.q, place.batch, head, first, params.head_dim), rows);
      load(dout, rows_of<const T>(params.dout, place.batch, head, first, params.head_dim), rows);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      float scores[kTile<T> / 8][4] = {}, dp[kTile<T> / 8][4] = {};
      compute_scores(scores, q, k, params.sign, keys.visible);
      RowStats stats;
      if constexpr (one_shot) {
        compute_p_one_shot(scores, params.scale_log2, mask);
      } else {
        stats.read_softmax(params, place.batch, head, first, mask);
        stats.read_delta(params, place.batch, head, first, mask);
        compute_p(scores, params.scale_log2, stats, mask);
      }
      store(p, scores);
      multiply<false, true>(dp, dout, v);
      if constexpr (one_shot) compute_delta(stats, p, dp);
      compute_ds(dp, p, stats, mask);
      store(ds, dp);
      __syncthreads();
      if constexpr (one_shot) {
        const auto dq = rows_of<T>(params.dq, place.batch, head, first, params.head_dim);
        store_product<false>(dq, ds, k, params.scale, ~0ull, rows);
      }
      multiply<true, false>(dv, p, dout);
      multiply<true, false>(dk, ds, q);
    }
  commit_copies();
  wait_for_copies<0>();  // of k and v, where no row sees them
  store_key_gradients<T>(params, place, keys, dk, dv);
  if constexpr (one_shot) finish_bwd<T>(params, place);
}

inline int tile_rows(DType dtype) { return dtype == DType::f32 ? kTile<float> : kTile<bf16>; }

// Calls a function with an element type and the columns of the tiles that hold a head.
template <class Function>
void by_tile(const Attention& params, Function function) {
  by_type(params.dtype, [&](auto type) {
    if (params.head_dim <= 64) return function(type, std::integral_constant<int, 64>());
    if (params.head_dim <= 96) return function(type, std::integral_constant<int, 96>());
    function(type, std::integral_constant<int, 128>());
  });
}

// How many parts to cut each of `programs` equal tasks into, at most `most`, to fill the device twice.
inline int64_t count_parts(int64_t programs, int64_t most) {
  const int64_t wanted = 2 * multiprocessors() / max(programs, int64_t(1));
  return max(int64_t(1), min(wanted, most));
}

}  // namespace flamingo_kernels
