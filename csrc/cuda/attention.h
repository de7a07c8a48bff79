// The three kernels that both attentions are made of: forward, backward by rows, backward by keys.
//
//   P = softmax(scale q k^T),  out = P v,  delta = rowsum(dout out),  dS = P (dout v^T - delta)
//   dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout
//
// Rows in which one key weighs more than all others have delta = rowsum(P dP), by a pass over the keys before.
//
// A problem (MaskedCrossAttention, PerceiverAttention) says by overloads of these functions what there is:
//
//   span_of(p, batch, row)                   the media that a row sees
//   place_of_rows(p), place_of_keys(p)       what a block owns
//   key_tiles(p, place, media)               all tiles of keys that a block of rows sees
//   keys_of(p, batch, kv_head, tile)         such a tile
//   owned_keys(p, place)                     the tile of keys that a block owns
//   gradients_of(p, batch, kv_head, keys)    where the gradients of a tile of keys go
//   partial_gradients_of(p, place, ...)      the same of a part, where the rows of a tile of keys are divided
//   rows_of(p, batch, medium, part)          the rows that a block of keys visits
//   finish(p, place, ...)                    what is left to do for rows, or keys, that nothing above has reached
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

// A tile of keys of a medium, from `first` on, and their values; of its `count` keys the first `real` are to be seen.
template <class T>
struct Keys {
  HeadRows<const T> k, v;
  int medium, first, count, real;
};

template <class T>
struct KeyGradients {
  HeadRows<T> dk, dv;
};

template <class T>
__device__ inline HeadRows<T> rows_from(const Rows& rows, int64_t batch, int64_t head, int64_t row, int columns) {
  T* data = static_cast<T*>(rows.data) + batch * rows.batch + head * rows.head + row * rows.row;
  return {data, rows.row, columns, rows.wide};
}

// Rows of a contiguous [B, T, H, d] in float32.
__device__ inline HeadRows<float> partial_rows(const Attention& p, const Place& place, int64_t row) {
  const int64_t first = ((place.part * p.batch + place.batch) * p.length + row) * p.heads + place.head;
  return {p.partial_rows + first * p.head_dim, p.heads * p.head_dim, int(p.head_dim), false};
}

// Where the one number that a row has lies in [B, H, T].
__device__ inline int64_t number_of(const Attention& p, int64_t batch, int64_t head, int64_t row) {
  return (batch * p.heads + head) * p.length + row;
}

// What the rows of a tile see. Every warp knows it of all of them: lane i of rows i and i + 32.
template <int rows>
struct Spans {
  Range media[rows / 32];

  template <class Params>
  __device__ Spans(const Params& p, int64_t batch, int64_t first, int64_t end) {
    for (int i = 0; i < rows / 32; ++i) {
      const int64_t row = first + i * 32 + lane();
      media[i] = row < end ? span_of(p, batch, row) : Range{0, 0};
    }
  }
  // The rows that see a medium, one bit each.
  __device__ uint64_t seeing(int medium) const {
    uint64_t bits = 0;
    for (int i = 0; i < rows / 32; ++i) bits |= uint64_t(__ballot_sync(~0u, media[i].holds(medium))) << i * 32;
    return bits;
  }
  __device__ uint64_t sighted() const {
    uint64_t bits = 0;
    for (int i = 0; i < rows / 32; ++i)
      bits |= uint64_t(__ballot_sync(~0u, media[i].begin < media[i].end)) << i * 32;
    return bits;
  }
  // Those that average all values.
  __device__ uint64_t averaging() const {
    uint64_t bits = 0;
    for (int i = 0; i < rows / 32; ++i) bits |= uint64_t(__ballot_sync(~0u, media[i].end < 0)) << i * 32;
    return bits;
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

// Whether the rows of a fragment are among those of `bits`.
struct Here {
  bool upper, lower;
  __device__ explicit Here(uint64_t bits)
      : upper(bits >> (first_row_of_warp() + fragment_row(0)) & 1),
        lower(bits >> (first_row_of_warp() + fragment_row(2)) & 1) {}
  __device__ bool operator[](int half) const { return half ? lower : upper; }
};

// Turns scores, which are not scaled yet, so that the highest weighs the most; of keys that are not real they are -inf.
template <int n>
__device__ inline void turn_scores(float (&scores)[n][4], float sign, int real) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; ++i) scores[j][i] = fragment_column(j, i) < real ? scores[j][i] * sign : -kInfinity;
}

