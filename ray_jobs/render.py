"""The main path: a manifest in, verified MP4s out. `render_lesson` is a lesson's whole road."""

from __future__ import annotations

from ray_jobs.plan import Request
from ray_jobs.results import Result
from ray_jobs.road import Road
from ray_jobs.run import Run
from ray_jobs.store import Committed
from stages.types import Lesson, Measured, Prepared, SegmentJob


def render(request: Request) -> int:
    """Render a manifest as `lectern render` does. Returns the exit code; raises Refused where nothing can
    start."""
    with Run(request) as run:
        plan = run.check()
        work = run.not_delivered(plan)
        if work:
            with run.open_road(work) as road:
                run.each(work, road, render_lesson)
        return run.finish()


def render_lesson(road: Road, lesson: Lesson, prepared: Prepared, result: Result) -> Measured:
    """One lesson from its portrait and recording to its finished, measured file.

    Segments that the store has are not rendered again. Each of the others goes on from the one before it:
    from its carry in memory, or from the store's where that segment was rendered by another run.
    """
    carries = lesson.settings.continuity == "carry"
    media = carry = None
    committed: list[Committed] = []
    for segment in prepared.segments:
        last = segment is prepared.segments[-1]
        done = road.kept(segment, last)
        if done is not None:
            carry = None
        else:
            media = media or road.load(lesson, prepared)
            before = committed[-1] if committed and carries else None
            job = SegmentJob(
                lesson.lesson_id,
                lesson.settings,
                prepared.picture,
                segment,
                prepared.frames,
                carried=before is not None,
                last=last,
            )
            done, carry = road.segment(
                job, lesson, prepared, media, before, carry if carries else None, result
            )
            result.segments_rendered += 1
        committed.append(done)
    return road.finish(lesson, prepared, committed)
