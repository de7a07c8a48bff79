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

// All ones is a NaN in float32, bfloat16, float16 and float64 alike.
void poison(void* memory, size_t bytes) {
  if (poisoned) std::memset(memory, 0xff, bytes);
}

[[noreturn]] void refuse_memory(const char* operation, const char* what, size_t bytes) {
  refuse(
      operation, ": out of memory, expected ", bytes, " bytes for ", what,
      ", got none; use a smaller batch or fewer threads.");
}

Tensor fresh(const char* operation, const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  try {
    Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
    poison(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
    return tensor;
  } catch (const std::exception&) {  // its message is lost at the C boundary
    size_t bytes = dtype == ScalarType::Float ? 4 : 2;
    for (int64_t size : sizes) bytes *= size;
    refuse_memory(operation, "a result", bytes);
  }
}

Tensor fresh_like(const char* operation, const Tensor& tensor) {
  return fresh(operation, tensor, {tensor.sizes().begin(), tensor.sizes().end()}, tensor.scalar_type());
}

// Memory of one operation, in whole cache lines. Kernels may read a line behind it.
template <class T>
class Memory {
 public:
  Memory() : data_(nullptr, std::free) {}
  Memory(const char* operation, const char* what, int64_t count) : Memory() {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64 + 64;
    data_.reset((T*)std::aligned_alloc(64, bytes));
    if (!data_) refuse_memory(operation, what, bytes);
    poison(data_.get(), bytes);
    count_ = count;
  }

  T* data() const { return data_.get(); }
  T* begin() const { return data(); }
  T* end() const { return data() + count_; }

 private:
  std::unique_ptr<T, decltype(&std::free)> data_;
  int64_t count_ = 0;
};

// As many threads as have a fair share of the work, which is counted in elements that are read or written; torch's own
// loops go by the same share.
int64_t threads_for(int64_t elements, int64_t tasks) {
  constexpr int64_t fair_share = 32768;
  return std::clamp<int64_t>(elements / fair_share, 1, std::min<int64_t>(tasks, torch::stable::get_num_threads()));
}

std::atomic<int64_t> threads_of_latest_run{0};  // for tests

// Every thread takes the next few tasks until none is left.
template <class Params>
void run(const char* operation, const Kernel<Params>& kernel, const Params& params, int64_t elements) {
  const int64_t tasks = kernel.tasks(params);
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = threads_of_latest_run = threads_for(elements, tasks);
  const int64_t few = std::max<int64_t>(1, tasks / (threads * 8));  // neighbours share cache lines and pages
  const int64_t floats = (kernel.scratch(params) + 15) / 16 * 16;
  const Memory<float> scratch(operation, "working memory", threads * floats);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    // What one slot leaves undone the others take: its range says only which memory is its own.
    for (int64_t first; (first = next.fetch_add(few)) < tasks;)
      for (int64_t task = first; task < std::min(first + few, tasks); ++task)
        kernel.run(params, task, scratch.data() + begin * floats);
  });
}

// The work of attention in elements: those of q, k, v and out, and as a thread multiplies and adds about eight pairs in
// the time of an element of plain arithmetic, an eighth of the pairs.
int64_t attention_work(int64_t rows, int64_t keys_of_a_row, int64_t keys, int64_t head_dim) {
  return 2 * (rows + keys + rows * keys_of_a_row / 8) * head_dim;
}

int64_t work_of(const MaskedCrossAttention& params) {
  const int64_t keys = params.media * params.latents, keys_of_a_row = params.immediate ? params.latents : keys;
  return attention_work(
      params.batch * params.heads * params.length, keys_of_a_row, params.batch * params.kv_heads * keys,
      params.head_dim);
}

int64_t work_of(const PerceiverAttention& params) {
  const int64_t keys = params.keys[0] + params.keys[1];
  return attention_work(
      params.batch * params.heads * params.length, keys, params.batch * params.kv_heads * keys, params.head_dim);
}

int64_t work_of(const GatedResidual& params) { return params.rows * params.columns; }
int64_t work_of(const GatedResidualNorm& params) { return work_of(params.residual); }

