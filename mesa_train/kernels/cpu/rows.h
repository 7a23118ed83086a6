// Shared parts of the CPU kernels: tensors that are read and written as rows of float32, the layout
// of codes, and how the work is divided.
//
// A unit of work is a stretch: whole groups of one row, about 2048 elements. So its float32 copy
// stays in the first-level cache, and memory is read once and written once.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <memory>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "codes.h"

namespace mesa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t STRETCH = 2048;
// The number of elements that justify a thread, as in ATen.
constexpr int64_t GRAIN = 32768;

// How far a thread prefetches ahead of its work: far enough to hide also a miss of the address
// cache.
constexpr int64_t BYTES_AHEAD = 12 * 1024;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

using FloatVector = std::vector<float, OnLines<float>>;

// --- tensors ---

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype);
}

// Calls f with the type that reads and writes a dtype. Float64 has no such type: float64 tensors
// are cast before and after.
template <typename F>
void with_dtype(ScalarType type, const F& f) {
  if (type == ScalarType::BFloat16) return f(BFloat16{});
  if (type == ScalarType::Half) return f(Float16{});
  f(Float32{});
}

inline void check_floating(const char* name, ScalarType type) {
  const bool known = type == ScalarType::Float || type == ScalarType::BFloat16 ||
                     type == ScalarType::Half || type == ScalarType::Double;
  STD_TORCH_CHECK(known, name,
                  " must be a floating-point tensor (float64, float32, float16 or bfloat16), got ",
                  torch::headeronly::toString(type));
}

inline Tensor cast(const Tensor& from, ScalarType dtype) {
  std::vector<int64_t> sizes(from.dim());
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = from.size(d);
  Tensor to = empty(sizes, dtype);
  return torch::stable::copy_(to, from);
}

// A 2-D tensor of any float dtype, read row by row.
struct Matrix {
  Tensor tensor;
  ScalarType type;  // the dtype that is read
  int64_t rows, cols;

  Matrix(const char* name, const Tensor& t) : tensor(t), type(t.scalar_type()) {
    STD_TORCH_CHECK(t.dim() == 2, name, " must be 2-D (rows, cols), got ", t.dim(), "-D");
    check_floating(name, type);
    rows = t.size(0);
    cols = t.size(1);
    if (type == ScalarType::Double) {
      type = ScalarType::Float;
      tensor = cast(t, type);
    } else if (cols > 1 && t.stride(1) != 1) {
      tensor = torch::stable::contiguous(t);
    }
    data_ = static_cast<const char*>(tensor.const_data_ptr());
    width_ = tensor.element_size();
    stride_ = tensor.stride(0) * width_;
  }
  template <typename T>
  const typename T::Raw* row(int64_t row) const {
    return reinterpret_cast<const typename T::Raw*>(data_ + row * stride_);
  }
  const void* at(int64_t row, int64_t col) const { return data_ + row * stride_ + col * width_; }
  // Whether other data lies between the rows.
  bool scattered() const { return stride_ != cols * width_; }

 private:
  const char* data_;
  int64_t width_, stride_;  // bytes
};

// A new (rows, cols) tensor, written row by row as `type`. `type` is float32 if the result is cast
// to another dtype afterwards.
struct Output {
  Tensor tensor;

  Output(int64_t rows, int64_t cols, ScalarType dtype, ScalarType type)
      : tensor(empty({rows, cols}, type)), dtype_(dtype) {
    check_floating("dtype", dtype);
    data_ = static_cast<char*>(tensor.mutable_data_ptr());
    width_ = tensor.element_size();
    stride_ = cols * width_;
  }
  template <typename T>
  typename T::Raw* row(int64_t row) const {
    return reinterpret_cast<typename T::Raw*>(data_ + row * stride_);
  }
  void* at(int64_t row, int64_t col) const { return data_ + row * stride_ + col * width_; }
  Tensor result() const {
    return tensor.scalar_type() == dtype_ ? tensor : cast(tensor, dtype_);
  }

 private:
  ScalarType dtype_;
  char* data_;
  int64_t width_, stride_;  // bytes
};

inline ScalarType written_as(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Float : dtype;
}

// A small vector (a weight, a bias, a row statistic) in float32, followed by zeros for two vectors'
// width. `data` is null if the tensor is absent.
struct Vector {
  FloatVector values;
  const float* data = nullptr;

