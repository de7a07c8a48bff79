// The checks of every operation. Anybody can call torch.ops.flamingo_kernels, so the bindings of every backend check
// whatever a kernel dereferences.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "tensors.h"

namespace flamingo_kernels {

using Sizes = std::initializer_list<int64_t>;

// The checks of one operation, whose first tensor says on which device all are.
class Checks {
 public:
  Checks(const char* operation, const char* first_name, const Tensor& first, int64_t dimensions)
      : operation_(operation), first_name_(first_name), first_(first) {
    expect_dimensions(first_name, first, dimensions);
  }

  void expect_dimensions(const char* name, const Tensor& tensor, int64_t dimensions) const {
    if (tensor.dim() != dimensions)
      refuse(
          operation_, ": expected ", name, " with ", dimensions, " dimensions, got ", in_brackets(tensor.sizes()), ".");
  }

  // [..., D] in any dtype of the kernels, with elements of a row side by side.
  void expect_rows(const char* name, const Tensor& tensor, Sizes sizes) const {
    expect_number(name, tensor), expect_layout_of_rows(name, tensor, sizes);
  }

  // The same in 8-bit integers.
  void expect_int8_rows(const char* name, const Tensor& tensor, Sizes sizes) const {
    if (tensor.scalar_type() != ScalarType::Char)
      refuse(operation_, ": expected ", name, " in Char, got ", toString(tensor.scalar_type()), ".");
    expect_layout_of_rows(name, tensor, sizes);
  }

  // The same, in the dtype of the first tensor.
  void expect_rows_like_first(const char* name, const Tensor& tensor, Sizes sizes) const {
    expect_rows(name, tensor, sizes);
    if (tensor.scalar_type() != first_.scalar_type())
      refuse(
          operation_, ": expected ", name, " in ", toString(first_.scalar_type()), " like ", first_name_, ", got ",
          toString(tensor.scalar_type()), ".");
  }

  // A parameter with an element for each of D channels, or one for all, in any dtype of the kernels and any layout.
  void expect_parameter(const char* name, const Tensor& tensor, int64_t channels, bool one_for_all) const {
    expect_number(name, tensor), expect_device(name, tensor);
    if (tensor.numel() != channels && !(one_for_all && tensor.numel() == 1))
      refuse(
          operation_, ": expected ", name, " with ", one_for_all ? "1 or " : "", channels, " elements, got shape ",
          in_brackets(tensor.sizes()), ".");
  }

  // Contiguous, in one dtype.
  void expect_contiguous(const char* name, const Tensor& tensor, ScalarType dtype, Sizes sizes) const {
    if (tensor.scalar_type() != dtype)
      refuse(operation_, ": expected ", name, " in ", toString(dtype), ", got ", toString(tensor.scalar_type()), ".");
    expect_sizes(name, tensor, sizes), expect_device(name, tensor);
    if (!tensor.is_contiguous())
      refuse(operation_, ": expected a contiguous ", name, ", got strides ", in_brackets(tensor.strides()), ".");
  }

  // There is no softmax without keys.
  void expect_latents(const char* name, const Tensor& tensor, int64_t dimension) const {
    if (tensor.size(dimension) == 0)
      refuse(operation_, ": expected ", name, " with at least one latent, got ", in_brackets(tensor.sizes()), ".");
  }

  void expect_head_groups(int64_t heads, int64_t kv_heads) const {
    if (kv_heads == 0 || heads % kv_heads != 0)
      refuse(
          operation_, ": expected the ", heads, " heads of q to be a multiple of the heads of the keys, got ", kv_heads,
          ".");
  }

 private:
  void expect_number(const char* name, const Tensor& tensor) const {
    if (!kernel_dtype(tensor.scalar_type()))
      refuse(operation_, ": expected ", name, " in Float, BFloat16 or Half, got ", toString(tensor.scalar_type()), ".");
  }

  void expect_layout_of_rows(const char* name, const Tensor& tensor, Sizes sizes) const {
    expect_sizes(name, tensor, sizes), expect_device(name, tensor);
    const int64_t last = tensor.dim() - 1;
    if (tensor.numel() != 0 && tensor.size(last) != 1 && tensor.stride(last) != 1)
      refuse(
          operation_, ": expected ", name, " with a contiguous last dimension, got strides ",
          in_brackets(tensor.strides()), ".");
  }

  void expect_sizes(const char* name, const Tensor& tensor, Sizes sizes) const {
    const auto found = tensor.sizes();
    if (!std::equal(sizes.begin(), sizes.end(), found.begin(), found.end()))
      refuse(operation_, ": expected ", name, " with shape ", in_brackets(sizes), ", got ", in_brackets(found), ".");
  }

  void expect_device(const char* name, const Tensor& tensor) const {
    if (tensor.is_cpu() != first_.is_cpu() || tensor.is_cuda() != first_.is_cuda() ||
        tensor.get_device_index() != first_.get_device_index())
      refuse(
          operation_, ": expected ", name, " on ", device_name(first_), " with ", first_name_, ", got ",
          device_name(tensor), ".");
  }

