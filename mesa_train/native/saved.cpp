// The structure of saved stashes, and how tensors are rebuilt from it (`saved.h`).

#include "saved.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/silu.h>
#include <c10/util/irange.h>
#include <pybind11/gil.h>
#include <torch/csrc/PyInterpreter.h>

#include "backward_cache.h"
#include "operators.h"

namespace mesa {
namespace {

// The activations that a node computes from an uncompressed input.
bool computes(std::string_view kind) {
  return kind == "gelu" || kind == "gelu_tanh" || kind == "silu";
}

c10::DimVector integers(PyObject* tuple) {
  c10::DimVector values(PyTuple_GET_SIZE(tuple));
  for (const auto i : c10::irange(values.size())) {
    values[i] = integer(PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(i)));
  }
  return values;
}

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

Ref Geometry::pack(const Tensor& source, const Tensor& view, bool reshapes) {
  const bool strided = view.is_alias_of(source) && view.scalar_type() == source.scalar_type();
  if (!strided && !reshapes) return Ref::borrow(Py_None);
  std::vector<int64_t> numbers = {
      strided,    reshapes,   view.is_contiguous(),
      source.dim(), view.dim(), strided ? view.storage_offset() - source.storage_offset() : 0};
  for (const auto& list : {source.sizes(), source.strides(), view.sizes(), view.strides()}) {
    numbers.insert(numbers.end(), list.begin(), list.end());
  }
  return Ref::steal(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(numbers.data()),
                                              static_cast<Py_ssize_t>(numbers.size() * 8)));
}

Geometry Geometry::unpack(PyObject* bytes) {
  const auto* number = reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(bytes));
  Geometry geometry;
  geometry.strided = number[0];
  geometry.reshaped = number[1];
  geometry.contiguous = number[2];
  const int64_t inner = number[3], outer = number[4];
  geometry.offset = number[5];
  number += 6;
  geometry.source_sizes.assign(number, number + inner);
  geometry.source_strides.assign(number + inner, number + 2 * inner);
  number += 2 * inner;
  geometry.sizes.assign(number, number + outer);
  geometry.strides.assign(number + outer, number + 2 * outer);
  return geometry;
}

// The tensors and structures that one call of `save` has met so far.
struct SavedStashes::Making {
  std::vector<Tensor> tensors;
  c10::SmallVector<std::pair<const void*, int>, 8> slots;   // by tensor
  c10::SmallVector<std::pair<PyObject*, int>, 8> structures;  // by stash
};

bool SavedStashes::save(std::initializer_list<Item> items) {
  Making making;
  specs_.reserve(items.size() + 2);
  for (const Item& item : items) {
    if (item.tensor.defined()) {
      Spec spec;
      spec.dtype = item.tensor.scalar_type();
      spec.slots.push_back(slot(item.tensor, making));
      roots_.push_back(static_cast<int>(specs_.size()));
      specs_.push_back(std::move(spec));
      continue;
    }
    const int root = item.stash ? strip(item.stash, making) : -1;
    if (root == -2) return false;
    roots_.push_back(root);
  }
  tensors_.reserve(making.tensors.size());
  for (const Tensor& tensor : making.tensors) tensors_.emplace_back(tensor, false);
  return true;
}

std::vector<Tensor> SavedStashes::tensors() const {
  std::vector<Tensor> tensors;
  tensors.reserve(tensors_.size());
  for (const auto& tensor : tensors_) tensors.push_back(tensor.unpack());
  return tensors;
}

void SavedStashes::release() {
  for (auto& tensor : tensors_) tensor.reset_data();
}

// The index of a saved tensor. Each tensor is saved once.
int SavedStashes::slot(const Tensor& tensor, Making& making) {
  for (const auto& [known, index] : making.slots) {
    if (known == tensor.unsafeGetTensorImpl()) return index;
  }
  const int index = static_cast<int>(making.tensors.size());
  making.tensors.push_back(tensor);
  making.slots.emplace_back(tensor.unsafeGetTensorImpl(), index);
  return index;
}

