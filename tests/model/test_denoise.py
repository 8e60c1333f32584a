"""The loop over cells: bits, order, guidance, conditions that do not fit, memory."""

import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.cache import CellExchange
from model.denoise import Conditions, Denoiser
from model.dit import CausalDiT
from model.golden.recorded import load_dit
from model.layers import linear
from model.noise import relative_distance
from model.solver import SolverState
from tests.model.conftest import SETTINGS, denoiser, render, rms, run_cells, small
from tests.model.test_dimensions import random_dit


@pytest.fixture(scope="module")
def video(dit, conditions):
    return render(denoiser(dit), conditions, 6)


def other_video(conditions):
    return replace(conditions, reference=conditions.reference + 0.5, speech=conditions.speech.flip(-1))


def same(ours, theirs) -> bool:
    return sorted(ours) == sorted(theirs) and all(torch.equal(ours[block], theirs[block]) for block in ours)


def test_same_video_twice_has_equal_bits(dit, conditions, video):
    once = denoiser(dit)
    assert same(render(once, conditions, 6), video)
    assert same(render(once, conditions, 6), video)


def test_another_seed_is_another_video(dit, conditions, video):
    assert not same(render(denoiser(dit, base_seed=421), conditions, 6), video)


def test_distance_of_the_reference_is_that_of_seed_block_and_step(dit, conditions, video):
    asked = []

    def recorded(seed, block, step):
        asked.append((seed, block, step))
        return relative_distance(seed, block, step)

    assert same(render(Denoiser(dit, SETTINGS, 12, 8, "sdpa", recorded), conditions, 6), video)
    assert asked == [(420, block, step) for block in range(6) for step in range(4)]
    fixed = Denoiser(dit, SETTINGS, 12, 8, "sdpa", lambda seed, block, step: 30)
    assert not same(render(fixed, conditions, 6), video)


@pytest.mark.parametrize("threads", [2, 4])
def test_number_of_threads_does_not_change_bits(dit, conditions, video, threads):
    torch.set_num_threads(threads)
    try:
        assert same(render(denoiser(dit), conditions, 6), video)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("inner", "columns"), [(80, 80), (60, 60), (30, 40), (240, 40), (288, 80), (36, 36), (512, 80), (24, 100)]
)
def test_number_of_threads_does_not_change_the_bits_of_a_product(inner, columns, dtype, threads_set):
    """Of shapes whose plain product on a CPU does change."""
    generator = torch.Generator().manual_seed(1)
    for rows in (1, 3, 9, 11, 15, 16, 22, 35, 93, 105, 128):
        sizes = (rows, inner), (columns, inner), (columns,)
        x, weight, bias = (torch.randn(size, generator=generator, dtype=dtype) for size in sizes)
        results = []
        for threads in (1, 2, 4):
            threads_set(threads)
            results.append(linear(x, weight, bias))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert torch.allclose(results[0], F.linear(x, weight, bias), rtol=0.1, atol=1e-4)


@pytest.fixture
def threads_set():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize(("heads", "head_dim", "size"), [(5, 16, (8, 14)), (3, 20, (10, 14))])
def test_number_of_threads_does_not_change_bits_of_odd_dimensions(heads, head_dim, size, threads_set):
    dit = random_dit(small(heads, head_dim, (0, 2)))
    generator = torch.Generator().manual_seed(2)
    reference, motion = (torch.randn(16, count, *size, generator=generator) for count in (1, 19))
    text, speech = torch.randn(9, 24, generator=generator), torch.randn(5, 12, 12 * 5, generator=generator)
    results = []
    for threads in (1, 2, 4):
        threads_set(threads)
        given = Conditions(text, None, reference, motion, speech, 0)
        results.append(render(Denoiser(dit, SETTINGS, size[0], size[1], "sdpa"), given, 5))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_two_videos_interleaved_have_the_bits_of_each_alone(dit, conditions, video):
    alone = render(denoiser(dit), other_video(conditions), 3)
    first, second = denoiser(dit), denoiser(dit)
    first.open(conditions, 0, 3)
    second.open(other_video(conditions), 0, 3)
    ours, theirs = {}, {}
    for block in range(3):
        state = other = None
        for step in range(4):
            state, other = first.cell(block, step, state), second.cell(block, step, other)
        assert state is not None
        assert other is not None
        ours[block], theirs[block] = state.x, other.x
    assert same(ours, {block: video[block] for block in range(3)})
    assert same(theirs, alone)


