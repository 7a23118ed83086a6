// Calls of the operators under `torch.ops.mesa_train` through the dispatcher.
//
// The dispatcher chooses the kernel of the device. So the nodes contain no kernel and no device.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "recorder.h"

namespace mesa {

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline Pair affine_encode(const Tensor& x, const Rule& rule) {
  static const auto op =
      find_operator<Pair(const Tensor&, int64_t, int64_t, bool, int64_t)>("mesa_train::affine_encode");
  return op.call(x, rule.bits, rule.group_size, rule.stochastic, rule.seed);
}

inline std::vector<Tensor> affine_encode_parts(const Tensor& x, int64_t parts, const Rule& rule) {
  static const auto op =
      find_operator<std::vector<Tensor>(const Tensor&, int64_t, int64_t, int64_t, bool, int64_t)>(
          "mesa_train::affine_encode_parts");
  return op.call(x, parts, rule.bits, rule.group_size, rule.stochastic, rule.seed);
}

inline Pair normalized_encode(const Tensor& x, const std::optional<Tensor>& mean,
                              const Tensor& rstd, const Rule& rule) {
  static const auto op = find_operator<Pair(const Tensor&, const std::optional<Tensor>&,
                                            const Tensor&, int64_t, int64_t, bool, int64_t)>(
      "mesa_train::normalized_encode");
  return op.call(x, mean, rstd, rule.bits, rule.group_size, rule.stochastic, rule.seed);
}

inline Tensor affine_decode(const Tensor& codes, const Tensor& scales, int64_t bits, int64_t cols,
                            at::ScalarType dtype, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias, std::optional<int64_t> dither) {
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&, int64_t, int64_t, at::ScalarType,
                           const std::optional<Tensor>&, const std::optional<Tensor>&,
                           std::optional<int64_t>)>("mesa_train::affine_decode");
  return op.call(codes, scales, bits, cols, dtype, weight, bias, dither);
}

inline Tensor activation_decode(const Tensor& codes, const Tensor& scales, int64_t bits,
                                int64_t cols, at::ScalarType dtype, std::string_view kind) {
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&, int64_t, int64_t,
                                              at::ScalarType, std::string_view)>(
      "mesa_train::activation_decode");
  return op.call(codes, scales, bits, cols, dtype, kind);
}

inline Tensor activation_backward(const Tensor& grad, const Tensor& codes, const Tensor& scales,
                                  int64_t bits, std::string_view kind) {
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t,
                                              std::string_view)>("mesa_train::activation_backward");
  return op.call(grad, codes, scales, bits, kind);
}

inline Pair activation_pair(const Tensor& grad, const Tensor& codes, const Tensor& scales,
                            int64_t bits, std::string_view kind) {
  static const auto op = find_operator<Pair(const Tensor&, const Tensor&, const Tensor&, int64_t,
                                            std::string_view)>("mesa_train::activation_pair");
  return op.call(grad, codes, scales, bits, kind);
}

inline Triple activation_pair_sum(const Tensor& grad, const Tensor& codes, const Tensor& scales,
                                  int64_t bits, std::string_view kind) {
  static const auto op = find_operator<Triple(const Tensor&, const Tensor&, const Tensor&, int64_t,
                                              std::string_view)>("mesa_train::activation_pair_sum");
  return op.call(grad, codes, scales, bits, kind);
}

inline Triple norm_backward(const Tensor& grad, const Tensor& codes, const Tensor& scales,
                            const Tensor& rstd, const std::optional<Tensor>& weight, int64_t bits,
                            bool centred, std::optional<int64_t> dither) {
  static const auto op =
      find_operator<Triple(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           const std::optional<Tensor>&, int64_t, bool, at::ScalarType,
                           std::optional<int64_t>)>("mesa_train::norm_backward");
  return op.call(grad, codes, scales, rstd, weight, bits, centred, grad.scalar_type(), dither);
}

inline Triple scale_backward(const Tensor& grad, const Tensor& scale, at::ScalarType dtype) {
  static const auto op = find_operator<Triple(const Tensor&, const Tensor&, at::ScalarType)>(
      "mesa_train::scale_backward");
  return op.call(grad, scale, dtype);
}

inline Tensor softmax_backward(const Tensor& grad, const Tensor& codes, const Tensor& scales,
                               int64_t bits, std::optional<int64_t> dither) {
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t,
                                              std::optional<int64_t>)>("mesa_train::softmax_backward");
  return op.call(grad, codes, scales, bits, dither);
}

}  // namespace mesa
