// Text rows attend to the media in their span.
//
// Oracle: flamingo_kernels/ops/masked_cross_attention/reference.py. Forward reads q, k, v and writes out, each once.
// Backward reads q, k, v, dout and writes dq, dk, dv, each once; where rows see several media it reads twice, and out
// once. FLOPs are 4 per (row, visible key, channel) forward and 10 backward, 14 where rows see several media, and 4
// more for rows in which one key has most of the weight.
//
// Keys are packed in blocks: a medium, or where it has many, parts of it. Where no row sees two blocks (`one_shot`), a
// task is a medium of one head: its keys are packed once, each row's softmax needs one pass, and the backward pass owns
// dk, dv and the rows of dq. Otherwise forward and dq take a task for each block of rows and visit the keys that these
// rows see; dq comes first and leaves each row's delta to dk and dv.
#pragma once

#include "attention.h"

namespace flamingo_kernels::FK_ISA::masked_cross_attention {

using Params = MaskedCrossAttention;

template <class T>
FK_INLINE Strided<T> latents_of(const Media& media, int64_t b, int64_t m, int64_t h, int64_t first = 0) {
  return {(T*)media.data + b * media.batch + m * media.medium + first * media.latent + h * media.head, media.latent};
}

// Blocks of a medium, and the keys of each but the last, in whole words and tiles where there are several.
FK_INLINE int64_t count_blocks(const Params& params) { return (params.latents + most_keys - 1) / most_keys; }
FK_INLINE int64_t block_keys(const Params& params) {
  const int64_t blocks = count_blocks(params);
  return blocks <= 1 ? params.latents : round_up((params.latents + blocks - 1) / blocks, 2 * tile_side);
}

struct Range {
  int64_t begin, end;
};

// The rows of a range that may see medium m.
FK_INLINE Range rows_near(const Params& params, int64_t b, int64_t m, Range range) {
  const int64_t start = params.start[b * params.media + m], stop = params.stop[b * params.media + m];
  return {start > range.begin ? start : range.begin, stop < range.end ? stop : range.end};
}

FK_INLINE bool sees(const Params& params, int64_t b, int64_t t, int64_t m) {
  return params.lo[b * params.length + t] <= m && m < params.hi[b * params.length + t];
}
FK_INLINE bool averages(const Params& params, int64_t b, int64_t t) {
  return params.averages && params.hi[b * params.length + t] < 0;
}

// Whether a row sees no medium. Where rows see one, the range of rows of that medium may leave this row out too.
FK_INLINE bool fully_masked(const Params& params, int64_t b, int64_t t) {
  const int64_t lo = params.lo[b * params.length + t], hi = params.hi[b * params.length + t];
  const int64_t first = lo > 0 ? lo : 0, end = hi < params.media ? hi : params.media;
  if (end <= first) return true;
  const Range row = rows_near(params, b, first, {t, t + 1});
  return params.immediate && row.begin >= row.end;
}
FK_INLINE int64_t kv_head(const Params& params, int64_t h) { return h / (params.heads / params.kv_heads); }

FK_INLINE void store_softmax(const Params& params, int64_t b, int64_t h, int64_t t, float row_max, float row_sum) {
  const int64_t row = (b * params.heads + h) * params.length + t;
  params.row_max[row] = row_max, params.row_sum[row] = row_sum;
}

// Packs the keys and values of block i of a medium.
template <class T, class Block>
FK_INLINE void pack(Block& block, const Params& params, int64_t b, int64_t hk, int64_t m, int64_t i = 0) {
  const int64_t first = i * block_keys(params), left = params.latents - first;
  block.pack(
      latents_of<const T>(params.k, b, m, hk, first), latents_of<const T>(params.v, b, m, hk, first),
      left < block_keys(params) ? left : block_keys(params));
}

// Calls `visit(rows, count)` with every `most` rows of a range that see medium m.
template <int64_t most, class Visit>
FK_INLINE void visit_rows_seeing(const Params& params, int64_t b, int64_t m, Range range, Visit visit) {
  visit_rows<most>(range.begin, range.end, [&](int64_t t) { return sees(params, b, t, m); }, visit);
}

// The mean of all values of a sequence: what rows that average return.
template <class T>
void average_values(const Params& params, int64_t b, int64_t h, float* mean) {
  const float p = 1.0f / (params.media * params.latents);
  for (int64_t j = 0; j < padded(params.head_dim); ++j) mean[j] = 0;
  for (int64_t m = 0; m < params.media; ++m) {
    Strided<const T> v = latents_of<const T>(params.v, b, m, kv_head(params, h));
    for (int64_t r = 0; r < params.latents; ++r)
      for (int64_t j = 0; j < params.head_dim; j += width)
        store(mean + j, load(mean + j) + load(v[r] + j, params.head_dim - j) * p);
  }
}

// Rows that see no medium: zero, or the mean of all values.
template <class T>
void write_masked_rows(const Params& params, int64_t b, int64_t h, int64_t begin, int64_t end, float* mean) {
  Strided<T> out = rows_of<T>(params.out, b, h);
  bool ready = false;
  for (int64_t t = begin; t < end; ++t) {
    if (!fully_masked(params, b, t)) continue;
    if (averages(params, b, t) && !ready) average_values<T>(params, b, h, mean), ready = true;
    for (int64_t j = 0; j < params.head_dim; j += width)
      store(out[t] + j, averages(params, b, t) ? load(mean + j) : Floats{}, params.head_dim - j);
    if (!params.one_shot) store_softmax(params, b, h, t, 0, 1);
  }
}

template <class T>
struct Forward {
  KeyBlock<T> block;
  QueryTile<T> tile;
  OnlineSoftmax<T> online;
  float* mean;