  Vector(const char* name, const std::optional<Tensor>& t, int64_t length) {
    if (!t) return;
    STD_TORCH_CHECK(t->dim() == 1, name, " must be 1-D, got ", t->dim(), "-D");
    STD_TORCH_CHECK(t->size(0) == length, name, " must have ", length, " elements, got ",
                    t->size(0));
    check_floating(name, t->scalar_type());
    const bool ready = t->scalar_type() == ScalarType::Float && t->is_contiguous();
    const Tensor source = ready ? *t : cast(*t, ScalarType::Float);
    values.resize(length + PAIR);
    std::memcpy(values.data(), source.const_data_ptr(), length * sizeof(float));
    data = values.data();
  }
};

// --- codes ---

// The layout of a row of codes, and how the row is cut into stretches that start on a whole byte.
// Rows that are one short stretch are processed together.
struct Layout {
  int bits;
  Planes planes;
  int64_t cols, groups, size, bytes, low_bytes;
  int64_t stretch_groups, stretch, stretches, together;

  Layout(int64_t bits_, int64_t cols_, int64_t groups_)
      : bits(checked(bits_)), planes(bits), cols(cols_), groups(groups_) {
    size = groups ? ceil_div(cols, groups) : 0;
    low_bytes = ceil_div(cols * planes.low, 8);
    bytes = low_bytes + ceil_div(cols * planes.high, 8);
    const int64_t per_byte = 8 / planes.least();
    const int64_t fit = size ? STRETCH / size / per_byte * per_byte : 0;
    stretch_groups = std::clamp(fit, per_byte, Grids::ROOM);
    stretch = stretch_groups * size;
    stretches = ceil_div(groups, stretch_groups);
    together = stretches == 1 ? std::max<int64_t>(1, stretch_groups / groups) : 1;
  }

  // The distance in rows from the row in work to the row that should be prefetched.
  int64_t rows_ahead(int64_t width) const {
    return std::max(together, BYTES_AHEAD / std::max<int64_t>(1, cols * width));
  }

  // Where the codes of a row from column `col` on are stored, in the row's bytes.
  Target target(uint8_t* row, int64_t col) const {
    return {row + col * planes.low / 8, row + low_bytes + col * planes.high / 8, planes};
  }

 private:
  static int checked(int64_t bits) {
    STD_TORCH_CHECK(bits == 8 || (bits >= 2 && bits <= 6),
                    "bits must be one of (8, 6, 5, 4, 3, 2), got ", bits);
    return static_cast<int>(bits);
  }
};

// `groups` groups with `n` elements, of each of `rows` rows.
struct Stretch {
  int64_t row, rows, group, groups, col, n;
};

// body(for_each) runs once per thread, so it can own its buffers. for_each visits the thread's
// stretches. whole: a thread gets whole rows.
template <typename Body>
void parallel_stretches(int64_t rows, const Layout& layout, bool whole, const Body& body) {
  if (rows == 0 || layout.cols == 0) return;
  const int64_t unit = whole ? layout.stretches : 1;
  const int64_t length = whole ? layout.cols : std::min(layout.stretch, layout.cols);
  torch::stable::parallel_for(
      0, ceil_div(rows, layout.together) * layout.stretches / unit,
      std::max<int64_t>(1, GRAIN / (length * layout.together)), [&](int64_t begin, int64_t end) {
        body([&](const auto& visit) {
          for (int64_t i = begin * unit; i < end * unit; ++i) {
            const int64_t row = i / layout.stretches * layout.together;
            const int64_t group = i % layout.stretches * layout.stretch_groups;
            const int64_t col = group * layout.size;
            visit(Stretch{row, std::min(layout.together, rows - row), group,
                          std::min(layout.stretch_groups, layout.groups - group), col,
                          std::min(layout.stretch, layout.cols - col)});
          }
        });
      });
}

template <typename Body>
void parallel_stretches(int64_t rows, const Layout& layout, const Body& body) {
  parallel_stretches(rows, layout, false, body);
}

// Codes and scales of (rows, cols), with checked shapes and dtypes.
struct Coded {
  Tensor codes, scales;
  Layout layout;

