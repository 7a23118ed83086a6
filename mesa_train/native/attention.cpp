// The rows of fused attention on a CPU, and of softmax.

#include <ATen/autocast_mode.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/softmax.h>
#include <c10/util/irange.h>
#include <pybind11/gil.h>

#include "nodes.h"
#include "operators.h"
#include "rows.h"

namespace mesa {
namespace {

// The return value of _fused_sdp_choice for flash attention.
constexpr int64_t FLASH = 1;
// The heads and features of one token may share a group of codes. Two tokens may not.
constexpr uint64_t WITHIN = 1 << 1 | 1 << 3;

// The largest number of scores per head for which half precision has a backward of its own
// (`attention.Short`).
constexpr int64_t SHORT = 512 * 512;

bool is_short(const Tensor& q, const Tensor& k, bool causal) {
  return !causal && (q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf) &&
         q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(2) * k.size(2) <= SHORT;
}

// q, k and v as matrices, if the columns of each follow the columns of the one before in the same
// rows (`packed_qkv._continues`).
std::optional<std::array<std::pair<Layout, Tensor>, 3>> packed(
    const std::array<const Tensor*, 3>& tensors) {
  std::array<std::pair<Layout, Tensor>, 3> parts;
  for (const auto i : c10::irange(3)) {
    if (tensors[i]->is_contiguous()) return std::nullopt;
    parts[i] = Layout::of(*tensors[i], WITHIN);
    const Tensor &first = parts[0].second, &part = parts[i].second;
    const int64_t cols = first.size(1);
    if (part.scalar_type() != first.scalar_type() || part.sizes() != first.sizes() ||
        part.strides() != first.strides() || first.stride(1) != 1 ||
        first.stride(0) < 3 * cols ||
        part.storage_offset() != first.storage_offset() + i * cols ||
        !part.is_alias_of(first)) {
      return std::nullopt;
    }
  }
  return parts;
}

// The stashes of q, k and v (`packed_qkv.keep_each`).
std::array<Ref, 3> keep_each(Call& call, const std::array<PyObject*, 3>& objects,
                             const std::array<const Tensor*, 3>& tensors) {
  std::array<Ref, 3> kept;
  const Rule& first = call.rule(Q);
  bool together = tensors[0]->is_cpu();
  for (const auto i : c10::irange(3)) {
    const Rule& rule = call.rule(static_cast<Operand>(Q + i));
    together = together && rule.bits == first.bits && rule.group_size == first.group_size &&
               rule.stochastic == first.stochastic && rule.seed == first.seed &&
               rule.affine && Call::codes(rule, *tensors[i]) && !call.usable(objects[i], *tensors[i], rule);
  }
  if (together) {
    const at::NoGradGuard guard;
    const at::AutoDispatchBelowADInplaceOrView below;
    if (const auto parts = packed(tensors)) {
      const Tensor& matrix = (*parts)[0].second;
      const std::vector<Tensor> codes = affine_encode_parts(
          matrix.as_strided({matrix.size(0), 3 * matrix.size(1)}, matrix.strides(),
                            matrix.storage_offset()),
          3, first);
      for (const auto i : c10::irange(3)) {
        const Rule& rule = call.rule(static_cast<Operand>(Q + i));
        kept[i] = call.leaf(rule, codes[2 * i], codes[2 * i + 1], (*parts)[i].first,
                            tensors[i]->scalar_type());
        call.remember(objects[i], *tensors[i], kept[i].get());
      }
      return kept;
    }
  }
  for (const auto i : c10::irange(3)) {
    kept[i] = call.keep(objects[i], *tensors[i], static_cast<Operand>(Q + i), WITHIN);
  }
  return kept;
}

}  // namespace

Ref attention_row(Call& call, const Arguments& arguments) {
  std::array<PyObject*, 8> values;
  if (!arguments.read<8>({"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale",
                          "enable_gqa"},
                         values)) {
    return {};
  }
  const std::array<PyObject*, 3> objects = {values[0], values[1], values[2]};
  std::array<const Tensor*, 3> tensors;
  for (const auto i : c10::irange(3)) {
    tensors[i] = plain_tensor(objects[i]);
    if (!tensors[i] || tensors[i]->dim() != 4 || !tensors[i]->is_cpu()) return {};
  }
  const Tensor &q = *tensors[0], &k = *tensors[1], &v = *tensors[2];
  const bool causal = values[5] && truth(values[5]);
  if ((values[3] && values[3] != Py_None) || (values[7] && truth(values[7])) || !q.numel() ||
      !call.covers(Q, {&q, &k, &v}) || is_short(q, k, causal) ||
      (autocasts(q) && q.scalar_type() != at::autocast::get_autocast_dtype(at::kCPU)) ||
      k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type()) {
    return {};
  }
  if (values[4] && PyFloat_AsDouble(values[4]) != 0) return {};
  std::optional<double> scale;
  if (values[6] && values[6] != Py_None) scale = PyFloat_AsDouble(values[6]);
  if (PyErr_Occurred()) throw python_error();
  if (at::_fused_sdp_choice(q, k, v, {}, 0.0, causal, scale, false) != FLASH) return {};

  const std::array<Ref, 3> kept = keep_each(call, objects, tensors);
  const auto [result, logsumexp] = exactly([&] {
    return at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, {}, scale);
  });
  const Ref object = wrapped(result);
  const Ref out = call.keep(object.get(), result, OUT, WITHIN);
  auto node = make_node<FlashCPUNode>();
  node->causal = causal;
  node->scale = scale;
  Ref output;
  if (node->saved.save({kept[0].get(), kept[1].get(), kept[2].get(), out.get(), logsumexp,
                        nullptr})) {
    output = recorded(result, node, {&q, &k, &v});
  } else {
    const Ref statistics = uncompressed(logsumexp);
    const Ref stashes = tuple_of(kept[0].get(), kept[1].get(), kept[2].get(), out.get(),
                                 statistics.get(), Py_None);
    const Ref fixed = tuple_of(causal ? Py_True : Py_False, values[6] ? values[6] : Py_None);
    output = Ref::steal(PyObject_CallMethodObjArgs(classes.flash_cpu.get(), names.apply,
                                                   object.get(), stashes.get(), fixed.get(),
                                                   objects[0], objects[1], objects[2], nullptr));
  }
  call.remember(output.get(), THPVariable_Unpack(output.get()), out.get());
  return output;
}

