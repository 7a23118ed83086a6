// Rules, lineage, report and new stashes (`recorder.h`).

#include "recorder.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/irange.h>

#include "operators.h"

namespace mesa {
namespace {

struct NamedOperand {
  const char *name, *operand;
};
constexpr std::array<NamedOperand, OPERANDS> NAMES = {{
    {"linear", "input"},
    {"layer_norm", "normalized"},
    {"rms_norm", "normalized"},
    {"activation", "input"},
    {"attention", "q"},
    {"attention", "k"},
    {"attention", "v"},
    {"attention", "out"},
    {"softmax", "output"},
    {"matmul", "left"},
    {"matmul", "right"},
    {"mul", "left"},
    {"mul", "right"},
}};

bool flag(PyObject* object, const char* name) {
  return truth(Ref::steal(PyObject_GetAttrString(object, name)).get());
}

int64_t number(PyObject* object, const char* name) {
  return integer(Ref::steal(PyObject_GetAttrString(object, name)).get());
}

// Reads `policy.Rules`. The result borrows from the object, which must outlive it.
std::unique_ptr<Rules> read(PyObject* object) {
  auto rules = std::make_unique<Rules>();
  const Ref table = Ref::steal(PyObject_GetAttrString(object, "table"));
  const Ref operators = Ref::steal(PyObject_GetAttrString(object, "operators"));
  for (const auto i : c10::irange(static_cast<int>(OPERANDS))) {
    Rule& rule = rules->of[i];
    rule.operator_name = interned(NAMES[i].name);
    rule.operand_name = interned(NAMES[i].operand);
    const Ref key = tuple_of(rule.operator_name, rule.operand_name);
    PyObject* const source = item(table.get(), key.get());
    PyObject* const on = item(operators.get(), rule.operator_name);
    if (!source || !on) continue;
    rule.on = truth(on);
    rule.enabled = flag(source, "enabled");
    rule.fused = flag(source, "fused");
    rule.rebuild_linear = flag(source, "rebuild_linear");
    rule.lossless = flag(source, "lossless");
    rule.limit = static_cast<int>(number(source, "limit"));
    rule.min_bytes = number(source, "min_bytes");
    const Ref codec = attribute(source, names.codec);
    rule.codec = codec.get();
    rule.small = Ref::steal(
        PyUnicode_FromFormat("uncompressed: under %lld bytes", (long long)rule.min_bytes));
    if (Py_IS_TYPE(codec.get(), (PyTypeObject*)classes.affine.get()) && !flag(source, "offload")) {
      rule.affine = true;
      rule.bits = number(codec.get(), "bits");
      rule.group_size = number(codec.get(), "group_size");
      rule.seed = number(codec.get(), "seed");
      rule.stochastic = flag(codec.get(), "stochastic");
      rule.coded = Ref::steal(PyObject_Str(codec.get()));
    } else if (rule.lossless && !flag(source, "offload")) {
      rule.values = true;
      rule.coded = Ref::steal(PyObject_Str(codec.get()));
    }
  }
  rules->rebuilds_matmuls = flag(object, "rebuilds_matmuls");
  PyObject* const fallback = item(operators.get(), Ref::steal(PyUnicode_FromString("fallback")).get());
  rules->plain_fallback = fallback && truth(fallback) && !flag(object, "functions");
  return rules;
}

constexpr const char* CAPSULE = "mesa_train.Rules";

void forget(PyObject* capsule) {
  delete static_cast<Rules*>(PyCapsule_GetPointer(capsule, CAPSULE));
}

// The C++ form of a context's rules. The Python object holds it in its attribute `native`.
const Rules* rules_of(PyObject* context) {
  const Ref object = attribute(context, names.rules);
  Ref capsule = attribute(object.get(), names.native);
  if (capsule.get() == Py_None) {
    std::unique_ptr<Rules> rules = read(object.get());
    capsule = Ref::steal(PyCapsule_New(rules.get(), CAPSULE, forget));
    rules.release();
    check(PyObject_SetAttr(object.get(), names.native, capsule.get()));
  }
  auto* const rules = static_cast<Rules*>(PyCapsule_GetPointer(capsule.get(), CAPSULE));
  if (!rules) throw python_error();
  return rules;
}

int64_t version(const Tensor& tensor) { return tensor._version(); }

// Removes an entry of a lineage when its tensor dies. `self` is (entries, key).
PyObject* drop_entry(PyObject* self, PyObject*) {
  PyObject *entries = PyTuple_GET_ITEM(self, 0), *key = PyTuple_GET_ITEM(self, 1);
  if (PyDict_DelItem(entries, key) < 0) PyErr_Clear();  // the entry is gone already
  Py_RETURN_NONE;
}

PyMethodDef drop_method = {"drop_entry", drop_entry, METH_O, nullptr};

PyObject* lookup(PyObject* entries, PyObject* object, const Tensor& tensor) {
  const Ref key = Ref::steal(PyLong_FromVoidPtr(object));
  PyObject* const entry = item(entries, key.get());
  if (!entry || PyWeakref_GetObject(PyTuple_GET_ITEM(entry, 0)) != object) return nullptr;
  if (integer(PyTuple_GET_ITEM(entry, 1)) != version(tensor)) return nullptr;
  return PyTuple_GET_ITEM(entry, 2);
}

void add_entry(PyObject* entries, PyObject* object, const Tensor& tensor, PyObject* value) {
  if (tensor.is_inference()) return;
  const Ref key = Ref::steal(PyLong_FromVoidPtr(object));
  const Ref place = tuple_of(entries, key.get());
  const Ref callback = Ref::steal(PyCFunction_New(&drop_method, place.get()));
  const Ref weak = Ref::steal(PyWeakref_NewRef(object, callback.get()));
  const Ref number = Ref::steal(PyLong_FromLongLong(version(tensor)));
  const Ref entry = tuple_of(weak.get(), number.get(), value);
  check(PyDict_SetItem(entries, key.get(), entry.get()));
}

}  // namespace

std::pair<Layout, Tensor> Layout::of(const Tensor& tensor, uint64_t within) {
  Tensor x = tensor;
  const int64_t dims = x.dim();
  Layout layout;
  layout.order.resize(dims);
  for (const auto d : c10::irange(dims)) layout.order[d] = d;
  if (!x.is_contiguous()) {
    bool expanded = false;
    for (const int64_t stride : x.strides()) expanded = expanded || stride == 0;
    if (expanded) {
      x = x.contiguous();
    } else {
      const auto strides = x.strides();
      std::stable_sort(layout.order.begin(), layout.order.end(),
                       [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
    }
  }
  layout.shape.assign(x.sizes().begin(), x.sizes().end());
  int64_t inner = 0;
  while (inner < dims && (within >> layout.order[dims - 1 - inner] & 1)) ++inner;
  inner = std::max<int64_t>(inner, 1);
  int64_t rows = 1, cols = 1;
  for (const auto i : c10::irange(dims)) {
    layout.contiguous = layout.contiguous && layout.order[i] == i;
    (i < dims - inner ? rows : cols) *= layout.shape[layout.order[i]];
  }
  layout.cols = cols;
  if (layout.contiguous && dims == 2 && inner == 1) return {std::move(layout), x};
  const Tensor permuted = layout.contiguous ? x : x.permute(layout.order);
  return {std::move(layout), reshaped(permuted, {rows, cols})};
}

Tensor Layout::restore(const Tensor& matrix) const {
  if (contiguous) return matrix.sizes() == shape ? matrix : matrix.view(shape);
  c10::DimVector sizes(order.size()), inverse(order.size());
  for (const auto i : c10::irange(order.size())) {
    sizes[i] = shape[order[i]];
    inverse[order[i]] = static_cast<int64_t>(i);
  }
  return matrix.view(sizes).permute(inverse);
}

Tensor Layout::rows(const Tensor& grad) const {
  if (contiguous && grad.dim() == 2 && grad.size(1) == cols) return grad;
  return reshaped(contiguous ? grad : grad.permute(order), {-1, cols});
}

Ref Layout::object() const {
  Ref object = allocate(classes.matrix_layout.get());
  classes.layout_slots.shape.set(object.get(), tuple_of_integers(shape));
  classes.layout_slots.order.set(object.get(), tuple_of_integers(order));
  classes.layout_slots.cols.set(object.get(), Ref::steal(PyLong_FromLongLong(cols)));
  return object;
}

Call::Call(PyObject* recorder)
    : recorder_(recorder),
      context_(attribute(recorder, names.context)),
      rules_(rules_of(context_.get())) {}

bool Call::covers(Operand operand, std::initializer_list<const Tensor*> tensors) const {
  if (!rule(operand).on) return false;
  bool gradient = false;
  for (const Tensor* tensor : tensors) {
    if (!tensor) continue;
    if (!tensor->is_floating_point() || tensor->layout() != at::kStrided || tensor->is_nested()) {
      return false;
    }
    gradient = gradient || tensor->requires_grad();
  }
  return gradient;
}

PyObject* Call::entries(Ref& cache, PyObject* name) {
  if (!cache) cache = attribute(attribute(recorder_, name).get(), names.entries);
  return cache.get();
}

PyObject* Call::known(PyObject* object, const Tensor& tensor) {
  return lookup(entries(lineage_, names.lineage), object, tensor);
}

PyObject* Call::usable(PyObject* object, const Tensor& tensor, const Rule& rule) {
  PyObject* const stash = known(object, tensor);
  return stash && rule.enabled && cost_of(stash) <= rule.limit ? stash : nullptr;
}

void Call::remember(PyObject* object, const Tensor& tensor, PyObject* stash) {
  add_entry(entries(lineage_, names.lineage), object, tensor, stash);
}

void Call::remember_linear(PyObject* output, const Tensor& tensor, PyObject* operands) {
  add_entry(entries(linears_, names.linears), output, tensor, operands);
}

PyObject* Call::linear_of(PyObject* object, const Tensor& tensor) {
  return lookup(entries(linears_, names.linears), object, tensor);
}

bool Call::codes(const Rule& rule, const Tensor& tensor) {
  return (rule.affine || rule.values) && rule.enabled && tensor.element_size() >= 2 && !of_parameter(tensor) &&
         static_cast<int64_t>(tensor.nbytes()) >= rule.min_bytes && tensor.dim() > 0 &&
         tensor.size(-1) != 1;
}

Ref Call::keep(PyObject* object, const Tensor& tensor, Operand operand, uint64_t within) {
  const Rule& rule = this->rule(operand);
  if (PyObject* const stash = usable(object, tensor, rule)) {
    report(rule, cost_of(stash) == VIEW ? names.how_shared : names.how_rebuilt, 0, stash);
    return Ref::borrow(stash);
  }
  const bool cast = autocasts(tensor);
  if (codes(rule, tensor) && (rule.affine || (!cast && !narrowed(tensor)))) {
    const at::NoGradGuard guard;
    // A lossless leaf is a view of the tensor: the view must share the tensor's version.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (rule.affine) below.emplace();
    const auto [layout, matrix] = Layout::of(tensor, within);
    Ref stash;
    if (rule.affine) {
      const auto [codes, scales] = affine_encode(matrix, rule);
      stash = leaf(rule, codes, scales, layout, tensor.scalar_type());
    } else {
      stash = leaf(rule, matrix.detach(), {}, layout, tensor.scalar_type());
    }
    remember(object, tensor, stash.get());
    return stash;
  }
  const bool small = (rule.affine || rule.values) && rule.enabled && tensor.element_size() >= 2 &&
                     !of_parameter(tensor) &&
                     static_cast<int64_t>(tensor.nbytes()) < rule.min_bytes;
  if (small && !cast && !narrowed(tensor)) {
    report(rule, rule.small.get(), static_cast<int64_t>(tensor.nbytes()), nullptr);
    return uncompressed(tensor, object);
  }
  // All other cases are rare: parameters, offload, running ranges, casts, parts of a larger tensor.
  c10::DimVector dims;
  for (const auto d : c10::irange(tensor.dim())) {
    if (within >> d & 1) dims.push_back(d);
  }
  const Ref spanned = tuple_of_integers(dims);
  return Ref::steal(PyObject_CallMethodObjArgs(recorder_, names.keep, object, rule.operator_name,
                                               rule.operand_name, spanned.get(), nullptr));
}

Ref Call::leaf(const Rule& rule, const Tensor& codes, const Tensor& scales, const Layout& layout,
               at::ScalarType dtype) {
  Ref recipe = allocate(classes.leaf.get());
  classes.leaf_slots.codec.set(recipe.get(), Ref::borrow(rule.codec));
  classes.leaf_slots.layout.set(recipe.get(), layout.object());
  const Ref first = wrapped(codes);
  int64_t size = static_cast<int64_t>(codes.nbytes());
  Ref tensors;
  if (scales.defined()) {
    const Ref second = wrapped(scales);
    tensors = tuple_of(first.get(), second.get());
    size += static_cast<int64_t>(scales.nbytes());
  } else {
    tensors = tuple_of(first.get());
  }
  Ref stash = new_stash(recipe.get(), std::move(tensors), Ref(), VIEW, dtype);
  report(rule, rule.coded.get(), size, stash.get());
  return stash;
}

void Call::report(const Rule& rule, PyObject* how, int64_t size, PyObject* stash) {
  const Ref report = attribute(recorder_, names.report);
  const Ref name = attribute(context_.get(), names.name);
  if (!Py_IS_TYPE(report.get(), (PyTypeObject*)classes.report.get())) {
    const Ref bytes = Ref::steal(PyLong_FromLongLong(size));
    Ref::steal(PyObject_CallMethodObjArgs(report.get(), names.add, name.get(), rule.operator_name,
                                          rule.operand_name, how, bytes.get(),
                                          stash ? stash : Py_None, nullptr));
    return;
  }
  const Ref rows = attribute(report.get(), names.rows);
  const Ref key = tuple_of(name.get(), rule.operator_name, rule.operand_name, how);
  int64_t calls = 1;
  if (PyObject* const row = item(rows.get(), key.get())) {
    calls += integer(PyTuple_GET_ITEM(row, 0));
    size += integer(PyTuple_GET_ITEM(row, 1));
  }
  const std::array<int64_t, 2> counted = {calls, size};
  check(PyDict_SetItem(rows.get(), key.get(), tuple_of_integers(counted).get()));
}

// The use count of a stash that is rebuilt from these sources (`stash._counted`).
Ref use_count(PyObject* sources) {
  const Ref counted = Ref::steal(PyList_New(0));
  for (const auto i : c10::irange(PyTuple_GET_SIZE(sources))) {
    PyObject* const uses = classes.stash_slots.uses.get(PyTuple_GET_ITEM(sources, i));
    if (uses != Py_None) check(PyList_Append(counted.get(), uses));
  }
  const Ref tuple = Ref::steal(PyList_AsTuple(counted.get()));
  return Ref::steal(PyObject_CallOneArg(classes.use_count.get(), tuple.get()));
}

Ref new_stash(PyObject* recipe, Ref tensors, Ref sources, Cost cost, at::ScalarType dtype) {
  static PyObject* const none = PyTuple_New(0);
  if (!tensors) tensors = Ref::borrow(none);
  if (!sources) sources = Ref::borrow(none);
  int highest = cost;
  for (const auto i : c10::irange(PyTuple_GET_SIZE(sources.get()))) {
    highest = std::max(highest, cost_of(PyTuple_GET_ITEM(sources.get(), i)));
  }
  Ref stash = allocate(classes.stash.get());
  const auto& slots = classes.stash_slots;
  const Ref uses = highest == MATMUL ? use_count(sources.get()) : Ref::borrow(Py_None);
  slots.recipe.set(stash.get(), Ref::borrow(recipe));
  slots.tensors.set(stash.get(), std::move(tensors));
  slots.sources.set(stash.get(), std::move(sources));
  slots.cost.set(stash.get(), classes.costs[highest]);
  slots.dtype.set(stash.get(), Ref::borrow(python_dtype(dtype)));
  slots.offloaded.set(stash.get(), Ref::borrow(Py_None));
  slots.uses.set(stash.get(), uses);
  return stash;
}

Ref uncompressed(const Tensor& tensor, PyObject* object) {
  Ref saved;
  if (tensor.requires_grad() &&
      !(object && !Py_IS_TYPE(object, (PyTypeObject*)THPVariableClass))) {
    saved = wrapped(tensor.detach());
  } else {
    saved = object ? Ref::borrow(object) : wrapped(tensor);
  }
  return new_stash(classes.whole.get(), tuple_of(saved.get()), Ref(), VIEW, tensor.scalar_type());
}

int cost_of(PyObject* stash) {
  return static_cast<int>(integer(classes.stash_slots.cost.get(stash)));
}

bool of_parameter(const Tensor& tensor) {
  if (!tensor.requires_grad()) {
    if (!tensor.is_view()) return false;
  } else if (tensor.is_leaf()) {
    return true;
  }
  if (!tensor.is_view()) return false;
  const at::TensorBase& base = tensor._base();
  return base.is_leaf() && base.requires_grad();
}

bool narrowed(const Tensor& tensor) {
  return tensor.is_view() && tensor.storage().nbytes() > tensor.nbytes();
}

bool autocasts(const Tensor& tensor) {
  return !tensor.is_meta() && at::autocast::is_autocast_enabled(tensor.device().type());
}

Ref held(PyObject* parameter) {
  // Hooks that move or count saved tensors skip parameters. So the alias is a Parameter if there are
  // hooks.
  if (!at::SavedTensorDefaultHooks::get_hooks()) {
    c10::TensorImpl* const held = THPVariable_Unpack(parameter).unsafeGetTensorImpl();
    return wrapped(Tensor(held->shallow_copy_and_detach(held->version_counter(), false)));
  }
  return Ref::steal(PyObject_CallOneArg(classes.held.get(), parameter));
}

}  // namespace mesa
