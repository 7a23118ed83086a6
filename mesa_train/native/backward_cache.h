// Results that one node computes for the next node of the same backward (see
// `stash/backward_cache.py`): an activation's gradient, the sum of this gradient for a bias, and a
// decoded leaf that two nodes read (attention's output).
//
// An entry is valid within one run of the autograd engine. The engine's final callback removes the
// entries that no node has taken.
#pragma once

#include <mutex>
#include <unordered_map>

#include <ATen/core/Tensor.h>

namespace mesa {

using at::Tensor;

class BackwardCache {
 public:
  // The cached gradient of a coded tensor, or an undefined tensor if it was not computed for this
  // same `grad`.
  Tensor take_gradient(const Tensor& codes, const Tensor& grad);
  void offer_gradient(const Tensor& codes, const Tensor& grad, const Tensor& value);
  // A decoded leaf of codes, or an undefined tensor. `last`: no other node reads the codes.
  Tensor take_decoded(const Tensor& codes, at::ScalarType dtype, bool last);
  void offer_decoded(const Tensor& codes, const Tensor& value);
  // Removes the decoded leaf of codes that no other node reads.
  void drop_decoded(const Tensor& codes);
  // The cached sum of this same `grad` over all dims but the last, or an undefined tensor.
  Tensor take_sum(const Tensor& grad);
  void offer_sum(const Tensor& grad, const Tensor& total);

 private:
  void enter();
  void clear();

  // A device's thread runs the nodes, and the thread that called backward runs the final callback.
  std::mutex mutex_;

  struct Gradient {
    Tensor codes, grad, value;
    uint32_t version;
  };
  struct Decoded {
    c10::weak_intrusive_ptr<c10::TensorImpl> codes;
    Tensor value;
  };
  struct Sum {
    c10::weak_intrusive_ptr<c10::TensorImpl> grad;
    uint32_t version;
    Tensor total;
  };
  std::unordered_map<const void*, Gradient> gradients_;
  std::unordered_map<const void*, Decoded> decoded_;
  std::unordered_map<const void*, Sum> sums_;
  int run_ = -1;
};

// The cache of this thread.
BackwardCache& backward_cache();

}  // namespace mesa
