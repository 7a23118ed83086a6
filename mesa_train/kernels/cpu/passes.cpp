// The passes of every activation for one dtype. MESA_DTYPE is Float32, BFloat16 or Float16. The
// build compiles this file once for each dtype, in parallel.

#include "passes.h"

namespace mesa {
namespace {

using T = MESA_DTYPE;

constexpr Activation ACTIVATIONS[] = {
    {"gelu", passes<Gelu, T>()},
    {"gelu_tanh", passes<GeluTanh, T>()},
    {"silu", passes<Silu, T>()},
    {"relu", passes<Relu, T>()},
    {"hardswish", passes<Hardswish, T>()},
    {"hardsigmoid", passes<Hardsigmoid, T>()},
    {"mish", passes<Mish, T>()},
    {"softplus", passes<Softplus, T>()},
    {"quick_gelu", passes<QuickGelu, T>()},
    {"elu", passes<Elu, T>()},
    {"leaky_relu", passes<LeakyRelu, T>()},
};

}  // namespace

template <>
std::span<const Activation> activations<T>() {
  return ACTIVATIONS;
}

}  // namespace mesa
