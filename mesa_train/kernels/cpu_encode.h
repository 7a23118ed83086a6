// The coding of rows: two passes over as many groups as have a lane in one vector, the second from
// the first-level cache. In between their grids are computed together.
#pragma once

#include <functional>

#include "cpu_rows.h"

namespace mesa {

// How values are coded.
struct Code {
  int64_t bits, group_size;
  bool stochastic;
  int64_t seed;
};

// Fresh codes and scales of a matrix; or of each of the `parts` that its columns are cut into, as the
// rows of the parts follow each other in memory: of three parts, row 7 is row 2 of the second.
struct Codes {
  struct Part {
    Tensor codes, scales;
    uint8_t* bytes;
    char* grids;
  };
  std::vector<Part> parts;

  // `layout` is a part's.
  Codes(int64_t rows, const Layout& layout, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      Tensor codes = empty({rows, layout.bytes}, ScalarType::Byte);
      Tensor scales = empty({rows, layout.groups, 2}, ScalarType::BFloat16);
      auto* const bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
      auto* const grids = static_cast<char*>(scales.mutable_data_ptr());
      parts.push_back({std::move(codes), std::move(scales), bytes, grids});
    }
  }
  int64_t count() const { return static_cast<int64_t>(parts.size()); }
};

// What each row is read through; of a matrix in parts, their rows in turns.
template <typename T>
struct PlainRows {
  const Matrix& x;
  int64_t parts, cols;
  Plain<T> operator()(int64_t row) const {
    if (parts == 1) return {x.row<T>(row)};
    return {x.row<T>(row / parts) + row % parts * cols};
  }
};

template <typename T>
struct NormalizedRows {
  const Matrix& x;
  const float *mean, *rstd;  // a row each; no mean is a mean of 0
  Normalized<T> operator()(int64_t row) const {
    return {x.row<T>(row), mean ? mean[row] : 0.0f, rstd[row]};
  }
};

// What a forward computes beside the codes of its rows, while those are in the cache: one a thread,
// which then visits whole rows.
struct Beside {
  virtual ~Beside() = default;
  // Before a row is read for its codes.
  virtual void before(int64_t /*row*/) {}
  // After n of its elements were coded.
  virtual void after(int64_t /*row*/, int64_t /*col*/, int64_t /*n*/) {}
};
using Besides = std::function<std::unique_ptr<Beside>()>;

// Encodes the rows of a matrix; one a thread.
template <typename Rows>
struct Encoder {
  const Layout& layout;
  const Codes& out;
  const Rows& rows;
  Code code;
  const uint16_t* elements;  // what `Draws` reads
  int64_t scattered;         // 0, or the number of rows, where they do not follow each other in memory
  std::unique_ptr<Beside> beside;
  Grids grids;
  Buffer<uint8_t> room = buffer<uint8_t>(layout.stretch + BLOCK);

  using Source = decltype(std::declval<Rows>()(0));
  using Raw = typename Source::Dtype::Raw;

  // The codes of a group of n elements, the `k`-th in `grids` and the `index`-th of its tensor.
  void quantize(const Source& x, uint8_t* to, int64_t n, int64_t k, int64_t index, int width) {
    const float zero = grids.zero[k], inverse = grids.inverse[k];
    const Width size{layout.bits, width};
    const uint32_t key =
        code.stochastic ? mix(grids.stored[k] ^ mix(static_cast<uint32_t>(index) ^
                                                    static_cast<uint32_t>(code.seed)))
                        : 0;
    const Draws draws{elements, static_cast<uint16_t>(key | 1), static_cast<uint16_t>(key >> 16)};
    if (grids.extreme[k]) [[unlikely]] {
      uint8_t* const q = width == 8 ? to : room.get();
      quantize_extreme(x, q, n, zero, inverse, layout.bits, code.stochastic ? &draws : nullptr);
      if (width != 8) pack(q, to, n, width);
    } else if (code.stochastic) {
      quantize_stochastic(x, to, n, zero, inverse, size, draws);
    } else {
      quantize_nearest(x, to, n, zero, inverse, size);
    }
  }

