// Tensors as kernels see them, on any backend: element types, and views made of a pointer and strides.
#pragma once

#include <cstdint>

namespace flamingo_kernels {

enum class DType : int { f32, bf16, f16 };

// In the order of `ACTIVATIONS` in flamingo_kernels/ops/linear/schema.py.
enum class Activation : int { none, gelu, gelu_tanh, relu, squared_relu, silu };

// Strides count elements. The last dimension of every tensor is contiguous. `wide`: all rows begin at multiples of
// 16 bytes and are multiples of 16 bytes long, so that a GPU's threads may move 16 bytes at once.
struct Rows {  // [B, T, H, d], [N, R, H, d] or [N, S, Hkv, d]
  void* data;
  int64_t batch, row, head;
  bool wide = false;
};

struct Media {  // [B, M, R, Hkv, d]
  void* data;
  int64_t batch, medium, latent, head;
  bool wide = false;
};

struct Matrix {  // [N, D]
  void* data;
  DType dtype;
  int64_t row;
  bool wide = false;
};

}  // namespace flamingo_kernels
