"""Every layout and type goes out and comes back; every mistake is named."""

import numpy as np
import pytest

from curvd.contract.enums import Dtype
from curvd.contract.layout import ParameterLayout
from curvd.errors import InvalidSpec, InvalidVector
from curvd.tensors.vectors import arrange, operand, split, vector_dtype

LAYOUT = ParameterLayout.of({"w": (2, 3), "b": (3,), "s": ()})
P = 10
ROWS = np.arange(4 * P, dtype=np.float64).reshape(4, P)


def sent(value, dtype=Dtype.FLOAT64, **options):
    """What goes over the wire, as one array; and the operand."""
    v = operand(value, LAYOUT, dtype, **options)
    values = list(v.values())
    assert all(part.ndim == 1 for part in values)
    return np.concatenate(values or [np.empty(0)]).reshape(v.shape), v


def tree(rows, kind):
    parts = split(rows, LAYOUT)
    if rows.ndim == 2:
        parts = [np.moveaxis(p, 0, -1) for p in parts]
    if kind == "dict":
        return dict(zip(reversed(LAYOUT.names), reversed(parts), strict=True))
    return kind(parts)


@pytest.mark.parametrize("kind", [list, tuple, "dict"])
@pytest.mark.parametrize("rows", [ROWS[0], ROWS], ids=["vector", "columns"])
def test_trees_are_laid_out_row_by_row_and_come_back(kind, rows):
    value = tree(rows, kind)
    wire, v = sent(value)
    np.testing.assert_array_equal(wire, rows)
    back = v.restore(rows)
    assert type(back) is type(value)
    if kind == "dict":
        assert list(back) == list(value)
        back, value = back.values(), value.values()
    for a, b in zip(back, value, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "value",
    [
        np.ascontiguousarray(ROWS.T),
        ROWS.T,
        np.repeat(ROWS, 2, axis=0).T[:, ::2],
        ROWS.T.astype(">f8"),
        np.broadcast_to(ROWS.T[:, :1], (P, 4)),
    ],
    ids=["C", "F", "strided", "big-endian", "broadcast"],
)
def test_any_memory_layout_of_a_matrix_is_taken(value):
    wire, v = sent(value)
    np.testing.assert_array_equal(wire, value.T)
    np.testing.assert_array_equal(v.restore(wire), value)


def test_rows_lead_on_the_left_of_an_operator():
    wire, v = sent(ROWS, leading=True)
    np.testing.assert_array_equal(wire, ROWS)
    assert v.restore(wire) is wire
    leaves = split(ROWS, LAYOUT)
    wire, v = sent(leaves, leading=True)
    np.testing.assert_array_equal(wire, ROWS)
    np.testing.assert_array_equal(v.restore(wire)[0], leaves[0])


def test_the_operand_and_the_result_are_views():
    matrix = ROWS.T.copy()
    _, v = sent(matrix)
    assert all(np.shares_memory(part, matrix) for part in v.values())
    assert np.shares_memory(v.restore(ROWS), ROWS)
    assert all(np.shares_memory(leaf, ROWS) for leaf in split(ROWS, LAYOUT))


def test_strided_columns_are_gathered_a_piece_at_a_time():
    layout = ParameterLayout.of({"w": (1000, 600), "b": (5,)})
    matrix = np.random.default_rng(0).standard_normal((layout.size, 2))
    for value in (matrix, [matrix[:600_000].reshape(1000, 600, 2), matrix[600_000:]]):
        v = operand(value, layout, Dtype.FLOAT64)
        parts = list(v.values())
        assert max(part.nbytes for part in parts) <= 2 << 20
        assert all(np.shares_memory(part, matrix) for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), matrix.T.ravel())


def test_no_columns_is_an_operand():
    wire, v = sent(np.empty((P, 0)))
    assert wire.shape == (0, P)
    assert v.restore(wire).shape == (P, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.ones(9), r"the vector has shape \[9\]; expected \[10\] or \[10, K\]"),
        (np.ones((4, P)), r"has shape \[4, 10\]; expected .*, columns last"),
        (np.float64(1), "a vector is a NumPy array or torch tensor, or a list"),
        (np.array(1.0), r"the vector has shape \[\]"),
        ("text", "got str"),
        ([np.ones(6)], "got a list of 1 arrays; the session has 3 parameters: w, b, s"),
        (
            [np.ones(6), np.ones(3), np.ones(())],
            r"item 0 \(parameter 'w'\) has shape \[6\]; expected \[2, 3\] or \[2, 3, K\]",
        ),
        (
            [np.ones((2, 3, 5)), np.ones((3, 4)), np.ones(5)],
            r"item 0 \(parameter 'w'\) has 5 columns, but item 1 \(parameter 'b'\) has 4",
        ),
        (
            [np.ones((2, 3)), np.ones((3, 4)), np.ones(())],
            r"has no column axis, but item 1 \(parameter 'b'\) has 4 columns",
        ),
        ([np.ones((2, 3)), [1, 2, 3], np.ones(())], "item 1 .* is a list, not a NumPy"),
        (
            {"w": np.ones((2, 3)), "bias": np.ones(3)},
            "missing: b, s; unknown: bias",
        ),
        (
            {"w": np.ones((2, 3)), "b": np.ones(4), "s": np.ones(())},
            r"parameter 'b' has shape \[4\]; expected \[3\] or \[3, K\]",
        ),
    ],
)
def test_a_wrong_shape_or_name_is_named(value, text):
    with pytest.raises(InvalidVector, match=text):
        operand(value, LAYOUT, Dtype.FLOAT64)


