// The operators as PyTorch sees them: checks, outputs, parameters, and tasks spread over threads.
// It and `tensors.h` alone include torch, and of torch only the stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "params.h"

namespace flamingo_kernels {
namespace {

bool poisoned = false;  // a test aid: outputs and scratch start as NaN

Tensor fresh(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  // All ones is a NaN in float32, bfloat16 and float16 alike.
  if (poisoned) std::memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());
  return tensor;
}

Tensor fresh_like(const Tensor& tensor) {
  return fresh(tensor, {tensor.sizes().begin(), tensor.sizes().end()}, tensor.scalar_type());
}

// Every thread takes the next few tasks until none is left.
template <class Params>
void run(const Kernel<Params>& kernel, const Params& params) {
  const int64_t tasks = kernel.tasks(params), floats = kernel.scratch(params);
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t few = std::max<int64_t>(1, tasks / (threads * 8));  // neighbours share cache lines and pages
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    // What one slot leaves undone the others take: the range itself says nothing.
    (void)begin, (void)end;
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    std::unique_ptr<float, decltype(&std::free)> scratch((float*)std::aligned_alloc(64, bytes + 64), std::free);
    if (poisoned) std::memset(scratch.get(), 0xff, bytes);
    for (int64_t first; (first = next.fetch_add(few)) < tasks;)
      for (int64_t task = first; task < std::min(first + few, tasks); ++task) kernel.run(params, task, scratch.get());
  });
}

