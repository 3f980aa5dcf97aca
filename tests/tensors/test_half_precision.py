import numpy as np
import pytest

from curvd.errors import InvalidSpec
from curvd.tensors.half_precision import narrow, widen


def back(bits, dtype, out_dtype=np.float32):
    out = np.empty(bits.size, out_dtype)
    widen(bits.view(np.uint8), dtype, out)
    return out


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (-0.0, -0.0),
        (1 + 2.0**-8, 1.0),  # a tie, to even: down
        (1 + 3 * 2.0**-8, 1 + 2.0**-6),  # a tie, to even: up
        (1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-7),
        (2.0**-130, 2.0**-130),  # subnormal
        (3.0e38, 3.0041e38),
    ],
)
def test_bfloat16_rounds_to_nearest_even(value, rounded):
    (result,) = back(narrow(np.array([value], np.float32), "BF16"), "BF16")
    assert result == pytest.approx(rounded, rel=1e-4)
    if value < 2:
        assert result == rounded
        assert np.signbit(result) == np.signbit(value)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("own", [np.float32, np.float64])
def test_no_value_is_further_off_than_half_a_step(dtype, own):
    values = np.random.default_rng(0).standard_normal(10_001).astype(own)
    bits = narrow(values, dtype)
    result = back(bits, dtype, own)
    digits = 8 if dtype == "BF16" else 11
    assert np.all(np.abs(result - values) <= np.abs(values) * 2.0**-digits + 2.0**-25)
    np.testing.assert_array_equal(narrow(result, dtype), bits)  # nothing more is lost


def test_what_is_not_finite_stays_what_it_is():
    values = np.array([np.inf, -np.inf, np.nan], np.float32)
    for dtype in ("BF16", "F16"):
        np.testing.assert_array_equal(back(narrow(values, dtype), dtype), values)


@pytest.mark.parametrize(("dtype", "value"), [("F16", 65520.0), ("BF16", 3.4e38)])
def test_what_does_not_fit_is_an_error(dtype, value):
    with pytest.raises(InvalidSpec, match=f"does not fit {dtype}"):
        narrow(np.array([1.0, value], np.float32), dtype)


def test_strides_do_not_matter():
    values = np.arange(20, dtype=np.float32)[::2]
    for dtype in ("BF16", "F16"):
        np.testing.assert_array_equal(back(narrow(values, dtype), dtype), values)
