"""The order of calls."""

import subprocess
import sys
from typing import Any

import pytest

from model.schedule import Call, calls


def order(*args, **changes):
    settings: dict[str, Any] = {"sample_steps": 2, "blocks_per_clip": 2, "reference": "first_latent"}
    return [(c.kind, c.block, c.step, c.replay) for c in calls(*args, **settings | changes)]


def test_blocks_in_order_each_with_all_of_its_steps():
    assert order(0, 2, 0) == [
        ("cell", 0, 0, False),
        ("cell", 0, 1, False),
        ("cell", 1, 0, False),
        ("cell", 1, 1, False),
    ]


@pytest.mark.parametrize("reference", ["first_latent", "first_latent_and_motion"])
def test_second_prefill_comes_right_before_the_second_clip(reference):
    got = order(0, 5, 0, reference=reference)
    assert [index for index, call in enumerate(got) if call[0] == "prefill"] == [4]
    assert got[4:6] == [("prefill", 2, 0, False), ("cell", 2, 0, False)]


def test_there_is_no_second_prefill_with_keep():
    assert all(call[0] == "cell" for call in order(0, 5, 0, reference="keep"))


def test_carried_blocks_are_replayed_first_and_nothing_is_prefilled_again():
    got = order(4, 6, 2)
    assert [call[1] for call in got] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert [call[3] for call in got] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("reference", ["first_latent", "first_latent_and_motion"])
def test_second_prefill_after_a_replayed_first_clip(reference):
    got = order(2, 4, 2, reference=reference)
    assert [call for call in got if call[0] == "prefill"] == [("prefill", 2, 0, True)]
    assert [call[1:] for call in got[3:6]] == [(1, 1, True), (2, 0, True), (2, 0, False)]
    assert all(call[0] == "cell" for call in order(2, 4, 2, reference="keep"))


def test_an_independent_segment_has_its_own_second_clip():
    assert [call[1] for call in order(4, 8, 0) if call[0] == "prefill"] == [6]


def test_every_cell_comes_after_what_it_needs():
    seen: set[Call] = set()
    for call in calls(4, 12, 4, 4, 4, "first_latent"):
        assert call.step == 0 or Call("cell", call.block, call.step - 1, call.replay) in seen
        earlier = [c for c in seen if (c.block, c.step) == (call.block - 1, call.step)]
        assert call.block == 0 or earlier
        seen.add(call)


def test_the_schedule_needs_no_torch():
    code = "import sys, model.schedule, model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
