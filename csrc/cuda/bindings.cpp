// The operators as PyTorch sees them: checks, outputs, parameters, the device and its stream.
// The only file that includes torch, and of torch only the stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace flamingo_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool poisoned = false;  // a test aid: outputs and working memory start as NaN

// Makes the device of a tensor the current one, while an operator runs, and finds its current stream.
class Launch {
 public:
#if defined(FK_EMULATE)
  explicit Launch(const Tensor&) {}
#else
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
#endif
  Stream stream = nullptr;

 private:
#if !defined(FK_EMULATE)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

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

Tensor fresh(const Launch& launch, const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  if (poisoned) kernels::fill_with_nan(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size(), launch.stream);
  return tensor;
}

Tensor fresh_like(const Launch& launch, const Tensor& tensor) {
  return fresh(launch, tensor, {tensor.sizes().begin(), tensor.sizes().end()}, tensor.scalar_type());
}

Tensor gradient_of_parameter(const Launch& launch, const Tensor& parameter) {
  return fresh(launch, parameter, {parameter.sizes().begin(), parameter.sizes().end()}, ScalarType::Float);
}

// The gradient in float32 of a parameter that nothing depended on.
Tensor no_gradient(const Launch& launch, const Tensor& parameter) {
  Tensor total = gradient_of_parameter(launch, parameter);
  torch::stable::zero_(total);
  return total;
}

void check_last_stride(const char* operation, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.stride(-1) == 1 || tensor.size(-1) <= 1, operation, ": expected a contiguous last dimension, got stride ",
      tensor.stride(-1), ".");
}

// Whether all rows begin at multiples of 16 bytes and are multiples of 16 bytes long.
bool is_wide(const Tensor& tensor) {
  const int64_t element = tensor.element_size(), last = tensor.dim() - 1;
  bool wide = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && tensor.size(last) * element % 16 == 0;
  for (int64_t i = 0; i < last; ++i) wide = wide && (tensor.size(i) <= 1 || tensor.stride(i) * element % 16 == 0);
  return wide;
}

Matrix matrix_of(const char* operation, const Tensor& t) {  // [N, D]
  check_last_stride(operation, t);
  // a thread takes 8 elements, whatever their size
  return {t.data_ptr(), dtype_of(t), t.stride(0), is_wide(t) && t.size(1) % 8 == 0};
}

Vector vector_of(const Tensor& t) { return {t.data_ptr(), dtype_of(t)}; }

// The dtype of x + tanh(gate) * y; as everywhere in torch, a gate without dimensions does not widen y.
ScalarType residual_dtype(const Tensor& x, const Tensor& y, const Tensor& gate) {
  const ScalarType product = gate.dim() == 0 ? y.scalar_type() : wider(y.scalar_type(), gate.scalar_type());
  return wider(x.scalar_type(), product);
}

GatedResidual residual_params(const Tensor& y, const Tensor& gate) {
  GatedResidual p = {};
  p.rows = y.size(0), p.columns = y.size(1);
  p.per_channel = gate.numel() > 1;
  p.gate = vector_of(gate);
  p.y = matrix_of("gated_residual", y);
  return p;
}

// Partial sums of a parameter's gradient, and the gradient, which they are where there is one part.
struct Partials {
  Tensor total, parts;