  Forward(Scratch& scratch, const Params& params)
      : block(scratch, block_keys(params), params.head_dim),
        tile(scratch, block_keys(params), params.head_dim),
        online(scratch, params.head_dim),
        mean(scratch.take(padded(params.head_dim))) {}

  static int64_t tasks(const Params& params) {
    const int64_t media = params.media + 1,
                  blocks = (params.length + OnlineSoftmax<T>::most - 1) / OnlineSoftmax<T>::most;
    return params.batch * params.heads * (params.one_shot ? media : blocks);
  }

  void run(const Params& params, int64_t task) {
    const int64_t h = task % params.heads, rest = task / params.heads;
    if (!params.one_shot) {
      const int64_t blocks = (params.length + OnlineSoftmax<T>::most - 1) / OnlineSoftmax<T>::most;
      return attend_block(params, rest / blocks, h, rest % blocks * OnlineSoftmax<T>::most);
    }
    const int64_t m = rest % (params.media + 1), b = rest / (params.media + 1);
    if (m == params.media) return write_masked_rows<T>(params, b, h, 0, params.length, mean);
    attend_medium(params, b, h, m);
  }

  // All rows that see medium m, and see nothing else.
  void attend_medium(const Params& params, int64_t b, int64_t h, int64_t m) {
    const Range near = rows_near(params, b, m, {0, params.length});
    if (near.begin >= near.end) return;
    pack<T>(block, params, b, kv_head(params, h), m);
    if (h + 1 < params.heads) {  // the next task's
      tile.prefetch.plan(0, latents_of<const T>(params.k, b, m, kv_head(params, h + 1)), params.latents);
      tile.prefetch.plan(1, latents_of<const T>(params.v, b, m, kv_head(params, h + 1)), params.latents);
    }
    Strided<const T> q = rows_of<const T>(params.q, b, h);
    Strided<T> out = rows_of<T>(params.out, b, h);
    visit_rows_seeing<forward_rows<T>>(params, b, m, near, [&](const int64_t* rows, int64_t count) {
      float row_max[forward_rows<T>], row_sum[forward_rows<T>];
      const int64_t next = rows[count - 1] + 1, left = near.end - next;
      tile.prefetch.plan(2, {q[next], q.row}, left < forward_rows<T> ? left : forward_rows<T>);
      tile.prefetch.plan(3, {out[rows[0]], out.row}, count);
      tile.count = 0;
      for (int64_t i = 0; i < count; ++i) tile.add(q[rows[i]]), row_max[i] = lowest;
      tile.attend(block, params.scale, row_max, row_sum);
      for (int64_t i = 0; i < count; ++i)
        write_row(out[rows[i]], tile.acc + i * tile.acc_row, params.head_dim, 1 / row_sum[i]);
    });
  }

