// The recorder's work in C++: rules, lineage, report and new stashes (see `stash/recorder.py`).
#pragma once

#include <array>
#include <initializer_list>
#include <optional>

#include "classes.h"

namespace mesa {

enum Operand : int {
  LINEAR_INPUT,
  LAYER_NORM,
  RMS_NORM,
  ACTIVATION,
  Q,
  K,
  V,
  OUT,
  SOFTMAX,
  LEFT,
  RIGHT,
  MUL_LEFT,
  MUL_RIGHT,
  OPERANDS
};

// How one operand is saved: `policy.Rule` with its names.
struct Rule {
  bool on = false;  // the operator has a row here
  bool enabled = false, affine = false, fused = false, rebuild_linear = false, lossless = false;
  bool values = false;  // the lossless codec, without offload
  int limit = 0;
  int64_t bits = 0, group_size = 0, seed = 0, min_bytes = 0;
  bool stochastic = false;
  PyObject* codec = nullptr;  // the object that holds this Rule holds the codec too
  PyObject *operator_name = nullptr, *operand_name = nullptr;
  Ref coded, small;  // how the report calls codes, and a tensor that is too small for codes
};

struct Rules {
  std::array<Rule, OPERANDS> of;
  bool rebuilds_matmuls = false;
  // No override names a function, and the fallback is enabled.
  bool plain_fallback = false;
};

// Without an operator if there is nothing to do.
inline Tensor cast(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}
// A reshape is two operators, a view is one.
inline Tensor reshaped(const Tensor& tensor, at::IntArrayRef shape) {
  return tensor.is_contiguous() ? tensor.view(shape) : tensor.reshape(shape);
}
inline Tensor flat_vector(const Tensor& tensor) {
  return tensor.dim() == 1 ? tensor : reshaped(tensor, {-1});
}
inline Tensor flat_rows(const Tensor& tensor) {
  return tensor.dim() == 2 ? tensor : reshaped(tensor, {-1, tensor.size(-1)});
}

// A tensor as a (rows, cols) matrix: `MatrixLayout`.
struct Layout {
  c10::DimVector shape, order;
  int64_t cols = 0;
  bool contiguous = true;

  // The layout of a tensor, and the tensor as a matrix. `within`: dims that one group may span.
  static std::pair<Layout, Tensor> of(const Tensor& x, uint64_t within);
  Tensor restore(const Tensor& matrix) const;
  // A gradient of the tensor as a matrix in the tensor's own memory order.
  Tensor rows(const Tensor& grad) const;
  Ref object() const;
};

// A call of a row: the recorder, and what its context says.
class Call {
 public:
  explicit Call(PyObject* recorder);

  PyObject* recorder() const { return recorder_; }
  const Rules& rules() const { return *rules_; }
  const Rule& rule(Operand operand) const { return rules_->of[operand]; }

  // True if the operator's row applies (see `Recorder.covers`), and all tensors are plain.
  bool covers(Operand operand, std::initializer_list<const Tensor*> tensors) const;

  // The stash of a live tensor, or null. Borrowed.
  PyObject* known(PyObject* object, const Tensor& tensor);
  // The same, if the rule lets the operand be rebuilt from it.
  PyObject* usable(PyObject* object, const Tensor& tensor, const Rule& rule);
  void remember(PyObject* object, const Tensor& tensor, PyObject* stash);
  // The operands of the Linear that made a tensor, or null. Borrowed.
  PyObject* linear_of(PyObject* object, const Tensor& tensor);
  // Records the operands of a Linear for a layer scale behind it.
  void remember_linear(PyObject* output, const Tensor& tensor, PyObject* operands);

  // `Recorder.keep`. `within`: as a bit mask of dims.
  Ref keep(PyObject* object, const Tensor& tensor, Operand operand, uint64_t within);
  // True if `keep` would make codes or a lossless leaf, if the tensor has no stash yet.
  static bool codes(const Rule& rule, const Tensor& tensor);
  // A leaf of codes that exist already, reported. The lossless codec has no scales.
  Ref leaf(const Rule& rule, const Tensor& codes, const Tensor& scales, const Layout& layout,
           at::ScalarType dtype);
  void report(const Rule& rule, PyObject* how, int64_t size, PyObject* stash);

 private:
  PyObject* entries(Ref& cache, PyObject* name);

  PyObject* recorder_;
  Ref context_, lineage_, linears_;
  const Rules* rules_;
};

Ref new_stash(PyObject* recipe, Ref tensors, Ref sources, Cost cost, at::ScalarType dtype);
Ref uncompressed(const Tensor& tensor, PyObject* object = nullptr);
int cost_of(PyObject* stash);
// True if a tensor's memory belongs to a parameter.
bool of_parameter(const Tensor& tensor);
// True if an object is a parameter itself, not a tensor that the model computed.
inline bool is_parameter(PyObject* tensor) { return !Py_IS_TYPE(tensor, (PyTypeObject*)THPVariableClass); }
// A view of a part of its storage (`stash/tensors.py`).
bool narrowed(const Tensor& tensor);
// True if autocast is active for the tensor's device.
bool autocasts(const Tensor& tensor);
// An alias of a parameter's present data (`stash/tensors.py`).
Ref held(PyObject* parameter);

}  // namespace mesa
