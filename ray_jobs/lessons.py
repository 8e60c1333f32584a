"""Rows of a manifest become lessons, or problems that name row, lesson, field, value and rule."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_jobs.settings import FIELDS, Effective, SettingsError, override, unknown
from stages.names import name_rule, same_file
from stages.paths import resolve
from stages.types import Lesson, Problem, Row
from stages.validate import validate

REQUIRED = ("lesson_id", "image", "audio", "prompt")


@dataclass(frozen=True)
class Course:
    """A manifest as far as it can be judged without opening its media."""

    lessons: list[Lesson]
    problems: list[Problem]


def read_rows(
    rows: Sequence[Row],
    manifest: str,
    effective: Effective,
    fill: Mapping[str, str],
    problems: Sequence[Problem],
) -> Course:
    """Check every row. `fill` gives columns that a row leaves empty; a row's own value wins.

    One row can have several problems; all of them are reported. Lessons without a problem are returned.
    """
    found = list(problems)
    lessons = []
    for row in rows:
        values = {**fill, **row.values}
        lesson, own = _read_row(row, values, manifest, effective)
        found += own
        if lesson is not None and not own:
            lessons.append(lesson)
    found += _shared_ids(rows, fill)
    bad = {problem.row for problem in found}
    found += _shared_outputs([lesson for lesson in lessons if lesson.number not in bad])
    bad = {problem.row for problem in found}
    found.sort(key=lambda problem: problem.row)
    return Course([lesson for lesson in lessons if lesson.number not in bad], found)


def output_name(lesson: Lesson) -> str:
    """The file that a lesson is delivered as, relative to the output folder."""
    return lesson.settings.output_name.format(lesson_id=lesson.lesson_id, **lesson.extras)


def _read_row(
    row: Row, values: Mapping[str, str], manifest: str, effective: Effective
) -> tuple[Lesson | None, list[Problem]]:
    lesson_id = values.get("lesson_id", "")
    problems: list[Problem] = []

    def problem(field: str, value: str, rule: str) -> None:
        problems.append(Problem(row.number, lesson_id, field, value, rule))

    for name in REQUIRED:
        if not values.get(name):
            problem(name, "", f"is empty, and no {name}=... was given for the whole run")
    if lesson_id and (rule := name_rule(lesson_id)):
        problem("lesson_id", lesson_id, rule)
    extras = {name: value for name, value in values.items() if name.startswith("x_")}
    own = {name: value for name, value in values.items() if name not in REQUIRED and name not in extras}
    for name in [name for name in own if name not in FIELDS]:
        problem(name, own.pop(name), _unknown_column(name))
    settings = effective.settings
    for name, value in own.items():
        try:
            settings = override(settings, {name: value}, f"row {row.number}")
        except SettingsError as error:
            problem(name, value, str(error).split(": ", 2)[-1])
    for field, setting, rule in validate(settings):
        problem(field, setting, rule)
    if problems:
        return None, problems
    image, audio = resolve(values["image"], manifest), resolve(values["audio"], manifest)
    lesson = Lesson(row.number, lesson_id, image, audio, values["prompt"], settings, extras)
    try:
        name = output_name(lesson)
    except KeyError as error:
        problem("output_name", settings.output_name, f"names a column that the row does not have: {error}")
        return None, problems
    if rule := name_rule(name):
        problem("output_name", name, rule)
    elif not name.endswith(".mp4"):
        problem("output_name", name, "must end in .mp4")
    return lesson, problems


def _unknown_column(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), REQUIRED, n=1)
    hint = f"did you mean {close[0]}?" if close else unknown(name)
    return f"unknown column ({hint}); columns of your own begin with x_"


def _shared_ids(rows: Sequence[Row], fill: Mapping[str, str]) -> list[Problem]:
    """A problem for each row whose id another row has too; some disks take upper and lower case for one."""
    ids = [(row.number, {**fill, **row.values}.get("lesson_id", "")) for row in rows]
    rows_of = defaultdict(list)
    for number, lesson_id in ids:
        rows_of[same_file(lesson_id)].append(number)
    problems = []
    for number, lesson_id in ids:
        others = [str(other) for other in rows_of[same_file(lesson_id)] if other != number]
        if lesson_id and others:
            rule = f"is also the id of row {', '.join(others)}; ids must differ by more than case"
            problems.append(Problem(number, lesson_id, "lesson_id", lesson_id, rule))
    return problems


def _shared_outputs(lessons: Sequence[Lesson]) -> list[Problem]:
    names = Counter(same_file(output_name(lesson)) for lesson in lessons)
    return [
        Problem(lesson.number, lesson.lesson_id, "output_name", name, "another lesson has the same file")
        for lesson in lessons
        if names[same_file(name := output_name(lesson))] > 1
    ]
