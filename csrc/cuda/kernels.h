// What the bindings call: each function puts the kernels of an operator on a stream, and throws what CUDA reports.
#pragma once

#include "params.h"

namespace flamingo_kernels {

// How the work of a grid is cut: rows into parts, columns into blocks.
struct Division {
  int64_t parts, part_rows, blocks;
};

namespace kernels {

void gated_residual_fwd(const GatedResidual&, Stream);
void gated_residual_bwd(const GatedResidual&, Stream);
Division divide_gated_residual_bwd(int64_t rows, int64_t columns);

bool is_one_shot(DType, bool immediate, int64_t latents);
void masked_cross_attention_fwd(const MaskedCrossAttention&, Stream);
void masked_cross_attention_bwd(const MaskedCrossAttention&, Stream);
int64_t count_masked_cross_attention_bwd_parts(const MaskedCrossAttention&);

int64_t count_perceiver_attention_parts(const PerceiverAttention&);
bool is_whole(const PerceiverAttention&);
void perceiver_attention_fwd(const PerceiverAttention&, float* partial_softmax, Stream);
void perceiver_attention_bwd(const PerceiverAttention&, Stream);

bool norms_apart(const Linear&);  // whether it needs room for x once it is normed
void linear_fwd(Linear, Stream);

// The attention of gated_block_decode; its linear layers are linear_fwd.
int64_t count_gated_block_decode_splits(const DecodeAttention&);
void gated_block_decode_attention(const DecodeAttention&, Stream);

void sum_partials(const Sum&, Stream);
void fill_with_nan(void* memory, int64_t bytes, Stream);  // a test aid

bool emulated();  // whether the kernels were compiled for the processor

}  // namespace kernels

}  // namespace flamingo_kernels
