"""Carry and replay: a segment goes on where the one before ended."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from model.cache import KVCache
from model.carry import Carry, CarryError
from model.denoise import Conditions, Denoiser
from model.dit import CausalDiT
from tests.model.conftest import SETTINGS, denoiser, render, rms, run_cells, small
from tests.model.test_dimensions import random_dit

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


@pytest.fixture(
    scope="module",
    params=[(small(3, 20, (1, 2)), (8, 10)), (small(5, 16, (0, 2)), (8, 14))],
    ids=["3-heads-of-20", "5-heads-of-16"],
)
def other(request) -> tuple[CausalDiT, Conditions, tuple[int, int]]:
    """A random transformer of other dimensions, what it renders, and the size of its latents."""
    config, (height, width) = request.param
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    portrait = draw(16, 1, height, width), draw(16, 19, height, width)
    return (
        random_dit(config),
        Conditions(draw(9, 24), None, *portrait, draw(5, 12, 12 * END), 0),
        (height, width),
    )


@pytest.mark.parametrize("cut", [4, 8, 12])
def test_seams_of_other_dimensions(other, cut):
    dit, conditions, size = other
    runs = [Denoiser(dit, SETTINGS, size[0], size[1], "sdpa") for _ in range(3)]
    uncut = render(runs[0], conditions, cut + 2)
    render(runs[1], conditions, cut)
    runs[2].open(conditions, cut, cut + 2, Carry.from_bytes(runs[1].carry().to_bytes()))
    differences = seam(run_cells(runs[2]), uncut)
    assert differences[1] <= differences[0] < 0.01
    assert (differences[0] == 0) == (cut == 4)


def test_a_later_cut_has_no_larger_seam(dit, conditions, uncut):
    first = denoiser(dit)
    render(first, conditions, 12)
    assert seam(resumed(dit, conditions, first.carry()), uncut)[0] < SEAM


@pytest.mark.parametrize("reference", ["keep", "first_latent", "first_latent_and_motion"])
def test_a_cut_after_the_first_clip_is_not_seen(dit, conditions, reference):
    """Bit-equal: nothing lies before the first clip that its replay could lack."""
    motion = conditions.motion.roll(3, dims=1) if reference == "first_latent_and_motion" else None
    whole, first, second = (denoiser(dit, reference=reference) for _ in range(3))
    whole.open(conditions, 0, 6)
    expected = run_cells(whole, motion)
    render(first, conditions, 4)
    second.open(conditions, 4, 6, Carry.from_bytes(first.carry(motion).to_bytes()))
    clean = run_cells(second)
    assert sorted(clean) == [4, 5]
    assert all(torch.equal(x, expected[block]) for block, x in clean.items())


def test_the_new_reference_while_the_first_clip_is_replayed_is_seen(dit, conditions, uncut):
    """Wrong: keys and values of the first clip were made with the portrait."""
    first = denoiser(dit)
    render(first, conditions, 4)
    carry = first.carry()
    early = replace(carry, reference=carry.next_reference)
    assert seam(resumed(dit, conditions, early, 5), uncut)[0] > 0


def test_prefill_forgotten_after_a_replayed_first_clip_is_noticed(dit, conditions):
    first, second = denoiser(dit), denoiser(dit)
    render(first, conditions, 4)
    second.open(conditions, 4, 6, first.carry())
    for block in range(4):
        for step in range(4):
            second.cell(block, step)
    with pytest.raises(ValueError, match=r"cell \(4, 0\): the second prefill comes first"):
        second.cell(4, 0)


def test_a_cut_after_the_first_clip_hands_on_both_references(dit, conditions):
    first = denoiser(dit)
    clean = render(first, conditions, 4)
    carry = first.carry()
    assert torch.equal(carry.reference, conditions.reference)
    assert torch.equal(carry.next_reference, clean[0][:, :1])
    with pytest.raises(ValueError, match="first_latent_and_motion"):
        one_clip(dit, conditions, "first_latent_and_motion").carry()
    motion = conditions.motion + 1
    with_motion = one_clip(dit, conditions, "first_latent_and_motion").carry(motion)
    assert torch.equal(with_motion.motion, conditions.motion)
    assert torch.equal(with_motion.next_motion, motion)
    kept = one_clip(dit, conditions, "keep").carry()
    assert torch.equal(kept.next_reference, conditions.reference)


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
    for name in ("inputs", "reference", "motion", "next_reference", "next_motion", "latents"):
        assert torch.equal(getattr(back, name), getattr(carry, name))


def test_truncated_carry_is_an_error(carry):
    with pytest.raises(CarryError, match="not a carry"):
        Carry.from_bytes(carry.to_bytes()[:-100])


def rewritten(carry, change):
    """The bytes of a carry after `change`(tensors, values) on what they hold."""
    data = carry.to_bytes()
    tensors = load(data)
    values = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["carry"])
    values = change(tensors, values) or values
    return save(tensors, metadata={"carry": json.dumps(values)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, v: t.__delitem__("latents"), "tensors: missing latents"),
        (lambda t, v: t.update(cache=torch.zeros(1)), "tensors: unexpected cache"),
        (lambda t, v: v.__delitem__("first_block"), "metadata: missing first_block"),
        (lambda t, v: v["settings"].__delitem__("base_seed"), "settings: missing base_seed"),
        (lambda t, v: v["settings"].update(heat=1), "settings: unexpected heat"),
        (lambda t, v: v["settings"].update(reference="painting"), "settings: reference='painting'"),
        (lambda t, v: v["settings"].update(sample_guide_scale="2"), "settings: .*not supported"),
        (lambda t, v: v.update(settings=[]), "its settings are no mapping"),
        (lambda t, v: v.update(first_block="8"), "first_block='8': must be a whole number"),
        (lambda t, v: [1], "its metadata are no mapping"),
    ],
)
def test_damaged_carry_is_an_error_that_names_the_damage(carry, change, message):
    with pytest.raises(CarryError, match=message):
        Carry.from_bytes(rewritten(carry, change))


def test_safetensors_that_are_no_carry_are_refused():
    for metadata in (None, {"format": "pt"}):
        with pytest.raises(CarryError, match="not a carry"):
            Carry.from_bytes(save({"x": torch.zeros(1)}, metadata=metadata))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("inputs", lambda x: x[:, :3], r"inputs of shape \[4, 3, .*must be \[4, 4"),
        ("inputs", lambda x: x.bfloat16(), "inputs of torch.bfloat16: must be torch.float32"),
        ("reference", lambda x: x[:, :, 1:], r"carry: reference of shape \[16, 1, 11, 8\]"),
        ("next_motion", lambda x: x[:, 1:], r"carry: next_motion of shape \[16, 18, 12, 8\]"),
        ("next_reference", lambda x: x.double(), "carry: next_reference of torch.float64"),
        ("latents", lambda x: x[:, 1:], r"carry: latents of shape \[16, 30, 12, 8\]: must be \[16, 31"),
        ("origin_block", lambda x: x + 1, "origin_block=1: must lie whole clips of 4 blocks before"),
    ],
)
def test_carry_that_does_not_fit_the_transformer_is_refused(dit, conditions, carry, name, change, message):
    with pytest.raises(CarryError, match=message):
        denoiser(dit).open(conditions, CUT, END, replace(carry, **{name: change(getattr(carry, name))}))


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
