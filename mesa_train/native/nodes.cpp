// The gradients of the autograd nodes, and the cache between them (`nodes.h`, `backward_cache.h`).

#include "nodes.h"

#include <mutex>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/silu_backward.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>

#include "backward_cache.h"
#include "operators.h"

namespace mesa {
namespace {

// The leaf tensors that a node of the graph leads to.
std::vector<Tensor> leaves(torch::autograd::Node* node) {
  std::vector<Tensor> found;
  std::vector<torch::autograd::Node*> todo = {node}, seen = {node};
  while (!todo.empty()) {
    torch::autograd::Node* const next = todo.back();
    todo.pop_back();
    for (const auto& edge : next->next_edges()) {
      torch::autograd::Node* const following = edge.function.get();
      if (!following || std::find(seen.begin(), seen.end(), following) != seen.end()) continue;
      seen.push_back(following);
      todo.push_back(following);
      if (auto* const accumulate = dynamic_cast<torch::autograd::AccumulateGrad*>(following)) {
        found.push_back(accumulate->variable);
      }
    }
  }
  return found;
}

// The gradients with a node that raises an error if they are differentiated (`ops/base.py`). The
// node also depends on the leaves and on the incoming gradient. Otherwise a derivative with respect
// to one of these would skip the error.
variable_list blocked(StashNode& node, const Tensor& grad, const variable_list& results) {
  const std::string name = node.operator_name();
  variable_list tracked;
  for (const Tensor& result : results) {
    if (result.defined()) tracked.push_back(result.detach().requires_grad_());
  }
  const size_t count = tracked.size();
  for (const Tensor& leaf : leaves(&node)) tracked.push_back(leaf);
  if (grad.requires_grad()) tracked.push_back(grad);
  torch::autograd::DelayedError error(
      "mesa_train: a second derivative through '" + name +
          "' was asked for, but it keeps codes, which have none. Leave it to PyTorch with "
          "overrides={'" +
          name + "': {'enabled': False}}, or unwrap the model.",
      static_cast<int64_t>(tracked.size()));
  const variable_list errors = error.apply(std::move(tracked));
  variable_list all(results.size());
  size_t taken = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    if (results[i].defined()) all[i] = errors[taken++];
  }
  TORCH_INTERNAL_ASSERT(taken == count);
  return all;
}

// A gradient summed over the dims that broadcasting added.
Tensor summed_to(const Tensor& grad, at::IntArrayRef shape) {
  return grad.sizes() == shape ? grad : grad.sum_to_size(shape);
}

// The gradient of an activation's input.
Tensor derivative(const Tensor& grad, const Tensor& x, std::string_view kind) {
  if (kind == "silu") return at::silu_backward(grad, x);
  return at::gelu_backward(grad, x, kind == "gelu_tanh" ? "tanh" : "none");
}

// True if the pass that rebuilds an activation also sums its gradient over the rows
// (`activation._sums`).
bool sums(const Layout& layout, const Tensor& grad) {
  const auto last = static_cast<int64_t>(layout.shape.size()) - 1;
  return !grad.is_cpu() && grad.element_size() <= 4 && layout.order.back() == last &&
         layout.cols == layout.shape[last];
}

// The input of a Linear, and the gradient of the activation in front, in one pass. `dx` is the
// gradient of the Linear's input.
Tensor input_of_linear(Rebuilt& saved, const Tensor& dx, at::ScalarType dtype) {
  const Spec& spec = saved.spec(0);
  if (!dx.defined() || spec.kind != Kind::ACTIVATED || spec.activation == "hardswish") {
    return saved.get(0, dtype);
  }
  const Spec& input = saved.source(spec);
  if (input.kind != Kind::CODES || once(spec.dtype, dtype) != dtype) return saved.get(0, dtype);
  const Tensor flat = input.layout.rows(dx);
  const Tensor &codes = saved.own(input, 0), &scales = saved.own(input, 1);
  if (!sums(input.layout, flat)) {
    const auto [before, value] =
        activation_pair(flat, codes, scales, input.bits, spec.activation);
    backward_cache().offer_gradient(codes, dx, input.layout.restore(before));
    return input.layout.restore(value);
  }
  const auto [flat_before, value, total] =
      activation_pair_sum(flat, codes, scales, input.bits, spec.activation);
  const Tensor before = input.layout.restore(flat_before);
  backward_cache().offer_gradient(codes, dx, before);
  backward_cache().offer_sum(before, total);
  return input.layout.restore(value);
}

// (dx, dweight, dbias) of a norm over rows (`norm.token_norm_gradients`).
Triple norm_gradients(const Tensor& grad, const Tensor& x_hat, const Tensor& rstd,
                      const std::optional<Tensor>& weight, bool centred) {
  Tensor g = cast(grad, x_hat.scalar_type());
  const Tensor dweight = at::mul(g, x_hat).sum(0), dbias = g.sum(0);
  if (weight) g = at::mul(g, *weight);
  Tensor inner = at::sub(g, at::mul(x_hat, at::mul(g, x_hat).mean(1, /*keepdim=*/true)));
  if (centred) inner = at::sub(inner, g.mean(1, /*keepdim=*/true));
  return {at::mul(inner, rstd.unsqueeze(1)), dweight, dbias};
}

}  // namespace

