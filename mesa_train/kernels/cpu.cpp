// The operators on the CPU: argument checks, how work is split among threads, and the order of the
// stages. Written against torch's stable ABI (torch >= 2.11), which compiles in seconds.
//
// A unit of work is a stretch of one row: whole groups, about 2048 elements, so that its float32
// copy stays in the first-level cache while memory is read once and written once.

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu_activations.h"
#include "cpu_stages.h"

namespace mesa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t STRETCH = 2048;
// Elements worth a thread: what ATen uses.
constexpr int64_t GRAIN = 32768;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- tensors ---

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype);
}

struct Dtype {
  ScalarType type;
  Load load;
  Store store;
};

constexpr Dtype DTYPES[] = {
    {ScalarType::Float, load_float, store_float},
    {ScalarType::BFloat16, load_bfloat16, store_bfloat16},
    {ScalarType::Half, load_half, store_half},
    {ScalarType::Double, load_double, store_double},
};

const Dtype& floating(const char* name, ScalarType type) {
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
    STD_TORCH_CHECK(cols == 0 || layout.groups > 0, "scales must have at least one group");
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

// `prepare(stretch, values)` changes the float32 values before they are coded.
template <typename Prepare>
std::tuple<Tensor, Tensor> encode(const Matrix& x, int64_t bits, int64_t group_size,
                                  bool stochastic, int64_t seed, const Prepare& prepare) {
  STD_TORCH_CHECK(group_size >= 1, "group_size must be at least 1, got ", group_size);
  const Layout layout(bits, x.cols, ceil_div(x.cols, group_size));
  Tensor codes = empty({x.rows, layout.bytes}, ScalarType::Byte);
  Tensor scales = empty({x.rows, layout.groups, 2}, ScalarType::BFloat16);
  uint8_t* code_data = static_cast<uint8_t*>(codes.mutable_data_ptr());
  char* scale_data = static_cast<char*>(scales.mutable_data_ptr());

  parallel_stretches(x.rows, layout, [&](const auto& for_each) {
    const auto values = buffer<float>(layout.stretch);
    const auto packed = buffer<uint8_t>(layout.stretch + 3);
    Grids grids(layout.stretch_groups);
    for_each([&](const Stretch& s) {
      x.read(s.row, s.col, values.get(), s.n);
      prepare(s, values.get());
      grids.make(values.get(), s.n, s.groups, layout.size, layout.bits);
      const int64_t first = s.row * layout.groups + s.group;
      std::memcpy(scale_data + first * 4, grids.stored.data(), s.groups * 4);

      uint8_t* const out = code_data + s.row * layout.bytes + s.col * layout.bits / 8;
      uint8_t* const q = layout.bits == 8 ? out : packed.get();
      for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t begin = g * layout.size, n = std::min(layout.size, s.n - begin);
        const float zero = grids.zero[g], inverse = grids.inverse[g];
        if (stochastic) {
          const uint32_t index = static_cast<uint32_t>(first + g) ^ static_cast<uint32_t>(seed);
          quantize_stochastic(values.get() + begin, q + begin, n, zero, inverse, layout.bits,
                              mix(grids.stored[g] ^ mix(index)),
                              static_cast<uint32_t>(s.col + begin));
        } else {
          quantize_nearest(values.get() + begin, q + begin, n, zero, inverse, layout.bits);
        }
      }
      if (layout.bits != 8) {
        std::memset(q + s.n, 0, 3);
        pack(q, out, s.n, layout.bits);
      }
    });
  });
  return {codes, scales};
}

// `finish(stretch, values)` changes the float32 values before they are stored.
template <typename Finish>
Tensor decode(const Coded& coded, int64_t rows, ScalarType dtype, const Finish& finish) {
  const Layout& layout = coded.layout;
  const Output out(rows, layout.cols, dtype);
  parallel_stretches(rows, layout, [&](const auto& for_each) {
    const auto values = buffer<float>(layout.stretch);
    const auto unpacked = buffer<uint8_t>(layout.stretch + 3);
    for_each([&](const Stretch& s) {
      coded.read(s, unpacked.get(), values.get());
      finish(s, values.get());
      out.write(s.row, s.col, values.get(), s.n);
    });
  });
  return out.tensor;
}

// --- operators ---

std::tuple<Tensor, Tensor> affine_encode(const Tensor& x, int64_t bits, int64_t group_size,
                                         bool stochastic, int64_t seed) {
  return encode(Matrix("x", x), bits, group_size, stochastic, seed, [](const Stretch&, float*) {});
}

std::tuple<Tensor, Tensor> normalized_encode(const Tensor& x, const std::optional<Tensor>& mean,
                                             const Tensor& rstd, int64_t bits, int64_t group_size,
                                             bool stochastic, int64_t seed) {
  const Matrix matrix("x", x);
  const Vector means("mean", mean, matrix.rows), rstds("rstd", rstd, matrix.rows);
  const auto prepare = [&](const Stretch& s, float* values) {
    // Less 0.0 is exact, so no mean is a mean of 0.
    normalize(values, means.data ? means.data[s.row] : 0.0f, rstds.data[s.row], s.n);
  };
  return encode(matrix, bits, group_size, stochastic, seed, prepare);
}

