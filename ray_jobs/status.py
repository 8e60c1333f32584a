"""`lectern status OUT`: a run as its events tell it, from anywhere that can read the output folder."""

from __future__ import annotations

import time

from rich.console import Console

from ray_jobs.events import read
from ray_jobs.folder import Folder, FolderError
from ray_jobs.plan import Refused
from ray_jobs.progress import Summary, table


def show(out: str, console: Console) -> int:
    """Print totals, the lessons on the road, and failures. Raises Refused if there is no run to tell of."""
    try:
        events = read(Folder(out))
    except (FolderError, ValueError) as error:
        raise Refused(f"{out}: no run has been started here: {error}") from error
    if not events:
        raise Refused(f"{out}: no run has been started here")
    summary = Summary()
    for event in events:
        summary.feed(event)
    state = (
        "ended" if summary.exit_code is not None else f"last heard of {time.time() - summary.now:.0f} s ago"
    )
    console.print(f"run {summary.run}: {state}", highlight=False)
    if summary.exit_code is not None:
        console.print(f"exit code {summary.exit_code}", highlight=False)
    console.print(table(summary))
    for lesson, reason in summary.failures:
        console.print(f"{lesson}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 0