variable_list StashNode::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Tensor& grad = grads[0];
  if (!grad.defined()) return variable_list(num_outputs());
  const bool differentiated = at::GradMode::is_enabled();
  variable_list results;
  {
    const at::NoGradGuard guard;
    const at::AutoDispatchBelowADInplaceOrView below;
    Rebuilt rebuilt(saved);
    results = gradients(rebuilt, grad);
  }
  return differentiated ? blocked(*this, grad, results) : results;
}

void StashNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  saved.release();
}

variable_list LinearNode::gradients(Rebuilt& saved, const Tensor& grad) {
  variable_list results(3);
  const at::ScalarType dtype = grad.scalar_type();
  // Flattened first. Otherwise a matmul with a permuted gradient would run batch by batch, and
  // copy the weight for each batch.
  const Tensor flat = flat_rows(grad);
  if (needs(0)) {
    const Tensor weight = saved.get(1, dtype);
    c10::DimVector shape(grad.sizes().begin(), grad.sizes().end());
    shape.back() = weight.size(1);
    results[0] = at::mm(flat, weight).view(shape);
  }
  if (needs(1)) {
    const Tensor x = input_of_linear(saved, results[0], dtype);
    results[1] = at::mm(flat.t(), flat_rows(x));
  }
  if (needs(2)) {
    const Tensor known = backward_cache().take_sum(grad);
    results[2] = known.defined() ? known : flat.sum(0);
  }
  return results;
}

variable_list ScaledLinearNode::gradients(Rebuilt& saved, const Tensor& grad) {
  variable_list results(4);
  const Tensor weight = saved.get(1), scale = saved.get(2), rows = flat_rows(grad);
  Tensor scaled, narrow, total;
  if (rows.scalar_type() == at::kDouble || rows.scalar_type() == dtype) {
    scaled = cast(at::mul(rows, scale), dtype);
    narrow = cast(rows, dtype);
    total = rows.sum(0);
  } else {
    std::tie(scaled, narrow, total) = scale_backward(rows, scale, dtype);
    total = cast(total, rows.scalar_type());
  }
  if (needs(0)) {
    c10::DimVector shape(grad.sizes().begin(), grad.sizes().end());
    shape.back() = weight.size(1);
    results[0] = at::mm(scaled, cast(weight, scaled.scalar_type())).view(shape);
  }
  if (needs(1) || needs(3)) {
    const Tensor x = input_of_linear(saved, results[0], dtype);
    const Tensor unscaled = cast(at::mm(narrow.t(), flat_rows(x)), weight.scalar_type());
    if (needs(1)) results[1] = at::mul(unscaled, scale.unsqueeze(1));
    if (needs(3)) {
      results[3] = at::mul(weight, unscaled).sum(1);
      if (saved.has(3)) results[3] = at::add(results[3], at::mul(saved.get(3), total));
    }
  }
  if (needs(2)) results[2] = at::mul(scale, total);
  return results;
}

variable_list MulNode::gradients(Rebuilt& saved, const Tensor& grad) {
  variable_list results(2);
  if (needs(0)) results[0] = summed_to(at::mul(grad, saved.get(1)), left_shape);
  if (needs(1)) results[1] = summed_to(at::mul(grad, saved.get(0)), right_shape);
  return results;
}

