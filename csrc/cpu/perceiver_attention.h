// Latents attend to two segments of keys, media and latents, read where they lie.
//
// Oracle: flamingo_kernels/ops/perceiver_attention/reference.py. A task is one head of one clip: forward reads k and v
// once per 96 latents (in tiles, 128) with an online softmax, and q and writes out once, 4 FLOPs per (latent, visible
// key, channel); backward reads q, k, v, out and dout and writes dq, dk and dv once, keeping dq in cache, 10 FLOPs (4
// more for rows in which one key has most of the weight).
#pragma once

#include "attention.h"

namespace flamingo_kernels::FK_ISA::perceiver_attention {

using Params = PerceiverAttention;

template <class T>
constexpr int64_t most_keys = in_tiles<T> ? 256 : 128;  // in flight

template <class T>
FK_INLINE Strided<T> keys_of(const Rows& keys, int64_t n, int64_t h, int64_t first) {
  return {rows_of<T>(keys, n, h)[first], keys.row};
}

FK_INLINE int64_t visible_keys(const Params& params, int64_t n, int segment) {
  const int64_t all = params.keys[segment];
  if (segment == 1 || !params.media_lengths) return all;
  const int64_t length = params.media_lengths[n];
  return length < 0 ? 0 : length < all ? length : all;
}

// Packs `count` keys of a segment and their values.
template <class T, class Block>
FK_INLINE void pack(
    Block& block, const Params& params, int64_t n, int64_t hk, int segment, int64_t first, int64_t count) {
  block.pack(
      keys_of<const T>(params.k[segment], n, hk, first), keys_of<const T>(params.v[segment], n, hk, first), count);
}

// Calls `visit(segment, first, count)` with the visible keys of a clip, `most_keys` at a time.
template <class T, class Visit>
FK_INLINE void visit_keys(const Params& params, int64_t n, Visit visit) {
  for (int segment = 0; segment < 2; ++segment) {
    const int64_t end = visible_keys(params, n, segment);
    for (int64_t first = 0; first < end; first += most_keys<T>)
      visit(segment, first, first + most_keys<T> < end ? most_keys<T> : end - first);
  }
}

template <class T>
struct Forward {
  KeyBlock<T> block;
  QueryTile<T> tile;
  OnlineSoftmax<T> online;

  Forward(Scratch& scratch, const Params& params)
      : block(scratch, most_keys<T>, params.head_dim),
        tile(scratch, most_keys<T>, params.head_dim),
        online(scratch, params.head_dim) {}

  static int64_t tasks(const Params& params) { return params.batch * params.heads; }

  void run(const Params& params, int64_t task) {
    const int64_t h = task % params.heads, n = task / params.heads;
    constexpr int64_t most = OnlineSoftmax<T>::most;
    for (int64_t begin = 0; begin < params.length; begin += most)
      attend_rows(params, n, h, begin, begin + most < params.length ? begin + most : params.length);
  }

  void attend_rows(const Params& params, int64_t n, int64_t h, int64_t begin, int64_t end) {
    const int64_t hk = h / (params.heads / params.kv_heads);
    Strided<const T> q = rows_of<const T>(params.q, n, h);
    Strided<T> out = rows_of<T>(params.out, n, h);
    online.reset(end - begin);
    visit_keys<T>(params, n, [&](int segment, int64_t first, int64_t count) {
      pack<T>(block, params, n, hk, segment, first, count);
      prefetch_next_block(params, n, hk, segment, first + count);
      for (int64_t t = begin; t < end; t += forward_rows<T>) {
        int64_t members[forward_rows<T>];
        tile.count = 0;
        for (int64_t i = t; i < t + forward_rows<T> && i < end; ++i) {
          members[tile.count] = i - begin;
          tile.add(q[i]);
        }
        online.attend(tile, block, params.scale, members);
      }
    });
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t - begin;
      write_row(out[t], online.acc + i * online.row, params.head_dim, 1 / online.row_sum[i]);
      const int64_t row = (n * params.heads + h) * params.length + t;
      params.row_max[row] = online.row_max[i], params.row_sum[row] = online.row_sum[i];
    }
  }

  // The next block of this segment, or of the next segment, or of the next head, while this one is computed: two keys
  // and two values for each row.
  void prefetch_next_block(const Params& params, int64_t n, int64_t hk, int segment, int64_t first) {
    if (first >= visible_keys(params, n, segment)) {
      first = 0;
      if (segment == 1 && ++hk == params.kv_heads) return;
      segment = 1 - segment;
    }
    const int64_t left = visible_keys(params, n, segment) - first, half = most_keys<T> / 2;
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t from = first + i * half, count = left - i * half;
      tile.prefetch.plan(i, keys_of<const T>(params.k[segment], n, hk, from), count < half ? count : half);
      tile.prefetch.plan(2 + i, keys_of<const T>(params.v[segment], n, hk, from), count < half ? count : half);
    }
  }
};

