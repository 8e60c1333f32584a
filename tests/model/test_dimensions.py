"""Dimensions other than the recorded ones, held to the naive float64 form of the specification."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from model.config import DiTConfig
from model.denoise import Conditions, Denoiser, DenoiseSettings
from model.dit import CausalDiT
from tests.model.naive import NaiveDiT


@contextmanager
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def random_dit(config: DiTConfig) -> CausalDiT:
    """Every parameter random, so that a path that is wired wrongly shows up."""
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        dit = CausalDiT(config)
    state = {}
    for name, parameter in dit.state_dict().items():
        value = torch.randn(parameter.shape, generator=generator)
        wide = parameter.ndim > 1 and not name.endswith(("modulation", "weights", "tokens", "mask.weight"))
        scale = parameter[0].numel() ** -0.5 if wide else 0.3
        state[name] = value * scale + (1 if "norm" in name and name.endswith("weight") else 0)
    dit.load_state_dict(state, strict=True, assign=True)
    return dit.eval()


VARIANTS = {
    # head size, layers with speech, latent height and width, steps, blocks of a clip
    "odd_patch_width_and_uneven_rope": (10, (1, 2), (8, 10), 2, 2),
    "three_steps_and_speech_after_every_layer": (18, (0, 1, 2), (10, 8), 3, 1),
    "long_ring": (6, (2,), (8, 14), 1, 3),
}


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_dimensions_follow_the_specification(variant, eps):
    head_dim, inject, (height, width), steps, blocks_per_clip = VARIANTS[variant]
    config = DiTConfig(
        dim=head_dim * 2,
        num_heads=2,
        ffn_dim=20,
        freq_dim=6,
        num_layers=3,
        in_dim=4,
        out_dim=4,
        cond_dim=4,
        text_dim=7,
        text_len=6,
        audio_dim=5,
        audio_inject_layers=inject,
        num_audio_token=2,
        num_wav2vec_layers=3,
        eps=eps,
    )
    dit, blocks = random_dit(config), blocks_per_clip + 2
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    conditions = Conditions(
        random(4, 7),
        None,
        random(4, 1, height, width),
        random(4, 19, height, width),
        random(3, 5, 12 * blocks),
        0,
    )
    settings = DenoiseSettings(12 * blocks_per_clip, steps, "euler", 3.0, 0.0, 7, "keep")
    denoiser = Denoiser(dit, settings, height, width, "sdpa", distance=_distance)
    denoiser.open(conditions, 0, blocks)
    ours = []
    for block in range(blocks):
        state = denoiser.solver.start(random(4, 3, height, width))
        for step in range(steps):
            before = state.x
            state = denoiser.cell(block, step, state)
            ours.append((block, step, before, state.x))
    expected = _naive_steps(dit, conditions, denoiser, ours, blocks_per_clip)
    for (block, step, _, after), theirs in zip(ours, expected, strict=True):
        assert (after - theirs).abs().max() < 1e-4, (block, step)


def _distance(seed: int, block: int, step: int) -> int:
    return 4 + (7 * block + 11 * step) % 27


def _naive_steps(dit, conditions, denoiser, cells, blocks_per_clip) -> list[Tensor]:
    """x after each cell, computed from our x before it."""
    sigmas = [t / 1000 for t in denoiser.solver.timesteps.double().tolist()] + [0.0]
    results = []
    with double_precision(), torch.inference_mode():
        weights = {name: weight.double() for name, weight in dit.state_dict().items()}
        naive = NaiveDiT(dit.config, weights, *conditions.reference.shape[-2:])
        text = naive.text(conditions.text.double())
        condition = naive.prefill(conditions.reference.double(), conditions.motion.double(), text)
        histories: list[list[list]] = [[[] for _ in range(dit.config.num_layers)] for _ in sigmas]
        for block, step, before, _ in cells:
            speech = conditions.speech[:, :, 12 * block : 12 * block + 12].double()
            velocity = naive.velocity(
                before.double(),
                1000 * sigmas[step],
                3 * block,
                3 * blocks_per_clip,
                _distance(0, block, step),
                speech,
                text,
                condition,
                histories[step],
            )
            results.append(before + (sigmas[step + 1] - sigmas[step]) * velocity)
    return results
