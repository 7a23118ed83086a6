// The backward of a softmax from codes of its output, and of a layer scale from the gradient behind
// it. Both process one row at a time.
#pragma once

#include "rows.h"

namespace mesa {

// Visits [0, n) in vectors like `for_vectors`, for sums; n >= LANES. If n is no multiple of LANES,
// the last vector overlaps the vector before. Then `fresh` is 0 for elements that were visited
// before, else 1.
template <typename Visit>
inline void for_fresh_vectors(int64_t n, const Visit& visit) {
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) visit(i, all(1.0f));
  if (whole == n) return;
  Floats fresh;
  for (int k = 0; k < LANES; ++k) fresh[k] = k < LANES - (n - whole) ? 0.0f : 1.0f;
  visit(n - LANES, fresh);
}

// y * (grad - sum(grad * y)), one row at a time. Rows shorter than a vector are padded with copies
// of their last gradient, and with zeros in y.
template <typename T>
void softmax_rows(const Matrix& grads, const Coded& coded,
                  const std::optional<DitheredCodes>& dithered, int64_t begin, int64_t end,
                  const Output& dx) {
  const Layout& layout = coded.layout;
  const int64_t cols = layout.cols, width = std::max<int64_t>(cols, LANES);
  const auto room = buffer<uint8_t>(width + LANES + 8);
  const auto integers = buffer<uint16_t>(dithered ? width : 0);
  const auto y = buffer<float>(width + LANES);
  Padded<typename T::Raw> read, written;
  for (int64_t row = begin; row < end; ++row) {
    const Grid* const grids = coded.grids(row, 0);
    const auto decode = [&]<typename Q>(const Q* q, const auto& value) {
      for (int64_t g = 0; g < layout.groups; ++g) {
        const int64_t first = g * layout.size, n = std::min(layout.size, cols - first);
        const float scale = grids[g].scale(), zero = grids[g].zero();
        Padded<Q> padded;
        const Q* const codes = padded.read(q + first, n);
        // A short group writes past its end. The next group overwrites these elements.
        for_vectors(std::max<int64_t>(n, LANES), [&](int64_t i) {
          store(y.get() + first + i, value(codes + i, scale, zero));
        });
      }
    };
    if (dithered) {
      dithered->combine(row, 0, 0, cols, room.get(), integers.get());
      decode(integers.get(), [&](const uint16_t* n, float scale, float zero) {
        return dithered->form.value(n, scale, zero);
      });
    } else {
      decode(coded.q(row, 0, cols, room.get()), [](const uint8_t* q, float scale, float zero) {
        return floats(load<Bytes>(q)) * scale + zero;
      });
    }
    if (cols < LANES) std::fill(y.get() + cols, y.get() + LANES, 0.0f);
    const typename T::Raw* const grad = read.read(grads.row<T>(row), cols);
    typename T::Raw* const to = written.write(dx.row<T>(row), cols);
    Floats sums{};
    for_fresh_vectors(width, [&](int64_t i, Floats fresh) {
      sums = fused(T::load(grad + i) * fresh, load<Floats>(y.get() + i), sums);
    });
    const Floats along = all(sum(sums));
    for_vectors(width, [&](int64_t i) {
      T::store(to + i, load<Floats>(y.get() + i) * (T::load(grad + i) - along));
    });
    written.finish(dx.row<T>(row), cols);
  }
}

// grad * scale and grad as U, and the contribution of a block of rows to the column sums. `scale`
// and `sums` are padded to whole vectors, and values in the padding are not used.
template <typename T, typename U>
void scale_rows(const Matrix& grads, const float* scale, int64_t begin, int64_t end,
                const Output& scaled, const Output& cast, float* sums) {
  const int64_t cols = grads.cols;
  Padded<typename T::Raw> read;
  Padded<typename U::Raw> written;
  for (int64_t row = begin; row < end; ++row) {
    const typename T::Raw* const grad = grads.row<T>(row);
    typename U::Raw* const times = scaled.row<U>(row);
    typename U::Raw* const same = cast.row<U>(row);
    for (int64_t i = 0; i < cols; i += LANES) {
      const Floats g = T::load(read.read(grad + i, cols - i));
      store(sums + i, load<Floats>(sums + i) + g);
      U::store(written.write(times + i, cols - i), g * load<Floats>(scale + i));
      written.finish(times + i, cols - i);
      U::store(written.write(same + i, cols - i), g);
      written.finish(same + i, cols - i);
    }
  }
}

// Adds the partial sums of blocks of rows in order. So the result has the same bits for any number
// of threads.
inline Tensor added(const FloatVector& partial, int64_t blocks, int64_t stride, int64_t first,
                    int64_t cols) {
  Tensor total = empty({cols}, ScalarType::Float);
  float* const sums = static_cast<float*>(total.mutable_data_ptr());
  std::fill_n(sums, cols, 0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    const float* const from = partial.data() + b * stride + first;
    for (int64_t i = 0; i < cols; ++i) sums[i] += from[i];
  }
  return total;
}

}  // namespace mesa
