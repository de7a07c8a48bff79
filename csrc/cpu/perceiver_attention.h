// Latents attend to two segments of keys, media and latents, read where they lie.
//
// Oracle: flamingo_kernels/ops/perceiver_attention/reference.py. A task is one head of one clip: forward
// reads k and v once per 96 latents (in tiles, 128) with an online softmax, 4 FLOPs per (latent, key,
// channel); backward reads them once, writes dk and dv once and keeps dq in cache, 10 FLOPs.
#pragma once

#include "attention.h"

namespace flamingo_kernels::FK_ISA::perceiver_attention {

using Params = PerceiverAttention;

template <class T>
constexpr int64_t most_keys = in_tiles<T> ? 256 : 128;  // in flight

template <class T>
FK_INLINE Strided<T> rows_of(const Rows& rows, int64_t n, int64_t h) {
  return {(T*)rows.data + n * rows.batch + h * rows.head, rows.row};
}

template <class T>
FK_INLINE Strided<T> keys_of(const Rows& keys, int64_t n, int64_t h, int64_t first) {
  return {rows_of<T>(keys, n, h)[first], keys.row};
}

FK_INLINE int64_t visible_keys(const Params& p, int64_t n, int segment) {
  const int64_t all = p.keys[segment];
  if (segment == 1 || !p.media_lengths) return all;
  const int64_t length = p.media_lengths[n];
  return length < 0 ? 0 : length < all ? length : all;
}

// Call `visit(segment, first, count)` with the visible keys of a clip, `most_keys` at a time.
template <class T, class Visit>
FK_INLINE void visit_keys(const Params& p, int64_t n, Visit visit) {
  for (int segment = 0; segment < 2; ++segment) {
    const int64_t end = visible_keys(p, n, segment);
    for (int64_t first = 0; first < end; first += most_keys<T>)
      visit(segment, first, first + most_keys<T> < end ? most_keys<T> : end - first);
  }
}

template <class T>
struct Forward {
  KeyBlock<T> block;
  QueryTile<T> tile;
  RunningRows<T> running;

  Forward(Scratch& scratch, const Params& p)
      : block(scratch, most_keys<T>, p.head_dim),
        tile(scratch, most_keys<T>, p.head_dim),
        running(scratch, p.head_dim) {}

  static int64_t tasks(const Params& p) { return p.batch * p.heads; }

  void run(const Params& p, int64_t task) {
    const int64_t h = task % p.heads, n = task / p.heads;
    constexpr int64_t most = RunningRows<T>::most;
    for (int64_t begin = 0; begin < p.length; begin += most)
      attend_rows(p, n, h, begin, begin + most < p.length ? begin + most : p.length);
  }

  void attend_rows(const Params& p, int64_t n, int64_t h, int64_t begin, int64_t end) {
    const int64_t hk = h / (p.heads / p.kv_heads);
    Strided<const T> q = rows_of<const T>(p.q, n, h);
    Strided<T> out = rows_of<T>(p.out, n, h);
    running.reset(end - begin);
    visit_keys<T>(p, n, [&](int segment, int64_t first, int64_t count) {
      block.pack(
          keys_of<const T>(p.k[segment], n, hk, first), keys_of<const T>(p.v[segment], n, hk, first), count);
      fetch_ahead(p, n, hk, segment, first + count);
      for (int64_t t = begin; t < end; t += forward_rows<T>) {
        int64_t members[forward_rows<T>];
        tile.count = 0;
        for (int64_t i = t; i < t + forward_rows<T> && i < end; ++i) {
          members[tile.count] = i - begin;
          tile.add(q[i]);
        }
        running.attend(tile, block, p.scale, members);
      }
    });
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t - begin;
      write_row(out[t], running.out + i * running.row, p.head_dim, share_of(running.max[i], running.sum[i]));
      const int64_t row = (n * p.heads + h) * p.length + t;
      p.softmax_max[row] = running.max[i], p.softmax_sum[row] = running.sum[i];
    }
  }

