// z = x + tanh(gate) * y and n = LayerNorm(z) or RMSNorm(z), and their gradients.
//
// Oracle: flamingo_kernels/ops/gated_residual_norm/reference.py. Forward reads x and y and writes z and n;
// backward reads dz, dn, z and y and writes dx and dy. A row stays in the L1 cache between its passes.
#pragma once

#include <cmath>

#include "gated_residual.h"

namespace flamingo_kernels::FK_ISA::gated_residual_norm {

using gated_residual::row_of;
using gated_residual::rows_per_task;
using Params = GatedResidualNorm;

template <class X, class Y, class Z>
struct Forward {
  Forward(Scratch&, const Params&) {}
  static int64_t tasks(const Params& p) { return gated_residual::task_count(p.residual.rows); }

  void run(const Params& p, int64_t task) {
    const int64_t rows = p.residual.rows, step = rows_per_task(rows);
    for (int64_t i = task * step; i < (task + 1) * step && i < rows; ++i) {
      gated_residual::forward_row<X, Y, Z>(p.residual, i);
      normalise(p, i);
    }
  }

  void normalise(const Params& p, int64_t i) {
    const int64_t columns = p.residual.columns;
    const Z* z = row_of<const Z>(p.residual.z, i);
    Z* n = row_of<Z>(p.n, i);
    Floats total = {}, squares = {};
    if (!p.rms)
      for (int64_t j = 0; j < columns; j += width) total += load(z + j, columns - j);
    const float rough = sum(total) / columns;
    Floats rests = {};
    for (int64_t j = 0; j < columns; j += width) {
      Floats centred = keep_first(load(z + j, columns - j) - splat(rough), columns - j, 0);
      rests += centred;
      squares += centred * centred;
    }
    // What the rough mean missed: a large mean loses the low bits of its sum.
    const float rest = p.rms ? 0 : sum(rests) / columns, mean = rough + rest;
    const float rstd = 1 / std::sqrt(sum(squares) / columns - rest * rest + p.eps);
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t rest = columns - j;
      Floats scaled = (load(z + j, rest) - splat(mean)) * rstd * load(p.weight + j, rest);
      store(n + j, p.bias ? scaled + load(p.bias + j, rest) : scaled, rest);
    }
    p.mean[i] = mean;
    p.rstd[i] = rstd;
  }
};

template <class X, class Y, class Z>
struct Backward {
  float* dx;  // one row in float: what dy and the gate see before it is rounded

  Backward(Scratch& scratch, const Params& p) : dx(scratch.take(round_up(p.residual.columns, width))) {}
  static int64_t tasks(const Params& p) { return gated_residual::task_count(p.residual.rows); }

  void run(const Params& p, int64_t task) {
    const GatedResidual& r = p.residual;
    const int64_t step = rows_per_task(r.rows), gates = r.per_channel ? r.columns : 1;
    float *dgate = r.dgate + task * gates, *dweight = p.dweight + task * r.columns,
          *dbias = p.dbias + task * r.columns;
    for (int64_t j = 0; j < gates; ++j) dgate[j] = 0;
    for (int64_t j = 0; j < r.columns; ++j) dweight[j] = dbias[j] = 0;
    GatedResidual row = r;
    row.dz = {dx, DType::f32, 0};
    double total = 0;
    for (int64_t i = task * step; i < (task + 1) * step && i < r.rows; ++i) {
      norm_gradient(p, i, dweight, dbias);
      total += gated_residual::backward_row<Y, float>(row, i, dgate);
      Z* to = row_of<Z>(p.dx, i);
      for (int64_t j = 0; j < r.columns; j += width) store(to + j, load(dx + j), r.columns - j);
    }
    if (!r.per_channel) dgate[0] = total;
  }

  // dx = dz + rstd * (w dn - mean(w dn) - zhat * mean(w dn * zhat)); an RMSNorm has no mean to subtract.
  void norm_gradient(const Params& p, int64_t i, float* dweight, float* dbias) {
    const int64_t columns = p.residual.columns;
    const Z *z = row_of<const Z>(p.residual.z, i), *dz = row_of<const Z>(p.residual.dz, i),
            *dn = row_of<const Z>(p.dn, i);
    const float mean = p.mean[i], rstd = p.rstd[i];
    Floats along_z = {}, along_one = {};
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t rest = columns - j;
      Floats zhat = (load(z + j, rest) - splat(mean)) * rstd, gradient = load(dn + j, rest);
      Floats weighted = gradient * load(p.weight + j, rest);
      store(dx + j, weighted);  // rounded once: multiplied anew, and fused, it would not cancel with its mean
      along_z += weighted * zhat;
      along_one += weighted;
      store(dweight + j, load(dweight + j, rest) + gradient * zhat, rest);
      store(dbias + j, load(dbias + j, rest) + gradient, rest);
    }
    const float c_z = sum(along_z) / columns, c_one = p.rms ? 0 : sum(along_one) / columns;
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t rest = columns - j;
      Floats zhat = (load(z + j, rest) - splat(mean)) * rstd;
      store(dx + j, load(dz + j, rest) + (load(dx + j) - splat(c_one) - zhat * c_z) * rstd);
    }
  }
};

}  // namespace flamingo_kernels::FK_ISA::gated_residual_norm
