import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.size import parse_size, true_size
from stages.types import RowError


@pytest.mark.parametrize("text", ["704*384", "704x384", "704X384", " 704 * 384 ", "704 X 384"])
def test_accepted_forms_mean_the_same(text):
    assert parse_size(text) == (704, 384)


@pytest.mark.parametrize(
    "text", ["704:384", "704", "", "704*384*3", "-704*384", "704.0*384", "a*b", "704**384", "٧٠٤*٣٨٤"]
)
def test_other_forms_are_a_row_error_that_shows_the_form(text):
    with pytest.raises(RowError, match=r"704\*384") as caught:
        parse_size(text)
    assert (caught.value.field, caught.value.value) == ("size", text)


@pytest.mark.parametrize(("text", "rule"), [("0*0", "at least 64"), ("99999*99999", "at most 2088960")])
def test_size_out_of_range_is_a_row_error(text, rule):
    with pytest.raises(RowError, match=rule):
        parse_size(text)


@pytest.mark.parametrize(
    ("picture", "area", "expected"),
    [
        ((720, 400), (720, 400), (704, 384)),
        ((1920, 1080), (720, 400), (704, 384)),
        ((720, 400), (704, 384), (704, 384)),
        ((720, 400), (688, 368), (640, 384)),
        ((400, 720), (688, 368), (384, 640)),
        ((2000, 2000), (720, 400), (512, 512)),
        ((2000, 2000), (688, 368), (448, 448)),
        ((300, 300), (720, 400), (320, 320)),  # Not enlarged beyond the next multiple of 64.
        ((512, 512), (128, 128), (128, 128)),
    ],
)
def test_true_size_is_upstreams(picture, area, expected):
    assert true_size(picture[0], picture[1], math.prod(area)) == expected


@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(64 * 64, 1280 * 720))
def test_true_size_is_multiples_of_64_within_the_area(width, height, area):
    try:
        w, h = true_size(width, height, area)
    except ValueError:
        assert max(width, height) > 30 * min(width, height)
        return
    assert w % 64 == h % 64 == 0
    assert 0 < w * h <= area