@pytest.mark.parametrize(
    ("dtype", "session", "text"),
    [
        (
            "f4",
            Dtype.FLOAT64,
            "float32, but the session computes in float64 and takes "
            r"float64: pass it with .astype\(np.float64\)",
        ),
        ("f8", Dtype.FLOAT32, "takes float32"),
        ("f8", Dtype.BFLOAT16, "computes in bfloat16 and takes float32"),
        ("i8", Dtype.FLOAT64, "the vector is int64"),
        ("c16", Dtype.FLOAT64, "the vector is complex128"),
        ("?", Dtype.FLOAT32, "the vector is bool"),
        ("O", Dtype.FLOAT32, "the vector is object"),
    ],
)
def test_a_wrong_element_type_comes_with_its_remedy(dtype, session, text):
    with pytest.raises(InvalidVector, match=text):
        operand(np.ones(P, dtype), LAYOUT, session)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda torch: np.ones(P) + 0j, r"takes float64: multiply \.real and \.imag"),
        (
            lambda torch: torch.ones(P) + 0j,
            r"takes float64: multiply \.real and \.imag",
        ),
        (lambda torch: np.array(["a"] * P), "takes float64: pass an array of numbers"),
        (lambda torch: np.ma.masked_array(np.ones(P), mask=True), r"masked: .*filled"),
        (lambda torch: torch.empty(P, device="meta"), "on the meta device"),
        (lambda torch: torch.eye(P).to_sparse()[0], r"sparse: pass \.to_dense"),
    ],
)
def test_what_has_not_all_its_numbers_is_refused(value, text):
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidVector, match=text):
        operand(value(torch), LAYOUT, Dtype.FLOAT64)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_found(bad):
    v = np.zeros(P)
    v[7] = bad
    with pytest.raises(InvalidVector, match=rf"index 7 \(parameter 'b'\) is {bad};"):
        operand(v, LAYOUT, Dtype.FLOAT64)
    V = np.zeros((P, 3))
    V[9, 2] = bad
    with pytest.raises(InvalidVector, match=r"\(parameter 's'\) is .* in column 2"):
        operand(V, LAYOUT, Dtype.FLOAT64)
    with pytest.raises(InvalidVector, match=r"item 1 \(parameter 'b'\) is"):
        operand(split(v, LAYOUT), LAYOUT, Dtype.FLOAT64)


def test_the_largest_finite_values_are_finite():
    v = np.full(P, np.finfo(np.float32).max, np.float32)
    operand(v, LAYOUT, Dtype.FLOAT32)


def test_gradients_are_arranged_in_every_layout():
    row = ROWS[0]
    assert arrange(row, LAYOUT, "flat") is row
    assert [a.shape for a in arrange(row, LAYOUT, "list")] == [(2, 3), (3,), ()]
    assert list(arrange(row, LAYOUT, "dict")) == ["w", "b", "s"]
    with pytest.raises(
        InvalidSpec, match="unknown layout 'tree'; known: flat, list, dict"
    ):
        arrange(row, LAYOUT, "tree")


def test_bfloat16_sessions_take_float32():
    assert vector_dtype(Dtype.BFLOAT16) == np.float32
    assert sent(ROWS[0].astype("f4"), Dtype.BFLOAT16)[0].dtype == np.float32


@pytest.mark.parametrize("kind", ["flat", "columns", "list", "dict"])
def test_torch_comes_back_as_torch(kind):
    torch = pytest.importorskip("torch")
    rows = ROWS if kind == "columns" else ROWS[0]
    value = torch.from_numpy(rows.T.copy()).requires_grad_()
    if kind == "list":
        value = [torch.from_numpy(a) for a in split(rows, LAYOUT)]
    elif kind == "dict":
        parts = map(torch.from_numpy, split(rows, LAYOUT))
        value = dict(zip(LAYOUT.names, parts, strict=True))
    wire, v = sent(value)
    np.testing.assert_array_equal(wire, rows)
    back = v.restore(rows)
    leaves = {"list": back, "dict": back.values() if kind == "dict" else ()}.get(
        kind, [back]
    )
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert not any(leaf.requires_grad for leaf in leaves)


def test_bfloat16_tensors_travel_as_float32_and_come_back():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(P, dtype=torch.bfloat16)
    wire, v = sent(tensor, Dtype.BFLOAT16)
    assert wire.dtype == np.float32
    assert v.restore(wire).dtype == torch.bfloat16
    with pytest.raises(InvalidVector, match=r"is bfloat16, .* \.to\(torch\.float32\)"):
        operand(tensor, LAYOUT, Dtype.FLOAT32)


def test_a_tensor_of_another_type_comes_with_its_remedy():
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidVector, match=r"is float32, .* \.to\(torch\.float64\)"):
        operand(torch.ones(P), LAYOUT, Dtype.FLOAT64)
