// z = x + tanh(gate) * y, and its gradients.
//
// Oracle: flamingo_kernels/ops/gated_residual/reference.py. Forward reads x and y and writes z; backward
// reads dz and y and writes dy (dx is dz itself); 2 and 3 FLOPs an element: memory bound.
#pragma once

#include <type_traits>

#include "params.h"
#include "simd.h"

namespace flamingo_kernels::FK_ISA::gated_residual {

using Params = GatedResidual;

// A fixed number of tasks, so that partial sums do not depend on the number of threads.
constexpr int64_t most_tasks = 64;

FK_INLINE int64_t rows_per_task(int64_t rows) { return (rows + most_tasks - 1) / most_tasks; }
FK_INLINE int64_t task_count(int64_t rows) {
  return rows == 0 ? 0 : (rows + rows_per_task(rows) - 1) / rows_per_task(rows);
}

template <class T>
FK_INLINE T* row_of(const Matrix& matrix, int64_t i) {
  return (T*)matrix.data + i * matrix.row;
}

FK_INLINE Floats tanh_gate_at(const Params& params, int64_t j) {
  return params.per_channel ? load(params.tanh_gate + j, params.columns - j) : splat(params.tanh_gate[0]);
}

template <class X, class Y, class Z>
FK_INLINE void forward_row(const Params& params, int64_t i) {
  const X* x = row_of<const X>(params.x, i);
  const Y* y = row_of<const Y>(params.y, i);
  Z* z = row_of<Z>(params.z, i);
  int64_t j = 0;
  for (; j + width <= params.columns; j += width) store(z + j, load(x + j) + tanh_gate_at(params, j) * load(y + j));
  if (const int64_t left = params.columns - j; left > 0)
    store(z + j, load(x + j, left) + tanh_gate_at(params, j) * load(y + j, left), left);
}

// dy = tanh(gate) * dz. Returns the sum of dz * y over the row where there is one gate; where each channel has its own,
// adds dz * y to `dgate`.
template <class Y, class Z>
FK_INLINE double backward_row(const Params& params, int64_t i, float* dgate) {
  const Z* dz = row_of<const Z>(params.dz, i);
  const Y* y = row_of<const Y>(params.y, i);
  Y* dy = row_of<Y>(params.dy, i);
  double sum_of_row = 0;
  for (int64_t block = 0; block < params.columns; block += 32 * width) {  // short sums in float, long ones in double
    Floats short_sum = {};
    for (int64_t j = block; j < block + 32 * width && j < params.columns; j += width) {
      const int64_t left = params.columns - j;
      Floats dz_j = load(dz + j, left);
      store(dy + j, dz_j * tanh_gate_at(params, j), left);
      Floats dz_y = dz_j * load(y + j, left);
      if (params.per_channel)
        store(dgate + j, load(dgate + j, left) + dz_y, left);
      else
        short_sum += dz_y;
    }
    sum_of_row += sum(short_sum);
  }
  return sum_of_row;
}

template <class X, class Y, class Z>
struct Forward {
  Forward(Scratch&, const Params&) {}
  static int64_t tasks(const Params& params) { return task_count(params.rows); }

  void run(const Params& params, int64_t task) {
    const int64_t step = rows_per_task(params.rows);
    for (int64_t i = task * step; i < (task + 1) * step && i < params.rows; ++i) forward_row<X, Y, Z>(params, i);
  }
};

template <class X, class Y, class Z>
struct Backward {
  Backward(Scratch&, const Params&) {}
  static int64_t tasks(const Params& params) { return task_count(params.rows); }

  void run(const Params& params, int64_t task) {
    const int64_t step = rows_per_task(params.rows), gates = params.per_channel ? params.columns : 1;
    float* dgate = params.dgate + task * gates;
    for (int64_t j = 0; j < gates; ++j) dgate[j] = 0;
    double sum_of_rows = 0;
    for (int64_t i = task * step; i < (task + 1) * step && i < params.rows; ++i)
      sum_of_rows += backward_row<Y, Z>(params, i, dgate);
    if (!params.per_channel) dgate[0] = sum_of_rows;
  }
};

}  // namespace flamingo_kernels::FK_ISA::gated_residual
