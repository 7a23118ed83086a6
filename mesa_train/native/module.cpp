// The Python module `mesa_train_native`, and its one compilation unit: torch's headers take most of
// the compiler's time.

#include "attention.cpp"
#include "classes.cpp"
#include "mode.cpp"
#include "nodes.cpp"
#include "products.cpp"
#include "rebuilt.cpp"
#include "recorder.cpp"
#include "rows.cpp"
#include "saved.cpp"
#include "types.cpp"

namespace {

PyObject* py_dispatch(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  return mesa::dispatch(args[0], args[1], args[2], args[3]);
  END_HANDLE_TH_ERRORS
}

PyObject* py_enter(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  return mesa::enter(args[0], args[1], args[2], args[3]);
  END_HANDLE_TH_ERRORS
}

PyObject* py_set_up(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  mesa::set_up(args[0]);
  mesa::register_types();
  mesa::set_tables(args[1], args[2], args[3], args[4]);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

template <typename Function>
PyCFunction fast(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"dispatch", fast(py_dispatch), METH_FASTCALL, "dispatch(mode, func, args, kwargs)"},
    {"enter", fast(py_enter), METH_FASTCALL, "enter(module, forward, args, kwargs)"},
    {"set_up", fast(py_set_up), METH_FASTCALL,
     "set_up(classes, native_rows, python_rows, nothing, stock)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "mesa_train_native", "The native rows of mesa_train.", -1, methods,
    nullptr,               nullptr,             nullptr,                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_mesa_train_native() {
  PyObject* const module = PyModule_Create(&definition);
  if (!module) return nullptr;
  mesa::SLOW = PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  if (!mesa::SLOW || PyModule_AddObjectRef(module, "SLOW", mesa::SLOW) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
