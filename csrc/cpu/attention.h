// The two steps every attention here is made of: query rows against a block of keys, forward and backward.
//
//   forward   S = Q K^T,  P = e^(scale (S - max)) / sum,  O = P V
//   backward  dP = dO V^T,  dS = scale P (dP - delta),  delta = rowsum(P dP) = rowsum(dO O),
//             dQ = dS K,  dK = dS^T Q,  dV = P^T dO
//
// max is taken before the scale: the largest key's weight is e^0 = 1, no rounding of large scores makes it more.
// Oracle: flamingo_kernels/ops/*/reference.py. Forward 4 FLOPs, backward 10 FLOPs per (row, key, channel);
// a block of keys is packed once and stays in the L1 or L2 cache for all rows that see it.
#pragma once

#include <cmath>
#include <limits>

#include "gemm.h"
#include "params.h"

namespace flamingo_kernels::FK_ISA {

template <class T>
struct DotOf {
  using type = Single;
};
template <>
struct DotOf<BFloat16> {
  using type = std::conditional_t<has_tiles, Tiles, std::conditional_t<has_pairs, Pairs, Single>>;
};

// Rows in flight: whole tiles, or multiples of 6 and of 2.
template <class T>
constexpr bool in_tiles = std::is_same_v<typename DotOf<T>::type, Tiles>;
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

// e^x, as exactly as a product shows it.
template <class Dot>
FK_INLINE Floats exp_for(Floats x) {
  if constexpr (Dot::lanes == 1)
    return exp(x);
  else
    return exp_for_bf16(x);
}

// A row's elements beyond its keys that a product reads.
template <class Dot>
FK_INLINE void clear_padding(typename Dot::Element* row, int64_t keys) {
  for (int64_t j = round_up(keys, width); j < words<Dot>(keys) * Dot::lanes; j += width)
    store_element(row + j, Floats{});
}

// A factor on scores, as a softmax applies it: its sign before the maximum is found, its size behind.
struct Scale {
  float sign, size;

  Scale(float scale) : sign(scale < 0 ? -1 : 1), size(sign * scale) {}
};

// The maximum of no scores. Finite, so that a score of -inf has a weight, 0.
constexpr float lowest = std::numeric_limits<float>::lowest();

// What the weights of a row are multiplied with. There is no softmax of scores that are all -inf.
FK_INLINE float share_of(float row_max, float row_sum) { return row_max > lowest ? 1 / row_sum : NAN; }

// The largest score of a row, of the scale's sign, or the maximum so far.
FK_INLINE float raised_max(const float* scores, int64_t keys, Scale scale, float so_far) {
  const int64_t whole = keys / width * width;
  Floats highest = splat(so_far);
  for (int64_t j = 0; j < whole; j += width) highest = max(load(scores + j) * scale.sign, highest);
  if (whole < keys) highest = max(keep_first(load(scores + whole) * scale.sign, keys - whole, lowest), highest);
  return largest(highest);
}

template <class Dot>
FK_INLINE Floats weight_of(Floats scores, Scale scale, float max) {
  return exp_for<Dot>((scores * scale.sign - max) * scale.size);
}

// Scores to weights relative to the maximum, which may take their place; returns the sum of the weights.
template <class Dot, class Weight>
FK_INLINE float weigh_row(const float* scores, Weight* weights, int64_t keys, Scale scale, float max) {
  Floats total = {};
  for (int64_t j = 0; j < keys; j += width) {
    Floats weight = weight_of<Dot>(load(scores + j), scale, max);
    if (keys - j < width) weight = keep_first(weight, keys - j, 0);
    store_element(weights + j, weight);
    total += weight;
  }
  return sum(total);
}

// A few query rows on their way through the forward pass.
template <class T, class Dot = typename DotOf<T>::type>
struct QueryTile {
  int64_t head_dim, q_row, score_row, out_row, count = 0;
  float *q, *scores, *out;  // scores, and then in their place the weights
  Ahead<T> ahead;

