// What crosses from the bindings to the kernels: plain structs of pointers, sizes and strides. No torch and no CUDA
// here, so that every compiler sees the same layout.
#pragma once

#include <cstdint>

namespace flamingo_kernels {

enum class DType : int { f32, bf16, f16 };

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

// total[size] = partials[0] + partials[1] + ..., in order and rounded once.
struct Sum {
  const float* partials;  // [parts, size]
  void* total;
  DType dtype;
  int64_t parts, size;
};

}  // namespace flamingo_kernels
