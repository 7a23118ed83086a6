// The coding of rows, and the operators that make codes, with or without a forward.
//
// As many groups as one vector has lanes are coded together. The first pass finds their ends. Then
// their grids are computed together. The second pass reads the groups from the first-level cache
// and writes their codes.

#include <string>
#include <tuple>

#include "encode.h"
#include "forward.h"

namespace mesa {
namespace {

// The source of each row. In a matrix in parts, a row's parts follow each other.
template <typename T>
struct PlainRows {
  const Matrix& x;
  int64_t parts, cols;
  Plain<T> operator()(int64_t row) const {
    if (parts == 1) return {x.row<T>(row)};
    return {x.row<T>(row / parts) + row % parts * cols};
  }
};

template <typename T>
struct NormalizedRows {
  const Matrix& x;
  const float *mean, *rstd;  // one per row; without a mean, 0
  Normalized<T> operator()(int64_t row) const {
    return {x.row<T>(row), mean ? mean[row] : 0.0f, rstd[row]};
  }
};

// Encodes the rows of a matrix. Each thread has one encoder.
template <typename Rows>
struct Encoder {
  const Layout& layout;
  const Codes& out;
  const Rows& rows;
  Code code;
  const uint16_t* elements;  // the elements' mixed indices, for `Draws`
  int64_t scattered;         // the number of rows if they are not contiguous, else 0
  std::unique_ptr<Beside> beside;
  Grids grids;
  Buffer<uint8_t> room = buffer<uint8_t>(layout.stretch + BLOCK);

  using Source = decltype(std::declval<Rows>()(0));
  using Raw = typename Source::Dtype::Raw;

  // Writes the codes of a group of n elements: the `k`-th group in `grids`, the `index`-th of its
  // tensor.
  void quantize(const Source& x, const Target& to, int64_t n, int64_t k, int64_t index) {
    const float zero = grids.zero[k], inverse = grids.inverse[k];
    Draws draws{};
    if (code.stochastic) {
      draws = Draws::of(elements, std::bit_cast<Grid>(grids.stored[k]), index, code.seed);
    }
    if (grids.extreme[k]) [[unlikely]] {
      const bool bytes = to.planes.low == 8;
      uint8_t* const q = bytes ? to.to : room.get();
      quantize_extreme(x, q, n, zero, inverse, layout.bits, code.stochastic ? &draws : nullptr);
      if (!bytes) pack(q, to, n);
    } else if (code.stochastic) {
      quantize_stochastic(x, to, n, zero, inverse, layout.bits, draws);
    } else {
      quantize_nearest(x, to, n, zero, inverse);
    }
  }

  // Packs n codes, one per byte. Reads up to 7 codes past n.
  static void pack(const uint8_t* q, const Target& to, int64_t n) {
    const auto [low, high] = to.planes;
    pack_plane(q, to.to, n, low, 0);
    if (high) pack_plane(q, to.high, n, high, low);
  }

  // visit(index of the group in the stretch, source, first element in the stretch, length)
  template <typename Visit>
  void for_groups(const Stretch& s, int64_t r, const Visit& visit) const {
    const Source row = rows(s.row + r);
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t begin = g * layout.size, n = std::min(layout.size, s.n - begin);
      visit(g, row.on(row.x + s.col + begin), begin, n);
    }
  }

  void encode(const Stretch& s) {
    for (int64_t r = 0; r < s.rows; ++r) {
      if (beside && s.group == 0) beside->before(s.row + r);
      for_groups(s, r, [&](int64_t g, const Source& x, int64_t, int64_t n) {
        Padded<Raw, BLOCK> padded;
        grids.set(r * s.groups + g, find_ends(x.on(padded.read(x.x, n)), std::max(n, BLOCK)));
      });
    }
    grids.compute(layout.bits);
    for (int64_t r = 0; r < s.rows; ++r) encode_row(s, r);
  }

