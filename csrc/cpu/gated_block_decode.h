// What a decoding step of a gated block does around its products: norms of rows, and one row of every text attending to
// the kept keys and values of its media.
//
// Oracle: flamingo_kernels/ops/gated_block_decode/reference.py; the products are those of linear.h and linear_int8.h.
// The attention reads what a text sees of K and V once for a group of heads: 2 numbers a key, head of K and column, and
// 4 FLOPs of each head that reads them. A task owns a text, a head of K and a split of the keys, always of so many, so
// that the results do not depend on the number of threads; the splits of a row are merged in their order.
#pragma once

#include "linear.h"

namespace flamingo_kernels::FK_ISA::gated_block_decode {

using linear::load_any;
using linear::smaller;
using linear::store_any;

// Rows of y = norm(x) * weight + bias, where the norm may be an RMSNorm.
struct Normalize {
  Normalize(Scratch&, const RowNorm&) {}
  static int64_t tasks(const RowNorm& params) { return params.rows; }

  void run(const RowNorm& params, int64_t row) {
    const auto x = [&](int64_t j) {
      return load_any(params.x.data, params.x.dtype, row * params.x.row + j, params.columns - j);
    };
    const float mean = params.rms ? 0 : mean_of(params.columns, x);
    const auto centred = [&](int64_t j) { return keep_first(x(j) - mean, params.columns - j, 0); };
    const float variance = mean_of(params.columns, [&](int64_t j) { return centred(j) * centred(j); });
    const float rstd = 1 / __builtin_sqrtf(variance + params.eps);
    for (int64_t j = 0; j < params.columns; j += width) {
      const int64_t left = params.columns - j;
      Floats y = centred(j) * rstd * load_any(params.weight, params.weight_dtype, j, left);
      if (params.bias) y += load_any(params.bias, params.bias_dtype, j, left);
      store_any(params.y, row, j, y, left);
    }
  }

 private:
  template <class Values>
  static FK_INLINE float mean_of(int64_t columns, const Values& values) {
    Floats added = {};
    for (int64_t j = 0; j < columns; j += width) added += values(j);
    return sum(added) / columns;
  }
};

constexpr int64_t split_keys = 512;
constexpr int64_t block_keys = 64;  // whose scores are known before their values are added
constexpr int64_t group = 4;        // heads that read a key at once
constexpr float lowest = -__builtin_inff();

FK_INLINE int64_t count_splits(const DecodeAttention& params) {
  const int64_t keys = params.media * params.latents;
  return keys <= split_keys ? 1 : (keys + split_keys - 1) / split_keys;
}

// The result of a row: `acc` over its sum, or 0 where it sees nothing.
FK_INLINE void store_row(const DecodeAttention& params, int64_t b, int64_t head, const float* acc, float row_sum) {
  const float inv_sum = row_sum == 0 ? 0 : 1 / row_sum;
  for (int64_t j = 0; j < params.head_dim; j += width)
    store_any(params.out, b, head * params.head_dim + j, load(acc + j) * inv_sum, params.head_dim - j);
}

// T is the type of k and v.
template <class T>
struct Attend {
  int64_t row_floats;  // of a head: whole vectors
  float *q, *acc, *scores;
  float row_max[group], row_sum[group];

  Attend(Scratch& scratch, const DecodeAttention& params)
      : row_floats(round_up(params.head_dim, width)),
        q(scratch.take(group * row_floats)),
        acc(scratch.take(group * row_floats)),
        scores(scratch.take(group * block_keys)) {}

  static int64_t tasks(const DecodeAttention& params) {
    return params.batch * params.kv_heads * count_splits(params);
  }

  void run(const DecodeAttention& params, int64_t task) {
    const int64_t splits = count_splits(params), split = task % splits;
    const int64_t b = task / splits / params.kv_heads, kv_head = task / splits % params.kv_heads;
    const int64_t heads = params.heads / params.kv_heads;
    for (int64_t i = 0; i < heads; i += group) {
      const int64_t rows = smaller(group, heads - i), head = kv_head * heads + i;
      if (rows == 4) attend<4>(params, b, kv_head, head, split);
      if (rows == 3) attend<3>(params, b, kv_head, head, split);
      if (rows == 2) attend<2>(params, b, kv_head, head, split);
      if (rows == 1) attend<1>(params, b, kv_head, head, split);
      for (int64_t r = 0; r < rows; ++r)
        if (splits == 1)
          store_row(params, b, head + r, acc + r * row_floats, row_sum[r]);
        else
          keep(params, ((b * params.heads) + head + r) * splits + split, r);
    }
  }

