// The operators as PyTorch sees them: checks, outputs, parameters, the device and its stream.
// It and `tensors.h` alone include torch, and of torch only the stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <numbers>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace flamingo_kernels {
namespace {

bool poisoned = false;  // a test aid: outputs and working memory start as NaN

// Makes the device of a tensor the current one, while an operator runs, and finds its current stream.
class Launch {
 public:
#if defined(FK_EMULATE)
  explicit Launch(const Tensor&) {}
#else
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
#endif
  Stream stream = nullptr;

 private:
#if !defined(FK_EMULATE)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

Tensor fresh(const Launch& launch, const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  if (poisoned)
    kernels::fill_with_nan(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size(), launch.stream);
  return tensor;
}

Tensor fresh_like(const Launch& launch, const Tensor& tensor) {
  return fresh(launch, tensor, {tensor.sizes().begin(), tensor.sizes().end()}, tensor.scalar_type());
}

Tensor gradient_of_parameter(const Launch& launch, const Tensor& parameter) {
  return fresh(launch, parameter, {parameter.sizes().begin(), parameter.sizes().end()}, ScalarType::Float);
}

Tensor zeroed(Tensor tensor) {
  torch::stable::zero_(tensor);
  return tensor;
}

// Whether all rows begin at multiples of 16 bytes and are multiples of 16 bytes long.
bool is_wide(const Tensor& tensor) {
  const int64_t element = tensor.element_size(), last = tensor.dim() - 1;
  bool wide = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && tensor.size(last) * element % 16 == 0;
  for (int64_t i = 0; i < last; ++i) wide = wide && (tensor.size(i) <= 1 || tensor.stride(i) * element % 16 == 0);
  return wide;
}

Matrix matrix_of(const Tensor& t) {  // [N, D]
  // a thread takes 8 elements, whatever their size
  return {t.data_ptr(), dtype_of(t), t.stride(0), is_wide(t) && t.size(1) % 8 == 0};
}

Vector vector_of(const Tensor& t) { return {t.data_ptr(), dtype_of(t)}; }

Rows rows_of(const Tensor& t) {  // [B, T, H, d]
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), is_wide(t)};
}

Media media_of(const Tensor& t) {  // [B, M, R, Hkv, d]
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), is_wide(t)};
}

// What the kernels take; the shape of a tensor may ask for more.
constexpr int64_t kMostColumns = 128, kMostSequences = 16, kMostInner = 16384;

void expect_at_most(const char* operation, const char* name, int64_t size, int64_t most) {
  if (size > most) refuse(operation, ": expected ", name, " of at most ", most, ", got ", size, ".");
}

Attention attention_params(const Tensor& q, int64_t kv_heads, double scale, const Tensor& out, const Tensor& softmax) {
  Attention params = {};
  params.dtype = dtype_of(q);
  params.batch = q.size(0), params.length = q.size(1), params.heads = q.size(2), params.head_dim = q.size(3);
  params.kv_heads = kv_heads, params.scale = scale, params.parts = 1;
  params.sign = std::signbit(scale) ? -1 : 1;
  // not 0, as 0 times the -inf of a key that is not real is NaN
  params.scale_log2 = std::max(float(std::abs(scale) * std::numbers::log2e), std::numeric_limits<float>::min());
  params.q = rows_of(q), params.out = rows_of(out);
  if (softmax.numel() == 0) return params;
  params.row_max = softmax.mutable_data_ptr<float>(), params.row_sum = params.row_max + softmax.numel() / 2;
  return params;
}

MaskedCrossAttention masked_params(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lo, const Tensor& hi, const Tensor& start,
    const Tensor& stop, bool immediate, bool averages, double scale, const Tensor& out, const Tensor& softmax) {
  MaskedCrossAttention params = {};
  static_cast<Attention&>(params) = attention_params(q, k.size(3), scale, out, softmax);
  params.media = k.size(1), params.latents = k.size(2);
  params.one_shot = kernels::is_one_shot(params.dtype, immediate, params.latents), params.averages = averages;
  params.lo = lo.const_data_ptr<int32_t>(), params.hi = hi.const_data_ptr<int32_t>();
  params.start = start.const_data_ptr<int32_t>(), params.stop = stop.const_data_ptr<int32_t>();
  params.k = media_of(k), params.v = media_of(v);
  return params;
}