  // visit(which group of the row's, its source, where it begins in the stretch, its length)
  template <typename Visit>
  void for_groups(const Stretch& s, int64_t r, const Visit& visit) const {
    const Source row = rows(s.row + r);
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t begin = g * layout.size, n = std::min(layout.size, s.n - begin);
      visit(g, row.on(row.x + s.col + begin), begin, n);
    }
  }

  void encode(const Stretch& s) {
    for (int64_t r = 0; r < s.rows; ++r) {
      if (beside && s.group == 0) beside->before(s.row + r);
      for_groups(s, r, [&](int64_t g, const Source& x, int64_t, int64_t n) {
        Padded<Raw, BLOCK> padded;
        grids.ends[r * s.groups + g] = find_ends(x.on(padded.read(x.x, n)), std::max(n, BLOCK));
      });
    }
    grids.compute(layout.bits);
    for (int64_t r = 0; r < s.rows; ++r) encode_row(s, r);
  }

  // The codes of the stretch's r-th row.
  void encode_row(const Stretch& s, int64_t r) {
    const int64_t virtual_row = s.row + r, count = out.count();
    const Codes::Part& part = out.parts[count == 1 ? 0 : virtual_row % count];
    const int64_t row = count == 1 ? virtual_row : virtual_row / count;
    const int64_t first = row * layout.groups + s.group;
    std::memcpy(part.grids + first * sizeof(Grid), grids.stored + r * s.groups,
                s.groups * sizeof(Grid));
    // Where groups do not begin and end on whole bytes, a row is packed when its codes are there.
    const bool whole = layout.size * layout.bits % 8 == 0 && s.n * layout.bits % 8 == 0;
    const int width = whole ? layout.bits : 8;
    uint8_t* const bytes = part.bytes + row * layout.bytes + s.col * layout.bits / 8;
    uint8_t* const to = whole ? bytes : room.get();
    const int64_t later = virtual_row + layout.rows_ahead(sizeof(Raw));
    for_groups(s, r, [&](int64_t g, const Source& x, int64_t begin, int64_t n) {
      if (later < scattered) prefetch_far(rows(later).x + s.col + begin, n * sizeof(Raw));
      Padded<Raw, BLOCK> padded;
      Padded<uint8_t, BLOCK> codes;
      uint8_t* const group = to + begin * width / 8;
      quantize(x.on(padded.read(x.x, n)), codes.write(group, n), std::max(n, BLOCK),
               r * s.groups + g, first + g, width);
      codes.finish(group, n, n * width / 8);
    });
    if (beside) beside->after(virtual_row, s.col, s.n);
    if (!whole) {
      std::memset(to + s.n, 0, 3);
      pack(to, bytes, s.n, layout.bits);
    }
  }
};

// rows_of(dtype) reads x, whose columns are cut into `parts`.
template <typename RowsOf>
Codes encode(const Matrix& x, int64_t parts, const Code& code, const Besides& besides,
             const RowsOf& rows_of) {
  STD_TORCH_CHECK(code.group_size >= 1, "group_size must be at least 1, got ", code.group_size);
  const int64_t rows = x.rows * parts, cols = x.cols / parts;
  const Layout layout(code.bits, cols, ceil_div(cols, code.group_size));
  Codes out(x.rows, layout, parts);
  const std::vector<uint16_t> elements = Draws::mixed(code.stochastic ? layout.size : 0);
  with_dtype(x.type, [&]<typename T>(T dtype) {
    const auto sources = rows_of(dtype);
    parallel_stretches(rows, layout, static_cast<bool>(besides), [&](const auto& for_each) {
      Encoder<decltype(sources)> encoder{layout,
                                         out,
                                         sources,
                                         code,
                                         elements.data(),
                                         x.scattered() ? rows : 0,
                                         besides ? besides() : nullptr};
      for_each([&](const Stretch& s) { encoder.encode(s); });
    });
  });
  return out;
}

inline Codes encode_plain(const Matrix& x, const Code& code, int64_t parts = 1,
                          const Besides& besides = {}) {
  return encode(x, parts, code, besides,
                [&]<typename T>(T) { return PlainRows<T>{x, parts, x.cols / parts}; });
}

inline Codes encode_normalized(const Matrix& x, const float* mean, const float* rstd,
                               const Code& code, const Besides& besides = {}) {
  return encode(x, 1, code, besides,
                [&]<typename T>(T) { return NormalizedRows<T>{x, mean, rstd}; });
}

}  // namespace mesa
