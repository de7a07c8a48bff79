// The two steps every attention here is made of: query rows against a block of keys, forward and backward.
//
//   forward   S = scale Q K^T,  P = e^(S - max) / sum,  O = P V
//   backward  dP = dO V^T,  dS = scale P (dP - delta),  delta = rowsum(P dP) = rowsum(dO O),
//             dQ = dS K,  dK = dS^T Q,  dV = P^T dO
//
// Oracle: flamingo_kernels/ops/*/reference.py. Forward 4 FLOPs, backward 10 FLOPs per (row, key, channel);
// a block of keys is packed once and stays in the L1 or L2 cache for all rows that see it.
#pragma once

#include <cmath>

#include "gemm.h"
#include "params.h"

namespace flamingo_kernels::FK_ISA {

constexpr int64_t forward_rows = 24, backward_rows = 36;  // rows in flight: multiples of 6 and of 2

template <class T>
struct DotOf {
  using type = Single;
};
template <>
struct DotOf<BFloat16> {
  using type = std::conditional_t<has_pairs, Pairs, Single>;
};

template <class Dot>
constexpr int64_t words(int64_t elements) {
  return round_up(elements, Dot::lanes) / Dot::lanes;
}

template <class T>
struct Strided {  // rows of head_dim contiguous elements
  T* data;
  int64_t row;

  T* operator[](int64_t i) const { return data + i * row; }
};

// Rows wanted soon, fetched one at a time between rows of arithmetic: one head's rows lie a whole model
// width apart, which the processor does not foresee (measured: 10% of a forward pass).
template <class T>
struct Ahead {
  static constexpr int streams = 5;
  Strided<const T> rows[streams];
  int64_t left[streams] = {};

  void plan(int stream, Strided<const T> from, int64_t count) { rows[stream] = from, left[stream] = count; }

  FK_INLINE void fetch(int64_t head_dim) {
    for (int stream = 0; stream < streams; ++stream) {
      if (left[stream] <= 0) continue;
      for (int64_t j = 0; j < head_dim; j += 64 / sizeof(T)) __builtin_prefetch(rows[stream].data + j);
      rows[stream].data += rows[stream].row;
      --left[stream];
    }
  }
};

// Keys and values packed for the forward pass.
template <class T, class Dot = typename DotOf<T>::type>
struct KeyBlock {
  int64_t head_dim, k_row, v_row, keys = 0;
  float *k, *v;  // [words(d)][keys], [words(keys)][d]

  KeyBlock(Scratch& scratch, int64_t most_keys, int64_t d)
      : head_dim(d), k_row(padded(most_keys)), v_row(padded(d)) {
    k = scratch.take(words<Dot>(d) * k_row);
    v = scratch.take(words<Dot>(most_keys) * v_row);
  }

  void pack(Strided<const T> from_k, Strided<const T> from_v, int64_t count) {
    keys = count;
    pack_transposed<Dot>(from_k.data, from_k.row, keys, head_dim, k, k_row);
    pack_matrix<Dot>(from_v.data, from_v.row, keys, head_dim, v, v_row);
  }
};

// Scores to weights relative to the running maximum; returns the sum of the weights.
FK_INLINE float softmax_row(float* scores, int64_t keys, float scale, float& running_max) {
  const int64_t whole = keys / width * width;
  Floats highest = splat(running_max);
  for (int64_t j = 0; j < whole; j += width) highest = max(load(scores + j) * scale, highest);
  if (whole < keys) highest = max(keep_first(load(scores + whole) * scale, keys - whole, -INFINITY), highest);
  running_max = largest(highest);
  Floats pivot = splat(running_max), total = {};
  for (int64_t j = 0; j < keys; j += width) {
    Floats weight = exp(load(scores + j) * scale - pivot);
    if (j == whole) weight = keep_first(weight, keys - whole, 0);
    store(scores + j, weight);
    total += weight;
  }
  return sum(total);
}

// A few query rows on their way through the forward pass.
template <class T, class Dot = typename DotOf<T>::type>
struct QueryTile {
  int64_t head_dim, q_row, score_row, weight_row, out_row, count = 0;
  float *q, *scores, *weights, *out;
  Ahead<T> ahead;

