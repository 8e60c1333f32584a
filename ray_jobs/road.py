"""What lessons on the road share: workers, encodings, the store, the count of frames, the wish to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conf.schema import Settings
from ray_jobs.backend import Backend, Failed, Lost, Ref, Resources, Worker
from ray_jobs.events import EventLog
from ray_jobs.failures import Tries, failure_class
from ray_jobs.group import Inputs, Replica
from ray_jobs.orders import Order
from ray_jobs.pool import Lease, Pool, Sizes, Stopped
from ray_jobs.progress import Summary
from ray_jobs.segment import Hooks, render_segment
from ray_jobs.shared import Shared
from ray_jobs.store import Committed, Store
from ray_jobs.workers import (
    CARRY,
    ConditionWorker,
    DecodeWorker,
    finish_lesson,
    is_intact,
    load_portrait,
    load_speech,
    read_carry,
)
from stages.types import Measured, Segment, SegmentJob

_PING_SECONDS = 2.0
_FRAMES_EVENT_SECONDS = 10.0


@dataclass(frozen=True)
class Media:
    """References to a lesson's portrait, uint8 [H, W, 3], and its sound, float32 [samples] at 16 kHz."""

    pixels: Ref
    sound: Ref


class Road:
    """Pools and shared state of one run; its methods are called by several lessons at once.

    Args:
        out_uri: folder of the finished files.
        work: the lessons that will be rendered, for the number of uses of each encoding.
    """

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        sizes: Sizes,
        store: Store,
        out_uri: str,
        events: EventLog,
        summary: Summary,
        work: list[Order],
    ) -> None:
        self.backend, self.sizes = backend, sizes
        self._settings, self._store, self._out_uri = settings, store, out_uri
        self._events, self._summary = events, summary
        on_gpu = settings.device == "cuda"
        cpu_node = "" if on_gpu else settings.cpu_resource
        self._task = Resources(settings.prepare_cpus, custom=settings.cpu_resource)
        condition = Resources(settings.condition_cpus, settings.condition_gpus * on_gpu, cpu_node)
        decode = Resources(settings.decode_cpus, settings.decode_gpus * on_gpu, cpu_node)
        self.conditioners = Pool(
            lambda: backend.start(ConditionWorker, settings, resources=condition), sizes.conditioners
        )
        self.groups = Pool(lambda: Replica(backend, settings), sizes.groups, loads=True)
        self.decoders = Pool(
            lambda: backend.start(DecodeWorker, settings, store.uri, resources=decode),
            sizes.decoders,
            slots=settings.decode_slots,
            loads=True,
        )
        self._shared = Shared(key for order in work for key in order.encodings)
        self.closing = threading.Event()
        """No further lesson is to begin."""
        self.stopping = threading.Event()
        """Lessons that are being rendered are to end now."""
        self._lock = threading.Lock()
        self._frames: dict[str, int] = {}
        self._frames_logged = 0.0

    # ---------------------------------------------------------------- the steps of a lesson

    def load(self, order: Order) -> Media:
        """A lesson's portrait and sound, as they were when they were checked."""
        media = Media(
            *(self._submit(task, order.lesson, order.prepared) for task in (load_portrait, load_speech))
        )
        self.backend.wait(media.pixels)
        self.backend.wait(media.sound)
        return media

    def kept(self, segment: Segment, last: bool) -> Committed | None:
        """A segment of an earlier run, if the store has it, whole, with what the next one goes on from."""
        found = self._store.find(segment.id)
        if found is None or (CARRY not in found.files and not last):
            return None
        return found if self.backend.get(self._submit(is_intact, self._store.uri, found)) else None

    def segment(
        self, order: Order, job: SegmentJob, media: Media, before: Committed | None, carry: Ref | None
    ) -> tuple[Committed, Ref | None]:
        """Render and commit a segment, as often as the rules allow.

        Args:
            before: the committed segment that it goes on from, if it does.
            carry: that segment's carry, where it is still in memory; else it is read from the store.

        Raises Lost or Failed when the last try has failed, Stopped when the run ends.
        """
        tries = Tries(self._settings.max_tries)
        while True:
            try:
                if before is not None and carry is None:
                    carry = self._submit(read_carry, self._store.uri, before)
                return self._render(order, job, self._condition(order, job, media, carry))
            except Lost as loss:
                self._emit("segment_lost", job, reason=_first_line(loss))
                if not tries.again_after_loss():
                    raise
                # What the lost worker or its node held is made again.
                for key in order.encodings:
                    self._shared.forget(key)
                media, carry = self.load(order), None
            except Failed as failure:
                order.result.failed_tries += 1
                kind = failure_class(failure.cause)
                self._emit("segment_failed", job, failure=kind, reason=_first_line(failure), log=failure.text)
                if not tries.again_after(kind):
                    raise

    def finish(self, order: Order, segments: list[Committed]) -> Measured:
        """Join the segments with the narration and publish the file."""
        self._events.emit("lesson_joining", lesson=order.lesson.lesson_id)
        arguments = (order.lesson, order.prepared, order.output, segments, self._store.uri, self._out_uri)
        return self.backend.get(self._submit(finish_lesson, *arguments))

    def release(self, order: Order) -> None:
        """The lesson is over: encodings that nobody else needs can go."""
        for key in order.encodings:
            self._shared.release(key)

    # ---------------------------------------------------------------- their parts

    def _condition(self, order: Order, job: SegmentJob, media: Media, carry: Ref | None) -> Inputs:
        """All inputs of a segment, computed: a group never waits for one."""
        lesson, result = order.lesson, order.result
        prompt, portrait, *negative = order.encodings
        text, new = self._shared.get(prompt, lambda: self._encode(job, "prompt", lesson.prompt))
        result.prompt_encodings += new
        latents, new = self._shared.get(portrait, lambda: self._encode(job, "portrait", media.pixels))
        result.portrait_encodings += new
        steered_from = None
        if negative:
            words = lesson.settings.negative_prompt
            steered_from, _ = self._shared.get(negative[0], lambda: self._encode(job, "prompt", words))
        speech = self._encode(job, "speech", media.sound, job)
        if carry is not None:
            self.backend.wait(carry)
        return Inputs(text, steered_from, latents, media.pixels, speech, carry)

    def _encode(self, job: SegmentJob, method: str, *arguments: object) -> Ref:
        """One call of a conditioner, finished; what it raised is raised by whoever uses the reference."""
        with self.conditioners.lease(_chain(job)) as lease:
            encoded = lease.worker.submit(method, *arguments)
            self.backend.wait(encoded)
            if self._is_lost(lease.worker):
                lease.replace()
            return encoded

    def _render(self, order: Order, job: SegmentJob, inputs: Inputs) -> tuple[Committed, Ref | None]:
        with self.decoders.lease(_chain(job)) as decoder, self.groups.lease(_chain(job)) as group:
            self._emit("segment_started", job)
            started = time.monotonic()

            def frames(done: int) -> None:
                if self.stopping.is_set():
                    raise Stopped
                if order.result.seconds_to_first_block is None:
                    order.result.seconds_to_first_block = round(time.monotonic() - started, 3)
                self._count(job, done)

            def motion(clip: Ref) -> Ref:
                return self._encode(job, "motion", inputs.pixels, clip)

            hooks = Hooks(frames, group.release, motion)
            try:
                done = render_segment(self.backend, group.worker, decoder.worker, job, inputs, hooks)
            except (Lost, Failed) as error:
                self._mend(error, group, decoder)
                decoder.worker.submit("drop", job)
                raise
        seconds = round(time.monotonic() - started, 3)
        frame_count = len(job.segment.frames(job.frames))
        self._count(job, frame_count, tell=True)
        self._emit("segment_done", job, frames=frame_count, seconds=seconds)
        return done

    def _mend(self, error: Lost | Failed, *leases: Lease) -> None:
        """Replace the workers that are gone; after running out of GPU memory, all of them."""
        out_of_memory = isinstance(error, Failed) and failure_class(error.cause) == "gpu_oom"
        for lease in leases:
            if out_of_memory or self._is_lost(lease.worker):
                lease.replace()

    def _is_lost(self, worker: Worker) -> bool:
        """Whether a worker is known to be gone. One that is busy does not answer in time, and is not."""
        answer = worker.submit("ping")
        if not self.backend.wait(answer, timeout=_PING_SECONDS):
            return False
        try:
            self.backend.get(answer)
        except Lost:
            return True
        return False

    def _count(self, job: SegmentJob, frames: int, tell: bool = False) -> None:
        """Note a segment's decoded frames; an event tells of them now and then, or at once."""
        with self._lock:
            self._frames[job.segment.id] = frames
            done = sum(self._frames.values())
            self._summary.count(done)
            tell = tell or time.monotonic() - self._frames_logged >= _FRAMES_EVENT_SECONDS
            if tell:
                self._frames_logged = time.monotonic()
        if tell:
            self._events.emit("frames", done=done)

    def _submit(self, task: Callable[..., Any], *arguments: object) -> Ref:
        return self.backend.task(task, *arguments, resources=self._task)

    def _emit(self, event: str, job: SegmentJob, **values: object) -> None:
        self._events.emit(event, lesson=job.lesson_id, segment=job.segment.index, **values)

    # ---------------------------------------------------------------- the end

    def stop(self) -> None:
        """End now: nothing new is begun, and what runs is given up at its next block."""
        self.closing.set()
        self.stopping.set()
        for pool in (self.conditioners, self.groups, self.decoders):
            pool.stop()

    def close(self) -> None:
        for pool in (self.conditioners, self.groups, self.decoders):
            pool.close()


def _chain(job: SegmentJob) -> int:
    """Frames from this segment to the lesson's end: nobody else can render them meanwhile."""
    return job.frames - job.segment.frames(job.frames).start


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
