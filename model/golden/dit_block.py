"""Set `dit_block`: a prefill, every network call of several clips, what the caches hold, one call in
detail."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attention_backend
from model.cache import CellExchange, KVCache, PrefillExchange, caches, condition_positions, token_layout
from model.dit import CausalDiT, Context
from model.golden import Check, compare
from model.golden.recorded import CACHES, ROPE, VELOCITY, Recorded, read
from model.noise import MAX_DISTANCE
from model.rope import RopeTable, multipliers, reference_time, rotate


def dit_block(folder: Path, dit: CausalDiT) -> list[Check]:
    """All quantities of the set."""
    values, recorded = read(folder, "dit_block")
    results = _prefill_checks(dit, values, recorded)
    for name in values["runs"]:
        results += _run_checks(name, dit, values, recorded)
    return results


class BlockRun:
    """Network calls as set `dit_block` makes them: own caches, given inputs, given pose."""

    def __init__(self, dit: CausalDiT, values: dict[str, Any], recorded: Recorded) -> None:
        self.dit, self.values, self.recorded = dit, values, recorded
        config, device = dit.config, dit.device
        height, width = values["latent_height"], values["latent_width"]
        self.blocks = values["blocks_per_clip"]
        layout = token_layout(config, height, width, self.blocks)
        clips = max(run["clips"] for run in values["runs"].values())
        last = reference_time(clips * values["frames_per_clip"], MAX_DISTANCE)
        self.size = height, width
        self.rope = RopeTable(config.head_dim, config.grid(height, width), 0, last, device)
        self.attend = attention_backend("sdpa", device)
        self.text = dit.encode_text(recorded["input.context"].to(device))
        self.caches = caches(config, layout, values["denoise_steps"], device, dit.dtype)
        self.condition_rope = multipliers(condition_positions(config, height, width), config.head_dim).to(
            device
        )

    def cache(self, step: int) -> KVCache:
        return self.caches[step // 2]

    def prefill(self) -> None:
        first, *others = self.caches
        reference, motion = (self.recorded[f"input.{kind}_latents"][0] for kind in ("ref", "motion"))
        hidden = self.dit.embed_condition(reference.to(self.dit.device), motion.to(self.dit.device))
        context = Context(
            self.dit.encode_time(0.0),
            self.text,
            None,
            PrefillExchange(first, self.condition_rope),
            self.attend,
        )
        self.dit.run_layers(hidden, range(self.dit.config.num_layers), context)
        for other in others:
            other.adopt_condition(first)

    def call(self, x: Tensor, block: int, step: int, distance: int) -> Tensor:
        """Velocity of the block (counted over all clips) at a step."""
        dit, recorded = self.dit, self.recorded
        config = dit.config
        frames, video_frames = config.num_frames_per_block, config.frames_per_block
        pose_start = block % self.blocks * frames
        pose = recorded["input.cond_states"][0, :, pose_start : pose_start + frames]
        speech = recorded["input.audio_emb"][0, :, :, block * video_frames : (block + 1) * video_frames]
        exchange = CellExchange(
            self.cache(step),
            step,
            block % self.blocks,
            min(block + 1, self.blocks),
            self.rope.frames(block * frames, frames),
            self.rope.frames(reference_time(block * frames, distance), 1),
        )
        time = dit.encode_time(recorded["timesteps"][step].item())
        context = Context(time, self.text, dit.encode_speech(speech.to(dit.device)), exchange, self.attend)
        hidden = dit.embed(x.to(dit.device), pose.to(dit.device))
        hidden = dit.run_layers(hidden, range(config.num_layers), context)
        return dit.velocity(hidden, *self.size, time).cpu()


def _prefill_checks(dit: CausalDiT, values: dict[str, Any], recorded: Recorded) -> list[Check]:
    run = BlockRun(dit, values, recorded)
    run.prefill()
    positions = condition_positions(dit.config, values["latent_height"], values["latent_width"])
    results = [
        compare("dit_block", "prefill.positions", positions, recorded["prefill.positions"], 0),
        compare("dit_block", "prefill.rope", run.condition_rope, recorded["prefill.rope_cos_sin"], ROPE),
    ]
    for name, tensor in recorded.items():
        if not (match := re.fullmatch(r"prefill\.layer(\d+)\.cond_([kv])", name)):
            continue
        layer, cache = int(match[1]), run.cache(0)
        if match[2] == "v":
            ours, theirs = cache.values_BSND[layer][0, cache.condition], tensor
        else:
            ours = cache.keys_BSND[layer][0, cache.condition]
            theirs = rotate(tensor[None], run.condition_rope.cpu())[0]
            reference = cache.reference_BLND[layer][0]
            results.append(
                compare("dit_block", f"{name} reference", reference, tensor[: len(reference)], CACHES)
            )
        results.append(compare("dit_block", name, ours, theirs, CACHES))
    return results


def _run_checks(name: str, dit: CausalDiT, values: dict[str, Any], recorded: Recorded) -> list[Check]:
    """Every velocity and clean block of a run, what its caches hold at the end, and the debug call."""
    run, steps, sigmas = BlockRun(dit, values, recorded), values["denoise_steps"], recorded["sigmas"]
    run.prefill()
    prefix = f"run{name}"
    velocities, finals, debug = [], [], []
    for block in range(values["runs"][name]["clips"] * run.blocks):
        clip, first = divmod(block * dit.config.num_frames_per_block, values["frames_per_clip"])
        x = recorded["input.noise"][clip][:, first : first + dit.config.num_frames_per_block]
        for step in range(steps):
            index = block * steps + step
            x = recorded[f"{prefix}.x_in"][index] if f"{prefix}.x_in" in recorded else x
            with _captured(dit, recorded) as captured:
                velocities.append(run.call(x, block, step, values["runs"][name]["relative_dist"]))
            if _is_debug_call(values, name, block, step):
                debug = _debug_checks(dit, recorded, captured, step)
            change = sigmas[step + 1] - sigmas[step]
            final = x + change * velocities[-1]
            x = x + change * recorded[f"{prefix}.velocity"][index]
        finals.append(final)
    clips = torch.stack(finals).unflatten(0, (-1, run.blocks)).transpose(1, 2).flatten(2, 3)
    return [
        compare(
            "dit_block",
            f"{prefix}.velocity",
            torch.stack(velocities),
            recorded[f"{prefix}.velocity"],
            VELOCITY,
        ),
        compare("dit_block", f"{prefix}.block_final", clips, recorded[f"{prefix}.block_final"], VELOCITY),
        *_ring_checks(prefix, run, recorded),
        *debug,
    ]


def _ring_checks(prefix: str, run: BlockRun, recorded: Recorded) -> Iterator[Check]:
    for name, tensor in recorded.items():
        if match := re.fullmatch(rf"{prefix}\.end\.step(\d+)\.layer(\d+)\.([kv])", name):
            step, layer = int(match[1]), int(match[2])
            cache = run.cache(step)
            held = (cache.keys_BSND if match[3] == "k" else cache.values_BSND)[layer]
            ring = torch.cat([held[0, cache.slot(step, index)] for index in range(run.blocks)])
            yield compare("dit_block", name, ring, tensor, CACHES)


def _is_debug_call(values: dict[str, Any], name: str, block: int, step: int) -> bool:
    call = values["debug_call"]
    return (name, block, step) == (
        call["run"],
        call["clip"] * values["blocks_per_clip"] + call["block"],
        call["step"],
    )


def _debug_module(dit: CausalDiT, name: str) -> tuple[nn.Module, bool] | None:
    """The module whose output is the recorded intermediate `name`, or whose input if the flag is set."""
    if match := re.fullmatch(r"debug\.block(\d+)\.(.+)", name):
        layer, part = int(match[1]), match[2]
        block: Any = dit.blocks[layer]
        if part == "after_audio":
            return dit.audio_injector, False
        parts = {
            "in": (block, True),
            "out": (block, False),
            "self_attn.out": (block.self_attn.o, False),
            "cross_attn.out": (block.cross_attn.o, False),
            "ffn.out": (block.ffn, False),
        }
        return parts[part]
    if match := re.fullmatch(r"debug\.audio_(adain|injector)(\d+)\.out", name):
        index, injector = int(match[2]), dit.audio_injector
        attention: Any = injector.injector[index]
        return (injector.injector_adain_layers[index] if match[1] == "adain" else attention.o), False
    return None


@contextmanager
def _captured(dit: CausalDiT, recorded: Recorded) -> Iterator[dict[str, Tensor]]:
    """Collects the intermediates that were recorded, of the calls made inside."""
    captured: dict[str, Tensor] = {}

    def hook(name: str, use_input: bool) -> Callable[..., None]:
        injection = None
        if name.endswith("after_audio"):
            layer = int(re.findall(r"\d+", name)[0])
            injection = dit.config.audio_inject_layers.index(layer)

        def keep(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if injection is None or inputs[0] == injection:
                captured[name] = inputs[0] if use_input else output

        return keep

    handles = []
    for name in recorded:
        if found := _debug_module(dit, name):
            module, use_input = found
            handles.append(module.register_forward_hook(hook(name, use_input)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _debug_checks(dit: CausalDiT, recorded: Recorded, captured: dict[str, Tensor], step: int) -> list[Check]:
    results = [
        compare("dit_block", name, tensor, recorded[name], VELOCITY) for name, tensor in captured.items()
    ]
    times = [dit.encode_time(recorded["timesteps"][step].item()), dit.encode_time(0.0)]
    rows = dit.config.num_frames_per_block
    context = recorded["input.context"]
    padded = F.pad(context, (0, 0, 0, dit.config.text_len - len(context)))[None].to(dit.device)
    text = dit.text_embedding(padded)
    results.append(
        compare("dit_block", "debug.text_embedding", text, recorded["debug.text_embedding"], VELOCITY)
    )
    for name, vectors in {
        "debug.time_embedding": [time.embedded for time in times],
        "debug.time_projection": [time.projected.flatten() for time in times],
    }.items():
        ours = torch.stack(vectors).repeat_interleave(rows, dim=0)
        results.append(compare("dit_block", name, ours, recorded[name], VELOCITY))
    return results