variable_list NormNode::gradients(Rebuilt& saved, const Tensor& grad) {
  const Tensor rstd = saved.get(1);
  std::optional<Tensor> weight;
  if (saved.has(2)) weight = flat_vector(saved.get(2));
  const Spec& spec = saved.spec(0);
  const int64_t cols = c10::multiply_integers(shape);
  const Tensor flat = grad.dim() == 2 && grad.size(1) == cols ? grad : reshaped(grad, {-1, cols});
  Tensor dx, dweight, dbias;
  if (spec.kind == Kind::CODES) {
    std::tie(dx, dweight, dbias) = norm_backward(flat, saved.own(spec, 0), saved.own(spec, 1), rstd,
                                                 weight, spec.bits, centred, spec.dither);
  } else {
    const Tensor x_hat = saved.get(0, c10::promoteTypes(rstd.scalar_type(), at::kFloat));
    std::tie(dx, dweight, dbias) =
        norm_gradients(flat, reshaped(x_hat, flat.sizes()), rstd, weight, centred);
  }
  variable_list results(3);
  if (needs(0)) results[0] = grad.dim() == 2 ? dx : dx.view_as(grad);
  if (needs(1)) results[1] = shape.size() == 1 ? dweight : dweight.view(shape);
  if (needs(2)) results[2] = shape.size() == 1 ? dbias : dbias.view(shape);
  return results;
}

variable_list SmoothNode::gradients(Rebuilt& saved, const Tensor& grad) {
  const Spec& spec = saved.spec(0);
  if (spec.kind != Kind::CODES) {
    return {derivative(grad, saved.get(0, grad.scalar_type()), kind)};
  }
  if (spec.dither) {
    const Tensor dx = derivative(cast(grad, at::kFloat), saved.get(0, at::kFloat), kind);
    return {cast(dx, grad.scalar_type())};
  }
  const Tensor& codes = saved.own(spec, 0);
  if (const Tensor known = backward_cache().take_gradient(codes, grad); known.defined()) {
    return {known};
  }
  return {spec.layout.restore(activation_backward(spec.layout.rows(grad), codes,
                                                  saved.own(spec, 1), spec.bits, kind))};
}

variable_list FlashCPUNode::gradients(Rebuilt& saved, const Tensor& grad) {
  const at::ScalarType dtype = grad.scalar_type();
  std::optional<Tensor> mask;
  if (saved.has(5)) mask = saved.get(5);
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      grad, saved.get(0, dtype), saved.get(1, dtype), saved.get(2, dtype), saved.get(3, dtype),
      saved.get(4), 0.0, causal, mask, scale);
  return {dq, dk, dv};
}

variable_list MatMulNode::gradients(Rebuilt& saved, const Tensor& grad) {
  variable_list results(2);
  const at::ScalarType dtype = grad.scalar_type();
  if (right_shape.size() == 2) {
    // One matmul over all leading dims (see `ops/matmul.py`).
    const Tensor flat = flat_rows(grad);
    if (needs(0)) results[0] = at::matmul(flat, saved.get(1, dtype).mT()).view(left_shape);
    if (needs(1)) results[1] = at::matmul(flat_rows(saved.get(0, dtype)).t(), flat);
    return results;
  }
  if (needs(0)) results[0] = summed_to(at::matmul(grad, saved.get(1, dtype).mT()), left_shape);
  if (needs(1)) results[1] = summed_to(at::matmul(saved.get(0, dtype).mT(), grad), right_shape);
  return results;
}

variable_list SoftmaxNode::gradients(Rebuilt& saved, const Tensor& grad) {
  const Spec& spec = saved.spec(0);
  const int64_t positive = dim < 0 ? dim + grad.dim() : dim;
  if (spec.kind == Kind::CODES && grad.scalar_type() != at::kDouble &&
      spec.layout.cols == grad.size(dim) && spec.layout.order.back() == positive) {
    return {spec.layout.restore(softmax_backward(spec.layout.rows(grad), saved.own(spec, 0),
                                                 saved.own(spec, 1), spec.bits, spec.dither))};
  }
  const Tensor output = saved.get(0, grad.scalar_type());
  const Tensor weighted = at::mul(grad, output);
  return {at::sub(weighted, at::mul(output, weighted.sum(dim, /*keepdim=*/true)))};
}

