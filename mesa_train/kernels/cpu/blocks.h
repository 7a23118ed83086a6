// Blocks: the unit of the coding loops. The elements of a block become one register of bytes. To
// narrow four registers together takes half the instructions of narrowing each.
#pragma once

#include <type_traits>

#include "vector.h"

namespace mesa {

constexpr int64_t BLOCK = 4 * LANES;

using Halves = uint16_t __attribute__((vector_size(4 * LANES)));
using Packed = uint8_t __attribute__((vector_size(4 * LANES)));

// --- between widths, in order. The inputs fit, except the lowest integer, which becomes 0 ---

// To the nearest integer, half to even. NaN becomes the lowest integer, or 0.
inline Ints rounded(Floats x) {
#if defined(MESA_AVX512)
  return (Ints)_mm512_cvtps_epi32(x);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32(x);
#else
  // 1.5 * 2**23: the last place of the sum is 1, so the addition itself rounds half to even.
  const Floats positive = larger(x, Floats{}) + 12582912.0f;
  return std::bit_cast<Ints>(as_words(positive) & 0x3FFFFFu);
#endif
}

// The low halves of integers, alternating from `even` and `odd`.
inline Halves interleaved(Ints even, Ints odd) {
#if defined(MESA_AVX512)
  return (Halves)_mm512_mask_blend_epi16(0xAAAAAAAAu, (__m512i)even, (__m512i)(odd << 16));
#elif defined(__AVX2__)
  return (Halves)_mm256_blend_epi16((__m256i)even, (__m256i)(odd << 16), 0xAA);
#else
  return std::bit_cast<Halves>((even & 0xFFFF) | odd << 16);
#endif
}

inline Halves narrowed(Ints low, Ints high) {
#if defined(MESA_AVX512)
  const __m512i pairs = _mm512_packus_epi32((__m512i)low, (__m512i)high);
  return (Halves)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), pairs);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32((__m256i)low, (__m256i)high);
  return (Halves)_mm256_permute4x64_epi64(pairs, 0xD8);
#else
  const Shorts halves[2] = {__builtin_convertvector(low, Shorts),
                            __builtin_convertvector(high, Shorts)};
  return std::bit_cast<Halves>(halves);
#endif
}

inline Packed narrowed(Halves low, Halves high) {
#if defined(MESA_AVX512)
  const __m512i pairs = _mm512_packus_epi16((__m512i)low, (__m512i)high);
  return (Packed)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), pairs);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi16((__m256i)low, (__m256i)high);
  return (Packed)_mm256_permute4x64_epi64(pairs, 0xD8);
#elif defined(__SSE2__)
  return (Packed)_mm_packus_epi16((__m128i)low, (__m128i)high);
#else
  using Quarter = uint8_t __attribute__((vector_size(2 * LANES)));
  const Quarter bytes[2] = {__builtin_convertvector(low, Quarter),
                            __builtin_convertvector(high, Quarter)};
  return std::bit_cast<Packed>(bytes);
#endif
}

// f(Floats) -> Ints, for 2 * LANES elements. A word with two bfloat16 becomes two floats by a shift
// and a mask, without widening each.
template <typename T, typename F>
inline Halves mapped(const typename T::Raw* from, const F& f) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Words pairs = load<Words>(from);
    return interleaved(f(as_floats(pairs << 16)), f(as_floats(pairs & 0xFFFF0000u)));
  }
#endif
  return narrowed(f(T::load(from)), f(T::load(from + LANES)));
}

// --- to memory ---

// The planes of a code: the low bits and the high bits, stored apart. Each number of bits divides 8,
// and `high` is 0 for codes of one plane.
struct Planes {
  int low, high;
  explicit Planes(int bits)
      : low(bits >= 8 ? 8 : bits >= 4 ? 4 : 2), high(bits - low) {}
  int least() const { return high ? high : low; }
};

// Packs one plane of the codes of n elements, one per byte, to ceil(n * bits / 8) bytes. The plane
// has the `bits` bits from bit `first`. A packed byte is the sum of shifted neighbouring codes. Reads
// up to 7 codes past n.
inline void pack_plane(const uint8_t* __restrict q, uint8_t* __restrict bytes, int64_t n, int bits,
                       int first) {
  if (bits == 8) {
    std::memcpy(bytes, q, n);
  } else if (bits == 4) {
    for (int64_t i = 0; i < (n + 1) / 2; ++i) {
      uint16_t w;
      std::memcpy(&w, q + 2 * i, 2);
      w = w >> first & 0x0F0F;
      bytes[i] = static_cast<uint8_t>(w | w >> 4);
    }
  } else if (bits == 2) {
    for (int64_t i = 0; i < (n + 3) / 4; ++i) {
      uint32_t w;
      std::memcpy(&w, q + 4 * i, 4);
      w = w >> first & 0x03030303;
      bytes[i] = static_cast<uint8_t>(w | w >> 6 | w >> 12 | w >> 18);
    }
  } else {
    for (int64_t i = 0; i < (n + 7) / 8; ++i) {
      uint64_t w;
      std::memcpy(&w, q + 8 * i, 8);
      w = w >> first & 0x0101010101010101u;
      bytes[i] = static_cast<uint8_t>(w * 0x0102040810204080u >> 56);
    }
  }
}