// The tiles that one of equal parts visits.
__device__ inline Range part_of(Range tiles, int part, int parts) {
  const int each = divide_up(tiles.end - tiles.begin, parts), begin = tiles.begin + part * each;
  return {begin, min(begin + each, tiles.end)};
}

// The softmax of 16 rows over the tiles of keys seen so far, and its product with their values.
template <int columns>
struct OnlineSoftmax {
  float highest[2] = {-kInfinity, -kInfinity}, total[2] = {}, shrink[2];
  float product[columns / 8][4] = {};

  // Makes weights of the scores of another tile. Rows that are not here keep what they have.
  template <int n>
  __device__ void weigh(float (&scores)[n][4], float scale, Here here) {
    for (int half = 0; half < 2; ++half) {
      const float higher = fmaxf(highest[half], row_max(scores, half));
      shrink[half] = power_below(highest[half], higher, scale);
      for (int j = 0; j < n; ++j)
        for (int i = 2 * half; i < 2 * half + 2; ++i) scores[j][i] = power_below(scores[j][i], higher, scale);
      const float sum = row_sum(scores, half);
      if (!here[half]) continue;
      total[half] = total[half] * shrink[half] + sum;
      highest[half] = higher;
    }
  }
  // Takes in 32 columns of the product of those weights. Selected, not multiplied by 0: 0 * NaN is NaN.
  __device__ void add(const float (&added)[4][4], int column, Here here) {
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 4; ++i)
        if (here[i / 2])
          product[column / 8 + j][i] = product[column / 8 + j][i] * shrink[i / 2] + added[j][i];
  }
};

// The next tile of keys, from `tile` on, that a row of these sees.
template <class T, class Params, int rows>
__device__ inline int next_seen(const Params& p, const Place& place, const Spans<rows>& spans, int tile, int end) {
  while (tile < end && !spans.seeing(keys_of<T>(p, place.batch, place.kv_head, tile).medium)) ++tile;
  return tile;
}

// Multiplies the rows of a fragment that are `kept`, and makes the others 0 (selected: 0 * NaN is NaN).
template <int n>
__device__ inline void scale_rows(float (&c)[n][4], float factor, const Here& kept) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; ++i) c[j][i] = kept[i / 2] ? c[j][i] * factor : 0.0f;
}

// Writes a fragment to the rows of `real`.
template <class T, int n>
__device__ inline void store_fragment(HeadRows<T> to, const float (&c)[n][4], uint64_t real) {
#pragma unroll
  for (int j = 0; j < n; j += 4) {
    float part[4][4];
    memcpy(part, c[j], sizeof part);
    store(to, part, j * 8, real);
  }
}

// Divides by the sums of the softmax, and writes the rows and what the backward pass needs of their softmax.
template <class T, int columns, class Params>
__device__ inline void store_out(
    const Params& p, const Place& place, int64_t first, const Here& sees, OnlineSoftmax<columns>& softmax) {
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + first_row_of_warp() + fragment_row(2 * half);
    const float total = sees[half] ? softmax.total[half] : 1.0f, share = 1 / total;
    for (int j = 0; j < columns / 8; ++j)
      for (int i = 2 * half; i < 2 * half + 2; ++i) softmax.product[j][i] *= share;
    if (!p.softmax_max || lane() % 4 || row >= p.length) continue;
    const int64_t at = number_of(p, place.part * p.batch + place.batch, place.head, row);
    p.softmax_max[at] = sees[half] ? softmax.highest[half] * p.sign : 0.0f;
    p.softmax_sum[at] = total;
  }
  const uint64_t rows = first_rows(min(p.length - first, int64_t(64)));
  if (p.parts > 1)
    store_fragment(partial_rows(p, place, first), softmax.product, rows);
  else
    store_fragment(
        rows_from<T>(p.out, place.batch, place.head, first, p.head_dim), softmax.product, rows);
}

