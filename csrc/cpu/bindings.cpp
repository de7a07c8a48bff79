// The operators as PyTorch sees them: checks, outputs, parameters, and tasks spread over threads. Includes only the
// stable ABI of torch.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../gated_block.h"
#include "../operators.h"
#include "params.h"

namespace flamingo_kernels {
namespace {

bool poisoned = false;  // a test aid: outputs and scratch start as NaN

// All ones is a NaN in float32, bfloat16, float16 and float64 alike.
void poison(void* memory, size_t bytes) {
  if (poisoned) std::fill_n(static_cast<unsigned char*>(memory), bytes, 0xff);
}

// One call of an operation, whose name its messages carry.
struct Call {
  const char* operation;

  Tensor fresh(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) const {
    try {
      Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
      poison(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
      return tensor;
    } catch (const std::exception&) {  // its message is lost at the C boundary
      size_t bytes = dtype == ScalarType::Float ? 4 : 2;
      for (int64_t size : sizes) bytes *= size;
      refuse_memory("a result", bytes);
    }
  }

  [[noreturn]] void refuse_memory(const char* what, size_t bytes) const {
    refuse(
        operation, ": out of memory, expected ", bytes, " bytes for ", what,
        ", got none; use a smaller batch or fewer threads.");
  }
};

// Memory of one operation, in whole cache lines. Kernels may read a line behind it.
template <class T>
class Memory {
 public:
  Memory() : data_(nullptr, std::free) {}
  Memory(const Call& call, const char* what, int64_t count) : Memory() {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64 + 64;
    data_.reset((T*)std::aligned_alloc(64, bytes));
    if (!data_) call.refuse_memory(what, bytes);
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

#ifdef FK_OWN_THREADS  // for the thread sanitizer, which does not see how torch's threads wait for each other
int64_t threads_for(int64_t, int64_t tasks) { return std::min<int64_t>(tasks, 4); }

template <class Function>
void on_each_thread(int64_t threads, const Function& call) {
  std::vector<std::thread> started;
  for (int64_t thread = 0; thread < threads; ++thread) started.emplace_back(call, thread);
  for (std::thread& thread : started) thread.join();
}
#else
// The number of threads that each get a fair share of the work, counted in elements that are read or written. The loops
// of torch use the same share.
int64_t threads_for(int64_t elements, int64_t tasks) {
  constexpr int64_t fair_share = 32768;
  return std::clamp<int64_t>(elements / fair_share, 1, std::min<int64_t>(tasks, torch::stable::get_num_threads()));
}

template <class Function>
void on_each_thread(int64_t threads, const Function& call) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) { call(thread); });
}
#endif

std::atomic<int64_t> threads_of_latest_run{0};  // for tests

// Every thread takes the next few tasks until none is left.
template <class Params>
void run(const Call& call, const Kernel<Params>& kernel, const Params& params, int64_t elements) {
  const int64_t tasks = kernel.tasks(params);
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = threads_of_latest_run = threads_for(elements, tasks);
  const int64_t few = std::max<int64_t>(1, tasks / (threads * 8));  // neighbours share cache lines and pages
  const int64_t floats = (kernel.scratch(params) + 15) / 16 * 16;
  const Memory<float> scratch(call, "working memory", threads * floats);
  on_each_thread(threads, [&](int64_t thread) {
    // Any thread may take any task: its number only says which memory is its own.
    for (int64_t first; (first = next.fetch_add(few)) < tasks;)
      for (int64_t task = first; task < std::min(first + few, tasks); ++task)
        kernel.run(params, task, scratch.data() + thread * floats);
  });
}

// The work of attention in elements: those of q, k, v and out, and as a thread multiplies and adds about eight pairs in
// the time of an element of plain arithmetic, an eighth of the pairs.
int64_t attention_work(int64_t rows, int64_t keys_of_a_row, int64_t keys, int64_t head_dim) {
  return 2 * (rows + keys + rows * keys_of_a_row / 8) * head_dim;
}

int64_t count_elements(const MaskedCrossAttention& params) {
  const int64_t keys = params.media * params.latents, keys_of_a_row = params.immediate ? params.latents : keys;
  return attention_work(
      params.batch * params.heads * params.length, keys_of_a_row, params.batch * params.kv_heads * keys,
      params.head_dim);
}

int64_t count_elements(const PerceiverAttention& params) {
  const int64_t keys = params.keys[0] + params.keys[1];
  return attention_work(
      params.batch * params.heads * params.length, keys, params.batch * params.kv_heads * keys, params.head_dim);
}

int64_t count_elements(const GatedResidual& params) { return params.rows * params.columns; }

// Whether a row sees one block of keys at the most; `makes_anew` in schema.py says the same.
bool is_one_shot(bool immediate, const Tensor& k) { return immediate && k.size(2) <= most_keys; }

std::tuple<Tensor, Tensor> masked_cross_attention_fwd(
    Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor start, Tensor stop, bool immediate, bool averages,
    double scale) {
  const Call call = {"masked_cross_attention_fwd"};
  check_masked_cross_attention(call.operation, q, k, v, lo, hi, start, stop);
  const bool one_shot = is_one_shot(immediate, k);
  Tensor out = fresh_like(call, q), softmax = fresh_softmax(call, q, one_shot ? 0 : q.size(1));
  auto params =
      masked_cross_attention_params<MaskedCrossAttention>(q, k, v, lo, hi, start, stop, averages, scale, out, softmax);
  params.immediate = immediate, params.one_shot = one_shot;
  run(call, variant().masked_cross_attention_fwd(params.dtype), params, count_elements(params));
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor> masked_cross_attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, Tensor lo, Tensor hi, Tensor start,
    Tensor stop, bool immediate, bool averages, double scale) {
  const Call call = {"masked_cross_attention_bwd"};
  const bool one_shot = is_one_shot(immediate, k);
  const int64_t kept = one_shot ? 0 : q.size(1);
  const Checks checks = check_masked_cross_attention(call.operation, q, k, v, lo, hi, start, stop);
  check_attention_bwd(checks, dout, q, out, softmax, kept);
  Tensor dq = fresh_like(call, q), dk = fresh_like(call, k), dv = fresh_like(call, v);
  auto params =
      masked_cross_attention_params<MaskedCrossAttention>(q, k, v, lo, hi, start, stop, averages, scale, out, softmax);
  params.immediate = immediate, params.one_shot = one_shot;
  const Memory<float> delta(call, "working memory", params.batch * params.heads * kept);
  set_gradients(params, dout, dq, dk, dv), params.delta = delta.data();
  run(call, variant().masked_cross_attention_dq(params.dtype), params, count_elements(params));
  run(call, variant().masked_cross_attention_bwd(params.dtype), params, count_elements(params));
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> perceiver_attention_fwd(
    Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, std::optional<Tensor> media_lengths,
    double scale) {
  const Call call = {"perceiver_attention_fwd"};
  check_perceiver_attention(call.operation, q, k_media, v_media, k_latents, v_latents, media_lengths);
  Tensor out = fresh_like(call, q), softmax = fresh_softmax(call, q, q.size(1));
  const auto params = perceiver_attention_params<PerceiverAttention>(
      q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  run(call, variant().perceiver_attention_fwd(params.dtype), params, count_elements(params));
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> perceiver_attention_bwd(
    Tensor dout, Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, Tensor out,
    Tensor softmax, std::optional<Tensor> media_lengths, double scale) {
  const Call call = {"perceiver_attention_bwd"};
  const Checks checks =
      check_perceiver_attention(call.operation, q, k_media, v_media, k_latents, v_latents, media_lengths);
  check_attention_bwd(checks, dout, q, out, softmax, q.size(1));
  Tensor dq = fresh_like(call, q), dk_media = fresh_like(call, k_media), dv_media = fresh_like(call, v_media),
         dk_latents = fresh_like(call, k_latents), dv_latents = fresh_like(call, v_latents);
  auto params = perceiver_attention_params<PerceiverAttention>(
      q, k_media, v_media, k_latents, v_latents, media_lengths, scale, out, softmax);
  set_gradients(params, dout, dq, dk_media, dv_media, dk_latents, dv_latents);
  run(call, variant().perceiver_attention_bwd(params.dtype), params, count_elements(params));
  return {dq, dk_media, dv_media, dk_latents, dv_latents};
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
Memory<float> load_floats(const Call& call, const Tensor& tensor) {
  const Tensor flat = torch::stable::contiguous(tensor);
  const DType dtype = element_type(flat);
  Memory<float> values(call, "a parameter", flat.numel());
  const uint16_t* halves = (const uint16_t*)flat.data_ptr();
  for (int64_t i = 0; i < flat.numel(); ++i)
    values.data()[i] = dtype == DType::f32    ? ((const float*)flat.data_ptr())[i]
                       : dtype == DType::bf16 ? bits_to_float(uint32_t(halves[i]) << 16)
                                              : half_to_float(halves[i]);
  return values;
}

Memory<float> load_tanh(const Call& call, const Tensor& gate) {
  Memory<float> values = load_floats(call, gate);
  for (float& value : values) value = std::tanh(value);
  return values;
}

// The gradient of a gate, from sums of dz * y of every task.
class GateGradient {
 public:
  GateGradient(const Call& call, const Tensor& gate, int64_t tasks)
      : gate_(load_floats(call, gate)),
        gradient_(fresh_gradient(call, gate)),
        partials_(call, "partial sums", tasks * gate.numel()),
        sums_(call, "partial sums", gate.numel()) {}

  float* partials() const { return partials_.data(); }

  // The sums of all tasks, added in their order, through tanh. d tanh(gate) / d gate is 1 / cosh(gate)^2, where nothing
  // cancels as it does in 1 - tanh(gate)^2.
  Tensor add() const {
    const int64_t columns = gradient_.numel();
    float* gradient = gradient_.mutable_data_ptr<float>();
    std::fill(sums_.begin(), sums_.end(), 0);
    for (const float* row = partials_.begin(); row < partials_.end(); row += columns)
      for (int64_t j = 0; j < columns; ++j) sums_.data()[j] += row[j];
    for (int64_t j = 0; j < columns; ++j) {
      const double cosh = std::cosh(double(gate_.data()[j]));
      gradient[j] = sums_.data()[j] / cosh / cosh;
    }
    return gradient_;
  }

 private:
  Memory<float> gate_;
  Tensor gradient_;
  Memory<float> partials_;
  Memory<double> sums_;
};

Tensor gated_residual_fwd(Tensor x, Tensor y, Tensor gate) {
  const Call call = {"gated_residual_fwd"};
  check_residual(call.operation, "x", x, y, gate);
  Tensor z = call.fresh(x, {x.size(0), x.size(1)}, residual_dtype(x, y, gate));
  const Memory<float> tanh_gate = load_tanh(call, gate);
  auto params = gated_residual_params<GatedResidual>(y, gate);
  params.tanh_gate = tanh_gate.data();
  params.x = matrix_of(x), params.z = matrix_of(z);
  run(call, variant().gated_residual_fwd(params.x.dtype, params.y.dtype, params.z.dtype), params,
      count_elements(params));
  return z;
}

std::tuple<Tensor, Tensor> gated_residual_bwd(Tensor dz, Tensor y, Tensor gate) {
  const Call call = {"gated_residual_bwd"};
  check_residual_bwd(call.operation, dz, y, gate);
  Tensor dy = fresh_like(call, y);
  const Memory<float> tanh_gate = load_tanh(call, gate);
  auto params = gated_residual_params<GatedResidual>(y, gate);
  params.tanh_gate = tanh_gate.data();
  params.dz = matrix_of(dz), params.dy = matrix_of(dy);
  const Kernel<GatedResidual> kernel = variant().gated_residual_bwd(params.dz.dtype, params.y.dtype, params.dz.dtype);
  const GateGradient dgate(call, gate, kernel.tasks(params));
  params.dgate = dgate.partials();
  run(call, kernel, params, count_elements(params));
  return {dy, dgate.add()};
}

// Whether the largest number of a row of x is so far above the others that 8 bits would leave them few steps: then
// rounding would cost more than a few percent of a product.
bool has_wide_rows(const Call& call, const Linear& params) {
  constexpr float most = 16;
  run(call, variant().linear_int8_spread(params.x.dtype), params, params.rows * params.in);
  for (int64_t i = 0; i < params.rows; ++i)
    if (params.x_scale[i] > most * params.x_offset[i]) return true;
  return false;
}

// The product that the params describe, by the kernels for its weight and number of rows.
void multiply(const Call& call, Linear params) {
  const int64_t whole_vectors = (params.in + 63) / 64 * 64;
  if (!params.weight_scale) {
    const Product kernels = variant().linear(params);
    const int64_t whole_panels = (params.rows + 31) / 32 * 32;  // of two bytes an element, or rows in float32
    const Memory<float> packed(call, "working memory", std::max(params.rows, whole_panels / 2) * whole_vectors);
    params.packed = packed.data();
    run(call, kernels.pack, params, params.rows * params.in);
    return run(call, kernels.forward, params, params.in * params.out);
  }
  // Two bytes for an element, and whole panels where there is more than a row or two.
  const int64_t whole_panels = params.rows <= 2 ? params.rows : (params.rows + 63) / 64 * 64;
  const Memory<float> packed(call, "working memory", whole_panels * whole_vectors / 2);
  const Memory<float> of_rows(call, "working memory", 2 * params.rows);
  params.packed = packed.data();
  params.x_scale = of_rows.data(), params.x_offset = of_rows.data() + params.rows;
  params.fine = params.rows <= variant().fine_int8_rows || has_wide_rows(call, params);
  const Product kernels = variant().linear_int8(params);
  run(call, kernels.pack, params, params.rows * params.in);
  run(call, kernels.forward, params, params.in * params.out);
}

Linear linear_params(const Matrix& x, int64_t rows, const LinearWeights& weights) {
  Linear params = {};
  params.rows = rows, params.in = weights.weight->size(1), params.out = weights.weight->size(0);
  params.x = x, params.weight = {weights.weight->data_ptr(), x.dtype, weights.weight->stride(0)};
  if (weights.scale) params.weight_scale = weights.scale->const_data_ptr<float>();
  if (weights.bias) params.bias = weights.bias->data_ptr(), params.bias_dtype = element_type(*weights.bias);
  return params;
}

template <class T>
const T* pointer_to(const std::optional<T>& value) {
  return value ? &*value : nullptr;
}

Tensor linear_fwd(
    Tensor x, Tensor weight, std::optional<Tensor> weight_scale, std::optional<Tensor> bias, int64_t activation,
    std::optional<Tensor> gate, std::optional<Tensor> residual) {
  const Call call = {"linear_fwd"};
  check_linear(call.operation, x, weight, weight_scale, bias, activation, gate, residual);
  Tensor y = call.fresh(x, {x.size(0), weight.size(0)}, linear_dtype(x, gate, residual));
  Linear params = linear_params(matrix_of(x), x.size(0), {&weight, pointer_to(bias), pointer_to(weight_scale)});
  params.y = matrix_of(y), params.activation = Activation(activation);
  const Memory<float> tanh_gate = gate ? load_tanh(call, *gate) : Memory<float>();
  if (gate) params.tanh_gate = tanh_gate.data(), params.per_channel = gate->numel() != 1;
  if (residual) params.residual = matrix_of(*residual);
  multiply(call, params);
  return y;
}

RowNorm norm_params(const NormWeights& norm) {
  RowNorm params = {};
  if (!norm.weight) return params;
  params.rms = norm.rms, params.eps = norm.eps;
  params.weight = norm.weight->data_ptr(), params.weight_dtype = element_type(*norm.weight);
  if (norm.bias) params.bias = norm.bias->data_ptr(), params.bias_dtype = element_type(*norm.bias);
  return params;
}

// One token of every text through a gated block: a list of kernels over its rows, in memory of their own.
class Step {
 public:
  Step(const Call& call, const GatedBlock& block, int64_t rows, DType dtype)
      : call_(call), block_(block), rows_(rows), dtype_(dtype) {}

  // norm(x), as the products read it.
  Matrix normed(const NormWeights& norm, const Matrix& x, int64_t columns) {
    RowNorm params = norm_params(norm);
    params.rows = rows_, params.columns = columns, params.x = x, params.y = fresh(columns, dtype_);
    run(call_, variant().row_norm, params, rows_ * columns);
    return params.y;
  }

  // act(x @ weight.T + bias) * factor
  Matrix projected(
      const LinearWeights& weights, const Matrix& x, DType dtype, Activation activation = Activation::none,
      const Matrix& factor = {}) {
    Linear params = linear_params(x, rows_, weights);
    params.y = fresh(params.out, dtype), params.activation = activation, params.factor = factor;
    multiply(call_, params);
    return params.y;
  }

  // y = residual + tanh(gate) * (x @ weight.T + bias)
  void add(const LinearWeights& weights, const Matrix& x, const Tensor* gate, const Matrix& residual, const Matrix& y) {
    Linear params = linear_params(x, rows_, weights);
    const Memory<float> tanh_gate = gate ? load_tanh(call_, *gate) : Memory<float>();
    if (gate) params.tanh_gate = tanh_gate.data(), params.per_channel = gate->numel() != 1;
    params.residual = residual, params.y = y;
    multiply(call_, params);
  }

  Matrix attended(DecodeAttention params, const Matrix& q) {
    params.q = (const float*)q.data, params.q_norm = norm_params(block_.q_norm);
    const int64_t splits = variant().decode_splits(params), row_floats = (params.head_dim + 15) / 16 * 16;
    const int64_t kept = splits == 1 ? 0 : params.batch * params.heads * splits;
    const Memory<float> partials(call_, "working memory", kept * (row_floats + 2));
    params.partial_out = partials.data();
    params.row_max = params.partial_out + kept * row_floats, params.row_sum = params.row_max + kept;
    params.out = fresh(params.heads * params.head_dim, dtype_);
    const int64_t keys = params.media * params.latents, rows = params.batch * params.heads;
    const int64_t work = attention_work(rows, keys, params.batch * params.kv_heads * keys, params.head_dim);
    run(call_, variant().decode_attention(dtype_), params, work);
    run(call_, variant().decode_merge, params, kept * row_floats);
    return params.out;
  }

  Matrix fresh(int64_t columns, DType dtype) {
    kept_.emplace_back(call_, "working memory", rows_ * columns);
    return {kept_.back().data(), dtype, columns};
  }

 private:
  const Call& call_;
  const GatedBlock& block_;
  int64_t rows_;
  DType dtype_;  // of the products
  std::vector<Memory<float>> kept_;
};

Tensor gated_block_decode_fwd(
    Tensor x, Tensor k, Tensor v, Tensor lo, Tensor hi, std::vector<Tensor> weights, int64_t heads, double scale,
    std::vector<double> eps, std::vector<int64_t> rms, int64_t activation) {
  const Call call = {"gated_block_decode_fwd"};
  const GatedBlock block(call.operation, weights, eps, rms, activation);
  check_gated_block_decode(call.operation, x, k, v, lo, hi, block, heads);
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType z_dtype = gated_dtype(k.scalar_type(), block.gate, x.scalar_type());
  Tensor out = call.fresh(x, {rows, columns}, gated_dtype(k.scalar_type(), block.ff_gate, z_dtype));
  if (out.numel() == 0) return out;
  const DType dtype = element_type(k);
  Step step(call, block, rows, dtype);

  DecodeAttention attention = {};
  attention.batch = rows, attention.texts = rows / k.size(0), attention.heads = heads, attention.kv_heads = k.size(3);
  attention.head_dim = k.size(4), attention.media = k.size(1), attention.latents = k.size(2), attention.scale = scale;
  attention.lo = lo.const_data_ptr<int32_t>(), attention.hi = hi.const_data_ptr<int32_t>();
  attention.k = media_of(k), attention.v = media_of(v);
  const Matrix q = step.projected(block.to_q, step.normed(block.norm, matrix_of(x), columns), DType::f32);
  const Matrix attended = step.attended(attention, q), z = step.fresh(columns, DType::f32);
  step.add(block.to_out, attended, block.gate, matrix_of(x), z);

  const Matrix n = step.normed(block.ff_norm, z, columns);
  const Matrix up = step.projected(block.up, n, block.has_glu() ? DType::f32 : dtype,
                                   block.has_glu() ? Activation::none : block.activation);
  const Matrix h = block.has_glu() ? step.projected(block.gate_proj, n, dtype, block.activation, up) : up;
  step.add(block.down, h, block.ff_gate, z, matrix_of(out));
  return out;
}

// The sum of whole blocks of memory, so that no compiler leaves a read out.
uint32_t read_all(const void* data, int64_t bytes, int way) {
  ReadLoop params = {data, bytes, ReadLoop::Way(way), nullptr};
  std::vector<uint32_t> sums(variant().read_loop.tasks(params));
  params.sums = sums.data();
  run(Call{"read"}, variant().read_loop, params, bytes / 4);
  return std::accumulate(sums.begin(), sums.end(), uint32_t(0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flamingo_kernels, CPU, library) {
  FK_REGISTER_OPERATORS(library, "");
}

}  // namespace flamingo_kernels

// What flamingo_kernels/_backends/cpu.py asks through ctypes.
FK_EXPORT int flamingo_kernels_select(const char* name) { return flamingo_kernels::select(name); }
FK_EXPORT const char* flamingo_kernels_variant() { return flamingo_kernels::variant().name; }
FK_EXPORT const char* flamingo_kernels_variants() { return flamingo_kernels::variants(); }
FK_EXPORT int64_t flamingo_kernels_threads_of_latest_run() { return flamingo_kernels::threads_of_latest_run; }
FK_EXPORT uint32_t flamingo_kernels_read(const void* data, int64_t bytes, int way) {
  return flamingo_kernels::read_all(data, bytes, way);
}
FK_EXPORT void flamingo_kernels_poison(int on) { flamingo_kernels::poisoned = on != 0; }