  QueryTile(Scratch& scratch, int64_t most_keys, int64_t d)
      : head_dim(d), q_row(padded(words<Dot>(d))), score_row(padded(most_keys)), out_row(padded(d)) {
    q = scratch.take(forward_rows<T> * q_row);
    scores = scratch.take(forward_rows<T> * score_row);
    out = scratch.take(forward_rows<T> * out_row);
  }

  void add(const T* row) { pack_row<Dot>(row, head_dim, q + count++ * q_row); }

  // out = unnormalised attention of the rows to the block; raises each row's maximum, returns its sum.
  void attend(const KeyBlock<T>& block, Scale scale, float* running_max, float* sums) {
    multiply<Dot, false>(
        count, block.keys, words<Dot>(head_dim), {q, q_row, 1}, block.k, block.k_row, scores, score_row);
    for (int64_t i = 0; i < count; ++i)
      running_max[i] = raised_max(scores + i * score_row, block.keys, scale, running_max[i]);
    for (int64_t i = 0; i < count; ++i) {
      float* row = scores + i * score_row;
      auto* weights = (typename Dot::Element*)row;
      ahead.fetch(head_dim);
      sums[i] = weigh_row<Dot>(row, weights, block.keys, scale, running_max[i]);
      clear_padding<Dot>(weights, block.keys);
    }
    multiply<Dot, false>(
        count, head_dim, words<Dot>(block.keys), {scores, score_row, 1}, block.v, block.v_row, out, out_row);
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

// Rows that meet several blocks of keys, one after the other (online softmax).
template <class T>
struct RunningRows {
  static constexpr int64_t most = in_tiles<T> ? 128 : 96;
  int64_t head_dim, row;
  float *out, *max, *sum;

  RunningRows(Scratch& scratch, int64_t d) : head_dim(d), row(padded(d)) {
    out = scratch.take(most * row);
    max = scratch.take(most);
    sum = scratch.take(most);
  }

  void reset(int64_t count) {
    for (int64_t i = 0; i < count * row; ++i) out[i] = 0;
    for (int64_t i = 0; i < count; ++i) max[i] = lowest, sum[i] = 0;
  }

  // Attend with the rows `members` of this block, which the tile holds in the same order.
  void attend(QueryTile<T>& tile, const KeyBlock<T>& block, Scale scale, const int64_t* members) {
    constexpr int64_t rows = round_up(forward_rows<T>, width);
    float shrink[rows] = {}, now[rows] = {}, sums[rows];
    for (int64_t i = 0; i < tile.count; ++i) shrink[i] = now[i] = max[members[i]];
    tile.attend(block, scale, now, sums);
    for (int64_t i = 0; i < tile.count; i += width) {
      // inf - inf and inf * 0 are no number: the sum is NaN or 0 already, and 0 keeps it
      const Floats fall = (load(shrink + i) - load(now + i)) * scale.size;
      store(shrink + i, exp(FK_ISA::max(fall, splat(-100))));
    }
    for (int64_t i = 0; i < tile.count; ++i) {
      int64_t t = members[i];
      max[t] = now[i];
      sum[t] = sum[t] * shrink[i] + sums[i];
      for (int64_t j = 0; j < head_dim; j += width)
        store(out + t * row + j, load(out + t * row + j) * shrink[i] + load(tile.out + i * tile.out_row + j));
    }
  }
};

// Whether one key has more than half of a row's weight. Its dP and delta are then nearly the same, and dS is what is
// left of them: delta must be the sum of P dP, by the same products, as the rounded O would leave more.
FK_INLINE bool is_sharp(float row_sum) { return row_sum < 2; }

// Call `visit(rows, count)` with every `most` rows between begin and end that are wanted.
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
  Doubles products = {};
  for (int64_t j = 0; j < head_dim; j += width)
    products += __builtin_convertvector(load(dout + j, head_dim - j), Doubles) *
                __builtin_convertvector(load(out + j, head_dim - j), Doubles);
  double total = 0;
  for (int lane = 0; lane < width; ++lane) total += products[lane];
  return total;
}

// Keys and values packed for the backward pass, with the gradients they collect.
template <class T, class Dot = typename DotOf<T>::type>
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