  QueryTile(Scratch& scratch, int64_t most_keys, int64_t d)
      : head_dim(d),
        q_row(padded(words<Dot>(d))),
        score_row(padded(most_keys)),
        weight_row(Dot::lanes == 1 ? score_row : padded(words<Dot>(most_keys))),
        out_row(padded(d)) {
    q = scratch.take(forward_rows * q_row);
    scores = scratch.take(forward_rows * score_row);
    weights = Dot::lanes == 1 ? scores : scratch.take(forward_rows * weight_row);
    out = scratch.take(forward_rows * out_row);
  }

  void add(const T* row) { pack_row<Dot>(row, head_dim, q + count++ * q_row); }

  // out = unnormalised attention of the rows to the block; raises each row's maximum, returns its sum.
  void attend(const KeyBlock<T>& block, float scale, float* running_max, float* sums) {
    multiply<Dot, false>(
        count, block.keys, words<Dot>(head_dim), {q, q_row, 1}, block.k, block.k_row, scores, score_row);
    for (int64_t i = 0; i < count; ++i) {
      float* row = scores + i * score_row;
      ahead.fetch(head_dim);
      sums[i] = softmax_row(row, block.keys, scale, running_max[i]);
      if constexpr (Dot::lanes > 1) pack_row<Dot>(row, block.keys, weights + i * weight_row);
    }
    multiply<Dot, false>(
        count, head_dim, words<Dot>(block.keys), {weights, weight_row, 1}, block.v, block.v_row, out, out_row);
  }
};

template <class T>
FK_INLINE void write_row(T* to, const float* from, int64_t head_dim, float factor) {
  for (int64_t j = 0; j < head_dim; j += width) store(to + j, load(from + j) * factor, head_dim - j);
}

// Rows that meet several blocks of keys, one after the other (online softmax).
struct RunningRows {
  static constexpr int64_t most = 4 * forward_rows;
  int64_t head_dim, row;
  float *out, *max, *sum;

  RunningRows(Scratch& scratch, int64_t d) : head_dim(d), row(padded(d)) {
    out = scratch.take(most * row);
    max = scratch.take(most);
    sum = scratch.take(most);
  }

  void reset(int64_t count) {
    for (int64_t i = 0; i < count * row; ++i) out[i] = 0;
    for (int64_t i = 0; i < count; ++i) max[i] = -INFINITY, sum[i] = 0;
  }

  // Attend with the rows `members` of this block, which the tile holds in the same order.
  template <class T>
  void attend(QueryTile<T>& tile, const KeyBlock<T>& block, float scale, const int64_t* members) {
    float before[forward_rows], now[forward_rows], sums[forward_rows];
    for (int64_t i = 0; i < tile.count; ++i) before[i] = now[i] = max[members[i]];
    tile.attend(block, scale, now, sums);
    for (int64_t i = 0; i < tile.count; ++i) {
      int64_t t = members[i];
      float shrink = exp(splat(before[i] - now[i]))[0];
      max[t] = now[i];
      sum[t] = sum[t] * shrink + sums[i];
      for (int64_t j = 0; j < head_dim; j += width)
        store(out + t * row + j, load(out + t * row + j) * shrink + load(tile.out + i * tile.out_row + j));
    }
  }
};

// Keys and values packed for the backward pass, with the gradients they collect.
template <class T, class Dot = typename DotOf<T>::type>
struct KeyGradients {
  int64_t head_dim, key_row, channel_row, keys = 0;
  float *k, *v, *k_rows;  // [words(d)][keys] twice, [words(keys)][d]
  float *dk, *dv;         // [keys][d]

