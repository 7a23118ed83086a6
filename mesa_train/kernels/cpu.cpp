// The operators on the CPU: for each its checks and the order of its stages. Written against torch's
// stable ABI (torch >= 2.11), which compiles in seconds.

#include <string>
#include <tuple>

#include "cpu_activations.h"
#include "cpu_rows.h"

namespace mesa {
namespace {

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
    const float* const w = weights.data + s.col;
    const float* const b = biases.data + s.col;
    if (weights.data && biases.data) {
      scale_shift(values, w, b, s.n);
    } else if (weights.data) {
      scale(values, w, s.n);
    } else if (biases.data) {
      shift(values, b, s.n);
    }
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

// One pass over the codes for a Linear that needs the activation it read and the activation's own
// backward, which needs the Linear's gradient.
std::tuple<Tensor, Tensor> activation_pair(const Tensor& grad, const Tensor& codes,
                                           const Tensor& scales, int64_t bits,
                                           const std::string& kind) {
  const Activation& act = find_activation(kind);
  const Matrix grads("grad", grad);
  const Coded coded(codes, scales, bits, grads.rows, grads.cols);
  const Layout& layout = coded.layout;
  const Output dx(grads.rows, grads.cols, grad.scalar_type());
  const Output y(grads.rows, grads.cols, grad.scalar_type());
  parallel_stretches(grads.rows, layout, [&](const auto& for_each) {
    const auto values = buffer<float>(layout.stretch);
    const auto slopes = buffer<float>(layout.stretch);
    const auto unpacked = buffer<uint8_t>(layout.stretch + 3);
    for_each([&](const Stretch& s) {
      coded.read(s, unpacked.get(), values.get());
      grads.read(s.row, s.col, slopes.get(), s.n);
      act.pair(values.get(), slopes.get(), s.n);
      dx.write(s.row, s.col, slopes.get(), s.n);
      y.write(s.row, s.col, values.get(), s.n);
    });
  });
  return {dx.tensor, y.tensor};
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
  m.impl("activation_pair", TORCH_BOX(&activation_pair));
  m.impl("bitmask_encode", TORCH_BOX(&bitmask_encode));
  m.impl("bitmask_positive", TORCH_BOX(&bitmask_positive));
  m.impl("bitmask_apply", TORCH_BOX(&bitmask_apply));
}

}  // namespace mesa
