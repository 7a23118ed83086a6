// The activations and their derivatives (slopes), for a vector of values that were decoded from
// codes. exp is a polynomial with a relative error of 1e-7. This is far below the error of a code,
// and takes few instructions.
#pragma once

#include <limits>
#include <type_traits>

#include "pieces.h"

namespace mesa {

inline Floats fused(Floats a, Floats b, float c) { return fused(a, b, all(c)); }
inline Floats fused(Floats a, float b, Floats c) { return fused(a, all(b), c); }
inline Floats fused(Floats a, float b, float c) { return fused(a, all(b), all(c)); }
// A NaN stays NaN.
inline Floats between(Floats x, float low, float high) {
  return smaller(all(high), larger(all(low), x));
}
inline Floats either(Ints which, Floats a, Floats b) { return which ? a : b; }
inline Floats either(Ints which, float a, Floats b) { return which ? all(a) : b; }
inline Floats either(Ints which, Floats a, float b) { return which ? a : all(b); }
inline Floats either(Ints which, float a, float b) { return which ? all(a) : all(b); }

// Cephes' expf: 2**n * polynomial(r), |r| <= log(2) / 2. Beyond its range 0 and infinity. NaN stays
// NaN.
inline Floats fast_exp(Floats x) {
  const Floats shifted = fused(x, 1.44269504f, 12582912.0f);
  const Floats n = shifted - 12582912.0f;
  const Floats r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
  Floats p = all(1.9875691500e-4f);
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p * r, r, r + 1.0f);
  const Floats y = p * as_floats((as_words(shifted) + 127) << 23);
  return either(x < -87.0f, 0.0f, either(x > 88.0f, std::numeric_limits<float>::infinity(), y));
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + fast_exp(-x)); }

// log(1 + y) for y in [0, 1], computed through atanh.
inline Floats fast_log1p(Floats y) {
  const Floats s = y / (2.0f + y), t = s * s;
  Floats p = all(1.0f / 13.0f);
  p = fused(p, t, 1.0f / 11.0f);
  p = fused(p, t, 1.0f / 9.0f);
  p = fused(p, t, 1.0f / 7.0f);
  p = fused(p, t, 1.0f / 5.0f);
  p = fused(p, t, 1.0f / 3.0f);
  return 2.0f * s * fused(p, t, 1.0f);
}

// gelu(x) / x and gelu's slope are each 1/2 plus an odd function of x, and nearly constant beyond
// an edge. With u = 2 (x / edge)**2 - 1, a polynomial in u approximates the odd function divided by
// x. At the edge it equals the constant. This takes half the instructions of an exponential and a
// quotient, and needs no choice between branches.
template <size_t N>
struct Sigmoidal {
  float edge;
  float coefficients[N];

  Floats operator()(Floats x) const {
    const Floats within = between(x, -edge, edge);
    const Floats u = fused(within * within, 2.0f / (edge * edge), -1.0f);
    Floats p = all(coefficients[N - 1]);
    for (size_t k = N - 1; k-- > 0;) p = fused(p, u, coefficients[k]);
    return fused(within, p, 0.5f);
  }
};

