"""denoise: the transformer walks a segment's cells, one call each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from conf.schema import Settings
from model.attention import attention_backend
from model.checkpoint import load_dit
from model.denoise import Carry, Conditions, Denoiser, DenoiseSettings
from model.solver import SolverState
from stages.types import PortraitLatents, SegmentJob


class Denoise:
    """One copy of the transformer, and the caches of the segment that it is rendering.

    Args:
        progress: called with the bytes loaded and in all.

    Raises BackendError before anything is loaded, and CheckpointError.
    """

    def __init__(self, settings: Settings, progress: Callable[[int, int], None]) -> None:
        self._backend = settings.attention_backend
        attention_backend(self._backend, torch.device(settings.device))
        self._dit = load_dit(settings, progress)
        self._denoiser: Denoiser | None = None
        self._allocated: tuple[object, ...] = ()
        self._states: dict[int, SolverState] = {}
        """Of the blocks between two steps."""

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
        fields = {f.name: getattr(job.settings, f.name) for f in dataclasses.fields(DenoiseSettings)}
        settings = DenoiseSettings(**fields)
        self._states.clear()
        negative = negative if settings.guided else None
        conditions = Conditions(
            text, negative, portrait.reference, portrait.motion, speech, job.first_computed_block
        )
        before = Carry.from_bytes(carry) if carry is not None else None
        denoiser = self._denoiser_for(settings, *portrait.reference.shape[-2:])
        denoiser.open(conditions, job.segment.first_block, job.segment.end_block, before)

    def prefill(self, motion: torch.Tensor | None) -> None:
        """The second prefill, with the first generated latent as reference."""
        self._open().prefill(motion=motion)

    def cell(self, block: int, step: int, state: SolverState | None) -> SolverState | None:
        """One block at one step. After the last step the block's state comes back, on the CPU.

        Before, nothing does: the state waits here, on the device, for the next step, which goes on from it
        unless it is given another.
        """
        denoiser = self._open()
        before = self._states.pop(block, None)
        after = denoiser.cell(block, step, before if state is None else state)
        if step == denoiser.settings.sample_steps - 1:
            return after.to("cpu")
        self._states[block] = after
        return None

    def carry(self, motion: torch.Tensor | None) -> bytes:
        """What the next segment goes on from."""
        return self._open().carry(motion).to_bytes()

    def _open(self) -> Denoiser:
        if self._denoiser is None:
            raise RuntimeError("no segment is open")
        return self._denoiser

    def _denoiser_for(self, settings: DenoiseSettings, height: int, width: int) -> Denoiser:
        """Caches are allocated anew only when lessons of another size or with other caches begin."""
        wanted = (height, width, *settings.caches)
        if self._denoiser is not None and wanted == self._allocated:
            self._denoiser.configure(settings)
        else:
            # The old caches go first: two sets do not fit on a card that one fills.
            self._denoiser = None
            self._denoiser = Denoiser(self._dit, settings, height, width, self._backend)
            self._allocated = wanted
        return self._denoiser
