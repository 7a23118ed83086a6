// A torch call under the mode, and the call of a wrapped module (`mode.h`).

#include "mode.h"

#include <vector>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/irange.h>
#include <pybind11/gil.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "rows.h"

namespace mesa {

PyObject* SLOW = nullptr;

namespace {

using TorchFunction = at::impl::PythonTorchFunctionTLS;

// Torch functions with a native row, those with a Python row, and the names of functions that save
// nothing large.
PyObject *native_rows, *python_rows, *nothing;
std::vector<Row> rows;

// A class of torch.nn whose forward only calls one torch function.
struct Stock {
  PyObject *type, *forward, *name, *function;  // torch.nn.functional.NAME is FUNCTION
  enum Kind { LINEAR, LAYER_NORM, GELU, DROPOUT } kind;
};
std::vector<Stock> stock;

PyObject* slow() { return Py_NewRef(SLOW); }

// The pack hook that is active, or null. Borrowed.
PyObject* active_hook() {
  const auto hooks = at::SavedTensorDefaultHooks::get_hooks();
  return hooks ? hooks->first.ptr(getPyInterpreter()) : nullptr;
}

// True if PyTorch differentiates by the autograd graph alone, and nobody watches or transforms the
// operators.
bool plain_eager() {
  using c10::DispatchKey;
  if (c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing() ||
      c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode)) {
    return false;
  }
  PyObject* const level = item(classes.current_level.get(), names.level);
  if (level && integer(level) >= 0) return false;
  PyObject* const exporting = item(classes.compiler.get(), names.exporting);
  PyObject* const compiling = item(classes.compiler.get(), names.compiling);
  return exporting == Py_False && compiling == Py_False;
}

// True if the recorder may be used natively, with the hooks that are active now.
bool usable(PyObject* recorder) {
  if (attribute(recorder, names.native).get() != Py_True) return false;
  const Ref hooks = attribute(recorder, names.hooks);
  PyObject* const active = active_hook();
  return hooks.get() == (active ? active : Py_None);
}

// True if no other torch function mode sees the calls. A default device is such a mode too, but it
// changes no operator. `below`: the number of modes below the compression mode.
bool alone(int64_t below) {
  for (const auto i : c10::irange(below)) {
    PyObject* const mode = TorchFunction::get_stack_at(i)->ptr(getPyInterpreter());
    if (!Py_IS_TYPE(mode, (PyTypeObject*)classes.device_context.get())) return false;
  }
  return true;
}

// The innermost torch function mode if it is a compression mode, else null. Borrowed.
PyObject* innermost() {
  const int64_t count = TorchFunction::stack_len();
  if (!count || TorchFunction::get_disabled_state() != at::impl::ENABLED) return nullptr;
  PyObject* const mode = TorchFunction::get_stack_at(count - 1)->ptr(getPyInterpreter());
  return Py_IS_TYPE(mode, (PyTypeObject*)classes.mode.get()) ? mode : nullptr;
}

bool fsdp_module(PyTypeObject* type) {
  static std::unordered_map<PyTypeObject*, bool> known;
  if (const auto found = known.find(type); found != known.end()) return found->second;
  const bool is = truth(
      Ref::steal(PyObject_CallOneArg(classes.is_fsdp_module.get(), (PyObject*)type)).get());
  Py_INCREF(type);  // so that no other class gets its address
  known.emplace(type, is);
  return is;
}

// True if an argument may need a gradient (`fallback._tracked`), or is no plain object.
bool may_need_gradient(PyObject* value, bool nested = false) {
  if (THPVariable_CheckExact(value)) return THPVariable_Unpack(value).requires_grad();
  if (value == Py_None || PyLong_Check(value) || PyFloat_Check(value) || PyUnicode_Check(value) ||
      Py_IS_TYPE(value, &THPDtypeType) || Py_IS_TYPE(value, &THPDeviceType)) {
    return false;
  }
  if (nested || !(PyTuple_Check(value) || PyList_Check(value))) return true;
  for (const auto i : c10::irange(PySequence_Fast_GET_SIZE(value))) {
    if (may_need_gradient(PySequence_Fast_GET_ITEM(value, i), true)) return true;
  }
  return false;
}

bool may_need_gradient(const Arguments& arguments) {
  for (const auto i : c10::irange(PyTuple_GET_SIZE(arguments.args))) {
    if (may_need_gradient(PyTuple_GET_ITEM(arguments.args, i))) return true;
  }
  PyObject *key, *value;
  for (Py_ssize_t place = 0;
       arguments.kwargs && PyDict_Next(arguments.kwargs, &place, &key, &value);) {
    if (may_need_gradient(value)) return true;
  }
  return false;
}

// Sets the recorder's context, and restores the former one.
class Context {
 public:
  Context(PyObject* recorder, PyObject* context)
      : recorder_(recorder), outside_(attribute(recorder, names.context)) {
    check(PyObject_SetAttr(recorder, names.context, context));
  }
  ~Context() {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject_SetAttr(recorder_, names.context, outside_.get());
    PyErr_Restore(type, value, trace);
  }

