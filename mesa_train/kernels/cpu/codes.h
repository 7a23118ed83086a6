// Values to codes: the minimum and maximum of a group (its ends), its grid, and the rounding to the
// grid. `reference.py` is the specification. Built without FMA contraction, these functions agree
// with it code for code.
#pragma once

#include <limits>
#include <vector>

#include "blocks.h"

namespace mesa {

// --- bytes to codes ---

// The inverse of `pack_plane` for the plane of the low bits, for 4 or 2 bits. Writes up to 3 codes
// past n.
inline void unpack_low(const uint8_t* __restrict bytes, uint8_t* __restrict q, int64_t n, int bits) {
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

// Adds the plane of the high bits, 2 or 1, to unpacked low bits. Writes up to 7 codes past n.
inline void unpack_high(const uint8_t* __restrict bytes, uint8_t* __restrict q, int64_t n, int bits,
                        int first) {
  if (bits == 2) {
    for (int64_t i = 0; i < (n + 3) / 4; ++i) {
      const uint32_t b = bytes[i];
      uint32_t w;
      std::memcpy(&w, q + 4 * i, 4);
      w |= ((b | b << 6 | b << 12 | b << 18) & 0x03030303) << first;
      std::memcpy(q + 4 * i, &w, 4);
    }
    return;
  }
  int64_t i = 0;
#if defined(MESA_AVX512)
  for (; i + 64 <= n; i += 64) {
    const __m512i high = _mm512_maskz_set1_epi8(load<uint64_t>(bytes + i / 8), 1 << first);
    _mm512_storeu_si512(q + i, _mm512_or_si512(_mm512_loadu_si512(q + i), high));
  }
#elif defined(__AVX2__)
  const __m256i place = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i high = _mm256_set1_epi8(static_cast<char>(1 << first));
  for (; i + 32 <= n; i += 32) {
    __m256i w = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(bytes + i / 8)), place);
    w = _mm256_cmpeq_epi8(_mm256_and_si256(w, bit), bit);
    auto* const at = reinterpret_cast<__m256i*>(q + i);
    _mm256_storeu_si256(at, _mm256_or_si256(_mm256_loadu_si256(at), _mm256_and_si256(w, high)));
  }
#endif
  for (; i < n; i += 8) {
    const uint64_t spread = bytes[i / 8] * uint64_t{0x0101010101010101} & 0x8040201008040201u;
    uint64_t w;
    std::memcpy(&w, q + i, 8);
    w |= ((spread + 0x7F7F7F7F7F7F7F7Fu) >> 7 & 0x0101010101010101u) << first;
    std::memcpy(q + i, &w, 8);
  }
}

// The stored form of a grid.
struct Grid {
  uint16_t scale_bits, zero_bits;
  float scale() const { return as_float(static_cast<uint32_t>(scale_bits) << 16); }
  float zero() const { return as_float(static_cast<uint32_t>(zero_bits) << 16); }
};

// --- sources: the elements of a group, read twice, because the group stays in the cache ---

template <typename T>
struct Plain {
  using Dtype = T;
  const typename T::Raw* x;
  Floats at(int64_t i) const { return T::load(x + i); }
  template <typename F>
  Halves mapped(int64_t i, const F& f) const {
    return mesa::mapped<T>(x + i, f);
  }
  Plain on(const typename T::Raw* other) const { return {other}; }
};

// (x - mean) * rstd. To subtract 0.0 is exact, so a mean of 0 has the same result as no mean.
template <typename T>
struct Normalized {
  using Dtype = T;
  const typename T::Raw* x;
  float mean, rstd;
  Floats at(int64_t i) const { return (T::load(x + i) - mean) * rstd; }
  template <typename F>
  Halves mapped(int64_t i, const F& f) const {
    return mesa::mapped<T>(x + i, [&](Floats v) { return f((v - mean) * rstd); });
  }
  Normalized on(const typename T::Raw* other) const { return {other, mean, rstd}; }
};