  // Zeros where no row has sent anything.
  void fill() {
    if (!empty) return;
    for (int64_t i = 0; i < keys * channel_row; ++i) dk[i] = dv[i] = 0;
    empty = false;
  }

  void write(Strided<T> to_k, Strided<T> to_v) {
    fill();
    for (int64_t i = 0; i < keys; ++i) {
      write_row(to_k[i], dk + i * channel_row, head_dim, 1);
      write_row(to_v[i], dv + i * channel_row, head_dim, 1);
    }
  }
};

// A few query rows on their way through the backward pass.
template <class T, class Dot = typename DotOf<T>::type>
struct GradientTile {
  static constexpr int64_t most = backward_rows<T>;
  static constexpr bool pairs = Dot::lanes == 2;
  using Element = typename Dot::Element;
  int64_t head_dim, key_row, channel_row, column_row, count = 0;
  float *q, *dout;              // [rows][words(d)]
  float *p, *ds;                // [rows][keys]: scores and dP, and then in their place P and dS, as elements
  float *q_pairs, *dout_pairs;  // [words(rows)][d]
  float *columns;               // P or dS, packed along the rows
  float *dq;                    // [rows][d]
  float delta[most], highest[most], share[most];  // what add() was told of a row
  const T *q_from[most], *dout_from[most];
  Ahead<T> ahead;

  GradientTile(Scratch& scratch, int64_t most_keys, int64_t d)
      : head_dim(d),
        key_row(padded(most_keys)),
        channel_row(padded(d)),
        column_row(in_tiles<T> ? padded(words<Dot>(most)) : key_row) {
    q = scratch.take(most * channel_row);
    dout = scratch.take(most * channel_row);
    p = scratch.take(most * key_row);
    ds = scratch.take(most * key_row);
    dq = scratch.take(most * channel_row);
    q_pairs = pairs ? scratch.take(words<Dot>(most) * channel_row) : q;
    dout_pairs = pairs ? scratch.take(words<Dot>(most) * channel_row) : dout;
    columns = scratch.take(pairs ? (in_tiles<T> ? round_up(most_keys, width) : words<Dot>(most)) * column_row : 0);
  }

  void add(const T* q_row, const T* dout_row) {
    pack_row<Dot>(q_row, head_dim, q + count * channel_row);
    pack_row<Dot>(dout_row, head_dim, dout + count * channel_row);
    q_from[count] = q_row;
    dout_from[count] = dout_row;
    ++count;
  }

  // A row that has more keys than one block: what the forward pass knows of the others.
  void add(const T* q_row, const T* dout_row, float row_delta, float row_max, float row_sum) {
    delta[count] = row_delta;
    highest[count] = row_max;
    share[count] = share_of(row_max, row_sum);
    add(q_row, dout_row);
  }

  // P of row i, by vectors, from its scores.
  FK_INLINE Floats probability(int64_t i, int64_t j, Scale scale) const {
    return weight_of<Dot>(load(p + i * key_row + j), scale, highest[i]) * share[i];
  }

  // Adds to each row's delta what a block of keys has of sum(P dP).
  void add_delta(const KeyGradients<T>& block, float scale) {
    score(block);
    for (int64_t i = 0; i < count; ++i) {
      Floats product = {};
      for (int64_t j = 0; j < block.keys; j += width)
        product += keep_first(probability(i, j, scale), block.keys - j, 0) * load(ds + i * key_row + j);
      delta[i] += sum(product);
    }
  }

