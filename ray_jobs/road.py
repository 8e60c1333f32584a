"""What all lessons on the road share: workers, encodings, the store, the count of frames, the wish to
stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from conf.schema import Settings
from ray_jobs.backend import Backend, Failed, Lost, Ref, Resources
from ray_jobs.events import EventLog
from ray_jobs.failures import Tries, failure_class
from ray_jobs.group import Inputs, Replica
from ray_jobs.lessons import output_name
from ray_jobs.pool import Pool, Sizes, Stopped
from ray_jobs.progress import Summary
from ray_jobs.results import Result
from ray_jobs.segment import Hooks, render_segment
from ray_jobs.shared import Shared, content_key
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
from stages.types import Lesson, Measured, Prepared, Segment, SegmentJob

_PING_SECONDS = 2.0
_FRAMES_EVENT_SECONDS = 10.0


def encoding_keys(lesson: Lesson, prepared: Prepared) -> list[str]:
    """Shared encodings that a lesson uses: its prompt, its portrait, and a negative prompt under guidance."""
    keys = [content_key("prompt", lesson.prompt), content_key("portrait", prepared.picture.sha256)]
    if lesson.settings.sample_guide_scale > 0:
        keys.append(content_key("prompt", lesson.settings.negative_prompt))
    return keys


class Road:
    """Pools and shared state of one run; its methods are called by several lessons at once.

    Args:
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
        work: Iterable[tuple[Lesson, Prepared]],
    ) -> None:
        self.backend, self.settings, self.sizes = backend, settings, sizes
        self.store, self.events = store, events
        self._out_uri, self._summary = out_uri, summary
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
        self._shared = Shared(key for lesson, prepared in work for key in encoding_keys(lesson, prepared))
        self.closing = threading.Event()
        """No further lesson is to begin."""
        self.stopping = threading.Event()
        """Lessons that are being rendered are to end now."""
        self._lock = threading.Lock()
        self._frames: dict[str, int] = {}
        self._frames_logged = 0.0

    # ---------------------------------------------------------------- the steps of a lesson

    def load(self, lesson: Lesson, prepared: Prepared) -> tuple[Ref, Ref]:
        """A lesson's portrait and sound, as they were when they were checked."""
        refs = [
            self.backend.task(f, lesson, prepared, resources=self._task) for f in (load_portrait, load_speech)
        ]
        for ref in refs:
            self.backend.wait(ref)
        return refs[0], refs[1]

    def kept(self, segment: Segment, last: bool) -> Committed | None:
        """A segment of an earlier run, if the store has it, whole, with what the next one goes on from."""
        found = self.store.find(segment.id)
        if found is None or (CARRY not in found.files and not last):
            return None
        intact = self.backend.get(self.backend.task(is_intact, self.store.uri, found, resources=self._task))
        return found if intact else None

    def segment(
        self,
        job: SegmentJob,
        lesson: Lesson,
        prepared: Prepared,
        media: tuple[Ref, Ref],
        before: Committed | None,
        carry: Ref | None,
        result: Result,
    ) -> tuple[Committed, Ref | None]:
        """Render and commit a segment, as often as the rules allow.

        Args:
            before: the committed segment that it goes on from, if it does.
            carry: that segment's carry, where it is still in memory; else it is read from the store.
            result: counts the tries and the encodings.

        Raises Lost or Failed when the last try has failed, Stopped when the run ends.
        """
        tries = Tries(self.settings.max_tries)
        place = {"lesson": job.lesson_id, "segment": job.segment.index}
        while True:
            try:
                if before is not None and carry is None:
                    carry = self.backend.task(read_carry, self.store.uri, before, resources=self._task)
                inputs = self._condition(job, lesson, prepared, media, carry, result)
                return self._render(job, inputs, result)
            except Lost as loss:
                self.events.emit("segment_lost", **place, reason=_first_line(loss))
                for key in encoding_keys(lesson, prepared):
                    self._shared.forget(key)
                media, carry = self.load(lesson, prepared), None
                if not tries.again_after_loss():
                    raise
            except Failed as failure:
                kind = failure_class(failure.cause)
                result.failed_tries += 1
                self.events.emit(
                    "segment_failed", **place, failure=kind, reason=_first_line(failure), log=failure.text
                )
                if not tries.again_after(kind):
                    raise

    def finish(self, lesson: Lesson, prepared: Prepared, segments: list[Committed]) -> Measured:
        """Join the segments with the narration and publish the file."""
        name = output_name(lesson)
        args = (lesson, prepared, name, segments, self.store.uri, self._out_uri)
        return self.backend.get(self.backend.task(finish_lesson, *args, resources=self._task))

    def release(self, lesson: Lesson, prepared: Prepared) -> None:
        """The lesson is over: encodings that nobody else needs can go."""
        for key in encoding_keys(lesson, prepared):
            self._shared.release(key)

    # ---------------------------------------------------------------- their parts

    def _encode(self, priority: float, method: str, *args: object) -> Ref:
        with self.conditioners.lease(priority) as lease:
            ref = lease.worker.submit(method, *args)
            self.backend.wait(ref)
            if self._is_lost(lease.worker):
                lease.replace()
            return ref

    def _condition(
        self,
        job: SegmentJob,
        lesson: Lesson,
        prepared: Prepared,
        media: tuple[Ref, Ref],
        carry: Ref | None,
        result: Result,
    ) -> Inputs:
        """All inputs of a segment, computed: a group never waits for one."""
        pixels, sound = media
        urgency = _chain(job)
        keys = encoding_keys(lesson, prepared)
        prompts = [lesson.prompt, lesson.settings.negative_prompt]
        text, new_text = self._shared.get(keys[0], lambda: self._encode(urgency, "prompt", prompts[0]))
        portrait, new_portrait = self._shared.get(keys[1], lambda: self._encode(urgency, "portrait", pixels))
        negative = None
        if len(keys) > 2:
            negative, _ = self._shared.get(keys[2], lambda: self._encode(urgency, "prompt", prompts[1]))
        result.prompt_encodings += new_text
        result.portrait_encodings += new_portrait
        speech = self._encode(urgency, "speech", sound, job)
        return Inputs(text, negative, portrait, pixels, speech, carry)

    def _render(self, job: SegmentJob, inputs: Inputs, result: Result) -> tuple[Committed, Ref | None]:
        with self.decoders.lease(_chain(job)) as decoder, self.groups.lease(_chain(job)) as group:
            self.events.emit("segment_started", lesson=job.lesson_id, segment=job.segment.index)
            started = time.monotonic()

            def frames(done: int) -> None:
                if self.stopping.is_set():
                    raise Stopped
                if result.seconds_to_first_block is None:
                    result.seconds_to_first_block = round(time.monotonic() - started, 3)
                self._count(job.segment.id, done)

            hooks = Hooks(
                frames, group.release, lambda clip: self._encode(_chain(job), "motion", inputs.pixels, clip)
            )
            try:
                done = render_segment(self.backend, group.worker, decoder.worker, job, inputs, hooks)
            except (Lost, Failed) as error:
                out_of_memory = isinstance(error, Failed) and failure_class(error.cause) == "gpu_oom"
                for lease in (group, decoder):
                    if out_of_memory or self._is_lost(lease.worker):
                        lease.replace()
                decoder.worker.submit("drop", job)
                raise
        seconds = round(time.monotonic() - started, 3)
        frame_count = len(job.segment.frames(job.frames))
        self.events.emit(
            "segment_done",
            lesson=job.lesson_id,
            segment=job.segment.index,
            frames=frame_count,
            seconds=seconds,
        )
        return done

    def _is_lost(self, worker: object) -> bool:
        """Whether a worker is known to be gone. One that is merely busy does not answer in time, and is
        not."""
        answer = worker.submit("ping")  # type: ignore[attr-defined]
        if not self.backend.wait(answer, timeout=_PING_SECONDS):
            return False
        try:
            self.backend.get(answer)
        except Lost:
            return True
        return False

    def _count(self, segment: str, frames: int) -> None:
        with self._lock:
            self._frames[segment] = frames
            self._summary.count(sum(self._frames.values()))
            if time.monotonic() - self._frames_logged < _FRAMES_EVENT_SECONDS:
                return
            self._frames_logged = time.monotonic()
            done = sum(self._frames.values())
        self.events.emit("frames", done=done)

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
    """Frames from this segment to the lesson's end. Nobody else can render them meanwhile, so the most go
    first."""
    return job.frames - job.segment.frames(job.frames).start


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