  KeyGradients(Scratch& scratch, int64_t most_keys, int64_t d)
      : head_dim(d), key_row(padded(most_keys)), channel_row(padded(d)) {
    k = scratch.take(words<Dot>(d) * key_row);
    v = scratch.take(words<Dot>(d) * key_row);
    k_rows = scratch.take(words<Dot>(most_keys) * channel_row);
    dk = scratch.take(most_keys * channel_row);
    dv = scratch.take(most_keys * channel_row);
  }

  void pack(Strided<const T> from_k, Strided<const T> from_v, int64_t count) {
    keys = count;
    pack_transposed<Dot>(from_k.data, from_k.row, keys, head_dim, k, key_row);
    pack_transposed<Dot>(from_v.data, from_v.row, keys, head_dim, v, key_row);
    pack_matrix<Dot>(from_k.data, from_k.row, keys, head_dim, k_rows, channel_row);
  }

  void reset() {
    for (int64_t i = 0; i < keys * channel_row; ++i) dk[i] = dv[i] = 0;
  }

  void write(Strided<T> to_k, Strided<T> to_v) const {
    for (int64_t i = 0; i < keys; ++i) {
      write_row(to_k[i], dk + i * channel_row, head_dim, 1);
      write_row(to_v[i], dv + i * channel_row, head_dim, 1);
    }
  }
};

// A few query rows on their way through the backward pass.
template <class T, class Dot = typename DotOf<T>::type>
struct GradientTile {
  static constexpr bool pairs = Dot::lanes == 2;
  int64_t head_dim, key_row, channel_row, count = 0;
  float *q, *dout;                // [rows][words(d)]
  float *p, *ds;                  // [rows][keys], scores and dP before that
  float *ds_words;                // [rows][words(keys)]
  float *q_pairs, *dout_pairs;    // [words(rows)][d]
  float *p_pairs, *ds_pairs;      // [words(rows)][keys]
  float *dq;                      // [rows][d]
  float delta[backward_rows], highest[backward_rows], share[backward_rows];  // what add() was told of a row
  const T *q_from[backward_rows], *dout_from[backward_rows];
  Ahead<T> ahead;

  GradientTile(Scratch& scratch, int64_t most_keys, int64_t d)
      : head_dim(d), key_row(padded(most_keys)), channel_row(padded(d)) {
    constexpr int64_t rows = backward_rows;
    q = scratch.take(rows * channel_row);
    dout = scratch.take(rows * channel_row);
    p = scratch.take(rows * key_row);
    ds = scratch.take(rows * key_row);
    dq = scratch.take(rows * channel_row);
    ds_words = pairs ? scratch.take(rows * key_row) : ds;
    q_pairs = pairs ? scratch.take(rows / 2 * channel_row) : q;
    dout_pairs = pairs ? scratch.take(rows / 2 * channel_row) : dout;
    p_pairs = pairs ? scratch.take(rows / 2 * key_row) : p;
    ds_pairs = pairs ? scratch.take(rows / 2 * key_row) : ds;
  }

  void add(const T* q_row, const T* dout_row) {
    pack_row<Dot>(q_row, head_dim, q + count * channel_row);
    pack_row<Dot>(dout_row, head_dim, dout + count * channel_row);
    q_from[count] = q_row;
    dout_from[count] = dout_row;
    ++count;
  }

  // A row that has more keys than one block: what the forward pass knows of the others.
  void add(const T* q_row, const T* dout_row, const T* out_row, float row_max, float row_sum) {
    double product = 0;  // its error would enter every dS of the row with the same sign
    for (int64_t j = 0; j < head_dim; j += width) {
      Floats a = load(dout_row + j, head_dim - j), b = load(out_row + j, head_dim - j);
      for (int lane = 0; lane < width; ++lane) product += double(a[lane]) * b[lane];
    }
    delta[count] = product;
    highest[count] = row_max;
    share[count] = 1 / row_sum;
    add(q_row, dout_row);
  }

