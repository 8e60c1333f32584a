"""Renders one segment: walks its cells through a group and hands every finished block to a decoder.

The conductor forwards references and never holds their data. Only calls whose outside inputs are there are
submitted, a bounded number of blocks ahead, so that nothing grows with the length of a segment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from model.schedule import calls
from ray_jobs.backend import Backend, Ref, Worker
from ray_jobs.group import Inputs, Replica
from ray_jobs.store import Committed
from stages.types import FRAMES_PER_BLOCK, SegmentJob


@dataclass(frozen=True)
class Hooks:
    """What the renderer of a segment asks of its surroundings."""

    frames: Callable[[int], None]
    """Called with the segment's decoded frames so far; raises to end the rendering."""
    submitted: Callable[[], None]
    """Called when the group has all of the segment's calls, so that the next segment can line up."""
    encode_motion: Callable[[Ref], Ref]
    """Motion latents from the first clip's frames, for `reference: first_latent_and_motion`."""


class BlockStream:
    """Finished blocks on their way to the decoder, at most `window_blocks` of them on either side."""

    def __init__(
        self, backend: Backend, decoder: Worker, job: SegmentJob, on_frames: Callable[[int], None]
    ) -> None:
        self._backend, self._decoder, self._job, self._on_frames = backend, decoder, job, on_frames
        self._window = job.settings.window_blocks
        self._denoising: deque[tuple[int, Ref]] = deque()
        self._decoding: deque[Ref] = deque()

    def push(self, block: int, state: Ref) -> None:
        """Add a block that has been submitted to the group; waits while too many are on the road."""
        self._denoising.append((block, state))
        while len(self._denoising) > self._window:
            self._forward()

    def drain(self) -> None:
        """Wait until every block has been decoded."""
        while self._denoising:
            self._forward()
        while self._decoding:
            self._acknowledge()

    def _forward(self) -> None:
        block, state = self._denoising.popleft()
        # The decoder runs the calls of all its segments in order: one that waits for a block holds up all.
        self._backend.wait(state)
        self._decoding.append(self._decoder.submit("decode", self._job, block, state))
        while len(self._decoding) > self._window:
            self._acknowledge()

    def _acknowledge(self) -> None:
        self._on_frames(self._backend.get(self._decoding.popleft()))


def render_segment(
    backend: Backend, group: Replica, decoder: Worker, job: SegmentJob, inputs: Inputs, hooks: Hooks
) -> tuple[Committed, Ref | None]:
    """Denoise, decode and commit one segment.

    Returns what was committed, and a reference to what the next segment goes on from, if there is one. Raises
    Lost or Failed as the backend does, and whatever a hook raises.
    """
    settings, segment = job.settings, job.segment
    decoding = decoder.submit("open", job, inputs.portrait, inputs.carry)
    stream = BlockStream(backend, decoder, job, hooks.frames)
    opened = state = group.open(job, inputs)
    clip_blocks = settings.infer_frames // FRAMES_PER_BLOCK

    def second_motion() -> Ref | None:
        """Motion latents that replace the portrait's after the first clip, where the settings want that."""
        if settings.reference != "first_latent_and_motion":
            return None
        stream.drain()
        return hooks.encode_motion(decoder.submit("first_clip", job))

    for call in calls(
        segment.first_block,
        segment.end_block,
        carried_blocks=segment.first_block - job.first_computed_block,
        sample_steps=settings.sample_steps,
        blocks_per_clip=clip_blocks,
        reference=settings.reference,
    ):
        if call.kind == "prefill":
            # A replayed first clip was decoded in the segment before: its motion is in the carry.
            opened = group.prefill(None if call.replay else second_motion())
            continue
        # `open` and `prefill` have no value; a first step that is given theirs fails as they failed.
        state = group.cell(call.block, call.step, opened if call.step == 0 else state)
        if call.step == settings.sample_steps - 1 and not call.replay:
            stream.push(call.block, state)
    carry = None
    if not job.last:
        one_clip = not job.carried and segment.end_block - segment.first_block == clip_blocks
        carry = group.carry(second_motion() if one_clip else None)
    hooks.submitted()
    backend.get(decoding)
    stream.drain()
    return backend.get(decoder.submit("finish", job, carry)), carry