// Packs one plane of the codes of a block, whose high bits above the plane are 0.
inline void pack(Packed q, uint8_t* bytes, int bits) {
  if (bits == 8) return store(bytes, q);
  if (bits == 1) {
#if defined(MESA_AVX512)
    return store(bytes, static_cast<uint64_t>(_mm512_test_epi8_mask((__m512i)q, (__m512i)q)));
#elif defined(__AVX2__)
    return store(bytes, _mm256_movemask_epi8(_mm256_slli_epi16((__m256i)q, 7)));
#endif
  }
#if defined(MESA_AVX512)
  // Adds neighbouring codes, the second one multiplied by a factor, which shifts it.
  if (bits == 4) {
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)q, _mm512_set1_epi16(0x1001));
    return store(bytes, _mm512_cvtepi16_epi8(pairs));
  }
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)q, _mm512_set1_epi16(0x0401));
  store(bytes, _mm512_cvtepi32_epi8(_mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001))));
#elif defined(__AVX2__)
  // The same. Each half of a register is narrowed separately.
  const __m256i factors = _mm256_set1_epi16(bits == 4 ? 0x1001 : 0x0401);
  __m256i codes = _mm256_maddubs_epi16((__m256i)q, factors);
  if (bits == 4) {
    codes = _mm256_permute4x64_epi64(_mm256_packus_epi16(codes, codes), 0x08);
    return store(bytes, _mm256_castsi256_si128(codes));
  }
  codes = _mm256_madd_epi16(codes, _mm256_set1_epi32(0x00100001));
  codes = _mm256_packus_epi32(codes, codes);
  codes = _mm256_permute4x64_epi64(_mm256_packus_epi16(codes, codes), 0x08);
  const __m128i words = _mm256_castsi256_si128(codes);
  store(bytes, _mm_cvtsi128_si64(_mm_shuffle_epi32(words, 0x08)));
#else
  uint8_t codes[BLOCK];
  store(codes, q);
  pack_plane(codes, bytes, BLOCK, bits, 0);
#endif
}

// Where the codes of a group go: in `bits` bits, or each in a byte.
struct Target {
  uint8_t* to;
  uint8_t* high;  // the plane of the high bits, if there is one
  Planes planes;  // of the stored form

  // Stores the codes of a block that begins with the i-th element.
  void put(int64_t i, Packed q) const {
    if (planes.high == 0) return pack(q, to + i * planes.low / 8, planes.low);
    const auto mask = static_cast<uint8_t>((1 << planes.low) - 1);
    pack(q & mask, to + i * planes.low / 8, planes.low);
    pack(q >> static_cast<uint8_t>(planes.low), high + i * planes.high / 8, planes.high);
  }
};

// --- the maximum of a vector ---

inline uint32_t largest(Words x) {
#if defined(MESA_AVX512)
  return _mm512_reduce_max_epu32((__m512i)x);
#elif defined(__AVX2__)
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128((__m256i)x),
                               _mm256_extracti128_si256((__m256i)x, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4E));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(most));
#else
  uint32_t most = x[0];
  for (int k = 1; k < LANES; ++k) most = std::max<uint32_t>(most, x[k]);
  return most;
#endif
}

inline uint32_t largest(Halves x) {
#if defined(__AVX2__)
#if defined(MESA_AVX512)
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256((__m512i)x),
                                        _mm512_extracti64x4_epi64((__m512i)x, 1));
#else
  const __m256i half = (__m256i)x;
#endif
  const __m128i quarter =
      _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
  return ~_mm_cvtsi128_si32(least) & 0xFFFF;
#else
  uint32_t most = x[0];
  for (int k = 1; k < 2 * LANES; ++k) most = std::max<uint32_t>(most, x[k]);
  return most;
#endif
}

// --- loops ---

// visit(i) for blocks that cover [0, n), n >= BLOCK. The last block may overlap the block before.
template <typename Visit>
inline void for_blocks(int64_t n, const Visit& visit) {
  for (int64_t i = 0; i < n; i += BLOCK) visit(std::min(i, n - BLOCK));
}

}  // namespace mesa
