// The activations and their slopes, on a stretch of float32 values that were decoded from codes.
// exp is a polynomial (relative error 1e-7) and erf one times exp(-x * x) (absolute error 2e-7): far
// below a code's own error, and unlike the library's functions they vectorise.
#pragma once

#include <string_view>

#include "cpu_stages.h"

namespace mesa {

// Cephes' expf: 2**n * polynomial(r), |r| <= log(2) / 2; 0 and infinity beyond. NaN stays NaN.
inline float fast_exp(float x) {
  const float shifted = fused(x, 1.44269504f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p * r, r, r + 1.0f);
  const float y = p * as_float((as_bits(shifted) + 127) << 23);
  return x < -87.0f ? 0.0f : x > 88.0f ? std::numeric_limits<float>::infinity() : y;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// log(1 + y) for y in [0, 1], through atanh.
inline float fast_log1p(float y) {
  const float s = y / (2.0f + y), t = s * s;
  float p = 1.0f / 13.0f;
  p = fused(p, t, 1.0f / 11.0f);
  p = fused(p, t, 1.0f / 9.0f);
  p = fused(p, t, 1.0f / 7.0f);
  p = fused(p, t, 1.0f / 5.0f);
  p = fused(p, t, 1.0f / 3.0f);
  return 2.0f * s * fused(p, t, 1.0f);
}

// Gelu's value over x and its slope are 1/2 plus an odd function of x, and constant beyond 5.5 but for
// 1e-6. The odd part over x is a polynomial in u = 2 (x / 5.5)**2 - 1, fitted at Chebyshev nodes:
// absolute error 4e-7 and 1.3e-6, in half the instructions of an exponential and a quotient.
// Spelled by recursion, since a loop inside the loop over elements would keep it from vectorising.
template <size_t K, size_t N>
inline float horner(const float (&coefficients)[N], float u) {
  if constexpr (K + 1 == N) {
    return coefficients[K];
  } else {
    return fused(horner<K + 1>(coefficients, u), u, coefficients[K]);
  }
}

template <size_t N>
inline float sigmoidal(float x, const float (&coefficients)[N]) {
  constexpr float edge = 5.5f;
  const float within = x < -edge ? -edge : x > edge ? edge : x;
  const float u = fused(within * within, 2.0f / (edge * edge), -1.0f);
  const float y = fused(within, horner<0>(coefficients, u), 0.5f);
  return x < -edge ? 0.0f : x > edge ? 1.0f : y;
}

struct Gelu {
  static constexpr float CDF[] = {
      1.285519710e-01f,  -6.417202004e-02f, 4.773316690e-02f,  -3.880173935e-02f, 3.215006421e-02f,
      -2.598297638e-02f, 1.983557338e-02f,  -1.516187987e-02f, 1.188126540e-02f,  -6.780335452e-03f,
      1.990242253e-03f,  -2.005734905e-03f, 2.782866748e-03f,  -1.111402824e-03f};
  static constexpr float SLOPE[] = {
      1.287593169e-01f,  -6.574264393e-02f, 5.365431245e-02f,  -5.362139557e-02f, 6.048361760e-02f,
      -7.010197854e-02f, 7.337015428e-02f,  -6.644046309e-02f, 6.679912973e-02f,  -7.025769289e-02f,
      3.978943527e-02f,  -3.615273466e-03f, 1.176455113e-02f,  -2.370564859e-02f, 9.773893476e-03f};
  static float value(float x) { return x * sigmoidal(x, CDF); }
  static float slope(float x) { return sigmoidal(x, SLOPE); }
};

// x * sigmoid(argument(x)): half a tanh form is a sigmoid of twice its argument.
struct GeluTanh {
  static constexpr float A = 1.59576912f, B = 0.044715f;
  static float value(float x) { return x * sigmoid(A * (x + B * x * x * x)); }
  static float slope(float x) {
    x = x < -20 ? -20.0f : x > 20 ? 20.0f : x;  // Flat beyond, and x * x cannot overflow.
    const float s = sigmoid(A * (x + B * x * x * x));
    return s + s * (1.0f - s) * A * x * (1.0f + 3.0f * B * x * x);
  }
};

struct Silu {
  static float value(float x) { return x * sigmoid(x); }
  static float slope(float x) {
    const float s = sigmoid(x);
    return s + x * s * (1.0f - s);
  }
};

struct QuickGelu {
  static float value(float x) { return x * sigmoid(1.702f * x); }
  static float slope(float x) {
    const float s = sigmoid(1.702f * x);
    return s + 1.702f * x * s * (1.0f - s);
  }
};

struct Relu {
  static float value(float x) { return x < 0 ? 0.0f : x; }
  static float slope(float x) { return x <= 0 ? 0.0f : 1.0f; }
};

struct LeakyRelu {
  static float value(float x) { return x > 0 ? x : 0.01f * x; }
  static float slope(float x) { return x > 0 ? 1.0f : 0.01f; }
};

inline float hard(float x) {
  const float y = x + 3.0f;
  return (y < 0 ? 0.0f : y > 6 ? 6.0f : y) / 6.0f;
}

struct Hardswish {
  static float value(float x) { return x * hard(x); }
  static float slope(float x) { return x <= -3 ? 0.0f : x >= 3 ? 1.0f : x / 3.0f + 0.5f; }
};

struct Hardsigmoid {
  static float value(float x) { return hard(x); }
  static float slope(float x) { return x > -3 && x < 3 ? 1.0f / 6.0f : 0.0f; }
};

struct Softplus {
  static float value(float x) {
    const float soft = (x > 0 ? x : 0.0f) + fast_log1p(fast_exp(-std::fabs(x)));
    return x == x ? soft : x;
  }
  static float slope(float x) { return sigmoid(x); }
};

struct Mish {
  // tanh(softplus(x)) = 1 - 2 / (n + 2) with n = e * e + 2 * e and e = exp(x). 1 beyond 20.
  static float excess(float x) {
    const float e = fast_exp(x);
    return e * (e + 2.0f);
  }
  static float value(float x) {
    const float n = excess(x > 20 ? 20.0f : x);
    return x * (n / (n + 2.0f));
  }
  static float slope(float x) {
    x = x > 20 ? 20.0f : x;
    const float n = excess(x), r = 1.0f / (n + 2.0f), t = n * r;
    return t + x * sigmoid(x) * 2.0f * r * (1.0f + t);
  }
};

struct Elu {
  static float value(float x) { return x > 0 ? x : fast_exp(x) - 1.0f; }
  static float slope(float x) { return x > 0 ? 1.0f : fast_exp(x); }
};

struct Activation {
  std::string_view kind;
  void (*value)(float* x, int64_t n);                     // x = kind(x)
  void (*backward)(const float* x, float* grad, int64_t n);  // grad = grad * kind'(x)
  void (*pair)(float* x, float* grad, int64_t n);            // both
};

template <typename Kind>
constexpr Activation activation(std::string_view kind) {
  return {kind,
          [](float* x, int64_t n) {
            for (int64_t i = 0; i < n; ++i) x[i] = Kind::value(x[i]);
          },
          [](const float* x, float* grad, int64_t n) {
            for (int64_t i = 0; i < n; ++i) grad[i] *= Kind::slope(x[i]);
          },
          [](float* __restrict x, float* __restrict grad, int64_t n) {
            for (int64_t i = 0; i < n; ++i) {
              grad[i] *= Kind::slope(x[i]);
              x[i] = Kind::value(x[i]);
            }
          }};
}

inline constexpr Activation ACTIVATIONS[] = {
    activation<Gelu>("gelu"),
    activation<GeluTanh>("gelu_tanh"),
    activation<Silu>("silu"),
    activation<Relu>("relu"),
    activation<Hardswish>("hardswish"),
    activation<Hardsigmoid>("hardsigmoid"),
    activation<Mish>("mish"),
    activation<Softplus>("softplus"),
    activation<QuickGelu>("quick_gelu"),
    activation<Elu>("elu"),
    activation<LeakyRelu>("leaky_relu"),
};

}  // namespace mesa
