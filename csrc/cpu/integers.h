// Rows of numbers as integers with a scale for each row.
#pragma once

#include "simd.h"

namespace flamingo_kernels::FK_ISA {

constexpr float most_of_8_bits = 127, most_of_16_bits = 32767;

// Of the `count` numbers of a row; infinite or NaN where one of them is.
template <class T>
FK_INLINE float largest_magnitude(const T* row, int64_t count) {
  Ints largest = {};  // the order of magnitudes is that of their bits, NaN above all
  for (int64_t k = 0; k < count; k += width) {
    const Ints bits = (Ints)load(row + k, count - k) & 0x7fffffff;
    largest = largest > bits ? largest : bits;
  }
  int32_t result = 0;
  for (int lane = 0; lane < width; ++lane) result = largest[lane] > result ? largest[lane] : result;
  float magnitude;
  __builtin_memcpy(&magnitude, &result, sizeof magnitude);
  return magnitude;
}

// The integers from -most to most that a row becomes: x is about scale * round(x).
struct Integers {
  float scale = 0, inverse = 0;

  Integers() = default;

  // A row with a number that is not finite has a scale of NaN.
  Integers(float largest, float most) {
    constexpr float least = 0x1p-100f;  // what is smaller has no inverse in floats
    scale = (largest < least ? least : largest) / most;
    inverse = largest < __builtin_inff() ? 1 / scale : 0;
    if (!(largest < __builtin_inff())) scale = __builtin_nanf("");
  }

  FK_INLINE Ints round(Floats x) const { return (Ints)(x * inverse + 0x1.8p23f) - 0x4b400000; }
};

// By how much products with a row of these are too large, where the weights are 128 more than they should be.
FK_INLINE float offset_of(Ints sums) {
  int64_t sum = 0;
  for (int lane = 0; lane < width; ++lane) sum += sums[lane];
  return 128.f * sum;
}

}  // namespace flamingo_kernels::FK_ISA
