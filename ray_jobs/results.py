"""`results.csv` and `results.parquet`: every row of the manifest with what became of it."""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from ray_jobs.folder import Folder
from ray_jobs.plan import Plan
from ray_jobs.progress import duration
from stages.types import Lesson, Measured, Prepared, Row

STATUSES = ("done", "reused", "failed", "invalid", "stopped", "not_started")


@dataclass
class Result:
    """One row of the results. Times in seconds, sizes in pixels and bytes."""

    row: int
    lesson_id: str
    status: str = "not_started"
    """One of STATUSES."""
    failure: str = ""
    """Class of a failure: input, gpu_oom, host_oom, storage, hang, bug."""
    reason: str = ""
    output: str = ""
    """The finished file: its path, or its URI."""
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    video_seconds: float | None = None
    sound_seconds: float | None = None
    bytes: int | None = None
    sha256: str = ""
    cut_away: float | None = None
    """Share of the portrait that is not seen."""
    segments: int = 0
    segments_rendered: int = 0
    """The others were in the store."""
    prompt_encodings: int = 0
    """1 if the prompt was encoded for this lesson, 0 if another's encoding or a finished file served."""
    portrait_encodings: int = 0
    failed_tries: int = 0
    seconds_to_first_block: float | None = None
    """From a transformer's being free to the first decoded block."""
    seconds: float | None = None
    """From the lesson's first step to its last."""
    warnings: str = ""
    extras: dict[str, str] = field(default_factory=dict)
    """The row's own `x_` columns."""

    @property
    def delivered(self) -> bool:
        return self.status in ("done", "reused")

    def plan(self, lesson: Lesson, prepared: Prepared) -> None:
        """Fill in what is known before rendering."""
        self.segments, self.cut_away = len(prepared.segments), round(prepared.picture.cut_away, 4)
        self.warnings, self.extras = "; ".join(prepared.warnings), dict(lesson.extras)

    def take(self, measured: Measured, status: str, output: str) -> None:
        """The finished file is there, and is what was measured."""
        self.status, self.output = status, output
        for name in ("width", "height", "frames", "video_seconds", "sound_seconds", "bytes", "sha256"):
            setattr(self, name, getattr(measured, name))
        self.warnings = "; ".join(filter(None, [self.warnings, *measured.warnings]))

    def fail(self, status: str, failure: str, reason: str) -> None:
        self.status, self.failure, self.reason = status, failure, reason


def begin(plan: Plan) -> dict[int, Result]:
    """A result for every row that was asked for: the bad ones final, the others not started."""
    results = {row.number: Result(row.number, row.values.get("lesson_id", "")) for row in plan.rows}
    for row in plan.rows:
        results[row.number].extras = {k: v for k, v in row.values.items() if k.startswith("x_")}
    for lesson, prepared in plan.ready:
        results[lesson.number].plan(lesson, prepared)
    for number, group in itertools.groupby(plan.problems, key=lambda problem: problem.row):
        if number in results:
            reason = "; ".join(f"{problem.field}={problem.value!r}: {problem.rule}" for problem in group)
            results[number].fail("invalid", "input", reason)
    return results


def earlier(out: Folder, rows: list[Row]) -> list[Result]:
    """Results of rows that this run leaves out, as the run before noted them."""
    known = {}
    if rows and out.exists("results.parquet"):
        table = pq.read_table(io.BytesIO(out.read("results.parquet"))).to_pylist()
        known = {values["lesson_id"]: values for values in table}
    results = []
    for row in rows:
        lesson_id = row.values.get("lesson_id", "")
        values = known.get(lesson_id, {})
        columns = {name: values[name] for name in COLUMNS if name in values}
        extras = {name: value for name, value in row.values.items() if name.startswith("x_")}
        results.append(Result(**{**columns, "row": row.number, "lesson_id": lesson_id, "extras": extras}))
    return results


COLUMNS = [f.name for f in fields(Result) if f.name != "extras"]


def write(out: Folder, results: list[Result]) -> None:
    """Write both files, rows in the manifest's order, `x_` columns last."""
    results = sorted(results, key=lambda result: result.row)
    extras = list(dict.fromkeys(name for result in results for name in result.extras))
    table = [
        {**{c: getattr(r, c) for c in COLUMNS}, **{x: r.extras.get(x, "") for x in extras}} for r in results
    ]

    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *extras], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    # With a mark at the front, spreadsheet programs read Chinese ids as what they are.
    out.write("results.csv", b"\xef\xbb\xbf" + text.getvalue().encode())

    buffer = io.BytesIO()
    schema = pa.schema([(name, _column_type(name)) for name in [*COLUMNS, *extras]])
    pq.write_table(pa.Table.from_pylist(table, schema), buffer)
    out.write("results.parquet", buffer.getvalue())


def _column_type(name: str) -> pa.DataType:
    annotations: dict[str, Any] = Result.__annotations__
    kind = str(annotations.get(name, "str")).split(" ")[0]
    return {"int": pa.int64(), "float": pa.float64()}.get(kind, pa.string())


def show(results: list[Result], seconds: float, console: Console) -> None:
    """The end of a run, for the eye: totals, what was shared, and every row that was not delivered."""
    counts = Counter(result.status for result in results)
    console.print(
        ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status]), style="bold"
    )
    made = [result for result in results if result.status == "done"]
    if made:
        video = sum(result.video_seconds or 0 for result in made)
        prompts = sum(result.prompt_encodings for result in results)
        portraits = sum(result.portrait_encodings for result in results)
        rendered = sum(result.segments_rendered for result in results)
        console.print(
            f"{duration(video)} of video in {duration(seconds)}; {rendered} segments rendered, "
            f"{prompts} prompts and {portraits} portraits encoded",
            highlight=False,
        )
    for result in results:
        if result.reason and result.status != "invalid":
            text = (
                f"row {result.row} ({result.lesson_id}): {result.status}, {result.failure}: {result.reason}"
            )
            console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        elif result.warnings:
            text = f"row {result.row} ({result.lesson_id}): warning: {result.warnings}"
            console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
