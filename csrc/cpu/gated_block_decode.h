// What a decoding step of a gated block does around its products: norms of rows, and one row of every text attending to
// the kept keys and values of its media.
//
// Oracle: flamingo_kernels/ops/gated_block_decode/reference.py; the products are those of linear.h and linear_int8.h.
// The attention reads what a text sees of K and V once for a group of heads: 2 numbers a key, head of K and column, and
// 4 FLOPs of each head that reads them. A task owns a text and a head of K; where keys are many, all heads and a split of
// the keys, always of so many, so that the results do not depend on the number of threads; the splits of a row are merged
// in their order.
#pragma once

#include "attention.h"
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
constexpr int64_t group = 4;  // heads that read a key at once
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
  // Whose scores are known before their values are added; what is asked for ahead fits in the L1 cache.
  static constexpr int64_t block_keys = sizeof(T) == 2 ? 64 : 32;
  int64_t row_floats;  // of a head: whole vectors
  float *q, *acc;      // [heads of a task][row_floats]
  float *row_max, *row_sum;
  float* scores;      // [group][block_keys]
  float* q_words;     // of each group, for tile registers: [words(head_dim)][tile_side]
  float* products;    // [block_keys][tile_side]
  BFloat16* rounded;  // [group][head_dim]

  Attend(Scratch& scratch, const DecodeAttention& params) : row_floats(round_up(params.head_dim, width)) {
    const int64_t heads = heads_of_a_task(params);
    q = scratch.take(heads * row_floats);
    acc = scratch.take(heads * row_floats);
    row_max = scratch.take(heads);
    row_sum = scratch.take(heads);
    scores = scratch.take(group * block_keys);
    if (!fits_tiles(params)) return;
    q_words = scratch.take(heads / sharing(params) * groups(params) * group_words(params));
    products = scratch.take(block_keys * tile_side);
    rounded = (BFloat16*)scratch.take(group * words<Tiles>(params.head_dim));
  }

  static int64_t tasks(const DecodeAttention& params) {
    return params.batch * count_splits(params) * params.heads / heads_of_a_task(params);
  }

  void run(const DecodeAttention& params, int64_t task) {
    const int64_t splits = count_splits(params), split = task % splits;
    const int64_t heads = heads_of_a_task(params), of_a_text = params.heads / heads;
    const int64_t b = task / splits / of_a_text, first = task / splits % of_a_text * heads;
    for (int64_t i = 0; i < heads; ++i) row_max[i] = lowest, row_sum[i] = 0;
    for (int64_t j = 0; j < heads * row_floats; j += width) store(acc + j, Floats{});
    attend(params, b, first, heads, split);
    for (int64_t i = 0; i < heads; ++i)
      if (splits == 1)
        store_row(params, b, first + i, acc + i * row_floats, row_sum[i]);
      else
        keep(params, (b * params.heads + first + i) * splits + split, i);
  }

 private:
  // Where keys are many, a task has all heads: what a key has of them lies side by side, in the same pages.
  static int64_t heads_of_a_task(const DecodeAttention& params) {
    return count_splits(params) == 1 ? sharing(params) : params.heads;
  }

  // Heads that share one of K, and how many groups they are.
  static int64_t sharing(const DecodeAttention& params) { return params.heads / params.kv_heads; }
  static int64_t groups(const DecodeAttention& params) { return (sharing(params) + group - 1) / group; }

  // Tile registers read keys where they are, in whole words and tiles.
  static bool fits_tiles(const DecodeAttention& params) {
    return in_tiles<T> && params.head_dim % (2 * tile_side) == 0 && params.k.latent % 2 == 0;
  }
  static int64_t group_words(const DecodeAttention& params) { return words<Tiles>(params.head_dim) * tile_side; }

  void keep(const DecodeAttention& params, int64_t place, int64_t i) {
    params.row_max[place] = row_max[i], params.row_sum[place] = row_sum[i];
    for (int64_t j = 0; j < row_floats; j += width)
      store(params.partial_out + place * row_floats + j, load(acc + i * row_floats + j));
  }

  // Heads from `first` on over the keys of a split that the text sees.
  void attend(const DecodeAttention& params, int64_t b, int64_t first, int64_t heads, int64_t split) {
    const int32_t lo = params.lo[b], hi = params.hi[b];
    const bool average = hi < 0;  // the mean of all values
    const int64_t from = average || lo < 0 ? 0 : lo, to = average || hi > params.media ? params.media : hi;
    const int64_t begin = larger(from * params.latents, split * split_keys);
    const int64_t end = smaller(to * params.latents, (split + 1) * split_keys);
    if (begin >= end) return;
    if (!average) load_queries(params, b, first, heads);
    const int64_t sharing = Attend::sharing(params), kv_first = first / sharing, kv_end = kv_first + heads / sharing;
    for (int64_t key = begin, keys; key < end; key += keys) {
      keys = smaller(smaller(block_keys, end - key), params.latents - key % params.latents);
      const int64_t next_key = key + keys < end ? key + keys : key;
      for (int64_t kv_head = kv_first; kv_head < kv_end; ++kv_head) {
        const bool is_last = kv_head + 1 == kv_end;
        const Block block{
            at(params.k, params, b, key, kv_head), at(params.v, params, b, key, kv_head),
            at(params.k, params, b, is_last ? next_key : key, is_last ? kv_first : kv_head + 1), keys, average};
        for (int64_t i = 0; i < sharing; i += group) {
          const int64_t rows = smaller(group, sharing - i), row = (kv_head - kv_first) * sharing + i;
          if (rows == 4) add_block<4>(params, block, row);
          if (rows == 3) add_block<3>(params, block, row);
          if (rows == 2) add_block<2>(params, block, row);
          if (rows == 1) add_block<1>(params, block, row);
        }
      }
    }
  }

  // Some keys of a head of K. The next ones are asked for ahead: the rows of a head lie apart, which the processor
  // does not foresee.
  struct Block {
    const T *k, *v, *next_k;
    int64_t keys;
    bool average;
  };

  static FK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  static FK_INLINE const T* at(
      const Media& media, const DecodeAttention& params, int64_t b, int64_t key, int64_t kv_head) {
    return (const T*)media.data + b / params.texts * media.batch + key / params.latents * media.medium +
           key % params.latents * media.latent + kv_head * media.head;
  }

  static FK_INLINE void fetch(const T* from, int64_t count) {
    for (int64_t j = 0; j < count; j += 64 / sizeof(T)) __builtin_prefetch(from + j);
  }

  // `rows` heads of the task over a block.
  template <int rows>
  void add_block(const DecodeAttention& params, const Block& block, int64_t row) {
    if (block.average)
      for (int64_t j = 0; j < rows * block_keys; ++j) scores[j] = 0;
    else
      score<rows>(params, block, row);
    weigh<rows>(block.keys, row);
    add_values<rows>(params, block, acc + row * row_floats);
  }

  // Normed where there is a norm, with zeros behind the last column. Those for tile registers are rounded as a product
  // would be given them, the others scaled.
  void load_queries(const DecodeAttention& params, int64_t b, int64_t first, int64_t heads) {
    for (int64_t i = 0; i < heads; ++i) {
      float* row = q + i * row_floats;
      const float* from = params.q + (b * params.heads + first + i) * params.head_dim;
      for (int64_t j = 0; j < params.head_dim; j += width) store(row + j, load(from + j, params.head_dim - j));
      if (params.q_norm.weight) {
        RowNorm norm = params.q_norm;
        norm.columns = params.head_dim, norm.x = norm.y = {row, DType::f32, 0};
        Scratch none{nullptr};
        Normalize(none, norm).run(norm, 0);
      }
    }
    if constexpr (in_tiles<T>)
      for (int64_t i = 0; fits_tiles(params) && i < heads; i += sharing(params))
        for (int64_t j = 0; j < sharing(params); j += group)
          pack_queries(params, i + j, smaller(group, sharing(params) - j));
    for (int64_t j = 0; j < heads * row_floats; j += width) store(q + j, load(q + j) * params.scale);
  }

  float* words_of(const DecodeAttention& params, int64_t row) {
    const int64_t kv_head = row / sharing(params), place = row % sharing(params) / group;
    return q_words + (kv_head * groups(params) + place) * group_words(params);
  }

  void pack_queries(const DecodeAttention& params, int64_t row, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < params.head_dim; j += width)
        store_element(rounded + i * params.head_dim + j, load(q + (row + i) * row_floats + j));
    pack_transposed<Tiles>(rounded, params.head_dim, rows, params.head_dim, words_of(params, row), tile_side);
  }

  // scores = scale q k^T
  template <int rows>
  FK_INLINE void score(const DecodeAttention& params, const Block& block, int64_t row) {
    constexpr int of_a_vector = width / linear::power_of_two(rows), at_once = of_a_vector < 4 ? of_a_vector : 4;
    const auto score_at = [&]<int keys>(int64_t j) {
      for (int i = 0; i < keys; ++i) fetch(block.v + (j + i) * params.v.latent, params.head_dim);
      score_some<rows, keys>(params, block.k + j * params.k.latent, q + row * row_floats, scores + j);
    };
    int64_t j = 0;
    if constexpr (in_tiles<T>)
      if (fits_tiles(params)) j = score_in_tiles<rows>(params, block, row);
    for (; j + at_once <= block.keys; j += at_once) score_at.template operator()<at_once>(j);
    for (; j < block.keys; ++j) score_at.template operator()<1>(j);
  }

  // The first of them on tile registers; returns how many.
  template <int rows>
  int64_t score_in_tiles(const DecodeAttention& params, const Block& block, int64_t row) {
    const int64_t whole = block.keys / tile_side * tile_side;
    multiply_in_tiles<OfBFloat16, false>(
        whole, tile_side, words<Tiles>(params.head_dim), (const float*)block.k, params.k.latent / 2,
        words_of(params, row), tile_side, products, tile_side);
    for (int64_t j = 0; j < whole; ++j) {
      fetch(block.v + j * params.v.latent, params.head_dim);
      for (int r = 0; r < rows; ++r) scores[r * block_keys + j] = products[j * tile_side + r] * params.scale;
    }
    return whole;
  }

  template <int rows, int keys>
  FK_INLINE void score_some(const DecodeAttention& params, const T* k, const float* q, float* to) {
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
    for (int r = 0; r < rows; ++r) __builtin_memcpy(to + r * block_keys, added + r * keys, keys * sizeof(float));
  }

  // Turns the scores of a block into weights under the largest score so far, which those before it are brought to.
  template <int rows>
  FK_INLINE void weigh(int64_t keys, int64_t first) {
    for (int r = 0; r < rows; ++r) {
      float *row = scores + r * block_keys, *acc_row = acc + (first + r) * row_floats;
      float &max_r = row_max[first + r], &sum_r = row_sum[first + r];
      Floats largest_score = splat(max_r);
      for (int64_t j = 0; j < keys; j += width)
        largest_score = max(keep_first(load(row + j), keys - j, lowest), largest_score);
      const float new_max = largest(largest_score);
      const float alpha = max_r == lowest ? 0 : exp(splat(max_r - new_max))[0];
      Floats added = {};
      for (int64_t j = 0; j < keys; j += width) {
        const Floats p = keep_first(exp(load(row + j) - new_max), keys - j, 0);
        store(row + j, p), added += p;
      }
      max_r = new_max, sum_r = sum_r * alpha + sum(added);
      if (alpha != 1)
        for (int64_t j = 0; j < row_floats; j += width)
          store(acc_row + j, load(acc_row + j) * alpha);
    }
  }

  // acc += p v
  template <int rows>
  FK_INLINE void add_values(const DecodeAttention& params, const Block& block, float* acc) {
    constexpr int vectors = width == 16 ? 4 : 2;
    int64_t j = 0;
    const auto by_vector = [](const T* from) { return load(from); };
    for (; j + vectors * width <= params.head_dim; j += vectors * width)
      add_columns<rows, vectors>(params, block, acc, j, by_vector);
    for (; j + width <= params.head_dim; j += width) add_columns<rows, 1>(params, block, acc, j, by_vector);
    if (const int64_t left = params.head_dim - j; left > 0)
      add_columns<rows, 1>(params, block, acc, j, [=](const T* from) { return load(from, left); });
  }

  template <int rows, int vectors, class Load>
  FK_INLINE void add_columns(
      const DecodeAttention& params, const Block& block, float* acc, int64_t first, const Load& load_value) {
    Floats sums[rows][vectors];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) sums[r][i] = load(acc + r * row_floats + first + i * width);
    for (int64_t j = 0; j < block.keys; ++j) {
      fetch(block.next_k + j * params.k.latent + first, vectors * width);
      Floats v_j[vectors];
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) v_j[i] = load_value(block.v + j * params.v.latent + first + i * width);
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
