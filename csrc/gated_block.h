// What a decoding step of a gated block is given of the block, on any backend: a list of tensors in the order of
// `TENSORS` in flamingo_kernels/ops/gated_block_decode/weights.py, those without an element standing for none.
#pragma once

#include <utility>
#include <vector>

#include "checks.h"

namespace flamingo_kernels {

struct LinearWeights {
  const Tensor *weight, *bias, *scale;  // [out, in], [out], [out]; bias and scale may be null
};

struct NormWeights {
  const Tensor *weight, *bias;  // [D]; no weight means no norm
  double eps;
  bool rms;
};

struct GatedBlock {
  NormWeights norm, q_norm, ff_norm;
  LinearWeights to_q, to_out, gate_proj, up, down;
  const Tensor *gate, *ff_gate;  // [1] or [D], or null: a factor of 1
  Activation activation;

  // Refers to the tensors of the list.
  GatedBlock(
      const char* operation, const std::vector<Tensor>& weights, const std::vector<double>& eps,
      const std::vector<int64_t>& rms, int64_t activation_place) {
    if (weights.size() != 23) refuse(operation, ": expected 23 weights, got ", weights.size(), ".");
    if (eps.size() != 3 || rms.size() != 3) refuse(operation, ": expected eps and rms of 3 norms.");
    expect_activation(operation, activation_place);
    auto next = weights.begin();
    const auto take = [&] { return next->numel() ? &*next++ : (++next, nullptr); };
    // The order of the calls is that of the list.
    norm.weight = take(), norm.bias = take();
    take_linear(to_q, take);
    q_norm.weight = take(), q_norm.bias = take();
    take_linear(to_out, take);
    gate = take();
    ff_norm.weight = take(), ff_norm.bias = take();
    take_linear(gate_proj, take), take_linear(up, take), take_linear(down, take);
    ff_gate = take();
    int place = 0;
    for (NormWeights* each : {&norm, &q_norm, &ff_norm}) each->eps = eps[place], each->rms = rms[place++];
    activation = static_cast<Activation>(activation_place);
  }

  bool has_glu() const { return gate_proj.weight; }

 private:
  template <class Take>
  static void take_linear(LinearWeights& linear, const Take& take) {
    linear.weight = take(), linear.bias = take(), linear.scale = take();
  }
};

// Everything is there and fits; the matrices are in the dtype of k, or of integers with a scale.
inline void check_gated_block_decode(
    const char* operation, const Tensor& x, const Tensor& k, const Tensor& v, const Tensor& lo, const Tensor& hi,
    const GatedBlock& block, int64_t heads) {
  const Checks checks(operation, "x", x, 2), like_k(operation, "k", k, 5);
  const int64_t batch = x.size(0), dim = x.size(1), sequences = k.size(0), inner = heads * k.size(4);
  checks.expect_rows("x", x, {batch, dim});
  if (sequences != batch && (sequences == 0 || batch % sequences != 0))
    refuse(operation, ": expected k of ", batch, " sequences or a divisor of them, got ", sequences, ".");
  for (const auto& [name, keys] : {std::pair("k", &k), std::pair("v", &v)}) {
    like_k.expect_rows_like_first(name, *keys, {sequences, k.size(1), k.size(2), k.size(3), k.size(4)});
    checks.expect_rows(name, *keys, {sequences, k.size(1), k.size(2), k.size(3), k.size(4)});  // on the device of x
  }
  checks.expect_latents("k", k, 2), checks.expect_head_groups(heads, k.size(3));
  checks.expect_contiguous("lo", lo, ScalarType::Int, {batch});
  checks.expect_contiguous("hi", hi, ScalarType::Int, {batch});

  // The caller makes all of it contiguous once: copying the weights in every step would take most of the time.
  const auto expect_norm = [&](const char* name, const NormWeights& norm, int64_t width) {
    if (!norm.weight) refuse(operation, ": expected a weight of ", name, ", got none.");
    for (const Tensor* each : {norm.weight, norm.bias})
      if (each) expect_vector(checks, operation, name, *each, width);
  };
  const auto expect_linear = [&](const char* name, const LinearWeights& linear, int64_t out, int64_t in) {
    if (!linear.weight) refuse(operation, ": expected a weight of ", name, ", got none.");
    const ScalarType dtype = linear.scale ? ScalarType::Char : k.scalar_type();
    checks.expect_contiguous(name, *linear.weight, dtype, {out, in});
    if (linear.scale) checks.expect_contiguous(name, *linear.scale, ScalarType::Float, {out});
    if (linear.bias) checks.expect_contiguous(name, *linear.bias, k.scalar_type(), {out});
  };
  const int64_t hidden = block.up.weight && block.up.weight->dim() == 2 ? block.up.weight->size(0) : 0;
  expect_norm("norm", block.norm, dim), expect_norm("ff_norm", block.ff_norm, dim);
  if (block.q_norm.weight) expect_norm("q_norm", block.q_norm, k.size(4));
  expect_linear("to_q", block.to_q, inner, dim), expect_linear("to_out", block.to_out, dim, inner);
  expect_linear("up", block.up, hidden, dim), expect_linear("down", block.down, dim, hidden);
  if (block.has_glu()) expect_linear("gate_proj", block.gate_proj, hidden, dim);
  for (const auto& [name, gate] : {std::pair("gate", block.gate), std::pair("ff_gate", block.ff_gate)})
    if (gate) expect_vector(checks, operation, name, *gate, gate->numel() == 1 ? 1 : dim);
}

}  // namespace flamingo_kernels