  // P and dS of the rows for a block of keys.
  void differentiate(const KeyGradients<T>& block, float scale) {
    score(block);
    for (int64_t i = 0; i < count; ++i) {
      float* weights = p + i * key_row;
      for (int64_t j = 0; j < block.keys; j += width)
        store(weights + j, exp(load(weights + j) * scale - splat(highest[i])) * share[i]);
      score_gradient(i, block.keys, delta[i], scale);
    }
  }

  // The same for rows that have no other keys: their softmax is made anew, and nothing of the forward
  // pass is read.
  void differentiate_whole(const KeyGradients<T>& block, float scale) {
    score(block);
    for (int64_t i = 0; i < count; ++i) {
      float *weights = p + i * key_row, *dp = ds + i * key_row, highest = -INFINITY;
      ahead.fetch(head_dim);
      const float share = 1 / softmax_row(weights, block.keys, scale, highest);
      Floats product = {};
      for (int64_t j = 0; j < block.keys; j += width) {
        Floats weight = load(weights + j) * share;
        store(weights + j, weight);
        product += weight * load(dp + j);
      }
      score_gradient(i, block.keys, sum(product), scale);
    }
  }

  // S into p and dP into ds.
  void score(const KeyGradients<T>& block) {
    multiply<Dot, false>(
        count, block.keys, words<Dot>(head_dim), {q, channel_row, 1}, block.k, block.key_row, p, key_row);
    multiply<Dot, false>(
        count, block.keys, words<Dot>(head_dim), {dout, channel_row, 1}, block.v, block.key_row, ds, key_row);
  }

  // dP of row i to dS, where row_delta is the sum of P dP.
  FK_INLINE void score_gradient(int64_t i, int64_t keys, float row_delta, float scale) {
    float *weights = p + i * key_row, *to = ds + i * key_row;
    for (int64_t j = 0; j < keys; j += width)
      store(to + j, load(weights + j) * (load(to + j) - splat(row_delta)) * scale);
    if constexpr (pairs) pack_row<Dot>(to, keys, ds_words + i * key_row);
  }

  // dq = dS K, or dq += dS K.
  template <bool accumulate>
  void query_gradient(const KeyGradients<T>& block, float* to) {
    multiply<Dot, accumulate>(
        count, head_dim, words<Dot>(block.keys), {ds_words, key_row, 1}, block.k_rows, block.channel_row, to,
        channel_row);
  }

  // dk += dS^T Q and dv += P^T dO.
  void key_gradients(KeyGradients<T>& block) {
    if constexpr (pairs)
      for (int64_t i = 0; i < count; i += 2) {
        const bool last = i + 1 == count;
        pack_rows<Dot>(q_from[i], last ? nullptr : q_from[i + 1], head_dim, q_pairs + i / 2 * channel_row);
        pack_rows<Dot>(
            dout_from[i], last ? nullptr : dout_from[i + 1], head_dim, dout_pairs + i / 2 * channel_row);
        pack_rows<Dot>(
            p + i * key_row, last ? nullptr : p + (i + 1) * key_row, block.keys, p_pairs + i / 2 * key_row);
        pack_rows<Dot>(
            ds + i * key_row, last ? nullptr : ds + (i + 1) * key_row, block.keys, ds_pairs + i / 2 * key_row);
      }
    const int64_t depth = words<Dot>(count);
    multiply<Dot, true>(
        block.keys, head_dim, depth, {p_pairs, 1, key_row}, dout_pairs, channel_row, block.dv, block.channel_row);
    multiply<Dot, true>(
        block.keys, head_dim, depth, {ds_pairs, 1, key_row}, q_pairs, channel_row, block.dk, block.channel_row);
  }
};

}  // namespace flamingo_kernels::FK_ISA