// How many blocks the registers of a multiprocessor hold at least: as many as spill nothing.
template <int columns>
constexpr int kForwardBlocks = columns <= 64 ? 3 : 2;
template <int columns>
constexpr int kRowsBlocks = columns <= 64 ? 3 : 2;
constexpr int kKeysBlocks = 2;

// KiB of shared memory of a multiprocessor. Of the least, that of sm_86, 89 and 120, a block may have 99.
constexpr size_t kSharedOf80 = 164, kSharedOf90 = 228;
constexpr size_t kLeastShared = 99 * 1024;

// How many blocks fit into it: each takes 1 KiB more than it asks for.
__host__ __device__ constexpr int fitting(size_t shared, size_t bytes) { return int(shared * 1024 / (bytes + 1024)); }

template <class T, int columns>
constexpr size_t kForwardBytes = 3 * Tile<T, columns>::kBytes + Tile<T, kTile<T>>::kBytes;

// A block takes a tile of rows through the keys that they see. Those of the next tile are under way meanwhile.
template <class T, int columns, class Params>
__global__ void __launch_bounds__(kThreads<T>, kForwardBlocks<columns>) attention_fwd_kernel(Params p) {
  static_assert(kForwardBytes<T, columns> <= kLeastShared);
  static_assert(fitting(kSharedOf80, kForwardBytes<T, columns>) >= kForwardBlocks<columns>);
  Arena arena = {static_cast<char*>(shared_memory())};
  const auto q = arena.take<Tile<T, columns>>(), k = arena.take<Tile<T, columns>>(), v = arena.take<Tile<T, columns>>();
  const auto weights = arena.take<Tile<T, kTile<T>>>();
  const Place place = place_of_rows<kTile<T>>(p);
  const int64_t first = int64_t(place.tile) * kTile<T>;
  const Spans<kTile<T>> spans(p, place.batch, first, p.length);
  const Range tiles = part_of(key_tiles<kTile<T>>(p, place, spans.all()), place.part, p.parts);
  load(q, rows_from<const T>(p.q, place.batch, place.head, first, p.head_dim), spans.sighted());

  OnlineSoftmax<columns> softmax;
  int tile = next_seen<T>(p, place, spans, tiles.begin, tiles.end);
  Keys<T> keys = keys_of<T>(p, place.batch, place.kv_head, tile);
  if (tile < tiles.end) load(k, keys.k, first_rows(keys.real));
  commit_copies();
  if (tile < tiles.end) load(v, keys.v, first_rows(keys.real));
  commit_copies();
  while (tile < tiles.end) {
    const Here here(spans.seeing(keys.medium));
    const int real = keys.real;
    tile = next_seen<T>(p, place, spans, tile + 1, tiles.end);
    keys = keys_of<T>(p, place.batch, place.kv_head, tile);
    wait_for_copies<1>();
    __syncthreads();  // k is there
    float scores[kTile<T> / 8][4] = {};
    multiply<false, true>(scores, q, k);
    turn_scores(scores, p.sign, real);
    softmax.weigh(scores, p.base2_scale, here);
    put(weights, scores);
    wait_for_copies<0>();
    __syncthreads();  // v is there, and k is free
    if (tile < tiles.end) load(k, keys.k, first_rows(keys.real));
    commit_copies();
#pragma unroll
    for (int column = 0; column < columns; column += 32) {
      float added[4][4] = {};
      multiply<false, false>(added, weights, v, column);
      softmax.add(added, column, here);
    }
    __syncthreads();  // v is free
    if (tile < tiles.end) load(v, keys.v, first_rows(keys.real));
    commit_copies();
  }
  wait_for_copies<0>();  // of q, where no tile was visited: `finish` takes its place
  finish<T>(p, place, spans, softmax);
  store_out<T>(p, place, first, Here(spans.sighted()), softmax);
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

// What the backward pass needs of the two rows that a lane has a part of.
struct RowNumbers {
  float highest[2], share[2], delta[2];

  // As the forward pass left them.
  __device__ void read_softmax(const Attention& p, int64_t batch, int64_t head, int64_t first, const Here& here) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = place_of(p, batch, head, first, here, half);
      highest[half] = p.softmax_max[at] * p.sign, share[half] = 1 / p.softmax_sum[at];
    }
  }
  // As the kernel by rows left it.
  __device__ void read_delta(const Attention& p, int64_t batch, int64_t head, int64_t first, const Here& here) {
    for (int half = 0; half < 2; ++half) delta[half] = p.delta[place_of(p, batch, head, first, here, half)];
  }

 private:
  // Of a row that is not here, any that exists.
  __device__ static int64_t place_of(
      const Attention& p, int64_t batch, int64_t head, int64_t first, const Here& here, int half) {
    return number_of(p, batch, head, here[half] ? first + first_row_of_warp() + fragment_row(2 * half) : 0);
  }
};