Tensor affine_decode(const Tensor& codes, const Tensor& scales, int64_t bits, int64_t cols,
                     ScalarType dtype, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& bias) {
  const Coded coded(codes, scales, bits, codes.size(0), cols);
  const Vector weights("weight", weight, cols), biases("bias", bias, cols);
  return decode(coded, codes.size(0), dtype, [&](const Stretch& s, float* values) {
    if (weights.data) multiply(values, weights.data + s.col, s.n);
    if (biases.data) add(values, biases.data + s.col, s.n);
  });
}

const Activation& find_activation(const std::string& kind) {
  for (const Activation& a : ACTIVATIONS) {
    if (a.kind == kind) return a;
  }
  std::string choices;
  for (const Activation& a : ACTIVATIONS) {
    choices += (choices.empty() ? "'" : ", '") + std::string(a.kind) + "'";
  }
  STD_TORCH_CHECK(false, "kind must be one of (", choices, "), got '", kind, "'");
}

Tensor activation_decode(const Tensor& codes, const Tensor& scales, int64_t bits, int64_t cols,
                         ScalarType dtype, const std::string& kind) {
  const Activation& act = find_activation(kind);
  const Coded coded(codes, scales, bits, codes.size(0), cols);
  return decode(coded, codes.size(0), dtype,
                [&](const Stretch& s, float* values) { act.value(values, s.n); });
}

Tensor activation_backward(const Tensor& grad, const Tensor& codes, const Tensor& scales,
                           int64_t bits, const std::string& kind) {
  const Activation& act = find_activation(kind);
  const Matrix grads("grad", grad);
  const Coded coded(codes, scales, bits, grads.rows, grads.cols);
  const Layout& layout = coded.layout;
  const Output out(grads.rows, grads.cols, grad.scalar_type());
  parallel_stretches(grads.rows, layout, [&](const auto& for_each) {
    const auto values = buffer<float>(layout.stretch);
    const auto slopes = buffer<float>(layout.stretch);
    const auto unpacked = buffer<uint8_t>(layout.stretch + 3);
    for_each([&](const Stretch& s) {
      coded.read(s, unpacked.get(), values.get());
      grads.read(s.row, s.col, slopes.get(), s.n);
      act.backward(values.get(), slopes.get(), s.n);
      out.write(s.row, s.col, slopes.get(), s.n);
    });
  });
  return out.tensor;
}

// Rows are summed into at most 64 partial sums whose extent depends on the shape alone, and those
// are added in order: the same bits for any number of threads.
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& codes,
                                                 const Tensor& scales, const Tensor& rstd,
                                                 const std::optional<Tensor>& weight, int64_t bits,
                                                 bool centered, ScalarType dtype) {
  const Matrix grads("grad", grad);
  const int64_t rows = grads.rows, cols = grads.cols;
  const Coded coded(codes, scales, bits, rows, cols);
  const Layout& layout = coded.layout;
  const Vector rstds("rstd", rstd, rows), weights("weight", weight, cols);
  const std::vector<float> ones(weights.data ? 0 : cols, 1.0f);
  const float* const w = weights.data ? weights.data : ones.data();
  const Output dx(rows, cols, dtype);
  const int64_t block = std::max<int64_t>(16, ceil_div(rows, 64)), blocks = ceil_div(rows, block);
  std::vector<float> partial(blocks * 2 * cols);

  const auto body = [&](int64_t begin, int64_t end) {
    const int64_t room = layout.stretches * layout.stretch;
    const auto g = buffer<float>(cols), xhat = buffer<float>(room);
    const auto unpacked = buffer<uint8_t>(layout.stretch + 3);
    for (int64_t row = begin * block; row < std::min(end * block, rows); ++row) {
      float* const dweight = partial.data() + row / block * 2 * cols;
      float* const dbias = dweight + cols;
      for (int64_t k = 0; k < layout.stretches; ++k) {
        const int64_t group = k * layout.stretch_groups, col = group * layout.size;
        coded.read({row, group, std::min(layout.stretch_groups, layout.groups - group), col,
                    std::min(layout.stretch, cols - col)},
                   unpacked.get(), xhat.get() + col);
      }
      grads.read(row, 0, g.get(), cols);
      float sum_d, sum_dx;
      norm_sums(g.get(), w, xhat.get(), cols, sum_d, sum_dx);
      norm_project(g.get(), w, xhat.get(), dweight, dbias, centered ? sum_d / cols : 0.0f,
                   sum_dx / cols, rstds.data[row], cols);
      dx.write(row, 0, xhat.get(), cols);
    }
  };
  if (rows > 0 && cols > 0) {
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / (block * cols)), body);
  }

  Tensor dweight = empty({cols}, ScalarType::Float), dbias = empty({cols}, ScalarType::Float);
  float* const sums[] = {static_cast<float*>(dweight.mutable_data_ptr()),
                         static_cast<float*>(dbias.mutable_data_ptr())};
  for (int which = 0; which < 2; ++which) {
    std::fill_n(sums[which], cols, 0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* const from = partial.data() + (2 * b + which) * cols;
      for (int64_t i = 0; i < cols; ++i) sums[which][i] += from[i];
    }
  }
  return {dx.tensor, dweight, dbias};
}

