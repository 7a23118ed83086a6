// What coding rows takes and gives, for the operators that do it. The loops are in encode.cpp and
// compile there once.
#pragma once

#include <functional>

#include "rows.h"

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

// Codes of the rows of x, whose columns are cut into `parts`.
Codes encode_plain(const Matrix& x, const Code& code, int64_t parts = 1, const Besides& besides = {});

// Codes of (x - mean) * rstd, a row each; no mean is a mean of 0.
Codes encode_normalized(const Matrix& x, const float* mean, const float* rstd, const Code& code,
                        const Besides& besides = {});

}  // namespace mesa