  // A block of rows, and every block of keys that one of them sees.
  void attend_block(const Params& params, int64_t b, int64_t h, int64_t begin) {
    const int64_t end = begin + OnlineSoftmax<T>::most < params.length ? begin + OnlineSoftmax<T>::most : params.length;
    Strided<const T> q = rows_of<const T>(params.q, b, h);
    online.reset(end - begin);
    for (int64_t m = 0; m < params.media; ++m) {
      const Range near = rows_near(params, b, m, {begin, end});
      for (int64_t i = 0; i < count_blocks(params) && near.begin < near.end; ++i) {
        pack<T>(block, params, b, kv_head(params, h), m, i);
        visit_rows_seeing<forward_rows<T>>(params, b, m, near, [&](const int64_t* rows, int64_t count) {
          int64_t members[forward_rows<T>];
          tile.count = 0;
          for (int64_t i = 0; i < count; ++i) tile.add(q[rows[i]]), members[i] = rows[i] - begin;
          online.attend(tile, block, params.scale, members);
        });
      }
    }
    Strided<T> out = rows_of<T>(params.out, b, h);
    for (int64_t t = begin; t < end; ++t) {
      if (fully_masked(params, b, t)) continue;
      const int64_t i = t - begin;
      write_row(out[t], online.acc + i * online.row, params.head_dim, 1 / online.row_sum[i]);
      store_softmax(params, b, h, t, online.row_max[i], online.row_sum[i]);
    }
    write_masked_rows<T>(params, b, h, begin, end, mean);
  }
};

// Fills a tile with rows, and with their softmax as the forward pass kept it.
template <class T>
FK_INLINE void fill(
    GradientTile<T>& tile, const Params& params, int64_t b, int64_t h, const int64_t* rows, int64_t count) {
  const Strided<const T> q = rows_of<const T>(params.q, b, h), dout = rows_of<const T>(params.dout, b, h);
  tile.count = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = (b * params.heads + h) * params.length + rows[i];
    tile.add(q[rows[i]], dout[rows[i]], params.delta[row], params.row_max[row], params.row_sum[row]);
  }
}

// dk and dv of one block of keys; where rows see no other, also their dq.
template <class T>
struct Backward {
  KeyGradients<T> block;
  GradientTile<T> tile;
  float* averaged_dv;

  Backward(Scratch& scratch, const Params& params)
      : block(scratch, block_keys(params), params.head_dim),
        tile(scratch, block_keys(params), params.head_dim),
        averaged_dv(scratch.take(padded(params.head_dim))) {}

  static int64_t tasks(const Params& params) {
    return params.batch * params.kv_heads * params.media * count_blocks(params);
  }

  void run(const Params& params, int64_t task) {
    const int64_t hk = task % params.kv_heads, rest = task / params.kv_heads, i = rest % count_blocks(params);
    const int64_t m = rest / count_blocks(params) % params.media, b = rest / count_blocks(params) / params.media;
    const int64_t group = params.heads / params.kv_heads, first = i * block_keys(params);
    pack<T>(block, params, b, hk, m, i);
    block.reset();
    if (params.one_shot && hk + 1 < params.kv_heads) {  // the next task's
      tile.prefetch.plan(0, latents_of<const T>(params.k, b, m, hk + 1), params.latents);
      tile.prefetch.plan(1, latents_of<const T>(params.v, b, m, hk + 1), params.latents);
    }
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) collect(params, b, h, m);
    if (params.averages)
      for (int64_t h = hk * group; h < (hk + 1) * group; ++h) add_averaged_dv(params, b, h);
    block.write(latents_of<T>(params.dk, b, m, hk, first), latents_of<T>(params.dv, b, m, hk, first));
  }

  void collect(const Params& params, int64_t b, int64_t h, int64_t m) {
    const Range near = rows_near(params, b, m, {0, params.length});
    Strided<const T> q = rows_of<const T>(params.q, b, h), dout = rows_of<const T>(params.dout, b, h);
    Strided<T> dq = rows_of<T>(params.dq, b, h);
    visit_rows_seeing<backward_rows<T>>(params, b, m, near, [&](const int64_t* rows, int64_t count) {
      if (!params.one_shot) {
        fill(tile, params, b, h, rows, count);
        tile.compute_p_ds(block, params.scale);
        return tile.add_dk_dv(block);
      }
      const int64_t next = rows[count - 1] + 1;
      const int64_t left = near.end - next < backward_rows<T> ? near.end - next : backward_rows<T>;
      tile.prefetch.plan(2, {q[next], q.row}, left);
      tile.prefetch.plan(3, {dout[next], dout.row}, left);
      tile.prefetch.plan(4, {dq[rows[0]], dq.row}, count);
      tile.count = 0;
      for (int64_t i = 0; i < count; ++i) tile.add(q[rows[i]], dout[rows[i]]);
      tile.compute_p_ds_one_shot(block, params.scale);
      tile.add_dk_dv(block);
      tile.template multiply_dq<false>(block, tile.dq);
      for (int64_t i = 0; i < count; ++i) write_row(dq[rows[i]], tile.dq + i * tile.channel_row, params.head_dim, 1);
    });
  }

  // Rows that average all values send each value an equal share of their gradient.
  void add_averaged_dv(const Params& params, int64_t b, int64_t h) {
    const float p = 1.0f / (params.media * params.latents);
    Strided<const T> dout = rows_of<const T>(params.dout, b, h);
    bool any = false;
    for (int64_t t = 0; t < params.length; ++t) {
      if (!averages(params, b, t)) continue;
      if (!any)
        for (int64_t j = 0; j < padded(params.head_dim); ++j) averaged_dv[j] = 0;
      any = true;
      for (int64_t j = 0; j < params.head_dim; j += width)
        store(averaged_dv + j, load(averaged_dv + j) + load(dout[t] + j, params.head_dim - j) * p);
    }
    if (!any) return;
    block.clear_if_empty();
    for (int64_t r = 0; r < block.keys; ++r)
      for (int64_t j = 0; j < params.head_dim; j += width) {
        float* to = block.dv + r * block.channel_row + j;
        store(to, load(to) + load(averaged_dv + j));
      }
  }
};

