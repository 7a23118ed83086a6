// Reads the Python classes and interns the names (`classes.h`).

#include "classes.h"

namespace mesa {

Classes& classes = *new Classes;
Names names;

void set_up(PyObject* dict) {
  const auto get = [dict](const char* name) {
    return Ref::borrow(item(dict, Ref::steal(PyUnicode_FromString(name)).get()));
  };
  Classes& c = classes;
  c.stash = get("Stash");
  c.leaf = get("Leaf");
  c.matrix_layout = get("MatrixLayout");
  c.affine = get("Affine");
  c.lossless = get("Lossless");
  c.scaled = get("Scaled");
  c.normalized = get("Normalized");
  c.activated = get("Activated");
  c.replay = get("Replay");
  c.cast = get("Cast");
  c.multiplied = get("Multiplied");
  c.sum = get("SUM");
  c.report = get("Report");
  c.mode = get("CompressionMode");
  c.device_context = get("DeviceContext");
  c.product = get("PRODUCT");
  c.whole = get("WHOLE");
  c.use_count = get("UseCount");
  c.linear = get("Linear");
  c.token_norm = get("TokenNorm");
  c.smooth = get("Smooth");
  c.flash_cpu = get("FlashCPU");
  c.matmul = get("MatMul");
  c.softmax = get("Softmax");
  c.scaled_linear = get("ScaledLinear");
  c.mul = get("Mul");
  c.use_handle = get("UseHandle");
  c.backward_cache = get("backward_cache");
  c.held = get("held");
  c.current_level = get("forward_ad");
  c.compiler = get("compiler");
  c.eval_frame_callback = get("eval_frame_callback");
  c.functional = get("functional");
  c.is_fsdp_module = get("is_fsdp_module");
  for (int cost = 0; cost < 3; ++cost) c.costs[cost] = Ref::steal(PyLong_FromLong(cost));

  PyObject* const stash = c.stash.get();
  c.stash_slots.recipe.find(stash, "recipe");
  c.stash_slots.tensors.find(stash, "tensors");
  c.stash_slots.sources.find(stash, "sources");
  c.stash_slots.cost.find(stash, "cost");
  c.stash_slots.dtype.find(stash, "dtype");
  c.stash_slots.offloaded.find(stash, "offloaded");
  c.stash_slots.uses.find(stash, "uses");
  c.leaf_slots.codec.find(c.leaf.get(), "codec");
  c.leaf_slots.layout.find(c.leaf.get(), "layout");
  c.layout_slots.shape.find(c.matrix_layout.get(), "shape");
  c.layout_slots.order.find(c.matrix_layout.get(), "order");
  c.layout_slots.cols.find(c.matrix_layout.get(), "cols");
  c.scaled_slots.has_weight.find(c.scaled.get(), "has_weight");
  c.scaled_slots.has_bias.find(c.scaled.get(), "has_bias");
  c.scaled_slots.per_channel.find(c.scaled.get(), "per_channel");
  c.normalized_slots.dims.find(c.normalized.get(), "dims");
  c.normalized_slots.centred.find(c.normalized.get(), "centred");
  c.activated_slots.kind.find(c.activated.get(), "kind");
  c.replay_slots.function.find(c.replay.get(), "function");
  c.replay_slots.args.find(c.replay.get(), "args");
  c.replay_slots.kwargs.find(c.replay.get(), "kwargs");
  c.replay_slots.index.find(c.replay.get(), "index");
  c.replay_slots.geometry.find(c.replay.get(), "geometry");

  names = {
      .context = interned("context"),
      .rules = interned("rules"),
      .native = interned("native"),
      .report = interned("report"),
      .rows = interned("rows"),
      .name = interned("name"),
      .lineage = interned("lineage"),
      .linears = interned("linears"),
      .entries = interned("_entries"),
      .hooks = interned("hooks"),
      .recorder = interned("recorder"),
      .owner = interned("owner"),
      .keep = interned("keep"),
      .apply = interned("apply"),
      .installed = interned("installed"),
      .module = interned("module"),
      .checkpointed = interned("checkpointed"),
      .dict = interned("__dict__"),
      .entry = interned("_mesa_train"),
      .compiling = interned("_is_compiling_flag"),
      .exporting = interned("_is_exporting_flag"),
      .level = interned("_current_level"),
      .codec = interned("codec"),
      .bits = interned("bits"),
      .dither = interned("dither"),
      .seed = interned("seed"),
      .parameters = interned("_parameters"),
      .add = interned("add"),
      .how_shared = interned("shared"),
      .how_rebuilt = interned("rebuilt"),
      .training = interned("training"),
      .weight = interned("weight"),
      .bias = interned("bias"),
      .normalized_shape = interned("normalized_shape"),
      .eps = interned("eps"),
      .approximate = interned("approximate"),
      .linear = interned("linear"),
      .layer_norm = interned("layer_norm"),
      .within = interned("within"),
      .enabled = interned("enabled"),
      .p = interned("p"),
      .take = interned("take"),
      .offer = interned("offer"),
      .count = interned("count"),
      .retains_grad = interned("retains_grad"),
      .backward_hooks = interned("_backward_hooks"),
      .copy = interned("copy_"),
  };
}

}  // namespace mesa
