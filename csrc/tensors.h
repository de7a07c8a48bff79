// What the bindings of every backend ask of tensors; of torch only the stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "dtype.h"

namespace flamingo_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(
      false, "flamingo_kernels: expected float32, bfloat16 or float16, got ",
      torch::headeronly::toString(tensor.scalar_type()), ".");
}

ScalarType wider(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// The dtype of x + tanh(gate) * y; as everywhere in torch, a gate without dimensions does not widen y.
ScalarType residual_dtype(const Tensor& x, const Tensor& y, const Tensor& gate) {
  const ScalarType product = gate.dim() == 0 ? y.scalar_type() : wider(y.scalar_type(), gate.scalar_type());
  return wider(x.scalar_type(), product);
}

void check_last_stride(const char* operation, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.stride(-1) == 1 || tensor.size(-1) <= 1, operation, ": expected a contiguous last dimension, got stride ",
      tensor.stride(-1), ".");
}

const int32_t* spans_of(const char* operation, const Tensor& t, int64_t batch, int64_t columns) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.size(0) == batch && t.size(1) == columns, operation,
      ": expected a contiguous int32 mask tensor of shape (", batch, ", ", columns, ").");
  return t.const_data_ptr<int32_t>();
}

// None is a null pointer: all are real.
const int32_t* lengths_of(const char* operation, const std::optional<Tensor>& media_lengths) {
  if (!media_lengths) return nullptr;
  STD_TORCH_CHECK(
      media_lengths->scalar_type() == ScalarType::Int && media_lengths->is_contiguous(), operation,
      ": expected contiguous int32 media_lengths.");
  return media_lengths->const_data_ptr<int32_t>();
}

}  // namespace
}  // namespace flamingo_kernels