// The rows in which one key weighs more than all others, one bit each. Every warp knows it of all of them.
template <int rows>
__device__ inline uint64_t saturated_rows(const Attention& p, const Place& place, int64_t first, uint64_t sighted) {
  uint64_t bits = 0;
  for (int i = 0; i < rows / 32; ++i) {
    const int row = i * 32 + lane();
    // relative to the weight of the highest
    const bool saturated = sighted >> row & 1 && p.softmax_sum[number_of(p, place.batch, place.head, first + row)] < 2;
    bits |= uint64_t(__ballot_sync(~0u, saturated)) << i * 32;
  }
  return bits;
}

// Makes weights P of scores; in rows that are not here they are 0.
template <int n>
__device__ inline void weigh(float (&scores)[n][4], float scale, const RowNumbers& numbers, const Here& here) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; ++i) {
      const float weight = exp2f((scores[j][i] - numbers.highest[i / 2]) * scale) * numbers.share[i / 2];
      scores[j][i] = here[i / 2] ? weight : 0.0f;
    }
}

// The same where these keys are all that the rows see.
template <int n>
__device__ inline void weigh_alone(float (&scores)[n][4], float scale, const Here& here) {
  RowNumbers numbers;
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
    numbers.highest[half] = row_max(scores, half);
    for (int j = 0; j < n; ++j)
      for (int i = 2 * half; i < 2 * half + 2; ++i) sum += exp2f((scores[j][i] - numbers.highest[half]) * scale);
    numbers.share[half] = 1 / quad_sum(sum);
  }
  weigh(scores, scale, numbers, here);
}

// delta = rowsum(P dP), where these keys are all that the rows see. A lane reads the weights that it has put there.
template <class T, int n>
__device__ inline void sum_along(RowNumbers& numbers, Tile<T, kTile<T>> weights, const float (&dweights)[n][4]) {
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
    for (int j = 0; j < n; ++j)
      for (int i = 2 * half; i < 2 * half + 2; ++i) sum += got(weights, j, i) * dweights[j][i];
    numbers.delta[half] = quad_sum(sum);
  }
}

// Adds a tile's share of rowsum(P dP), what this lane has of it, for the rows that are here: 0 * NaN is NaN.
template <int n>
__device__ inline void add_along(
    float (&sums)[2], const float (&weights)[n][4], const float (&dweights)[n][4], const Here& here) {
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
    for (int j = 0; j < n; ++j)
      for (int i = 2 * half; i < 2 * half + 2; ++i) sum += weights[j][i] * dweights[j][i];
    if (here[half]) sums[half] += sum;
  }
}

// Makes dS of dout v^T. From the tile, as registers are short, the weights come as the products take them.
template <class T, int n>
__device__ inline void differentiate(
    float (&dweights)[n][4], Tile<T, kTile<T>> weights, const RowNumbers& numbers, const Here& here) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 4; ++i) {
      const float dscore = got(weights, j, i) * (dweights[j][i] - numbers.delta[i / 2]);
      dweights[j][i] = here[i / 2] ? dscore : 0.0f;
    }
}