// The index of a stash's structure, or -2 if a recipe has no native form.
int SavedStashes::strip(PyObject* stash, Making& making) {
  for (const auto& [known, index] : making.structures) {
    if (known == stash) return index;
  }
  const Classes& c = classes;
  const auto& slots = c.stash_slots;
  PyObject* const recipe = slots.recipe.get(stash);
  PyObject* const sources = slots.sources.get(stash);
  if (slots.offloaded.get(stash) != Py_None) return -2;
  Spec spec;
  spec.dtype = dtype_of(slots.dtype.get(stash));
  for (const auto i : c10::irange(PyTuple_GET_SIZE(sources))) {
    spec.sources.push_back(strip(PyTuple_GET_ITEM(sources, i), making));
    if (spec.sources.back() < 0) return -2;
  }
  const auto* const kind = Py_TYPE(recipe);
  const auto is = [kind](const Ref& type) { return (PyObject*)kind == type.get(); };
  if (recipe == c.whole.get()) {
    spec.kind = Kind::WHOLE;
  } else if (is(c.leaf)) {
    PyObject* const codec = c.leaf_slots.codec.get(recipe);
    PyObject* const layout = c.leaf_slots.layout.get(recipe);
    if (Py_IS_TYPE(codec, (PyTypeObject*)c.affine.get())) {
      spec.kind = Kind::CODES;
      spec.bits = integer(attribute(codec, names.bits).get());
      if (truth(attribute(codec, names.dither).get())) {
        spec.dither = integer(attribute(codec, names.seed).get());
      }
    } else if (Py_IS_TYPE(codec, (PyTypeObject*)c.lossless.get())) {
      spec.kind = Kind::VALUES;
    } else {
      return -2;
    }
    spec.layout.shape = integers(c.layout_slots.shape.get(layout));
    spec.layout.order = integers(c.layout_slots.order.get(layout));
    spec.layout.cols = integer(c.layout_slots.cols.get(layout));
    if (spec.layout.shape.empty()) return -2;
    for (const auto i : c10::irange(spec.layout.order.size())) {
      spec.layout.contiguous = spec.layout.contiguous && spec.layout.order[i] == (int64_t)i;
    }
  } else if (is(c.scaled)) {
    spec.kind = Kind::SCALED;
    PyObject* const per_channel = c.scaled_slots.per_channel.get(recipe);
    if (per_channel != Py_None) {
      spec.per_channel = integers(per_channel);
    } else if (const Kind kind = specs_[spec.sources[0]].kind;
               kind != Kind::CODES && kind != Kind::VALUES) {
      return -2;
    }
    spec.has_weight = truth(c.scaled_slots.has_weight.get(recipe));
    spec.has_bias = truth(c.scaled_slots.has_bias.get(recipe));
  } else if (is(c.normalized)) {
    spec.kind = Kind::NORMALIZED;
    spec.dims = integer(c.normalized_slots.dims.get(recipe));
    spec.centred = truth(c.normalized_slots.centred.get(recipe));
  } else if (recipe == c.product.get()) {
    spec.kind = Kind::PRODUCT;
  } else if (is(c.activated)) {
    spec.kind = Kind::ACTIVATED;
    const char* const name = PyUnicode_AsUTF8(c.activated_slots.kind.get(recipe));
    if (!name) throw python_error();
    spec.activation = name;
    const Spec& input = specs_[spec.sources[0]];
    if (input.dither) return -2;  // the operators of activations subtract no draws
    if (input.kind != Kind::CODES && !computes(spec.activation)) return -2;
  } else if (is(c.replay)) {
    spec.kind = Kind::VIEW;
    PyObject* const geometry = c.replay_slots.geometry.get(recipe);
    if (geometry && geometry != Py_None) spec.geometry = Geometry::unpack(geometry);
    spec.recipe = std::make_shared<c10::SafePyObject>(Py_NewRef(recipe), getPyInterpreter());
  } else if (is(c.cast)) {
    spec.kind = Kind::CAST;
  } else if (is(c.multiplied)) {
    spec.kind = Kind::MULTIPLIED;
  } else if (recipe == c.sum.get()) {
    spec.kind = Kind::SUM;
  } else {
    return -2;
  }
  PyObject* const tensors = slots.tensors.get(stash);
  for (const auto i : c10::irange(PyTuple_GET_SIZE(tensors))) {
    PyObject* const object = PyTuple_GET_ITEM(tensors, i);
    if (!plain_tensor(object)) return -2;
    spec.slots.push_back(slot(THPVariable_Unpack(object), making));
  }
  if (PyObject* const uses = slots.uses.get(stash); uses != Py_None) {
    Ref user = Ref::steal(PyObject_CallOneArg(c.use_handle.get(), uses));
    spec.user = std::make_shared<c10::SafePyObject>(user.release(), getPyInterpreter());
    spec.uses = std::make_shared<c10::SafePyObject>(Py_NewRef(uses), getPyInterpreter());
  }
  const int index = static_cast<int>(specs_.size());
  specs_.push_back(std::move(spec));
  making.structures.emplace_back(stash, index);
  return index;
}

Rebuilt::Rebuilt(const SavedStashes& saved) : saved_(saved), tensors_(saved.tensors()) {}

Tensor Rebuilt::of_source(const Spec& spec, int i) {
  const int index = spec.sources[i];
  return value(index, saved_.specs_[index].dtype);
}

Tensor Rebuilt::value(int index, at::ScalarType dtype) {
  for (const Known& known : known_) {
    if (known.index == index && known.dtype == dtype) return known.value;
  }
  const Spec& spec = saved_.specs_[index];
  Tensor value = spec.uses ? shared(spec, dtype) : load(spec, dtype);
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
