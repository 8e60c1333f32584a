"""Everything about a GPU in under nine minutes: arithmetic, speed, memory.

    python bench/gpu.py --golden tests/golden --out results

Needs this repository, torch, diffusers and transformers, and no weights. Sections run one after the other,
each under its own limit, and print as they go; `gpu.json` is written anew after each. A section that fails or
runs out of time says so and the next one runs. Exits with 1 if any did.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

# A script has its own folder first on the path, where `model` is a benchmark.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.report import Report  # noqa: E402
from bench.sections import FULL, SMALL, run  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--golden", type=Path, required=True, help="folder laid out like tests/golden")
    options.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options.add_argument("--tiny", action="store_true", help="tiny dimensions, to try the script itself")
    options.add_argument("--minutes", type=float, default=8.5, help="no section goes on beyond that")
    given = options.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = Report(given.out, time.monotonic() + 60 * given.minutes)
    run(SMALL if given.tiny else FULL, torch.device(given.device), given.golden, report)
    print(f"failed: {', '.join(report.failed)}" if report.failed else "all sections done")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
