"""Positions and rotation."""

import math

import pytest
import torch

from model.framepack import motion_positions
from model.rope import RopeTable, grid_positions, multipliers, reference_time, rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("head_dim", "split"), [(16, (4, 2, 2)), (128, (22, 21, 21)), (10, (3, 1, 1)), (18, (3, 3, 3))]
)
def test_channels_are_split_among_time_row_and_column(head_dim, split):
    start = 0
    for axis, count in enumerate(split):
        position = torch.zeros(1, 3, dtype=torch.int64)
        position[0, axis] = 1
        turned = multipliers(position, head_dim)[0, :, 1] != 0
        assert turned.nonzero().flatten().tolist() == list(range(start, start + count))
        start += count


def test_a_multiplier_is_that_of_its_formula_rounded_to_half():
    value = multipliers(torch.tensor([[1234, 0, 0]]), 16)[0, 1]
    angle = 1234 * 10000 ** (-2 / 8)
    assert (
        value.tolist()
        == torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64).half().tolist()
    )


def test_a_negative_time_is_the_conjugate():
    ahead, behind = multipliers(torch.tensor([[7, 2, 3], [-7, 2, 3]]), 16)
    assert torch.equal(behind[:4, 1], -ahead[:4, 1])
    assert torch.equal(behind[4:], ahead[4:])


def test_rotation_is_that_of_complex_numbers():
    x, turns = torch.randn(1, 5, 3, 10), multipliers(torch.randint(-9, 99, (5, 3)), 10)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(
        pairs * torch.view_as_complex(turns.double().contiguous())[:, None]
    ).flatten(-2)
    torch.testing.assert_close(rotate(x, turns).double(), expected, rtol=0, atol=1e-6)


def test_rotation_keeps_the_dtype():
    assert (
        rotate(torch.randn(1, 2, 1, 6).bfloat16(), multipliers(torch.zeros(2, 3), 6)).dtype == torch.bfloat16
    )


def test_table_has_the_multipliers_of_its_positions():
    table = RopeTable(10, (2, 5), 40_000, 50_000, CPU)
    positions = grid_positions([49_998, 49_999, 50_000], [0, 1], [0, 1, 2, 3, 4])
    assert torch.equal(table.frames(49_998, 3), multipliers(positions, 10))


@pytest.mark.parametrize("first", [39_999, 49_999])
def test_frames_outside_of_the_table_are_an_error(first):
    with pytest.raises(IndexError, match=r"lie outside 40000\.\.50000"):
        RopeTable(10, (2, 5), 40_000, 50_000, CPU).frames(first, 3)


@pytest.mark.parametrize(
    ("frame", "distance", "time"),
    [(0, 30, 30), (3, 30, 33), (0, 10, 30), (18, 10, 30), (21, 10, 31), (300, 4, 304)],
)
def test_reference_rests_and_then_goes_ahead(frame, distance, time):
    assert reference_time(frame, distance) == time


def test_motion_positions_of_a_size_that_does_not_divide():
    positions = motion_positions(12, 10, (1, 2, 16))
    assert len(positions) == 30 + 3 * 2 + 4 * 1 * 1
    assert positions[30:36].tolist() == [[-3, r, c] for r in (0, 2, 5) for c in (0, 4)]
    assert positions[36:].tolist() == [[-19, 0, 0], [-14, 0, 0], [-9, 0, 0], [-4, 0, 0]]
