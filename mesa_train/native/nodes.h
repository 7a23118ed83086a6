// The autograd nodes in C++: the backward of `ops/linear.py`, `norm.py`, `activation.py`,
// `attention.py` and others, with the same mathematics.
#pragma once

#include <torch/csrc/autograd/function.h>

#include "saved.h"

namespace mesa {

using torch::autograd::variable_list;

class StashNode : public torch::autograd::Node {
 public:
  // The operator's name in the policy, for the error of a second derivative.
  virtual const char* operator_name() const = 0;
  variable_list apply(variable_list&& grads) override;
  void release_variables() override;

  SavedStashes saved;

 protected:
  virtual variable_list gradients(Rebuilt& saved, const Tensor& grad) = 0;
  bool needs(int input) const { return task_should_compute_output(input); }
};

class LinearNode : public StashNode {  // inputs: x, weight, bias; stashes: x, weight
 public:
  std::string name() const override { return "LinearBackward"; }
  const char* operator_name() const override { return "linear"; }

 protected:
  variable_list gradients(Rebuilt& saved, const Tensor& grad) override;
};

// inputs: x, weight, bias, scale; stashes: x, weight, scale, bias
class ScaledLinearNode : public StashNode {
 public:
  std::string name() const override { return "ScaledLinearBackward"; }
  const char* operator_name() const override { return "linear"; }

  at::ScalarType dtype = at::kFloat;  // of the Linear

 protected:
  variable_list gradients(Rebuilt& saved, const Tensor& grad) override;
};

class MulNode : public StashNode {  // inputs: left, right; stashes: left, right
 public:
  std::string name() const override { return "MulBackward"; }
  const char* operator_name() const override { return "mul"; }

  c10::DimVector left_shape, right_shape;

 protected:
  variable_list gradients(Rebuilt& saved, const Tensor& grad) override;
};

class NormNode : public StashNode {  // inputs: x, weight, bias; stashes: x_hat, rstd, weight
 public:
  std::string name() const override { return centred ? "TokenNormBackward" : "RMSNormBackward"; }
  const char* operator_name() const override { return centred ? "layer_norm" : "rms_norm"; }

  bool centred = true;
  c10::DimVector shape;  // the normalized shape

 protected:
  variable_list gradients(Rebuilt& saved, const Tensor& grad) override;
};

class SmoothNode : public StashNode {  // inputs: x; stashes: x
 public:
  std::string name() const override { return "SmoothBackward"; }
  const char* operator_name() const override { return "activation"; }

  std::string kind;

 protected:
  variable_list gradients(Rebuilt& saved, const Tensor& grad) override;
};

// inputs: q, k, v; stashes: q, k, v, out, logsumexp, mask
class FlashCPUNode : public StashNode {
 public:
  std::string name() const override { return "FlashCPUBackward"; }
  const char* operator_name() const override { return "attention"; }

  bool causal = false;
  std::optional<double> scale;

 protected:
  variable_list gradients(Rebuilt& saved, const Tensor& grad) override;
};

class MatMulNode : public StashNode {  // inputs: left, right; stashes: left, right
 public:
  std::string name() const override { return "MatMulBackward"; }
  const char* operator_name() const override { return "matmul"; }

  c10::DimVector left_shape, right_shape;

 protected:
  variable_list gradients(Rebuilt& saved, const Tensor& grad) override;
};

class SoftmaxNode : public StashNode {  // inputs: x; stashes: the output
 public:
  std::string name() const override { return "SoftmaxBackward"; }
  const char* operator_name() const override { return "softmax"; }

  int64_t dim = 0;

 protected:
  variable_list gradients(Rebuilt& saved, const Tensor& grad) override;
};

// PyTorch 2.11 holds nodes by std::shared_ptr, later versions by c10::intrusive_ptr.
template <typename T>
auto make_node() {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<T>(new T(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

// Gives the nodes their Python types.
void register_types();

// Records `node` as the function that made `result`. Returns the output as a Python object.
template <typename NodePointer>
Ref recorded(const Tensor& result, const NodePointer& node,
             std::initializer_list<const Tensor*> inputs) {
  torch::autograd::edge_list edges;
  for (const Tensor* input : inputs) {
    edges.push_back(input && input->defined() ? torch::autograd::impl::gradient_edge(*input)
                                              : torch::autograd::Edge());
  }
  node->set_next_edges(std::move(edges));
  // A new tensor with the same memory and version. The result may be a view that was made without a
  // record, and PyTorch refuses to write to such a view in place.
  c10::TensorImpl* const made = result.unsafeGetTensorImpl();
  const Tensor output(made->shallow_copy_and_detach(made->version_counter(), true));
  const auto number = node->add_input_metadata(output);
  torch::autograd::impl::set_gradient_edge(output, {node, number});
  return wrapped(output);
}

}  // namespace mesa
