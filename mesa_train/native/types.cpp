// The Python types of the nodes, as PyTorch's own nodes have them: `type(tensor.grad_fn)`.
//
// Besides the attributes of every node they have `saved_tensors`, like the nodes of a
// torch.autograd.Function.

#include <pybind11/gil.h>
#include <torch/csrc/autograd/python_cpp_function.h>

#include "nodes.h"

namespace mesa {
namespace {

using namespace torch::autograd;  // for the macro of the default properties

PyObject* saved_tensors(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  auto* const object = reinterpret_cast<torch::autograd::THPCppFunction*>(self);
  const variable_list tensors = static_cast<StashNode*>(object->cdata.get())->saved.tensors();
  Ref tuple = Ref::steal(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(i), wrapped(tensors[i]).release());
  }
  return tuple.release();
  END_HANDLE_TH_ERRORS
}

template <typename Node>
void register_type(const char* name) {
  static PyGetSetDef properties[] = {THP_FUNCTION_DEFAULT_PROPERTIES,
                                     {"saved_tensors", saved_tensors, nullptr, nullptr, nullptr},
                                     {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyTypeObject type;
  torch::autograd::_initFunctionPyTypeObject(type, name, properties, nullptr);
  torch::autograd::registerCppFunction(typeid(Node), &type);
}

}  // namespace

void register_types() {
  register_type<LinearNode>("LinearBackward");
  register_type<ScaledLinearNode>("ScaledLinearBackward");
  register_type<MulNode>("MulBackward");
  register_type<NormNode>("TokenNormBackward");
  register_type<SmoothNode>("SmoothBackward");
  register_type<FlashCPUNode>("FlashCPUBackward");
  register_type<MatMulNode>("MatMulBackward");
  register_type<SoftmaxNode>("SoftmaxBackward");
}

}  // namespace mesa
