"""The transformer's sets; here `denoise_loop`, `audio_encoder` and `framepack`: its loop and small parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.denoise import Conditions, Denoiser, DenoiseSettings
from model.dit import CausalDiT
from model.framepack import motion_positions
from model.golden import Check, compare, present
from model.golden.dit_block import dit_block
from model.golden.recorded import (
    AUDIO_ENCODER,
    ROPE,
    SIGMAS,
    TIMESTEPS,
    TOKENS,
    VELOCITY,
    Recorded,
    load_dit,
    read,
)
from model.rope import multipliers
from model.solver import Solver


def denoise_loop(folder: Path, dit: CausalDiT) -> list[Check]:
    values, recorded = read(folder, "denoise_loop")
    block_values, inputs = read(folder, "dit_block")
    scheduler = values["scheduler"]
    solver = Solver("euler", scheduler["num_inference_steps"], float(scheduler["shift"]))
    results = [
        compare("denoise_loop", "timesteps", solver.timesteps, recorded["timesteps"], TIMESTEPS),
        compare("denoise_loop", "sigmas", solver.sigmas, recorded["sigmas"], SIGMAS),
    ]
    for name, run in values["runs"].items():
        settings = DenoiseSettings(
            infer_frames=block_values["blocks_per_clip"] * dit.config.frames_per_block,
            sample_steps=scheduler["num_inference_steps"],
            sample_solver="euler",
            sample_shift=float(scheduler["shift"]),
            sample_guide_scale=0.0,
            base_seed=0,
            reference=_reference(run["second_prefill"]),
        )
        ours = _loop(dit, settings, run, recorded, inputs)
        results.append(compare("denoise_loop", f"final.{name}", ours, recorded[f"final.{name}"], VELOCITY))
    return results


def _reference(second_prefill: str | bool) -> str:
    """The setting that the recorded description of a run's second prefill stands for."""
    if not second_prefill:
        return "keep"
    with_motion = any(words in str(second_prefill) for words in ("motion = ", "and_motion"))
    return "first_latent_and_motion" if with_motion else "first_latent"


def _loop(
    dit: CausalDiT, settings: DenoiseSettings, run: dict[str, Any], recorded: Recorded, inputs: Recorded
) -> Tensor:
    """Clean latents [clips, C, frames of a clip, h, w] of a run, through the `Denoiser` as lessons use it."""
    steps, frames = settings.sample_steps, dit.config.num_frames_per_block

    def distance(_: int, block: int, step: int) -> int:
        fixed = run["relative_dist"]
        return (
            fixed if isinstance(fixed, int) else int(recorded["relative_dist_sequence"][block * steps + step])
        )

    height, width = inputs["input.noise"].shape[-2:]
    denoiser = Denoiser(dit, settings, height, width, "sdpa", distance)
    conditions = Conditions(
        text=inputs["input.context"],
        negative_text=None,
        reference=inputs["input.ref_latents"][0],
        motion=inputs["input.motion_latents"][0],
        speech=inputs["input.audio_emb"][0],
        speech_first_block=0,
    )
    blocks_per_clip = denoiser.blocks_per_clip
    denoiser.open(conditions, 0, run["clips"] * blocks_per_clip)
    finals = []
    for block in range(run["clips"] * blocks_per_clip):
        if block == blocks_per_clip and settings.reference != "keep":
            with_motion = settings.reference == "first_latent_and_motion"
            denoiser.prefill(motion=recorded["input.motion_latents_clip1"][0] if with_motion else None)
        clip, index = divmod(block, blocks_per_clip)
        state = denoiser.solver.start(inputs["input.noise"][clip][:, index * frames : (index + 1) * frames])
        for step in range(steps):
            state = denoiser.cell(block, step, state)
        finals.append(state.x.cpu())
    return torch.stack(finals).unflatten(0, (-1, blocks_per_clip)).transpose(1, 2).flatten(2, 3)


def audio_encoder(folder: Path, dit: CausalDiT) -> list[Check]:
    values, recorded = read(folder, "audio_encoder")
    block = recorded["block_features"][0]
    padded = torch.cat((block[:, :, :1].expand(-1, -1, values["prepend_frames"]), block), dim=2)
    results = []
    for suffix, features in {"": padded, "_21": recorded["features_21"][0]}.items():
        whole_TD, local_TKD = dit.casual_audio_encoder(features.to(dit.device))
        for name, ours in {"global": whole_TD[None, :, None], "local": local_TKD[None]}.items():
            results.append(
                compare("audio_encoder", name + suffix, ours, recorded[name + suffix], AUDIO_ENCODER)
            )
    heard = dit.encode_speech(block.to(dit.device)).local
    expected = recorded["local"][0, values["drop_latent_frames"] :]
    return [*results, compare("audio_encoder", "local of the block", heard, expected, AUDIO_ENCODER)]


def framepack(folder: Path, dit: CausalDiT) -> list[Check]:
    values, recorded = read(folder, "framepack")
    motion = load_file(folder / "dit_block.safetensors")["input.motion_latents"][0].to(dit.device)
    height, width = motion.shape[-2:]
    positions = motion_positions(height, width, tuple(values["zip_frame_buckets"]))
    ours = {"tokens": dit.frame_packer(motion), "tokens_short": dit.frame_packer(motion[:, -5:])}
    return [
        compare("framepack", "positions", positions, recorded["positions"], 0),
        compare(
            "framepack", "rope", multipliers(positions, dit.config.head_dim), recorded["rope_cos_sin"], ROPE
        ),
        *(compare("framepack", name, tokens, recorded[name], TOKENS) for name, tokens in ours.items()),
    ]


SETS: dict[str, Callable[[Path, CausalDiT], list[Check]]] = {
    "dit_block": dit_block,
    "denoise_loop": denoise_loop,
    "audio_encoder": audio_encoder,
    "framepack": framepack,
}


def checks(folder: Path, device: str = "cpu") -> list[Check]:
    """All quantities of the sets that are there. Errors are those of the readers."""
    return [check for name in present(folder) if name in SETS for check in run_set(name, folder, device)]


@torch.inference_mode()
def run_set(name: str, folder: Path, device: str) -> list[Check]:
    """All quantities of one of `SETS`."""
    return SETS[name](folder, load_dit(folder, device))