def test_wavefront_order_has_the_same_bits(dit, conditions, video):
    """Steps of different blocks do not see each other's rings."""
    wavefront = denoiser(dit, reference="keep")
    expected = render(denoiser(dit, reference="keep"), conditions, 6)
    wavefront.open(conditions, 0, 6)
    states: dict[int, SolverState] = {}
    for wave in range(6 + 3):
        for step in range(4):
            if 0 <= (block := wave - step) < 6:
                states[block] = wavefront.cell(block, step, states.get(block))
    assert same({block: state.x for block, state in states.items()}, expected)


def test_an_error_in_another_video_leaves_no_trace(dit, conditions, video, monkeypatch):
    shared = denoiser(dit)
    shared.open(other_video(conditions), 0, 3)
    shared.cell(0, 0)
    call = CellExchange.__call__

    def fail_late(self, layer, q, k, v):
        if layer == 2:
            raise RuntimeError("out of memory")
        return call(self, layer, q, k, v)

    with monkeypatch.context() as patch:
        patch.setattr(CellExchange, "__call__", fail_late)
        with pytest.raises(RuntimeError, match="out of memory"):
            shared.cell(1, 0)
    assert same(render(shared, conditions, 6), video)


def test_state_may_hop_through_pickle_between_steps(dit, conditions, video):
    hopping = denoiser(dit)
    hopping.open(conditions, 0, 1)
    state = hopping.cell(0, 0)
    for step in (1, 2, 3):
        state = hopping.cell(0, step, pickle.loads(pickle.dumps(state)))
    assert torch.equal(state.x, video[0])


def test_cells_out_of_order_are_refused(dit, conditions):
    once = denoiser(dit)
    with pytest.raises(RuntimeError, match="no segment is open"):
        once.cell(0, 0)
    once.open(conditions, 0, 2)
    with pytest.raises(ValueError, match="step 0 goes on at block 0"):
        once.cell(1, 0)
    with pytest.raises(ValueError, match="only step 0 goes without a state"):
        once.cell(0, 1)
    run_cells(once)
    with pytest.raises(ValueError, match="step 0 goes on at block 2"):
        once.cell(2, 0)


@pytest.mark.parametrize("reference", ["keep", "first_latent", "first_latent_and_motion"])
def test_reference_settings_differ_from_the_second_clip_on(dit, conditions, reference):
    once, motion = denoiser(dit, reference=reference), conditions.motion.roll(3, dims=1)
    once.open(conditions, 0, 5)
    clean = run_cells(once, motion=motion if reference == "first_latent_and_motion" else None)
    kept = render(denoiser(dit, reference="keep"), conditions, 5)
    assert torch.equal(clean[3], kept[3])
    assert torch.equal(clean[4], kept[4]) == (reference == "keep")


def test_motion_is_replaced_with_first_latent_and_motion(dit, conditions):
    results = []
    for motion in (conditions.motion, conditions.motion.roll(3, dims=1)):
        once = denoiser(dit, reference="first_latent_and_motion")
        once.open(conditions, 0, 5)
        results.append(run_cells(once, motion=motion))
    assert torch.equal(results[0][3], results[1][3])
    assert not torch.equal(results[0][4], results[1][4])


def test_prefill_outside_its_moment_is_refused(dit, conditions):
    once, moment = denoiser(dit), "its one moment is after the first clip"
    once.open(conditions, 0, 5)
    with pytest.raises(ValueError, match=f"prefill before block 0: {moment}, which here is 4"):
        once.prefill()
    run_cells(once)
    with pytest.raises(ValueError, match=f"prefill before block 5: {moment}, which here is None"):
        once.prefill()
    kept = denoiser(dit, reference="keep")
    render(kept, conditions, 4)
    with pytest.raises(ValueError, match=moment):
        kept.prefill()


def test_prefill_before_the_first_clip_has_all_of_its_steps_is_refused(dit, conditions):
    once = denoiser(dit)
    once.open(conditions, 0, 5)
    for block in range(4):
        state = None
        for step in range(3 if block == 3 else 4):
            state = once.cell(block, step, state)
    with pytest.raises(ValueError, match="prefill before block 3"):
        once.prefill()


