// The rows of Linear, layer norm, activations, products, sums and views (`rows.h`).

#include "rows.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/silu.h>
#include <c10/util/irange.h>
#include <pybind11/gil.h>

#include "nodes.h"
#include "operators.h"

namespace mesa {
namespace {

// True if PyTorch's choice between one matmul and a batch of matmuls depends on a gradient that
// only a recorded call requires (`folding._depends` for the weight of a Linear).
bool folds_by_gradient(const Tensor& input, const Tensor& weight) {
  if (input.dim() < 3 || !weight.requires_grad()) return false;
  for (const auto i : c10::irange(input.dim() - 2)) {
    if (input.stride(i) != input.stride(i + 1) * input.size(i + 1)) return true;
  }
  return false;
}

std::optional<Tensor> optional(const Tensor* tensor) {
  return tensor ? std::optional<Tensor>(*tensor) : std::nullopt;
}

// The operands of a Linear's output, for a layer scale behind it: see `Recorder.linears`.
void remember_linear(Call& call, PyObject* output, PyObject* input, const Tensor& x, PyObject* kept,
                     PyObject* weight, PyObject* bias) {
  const Ref version =
      Ref::steal(PyLong_FromLongLong(x.is_inference() ? 0 : static_cast<int64_t>(x._version())));
  const Ref operands = tuple_of(input, version.get(), kept, weight, bias ? bias : Py_None);
  call.remember_linear(output, THPVariable_Unpack(output), operands.get());
}

Ref linear_row(Call& call, const Arguments& arguments) {
  std::array<PyObject*, 3> values;
  if (!arguments.read<3>({"input", "weight", "bias"}, values)) return {};
  return linear(call, values[0], values[1], given(values[2]));
}

Ref layer_norm_row(Call& call, const Arguments& arguments) {
  std::array<PyObject*, 5> values;
  if (!arguments.read<5>({"input", "normalized_shape", "weight", "bias", "eps"}, values) ||
      !values[1] || !PyTuple_Check(values[1])) {
    return {};
  }
  c10::DimVector shape;
  for (const auto i : c10::irange(PyTuple_GET_SIZE(values[1]))) {
    shape.push_back(integer(PyTuple_GET_ITEM(values[1], i)));
  }
  const double eps = values[4] ? PyFloat_AsDouble(values[4]) : 1e-5;
  if (PyErr_Occurred()) throw python_error();
  return layer_norm(call, values[0], shape, given(values[2]), given(values[3]), eps);
}

Ref gelu_row(Call& call, const Arguments& arguments) {
  std::array<PyObject*, 2> values;
  if (!arguments.read<2>({"input", "approximate"}, values)) return {};
  bool tanh = false;
  if (values[1]) {
    tanh = PyUnicode_CompareWithASCIIString(values[1], "tanh") == 0;
    if (!tanh && PyUnicode_CompareWithASCIIString(values[1], "none") != 0) return {};
  }
  return smooth(call, values[0], tanh ? "gelu_tanh" : "gelu");
}

Ref silu_row(Call& call, const Arguments& arguments) {
  std::array<PyObject*, 2> values;
  if (!arguments.read<2>({"input", "inplace"}, values) || (values[1] && truth(values[1]))) return {};
  return smooth(call, values[0], "silu");
}

// An addition saves nothing. Its sum is rebuilt only if matmuls are. If a term is a number and the other
// has a stash, the Python row records the sum.
Ref add_row(Call& call, const Arguments& arguments) {
  const bool two = PyTuple_GET_SIZE(arguments.args) == 2;
  if (!two || !call.rules().plain_fallback) return {};
  PyObject *const first = PyTuple_GET_ITEM(arguments.args, 0),
                  *const second = PyTuple_GET_ITEM(arguments.args, 1);
  if (PyFloat_Check(second) || PyLong_Check(second)) {
    const Tensor* const shifted = plain_tensor(first);
    if (shifted && call.known(first, *shifted)) return {};
  }
  const auto rebuilt = [&](Py_ssize_t i) {
    PyObject* const term = PyTuple_GET_ITEM(arguments.args, i);
    const Tensor* const tensor = plain_tensor(term);
    PyObject* const stash = tensor ? call.known(term, *tensor) : nullptr;
    return stash && cost_of(stash) == MATMUL;
  };
  // A sum of two constants that are made of numbers (`ops/narrow/numbers.py`): the Python row.
  const Tensor* const constant = plain_tensor(first);
  if (constant && !constant->requires_grad() && call.known(first, *constant)) return {};
  if (!call.rules().rebuilds_matmuls) return arguments.call();
  if (rebuilt(0) || rebuilt(1)) return {};
  // A sum that broadcasting widens (`add._widens`): the Python row decides.
  const Tensor* const left = plain_tensor(PyTuple_GET_ITEM(arguments.args, 0));
  const Tensor* const right = plain_tensor(PyTuple_GET_ITEM(arguments.args, 1));
  // A nested tensor has no sizes.
  const bool widens = left && right && !left->is_nested() && !right->is_nested() &&
                      left->dim() > 2 && right->dim() > 2 &&
                      !left->sizes().equals(right->sizes());
  return widens ? Ref() : arguments.call();
}

// A dropout that drops nothing. torch.dropout calls `training` `train`.
Ref dropout_row(Call&, const Arguments& arguments) {
  std::array<PyObject*, 4> values;
  if (!arguments.read<4>({"input", "p", "training", "inplace"}, values) || !values[1]) return {};
  const double p = PyFloat_AsDouble(values[1]);
  if (PyErr_Occurred()) throw python_error();
  if (p != 0 && !(values[2] && !truth(values[2]))) return {};
  return arguments.call();
}

void derive(Call& call, PyObject* output, PyObject* input, PyObject* source, PyObject* args,
            PyObject* kwargs, PyObject* function, PyObject* index, bool reshapes) {
  const Tensor* const view = plain_tensor(output);
  const Tensor* const x = plain_tensor(input);
  const at::ScalarType dtype = dtype_of(classes.stash_slots.dtype.get(source));
  if (!view || view->scalar_type() != dtype || call.known(output, *view)) return;
  Ref recipe = allocate(classes.replay.get());
  const auto& slots = classes.replay_slots;
  slots.function.set(recipe.get(), Ref::borrow(function));
  slots.args.set(recipe.get(), Ref::borrow(args));
  slots.kwargs.set(recipe.get(), Ref::borrow(kwargs));
  slots.index.set(recipe.get(), Ref::borrow(index));
  slots.geometry.set(recipe.get(), Geometry::pack(*x, *view, reshapes));
  const Ref stash = new_stash(recipe.get(), Ref(), tuple_of(source), VIEW, dtype);
  call.remember(output, *view, stash.get());
}

bool has_tensor(PyObject* values) {
  const Py_ssize_t count = PyTuple_GET_SIZE(values);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const value = PyTuple_GET_ITEM(values, i);
    // A number, a text, None or a slice is no tensor. Any other object is left to the Python row.
    if (PyLong_Check(value) || PyFloat_Check(value) || PyUnicode_Check(value) ||
        value == Py_None || PySlice_Check(value)) {
      continue;
    }
    if ((PyTuple_Check(value) && !has_tensor(value)) ||
        (PyList_Check(value) && !has_tensor(Ref::steal(PyList_AsTuple(value)).get()))) {
      continue;
    }
    return true;
  }
  return false;
}

Ref view_row_of(Call& call, const Arguments& arguments, bool reshapes) {
  const Py_ssize_t count = PyTuple_GET_SIZE(arguments.args);
  PyObject* const input = count ? PyTuple_GET_ITEM(arguments.args, 0) : nullptr;
  const Tensor* const x = plain_tensor(input);
  if (!x) return {};
  PyObject* const source = call.known(input, *x);
  if (!source) return arguments.call();
  const Ref rest = Ref::steal(PyTuple_GetSlice(arguments.args, 1, count));
  const Ref kwargs =
      Ref::steal(arguments.kwargs ? PyDict_Copy(arguments.kwargs) : PyDict_New());
  const Ref named = Ref::steal(PyDict_Values(kwargs.get()));
  if (has_tensor(rest.get()) || has_tensor(Ref::steal(PyList_AsTuple(named.get())).get())) {
    return {};
  }
  const Ref held_source = Ref::borrow(source);
  Ref output = arguments.call();
  if (THPVariable_Check(output.get())) {
    derive(call, output.get(), input, source, rest.get(), kwargs.get(), arguments.function, Py_None,
           reshapes);
  } else if (PyTuple_Check(output.get())) {
    for (const auto i : c10::irange(PyTuple_GET_SIZE(output.get()))) {
      const Ref index = Ref::steal(PyLong_FromSsize_t(i));
      derive(call, PyTuple_GET_ITEM(output.get(), i), input, source, rest.get(), kwargs.get(),
             arguments.function, index.get(), false);
    }
  }
  return output;
}

Ref view_row(Call& call, const Arguments& arguments) {
  return view_row_of(call, arguments, false);
}
// For functions that copy if they cannot view: the values stay in their order.
Ref reshape_row(Call& call, const Arguments& arguments) {
  return view_row_of(call, arguments, true);
}

// A padding with a constant saves nothing.
Ref pad_row(Call& call, const Arguments& arguments) {
  std::array<PyObject*, 4> values;
  if (!arguments.read<4>({"input", "pad", "mode", "value"}, values)) return {};
  const Tensor* const x = plain_tensor(values[0]);
  const bool constant =
      !values[2] || (PyUnicode_Check(values[2]) &&
                     PyUnicode_CompareWithASCIIString(values[2], "constant") == 0);
  return x && constant ? view_row_of(call, arguments, false) : Ref();
}

// A function that saves nothing large.
Ref nothing_row(Call&, const Arguments& arguments) { return arguments.call(); }

struct NamedRow {
  const char* name;
  Row row;
};

}  // namespace

