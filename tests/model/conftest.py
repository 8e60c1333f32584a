"""The recorded transformer, and its loop as lessons use it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.config import DiTConfig
from model.denoise import Conditions, Denoiser, DenoiseSettings
from model.dit import CausalDiT
from model.golden.recorded import load_dit
from model.schedule import calls

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def config() -> DiTConfig:
    return DiTConfig.from_file(GOLDEN / "dit_config.json")


@pytest.fixture(scope="session")
def dit() -> CausalDiT:
    return load_dit(GOLDEN, "cpu")


@pytest.fixture(scope="session")
def conditions() -> Conditions:
    """The recorded inputs; the recorded speech is repeated to last for 24 blocks."""
    inputs = load_file(GOLDEN / "dit_block.safetensors")
    return Conditions(
        text=inputs["input.context"],
        negative_text=None,
        reference=inputs["input.ref_latents"][0],
        motion=inputs["input.motion_latents"][0],
        speech=inputs["input.audio_emb"][0].repeat(1, 1, 2),
        speech_first_block=0,
    )


SETTINGS = DenoiseSettings(
    infer_frames=48,
    sample_steps=4,
    sample_solver="euler",
    sample_shift=3.0,
    sample_guide_scale=0.0,
    base_seed=420,
    reference="first_latent",
)


def small(heads: int, head_dim: int, layers: tuple[int, ...]) -> DiTConfig:
    """Dimensions that are not those of the recording."""
    return DiTConfig(
        dim=heads * head_dim,
        num_heads=heads,
        ffn_dim=2 * heads * head_dim + 8,
        freq_dim=16,
        num_layers=3,
        in_dim=16,
        out_dim=16,
        cond_dim=16,
        text_dim=24,
        text_len=11,
        audio_dim=12,
        audio_inject_layers=layers,
        num_audio_token=3,
        num_wav2vec_layers=5,
    )


def denoiser(dit: CausalDiT, **changes: Any) -> Denoiser:
    """For the recorded size, with `changes` to the default settings."""
    return Denoiser(dit, replace(SETTINGS, **changes), 12, 8, "sdpa")


def run_cells(denoiser: Denoiser, motion: Tensor | None = None) -> dict[int, Tensor]:
    """All calls of the open segment in order; clean latents per block."""
    segment, settings = denoiser.segment, denoiser.settings
    carried, clean, state = segment.first_block - segment.first_cell, {}, None
    order = calls(
        segment.first_block,
        segment.end_block,
        carried,
        settings.sample_steps,
        denoiser.blocks_per_clip,
        settings.reference,
    )
    for call in order:
        if call.kind == "prefill":
            denoiser.prefill(motion=motion)
            continue
        state = denoiser.cell(call.block, call.step, state if call.step else None)
        if call.step == settings.sample_steps - 1 and not call.replay:
            clean[call.block] = state.x.clone()
    return clean


def render(denoiser: Denoiser, conditions: Conditions, end_block: int) -> dict[int, Tensor]:
    """A video of `end_block` blocks from its beginning, without a cut."""
    denoiser.open(conditions, 0, end_block)
    return run_cells(denoiser)


def rms(difference: Tensor, of: Tensor) -> float:
    """Root mean square of a difference, as a share of that of `of`."""
    return (difference.square().mean() / of.square().mean()).sqrt().item()
