"""Fetching published weights, and keeping the result of merging a LoRA into them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import save_file

from conf.schema import ModelSettings
from model import parts, tensors
from model.checkpoint import MERGED_FROM, check, fingerprint, lora_change
from model.files import NOT_NEEDED, CheckpointError, Files, locate, new_folder, sha256


def pull(
    ids: Sequence[str], out_dir: Path | None, *, dry_run: bool, report: Callable[[str], None] = print
) -> list[Path]:
    """Fetches models of the Hugging Face Hub, each into `out_dir/<name>`, or without it into the Hub cache.

    First reports every file that is not here yet with its bytes, and compares the sum with the free disk; a
    dry run ends there. Returns the folders (none for a dry run). Raises CheckpointError if the Hub cannot be
    asked or the disk is too small.
    """
    folders = {id: out_dir / id.rpartition("/")[2] if out_dir else None for id in ids}
    needed = 0
    for id, folder in folders.items():
        for file in _wanted(id, folder):
            report(f"{file.file_size or 0:>15,} bytes  {id}/{file.filename}")
            needed += file.file_size or 0
    place = out_dir or Path(huggingface_hub.constants.HF_HUB_CACHE)
    report(f"{needed:>15,} bytes to fetch, {_free_bytes(place):,} free at {place}")
    _check_disk(needed, place)
    if dry_run:
        return []
    return [
        Path(huggingface_hub.snapshot_download(id, local_dir=folder, ignore_patterns=list(NOT_NEEDED)))
        for id, folder in folders.items()
    ]


def _wanted(id: str, folder: Path | None) -> list[huggingface_hub.DryRunFileInfo]:
    try:
        files = huggingface_hub.snapshot_download(
            id, local_dir=folder, ignore_patterns=list(NOT_NEEDED), dry_run=True
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{id}: the Hub gave no list of files: {str(error).splitlines()[0]}") from error
    return [file for file in files if file.will_download]


def _check_disk(needed: int, place: Path) -> None:
    if needed > (free := _free_bytes(place)):
        raise CheckpointError(f"{place}: {needed:,} bytes are needed and {free:,} are free")


def _free_bytes(place: Path) -> int:
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def merge(m: ModelSettings, out_dir: Path) -> None:
    """Writes `m`'s checkpoint with its LoRA merged in, in the same layout; it loads without `lora_path_dmd`.

    The transformer's files are written anew, in their own dtype, with what was merged in their headers; the
    others are hard links where the disk allows it. The folder appears whole or not at all. Raises
    CheckpointError for weights that do not fit, no LoRA, a folder that is not empty, or too small a disk.
    """
    check(m)
    files = locate(m)
    if files.lora is None:
        raise CheckpointError("lora_path_dmd is empty: there is nothing to merge")
    _check_disk(sum(path.stat().st_size for path in files.transformer), out_dir)
    with new_folder(out_dir) as new:
        _write_merged(files, m, new)
        _link_rest(files, new)


def _write_merged(files: Files, m: ModelSettings, folder: Path) -> None:
    assert files.lora is not None
    origin = {
        "base": fingerprint(replace(m, lora_path_dmd=None)),
        "lora": sha256(files.lora),
        "lora_alpha": m.lora_alpha,
        "lora_rank": m.lora_rank,
    }
    header = {"format": "pt", MERGED_FROM: json.dumps(origin)}
    change = lora_change(files, m, parts.transformer(files))
    for path in files.transformer:
        state = {
            name: change(name, tensor.to(m.device)).to(tensor.dtype).cpu().contiguous()
            for name, tensor in tensors.read(path, tensors.shapes(path))
        }
        save_file(state, folder / path.name, metadata=header)


def _link_rest(files: Files, folder: Path) -> None:
    for path in sorted(files.root.rglob("*")):
        place = path.relative_to(files.root)
        if path.is_dir() or path in files.transformer or place.parts[0].startswith("."):
            continue
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), target)
        except OSError:
            shutil.copyfile(path, target)
