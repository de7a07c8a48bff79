// What the bindings call: each function puts the kernels of an operator on a stream, and throws what CUDA reports.
#pragma once

#include "params.h"

namespace flamingo_kernels {

// What is divided among the blocks of a grid: rows into parts, columns into blocks.
struct Division {
  int64_t parts, part_rows, blocks;
};

namespace kernels {

void gated_residual_fwd(const GatedResidual&, Stream);
void gated_residual_bwd(const GatedResidual&, Stream);
Division divide_gated_residual_bwd(int64_t rows, int64_t columns);

void gated_residual_norm_fwd(const GatedResidualNorm&, Stream);
void gated_residual_norm_bwd(const GatedResidualNorm&, Stream);
Division divide_gated_residual_norm_bwd(int64_t rows, int64_t columns);

void sum(const Sum&, Stream);
void fill_with_nan(void* memory, int64_t bytes, Stream);  // a test aid

bool emulated();  // whether the kernels were compiled for the processor

}  // namespace kernels

}  // namespace flamingo_kernels