// --- the cache ---

BackwardCache& backward_cache() {
  static thread_local BackwardCache cache;
  return cache;
}

namespace {

// The start of a tensor's memory.
const void* address(const Tensor& tensor) {
  return static_cast<const char*>(static_cast<const void*>(
             tensor.storage().unsafeGetStorageImpl())) +
         tensor.storage_offset();
}

bool same_place(const Tensor& a, const Tensor& b) {
  return a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl() &&
         a.storage_offset() == b.storage_offset() && a.sizes() == b.sizes() &&
         a.strides() == b.strides() && a.scalar_type() == b.scalar_type();
}

}  // namespace

Tensor BackwardCache::take_gradient(const Tensor& codes, const Tensor& grad) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (gradients_.empty() || !grad.has_storage()) return {};
  const auto found = gradients_.find(address(codes));
  if (found == gradients_.end()) return {};
  const Gradient gradient = std::move(found->second);
  gradients_.erase(found);
  // Hooks, or another user of the activation, would have made another tensor or another version.
  const bool same = same_place(gradient.grad, grad) && same_place(gradient.codes, codes) &&
                    gradient.version == gradient.grad._version() &&
                    gradient.version == grad._version();
  return same ? gradient.value : Tensor();
}

void BackwardCache::offer_gradient(const Tensor& codes, const Tensor& grad, const Tensor& value) {
  // A tensor of vmap has no storage.
  if (!grad.has_storage()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  enter();
  gradients_.insert_or_assign(address(codes),
                              Gradient{codes, grad, value, (uint32_t)grad._version()});
}

Tensor BackwardCache::take_decoded(const Tensor& codes, at::ScalarType dtype, bool last) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = decoded_.find(codes.unsafeGetTensorImpl());
  if (found == decoded_.end() || run_ != torch::autograd::get_current_graph_task_id()) return {};
  // The codes live, because the caller holds them. An entry of a dead tensor has another control
  // block at the same address.
  const bool same = !found->second.codes.expired() && found->second.value.scalar_type() == dtype;
  const Tensor value = same ? found->second.value : Tensor();
  if (last || !same) decoded_.erase(found);
  return value;
}

void BackwardCache::offer_decoded(const Tensor& codes, const Tensor& value) {
  const std::lock_guard<std::mutex> lock(mutex_);
  enter();
  decoded_.insert_or_assign(
      codes.unsafeGetTensorImpl(),
      Decoded{c10::weak_intrusive_ptr<c10::TensorImpl>(codes.getIntrusivePtr()), value});
}

void BackwardCache::drop_decoded(const Tensor& codes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!decoded_.empty()) decoded_.erase(codes.unsafeGetTensorImpl());
}

Tensor BackwardCache::take_sum(const Tensor& grad) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (sums_.empty()) return {};
  const auto found = sums_.find(grad.unsafeGetTensorImpl());
  if (found == sums_.end()) return {};
  const Sum sum = std::move(found->second);
  sums_.erase(found);
  return !sum.grad.expired() && sum.version == grad._version() ? sum.total : Tensor();
}

void BackwardCache::offer_sum(const Tensor& grad, const Tensor& total) {
  const std::lock_guard<std::mutex> lock(mutex_);
  enter();
  sums_.insert_or_assign(grad.unsafeGetTensorImpl(),
                         Sum{c10::weak_intrusive_ptr<c10::TensorImpl>(grad.getIntrusivePtr()),
                             (uint32_t)grad._version(), total});
}

void BackwardCache::enter() {
  // A run that ended in an error has not called its callback.
  const int run = torch::autograd::get_current_graph_task_id();
  if (run == run_) return;
  clear();
  run_ = run;
  torch::autograd::Engine::get_default_engine().queue_callback([this] {
    const std::lock_guard<std::mutex> lock(mutex_);
    clear();
  });
}

void BackwardCache::clear() {
  gradients_.clear();
  decoded_.clear();
  sums_.clear();
}

}  // namespace mesa
