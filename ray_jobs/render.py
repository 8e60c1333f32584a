"""The main path: a manifest in, verified MP4s out. `render_lesson` is a lesson's whole road."""

from __future__ import annotations

from ray_jobs.orders import Order
from ray_jobs.plan import Request
from ray_jobs.road import Road
from ray_jobs.run import Run
from ray_jobs.store import Committed
from stages.types import Measured


def render(request: Request) -> int:
    """Render a manifest as `lectern render` does.

    Returns the exit code; raises Refused where nothing can start.
    """
    with Run(request) as run:
        plan = run.check()
        orders = run.not_delivered(plan)
        if orders:
            with run.open_road(orders) as road:
                run.each(orders, road, render_lesson)
        return run.finish()


def render_lesson(road: Road, order: Order) -> Measured:
    """One lesson from its portrait and recording to its finished, measured file.

    Segments that the store has are not rendered again. Each of the others goes on from the one before it:
    from its carry in memory, or from the store's where that segment was rendered by another run.
    """
    carries = order.lesson.settings.continuity == "carry"
    media = carry = None
    committed: list[Committed] = []
    for segment in order.prepared.segments:
        before = committed[-1] if committed and carries else None
        job = order.job(segment, carried=before is not None)
        done = road.kept(segment, job.last)
        if done is None:
            media = media or road.load(order)
            done, carry = road.segment(order, job, media, before, carry)
            order.result.segments_rendered += 1
        else:
            carry = None
        committed.append(done)
    return road.finish(order, committed)
