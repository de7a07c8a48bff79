// What crosses from the bindings to the kernels: plain structs of views, pointers and sizes.
// No torch and no instruction set here, so every source file sees the same layout.
#pragma once

#include <cstdint>

#include "../views.h"

namespace flamingo_kernels {

// What both attentions have: rows that attend, and what is kept of their softmax.
struct Attention {
  DType dtype;
  int64_t batch, length, heads, head_dim, kv_heads;
  float scale;
  Rows q, out;
  // [B, H, T]: the largest score of a row, before the scale but of its sign, and the sum of e^(scale (s - max)); null
  // where the backward pass reads neither
  float *row_max, *row_sum;
  // backward only
  Rows dout, dq;
  float* delta;  // [B, H, T]
};

// The most keys of a medium that are packed at once; schema.py of masked_cross_attention says the same.
constexpr int64_t most_keys = 256;

struct MaskedCrossAttention : Attention {
  int64_t media, latents;
  bool immediate;               // no row sees more than one medium
  bool one_shot;                // nor more than one block of keys; then row_max, row_sum and delta are null
  bool averages;                // rows with hi < 0 may be there: they average all values
  const int32_t *lo, *hi;       // [B, T] contiguous
  const int32_t *start, *stop;  // [B, M] contiguous
  Media k, v, dk, dv;
};

struct PerceiverAttention : Attention {
  int64_t keys[2];               // S media keys, L latent keys
  const int32_t* media_lengths;  // [N] or null
  Rows k[2], v[2], dk[2], dv[2];
};

struct GatedResidual {
  int64_t rows, columns;
  bool per_channel;  // the gate has D elements, not 1
  const float* tanh_gate;
  Matrix x, y, z;
  // backward only
  Matrix dz, dy;
  float* dgate;  // partial sums [tasks, D or 1] of dz * y
};

struct Linear {
  int64_t rows, in, out;
  Matrix x;                   // [rows, in]
  Matrix weight;              // [out, in]; of int8 where there is a weight_scale
  const float* weight_scale;  // [out] or null
  void* packed;               // x as the products read it
  float *x_scale, *x_offset;  // [rows]: x is packed as integers of this scale, whose sums are this much too large
  bool fine;                  // blocks of weights of 8 bits meet each row of x as two columns
  const void* bias;  // [out] or null
  DType bias_dtype;
  Activation activation;
  const float* tanh_gate;  // [1] or [out], or null: 1
  bool per_channel;        // the gate has `out` elements, not 1
  Matrix factor;           // [rows, out], by which the activation's result is multiplied; its data may be null
  Matrix residual, y;      // [rows, out]; data of no residual is null
};

// y = norm(x) * weight + bias
struct RowNorm {
  int64_t rows, columns;
  bool rms;
  float eps;
  const void *weight, *bias;  // [columns]; the bias may be null
  DType weight_dtype, bias_dtype;
  Matrix x, y;
};

// One row of each text attends to the media of its sequence.
struct DecodeAttention {
  int64_t batch, texts, heads, kv_heads, head_dim, media, latents;  // texts: in a row, that share a sequence
  float scale;
  const int32_t *lo, *hi;  // [B]
  const float* q;          // [B, H, d]
  RowNorm q_norm;          // of each row of q; without a weight there is none
  Media k, v;
  float *partial_out, *row_max, *row_sum;  // [B, H, splits] rows of d in whole vectors, and numbers
  Matrix out;                              // [B, H d]
};

struct ReadLoop {
  enum Way : int { plain, prefetched, streamed };
  const void* data;
  int64_t bytes;  // whole blocks of them are read
  Way way;
  uint32_t* sums;  // [blocks]
};

// A kernel is a list of independent tasks, each of which owns what it writes: the result is the same to
// the last bit however many threads run them.
template <class Params>
struct Kernel {
  int64_t (*tasks)(const Params&);
  int64_t (*scratch)(const Params&);  // floats of working memory for one thread
  void (*run)(const Params&, int64_t task, float* scratch);
};

// One instruction set's kernels, by element type.
template <class Params>
using AttentionKernel = Kernel<Params> (*)(DType);
using ResidualKernel = Kernel<GatedResidual> (*)(DType x, DType y, DType z);
using LinearKernel = Kernel<Linear> (*)(DType);

// A product in two steps.
struct Product {
  Kernel<Linear> pack, forward;
};

struct Variant {
  const char* name;
  AttentionKernel<MaskedCrossAttention> masked_cross_attention_fwd, masked_cross_attention_bwd,
      masked_cross_attention_dq;
  AttentionKernel<PerceiverAttention> perceiver_attention_fwd, perceiver_attention_bwd;
  ResidualKernel gated_residual_fwd, gated_residual_bwd;
  Product (*linear)(const Linear&);
  int64_t fine_int8_rows;  // up to so many rows of x have 16 bits anyway
  LinearKernel linear_int8_spread;
  Product (*linear_int8)(const Linear&);
  Kernel<RowNorm> row_norm;
  Kernel<DecodeAttention> (*decode_attention)(DType);
  Kernel<DecodeAttention> decode_merge;
  int64_t (*decode_splits)(const DecodeAttention&);
  Kernel<ReadLoop> read_loop;
};

// The variant in use: the widest this processor has, unless select() chose another.
const Variant& variant();

// By name, or "auto"; false if it is not built or this processor lacks it.
bool select(const char* name);

// The names of the variants usable here, separated by commas, narrowest first.
const char* variants();

}  // namespace flamingo_kernels
