// Vectors of a register's width and a few operations on them, for the inner loops of the CPU
// kernels.
//
// The types are the compiler's vector extension (g++ and clang++). So arithmetic, comparisons and
// selections are written as for numbers, and compile for any processor. Some instructions have no
// form in the extension. They are used under the processor's macro, beside a plain version that
// gives the same bits. Only `fused` rounds differently without FMA.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
// Included only if no instruction converts float16: reading this header takes a second.
#if !(defined(__AVX2__) && defined(__F16C__))
#include <torch/headeronly/util/Half.h>
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

// --- memory ---

// Allocates on whole cache lines. A vector across two lines takes twice as long to load or store.
template <typename T>
struct OnLines {
  using value_type = T;
  static constexpr std::align_val_t LINE{64};
  OnLines() = default;
  template <typename U>
  OnLines(const OnLines<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
  void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
  bool operator==(const OnLines&) const = default;
};

// --- between widths: the extension has these too, but g++ splits the vectors for them ---

inline Ints widen(Bytes x) {
#if defined(MESA_AVX512)
  return (Ints)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_set_epi64x(0, std::bit_cast<int64_t>(x)));
#else
  return __builtin_convertvector(x, Ints);
#endif
}

inline Words widen(Shorts x) {
#if defined(MESA_AVX512)
  return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}

// The low bytes of the words.
inline Bytes to_bytes(Words x) {
#if defined(MESA_AVX512)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256((__m256i)x, _mm256_set1_epi32(255));
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  return std::bit_cast<Bytes>(_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves)));
#else
  return __builtin_convertvector(x, Bytes);
#endif
}

// The high halves of the words.
inline Shorts to_shorts(Words x) {
#if defined(MESA_AVX512)
  return (Shorts)_mm512_cvtepi32_epi16((__m512i)(x >> 16));
#elif defined(__AVX2__)
  const __m256i high = (__m256i)(x >> 16);
  return (Shorts)_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
#else
  return __builtin_convertvector(x >> 16, Shorts);
#endif
}

inline Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats floats(Bytes x) { return floats(widen(x)); }

// --- arithmetic ---

