// The rows of products: element by element, layer scales, and matrix products.

#include <ATen/ExpandUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>

#include "nodes.h"
#include "rows.h"

namespace mesa {
namespace {

// The dims that one group of codes of a matmul's operand may span (`matmul._within`).
uint64_t within_matmul(const Tensor& operand) {
  const int64_t dims = operand.dim();
  if (dims < 4) return uint64_t{1} << (dims - 1);
  const bool transposed = operand.stride(-2) == 1 && operand.stride(-1) != 1;
  return uint64_t{1} << (dims - 3) | uint64_t{1} << (transposed ? dims - 2 : dims - 1);
}

// True if a product has at least four times as many elements as both factors together.
bool widens(const Tensor& left, const Tensor& right) {
  if (left.is_nested() || right.is_nested() || left.sizes().equals(right.sizes())) return false;
  const auto sizes = at::infer_size_dimvector(left.sizes(), right.sizes());
  return c10::multiply_integers(sizes) >= 4 * (left.numel() + right.numel());
}

// True if PyTorch's choice between one matmul and a batch of matmuls may depend on a gradient
// (`folding._depends`). Then the Python row handles the call.
bool matmul_folds_by_gradient(const Tensor& left, const Tensor& right) {
  const bool first = left.dim() >= right.dim();
  const Tensor &large = first ? left : right, &small = first ? right : left;
  return large.dim() >= 3 && small.dim() <= 2 && small.requires_grad();
}

// A product of matrices. `dims`: what both operands must have, or 0 for any.
Ref product(Call& call, const Arguments& arguments, int64_t dims) {
  if (arguments.kwargs && PyDict_GET_SIZE(arguments.kwargs)) return {};
  if (PyTuple_GET_SIZE(arguments.args) != 2) return {};
  PyObject *const first = PyTuple_GET_ITEM(arguments.args, 0),
                  *const second = PyTuple_GET_ITEM(arguments.args, 1);
  const Tensor *const left = plain_tensor(first), *const right = plain_tensor(second);
  if (!left || !right || left->dim() < 2 || right->dim() < 2 || !right->numel() ||
      (dims && (left->dim() != dims || right->dim() != dims)) ||
      !call.covers(LEFT, {left, right}) || matmul_folds_by_gradient(*left, *right)) {
    return {};
  }
  // The Python row records how scores of attention are rebuilt (`matmul._are_scores`).
  if (call.rules().rebuilds_matmuls && (right->dim() > 2 || left->dim() == 2) &&
      right->size(-1) >= left->size(-1)) {
    return {};
  }
  Ref kept_left, kept_right;
  if (right->requires_grad()) kept_left = call.keep(first, *left, LEFT, within_matmul(*left));
  if (left->requires_grad()) kept_right = call.keep(second, *right, RIGHT, within_matmul(*right));
  const Tensor result = exactly([&] { return at::matmul(*left, *right); });
  auto node = make_node<MatMulNode>();
  node->left_shape.assign(left->sizes().begin(), left->sizes().end());
  node->right_shape.assign(right->sizes().begin(), right->sizes().end());
  if (node->saved.save({kept_left.get(), kept_right.get()})) {
    return recorded(result, node, {left, right});
  }
  PyObject* const none = Py_None;
  const Ref stashes = tuple_of(kept_left ? kept_left.get() : none,
                               kept_right ? kept_right.get() : none);
  const Ref left_shape = tuple_of_integers(left->sizes());
  const Ref right_shape = tuple_of_integers(right->sizes());
  const Ref shapes = tuple_of(left_shape.get(), right_shape.get());
  const Ref object = wrapped(result);
  return Ref::steal(PyObject_CallMethodObjArgs(classes.matmul.get(), names.apply, object.get(),
                                               stashes.get(), shapes.get(), first, second,
                                               nullptr));
}

// A Linear's output times a trained scale per feature (`linear.scaled`). Nothing for any other
// product; empty if the Python row has to handle the scale.
std::optional<Ref> scaled(Call& call, PyObject* product, PyObject* scale) {
  const Tensor *const y = plain_tensor(product), *const s = plain_tensor(scale);
  if (!y || !s || s->dim() != 1 || !s->requires_grad() || !y->dim() ||
      y->size(-1) != s->size(0)) {
    return std::nullopt;
  }
  const Ref operands = Ref::borrow(call.linear_of(product, *y));
  if (!operands) return std::nullopt;
  PyObject* const input = PyTuple_GET_ITEM(operands.get(), 0);
  PyObject* const kept = PyTuple_GET_ITEM(operands.get(), 2);
  PyObject* const weight = PyTuple_GET_ITEM(operands.get(), 3);
  PyObject* const bias = given(PyTuple_GET_ITEM(operands.get(), 4));
  const Tensor *const x = plain_tensor(input), *const w = plain_tensor(weight);
  const Tensor* const b = bias ? plain_tensor(bias) : nullptr;
  if (!x || !w || (bias && !b)) return Ref();
  const int64_t version = x->is_inference() ? 0 : static_cast<int64_t>(x->_version());
  if (integer(PyTuple_GET_ITEM(operands.get(), 1)) != version) return Ref();
  // The user needs the gradient of the product, or autocast casts a weight that the model computed.
  if (truth(attribute(product, names.retains_grad).get()) ||
      truth(attribute(product, names.backward_hooks).get()) ||
      (autocasts(*w) && !of_parameter(*w) && (w->requires_grad() || !is_parameter(weight)))) {
    return Ref();
  }
  const Ref alias = held(weight);
  Ref bias_alias;
  if (bias) bias_alias = held(bias);
  auto node = make_node<ScaledLinearNode>();
  node->dtype = y->scalar_type();
  if (!node->saved.save({kept, THPVariable_Unpack(alias.get()), *s,
                         bias ? Item(THPVariable_Unpack(bias_alias.get())) : nullptr})) {
    return Ref();
  }
  const Tensor result = exactly([&] { return at::mul(*y, *s); });
  return recorded(result, node, {x, w, b, s});
}

// True if a tensor is an output of log_softmax, and `target` has its shape.
bool weighs(const Tensor& tensor, const Tensor& target) {
  return tensor.requires_grad() && tensor.grad_fn() && tensor.sizes().equals(target.sizes()) &&
         tensor.grad_fn()->name() == "LogSoftmaxBackward";
}

}  // namespace

Ref mul_row(Call& call, const Arguments& arguments) {
  if (PyTuple_GET_SIZE(arguments.args) != 2) return {};
  if (arguments.kwargs && PyDict_GET_SIZE(arguments.kwargs)) return {};
  PyObject *const first = PyTuple_GET_ITEM(arguments.args, 0),
                  *const second = PyTuple_GET_ITEM(arguments.args, 1);
  const Tensor *const left = plain_tensor(first), *const right = plain_tensor(second);
  if (!left || !right) {
    // A product with a number. The Python row records it if the tensor has a stash, or if it may be
    // the argument of QuickGELU's sigmoid. The scales of attention are below 1.
    PyObject* const object = left ? first : second;
    const Tensor* const tensor = left ? left : right;
    PyObject* const number = left ? second : first;
    if (!tensor || !(PyFloat_Check(number) || PyLong_Check(number))) return {};
    const bool recorded = PyFloat_Check(number) && PyFloat_AS_DOUBLE(number) > 1 && tensor->requires_grad();
    return recorded || call.known(object, *tensor) ? Ref() : arguments.call();
  }
  if (!left->requires_grad() || !right->requires_grad()) {
    // If a factor has a stash, the Python row records the product. It also records a product of two
    // constants that broadcasting widens: the table of positions (`ops/narrow/positions.py`), and a
    // product of a target and an output of log_softmax (`ops/losses/log_softmax.py`).
    const bool recorded = call.known(first, *left) || call.known(second, *right) ||
                          weighs(*left, *right) || weighs(*right, *left) ||
                          (!left->requires_grad() && !right->requires_grad() && widens(*left, *right));
    return recorded ? Ref() : arguments.call();
  }
  if (!call.covers(MUL_LEFT, {left, right}) || !left->dim() || !right->dim()) return {};
  if (auto output = scaled(call, first, second)) return std::move(*output);
  if (auto output = scaled(call, second, first)) return std::move(*output);
  const Ref kept_left = call.keep(first, *left, MUL_LEFT, last(*left));
  const Ref kept_right = call.keep(second, *right, MUL_RIGHT, last(*right));
  const Tensor result = exactly([&] { return at::mul(*left, *right); });
  auto node = make_node<MulNode>();
  node->left_shape.assign(left->sizes().begin(), left->sizes().end());
  node->right_shape.assign(right->sizes().begin(), right->sizes().end());
  const Ref stashes = tuple_of(kept_left.get(), kept_right.get());
  Ref output;
  if (node->saved.save({kept_left.get(), kept_right.get()})) {
    output = recorded(result, node, {left, right});
  } else {
    const Ref left_shape = tuple_of_integers(left->sizes());
    const Ref right_shape = tuple_of_integers(right->sizes());
    const Ref shapes = tuple_of(left_shape.get(), right_shape.get());
    output = apply(classes.mul, result, stashes, shapes.get(), first, second);
  }
  if (call.rules().rebuilds_matmuls ||
      (cost_of(kept_left.get()) < MATMUL && cost_of(kept_right.get()) < MATMUL)) {
    const Ref recipe = Ref::steal(PyObject_CallNoArgs(classes.multiplied.get()));
    const Ref stash = new_stash(recipe.get(), Ref(), stashes, CHEAP, result.scalar_type());
    call.remember(output.get(), THPVariable_Unpack(output.get()), stash.get());
  }
  return output;
}

// A layer scale in place: the product is computed apart, and written back by autograd's own copy.
Ref mul_in_place_row(Call& call, const Arguments& arguments) {
  if (PyTuple_GET_SIZE(arguments.args) != 2) return {};
  if (arguments.kwargs && PyDict_GET_SIZE(arguments.kwargs)) return {};
  PyObject* const input = PyTuple_GET_ITEM(arguments.args, 0);
  const std::optional<Ref> product = scaled(call, input, PyTuple_GET_ITEM(arguments.args, 1));
  if (!product || !*product) return {};
  return Ref::steal(PyObject_CallMethodOneArg(input, names.copy, product->get()));
}

Ref matmul_row(Call& call, const Arguments& arguments) { return product(call, arguments, 0); }
Ref bmm_row(Call& call, const Arguments& arguments) { return product(call, arguments, 3); }
Ref mm_row(Call& call, const Arguments& arguments) { return product(call, arguments, 2); }

}  // namespace mesa
