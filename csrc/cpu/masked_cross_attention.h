// Text rows attend to the media their span names.
//
// Oracle: flamingo_kernels/ops/masked_cross_attention/reference.py. Forward reads q, k, v and writes out
// once; FLOPs are 4 per (row, visible key, channel), 10 backward (14 where rows see several media, and 4 more for those
// that attend to one key almost alone).
//
// Where no row sees two media (`immediate`), a task is a medium of one head: its keys are packed once, each
// row's softmax needs one pass, and the backward pass owns dk, dv and the rows of dq. Otherwise forward and
// dq take a task for each block of rows and visit the media these rows name; dq comes first and leaves each row's delta
// to dk and dv.
#pragma once

#include "attention.h"

namespace flamingo_kernels::FK_ISA::masked_cross_attention {

using Params = MaskedCrossAttention;

template <class T>
FK_INLINE Strided<T> rows_of(const Rows& rows, int64_t b, int64_t h) {
  return {(T*)rows.data + b * rows.batch + h * rows.head, rows.row};
}

template <class T>
FK_INLINE Strided<T> latents_of(const Media& media, int64_t b, int64_t m, int64_t h) {
  return {(T*)media.data + b * media.batch + m * media.medium + h * media.head, media.latent};
}

struct Range {
  int64_t begin, end;
};

// The rows of a range that may see medium m.
FK_INLINE Range rows_near(const Params& p, int64_t b, int64_t m, Range range) {
  const int64_t start = p.start[b * p.media + m], stop = p.stop[b * p.media + m];
  return {start > range.begin ? start : range.begin, stop < range.end ? stop : range.end};
}

FK_INLINE bool sees(const Params& p, int64_t b, int64_t t, int64_t m) {
  return p.lo[b * p.length + t] <= m && m < p.hi[b * p.length + t];
}
FK_INLINE bool averages(const Params& p, int64_t b, int64_t t) { return p.averages && p.hi[b * p.length + t] < 0; }

// Whether no medium there is visits a row; where rows see one, also because the mask keeps its medium from it.
FK_INLINE bool blind(const Params& p, int64_t b, int64_t t) {
  const int64_t lo = p.lo[b * p.length + t], hi = p.hi[b * p.length + t];
  const int64_t first = lo > 0 ? lo : 0, end = hi < p.media ? hi : p.media;
  if (end <= first) return true;
  const Range row = rows_near(p, b, first, {t, t + 1});
  return p.immediate && row.begin >= row.end;
}
FK_INLINE int64_t kv_head(const Params& p, int64_t h) { return h / (p.heads / p.kv_heads); }

FK_INLINE void keep_softmax(const Params& p, int64_t b, int64_t h, int64_t t, float max, float sum) {
  const int64_t row = (b * p.heads + h) * p.length + t;
  p.softmax_max[row] = max, p.softmax_sum[row] = sum;
}

// Call `visit(rows, count)` with every `most` rows of a range that see medium m.
template <int64_t most, class Visit>
FK_INLINE void visit_rows_of(const Params& p, int64_t b, int64_t m, Range range, Visit visit) {
  visit_rows<most>(range.begin, range.end, [&](int64_t t) { return sees(p, b, t, m); }, visit);
}

// The mean of all values of a sequence: what rows that average return.
template <class T>
void average_values(const Params& p, int64_t b, int64_t h, float* mean) {
  const float share = 1.0f / (p.media * p.latents);
  for (int64_t j = 0; j < padded(p.head_dim); ++j) mean[j] = 0;
  for (int64_t m = 0; m < p.media; ++m) {
    Strided<const T> v = latents_of<const T>(p.v, b, m, kv_head(p, h));
    for (int64_t r = 0; r < p.latents; ++r)
      for (int64_t j = 0; j < p.head_dim; j += width)
        store(mean + j, load(mean + j) + load(v[r] + j, p.head_dim - j) * share);
  }
}

// Rows that see no medium: zero, or the mean of all values.
template <class T>
void write_blind_rows(const Params& p, int64_t b, int64_t h, int64_t begin, int64_t end, float* mean) {
  Strided<T> out = rows_of<T>(p.out, b, h);
  bool ready = false;
  for (int64_t t = begin; t < end; ++t) {
    if (!blind(p, b, t)) continue;
    if (averages(p, b, t) && !ready) average_values<T>(p, b, h, mean), ready = true;
    for (int64_t j = 0; j < p.head_dim; j += width)
      store(out[t] + j, averages(p, b, t) ? load(mean + j) : Floats{}, p.head_dim - j);
    if (!p.immediate) keep_softmax(p, b, h, t, 0, 1);
  }
}

template <class T>
struct Forward {
  KeyBlock<T> block;
  QueryTile<T> tile;
  RunningRows<T> running;
  float* mean;

