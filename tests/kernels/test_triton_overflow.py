"""The indices of the last tile of a huge matrix, near 2^31 rows or units, in Triton's interpreter.

The kernels run without the memory of such a matrix: loads and stores are recorded, not done.
"""

import numpy as np
import pytest
import torch
import triton_interpreter

from mesa_train.kernels import packing, reference, schemas

ROWS, COLS = 2**31 - 3, 16


@pytest.mark.parametrize("bits", schemas.BITS)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_largest_tiles_have_indices_below_2_to_the_31(triton, bits, groups):
    from mesa_train.kernels.triton import tiles

    last = tiles._LAST
    # Groups of a long row. Their tiles are wider than the groups.
    long = -(-last // (32768 * min(packing.planes(bits)) // 8 - 1))
    for rows, cols, count in (
        (last, 1, 1),
        (last // 3, 7, groups),
        (1, last, long),
        (5, 197, groups),
    ):
        cut = tiles.tiles(rows, cols, count, bits)
        _, per_row, _, size, *_ = cut.numbers
        _, joined, _, height, width = cut.constants
        assert cut.grid[0] * height <= 2**31
        assert (per_row - 1) * joined * size + width <= 2**31
        whole = tiles.row_tiles(rows, cols, count, bits)
        if whole is not None:
            assert whole.grid[0] * whole.constants[3] <= 2**31
    assert tiles.tiles(last + 1, 1, 1, bits) is None
    assert tiles.tiles(1, last + 1, last + 1, bits) is None
    assert tiles.row_tiles(last + 1, 1, 1, bits) is None


@pytest.fixture
def offsets(triton, monkeypatch):
    """A function that runs one program of a kernel and returns the offsets of its accesses.

    An offset is in bytes from the first byte that program 0 touches in the same access.
    """
    if torch.cuda.is_available():
        pytest.skip("there is no interpreter on a machine with a GPU")
    triton_interpreter.apart()
    from triton.runtime import interpreter

    here = [0]
    accesses: list[np.ndarray] = []

    class Memory:
        @staticmethod
        def load(pointers, mask, _other, dtype):
            accesses.append(pointers[mask].astype(np.int64))
            return np.zeros(pointers.shape, dtype)

        @staticmethod
        def store(pointers, _values, mask):
            accesses.append(pointers[mask].astype(np.int64))

    def program_id(_builder, axis):
        number = np.array([here[0] if axis == 0 else 0], dtype=np.int32)
        return interpreter.TensorHandle(number, interpreter.tl.int32)

    monkeypatch.setattr(interpreter, "_interpreter", Memory)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", program_id)

    def run(kernel, program: int, arguments) -> list[np.ndarray]:
        found = []
        for at in (0, program):
            here[0] = at
            accesses.clear()
            kernel[(1,)](*arguments)
            found.append(list(accesses))
        return [b - a.min() for a, b in zip(*found, strict=True) if a.size and b.size]

    return run


def rows_of(kernel: str) -> tuple[object, int, tuple[object, ...]]:
    """A kernel over ROWS rows in shares of three tiles, rows of a tile, and its arguments."""
    from mesa_train.kernels.triton import norm, scale

    x, weight = torch.zeros(4, COLS), torch.zeros(COLS)
    codes, scales = reference.affine_encode(x, 8, COLS, False, 0)
    parts = torch.zeros(2, COLS)
    if kernel == "norm":
        tensors = x, codes, scales, torch.zeros(4), weight, x, parts
        numbers = ROWS, COLS, 1, COLS, COLS, COLS, 1, 3
        return norm._rows, 16, (*tensors, 0, *numbers, COLS, True, 8, 16, COLS, True)
    tensors = x, weight, x, x, parts
    return scale._rows, 16, (*tensors, ROWS, COLS, COLS, 1, 3, 16, COLS)


@pytest.mark.parametrize("name", ["norm", "scale"])
def test_column_sums_touch_no_row_beyond_the_last(offsets, name):
    kernel, height, arguments = rows_of(name)
    count = -(-ROWS // height)
    programs = -(-count // 3)
    assert programs * 3 * height > 2**31  # the tiles behind the last row are beyond an int32
    touched = offsets(kernel, programs - 1, arguments)
    assert all((t >= 0).all() for t in touched)
    most = max(t.max() for t in touched)
    assert (ROWS - 3 * height) * COLS * 4 <= most < ROWS * COLS * 4


def test_codes_of_the_largest_matrix_touch_no_row_beyond_the_last(offsets):
    from mesa_train.kernels.triton import encode, tiles

    rows = tiles._LAST
    cut = tiles.tiles(rows, 1, 1, 8)
    codes, scales = torch.zeros(4, 1, dtype=torch.uint8), torch.zeros(4, 1, 2, dtype=torch.bfloat16)
    arguments = (torch.zeros(4, 1), None, None, codes, scales, 0)
    arguments = (*arguments, *cut.numbers, 1, 1, *cut.constants, False)
    touched = offsets(encode._encode, cut.grid[0] - 1, arguments)
    assert all((t >= 0).all() for t in touched)
    assert max(t.max() for t in touched) == rows * 4 - 4


def test_the_pair_refuses_rows_that_its_last_tiles_would_overflow(triton, monkeypatch):
    from mesa_train.kernels.triton import schemas as triton_schemas

    triton_interpreter.apart()
    from mesa_train.kernels.triton import pair

    rows = 2**31 - 40000
    with torch.device("meta"):
        grad, codes = torch.empty(rows, 1), torch.empty(rows, 1, dtype=torch.uint8)
        scales = torch.empty(rows, 1, 2, dtype=torch.bfloat16)
    # One program has no tile behind the last row. 999 programs of 525 tiles have 196.
    for most, refused in ((1, False), (1000, True)):
        monkeypatch.setattr(pair, "programs_at_once", lambda *_, most=most: most)
        found = pair.activation_pair_sum.__wrapped__(grad, codes, scales, 8, "gelu")
        assert (found is triton_schemas.activation_pair_sum) == refused