 private:
  PyObject* recorder_;
  Ref outside_;
};

// A parameter of a module whose class is one of torch.nn. Borrowed; null if it is None.
PyObject* parameter(PyObject* parameters, PyObject* name) {
  PyObject* const value = item(parameters, name);
  return value == Py_None ? nullptr : value;
}

// The forward of a module of torch.nn, without its Python code. Empty if it has to run.
Ref stock_forward(const Stock& entry, Call& call, PyObject* attributes, PyObject* input) {
  PyObject* const parameters = item(attributes, names.parameters);
  if (!parameters) return {};
  switch (entry.kind) {
    case Stock::LINEAR: {
      PyObject* const weight = parameter(parameters, names.weight);
      return weight ? linear(call, input, weight, parameter(parameters, names.bias)) : Ref();
    }
    case Stock::LAYER_NORM: {
      PyObject* const shape = item(attributes, names.normalized_shape);
      PyObject* const eps = item(attributes, names.eps);
      if (!shape || !PyTuple_Check(shape) || !eps || !PyFloat_Check(eps)) return {};
      c10::DimVector sizes;
      for (const auto i : c10::irange(PyTuple_GET_SIZE(shape))) {
        sizes.push_back(integer(PyTuple_GET_ITEM(shape, i)));
      }
      return layer_norm(call, input, sizes, parameter(parameters, names.weight),
                        parameter(parameters, names.bias), PyFloat_AS_DOUBLE(eps));
    }
    case Stock::GELU: {
      PyObject* const approximate = item(attributes, names.approximate);
      if (!approximate || !PyUnicode_Check(approximate)) return {};
      const bool tanh = PyUnicode_CompareWithASCIIString(approximate, "tanh") == 0;
      return smooth(call, input, tanh ? "gelu_tanh" : "gelu");
    }
    case Stock::DROPOUT: {
      PyObject* const probability = item(attributes, names.p);
      PyObject* const training = item(attributes, names.training);
      const bool idle = training == Py_False ||
                        (probability && PyFloat_Check(probability) &&
                         PyFloat_AS_DOUBLE(probability) == 0);
      // PyTorch returns the same tensor.
      return idle && plain_tensor(input) ? Ref::borrow(input) : Ref();
    }
  }
  return {};
}

const Stock* stock_of(PyObject* module, PyObject* forward) {
  for (const Stock& entry : stock) {
    if (Py_IS_TYPE(module, (PyTypeObject*)entry.type)) {
      const bool same = forward == entry.forward &&
                        item(classes.functional.get(), entry.name) == entry.function;
      return same ? &entry : nullptr;
    }
  }
  return nullptr;
}

bool needs_gradient(PyObject* args) {
  for (const auto i : c10::irange(PyTuple_GET_SIZE(args))) {
    PyObject* const value = PyTuple_GET_ITEM(args, i);
    if (THPVariable_CheckExact(value) && THPVariable_Unpack(value).requires_grad()) return true;
  }
  return false;
}

}  // namespace

