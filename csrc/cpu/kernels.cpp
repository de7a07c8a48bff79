// Every kernel of one instruction set: compiled once for each, with -DFK_ISA=<its name>.
#include "gated_block_decode.h"
#include "gated_residual.h"
#include "linear.h"
#include "linear_int8.h"
#include "linear_tiles.h"
#include "masked_cross_attention.h"
#include "perceiver_attention.h"
#include "read_loop.h"

namespace flamingo_kernels {
namespace FK_ISA {

template <class Implementation, class Params>
void run_task(const Params& params, int64_t task, float* base) {
  Scratch scratch{base};
  Implementation(scratch, params).run(params, task);
}

template <class Implementation, class Params>
int64_t scratch_size(const Params& params) {
  Scratch scratch{nullptr};
  Implementation(scratch, params);
  return scratch.used;
}

template <class Implementation, class Registers, class Params>
void run_with_registers(const Params& params, int64_t task, float* base) {
  [[maybe_unused]] const Registers registers;
  run_task<Implementation>(params, task, base);
}

// What has no element type.
template <class Implementation, class Params>
constexpr Kernel<Params> untyped = {Implementation::tasks, scratch_size<Implementation, Params>, run_task<Implementation, Params>};

// Attention: one element type.
template <template <class> class Implementation, class Params>
Kernel<Params> attention(DType dtype) {
  auto kernel = []<class T>(T) {
    using I = Implementation<T>;
    using Registers = typename DotFor<T>::Registers;
    return Kernel<Params>{I::tasks, scratch_size<I, Params>, run_with_registers<I, Registers, Params>};
  };
  if (dtype == DType::f32) return kernel(float());
  if (dtype == DType::bf16) return kernel(BFloat16());
  return kernel(Float16());
}

// Residuals: the types of x, y and z. z is the wider of x and y, or wider still through the gate's type.
template <template <class, class, class> class Implementation>
Kernel<GatedResidual> residual(DType x, DType y, DType z) {
  auto kernel = []<class X, class Y, class Z>(X, Y, Z) {
    using I = Implementation<X, Y, Z>;
    return Kernel<GatedResidual>{I::tasks, scratch_size<I, GatedResidual>, run_task<I, GatedResidual>};
  };
  if (z == DType::bf16) return kernel(BFloat16(), BFloat16(), BFloat16());
  if (z == DType::f16) return kernel(Float16(), Float16(), Float16());
  auto with_y = [&](auto first) {
    if (y == DType::f32) return kernel(first, float(), float());
    if (y == DType::bf16) return kernel(first, BFloat16(), float());
    return kernel(first, Float16(), float());
  };
  if (x == DType::f32) return with_y(float());
  if (x == DType::bf16) return with_y(BFloat16());
  return with_y(Float16());
}

// Products: one element type, that of x.
template <template <class> class Implementation, class Registers = Single::Registers>
Kernel<Linear> product(DType dtype) {
  auto kernel = []<class T>(T) {
    using I = Implementation<T>;
    return Kernel<Linear>{I::tasks, scratch_size<I, Linear>, run_with_registers<I, Registers, Linear>};
  };
  if (dtype == DType::f32) return kernel(float());
  if (dtype == DType::bf16) return kernel(BFloat16());
  return kernel(Float16());
}

template <class T>
using PackX = linear::Pack<T, T>;
template <class T>
using LinearForward = linear::Forward<T, T>;
template <class T>
using FinePack = linear::Pack<T, int8_t>;
template <class T>
using FineForward = linear::Forward<T, int8_t>;
template <class T>
using CoarsePack = linear::Pack<T, int8_t, linear::InQuads>;
template <class T>
using CoarseForward = linear::Forward<T, int8_t, linear::InQuads>;

template <class Implementation>
Kernel<Linear> product_on_tiles() {
  return {Implementation::tasks, scratch_size<Implementation, Linear>, run_with_registers<Implementation, TileRegisters, Linear>};
}

// Weights of floating-point numbers: one row at a time, or in bfloat16 blocks on tile registers.
Product linear_for(const Linear& params) {
  const DType dtype = params.x.dtype;
  if constexpr (has_tiles)
    if (dtype == DType::bf16 && params.rows >= linear_tiles::least_rows && linear_tiles::fits(params))
      return {product_on_tiles<linear_tiles::Pack>(), product_on_tiles<linear_tiles::Forward>()};
  return {product<PackX>(dtype), product<LinearForward>(dtype)};
}

constexpr int64_t fine_int8_rows = has_tiles ? 16 : has_quads ? 4 : INT64_MAX;

// Weights of 8 bits: one row at a time or blocks, and integers of x as fine as cost nothing, or as its rows need.
Product linear_int8_for(const Linear& params) {
  constexpr int64_t row_by_row = has_tiles ? 2 : has_quads ? 4 : 16;
  constexpr int64_t coarse_row_by_row = has_quads && !has_tiles ? 32 : 0;
  constexpr int64_t longest_sum = 65536;  // longer ones of products of 8-bit integers may not fit into 32 bits
  const DType dtype = params.x.dtype;
  if (params.rows <= row_by_row || params.in > longest_sum)
    return {product<FinePack>(dtype), product<FineForward>(dtype)};
  if (params.rows <= coarse_row_by_row && !params.fine)
    return {product<CoarsePack>(dtype), product<CoarseForward>(dtype)};
  using Registers = linear_int8::Dot::Registers;
  return {product<linear_int8::Pack>(dtype), product<linear_int8::Forward, Registers>(dtype)};
}

}  // namespace FK_ISA

#define FK_NAME_(isa) #isa
#define FK_NAME(isa) FK_NAME_(isa)

extern const Variant FK_JOIN(variant_, FK_ISA);
const Variant FK_JOIN(variant_, FK_ISA) = {
    FK_NAME(FK_ISA),
    FK_ISA::attention<FK_ISA::masked_cross_attention::Forward, MaskedCrossAttention>,
    FK_ISA::attention<FK_ISA::masked_cross_attention::Backward, MaskedCrossAttention>,
    FK_ISA::attention<FK_ISA::masked_cross_attention::QueryBackward, MaskedCrossAttention>,
    FK_ISA::attention<FK_ISA::perceiver_attention::Forward, PerceiverAttention>,
    FK_ISA::attention<FK_ISA::perceiver_attention::Backward, PerceiverAttention>,
    FK_ISA::residual<FK_ISA::gated_residual::Forward>,
    FK_ISA::residual<FK_ISA::gated_residual::Backward>,
    FK_ISA::linear_for,
    FK_ISA::fine_int8_rows,
    FK_ISA::product<FK_ISA::linear_int8::Spread>,
    FK_ISA::linear_int8_for,
    FK_ISA::untyped<FK_ISA::gated_block_decode::Normalize, RowNorm>,
    FK_ISA::attention<FK_ISA::gated_block_decode::Attend, DecodeAttention>,
    FK_ISA::untyped<FK_ISA::gated_block_decode::Merge, DecodeAttention>,
    FK_ISA::gated_block_decode::count_splits,
    FK_ISA::untyped<FK_ISA::read_loop::Forward, ReadLoop>,
};

}  // namespace flamingo_kernels
