"""Checks every lesson before any model is loaded, and remembers what it found by content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray_jobs.backend import Backend, Failed, Resources
from ray_jobs.settings import RUN_FIELDS
from ray_jobs.store import Store
from ray_jobs.workers import check_lesson
from stages.identity import GENERATION_VERSION
from stages.paths import open_binary
from stages.prepare import PREPARE_VERSION
from stages.types import Lesson, Picture, Prepared, Problem, RowError, Segment, as_dict

_HASHING_THREADS = 4


@dataclass(frozen=True)
class Checked:
    """Lessons that can be rendered, and what is wrong with the others."""

    ready: list[tuple[Lesson, Prepared]]
    problems: list[Problem]


def check_lessons(
    lessons: list[Lesson], weights: str, store: Store | None, backend: Callable[[], Backend], task: Resources
) -> Checked:
    """Open every portrait and recording once in their life.

    What was found is kept in the store under the hash of the inputs' bytes and the settings, so that a rerun
    reads them but decodes none. `backend` is called only if there is something to decode.
    """
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        keys = list(threads.map(lambda lesson: _key(lesson, weights), lessons))
        known = list(threads.map(lambda key: store.get_prepared(key) if key and store else None, keys))
    found: dict[int, Prepared | RowError] = {}
    for lesson, values in zip(lessons, known, strict=True):
        if values and (prepared := _from_json(values)):
            found[lesson.number] = prepared
    missing = [(lesson, key) for lesson, key in zip(lessons, keys, strict=True) if lesson.number not in found]
    for lesson, key, result in _check_now(missing, weights, backend, task):
        found[lesson.number] = result
        if isinstance(result, Prepared) and key and store:
            store.put_prepared(key, as_dict(result))
    results = [(lesson, found[lesson.number]) for lesson in lessons]
    return Checked(
        [(lesson, result) for lesson, result in results if isinstance(result, Prepared)],
        [
            result.problem(lesson.number, lesson.lesson_id)
            for lesson, result in results
            if isinstance(result, RowError)
        ],
    )


def _check_now(
    lessons: list[tuple[Lesson, str | None]], weights: str, backend: Callable[[], Backend], task: Resources
) -> Iterator[tuple[Lesson, str | None, Prepared | RowError]]:
    if not lessons:
        return
    running = backend()
    refs = [running.task(check_lesson, lesson, weights, resources=task) for lesson, _ in lessons]
    for (lesson, key), ref in zip(lessons, refs, strict=True):
        try:
            yield lesson, key, running.get(ref)
        except Failed as failure:
            # Not a rule of ours but a library that gave up on this input: the row fails, the others do not.
            yield (
                lesson,
                None,
                RowError("image, audio", f"{lesson.image}, {lesson.audio}", f"cannot be read: {failure}"),
            )


def _key(lesson: Lesson, weights: str) -> str | None:
    """Hash of all that `prepare` looks at; None where an input cannot be read, of which prepare says why."""
    digest = hashlib.sha256()
    try:
        for uri in (lesson.image, lesson.audio):
            with open_binary(uri) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]
    except (OSError, ValueError):
        return None
    every = dataclasses.asdict(lesson.settings)
    settings = {name: value for name, value in every.items() if name not in RUN_FIELDS}
    versions = (PREPARE_VERSION, GENERATION_VERSION)
    digest.update(json.dumps([lesson.prompt, weights, versions, settings], sort_keys=True).encode())
    return digest.hexdigest()


def _from_json(values: dict[str, Any]) -> Prepared | None:
    """What `as_dict` made of a Prepared; None if it is damaged, and has to be found out again."""
    try:
        picture = Picture(**{**values["picture"], "crop": tuple(values["picture"]["crop"])})
        segments = tuple(Segment(**segment) for segment in values["segments"])
        return Prepared(
            **{**values, "picture": picture, "segments": segments, "warnings": tuple(values["warnings"])}
        )
    except (KeyError, TypeError):
        return None
