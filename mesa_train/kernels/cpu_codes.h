// Values to codes: packing bits, the ends of a group, its grid, and the rounding to it.
// `reference.py` is the specification; built without FMA contraction, these agree with it code for
// code.
#pragma once

#include <limits>

#include "cpu_vector.h"

namespace mesa {

// --- codes to bytes and back: low bits first, so a byte is neighbours shifted together ---

// Codes of n elements, one a byte, to ceil(n * bits / 8) bytes. Reads up to 3 codes past n.
inline void pack(const uint8_t* __restrict q, uint8_t* __restrict bytes, int64_t n, int bits) {
  if (bits == 8) {
    std::memcpy(bytes, q, n);
  } else if (bits == 4) {
    for (int64_t i = 0; i < (n + 1) / 2; ++i) {
      uint16_t w;
      std::memcpy(&w, q + 2 * i, 2);
      bytes[i] = static_cast<uint8_t>(w | w >> 4);
    }
  } else {
    for (int64_t i = 0; i < (n + 3) / 4; ++i) {
      uint32_t w;
      std::memcpy(&w, q + 4 * i, 4);
      bytes[i] = static_cast<uint8_t>(w | w >> 6 | w >> 12 | w >> 18);
    }
  }
}

// The inverse for bits below 8. Writes up to 3 codes past n.
inline void unpack(const uint8_t* __restrict bytes, uint8_t* __restrict q, int64_t n, int bits) {
  if (bits == 4) {
    for (int64_t i = 0; i < (n + 1) / 2; ++i) {
      const uint16_t w = (bytes[i] | bytes[i] << 4) & 0x0F0F;
      std::memcpy(q + 2 * i, &w, 2);
    }
  } else {
    for (int64_t i = 0; i < (n + 3) / 4; ++i) {
      const uint32_t b = bytes[i];
      const uint32_t w = (b | b << 6 | b << 12 | b << 18) & 0x03030303;
      std::memcpy(q + 4 * i, &w, 4);
    }
  }
}

// What is stored of a grid.
struct Grid {
  uint16_t scale_bits, zero_bits;
  float scale() const { return as_float(static_cast<uint32_t>(scale_bits) << 16); }
  float zero() const { return as_float(static_cast<uint32_t>(zero_bits) << 16); }
};

// --- rows that are coded: what a group is read through, twice, since it stays in the cache ---

template <typename T>
struct Plain {
  using Dtype = T;
  const typename T::Raw* x;
  Floats at(int64_t i) const { return T::load(x + i); }
  Plain on(const typename T::Raw* other) const { return {other}; }
};

// (x - mean) * rstd. Less 0.0 is exact, so no mean is a mean of 0.
template <typename T>
struct Normalized {
  using Dtype = T;
  const typename T::Raw* x;
  float mean, rstd;
  Floats at(int64_t i) const { return (T::load(x + i) - mean) * rstd; }
  Normalized on(const typename T::Raw* other) const { return {other, mean, rstd}; }
};

// --- the ends of a group ---

// Bits of a float in an order where integers compare like the numbers: -0.0 is below 0.0, and NaN and
// infinity are at the ends, where one test a group finds them. Its own inverse.
template <typename I>
inline I ordered(I bits) {
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

struct Ends {
  int32_t low, high;
};

inline Ends ends_of(Ints low, Ints high) {
#if defined(MESA_AVX512)
  return {_mm512_reduce_min_epi32((__m512i)low), _mm512_reduce_max_epi32((__m512i)high)};
#else
  Ends ends{low[0], high[0]};
  for (int k = 1; k < LANES; ++k) {
    ends.low = std::min<int32_t>(ends.low, low[k]);
    ends.high = std::max<int32_t>(ends.high, high[k]);
  }
  return ends;
#endif
}

template <typename Source>
inline Ends find_ends(const Source& x, int64_t n) {
  Ints low = std::numeric_limits<int32_t>::max() - Ints{};
  Ints high = std::numeric_limits<int32_t>::min() - Ints{};
  for_vectors(n, [&](int64_t i) {
    const Ints key = ordered(std::bit_cast<Ints>(x.at(i)));
    low = smaller(low, key);
    high = larger(high, key);
  });
  return ends_of(low, high);
}

// Of bfloat16 as it is, twice as many at once: as integers of its own 16 bits.
inline Ends find_ends(const Plain<BFloat16>& x, int64_t n) {
  using Keys = int16_t __attribute__((vector_size(4 * LANES)));
  if (n < 2 * LANES) return find_ends<Plain<BFloat16>>(x, n);
  Keys low = std::numeric_limits<int16_t>::max() - Keys{};
  Keys high = std::numeric_limits<int16_t>::min() - Keys{};
  const auto visit = [&](int64_t i) {
    const Keys bits = load<Keys>(x.x + i), key = bits ^ ((bits >> 15) & 0x7FFF);
    low = key < low ? key : low;
    high = key > high ? key : high;
  };
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) visit(i);
  if (i < n) visit(n - 2 * LANES);
  // Odd and even elements as 32 bits, then the low half of a float that has 16 bits: ordered, the
  // ones of a negative number.
  const Ints lows = std::bit_cast<Ints>(low), highs = std::bit_cast<Ints>(high);
  Ends ends = ends_of(smaller(lows >> 16, lows << 16 >> 16), larger(highs >> 16, highs << 16 >> 16));
  for (int32_t* const key : {&ends.low, &ends.high}) {
    *key = static_cast<int32_t>(static_cast<uint32_t>(*key) << 16 | (*key < 0 ? 0xFFFFu : 0u));
  }
  return ends;
}

// --- the grids of the groups that are coded together ---

struct Grids {
  static constexpr int64_t ROOM = 16;
  Ends ends[ROOM] = {};
  float zero[ROOM], inverse[ROOM];  // 0 and 0 for a group with NaN or infinity: its codes are 0
  uint32_t stored[ROOM];            // scale in the low, zero in the high half, as bfloat16

