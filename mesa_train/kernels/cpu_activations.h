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

struct Gelu {
  // The normal distribution function from its density (Abramowitz and Stegun 7.1.26).
  static float cdf(float x, float gauss) {
    const float z = std::fabs(x) * 0.70710678f;
    const float t = 1.0f / fused(0.3275911f, z, 1.0f);
    float p = 1.061405429f;
    p = fused(p, t, -1.453152027f);
    p = fused(p, t, 1.421413741f);
    p = fused(p, t, -0.284496736f);
    p = fused(p, t, 0.254829592f);
    const float tail = 0.5f * p * t * gauss;
    return x > 0 ? 1.0f - tail : tail;
  }
  static float value(float x) { return x * cdf(x, fast_exp(-0.5f * x * x)); }
  static float slope(float x) {
    const float gauss = fast_exp(-0.5f * x * x);
    return cdf(x, gauss) + x * gauss * 0.39894228f;
  }
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
};

template <typename Kind>
constexpr Activation activation(std::string_view kind) {
  return {kind,
          [](float* x, int64_t n) {
            for (int64_t i = 0; i < n; ++i) x[i] = Kind::value(x[i]);
          },
          [](const float* x, float* grad, int64_t n) {
            for (int64_t i = 0; i < n; ++i) grad[i] *= Kind::slope(x[i]);
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
