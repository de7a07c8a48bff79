// What crosses from the bindings to the kernels: plain structs of views, pointers and sizes. No torch and no CUDA
// here, so that every compiler sees the same layout.
#pragma once

#include <cstdint>

#include "../views.h"

namespace flamingo_kernels {

using Stream = void*;  // a cudaStream_t

struct Vector {  // [D] or [1], contiguous; no data where there is none
  const void* data;
  DType dtype;
  bool wide = false;  // as in views.h
};

struct GatedResidual {
  int64_t rows, columns;
  bool per_channel;  // the gate has D elements, not 1
  Vector gate;
  Matrix x, y, z;
  // backward only
  Matrix dz, dy;
  int64_t parts, part_rows;  // how many parts the rows are cut into, and the rows of each
  float* dgate;              // partial sums [parts, D], or one of every block
};

// What both attentions have: rows that attend, and what is kept of their softmax.
struct Attention {
  DType dtype;
  int64_t batch, length, heads, head_dim, kv_heads;
  float scale;
  float sign, scale_log2;  // sign(scale), 0 for 0, and |scale| log2(e), which is never 0
  Rows q, out;
  float *row_max, *row_sum;  // [B, H, T], of scores before their scale; null where the backward pass reads neither
  // backward only
  Rows dout, dq;
  float* delta;  // [B, H, T]: rowsum(dout * out), or rowsum(P * dP) where one key has most of the weight
  // each part of the work writes results of its own, in float32
  int64_t parts;
  float* partial_rows;             // [parts, B, T, H, d] of out or dq
  float *partial_dk, *partial_dv;  // [parts, B, M, R, Hkv, d]
};

struct MaskedCrossAttention : Attention {
  int64_t media, latents;
  bool one_shot;                // every row sees one medium, whose keys are one tile
  bool averages;                // rows with hi < 0 may be there: they average all values
  const int32_t *lo, *hi;       // [B, T] contiguous
  const int32_t *start, *stop;  // [B, M] contiguous
  Media k, v, dk, dv;
  float* averaged_dv;  // [B, Hkv, d]: what rows that average all values add to the dv of each
};

struct PerceiverAttention : Attention {
  int64_t keys[2];               // S media keys, L latent keys
  const int32_t* media_lengths;  // [N] or null
  bool whole;                    // one tile holds all rows, and no other head shares the keys
  Rows k[2], v[2], dk[2], dv[2];
};

struct Norm {
  Vector weight, bias;  // no weight, no norm
  float eps;
  bool rms;
};

struct Weights {  // [out, in]
  const void* data;
  int64_t row;         // stride of a row
  bool wide;           // as in views.h
  const float* scale;  // [out], of weights of int8; else null
  Vector bias;         // [out]
};

// y = residual + tanh(gate) * act(weight norm(x) + bias); with a gate_proj, act(gate_proj norm(x) + bias) *
// (weight norm(x) + bias) in the place of act(...).
struct Linear {
  DType dtype;  // what is multiplied has: x once it is normed, and weights that are no integers
  int64_t rows, out;
  int in, chunk;  // columns of x, and those that a block keeps at once: the launch says how many
  Matrix x;       // [rows, in]
  Norm norm;
  Matrix normed;  // [rows, in], where a kernel of its own makes it: `norms_apart`
  Weights weight, gate_proj;  // no data of gate_proj where there is none
  Activation activation;
  Vector gate;
  bool per_channel;    // the gate has `out` elements, not 1
  Matrix residual, y;  // [rows, out]; no data of residual where there is none
};

// One token of every text attends to its media, which `texts` in a row share.
struct DecodeAttention {
  DType dtype;
  int batch, texts, heads, kv_heads, head_dim, media, latents;
  float scale;
  const int32_t *lo, *hi;  // [B]
  const void* q;           // [B, H, d]
  Norm q_norm;             // over d
  Media k, v;              // [B / texts, M, R, Hkv, d]
  void* out;               // [B, H, d]
  int splits;              // into how many the keys of a text are cut
  // the softmax of each split, where there are several: [splits, B, H, d], [splits, B, H], [splits, B, H]
  float *acc, *row_max, *row_sum;
};

// total[size] = partials[0] + partials[1] + ..., in order and rounded once.
struct Sum {
  const float* partials;  // [parts, size]
  void* total;
  DType dtype;
  int64_t parts, size;
};

}  // namespace flamingo_kernels
