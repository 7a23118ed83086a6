// The backward of a norm from the codes of its normalised input.
//
// Each row takes two passes, and the second reads from the first-level cache. Only two sums are
// kept between the passes. Rows are processed in the order of memory, because the processor then
// prefetches by itself.
//
// Several rows at once would share loads of the weight and of the column sums. This took 1.5 times
// as long with cold memory, with or without prefetch.
#pragma once

#include "rows.h"

namespace mesa {

// A row, read as groups of whole vectors. Q is uint8_t for codes, and uint16_t for the integers of
// dithered codes. If groups are no whole vectors, Q is float for values that were decoded before,
// with the grid (1, 0).
template <typename T, typename U, typename Q>
struct NormRow {
  const Q* q;
  const typename T::Raw* grad;
  typename U::Raw* dx;
  const Grid* grids;
  float rstd;
  const Dithered* dithered = nullptr;

  float scale(int64_t g) const {
    if constexpr (std::is_same_v<Q, uint16_t>) return dithered->scale(grids[g]);
    return grids[g].scale();
  }
  float zero(int64_t g) const {
    if constexpr (std::is_same_v<Q, uint16_t>) return dithered->zero(grids[g]);
    return grids[g].zero();
  }
};

inline Floats widened(const uint8_t* q) { return floats(load<Bytes>(q)); }
inline Floats widened(const uint16_t* n) {
  return floats(std::bit_cast<Ints>(widen(load<Shorts>(n))));
}
inline Floats widened(const float* x) { return load<Floats>(x); }

struct NormShape {
  int64_t cols, padded, groups, size;  // `padded`: cols rounded up to whole vectors
  bool centered;
  const float* weight;
};

template <typename T, typename U, typename Q>
void norm_row(const NormShape& shape, const NormRow<T, U, Q>& row, float* dweight, float* dbias) {
  // Local copies, which no store can change.
  const float* const weight = shape.weight;
  const Q* const q = row.q;
  const auto* const upstream = row.grad;
  auto* const dx = row.dx;
  Floats sum_d{}, sum_dx{};
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t begin = g * shape.size, end = std::min(begin + shape.size, shape.padded);
    const Floats scale = all(row.scale(g)), zero = all(row.zero(g));
    for (int64_t i = begin; i < end; i += LANES) {
      const Floats x = fused(widened(q + i), scale, zero);
      const Floats grad = T::load(upstream + i), d = grad * load<Floats>(weight + i);
      store(dweight + i, fused(grad, x, load<Floats>(dweight + i)));
      store(dbias + i, grad + load<Floats>(dbias + i));
      sum_d += d;
      sum_dx = fused(d, x, sum_dx);
    }
  }
  // dx = rstd * (d - mean(d) - x * mean(d * x)), as a function of the code: a * q + (b + rstd * d).
  const float mean_d = shape.centered ? sum(sum_d) / shape.cols : 0.0f;
  const float mean_dx = sum(sum_dx) / shape.cols;
  const Floats rstd = all(row.rstd);
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t begin = g * shape.size, end = std::min(begin + shape.size, shape.padded);
    const Floats a = all(-row.rstd * mean_dx * row.scale(g));
    const Floats b = all(-row.rstd * (mean_d + mean_dx * row.zero(g)));
    const auto at = [=](int64_t i) {
      const Floats d = T::load(upstream + i) * load<Floats>(weight + i);
      return fused(widened(q + i), a, fused(d, rstd, b));
    };
    int64_t i = begin;
    for (; i + PAIR <= end; i += PAIR) U::store(dx + i, at(i), at(i + LANES));
    if (i < end) U::store(dx + i, at(i));
  }
}

// Rows whose groups are no whole vectors are copied to buffers of whole vectors, padded with zeros.
template <typename T, typename U, typename Q>
void norm_odd_row(const Coded& coded, const NormShape& shape, const NormRow<T, U, Q>& row,
                  float* room, float* dweight, float* dbias) {
  static constexpr Grid IDENTITY{0x3F80, 0};
  float* const x = room;
  float* const grad = room + shape.padded;
  float* const dx = grad + shape.padded;
  std::fill_n(room, 2 * shape.padded, 0.0f);
  for (int64_t i = 0; i < shape.cols; ++i) {
    const int64_t g = i / coded.layout.size;
    x[i] = static_cast<float>(row.q[i]) * row.scale(g) + row.zero(g);
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
  const NormShape whole{shape.cols, shape.padded, 1, shape.padded, shape.centered, shape.weight};
  norm_row(whole, wide, dweight, dbias);
  convert(Float32{}, U{}, dx, row.dx);
}

// A block of rows: computes dx and the contribution to the column sums.
template <typename T, typename U>
void norm_block(const Matrix& grads, const Coded& coded,
                const std::optional<DitheredCodes>& dithered, const NormShape& shape,
                const float* rstd, int64_t begin, int64_t end, const Output& dx, float* dweight,
                float* dbias) {
  const Layout& layout = coded.layout;
  const bool whole = layout.size % LANES == 0 && layout.cols % LANES == 0;
  const auto room = buffer<uint8_t>(shape.padded + 8);
  const auto integers = buffer<uint16_t>(dithered ? shape.padded : 0);
  const auto wide = buffer<float>(whole ? 0 : 3 * shape.padded);
  for (int64_t r = begin; r < end; ++r) {
    const auto run = [&]<typename Q>(const Q* q, const Dithered* form) {
      const NormRow<T, U, Q> row{q, grads.row<T>(r), dx.row<U>(r), coded.grids(r, 0), rstd[r], form};
      if (whole) {
        norm_row(shape, row, dweight, dbias);
      } else {
        norm_odd_row(coded, shape, row, wide.get(), dweight, dbias);
      }
    };
    if (dithered) {
      dithered->combine(r, 0, 0, layout.cols, room.get(), integers.get());
      run(integers.get(), &dithered->form);
    } else {
      run(coded.q(r, 0, layout.cols, room.get()), nullptr);
    }
  }
}

}  // namespace mesa
