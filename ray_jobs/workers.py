"""The stages as workers: what runs inside an actor or a task, or in this process with `--local`.

Each class holds one stage object and the little that only a long-lived process needs: its thread count,
models that load in the background so that their progress can be asked for, several segments at once.
"""

from __future__ import annotations

import io
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.schema import Settings
from ray_jobs.environment import hardware
from ray_jobs.folder import Folder
from ray_jobs.store import Committed, Store, StoreError
from stages import prepare
from stages.condition import Encoders
from stages.mux import mux
from stages.types import Lesson, Measured, PortraitLatents, Prepared, RowError, SegmentJob

if TYPE_CHECKING:
    import torch

    from model.solver import SolverState
    from stages.decode import SegmentDecoder
    from stages.denoise import Denoise

VIDEO, CARRY = "video.mov", "carry.safetensors"
"""Files of a committed segment."""


# ---------------------------------------------------------------- tasks


def check_lesson(lesson: Lesson, weights: str) -> Prepared | RowError:
    """prepare.check, with a bad row as a value: it is a finding, not a failure."""
    try:
        return prepare.check(lesson, weights)
    except RowError as error:
        return error


def check_weights(settings: Settings) -> None:
    """Raises CheckpointError with all that is wrong with the checkpoint."""
    from model.checkpoint import check

    check(settings)


def finish_lesson(
    lesson: Lesson, prepared: Prepared, name: str, segments: list[Committed], store_uri: str, out_uri: str
) -> Measured:
    """Join a lesson's segments with its narration and publish the file as `name`. See `stages.mux.mux`."""
    prepare.require_unchanged(lesson, prepared)
    store, out = Store(store_uri), Folder(out_uri)
    with ExitStack() as stack:
        target = out.local_path(name)
        finished = target or Path(stack.enter_context(tempfile.TemporaryDirectory()), "lesson.mp4")
        measured = mux(
            (io.BytesIO(store.read(segment, VIDEO)) for segment in segments),
            lesson.audio,
            finished,
            width=prepared.picture.width,
            height=prepared.picture.height,
            frames=prepared.frames,
            sound_seconds=prepared.sound_seconds,
            audio_bitrate=lesson.settings.audio_bitrate,
            loudness=lesson.settings.loudness,
        )
        if target is None:
            out.upload(finished, name)
    return measured


def load_portrait(lesson: Lesson, prepared: Prepared) -> np.ndarray:
    return prepare.load_portrait(lesson, prepared)


def load_speech(lesson: Lesson, prepared: Prepared) -> np.ndarray:
    return prepare.load_speech(lesson, prepared)


def is_intact(store_uri: str, segment: Committed) -> bool:
    """Read a segment of an earlier run and compare its hashes; a damaged one is withdrawn from the store."""
    store = Store(store_uri)
    try:
        for name in segment.files:
            store.read(segment, name)
    except StoreError:
        store.withdraw(segment)
        return False
    return True


def read_carry(store_uri: str, segment: Committed) -> bytes:
    return Store(store_uri).read(segment, CARRY)


# ---------------------------------------------------------------- actors


