// The interface of row coding, for the operators that code rows. The loops are in encode.cpp and
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

// New codes and scales of a matrix, or of each of the `parts` of its columns. Rows are counted as
// the rows of the parts follow each other in memory: with three parts, row 7 is row 2 of the second
// part.
struct Codes {
  struct Part {
    Tensor codes, scales;
    uint8_t* bytes;
    char* grids;
  };
  std::vector<Part> parts;

  // `layout` is the layout of one part.
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

// Work of a fused forward on its rows, beside the coding, while the rows are in the cache. Each
// thread has one object, and then visits whole rows.
struct Beside {
  virtual ~Beside() = default;
  // Called before a row is read for coding.
  virtual void before(int64_t /*row*/) {}
  // Called after n elements of a row were coded.
  virtual void after(int64_t /*row*/, int64_t /*col*/, int64_t /*n*/) {}
};
using Besides = std::function<std::unique_ptr<Beside>()>;

// Codes of the rows of x. The columns of x are cut into `parts`.
Codes encode_plain(const Matrix& x, const Code& code, int64_t parts = 1, const Besides& besides = {});

// Codes of (x - mean) * rstd, with one mean and rstd per row. Without a mean, it is 0.
Codes encode_normalized(const Matrix& x, const float* mean, const float* rstd, const Code& code,
                        const Besides& besides = {});

}  // namespace mesa