// dq += dS k for the rows that are here: not multiplied by 0, as 0 * NaN is NaN.
template <class T, int columns>
__device__ inline void add_product(
    float (&dq)[columns / 8][4], Tile<T, kTile<T>> dscores, Tile<T, columns> k, const Here& here) {
#pragma unroll
  for (int j = 0; j < columns / 8; j += 4) {
    float added[4][4] = {};
    multiply<false, false>(added, dscores, k, j * 8);
    for (int m = 0; m < 4; ++m)
      for (int i = 0; i < 4; ++i) dq[j + m][i] = here[i / 2] ? dq[j + m][i] + added[m][i] : dq[j + m][i];
  }
}

// Writes the warp's rows of factor * a b (of a^T b), or 0 where they are not `kept`; only `real` rows are written.
template <bool a_transposed, class T, int columns>
__device__ inline void store_product(
    HeadRows<T> to, Tile<T, kTile<T>> a, Tile<T, columns> b, float factor, uint64_t kept, uint64_t real) {
#pragma unroll(sizeof(T) == 2 ? columns / 32 : 1)  // registers are short in float32
  for (int column = 0; column < columns; column += 32) {
    float product[4][4] = {};
    multiply<a_transposed, false>(product, a, b, column);
    scale_rows(product, factor, Here(kept));
    store(to, product, column, real);
  }
}

// Writes dk and dv of the block's keys, or its part of them.
template <class T, int columns, class Params>
__device__ inline void store_key_gradients(
    const Params& p, const Place& place, const Keys<T>& keys, float (&dk)[columns][4], float (&dv)[columns][4]) {
  const uint64_t count = first_rows(keys.count);
  scale_rows(dk, p.scale, Here(first_rows(keys.real)));
  scale_rows(dv, 1.0f, Here(first_rows(keys.real)));
  if constexpr (requires { partial_gradients_of(p, place, 0, 0); }) {
    if (p.parts > 1) {
      const KeyGradients<float> to = partial_gradients_of(p, place, keys.medium, keys.first);
      store_fragment(to.dk, dk, count);
      store_fragment(to.dv, dv, count);
      return;
    }
  }
  const KeyGradients<T> to = gradients_of<T>(p, place.batch, place.kv_head, keys);
  store_fragment(to.dk, dk, count);
  store_fragment(to.dv, dv, count);
}

template <class T, int columns, bool apart>
constexpr size_t kBackwardBytes = 4 * Tile<T, columns>::kBytes + (apart ? 2 : 1) * Tile<T, kTile<T>>::kBytes;

// What a block of either backward kernel has in shared memory. `apart`: the weights are needed after dS is there.
template <class T, int columns>
struct BackwardTiles {
  Tile<T, columns> q, dout, k, v;
  Tile<T, kTile<T>> weights, dscores;
};

template <class T, int columns, bool apart>
__device__ inline BackwardTiles<T, columns> backward_tiles() {
  static_assert(kBackwardBytes<T, columns, apart> <= kLeastShared);
  Arena arena = {static_cast<char*>(shared_memory())};
  using Wide = Tile<T, columns>;
  using Square = Tile<T, kTile<T>>;
  const Wide q = arena.take<Wide>(), dout = arena.take<Wide>(), k = arena.take<Wide>(), v = arena.take<Wide>();
  const Square weights = arena.take<Square>();
  return {q, dout, k, v, weights, apart ? arena.take<Square>() : weights};
}

