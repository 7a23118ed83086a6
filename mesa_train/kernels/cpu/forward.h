// Fused forwards: a norm, an activation or a softmax, computed beside the codes for its backward
// while its rows are in the cache. They equal PyTorch's up to rounding, because they sum float32 in
// another order.
#pragma once

#include "decode.h"
#include "encode.h"

namespace mesa {

// The sum of f over n elements, in four parallel sums. f takes LANES elements.
template <typename T, typename F>
inline float summed(const typename T::Raw* x, int64_t n, const F& f) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    for (int k = 0; k < 4; ++k) sums[k] += f(T::load(x + i + k * LANES));
  }
  for (; i + LANES <= n; i += LANES) sums[0] += f(T::load(x + i));
  if (i < n) {
    Padded<typename T::Raw> padded;
    Floats last = f(T::load(padded.read(x + i, n - i)));
    for (int64_t k = n - i; k < LANES; ++k) last[k] = 0;
    sums[1] += last;
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// --- an activation ---

struct ActivationForward : Beside {
  const Matrix& x;
  const Output& y;
  const ActivateValues values;

  ActivationForward(const Matrix& x_, const Output& y_, ActivateValues values_)
      : x(x_), y(y_), values(values_) {}
  void after(int64_t row, int64_t col, int64_t n) override {
    values(x.at(row, col), y.at(row, col), n);
  }
};

// --- a norm ---

// LayerNorm (centered) or RMSNorm. weight and bias are ones and zeros if the norm has none.
struct NormForward : Beside {
  struct Task {
    const Matrix& x;
    const Output& y;
    float *mean, *rstd;  // of each row; without a mean, 0
    const float *weight, *bias;
    float eps;
    void (*statistics)(const Task&, int64_t row);
    void (*values)(const Task&, int64_t row, int64_t col, int64_t n);
  };
  const Task& task;

  explicit NormForward(const Task& task_) : task(task_) {}
  void before(int64_t row) override { task.statistics(task, row); }
  void after(int64_t row, int64_t col, int64_t n) override { task.values(task, row, col, n); }
};

// Computes the mean first, so that the deviations are sums of small numbers.
template <typename T>
void norm_statistics(const NormForward::Task& task, int64_t row) {
  const auto* const x = task.x.row<T>(row);
  const int64_t n = task.x.cols;
  float mean = 0;
  if (task.mean) task.mean[row] = mean = summed<T>(x, n, [](Floats v) { return v; }) / n;
  const float squares = summed<T>(x, n, [=](Floats v) { return (v - mean) * (v - mean); });
  task.rstd[row] = 1.0f / std::sqrt(squares / n + task.eps);
}

template <typename T, typename U>
void norm_values(const NormForward::Task& task, int64_t row, int64_t col, int64_t n) {
  const float mean = task.mean ? task.mean[row] : 0.0f, rstd = task.rstd[row];
  const float *const weight = task.weight + col, *const bias = task.bias + col;
  map_all<T, U>(task.x.row<T>(row) + col, task.y.row<U>(row) + col, n, [=](Floats x, int64_t i) {
    return fused((x - mean) * rstd, load<Floats>(weight + i), load<Floats>(bias + i));
  });
}

// --- a softmax ---

// Makes codes of its output, which is computed before the codes.
template <typename T, typename U>
struct SoftmaxForward : Beside {
  const Matrix& x;
  const Output& y;
  Buffer<float> powers;

  SoftmaxForward(const Matrix& x_, const Output& y_)
      : x(x_), y(y_), powers(buffer<float>(std::max(x_.cols, PAIR))) {}
  void before(int64_t row) override {
    const auto* const from = x.row<T>(row);
    const int64_t n = x.cols;
    Padded<typename T::Raw> padded;
    const auto* const ends = padded.read(from, n);
    Floats most = T::load(ends);
    for_vectors(std::max<int64_t>(n, LANES), [&](int64_t i) { most = larger(T::load(ends + i), most); });
    float top = most[0];
    for (int k = 1; k < LANES; ++k) top = std::max(top, most[k]);
    // The exponential of a NaN is NaN. A row that has only infinities gives NaN too.
    map_all<T, Float32>(from, powers.get(), n, [=](Floats v, int64_t) { return fast_exp(v - top); });
    const float share = 1.0f / summed<Float32>(powers.get(), n, [](Floats v) { return v; });
    map_all<Float32, U>(powers.get(), y.row<U>(row), n, [=](Floats v, int64_t) { return v * share; });
  }
};

}  // namespace mesa