  Forward(Scratch& scratch, const Params& p)
      : block(scratch, p.latents, p.head_dim),
        tile(scratch, p.latents, p.head_dim),
        running(scratch, p.head_dim),
        mean(scratch.take(padded(p.head_dim))) {}

  static int64_t tasks(const Params& p) {
    const int64_t media = p.media + 1, blocks = (p.length + RunningRows<T>::most - 1) / RunningRows<T>::most;
    return p.batch * p.heads * (p.immediate ? media : blocks);
  }

  void run(const Params& p, int64_t task) {
    const int64_t h = task % p.heads, rest = task / p.heads;
    if (!p.immediate) {
      const int64_t blocks = (p.length + RunningRows<T>::most - 1) / RunningRows<T>::most;
      return attend_block(p, rest / blocks, h, rest % blocks * RunningRows<T>::most);
    }
    const int64_t m = rest % (p.media + 1), b = rest / (p.media + 1);
    if (m == p.media) return write_blind_rows<T>(p, b, h, 0, p.length, mean);
    attend_medium(p, b, h, m);
  }

  void pack(const Params& p, int64_t b, int64_t h, int64_t m) {
    block.pack(
        latents_of<const T>(p.k, b, m, kv_head(p, h)), latents_of<const T>(p.v, b, m, kv_head(p, h)), p.latents);
  }

  // All rows that see medium m, and see nothing else.
  void attend_medium(const Params& p, int64_t b, int64_t h, int64_t m) {
    const Range near = rows_near(p, b, m, {0, p.length});
    if (near.begin >= near.end) return;
    pack(p, b, h, m);
    if (h + 1 < p.heads) {  // the next task's
      tile.ahead.plan(0, latents_of<const T>(p.k, b, m, kv_head(p, h + 1)), p.latents);
      tile.ahead.plan(1, latents_of<const T>(p.v, b, m, kv_head(p, h + 1)), p.latents);
    }
    Strided<const T> q = rows_of<const T>(p.q, b, h);
    Strided<T> out = rows_of<T>(p.out, b, h);
    visit_rows_of<forward_rows<T>>(p, b, m, near, [&](const int64_t* rows, int64_t count) {
      float highest[forward_rows<T>], sums[forward_rows<T>];
      const int64_t next = rows[count - 1] + 1, left = near.end - next;
      tile.ahead.plan(2, {q[next], q.row}, left < forward_rows<T> ? left : forward_rows<T>);
      tile.ahead.plan(3, {out[rows[0]], out.row}, count);
      tile.count = 0;
      for (int64_t i = 0; i < count; ++i) tile.add(q[rows[i]]), highest[i] = lowest;
      tile.attend(block, p.scale, highest, sums);
      for (int64_t i = 0; i < count; ++i)
        write_row(out[rows[i]], tile.out + i * tile.out_row, p.head_dim, share_of(highest[i], sums[i]));
    });
  }

