// The structure of saved stashes (`saved.h`).

#include "saved.h"

#include <c10/util/irange.h>
#include <torch/csrc/PyInterpreter.h>

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

}  // namespace

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
    if (root >= 0) count_reader(specs_[root]);
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

// Counts this node as a reader of a stash that costs a matmul.
void SavedStashes::count_reader(Spec& spec) {
  if (!spec.uses || spec.user) return;
  PyObject* const uses = spec.uses->ptr(getPyInterpreter());
  Ref user = Ref::steal(PyObject_CallOneArg(classes.use_handle.get(), uses));
  spec.user = std::make_shared<c10::SafePyObject>(user.release(), getPyInterpreter());
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
    spec.uses = std::make_shared<c10::SafePyObject>(Py_NewRef(uses), getPyInterpreter());
  }
  const int index = static_cast<int>(specs_.size());
  specs_.push_back(std::move(spec));
  making.structures.emplace_back(stash, index);
  return index;
}

}  // namespace mesa
