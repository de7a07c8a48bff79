// The activations of a hidden layer, on vectors of floats.
#pragma once

#include "params.h"
#include "simd.h"

namespace flamingo_kernels::FK_ISA {

FK_INLINE Floats magnitude_of(Floats x) { return (Floats)((Bits)x & 0x7fffffff); }

FK_INLINE Floats sigmoid(Floats x) {
  const Floats e = exp(-magnitude_of(x));  // at most 1
  return (x < 0.f ? e : splat(1.f)) / (1.f + e);
}

// The share of a normal distribution below x, to 1e-7: (1 + erf(x / sqrt(2))) / 2. Abramowitz and Stegun, 7.1.26, gives
// the smaller of the two shares, from which nothing is subtracted.
FK_INLINE Floats share_below(Floats x) {
  const Floats t = 1.f / (1.f + 0.231641888f * magnitude_of(x));
  Floats p = splat(0.530702715f);
  p = p * t - 0.726576013f;
  p = p * t + 0.710706871f;
  p = p * t - 0.142248368f;
  p = p * t + 0.127414796f;
  const Floats smaller = p * t * exp(-0.5f * x * x);
  return x < 0.f ? smaller : 1.f - smaller;
}

FK_INLINE Floats activate(Activation activation, Floats x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::gelu: return x * share_below(x);
    case Activation::gelu_tanh: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));  // (1 + tanh(u)) / 2
    case Activation::relu: return x < 0.f ? splat(0.f) : x;                                      // NaN stays
    case Activation::squared_relu: return x < 0.f ? splat(0.f) : x * x;
    case Activation::silu: return x * sigmoid(x);
  }
  return x;
}

}  // namespace flamingo_kernels::FK_ISA