def test_a_forgotten_prefill_is_noticed_at_the_second_clip(dit, conditions):
    once = denoiser(dit)
    once.open(conditions, 0, 5)
    for block in range(4):
        state = None
        for step in range(4):
            state = once.cell(block, step, state)
    with pytest.raises(ValueError, match=r"cell \(4, 0\): the second prefill comes first"):
        once.cell(4, 0)


def test_independent_segment_begins_a_video_of_its_own(dit, conditions):
    """Its positions start anew: only noise and distances are those of its place in the lesson."""
    early, late = denoiser(dit, reference="keep"), denoiser(dit, reference="keep")
    early.distance = late.distance = lambda seed, block, step: 30
    early.open(conditions, 0, 1)
    late.open(replace(conditions, speech_first_block=8), 8, 9)
    noise = late.solver.start(torch.randn(16, 3, 12, 8))
    assert torch.equal(early.cell(0, 0, noise).x, late.cell(8, 0, noise).x)


def test_guidance_steers_away_from_the_negative_prompt_in_silence(dit, conditions):
    other = conditions.text.flip(0) * 2
    silent = replace(conditions, text=other, speech=torch.zeros_like(conditions.speech))
    positive, negative = (one_velocity(denoiser(dit), given) for given in (conditions, silent))
    guided = one_velocity(denoiser(dit, sample_guide_scale=3.0), replace(conditions, negative_text=other))
    assert torch.equal(guided, negative + 3.0 * (positive - negative))
    hears = one_velocity(denoiser(dit), replace(conditions, text=other))
    assert not torch.equal(negative, hears)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_guidance_up_to_a_scale_of_one_is_the_plain_result(dit, conditions, scale):
    once = denoiser(dit, sample_guide_scale=scale)
    assert len(once.caches) == 1
    assert torch.equal(one_velocity(once, conditions), one_velocity(denoiser(dit), conditions))


def one_velocity(denoiser, conditions):
    """Of the second block at step 0, so that each prompt's own ring counts. x does not depend on the
    prompt."""
    denoiser.open(conditions, 0, 2)
    denoiser.cell(0, 0)
    seen, step = [], denoiser.solver.step

    def keep(state, velocity, index):
        seen.append(velocity)
        return step(state, velocity, index)

    denoiser.solver.step = keep
    denoiser.cell(1, 0)
    return seen[0]


