// Python objects in C++: owned references, members of classes with __slots__, and conversions.
#pragma once

#include <Python.h>
#include <structmember.h>

#include <utility>

#include <ATen/core/Tensor.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace mesa {

using at::Tensor;

// An owned reference. The GIL must be held wherever one is made, copied or destroyed.
class Ref {
 public:
  Ref() = default;
  // Takes over a new reference, as a function of Python's C API returns it. Throws if it is null,
  // because then the function has set an error.
  static Ref steal(PyObject* object) {
    if (!object) throw python_error();
    Ref ref;
    ref.object_ = object;
    return ref;
  }
  static Ref borrow(PyObject* object) {
    Ref ref;
    ref.object_ = Py_XNewRef(object);
    return ref;
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref(const Ref& other) : object_(Py_XNewRef(other.object_)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

// An interned string, made once and never freed.
inline PyObject* interned(const char* text) {
  PyObject* string = PyUnicode_InternFromString(text);
  if (!string) throw python_error();
  return string;
}

inline Ref attribute(PyObject* object, PyObject* name) {
  return Ref::steal(PyObject_GetAttr(object, name));
}

// A borrowed value of a dict, or null. Unlike PyDict_GetItem it does not hide errors.
inline PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw python_error();
  return value;
}

inline void check(int status) {
  if (status < 0) throw python_error();
}

inline int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

inline bool truth(PyObject* object) {
  if (object == Py_True) return true;
  if (object == Py_False || object == Py_None) return false;
  const int value = PyObject_IsTrue(object);
  check(value);
  return value;
}

template <typename Values>
Ref tuple_of_integers(const Values& values) {
  Ref tuple = Ref::steal(PyTuple_New(static_cast<Py_ssize_t>(values.size())));
  Py_ssize_t i = 0;
  for (const auto value : values) {
    PyObject* number = PyLong_FromLongLong(value);
    if (!number) throw python_error();
    PyTuple_SET_ITEM(tuple.get(), i++, number);
  }
  return tuple;
}

template <typename... Objects>
Ref tuple_of(Objects*... objects) {
  return Ref::steal(PyTuple_Pack(sizeof...(objects), objects...));
}

inline Ref wrapped(const Tensor& tensor) { return Ref::steal(THPVariable_Wrap(tensor)); }

// The tensor of a Python object, or null if the object is no plain tensor: a subclass, or a tensor
// of a dispatch mode or a functorch transform.
inline const Tensor* plain_tensor(PyObject* object) {
  if (!object || !THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  return tensor.defined() && !tensor.key_set().has_any(c10::python_ks) &&
                 !tensor.key_set().has(c10::DispatchKey::FuncTorchGradWrapper) &&
                 !tensor.key_set().has(c10::DispatchKey::FuncTorchBatched)
             ? &tensor
             : nullptr;
}

inline at::ScalarType dtype_of(PyObject* dtype) {
  return reinterpret_cast<THPDtype*>(dtype)->scalar_type;
}

inline PyObject* python_dtype(at::ScalarType type) {
  return reinterpret_cast<PyObject*>(torch::getTHPDtype(type));
}

// A member of a Python class with __slots__, read and written without a lookup.
class Slot {
 public:
  void find(PyObject* type, const char* name) {
    const Ref member = Ref::steal(PyObject_GetAttrString(type, name));
    TORCH_CHECK(Py_IS_TYPE(member.get(), &PyMemberDescr_Type), name, " is not a slot");
    offset_ = reinterpret_cast<PyMemberDescrObject*>(member.get())->d_member->offset;
  }
  // Borrowed; null if the slot is empty.
  PyObject* get(PyObject* object) const { return *place(object); }
  void set(PyObject* object, Ref value) const {
    PyObject* const old = std::exchange(*place(object), value.release());
    Py_XDECREF(old);
  }

 private:
  PyObject** place(PyObject* object) const {
    return reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  }
  Py_ssize_t offset_ = 0;
};

// A new object of a class with __slots__, without a call of its __init__.
inline Ref allocate(PyObject* type) {
  auto* const kind = reinterpret_cast<PyTypeObject*>(type);
  return Ref::steal(kind->tp_alloc(kind, 0));
}

}  // namespace mesa
