"""Carry and replay: a segment goes on where the one before ended."""

from dataclasses import replace

import pytest
import torch

from model.cache import KVCache
from model.carry import Carry, CarryError
from tests.model.conftest import SETTINGS, denoiser, render, rms, run_cells

CUT, END = 8, 20

SEAM = 0.005
"""Largest difference of the first block after the cut, as a share of the picture; 0.003 is what is seen."""


@pytest.fixture(scope="module")
def uncut(dit, conditions):
    return render(denoiser(dit), conditions, END)


@pytest.fixture(scope="module")
def carry(dit, conditions) -> Carry:
    first = denoiser(dit)
    render(first, conditions, CUT)
    return first.carry()


def resumed(dit, conditions, carry, end=END):
    second = denoiser(dit)
    second.open(conditions, carry.first_block, end, carry)
    return run_cells(second)


def seam(clean, uncut):
    """Difference to the uncut video per block, as a share of its rms."""
    return [rms(clean[block] - uncut[block], uncut[block]) for block in sorted(clean)]


def test_first_block_after_a_cut_is_that_of_the_uncut_video_and_the_rest_fades(dit, conditions, uncut, carry):
    differences = seam(resumed(dit, conditions, carry), uncut)
    assert differences[0] < SEAM
    assert max(differences[8:]) < differences[0]
    assert max(differences[8:]) < 0.001


def test_replay_is_deterministic(dit, conditions, carry):
    once, again = (resumed(dit, conditions, carry, CUT + 2) for _ in range(2))
    assert all(torch.equal(once[block], again[block]) for block in once)


def test_caches_that_held_another_video_do_not_show(dit, conditions, carry):
    used = denoiser(dit)
    render(used, replace(conditions, reference=conditions.reference + 0.5), 6)
    used.open(conditions, CUT, CUT + 2, carry)
    expected = resumed(dit, conditions, carry, CUT + 2)
    assert all(torch.equal(x, expected[block]) for block, x in run_cells(used).items())


def test_replayed_blocks_are_not_delivered(dit, conditions, carry):
    assert sorted(resumed(dit, conditions, carry, CUT + 2)) == [CUT, CUT + 1]


def test_without_a_carry_the_seam_is_seen(dit, conditions, uncut, carry):
    """Wrong: the second segment starts from the portrait with nothing before it."""
    fresh = denoiser(dit)
    fresh.open(conditions, CUT, CUT + 2)
    assert seam(run_cells(fresh), uncut)[0] > 10 * SEAM


def test_ring_slots_that_are_still_empty_must_not_be_attended(dit, conditions, uncut, carry, monkeypatch):
    visible = KVCache.visible
    monkeypatch.setattr(
        KVCache, "visible", lambda self, step, blocks: visible(self, step, self.layout.blocks)
    )
    assert seam(resumed(dit, conditions, carry, CUT + 1), uncut)[0] > SEAM


def test_the_portrait_as_reference_after_a_cut_is_seen_for_ever(dit, conditions, uncut, carry):
    old = replace(carry, reference=conditions.reference)
    assert min(seam(resumed(dit, conditions, old), uncut)) > 4 * SEAM


def test_motion_goes_on_from_the_carry(dit, conditions, carry):
    moved = replace(carry, motion=carry.motion.roll(3, dims=1))
    expected = resumed(dit, conditions, carry, CUT + 1)
    assert not torch.equal(resumed(dit, conditions, moved, CUT + 1)[CUT], expected[CUT])
    still = replace(conditions, motion=conditions.motion.roll(3, dims=1))
    assert torch.equal(resumed(dit, still, carry, CUT + 1)[CUT], expected[CUT])


def test_replayed_blocks_take_their_own_speech(dit, conditions, uncut, carry):
    """A segment's features begin with its first replayed block."""
    window = replace(conditions, speech=conditions.speech[:, :, 12 * (CUT - 4) :], speech_first_block=CUT - 4)
    expected = resumed(dit, conditions, carry, CUT + 1)
    assert torch.equal(resumed(dit, window, carry, CUT + 1)[CUT], expected[CUT])
    short = replace(window, speech=window.speech[:, :, 12:], speech_first_block=CUT - 3)
    with pytest.raises(ValueError, match="must span blocks 4"):
        resumed(dit, short, carry)


