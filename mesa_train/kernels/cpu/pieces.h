// Piecewise polynomials: a function in 32 pieces whose coefficients are in registers. This takes
// fewer instructions than one polynomial, for a few correct digits or for nearly all. Only for
// processors that look up 32 numbers at once.
#pragma once

#include "vector.h"

#if defined(MESA_AVX512)
namespace mesa {

// Polynomials of degree 2 of a function. Each is valid within step / 2 of a multiple of `step`,
// from -15 to 14 steps. Beyond these pieces the function is the constants `below` and `above`.
struct Pieces {
  static constexpr int COUNT = 32;
  float step;
  float coefficients[3][COUNT];

  // Each polynomial equals f at the Chebyshev nodes of its piece. The error is step**3 / 192 times
  // f's third derivative.
  Pieces(double (*f)(double), double step_, float below, float above)
      : step(static_cast<float>(step_)) {
    for (int j = 0; j < COUNT; ++j) {
      const double x0 = (j - COUNT / 2) * step_, d = std::sqrt(0.75) / 2 * step_;
      const double low = f(x0 - d), mid = f(x0), high = f(x0 + d);
      const double slope = (high - low) / (2 * d), bend = (high - 2 * mid + low) / (2 * d * d);
      coefficients[2][j] = static_cast<float>(bend);
      coefficients[1][j] = static_cast<float>(slope - 2 * bend * x0);
      coefficients[0][j] = static_cast<float>(mid - slope * x0 + bend * x0 * x0);
    }
    for (int k = 0; k < 3; ++k) coefficients[k][0] = coefficients[k][COUNT - 1] = 0;
    coefficients[0][0] = below;
    coefficients[0][COUNT - 1] = above;
  }

  // The index of x's piece, for `at`: x / step, rounded, in the last digits of a float.
  static __m512i index(Floats x, float step) {
    constexpr int zero = 0x4B400000 + COUNT / 2;  // 1.5 * 2**23; piece 16 is around 0
    const __m512i at = std::bit_cast<__m512i>(fused(x, all(1 / step), all(as_float(zero))));
    return _mm512_min_epi32(_mm512_max_epi32(at, _mm512_set1_epi32(zero - COUNT / 2)),
                            _mm512_set1_epi32(zero + COUNT / 2 - 1));
  }
};

// The same pieces in registers.
struct PiecesHeld {
  __m512 low[3], high[3];
  explicit PiecesHeld(const Pieces& pieces) {
    for (int k = 0; k < 3; ++k) {
      low[k] = _mm512_loadu_ps(pieces.coefficients[k]);
      high[k] = _mm512_loadu_ps(pieces.coefficients[k] + 16);
    }
  }
  Floats at(Floats x, __m512i index) const {
    const Floats bend = _mm512_permutex2var_ps(low[2], index, high[2]);
    const Floats slope = _mm512_permutex2var_ps(low[1], index, high[1]);
    return fused(fused(bend, x, slope), x, _mm512_permutex2var_ps(low[0], index, high[0]));
  }
};

// The same with degree 3, for a function of |x|. Each polynomial is valid within step / 2 of a
// multiple of `step` from 0 up. Beyond the pieces the function is the constant `beyond`. The error
// is step**4 / 3072 times f's fourth derivative.
struct FinePieces {
  static constexpr int COUNT = Pieces::COUNT;
  float step, edge;
  float coefficients[4][COUNT];

  FinePieces(double (*f)(double), double step_, float beyond)
      : step(static_cast<float>(step_)), edge(static_cast<float>((COUNT - 1) * step_)) {
    for (int j = 0; j < COUNT; ++j) {
      double nodes[4], d[4];
      for (int k = 0; k < 4; ++k) {
        nodes[k] = (j + std::cos((2 * k + 1) * M_PI / 8) / 2) * step_;
        d[k] = f(nodes[k]);
      }
      // Newton's form: divided differences, then multiplied out.
      for (int order = 1; order < 4; ++order) {
        for (int k = 3; k >= order; --k) d[k] = (d[k] - d[k - 1]) / (nodes[k] - nodes[k - order]);
      }
      double powers[4] = {d[3]};
      for (int k = 2; k >= 0; --k) {
        for (int m = 3; m > 0; --m) powers[m] = powers[m - 1] - nodes[k] * powers[m];
        powers[0] = d[k] - nodes[k] * powers[0];
      }
      for (int m = 0; m < 4; ++m) coefficients[m][j] = static_cast<float>(powers[m]);
    }
    for (int m = 0; m < 4; ++m) coefficients[m][COUNT - 1] = m ? 0 : beyond;
  }
};

struct FinePiecesHeld {
  __m512 low[4], high[4];
  float inverse, edge;
  explicit FinePiecesHeld(const FinePieces& pieces) : inverse(1 / pieces.step), edge(pieces.edge) {
    for (int k = 0; k < 4; ++k) {
      low[k] = _mm512_loadu_ps(pieces.coefficients[k]);
      high[k] = _mm512_loadu_ps(pieces.coefficients[k] + 16);
    }
  }
  // The function at |x|. A NaN stays NaN.
  Floats at(Floats magnitude) const {
    const Floats x = smaller(all(edge), magnitude);
    const __m512i index = std::bit_cast<__m512i>(fused(x, all(inverse), all(12582912.0f)));
    const auto coefficient = [&](int k) -> Floats {
      return _mm512_permutex2var_ps(low[k], index, high[k]);
    };
    // The two halves of the polynomial are computed in parallel. This has a lower latency than one
    // step after another.
    return fused(fused(coefficient(3), x, coefficient(2)), x * x,
                 fused(coefficient(1), x, coefficient(0)));
  }
};

}  // namespace mesa
#endif
