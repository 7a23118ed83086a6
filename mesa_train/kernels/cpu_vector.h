// Vectors of a register's width, as a few operations on them: the vocabulary of the CPU kernels'
// inner loops.
//
// The types are the compiler's own vector extension (g++ and clang++), so arithmetic, comparisons
// and choices are spelled as for numbers and compile for any processor. Where a processor has an
// instruction that the extension cannot spell, it is used under that processor's macro, with a plain
// version beside it that gives the same bits; only `fused` rounds differently without FMA.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(std::endian::native == std::endian::little, "codes are packed through wider integers");

namespace mesa {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MESA_AVX512
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Shorts = uint16_t __attribute__((vector_size(2 * LANES)));
using Bytes = uint8_t __attribute__((vector_size(LANES)));

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline Floats as_floats(Words bits) { return std::bit_cast<Floats>(bits); }
inline Words as_words(Floats x) { return std::bit_cast<Words>(x); }

inline Floats all(float x) { return x - Floats{}; }
inline Words all(uint32_t x) { return x + Words{}; }

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline Floats floats(Bytes q) {
  return __builtin_convertvector(__builtin_convertvector(q, Ints), Floats);
}

// --- arithmetic ---

// A NaN in `a` gives b.
inline Floats larger(Floats a, Floats b) {
#if defined(MESA_AVX512)
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Floats smaller(Floats a, Floats b) {
#if defined(MESA_AVX512)
  return _mm512_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// For results that need not be equal to the reference bit for bit.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(MESA_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  for (int k = 0; k < LANES; ++k) c[k] = std::fma(a[k], b[k], c[k]);
  return c;
#else
  return a * b + c;
#endif
}

inline Floats absolute(Floats x) { return as_floats(as_words(x) & 0x7FFFFFFFu); }

// The same order of additions whatever the processor does with halves.
inline float sum(Floats x) {
  float total = 0;
  for (int k = 0; k < LANES; ++k) total += x[k];
  return total;
}

// table[q] for q below 16.
inline Floats lookup(const float* table, Bytes q) {
#if defined(MESA_AVX512)
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32((__m128i)q), _mm512_loadu_ps(table));
#else
  Floats v;
  for (int k = 0; k < LANES; ++k) v[k] = table[q[k]];
  return v;
#endif
}

// --- dtypes: how LANES elements are read and written ---

struct Float32 {
  using Raw = float;
  static Floats load(const Raw* from) { return mesa::load<Floats>(from); }
  static void store(Raw* to, Floats x) { mesa::store(to, x); }
};

struct BFloat16 {
  using Raw = uint16_t;
  static Floats load(const Raw* from) {
    return as_floats(__builtin_convertvector(mesa::load<Shorts>(from), Words) << 16);
  }
  // To nearest, half to even; every NaN is PyTorch's own. The processor's instruction for this
  // flushes denormals and keeps a NaN's digits.
  static void store(Raw* to, Floats x) {
    const Words bits = as_words(x);
    const Words even = bits + 0x7FFF + ((bits >> 16) & 1);
    const Words kept = (x == x) ? even : all(0x7FC00000u);
    mesa::store(to, __builtin_convertvector(kept >> 16, Shorts));
  }
};

struct Float16 {
  using Raw = uint16_t;
  static Floats load(const Raw* from) {
#if defined(MESA_AVX512)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Floats x;
    for (int k = 0; k < LANES; ++k) x[k] = c10::Half(from[k], c10::Half::from_bits());
    return x;
#endif
  }
  static void store(Raw* to, Floats x) {
#if defined(MESA_AVX512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int k = 0; k < LANES; ++k) to[k] = c10::Half(x[k]).x;
#endif
  }
};

// --- loops ---

// visit(i) for vectors that cover [0, n), n >= LANES. Where n is no multiple of LANES the last one
// overlaps its neighbour, so a visit must not mind being repeated.
template <typename Visit>
inline void for_vectors(int64_t n, const Visit& visit) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) visit(i);
  if (i < n) visit(n - LANES);
}

// A group that is shorter than a vector, continued with its last element.
template <typename Raw>
struct Padded {
  Raw data[LANES];
  Padded() = default;
  Padded(const Raw* from, int64_t n) {
    for (int64_t i = 0; i < LANES; ++i) data[i] = from[std::min(i, n - 1)];
  }
  void copy_to(Raw* to, int64_t n) const { std::memcpy(to, data, n * sizeof(Raw)); }
};

}  // namespace mesa