  // Writes the codes of the stretch's r-th row.
  void encode_row(const Stretch& s, int64_t r) {
    const int64_t virtual_row = s.row + r, count = out.count();
    const Codes::Part& part = out.parts[count == 1 ? 0 : virtual_row % count];
    const int64_t row = count == 1 ? virtual_row : virtual_row / count;
    const int64_t first = row * layout.groups + s.group;
    std::memcpy(part.grids + first * sizeof(Grid), grids.stored + r * s.groups,
                s.groups * sizeof(Grid));
    // If groups do not begin and end on whole bytes, a row is packed after its codes are computed.
    // So are short groups with two planes.
    const Planes& planes = layout.planes;
    const int64_t last = s.n - (s.groups - 1) * layout.size;
    const bool whole = layout.size * planes.least() % 8 == 0 && s.n * planes.least() % 8 == 0 &&
                       (planes.high == 0 || last >= BLOCK);
    const Target packed = layout.target(part.bytes + row * layout.bytes, s.col);
    const Target to = whole ? packed : Target{room.get(), nullptr, Planes(8)};
    const int64_t later = virtual_row + layout.rows_ahead(sizeof(Raw));
    for_groups(s, r, [&](int64_t g, const Source& x, int64_t begin, int64_t n) {
      if (later < scattered) prefetch_far(rows(later).x + s.col + begin, n * sizeof(Raw));
      Padded<Raw, BLOCK> padded;
      Padded<uint8_t, BLOCK> codes;
      const auto [low, high] = to.planes;
      uint8_t* const group = to.to + begin * low / 8;
      const Target into{codes.write(group, n), to.high + begin * high / 8, to.planes};
      quantize(x.on(padded.read(x.x, n)), into, std::max(n, BLOCK), r * s.groups + g, first + g);
      codes.finish(group, n, n * low / 8);
    });
    if (beside) beside->after(virtual_row, s.col, s.n);
    if (!whole) {
      std::memset(room.get() + s.n, 0, 7);
      pack(room.get(), packed, s.n);
    }
  }
};

// rows_of(dtype) returns the sources of x's rows. The columns of x are cut into `parts`.
template <typename RowsOf>
Codes encode(const Matrix& x, int64_t parts, const Code& code, const Besides& besides,
             const RowsOf& rows_of) {
  STD_TORCH_CHECK(code.group_size >= 1, "group_size must be at least 1, got ", code.group_size);
  const int64_t rows = x.rows * parts, cols = x.cols / parts;
  const Layout layout(code.bits, cols, ceil_div(cols, code.group_size));
  Codes out(x.rows, layout, parts);
  const std::vector<uint16_t> elements = Draws::mixed(code.stochastic ? layout.size : 0);
  with_dtype(x.type, [&]<typename T>(T dtype) {
    const auto sources = rows_of(dtype);
    parallel_stretches(rows, layout, static_cast<bool>(besides), [&](const auto& for_each) {
      Encoder<decltype(sources)> encoder{layout,
                                         out,
                                         sources,
                                         code,
                                         elements.data(),
                                         x.scattered() ? rows : 0,
                                         besides ? besides() : nullptr};
      for_each([&](const Stretch& s) { encoder.encode(s); });
    });
  });
  return out;
}

}  // namespace

Codes encode_plain(const Matrix& x, const Code& code, int64_t parts, const Besides& besides) {
  return encode(x, parts, code, besides,
                [&]<typename T>(T) { return PlainRows<T>{x, parts, x.cols / parts}; });
}

Codes encode_normalized(const Matrix& x, const float* mean, const float* rstd, const Code& code,
                        const Besides& besides) {
  return encode(x, 1, code, besides,
                [&]<typename T>(T) { return NormalizedRows<T>{x, mean, rstd}; });
}

