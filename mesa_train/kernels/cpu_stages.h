// The inner loops of the CPU kernels. Each stage walks a stretch of a row that fits the first-level
// cache (a few thousand floats), so that a stage knows one thing only (a dtype, a number of bits,
// an activation) and stages combine without a template for every combination. A stage costs about a
// cycle per vector: less than the memory traffic that the operator is there for.
//
// Loops are written for the compiler to vectorise: fixed trip counts or independent iterations,
// integers where floating-point comparisons would have to care for NaN. `reference.py` is the
// specification; built without FMA contraction, these agree with it code for code.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <torch/headeronly/util/Half.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

static_assert(std::endian::native == std::endian::little, "codes are packed through wider integers");

namespace mesa {

constexpr int LANES = 16;

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }

// --- a dtype to float32 and back ---

using Load = void (*)(const void*, float*, int64_t);
using Store = void (*)(const float*, void*, int64_t);

inline void load_float(const void* src, float* dst, int64_t n) { std::memcpy(dst, src, n * 4); }
inline void store_float(const float* src, void* dst, int64_t n) { std::memcpy(dst, src, n * 4); }

inline void load_double(const void* src, float* dst, int64_t n) {
  const double* from = static_cast<const double*>(src);
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(from[i]);
}

inline void store_double(const float* src, void* dst, int64_t n) {
  double* to = static_cast<double*>(dst);
  for (int64_t i = 0; i < n; ++i) to[i] = src[i];
}

inline void load_bfloat16(const void* src, float* dst, int64_t n) {
  const uint16_t* from = static_cast<const uint16_t*>(src);
  for (int64_t i = 0; i < n; ++i) dst[i] = as_float(static_cast<uint32_t>(from[i]) << 16);
}

inline void store_bfloat16(const float* src, void* dst, int64_t n) {
  uint16_t* to = static_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = as_bits(src[i]);
    const uint32_t even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : even);
  }
}

inline void load_half(const void* src, float* dst, int64_t n) {
  const uint16_t* from = static_cast<const uint16_t*>(src);
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < n; ++i) dst[i] = c10::Half(from[i], c10::Half::from_bits());
}

inline void store_half(const float* src, void* dst, int64_t n) {
  uint16_t* to = static_cast<uint16_t*>(dst);
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
#endif
  for (; i < n; ++i) to[i] = c10::Half(src[i]).x;
}

// --- float32 arithmetic ---

// For results that need not be equal to the reference bit for bit.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline void scale_shift(float* __restrict x, const float* __restrict weight,
                        const float* __restrict bias, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * weight[i] + bias[i];
}

inline void scale(float* __restrict x, const float* __restrict weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= weight[i];
}

inline void shift(float* __restrict x, const float* __restrict bias, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += bias[i];
}

inline void normalize(float* x, float minus, float times, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - minus) * times;
}

// A norm's backward reads its row twice. First the sums of d = grad * weight and of d * xhat, in a
// fixed order;
inline void norm_sums(const float* __restrict grad, const float* __restrict weight,
                      const float* __restrict xhat, int64_t n, float& sum_d, float& sum_dx) {
  float lane_d[LANES] = {}, lane_dx[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int k = 0; k < LANES; ++k) {
      const float d = grad[i + k] * weight[i + k];
      lane_d[k] += d;
      lane_dx[k] = fused(d, xhat[i + k], lane_dx[k]);
    }
  }
  for (; i < n; ++i) {
    const float d = grad[i] * weight[i];
    lane_d[i % LANES] += d;
    lane_dx[i % LANES] = fused(d, xhat[i], lane_dx[i % LANES]);
  }
  sum_d = sum_dx = 0;
  for (int k = 0; k < LANES; ++k) sum_d += lane_d[k], sum_dx += lane_dx[k];
}

// then x = rstd * (d - mean_d - xhat * mean_dx), where x holds xhat on entry, and the column sums.
inline void norm_project(const float* __restrict grad, const float* __restrict weight,
                         float* __restrict x, float* __restrict dweight, float* __restrict dbias,
                         float mean_d, float mean_dx, float rstd, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    dweight[i] = fused(grad[i], x[i], dweight[i]);
    dbias[i] += grad[i];
    x[i] = fused(-mean_dx, x[i], fused(grad[i], weight[i], -mean_d)) * rstd;
  }
}

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

// --- the grids of a stretch's groups ---

// Bits of a float in an order where integers compare like the numbers: minima and maxima vectorise,
// -0.0 is below 0.0, and NaN and infinity are at the ends, where one test a group finds them.
// Its own inverse.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

inline void find_range(const float* x, int64_t n, int32_t& low, int32_t& high) {
  int32_t least = std::numeric_limits<int32_t>::max(), most = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = ordered(std::bit_cast<int32_t>(x[i]));
    least = std::min(least, key);
    most = std::max(most, key);
  }
  low = least, high = most;
}

struct Grids {
  std::vector<int32_t> low, high;
  std::vector<float> zero, inverse;  // 0 and 0 for a group with NaN or infinity: its codes are 0
  std::vector<uint32_t> stored;      // scale in the low, zero in the high half, as bfloat16

