// Vectors of `width` floats on the compiler's own vector types: one source for SSE, AVX2, AVX-512 and NEON.
// Everything lives in namespace FK_ISA: compiled once per instruction set, it must have one name in each.
#pragma once

#include <cstdint>
#include <utility>

// An emulating build does without the instructions it stands for, also where the processor has them.
#if defined(__F16C__) && !defined(FK_EMULATE)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 in its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#ifdef __AVX512F__
#define FK_AVX512
#else
#define FK_AVX2
#endif
#ifdef __AVX512BF16__
#define FK_AVX512_BF16
#endif
#ifdef __AVX512VNNI__
#define FK_AVX512_VNNI
#endif
#ifdef __AVXVNNI__
#define FK_AVX_VNNI
#endif
#endif

#define FK_JOIN_(a, b) a##b
#define FK_JOIN(a, b) FK_JOIN_(a, b)
#define FK_WIDTH_portable 4
#define FK_WIDTH_avx2 8
#define FK_WIDTH_avx2_vnni 8
#define FK_WIDTH_avx512 16
#define FK_WIDTH_avx512_bf16 16
#define FK_WIDTH_avx512_amx 16
#define FK_PAIRS_portable 0
#define FK_PAIRS_avx2 0
#define FK_PAIRS_avx2_vnni 0
#define FK_PAIRS_avx512 0
#define FK_PAIRS_avx512_bf16 1
#define FK_PAIRS_avx512_amx 1
#define FK_QUADS_portable 0
#define FK_QUADS_avx2 0
#define FK_QUADS_avx2_vnni 1
#define FK_QUADS_avx512 0
#define FK_QUADS_avx512_bf16 1
#define FK_QUADS_avx512_amx 1
#define FK_TILES_portable 0
#define FK_TILES_avx2 0
#define FK_TILES_avx2_vnni 0
#define FK_TILES_avx512 0
#define FK_TILES_avx512_bf16 0
#define FK_TILES_avx512_amx 1
#define FK_INLINE inline __attribute__((always_inline))

namespace flamingo_kernels::FK_ISA {

constexpr int width = FK_JOIN(FK_WIDTH_, FK_ISA);
constexpr bool has_pairs = FK_JOIN(FK_PAIRS_, FK_ISA);
constexpr bool has_quads = FK_JOIN(FK_QUADS_, FK_ISA);  // products of four 8-bit integers at once
constexpr bool has_tiles = FK_JOIN(FK_TILES_, FK_ISA);

typedef float Floats __attribute__((vector_size(4 * width)));
typedef int32_t Ints __attribute__((vector_size(4 * width)));
typedef uint32_t Bits __attribute__((vector_size(4 * width)));
typedef uint16_t Shorts __attribute__((vector_size(2 * width)));
typedef double Doubles __attribute__((vector_size(8 * width)));
typedef int8_t Bytes __attribute__((vector_size(width)));
typedef int16_t Int16s __attribute__((vector_size(4 * width)));  // two in a lane
typedef int8_t Int8s __attribute__((vector_size(2 * width)));    // as many

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class V, class Element, int... lane>
FK_INLINE V repeat(Element value, std::integer_sequence<int, lane...>) {
  return V{((void)lane, value)...};
}

// Moves bits and does no arithmetic: a word may hold two bfloat16.
FK_INLINE Floats splat(float value) { return repeat<Floats>(value, std::make_integer_sequence<int, width>()); }
FK_INLINE Bits splat_bits(uint32_t value) { return repeat<Bits>(value, std::make_integer_sequence<int, width>()); }

template <int... lane>
FK_INLINE Ints count_lanes(std::integer_sequence<int, lane...>) {
  return Ints{lane...};
}

// The first `count` lanes of x, `other` in the rest.
FK_INLINE Floats keep_first(Floats x, int64_t count, float other) {
  return count_lanes(std::make_integer_sequence<int, width>()) < (int32_t)count ? x : splat(other);
}

FK_INLINE Floats max(Floats a, Floats b) {
#ifdef FK_AVX512
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);  // the same in one instruction: b where one is NaN
#else
  return a > b ? a : b;
#endif
}