// A block takes a tile of rows through the keys that they see, for dq. `whole`: no other block has rows that see these
// keys, so it writes dk and dv on the way.
template <class T, int columns, bool whole, class Params>
__global__ void __launch_bounds__(kThreads<T>, kRowsBlocks<columns>) attention_bwd_rows_kernel(Params p) {
  static_assert(fitting(whole ? kSharedOf90 : kSharedOf80, kBackwardBytes<T, columns, whole>) >= kRowsBlocks<columns>);
  const auto [q, dout, k, v, weights, dscores] = backward_tiles<T, columns, whole>();
  const Place place = place_of_rows<kTile<T>>(p);
  const int64_t first = int64_t(place.tile) * kTile<T>;
  const Spans<kTile<T>> spans(p, place.batch, first, p.length);
  const Range all = key_tiles<kTile<T>>(p, place, spans.all()), tiles = part_of(all, place.part, p.parts);
  const uint64_t rows = first_rows(min(p.length - first, int64_t(64))), sighted = spans.sighted();

  load(q, rows_from<const T>(p.q, place.batch, place.head, first, p.head_dim), sighted);
  load(dout, rows_from<const T>(p.dout, place.batch, place.head, first, p.head_dim), sighted);
  load(k, rows_from<const T>(p.out, place.batch, place.head, first, p.head_dim), sighted);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  RowNumbers numbers;
  numbers.read_softmax(p, place.batch, place.head, first, Here(sighted));
  for (int half = 0; half < 2; ++half) numbers.delta[half] = row_dot(dout, k, half);
  const auto load_keys = [&](const Keys<T>& keys) {
    __syncthreads();  // k and v are free
    load(k, keys.k, first_rows(keys.real));
    load(v, keys.v, first_rows(keys.real));
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
  };

  // Where one key has most of a row's weight its dP cancels against delta: from the rounded out it would not.
  if (const uint64_t saturated = saturated_rows<kTile<T>>(p, place, first, sighted)) {
    float sums[2] = {};
    for (int tile = all.begin; (tile = next_seen<T>(p, place, spans, tile, all.end)) < all.end; ++tile) {
      const Keys<T> keys = keys_of<T>(p, place.batch, place.kv_head, tile);
      const Here here(spans.seeing(keys.medium));
      load_keys(keys);
      float scores[kTile<T> / 8][4] = {}, dweights[kTile<T> / 8][4] = {};
      multiply<false, true>(scores, q, k);
      turn_scores(scores, p.sign, keys.real);
      weigh(scores, p.base2_scale, numbers, here);
      multiply<false, true>(dweights, dout, v);
      add_along(sums, scores, dweights, here);
    }
    const Here exact(saturated);
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(sums[half]);
      if (exact[half]) numbers.delta[half] = sum;
    }
  }
  for (int half = 0; half < 2; ++half) {
    const int row = first_row_of_warp() + fragment_row(2 * half);
    if (!whole && place.part == 0 && lane() % 4 == 0 && (rows >> row & 1))
      p.delta[number_of(p, place.batch, place.head, first + row)] = numbers.delta[half];
  }

  float dq[columns / 8][4] = {};
  for (int tile = tiles.begin; (tile = next_seen<T>(p, place, spans, tile, tiles.end)) < tiles.end; ++tile) {
    const Keys<T> keys = keys_of<T>(p, place.batch, place.kv_head, tile);
    const Here here(spans.seeing(keys.medium));
    load_keys(keys);
    float scores[kTile<T> / 8][4] = {}, dweights[kTile<T> / 8][4] = {};
    multiply<false, true>(scores, q, k);
    turn_scores(scores, p.sign, keys.real);
    weigh(scores, p.base2_scale, numbers, here);
    put(weights, scores);
    multiply<false, true>(dweights, dout, v);
    differentiate(dweights, weights, numbers, here);
    put(dscores, dweights);
    whole ? __syncthreads() : __syncwarp();
    add_product(dq, dscores, k, here);
    if constexpr (whole) {
      const KeyGradients<T> to = gradients_of<T>(p, place.batch, place.kv_head, keys);
      const uint64_t real = first_rows(keys.real), count = first_rows(keys.count);
      store_product<true>(to.dv, weights, dout, 1.0f, real, count);
      store_product<true>(to.dk, dscores, q, p.scale, real, count);
    }
  }
  scale_rows(dq, p.scale, Here(~0ull));
  if (p.parts > 1)
    store_fragment(partial_rows(p, place, first), dq, rows);
  else
    store_fragment(rows_from<T>(p.dq, place.batch, place.head, first, p.head_dim), dq, rows);
  if constexpr (whole) finish<T>(p, place);
}

