// Bit masks: one bit per element, in row-major order, low bit first.
#pragma once

#include "rows.h"

namespace mesa {

// Packs n flags (0 or 1, one per byte) to ceil(n / 8) bytes.
inline void pack_flags(const uint8_t* __restrict flags, uint8_t* __restrict bytes, int64_t n) {
  int64_t i = 0;
#if defined(MESA_AVX512)
  for (; i + 64 <= n; i += 64) {
    const __m512i x = _mm512_loadu_si512(flags + i);
    prefetch(flags + i + AHEAD);
    store(bytes + i / 8, _cvtmask64_u64(_mm512_test_epi8_mask(x, x)));
  }
#elif defined(__AVX2__)
  for (; i + 32 <= n; i += 32) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(flags + i));
    prefetch(flags + i + AHEAD);
    store(bytes + i / 8, _mm256_movemask_epi8(_mm256_slli_epi16(x, 7)));
  }
#endif
  for (; i < n; i += 8) {
    uint64_t w = 0;
    std::memcpy(&w, flags + i, std::min<int64_t>(8, n - i));
    // Flag k is at bit 8k. Among the terms of the product, only the flag's own term, 2**(56 - 7k),
    // moves it to bit 56 + k.
    bytes[i / 8] = static_cast<uint8_t>((w * 0x0102040810204080u) >> 56);
  }
}

// Flags of x > 0. A NaN counts as positive.
template <typename T>
inline void positive(const typename T::Raw* x, uint8_t* flags, int64_t n) {
  Padded<typename T::Raw> padded;
  Padded<uint8_t> last;
  const auto* const from = padded.read(x, n);
  uint8_t* const to = last.write(flags, n);
  for_vectors(std::max<int64_t>(n, LANES), [&](int64_t i) {
    store(to + i, to_bytes(std::bit_cast<Words>((T::load(from + i) <= 0) + 1)));
  });
  last.finish(flags, n);
}

// All ones if the bit of an element is set. i is a multiple of LANES.
inline Ints mask_at(const uint8_t* bytes, int64_t i) {
  uint32_t bits = bytes[i / 8];
  if constexpr (LANES == 16) bits |= static_cast<uint32_t>(bytes[i / 8 + 1]) << 8;
  if constexpr (LANES < 8) bits >>= i % 8;
  Words one;
  for (int k = 0; k < LANES; ++k) one[k] = 1u << k;
  return (all(bits) & one) != 0;
}

// x * scale if the bit is set, else 0. The first element's bit starts a byte.
template <typename T>
inline void apply_bits(const typename T::Raw* x, const uint8_t* bytes, typename T::Raw* out,
                       int64_t n, float scale) {
  const auto visit = [&](const auto* from, Ints mask, auto* to) {
    const Words kept = std::bit_cast<Words>(mask) & as_words(T::load(from) * scale);
    T::store(to, as_floats(kept));
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) visit(x + i, mask_at(bytes, i), out + i);
  if (i < n) {
    Padded<typename T::Raw> padded, result;
    uint8_t last[3] = {};  // as many bytes as mask_at reads
    std::memcpy(last, bytes + i / 8, ceil_div(n, 8) - i / 8);
    visit(padded.read(x + i, n - i), mask_at(last, i % 8), result.data);
    result.finish(out + i, n - i);
  }
}

inline void apply_bits(const double* x, const uint8_t* bytes, double* out, int64_t n,
                       double scale) {
  for (int64_t i = 0; i < n; ++i) out[i] = bytes[i / 8] >> i % 8 & 1 ? x[i] * scale : 0.0;
}

// run(begin, n) for pieces of [0, numel) that begin on a whole byte.
template <typename Run>
void parallel_pieces(int64_t numel, const Run& run) {
  torch::stable::parallel_for(0, ceil_div(numel, STRETCH), GRAIN / STRETCH,
                              [&](int64_t first, int64_t last) {
                                for (int64_t k = first; k < last; ++k) {
                                  run(k * STRETCH, std::min(STRETCH, numel - k * STRETCH));
                                }
                              });
}

// flags(begin, n, room) returns n flags, 0 or 1. It writes them to `room` unless they exist in
// memory already.
template <typename Flags>
Tensor encode_flags(int64_t numel, const Flags& flags) {
  Tensor bits = empty({ceil_div(numel, 8)}, ScalarType::Byte);
  uint8_t* const bytes = static_cast<uint8_t*>(bits.mutable_data_ptr());
  parallel_pieces(numel, [&](int64_t begin, int64_t n) {
    uint8_t room[STRETCH];
    pack_flags(flags(begin, n, room), bytes + begin / 8, n);
  });
  return bits;
}

}  // namespace mesa