// dq of the rows that Backward leaves: those that see nothing or, where rows see several blocks, all, and their delta.
template <class T>
struct QueryBackward {
  static constexpr int64_t most = backward_rows<T> * 4;
  KeyGradients<T> block;
  GradientTile<T> tile;
  float* dq;

  QueryBackward(Scratch& scratch, const Params& params)
      : block(scratch, block_keys(params), params.head_dim),
        tile(scratch, block_keys(params), params.head_dim),
        dq(scratch.take(most * padded(params.head_dim))) {}

  static int64_t tasks(const Params& params) {
    return params.batch * params.heads * ((params.length + most - 1) / most);
  }

  void run(const Params& params, int64_t task) {
    const int64_t h = task % params.heads, blocks = (params.length + most - 1) / most;
    const int64_t b = task / params.heads / blocks, begin = task / params.heads % blocks * most;
    const int64_t end = begin + most < params.length ? begin + most : params.length, row = padded(params.head_dim);
    for (int64_t i = 0; i < (end - begin) * row; ++i) dq[i] = 0;
    if (!params.one_shot) {
      find_delta(params, b, h, {begin, end});
      for (int64_t m = 0; m < params.media; ++m) collect(params, b, h, m, {begin, end});
    }
    Strided<T> to = rows_of<T>(params.dq, b, h);
    for (int64_t t = begin; t < end; ++t)
      if (!params.one_shot || fully_masked(params, b, t)) write_row(to[t], dq + (t - begin) * row, params.head_dim, 1);
  }

  void find_delta(const Params& params, int64_t b, int64_t h, Range block_rows) {
    const int64_t row = (b * params.heads + h) * params.length;
    Strided<const T> dout = rows_of<const T>(params.dout, b, h), out = rows_of<const T>(params.out, b, h);
    const auto saturated = [&](int64_t t) { return is_saturated(params.row_sum[row + t]); };
    for (int64_t t = block_rows.begin; t < block_rows.end; ++t)
      params.delta[row + t] = saturated(t) ? 0 : row_delta(dout[t], out[t], params.head_dim);
    for (int64_t m = 0; m < params.media; ++m) {
      const Range near = rows_near(params, b, m, block_rows);
      const auto wanted = [&](int64_t t) { return saturated(t) && sees(params, b, t, m); };
      for (int64_t i = 0; i < count_blocks(params); ++i) {
        bool packed = false;
        visit_rows<backward_rows<T>>(near.begin, near.end, wanted, [&](const int64_t* rows, int64_t count) {
          if (!packed) pack<T>(block, params, b, kv_head(params, h), m, i), packed = true;
          fill(tile, params, b, h, rows, count);
          tile.add_delta(block, params.scale);
          for (int64_t i = 0; i < count; ++i) params.delta[row + rows[i]] = tile.delta[i];
        });
      }
    }
  }

  void collect(const Params& params, int64_t b, int64_t h, int64_t m, Range block_rows) {
    const int64_t row = padded(params.head_dim);
    const Range near = rows_near(params, b, m, block_rows);
    for (int64_t i = 0; i < count_blocks(params) && near.begin < near.end; ++i) {
      pack<T>(block, params, b, kv_head(params, h), m, i);
      visit_rows_seeing<backward_rows<T>>(params, b, m, near, [&](const int64_t* rows, int64_t count) {
        fill(tile, params, b, h, rows, count);
        tile.compute_p_ds(block, params.scale);
        tile.template multiply_dq<false>(block, tile.dq);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < params.head_dim; j += width) {
            float* sum = dq + (rows[i] - block_rows.begin) * row + j;
            store(sum, load(sum) + load(tile.dq + i * tile.channel_row + j));
          }
      });
    }
  }
};

}  // namespace flamingo_kernels::FK_ISA::masked_cross_attention