def test_a_chain_of_segments_carries_on(dit, conditions, uncut, carry):
    second = denoiser(dit)
    second.open(conditions, CUT, CUT + 4, carry)
    clean = run_cells(second)
    third = resumed(dit, conditions, second.carry())
    assert sorted(clean | third) == list(range(CUT, END))
    assert max(seam(third, uncut)) < SEAM


def test_a_cut_after_the_first_clip_hands_on_the_first_latent(dit, conditions, uncut):
    first = denoiser(dit)
    clean = render(first, conditions, 4)
    carry = first.carry()
    assert torch.equal(carry.reference, clean[0][:, :1])
    with pytest.raises(ValueError, match="first_latent_and_motion"):
        one_clip(dit, conditions, "first_latent_and_motion").carry()
    motion = conditions.motion + 1
    with_motion = one_clip(dit, conditions, "first_latent_and_motion").carry(motion)
    assert torch.equal(with_motion.motion, motion)
    kept = one_clip(dit, conditions, "keep").carry()
    assert torch.equal(kept.reference, conditions.reference)


def one_clip(dit, conditions, reference):
    first = denoiser(dit, reference=reference)
    render(first, conditions, 4)
    return first


def test_latents_for_the_decoder_are_the_last_38(carry, uncut, conditions):
    clean = torch.cat([uncut[block] for block in range(CUT)], dim=1)
    assert carry.latents.shape[1] == 31
    assert torch.equal(carry.latents, torch.cat((conditions.motion[:, :7], clean), dim=1))


def test_latents_for_the_decoder_stop_growing(dit, conditions, uncut):
    first = denoiser(dit)
    render(first, conditions, 16)
    clean = torch.cat([uncut[block] for block in range(16)], dim=1)
    assert torch.equal(first.carry().latents, clean[:, -38:])


def test_carry_survives_bytes(carry):
    back = Carry.from_bytes(carry.to_bytes())
    assert back.to_bytes() == carry.to_bytes()
    assert (back.settings, back.first_block, back.origin_block) == (SETTINGS, CUT, 0)
    for name in ("inputs", "reference", "motion", "latents"):
        assert torch.equal(getattr(back, name), getattr(carry, name))


def test_truncated_carry_is_an_error(carry):
    with pytest.raises(CarryError, match="not a carry"):
        Carry.from_bytes(carry.to_bytes()[:-100])


def test_carry_of_another_schema_is_refused(carry, monkeypatch):
    data = carry.to_bytes()
    monkeypatch.setattr("model.carry.SCHEMA", 2)
    with pytest.raises(CarryError, match="schema=1: this version reads 2"):
        Carry.from_bytes(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_solver", "unipc"),
        ("sample_steps", 3),
        ("sample_shift", 5.0),
        ("base_seed", 1),
        ("infer_frames", 24),
    ],
)
def test_carry_of_other_settings_is_refused_by_name(dit, conditions, carry, field, value):
    other = denoiser(dit, **{field: value})
    with pytest.raises(CarryError, match=f"{field}={value!r}: the segment before was made with"):
        other.open(conditions, CUT, END, carry)


def test_carry_of_another_place_is_refused(dit, conditions, carry):
    with pytest.raises(CarryError, match="first_block=12: the carry goes on at block 8"):
        denoiser(dit).open(conditions, 12, END, carry)


def test_carry_of_an_unfinished_or_uneven_segment_is_refused(dit, conditions):
    first = denoiser(dit)
    first.open(conditions, 0, 4)
    first.cell(0, 0)
    with pytest.raises(ValueError, match="finished segment of whole clips"):
        first.carry()
    render(first, conditions, 3)
    with pytest.raises(ValueError, match="finished segment of whole clips"):
        first.carry()


def test_carry_holds_no_caches(carry):
    """It grows with the clip and the decoder's history and not with the lesson."""
    assert len(carry.to_bytes()) < 4 * (16 + 8) * 16 * 3 * 12 * 8 * 4
    assert carry.inputs.shape == (4, 4, 16, 3, 12, 8)