class _Loading:
    """A model that loads in a thread, so that the worker can tell how far it is."""

    def __init__(self, load: Callable[[Callable[[int, int], None]], Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._done, self._total, self._error = 0, 0, None  # type: tuple[int, int, BaseException | None]
        self._model: Any = None

        def run() -> None:
            torch.set_num_threads(threads)
            try:
                self._model = load(self._progress)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="load")
        self._thread.start()

    def _progress(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    def state(self) -> tuple[int, int, bool]:
        """Bytes loaded, bytes in all, and whether the model is there. Raises what loading raised."""
        over = not self._thread.is_alive()
        if over:
            self.get()
        return self._done, self._total, over

    def get(self) -> Any:
        """The model, once it is there. Raises what loading raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._model


class _Worker:
    """What every actor answers."""

    def ping(self) -> None:
        """Answers at once if the worker is idle, and fails if it is lost."""


class _ModelWorker(_Worker):
    """One that holds a model."""

    def __init__(self, settings: Settings, load: Callable[[Callable[[int, int], None]], Any]) -> None:
        self._device = settings.device
        self._loading = _Loading(load, settings.threads)

    def loading(self) -> tuple[int, int, bool]:
        """See `_Loading.state`."""
        return self._loading.state()

    def hardware(self) -> str:
        """What it computes on."""
        return hardware(self._device)


class ConditionWorker(_Worker):
    """Encodes prompts, portraits and speech."""

    def __init__(self, settings: Settings) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        self._encoders = Encoders(settings)

    def prompt(self, text: str) -> torch.Tensor:
        return self._encoders.prompt(text)

    def portrait(self, pixels: np.ndarray) -> PortraitLatents:
        return self._encoders.portrait(pixels)

    def motion(self, pixels: np.ndarray, clip: np.ndarray) -> torch.Tensor:
        return self._encoders.motion(pixels, clip)

    def speech(self, samples: np.ndarray, job: SegmentJob) -> torch.Tensor:
        return self._encoders.speech(samples, job)


class RankWorker(_ModelWorker):
    """One rank of a group: the transformer, or its share, and the caches of the segment that it renders."""

    def __init__(self, settings: Settings) -> None:
        def load(progress: Callable[[int, int], None]) -> Denoise:
            from stages.denoise import Denoise

            return Denoise(settings, progress)

        super().__init__(settings, load)

    def open(
        self,
        job: SegmentJob,
        text: torch.Tensor,
        negative: torch.Tensor | None,
        portrait: PortraitLatents,
        speech: torch.Tensor,
        carry: bytes | None,
    ) -> None:
        self._loading.get().open(job, text, negative, portrait, speech, carry)

    def prefill(self, motion: torch.Tensor | None) -> None:
        self._loading.get().prefill(motion)

    def cell(self, block: int, step: int, state: SolverState | None) -> SolverState | None:
        return self._loading.get().cell(block, step, state)

    def carry(self, motion: torch.Tensor | None) -> bytes:
        return self._loading.get().carry(motion)


class DecodeWorker(_ModelWorker):
    """Decodes several segments at once and commits each to the store when its last block is there."""

    def __init__(self, settings: Settings, store_uri: str) -> None:
        def load(progress: Callable[[int, int], None]) -> Any:
            from model.checkpoint import load_vae

            return load_vae(settings, progress)

        super().__init__(settings, load)
        self._slots = settings.decode_slots
        self._store = Store(store_uri)
        self._segments: dict[str, SegmentDecoder] = {}

    def open(self, job: SegmentJob, portrait: PortraitLatents, carry: bytes | None) -> None:
        from stages.decode import SegmentDecoder, history

        self._segments.pop(job.segment.id, None)
        if len(self._segments) >= self._slots:
            raise RuntimeError(f"decode_slots={self._slots}: this decoder already holds that many segments")
        before = history(portrait, carry)
        self._segments[job.segment.id] = SegmentDecoder(self._loading.get(), job, before)

    def decode(self, job: SegmentJob, block: int, state: SolverState) -> int:
        """Decode one finished block; returns the segment's frames so far."""
        return self._segments[job.segment.id].decode(block, state.x)

    def first_clip(self, job: SegmentJob) -> np.ndarray:
        """The frames decoded so far, uint8 [T, H, W, 3], of a segment that keeps its first clip."""
        return self._segments[job.segment.id].first_clip()

    def finish(self, job: SegmentJob, carry: bytes | None) -> Committed:
        """Commit the segment: its video, what the next one goes on from, and last the file that says so."""
        files = {VIDEO: self._segments.pop(job.segment.id).finish()}
        if carry is not None:
            files[CARRY] = carry
        meta = {
            "lesson": job.lesson_id,
            "index": job.segment.index,
            "frames": len(job.segment.frames(job.frames)),
        }
        return self._store.commit(job.segment.id, files, meta)

    def drop(self, job: SegmentJob) -> None:
        """Forget a segment that was given up."""
        self._segments.pop(job.segment.id, None)