// If `a` is NaN, the result is b.
inline Floats larger(Floats a, Floats b) {
#if defined(MESA_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Floats smaller(Floats a, Floats b) {
#if defined(MESA_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// a * b + c. For results that need not equal the reference bit for bit.
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

inline float sum(Floats x) {
#if defined(MESA_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  float total = 0;
  for (int k = 0; k < LANES; ++k) total += x[k];
  return total;
#endif
}

// A lookup table: a function of the codes below 16. It is in registers if they have space for all
// values.
struct Table {
#if defined(MESA_AVX512)
  Floats values;
#elif defined(__AVX2__)
  Floats low, high;
#else
  float values[16];
#endif

  template <typename F>
  void fill(const F& f) {
    Floats code;
    for (int k = 0; k < LANES; ++k) code[k] = static_cast<float>(k);
#if defined(MESA_AVX512)
    values = f(code);
#elif defined(__AVX2__)
    low = f(code), high = f(code + 8.0f);
#else
    for (int q = 0; q < 16; q += LANES) store(values + q, f(code + static_cast<float>(q)));
#endif
  }
  Floats operator[](Bytes q) const {
#if defined(MESA_AVX512)
    return _mm512_permutexvar_ps((__m512i)widen(q), values);
#elif defined(__AVX2__)
    // Only the three low bits of an index are used. The fourth bit becomes the sign that selects
    // the half.
    const __m256i index = (__m256i)widen(q);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                            _mm256_permutevar8x32_ps(high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
#else
    Floats v;
    for (int k = 0; k < LANES; ++k) v[k] = values[q[k]];
    return v;
#endif
  }
};

// --- dtypes: how LANES elements are read and written ---

struct Float32 {
  using Raw = float;
  static Floats load(const Raw* from) { return mesa::load<Floats>(from); }
  static void store(Raw* to, Floats x) { mesa::store(to, x); }
  static void store(Raw* to, Floats low, Floats high) { store(to, low), store(to + LANES, high); }
  static void store_flushed(Raw* to, Floats low, Floats high) { store(to, low, high); }
};

struct BFloat16 {
  using Raw = uint16_t;
  static Floats load(const Raw* from) {
    return as_floats(widen(mesa::load<Shorts>(from)) << 16);
  }
  // Rounds to nearest, half to even; every NaN becomes 0x7FC0. The processor's instruction flushes
  // denormals and keeps a NaN's payload, so it is used for vectors without either.
  static void store(Raw* to, Floats x) {
#if defined(MESA_AVX512) && defined(__AVX512BF16__) && defined(__AVX512DQ__)
    if (_mm512_fpclass_ps_mask(x, SPECIAL) == 0) [[likely]] {
      const __m256bh narrow = _mm512_cvtneps_pbh(x);
      return std::memcpy(to, &narrow, sizeof narrow), void();
    }
#endif
    store_any(to, x);
  }
  // Two vectors with one test and one store.
  static void store(Raw* to, Floats low, Floats high) {
#if defined(MESA_AVX512) && defined(__AVX512BF16__) && defined(__AVX512DQ__)
    if (_kortestz_mask16_u8(_mm512_fpclass_ps_mask(low, SPECIAL),
                            _mm512_fpclass_ps_mask(high, SPECIAL))) [[likely]] {
      const __m512bh narrow = _mm512_cvtne2ps_pbh(high, low);
      return std::memcpy(to, &narrow, sizeof narrow), void();
    }
#endif
    store_any(to, low), store_any(to + LANES, high);
  }
  // Without the test: a denormal may become 0, and a NaN may become any NaN.
  static void store_flushed(Raw* to, Floats low, Floats high) {
#if defined(MESA_AVX512) && defined(__AVX512BF16__)
    const __m512bh narrow = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(to, &narrow, sizeof narrow);
#else
    store_any(to, low), store_any(to + LANES, high);
#endif
  }

 private:
  static constexpr int SPECIAL = 0x01 | 0x20 | 0x80;  // quiet NaN, denormal, signalling NaN
  static void store_any(Raw* to, Floats x) {
    const Words bits = as_words(x);
    const Words even = bits + 0x7FFF + ((bits >> 16) & 1);
    const Words kept = (x == x) ? even : all(0x7FC00000u);
    mesa::store(to, to_shorts(kept));
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
  static void store(Raw* to, Floats low, Floats high) { store(to, low), store(to + LANES, high); }
  static void store_flushed(Raw* to, Floats low, Floats high) { store(to, low, high); }
};

// --- loops ---

// Prefetches one line. The hardware prefetches a long run by itself. It does not prefetch the next
// of many short rows, and it does not prefetch enough of a run while it waits for arithmetic. Any
// address is valid, also beyond an end.
inline void prefetch(const void* from) { __builtin_prefetch(from); }
// Prefetches to the second-level cache. This cache can wait for more lines at once than the
// first-level cache. With the limit of the first-level cache, short rows that are far apart take a
// third longer.
inline void prefetch_far(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
  }
}
// How many elements ahead a loop prefetches, for every element size.
constexpr int64_t AHEAD = 1024;

// visit(i) for vectors that cover [0, n), n >= LANES. If n is no multiple of LANES, the last vector
// overlaps the one before. So a repeated visit must give the same result. The loop contains a
// single call, which the compiler inlines even if it is long.
template <typename Visit>
inline void for_vectors(int64_t n, const Visit& visit) {
  for (int64_t i = 0; i < n; i += LANES) visit(std::min(i, n - LANES));
}

// The same for two vectors at i and i + LANES, n >= PAIR.
constexpr int64_t PAIR = 2 * LANES;
template <typename Visit>
inline void for_pairs(int64_t n, const Visit& visit) {
  for (int64_t i = 0; i < n; i += PAIR) visit(std::min(i, n - PAIR));
}

// A buffer for a group that is shorter than a vector, or shorter than N.
template <typename Raw, int64_t N = LANES>
struct Padded {
  Raw data[N];

  // `from` if it has at least N elements. Otherwise the buffer, filled with the n elements and
  // copies of the last.
  const Raw* read(const Raw* from, int64_t n) {
    if (n >= N) return from;
    fill(from, n);
    return data;
  }
  // An address where N elements can be written for n elements of `to`. `finish` copies them to
  // `to`.
  Raw* write(Raw* to, int64_t n) { return n >= N ? to : data; }
  void finish(Raw* to, int64_t n) const { finish(to, n, n * sizeof(Raw)); }
  void finish(Raw* to, int64_t n, int64_t bytes) const {
    if (n < N) std::memcpy(to, data, bytes);
  }

 private:
  [[gnu::noinline]] void fill(const Raw* from, int64_t n) {
    std::copy_n(from, n, data);
    std::fill_n(data + n, N - n, from[n - 1]);
  }
};

// Maps n elements of `from` by f(value, i) to `to`. For results that need only be right up to
// rounding.
template <typename T, typename U, typename F>
inline void map_all(const typename T::Raw* from, typename U::Raw* to, int64_t n, const F& f) {
  Padded<typename T::Raw, PAIR> read;
  Padded<typename U::Raw, PAIR> written;
  const auto* const x = read.read(from, n);
  auto* const y = written.write(to, n);
  for_pairs(std::max(n, PAIR), [&](int64_t i) {
    U::store_flushed(y + i, f(T::load(x + i), i), f(T::load(x + i + LANES), i + LANES));
  });
  written.finish(to, n);
}

}  // namespace mesa