  explicit Grids(int64_t groups)
      : low(groups), high(groups), zero(groups), inverse(groups), stored(groups) {}

  void make(const float* x, int64_t n, int64_t groups, int64_t size, int bits) {
    for (int64_t g = 0; g < groups; ++g) {
      find_range(x + g * size, std::min(size, n - g * size), low[g], high[g]);
    }
    compute(low.data(), high.data(), zero.data(), inverse.data(), stored.data(), groups, bits);
  }

 private:
  static void compute(const int32_t* __restrict low, const int32_t* __restrict high,
                      float* __restrict zeros, float* __restrict inverses,
                      uint32_t* __restrict stored, int64_t groups, int bits) {
    constexpr float largest = std::numeric_limits<float>::max();
    const float levels = static_cast<float>((1 << bits) - 1);
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t least = static_cast<uint32_t>(ordered(low[g]));
      const float most = as_float(static_cast<uint32_t>(ordered(high[g])));

      uint32_t down = least & 0xFFFF0000u;
      down += low[g] < 0 && down != least ? 0x10000u : 0u;
      down = down == 0x80000000u ? 0u : down;
      down = down == 0xFF800000u ? 0xFF7F0000u : down;
      const float zero = as_float(down);

      const float range = most - zero;
      uint32_t up = as_bits((range < largest ? range : largest) / levels);
      up = (up + 0xFFFF) & 0xFFFF0000u;
      up -= std::fabs(levels * as_float(up) + zero) <= largest ? 0u : 0x10000u;
      up = as_float(up) < std::numeric_limits<float>::min() ? 0u : up;

      // Masks, because the vectoriser gives up on a float that is stored conditionally.
      const uint32_t finite = low[g] > ~0x7F800000 && high[g] < 0x7F800000 ? ~0u : 0u;
      const uint32_t positive = up ? finite : 0u;
      zeros[g] = as_float(down & finite);
      inverses[g] = as_float(as_bits(1.0f / as_float(up)) & positive);
      stored[g] = ((up >> 16 | down) & finite) | (0x7FC07FC0u & ~finite);
    }
  }
};

// --- values to codes, one a byte ---

// lowbias32, https://nullprogram.com/blog/2018/07/31/
inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}

// NaN becomes 0.
inline float clamp(float v, float levels) {
  v = v > 0 ? v : 0;
  return v < levels ? v : levels;
}

inline void quantize_nearest(const float* __restrict x, uint8_t* __restrict q, int64_t n,
                             float zero, float inverse, int bits) {
  const float levels = static_cast<float>((1 << bits) - 1);
  for (int64_t i = 0; i < n; ++i) {
    const float v = clamp((x[i] - zero) * inverse, levels);
    // 1.5 * 2**23: the sum's last place is 1, so the addition itself rounds half to even.
    q[i] = static_cast<uint8_t>(as_bits(v + 12582912.0f));
  }
}

inline void quantize_stochastic(const float* __restrict x, uint8_t* __restrict q, int64_t n,
                                float zero, float inverse, int bits, uint32_t key,
                                uint32_t column) {
  const float levels = static_cast<float>((1 << bits) - 1);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t h = mix(key ^ (column + static_cast<uint32_t>(i)) * 0x9E3779B9u) >> 8;
    const float u = static_cast<float>(static_cast<int32_t>(h)) * 0x1p-24f;
    q[i] = static_cast<uint8_t>(static_cast<int32_t>(clamp((x[i] - zero) * inverse + u, levels)));
  }
}

// --- bits of a mask ---

// n flags (0 or 1, one a byte) to ceil(n / 8) bytes. Reads up to 7 flags past n.
inline void pack_flags(const uint8_t* __restrict flags, uint8_t* __restrict bytes, int64_t n) {
  for (int64_t i = 0; i < (n + 7) / 8; ++i) {
    uint64_t w;
    std::memcpy(&w, flags + 8 * i, 8);
    // Flag k stands at bit 8k; of the product's terms only its own, 2**(56 - 7k), lifts it to 56 + k.
    bytes[i] = static_cast<uint8_t>((w * 0x0102040810204080u) >> 56);
  }
}

// The inverse. Writes up to 7 flags past n.
inline void unpack_flags(const uint8_t* __restrict bytes, uint8_t* __restrict flags, int64_t n) {
  for (int64_t i = 0; i < (n + 7) / 8; ++i) {
    // A copy of the byte in each flag keeps its own bit k alone, and any bit carries into bit 7.
    uint64_t w = (bytes[i] * 0x0101010101010101u) & 0x8040201008040201u;
    w = ((w + 0x7F7F7F7F7F7F7F7Fu) | w) >> 7 & 0x0101010101010101u;
    std::memcpy(flags + 8 * i, &w, 8);
  }
}

// x * scale where the flag is set, else 0.
template <typename T>
inline void apply_flags(T* __restrict x, const uint8_t* __restrict flags, int64_t n, T scale) {
  for (int64_t i = 0; i < n; ++i) x[i] = flags[i] ? x[i] * scale : T(0);
}

}  // namespace mesa
