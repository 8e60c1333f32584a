"""denoise: the transformer walks a segment's cells, one call each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from conf.schema import Settings
from model.checkpoint import load_dit
from model.denoise import Carry, Conditions, Denoiser, DenoiseSettings
from model.solver import SolverState
from stages.types import PortraitLatents, SegmentJob


class Denoise:
    """One copy of the transformer, and the caches of the segment that it is rendering.

    Args:
        progress: called with the bytes loaded and in all.
    """

    def __init__(self, settings: Settings, progress: Callable[[int, int], None]) -> None:
        self._backend = settings.attention_backend
        self._dit = load_dit(settings, progress)
        self._denoiser: Denoiser | None = None
        self._signature: tuple[object, ...] = ()

    def open(
        self,
        job: SegmentJob,
        text: torch.Tensor,
        negative: torch.Tensor | None,
        portrait: PortraitLatents,
        speech: torch.Tensor,
        carry: bytes | None,
    ) -> None:
        """Begin a segment: caches for its size, text keys and values, the first prefill."""
        conditions = Conditions(
            text, negative, portrait.reference, portrait.motion, speech, job.first_computed_block
        )
        before = Carry.from_bytes(carry) if carry is not None else None
        denoiser = self._denoiser_for(job.settings, *portrait.reference.shape[-2:])
        denoiser.open(conditions, job.segment.first_block, job.segment.end_block, before)

    def prefill(self, motion: torch.Tensor | None) -> None:
        """The second prefill, with the first generated latent as reference."""
        self._open().prefill(motion=motion)

    def cell(self, block: int, step: int, state: SolverState | None) -> SolverState:
        """One block at one step; the state comes back on the CPU."""
        return self._open().cell(block, step, state).to("cpu")

    def carry(self, motion: torch.Tensor | None) -> bytes:
        """What the next segment goes on from."""
        return self._open().carry(motion).to_bytes()

    def _open(self) -> Denoiser:
        if self._denoiser is None:
            raise RuntimeError("no segment is open")
        return self._denoiser

    def _denoiser_for(self, settings: Settings, height: int, width: int) -> Denoiser:
        """Caches are allocated anew only when lessons of another size or with other settings begin."""
        fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(DenoiseSettings)}
        signature = (height, width, *fields.values())
        if self._denoiser is None or signature != self._signature:
            # The old caches go first: two sets do not fit on a card that one fills.
            self._denoiser = None
            self._denoiser = Denoiser(self._dit, DenoiseSettings(**fields), height, width, self._backend)
            self._signature = signature
        return self._denoiser
