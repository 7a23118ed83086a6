// Softmax's backward from codes of its output, and the gradient behind a layer scale: a row at a time.
#pragma once

#include "cpu_rows.h"

namespace mesa {

// One row through buffers of whole vectors: y * (grad - sum(grad * y)).
template <typename T>
void softmax_rows(const Matrix& grads, const Coded& coded, int64_t begin, int64_t end,
                  const Output& dx) {
  const Layout& layout = coded.layout;
  const int64_t cols = layout.cols, padded = ceil_div(cols, LANES) * LANES;
  const auto room = buffer<uint8_t>(padded + LANES);
  const auto y = buffer<float>(padded);
  std::fill_n(y.get(), padded, 0.0f);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* const q = coded.q(row, 0, cols, room.get());
    const Grid* const grids = coded.grids(row, 0);
    for (int64_t g = 0; g < layout.groups; ++g) {
      const float scale = grids[g].scale(), zero = grids[g].zero();
      const int64_t last = std::min((g + 1) * layout.size, cols);
      for (int64_t i = g * layout.size; i < last; ++i) {
        y[i] = static_cast<float>(q[i]) * scale + zero;
      }
    }
    const typename T::Raw* const grad = grads.row<T>(row);
    typename T::Raw* const to = dx.row<T>(row);
    Padded<typename T::Raw> read, written;
    Floats sums{};
    for (int64_t i = 0; i < cols; i += LANES) {
      // What continues a short last vector meets zeros in y; a NaN there would be the row's own.
      const Floats g = T::load(read.read(grad + i, cols - i));
      sums = fused(g, load<Floats>(y.get() + i), sums);
    }
    const Floats along = all(sum(sums));
    for (int64_t i = 0; i < cols; i += LANES) {
      const Floats g = T::load(read.read(grad + i, cols - i));
      T::store(written.write(to + i, cols - i), load<Floats>(y.get() + i) * (g - along));
      written.finish(to + i, cols - i);
    }
  }
}

// grad * scale and grad as U, and what a block of rows adds to the column sums. `scale` and `sums`
// are padded to whole vectors, and what is written there is nobody's.
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

// Adds the partial sums of blocks of rows in order: the same bits for any number of threads.
inline Tensor added(const std::vector<float>& partial, int64_t blocks, int64_t stride, int64_t first,
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