@pytest.mark.parametrize(("scale", "negative"), [(0.0, True), (3.0, False)])
def test_negative_text_comes_with_guidance_and_only_then(dit, conditions, scale, negative):
    given = replace(conditions, negative_text=conditions.text if negative else None)
    with pytest.raises(ValueError, match="negative_text: must be given with sample_guide_scale above 1"):
        denoiser(dit, sample_guide_scale=scale).open(given, 0, 1)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_other_solvers_and_numbers_of_steps_render(dit, conditions, solver, steps):
    clean = render(denoiser(dit, sample_solver=solver, sample_steps=steps), conditions, 5)
    assert all(torch.isfinite(x).all() for x in clean.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reference": torch.zeros(16, 1, 12, 10)},
            r"reference of shape \[16, 1, 12, 10\]: must be \[16, 1, 12, 8\]",
        ),
        ({"motion": torch.zeros(16, 18, 12, 8)}, r"motion of shape .* must be \[16, 19, 12, 8\]"),
        ({"speech": torch.zeros(24, 24, 48)}, "speech of 24 layers x 24: must be 25 x 24"),
        ({"speech": torch.zeros(25, 24, 47)}, "speech of 47 frames from block 0 on: must span blocks 0..4"),
        ({"speech_first_block": 1}, "must span blocks 0..4"),
        ({"motion": torch.zeros(16, 19, 12, 8).half()}, "motion of torch.float16: must be torch.float32"),
        ({"text": torch.zeros(17, 24)}, "text of 17 tokens: must be at most 16"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(dit, conditions, change, message):
    with pytest.raises(ValueError, match=message):
        denoiser(dit).open(replace(conditions, **change), 0, 4)


@pytest.mark.parametrize("blocks", [(0, 0), (-1, 2), (3, 2)])
def test_a_segment_of_no_blocks_is_refused(dit, conditions, blocks):
    with pytest.raises(ValueError, match="must be a range of at least one block"):
        denoiser(dit).open(conditions, *blocks)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"infer_frames": 50}, (12, 8), "infer_frames=50: must be a multiple of 12"),
        ({"infer_frames": 0}, (12, 8), "infer_frames=0: must be a multiple of 12"),
        ({}, (12, 9), r"latents of 12x9: must divide into \(2, 2\) patches"),
        ({"sample_solver": "heun"}, (12, 8), "sample_solver='heun': must be one of euler, unipc, dpm"),
        ({"reference": "portrait"}, (12, 8), "reference='portrait': must be one of first_latent"),
        ({"sample_guide_scale": -1.0}, (12, 8), "sample_guide_scale=-1.0: must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(dit, settings, size, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(dit, replace(SETTINGS, **settings), size[0], size[1], "sdpa")


def test_bfloat16_stays_near_float32_with_caches_of_half_the_size(golden, conditions):
    """A stream of hidden states that is rounded at every layer; velocities and latents stay float32."""
    half, full = load_dit(golden, "cpu").bfloat16(), load_dit(golden, "cpu")
    results = []
    for dit in (half, full):
        once = denoiser(dit)
        results.append(render(once, conditions, 2))
        assert {t.dtype for c in once.caches[0] for t in c.keys_BSND.values()} == {dit.dtype}
        assert once.segment.inputs.dtype == dit.dtype
    for block in (0, 1):
        ours, expected = results[0][block], results[1][block]
        assert ours.dtype == torch.float32
        assert 0 < rms(ours - expected, expected) < 0.03


def test_replay_embeds_what_the_first_run_embedded(golden):
    """The carry keeps x in the dtype of the weights, so nothing finer may enter the network."""
    half, x = load_dit(golden, "cpu").bfloat16(), torch.randn(16, 3, 12, 8)
    assert torch.equal(half.embed(x), half.embed(x.bfloat16()))


def test_time_is_embedded_in_float32_whatever_the_weights(golden):
    half = load_dit(golden, "cpu").bfloat16()
    time = half.encode_time(857.6923)
    rounded_weights = half.float().encode_time(857.6923)
    assert torch.equal(time.embedded, rounded_weights.embedded)
    assert torch.equal(time.projected, rounded_weights.projected)


class NewStorages(TorchDispatchMode):
    """Bytes of every storage that the calls inside make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.sizes += [s.nbytes() for s in made if s.data_ptr() not in known]
        return result


def test_no_allocation_of_a_cell_grows_with_the_history(dit, conditions):
    """Not even while the rings fill: what is attended is a view."""
    once = denoiser(dit, reference="keep")
    once.open(conditions, 0, 20)
    allocated = []
    for block in range(20):
        state = once.cell(block, 0)
        with NewStorages() as mode:
            state = once.cell(block, 1, state)
        allocated.append(mode.sizes)
        for step in (2, 3):
            state = once.cell(block, step, state)
    assert len(allocated[0]) > 100
    assert all(sizes == allocated[0] for sizes in allocated)


def test_a_copy_of_what_is_attended_would_be_noticed(dit, conditions, monkeypatch):
    call = CellExchange.__call__

    def copied(self, layer, q, k, v):
        q, keys, values = call(self, layer, q, k, v)
        return q, keys.clone(), values.clone()

    monkeypatch.setattr(CellExchange, "__call__", copied)
    with pytest.raises(AssertionError):
        test_no_allocation_of_a_cell_grows_with_the_history(dit, conditions)


def count_calls(monkeypatch, name) -> list[str]:
    """Collects the method's name at every call."""
    called, method = [], getattr(CausalDiT, name)

    def counted(self, argument):
        called.append(name)
        return method(self, argument)

    monkeypatch.setattr(CausalDiT, name, counted)
    return called


def test_speech_of_a_block_does_not_keep_the_latent_steps_that_were_dropped(dit, conditions):
    heard = dit.encode_speech(conditions.speech[:, :, :12])
    for tokens in (heard.whole, heard.local):
        assert tokens.untyped_storage().nbytes() == tokens.nbytes


def test_text_is_encoded_once_per_segment(dit, conditions, monkeypatch):
    encoded = count_calls(monkeypatch, "encode_text")
    render(denoiser(dit), conditions, 5)
    assert len(encoded) == 1


def test_speech_of_a_block_is_encoded_once_and_forgotten(dit, conditions, monkeypatch):
    encoded = count_calls(monkeypatch, "encode_speech")
    once = denoiser(dit)
    render(once, conditions, 5)
    assert len(encoded) == 5
    assert once.segment.speech == {}
