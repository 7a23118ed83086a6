// A norm's backward from the codes of its normalised input: two passes over a few rows at a time,
// the second from the first-level cache. Nothing is kept between them but two sums a row.
#pragma once

#include "cpu_rows.h"

namespace mesa {

// Rows that go together share the loads of the weight and of the column sums; as many as leave their
// running sums in registers.
constexpr int TOGETHER = LANES == 16 ? 4 : 2;

// Some whole rows, read as groups of whole vectors. Q is uint8_t for codes, or float for values that
// were decoded before, where groups are no whole vectors: with the grid 1, 0.
template <typename T, typename U, typename Q>
struct NormRow {
  const Q* q;
  const typename T::Raw* grad;
  typename U::Raw* dx;
  const Grid* grids;
  float rstd;
};

inline Floats widened(const uint8_t* q) { return floats(load<Bytes>(q)); }
inline Floats widened(const float* x) { return load<Floats>(x); }

struct NormShape {
  int64_t cols, padded, groups, size;  // `padded`: cols up to whole vectors
  int64_t ahead;                       // elements to what is worth a prefetch
  bool centered;
  const float* weight;
};

template <int R, typename T, typename U, typename Q>
void norm_rows(const NormShape& shape, const NormRow<T, U, Q>* rows, float* dweight, float* dbias) {
  Floats sum_d[R] = {}, sum_dx[R] = {};
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t begin = g * shape.size, end = std::min(begin + shape.size, shape.padded);
    Floats scale[R], zero[R];
    for (int r = 0; r < R; ++r) {
      scale[r] = all(rows[r].grids[g].scale()), zero[r] = all(rows[r].grids[g].zero());
    }
    for (int64_t i = begin; i < end; i += LANES) {
      const Floats weight = load<Floats>(shape.weight + i);
      Floats column_dx = load<Floats>(dweight + i), column_d = load<Floats>(dbias + i);
      for (int r = 0; r < R; ++r) {
        const Floats x = fused(widened(rows[r].q + i), scale[r], zero[r]);
        const Floats grad = T::load(rows[r].grad + i), d = grad * weight;
        column_dx = fused(grad, x, column_dx);
        column_d += grad;
        sum_d[r] += d;
        sum_dx[r] = fused(d, x, sum_dx[r]);
      }
      store(dweight + i, column_dx);
      store(dbias + i, column_d);
    }
  }
  // dx = rstd * (d - mean(d) - x * mean(d * x)), as a function of the code: a * q + (b + rstd * d).
  for (int r = 0; r < R; ++r) {
    const NormRow<T, U, Q>& row = rows[r];
    const float mean_d = shape.centered ? sum(sum_d[r]) / shape.cols : 0.0f;
    const float mean_dx = sum(sum_dx[r]) / shape.cols;
    for (int64_t g = 0; g < shape.groups; ++g) {
      const int64_t begin = g * shape.size, end = std::min(begin + shape.size, shape.padded);
      const Floats a = all(-row.rstd * mean_dx * row.grids[g].scale());
      const Floats b = all(-row.rstd * (mean_d + mean_dx * row.grids[g].zero()));
      const Floats rstd = all(row.rstd);
      for (int64_t i = begin; i < end; i += LANES) {
        prefetch(row.grad + i + shape.ahead);
        prefetch(row.q + i + shape.ahead);
        const Floats d = T::load(row.grad + i) * load<Floats>(shape.weight + i);
        U::store(row.dx + i, fused(widened(row.q + i), a, fused(d, rstd, b)));
      }
    }
  }
}

// Rows whose groups are no whole vectors go through buffers that are, with zeros behind them.
template <typename T, typename U>
void norm_odd_row(const Coded& coded, const NormShape& shape, const NormRow<T, U, uint8_t>& row,
                  float* room, float* dweight, float* dbias) {
  static constexpr Grid IDENTITY{0x3F80, 0};
  float* const x = room;
  float* const grad = room + shape.padded;
  float* const dx = grad + shape.padded;
  std::fill_n(room, 2 * shape.padded, 0.0f);
  for (int64_t i = 0; i < shape.cols; ++i) {
    const Grid grid = row.grids[i / coded.layout.size];
    x[i] = static_cast<float>(row.q[i]) * grid.scale() + grid.zero();
  }
  const auto convert = [&](auto from, auto to, const auto* source, auto* target) {
    for (int64_t i = 0; i < shape.cols; i += LANES) {
      const int64_t n = std::min<int64_t>(LANES, shape.cols - i);
      Padded<std::remove_cvref_t<decltype(*source)>> read;
      Padded<std::remove_cvref_t<decltype(*target)>> written;
      to.store(written.write(target + i, n), from.load(read.read(source + i, n)));
      written.finish(target + i, n);
    }
  };
  convert(T{}, Float32{}, row.grad, grad);
  const NormRow<Float32, Float32, float> wide{x, grad, dx, &IDENTITY, row.rstd};
  const NormShape whole{shape.cols, shape.padded, 1, shape.padded, 0, shape.centered, shape.weight};
  norm_rows<1>(whole, &wide, dweight, dbias);
  convert(Float32{}, U{}, dx, row.dx);
}

// A block of rows: their dx, and what they add to the column sums.
template <typename T, typename U>
void norm_block(const Matrix& grads, const Coded& coded, const NormShape& shape, const float* rstd,
                int64_t begin, int64_t end, const Output& dx, float* dweight, float* dbias) {
  const Layout& layout = coded.layout;
  const bool whole = layout.size % LANES == 0 && layout.cols % LANES == 0;
  const auto room = buffer<uint8_t>(TOGETHER * (shape.padded + 3));
  const auto wide = buffer<float>(whole ? 0 : 3 * shape.padded);
  NormRow<T, U, uint8_t> rows[TOGETHER];
  for (int64_t row = begin; row < end; row += TOGETHER) {
    const int count = static_cast<int>(std::min<int64_t>(TOGETHER, end - row));
    for (int r = 0; r < count; ++r) {
      const uint8_t* const q =
          coded.q(row + r, 0, layout.cols, room.get() + r * (shape.padded + 3));
      rows[r] = {q, grads.row<T>(row + r), dx.row<U>(row + r), coded.grids(row + r, 0),
                 rstd[row + r]};
    }
    if (whole && count == TOGETHER) {
      norm_rows<TOGETHER>(shape, rows, dweight, dbias);
    } else {
      for (int r = 0; r < count; ++r) {
        if (whole) {
          norm_rows<1>(shape, rows + r, dweight, dbias);
        } else {
          norm_odd_row(coded, shape, rows[r], wide.get(), dweight, dbias);
        }
      }
    }
  }
}

}  // namespace mesa
