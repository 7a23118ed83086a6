// The two entrances from Python: a torch call under the mode, and the call of a wrapped module.
#pragma once

#include "python.h"

namespace mesa {

// `CompressionMode.__torch_function__(func, types, args, kwargs)` for calls that have a native row
// or need none. Returns `SLOW` if the Python code must handle the call.
PyObject* dispatch(PyObject* mode, PyObject* func, PyObject* args, PyObject* kwargs);

// `entry.enter(module, call, args, kwargs)` for a module inside an active mode. Returns `SLOW` if
// the Python code must handle the call.
PyObject* enter(PyObject* module, PyObject* call, PyObject* args, PyObject* kwargs);

// Takes over the tables of `engine/native.py`, in which `dispatch` and `enter` look up a call.
void set_tables(PyObject* rows, PyObject* python_rows, PyObject* nothing, PyObject* stock);

extern PyObject* SLOW;

}  // namespace mesa
