// The operators that read codes: decoding, an activation and its backward, and the backward of a
// norm or a softmax. Also the operators of bit masks.

#include <string>
#include <tuple>

#include "bitmask.h"
#include "decode.h"
#include "norm.h"
#include "rowwise.h"

namespace mesa {
namespace {

Tensor affine_decode(const Tensor& codes, const Tensor& scales, int64_t bits, int64_t cols,
                     ScalarType dtype, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& bias, const std::optional<int64_t>& dither) {
  const Coded coded(codes, scales, bits, codes.size(0), cols);
  const auto dithered = DitheredCodes::of(coded, dither);
  const Vector weights("weight", weight, cols), biases("bias", bias, cols);
  const int64_t rows = codes.size(0);
  const auto times = [w = weights.data](Floats x, int64_t col) { return x * load<Floats>(w + col); };
  const auto plus = [b = biases.data](Floats x, int64_t col) { return x + load<Floats>(b + col); };
  if (weights.data && biases.data) {
    return decode(coded, dithered, rows, dtype,
                  [=](Floats x, int64_t col) { return plus(times(x, col), col); });
  }
  if (weights.data) return decode(coded, dithered, rows, dtype, times);
  if (biases.data) return decode(coded, dithered, rows, dtype, plus);
  return decode(coded, dithered, rows, dtype, [](Floats x, int64_t) { return x; });
}

Tensor activation_decode(const Tensor& codes, const Tensor& scales, int64_t bits, int64_t cols,
                         ScalarType dtype, const std::string& kind) {
  const Coded coded(codes, scales, bits, codes.size(0), cols);
  const Output y(codes.size(0), cols, dtype, written_as(dtype));
  with_dtype(dtype, [&]<typename T>(T) {
    activate_all<T>(coded, codes.size(0), find_passes<T>(kind).value[bits <= 4],
                    [&](int64_t row, int64_t col, Piece& p) { p.y = y.row<T>(row) + col; });
  });
  return y.result();
}

Tensor activation_backward(const Tensor& grad, const Tensor& codes, const Tensor& scales,
                           int64_t bits, const std::string& kind) {
  const Matrix grads("grad", grad);
  const Coded coded(codes, scales, bits, grads.rows, grads.cols);
  const Output dx(grads.rows, grads.cols, grad.scalar_type(), grads.type);
  with_dtype(grads.type, [&]<typename T>(T) {
    activate_all<T>(coded, grads.rows, find_passes<T>(kind).backward[bits <= 4],
                    [&](int64_t row, int64_t col, Piece& p) {
                      p.grad = grads.row<T>(row) + col;
                      p.dx = dx.row<T>(row) + col;
                    });
  });
  return dx.result();
}

// One pass over the codes computes two results: the activation, which the Linear behind reads as
// its input, and the activation's own backward, which needs the gradient from the Linear.
std::tuple<Tensor, Tensor> activation_pair(const Tensor& grad, const Tensor& codes,
                                           const Tensor& scales, int64_t bits,
                                           const std::string& kind) {
  const Matrix grads("grad", grad);
  const Coded coded(codes, scales, bits, grads.rows, grads.cols);
  const Output dx(grads.rows, grads.cols, grad.scalar_type(), grads.type);
  const Output y(grads.rows, grads.cols, grad.scalar_type(), grads.type);
  with_dtype(grads.type, [&]<typename T>(T) {
    activate_all<T>(coded, grads.rows, find_passes<T>(kind).pair[bits <= 4],
                    [&](int64_t row, int64_t col, Piece& p) {
                      p.grad = grads.row<T>(row) + col;
                      p.dx = dx.row<T>(row) + col;
                      p.y = y.row<T>(row) + col;
                    });
  });
  return {dx.result(), y.result()};
}

// Rows are summed into at most 64 partial sums. The rows of each partial sum depend only on the
// shape, and the partial sums are added in order. So the result has the same bits for any number of
// threads.
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& codes,
                                                 const Tensor& scales, const Tensor& rstd,
                                                 const std::optional<Tensor>& weight, int64_t bits,
                                                 bool centered, ScalarType dtype,
                                                 const std::optional<int64_t>& dither) {
  const Matrix grads("grad", grad);
  const int64_t rows = grads.rows, cols = grads.cols, padded = ceil_div(cols, LANES) * LANES;
  const Coded coded(codes, scales, bits, rows, cols);
  const auto dithered = DitheredCodes::of(coded, dither);
  const Vector rstds("rstd", rstd, rows), weights("weight", weight, cols);
  const FloatVector ones(weights.data ? 0 : padded, 1.0f);
  const NormShape shape{cols,     padded, coded.layout.groups, coded.layout.size,
                        centered, weights.data ? weights.data : ones.data()};
  // A dtype other than grad's is rare. Then the result is computed in float32, which is exact, and
  // cast.
  const bool same = dtype == grads.type;
  const Output dx(rows, cols, dtype, same ? dtype : ScalarType::Float);
  const int64_t block = std::max<int64_t>(16, ceil_div(rows, 64)), blocks = ceil_div(rows, block);
  FloatVector partial(blocks * 2 * padded);

  if (rows > 0 && cols > 0) {
    with_dtype(grads.type, [&]<typename T>(T) {
      const auto body = [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) {
          float* const sums = partial.data() + b * 2 * padded;
          const auto run = same ? norm_block<T, T> : norm_block<T, Float32>;
          run(grads, coded, dithered, shape, rstds.data, b * block, std::min((b + 1) * block, rows), dx, sums,
              sums + padded);
        }
      };
      torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / (block * cols)), body);
    });
  }

  return {dx.result(), added(partial, blocks, 2 * padded, 0, cols),
          added(partial, blocks, 2 * padded, padded, cols)};
}