// --- the ends of a group ---

// The bits of the lowest and the highest float. If the group has a NaN or an infinity, the bits of
// that.
struct Ends {
  uint32_t low, high;
};

// Finds the ends of n elements. bits_at(i) is a vector of unsigned integers: the high bits of the
// floats from i.
//
// The bits of floats, as integers, compare like the floats, except that negative floats are in
// reverse order. NaN and infinity are at the ends of the order, so one test per group finds them.
// The largest unsigned integer is the lowest float, if there is a negative float. The largest
// signed integer is the highest float, if there is a non-negative float.
template <typename Signed, typename BitsAt>
inline Ends scan_ends(int64_t n, const BitsAt& bits_at) {
  using Bits = decltype(bits_at(0));
  constexpr int64_t step = sizeof(Bits) / sizeof(Bits{}[0]);
  constexpr int width = 8 * sizeof(Bits{}[0]);
  constexpr uint32_t ones = ~0u >> (32 - width), sign = 1u << (width - 1);
  const Bits flip = sign - Bits{};
  Signed as_signed = std::bit_cast<Signed>(bits_at(0));
  Bits as_unsigned = bits_at(0);
  const auto visit = [&](Bits bits) {
    const Signed key = std::bit_cast<Signed>(bits);
    as_signed = as_signed > key ? as_signed : key;
    as_unsigned = as_unsigned > bits ? as_unsigned : bits;
  };
  int64_t next = step;
  for (; next + step <= n; next += step) visit(bits_at(next));
  if (next < n) visit(bits_at(n - step));
  uint32_t high = largest(std::bit_cast<Bits>(as_signed) ^ flip) ^ sign;
  uint32_t low = largest(as_unsigned);
  if (high >= sign || low < sign) [[unlikely]] {
    Bits inverted{};
    for (int64_t i = 0; i < n; i += step) {
      const Bits bits = ~bits_at(std::min(i, n - step));
      inverted = inverted > bits ? inverted : bits;
    }
    (high >= sign ? high : low) = ~largest(inverted) & ones;
  }
  return {low << (32 - width), high << (32 - width)};
}

template <typename Source>
inline Ends find_ends(const Source& x, int64_t n) {
  return scan_ends<Ints>(n, [&](int64_t i) { return as_words(x.at(i)); });
}

// bfloat16 without conversion: twice as many elements at once.
inline Ends find_ends(const Plain<BFloat16>& x, int64_t n) {
  using SignedHalves = int16_t __attribute__((vector_size(4 * LANES)));
  return scan_ends<SignedHalves>(n, [&](int64_t i) { return load<Halves>(x.x + i); });
}

// A rounded subtraction or multiplication keeps the order of its inputs, and a negative rstd
// reverses it. So the ends of the normalised values are the normalised ends.
template <typename T>
inline Ends find_ends(const Normalized<T>& x, int64_t n) {
  const Ends raw = find_ends(Plain<T>{x.x}, n);
  const uint32_t low = as_bits((as_float(raw.low) - x.mean) * x.rstd);
  const uint32_t high = as_bits((as_float(raw.high) - x.mean) * x.rstd);
  return x.rstd < 0 ? Ends{high, low} : Ends{low, high};
}

// --- the grids of the groups that are coded together ---

struct Grids {
  static constexpr int64_t ROOM = 16;
  static_assert(ROOM % LANES == 0);
  uint32_t low[ROOM] = {}, high[ROOM] = {};  // the ends of the groups
  float zero[ROOM], inverse[ROOM];  // both 0 for a group with NaN or infinity, so its codes are 0
  uint32_t stored[ROOM];            // scale in the low half, zero in the high half, as bfloat16
  // Whether a code and its fraction, in 16 bits, may overflow in between: for numbers of about 1e38
  // or 1e-30.
  uint32_t extreme[ROOM];

  void set(int64_t k, Ends ends) { low[k] = ends.low, high[k] = ends.high; }