namespace {

std::tuple<Tensor, Tensor> affine_encode(const Tensor& x, int64_t bits, int64_t group_size,
                                         bool stochastic, int64_t seed) {
  const Codes out = encode_plain(Matrix("x", x), {bits, group_size, stochastic, seed});
  return {out.parts[0].codes, out.parts[0].scales};
}

std::vector<Tensor> affine_encode_parts(const Tensor& x, int64_t parts, int64_t bits,
                                        int64_t group_size, bool stochastic, int64_t seed) {
  const Matrix matrix("x", x);
  STD_TORCH_CHECK(parts >= 1 && matrix.cols % parts == 0, "parts must divide the columns of x, got ",
                  parts, " and ", matrix.cols, " columns");
  std::vector<Tensor> tensors;
  const Codes out = encode_plain(matrix, {bits, group_size, stochastic, seed}, parts);
  for (const Codes::Part& part : out.parts) {
    tensors.push_back(part.codes), tensors.push_back(part.scales);
  }
  return tensors;
}

std::tuple<Tensor, Tensor> normalized_encode(const Tensor& x, const std::optional<Tensor>& mean,
                                             const Tensor& rstd, int64_t bits, int64_t group_size,
                                             bool stochastic, int64_t seed) {
  const Matrix matrix("x", x);
  const Vector means("mean", mean, matrix.rows), rstds("rstd", rstd, matrix.rows);
  const Codes out = encode_normalized(matrix, means.data, rstds.data,
                                      {bits, group_size, stochastic, seed});
  return {out.parts[0].codes, out.parts[0].scales};
}

std::tuple<Tensor, Tensor, Tensor> activation_encode(const Tensor& x, const std::string& kind,
                                                     int64_t bits, int64_t group_size,
                                                     bool stochastic, int64_t seed) {
  const Matrix matrix("x", x);
  const Output y(matrix.rows, matrix.cols, x.scalar_type(), matrix.type);
  ActivateValues values = nullptr;
  with_dtype(matrix.type, [&]<typename T>(T) { values = find_passes<T>(kind).values; });
  const Codes out = encode_plain(matrix, {bits, group_size, stochastic, seed}, 1, [&] {
    return std::make_unique<ActivationForward>(matrix, y, values);
  });
  return {y.result(), out.parts[0].codes, out.parts[0].scales};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_encode(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    double eps, bool centered, ScalarType dtype, int64_t bits, int64_t group_size, bool stochastic,
    int64_t seed) {
  const Matrix matrix("x", x);
  const int64_t rows = matrix.rows, cols = matrix.cols;
  const Vector weights("weight", weight, cols), biases("bias", bias, cols);
  const FloatVector ones(weights.data ? 0 : cols + PAIR, 1.0f);
  const FloatVector zeros(biases.data ? 0 : cols + PAIR);
  const Output y(rows, cols, dtype, written_as(dtype));
  const Tensor rstd = empty({rows}, ScalarType::Float);
  std::vector<float> means(centered ? rows : 0);
  NormForward::Task task{matrix,
                         y,
                         centered ? means.data() : nullptr,
                         static_cast<float*>(rstd.mutable_data_ptr()),
                         weights.data ? weights.data : ones.data(),
                         biases.data ? biases.data : zeros.data(),
                         static_cast<float>(eps),
                         nullptr,
                         nullptr};
  with_dtype(matrix.type, [&]<typename T>(T) {
    task.statistics = norm_statistics<T>;
    with_dtype(written_as(dtype), [&]<typename U>(U) { task.values = norm_values<T, U>; });
  });
  const Codes out = encode_normalized(matrix, task.mean, task.rstd,
                                      {bits, group_size, stochastic, seed},
                                      [&] { return std::make_unique<NormForward>(task); });
  return {y.result(), rstd, out.parts[0].codes, out.parts[0].scales};
}

std::tuple<Tensor, Tensor, Tensor> softmax_encode(const Tensor& x, ScalarType dtype, int64_t bits,
                                                  int64_t group_size, bool stochastic,
                                                  int64_t seed) {
  const Matrix matrix("x", x);
  const Output y(matrix.rows, matrix.cols, dtype, written_as(dtype));
  const Matrix weights("y", y.tensor);
  Besides besides;
  with_dtype(matrix.type, [&]<typename T>(T) {
    with_dtype(weights.type, [&]<typename U>(U) {
      besides = [&] { return std::make_unique<SoftmaxForward<T, U>>(matrix, y); };
    });
  });
  const Codes out = encode_plain(weights, {bits, group_size, stochastic, seed}, 1, besides);
  return {y.result(), out.parts[0].codes, out.parts[0].scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mesa_train, CPU, m) {
  m.impl("affine_encode", TORCH_BOX(&affine_encode));
  m.impl("affine_encode_parts", TORCH_BOX(&affine_encode_parts));
  m.impl("normalized_encode", TORCH_BOX(&normalized_encode));
  m.impl("activation_encode", TORCH_BOX(&activation_encode));
  m.impl("norm_encode", TORCH_BOX(&norm_encode));
  m.impl("softmax_encode", TORCH_BOX(&softmax_encode));
}

}  // namespace mesa
