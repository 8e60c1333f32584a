"""The transformer with random weights: speed, components and memory once its ring is full."""

import time
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from bench.components import Components
from bench.measure import Product, Spread, building, mib, peak_bytes, seconds
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
class Component:
    """Part of a block, over the blocks that were measured by component."""

    seconds: Spread
    share: float
    """Of the block's time: the median of its shares of each block."""
    tflops: float | None
    """10^12 operations per second, from the median; None where operations are not counted."""


@dataclass(frozen=True)
class DenoiseTimes:
    """One size of latents, with the ring full."""

    block: Spread
    """Seconds."""
    fps: float
    """Video frames per second, from the median block."""
    tflops: float
    """10^12 operations per second, from the median block."""
    share_of_product: Spread
    """Operations per second as a share of the matrix product's right before each block."""
    components: dict[str, Component]
    marking: float
    """How much longer blocks took that were measured by component, as a share."""
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
    product: Product,
    repeats: int,
    budget: float,
    compiled: bool,
) -> DenoiseTimes:
    """Renders past the second prefill, twice. Then, up to `repeats` times (at least once) and for about
    `budget` seconds, times the product, a block, and a block by component."""
    config, device = dit.config, dit.device
    layout = token_layout(config, height, width, settings.infer_frames // config.frames_per_block)
    first = layout.blocks + 1
    end = first + 2 * repeats
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
    rounds = _rounds(denoiser, range(first, end), product, budget, compiled)
    work = flops.block(config, layout, settings.sample_steps)
    block = Spread.of([each.plain for each in rounds])
    predicted = memory.denoiser(config, settings, height, width, end, dit.dtype.itemsize)
    return DenoiseTimes(
        block=block,
        fps=config.frames_per_block / block.median,
        tflops=work / block.median / 1e12,
        share_of_product=Spread.of([work / each.plain / each.product for each in rounds]),
        components=_components(rounds, _work(config, layout, settings.sample_steps)),
        marking=Spread.of([each.marked / each.plain for each in rounds]).median - 1,
        same_bits=torch.equal(expected, again),
        predicted_bytes=predicted.total - predicted.parameters,
        measured_bytes=measured,
    )


@dataclass(frozen=True)
class _Round:
    product: float
    """FLOP/s."""
    plain: float
    """Seconds of a block."""
    marked: float
    """Seconds of the block after it, with marks between its parts."""
    parts: dict[str, float]
    """Seconds by component."""


def _rounds(
    denoiser: Denoiser, blocks: range, product: Product, budget: float, compiled: bool
) -> list[_Round]:
    rounds, start = list[_Round](), time.perf_counter()
    device = denoiser.dit.device
    for block in blocks[::2]:
        rate = product.rate()
        plain = seconds(device, partial(run_block, denoiser, block))
        with Components(denoiser, compiled) as clock:
            marked = seconds(device, partial(run_block, denoiser, block + 1))
        parts = clock.seconds()
        parts["rest"] = marked - sum(parts.values())
        rounds.append(_Round(rate, plain, marked, parts))
        if time.perf_counter() - start > budget:
            break
    return rounds


def _work(config: DiTConfig, layout: TokenLayout, steps: int) -> dict[str, int]:
    """Operations of the components in one block, but for those of little work."""
    cell = flops.cell(config, layout, layout.blocks)
    return {
        "projections": steps * cell.projections,
        "self_attention": steps * cell.self_attention,
        "text": steps * cell.text,
        "ffn": steps * cell.ffn,
        "injection": steps * cell.injection + flops.speech(config),
        "project": steps * cell.projections * 3 // 4,
        "finish": steps * (cell.projections // 4 + cell.text + cell.ffn),
    }


def _components(rounds: list[_Round], work: dict[str, int]) -> dict[str, Component]:
    components = {}
    for name in [*(name for name in work if name in rounds[0].parts), "embeddings", "rest"]:
        spread = Spread.of([each.parts[name] for each in rounds])
        share = Spread.of([each.parts[name] / each.marked for each in rounds]).median
        tflops = work[name] / spread.median / 1e12 if name in work else None
        components[name] = Component(spread, share, tflops)
    return components


def table(times: DenoiseTimes) -> str:
    """A line for the whole, then one per component."""
    block, share = times.block, times.share_of_product
    lines = [f"{block.samples} rounds; extremes of a block are {block.noise:.0%} of its median apart"]
    lines.append(f"{'':16}  median s      min      max  TFLOP/s    share")
    lines.append(f"{'block':16}{_seconds(block)} {times.tflops:8.3f}  {times.fps:.2f} FPS")
    for name, part in times.components.items():
        rate = "" if part.tflops is None else f"{part.tflops:.3f}"
        lines.append(f"  {name:14}{_seconds(part.seconds)} {rate:>8} {part.share:8.1%}")
    low, high = f"{share.min:.0%}", f"{share.max:.0%}"
    lines.append(f"{share.median:.0%} ({low} to {high}) of the matrix product before each block")
    lines.append(f"marking the parts changed the time of a block by {times.marking:+.1%}")
    measured = "not measured" if times.measured_bytes is None else f"measured {mib(times.measured_bytes)}"
    lines.append(f"memory besides parameters: predicted {mib(times.predicted_bytes)}, {measured}")
    lines.append(f"same bits twice: {'yes' if times.same_bits else 'NO'}")
    return "\n".join(lines)


def _seconds(spread: Spread) -> str:
    return f"{spread.median:10.4f} {spread.min:8.4f} {spread.max:8.4f}"
