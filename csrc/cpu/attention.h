// The two steps every attention here is made of: query rows against a block of keys, forward and backward.
//
//   forward   S = Q K^T,  P = e^(scale (S - max)) / sum,  O = P V
//   backward  dP = dO V^T,  dS = scale P (dP - delta),  delta = rowsum(P dP) = rowsum(dO O),
//             dQ = dS K,  dK = dS^T Q,  dV = P^T dO
//
// The maximum is subtracted before the scale is applied, so the largest weight is e^0 = 1 however large the scores are.
// Oracle: flamingo_kernels/ops/*/reference.py. Forward 4 FLOPs, backward 10 FLOPs per (row, key, channel);
// a block of keys is packed once and stays in the L1 or L2 cache for all rows that see it.
#pragma once

#include <cmath>
#include <limits>

#include "gemm.h"
#include "params.h"

namespace flamingo_kernels::FK_ISA {

// How elements of type T are multiplied.
template <class T>
using DotFor = std::conditional_t<
    !std::is_same_v<T, BFloat16>, Single,
    std::conditional_t<has_tiles, Tiles, std::conditional_t<has_pairs, Pairs, Single>>>;

template <class T>
constexpr bool in_tiles = std::is_same_v<DotFor<T>, Tiles>;

// Rows in flight: whole tiles, or multiples of 6 and of 2.
template <class T>
constexpr int64_t forward_rows = in_tiles<T> ? 32 : 24;
template <class T>
constexpr int64_t backward_rows = in_tiles<T> ? 64 : 36;

template <class T>
struct Strided {  // rows of head_dim contiguous elements
  T* data;
  int64_t row;

  T* operator[](int64_t i) const { return data + i * row; }
};

template <class T>
FK_INLINE Strided<T> rows_of(const Rows& rows, int64_t b, int64_t h) {
  return {(T*)rows.data + b * rows.batch + h * rows.head, rows.row};
}

// Rows wanted soon, fetched one at a time between rows of arithmetic: one head's rows lie a whole model
// width apart, which the processor does not foresee (measured: 10% of a forward pass).
template <class T>
struct Prefetch {
  static constexpr int streams = 5;
  Strided<const T> rows[streams];
  int64_t left[streams] = {};

  void plan(int stream, Strided<const T> from, int64_t count) { rows[stream] = from, left[stream] = count; }

  FK_INLINE void next(int64_t head_dim) {
    for (int stream = 0; stream < streams; ++stream) {
      if (left[stream] <= 0) continue;
      for (int64_t j = 0; j < head_dim; j += 64 / sizeof(T)) __builtin_prefetch(rows[stream].data + j);
      rows[stream].data += rows[stream].row;
      --left[stream];
    }
  }
};

// Keys and values packed for the forward pass.
template <class T, class Dot = DotFor<T>>
struct KeyBlock {
  int64_t head_dim, k_row, v_row, keys = 0;
  float *k, *v;  // [words(d)][keys], [words(keys)][d]

  KeyBlock(Scratch& scratch, int64_t most_keys, int64_t d) : head_dim(d), k_row(padded(most_keys)), v_row(padded(d)) {
    k = scratch.take(words<Dot>(d) * k_row);
    v = scratch.take(words<Dot>(most_keys) * v_row);
  }

  void pack(Strided<const T> from_k, Strided<const T> from_v, int64_t count) {
    keys = count;
    pack_transposed<Dot>(from_k.data, from_k.row, keys, head_dim, k, k_row);
    pack_matrix<Dot>(from_v.data, from_v.row, keys, head_dim, v, v_row);
  }
};

// e^x, as exactly as a product shows it.
template <class Dot>
FK_INLINE Floats exp_for(Floats x) {
  if constexpr (Dot::lanes == 1)
    return exp(x);
  else
    return exp_for_bf16(x);
}

// Writes zeros to the elements beyond a row's keys that a product reads.
template <class Dot>
FK_INLINE void clear_padding(typename Dot::Element* row, int64_t keys) {
  for (int64_t j = round_up(keys, width); j < words<Dot>(keys) * Dot::lanes; j += width)
    store_element(row + j, Floats{});
}

// A softmax applies the sign of the scale to the scores before it finds their maximum, and its size after.
struct Scale {
  float sign, size;

