// What crosses from the bindings to the kernels: plain structs of pointers, sizes and strides. No torch and no CUDA
// here, so that every compiler sees the same layout.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace flamingo_kernels {

using Stream = void*;  // a cudaStream_t

// Strides count elements. The last dimension of every tensor is contiguous. `wide`: all rows begin at multiples of
// 16 bytes and are multiples of 16 bytes long, so that threads may move 16 bytes at once.
struct Matrix {  // [N, D]
  void* data;
  DType dtype;
  int64_t row;
  bool wide;
};

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
  int64_t parts, part_rows;  // among how many blocks the rows are divided, and how many each takes
  float* dgate;              // partial sums [parts, D], or one of every block
};

struct GatedResidualNorm {
  GatedResidual residual;
  bool rms;
  float eps;
  Vector weight, bias;  // of no bias the data is null
  Matrix n;
  float *mean, *rstd;  // [N]
  // backward only
  Matrix dn, dx;
  float* means;            // [2, N]: of weight * dn and of weight * dn * zhat; null where a block has whole rows
  float *dweight, *dbias;  // partial sums [parts, D]
};

struct Rows {  // [B, T, H, d], [N, R, H, d] or [N, S, Hkv, d]
  void* data;
  int64_t batch, row, head;
  bool wide;
};

struct Media {  // [B, M, R, Hkv, d]
  void* data;
  int64_t batch, medium, latent, head;
  bool wide;
};

// What both attentions have: rows that attend, and what is kept of their softmax.
struct Attention {
  DType dtype;
  int64_t batch, length, heads, head_dim, kv_heads;
  float scale;
  float sign, base2_scale;  // of the scale; and the scale without it, in base 2 and not 0
  Rows q, out;
  float *softmax_max, *softmax_sum;  // [B, H, T], of scores not scaled; null where the backward pass needs them not
  // backward only
  Rows dout, dq;
  float* delta;   // [B, H, T]: rowsum(dout * out), or rowsum(P * dP) where one key has most of the weight
  // where the work of one result is divided, each part writes its own, in float32
  int64_t parts;  // 1: no division
  float* partial_rows;                // [parts, B, T, H, d] of out or dq
  float *partial_dk, *partial_dv;     // [parts, B, M, R, Hkv, d]
};

struct MaskedCrossAttention : Attention {
  int64_t media, latents;
  bool one_shot;        // every row sees one medium, whose keys are one tile
  bool averages;        // rows with hi < 0 may be there: they average all values
  const int32_t* lo;    // [B, T] contiguous
  const int32_t* hi;    // [B, T]
  const int32_t* start; // [B, M]
  const int32_t* stop;  // [B, M]
  Media k, v, dk, dv;
  float* share;  // [B, Hkv, d]: what averaging rows send to every value
};

struct PerceiverAttention : Attention {
  int64_t keys[2];               // S media keys, L latent keys
  const int32_t* media_lengths;  // [N] or null
  bool whole;                    // one tile holds all rows, and no other head shares the keys
  Rows k[2], v[2], dk[2], dv[2];
};

enum class Activation : int { none, gelu, squared_relu, relu };

// A row of weights for each of `rows` outputs: output[b] = weights norm(input[b]), and what follows from it.
struct WeightProduct {
  DType dtype;
  int64_t batch, rows, columns;
  const void *input, *weights;      // [B, columns], [rows, columns], contiguous
  Vector norm_weight, norm_bias;    // of no norm the data is null
  float eps;
  Activation activation;
  const void* residual;             // [B, rows] or null: output = residual + tanh(gate) * product
  Vector gate;
  bool per_channel;
  void* output;                     // [B, rows]
};

// One token of every sequence attends to its media, and the result goes through weights [D, H d] into the residual.
struct DecodeAttention {
  WeightProduct out;         // its input is what the attention makes
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
