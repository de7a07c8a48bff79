// The operators as PyTorch sees them: checks, outputs, parameters, the device and its stream. Includes only the stable
// ABI of torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <numbers>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../operators.h"
#include "kernels.h"

namespace flamingo_kernels {
namespace {

bool poisoned = false;  // a test aid: outputs and working memory start as NaN

// One call of an operation: makes the device of a tensor the current one, finds its stream, and allocates.
class Call {
 public:
#if defined(FK_EMULATE)
  explicit Call(const Tensor&) {}
#else
  explicit Call(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
#endif
  Stream stream = nullptr;

  Tensor fresh(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) const {
    Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
    if (poisoned) kernels::fill_with_nan(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size(), stream);
    return tensor;
  }

 private:
#if !defined(FK_EMULATE)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

Tensor zeroed(Tensor tensor) {
  torch::stable::zero_(tensor);
  return tensor;
}

Vector vector_of(const Tensor& t) { return {t.data_ptr(), element_type(t)}; }

// The largest sizes that the kernels take.
constexpr int64_t kMostColumns = 128, kMostSequences = 16, kMostInner = 16384;

void expect_at_most(const char* operation, const char* name, int64_t size, int64_t most) {
  if (size > most) refuse(operation, ": expected ", name, " of at most ", most, ", got ", size, ".");
}

void set_scale(Attention& params, double scale) {
  params.sign = (scale > 0) - (scale < 0);  // a scale of 0 makes all scores equal, however large
  // not 0, as 0 times the -inf of a key that is not visible is NaN
  params.scale_log2 = std::max(float(std::abs(scale) * std::numbers::log2e), std::numeric_limits<float>::min());
}

MaskedCrossAttention masked_params(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lo, const Tensor& hi, const Tensor& start,
    const Tensor& stop, bool immediate, bool averages, double scale, const Tensor& out, const Tensor& softmax) {
  auto params =
      masked_cross_attention_params<MaskedCrossAttention>(q, k, v, lo, hi, start, stop, averages, scale, out, softmax);
  params.one_shot = kernels::is_one_shot(params.dtype, immediate, params.latents), params.parts = 1;
  set_scale(params, scale);
  return params;
}

std::tuple<Tensor, Tensor> masked_cross_attention_fwd(
    Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor start, Tensor stop, bool immediate, bool averages,
    double scale) {
  const char* operation = "masked_cross_attention_fwd";
  check_masked_cross_attention(operation, q, k, v, lo, hi, start, stop);
  expect_at_most(operation, "head_dim", q.size(3), kMostColumns);
  const Call call(q);
  const bool one_shot = kernels::is_one_shot(element_type(q), immediate, k.size(2));
  Tensor out = fresh_like(call, q), softmax = fresh_softmax(call, q, one_shot ? 0 : q.size(1));
  if (out.numel() == 0) return {out, softmax};
  const MaskedCrossAttention params =
      masked_params(q, k, v, lo, hi, start, stop, immediate, averages, scale, out, softmax);
  kernels::masked_cross_attention_fwd(params, call.stream);
  return {out, softmax};
}

// Memory for the results of every part of the work, in float32.
Tensor fresh_partials(const Call& call, const Tensor& result, int64_t parts) {
  std::vector<int64_t> sizes = {parts};
  sizes.insert(sizes.end(), result.sizes().begin(), result.sizes().end());
  return call.fresh(result, sizes, ScalarType::Float);
}

void add_partials(const Call& call, const Tensor& partials, Tensor& total) {
  kernels::sum_partials(
      {partials.const_data_ptr<float>(), total.mutable_data_ptr(), element_type(total), partials.size(0),
       total.numel()},
      call.stream);
}

std::tuple<Tensor, Tensor, Tensor> masked_cross_attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, Tensor lo, Tensor hi, Tensor start,
    Tensor stop, bool immediate, bool averages, double scale) {
  const char* operation = "masked_cross_attention_bwd";
  const Checks checks = check_masked_cross_attention(operation, q, k, v, lo, hi, start, stop);
  expect_at_most(operation, "head_dim", q.size(3), kMostColumns);
  const int64_t kept = kernels::is_one_shot(element_type(q), immediate, k.size(2)) ? 0 : q.size(1);
  check_attention_bwd(checks, dout, q, out, softmax, kept);
  const Call call(q);
  Tensor dq = fresh_like(call, q), dk = fresh_like(call, k), dv = fresh_like(call, v);
  if (q.numel() == 0 || k.numel() == 0) return {zeroed(dq), zeroed(dk), zeroed(dv)};
  MaskedCrossAttention params = masked_params(q, k, v, lo, hi, start, stop, immediate, averages, scale, out, softmax);
  set_gradients(params, dout, dq, dk, dv);
  const Tensor delta = call.fresh(
                   q, {params.one_shot ? 0 : params.batch * params.heads * params.length}, ScalarType::Float),
               averaged_dv =
                   call.fresh(q, {averages ? params.batch * params.kv_heads * params.head_dim : 0}, ScalarType::Float);
  params.delta = params.one_shot ? nullptr : delta.mutable_data_ptr<float>();
  params.averaged_dv = averaged_dv.mutable_data_ptr<float>();
  params.parts = kernels::count_masked_cross_attention_bwd_parts(params);
  if (params.parts == 1) {
    kernels::masked_cross_attention_bwd(params, call.stream);
    return {dq, dk, dv};
  }
  const Tensor dks = fresh_partials(call, dk, params.parts), dvs = fresh_partials(call, dv, params.parts);
  params.partial_dk = dks.mutable_data_ptr<float>(), params.partial_dv = dvs.mutable_data_ptr<float>();
  kernels::masked_cross_attention_bwd(params, call.stream);
  add_partials(call, dks, dk), add_partials(call, dvs, dv);
  return {dq, dk, dv};
}

PerceiverAttention perceiver_params(
    const Tensor& q, const Tensor& k_media, const Tensor& v_media, const Tensor& k_latents, const Tensor& v_latents,
    const std::optional<Tensor>& media_lengths, double scale, const Tensor& out, const Tensor& softmax) {
  auto params = perceiver_attention_params<PerceiverAttention>(
      q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  set_scale(params, scale);
  params.parts = kernels::count_perceiver_attention_parts(params), params.whole = kernels::is_whole(params);
  return params;
}

std::tuple<Tensor, Tensor> perceiver_attention_fwd(
    Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, std::optional<Tensor> media_lengths,
    double scale) {
  const char* operation = "perceiver_attention_fwd";
  check_perceiver_attention(operation, q, k_media, v_media, k_latents, v_latents, media_lengths);
  expect_at_most(operation, "head_dim", q.size(3), kMostColumns);
  const Call call(q);
  Tensor out = fresh_like(call, q), softmax = fresh_softmax(call, q, q.size(1));
  if (out.numel() == 0) return {out, softmax};
  PerceiverAttention params =
      perceiver_params(q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  const bool divided = params.parts > 1;
  const Tensor outs = fresh_partials(call, out, divided ? params.parts : 0),
               softmaxes = fresh_partials(call, softmax, divided ? params.parts : 0);
  params.partial_rows = outs.mutable_data_ptr<float>();
  kernels::perceiver_attention_fwd(params, softmaxes.mutable_data_ptr<float>(), call.stream);
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> perceiver_attention_bwd(
    Tensor dout, Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, Tensor out,
    Tensor softmax, std::optional<Tensor> media_lengths, double scale) {
  const char* operation = "perceiver_attention_bwd";
  const Checks checks = check_perceiver_attention(operation, q, k_media, v_media, k_latents, v_latents, media_lengths);
  expect_at_most(operation, "head_dim", q.size(3), kMostColumns);
  check_attention_bwd(checks, dout, q, out, softmax, q.size(1));
  const Call call(q);
  Tensor dq = fresh_like(call, q), dk_media = fresh_like(call, k_media), dv_media = fresh_like(call, v_media),
         dk_latents = fresh_like(call, k_latents), dv_latents = fresh_like(call, v_latents);
  if (q.numel() == 0) return {dq, zeroed(dk_media), zeroed(dv_media), zeroed(dk_latents), zeroed(dv_latents)};
  PerceiverAttention params =
      perceiver_params(q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  set_gradients(params, dout, dq, dk_media, dv_media, dk_latents, dv_latents);
  const Tensor delta =
                   call.fresh(q, {params.whole ? 0 : params.batch * params.heads * params.length}, ScalarType::Float),
               dqs = fresh_partials(call, dq, params.parts > 1 ? params.parts : 0);
  params.delta = params.whole ? nullptr : delta.mutable_data_ptr<float>();
  params.partial_rows = dqs.mutable_data_ptr<float>();
  kernels::perceiver_attention_bwd(params, call.stream);
  if (params.parts > 1) add_partials(call, dqs, dq);
  return {dq, dk_media, dv_media, dk_latents, dv_latents};
}

GatedResidual residual_params(const Tensor& y, const Tensor& gate) {
  auto params = gated_residual_params<GatedResidual>(y, gate);
  params.gate = vector_of(gate);
  return params;
}

// The gradient of a gate and its partial sums, of every part or where all columns have one gate of every block. One
// partial sum is the gradient itself.
struct GateGradient {
  Tensor gradient, partials;

  GateGradient(const Call& call, const Tensor& gate, const Division& division)
      : gradient(fresh_gradient(call, gate)), partials(gradient) {
    const int64_t parts = gate.numel() > 1 ? division.parts : division.parts * division.blocks;
    if (parts != 1) partials = call.fresh(gradient, {parts, gradient.numel()}, ScalarType::Float);
  }

  float* data() { return partials.mutable_data_ptr<float>(); }

  Tensor add(const Call& call) {
    if (partials.numel() != gradient.numel()) add_partials(call, partials, gradient);
    return gradient;
  }
};

Tensor gated_residual_fwd(Tensor x, Tensor y, Tensor gate) {
  check_residual("gated_residual_fwd", "x", x, y, gate);
  const Call call(x);
  Tensor z = call.fresh(x, {x.size(0), x.size(1)}, residual_dtype(x, y, gate));
  if (z.numel() == 0) return z;
  gate = torch::stable::contiguous(gate);
  GatedResidual params = residual_params(y, gate);
  params.x = matrix_of(x), params.z = matrix_of(z);
  kernels::gated_residual_fwd(params, call.stream);
  return z;
}

std::tuple<Tensor, Tensor> gated_residual_bwd(Tensor dz, Tensor y, Tensor gate) {
  const char* operation = "gated_residual_bwd";
  check_residual_bwd(operation, dz, y, gate);
  const Call call(y);
  Tensor dy = fresh_like(call, y);
  if (dy.numel() == 0) return {dy, zeroed(fresh_gradient(call, gate))};
  gate = torch::stable::contiguous(gate);
  const Division division = kernels::divide_gated_residual_bwd(y.size(0), y.size(1));
  GateGradient dgate(call, gate, division);
  GatedResidual params = residual_params(y, gate);
  params.dz = matrix_of(dz), params.dy = matrix_of(dy);
  params.parts = division.parts, params.part_rows = division.part_rows, params.dgate = dgate.data();
  kernels::gated_residual_bwd(params, call.stream);
  return {dy, dgate.add(call)};
}

DecodeLinear linear_params(const Tensor& input, const Tensor& weight, const Tensor& output) {
  DecodeLinear params = {};
  params.dtype = element_type(input);
  params.batch = input.size(0), params.rows = weight.size(0), params.columns = weight.size(1);
  params.input = input.data_ptr(), params.weight = weight.data_ptr(), params.output = output.data_ptr();
  return params;
}

void add_norm(DecodeLinear& params, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  params.norm_weight = vector_of(weight), params.eps = eps;
  if (bias) params.norm_bias = vector_of(*bias);
}

void add_residual(DecodeLinear& params, const Tensor& residual, const Tensor& gate) {
  params.residual = residual.data_ptr(), params.gate = vector_of(gate), params.per_channel = gate.numel() > 1;
}

void check_gated_block_decode(
    const char* operation, const Tensor& x, const Tensor& k, const Tensor& v, const Tensor& lo, const Tensor& hi,
    const Tensor& norm, const std::optional<Tensor>& norm_bias, const Tensor& to_q, const Tensor& to_out,
    const Tensor& gate, const Tensor& ff_norm, const std::optional<Tensor>& ff_norm_bias, const Tensor& up,
    const Tensor& down, const Tensor& ff_gate, int64_t heads, int64_t activation) {
  const Checks checks(operation, "x", x, 2);
  checks.expect_dimensions("k", k, 5), checks.expect_dimensions("up", up, 2);
  const int64_t batch = x.size(0), dim = x.size(1), inner = heads * k.size(4), hidden = up.size(0);
  // The caller makes all of it contiguous once: copying the weights in every step would take most of the time.
  const auto expect_matrix = [&](const char* name, const Tensor& matrix, int64_t rows, int64_t columns) {
    checks.expect_contiguous(name, matrix, x.scalar_type(), {rows, columns});
  };
  const auto expect_vector = [&](const char* name, const Tensor& vector, bool one_for_all) {
    checks.expect_parameter(name, vector, dim, one_for_all);
    if (!vector.is_contiguous()) refuse(operation, ": expected a contiguous ", name, ".");
  };
  checks.expect_rows("x", x, {batch, dim}), expect_matrix("x", x, batch, dim);
  expect_matrix("to_q", to_q, inner, dim), expect_matrix("to_out", to_out, dim, inner);
  expect_matrix("up", up, hidden, dim), expect_matrix("down", down, dim, hidden);
  expect_vector("norm", norm, false), expect_vector("ff_norm", ff_norm, false);
  if (norm_bias) expect_vector("norm_bias", *norm_bias, false);
  if (ff_norm_bias) expect_vector("ff_norm_bias", *ff_norm_bias, false);
  expect_vector("gate", gate, true), expect_vector("ff_gate", ff_gate, true);
  for (const auto& [name, keys] : {std::pair("k", k), std::pair("v", v)})
    checks.expect_rows_like_first(name, keys, {batch, k.size(1), k.size(2), k.size(3), k.size(4)});
  checks.expect_latents("k", k, 2), checks.expect_head_groups(heads, k.size(3));
  for (const auto& [name, span] : {std::pair("lo", lo), std::pair("hi", hi)})
    checks.expect_contiguous(name, span, ScalarType::Int, {batch, 1});
  expect_at_most(operation, "B", batch, kMostSequences), expect_at_most(operation, "head_dim", k.size(4), kMostColumns);
  expect_at_most(operation, "H * d", inner, kMostInner);
  if (activation < 0 || activation > static_cast<int64_t>(Activation::relu))
    refuse(operation, ": expected an activation from 0 to 3, got ", activation, ".");
}

Tensor gated_block_decode(
    Tensor x, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor norm, std::optional<Tensor> norm_bias, Tensor to_q,
    Tensor to_out, Tensor gate, Tensor ff_norm, std::optional<Tensor> ff_norm_bias, Tensor up, Tensor down,
    Tensor ff_gate, int64_t heads, double scale, double eps, int64_t activation) {
  const char* operation = "gated_block_decode";
  check_gated_block_decode(
      operation, x, k, v, lo, hi, norm, norm_bias, to_q, to_out, gate, ff_norm, ff_norm_bias, up, down, ff_gate, heads,
      activation);
  const Call call(x);
  const int64_t batch = x.size(0);
  const Tensor q = call.fresh(x, {batch, to_q.size(0)}, x.scalar_type()), z = fresh_like(call, x),
               hidden = call.fresh(x, {batch, up.size(0)}, x.scalar_type());
  Tensor out = fresh_like(call, x);
  if (x.numel() == 0) return out;

  DecodeLinear q_proj = linear_params(x, to_q, q), up_proj = linear_params(z, up, hidden),
               down_proj = linear_params(hidden, down, out);
  add_norm(q_proj, norm, norm_bias, eps), add_norm(up_proj, ff_norm, ff_norm_bias, eps);
  up_proj.activation = static_cast<Activation>(activation);
  add_residual(down_proj, z, ff_gate);
  DecodeAttention attention = {};
  attention.out = linear_params(q, to_out, z);
  add_residual(attention.out, x, gate);
  attention.heads = heads, attention.kv_heads = k.size(3), attention.head_dim = k.size(4);
  attention.media = k.size(1), attention.latents = k.size(2), attention.scale = scale;
  attention.lo = lo.const_data_ptr<int32_t>(), attention.hi = hi.const_data_ptr<int32_t>();
  attention.q = q.data_ptr(), attention.k = media_of(k), attention.v = media_of(v);

  kernels::gated_block_decode_linear(q_proj, call.stream);
  kernels::gated_block_decode_attention(attention, call.stream);
  kernels::gated_block_decode_linear(up_proj, call.stream);
  kernels::gated_block_decode_linear(down_proj, call.stream);
  return out;
}

}  // namespace

#if defined(FK_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(flamingo_kernels, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(flamingo_kernels, CUDA, library) {
#endif
  FK_REGISTER_OPERATORS(library, ".cuda");
  library.impl("gated_block_decode.cuda", TORCH_BOX(&gated_block_decode));
}

}  // namespace flamingo_kernels

// What flamingo_kernels/_backends/cuda.py asks through ctypes.
FK_EXPORT int flamingo_kernels_cuda_emulated() { return flamingo_kernels::kernels::emulated(); }
extern "C" __attribute__((visibility("default"), used)) const char flamingo_kernels_cuda_build[] =
    "flamingo_kernels_cuda_build: " FK_BUILD;
FK_EXPORT void flamingo_kernels_cuda_poison(int on) { flamingo_kernels::poisoned = on != 0; }
