// The Python classes whose objects the native rows make and read, and names of their attributes.
#pragma once

#include "python.h"

namespace mesa {

// How a stash is rebuilt (see `policy.py`).
enum Cost : int { VIEW = 0, CHEAP = 1, MATMUL = 2 };

struct Classes {
  Ref stash, leaf, matrix_layout, affine, lossless, scaled, normalized, activated, replay, cast,
      multiplied, sum, report,
      mode, device_context, product, whole, use_count;
  struct {
    Slot recipe, tensors, sources, cost, dtype, offloaded, uses;
  } stash_slots;
  struct {
    Slot codec, layout;
  } leaf_slots;
  struct {
    Slot shape, order, cols;
  } layout_slots;
  struct {
    Slot has_weight, has_bias, per_channel;
  } scaled_slots;
  struct {
    Slot dims, centred;
  } normalized_slots;
  struct {
    Slot kind;
  } activated_slots;
  struct {
    Slot function, args, kwargs, index, geometry;
  } replay_slots;
  // The Python operators, for stashes that no native node can read.
  Ref linear, token_norm, smooth, flash_cpu, matmul, softmax, scaled_linear, mul;
  // Python functions and objects.
  Ref use_handle, backward_cache, held, current_level, compiler, eval_frame_callback, functional, is_fsdp_module;
  // The costs 0, 1 and 2 as Python objects.
  Ref costs[3];
};

// Never destroyed: at the end of the process there is no interpreter to free its objects.
extern Classes& classes;

// Interned names. They are never freed.
struct Names {
  PyObject *context, *rules, *native, *report, *rows, *name, *lineage, *linears, *entries, *hooks,
      *recorder, *owner, *keep, *apply, *installed, *module, *checkpointed, *dict, *entry,
      *compiling, *exporting, *level, *codec, *bits, *dither, *seed, *parameters, *add, *how_shared, *how_rebuilt,
      *training, *weight, *bias, *normalized_shape, *eps, *approximate, *linear, *layer_norm,
      *within, *enabled, *p, *take, *offer, *count, *retains_grad, *backward_hooks, *copy;
};

extern Names names;

// Fills `classes` from a dict of Python's names, and `names`.
void set_up(PyObject* dict);

}  // namespace mesa