Tensor softmax_backward(const Tensor& grad, const Tensor& codes, const Tensor& scales, int64_t bits,
                        const std::optional<int64_t>& dither) {
  const Matrix grads("grad", grad);
  const Coded coded(codes, scales, bits, grads.rows, grads.cols);
  const auto dithered = DitheredCodes::of(coded, dither);
  const Output dx(grads.rows, grads.cols, grad.scalar_type(), grads.type);
  if (grads.rows > 0 && grads.cols > 0) {
    with_dtype(grads.type, [&]<typename T>(T) {
      torch::stable::parallel_for(
          0, grads.rows, std::max<int64_t>(1, GRAIN / grads.cols),
          [&](int64_t begin, int64_t end) { softmax_rows<T>(grads, coded, dithered, begin, end, dx); });
    });
  }
  return dx.result();
}

std::tuple<Tensor, Tensor, Tensor> scale_backward(const Tensor& grad, const Tensor& scale,
                                                  ScalarType dtype) {
  const Matrix grads("grad", grad);
  const int64_t rows = grads.rows, cols = grads.cols, padded = ceil_div(cols, LANES) * LANES;
  const Vector factors("scale", scale, cols);
  const Output scaled(rows, cols, dtype, written_as(dtype)), cast(rows, cols, dtype, written_as(dtype));
  const int64_t block = std::max<int64_t>(16, ceil_div(rows, 64)), blocks = ceil_div(rows, block);
  FloatVector partial(blocks * padded);
  if (rows > 0 && cols > 0) {
    with_dtype(grads.type, [&]<typename T>(T) {
      with_dtype(written_as(dtype), [&]<typename U>(U) {
        torch::stable::parallel_for(
            0, blocks, std::max<int64_t>(1, GRAIN / (block * cols)),
            [&](int64_t first, int64_t last) {
              for (int64_t b = first; b < last; ++b) {
                scale_rows<T, U>(grads, factors.data, b * block, std::min((b + 1) * block, rows),
                                 scaled, cast, partial.data() + b * padded);
              }
            });
      });
    });
  }
  return {scaled.result(), cast.result(), added(partial, blocks, padded, 0, cols)};
}

Tensor bitmask_encode(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be torch.bool, got ",
                  torch::headeronly::toString(mask.scalar_type()));
  const Tensor source = torch::stable::contiguous(mask);
  const uint8_t* const from = static_cast<const uint8_t*>(source.const_data_ptr());
  return encode_flags(source.numel(),
                      [&](int64_t begin, int64_t, uint8_t*) { return from + begin; });
}

Tensor bitmask_positive(const Tensor& x) {
  check_floating("x", x.scalar_type());
  const Tensor source = torch::stable::contiguous(x);
  const void* const data = source.const_data_ptr();
  if (x.scalar_type() == ScalarType::Double) {  // float32 would lose the smallest numbers above 0
    const double* const from = static_cast<const double*>(data);
    return encode_flags(source.numel(), [&](int64_t begin, int64_t n, uint8_t* flags) {
      for (int64_t i = 0; i < n; ++i) flags[i] = !(from[begin + i] <= 0);
      return flags;
    });
  }
  std::optional<Tensor> bits;
  with_dtype(x.scalar_type(), [&]<typename T>(T) {
    const auto* const from = static_cast<const typename T::Raw*>(data);
    bits = encode_flags(source.numel(), [&](int64_t begin, int64_t n, uint8_t* flags) {
      positive<T>(from + begin, flags, n);
      return flags;
    });
  });
  return *bits;
}

Tensor bitmask_apply(const Tensor& grad, const Tensor& bits, double scale) {
  check_floating("grad", grad.scalar_type());
  const int64_t numel = grad.numel();
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte, "bits must be torch.uint8, got ",
                  torch::headeronly::toString(bits.scalar_type()));
  STD_TORCH_CHECK(bits.dim() == 1 && bits.size(0) == ceil_div(numel, 8), "bits must have ",
                  ceil_div(numel, 8), " elements, got ", bits.numel(), " in ", bits.dim(), "-D");
  const Tensor source = torch::stable::contiguous(grad), mask = torch::stable::contiguous(bits);
  Tensor out = torch::stable::empty_like(source);
  const void* const from = source.const_data_ptr();
  const uint8_t* const bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
  void* const to = out.mutable_data_ptr();
  if (grad.scalar_type() == ScalarType::Double) {
    parallel_pieces(numel, [&](int64_t begin, int64_t n) {
      apply_bits(static_cast<const double*>(from) + begin, bytes + begin / 8,
                 static_cast<double*>(to) + begin, n, scale);
    });
  } else {
    with_dtype(grad.scalar_type(), [&]<typename T>(T) {
      using Raw = typename T::Raw;
      parallel_pieces(numel, [&](int64_t begin, int64_t n) {
        apply_bits<T>(static_cast<const Raw*>(from) + begin, bytes + begin / 8,
                      static_cast<Raw*>(to) + begin, n, static_cast<float>(scale));
      });
    });
  }
  if (grad.is_contiguous()) return out;
  Tensor strided = torch::stable::empty_like(grad);
  return torch::stable::copy_(strided, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mesa_train, CPU, m) {
  m.impl("affine_decode", TORCH_BOX(&affine_decode));
  m.impl("activation_decode", TORCH_BOX(&activation_decode));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
  m.impl("activation_pair", TORCH_BOX(&activation_pair));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
  m.impl("scale_backward", TORCH_BOX(&scale_backward));
  m.impl("bitmask_encode", TORCH_BOX(&bitmask_encode));
  m.impl("bitmask_positive", TORCH_BOX(&bitmask_positive));
  m.impl("bitmask_apply", TORCH_BOX(&bitmask_apply));
}

}  // namespace mesa