  // A block of rows, and every medium that one of them sees.
  void attend_block(const Params& p, int64_t b, int64_t h, int64_t begin) {
    const int64_t end = begin + RunningRows<T>::most < p.length ? begin + RunningRows<T>::most : p.length;
    Strided<const T> q = rows_of<const T>(p.q, b, h);
    running.reset(end - begin);
    for (int64_t m = 0; m < p.media; ++m) {
      const Range near = rows_near(p, b, m, {begin, end});
      if (near.begin >= near.end) continue;
      pack(p, b, h, m);
      visit_rows_of<forward_rows<T>>(p, b, m, near, [&](const int64_t* rows, int64_t count) {
        int64_t members[forward_rows<T>];
        tile.count = 0;
        for (int64_t i = 0; i < count; ++i) tile.add(q[rows[i]]), members[i] = rows[i] - begin;
        running.attend(tile, block, p.scale, members);
      });
    }
    Strided<T> out = rows_of<T>(p.out, b, h);
    for (int64_t t = begin; t < end; ++t) {
      if (blind(p, b, t)) continue;
      const int64_t i = t - begin;
      write_row(out[t], running.out + i * running.row, p.head_dim, share_of(running.max[i], running.sum[i]));
      keep_softmax(p, b, h, t, running.max[i], running.sum[i]);
    }
    write_blind_rows<T>(p, b, h, begin, end, mean);
  }
};

template <class T>
FK_INLINE void add_row(const Params& p, GradientTile<T>& tile, int64_t b, int64_t h, int64_t t) {
  const int64_t row = (b * p.heads + h) * p.length + t;
  tile.add(
      rows_of<const T>(p.q, b, h)[t], rows_of<const T>(p.dout, b, h)[t], p.delta[row], p.softmax_max[row],
      p.softmax_sum[row]);
}

// dk and dv of one medium; where rows see one medium only, also their dq.
template <class T>
struct Backward {
  KeyGradients<T> block;
  GradientTile<T> tile;
  float* average;

  Backward(Scratch& scratch, const Params& p)
      : block(scratch, p.latents, p.head_dim),
        tile(scratch, p.latents, p.head_dim),
        average(scratch.take(padded(p.head_dim))) {}

  static int64_t tasks(const Params& p) { return p.batch * p.kv_heads * p.media; }

  void run(const Params& p, int64_t task) {
    const int64_t hk = task % p.kv_heads, m = task / p.kv_heads % p.media, b = task / p.kv_heads / p.media;
    const int64_t group = p.heads / p.kv_heads;
    block.pack(latents_of<const T>(p.k, b, m, hk), latents_of<const T>(p.v, b, m, hk), p.latents);
    block.reset();
    if (hk + 1 < p.kv_heads) {  // the next task's
      tile.ahead.plan(0, latents_of<const T>(p.k, b, m, hk + 1), p.latents);
      tile.ahead.plan(1, latents_of<const T>(p.v, b, m, hk + 1), p.latents);
    }
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) collect(p, b, h, m);
    if (p.averages)
      for (int64_t h = hk * group; h < (hk + 1) * group; ++h) collect_averages(p, b, h);
    block.write(latents_of<T>(p.dk, b, m, hk), latents_of<T>(p.dv, b, m, hk));
  }

  void collect(const Params& p, int64_t b, int64_t h, int64_t m) {
    const Range near = rows_near(p, b, m, {0, p.length});
    Strided<const T> q = rows_of<const T>(p.q, b, h), dout = rows_of<const T>(p.dout, b, h);
    Strided<T> dq = rows_of<T>(p.dq, b, h);
    visit_rows_of<backward_rows<T>>(p, b, m, near, [&](const int64_t* rows, int64_t count) {
      tile.count = 0;
      if (!p.immediate) {
        for (int64_t i = 0; i < count; ++i) add_row(p, tile, b, h, rows[i]);
        tile.differentiate(block, p.scale);
        return tile.key_gradients(block);
      }
      const int64_t next = rows[count - 1] + 1;
      const int64_t left = near.end - next < backward_rows<T> ? near.end - next : backward_rows<T>;
      tile.ahead.plan(2, {q[next], q.row}, left);
      tile.ahead.plan(3, {dout[next], dout.row}, left);
      tile.ahead.plan(4, {dq[rows[0]], dq.row}, count);
      for (int64_t i = 0; i < count; ++i) tile.add(q[rows[i]], dout[rows[i]]);
      tile.differentiate_whole(block, p.scale);
      tile.key_gradients(block);
      tile.template query_gradient<false>(block, tile.dq);
      for (int64_t i = 0; i < count; ++i)
        write_row(dq[rows[i]], tile.dq + i * tile.channel_row, p.head_dim, 1);
    });
  }

  // Rows that average all values send each value an equal share of their gradient.
  void collect_averages(const Params& p, int64_t b, int64_t h) {
    const float share = 1.0f / (p.media * p.latents);
    Strided<const T> dout = rows_of<const T>(p.dout, b, h);
    bool any = false;
    for (int64_t t = 0; t < p.length; ++t) {
      if (!averages(p, b, t)) continue;
      if (!any)
        for (int64_t j = 0; j < padded(p.head_dim); ++j) average[j] = 0;
      any = true;
      for (int64_t j = 0; j < p.head_dim; j += width)
        store(average + j, load(average + j) + load(dout[t] + j, p.head_dim - j) * share);
    }
    if (!any) return;
    block.fill();
    for (int64_t r = 0; r < block.keys; ++r)
      for (int64_t j = 0; j < p.head_dim; j += width) {
        float* to = block.dv + r * block.channel_row + j;
        store(to, load(to) + load(average + j));
      }
  }
};