  // The next block, while this one is computed: two keys and two values for each row. It is the segment's,
  // or else the next segment's, or else the next head's.
  void fetch_ahead(const Params& p, int64_t n, int64_t hk, int segment, int64_t first) {
    if (first >= visible_keys(p, n, segment)) {
      first = 0;
      if (segment == 1 && ++hk == p.kv_heads) return;
      segment = 1 - segment;
    }
    const int64_t left = visible_keys(p, n, segment) - first, half = most_keys<T> / 2;
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t from = first + i * half, count = left - i * half;
      tile.ahead.plan(i, keys_of<const T>(p.k[segment], n, hk, from), count < half ? count : half);
      tile.ahead.plan(2 + i, keys_of<const T>(p.v[segment], n, hk, from), count < half ? count : half);
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

  Backward(Scratch& scratch, const Params& p)
      : block(scratch, most_keys<T>, p.head_dim),
        tile(scratch, most_keys<T>, p.head_dim),
        head_rows(round_up(p.length, DotOf<T>::type::rows)),
        dq(scratch.take(p.heads / p.kv_heads * head_rows * padded(p.head_dim))),
        delta(scratch.take(p.heads / p.kv_heads * head_rows)) {}

  static int64_t tasks(const Params& p) { return p.batch * p.kv_heads; }

  void run(const Params& p, int64_t task) {
    const int64_t hk = task % p.kv_heads, n = task / p.kv_heads, group = p.heads / p.kv_heads;
    const int64_t row = padded(p.head_dim);
    for (int64_t i = 0; i < group * head_rows * row; ++i) dq[i] = 0;
    find_delta(p, n, hk);
    visit_keys<T>(p, n, [&](int segment, int64_t first, int64_t count) {
      block.pack(
          keys_of<const T>(p.k[segment], n, hk, first), keys_of<const T>(p.v[segment], n, hk, first), count);
      block.reset();
      for (int64_t g = 0; g < group; ++g)
        collect(p, n, hk * group + g, delta + g * head_rows, dq + g * head_rows * row);
      block.write(keys_of<T>(p.dk[segment], n, hk, first), keys_of<T>(p.dv[segment], n, hk, first));
    });
    for (int64_t g = 0; g < group; ++g)
      for (int64_t t = 0; t < p.length; ++t)
        write_row(
            rows_of<T>(p.dq, n, hk * group + g)[t], dq + (g * head_rows + t) * row, p.head_dim, 1);
    clear_hidden_keys(p, n, hk);
  }

  void find_delta(const Params& p, int64_t n, int64_t hk) {
    const int64_t group = p.heads / p.kv_heads;
    bool any_sharp = false;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = hk * group + g, row = (n * p.heads + h) * p.length;
      Strided<const T> dout = rows_of<const T>(p.dout, n, h), out = rows_of<const T>(p.out, n, h);
      for (int64_t t = 0; t < p.length; ++t) {
        const bool sharp = is_sharp(p.softmax_sum[row + t]);
        delta[g * head_rows + t] = sharp ? 0 : row_delta(dout[t], out[t], p.head_dim);
        any_sharp |= sharp;
      }
    }
    if (!any_sharp) return;
    visit_keys<T>(p, n, [&](int segment, int64_t first, int64_t count) {
      block.pack(
          keys_of<const T>(p.k[segment], n, hk, first), keys_of<const T>(p.v[segment], n, hk, first), count);
      for (int64_t g = 0; g < group; ++g) add_sharp_deltas(p, n, hk * group + g, delta + g * head_rows);
    });
  }

  // What the block of keys has of the deltas of sharp rows.
  void add_sharp_deltas(const Params& p, int64_t n, int64_t h, float* head_delta) {
    const int64_t row = (n * p.heads + h) * p.length;
    const auto sharp = [&](int64_t t) { return is_sharp(p.softmax_sum[row + t]); };
    visit_rows<backward_rows<T>>(0, p.length, sharp, [&](const int64_t* rows, int64_t count) {
      tile.count = 0;
      for (int64_t i = 0; i < count; ++i) add_row(p, n, h, rows[i], head_delta);
      tile.add_delta(block, p.scale);
      for (int64_t i = 0; i < count; ++i) head_delta[rows[i]] = tile.delta[i];
    });
  }

  void add_row(const Params& p, int64_t n, int64_t h, int64_t t, const float* head_delta) {
    const int64_t row = (n * p.heads + h) * p.length + t;
    tile.add(
        rows_of<const T>(p.q, n, h)[t], rows_of<const T>(p.dout, n, h)[t], head_delta[t], p.softmax_max[row],
        p.softmax_sum[row]);
  }

  void collect(const Params& p, int64_t n, int64_t h, const float* head_delta, float* head_dq) {
    for (int64_t begin = 0; begin < p.length; begin += backward_rows<T>) {
      tile.count = 0;
      for (int64_t t = begin; t < begin + backward_rows<T> && t < p.length; ++t) add_row(p, n, h, t, head_delta);
      tile.differentiate(block, p.scale);
      tile.key_gradients(block);
      tile.template query_gradient<true>(block, head_dq + begin * padded(p.head_dim));
    }
  }

  // Keys beyond a clip's length have no gradient.
  void clear_hidden_keys(const Params& p, int64_t n, int64_t hk) {
    for (int64_t s = visible_keys(p, n, 0); s < p.keys[0]; ++s)
      for (const Rows& gradient : {p.dk[0], p.dv[0]})
        for (int64_t j = 0; j < p.head_dim; j += width)
          store(keys_of<T>(gradient, n, hk, s).data + j, Floats{}, p.head_dim - j);
  }
};

}  // namespace flamingo_kernels::FK_ISA::perceiver_attention
