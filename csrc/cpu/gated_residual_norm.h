// z = x + tanh(gate) * y and n = LayerNorm(z) or RMSNorm(z), and their gradients.
//
// Oracle: flamingo_kernels/ops/gated_residual_norm/reference.py. Forward reads x and y and writes z and n;
// backward reads dz, dn, z and y and writes dx and dy; 11 and 17 FLOPs an element. A row stays in the L1 cache between
// its passes.
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
  static int64_t tasks(const Params& params) { return gated_residual::task_count(params.residual.rows); }

  void run(const Params& params, int64_t task) {
    const int64_t rows = params.residual.rows, step = rows_per_task(rows);
    for (int64_t i = task * step; i < (task + 1) * step && i < rows; ++i) {
      gated_residual::forward_row<X, Y, Z>(params.residual, i);
      normalise(params, i);
    }
  }

  void normalise(const Params& params, int64_t i) {
    const int64_t columns = params.residual.columns;
    const Z* z = row_of<const Z>(params.residual.z, i);
    Z* n = row_of<Z>(params.n, i);
    Floats sums = {}, errors = {}, squares = {};
    if (!params.rms)
      for (int64_t j = 0; j < columns; j += width) sums += load(z + j, columns - j);
    const float first_mean = sum(sums) / columns;
    for (int64_t j = 0; j < columns; j += width) {
      Floats centred = keep_first(load(z + j, columns - j) - splat(first_mean), columns - j, 0);
      errors += centred;
      squares += centred * centred;
    }
    // A large mean loses the low bits of its sum: the mean of the differences corrects it.
    const float error = params.rms ? 0 : sum(errors) / columns, mean = first_mean + error;
    // Fused, as the square of the error may overflow where the squares have: of infinities there is no difference.
    const float variance = std::fma(-error, error, sum(squares) / columns);
    const float rstd = 1 / std::sqrt(variance + params.eps);
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t left = columns - j;
      Floats scaled = (load(z + j, left) - splat(mean)) * rstd * load(params.weight + j, left);
      store(n + j, params.bias ? scaled + load(params.bias + j, left) : scaled, left);
    }
    params.mean[i] = mean;
    params.rstd[i] = rstd;
  }
};

template <class X, class Y, class Z>
struct Backward {
  float* dx;  // one row in float: dy and dgate are computed from it before it is rounded

  Backward(Scratch& scratch, const Params& params) : dx(scratch.take(round_up(params.residual.columns, width))) {}
  static int64_t tasks(const Params& params) { return gated_residual::task_count(params.residual.rows); }

  void run(const Params& params, int64_t task) {
    const GatedResidual& r = params.residual;
    const int64_t step = rows_per_task(r.rows), gates = r.per_channel ? r.columns : 1;
    float *dgate = r.dgate + task * gates, *dweight = params.dweight + task * r.columns,
          *dbias = params.dbias + task * r.columns;
    for (int64_t j = 0; j < gates; ++j) dgate[j] = 0;
    for (int64_t j = 0; j < r.columns; ++j) dweight[j] = dbias[j] = 0;
    GatedResidual row = r;
    row.dz = {dx, DType::f32, 0};
    double sum_of_rows = 0;
    for (int64_t i = task * step; i < (task + 1) * step && i < r.rows; ++i) {
      norm_gradient(params, i, dweight, dbias);
      sum_of_rows += gated_residual::backward_row<Y, float>(row, i, dgate);
      Z* to = row_of<Z>(params.dx, i);
      for (int64_t j = 0; j < r.columns; j += width) store(to + j, load(dx + j), r.columns - j);
    }
    if (!r.per_channel) dgate[0] = sum_of_rows;
  }

  // dx = dz + rstd * (wdn - mean(wdn) - zhat * mean(wdn * zhat)) where wdn = weight * dn; an RMSNorm has no
  // mean(wdn).
  void norm_gradient(const Params& params, int64_t i, float* dweight, float* dbias) {
    const int64_t columns = params.residual.columns;
    const Z *z = row_of<const Z>(params.residual.z, i), *dz = row_of<const Z>(params.residual.dz, i),
            *dn = row_of<const Z>(params.dn, i);
    const float mean = params.mean[i], rstd = params.rstd[i];
    Floats wdn_zhat_sums = {}, wdn_sums = {};
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t left = columns - j;
      Floats zhat = (load(z + j, left) - splat(mean)) * rstd, dn_j = load(dn + j, left);
      Floats wdn = dn_j * load(params.weight + j, left);
      store(dx + j, wdn);  // rounded once: multiplied again, and fused, it would not cancel with its mean
      wdn_zhat_sums += wdn * zhat;
      wdn_sums += wdn;
      store(dweight + j, load(dweight + j, left) + dn_j * zhat, left);
      store(dbias + j, load(dbias + j, left) + dn_j, left);
    }
    const float mean_wdn_zhat = sum(wdn_zhat_sums) / columns, mean_wdn = params.rms ? 0 : sum(wdn_sums) / columns;
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t left = columns - j;
      Floats zhat = (load(z + j, left) - splat(mean)) * rstd;
      store(dx + j, load(dz + j, left) + (load(dx + j) - splat(mean_wdn) - zhat * mean_wdn_zhat) * rstd);
    }
  }
};

}  // namespace flamingo_kernels::FK_ISA::gated_residual_norm
