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
Tensor decode(const Coded& coded, const std::optional<DitheredCodes>& dithered, int64_t rows,
              ScalarType dtype, Finish finish) {
  const Layout& layout = coded.layout;
  const Output out(rows, layout.cols, dtype, written_as(dtype));
  with_dtype(dtype, [&]<typename T>(T) {
    parallel_stretches(rows, layout, [&, finish](const auto& for_each) {
      const auto room = buffer<uint8_t>(coded.room());
      const auto integers = buffer<uint16_t>(dithered ? coded.room() : 0);
      for_each([&](const Stretch& s) {
        for (int64_t row = s.row; row < s.row + s.rows; ++row) {
          const Grid* const grids = coded.grids(row, s.group);
          // value(codes, scale, zero): the values of LANES codes.
          const auto write = [&]<typename Q>(const Q* q, const auto& value) {
            for (int64_t g = 0; g < s.groups; ++g) {
              const int64_t begin = g * layout.size, n = std::min(layout.size, s.n - begin);
              const float scale = grids[g].scale(), zero = grids[g].zero();
              auto* const to = out.row<T>(row) + s.col + begin;
              Padded<Q, PAIR> read;
              Padded<typename T::Raw, PAIR> padded;
              const Q* const codes = read.read(q + begin, n);
              auto* const values = padded.write(to, n);
              const auto at = [&](int64_t i) {
                return finish(value(codes + i, scale, zero), s.col + begin + i);
              };
              for_pairs(std::max(n, PAIR), [&](int64_t i) {
                prefetch(codes + i + AHEAD);
                T::store(values + i, at(i), at(i + LANES));
              });
              padded.finish(to, n);
            }
          };
          if (dithered) {
            dithered->combine(row, s.group, s.col, s.n, room.get(), integers.get());
            write(integers.get(), [form = dithered->form](const uint16_t* n, float scale, float zero) {
              return form.value(n, scale, zero);
            });
          } else {
            write(coded.q(row, s.col, s.n, room.get()),
                  [](const uint8_t* q, float scale, float zero) {
                    return floats(load<Bytes>(q)) * scale + zero;
                  });
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