  // P and dS of the rows for a block of keys.
  void differentiate(const KeyGradients<T>& block, float scale) {
    score(block);
    for (int64_t i = 0; i < count; ++i)
      score_gradient(i, block.keys, delta[i], scale, [&](int64_t j) { return probability(i, j, scale); });
  }

  // The same for rows that have no other keys: their softmax is made anew, and nothing of the forward
  // pass is read.
  void differentiate_whole(const KeyGradients<T>& block, float scale) {
    score(block);
    for (int64_t i = 0; i < count; ++i) highest[i] = raised_max(p + i * key_row, block.keys, scale, lowest);
    for (int64_t i = 0; i < count; ++i) {
      float *weights = p + i * key_row, *dp = ds + i * key_row;
      ahead.fetch(head_dim);
      const float share = share_of(highest[i], weigh_row<Dot>(weights, weights, block.keys, scale, highest[i]));
      const auto weight = [&](int64_t j) { return load(weights + j) * share; };
      Floats product = {};
      for (int64_t j = 0; j < block.keys; j += width) product += weight(j) * load(dp + j);
      score_gradient(i, block.keys, sum(product), scale, weight);
    }
  }

  // S into p and dP into ds.
  void score(const KeyGradients<T>& block) {
    multiply<Dot, false>(
        count, block.keys, words<Dot>(head_dim), {q, channel_row, 1}, block.k, block.key_row, p, key_row);
    multiply<Dot, false>(
        count, block.keys, words<Dot>(head_dim), {dout, channel_row, 1}, block.v, block.key_row, ds, key_row);
  }

  // P of row i, which `weight` gives by vectors, and dS from dP; row_delta is the sum of P dP.
  template <class Weight>
  FK_INLINE void score_gradient(int64_t i, int64_t keys, float row_delta, float scale, Weight weight) {
    float *to_p = p + i * key_row, *to_ds = ds + i * key_row;
    for (int64_t j = 0; j < keys; j += width) {
      Floats probability = weight(j);
      if (keys - j < width) probability = keep_first(probability, keys - j, 0);
      const Floats gradient = probability * (load(to_ds + j) - row_delta) * scale;
      store_element((Element*)to_p + j, probability);
      store_element((Element*)to_ds + j, gradient);
    }
    clear_padding<Dot>((Element*)to_ds, keys);
  }

  // dq = dS K, or dq += dS K.
  template <bool accumulate>
  void query_gradient(const KeyGradients<T>& block, float* to) {
    multiply<Dot, accumulate>(
        count, head_dim, words<Dot>(block.keys), {ds, key_row, 1}, block.k_rows, block.channel_row, to,
        channel_row);
  }

  // dk += dS^T Q and dv += P^T dO.
  void key_gradients(KeyGradients<T>& block) {
    if constexpr (pairs) pack_pairs(q_from, q_pairs), pack_pairs(dout_from, dout_pairs);
    add_key_gradient(p, dout_pairs, block, block.dv);
    add_key_gradient(ds, q_pairs, block, block.dk);
    block.empty = false;
  }

  // The rows as a B operand summed along them.
  void pack_pairs(const T* const (&from)[most], float* to) {
    const auto row = [&](int64_t i) { return i < count ? from[i] : nullptr; };
    for (int64_t k = 0; k < words<Dot>(count); ++k)
      pack_rows<Dot>(row(2 * k), row(2 * k + 1), head_dim, to + k * channel_row);
  }

  // to[keys][d] += weights[rows][keys]^T rows[rows][d]
  void add_key_gradient(const float* weights, const float* rows, const KeyGradients<T>& block, float* to) {
    const Operand transposed = pack_columns<Dot>(
        (const Element*)weights, key_row * Dot::lanes, count, block.keys, columns, column_row);
    const auto product = block.empty ? multiply<Dot, false> : multiply<Dot, true>;
    product(block.keys, head_dim, words<Dot>(count), transposed, rows, channel_row, to, channel_row);
  }
};

}  // namespace flamingo_kernels::FK_ISA