  float* data() { return parts.mutable_data_ptr<float>(); }
  Tensor added(const Launch& launch) {
    const int64_t size = total.numel(), count = parts.numel() / size;
    if (count != 1) kernels::sum({data(), total.mutable_data_ptr(), dtype_of(total), count, size}, launch.stream);
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
  const Launch launch(x);
  Tensor z = fresh(launch, x, {x.size(0), x.size(1)}, residual_dtype(x, y, gate));
  if (z.numel() == 0) return z;
  gate = torch::stable::contiguous(gate);
  GatedResidual p = residual_params(y, gate);
  p.x = matrix_of("gated_residual", x), p.z = matrix_of("gated_residual", z);
  kernels::gated_residual_fwd(p, launch.stream);
  return z;
}

std::tuple<Tensor, Tensor> gated_residual_bwd(Tensor dz, Tensor y, Tensor gate) {
  const Launch launch(y);
  Tensor dy = fresh_like(launch, y);
  if (dy.numel() == 0) return {dy, no_gradient(launch, gate)};
  gate = torch::stable::contiguous(gate);
  const Division division = kernels::divide_gated_residual_bwd(y.size(0), y.size(1));
  Partials dgate = gate_partials_of(launch, gate, division);
  GatedResidual p = residual_params(y, gate);
  p.dz = matrix_of("gated_residual", dz), p.dy = matrix_of("gated_residual", dy);
  p.parts = division.parts, p.part_rows = division.part_rows, p.dgate = dgate.data();
  kernels::gated_residual_bwd(p, launch.stream);
  return {dy, dgate.added(launch)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm_fwd(
    Tensor x, Tensor y, Tensor gate, Tensor weight, std::optional<Tensor> bias, double eps, bool rms) {
  const char* operation = "gated_residual_norm";
  const Launch launch(x);
  const ScalarType dtype = residual_dtype(x, y, gate);
  Tensor z = fresh(launch, x, {x.size(0), x.size(1)}, dtype), n = fresh_like(launch, z),
         mean = fresh(launch, x, {x.size(0)}, ScalarType::Float), rstd = fresh_like(launch, mean);
  if (z.numel() == 0) return {z, n, mean, rstd};
  gate = torch::stable::contiguous(gate), weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  GatedResidualNorm p = {};
  p.residual = residual_params(y, gate);
  p.residual.x = matrix_of(operation, x), p.residual.z = matrix_of(operation, z);
  p.rms = rms, p.eps = eps, p.weight = vector_of(weight);
  if (bias) p.bias = vector_of(*bias);
  p.n = matrix_of(operation, n);
  p.mean = mean.mutable_data_ptr<float>(), p.rstd = rstd.mutable_data_ptr<float>();
  kernels::gated_residual_norm_fwd(p, launch.stream);
  return {z, n, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_bwd(
    Tensor dz, Tensor dn, Tensor y, Tensor gate, Tensor weight, Tensor z, Tensor mean, Tensor rstd, bool rms) {
  const char* operation = "gated_residual_norm";
  const Launch launch(z);
  Tensor dx = fresh_like(launch, z), dy = fresh_like(launch, y);
  if (dx.numel() == 0) return {dx, dy, no_gradient(launch, gate), no_gradient(launch, weight), no_gradient(launch, weight)};
  gate = torch::stable::contiguous(gate), weight = torch::stable::contiguous(weight);
  const Division division = kernels::divide_gated_residual_norm_bwd(z.size(0), z.size(1));
  Partials dgate = gate_partials_of(launch, gate, division), dweight = partials_of(launch, weight, division.parts),
           dbias = partials_of(launch, weight, division.parts);
  std::optional<Tensor> means;  // of rows that are cut
  if (division.blocks > 1) means = fresh(launch, z, {2, z.size(0)}, ScalarType::Float);
  GatedResidualNorm p = {};
  p.residual = residual_params(y, gate);
  p.residual.z = matrix_of(operation, z), p.residual.dz = matrix_of(operation, dz);
  p.residual.dy = matrix_of(operation, dy);
  p.residual.parts = division.parts, p.residual.part_rows = division.part_rows;
  p.residual.dgate = dgate.data(), p.dweight = dweight.data(), p.dbias = dbias.data();
  p.rms = rms, p.weight = vector_of(weight);
  p.dn = matrix_of(operation, dn), p.dx = matrix_of(operation, dx);
  p.mean = mean.mutable_data_ptr<float>(), p.rstd = rstd.mutable_data_ptr<float>();
  p.means = means ? means->mutable_data_ptr<float>() : nullptr;
  kernels::gated_residual_norm_bwd(p, launch.stream);
  return {dx, dy, dgate.added(launch), dweight.added(launch), dbias.added(launch)};
}

}  // namespace

#if defined(FK_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(flamingo_kernels, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(flamingo_kernels, CUDA, m) {
#endif
  m.impl("gated_residual_fwd.cuda", TORCH_BOX(&gated_residual_fwd));
  m.impl("gated_residual_bwd.cuda", TORCH_BOX(&gated_residual_bwd));
  m.impl("gated_residual_norm_fwd.cuda", TORCH_BOX(&gated_residual_norm_fwd));
  m.impl("gated_residual_norm_bwd.cuda", TORCH_BOX(&gated_residual_norm_bwd));
}

}  // namespace flamingo_kernels

// What flamingo_kernels/_cuda.py asks through ctypes.
#define FK_EXPORT extern "C" __attribute__((visibility("default")))
FK_EXPORT int flamingo_kernels_cuda_emulated() { return flamingo_kernels::kernels::emulated(); }
extern "C" __attribute__((visibility("default"), used)) const char flamingo_kernels_cuda_build[] =
    "flamingo_kernels_cuda_build: " FK_BUILD;
FK_EXPORT void flamingo_kernels_cuda_poison(int on) { flamingo_kernels::poisoned = on != 0; }
