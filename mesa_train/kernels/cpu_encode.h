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

// The codes of one group, `first` its index in the tensor and `column` that of its first element.
template <typename Source>
inline void quantize(const Source& x, uint8_t* q, int64_t n, const Grids& grids, int64_t g,
                     int bits, Rounding rounding, int64_t first, int64_t column) {
  if (rounding.stochastic) {
    const uint32_t index = static_cast<uint32_t>(first + g) ^ rounding.seed;
    quantize_stochastic(x, q, n, grids.zero[g], grids.inverse[g], bits,
                        mix(grids.stored[g] ^ mix(index)), static_cast<uint32_t>(column));
  } else {
    quantize_nearest(x, q, n, grids.zero[g], grids.inverse[g], bits);
  }
}

// source(row) is what row's elements are read through.
template <typename SourceOf>
void encode_stretch(const Stretch& s, int64_t rows, const Layout& layout, const SourceOf& source, Grids& grids,
                    Rounding rounding, const Codes& out, uint8_t* room) {
  using Raw = typename decltype(source(0))::Dtype::Raw;
  // visit(group among the stretch's, its source, where it begins in its row's stretch, its length)
  const auto for_groups = [&](int64_t r, const auto& visit) {
    const auto row = source(s.row + r);
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t begin = g * layout.size, n = std::min(layout.size, s.n - begin);
      visit(r * s.groups + g, row.on(row.x + s.col + begin), begin, n);
    }
  };
  for (int64_t r = 0; r < s.rows; ++r) {
    for_groups(r, [&](int64_t k, const auto& x, int64_t, int64_t n) {
      Padded<Raw> padded;
      grids.ends[k] = find_ends(x.on(padded.read(x.x, n)), std::max<int64_t>(n, LANES));
    });
  }
  grids.compute(layout.bits);
  const int64_t first = s.row * layout.groups + s.group;
  std::memcpy(out.grids + first * sizeof(Grid), grids.stored, s.rows * s.groups * sizeof(Grid));

  for (int64_t r = 0; r < s.rows; ++r) {
    uint8_t* const bytes = out.bytes + (s.row + r) * layout.bytes + s.col * layout.bits / 8;
    uint8_t* const q = layout.bits == 8 ? bytes : room;
    if (const int64_t later = s.row + r + layout.rows_ahead(sizeof(Raw)); later < rows) {
      prefetch(source(later).x + s.col, s.n * sizeof(Raw));
    }
    for_groups(r, [&](int64_t k, const auto& x, int64_t begin, int64_t n) {
      Padded<Raw> padded;
      Padded<uint8_t> codes;
      quantize(x.on(padded.read(x.x, n)), codes.write(q + begin, n), std::max<int64_t>(n, LANES),
               grids, k, layout.bits, rounding, first, s.col + begin);
      codes.finish(q + begin, n);
    });
    if (layout.bits != 8) {
      std::memset(q + s.n, 0, 3);
      pack(q, bytes, s.n, layout.bits);
    }
  }
}

// source(dtype, row) is what row's elements are read through.
template <typename Source>
std::tuple<Tensor, Tensor> encode(const Matrix& x, int64_t bits, int64_t group_size,
                                  Rounding rounding, const Source& source) {
  STD_TORCH_CHECK(group_size >= 1, "group_size must be at least 1, got ", group_size);
  const Layout layout(bits, x.cols, ceil_div(x.cols, group_size));
  const Codes out(x.rows, layout);
  with_dtype(x.type, [&]<typename T>(T dtype) {
    const auto of = [&](int64_t row) { return source(dtype, row); };
    parallel_stretches(x.rows, layout, [&](const auto& for_each) {
      const auto room = buffer<uint8_t>(layout.stretch + 3);
      Grids grids;
      for_each([&](const Stretch& s) {
        encode_stretch(s, x.rows, layout, of, grids, rounding, out, room.get());
      });
    });
  });
  return {out.codes, out.scales};
}

}  // namespace mesa
