"""`lectern weights`: fetch published checkpoints, keep the result of a merge, or write the tiny one."""

from __future__ import annotations

from pathlib import Path

from model.files import CheckpointError
from ray_jobs.plan import Refused
from ray_jobs.settings import Layer, resolve


def pull(folder: Path | None, values: dict[str, str], dry_run: bool) -> int:
    """Fetch what the model's `ckpt_dir` and `lora_path_dmd` name on the Hub; a dry run only says what and how
    much.

    Without a folder they go to the Hub's own cache, where the ids are found again.
    """
    from model.weights import pull as fetch

    settings = resolve([Layer("command line", values)]).settings
    names = [name for name in (settings.ckpt_dir, settings.lora_path_dmd) if name is not None]
    ids = [name for name in names if not Path(name).exists()]
    try:
        for path in fetch(ids, folder, dry_run=dry_run):
            print(path)
    except CheckpointError as error:
        raise Refused(str(error)) from error
    return 0


def merge(folder: Path, values: dict[str, str]) -> int:
    """Write a checkpoint with the LoRA merged in, which loads faster and needs no `lora_path_dmd`."""
    from model.weights import merge as write

    try:
        write(resolve([Layer("command line", values)]).settings, folder)
    except (CheckpointError, OSError) as error:
        raise Refused(str(error)) from error
    return 0


def tiny(folder: Path) -> int:
    """Write the small checkpoint of random weights that `model: tiny` loads."""
    from model.tiny import write

    try:
        write(folder)
    except (CheckpointError, OSError) as error:
        raise Refused(str(error)) from error
    return 0
