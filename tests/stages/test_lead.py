"""Frame k of the video belongs to the sound of frame k: a change of the sound, followed through the tiny
model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model import tiny
from model.checkpoint import load_dit, load_vae
from model.denoise import Conditions, Denoiser, DenoiseSettings
from model.schedule import calls
from stages.condition import frame_of_sound
from stages.decode import PRIMING_LATENTS
from stages.types import DROPPED_FRAMES, FRAMES_PER_BLOCK

BLOCKS = 3


@pytest.fixture(scope="module")
def models(weights: Path):
    torch.set_num_threads(1)
    settings = tiny.settings(weights)
    return load_dit(settings), load_vae(settings)


def video(models, sound_CLT: torch.Tensor, lead_frames: int) -> np.ndarray:
    """Frames [T, 3, H, W] of the video whose sound has these features, one column per frame of the sound."""
    dit, vae = models
    draw = torch.Generator().manual_seed(0)
    motion = torch.randn(16, 19, 8, 8, generator=draw)
    heard = frame_of_sound(np.arange(BLOCKS * FRAMES_PER_BLOCK), lead_frames)
    text = torch.randn(5, dit.config.text_dim, generator=draw)
    conditions = Conditions(text, None, motion[:, :1], motion, sound_CLT[:, :, heard], 0)
    denoiser = Denoiser(dit, DenoiseSettings(48, 4, "euler", 3.0, 0.0, 420, "keep"), 8, 8, "sdpa")
    denoiser.open(conditions, 0, BLOCKS)
    stream = vae.stream()
    stream.push(motion[:, :PRIMING_LATENTS])
    state, frames = None, []
    for call in calls(0, BLOCKS, 0, 4, 4, "keep"):
        state = denoiser.cell(call.block, call.step, state if call.step else None)
        if call.step == 3:
            frames.append(stream.push(state.x))
    return torch.cat(frames, dim=1)[:, DROPPED_FRAMES:].transpose(0, 1).numpy()


def first_frame_that_moves(models, sound_frame: int, lead_frames: int) -> int:
    config = models[0].config
    draw = torch.Generator().manual_seed(1)
    shape = (config.num_wav2vec_layers, config.audio_dim, BLOCKS * FRAMES_PER_BLOCK)
    quiet = torch.randn(shape, generator=draw)
    loud = quiet.clone()
    loud[:, :, sound_frame] += 3.0
    moved = np.abs(video(models, loud, lead_frames) - video(models, quiet, lead_frames)).max(axis=(1, 2, 3))
    return int(np.flatnonzero(moved)[0])


@pytest.mark.parametrize("block", [1, 2])
def test_the_first_sound_of_a_block_moves_its_own_frame_and_none_before(models, block):
    """Blocks are causal, so that the first frame of a block is where timing can be seen to the frame."""
    frame = block * FRAMES_PER_BLOCK - DROPPED_FRAMES
    assert first_frame_that_moves(models, frame, lead_frames=0) == frame


@pytest.mark.parametrize("block", [1, 2])
def test_with_upstreams_lead_the_picture_is_three_frames_early(models, block):
    frame = block * FRAMES_PER_BLOCK
    assert first_frame_that_moves(models, frame, lead_frames=3) == frame - 3


def test_frames_that_are_never_shown_hear_the_first_sound():
    assert frame_of_sound(np.arange(6), lead_frames=0).tolist() == [0, 0, 0, 0, 1, 2]
    assert frame_of_sound(np.arange(6), lead_frames=3).tolist() == [0, 1, 2, 3, 4, 5]