  // Computes all grids, also the unused ones. The vectors are written by hand: g++ compiles a loop
  // of numbers with branches, and then the 16 grids take as long as the codes of their groups.
  void compute(int bits) {
    const float levels = static_cast<float>((1 << bits) - 1);
    for (int64_t g = 0; g < ROOM; g += LANES) compute(g, levels);
  }

 private:
  // `value` if the mask is set, else 0.
  static Words where(Ints mask, uint32_t value) { return std::bit_cast<Words>(mask) & value; }

  void compute(int64_t g, float levels) {
    constexpr float largest = std::numeric_limits<float>::max();
    const Words lowest = load<Words>(low + g), highest = load<Words>(high + g);
    const Floats most = as_floats(highest);

    Words down = lowest & 0xFFFF0000u;
    down += where((lowest >= 0x80000000u) & (down != lowest), 0x10000u);
    down &= ~where(down == 0x80000000u, ~0u);
    down -= where(down == 0xFF800000u, 0x10000u);
    const Floats bottom = as_floats(down);

    const Floats range = most - bottom;
    Words up = as_words(smaller(range, all(largest)) / levels);
    up = (up + 0xFFFF) & 0xFFFF0000u;
    const Words cut = ~where(absolute(levels * as_floats(up) + bottom) <= largest, ~0u) & 0x10000u;
    up -= cut;
    up &= ~where(as_floats(up) < std::numeric_limits<float>::min(), ~0u);

    const Words finite = where((~lowest & 0x7F800000u) != 0, ~0u) &
                         where((~highest & 0x7F800000u) != 0, ~0u);
    const Words positive = where(up != 0, ~0u) & finite;
    store(zero + g, down & finite);
    store(inverse + g, as_words(1.0f / as_floats(up)) & positive);
    store(stored + g, ((up >> 16 | down) & finite) | (0x7FC07FC0u & ~finite));
    const Words unlike = cut | (~where(range <= largest, ~0u) & 1u) |
                         where(as_floats(up) < 0x1p-100f, 1u);
    store(extreme + g, unlike & positive);
  }
};

// --- values to codes: of n >= BLOCK elements ---

template <typename Source>
inline void quantize_nearest(const Source& x, const Target& to, int64_t n, float zero,
                             float inverse) {
  const auto code = [=](Floats v) { return rounded((v - zero) * inverse); };
  for_blocks(n, [&](int64_t i) {
    const Halves low = x.mapped(i, code), high = x.mapped(i + 2 * LANES, code);
    to.put(i, narrowed(low, high));
  });
}

// lowbias32, https://nullprogram.com/blog/2018/07/31/
inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}

// 16 drawn bits for each element of a group. The bits of the element's mixed index are multiplied
// by one half of the group's key, and the other half is added.
struct Draws {
  const uint16_t* elements;
  uint16_t factor, offset;

  static std::vector<uint16_t> mixed(int64_t n) {
    std::vector<uint16_t> values(std::max(n, BLOCK));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<uint16_t>(mix(static_cast<uint32_t>(i)) >> 16);
    }
    return values;
  }
  Halves at(int64_t i) const { return load<Halves>(elements + i) * factor + offset; }
  uint16_t one(int64_t i) const { return static_cast<uint16_t>(elements[i] * factor + offset); }

  // `index`: of the group in its tensor.
  static Draws of(const uint16_t* elements, Grid grid, int64_t index, int64_t seed) {
    const uint32_t stored = grid.scale_bits | static_cast<uint32_t>(grid.zero_bits) << 16;
    const uint32_t key =
        mix(stored ^ mix(static_cast<uint32_t>(index) ^ static_cast<uint32_t>(seed)));
    return {elements, static_cast<uint16_t>(key | 1), static_cast<uint16_t>(key >> 16)};
  }
};

// --- codes with their draws subtracted (subtractive dither) ---

