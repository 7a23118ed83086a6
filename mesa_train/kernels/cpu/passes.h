// Passes over groups of codes that compute an activation, its backward, or both. Also passes over
// values that were never codes. passes.cpp compiles the passes for one dtype at a time.
#pragma once

#include <span>
#include <string_view>

#include "activations.h"
#include "codes.h"

namespace mesa {

// Some groups of a row: their codes, and the corresponding elements of the other tensors.
struct Piece {
  const uint8_t* q;
  const Grid* grids;
  int64_t groups, size, n;
  const void* grad;  // this and dx are null unless the backward is computed
  void* dx;
  void* y;  // null unless the activation is computed
};

// An activation and its slope at a group's codes, computed for each code.
template <typename Kind, typename T>
struct Computed {
  typename Evaluator<Kind, T>::Type kind;
  float scale, zero;
  void enter(Grid grid) { scale = grid.scale(), zero = grid.zero(); }
  Floats at(Bytes q) const { return floats(q) * scale + zero; }
  Floats value(Bytes q) const { return kind.template value<T>(at(q)); }
  Floats slope(Bytes q) const { return kind.template slope<T>(at(q)); }
};

// An activation and its slope at a group's codes, looked up in a table of 16 or 4 values.
template <typename Kind, typename T>
struct Tabled {
  typename Evaluator<Kind, T>::Type kind;
  Table values, slopes;  // the compiler removes the table that a pass does not use
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

// The activation of n values that were never codes: a forward. No error of a code hides its own
// error, so it is computed with the accuracy of float32.
template <typename T, typename Kind>
void activate_values(const void* from, void* to, int64_t n) {
  using Raw = typename T::Raw;
  const typename Evaluator<Kind, Float32>::Type kind;
  map_all<T, T>(static_cast<const Raw*>(from), static_cast<Raw*>(to), n,
                [&](Floats x, int64_t) { return kind.template value<Float32>(x); });
}

using ActivateValues = void (*)(const void*, void*, int64_t);

// The passes for one dtype: from codes over 4 bits, from codes of at most 4 bits, and from values.
struct Passes {
  Activate value[2], backward[2], pair[2];
  ActivateValues values;
};

template <typename Kind, typename T>
constexpr Passes passes() {
  using Long = Computed<Kind, T>;
  using Short = Tabled<Kind, T>;
  return {{activate<T, Long, false, true>, activate<T, Short, false, true>},
          {activate<T, Long, true, false>, activate<T, Short, true, false>},
          {activate<T, Long, true, true>, activate<T, Short, true, true>},
          activate_values<T, Kind>};
}

struct Activation {
  std::string_view kind;
  Passes passes;
};

// All activations, in the same order for every dtype.
template <typename T>
std::span<const Activation> activations();

}  // namespace mesa