Rows rows_of(const Tensor& t) {  // [B, T, H, d]
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Media media_of(const Tensor& t) {  // [B, M, R, Hkv, d]
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

MaskedCrossAttention masked_params(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lo, const Tensor& hi, const Tensor& start,
    const Tensor& stop, bool immediate, bool averages, double scale, const Tensor& out, const Tensor& softmax) {
  MaskedCrossAttention params = {};
  params.dtype = dtype_of(q);
  params.batch = q.size(0), params.length = q.size(1), params.heads = q.size(2), params.head_dim = q.size(3);
  params.media = k.size(1), params.latents = k.size(2), params.kv_heads = k.size(3);
  params.scale = scale, params.immediate = immediate, params.averages = averages;
  params.lo = lo.const_data_ptr<int32_t>(), params.hi = hi.const_data_ptr<int32_t>();
  params.start = start.const_data_ptr<int32_t>(), params.stop = stop.const_data_ptr<int32_t>();
  params.q = rows_of(q), params.out = rows_of(out), params.k = media_of(k), params.v = media_of(v);
  params.row_max = softmax.mutable_data_ptr<float>(), params.row_sum = params.row_max + softmax.numel() / 2;
  return params;
}

std::tuple<Tensor, Tensor> masked_cross_attention_fwd(
    Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor start, Tensor stop, bool immediate, bool averages,
    double scale) {
  const char* operation = "masked_cross_attention_fwd";
  check_masked_cross_attention(operation, q, k, v, lo, hi, start, stop);
  Tensor out = fresh_like(operation, q),
         softmax = fresh(operation, q, {2, q.size(0), q.size(2), immediate ? 0 : q.size(1)}, ScalarType::Float);
  const MaskedCrossAttention params =
      masked_params(q, k, v, lo, hi, start, stop, immediate, averages, scale, out, softmax);
  run(operation, variant().masked_cross_attention_fwd(params.dtype), params, work_of(params));
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor> masked_cross_attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, Tensor lo, Tensor hi, Tensor start,
    Tensor stop, bool immediate, bool averages, double scale) {
  const char* operation = "masked_cross_attention_bwd";
  const int64_t kept = immediate ? 0 : q.size(1);
  const Checks checks = check_masked_cross_attention(operation, q, k, v, lo, hi, start, stop);
  check_attention_bwd(checks, dout, q, out, softmax, kept);
  Tensor dq = fresh_like(operation, q), dk = fresh_like(operation, k), dv = fresh_like(operation, v);
  MaskedCrossAttention params = masked_params(q, k, v, lo, hi, start, stop, immediate, averages, scale, out, softmax);
  const Memory<float> delta(operation, "working memory", params.batch * params.heads * kept);
  params.dout = rows_of(dout), params.dq = rows_of(dq), params.dk = media_of(dk), params.dv = media_of(dv),
  params.delta = delta.data();
  run(operation, variant().masked_cross_attention_dq(params.dtype), params, work_of(params));
  run(operation, variant().masked_cross_attention_bwd(params.dtype), params, work_of(params));
  return {dq, dk, dv};
}

PerceiverAttention perceiver_params(
    const Tensor& q, const Tensor& k_media, const Tensor& v_media, const Tensor& k_latents, const Tensor& v_latents,
    const std::optional<Tensor>& media_lengths, double scale, const Tensor& out, const Tensor& softmax) {
  PerceiverAttention params = {};
  params.dtype = dtype_of(q);
  params.batch = q.size(0), params.length = q.size(1), params.heads = q.size(2), params.head_dim = q.size(3);
  params.kv_heads = k_media.size(2);
  params.keys[0] = k_media.size(1), params.keys[1] = k_latents.size(1);
  params.media_lengths = data_or_null(media_lengths);
  params.scale = scale;
  params.q = rows_of(q), params.out = rows_of(out);
  params.k[0] = rows_of(k_media), params.k[1] = rows_of(k_latents);
  params.v[0] = rows_of(v_media), params.v[1] = rows_of(v_latents);
  params.row_max = softmax.mutable_data_ptr<float>(), params.row_sum = params.row_max + softmax.numel() / 2;
  return params;
}

std::tuple<Tensor, Tensor> perceiver_attention_fwd(
    Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, std::optional<Tensor> media_lengths,
    double scale) {
  const char* operation = "perceiver_attention_fwd";
  check_perceiver_attention(operation, q, k_media, v_media, k_latents, v_latents, media_lengths);
  Tensor out = fresh_like(operation, q),
         softmax = fresh(operation, q, {2, q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  const PerceiverAttention params =
      perceiver_params(q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  run(operation, variant().perceiver_attention_fwd(params.dtype), params, work_of(params));
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> perceiver_attention_bwd(
    Tensor dout, Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, Tensor out,
    Tensor softmax, std::optional<Tensor> media_lengths, double scale) {
  const char* operation = "perceiver_attention_bwd";
  const Checks checks = check_perceiver_attention(operation, q, k_media, v_media, k_latents, v_latents, media_lengths);
  check_attention_bwd(checks, dout, q, out, softmax, q.size(1));
  const auto gradient = [&](const Tensor& of) { return fresh_like(operation, of); };
  Tensor dq = gradient(q), dk_media = gradient(k_media), dv_media = gradient(v_media), dk_latents = gradient(k_latents),
         dv_latents = gradient(v_latents);
  PerceiverAttention params =
      perceiver_params(q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  params.dout = rows_of(dout), params.dq = rows_of(dq);
  params.dk[0] = rows_of(dk_media), params.dk[1] = rows_of(dk_latents);
  params.dv[0] = rows_of(dv_media), params.dv[1] = rows_of(dv_latents);
  run(operation, variant().perceiver_attention_bwd(params.dtype), params, work_of(params));
  return {dq, dk_media, dv_media, dk_latents, dv_latents};
}

Matrix matrix_of(const Tensor& t) {  // [N, D]
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
Memory<float> floats_of(const char* operation, const Tensor& tensor) {
  const Tensor flat = torch::stable::contiguous(tensor);
  const DType dtype = dtype_of(flat);
  Memory<float> values(operation, "a parameter", flat.numel());
  const uint16_t* halves = (const uint16_t*)flat.data_ptr();
  for (int64_t i = 0; i < flat.numel(); ++i)
    values.data()[i] = dtype == DType::f32    ? ((const float*)flat.data_ptr())[i]
                       : dtype == DType::bf16 ? bits_to_float(uint32_t(halves[i]) << 16)
                                              : half_to_float(halves[i]);
  return values;
}

Memory<float> tanh_of(const char* operation, const Tensor& gate) {
  Memory<float> values = floats_of(operation, gate);
  for (float& value : values) value = std::tanh(value);
  return values;
}

GatedResidual residual_params(const Tensor& y, const Tensor& gate, const Memory<float>& tanh_gate) {
  GatedResidual params = {};
  params.rows = y.size(0), params.columns = y.size(1);
  params.per_channel = gate.numel() != 1;  // none for no channels
  params.tanh_gate = tanh_gate.data();
  params.y = matrix_of(y);
  return params;
}

// The gradient of a parameter from partial sums, which each task has of its own.
class ParameterGradient {
 public:
  ParameterGradient(const char* operation, const Tensor& parameter, int64_t tasks)
      : total_(fresh(operation, parameter, {parameter.sizes().begin(), parameter.sizes().end()}, ScalarType::Float)),
        partial_(operation, "partial sums", tasks * parameter.numel()),
        sums_(operation, "partial sums", parameter.numel()) {}

  float* partial() const { return partial_.data(); }

  // The sums of all tasks, added in their order.
  Tensor added() const {
    return added_and([](double sum, int64_t) { return sum; });
  }

  // Of sums of dz * y, times d tanh(gate) / d gate: 1 - tanh(gate)^2 = 1 / cosh(gate)^2, where nothing cancels.
  Tensor added_times_slope(const Memory<float>& gate) const {
    return added_and([&](double sum, int64_t j) {
      const double cosh = std::cosh(double(gate.data()[j]));
      return sum / cosh / cosh;
    });
  }

 private:
  template <class Finish>
  Tensor added_and(Finish finish) const {
    const int64_t columns = total_.numel();
    float* total = total_.mutable_data_ptr<float>();
    std::fill(sums_.begin(), sums_.end(), 0);
    for (const float* row = partial_.begin(); row < partial_.end(); row += columns)
      for (int64_t j = 0; j < columns; ++j) sums_.data()[j] += row[j];
    for (int64_t j = 0; j < columns; ++j) total[j] = finish(sums_.data()[j], j);
    return total_;
  }

  Tensor total_;
  Memory<float> partial_;
  Memory<double> sums_;
};

Tensor gated_residual_fwd(Tensor x, Tensor y, Tensor gate) {
  const char* operation = "gated_residual_fwd";
  check_residual(operation, "x", x, y, gate);
  Tensor z = fresh(operation, x, {x.size(0), x.size(1)}, residual_dtype(x, y, gate));
  const Memory<float> tanh_gate = tanh_of(operation, gate);
  GatedResidual params = residual_params(y, gate, tanh_gate);
  params.x = matrix_of(x), params.z = matrix_of(z);
  run(operation, variant().gated_residual_fwd(params.x.dtype, params.y.dtype, params.z.dtype), params, work_of(params));
  return z;
}

std::tuple<Tensor, Tensor> gated_residual_bwd(Tensor dz, Tensor y, Tensor gate) {
  const char* operation = "gated_residual_bwd";
  check_residual(operation, "dz", dz, y, gate);
  check_residual_bwd(operation, "dz", dz, y);
  Tensor dy = fresh_like(operation, y);
  const Memory<float> tanh_gate = tanh_of(operation, gate);
  GatedResidual params = residual_params(y, gate, tanh_gate);
  params.dz = matrix_of(dz), params.dy = matrix_of(dy);
  const Kernel<GatedResidual> kernel = variant().gated_residual_bwd(params.dz.dtype, params.y.dtype, params.dz.dtype);
  const ParameterGradient dgate(operation, gate, kernel.tasks(params));
  params.dgate = dgate.partial();
  run(operation, kernel, params, work_of(params));
  return {dy, dgate.added_times_slope(floats_of(operation, gate))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm_fwd(
    Tensor x, Tensor y, Tensor gate, Tensor weight, std::optional<Tensor> bias, double eps, bool rms) {
  const char* operation = "gated_residual_norm_fwd";
  const Checks checks = check_residual(operation, "x", x, y, gate);
  const int64_t rows = x.size(0), columns = x.size(1);
  checks.expect_parameter("weight", weight, columns, false);
  if (bias) checks.expect_parameter("bias", *bias, columns, false);
  const ScalarType dtype = residual_dtype(x, y, gate);
  Tensor z = fresh(operation, x, {rows, columns}, dtype), n = fresh(operation, x, {rows, columns}, dtype),
         mean = fresh(operation, x, {rows}, ScalarType::Float), rstd = fresh(operation, x, {rows}, ScalarType::Float);
  const Memory<float> tanh_gate = tanh_of(operation, gate), scale = floats_of(operation, weight),
                      offset = bias ? floats_of(operation, *bias) : Memory<float>();
  GatedResidualNorm params = {};
  params.residual = residual_params(y, gate, tanh_gate);
  params.residual.x = matrix_of(x), params.residual.z = matrix_of(z);
  params.rms = rms, params.eps = eps, params.weight = scale.data(), params.bias = offset.data();
  params.n = matrix_of(n);
  params.mean = mean.mutable_data_ptr<float>(), params.rstd = rstd.mutable_data_ptr<float>();
  run(operation, variant().gated_residual_norm_fwd(params.residual.x.dtype, params.residual.y.dtype, params.n.dtype),
      params, work_of(params));
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
  Tensor dx = fresh_like(operation, z), dy = fresh_like(operation, y);
  const Memory<float> tanh_gate = tanh_of(operation, gate), scale = floats_of(operation, weight);
  GatedResidualNorm params = {};
  params.residual = residual_params(y, gate, tanh_gate);
  params.residual.z = matrix_of(z), params.residual.dz = matrix_of(dz), params.residual.dy = matrix_of(dy);
  params.rms = rms, params.weight = scale.data();
  params.dn = matrix_of(dn), params.dx = matrix_of(dx);
  params.mean = mean.mutable_data_ptr<float>(), params.rstd = rstd.mutable_data_ptr<float>();
  const Kernel<GatedResidualNorm> kernel =
      variant().gated_residual_norm_bwd(params.residual.z.dtype, params.residual.y.dtype, params.residual.z.dtype);
  const int64_t tasks = kernel.tasks(params);
  const ParameterGradient dgate(operation, gate, tasks), dweight(operation, weight, tasks),
      dbias(operation, weight, tasks);
  params.residual.dgate = dgate.partial(), params.dweight = dweight.partial(), params.dbias = dbias.partial();
  run(operation, kernel, params, work_of(params));
  return {dx, dy, dgate.added_times_slope(floats_of(operation, gate)), dweight.added(), dbias.added()};
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

// What flamingo_kernels/_backends/cpu.py asks through ctypes.
#define FK_EXPORT extern "C" __attribute__((visibility("default")))
FK_EXPORT int flamingo_kernels_select(const char* name) { return flamingo_kernels::select(name); }
FK_EXPORT const char* flamingo_kernels_variant() { return flamingo_kernels::variant().name; }
FK_EXPORT const char* flamingo_kernels_variants() { return flamingo_kernels::variants(); }
FK_EXPORT int64_t flamingo_kernels_threads_of_latest_run() { return flamingo_kernels::threads_of_latest_run; }
FK_EXPORT void flamingo_kernels_poison(int on) { flamingo_kernels::poisoned = on != 0; }