PyObject* dispatch(PyObject* mode, PyObject* func, PyObject* args, PyObject* kwargs) {
  if (kwargs == Py_None) kwargs = nullptr;
  const Arguments arguments{func, args, kwargs};
  if (!at::GradMode::is_enabled()) return slow();
  if (PyObject* const place = item(native_rows, func)) {
    // PyTorch has taken the compression mode off the stack.
    if (!plain_eager() || !alone(TorchFunction::stack_len())) return slow();
    const Ref recorder = attribute(mode, names.recorder);
    if (!usable(recorder.get())) return slow();
    Call call(recorder.get());
    Ref result = rows[integer(place)](call, arguments);
    return result ? result.release() : slow();
  }
  if (item(python_rows, func)) return slow();
  const Ref name = Ref::steal(PyObject_GetAttrString(func, "__name__"));
  const int saves_nothing = PySet_Contains(nothing, name.get());
  check(saves_nothing);
  // Without a gradient nothing is saved at all.
  if (!saves_nothing && (!plain_eager() || may_need_gradient(arguments))) return slow();
  return arguments.call().release();
}

PyObject* enter(PyObject* module, PyObject* forward, PyObject* args, PyObject* kwargs) {
  if (!at::GradMode::is_enabled()) return slow();
  const Ref attributes = attribute(module, names.dict);
  PyObject* const entry = item(attributes.get(), names.entry);
  PyObject* const mode = innermost();
  if (!entry || !mode || !needs_gradient(args)) return slow();
  const Ref installed = attribute(entry, names.installed);
  if (attribute(mode, names.owner).get() != installed.get()) return slow();
  const Ref tracer = Ref::steal(PyObject_CallNoArgs(classes.eval_frame_callback.get()));
  if (PyCallable_Check(tracer.get())) return slow();
  const Ref context = attribute(entry, names.context);
  if (attribute(context.get(), names.checkpointed).get() != Py_False) return slow();
  const Ref recorder = attribute(mode, names.recorder);
  if (!plain_eager() || !usable(recorder.get()) || fsdp_module(Py_TYPE(module))) return slow();

  const Context inside(recorder.get(), context.get());
  if (const Stock* const entry = stock_of(module, forward);
      entry && alone(TorchFunction::stack_len() - 1) && PyTuple_GET_SIZE(args) == 2 &&
      !PyDict_GET_SIZE(kwargs)) {
    Call call(recorder.get());
    Ref result = stock_forward(*entry, call, attributes.get(), PyTuple_GET_ITEM(args, 1));
    if (result) return result.release();
  }
  return Ref::steal(PyObject_Call(forward, args, kwargs)).release();
}

void set_tables(PyObject* native, PyObject* python, PyObject* saving_nothing, PyObject* modules) {
  native_rows = PyDict_New();
  PyObject *func, *name;
  for (Py_ssize_t place = 0; PyDict_Next(native, &place, &func, &name);) {
    const char* const text = PyUnicode_AsUTF8(name);
    const Row row = text ? row_named(text) : nullptr;
    TORCH_CHECK(row, "no native row named ", text ? text : "?");
    const Ref index = Ref::steal(PyLong_FromSize_t(rows.size()));
    rows.push_back(row);
    check(PyDict_SetItem(native_rows, func, index.get()));
  }
  python_rows = Py_NewRef(python);
  nothing = Py_NewRef(saving_nothing);
  const Ref list = Ref::steal(PySequence_List(modules));
  for (const auto i : c10::irange(PyList_GET_SIZE(list.get()))) {
    PyObject* const values = Py_NewRef(PyList_GET_ITEM(list.get(), i));
    stock.push_back({PyTuple_GET_ITEM(values, 0), PyTuple_GET_ITEM(values, 1),
                     PyTuple_GET_ITEM(values, 2), PyTuple_GET_ITEM(values, 3),
                     static_cast<Stock::Kind>(integer(PyTuple_GET_ITEM(values, 4)))});
  }
}

}  // namespace mesa