 private:
  void keep(const DecodeAttention& params, int64_t place, int64_t r) {
    params.row_max[place] = row_max[r], params.row_sum[place] = row_sum[r];
    for (int64_t j = 0; j < row_floats; j += width)
      store(params.partial_out + place * row_floats + j, load(acc + r * row_floats + j));
  }

  // `rows` heads over the keys of a split that the text sees.
  template <int rows>
  void attend(const DecodeAttention& params, int64_t b, int64_t kv_head, int64_t head, int64_t split) {
    const int32_t lo = params.lo[b], hi = params.hi[b];
    const bool average = hi < 0;  // the mean of all values
    const int64_t first = average || lo < 0 ? 0 : lo, last = average || hi > params.media ? params.media : hi;
    const int64_t begin = larger(first * params.latents, split * split_keys);
    const int64_t end = smaller(last * params.latents, (split + 1) * split_keys);
    for (int r = 0; r < rows; ++r) row_max[r] = lowest, row_sum[r] = 0;
    for (int64_t j = 0; j < rows * row_floats; j += width) store(acc + j, Floats{});
    if (begin >= end) return;
    if (!average) load_queries<rows>(params, b, head);
    const int64_t sequence = b / params.texts;
    for (int64_t key = begin, keys; key < end; key += keys) {
      const int64_t medium = key / params.latents, latent = key % params.latents;
      keys = smaller(smaller(block_keys, end - key), params.latents - latent);
      const T* k = at(params.k, sequence, medium, latent, kv_head);
      const T* v = at(params.v, sequence, medium, latent, kv_head);
      if (average)
        for (int64_t j = 0; j < rows * block_keys; ++j) scores[j] = 0;
      else
        score<rows>(params, k, v, keys);
      weigh<rows>(keys);
      const int64_t next = key + keys < end ? key + keys : key;
      add_values<rows>(
          params, v, at(params.k, sequence, next / params.latents, next % params.latents, kv_head), keys);
    }
  }

  static FK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  static FK_INLINE const T* at(
      const Media& media, int64_t sequence, int64_t medium, int64_t latent, int64_t kv_head) {
    return (const T*)media.data + sequence * media.batch + medium * media.medium + latent * media.latent +
           kv_head * media.head;
  }

  // Normed where there is a norm, with zeros behind the last column.
  template <int rows>
  void load_queries(const DecodeAttention& params, int64_t b, int64_t head) {
    for (int r = 0; r < rows; ++r) {
      float* row = q + r * row_floats;
      const float* from = params.q + (b * params.heads + head + r) * params.head_dim;
      for (int64_t j = 0; j < params.head_dim; j += width) store(row + j, load(from + j, params.head_dim - j));
      if (!params.q_norm.weight) continue;
      RowNorm norm = params.q_norm;
      norm.columns = params.head_dim, norm.x = norm.y = {row, DType::f32, 0};
      Scratch none{nullptr};
      Normalize(none, norm).run(norm, 0);
    }
  }

  // scores = q k^T; asks for the values meanwhile. The rows of a head lie apart, which the processor does not foresee.
  template <int rows>
  FK_INLINE void score(const DecodeAttention& params, const T* k, const T* v, int64_t keys) {
    constexpr int of_a_vector = width / linear::power_of_two(rows), at_once = of_a_vector < 4 ? of_a_vector : 4;
    int64_t j = 0;
    for (; j + at_once <= keys; j += at_once) {
      for (int i = 0; i < at_once; ++i) fetch(v + (j + i) * params.v.latent, params.head_dim);
      score_some<rows, at_once>(params, k + j * params.k.latent, scores + j);
    }
    for (; j < keys; ++j) {
      fetch(v + j * params.v.latent, params.head_dim);
      score_some<rows, 1>(params, k + j * params.k.latent, scores + j);
    }
  }

  static FK_INLINE void fetch(const T* from, int64_t count) {
    for (int64_t j = 0; j < count; j += 64 / sizeof(T)) __builtin_prefetch(from + j);
  }

