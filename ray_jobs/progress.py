"""What the user sees while a run goes on: a live table in a terminal, one plain line a minute elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ray_jobs.events import Event

_SHOWN_LESSONS = 12
_LOG_WIDTH = 250


@dataclass
class Summary:
    """A run as its events tell it. Fed one event after another, by the run itself or by `lectern status`."""

    run: str = ""
    started: float = 0.0
    now: float = 0.0
    lessons: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    running: dict[str, str] = field(default_factory=dict)
    """Lesson -> what is being done for it."""
    segments: int = 0
    segments_done: int = 0
    frames: int = 0
    """Frames that this run has to render."""
    frames_done: int = 0
    rendering_since: float = 0.0
    loading: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Stage -> bytes loaded and in all, while its models are being loaded."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    exit_code: int | None = None

    def feed(self, event: Event) -> None:
        self.now = event["time"]
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _on_run_started(self, event: Event) -> None:
        self.run, self.started = event["run"], event["time"]

    def _on_checked(self, event: Event) -> None:
        self.lessons = event["lessons"]

    def _on_work_planned(self, event: Event) -> None:
        self.segments, self.frames = event["segments"], event["frames"]

    def _on_loading(self, event: Event) -> None:
        self.loading[event["stage"]] = (event["bytes"], event["total"])

    def _on_loaded(self, event: Event) -> None:
        self.loading.pop(event["stage"], None)

    def _on_lesson_started(self, event: Event) -> None:
        self.running[event["lesson"]] = "encoding"

    def _on_segment_started(self, event: Event) -> None:
        self.running[event["lesson"]] = f"rendering segment {event['segment']}"

    def _on_segment_lost(self, event: Event) -> None:
        self.running[event["lesson"]] = f"segment {event['segment']} lost its worker, again"

    def _on_segment_failed(self, event: Event) -> None:
        self.running[event["lesson"]] = f"segment {event['segment']} failed, {event['failure']}"

    def _on_lesson_joining(self, event: Event) -> None:
        self.running[event["lesson"]] = "joining"

    def _on_frames(self, event: Event) -> None:
        self.rendering_since = self.rendering_since or event["time"]
        self.frames_done = event["done"]

    def count(self, frames: int) -> None:
        """More often than events are worth writing: the frames decoded so far in this run."""
        self.now = time.time()
        self.rendering_since = self.rendering_since or self.now
        self.frames_done = frames

    def _on_segment_done(self, event: Event) -> None:
        self.segments_done += 1
        self.running[event["lesson"]] = f"segment {event['segment']} done"

    def _on_lesson_ended(self, event: Event) -> None:
        self.running.pop(event["lesson"], None)
        self.statuses[event["status"]] += 1
        if event.get("reason"):
            self.failures.append((event["lesson"] or f"row {event['row']}", event["reason"]))

    def _on_run_ended(self, event: Event) -> None:
        self.exit_code = event["exit_code"]
        if event.get("reason"):
            self.failures.append(("the run", event["reason"]))

    @property
    def frames_per_second(self) -> float | None:
        seconds = self.now - self.rendering_since
        return (
            self.frames_done / seconds if self.rendering_since and seconds > 1 and self.frames_done else None
        )

    @property
    def seconds_left(self) -> float | None:
        rate = self.frames_per_second
        return (self.frames - self.frames_done) / rate if rate else None

    def rows(self) -> list[tuple[str, str]]:
        """What there is to say: (what, how much)."""
        rows = [
            (f"loading {stage}", f"{_gb(done)} of {_gb(total)}" if total else "...")
            for stage, (done, total) in self.loading.items()
        ]
        counts = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        rows.append(
            ("lessons", f"{sum(self.statuses.values())}/{self.lessons}" + (f" ({counts})" if counts else ""))
        )
        if self.segments:
            rows.append(("segments", f"{self.segments_done}/{self.segments}"))
            rows.append(("frames", f"{self.frames_done}/{self.frames}"))
        if rate := self.frames_per_second:
            rows.append(("frames/s", f"{rate:.1f}"))
        if (left := self.seconds_left) is not None and self.exit_code is None:
            rows.append(("time left", duration(left)))
        return rows

    def line(self) -> str:
        """The run in one line."""
        return " | ".join(f"{what} {how_much}" for what, how_much in self.rows())


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def table(summary: Summary) -> Group:
    """The run as a table: totals above, the lessons on the road below."""
    totals, lessons = (
        Table(box=None, show_header=False, pad_edge=False),
        Table("lesson", "now", box=None, pad_edge=False),
    )
    for what, how_much in summary.rows():
        totals.add_row(Text(what), Text(how_much, style="bold"))
    for lesson, state in list(summary.running.items())[:_SHOWN_LESSONS]:
        lessons.add_row(Text(lesson), Text(state))
    return Group(totals, lessons) if summary.running else Group(totals)


def console(stderr: bool = False) -> Console:
    """Where the user reads. A log has no width: nothing is wrapped or cut there."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=_LOG_WIDTH)


class Reporter:
    """Shows a Summary until it is stopped. `console.is_terminal` decides between table and lines."""

    def __init__(self, summary: Summary, seconds: float, console: Console | None = None) -> None:
        self._summary = summary
        self._seconds = seconds
        self._console = console or Console(stderr=True)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        if self._console.is_terminal:
            with Live(console=self._console, refresh_per_second=4, transient=True) as live:
                while not self._stopped.wait(0.25):
                    live.update(table(self._summary))
            return
        while not self._stopped.wait(self._seconds):
            clock = time.strftime("%H:%M:%S")
            print(f"{clock} {self._summary.line()}", file=sys.stderr, flush=True)