struct Gelu {
  // The absolute error is 8e-7 (of the value; relative if it is over 1) and 1.1e-6 (of the slope).
  static constexpr Sigmoidal<14> VALUE = {5.5f, {
      1.285519451e-01f, -6.417196244e-02f, 4.773576930e-02f, -3.880549595e-02f,
      3.211162239e-02f, -2.593359537e-02f, 2.003803290e-02f, -1.540715061e-02f,
      1.140877698e-02f, -6.228316575e-03f, 2.490009647e-03f, -2.575250575e-03f,
      2.587427618e-03f, -8.927216404e-04f}};
  static constexpr Sigmoidal<15> SLOPE = {5.5f, {
      1.287592947e-01f, -6.574306637e-02f, 5.365608633e-02f, -5.360771716e-02f,
      6.045554578e-02f, -7.022278011e-02f, 7.353781909e-02f, -6.599184126e-02f,
      6.632103026e-02f, -7.105769217e-02f, 4.048813507e-02f, -2.936890814e-03f,
      1.126019098e-02f, -2.392522059e-02f, 9.916198440e-03f}};
  // The absolute error is 8e-5 and 2e-4: a twentieth of bfloat16's rounding at 1.
  static constexpr Sigmoidal<8> SHORT_VALUE = {4.25f, {
      1.659333110e-01f, -8.085899055e-02f, 5.586025119e-02f, -3.822915629e-02f,
      2.418169193e-02f, -1.715241186e-02f, 1.205832046e-02f, -4.145951010e-03f}};
  static constexpr Sigmoidal<9> SHORT_SLOPE = {4.25f, {
      1.702994406e-01f, -9.998853505e-02f, 1.000233442e-01f, -1.110667884e-01f,
      1.005646586e-01f, -6.512974948e-02f, 6.013279781e-02f, -6.350968033e-02f, 2.632157505e-02f}};
  template <typename T>
  static Floats value(Floats x) {
    if constexpr (std::is_same_v<T, BFloat16>) return times(x, SHORT_VALUE);
    return times(x, VALUE);
  }
  template <typename T>
  static Floats slope(Floats x) {
    if constexpr (std::is_same_v<T, BFloat16>) return SHORT_SLOPE(x);
    return SLOPE(x);
  }

 private:
  // Below the edge the factor is 0 except for its rounding, which a huge x would magnify.
  template <size_t N>
  static Floats times(Floats x, const Sigmoidal<N>& share) {
    return larger(all(-share.edge), x) * share(x);
  }
};

#if defined(MESA_AVX512)
// Gelu for bfloat16, in a third of the instructions: piecewise polynomials for x's factor and for
// the slope. Their absolute error is 5e-5 and 2e-4. Beyond the pieces they are 0 and 1, with an
// error of 1e-4 and 4e-4.
struct GeluPieces {
  static constexpr double STEP = 0.28;
  static double cdf(double x) { return 0.5 * std::erfc(-x * M_SQRT1_2); }
  static double derivative(double x) {
    return cdf(x) + x * std::exp(-x * x / 2) * M_SQRT1_2 * M_2_SQRTPI / 2;
  }
  static const Pieces& factors() {
    static const Pieces pieces(cdf, STEP, 0, 1);
    return pieces;
  }
  static const Pieces& slopes() {
    static const Pieces pieces(derivative, STEP, 0, 1);
    return pieces;
  }
  PiecesHeld factor{factors()}, derivatives{slopes()};

  template <typename T>
  Floats value(Floats x) const {
    return x * factor.at(x, Pieces::index(x, STEP));
  }
  template <typename T>
  Floats slope(Floats x) const {
    return derivatives.at(x, Pieces::index(x, STEP));
  }
};

// Gelu's value for the other dtypes, and for a forward: x / 2 plus |x| times the probability of the
// normal distribution between 0 and |x|. The absolute error is 5e-7, half of the error of PyTorch's
// float32.
struct GeluFine : Gelu {
  static double half(double x) { return std::erf(x * M_SQRT1_2) / 2; }
  static const FinePieces& halves() {
    static const FinePieces pieces(half, 0.18, 0.5f);
    return pieces;
  }
  FinePiecesHeld between_0_and{halves()};

  template <typename T>
  Floats value(Floats x) const {
    const Floats magnitude = absolute(x);
    return fused(magnitude, between_0_and.at(magnitude), 0.5f * x);
  }
};
#endif

// x * sigmoid(argument(x)), because (1 + tanh(a)) / 2 is the sigmoid of 2 a.
struct GeluTanh {
  static constexpr float A = 1.59576912f, B = 0.044715f;
  template <typename T>
  static Floats value(Floats x) {
    return x * sigmoid(A * (x + B * x * x * x));
  }
  template <typename T>
  static Floats slope(Floats x) {
    x = between(x, -20.0f, 20.0f);  // constant beyond these bounds, and x * x cannot overflow
    const Floats s = sigmoid(A * (x + B * x * x * x));
    return s + s * (1.0f - s) * A * x * (1.0f + 3.0f * B * x * x);
  }
};

