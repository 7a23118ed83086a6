// What the CPU kernels share: tensors read and written as rows of float32, the layout of codes, and
// how the work is split.
//
// A unit of work is a stretch of one row: whole groups, about 2048 elements, so that its float32
// copy stays in the first-level cache while memory is read once and written once.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <memory>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu_stages.h"

namespace mesa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t STRETCH = 2048;
// Elements worth a thread: what ATen uses.
constexpr int64_t GRAIN = 32768;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- tensors ---

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype);
}

struct Dtype {
  ScalarType type;
  Load load;
  Store store;
};

inline constexpr Dtype DTYPES[] = {
    {ScalarType::Float, load_float, store_float},
    {ScalarType::BFloat16, load_bfloat16, store_bfloat16},
    {ScalarType::Half, load_half, store_half},
    {ScalarType::Double, load_double, store_double},
};

inline const Dtype& floating(const char* name, ScalarType type) {
  for (const Dtype& d : DTYPES) {
    if (d.type == type) return d;
  }
  STD_TORCH_CHECK(false, name,
                  " must be a floating-point tensor (float64, float32, float16 or bfloat16), got ",
                  torch::headeronly::toString(type));
}

// A 2-D tensor of any float dtype, read row by row.
struct Matrix {
  Tensor tensor;
  Load load;
  int64_t rows, cols;

  Matrix(const char* name, const Tensor& t) : tensor(t) {
    STD_TORCH_CHECK(t.dim() == 2, name, " must be 2-D (rows, cols), got ", t.dim(), "-D");
    load = floating(name, t.scalar_type()).load;
    rows = t.size(0);
    cols = t.size(1);
    if (cols > 1 && t.stride(1) != 1) tensor = torch::stable::contiguous(t);
    data_ = static_cast<const char*>(tensor.const_data_ptr());
    width_ = tensor.element_size();
    stride_ = tensor.stride(0) * width_;
  }
  void read(int64_t row, int64_t col, float* to, int64_t n) const {
    load(data_ + row * stride_ + col * width_, to, n);
  }

 private:
  const char* data_;
  int64_t width_, stride_;
};

// A fresh (rows, cols) tensor, written row by row.
struct Output {
  Tensor tensor;

  Output(int64_t rows, int64_t cols, ScalarType dtype)
      : tensor(empty({rows, cols}, dtype)), store_(floating("dtype", dtype).store), cols_(cols) {
    data_ = static_cast<char*>(tensor.mutable_data_ptr());
    width_ = tensor.element_size();
  }
  void write(int64_t row, int64_t col, const float* from, int64_t n) const {
    store_(from, data_ + (row * cols_ + col) * width_, n);
  }

 private:
  Store store_;
  char* data_;
  int64_t cols_, width_;
};

// A small vector (a weight, a bias, a row statistic) in float32; `data` is null when it is absent.
struct Vector {
  std::vector<float> values;
  const float* data = nullptr;

  Vector(const char* name, const std::optional<Tensor>& t, int64_t length) {
    if (!t) return;
    STD_TORCH_CHECK(t->dim() == 1, name, " must be 1-D, got ", t->dim(), "-D");
    STD_TORCH_CHECK(t->size(0) == length, name, " must have ", length, " elements, got ",
                    t->size(0));
    const Load load = floating(name, t->scalar_type()).load;
    const Tensor source = torch::stable::contiguous(*t);
    values.resize(length);
    load(source.const_data_ptr(), values.data(), length);
    data = values.data();
  }
};

// --- codes ---

// How a row of codes is laid out, and how it is cut into stretches that start on a whole byte.
struct Layout {
  int bits;
  int64_t cols, groups, size, bytes;
  int64_t stretch_groups, stretch, stretches;

  Layout(int64_t bits_, int64_t cols_, int64_t groups_) : cols(cols_), groups(groups_) {
    STD_TORCH_CHECK(bits_ == 8 || bits_ == 4 || bits_ == 2, "bits must be one of (8, 4, 2), got ",
                    bits_);
    bits = static_cast<int>(bits_);
    size = groups ? ceil_div(cols, groups) : 0;
    bytes = ceil_div(cols * bits, 8);
    const int64_t per_byte = 8 / bits;
    const int64_t fit = size ? STRETCH / size / per_byte * per_byte : 0;
    stretch_groups = std::max(fit, per_byte);
    stretch = stretch_groups * size;
    stretches = ceil_div(groups, stretch_groups);
  }
};

struct Stretch {
  int64_t row, group, groups, col, n;
};

// body(for_each) runs once a thread, so that it can own its buffers; for_each visits its stretches.
template <typename Body>
void parallel_stretches(int64_t rows, const Layout& layout, const Body& body) {
  if (rows == 0 || layout.cols == 0) return;
  const int64_t length = std::min(layout.stretch, layout.cols);
  torch::stable::parallel_for(
      0, rows * layout.stretches, std::max<int64_t>(1, GRAIN / length),
      [&](int64_t begin, int64_t end) {
        body([&](const auto& visit) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / layout.stretches;
            const int64_t group = i % layout.stretches * layout.stretch_groups;
            const int64_t col = group * layout.size;
            visit(Stretch{row, group, std::min(layout.stretch_groups, layout.groups - group), col,
                          std::min(layout.stretch, layout.cols - col)});
          }
        });
      });
}

// Codes and scales of (rows, cols), checked and read as float32 values.
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
    scales_ptr_ = static_cast<const uint16_t*>(scales.const_data_ptr());
  }

  // `unpacked` has room for a stretch and 3 more; `to` for a stretch.
  void read(const Stretch& s, uint8_t* unpacked, float* to) const {
    const uint8_t* q = bytes_ + s.row * layout.bytes + s.col * layout.bits / 8;
    if (layout.bits != 8) {
      unpack(q, unpacked, s.n, layout.bits);
      q = unpacked;
    }
    const uint16_t* grid = scales_ptr_ + (s.row * layout.groups + s.group) * 2;
    for (int64_t g = 0; g < s.groups; ++g) {
      const float scale = as_float(static_cast<uint32_t>(grid[2 * g]) << 16);
      const float zero = as_float(static_cast<uint32_t>(grid[2 * g + 1]) << 16);
      const int64_t begin = g * layout.size, end = std::min(begin + layout.size, s.n);
      for (int64_t i = begin; i < end; ++i) to[i] = static_cast<float>(q[i]) * scale + zero;
    }
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
  const uint16_t* scales_ptr_;
};

template <typename T>
std::unique_ptr<T[]> buffer(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

}  // namespace mesa