  Scale(float scale) : sign(scale < 0 ? -1 : 1), size(sign * scale) {}
};

// The maximum of no scores. It is finite, so that a score of -inf has the weight 0; a row of no others is 0 / 0.
constexpr float lowest = std::numeric_limits<float>::lowest();

// The larger of row_max and the largest of a row's scores, which have the scale's sign.
FK_INLINE float updated_max(const float* scores, int64_t keys, Scale scale, float row_max) {
  const int64_t whole = keys / width * width;
  Floats maxima = splat(row_max);
  for (int64_t j = 0; j < whole; j += width) maxima = max(load(scores + j) * scale.sign, maxima);
  if (whole < keys) maxima = max(keep_first(load(scores + whole) * scale.sign, keys - whole, lowest), maxima);
  return largest(maxima);
}

// P before it is divided by row_sum.
template <class Dot>
FK_INLINE Floats scaled_exp(Floats scores, Scale scale, float row_max) {
  return exp_for<Dot>((scores * scale.sign - row_max) * scale.size);
}

// Writes P, not divided yet, which may take the place of the scores, and returns row_sum.
template <class Dot, class Element>
FK_INLINE float softmax_row(const float* scores, Element* p, int64_t keys, Scale scale, float row_max) {
  Floats sums = {};
  for (int64_t j = 0; j < keys; j += width) {
    Floats p_j = scaled_exp<Dot>(load(scores + j), scale, row_max);
    if (keys - j < width) p_j = keep_first(p_j, keys - j, 0);
    store_element(p + j, p_j);
    sums += p_j;
  }
  return sum(sums);
}

// A few query rows on their way through the forward pass.
template <class T, class Dot = DotFor<T>>
struct QueryTile {
  int64_t head_dim, q_row, score_row, acc_row, count = 0;
  float *q, *scores, *acc;  // S, and then P in its place
  Prefetch<T> prefetch;

  QueryTile(Scratch& scratch, int64_t most_keys, int64_t d)
      : head_dim(d), q_row(padded(words<Dot>(d))), score_row(padded(most_keys)), acc_row(padded(d)) {
    q = scratch.take(forward_rows<T> * q_row);
    scores = scratch.take(forward_rows<T> * score_row);
    acc = scratch.take(forward_rows<T> * acc_row);
  }

  void add(const T* row) { pack_row<Dot>(row, head_dim, q + count++ * q_row); }

  // acc = P V of the rows and the block, not divided by row_sum yet. Updates row_max, and writes the block's row_sum.
  void attend(const KeyBlock<T>& block, Scale scale, float* row_max, float* row_sum) {
    multiply<Dot, false>(
        count, block.keys, words<Dot>(head_dim), {q, q_row, 1}, block.k, block.k_row, scores, score_row);
    for (int64_t i = 0; i < count; ++i) row_max[i] = updated_max(scores + i * score_row, block.keys, scale, row_max[i]);
    for (int64_t i = 0; i < count; ++i) {
      float* row = scores + i * score_row;
      auto* p = (typename Dot::Element*)row;
      prefetch.next(head_dim);
      row_sum[i] = softmax_row<Dot>(row, p, block.keys, scale, row_max[i]);
      clear_padding<Dot>(p, block.keys);
    }
    multiply<Dot, false>(
        count, head_dim, words<Dot>(block.keys), {scores, score_row, 1}, block.v, block.v_row, acc, acc_row);
  }
};

template <class T>
FK_INLINE void write_row(T* to, const float* from, int64_t head_dim, float factor) {
  for (int64_t j = 0; j < head_dim; j += width) {
    const Floats x = load(from + j) * factor;
    if constexpr (std::is_same_v<T, BFloat16>)
      store(to + j, round_to_bf16(x), head_dim - j);
    else
      store(to + j, x, head_dim - j);
  }
}

// Rows that meet several blocks of keys, one after the other.
template <class T>
struct OnlineSoftmax {
  static constexpr int64_t most = in_tiles<T> ? 128 : 96;
  int64_t head_dim, row;
  float *acc, *row_max, *row_sum;