Ref softmax_row(Call& call, const Arguments& arguments) {
  std::array<PyObject*, 4> values;
  if (!arguments.read<4>({"input", "dim", "_stacklevel", "dtype"}, values) || !values[1] ||
      !PyLong_Check(values[1]) || (values[3] && values[3] != Py_None)) {
    return {};
  }
  const Tensor* const x = plain_tensor(values[0]);
  const Rule& rule = call.rule(SOFTMAX);
  if (!x || !x->dim() || rule.fused || !call.covers(SOFTMAX, {x}) ||
      (autocasts(*x) && !x->is_cpu())) {
    return {};
  }
  // The Python row records how the weights are rebuilt from scores.
  PyObject* const scores = rule.rebuild_linear ? call.known(values[0], *x) : nullptr;
  if (scores && cost_of(scores) == MATMUL) return {};
  const int64_t dim = integer(values[1]);
  const Tensor result = exactly([&] { return at::softmax(*x, dim); });
  const Ref object = wrapped(result);
  const Ref kept = call.keep(object.get(), result, SOFTMAX, uint64_t{1} << (result.dim() - 1));
  auto node = make_node<SoftmaxNode>();
  node->dim = dim;
  Ref output;
  if (node->saved.save({kept.get()})) {
    output = recorded(result, node, {x});
  } else {
    const Ref stashes = tuple_of(kept.get());
    output = Ref::steal(PyObject_CallMethodObjArgs(classes.softmax.get(), names.apply, object.get(),
                                                   stashes.get(), values[1], values[0], nullptr));
  }
  call.remember(output.get(), THPVariable_Unpack(output.get()), kept.get());
  return output;
}

}  // namespace mesa