  template <int rows, int keys>
  FK_INLINE void score_some(const DecodeAttention& params, const T* k, float* to) {
    constexpr int count = rows * keys;
    Floats sums[linear::power_of_two(count)] = {};
    const auto add = [&](int64_t j, const auto& load_key) {
      Floats k_j[keys];
#pragma GCC unroll 4
      for (int i = 0; i < keys; ++i) k_j[i] = load_key(k + i * params.k.latent + j);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Floats q_j = load(q + r * row_floats + j);
#pragma GCC unroll 4
        for (int i = 0; i < keys; ++i) sums[r * keys + i] += q_j * k_j[i];
      }
    };
    int64_t j = 0;
    for (; j + width <= params.head_dim; j += width) add(j, [](const T* from) { return load(from); });
    if (const int64_t left = params.head_dim - j; left > 0) add(j, [=](const T* from) { return load(from, left); });
    float added[width];
    store(added, linear::add_lanes(sums));
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < keys; ++i) to[r * block_keys + i] = added[r * keys + i] * params.scale;
  }

  // Turns the scores of a block into weights under the largest score so far, which those before it are brought to.
  template <int rows>
  FK_INLINE void weigh(int64_t keys) {
    for (int r = 0; r < rows; ++r) {
      float* row = scores + r * block_keys;
      Floats largest_score = splat(row_max[r]);
      for (int64_t j = 0; j < keys; j += width)
        largest_score = max(keep_first(load(row + j), keys - j, lowest), largest_score);
      const float new_max = largest(largest_score);
      const float alpha = row_max[r] == lowest ? 0 : exp(splat(row_max[r] - new_max))[0];
      Floats added = {};
      for (int64_t j = 0; j < keys; j += width) {
        const Floats p = keep_first(exp(load(row + j) - new_max), keys - j, 0);
        store(row + j, p), added += p;
      }
      row_max[r] = new_max, row_sum[r] = row_sum[r] * alpha + sum(added);
      if (alpha != 1)
        for (int64_t j = 0; j < row_floats; j += width)
          store(acc + r * row_floats + j, load(acc + r * row_floats + j) * alpha);
    }
  }

  // acc += p v; asks for the next block's keys meanwhile.
  template <int rows>
  FK_INLINE void add_values(const DecodeAttention& params, const T* v, const T* next_k, int64_t keys) {
    constexpr int vectors = width == 16 ? 4 : 2;
    int64_t j = 0;
    const auto by_vector = [](const T* from) { return load(from); };
    for (; j + vectors * width <= params.head_dim; j += vectors * width)
      add_columns<rows, vectors>(params, v, next_k, keys, j, by_vector);
    for (; j + width <= params.head_dim; j += width) add_columns<rows, 1>(params, v, next_k, keys, j, by_vector);
    if (const int64_t left = params.head_dim - j; left > 0)
      add_columns<rows, 1>(params, v, next_k, keys, j, [=](const T* from) { return load(from, left); });
  }

  template <int rows, int vectors, class Load>
  FK_INLINE void add_columns(
      const DecodeAttention& params, const T* v, const T* next_k, int64_t keys, int64_t first,
      const Load& load_value) {
    Floats sums[rows][vectors];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) sums[r][i] = load(acc + r * row_floats + first + i * width);
    for (int64_t j = 0; j < keys; ++j) {
      fetch(next_k + j * params.k.latent + first, vectors * width);
      Floats v_j[vectors];
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) v_j[i] = load_value(v + j * params.v.latent + first + i * width);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) sums[r][i] += scores[r * block_keys + j] * v_j[i];
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) store(acc + r * row_floats + first + i * width, sums[r][i]);
  }
};

// The splits of each row as one result.
struct Merge {
  int64_t row_floats;
  float* acc;

  Merge(Scratch& scratch, const DecodeAttention& params)
      : row_floats(round_up(params.head_dim, width)), acc(scratch.take(row_floats)) {}

  static int64_t tasks(const DecodeAttention& params) {
    return count_splits(params) == 1 ? 0 : params.batch * params.heads;
  }

  void run(const DecodeAttention& params, int64_t row) {
    const int64_t splits = count_splits(params);
    const float *maxima = params.row_max + row * splits, *sums = params.row_sum + row * splits;
    float row_max = lowest, row_sum = 0;
    for (int64_t i = 0; i < splits; ++i)
      if (sums[i] != 0 && !(maxima[i] <= row_max)) row_max = maxima[i];
    for (int64_t j = 0; j < row_floats; j += width) store(acc + j, Floats{});
    for (int64_t i = 0; i < splits; ++i) {
      if (sums[i] == 0) continue;
      const float alpha = exp(splat(maxima[i] - row_max))[0];
      const float* from = params.partial_out + (row * splits + i) * row_floats;
      row_sum += sums[i] * alpha;
      for (int64_t j = 0; j < row_floats; j += width) store(acc + j, load(acc + j) + load(from + j) * alpha);
    }
    store_row(params, row / params.heads, row % params.heads, acc, row_sum);
  }
};

}  // namespace flamingo_kernels::FK_ISA::gated_block_decode