  OnlineSoftmax(Scratch& scratch, int64_t d) : head_dim(d), row(padded(d)) {
    acc = scratch.take(most * row);
    row_max = scratch.take(most);
    row_sum = scratch.take(most);
  }

  void reset(int64_t count) {
    for (int64_t i = 0; i < count * row; ++i) acc[i] = 0;
    for (int64_t i = 0; i < count; ++i) row_max[i] = lowest, row_sum[i] = 0;
  }

  // Takes the rows `members`, which the tile holds in the same order, through one more block of keys.
  void attend(QueryTile<T>& tile, const KeyBlock<T>& block, Scale scale, const int64_t* members) {
    constexpr int64_t rows = round_up(forward_rows<T>, width);
    float alpha[rows] = {}, new_max[rows] = {}, block_sum[rows];
    for (int64_t i = 0; i < tile.count; ++i) alpha[i] = new_max[i] = row_max[members[i]];
    tile.attend(block, scale, new_max, block_sum);
    for (int64_t i = 0; i < tile.count; i += width) {
      // inf - inf and inf * 0 are no number: the sum is NaN or 0 already, and 0 keeps it
      const Floats exponent = (load(alpha + i) - load(new_max + i)) * scale.size;
      store(alpha + i, exp(max(exponent, splat(-100))));
    }
    for (int64_t i = 0; i < tile.count; ++i) {
      int64_t t = members[i];
      row_max[t] = new_max[i];
      row_sum[t] = row_sum[t] * alpha[i] + block_sum[i];
      for (int64_t j = 0; j < head_dim; j += width)
        store(acc + t * row + j, load(acc + t * row + j) * alpha[i] + load(tile.acc + i * tile.acc_row + j));
    }
  }
};

// Whether one key has more than half of a row's weight. Then its dP and delta nearly cancel in dS, so delta must be the
// sum of P dP by the same products: the rounding of O would be larger than the difference.
FK_INLINE bool is_saturated(float row_sum) { return row_sum < 2; }

// Calls `visit(rows, count)` with every `most` rows between begin and end that are wanted.
template <int64_t most, class Wanted, class Visit>
FK_INLINE void visit_rows(int64_t begin, int64_t end, Wanted wanted, Visit visit) {
  int64_t rows[most], count = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (!wanted(t)) continue;
    rows[count++] = t;
    if (count == most) visit(rows, count), count = 0;
  }
  if (count) visit(rows, count);
}

// delta = sum(dO O) of a row, in double: its error would enter every dS of the row with the same sign.
template <class T>
FK_INLINE float row_delta(const T* dout, const T* out, int64_t head_dim) {
  Doubles sums = {};
  for (int64_t j = 0; j < head_dim; j += width)
    sums += __builtin_convertvector(load(dout + j, head_dim - j), Doubles) *
            __builtin_convertvector(load(out + j, head_dim - j), Doubles);
  double delta = 0;
  for (int lane = 0; lane < width; ++lane) delta += sums[lane];
  return delta;
}

// Keys and values packed for the backward pass, with their gradients.
template <class T, class Dot = DotFor<T>>
struct KeyGradients {
  int64_t head_dim, key_row, channel_row, keys = 0;
  float *k, *v, *k_rows;  // [words(d)][keys] twice, [words(keys)][d]
  float *dk, *dv;         // [keys][d]
  bool empty = true;      // dk and dv hold nothing yet: the first rows' products are written, not added

  KeyGradients(Scratch& scratch, int64_t most_keys, int64_t d)
      : head_dim(d), key_row(padded(most_keys)), channel_row(padded(d)) {
    k = scratch.take(words<Dot>(d) * key_row);
    v = scratch.take(words<Dot>(d) * key_row);
    k_rows = scratch.take(words<Dot>(most_keys) * channel_row);
    dk = scratch.take(round_up(most_keys, Dot::rows) * channel_row);
    dv = scratch.take(round_up(most_keys, Dot::rows) * channel_row);
  }