template <class V>
FK_INLINE V read(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
FK_INLINE void write(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

FK_INLINE Bits widen(Shorts h) {
#ifdef FK_AVX512
  return (Bits)_mm512_cvtepu16_epi32((__m256i)h);  // one instruction, for which GCC takes four
#else
  return __builtin_convertvector(h, Bits);
#endif
}

FK_INLINE Int16s widen(Int8s bytes) {
#if defined(FK_AVX512)
  return (Int16s)_mm512_cvtepi8_epi16((__m256i)bytes);
#elif defined(FK_AVX2)
  return (Int16s)_mm256_cvtepi8_epi16((__m128i)bytes);
#else
  return __builtin_convertvector(bytes, Int16s);
#endif
}

// sum + the products of the two 16-bit integers in each lane.
FK_INLINE Ints add_pairs(Ints sum, Int16s a, Int16s b) {
#if defined(FK_AVX512_VNNI)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(FK_AVX512)
  return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(FK_AVX2)
  return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const Ints low = (Ints)((Bits)a << 16) >> 16, other_low = (Ints)((Bits)b << 16) >> 16;
  return sum + low * other_low + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

// sum + the products of the four 8-bit integers in each lane, where those of a have no sign.
FK_INLINE Ints add_quads(Ints sum, Bits a, Bits b) {
#ifdef FK_AVX512_VNNI
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(FK_AVX_VNNI)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
  for (int bit = 0; bit < 32; bit += 8) sum += (Ints)((a >> bit) & 0xff) * ((Ints)(b << (24 - bit)) >> 24);
  return sum;
#endif
}

FK_INLINE Floats bf16_to_float(Shorts h) { return (Floats)(widen(h) << 16); }

// Round to nearest even, in the low 16 bits of each lane; NaN stays NaN.
FK_INLINE Bits float_to_bf16(Floats x) {
  Bits bits = (Bits)x;
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x != x ? (bits >> 16) | 0x40 : rounded;
}

// The same for operands of products: subnormal numbers may become zero, as the products take them.
FK_INLINE Shorts round_to_bf16(Floats x) {
#ifdef FK_AVX512_BF16
  return (Shorts)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector(float_to_bf16(x), Shorts);
#endif
}

// Processors that have an instruction for it need it: elsewhere each subnormal number costs a hundred cycles.
FK_INLINE Floats half_to_float(Shorts h) {
#if defined(FK_AVX512)
  return (Floats)_mm512_cvtph_ps((__m256i)h);
#elif defined(FK_AVX2)
  return (Floats)_mm256_cvtph_ps((__m128i)h);
#else
  Bits wide = widen(h);
  Bits magnitude = wide & 0x7fff;
  Bits scaled = (Bits)((Floats)(magnitude << 13) * splat(0x1p112f));  // also right for subnormals
  Bits bits = magnitude >= 0x7c00 ? scaled | 0x7f800000 : scaled;
  return (Floats)(bits | (wide & 0x8000) << 16);
#endif
}

FK_INLINE Shorts float_to_half(Floats x) {
#if defined(FK_AVX512)
  return (Shorts)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(FK_AVX2)
  return (Shorts)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  Bits sign = ((Bits)x >> 16) & 0x8000, magnitude = (Bits)x & 0x7fffffff;
  Bits normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  Bits subnormal = (Bits)((Floats)magnitude + splat(0.5f)) - 0x3f000000;
  Bits special = magnitude > 0x7f800000 ? splat_bits(0x7e00) : splat_bits(0x7c00);
  Bits rounded = magnitude < 0x38800000 ? subnormal : normal;
  return __builtin_convertvector(sign | (magnitude >= 0x47800000 ? special : rounded), Shorts);
#endif
}

FK_INLINE Floats load(const float* from) { return read<Floats>(from); }
FK_INLINE Floats load(const BFloat16* from) { return bf16_to_float(read<Shorts>(from)); }
FK_INLINE Floats load(const Float16* from) { return half_to_float(read<Shorts>(from)); }
FK_INLINE void store(float* to, Floats x) { write(to, x); }
FK_INLINE void store(BFloat16* to, Floats x) { write(to, __builtin_convertvector(float_to_bf16(x), Shorts)); }
FK_INLINE void store(BFloat16* to, Shorts bits) { write(to, bits); }
FK_INLINE void store(Float16* to, Floats x) { write(to, float_to_half(x)); }

// The first `count` elements, zeros behind them.
FK_INLINE Shorts load_bits(const BFloat16* from, int64_t count) {
  if (count >= width) return read<Shorts>(from);
  BFloat16 padded[width] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return read<Shorts>(padded);
}

template <class T>
FK_INLINE Floats load(const T* from, int64_t count) {
  if (count >= width) return load(from);
  T padded[width] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <class T, class V>
FK_INLINE void store(T* to, V x, int64_t count) {
  if (count >= width) return store(to, x);
  T padded[width];
  store(padded, x);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

struct Plus {
  template <class V>
  FK_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <class V>
  FK_INLINE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

template <int... lane>
FK_INLINE Floats swap_lanes(Floats x, int distance, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return distance == 8   ? __builtin_shufflevector(x, x, ((lane ^ 8) % width)...)
         : distance == 4 ? __builtin_shufflevector(x, x, ((lane ^ 4) % width)...)
         : distance == 2 ? __builtin_shufflevector(x, x, (lane ^ 2)...)
                         : __builtin_shufflevector(x, x, (lane ^ 1)...);
#else
  return __builtin_shuffle(x, Ints{(lane ^ distance)...});
#endif
}

// Combines the upper half of the vector with the lower, again and again, in registers throughout.
template <class Operation>
FK_INLINE float reduce(Floats x) {
#pragma GCC unroll 4
  for (int distance = width / 2; distance > 0; distance /= 2)
    x = Operation()(x, swap_lanes(x, distance, std::make_integer_sequence<int, width>()));
  return x[0];
}

FK_INLINE float sum(Floats x) { return reduce<Plus>(x); }
FK_INLINE float largest(Floats x) { return reduce<Larger>(x); }

// e^x for x <= 88, to an ulp or two; 0 below e^-87, NaN for NaN. Above 88 the result is wrong: powers are made of
// unsigned bits, whose sum may wrap.
FK_INLINE Floats exp(Floats x) {
  Floats clamped = x < -87.f ? splat(-87.f) : x;
  Floats shifted = clamped * 1.44269504f + 0x1.8p23f;  // rounds x / ln 2 to an integer, kept in the low bits
  Floats n = shifted - 0x1.8p23f;
  Floats f = clamped - n * 0.693359375f;  // exact: ln 2 is a sum of two numbers, the first of few bits
  f = f - n * -2.12194440e-4f;
  Floats p = splat(1.381446694e-03f);  // minimax on half an octave, exact at 0
  p = p * f + 8.368780515e-03f;
  p = p * f + 4.166839422e-02f;
  p = p * f + 1.666652011e-01f;
  p = p * f + 4.999999341e-01f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  Floats power = p * (Floats)(((Bits)shifted << 23) + 0x3f800000);
  return x < -87.f ? splat(0.f) : power;
}

// The same to 2^-13 of it, more than bfloat16 shows.
FK_INLINE Floats exp_for_bf16(Floats x) {
  Floats clamped = max(splat(-87.f), x);
  Floats shifted = clamped * 1.44269504f + 0x1.8p23f;
  Floats f = clamped * 1.44269504f - (shifted - 0x1.8p23f);
  Floats p = splat(5.50089329e-02f);  // minimax of 2^f on half an octave, exact at 0
  p = p * f + 2.42210954e-01f;
  p = p * f + 6.93282902e-01f;
  p = p * f + 1.f;
  return x < -87.f ? splat(0.f) : (Floats)((Bits)p + ((Bits)shifted << 23));
}

template <int... lane>
FK_INLINE Floats interleave(Floats a, Floats b, int from, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return from == 0 ? __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * width)...)
                   : __builtin_shufflevector(a, b, (lane / 2 + width / 2 + lane % 2 * width)...);
#else
  return from == 0 ? __builtin_shuffle(a, b, Ints{(lane / 2 + lane % 2 * width)...})
                   : __builtin_shuffle(a, b, Ints{(lane / 2 + width / 2 + lane % 2 * width)...});
#endif
}

// Transpose a width x width block held in registers: log2(width) rounds of a perfect shuffle.
FK_INLINE void transpose(Floats (&rows)[width]) {
  constexpr auto lanes = std::make_integer_sequence<int, width>();
#pragma GCC unroll 4
  for (int round = 1; round < width; round *= 2) {
    Floats shuffled[width];
#pragma GCC unroll 8
    for (int i = 0; i < width / 2; ++i) {
      shuffled[2 * i] = interleave(rows[i], rows[i + width / 2], 0, lanes);
      shuffled[2 * i + 1] = interleave(rows[i], rows[i + width / 2], 1, lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) rows[i] = shuffled[i];
  }
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hands out a thread's working memory; with no base it only counts.
struct Scratch {
  float* base;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* block = base ? base + used : nullptr;
    used += round_up(floats, 16);  // cache lines
    return block;
  }
};

}  // namespace flamingo_kernels::FK_ISA
