"""The transformer with random weights: speed, components and memory once its ring is full."""

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bench.measure import Spread, building, gib, peak_bytes, seconds, synchronize
from model import flops, memory
from model.cache import token_layout
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


class Components:
    """Times what a `Denoiser` spends where, while entered: marks on the GPU's own clock, or CPU time.

    Hooks on the modules and a wrapper around the attention backend; of nested ones the outermost counts.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser, self._attend = denoiser, denoiser.attend
        self._cuda = denoiser.dit.device.type == "cuda"
        self._hooks: list[Any] = []
        self._spans: list[tuple[str, Any, Any]] = []
        self._depth, self._begin = 0, None

    def __enter__(self) -> "Components":
        dit = self._denoiser.dit
        for block in cast(list[DiTBlock], list(dit.blocks)):
            own, text = block.self_attn, block.cross_attn
            self._watch("projections", own.q, own.k, own.v, own.o)
            self._watch("text", text.q, text.o)
            self._watch("ffn", block.ffn)
        self._watch("injection", dit.audio_injector, dit.casual_audio_encoder)
        self._watch("embeddings", dit.head)
        self._denoiser.attend = replace(self._attend, attend=self._timed_attention)
        return self

    def __exit__(self, *_: object) -> None:
        self._denoiser.attend = self._attend
        for hook in self._hooks:
            hook.remove()

    def seconds(self) -> dict[str, float]:
        """By the names of `model.flops.Flops`; what is left of a call's time is norms, positions and sums."""
        synchronize(self._denoiser.dit.device)
        totals: dict[str, float] = {}
        for name, begin, end in self._spans:
            elapsed = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            totals[name] = totals.get(name, 0.0) + elapsed
        return totals

    def _watch(self, name: str, *modules: torch.nn.Module) -> None:
        for module in modules:
            self._hooks.append(module.register_forward_pre_hook(lambda *_: self._start()))
            self._hooks.append(module.register_forward_hook(lambda *_: self._stop(name)))

    def _timed_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of_text = any(k is keys for keys, _ in self._denoiser.segment.texts[0])
        self._start()
        out = self._attend(q, k, v)
        self._stop("text" if of_text else "self_attention")
        return out

    def _start(self) -> None:
        if self._depth == 0:
            self._begin = self._now()
        self._depth += 1

    def _stop(self, name: str) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._spans.append((name, self._begin, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


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
    """Compiles what lies before and after each layer's self-attention."""
    for block in dit.blocks:
        for name in ("project", "finish"):
            setattr(block, name, torch.compile(getattr(block, name), backend=backend, dynamic=False))


@dataclass(frozen=True)
class DenoiseTimes:
    """One size of latents, with the ring full."""

    block: Spread
    fps: float
    """Video frames per second, from the median block."""
    tflops: float
    """10^12 operations per second, from the median block."""
    components: dict[str, dict[str, float]]
    """Name -> seconds in one block, and TFLOP/s where operations are counted."""
    hooks_cost: float
    """Time of the block that was measured by component, against the median."""
    same_bits: bool
    """Whether rendering the beginning again gave the same latents."""
    predicted_bytes: int
    measured_bytes: int
    """Peak of caches, segment and activations, without parameters."""


def denoise(
    dit: CausalDiT, settings: DenoiseSettings, height: int, width: int, repeats: int, budget: float
) -> DenoiseTimes:
    """Renders past the second prefill, twice, then times up to `repeats` blocks (at least one) for about
    `budget` seconds."""
    config, device = dit.config, dit.device
    clip = settings.infer_frames // config.frames_per_block
    end = clip + 2 + repeats
    given = random_conditions(config, height, width, end)
    made: list[Denoiser] = []

    def begin() -> Tensor:
        if not made:
            made.append(Denoiser(dit, settings, height, width, "sdpa"))
        made[0].open(given, 0, end)
        return [run_block(made[0], block) for block in range(clip + 1)][-1]

    first: list[Tensor] = []
    measured = peak_bytes(device, lambda: first.append(begin()))
    same_bits = torch.equal(first[0], begin())
    denoiser, samples, start = made[0], list[float](), time.perf_counter()
    for block in range(clip + 1, end - 1):
        samples.append(seconds(device, partial(run_block, denoiser, block)))
        if time.perf_counter() - start > budget:
            break
    spread = Spread.of(samples)
    with Components(denoiser) as clock:
        hooked = seconds(device, lambda: run_block(denoiser, clip + 1 + len(samples)))
    layout = token_layout(config, height, width, clip)
    predicted = memory.denoiser(config, settings, height, width, end, dit.dtype.itemsize)
    return DenoiseTimes(
        block=spread,
        fps=config.frames_per_block / spread.median,
        tflops=flops.block(config, layout, settings.sample_steps) / spread.median / 1e12,
        components=_rates(config, settings, height, width, clock.seconds(), hooked),
        hooks_cost=hooked / spread.median - 1,
        same_bits=same_bits,
        predicted_bytes=predicted.total - predicted.parameters,
        measured_bytes=measured,
    )


def _rates(
    config: DiTConfig,
    settings: DenoiseSettings,
    height: int,
    width: int,
    spent: dict[str, float],
    whole: float,
) -> dict[str, dict[str, float]]:
    layout = token_layout(config, height, width, settings.infer_frames // config.frames_per_block)
    work = flops.cell(config, layout, layout.blocks)
    rates = {
        name: {
            "seconds": spent[name],
            "tflops": settings.sample_steps * getattr(work, name) / spent[name] / 1e12,
        }
        for name in spent
    }
    return {**rates, "rest": {"seconds": whole - sum(spent.values())}}


def table(times: DenoiseTimes) -> str:
    """A line for the whole, then one per component with its share of the time."""
    block = times.block
    lines = [
        f"block        {block.median:9.4f} s   {times.tflops:8.3f} TFLOP/s   {times.fps:7.2f} FPS   "
        f"(min {block.min:.4f}, max {block.max:.4f}, {block.samples} samples, noise {block.noise:.0%})"
    ]
    whole = sum(part["seconds"] for part in times.components.values())
    for name, part in times.components.items():
        rate = f"{part['tflops']:8.3f} TFLOP/s" if "tflops" in part else " " * 16
        lines.append(f"  {name:15}{part['seconds']:7.4f} s  {rate}   {part['seconds'] / whole:6.1%}")
    lines.append(f"memory       predicted {gib(times.predicted_bytes)}, measured {gib(times.measured_bytes)}")
    lines.append(f"same bits    {'yes' if times.same_bits else 'NO'}")
    return "\n".join(lines)


def as_json(times: DenoiseTimes) -> dict[str, Any]:
    return {**vars(times), "block": asdict(times.block)}