  void pack(Strided<const T> from_k, Strided<const T> from_v, int64_t count) {
    keys = count;
    pack_transposed<Dot>(from_k.data, from_k.row, keys, head_dim, k, key_row);
    pack_transposed<Dot>(from_v.data, from_v.row, keys, head_dim, v, key_row);
    pack_matrix<Dot>(from_k.data, from_k.row, keys, head_dim, k_rows, channel_row);
  }

  void reset() { empty = true; }

  // Writes zeros where no row has added anything.
  void clear_if_empty() {
    if (!empty) return;
    for (int64_t i = 0; i < keys * channel_row; ++i) dk[i] = dv[i] = 0;
    empty = false;
  }

  void write(Strided<T> to_k, Strided<T> to_v) {
    clear_if_empty();
    for (int64_t i = 0; i < keys; ++i) {
      write_row(to_k[i], dk + i * channel_row, head_dim, 1);
      write_row(to_v[i], dv + i * channel_row, head_dim, 1);
    }
  }
};

// A few query rows on their way through the backward pass.
template <class T, class Dot = DotFor<T>>
struct GradientTile {
  static constexpr int64_t most = backward_rows<T>;
  static constexpr bool pairs = Dot::lanes == 2;
  using Element = typename Dot::Element;
  int64_t head_dim, key_row, channel_row, transposed_row, count = 0;
  float *q, *dout;              // [rows][words(d)]
  float *p, *ds;                // [rows][keys]: S and dP, and then in their place P and dS, as elements
  float *q_pairs, *dout_pairs;  // [words(rows)][d]
  float* transposed;            // P^T or dS^T, packed along the rows
  float* dq;                    // [rows][d]
  float delta[most], row_max[most], inv_sum[most];
  const T *q_from[most], *dout_from[most];
  Prefetch<T> prefetch;

  GradientTile(Scratch& scratch, int64_t most_keys, int64_t d)
      : head_dim(d),
        key_row(padded(most_keys)),
        channel_row(padded(d)),
        transposed_row(in_tiles<T> ? padded(words<Dot>(most)) : key_row) {
    q = scratch.take(most * channel_row);
    dout = scratch.take(most * channel_row);
    p = scratch.take(most * key_row);
    ds = scratch.take(most * key_row);
    dq = scratch.take(most * channel_row);
    q_pairs = pairs ? scratch.take(words<Dot>(most) * channel_row) : q;
    dout_pairs = pairs ? scratch.take(words<Dot>(most) * channel_row) : dout;
    transposed =
        scratch.take(pairs ? (in_tiles<T> ? round_up(most_keys, width) : words<Dot>(most)) * transposed_row : 0);
  }

  void add(const T* q_row, const T* dout_row) {
    pack_row<Dot>(q_row, head_dim, q + count * channel_row);
    pack_row<Dot>(dout_row, head_dim, dout + count * channel_row);
    q_from[count] = q_row;
    dout_from[count] = dout_row;
    ++count;
  }

  // A row that has more keys than one block, with the softmax that the forward pass kept.
  void add(const T* q_row, const T* dout_row, float delta_i, float max_i, float sum_i) {
    delta[count] = delta_i;
    row_max[count] = max_i;
    inv_sum[count] = 1 / sum_i;
    add(q_row, dout_row);
  }

  // A vector of P of row i, from its scores.
  FK_INLINE Floats p_at(int64_t i, int64_t j, Scale scale) const {
    return scaled_exp<Dot>(load(p + i * key_row + j), scale, row_max[i]) * inv_sum[i];
  }

  // Adds a block's terms of sum(P dP) to each row's delta.
  void add_delta(const KeyGradients<T>& block, float scale) {
    multiply_s_dp(block);
    for (int64_t i = 0; i < count; ++i) {
      Floats p_dp = {};
      for (int64_t j = 0; j < block.keys; j += width)
        p_dp += keep_first(p_at(i, j, scale), block.keys - j, 0) * load(ds + i * key_row + j);
      delta[i] += sum(p_dp);
    }
  }