// A code and its draw as one integer of 16 bits: the code in the high bits, the draw's complement in
// the low bits. Times 1 / 2**point, less `middle`, it is the code less the draw plus the mean draw.
// Both steps are exact in float32.
struct Dithered {
  int bits, point;
  float step, middle;

  explicit Dithered(int bits_)
      : bits(bits_), point(16 - bits_), step(1.0f / static_cast<float>(1 << point)),
        middle(static_cast<float>((1 << point) - 1) / 2) {}

  // The scale and the zero for the integer itself, up to a rounding.
  float scale(Grid grid) const { return grid.scale() * step; }
  float zero(Grid grid) const { return grid.zero() - middle * scale(grid); }

  // The value of a group with this scale and zero, rounded as the specification.
  Floats value(const uint16_t* n, float scale, float zero) const {
    const Floats integer = floats(std::bit_cast<Ints>(widen(load<Shorts>(n))));
    return (integer - middle) * step * scale + zero;
  }

  // The integers of the n codes of a group.
  void combine(const uint8_t* q, uint16_t* to, int64_t n, Grid grid, const Draws& draws) const {
    constexpr uint16_t undithered = 0x6F80;  // the scale 2**96
    const bool drawn = grid.scale_bits < undithered;
    const Draws complement{draws.elements, static_cast<uint16_t>(drawn ? -draws.factor : 0),
                           static_cast<uint16_t>(drawn ? ~draws.offset : 0x7FFF)};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
      store(to + i, to_halves(q + i) << point | complement.at(i) >> bits);
    }
    for (; i < n; ++i) to[i] = static_cast<uint16_t>(q[i] << point | complement.one(i) >> bits);
  }

 private:
  // 2 * LANES bytes, each in 16 bits.
  static Halves to_halves(const uint8_t* q) {
#if defined(MESA_AVX512)
    return (Halves)_mm512_cvtepu8_epi16(load<__m256i>(q));
#elif defined(__AVX2__)
    return (Halves)_mm256_cvtepu8_epi16(load<__m128i>(q));
#else
    using Narrow = uint8_t __attribute__((vector_size(2 * LANES)));
    return __builtin_convertvector(load<Narrow>(q), Halves);
#endif
  }
};

// Stochastic rounding: a code with its fraction in 16 bits, plus as many drawn bits. All of it
// takes half the width of a float.
template <typename Source>
inline void quantize_stochastic(const Source& x, const Target& to, int64_t n, float zero,
                                float inverse, int bits, const Draws& draws) {
  const int point = 16 - bits;
  const float step = inverse * static_cast<float>(1 << point);
  const auto code = [=](Floats v) { return rounded((v - zero) * step); };
  // A code is at most the highest code, and the drawn number is less than 1. So 16 bits hold the
  // sum.
  const auto half = [&](int64_t i) {
    return (x.mapped(i, code) + (draws.at(i) >> bits)) >> point;
  };
  for_blocks(n, [&](int64_t i) { to.put(i, narrowed(half(i), half(i + 2 * LANES))); });
}

// The same for extreme groups. Without draws it rounds to nearest. Each code takes a byte.
template <typename Source>
[[gnu::noinline]] void quantize_extreme(const Source& x, uint8_t* q, int64_t n, float zero,
                                        float inverse, int bits, const Draws* draws) {
  const int point = draws ? 16 - bits : 0;
  const float top = static_cast<float>((1 << (draws ? 16 : bits)) - 1);
  for_vectors(n, [&](int64_t i) {
    const Floats v = (x.at(i) - zero) * inverse * static_cast<float>(1 << point);
    const Ints codes = rounded(smaller(larger(v, Floats{}), all(top)));  // NaN becomes 0
    for (int k = 0; k < LANES; ++k) {
      const int drawn = draws ? draws->one(i + k) >> bits : 0;
      q[i + k] = static_cast<uint8_t>(std::min(codes[k] + drawn, 65535) >> point);
    }
  });
}

}  // namespace mesa
