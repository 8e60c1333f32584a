"""A change of what the model computes must not be taken for what the store already has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.identity import GENERATION_VERSION

REFERENCE = Path(__file__).parent / "data" / "generation.json"
TOLERANCE = 3e-4
"""Above what another CPU rounds differently, far below what another formula would change."""


def generate(weights: Path) -> list[float]:
    """A few latents of the tiny model's second clip, and a few pixels decoded from them."""
    from model.checkpoint import load_dit, load_vae
    from model.denoise import Conditions, Denoiser, DenoiseSettings
    from model.schedule import calls
    from model.tiny import settings

    torch.set_num_threads(1)
    tiny = settings(weights)
    dit, vae = load_dit(tiny), load_vae(tiny)
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(draw.standard_normal(shape).astype(np.float32))

    config = dit.config
    conditions = Conditions(
        text=normal(7, config.text_dim),
        negative_text=None,
        reference=normal(16, 1, 8, 8),
        motion=normal(16, 19, 8, 8),
        speech=normal(config.num_wav2vec_layers, config.audio_dim, 60),
        speech_first_block=0,
    )
    denoiser = Denoiser(dit, DenoiseSettings(48, 4, "euler", 3.0, 0.0, 420, "first_latent"), 8, 8, "sdpa")
    denoiser.open(conditions, 0, 5)
    state = None
    for call in calls(0, 5, 0, 4, 4, "first_latent"):
        if call.kind == "prefill":
            denoiser.prefill()
        else:
            state = denoiser.cell(call.block, call.step, state if call.step else None)
    assert state is not None
    pixels = vae.stream().push(state.x)
    return [
        round(value, 5)
        for tensor in (state.x, pixels)
        for value in tensor.flatten()[:: tensor.numel() // 24].tolist()
    ]


def test_what_the_model_computes_has_not_changed_without_another_version(weights: Path) -> None:
    """Where it fails on purpose: raise GENERATION_VERSION, then write `tests/data/generation.json` anew with
    `python -m tests.test_generation_version`."""
    known = json.loads(REFERENCE.read_text())
    assert known["version"] == GENERATION_VERSION, "the reference outputs are those of another version"
    assert generate(weights) == pytest.approx(known["values"], abs=TOLERANCE)


if __name__ == "__main__":
    import tempfile

    from model.tiny import write

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "tiny"))
        content = {"version": GENERATION_VERSION, "values": generate(Path(folder, "tiny"))}
    REFERENCE.parent.mkdir(exist_ok=True)
    REFERENCE.write_text(json.dumps(content) + "\n")