std::tuple<Tensor, Tensor> masked_cross_attention_fwd(
    Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor start, Tensor stop, bool immediate, bool averages,
    double scale) {
  const char* operation = "masked_cross_attention_fwd";
  check_masked_cross_attention(operation, q, k, v, lo, hi, start, stop);
  expect_at_most(operation, "head_dim", q.size(3), kMostColumns);
  const Launch launch(q);
  const bool one_shot = kernels::is_one_shot(dtype_of(q), immediate, k.size(2));
  Tensor out = fresh_like(launch, q),
         softmax = fresh(launch, q, {2, q.size(0), q.size(2), one_shot ? 0 : q.size(1)}, ScalarType::Float);
  if (out.numel() == 0) return {out, softmax};
  const MaskedCrossAttention params =
      masked_params(q, k, v, lo, hi, start, stop, immediate, averages, scale, out, softmax);
  kernels::masked_cross_attention_fwd(params, launch.stream);
  return {out, softmax};
}

// Results of which each part of the work has its own, in float32.
Tensor parts_of(const Launch& launch, const Tensor& result, int64_t parts) {
  std::vector<int64_t> sizes = {parts};
  sizes.insert(sizes.end(), result.sizes().begin(), result.sizes().end());
  return fresh(launch, result, sizes, ScalarType::Float);
}

void add_parts(const Launch& launch, const Tensor& parts, Tensor& total) {
  kernels::sum_partials(
      {parts.const_data_ptr<float>(), total.mutable_data_ptr(), dtype_of(total), parts.size(0), total.numel()},
      launch.stream);
}

std::tuple<Tensor, Tensor, Tensor> masked_cross_attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, Tensor lo, Tensor hi, Tensor start,
    Tensor stop, bool immediate, bool averages, double scale) {
  const char* operation = "masked_cross_attention_bwd";
  const Checks checks = check_masked_cross_attention(operation, q, k, v, lo, hi, start, stop);
  expect_at_most(operation, "head_dim", q.size(3), kMostColumns);
  const int64_t kept = kernels::is_one_shot(dtype_of(q), immediate, k.size(2)) ? 0 : q.size(1);
  check_attention_bwd(checks, dout, q, out, softmax, kept);
  const Launch launch(q);
  Tensor dq = fresh_like(launch, q), dk = fresh_like(launch, k), dv = fresh_like(launch, v);
  if (q.numel() == 0 || k.numel() == 0) return {zeroed(dq), zeroed(dk), zeroed(dv)};
  MaskedCrossAttention params = masked_params(q, k, v, lo, hi, start, stop, immediate, averages, scale, out, softmax);
  params.dout = rows_of(dout), params.dq = rows_of(dq);
  params.dk = media_of(dk), params.dv = media_of(dv);
  const Tensor delta = fresh(
                   launch, q, {params.one_shot ? 0 : params.batch * params.heads * params.length}, ScalarType::Float),
               averaged_dv = fresh(
                   launch, q, {averages ? params.batch * params.kv_heads * params.head_dim : 0}, ScalarType::Float);
  params.delta = params.one_shot ? nullptr : delta.mutable_data_ptr<float>(),
  params.averaged_dv = averaged_dv.mutable_data_ptr<float>();
  params.parts = kernels::count_masked_cross_attention_bwd_parts(params);
  if (params.parts == 1) {
    kernels::masked_cross_attention_bwd(params, launch.stream);
    return {dq, dk, dv};
  }
  const Tensor dks = parts_of(launch, dk, params.parts), dvs = parts_of(launch, dv, params.parts);
  params.partial_dk = dks.mutable_data_ptr<float>(), params.partial_dv = dvs.mutable_data_ptr<float>();
  kernels::masked_cross_attention_bwd(params, launch.stream);
  add_parts(launch, dks, dk), add_parts(launch, dvs, dv);
  return {dq, dk, dv};
}

