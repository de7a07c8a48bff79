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
#include "../gated_block.h"
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

Vector vector_of(const Tensor& t) {  // a thread takes 8 elements, whatever their size
  const bool wide = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.numel() % 8 == 0;
  return {t.data_ptr(), element_type(t), wide};
}

// The largest head_dim that the kernels take.
constexpr int64_t kMostColumns = 128;

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

Norm norm_of(const NormWeights& weights) {
  Norm norm = {};
  if (weights.weight) norm = {vector_of(*weights.weight), {}, float(weights.eps), weights.rms};
  if (weights.bias) norm.bias = vector_of(*weights.bias);
  return norm;
}

Weights weights_of(const LinearWeights& linear) {
  Weights weights = {};
  weights.data = linear.weight->data_ptr(), weights.row = linear.weight->stride(0);
  weights.wide = is_wide(*linear.weight);
  if (linear.scale) weights.scale = linear.scale->const_data_ptr<float>();
  if (linear.bias) weights.bias = vector_of(*linear.bias);
  return weights;
}

// y = weight x + bias, where products are in this dtype.
Linear linear_params(DType dtype, const Tensor& x, const LinearWeights& weights, const Tensor& y) {
  Linear params = {};
  params.dtype = dtype, params.rows = x.size(0), params.in = x.size(1), params.out = y.size(1);
  params.x = matrix_of(x), params.y = matrix_of(y), params.weight = weights_of(weights);
  return params;
}

void set_gate(Linear& params, const Tensor& gate) {
  params.gate = vector_of(gate), params.per_channel = gate.numel() != 1;
}

const Tensor* pointer_to(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

Tensor linear_fwd(
    Tensor x, Tensor weight, std::optional<Tensor> weight_scale, std::optional<Tensor> bias, int64_t activation,
    std::optional<Tensor> gate, std::optional<Tensor> residual) {
  check_linear("linear_fwd", x, weight, weight_scale, bias, activation, gate, residual);
  const Call call(x);
  Tensor y = call.fresh(x, {x.size(0), weight.size(0)}, linear_dtype(x, gate, residual));
  if (y.numel() == 0) return y;
  for (std::optional<Tensor>* each : {&bias, &gate})
    if (*each) *each = torch::stable::contiguous(**each);
  Linear params = linear_params(element_type(x), x, {&weight, pointer_to(bias), pointer_to(weight_scale)}, y);
  params.activation = static_cast<Activation>(activation);
  if (gate) set_gate(params, *gate);
  if (residual) params.residual = matrix_of(*residual);
  kernels::linear_fwd(params, call.stream);
  return y;
}

// The attention of a block's step from q to out [B, H d].
void run_decode_attention(
    const Call& call, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lo, const Tensor& hi,
    const GatedBlock& block, int64_t heads, double scale, const Tensor& out) {
  DecodeAttention params = {};
  params.dtype = element_type(k), params.scale = scale;
  params.batch = q.size(0), params.texts = q.size(0) / k.size(0), params.media = k.size(1), params.latents = k.size(2);
  params.heads = heads, params.kv_heads = k.size(3), params.head_dim = k.size(4);
  params.lo = lo.const_data_ptr<int32_t>(), params.hi = hi.const_data_ptr<int32_t>();
  params.q = q.data_ptr(), params.q_norm = norm_of(block.q_norm), params.out = out.data_ptr();
  params.k = media_of(k), params.v = media_of(v);
  params.splits = kernels::count_gated_block_decode_splits(params);
  const Tensor acc = fresh_partials(call, out, params.splits > 1 ? params.splits : 0),
               softmax = call.fresh(out, {2, params.splits, params.batch, heads}, ScalarType::Float);
  params.acc = acc.mutable_data_ptr<float>();
  params.row_max = softmax.mutable_data_ptr<float>(), params.row_sum = params.row_max + softmax.numel() / 2;
  kernels::gated_block_decode_attention(params, call.stream);
}

// The same with the norm before it, as each half of a block begins.
void run_with_norm(const Call& call, const Tensor& x, Linear params, const NormWeights& norm, const Tensor& y) {
  params.norm = norm_of(norm);
  const bool apart = kernels::norms_apart(params);
  const Tensor normed = call.fresh(x, {apart ? x.size(0) : 0, x.size(1)}, y.scalar_type());
  if (apart) params.normed = matrix_of(normed);
  kernels::linear_fwd(params, call.stream);
}

// y = residual + tanh(gate) * (weight x + bias), as each half of a block ends.
void add_branch(
    const Call& call, const Tensor& x, const LinearWeights& weights, const Tensor* gate, const Tensor& residual,
    const Tensor& y) {
  Linear params = linear_params(element_type(x), x, weights, y);
  if (gate) set_gate(params, *gate);
  params.residual = matrix_of(residual);
  kernels::linear_fwd(params, call.stream);
}

Tensor gated_block_decode_fwd(
    Tensor x, Tensor k, Tensor v, Tensor lo, Tensor hi, std::vector<Tensor> weights, int64_t heads, double scale,
    std::vector<double> eps, std::vector<int64_t> rms, int64_t activation) {
  const char* operation = "gated_block_decode_fwd";
  const GatedBlock block(operation, weights, eps, rms, activation);
  check_gated_block_decode(operation, x, k, v, lo, hi, block, heads);
  expect_at_most(operation, "head_dim", k.size(4), kMostColumns);
  const Call call(x);
  const auto fresh = [&](const LinearWeights& linear, ScalarType dtype) {
    return call.fresh(x, {x.size(0), linear.weight->size(0)}, dtype);
  };
  const ScalarType dtype = k.scalar_type(), z_dtype = gated_dtype(dtype, block.gate, x.scalar_type());
  const Tensor q = fresh(block.to_q, dtype), attended = fresh(block.to_q, dtype), z = fresh(block.to_out, z_dtype),
               hidden = fresh(block.up, dtype), out = fresh(block.down, gated_dtype(dtype, block.ff_gate, z_dtype));
  if (out.numel() == 0) return out;

  run_with_norm(call, x, linear_params(element_type(k), x, block.to_q, q), block.norm, q);
  run_decode_attention(call, q, k, v, lo, hi, block, heads, scale, attended);
  add_branch(call, attended, block.to_out, block.gate, x, z);
  Linear up = linear_params(element_type(k), z, block.up, hidden);
  up.activation = block.activation;
  if (block.has_glu()) up.gate_proj = weights_of(block.gate_proj);
  run_with_norm(call, z, up, block.ff_norm, hidden);
  add_branch(call, hidden, block.down, block.ff_gate, z, out);
  return out;
}

}  // namespace

#if defined(FK_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(flamingo_kernels, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(flamingo_kernels, CUDA, library) {
#endif
  FK_REGISTER_OPERATORS(library, ".cuda");
}

}  // namespace flamingo_kernels

// What flamingo_kernels/_backends/cuda.py asks through ctypes.
FK_EXPORT int flamingo_kernels_cuda_emulated() { return flamingo_kernels::kernels::emulated(); }
extern "C" __attribute__((visibility("default"), used)) const char flamingo_kernels_cuda_build[] =
    "flamingo_kernels_cuda_build: " FK_BUILD;
FK_EXPORT void flamingo_kernels_cuda_poison(int on) { flamingo_kernels::poisoned = on != 0; }