  // P and dS of the rows for a block of keys.
  void compute_p_ds(const KeyGradients<T>& block, float scale) {
    multiply_s_dp(block);
    for (int64_t i = 0; i < count; ++i)
      store_p_ds(i, block.keys, delta[i], scale, [&](int64_t j) { return p_at(i, j, scale); });
  }

  // The same for rows that have no other keys: their softmax is computed again, so the forward pass kept nothing.
  void compute_p_ds_one_shot(const KeyGradients<T>& block, float scale) {
    multiply_s_dp(block);
    for (int64_t i = 0; i < count; ++i) row_max[i] = updated_max(p + i * key_row, block.keys, scale, lowest);
    for (int64_t i = 0; i < count; ++i) {
      float *row = p + i * key_row, *dp = ds + i * key_row;
      prefetch.next(head_dim);
      const float inverse = 1 / softmax_row<Dot>(row, row, block.keys, scale, row_max[i]);
      const auto p_at = [&](int64_t j) { return load(row + j) * inverse; };
      Floats p_dp = {};
      for (int64_t j = 0; j < block.keys; j += width) p_dp += p_at(j) * load(dp + j);
      store_p_ds(i, block.keys, sum(p_dp), scale, p_at);
    }
  }

  // S into p and dP into ds.
  void multiply_s_dp(const KeyGradients<T>& block) {
    multiply<Dot, false>(
        count, block.keys, words<Dot>(head_dim), {q, channel_row, 1}, block.k, block.key_row, p, key_row);
    multiply<Dot, false>(
        count, block.keys, words<Dot>(head_dim), {dout, channel_row, 1}, block.v, block.key_row, ds, key_row);
  }

  // Writes P of row i, which `p_at` gives by vectors, and dS = scale P (dP - delta).
  template <class P>
  FK_INLINE void store_p_ds(int64_t i, int64_t keys, float delta_i, float scale, P p_at) {
    float *to_p = p + i * key_row, *to_ds = ds + i * key_row;
    for (int64_t j = 0; j < keys; j += width) {
      Floats p_j = p_at(j);
      if (keys - j < width) p_j = keep_first(p_j, keys - j, 0);
      const Floats ds_j = p_j * (load(to_ds + j) - delta_i) * scale;
      store_element((Element*)to_p + j, p_j);
      store_element((Element*)to_ds + j, ds_j);
    }
    clear_padding<Dot>((Element*)to_ds, keys);
  }

  // dq = dS K, or dq += dS K.
  template <bool accumulate>
  void multiply_dq(const KeyGradients<T>& block, float* to) {
    multiply<Dot, accumulate>(
        count, head_dim, words<Dot>(block.keys), {ds, key_row, 1}, block.k_rows, block.channel_row, to, channel_row);
  }

  // dk += dS^T Q and dv += P^T dO.
  void add_dk_dv(KeyGradients<T>& block) {
    if constexpr (pairs) pack_pairs(q_from, q_pairs), pack_pairs(dout_from, dout_pairs);
    add_transposed_product(p, dout_pairs, block, block.dv);
    add_transposed_product(ds, q_pairs, block, block.dk);
    block.empty = false;
  }

  // The rows as a B operand summed along them.
  void pack_pairs(const T* const (&from)[most], float* to) {
    const auto row = [&](int64_t i) { return i < count ? from[i] : nullptr; };
    for (int64_t k = 0; k < words<Dot>(count); ++k)
      pack_rows<Dot>(row(2 * k), row(2 * k + 1), head_dim, to + k * channel_row);
  }

  // to[keys][d] += a[rows][keys]^T b[rows][d]
  void add_transposed_product(const float* a, const float* b, const KeyGradients<T>& block, float* to) {
    const Operand operand =
        pack_columns<Dot>((const Element*)a, key_row * Dot::lanes, count, block.keys, transposed, transposed_row);
    const auto add = block.empty ? multiply<Dot, false> : multiply<Dot, true>;
    add(block.keys, head_dim, words<Dot>(count), operand, b, channel_row, to, channel_row);
  }
};

}  // namespace flamingo_kernels::FK_ISA