Rows rows_of(const char* operation, const Tensor& t) {  // [B, T, H, d]
  check_last_stride(operation, t);
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Media media_of(const char* operation, const Tensor& t) {  // [B, M, R, Hkv, d]
  check_last_stride(operation, t);
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

MaskedCrossAttention masked_params(
    const char* operation, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lo, const Tensor& hi,
    const Tensor& start, const Tensor& stop, bool immediate, bool averages, double scale, const Tensor& out,
    const Tensor& softmax) {
  MaskedCrossAttention p = {};
  p.dtype = dtype_of(q);
  p.batch = q.size(0), p.length = q.size(1), p.heads = q.size(2), p.head_dim = q.size(3);
  p.media = k.size(1), p.latents = k.size(2), p.kv_heads = k.size(3);
  p.scale = scale, p.immediate = immediate, p.averages = averages;
  p.lo = spans_of(operation, lo, p.batch, p.length), p.hi = spans_of(operation, hi, p.batch, p.length);
  p.start = spans_of(operation, start, p.batch, p.media), p.stop = spans_of(operation, stop, p.batch, p.media);
  p.q = rows_of(operation, q), p.out = rows_of(operation, out);
  p.k = media_of(operation, k), p.v = media_of(operation, v);
  p.softmax_max = softmax.mutable_data_ptr<float>(), p.softmax_sum = p.softmax_max + softmax.numel() / 2;
  return p;
}

std::tuple<Tensor, Tensor> masked_cross_attention_fwd(
    Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor start, Tensor stop, bool immediate, bool averages,
    double scale) {
  Tensor out = fresh_like(q),
         softmax = fresh(q, {2, q.size(0), q.size(2), immediate ? 0 : q.size(1)}, ScalarType::Float);
  const MaskedCrossAttention p = masked_params(
      "masked_cross_attention_fwd", q, k, v, lo, hi, start, stop, immediate, averages, scale, out, softmax);
  run(variant().masked_cross_attention_fwd(p.dtype), p);
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor> masked_cross_attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, Tensor lo, Tensor hi, Tensor start, Tensor stop,
    bool immediate, bool averages, double scale) {
  const char* operation = "masked_cross_attention_bwd";
  Tensor dq = fresh_like(q), dk = fresh_like(k), dv = fresh_like(v);
  MaskedCrossAttention p =
      masked_params(operation, q, k, v, lo, hi, start, stop, immediate, averages, scale, out, softmax);
  p.dout = rows_of(operation, dout), p.dq = rows_of(operation, dq);
  p.dk = media_of(operation, dk), p.dv = media_of(operation, dv);
  run(variant().masked_cross_attention_bwd(p.dtype), p);
  run(variant().masked_cross_attention_dq(p.dtype), p);
  return {dq, dk, dv};
}

PerceiverAttention perceiver_params(
    const char* operation, const Tensor& q, const Tensor& k_media, const Tensor& v_media, const Tensor& k_latents,
    const Tensor& v_latents, const std::optional<Tensor>& media_lengths, double scale, const Tensor& out,
    const Tensor& softmax) {
  PerceiverAttention p = {};
  p.dtype = dtype_of(q);
  p.batch = q.size(0), p.length = q.size(1), p.heads = q.size(2), p.head_dim = q.size(3);
  p.kv_heads = k_media.size(2);
  p.keys[0] = k_media.size(1), p.keys[1] = k_latents.size(1);
  p.media_lengths = lengths_of(operation, media_lengths);
  p.scale = scale;
  p.q = rows_of(operation, q), p.out = rows_of(operation, out);
  p.k[0] = rows_of(operation, k_media), p.k[1] = rows_of(operation, k_latents);
  p.v[0] = rows_of(operation, v_media), p.v[1] = rows_of(operation, v_latents);
  p.softmax_max = softmax.mutable_data_ptr<float>(), p.softmax_sum = p.softmax_max + softmax.numel() / 2;
  return p;
}

std::tuple<Tensor, Tensor> perceiver_attention_fwd(
    Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, std::optional<Tensor> media_lengths,
    double scale) {
  Tensor out = fresh_like(q), softmax = fresh(q, {2, q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  const PerceiverAttention p = perceiver_params(
      "perceiver_attention_fwd", q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  run(variant().perceiver_attention_fwd(p.dtype), p);
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> perceiver_attention_bwd(
    Tensor dout, Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, Tensor out, Tensor softmax,
    std::optional<Tensor> media_lengths, double scale) {
  const char* operation = "perceiver_attention_bwd";
  Tensor dq = fresh_like(q), dk_media = fresh_like(k_media), dv_media = fresh_like(v_media),
         dk_latents = fresh_like(k_latents), dv_latents = fresh_like(v_latents);
  PerceiverAttention p = perceiver_params(
      operation, q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  p.dout = rows_of(operation, dout), p.dq = rows_of(operation, dq);
  p.dk[0] = rows_of(operation, dk_media), p.dk[1] = rows_of(operation, dk_latents);
  p.dv[0] = rows_of(operation, dv_media), p.dv[1] = rows_of(operation, dv_latents);
  run(variant().perceiver_attention_bwd(p.dtype), p);
  return {dq, dk_media, dv_media, dk_latents, dv_latents};
}

Matrix matrix_of(const char* operation, const Tensor& t) {  // [N, D]
  check_last_stride(operation, t);
  return {t.data_ptr(), dtype_of(t), t.stride(0)};
}

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff, sign = uint32_t(half & 0x8000) << 16;
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  return bits_to_float((magnitude >= 0x7c00 ? bits | 0x7f800000 : bits) | sign);
}

// A vector of parameters as floats.
std::vector<float> floats_of(const Tensor& tensor) {
  const int64_t count = tensor.numel();
  const Tensor flat = torch::stable::contiguous(tensor);
  const DType dtype = dtype_of(flat);
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == DType::f32) values[i] = ((const float*)flat.data_ptr())[i];
    const uint16_t* halves = (const uint16_t*)flat.data_ptr();
    if (dtype == DType::bf16) values[i] = bits_to_float(uint32_t(halves[i]) << 16);
    if (dtype == DType::f16) values[i] = half_to_float(halves[i]);
  }
  return values;
}

std::vector<float> tanh_of(const Tensor& gate) {
  std::vector<float> values = floats_of(gate);
  for (float& value : values) value = std::tanh(value);
  return values;
}

GatedResidual residual_params(const Tensor& y, const Tensor& gate, const std::vector<float>& tanh_gate) {
  GatedResidual p = {};
  p.rows = y.size(0), p.columns = y.size(1);
  p.per_channel = gate.numel() > 1;
  p.gate = tanh_gate.data();
  p.y = matrix_of("gated_residual", y);
  return p;
}

// Partial sums of all tasks, in their order.
void add_up(const std::vector<float>& partial, Tensor& total, const std::vector<double>* factor) {
  const int64_t columns = total.numel();
  float* sums = total.mutable_data_ptr<float>();
  std::vector<double> exact(columns, 0);
  for (size_t i = 0; i < partial.size(); ++i) exact[i % columns] += partial[i];
  for (int64_t j = 0; j < columns; ++j) sums[j] = factor ? exact[j] * (*factor)[j] : exact[j];
}

Tensor parameter_gradient(const Tensor& parameter) {
  return fresh(parameter, {parameter.sizes().begin(), parameter.sizes().end()}, ScalarType::Float);
}

// d tanh(gate) / d gate = 1 - tanh(gate)^2, in double because the two nearly cancel for large gates.
std::vector<double> gate_slope(const Tensor& gate) {
  std::vector<double> slope;
  for (double value : floats_of(gate)) slope.push_back(1 - std::tanh(value) * std::tanh(value));
  return slope;
}

Tensor gated_residual_fwd(Tensor x, Tensor y, Tensor gate) {
  Tensor z = fresh(x, {x.size(0), x.size(1)}, residual_dtype(x, y, gate));
  const std::vector<float> tanh_gate = tanh_of(gate);
  GatedResidual p = residual_params(y, gate, tanh_gate);
  p.x = matrix_of("gated_residual", x), p.z = matrix_of("gated_residual", z);
  run(variant().gated_residual_fwd(p.x.dtype, p.y.dtype, p.z.dtype), p);
  return z;
}

std::tuple<Tensor, Tensor> gated_residual_bwd(Tensor dz, Tensor y, Tensor gate) {
  Tensor dy = fresh_like(y), dgate = parameter_gradient(gate);
  const std::vector<float> tanh_gate = tanh_of(gate);
  const std::vector<double> slope = gate_slope(gate);
  GatedResidual p = residual_params(y, gate, tanh_gate);
  p.dz = matrix_of("gated_residual", dz), p.dy = matrix_of("gated_residual", dy);
  const Kernel<GatedResidual> kernel = variant().gated_residual_bwd(p.dz.dtype, p.y.dtype, p.dz.dtype);
  std::vector<float> partial(kernel.tasks(p) * gate.numel());
  p.dgate = partial.data();
  run(kernel, p);
  add_up(partial, dgate, &slope);
  return {dy, dgate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm_fwd(
    Tensor x, Tensor y, Tensor gate, Tensor weight, std::optional<Tensor> bias, double eps, bool rms) {
  const char* operation = "gated_residual_norm";
  const ScalarType dtype = residual_dtype(x, y, gate);
  Tensor z = fresh(x, {x.size(0), x.size(1)}, dtype), n = fresh(x, {x.size(0), x.size(1)}, dtype),
         mean = fresh(x, {x.size(0)}, ScalarType::Float), rstd = fresh(x, {x.size(0)}, ScalarType::Float);
  const std::vector<float> tanh_gate = tanh_of(gate), scale = floats_of(weight),
                           offset = bias ? floats_of(*bias) : std::vector<float>();
  GatedResidualNorm p = {};
  p.residual = residual_params(y, gate, tanh_gate);
  p.residual.x = matrix_of(operation, x), p.residual.z = matrix_of(operation, z);
  p.rms = rms, p.eps = eps, p.weight = scale.data(), p.bias = bias ? offset.data() : nullptr;
  p.n = matrix_of(operation, n);
  p.mean = mean.mutable_data_ptr<float>(), p.rstd = rstd.mutable_data_ptr<float>();
  run(variant().gated_residual_norm_fwd(p.residual.x.dtype, p.residual.y.dtype, p.n.dtype), p);
  return {z, n, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_bwd(
    Tensor dz, Tensor dn, Tensor y, Tensor gate, Tensor weight, Tensor z, Tensor mean, Tensor rstd, bool rms) {
  const char* operation = "gated_residual_norm";
  Tensor dx = fresh_like(z), dy = fresh_like(y), dgate = parameter_gradient(gate), dweight = parameter_gradient(weight),
         dbias = parameter_gradient(weight);
  const std::vector<float> tanh_gate = tanh_of(gate), scale = floats_of(weight);
  const std::vector<double> slope = gate_slope(gate);
  GatedResidualNorm p = {};
  p.residual = residual_params(y, gate, tanh_gate);
  p.residual.z = matrix_of(operation, z), p.residual.dz = matrix_of(operation, dz);
  p.residual.dy = matrix_of(operation, dy);
  p.rms = rms, p.weight = scale.data();
  p.dn = matrix_of(operation, dn), p.dx = matrix_of(operation, dx);
  p.mean = mean.mutable_data_ptr<float>(), p.rstd = rstd.mutable_data_ptr<float>();
  const Kernel<GatedResidualNorm> kernel =
      variant().gated_residual_norm_bwd(p.residual.z.dtype, p.residual.y.dtype, p.residual.z.dtype);
  const int64_t tasks = kernel.tasks(p);
  std::vector<float> gates(tasks * gate.numel()), weights(tasks * weight.numel()), biases(tasks * weight.numel());
  p.residual.dgate = gates.data(), p.dweight = weights.data(), p.dbias = biases.data();
  run(kernel, p);
  add_up(gates, dgate, &slope);
  add_up(weights, dweight, nullptr);
  add_up(biases, dbias, nullptr);
  return {dx, dy, dgate, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flamingo_kernels, CPU, m) {
  m.impl("masked_cross_attention_fwd", TORCH_BOX(&masked_cross_attention_fwd));
  m.impl("masked_cross_attention_bwd", TORCH_BOX(&masked_cross_attention_bwd));
  m.impl("perceiver_attention_fwd", TORCH_BOX(&perceiver_attention_fwd));
  m.impl("perceiver_attention_bwd", TORCH_BOX(&perceiver_attention_bwd));
  m.impl("gated_residual_fwd", TORCH_BOX(&gated_residual_fwd));
  m.impl("gated_residual_bwd", TORCH_BOX(&gated_residual_bwd));
  m.impl("gated_residual_norm_fwd", TORCH_BOX(&gated_residual_norm_fwd));
  m.impl("gated_residual_norm_bwd", TORCH_BOX(&gated_residual_norm_bwd));
}

}  // namespace flamingo_kernels

// What flamingo_kernels/_extension.py asks through ctypes.
#define FK_EXPORT extern "C" __attribute__((visibility("default")))
FK_EXPORT int flamingo_kernels_select(const char* name) { return flamingo_kernels::select(name); }
FK_EXPORT const char* flamingo_kernels_variant() { return flamingo_kernels::variant().name; }
FK_EXPORT const char* flamingo_kernels_variants() { return flamingo_kernels::variants(); }
FK_EXPORT void flamingo_kernels_poison(int on) { flamingo_kernels::poisoned = on != 0; }
