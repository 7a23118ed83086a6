// Element-wise reads of codes: the values themselves, and an activation or its backward at these
// values. One pass from memory to memory, in registers.
#pragma once

#include <string>

#include "passes.h"
#include "rows.h"

namespace mesa {

// finish(values, col) changes the values of LANES columns before they are stored. It is copied, so
// that a store cannot overwrite the data that it reads.
template <typename Finish>
Tensor decode(const Coded& coded, int64_t rows, ScalarType dtype, Finish finish) {
  const Layout& layout = coded.layout;
  const Output out(rows, layout.cols, dtype, written_as(dtype));
  with_dtype(dtype, [&]<typename T>(T) {
    parallel_stretches(rows, layout, [&, finish](const auto& for_each) {
      const auto room = buffer<uint8_t>(coded.room());
      for_each([&](const Stretch& s) {
        for (int64_t row = s.row; row < s.row + s.rows; ++row) {
          const uint8_t* const q = coded.q(row, s.col, s.n, room.get());
          const Grid* const grids = coded.grids(row, s.group);
          for (int64_t g = 0; g < s.groups; ++g) {
            const int64_t begin = g * layout.size, n = std::min(layout.size, s.n - begin);
            const float scale = grids[g].scale(), zero = grids[g].zero();
            auto* const to = out.row<T>(row) + s.col + begin;
            Padded<uint8_t, PAIR> read;
            Padded<typename T::Raw, PAIR> padded;
            const uint8_t* const codes = read.read(q + begin, n);
            auto* const values = padded.write(to, n);
            const auto at = [&](int64_t i) {
              const Floats value = floats(load<Bytes>(codes + i)) * scale + zero;
              return finish(value, s.col + begin + i);
            };
            for_pairs(std::max(n, PAIR), [&](int64_t i) {
              prefetch(codes + i + AHEAD);
              T::store(values + i, at(i), at(i + LANES));
            });
            padded.finish(to, n);
          }
        }
      });
    });
  });
  return out.result();
}

// The passes of an activation for results of dtype T.
template <typename T>
const Passes& find_passes(const std::string& kind) {
  const Passes* passes = nullptr;
  for (const Activation& a : activations<T>()) {
    if (a.kind == kind) passes = &a.passes;
  }
  if (!passes) {
    std::string choices;
    for (const Activation& a : activations<T>()) {
      choices += (choices.empty() ? "'" : ", '") + std::string(a.kind) + "'";
    }
    STD_TORCH_CHECK(false, "kind must be one of (", choices, "), got '", kind, "'");
  }
  return *passes;
}

// fill(row, col, p) sets the tensors of p.
template <typename T, typename Fill>
void activate_all(const Coded& coded, int64_t rows, Activate pass, const Fill& fill) {
  const Layout& layout = coded.layout;
  parallel_stretches(rows, layout, [&](const auto& for_each) {
    const auto room = buffer<uint8_t>(coded.room());
    for_each([&](const Stretch& s) {
      for (int64_t row = s.row; row < s.row + s.rows; ++row) {
        Piece p{coded.q(row, s.col, s.n, room.get()), coded.grids(row, s.group), s.groups,
                layout.size, s.n, nullptr, nullptr, nullptr};
        fill(row, s.col, p);
        pass(p);
      }
    });
  });
}

}  // namespace mesa