Ref attention_row(Call& call, const Arguments& arguments);
Ref softmax_row(Call& call, const Arguments& arguments);
Ref mul_row(Call& call, const Arguments& arguments);
Ref mul_in_place_row(Call& call, const Arguments& arguments);
Ref matmul_row(Call& call, const Arguments& arguments);
Ref bmm_row(Call& call, const Arguments& arguments);
Ref mm_row(Call& call, const Arguments& arguments);

Row row_named(const char* name) {
  static constexpr NamedRow rows[] = {
      {"linear", linear_row},     {"layer_norm", layer_norm_row}, {"gelu", gelu_row},
      {"silu", silu_row},         {"add", add_row},               {"dropout", dropout_row},
      {"view", view_row},         {"reshape", reshape_row},       {"nothing", nothing_row},
      {"mul", mul_row},           {"mul_", mul_in_place_row},     {"attention", attention_row}, {"softmax", softmax_row},     {"matmul", matmul_row},
      {"bmm", bmm_row},           {"mm", mm_row},                 {"pad", pad_row},
  };
  for (const auto& row : rows) {
    if (std::string_view(row.name) == name) return row.row;
  }
  return nullptr;
}

Ref linear(Call& call, PyObject* input, PyObject* weight, PyObject* bias) {
  const Tensor *const x = plain_tensor(input), *const w = plain_tensor(weight);
  const Tensor* const b = bias ? plain_tensor(bias) : nullptr;
  if (!x || !w || (bias && !b) || w->dim() != 2 || !w->numel() ||
      !call.covers(LINEAR_INPUT, {x, w, b}) || folds_by_gradient(*x, *w)) {
    return {};
  }
  // Autocast casts a weight that the model has computed, and PyTorch saves the cast.
  if (autocasts(*w) && !of_parameter(*w) && (w->requires_grad() || !is_parameter(weight))) return {};
  Ref kept, alias;
  if (w->requires_grad()) kept = call.keep(input, *x, LINEAR_INPUT, last(*x));
  if (x->requires_grad()) alias = held(weight);
  const Tensor result = exactly([&] { return at::linear(*x, *w, optional(b)); });
  auto node = make_node<LinearNode>();
  Ref output;
  if (node->saved.save({kept.get(), alias ? Item(THPVariable_Unpack(alias.get())) : nullptr})) {
    output = recorded(result, node, {x, w, b});
  } else {
    Ref saved_weight;
    if (alias) saved_weight = uncompressed(THPVariable_Unpack(alias.get()), alias.get());
    const Ref stashes = tuple_of(or_none(kept.get()), or_none(saved_weight.get()));
    output = apply(classes.linear, result, stashes, Py_None, input, weight, or_none(bias));
  }
  if (kept) remember_linear(call, output.get(), input, *x, kept.get(), weight, bias);
  if (!call.rules().rebuilds_matmuls) return output;
  // A frozen weight needs no input. But the output can be recomputed from the input's stash.
  PyObject* source = kept ? kept.get() : call.usable(input, *x, call.rule(LINEAR_INPUT));
  if (!source && x->requires_grad() && w->size(1) <= w->size(0)) {
    // The codes of the input take no more memory than those of the output (`linear.linear`).
    kept = call.keep(input, *x, LINEAR_INPUT, last(*x));
    source = kept.get();
  }
  const bool narrow = 4 * w->size(1) <= w->size(0);  // `linear._narrow`
  if (source && (cost_of(source) < MATMUL || narrow)) {
    const Ref first = held(weight);
    Ref parameters;
    if (bias) {
      const Ref second = held(bias);
      parameters = tuple_of(first.get(), second.get());
    } else {
      parameters = tuple_of(first.get());
    }
    const Ref stash = new_stash(classes.product.get(), std::move(parameters), tuple_of(source),
                                MATMUL, result.scalar_type());
    call.remember(output.get(), THPVariable_Unpack(output.get()), stash.get());
  }
  return output;
}

