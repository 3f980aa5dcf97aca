"""What is refused before the queue, and what the message names."""

import numpy as np
import pytest

from curvd.contract.enums import Dtype
from curvd.contract.layout import ParameterLayout
from curvd.errors import InvalidSpec, InvalidVector, LimitExceeded
from curvd.tensors.safetensors_header import TensorHeader
from curvd_server.config import LimitsConfig
from curvd_server.service import validation
from curvd_server.storage import finite_values

LAYOUT = ParameterLayout.of({"a": (2,), "empty": (0,), "b": (3,)})


def operand(
    shape, dtype="F32", name="v", *, matrix=True, session=Dtype.FLOAT32, **limits
):
    header = {name: TensorHeader(dtype, shape, 0)}
    return validation.check_operand(
        header,
        matrix=matrix,
        layout=LAYOUT,
        dtype=session,
        limits=LimitsConfig(**limits),
    )


def test_a_right_operand_passes():
    assert operand((7, 5)) == 7
    assert operand((0, 5)) == 0
    assert operand((5,), matrix=False) == 1
    assert operand((7, 5), "F64", session=Dtype.FLOAT64) == 7
    assert operand((7, 5), "F32", session=Dtype.BFLOAT16) == 7


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"shape": (7, 6)}, r"shape \[7, 6\]; this session's is \[K, 5\]"),
        ({"shape": (5,)}, r"shape \[5\]; this session's is \[K, 5\]"),
        ({"shape": (1, 5), "matrix": False}, r"this session's is \[5\]"),
        ({"shape": (1, 5), "dtype": "F64"}, "element type F64; this session's is F32"),
        ({"shape": (1, 5), "dtype": "I32"}, "element type I32"),
        (
            {"shape": (1, 5), "name": "w"},
            "one tensor named 'v'; the tensors sent are 'w'",
        ),
    ],
)
def test_a_wrong_operand_is_named(arguments, match):
    with pytest.raises(InvalidVector, match=match):
        operand(**arguments)


def test_an_operand_has_limits():
    with pytest.raises(LimitExceeded, match="3 columns; the limit is 2"):
        operand((3, 5), columns=2)
    with pytest.raises(LimitExceeded, match="60 bytes; the limit is 59"):
        operand((3, 5), operand_bytes=59)


@pytest.mark.parametrize(
    ("index", "value", "parameter"),
    [(1, np.nan, "a"), (2, np.inf, "b"), (4, -np.inf, "b")],
)
def test_what_is_not_finite_is_named_by_column_and_parameter(index, value, parameter):
    columns = np.zeros((3, 5), np.float32)
    validation.check_finite(columns, layout=LAYOUT)
    columns[1, index] = value
    with pytest.raises(InvalidVector, match="column 11 has") as caught:
        validation.check_finite(columns, layout=LAYOUT, first=10 * LAYOUT.size)
    assert caught.value.metadata == {
        "column": "11",
        "index": str(index),
        "parameter": parameter,
    }


def test_data_is_finite_in_every_type():
    finite_values.check_finite_data("n", "I64", np.ones((3, 2), np.int64))
    half = np.array([[0x3F80], [0x7F80]], np.uint16)  # 1 and infinity in bfloat16
    finite_values.check_finite_data("h", "BF16", half[:1])
    with pytest.raises(InvalidSpec, match="tensor 'h' is not finite in data point 1"):
        finite_values.check_finite_data("h", "BF16", half)
    wide = np.ones((4, 3))
    wide[2, 1] = np.nan
    with pytest.raises(InvalidSpec, match="data point 2"):
        finite_values.check_finite_data("x", "F64", wide)


def test_what_an_upload_announces_is_judged_first():
    limits = LimitsConfig(upload_bytes=100)
    validation.check_upload(100, 0, limits)
    with pytest.raises(
        LimitExceeded, match="101 bytes exceeds this server's limit of 100"
    ):
        validation.check_upload(101, 0, limits)
    for total, offset in ((0, 0), (-1, 0), (50, 51), (50, -1)):
        with pytest.raises(InvalidSpec, match="offset within it"):
            validation.check_upload(total, offset, limits)