// dq of the rows that Backward leaves: those that see nothing and, where rows see several media, all, with their delta.
template <class T>
struct QueryBackward {
  static constexpr int64_t most = backward_rows<T> * 4;
  KeyGradients<T> block;
  GradientTile<T> tile;
  float* dq;

  QueryBackward(Scratch& scratch, const Params& p)
      : block(scratch, p.latents, p.head_dim),
        tile(scratch, p.latents, p.head_dim),
        dq(scratch.take(most * padded(p.head_dim))) {}

  static int64_t tasks(const Params& p) { return p.batch * p.heads * ((p.length + most - 1) / most); }

  void run(const Params& p, int64_t task) {
    const int64_t h = task % p.heads, blocks = (p.length + most - 1) / most;
    const int64_t b = task / p.heads / blocks, begin = task / p.heads % blocks * most;
    const int64_t end = begin + most < p.length ? begin + most : p.length, row = padded(p.head_dim);
    for (int64_t i = 0; i < (end - begin) * row; ++i) dq[i] = 0;
    if (!p.immediate) {
      find_delta(p, b, h, {begin, end});
      for (int64_t m = 0; m < p.media; ++m) collect(p, b, h, m, {begin, end});
    }
    Strided<T> to = rows_of<T>(p.dq, b, h);
    for (int64_t t = begin; t < end; ++t)
      if (!p.immediate || blind(p, b, t)) write_row(to[t], dq + (t - begin) * row, p.head_dim, 1);
  }

  void find_delta(const Params& p, int64_t b, int64_t h, Range block_rows) {
    const int64_t row = (b * p.heads + h) * p.length;
    Strided<const T> dout = rows_of<const T>(p.dout, b, h), out = rows_of<const T>(p.out, b, h);
    const auto sharp = [&](int64_t t) { return is_sharp(p.softmax_sum[row + t]); };
    for (int64_t t = block_rows.begin; t < block_rows.end; ++t)
      p.delta[row + t] = sharp(t) ? 0 : row_delta(dout[t], out[t], p.head_dim);
    for (int64_t m = 0; m < p.media; ++m) {
      const Range near = rows_near(p, b, m, block_rows);
      const auto wanted = [&](int64_t t) { return sharp(t) && sees(p, b, t, m); };
      bool packed = false;
      visit_rows<backward_rows<T>>(near.begin, near.end, wanted, [&](const int64_t* rows, int64_t count) {
        if (!packed) pack(p, b, h, m), packed = true;
        tile.count = 0;
        for (int64_t i = 0; i < count; ++i) add_row(p, tile, b, h, rows[i]);
        tile.add_delta(block, p.scale);
        for (int64_t i = 0; i < count; ++i) p.delta[row + rows[i]] = tile.delta[i];
      });
    }
  }

  void pack(const Params& p, int64_t b, int64_t h, int64_t m) {
    const int64_t hk = kv_head(p, h);
    block.pack(latents_of<const T>(p.k, b, m, hk), latents_of<const T>(p.v, b, m, hk), p.latents);
  }

  void collect(const Params& p, int64_t b, int64_t h, int64_t m, Range block_rows) {
    const int64_t row = padded(p.head_dim);
    const Range near = rows_near(p, b, m, block_rows);
    if (near.begin >= near.end) return;
    pack(p, b, h, m);
    visit_rows_of<backward_rows<T>>(p, b, m, near, [&](const int64_t* rows, int64_t count) {
      tile.count = 0;
      for (int64_t i = 0; i < count; ++i) add_row(p, tile, b, h, rows[i]);
      tile.differentiate(block, p.scale);
      tile.template query_gradient<false>(block, tile.dq);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < p.head_dim; j += width) {
          float* sum = dq + (rows[i] - block_rows.begin) * row + j;
          store(sum, load(sum) + load(tile.dq + i * tile.channel_row + j));
        }
    });
  }
};

}  // namespace flamingo_kernels::FK_ISA::masked_cross_attention