// A block takes a tile of keys through the rows that see it, for dk and dv. `one_shot`: the rows see nothing else, so
// it makes their softmax anew and writes their dq.
template <class T, int columns, bool one_shot, class Params>
__global__ void __launch_bounds__(kThreads<T>, kKeysBlocks) attention_bwd_keys_kernel(Params p) {
  static_assert(fitting(kSharedOf90, kBackwardBytes<T, columns, true>) >= kKeysBlocks);
  const auto [q, dout, k, v, weights, dscores] = backward_tiles<T, columns, true>();
  const Place place = place_of_keys<kTile<T>>(p);
  const Keys<T> keys = owned_keys<T>(p, place);
  load(k, keys.k, first_rows(keys.real));
  load(v, keys.v, first_rows(keys.real));

  float dk[columns / 8][4] = {}, dv[columns / 8][4] = {};  // of the 16 keys of this warp
  first_gradients(p, place, dv);
  const Range range = keys.real > 0 ? rows_of<kTile<T>>(p, place.batch, keys.medium, place.part) : Range{0, 0};
  const int group = p.heads / p.kv_heads;
  for (int head = place.kv_head * group; head < (place.kv_head + 1) * group; ++head)
    for (int first = range.begin; first < range.end; first += kTile<T>) {
      const uint64_t rows = Spans<kTile<T>>(p, place.batch, first, range.end).seeing(keys.medium);
      const Here here(rows);
      __syncthreads();  // q, dout, weights and dscores are free
      load(q, rows_from<const T>(p.q, place.batch, head, first, p.head_dim), rows);
      load(dout, rows_from<const T>(p.dout, place.batch, head, first, p.head_dim), rows);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      float scores[kTile<T> / 8][4] = {}, dweights[kTile<T> / 8][4] = {};
      multiply<false, true>(scores, q, k);
      turn_scores(scores, p.sign, keys.real);
      RowNumbers numbers;
      if constexpr (one_shot) {
        weigh_alone(scores, p.base2_scale, here);
      } else {
        numbers.read_softmax(p, place.batch, head, first, here);
        numbers.read_delta(p, place.batch, head, first, here);
        weigh(scores, p.base2_scale, numbers, here);
      }
      put(weights, scores);
      multiply<false, true>(dweights, dout, v);
      if constexpr (one_shot) sum_along(numbers, weights, dweights);
      differentiate(dweights, weights, numbers, here);
      put(dscores, dweights);
      __syncthreads();
      if constexpr (one_shot) {
        const auto dq = rows_from<T>(p.dq, place.batch, head, first, p.head_dim);
        store_product<false>(dq, dscores, k, p.scale, ~0ull, rows);
      }
      multiply<true, false>(dv, weights, dout);
      multiply<true, false>(dk, dscores, q);
    }
  commit_copies();
  wait_for_copies<0>();  // of k and v, where no row sees them
  store_key_gradients<T>(p, place, keys, dk, dv);
  if constexpr (one_shot) finish<T>(p, place);
}

inline int tile_of(DType dtype) { return dtype == DType::f32 ? kTile<float> : kTile<bf16>; }

// Calls a function with an element type and the columns of the tiles that hold a head.
template <class Function>
void by_tile(const Attention& p, Function function) {
  by_type(p.dtype, [&](auto type) {
    if (p.head_dim <= 64) return function(type, std::integral_constant<int, 64>());
    if (p.head_dim <= 96) return function(type, std::integral_constant<int, 96>());
    function(type, std::integral_constant<int, 128>());
  });
}

// How many parts to cut each of `programs` equal tasks into, at most `most`, to fill the device twice.
inline int64_t parts_of(int64_t programs, int64_t most) {
  const int64_t wanted = 2 * multiprocessors() / max(programs, int64_t(1));
  return max(int64_t(1), min(wanted, most));
}

}  // namespace flamingo_kernels