  // All of them whether they are needed or not: a loop of a fixed length is a few vectors.
  void compute(int bits) {
    constexpr float largest = std::numeric_limits<float>::max();
    const float levels = static_cast<float>((1 << bits) - 1);
    for (int64_t g = 0; g < ROOM; ++g) {
      const int32_t low = ends[g].low, high = ends[g].high;
      const uint32_t least = static_cast<uint32_t>(ordered(low));
      const float most = as_float(static_cast<uint32_t>(ordered(high)));

      uint32_t down = least & 0xFFFF0000u;
      down += low < 0 && down != least ? 0x10000u : 0u;
      down = down == 0x80000000u ? 0u : down;
      down = down == 0xFF800000u ? 0xFF7F0000u : down;
      const float bottom = as_float(down);

      const float range = most - bottom;
      uint32_t up = as_bits((range < largest ? range : largest) / levels);
      up = (up + 0xFFFF) & 0xFFFF0000u;
      up -= std::fabs(levels * as_float(up) + bottom) <= largest ? 0u : 0x10000u;
      up = as_float(up) < std::numeric_limits<float>::min() ? 0u : up;

      // Masks, because the vectoriser gives up on a float that is stored conditionally.
      const uint32_t finite = low > ~0x7F800000 && high < 0x7F800000 ? ~0u : 0u;
      const uint32_t positive = up ? finite : 0u;
      zero[g] = as_float(down & finite);
      inverse[g] = as_float(as_bits(1.0f / as_float(up)) & positive);
      stored[g] = ((up >> 16 | down) & finite) | (0x7FC07FC0u & ~finite);
    }
  }
};

// --- values to codes, one a byte ---

// lowbias32, https://nullprogram.com/blog/2018/07/31/
template <typename W>
inline W mix(W x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}

inline Floats clamp(Floats v, float levels) {  // NaN becomes 0.
  return smaller(larger(v, Floats{}), all(levels));
}

template <typename Source>
inline void quantize_nearest(const Source& x, uint8_t* q, int64_t n, float zero, float inverse,
                             int bits) {
  const float levels = static_cast<float>((1 << bits) - 1);
  for_vectors(n, [&](int64_t i) {
    const Floats v = clamp((x.at(i) - zero) * inverse, levels);
    // 1.5 * 2**23: the sum's last place is 1, so the addition itself rounds half to even.
    store(q + i, to_bytes(as_words(v + 12582912.0f)));
  });
}

// `column` is that of the group's first element, `key` its hash.
template <typename Source>
inline void quantize_stochastic(const Source& x, uint8_t* q, int64_t n, float zero, float inverse,
                                int bits, uint32_t key, uint32_t column) {
  const float levels = static_cast<float>((1 << bits) - 1);
  constexpr uint32_t golden = 0x9E3779B9u;
  Words spread;  // (column + i) * golden, carried along
  for (int k = 0; k < LANES; ++k) spread[k] = (column + k) * golden;
  int64_t at = 0;
  for_vectors(n, [&](int64_t i) {
    if (i != at) spread += static_cast<uint32_t>(i - at) * golden;
    const Floats h = floats(std::bit_cast<Ints>(mix(spread ^ key) >> 8));
    // The product is exact, so the sum is rounded once however it is computed.
    const Floats v = clamp(fused(h, all(0x1p-24f), (x.at(i) - zero) * inverse), levels);
    store(q + i, to_bytes(std::bit_cast<Words>(__builtin_convertvector(v, Ints))));
    spread += static_cast<uint32_t>(LANES) * golden;
    at = i + LANES;
  });
}

}  // namespace mesa