PerceiverAttention perceiver_params(
    const Tensor& q, const Tensor& k_media, const Tensor& v_media, const Tensor& k_latents, const Tensor& v_latents,
    const std::optional<Tensor>& media_lengths, double scale, const Tensor& out, const Tensor& softmax) {
  PerceiverAttention params = {};
  static_cast<Attention&>(params) = attention_params(q, k_media.size(2), scale, out, softmax);
  params.keys[0] = k_media.size(1), params.keys[1] = k_latents.size(1);
  params.media_lengths = data_or_null(media_lengths);
  params.k[0] = rows_of(k_media), params.k[1] = rows_of(k_latents);
  params.v[0] = rows_of(v_media), params.v[1] = rows_of(v_latents);
  params.parts = kernels::count_perceiver_attention_parts(params), params.whole = kernels::is_whole(params);
  return params;
}

std::tuple<Tensor, Tensor> perceiver_attention_fwd(
    Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, std::optional<Tensor> media_lengths,
    double scale) {
  const char* operation = "perceiver_attention_fwd";
  check_perceiver_attention(operation, q, k_media, v_media, k_latents, v_latents, media_lengths);
  expect_at_most(operation, "head_dim", q.size(3), kMostColumns);
  const Launch launch(q);
  Tensor out = fresh_like(launch, q),
         softmax = fresh(launch, q, {2, q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  if (out.numel() == 0) return {out, softmax};
  PerceiverAttention params =
      perceiver_params(q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  const bool divided = params.parts > 1;
  const Tensor outs = parts_of(launch, out, divided ? params.parts : 0),
               softmaxes = parts_of(launch, softmax, divided ? params.parts : 0);
  params.partial_rows = outs.mutable_data_ptr<float>();
  kernels::perceiver_attention_fwd(params, softmaxes.mutable_data_ptr<float>(), launch.stream);
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> perceiver_attention_bwd(
    Tensor dout, Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, Tensor out,
    Tensor softmax, std::optional<Tensor> media_lengths, double scale) {
  const char* operation = "perceiver_attention_bwd";
  const Checks checks = check_perceiver_attention(operation, q, k_media, v_media, k_latents, v_latents, media_lengths);
  expect_at_most(operation, "head_dim", q.size(3), kMostColumns);
  check_attention_bwd(checks, dout, q, out, softmax, q.size(1));
  const Launch launch(q);
  Tensor dq = fresh_like(launch, q), dk_media = fresh_like(launch, k_media), dv_media = fresh_like(launch, v_media),
         dk_latents = fresh_like(launch, k_latents), dv_latents = fresh_like(launch, v_latents);
  if (q.numel() == 0) return {dq, zeroed(dk_media), zeroed(dv_media), zeroed(dk_latents), zeroed(dv_latents)};
  PerceiverAttention params =
      perceiver_params(q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  params.dout = rows_of(dout), params.dq = rows_of(dq);
  params.dk[0] = rows_of(dk_media), params.dk[1] = rows_of(dk_latents);
  params.dv[0] = rows_of(dv_media), params.dv[1] = rows_of(dv_latents);
  const Tensor delta = fresh(
                   launch, q, {params.whole ? 0 : params.batch * params.heads * params.length}, ScalarType::Float),
               dqs = parts_of(launch, dq, params.parts > 1 ? params.parts : 0);
  params.delta = params.whole ? nullptr : delta.mutable_data_ptr<float>(),
  params.partial_rows = dqs.mutable_data_ptr<float>();
  kernels::perceiver_attention_bwd(params, launch.stream);
  if (params.parts > 1) add_parts(launch, dqs, dq);
  return {dq, dk_media, dv_media, dk_latents, dv_latents};
}

GatedResidual residual_params(const Tensor& y, const Tensor& gate) {
  GatedResidual params = {};
  params.rows = y.size(0), params.columns = y.size(1);
  params.per_channel = gate.numel() > 1;
  params.gate = vector_of(gate);
  params.y = matrix_of(y);
  return params;
}

// Partial sums of a parameter's gradient, and the gradient, which they are where there is one part.
struct Partials {
  Tensor total, parts;

  float* data() { return parts.mutable_data_ptr<float>(); }
  Tensor added(const Launch& launch) {
    const int64_t size = total.numel(), count = parts.numel() / size;
    if (count != 1)
      kernels::sum_partials({data(), total.mutable_data_ptr(), dtype_of(total), count, size}, launch.stream);
    return total;
  }
};

Partials partials_of(const Launch& launch, const Tensor& parameter, int64_t count) {
  const Tensor total = gradient_of_parameter(launch, parameter);
  return {total, count == 1 ? total : fresh(launch, total, {count, total.numel()}, ScalarType::Float)};
}

// Of one gate for all columns every block has a partial sum.
Partials gate_partials_of(const Launch& launch, const Tensor& gate, const Division& division) {
  return partials_of(launch, gate, gate.numel() > 1 ? division.parts : division.parts * division.blocks);
}

Tensor gated_residual_fwd(Tensor x, Tensor y, Tensor gate) {
  check_residual("gated_residual_fwd", "x", x, y, gate);
  const Launch launch(x);
  Tensor z = fresh(launch, x, {x.size(0), x.size(1)}, residual_dtype(x, y, gate));
  if (z.numel() == 0) return z;
  gate = torch::stable::contiguous(gate);
  GatedResidual params = residual_params(y, gate);
  params.x = matrix_of(x), params.z = matrix_of(z);
  kernels::gated_residual_fwd(params, launch.stream);
  return z;
}

std::tuple<Tensor, Tensor> gated_residual_bwd(Tensor dz, Tensor y, Tensor gate) {
  const char* operation = "gated_residual_bwd";
  check_residual(operation, "dz", dz, y, gate);
  check_residual_bwd(operation, "dz", dz, y);
  const Launch launch(y);
  Tensor dy = fresh_like(launch, y);
  if (dy.numel() == 0) return {dy, zeroed(gradient_of_parameter(launch, gate))};
  gate = torch::stable::contiguous(gate);
  const Division division = kernels::divide_gated_residual_bwd(y.size(0), y.size(1));
  Partials dgate = gate_partials_of(launch, gate, division);
  GatedResidual params = residual_params(y, gate);
  params.dz = matrix_of(dz), params.dy = matrix_of(dy);
  params.parts = division.parts, params.part_rows = division.part_rows, params.dgate = dgate.data();
  kernels::gated_residual_bwd(params, launch.stream);
  return {dy, dgate.added(launch)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm_fwd(
    Tensor x, Tensor y, Tensor gate, Tensor weight, std::optional<Tensor> bias, double eps, bool rms) {
  const Checks checks = check_residual("gated_residual_norm_fwd", "x", x, y, gate);
  checks.expect_parameter("weight", weight, x.size(1), false);
  if (bias) checks.expect_parameter("bias", *bias, x.size(1), false);
  const Launch launch(x);
  const ScalarType dtype = residual_dtype(x, y, gate);
  Tensor z = fresh(launch, x, {x.size(0), x.size(1)}, dtype), n = fresh_like(launch, z),
         mean = fresh(launch, x, {x.size(0)}, ScalarType::Float), rstd = fresh_like(launch, mean);
  if (z.numel() == 0) return {z, n, mean, rstd};
  gate = torch::stable::contiguous(gate), weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  GatedResidualNorm params = {};
  params.residual = residual_params(y, gate);
  params.residual.x = matrix_of(x), params.residual.z = matrix_of(z);
  params.rms = rms, params.eps = eps, params.weight = vector_of(weight);
  if (bias) params.bias = vector_of(*bias);
  params.n = matrix_of(n);
  params.mean = mean.mutable_data_ptr<float>(), params.rstd = rstd.mutable_data_ptr<float>();
  kernels::gated_residual_norm_fwd(params, launch.stream);
  return {z, n, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_bwd(
    Tensor dz, Tensor dn, Tensor y, Tensor gate, Tensor weight, Tensor z, Tensor mean, Tensor rstd, bool rms) {
  const char* operation = "gated_residual_norm_bwd";
  const Checks checks = check_residual(operation, "z", z, y, gate);
  const int64_t rows = z.size(0), columns = z.size(1);
  check_residual_bwd(operation, "z", z, y);
  checks.expect_rows_like_first("dz", dz, {rows, columns}), checks.expect_rows_like_first("dn", dn, {rows, columns});
  checks.expect_parameter("weight", weight, columns, false);
  checks.expect_contiguous("mean", mean, ScalarType::Float, {rows});
  checks.expect_contiguous("rstd", rstd, ScalarType::Float, {rows});
  const Launch launch(z);
  Tensor dx = fresh_like(launch, z), dy = fresh_like(launch, y);
  if (dx.numel() == 0) {
    const auto none = [&](const Tensor& parameter) { return zeroed(gradient_of_parameter(launch, parameter)); };
    return {dx, dy, none(gate), none(weight), none(weight)};
  }
  gate = torch::stable::contiguous(gate), weight = torch::stable::contiguous(weight);
  const Division division = kernels::divide_gated_residual_norm_bwd(rows, columns);
  Partials dgate = gate_partials_of(launch, gate, division), dweight = partials_of(launch, weight, division.parts),
           dbias = partials_of(launch, weight, division.parts);
  std::optional<Tensor> means;  // of rows that are cut
  if (division.blocks > 1) means = fresh(launch, z, {2, z.size(0)}, ScalarType::Float);
  GatedResidualNorm params = {};
  params.residual = residual_params(y, gate);
  params.residual.z = matrix_of(z), params.residual.dz = matrix_of(dz);
  params.residual.dy = matrix_of(dy);
  params.residual.parts = division.parts, params.residual.part_rows = division.part_rows;
  params.residual.dgate = dgate.data(), params.dweight = dweight.data(), params.dbias = dbias.data();
  params.rms = rms, params.weight = vector_of(weight);
  params.dn = matrix_of(dn), params.dx = matrix_of(dx);
  params.mean = mean.mutable_data_ptr<float>(), params.rstd = rstd.mutable_data_ptr<float>();
  params.means = means ? means->mutable_data_ptr<float>() : nullptr;
  kernels::gated_residual_norm_bwd(params, launch.stream);
  return {dx, dy, dgate.added(launch), dweight.added(launch), dbias.added(launch)};
}

DecodeLinear linear_params(const Tensor& input, const Tensor& weight, const Tensor& output) {
  DecodeLinear params = {};
  params.dtype = dtype_of(input);
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
  // What is contiguous here the caller makes so: copies of weights in every step would be most of the time.
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
  const Launch launch(x);
  const int64_t batch = x.size(0);
  const Tensor q = fresh(launch, x, {batch, to_q.size(0)}, x.scalar_type()), z = fresh_like(launch, x),
               hidden = fresh(launch, x, {batch, up.size(0)}, x.scalar_type());
  Tensor out = fresh_like(launch, x);
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

  kernels::gated_block_decode_linear(q_proj, launch.stream);
  kernels::gated_block_decode_attention(attention, launch.stream);
  kernels::gated_block_decode_linear(up_proj, launch.stream);
  kernels::gated_block_decode_linear(down_proj, launch.stream);
  return out;
}

}  // namespace

#if defined(FK_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(flamingo_kernels, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(flamingo_kernels, CUDA, m) {
#endif
  m.impl("masked_cross_attention_fwd.cuda", TORCH_BOX(&masked_cross_attention_fwd));
  m.impl("masked_cross_attention_bwd.cuda", TORCH_BOX(&masked_cross_attention_bwd));
  m.impl("perceiver_attention_fwd.cuda", TORCH_BOX(&perceiver_attention_fwd));
  m.impl("perceiver_attention_bwd.cuda", TORCH_BOX(&perceiver_attention_bwd));
  m.impl("gated_residual_fwd.cuda", TORCH_BOX(&gated_residual_fwd));
  m.impl("gated_residual_bwd.cuda", TORCH_BOX(&gated_residual_bwd));
  m.impl("gated_residual_norm_fwd.cuda", TORCH_BOX(&gated_residual_norm_fwd));
  m.impl("gated_residual_norm_bwd.cuda", TORCH_BOX(&gated_residual_norm_bwd));
  m.impl("gated_block_decode.cuda", TORCH_BOX(&gated_block_decode));
}

}  // namespace flamingo_kernels

// What flamingo_kernels/_backends/cuda.py asks through ctypes.
#define FK_EXPORT extern "C" __attribute__((visibility("default")))
FK_EXPORT int flamingo_kernels_cuda_emulated() { return flamingo_kernels::kernels::emulated(); }
extern "C" __attribute__((visibility("default"), used)) const char flamingo_kernels_cuda_build[] =
    "flamingo_kernels_cuda_build: " FK_BUILD;
FK_EXPORT void flamingo_kernels_cuda_poison(int on) { flamingo_kernels::poisoned = on != 0; }
