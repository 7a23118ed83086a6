// The rows of `ops/linear.py`, `norm.py`, `activation.py`, `attention.py` and others in C++, for the
// common cases of the forward.
//
// A row returns an empty reference if the call is not a common case. Then it has changed nothing,
// and the Python row handles the call.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/gil.h>

#include "recorder.h"

namespace mesa {

// The arguments of a call by position or by name.
struct Arguments {
  PyObject* function;
  PyObject* args;    // a tuple
  PyObject* kwargs;  // a dict or null

  // Fills `values` in the order of the names. False if there are other arguments.
  template <size_t N>
  bool read(const std::array<const char*, N>& names, std::array<PyObject*, N>& values) const {
    values.fill(nullptr);
    const Py_ssize_t count = PyTuple_GET_SIZE(args);
    if (count > static_cast<Py_ssize_t>(N)) return false;
    for (Py_ssize_t i = 0; i < count; ++i) values[i] = PyTuple_GET_ITEM(args, i);
    if (!kwargs) return true;
    PyObject *key, *value;
    Py_ssize_t place = 0;
    while (PyDict_Next(kwargs, &place, &key, &value)) {
      size_t i = 0;
      while (i < N && PyUnicode_CompareWithASCIIString(key, names[i]) != 0) ++i;
      if (i == N || values[i]) return false;
      values[i] = value;
    }
    return true;
  }
  // Calls the function itself.
  Ref call() const { return Ref::steal(PyObject_Call(function, args, kwargs)); }
};

using Row = Ref (*)(Call&, const Arguments&);

Ref linear(Call& call, PyObject* input, PyObject* weight, PyObject* bias);
Ref layer_norm(Call& call, PyObject* input, at::IntArrayRef shape, PyObject* weight,
               PyObject* bias, double eps);
Ref smooth(Call& call, PyObject* input, std::string_view kind);

// The row of a name that `engine/native.py` gives to a torch function, or null.
Row row_named(const char* name);

// The last dim as a bit mask.
inline uint64_t last(const Tensor& tensor) { return uint64_t{1} << (tensor.dim() - 1); }

// Calls a Python operator, if no native node can read its stashes.
template <typename... Objects>
Ref apply(const Ref& type, const Tensor& result, const Ref& stashes, Objects*... rest) {
  const Ref output = wrapped(result);
  return Ref::steal(PyObject_CallMethodObjArgs(type.get(), names.apply, output.get(),
                                               stashes.get(), rest..., nullptr));
}

inline PyObject* or_none(PyObject* object) { return object ? object : Py_None; }

// None as an absent argument.
inline PyObject* given(PyObject* object) { return object == Py_None ? nullptr : object; }

// Computes under `no_grad`, without autocast's cache and without the GIL (`Recorder.exactly`).
//
// The dispatcher skips the kernels that record for autograd. No operator here writes to a tensor or
// returns a view to the user, so there is nothing to record.
template <typename Compute>
auto exactly(const Compute& compute) {
  const at::NoGradGuard guard;
  const at::AutoDispatchBelowADInplaceOrView below;
  const pybind11::gil_scoped_release release;
  if (!at::autocast::is_autocast_cache_enabled()) return compute();
  struct Cache {
    Cache() { at::autocast::set_autocast_cache_enabled(false); }
    ~Cache() { at::autocast::set_autocast_cache_enabled(true); }
  } cache;
  return compute();
}

}  // namespace mesa
