"""The transformer with random weights: speed, components and memory once its ring is full."""

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bench.components import Components
from bench.measure import Spread, building, mib, peak_bytes, seconds
from model import flops, memory
from model.cache import TokenLayout, token_layout
from model.config import DiTConfig
from model.denoise import Conditions, Denoiser, DenoiseSettings
from model.dit import CausalDiT, DiTBlock

SETTINGS = DenoiseSettings(
    infer_frames=48,
    sample_steps=4,
    sample_solver="euler",
    sample_shift=3.0,
    sample_guide_scale=0.0,
    base_seed=420,
    reference="first_latent",
)
"""Upstream's, as in `conf.schema`."""


def random_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> CausalDiT:
    with building(device, dtype):
        return CausalDiT(config).eval().requires_grad_(False)


def random_conditions(config: DiTConfig, height: int, width: int, blocks: int) -> Conditions:
    """A prompt, a picture and the sound of `blocks` blocks, all of them noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Conditions(
        text=noise(config.text_len // 2, config.text_dim),
        negative_text=None,
        reference=noise(config.in_dim, 1, height, width),
        motion=noise(config.in_dim, config.motion_frames_latent, height, width),
        speech=noise(config.num_wav2vec_layers, config.audio_dim, blocks * config.frames_per_block),
        speech_first_block=0,
    )


def run_block(denoiser: Denoiser, block: int) -> Tensor:
    """All steps of a block, with the second prefill where it belongs; its clean latents."""
    if block == denoiser.blocks_per_clip and denoiser.settings.reference != "keep":
        denoiser.prefill()
    state = None
    for step in range(denoiser.settings.sample_steps):
        state = denoiser.cell(block, step, state)
    assert state is not None
    return state.x


def compile_layers(dit: CausalDiT, backend: str) -> None:
    """Compiles what lies before and after each layer's self-attention, once for all layers."""
    for block in cast(list[DiTBlock], list(dit.blocks)):
        project, finish = (
            torch.compile(method, backend=backend, dynamic=False, fullgraph=True)
            for method in (block.project, block.finish)
        )
        block.__dict__.update(project=project, finish=finish)


@dataclass(frozen=True)
class DenoiseTimes:
    """One size of latents, with the ring full."""

    block: Spread
    fps: float
    """Video frames per second, from the median block."""
    tflops: float
    """10^12 operations per second, from the median block."""
    components: dict[str, dict[str, float]]
    """Name -> `seconds` in one block, and `tflops` (10^12 per second) where operations are counted."""
    marked: float
    """Seconds of the block that was measured by component."""
    same_bits: bool
    """Whether rendering the beginning again gave the same latents."""
    predicted_bytes: int
    """Caches, segment and activations, without parameters."""
    measured_bytes: int | None
    """Likewise, at their peak; None for compiled layers on a CPU, where storages cannot be watched."""


def denoise(
    dit: CausalDiT,
    settings: DenoiseSettings,
    height: int,
    width: int,
    repeats: int,
    budget: float,
    compiled: bool,
) -> DenoiseTimes:
    """Renders past the second prefill, twice, then times up to `repeats` blocks (at least one) for about
    `budget` seconds, and one more by component."""
    config, device = dit.config, dit.device
    layout = token_layout(config, height, width, settings.infer_frames // config.frames_per_block)
    first = layout.blocks + 1
    end = first + repeats + 1
    given = random_conditions(config, height, width, end)

    def beginning() -> tuple[Denoiser, Tensor]:
        denoiser = Denoiser(dit, settings, height, width, "sdpa")
        denoiser.open(given, 0, end)
        return denoiser, [run_block(denoiser, block) for block in range(first)][-1]

    expected = beginning()[1]
    made: list[tuple[Denoiser, Tensor]] = []
    if compiled and device.type == "cpu":
        measured, (denoiser, again) = None, beginning()
    else:
        measured = peak_bytes(device, lambda: made.append(beginning()))
        denoiser, again = made.pop()
    samples = _time_blocks(denoiser, range(first, end - 1), budget)
    block = Spread.of(samples)
    with Components(denoiser, compiled) as clock:
        marked = seconds(device, partial(run_block, denoiser, first + len(samples)))
    predicted = memory.denoiser(config, settings, height, width, end, dit.dtype.itemsize)
    return DenoiseTimes(
        block=block,
        fps=config.frames_per_block / block.median,
        tflops=flops.block(config, layout, settings.sample_steps) / block.median / 1e12,
        components=_rates(config, layout, settings.sample_steps, clock.seconds(), marked),
        marked=marked,
        same_bits=torch.equal(expected, again),
        predicted_bytes=predicted.total - predicted.parameters,
        measured_bytes=measured,
    )


def _time_blocks(denoiser: Denoiser, blocks: range, budget: float) -> list[float]:
    samples, start = list[float](), time.perf_counter()
    for block in blocks:
        samples.append(seconds(denoiser.dit.device, partial(run_block, denoiser, block)))
        if time.perf_counter() - start > budget:
            break
    return samples


def _rates(
    config: DiTConfig, layout: TokenLayout, steps: int, spent: dict[str, float], whole: float
) -> dict[str, dict[str, float]]:
    """Seconds and TFLOP/s of the components of a block that took `whole` seconds."""
    cell = flops.cell(config, layout, layout.blocks)
    work = {name: steps * count for name, count in asdict(cell).items()}
    work["injection"] += flops.speech(config)
    work["project"] = work["projections"] * 3 // 4
    work["finish"] = work["projections"] // 4 + work["text"] + work["ffn"]
    del work["embeddings"]
    rates = {name: {"seconds": elapsed} for name, elapsed in spent.items()}
    for name in rates.keys() & work.keys():
        rates[name]["tflops"] = work[name] / spent[name] / 1e12
    rates["rest"] = {"seconds": whole - sum(spent.values())}
    return rates


def table(times: DenoiseTimes) -> str:
    """A line for the whole, then one per component with its share of the time."""
    block = times.block
    lines = [
        f"block          {block.median:9.4f} s  {times.tflops:8.3f} TFLOP/s  {times.fps:8.2f} FPS  "
        f"(min {block.min:.4f}, max {block.max:.4f}, {block.samples} samples, noise {block.noise:.0%})"
    ]
    for name, part in times.components.items():
        rate = f"{part['tflops']:8.3f} TFLOP/s" if "tflops" in part else " " * 16
        share = part["seconds"] / times.marked
        lines.append(f"  {name:14}{part['seconds']:8.4f} s  {rate}  {share:8.1%}")
    measured = "not measured" if times.measured_bytes is None else f"measured {mib(times.measured_bytes)}"
    lines.append(f"memory         predicted {mib(times.predicted_bytes)}, {measured}")
    lines.append(f"same bits      {'yes' if times.same_bits else 'NO'}")
    return "\n".join(lines)


def as_json(times: DenoiseTimes) -> dict[str, Any]:
    return {**vars(times), "block": asdict(times.block)}
