// How tensors are rebuilt from saved stashes (`saved.h`).

#include "saved.h"

#include <ATen/ops/add.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sub.h>
#include <c10/util/irange.h>
#include <pybind11/gil.h>
#include <torch/csrc/PyInterpreter.h>

#include "backward_cache.h"
#include "operators.h"

namespace mesa {
namespace {

bool decoded(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

}  // namespace

at::ScalarType once(at::ScalarType own, at::ScalarType dtype) {
  return c10::elementSize(own) >= 4 && c10::elementSize(dtype) <= c10::elementSize(own) ? dtype
                                                                                         : own;
}

Tensor activation(const Tensor& x, std::string_view kind) {
  if (kind == "silu") return at::silu(x);
  return at::gelu(x, kind == "gelu_tanh" ? "tanh" : "none");
}

Rebuilt::Rebuilt(const SavedStashes& saved) : saved_(saved), tensors_(saved.tensors()) {}

Rebuilt::~Rebuilt() {
  // The last node that holds codes may have read the codes themselves.
  for (const Tensor& tensor : tensors_) {
    if (tensor.use_count() <= 2) backward_cache().drop_decoded(tensor);
  }
}

Tensor Rebuilt::of_source(const Spec& spec, int i) {
  const int index = spec.sources[i];
  return value(index, saved_.specs_[index].dtype);
}

Tensor Rebuilt::get(int index, at::ScalarType dtype) {
  const int root = saved_.roots_[index];
  if (!saved_.specs_[root].uses) return value(root, dtype);
  if (const Tensor* const known = find(root, dtype)) return *known;
  known_.push_back({root, dtype, value(root, dtype)});
  return known_.back().value;
}

const Tensor* Rebuilt::find(int index, at::ScalarType dtype) const {
  for (const Known& known : known_) {
    if (known.index == index && known.dtype == dtype) return &known.value;
  }
  return nullptr;
}

Tensor Rebuilt::value(int index, at::ScalarType dtype) {
  const Spec& spec = saved_.specs_[index];
  // Each reader of a stash that costs a matmul is counted, so this node holds no further reference.
  if (spec.uses) return shared(spec, dtype);
  if (const Tensor* const known = find(index, dtype)) return *known;
  Tensor value = load(spec, dtype);
  known_.push_back({index, dtype, value});
  return value;
}

Tensor Rebuilt::load(const Spec& spec, at::ScalarType dtype) {
  switch (spec.kind) {
    case Kind::WHOLE:
      return cast(own(spec, 0), dtype);
    case Kind::CODES: {
      const Tensor& codes = own(spec, 0);
      // This node holds the codes twice: in its saved variable and unpacked. Any further owner is
      // another node that reads them in this backward.
      const bool last = codes.use_count() <= 2;
      if (const Tensor known = backward_cache().take_decoded(codes, dtype, last); known.defined()) {
        return known;
      }
      const Tensor value = spec.layout.restore(
          affine_decode(codes, own(spec, 1), spec.bits, spec.layout.cols, dtype, {}, {},
                        spec.dither));
      if (!last) backward_cache().offer_decoded(codes, value);
      return value;
    }
    case Kind::VALUES:
      return spec.layout.restore(cast(own(spec, 0), dtype));
    case Kind::SCALED: {
      const Spec& leaf = source(spec);
      const auto parameter = [&](bool exists, size_t i) -> std::optional<Tensor> {
        if (!exists) return std::nullopt;
        return flat_vector(own(spec, static_cast<int>(i)));
      };
      const auto weight = parameter(spec.has_weight, 0);
      const auto bias = parameter(spec.has_bias, spec.slots.size() - 1);
      const at::ScalarType rounded = once(spec.dtype, dtype);
      if (!spec.per_channel.empty()) {
        Tensor x = value(spec.sources[0], c10::promoteTypes(rounded, at::kFloat));
        if (weight) x = at::mul(x, weight->view(spec.per_channel));
        if (bias) x = at::add(x, bias->view(spec.per_channel));
        return cast(cast(x, rounded), dtype);
      }
      Tensor matrix;
      if (leaf.kind == Kind::CODES) {
        matrix = affine_decode(own(leaf, 0), own(leaf, 1), leaf.bits, leaf.layout.cols, rounded,
                               weight, bias, leaf.dither);
      } else {
        matrix = own(leaf, 0);
        if (weight) matrix = at::mul(matrix, *weight);
        if (bias) matrix = at::add(matrix, *bias);
        matrix = cast(matrix, rounded);
      }
      return cast(leaf.layout.restore(matrix), dtype);
    }
    case Kind::NORMALIZED: {
      const Tensor x = value(spec.sources[0], source(spec).dtype);
      const Tensor& rstd = own(spec, 0);
      Tensor rows = x.flatten(x.dim() - spec.dims)
                        .to(c10::promoteTypes(dtype, rstd.scalar_type()));
      if (spec.centred) rows = at::sub(rows, rows.mean(-1, /*keepdim=*/true));
      c10::DimVector shape(rows.sizes().begin(), rows.sizes().end());
      shape.back() = 1;
      return at::mul(rows, rstd.view(shape)).view(x.sizes()).to(dtype);
    }
    case Kind::PRODUCT: {
      std::optional<Tensor> bias;
      if (spec.slots.size() > 1) bias = cast(own(spec, 1), spec.dtype);
      const Tensor product =
          at::linear(value(spec.sources[0], spec.dtype), cast(own(spec, 0), spec.dtype), bias);
      return cast(product, dtype);
    }
    case Kind::ACTIVATED: {
      const Spec& input = source(spec);
      if (input.kind != Kind::CODES) {
        return cast(activation(value(spec.sources[0], spec.dtype), spec.activation), dtype);
      }
      const Tensor matrix = activation_decode(own(input, 0), own(input, 1), input.bits,
                                              input.layout.cols, once(spec.dtype, dtype),
                                              spec.activation);
      return cast(input.layout.restore(matrix), dtype);
    }
    case Kind::VIEW:
      return view(spec, dtype);
    case Kind::CAST: {
      const Spec& from = source(spec);
      if (c10::elementSize(spec.dtype) >= 4 &&
          c10::elementSize(spec.dtype) > c10::elementSize(from.dtype)) {
        return value(spec.sources[0], dtype);  // A cast to a wider dtype changes no value.
      }
      return value(spec.sources[0], decoded(spec.dtype) ? spec.dtype : from.dtype)
          .to(spec.dtype)
          .to(dtype);
    }
    case Kind::MULTIPLIED:
      return cast(at::mul(of_source(spec, 0), of_source(spec, 1)), dtype);
    case Kind::SUM:
      return cast(at::add(of_source(spec, 0), of_source(spec, 1)), dtype);
  }
  TORCH_INTERNAL_ASSERT(false);
}

Tensor Rebuilt::shared(const Spec& spec, at::ScalarType dtype) {
  PyObject* const uses = spec.uses->ptr(getPyInterpreter());
  PyObject* const type = python_dtype(dtype);
  PyObject* const cache = classes.backward_cache.get();
  bool cached = true;
  {
    const pybind11::gil_scoped_acquire gil;
    if (integer(attribute(uses, names.count).get()) > 1) {
      const Ref known =
          Ref::steal(PyObject_CallMethodObjArgs(cache, names.take, uses, type, nullptr));
      if (known.get() != Py_None) return THPVariable_Unpack(known.get());
    } else {
      cached = false;
    }
  }
  const Tensor value = load(spec, dtype);
  if (cached) {
    const pybind11::gil_scoped_acquire gil;
    const Ref object = wrapped(value);
    Ref::steal(
        PyObject_CallMethodObjArgs(cache, names.offer, uses, type, object.get(), nullptr));
  }
  return value;
}

Tensor Rebuilt::view(const Spec& spec, at::ScalarType dtype) {
  const Geometry& geometry = spec.geometry;
  const Tensor from = value(spec.sources[0], dtype);
  if (geometry.strided && from.sizes() == geometry.source_sizes &&
      from.strides() == geometry.source_strides) {
    return from.as_strided(geometry.sizes, geometry.strides,
                           from.storage_offset() + geometry.offset);
  }
  if (geometry.reshaped) {
    const Tensor copy = reshaped(from, geometry.sizes);
    // A later view may rely on the memory order of the forward's copy.
    return geometry.contiguous ? copy.contiguous() : copy;
  }
  // Any other function: as `recipes.Replay` does.
  const pybind11::gil_scoped_acquire gil;
  PyObject* const recipe = spec.recipe->ptr(getPyInterpreter());
  const auto& slots = classes.replay_slots;
  PyObject* const args = slots.args.get(recipe);
  const Py_ssize_t count = PyTuple_GET_SIZE(args);
  const Ref all = Ref::steal(PyTuple_New(count + 1));
  PyTuple_SET_ITEM(all.get(), 0, wrapped(from).release());
  for (const auto i : c10::irange(count)) {
    PyTuple_SET_ITEM(all.get(), i + 1, Py_NewRef(PyTuple_GET_ITEM(args, i)));
  }
  Ref result = Ref::steal(
      PyObject_Call(slots.function.get(recipe), all.get(), slots.kwargs.get(recipe)));
  if (PyObject* const index = slots.index.get(recipe); index && index != Py_None) {
    result = Ref::steal(PyObject_GetItem(result.get(), index));
  }
  return THPVariable_Unpack(result.get());
}

}  // namespace mesa
