// What a node saves: tensors, and the structure that rebuilds other tensors from them.
//
// `SavedStashes` is the native form of the saved tensors and of `ctx.kept`, `Rebuilt` that of
// `stash.Saved`. Its tensors are PyTorch's
// saved variables, so saved-tensor hooks and the check of versions apply to them.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <c10/core/SafePyObject.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "recorder.h"

namespace mesa {

enum class Kind : uint8_t {
  WHOLE,      // the tensor itself
  CODES,      // a leaf of affine codes
  VALUES,     // a leaf of the lossless codec
  SCALED,     // a norm's output: weight and bias applied to x_hat
  NORMALIZED, // a norm's x_hat, from its input
  PRODUCT,    // a Linear of its source
  ACTIVATED,  // an activation of its source
  VIEW,       // a view of its source, or a copy of a view
  CAST,       // its source in another dtype
  MULTIPLIED, // the product of two sources
  SUM,        // the sum of two sources
};

// A view of a source, as strides if it is one. The Python recipe is called for all other views.
struct Geometry {
  bool strided = false, reshaped = false, contiguous = false;
  c10::DimVector source_sizes, source_strides, sizes, strides;
  int64_t offset = 0;  // from the first element of the source

  static Ref pack(const Tensor& source, const Tensor& view, bool reshapes);
  static Geometry unpack(PyObject* bytes);
};

struct Spec {
  Kind kind = Kind::WHOLE;
  at::ScalarType dtype = at::kFloat;
  c10::SmallVector<int, 2> slots;  // of the saved tensors
  c10::SmallVector<int, 2> sources;  // indices of the sources' structures
  int64_t bits = 0;
  std::optional<int64_t> dither;  // the seed of the draws that are subtracted from codes
  Layout layout;
  bool has_weight = false, has_bias = false;
  c10::DimVector per_channel;  // the shape of weight and bias; empty if x_hat is a leaf
  int64_t dims = 0;            // the trailing dims of a norm
  bool centred = false;
  std::string activation;
  Geometry geometry;
  std::shared_ptr<c10::SafePyObject> recipe;  // of a view without geometry
  // Of a stash that costs a matmul: its use count, and this node's entry in it if the node itself
  // reads the stash.
  std::shared_ptr<c10::SafePyObject> uses, user;
};

// What a node saves at one place: a Python stash, a tensor itself, or nothing.
struct Item {
  Item(std::nullptr_t) {}
  Item(PyObject* stash) : stash(stash) {}
  Item(const Tensor& tensor) : tensor(tensor) {}

  PyObject* stash = nullptr;
  Tensor tensor;
};

// The saved stashes of a node.
class SavedStashes {
 public:
  // Fills this object. False if a recipe has no native form; then nothing is saved.
  bool save(std::initializer_list<Item> items);
  void release();
  // The saved tensors. Throws if they were released, or written to since.
  std::vector<Tensor> tensors() const;

 private:
  friend class Rebuilt;
  struct Making;
  int strip(PyObject* stash, Making& making);
  static void count_reader(Spec& spec);
  static int slot(const Tensor& tensor, Making& making);

  std::vector<Spec> specs_;
  c10::SmallVector<int, 8> roots_;
  std::vector<torch::autograd::SavedVariable> tensors_;
};

// The saved stashes of a node in its backward. Each tensor is rebuilt at most once in a dtype; one
// that costs a matmul at most once in a run of the autograd engine.
class Rebuilt {
 public:
  explicit Rebuilt(const SavedStashes& saved);
  ~Rebuilt();

  bool has(int index) const { return saved_.roots_[index] >= 0; }
  const Spec& spec(int index) const { return saved_.specs_[saved_.roots_[index]]; }
  const Spec& source(const Spec& spec) const { return saved_.specs_[spec.sources[0]]; }
  // Stash `index` as a tensor of `dtype`.
  Tensor get(int index, at::ScalarType dtype);
  // The stash in its own dtype.
  Tensor get(int index) { return get(index, spec(index).dtype); }
  // The i-th saved tensor that a structure itself reads.
  const Tensor& own(const Spec& spec, int i) const { return tensors_[spec.slots[i]]; }

 private:
  // A structure's tensor, for one of its readers.
  Tensor value(int index, at::ScalarType dtype);
  const Tensor* find(int index, at::ScalarType dtype) const;
  // The i-th source in its own dtype.
  Tensor of_source(const Spec& spec, int i);
  Tensor load(const Spec& spec, at::ScalarType dtype);
  Tensor view(const Spec& spec, at::ScalarType dtype);
  // The value of a structure that other nodes rebuild too, through `backward_cache`.
  Tensor shared(const Spec& spec, at::ScalarType dtype);

  const SavedStashes& saved_;
  std::vector<Tensor> tensors_;
  struct Known {
    int index;
    at::ScalarType dtype;
    Tensor value;
  };
  c10::SmallVector<Known, 6> known_;
};

// The dtype to which a recipe that computes in float32 rounds (`stash.once`).
at::ScalarType once(at::ScalarType own, at::ScalarType dtype);

Tensor activation(const Tensor& x, std::string_view kind);

}  // namespace mesa