  Coded(const Tensor& codes_, const Tensor& scales_, int64_t bits, int64_t rows, int64_t cols)
      : codes(codes_), scales(scales_), layout(bits, cols, check_scales(scales_)) {
    STD_TORCH_CHECK(codes.dim() == 2, "codes must be 2-D (rows, bytes), got ", codes.dim(), "-D");
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, "codes must be torch.uint8, got ",
                    torch::headeronly::toString(codes.scalar_type()));
    STD_TORCH_CHECK(codes.size(0) == rows && scales.size(0) == rows,
                    "codes and scales must have ", rows, " rows, got ", codes.size(0), " and ",
                    scales.size(0));
    STD_TORCH_CHECK(codes.size(1) == layout.bytes, "codes must have ", layout.bytes,
                    " bytes a row for cols=", cols, " at bits=", bits, ", got ", codes.size(1));
    STD_TORCH_CHECK(cols == 0 || (layout.size && layout.groups == ceil_div(cols, layout.size)),
                    "scales must have as many groups as cols=", cols, " can be cut into, got ",
                    layout.groups);
    if (!codes.is_contiguous()) codes = torch::stable::contiguous(codes);
    if (!scales.is_contiguous()) scales = torch::stable::contiguous(scales);
    bytes_ = static_cast<const uint8_t*>(codes.const_data_ptr());
    grids_ = static_cast<const Grid*>(scales.const_data_ptr());
  }

  // The number of elements that `q` needs in its buffer.
  int64_t room() const { return layout.stretch + 8; }

  // The codes of n elements of a row, one per byte. They are unpacked to `room` unless they already
  // take one byte each.
  const uint8_t* q(int64_t row, int64_t col, int64_t n, uint8_t* room) const {
    const Planes& planes = layout.planes;
    const uint8_t* const from = bytes_ + row * layout.bytes;
    if (layout.bits == 8) return from + col;
    unpack_low(from + col * planes.low / 8, room, n, planes.low);
    if (planes.high) {
      unpack_high(from + layout.low_bytes + col * planes.high / 8, room, n, planes.high, planes.low);
    }
    return room;
  }
  const Grid* grids(int64_t row, int64_t group) const {
    return grids_ + row * layout.groups + group;
  }

 private:
  static int64_t check_scales(const Tensor& scales) {
    STD_TORCH_CHECK(scales.scalar_type() == ScalarType::BFloat16 && scales.dim() == 3,
                    "scales must be torch.bfloat16 (rows, groups, 2), got ",
                    torch::headeronly::toString(scales.scalar_type()), " ", scales.dim(), "-D");
    STD_TORCH_CHECK(scales.size(2) == 2, "scales must end in 2, got ", scales.size(2));
    return scales.size(1);
  }
  const uint8_t* bytes_;
  const Grid* grids_;
};

// Codes that are decoded with their draws subtracted.
struct DitheredCodes {
  const Coded& coded;
  int64_t seed;
  Dithered form;
  std::vector<uint16_t> elements;

  static std::optional<DitheredCodes> of(const Coded& coded, const std::optional<int64_t>& seed) {
    return seed ? std::optional<DitheredCodes>(std::in_place, coded, *seed) : std::nullopt;
  }

  DitheredCodes(const Coded& coded_, int64_t seed_)
      : coded(coded_), seed(seed_), form(coded_.layout.bits),
        elements(Draws::mixed(coded_.layout.size)) {}

  // The integers of n elements of a row, from column `col` in group `group` on, in `to`. `room` is
  // as for `Coded::q`.
  void combine(int64_t row, int64_t group, int64_t col, int64_t n, uint8_t* room,
               uint16_t* to) const {
    const Layout& layout = coded.layout;
    const uint8_t* const q = coded.q(row, col, n, room);
    const Grid* const grids = coded.grids(row, group);
    const int64_t index = row * layout.groups + group;
    for (int64_t begin = 0, g = 0; begin < n; begin += layout.size, ++g) {
      form.combine(q + begin, to + begin, std::min(layout.size, n - begin), grids[g],
                   Draws::of(elements.data(), grids[g], index + g, seed));
    }
  }
};

template <typename T>
struct FreeOnLines {
  void operator()(T* p) const { OnLines<T>().deallocate(p, 0); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], FreeOnLines<T>>;

// An uninitialised buffer.
template <typename T>
Buffer<T> buffer(int64_t n) {
  return Buffer<T>(OnLines<T>().allocate(n));
}

}  // namespace mesa
