// The coding of rows: two passes over as many groups as have a lane in one vector, the second from
// the first-level cache. In between their grids are computed together.
#pragma once

#include "cpu_rows.h"

namespace mesa {

struct Codes {
  Tensor codes, scales;
  uint8_t* bytes;
  char* grids;

  Codes(int64_t rows, const Layout& layout)
      : codes(empty({rows, layout.bytes}, ScalarType::Byte)),
        scales(empty({rows, layout.groups, 2}, ScalarType::BFloat16)),
        bytes(static_cast<uint8_t*>(codes.mutable_data_ptr())),
        grids(static_cast<char*>(scales.mutable_data_ptr())) {}
};

struct Rounding {
  bool stochastic;
  uint32_t seed;
};

// Encodes the rows of a matrix; one a thread. source(row) is what its elements are read through.
template <typename SourceOf>
struct Encoder {
  const Layout& layout;
  const Codes& out;
  const SourceOf& source;
  Rounding rounding;
  const uint16_t* elements;  // what `Draws` reads
  int64_t scattered;         // 0, or the number of rows, where they do not follow each other in memory
  Grids grids;
  std::unique_ptr<uint8_t[]> room{new uint8_t[layout.stretch + BLOCK]};

  using Source = decltype(std::declval<SourceOf>()(0));
  using Raw = typename Source::Dtype::Raw;

  // The codes of a group of n elements, the `k`-th in `grids` and the `index`-th of the tensor.
  void quantize(const Source& x, uint8_t* to, int64_t n, int64_t k, int64_t index, int width) {
    const float zero = grids.zero[k], inverse = grids.inverse[k];
    const Width size{layout.bits, width};
    const uint32_t key =
        rounding.stochastic
            ? mix(grids.stored[k] ^ mix(static_cast<uint32_t>(index) ^ rounding.seed))
            : 0;
    const Draws draws{elements, static_cast<uint16_t>(key | 1), static_cast<uint16_t>(key >> 16)};
    if (grids.extreme[k]) [[unlikely]] {
      uint8_t* const q = width == 8 ? to : room.get();
      quantize_extreme(x, q, n, zero, inverse, layout.bits, rounding.stochastic ? &draws : nullptr);
      if (width != 8) pack(q, to, n, width);
    } else if (rounding.stochastic) {
      quantize_stochastic(x, to, n, zero, inverse, size, draws);
    } else {
      quantize_nearest(x, to, n, zero, inverse, size);
    }
  }

  // visit(the group's index in `grids`, its source, where it begins in the stretch, its length)
  template <typename Visit>
  void for_groups(const Stretch& s, int64_t r, const Visit& visit) const {
    const Source row = source(s.row + r);
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t begin = g * layout.size, n = std::min(layout.size, s.n - begin);
      visit(r * s.groups + g, row.on(row.x + s.col + begin), begin, n);
    }
  }

  void encode(const Stretch& s) {
    for (int64_t r = 0; r < s.rows; ++r) {
      for_groups(s, r, [&](int64_t k, const Source& x, int64_t, int64_t n) {
        Padded<Raw, BLOCK> padded;
        grids.ends[k] = find_ends(x.on(padded.read(x.x, n)), std::max(n, BLOCK));
      });
    }
    grids.compute(layout.bits);
    const int64_t first = s.row * layout.groups + s.group;
    std::memcpy(out.grids + first * sizeof(Grid), grids.stored, s.rows * s.groups * sizeof(Grid));

    // Where groups do not begin and end on whole bytes, a row is packed when its codes are there.
    const bool whole = layout.size * layout.bits % 8 == 0 && s.n * layout.bits % 8 == 0;
    const int width = whole ? layout.bits : 8;
    for (int64_t r = 0; r < s.rows; ++r) {
      uint8_t* const bytes = out.bytes + (s.row + r) * layout.bytes + s.col * layout.bits / 8;
      uint8_t* const to = whole ? bytes : room.get();
      const int64_t later = s.row + r + layout.rows_ahead(sizeof(Raw));
      for_groups(s, r, [&](int64_t k, const Source& x, int64_t begin, int64_t n) {
        if (later < scattered) prefetch_far(source(later).x + s.col + begin, n * sizeof(Raw));
        Padded<Raw, BLOCK> padded;
        Padded<uint8_t, BLOCK> codes;
        uint8_t* const group = to + begin * width / 8;
        quantize(x.on(padded.read(x.x, n)), codes.write(group, n), std::max(n, BLOCK), k, first + k,
                 width);
        codes.finish(group, n, n * width / 8);
      });
      if (!whole) {
        std::memset(to + s.n, 0, 3);
        pack(to, bytes, s.n, layout.bits);
      }
    }
  }
};

// source(dtype, row) is what row's elements are read through.
template <typename Source>
std::tuple<Tensor, Tensor> encode(const Matrix& x, int64_t bits, int64_t group_size,
                                  Rounding rounding, const Source& source) {
  STD_TORCH_CHECK(group_size >= 1, "group_size must be at least 1, got ", group_size);
  const Layout layout(bits, x.cols, ceil_div(x.cols, group_size));
  const Codes out(x.rows, layout);
  const std::vector<uint16_t> elements = Draws::mixed(rounding.stochastic ? layout.size : 0);
  with_dtype(x.type, [&]<typename T>(T dtype) {
    const auto of = [&](int64_t row) { return source(dtype, row); };
    parallel_stretches(x.rows, layout, [&](const auto& for_each) {
      Encoder<decltype(of)> encoder{layout, out, of, rounding, elements.data(),
                                    x.scattered() ? x.rows : 0};
      for_each([&](const Stretch& s) { encoder.encode(s); });
    });
  });
  return {out.codes, out.scales};
}

}  // namespace mesa