Ref layer_norm(Call& call, PyObject* input, at::IntArrayRef shape, PyObject* weight,
               PyObject* bias, double eps) {
  const Tensor* const x = plain_tensor(input);
  const Tensor* const w = weight ? plain_tensor(weight) : nullptr;
  const Tensor* const b = bias ? plain_tensor(bias) : nullptr;
  const Rule& rule = call.rule(LAYER_NORM);
  if (!x || (weight && !w) || (bias && !b) || !x->numel() || !call.covers(LAYER_NORM, {x, w, b}) ||
      !(rule.affine || rule.values) || rule.fused ||
      (x->is_view() && of_parameter(*x)) ||
      PyObject_TypeCheck(input, (PyTypeObject*)ParameterClass) ||
      (autocasts(*x) && (!x->is_cpu() || !rule.affine)) || (rule.values && narrowed(*x))) {
    return {};
  }
  if (rule.rebuild_linear) {
    // A norm of a matmul's output is rebuilt from it: the Python row.
    PyObject* const source = call.known(input, *x);
    if (source && cost_of(source) == MATMUL) return {};
  }
  const auto [result, mean, rstd] =
      exactly([&] { return at::native_layer_norm(*x, shape, optional(w), optional(b), eps); });
  const Tensor deviations = exactly([&, &rstd = rstd] { return flat_vector(rstd); });
  Ref x_hat;
  if (rule.affine) {
    Layout layout;
    layout.shape.assign(result.sizes().begin(), result.sizes().end());
    layout.order.resize(result.dim());
    for (const auto d : c10::irange(result.dim())) layout.order[d] = d;
    layout.cols = c10::multiply_integers(shape);
    const auto [codes, scales] = exactly([&, &mean = mean] {
      return normalized_encode(reshaped(*x, {-1, layout.cols}), flat_vector(mean), deviations, rule);
    });
    x_hat = call.leaf(rule, codes, scales, layout, result.scalar_type());
  } else {
    // The input itself takes no more memory than x_hat, and another operator may save it too.
    const Ref kept = call.keep(input, *x, LAYER_NORM, last(*x));
    Ref recipe = allocate(classes.normalized.get());
    classes.normalized_slots.dims.set(
        recipe.get(), Ref::steal(PyLong_FromSsize_t(static_cast<Py_ssize_t>(shape.size()))));
    classes.normalized_slots.centred.set(recipe.get(), Ref::borrow(Py_True));
    const Ref statistics = wrapped(deviations);
    x_hat = new_stash(recipe.get(), tuple_of(statistics.get()), tuple_of(kept.get()), CHEAP,
                      result.scalar_type());
  }
  auto node = make_node<NormNode>();
  node->shape.assign(shape.begin(), shape.end());
  Ref output;
  if (node->saved.save({x_hat.get(), deviations, w ? Item(*w) : nullptr})) {
    output = recorded(result, node, {x, w, b});
  } else {
    const Ref statistics = uncompressed(deviations);
    Ref saved_weight;
    if (w) saved_weight = uncompressed(*w, weight);
    const Ref stashes = tuple_of(x_hat.get(), statistics.get(), or_none(saved_weight.get()));
    const Ref spanned = tuple_of_integers(shape);
    const Ref fixed = tuple_of(Py_True, spanned.get());
    output = apply(classes.token_norm, result, stashes, fixed.get(), input, or_none(weight),
                   or_none(bias));
  }

  Ref recipe = allocate(classes.scaled.get());
  classes.scaled_slots.has_weight.set(recipe.get(), Ref::borrow(w ? Py_True : Py_False));
  classes.scaled_slots.has_bias.set(recipe.get(), Ref::borrow(b ? Py_True : Py_False));
  classes.scaled_slots.per_channel.set(
      recipe.get(), rule.affine ? Ref::borrow(Py_None) : tuple_of_integers(shape));
  Ref parameters;
  if (w && b) {
    const Ref first = held(weight), second = held(bias);
    parameters = tuple_of(first.get(), second.get());
  } else if (w || b) {
    const Ref only = held(w ? weight : bias);
    parameters = tuple_of(only.get());
  }
  const Ref stash = new_stash(recipe.get(), std::move(parameters), tuple_of(x_hat.get()), CHEAP,
                              result.scalar_type());
  call.remember(output.get(), THPVariable_Unpack(output.get()), stash.get());
  return output;
}

Ref smooth(Call& call, PyObject* input, std::string_view kind) {
  const Tensor* const x = plain_tensor(input);
  const Rule& rule = call.rule(ACTIVATION);
  if (!x || rule.fused || !call.covers(ACTIVATION, {x}) || !x->dim()) return {};
  const Ref kept = call.keep(input, *x, ACTIVATION, last(*x));
  const Tensor result = exactly([&] { return activation(*x, kind); });
  auto node = make_node<SmoothNode>();
  const Ref name = Ref::steal(PyUnicode_FromStringAndSize(kind.data(), (Py_ssize_t)kind.size()));
  node->kind = kind;
  Ref output;
  if (node->saved.save({kept.get()})) {
    output = recorded(result, node, {x});
  } else {
    output = apply(classes.smooth, result, tuple_of(kept.get()), name.get(), input);
  }
  Ref recipe = allocate(classes.activated.get());
  classes.activated_slots.kind.set(recipe.get(), name);
  const Ref stash = new_stash(recipe.get(), Ref(), tuple_of(kept.get()), CHEAP,
                              result.scalar_type());
  call.remember(output.get(), THPVariable_Unpack(output.get()), stash.get());
  return output;
}

}  // namespace mesa
