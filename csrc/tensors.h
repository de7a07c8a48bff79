// Tensors as the bindings of every backend see them: their dtypes, and as what the kernels read them. Includes only the
// stable ABI of torch.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "views.h"

namespace flamingo_kernels {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

// Throws a message without the file and line that torch's own macro puts before it.
template <class... Words>
[[noreturn]] void refuse(const Words&... words) {
  std::ostringstream message;
  (message << ... << words);
  throw std::runtime_error(message.str());
}

inline std::optional<DType> kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return std::nullopt;
  }
}

inline DType element_type(const Tensor& tensor) {
  const std::optional<DType> dtype = kernel_dtype(tensor.scalar_type());
  if (!dtype) refuse("flamingo_kernels: expected Float, BFloat16 or Half, got ", toString(tensor.scalar_type()), ".");
  return *dtype;
}

inline ScalarType wider(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// The dtype of x + tanh(gate) * y; as everywhere in torch, a gate without dimensions does not widen y.
inline ScalarType residual_dtype(const Tensor& x, const Tensor& y, const Tensor& gate) {
  const ScalarType branch = gate.dim() == 0 ? y.scalar_type() : wider(y.scalar_type(), gate.scalar_type());
  return wider(x.scalar_type(), branch);
}

// The dtype of residual + tanh(gate) * y, where there may be no gate.
inline ScalarType gated_dtype(ScalarType y, const Tensor* gate, ScalarType residual) {
  return wider(residual, gate && gate->dim() != 0 ? wider(y, gate->scalar_type()) : y);
}

// The same where y is in the dtype of x, and there may be no residual either.
inline ScalarType linear_dtype(
    const Tensor& x, const std::optional<Tensor>& gate, const std::optional<Tensor>& residual) {
  const ScalarType y = x.scalar_type();
  return gated_dtype(y, gate ? &*gate : nullptr, residual ? residual->scalar_type() : y);
}

template <class Numbers>
std::string in_brackets(const Numbers& numbers) {
  std::string text;
  for (int64_t number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "(" + text + ")";
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another device, ") + std::to_string(tensor.get_device_index());
}

// A function `..._of` returns a view of its tensor: a pointer with sizes or strides, and nothing is copied.

inline bool is_wide(const Tensor& tensor) {
  const int64_t element = tensor.element_size(), last = tensor.dim() - 1;
  bool wide = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && tensor.size(last) * element % 16 == 0;
  for (int64_t i = 0; i < last; ++i) wide = wide && (tensor.size(i) <= 1 || tensor.stride(i) * element % 16 == 0);
  return wide;
}

inline Rows rows_of(const Tensor& t) {  // [B, T, H, d]
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), is_wide(t)};
}

inline Media media_of(const Tensor& t) {  // [B, M, R, Hkv, d]
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), is_wide(t)};
}

inline Matrix matrix_of(const Tensor& t) {  // [N, D]
  // a thread takes 8 elements, whatever their size
  return {t.data_ptr(), element_type(t), t.stride(0), is_wide(t) && t.size(1) % 8 == 0};
}

// None is a null pointer.
inline const int32_t* data_or_null(const std::optional<Tensor>& integers) {
  return integers ? integers->const_data_ptr<int32_t>() : nullptr;
}

}  // namespace flamingo_kernels
