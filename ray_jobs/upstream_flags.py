"""What became of every flag and environment variable of Live Avatar's scripts."""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import conf

TABLE = Path(conf.__file__).parent / "upstream-flags.csv"


@dataclass(frozen=True)
class UpstreamFlag:
    """One line of the table."""

    flag: str
    verdict: str
    """`same`, `renamed`, `not needed`, `not offered` or `not yet`."""
    ours: str
    """Settings, options or columns that stand for it here; may be empty."""
    why: str

    def __str__(self) -> str:
        here = f" ({self.ours})" if self.ours else ""
        if self.verdict == "same":
            here = f", write {self.ours}=VALUE"
        return f"{self.flag} of Live Avatar: {self.verdict}{here}. {self.why}"


@cache
def table() -> tuple[UpstreamFlag, ...]:
    """All lines, in the order of the file."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(UpstreamFlag(**row) for row in csv.DictReader(file))


def line_for(flag: str) -> str | None:
    """The line about `flag`, written as `--fp8`, `--fp8=1` or `fp8`; None if it is none of upstream's."""
    name = _bare(flag)
    return next((str(line) for line in table() if _bare(line.flag) == name), None)


def _bare(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-").replace("-", "_")
