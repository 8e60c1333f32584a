"""What a run would do, known from the manifest, the settings and the store alone: no model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from model.files import CheckpointError, fingerprint
from ray_jobs.backend import Backend, LocalBackend, Resources
from ray_jobs.check import check_lessons
from ray_jobs.folder import join
from ray_jobs.lessons import output_name, read_rows
from ray_jobs.progress import duration
from ray_jobs.settings import Effective, Layer, resolve
from ray_jobs.store import Store
from stages import manifest
from stages.types import FPS, Lesson, Prepared, Problem


class Refused(Exception):
    """Nothing can start. The text says what has to change."""


@dataclass(frozen=True)
class Request:
    """A command as the user gave it."""

    manifest: str
    layers: list[Layer] = field(default_factory=list)
    """Settings, from the least to the most specific; see `ray_jobs/settings.py`."""
    fill: Mapping[str, str] = field(default_factory=dict)
    """Columns for rows that leave them empty."""
    out: str | None = None
    store: str | None = None
    """URI of a store that several runs share; None keeps it in the output folder."""
    only: tuple[str, ...] = ()
    limit: int | None = None
    strict: bool = False
    max_failures: int | None = None
    local: bool = False
    address: str | None = None
    """Of a running Ray cluster; None starts one on this machine."""


@dataclass(frozen=True)
class Plan:
    """A course that has been checked."""

    effective: Effective
    rows: dict[int, str]
    """Row number -> lesson id, of every row that was asked for."""
    ready: list[tuple[Lesson, Prepared]]
    problems: list[Problem]
    in_store: frozenset[str]
    """Identities of segments that need not be rendered."""

    def missing_segments(self, prepared: Prepared) -> int:
        return sum(segment.id not in self.in_store for segment in prepared.segments)

    def missing_frames(self, prepared: Prepared) -> int:
        missing = (segment for segment in prepared.segments if segment.id not in self.in_store)
        return sum(len(segment.frames(prepared.frames)) for segment in missing)


def make_plan(
    request: Request, effective: Effective, weights: str, store: Store | None, backend: Callable[[], Backend]
) -> Plan:
    """Read and check a manifest. Raises Refused where not even a single row could be judged.

    Args:
        weights: fingerprint of the weights.
        store: asked for what is known and there already; None if there is no output folder yet.
        backend: where portraits and recordings are opened that no earlier run has seen.
    """
    rows, problems = manifest.read(request.manifest)
    if not rows and problems:
        raise Refused("\n".join(str(problem) for problem in problems))
    course = read_rows(rows, request.manifest, effective, request.fill, problems)
    ids = {row.number: row.values.get("lesson_id") or request.fill.get("lesson_id", "") for row in rows}
    ids |= {problem.row: problem.lesson_id for problem in problems if problem.row not in ids}
    chosen = _choose(ids, request)
    lessons = [lesson for lesson in course.lessons if lesson.number in chosen]
    task = Resources(effective.settings.prepare_cpus, custom=effective.settings.cpu_resource)
    checked = check_lessons(lessons, weights, store, backend, task)
    found = [problem for problem in course.problems if problem.row in chosen or problem.row == 0]
    segments = {segment.id for _, prepared in checked.ready for segment in prepared.segments}
    in_store = frozenset(id for id in segments if store is not None and store.find(id) is not None)
    return Plan(
        effective,
        {number: id for number, id in ids.items() if number in chosen},
        checked.ready,
        sorted([*found, *checked.problems], key=lambda problem: problem.row),
        in_store,
    )


def _choose(ids: Mapping[int, str], request: Request) -> set[int]:
    """Rows that `--only` and `--limit` leave."""
    unknown = [id for id in request.only if id not in ids.values()]
    if unknown:
        raise Refused(f"--only {','.join(unknown)}: the manifest has no lesson of that id")
    numbers = [number for number, id in sorted(ids.items()) if not request.only or id in request.only]
    return set(numbers[: request.limit])


# ---------------------------------------------------------------- for the eye


def show_settings(effective: Effective, console: Console) -> None:
    """The settings in force, once, each with where it came from. Defaults are in `docs/settings.md`."""
    chosen = [(name, origin) for name, origin in effective.origins.items() if origin != "default"]
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for name, origin in sorted(chosen):
        table.add_row(name, _short(getattr(effective.settings, name)), origin)
    console.print(table)
    console.print(f"{len(effective.origins) - len(chosen)} other settings have their defaults\n")


def show_problems(problems: list[Problem], console: Console) -> None:
    for problem in problems:
        console.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)


def show_plan(plan: Plan, console: Console) -> None:
    """True sizes, frames, segments, what is in the store already, and totals."""
    table = Table(
        "row", "lesson", "size", "cut away", "frames", "length", "segments", "in store", "output", box=None
    )
    for lesson, prepared in plan.ready:
        picture, here = prepared.picture, len(prepared.segments) - plan.missing_segments(prepared)
        table.add_row(
            str(lesson.number),
            lesson.lesson_id,
            f"{picture.width}x{picture.height}",
            f"{picture.cut_away:.0%}",
            str(prepared.frames),
            duration(prepared.frames / FPS),
            str(len(prepared.segments)),
            str(here),
            output_name(lesson),
        )
    console.print(table)
    for lesson, prepared in plan.ready:
        for warning in prepared.warnings:
            console.print(
                f"row {lesson.number} ({lesson.lesson_id}): warning: {warning}", style="yellow", markup=False
            )
        for segment in prepared.segments if len(prepared.segments) < 4 else ():
            state = "in store" if segment.id in plan.in_store else "to render"
            console.print(
                f"  {lesson.lesson_id} segment {segment.index}: {segment.id[:16]} {state}", markup=False
            )
    show_problems(plan.problems, console)
    frames = sum(prepared.frames for _, prepared in plan.ready)
    missing = sum(plan.missing_frames(prepared) for _, prepared in plan.ready)
    bad = len({problem.row for problem in plan.problems})
    console.print(
        f"\n{len(plan.ready)} lessons can be rendered, {bad} cannot; {duration(frames / FPS)} of video "
        f"({frames} frames), of which {duration(missing / FPS)} ({missing} frames) are not in the store yet"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def default_store(out: str) -> str:
    """The store of an output folder that was given no other."""
    return join(out if "://" in out else str(Path(out).absolute()), ".lectern")


def plan(request: Request, console: Console) -> int:
    """`lectern plan`: show what `render` would do. Returns 0, or 3 if some rows cannot be rendered."""
    effective = resolve(request.layers)
    show_settings(effective, console)
    location = request.store or (default_store(request.out) if request.out else None)
    try:
        weights = fingerprint(effective.settings)
    except CheckpointError as error:
        console.print(
            f"identities are not those of a run, since there are no weights: {error}\n", style="yellow"
        )
        weights, location = "", None
    store = Store(location) if location else None
    found = make_plan(request, effective, weights, store, LocalBackend)
    show_plan(found, console)
    return 3 if found.problems else 0
