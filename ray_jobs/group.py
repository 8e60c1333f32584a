"""Groups of actors that hold one copy of the transformer. All layouts are called in the same way.

A call returns a reference at once; the order of submission is the schedule. A group belongs to one conductor.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import Settings
from ray_jobs.backend import Backend, Ref, Resources
from ray_jobs.workers import RankWorker
from stages.types import SegmentJob


@dataclass(frozen=True)
class Inputs:
    """References to what a segment is rendered from."""

    text: Ref
    negative: Ref | None
    portrait: Ref
    pixels: Ref
    speech: Ref
    carry: Ref | None


class Replica:
    """A group of one rank, which holds all layers and all caches: no communication, no bubbles."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        gpus = settings.denoise_gpus if settings.device == "cuda" else 0.0
        self._rank = backend.start(RankWorker, settings, resources=Resources(settings.denoise_cpus, gpus))

    def submit(self, method: str, *args: object) -> Ref:
        """A call that is no part of a segment, such as `ping`."""
        return self._rank.submit(method, *args)

    def open(self, job: SegmentJob, inputs: Inputs) -> Ref:
        """Begin a segment and forget the one before. The value is None: the state before a first step."""
        return self._rank.submit(
            "open", job, inputs.text, inputs.negative, inputs.portrait, inputs.speech, inputs.carry
        )

    def prefill(self, motion: Ref | None) -> Ref:
        """The second prefill, with the first generated latent as reference. The value is None."""
        return self._rank.submit("prefill", motion)

    def cell(self, block: int, step: int, state: Ref) -> Ref:
        """One block at one step, from the state before it to the state after it."""
        return self._rank.submit("cell", block, step, state)

    def carry(self, motion: Ref | None) -> Ref:
        """What the next segment goes on from, once all calls before are done: bytes."""
        return self._rank.submit("carry", motion)

    def kill(self) -> None:
        self._rank.kill()
