// What is read from codes element by element: the values themselves, and an activation or its
// backward at them. One pass, in registers between memory and memory.
#pragma once

#include <string>
#include <string_view>

#include "cpu_activations.h"
#include "cpu_rows.h"

namespace mesa {

// finish(values, col) changes the values of LANES columns before they are stored. It is copied, so that
// a store cannot be to what it reads.
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

// Some groups of a row: their codes, and the same elements of the tensors that go with them.
struct Piece {
  const uint8_t* q;
  const Grid* grids;
  int64_t groups, size, n;
  const void* grad;  // null unless a backward is asked for,
  void* dx;
  void* y;  // and null unless the activation is
};

// An activation and its slope at a group's codes: computed,
template <typename Kind, typename T>
struct Computed {
  typename Evaluator<Kind, T>::Type kind;
  float scale, zero;
  void enter(Grid grid) { scale = grid.scale(), zero = grid.zero(); }
  Floats at(Bytes q) const { return floats(q) * scale + zero; }
  Floats value(Bytes q) const { return kind.template value<T>(at(q)); }
  Floats slope(Bytes q) const { return kind.template slope<T>(at(q)); }
};

// or looked up among the 16 or 4 there are.
template <typename Kind, typename T>
struct Tabled {
  typename Evaluator<Kind, T>::Type kind;
  Table values, slopes;  // The compiler leaves out the one that a pass does not use.
  void enter(Grid grid) {
    const float scale = grid.scale(), zero = grid.zero();
    values.fill([&](Floats q) { return kind.template value<T>(q * scale + zero); });
    slopes.fill([&](Floats q) { return kind.template slope<T>(q * scale + zero); });
  }
  Floats value(Bytes q) const { return values[q]; }
  Floats slope(Bytes q) const { return slopes[q]; }
};

template <typename T, typename Activated, bool BACKWARD, bool VALUE>
void activate(const Piece& p) {
  using Raw = typename T::Raw;
  Activated activated;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t begin = g * p.size, n = std::min(p.size, p.n - begin);
    activated.enter(p.grids[g]);
    Padded<uint8_t, PAIR> codes;
    const uint8_t* const q = codes.read(p.q + begin, n);
    Padded<Raw, PAIR> padded, dx_padded, y_padded;
    const Raw* grad = nullptr;
    Raw *dx = nullptr, *y = nullptr;
    if constexpr (BACKWARD) {
      grad = padded.read(static_cast<const Raw*>(p.grad) + begin, n);
      dx = dx_padded.write(static_cast<Raw*>(p.dx) + begin, n);
    }
    if constexpr (VALUE) y = y_padded.write(static_cast<Raw*>(p.y) + begin, n);
    for_pairs(std::max(n, PAIR), [&](int64_t i) {
      const Bytes low = load<Bytes>(q + i), high = load<Bytes>(q + i + LANES);
      prefetch(q + i + AHEAD);
      if constexpr (BACKWARD) {
        prefetch(grad + i + AHEAD);
        T::store(dx + i, T::load(grad + i) * activated.slope(low),
                 T::load(grad + i + LANES) * activated.slope(high));
      }
      if constexpr (VALUE) T::store(y + i, activated.value(low), activated.value(high));
    });
    if constexpr (BACKWARD) dx_padded.finish(static_cast<Raw*>(p.dx) + begin, n);
    if constexpr (VALUE) y_padded.finish(static_cast<Raw*>(p.y) + begin, n);
  }
}

using Activate = void (*)(const Piece&);

// The activation of n values that were never codes: a forward, whose error is nobody's rounding.
template <typename T, typename Kind>
void activate_values(const void* from, void* to, int64_t n) {
  using Raw = typename T::Raw;
  const typename Evaluator<Kind, Float32>::Type kind;
  map_all<T, T>(static_cast<const Raw*>(from), static_cast<Raw*>(to), n,
                [&](Floats x, int64_t) { return kind.template value<Float32>(x); });
}

using ActivateValues = void (*)(const void*, void*, int64_t);

// Of one dtype: from codes at 8 bits, and at fewer; from values.
template <typename T>
struct Passes {
  Activate value[2], backward[2], pair[2];
  ActivateValues values;
};

template <typename Kind, typename T>
constexpr Passes<T> passes() {
  using Long = Computed<Kind, T>;
  using Short = Tabled<Kind, T>;
  return {{activate<T, Long, false, true>, activate<T, Short, false, true>},
          {activate<T, Long, true, false>, activate<T, Short, true, false>},
          {activate<T, Long, true, true>, activate<T, Short, true, true>},
          activate_values<T, Kind>};
}

struct Activation {
  std::string_view kind;
  Passes<Float32> float32;
  Passes<BFloat16> bfloat16;
  Passes<Float16> float16;

  const Passes<Float32>& of(Float32) const { return float32; }
  const Passes<BFloat16>& of(BFloat16) const { return bfloat16; }
  const Passes<Float16>& of(Float16) const { return float16; }
};

template <typename Kind>
constexpr Activation activation(std::string_view kind) {
  return {kind, passes<Kind, Float32>(), passes<Kind, BFloat16>(), passes<Kind, Float16>()};
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

inline const Activation& find_activation(const std::string& kind) {
  for (const Activation& a : ACTIVATIONS) {
    if (a.kind == kind) return a;
  }
  std::string choices;
  for (const Activation& a : ACTIVATIONS) {
    choices += (choices.empty() ? "'" : ", '") + std::string(a.kind) + "'";
  }
  STD_TORCH_CHECK(false, "kind must be one of (", choices, "), got '", kind, "'");
}

// fill(row, col, p) adds its tensors to p.
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
