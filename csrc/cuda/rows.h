// Rows of matrices in vectors of 8 elements, as floats; for the kernels that read each element once.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "device.h"
#include "kernels.h"

namespace flamingo_kernels {

constexpr int kVector = 8;  // elements that a thread takes at once: 16 bytes where they have 16 bits

// The element type of matrices that do not agree on one: each says its own at run time.
struct Mixed {};

// What neighbouring threads take of a row, and what is beyond its end.
struct Columns {
  int64_t first, count;  // first of the thread's, count of the row
  __device__ bool inside() const { return first < count; }
};

template <class T, bool wide>
__device__ inline void load_typed(float (&values)[kVector], const T* at, Columns columns) {
  if constexpr (wide) {
    constexpr int loads = kVector * sizeof(T) / 16;
    uint4 words[loads];
    for (int i = 0; i < loads; ++i) words[i] = load_128(at + i * (kVector / loads));
    T elements[kVector];
    memcpy(elements, words, sizeof words);
    for (int i = 0; i < kVector; ++i) values[i] = to_float(elements[i]);
  } else {
    for (int i = 0; i < kVector; ++i) values[i] = columns.first + i < columns.count ? to_float(at[i]) : 0.0f;
  }
}

template <class T, bool wide>
__device__ inline void store_typed(T* at, const float (&values)[kVector], Columns columns) {
  if constexpr (wide) {
    constexpr int stores = kVector * sizeof(T) / 16;
    T elements[kVector];
    for (int i = 0; i < kVector; ++i) elements[i] = from_float<T>(values[i]);
    uint4 words[stores];
    memcpy(words, elements, sizeof words);
    for (int i = 0; i < stores; ++i) store_128(at + i * (kVector / stores), words[i]);
  } else {
    for (int i = 0; i < kVector; ++i)
      if (columns.first + i < columns.count) at[i] = from_float<T>(values[i]);
  }
}

// Calls a function with T, or where T is Mixed with the type that a matrix says it has.
template <class T, class Function>
__device__ inline void with_type(DType dtype, Function function) {
  if constexpr (!std::is_same_v<T, Mixed>)
    function(T());
  else if (dtype == DType::f32)
    function(float());
  else if (dtype == DType::bf16)
    function(bf16());
  else
    function(f16());
}

template <class T, bool wide>
__device__ inline void load(float (&values)[kVector], const Matrix& matrix, int64_t row, Columns columns) {
  with_type<T>(matrix.dtype, [&](auto type) {
    using Element = decltype(type);
    load_typed<Element, wide>(values, (const Element*)matrix.data + row * matrix.row + columns.first, columns);
  });
}

template <class T, bool wide>
__device__ inline void store(const Matrix& matrix, int64_t row, Columns columns, const float (&values)[kVector]) {
  with_type<T>(matrix.dtype, [&](auto type) {
    using Element = decltype(type);
    store_typed<Element, wide>((Element*)matrix.data + row * matrix.row + columns.first, values, columns);
  });
}

// The same of a matrix that says its width at run time, and its dtype too where T is Mixed; 0 beyond the end.
template <class T = Mixed>
__device__ inline void load(float (&values)[kVector], const Matrix& matrix, int64_t row, Columns columns) {
  if (matrix.wide && columns.inside())
    load<T, true>(values, matrix, row, columns);
  else
    load<T, false>(values, matrix, row, columns);
}

template <class T = Mixed>
__device__ inline float element(const Vector& vector, int64_t i) {
  float value;
  with_type<T>(vector.dtype, [&](auto type) { value = to_float(((const decltype(type)*)vector.data)[i]); });
  return value;
}

template <class T = Mixed>
__device__ inline float element(const Matrix& matrix, int64_t row, int64_t column) {
  return element<T>(Vector{matrix.data, matrix.dtype}, row * matrix.row + column);
}

template <class T = Mixed>
__device__ inline void store_element(const Matrix& matrix, int64_t row, int64_t column, float value) {
  with_type<T>(matrix.dtype, [&](auto type) {
    using Element = decltype(type);
    ((Element*)matrix.data)[row * matrix.row + column] = from_float<Element>(value);
  });
}

// The thread's elements of a vector of parameters; 0 beyond the end.
template <class T, bool wide>
__device__ inline void load(float (&values)[kVector], const Vector& vector, Columns columns) {
  with_type<T>(vector.dtype, [&](auto type) {
    using Element = decltype(type);
    load_typed<Element, wide>(values, static_cast<const Element*>(vector.data) + columns.first, columns);
  });
}

// The same of one that says its dtype and whether it is wide at run time.
__device__ inline void load(float (&values)[kVector], const Vector& vector, Columns columns) {
  if (vector.wide && columns.inside())
    load<Mixed, true>(values, vector, columns);
  else
    load<Mixed, false>(values, vector, columns);
}

// Calls a function with an element type that all of these matrices have, or Mixed, and whether accesses are wide.
template <class Function>
void by_layout(std::initializer_list<Matrix> matrices, Function function) {
  const DType dtype = matrices.begin()->dtype;
  bool same = true, wide = true;
  for (const Matrix& matrix : matrices) same = same && matrix.dtype == dtype, wide = wide && matrix.wide;
  const auto by_width = [&](auto type) { wide ? function(type, std::true_type()) : function(type, std::false_type()); };
  if (!same) return by_width(Mixed());
  by_type(dtype, by_width);
}

}  // namespace flamingo_kernels