// `flag(begin, flags, n)` writes 0 or 1 for each of n elements in row-major order.
template <typename Flag>
Tensor encode_flags(int64_t numel, const Flag& flag) {
  Tensor bits = empty({ceil_div(numel, 8)}, ScalarType::Byte);
  uint8_t* const bytes = static_cast<uint8_t*>(bits.mutable_data_ptr());
  torch::stable::parallel_for(
      0, ceil_div(numel, STRETCH), GRAIN / STRETCH, [&](int64_t first, int64_t last) {
        uint8_t flags[STRETCH + 8];
        for (int64_t k = first; k < last; ++k) {
          const int64_t begin = k * STRETCH, n = std::min(STRETCH, numel - begin);
          flag(begin, flags, n);
          std::memset(flags + n, 0, 8);
          pack_flags(flags, bytes + begin / 8, n);
        }
      });
  return bits;
}

Tensor bitmask_encode(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be torch.bool, got ",
                  torch::headeronly::toString(mask.scalar_type()));
  const Tensor source = torch::stable::contiguous(mask);
  const uint8_t* const from = static_cast<const uint8_t*>(source.const_data_ptr());
  return encode_flags(source.numel(), [&](int64_t begin, uint8_t* flags, int64_t n) {
    std::memcpy(flags, from + begin, n);
  });
}

Tensor bitmask_positive(const Tensor& x) {
  const Dtype& dtype = floating("x", x.scalar_type());
  const Tensor source = torch::stable::contiguous(x);
  const int64_t width = source.element_size();
  const char* const from = static_cast<const char*>(source.const_data_ptr());
  const bool is_double = dtype.type == ScalarType::Double;
  return encode_flags(source.numel(), [&](int64_t begin, uint8_t* flags, int64_t n) {
    if (is_double) {  // A float32 would lose the smallest numbers above 0.
      const double* const values = reinterpret_cast<const double*>(from) + begin;
      for (int64_t i = 0; i < n; ++i) flags[i] = values[i] > 0;
    } else {
      float values[STRETCH];
      dtype.load(from + begin * width, values, n);
      for (int64_t i = 0; i < n; ++i) flags[i] = values[i] > 0;
    }
  });
}

Tensor bitmask_apply(const Tensor& grad, const Tensor& bits, double scale) {
  const Dtype& dtype = floating("grad", grad.scalar_type());
  const int64_t numel = grad.numel();
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte, "bits must be torch.uint8, got ",
                  torch::headeronly::toString(bits.scalar_type()));
  STD_TORCH_CHECK(bits.dim() == 1 && bits.size(0) == ceil_div(numel, 8), "bits must have ",
                  ceil_div(numel, 8), " elements, got ", bits.numel(), " in ", bits.dim(), "-D");
  const Tensor source = torch::stable::contiguous(grad), mask = torch::stable::contiguous(bits);
  Tensor out = torch::stable::empty_like(source);
  const char* const from = static_cast<const char*>(source.const_data_ptr());
  const uint8_t* const bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t width = grad.element_size();
  torch::stable::parallel_for(
      0, ceil_div(numel, STRETCH), GRAIN / STRETCH, [&](int64_t first, int64_t last) {
        uint8_t flags[STRETCH + 8];
        for (int64_t k = first; k < last; ++k) {
          const int64_t begin = k * STRETCH, n = std::min(STRETCH, numel - begin);
          unpack_flags(bytes + begin / 8, flags, n);
          if (dtype.type == ScalarType::Double) {
            double values[STRETCH];
            std::memcpy(values, from + begin * width, n * width);
            apply_flags(values, flags, n, scale);
            std::memcpy(to + begin * width, values, n * width);
          } else {
            float values[STRETCH];
            dtype.load(from + begin * width, values, n);
            apply_flags(values, flags, n, static_cast<float>(scale));
            dtype.store(values, to + begin * width, n);
          }
        }
      });
  if (grad.is_contiguous()) return out;
  Tensor strided = torch::stable::empty_like(grad);
  return torch::stable::copy_(strided, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mesa_train, CPU, m) {
  m.impl("affine_encode", TORCH_BOX(&affine_encode));
  m.impl("affine_decode", TORCH_BOX(&affine_decode));
  m.impl("normalized_encode", TORCH_BOX(&normalized_encode));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("activation_decode", TORCH_BOX(&activation_decode));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
  m.impl("bitmask_encode", TORCH_BOX(&bitmask_encode));
  m.impl("bitmask_positive", TORCH_BOX(&bitmask_positive));
  m.impl("bitmask_apply", TORCH_BOX(&bitmask_apply));
}

}  // namespace mesa
