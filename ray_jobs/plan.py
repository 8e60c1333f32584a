"""What a run would do, known from the manifest, the settings and the store alone: no model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.spec import TextEncoderSpec, VaeSpec
from model.files import CheckpointError, fingerprint
from ray_jobs.backend import Backend, LocalBackend, Resources
from ray_jobs.check import check_lessons
from ray_jobs.exit_codes import ALL_DELIVERED, NOT_ALL_DELIVERED
from ray_jobs.folder import join
from ray_jobs.lessons import output_name, read_rows
from ray_jobs.progress import duration
from ray_jobs.settings import Effective, Layer, resolve
from ray_jobs.store import Store
from stages import manifest
from stages.types import FPS, Lesson, Prepared, Problem, Row

_LOOKUP_THREADS = 16
_SHOWN_IDENTITIES = 3


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

    weights: str
    """Fingerprint of the weights; empty where there are none yet, and identities mean nothing."""
    rows: list[Row]
    """Every row that was asked for, as it stands in the manifest."""
    others: list[Row]
    """Those that `--only` and `--limit` leave out."""
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
    # A line that could not be read is a row too, of which only the id may be known.
    unread = {problem.row: problem.lesson_id for problem in problems if problem.row}
    rows += [Row(number, {"lesson_id": lesson_id}) for number, lesson_id in unread.items()]
    chosen = _choose(rows, request)
    numbers = {row.number for row in chosen}
    lessons = [lesson for lesson in course.lessons if lesson.number in numbers]
    task = Resources(effective.settings.prepare_cpus, custom=effective.settings.cpu_resource)
    checked = check_lessons(lessons, weights, store, backend, task)
    found = [problem for problem in course.problems if problem.row in numbers or problem.row == 0]
    problems = sorted([*found, *checked.problems], key=lambda problem: problem.row)
    others = [row for row in rows if row.number not in numbers]
    return Plan(weights, chosen, others, checked.ready, problems, _kept(checked.ready, store))


def _kept(ready: list[tuple[Lesson, Prepared]], store: Store | None) -> frozenset[str]:
    """Identities of the lessons' segments that the store has."""
    if store is None:
        return frozenset()
    ids = list({segment.id for _, prepared in ready for segment in prepared.segments})
    with ThreadPoolExecutor(_LOOKUP_THREADS) as threads:
        return frozenset(id for id, found in zip(ids, threads.map(store.find, ids), strict=True) if found)


def _choose(rows: list[Row], request: Request) -> list[Row]:
    """Rows that `--only` and `--limit` leave, in the manifest's order."""
    ids = {row.values.get("lesson_id", "") for row in rows}
    unknown = [lesson_id for lesson_id in request.only if lesson_id not in ids]
    if unknown:
        raise Refused(f"--only {','.join(unknown)}: the manifest has no lesson of that id")
    wanted = [row for row in rows if not request.only or row.values.get("lesson_id") in request.only]
    return sorted(wanted, key=lambda row: row.number)[: request.limit]


# ---------------------------------------------------------------- for the eye


def show_settings(effective: Effective, console: Console) -> None:
    """The settings in force, once, each with where it came from; the defaults in one paragraph."""
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    defaults = []
    for name, origin in sorted(effective.origins.items()):
        value = _short(getattr(effective.settings, name))
        if origin == "default":
            defaults.append(f"{name}={value or repr(value)}")
        else:
            table.add_row(name, Text(value), origin)
    console.print(table)
    console.print(Text("default: " + " ".join(defaults) + "\n"), style="dim")


def show_problems(problems: list[Problem], console: Console) -> None:
    for problem in problems:
        console.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)


def show_plan(plan: Plan, console: Console) -> None:
    """True sizes, frames, segments, which of them are in the store already (marked `+`), and totals."""
    titles = ("row", "lesson", "size", "cut away", "frames", "length", "in store", "segments", "output")
    table = Table(*titles, box=None)
    for lesson, prepared in plan.ready:
        picture, segments = prepared.picture, len(prepared.segments)
        table.add_row(
            str(lesson.number),
            lesson.lesson_id,
            f"{picture.width}x{picture.height}",
            f"{picture.cut_away:.0%}",
            str(prepared.frames),
            duration(prepared.frames / FPS),
            f"{segments - plan.missing_segments(prepared)} of {segments}",
            _identities(plan, prepared),
            output_name(lesson),
        )
    console.print(table)
    for lesson, prepared in plan.ready:
        for warning in prepared.warnings:
            text = f"row {lesson.number} ({lesson.lesson_id}): warning: {warning}"
            console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
    show_problems(plan.problems, console)
    frames = sum(prepared.frames for _, prepared in plan.ready)
    missing = sum(plan.missing_frames(prepared) for _, prepared in plan.ready)
    bad = len({problem.row for problem in plan.problems})
    console.print(
        f"\n{len(plan.ready)} lessons can be rendered, {bad} cannot; {duration(frames / FPS)} of video "
        f"({frames} frames), of which {duration(missing / FPS)} ({missing} frames) are not in the store yet",
        soft_wrap=True,
    )


def _identities(plan: Plan, prepared: Prepared) -> str:
    """The beginnings of the first segments' identities; none without weights, which are part of them."""
    if not plan.weights:
        return "no weights yet"
    shown = [("+" if s.id in plan.in_store else "") + s.id[:8] for s in prepared.segments[:_SHOWN_IDENTITIES]]
    more = len(prepared.segments) - len(shown)
    return " ".join(shown) + (f" and {more} more" if more else "")


def _short(value: Any) -> str:
    if not isinstance(value, VaeSpec | TextEncoderSpec):
        return str(value)
    published = dataclasses.asdict(type(value)())
    other = {name: part for name, part in dataclasses.asdict(value).items() if part != published[name]}
    return " ".join(f"{name}={part}" for name, part in other.items()) or "as published"


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
    return NOT_ALL_DELIVERED if found.problems else ALL_DELIVERED
