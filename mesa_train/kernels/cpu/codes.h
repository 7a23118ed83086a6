// Values to codes: the minimum and maximum of a group (its ends), its grid, and the rounding to the
// grid. `reference.py` is the specification. Built without FMA contraction, these functions agree
// with it code for code.
#pragma once

#include <limits>
#include <vector>

#include "blocks.h"

namespace mesa {

// --- bytes to codes ---

// The inverse of `pack`, for bits below 8. Writes up to 3 codes past n.
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

// --- values to codes: of n >= BLOCK elements, each in `width` bits: `bits`, or a byte ---

struct Width {
  int bits, width;
};

template <typename Source>
inline void quantize_nearest(const Source& x, uint8_t* to, int64_t n, float zero, float inverse,
                             Width size) {
  const auto code = [=](Floats v) { return rounded((v - zero) * inverse); };
  for_blocks(n, [&](int64_t i) {
    const Halves low = x.mapped(i, code), high = x.mapped(i + 2 * LANES, code);
    pack(narrowed(low, high), to + i * size.width / 8, size.width);
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
};

// Stochastic rounding: a code with its fraction in 16 bits, plus as many drawn bits. All of it
// takes half the width of a float.
template <typename Source>
inline void quantize_stochastic(const Source& x, uint8_t* to, int64_t n, float zero, float inverse,
                                Width size, const Draws& draws) {
  const int point = 16 - size.bits;
  const float step = inverse * static_cast<float>(1 << point);
  const auto code = [=](Floats v) { return rounded((v - zero) * step); };
  // A code is at most the highest code, and the drawn number is less than 1. So 16 bits hold the
  // sum.
  const auto half = [&](int64_t i) {
    return (x.mapped(i, code) + (draws.at(i) >> size.bits)) >> point;
  };
  for_blocks(n, [&](int64_t i) {
    pack(narrowed(half(i), half(i + 2 * LANES)), to + i * size.width / 8, size.width);
  });
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