// One key/value head of one clip: every gradient of it and of the query heads that read it.
template <class T>
struct Backward {
  KeyGradients<T> block;
  GradientTile<T> tile;
  int64_t head_rows;
  float* dq;     // [query heads of the group][R, in whole tiles][d]
  float* delta;  // [query heads of the group][R]

  Backward(Scratch& scratch, const Params& params)
      : block(scratch, most_keys<T>, params.head_dim),
        tile(scratch, most_keys<T>, params.head_dim),
        head_rows(round_up(params.length, DotFor<T>::rows)),
        dq(scratch.take(params.heads / params.kv_heads * head_rows * padded(params.head_dim))),
        delta(scratch.take(params.heads / params.kv_heads * head_rows)) {}

  static int64_t tasks(const Params& params) { return params.batch * params.kv_heads; }

  void run(const Params& params, int64_t task) {
    const int64_t hk = task % params.kv_heads, n = task / params.kv_heads, group = params.heads / params.kv_heads;
    const int64_t row = padded(params.head_dim);
    for (int64_t i = 0; i < group * head_rows * row; ++i) dq[i] = 0;
    find_delta(params, n, hk);
    visit_keys<T>(params, n, [&](int segment, int64_t first, int64_t count) {
      pack<T>(block, params, n, hk, segment, first, count);
      block.reset();
      for (int64_t g = 0; g < group; ++g)
        collect(params, n, hk * group + g, delta + g * head_rows, dq + g * head_rows * row);
      block.write(keys_of<T>(params.dk[segment], n, hk, first), keys_of<T>(params.dv[segment], n, hk, first));
    });
    for (int64_t g = 0; g < group; ++g)
      for (int64_t t = 0; t < params.length; ++t)
        write_row(rows_of<T>(params.dq, n, hk * group + g)[t], dq + (g * head_rows + t) * row, params.head_dim, 1);
    clear_hidden_keys(params, n, hk);
  }

  void find_delta(const Params& params, int64_t n, int64_t hk) {
    const int64_t group = params.heads / params.kv_heads;
    bool any_saturated = false;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = hk * group + g, row = (n * params.heads + h) * params.length;
      Strided<const T> dout = rows_of<const T>(params.dout, n, h), out = rows_of<const T>(params.out, n, h);
      for (int64_t t = 0; t < params.length; ++t) {
        const bool saturated = is_saturated(params.row_sum[row + t]);
        delta[g * head_rows + t] = saturated ? 0 : row_delta(dout[t], out[t], params.head_dim);
        any_saturated |= saturated;
      }
    }
    if (!any_saturated) return;
    visit_keys<T>(params, n, [&](int segment, int64_t first, int64_t count) {
      pack<T>(block, params, n, hk, segment, first, count);
      for (int64_t g = 0; g < group; ++g) add_saturated_deltas(params, n, hk * group + g, delta + g * head_rows);
    });
  }

  // Adds a block's terms to the delta of saturated rows.
  void add_saturated_deltas(const Params& params, int64_t n, int64_t h, float* head_delta) {
    const int64_t row = (n * params.heads + h) * params.length;
    const auto saturated = [&](int64_t t) { return is_saturated(params.row_sum[row + t]); };
    visit_rows<backward_rows<T>>(0, params.length, saturated, [&](const int64_t* rows, int64_t count) {
      tile.count = 0;
      for (int64_t i = 0; i < count; ++i) add_row(params, n, h, rows[i], head_delta);
      tile.add_delta(block, params.scale);
      for (int64_t i = 0; i < count; ++i) head_delta[rows[i]] = tile.delta[i];
    });
  }

  void add_row(const Params& params, int64_t n, int64_t h, int64_t t, const float* head_delta) {
    const int64_t row = (n * params.heads + h) * params.length + t;
    tile.add(
        rows_of<const T>(params.q, n, h)[t], rows_of<const T>(params.dout, n, h)[t], head_delta[t], params.row_max[row],
        params.row_sum[row]);
  }

  void collect(const Params& params, int64_t n, int64_t h, const float* head_delta, float* head_dq) {
    for (int64_t begin = 0; begin < params.length; begin += backward_rows<T>) {
      tile.count = 0;
      for (int64_t t = begin; t < begin + backward_rows<T> && t < params.length; ++t)
        add_row(params, n, h, t, head_delta);
      tile.compute_p_ds(block, params.scale);
      tile.add_dk_dv(block);
      tile.template multiply_dq<true>(block, head_dq + begin * padded(params.head_dim));
    }
  }

  // Keys beyond a clip's length have no gradient.
  void clear_hidden_keys(const Params& params, int64_t n, int64_t hk) {
    for (int64_t s = visible_keys(params, n, 0); s < params.keys[0]; ++s)
      for (const Rows& gradient : {params.dk[0], params.dv[0]})
        for (int64_t j = 0; j < params.head_dim; j += width)
          store(keys_of<T>(gradient, n, hk, s).data + j, Floats{}, params.head_dim - j);
  }
};

}  // namespace flamingo_kernels::FK_ISA::perceiver_attention
