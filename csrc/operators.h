// What the bindings of every backend do alike for an operator: its outputs, the fields that the parameters of all
// backends have, and its registration. A `Call` is a backend's own class that allocates by `fresh(like, sizes, dtype)`.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>

#include "tensors.h"

namespace flamingo_kernels {

template <class Call>
Tensor fresh_like(const Call& call, const Tensor& tensor) {
  return call.fresh(tensor, {tensor.sizes().begin(), tensor.sizes().end()}, tensor.scalar_type());
}

// row_max and row_sum of so many rows of each head.
template <class Call>
Tensor fresh_softmax(const Call& call, const Tensor& q, int64_t rows) {
  return call.fresh(q, {2, q.size(0), q.size(2), rows}, ScalarType::Float);
}

// The gradient of a parameter, in float32 whatever its dtype.
template <class Call>
Tensor fresh_gradient(const Call& call, const Tensor& parameter) {
  return call.fresh(parameter, {parameter.sizes().begin(), parameter.sizes().end()}, ScalarType::Float);
}

template <class Params>
void set_attention(
    Params& params, const Tensor& q, int64_t kv_heads, double scale, const Tensor& out, const Tensor& softmax) {
  params.dtype = element_type(q);
  params.batch = q.size(0), params.length = q.size(1), params.heads = q.size(2), params.head_dim = q.size(3);
  params.kv_heads = kv_heads, params.scale = scale;
  params.q = rows_of(q), params.out = rows_of(out);
  if (softmax.numel() == 0) return;
  params.row_max = softmax.mutable_data_ptr<float>(), params.row_sum = params.row_max + softmax.numel() / 2;
}

template <class Params>
Params masked_cross_attention_params(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lo, const Tensor& hi, const Tensor& start,
    const Tensor& stop, bool averages, double scale, const Tensor& out, const Tensor& softmax) {
  Params params = {};
  set_attention(params, q, k.size(3), scale, out, softmax);
  params.media = k.size(1), params.latents = k.size(2), params.averages = averages;
  params.lo = lo.const_data_ptr<int32_t>(), params.hi = hi.const_data_ptr<int32_t>();
  params.start = start.const_data_ptr<int32_t>(), params.stop = stop.const_data_ptr<int32_t>();
  params.k = media_of(k), params.v = media_of(v);
  return params;
}

template <class Params>
Params perceiver_attention_params(
    const Tensor& q, const Tensor& k_media, const Tensor& v_media, const Tensor& k_latents, const Tensor& v_latents,
    const std::optional<Tensor>& media_lengths, double scale, const Tensor& out, const Tensor& softmax) {
  Params params = {};
  set_attention(params, q, k_media.size(2), scale, out, softmax);
  params.keys[0] = k_media.size(1), params.keys[1] = k_latents.size(1);
  params.media_lengths = data_or_null(media_lengths);
  params.k[0] = rows_of(k_media), params.k[1] = rows_of(k_latents);
  params.v[0] = rows_of(v_media), params.v[1] = rows_of(v_latents);
  return params;
}

template <class Params>
void set_gradients(Params& params, const Tensor& dout, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  params.dout = rows_of(dout), params.dq = rows_of(dq);
  params.dk = media_of(dk), params.dv = media_of(dv);
}

template <class Params>
void set_gradients(
    Params& params, const Tensor& dout, const Tensor& dq, const Tensor& dk_media, const Tensor& dv_media,
    const Tensor& dk_latents, const Tensor& dv_latents) {
  params.dout = rows_of(dout), params.dq = rows_of(dq);
  params.dk[0] = rows_of(dk_media), params.dk[1] = rows_of(dk_latents);
  params.dv[0] = rows_of(dv_media), params.dv[1] = rows_of(dv_latents);
}

template <class Params>
Params gated_residual_params(const Tensor& y, const Tensor& gate) {
  Params params = {};
  params.rows = y.size(0), params.columns = y.size(1);
  params.per_channel = gate.numel() != 1;
  params.y = matrix_of(y);
  return params;
}

}  // namespace flamingo_kernels

// The operators that every backend has, under their names and the overload of the backend.
#define FK_REGISTER_OPERATORS(library, overload)                                               \
  library.impl("masked_cross_attention_fwd" overload, TORCH_BOX(&masked_cross_attention_fwd)); \
  library.impl("masked_cross_attention_bwd" overload, TORCH_BOX(&masked_cross_attention_bwd)); \
  library.impl("perceiver_attention_fwd" overload, TORCH_BOX(&perceiver_attention_fwd));       \
  library.impl("perceiver_attention_bwd" overload, TORCH_BOX(&perceiver_attention_bwd));       \
  library.impl("gated_residual_fwd" overload, TORCH_BOX(&gated_residual_fwd));                 \
  library.impl("gated_residual_bwd" overload, TORCH_BOX(&gated_residual_bwd));                 \
  library.impl("gated_block_decode_fwd" overload, TORCH_BOX(&gated_block_decode_fwd));         \
  library.impl("linear_fwd" overload, TORCH_BOX(&linear_fwd))

// What Python asks a library through ctypes.
#define FK_EXPORT extern "C" __attribute__((visibility("default")))