  const char *operation_, *first_name_;
  const Tensor& first_;
};

inline Checks check_masked_cross_attention(
    const char* operation, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lo, const Tensor& hi,
    const Tensor& start, const Tensor& stop) {
  const Checks checks(operation, "q", q, 4);
  checks.expect_dimensions("k", k, 5);
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int64_t media = k.size(1), latents = k.size(2), kv_heads = k.size(3);
  checks.expect_rows_like_first("q", q, {batch, length, heads, head_dim});
  checks.expect_rows_like_first("k", k, {batch, media, latents, kv_heads, head_dim});
  checks.expect_rows_like_first("v", v, {batch, media, latents, kv_heads, head_dim});
  checks.expect_latents("k", k, 2), checks.expect_head_groups(heads, kv_heads);
  checks.expect_contiguous("lo", lo, ScalarType::Int, {batch, length});
  checks.expect_contiguous("hi", hi, ScalarType::Int, {batch, length});
  checks.expect_contiguous("start", start, ScalarType::Int, {batch, media});
  checks.expect_contiguous("stop", stop, ScalarType::Int, {batch, media});
  return checks;
}

inline Checks check_perceiver_attention(
    const char* operation, const Tensor& q, const Tensor& k_media, const Tensor& v_media, const Tensor& k_latents,
    const Tensor& v_latents, const std::optional<Tensor>& media_lengths) {
  const Checks checks(operation, "q", q, 4);
  checks.expect_dimensions("k_media", k_media, 4), checks.expect_dimensions("k_latents", k_latents, 4);
  const int64_t batch = q.size(0), heads = q.size(2), head_dim = q.size(3);
  const int64_t features = k_media.size(1), latents = k_latents.size(1), kv_heads = k_media.size(2);
  checks.expect_rows_like_first("q", q, {batch, q.size(1), heads, head_dim});
  checks.expect_rows_like_first("k_media", k_media, {batch, features, kv_heads, head_dim});
  checks.expect_rows_like_first("v_media", v_media, {batch, features, kv_heads, head_dim});
  checks.expect_rows_like_first("k_latents", k_latents, {batch, latents, kv_heads, head_dim});
  checks.expect_rows_like_first("v_latents", v_latents, {batch, latents, kv_heads, head_dim});
  checks.expect_latents("k_latents", k_latents, 1), checks.expect_head_groups(heads, kv_heads);
  if (media_lengths) checks.expect_contiguous("media_lengths", *media_lengths, ScalarType::Int, {batch});
  return checks;
}

// What the forward pass of either attention left for the backward pass, and the gradient of its output; it left the
// softmax of `kept` rows.
inline void check_attention_bwd(
    const Checks& checks, const Tensor& dout, const Tensor& q, const Tensor& out, const Tensor& softmax, int64_t kept) {
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), head_dim = q.size(3);
  checks.expect_rows_like_first("dout", dout, {batch, length, heads, head_dim});
  checks.expect_rows_like_first("out", out, {batch, length, heads, head_dim});
  checks.expect_contiguous("softmax", softmax, ScalarType::Float, {2, batch, heads, kept});
}

// The branch y of a residual and its gate, of one element or one a channel; `first` is x, or dz backward.
inline void check_residual(
    const char* operation, const char* first_name, const Tensor& first, const Tensor& y, const Tensor& gate) {
  const Checks checks(operation, first_name, first, 2);
  const int64_t rows = first.size(0), columns = first.size(1);
  checks.expect_rows(first_name, first, {rows, columns}), checks.expect_rows("y", y, {rows, columns});
  checks.expect_parameter("gate", gate, columns, true);
}

// The gradient of a sum with y is in y's dtype or wider.
inline void check_residual_bwd(const char* operation, const Tensor& dz, const Tensor& y, const Tensor& gate) {
  check_residual(operation, "dz", dz, y, gate);
  if (wider(dz.scalar_type(), y.scalar_type()) != dz.scalar_type())
    refuse(
        operation, ": expected dz in Float or in ", toString(y.scalar_type()), " like y, got ",
        toString(dz.scalar_type()), ".");
}

inline void expect_activation(const char* operation, int64_t activation) {
  const int64_t last = static_cast<int64_t>(Activation::silu);
  if (activation < 0 || activation > last)
    refuse(operation, ": expected activation from 0 to ", last, ", got ", activation, ".");
}

// Parameters with an element for each of so many channels, side by side.
inline void expect_vector(
    const Checks& checks, const char* operation, const char* name, const Tensor& vector, int64_t channels) {
  checks.expect_parameter(name, vector, channels, false);
  if (!vector.is_contiguous()) refuse(operation, ": expected a contiguous ", name, ".");
}

inline void check_linear(
    const char* operation, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& weight_scale,
    const std::optional<Tensor>& bias, int64_t activation, const std::optional<Tensor>& gate,
    const std::optional<Tensor>& residual) {
  const Checks checks(operation, "x", x, 2);
  checks.expect_dimensions("weight", weight, 2);
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  checks.expect_rows_like_first("x", x, {rows, in});
  if (weight_scale) {
    checks.expect_int8_rows("weight", weight, {out, in});
    checks.expect_contiguous("weight_scale", *weight_scale, ScalarType::Float, {out});
  } else {
    checks.expect_rows_like_first("weight", weight, {out, in});
  }
  if (bias) checks.expect_dimensions("bias", *bias, 1), checks.expect_rows("bias", *bias, {out});
  expect_activation(operation, activation);
  if (gate) checks.expect_parameter("gate", *gate, out, true);
  if (residual) checks.expect_rows("residual", *residual, {rows, out});
}

}  // namespace flamingo_kernels