struct Silu {
  template <typename T>
  static Floats value(Floats x) {
    return x * sigmoid(x);
  }
  template <typename T>
  static Floats slope(Floats x) {
    const Floats s = sigmoid(x);
    return s + x * s * (1.0f - s);
  }
};

struct QuickGelu {
  template <typename T>
  static Floats value(Floats x) {
    return x * sigmoid(1.702f * x);
  }
  template <typename T>
  static Floats slope(Floats x) {
    const Floats s = sigmoid(1.702f * x);
    return s + 1.702f * x * s * (1.0f - s);
  }
};

struct Relu {
  template <typename T>
  static Floats value(Floats x) {
    return either(x < 0, 0.0f, x);
  }
  template <typename T>
  static Floats slope(Floats x) {
    return either(x <= 0, 0.0f, 1.0f);
  }
};

struct LeakyRelu {
  template <typename T>
  static Floats value(Floats x) {
    return either(x > 0, x, 0.01f * x);
  }
  template <typename T>
  static Floats slope(Floats x) {
    return either(x > 0, 1.0f, 0.01f);
  }
};

inline Floats hard(Floats x) { return between(x + 3.0f, 0.0f, 6.0f) / 6.0f; }

struct Hardswish {
  template <typename T>
  static Floats value(Floats x) {
    return x * hard(x);
  }
  template <typename T>
  static Floats slope(Floats x) {
    return either(x <= -3, 0.0f, either(x >= 3, 1.0f, x / 3.0f + 0.5f));
  }
};

struct Hardsigmoid {
  template <typename T>
  static Floats value(Floats x) {
    return hard(x);
  }
  template <typename T>
  static Floats slope(Floats x) {
    return either((x > -3) & (x < 3), 1.0f / 6.0f, 0.0f);
  }
};

struct Softplus {
  template <typename T>
  static Floats value(Floats x) {
    const Floats soft = either(x > 0, x, 0.0f) + fast_log1p(fast_exp(-absolute(x)));
    return either(x == x, soft, x);
  }
  template <typename T>
  static Floats slope(Floats x) {
    return sigmoid(x);
  }
};

struct Mish {
  // tanh(softplus(x)) = 1 - 2 / (n + 2) with n = e * e + 2 * e and e = exp(x). It is 1 for x beyond
  // 20.
  static Floats excess(Floats x) {
    const Floats e = fast_exp(x);
    return e * (e + 2.0f);
  }
  template <typename T>
  static Floats value(Floats x) {
    const Floats n = excess(either(x > 20, 20.0f, x));
    return x * (n / (n + 2.0f));
  }
  template <typename T>
  static Floats slope(Floats x) {
    x = either(x > 20, 20.0f, x);
    const Floats n = excess(x), r = 1.0f / (n + 2.0f), t = n * r;
    return t + x * sigmoid(x) * 2.0f * r * (1.0f + t);
  }
};

struct Elu {
  template <typename T>
  static Floats value(Floats x) {
    return either(x > 0, x, fast_exp(x) - 1.0f);
  }
  template <typename T>
  static Floats slope(Floats x) {
    return either(x > 0, 1.0f, fast_exp(x));
  }
};

// The implementation of a kind for results of dtype T.
template <typename Kind, typename T>
struct Evaluator {
  using Type = Kind;
};
#if defined(MESA_AVX512)
template <>
struct Evaluator<Gelu, BFloat16> {
  using Type = GeluPieces;
};
template <>
struct Evaluator<Gelu, Float16> {
  using Type = GeluFine;
};
template <>
struct Evaluator<Gelu, Float32> {
  using Type = GeluFine;
};
#endif

}  // namespace mesa
