// What crosses from the bindings to the kernels: plain structs of views, pointers and sizes. No torch and no CUDA
// here, so that every compiler sees the same layout.
#pragma once

#include <cstdint>

#include "../views.h"

namespace flamingo_kernels {

using Stream = void*;  // a cudaStream_t

struct Vector {  // [D] or [1], contiguous
  const void* data;
  DType dtype;
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

enum class Activation : int { none, gelu, squared_relu, relu };

// A linear layer and what surrounds it: output = act(weight norm(input)), or residual + tanh(gate) * weight input.
struct DecodeLinear {
  DType dtype;
  int64_t batch, rows, columns;
  const void *input, *weight;     // [B, columns], [rows, columns], contiguous
  Vector norm_weight, norm_bias;  // the data is null where there is no norm
  float eps;
  Activation activation;
  const void* residual;  // [B, rows] or null
  Vector gate;
  bool per_channel;
  void* output;  // [B, rows]
};

// One token of every sequence attends to its media, and the result goes through a linear layer [D, H d].
struct DecodeAttention {
  DecodeLinear out;                                          // its input is the attention's output
  int64_t heads, kv_heads, head_dim, media, latents, slice;  // slice: rows of a block
  float scale;
  const int32_t *lo, *hi;  // [B]
  const void* q;           // [B, H, d]
  Media k, v;
};

// total[size] = partials[0] + partials[1] + ..., in order and rounded once.
struct Sum {
  const float* partials;  // [parts, size]
  void* total;
  DType dtype;
  int64_t parts, size;
};

}  // namespace flamingo_kernels
