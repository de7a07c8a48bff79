// z = x + tanh(gate) * y, and its gradients.
//
// Oracle: flamingo_kernels/ops/gated_residual/reference.py. Forward reads x and y and writes z; backward
// reads dz and y and writes dy (dx is dz itself); 2 and 4 FLOPs an element: memory bound.
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

FK_INLINE Floats gate_at(const Params& p, int64_t j) {
  return p.per_channel ? load(p.gate + j, p.columns - j) : splat(p.gate[0]);
}

template <class X, class Y, class Z>
FK_INLINE void forward_row(const Params& p, int64_t i) {
  const X* x = row_of<const X>(p.x, i);
  const Y* y = row_of<const Y>(p.y, i);
  Z* z = row_of<Z>(p.z, i);
  int64_t j = 0;
  for (; j + width <= p.columns; j += width) store(z + j, load(x + j) + gate_at(p, j) * load(y + j));
  if (const int64_t rest = p.columns - j; rest > 0)
    store(z + j, load(x + j, rest) + gate_at(p, j) * load(y + j, rest), rest);
}

// dy = tanh(gate) * dz, and the sum of dz * y over the row (scalar gate) or added to `sums` (a gate a channel).
template <class Y, class Z>
FK_INLINE double backward_row(const Params& p, int64_t i, float* sums) {
  const Z* dz = row_of<const Z>(p.dz, i);
  const Y* y = row_of<const Y>(p.y, i);
  Y* dy = row_of<Y>(p.dy, i);
  double total = 0;
  for (int64_t block = 0; block < p.columns; block += 32 * width) {  // short sums in float, long ones in double
    Floats short_sum = {};
    for (int64_t j = block; j < block + 32 * width && j < p.columns; j += width) {
      const int64_t rest = p.columns - j;
      Floats gradient = load(dz + j, rest);
      store(dy + j, gradient * gate_at(p, j), rest);
      Floats product = gradient * load(y + j, rest);
      if (p.per_channel)
        store(sums + j, load(sums + j, rest) + product, rest);
      else
        short_sum += product;
    }
    total += sum(short_sum);
  }
  return total;
}

template <class X, class Y, class Z>
struct Forward {
  Forward(Scratch&, const Params&) {}
  static int64_t tasks(const Params& p) { return task_count(p.rows); }

  void run(const Params& p, int64_t task) {
    const int64_t step = rows_per_task(p.rows);
    for (int64_t i = task * step; i < (task + 1) * step && i < p.rows; ++i) forward_row<X, Y, Z>(p, i);
  }
};

template <class X, class Y, class Z>
struct Backward {
  Backward(Scratch&, const Params&) {}
  static int64_t tasks(const Params& p) { return task_count(p.rows); }

  void run(const Params& p, int64_t task) {
    const int64_t step = rows_per_task(p.rows), gates = p.per_channel ? p.columns : 1;
    float* sums = p.dgate + task * gates;
    for (int64_t j = 0; j < gates; ++j) sums[j] = 0;
    double total = 0;
    for (int64_t i = task * step; i < (task + 1) * step && i < p.rows; ++i)
      total += backward_row<Y, Z>(p, i, sums);
    if (!p.per_channel) sums[0] = total;
  }
};

}  // namespace flamingo_kernels::FK_ISA::gated_residual
