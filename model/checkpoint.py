"""Published checkpoints: checked against what the models should hold, and loaded straight into place.

Models are built on the meta device. Tensors are mapped from their files, so that all processes of a machine
share one reading of the disk, and copied only where device or dtype differ from the file's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor

from conf.schema import ModelSettings
from model import lora, parts, tensors
from model.dit import CausalDiT
from model.files import CheckpointError, Files, describe, fingerprint, locate
from model.parts import Part
from model.prompt import load_tokenizer
from model.speech import SpeechEncoder
from model.text import TextEncoder
from model.vae import Vae

__all__ = [
    "CheckpointError",
    "Progress",
    "check",
    "fill",
    "fingerprint",
    "load_dit",
    "load_speech_encoder",
    "load_text_encoder",
    "load_vae",
]

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

MERGED_FROM = "merged_from"
"""Key in the header of a merged checkpoint's files; its value says what was merged."""

M = TypeVar("M", bound=nn.Module)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check(m: ModelSettings) -> None:
    """Compares every file of the checkpoint with what the models need, from headers alone.

    Raises CheckpointError with all that is wrong: files that are missing, truncated or of another model,
    tensors that are missing, unexpected or misshapen, dimensions on which two parts disagree, a LoRA that
    does not fit.
    """
    files = locate(m)
    steps: list[Callable[[], list[str]]] = [
        files.missing,
        lambda: parts.mismatches(parts.transformer(files)),
        lambda: parts.mismatches(parts.autoencoder(files, m)),
        lambda: parts.mismatches(parts.text_encoder(files, m)),
        lambda: parts.mismatches(parts.speech_encoder(files)),
        lambda: parts.disagreements(files, m),
        lambda: parts.vocabulary(files, m),
    ]
    if files.lora:
        steps.append(lambda: find_lora(files, m, parts.transformer(files))[1])
    problems = dict.fromkeys(problem for step in steps for problem in _problems(step))
    if problems:
        kind = describe(files.root)
        raise CheckpointError(*([f"ckpt_dir={m.ckpt_dir!r} looks like {kind}"] if kind else []), *problems)


def _problems(step: Callable[[], list[str]]) -> tuple[str, ...]:
    try:
        return tuple(step())
    except CheckpointError as error:
        return error.problems


def load_dit(m: ModelSettings, progress: Progress | None = None) -> CausalDiT:
    """The transformer on `m.device` in `m.dtype`, with the LoRA of `m.lora_path_dmd` merged in.

    Raises CheckpointError for files or tensors that do not fit.
    """
    files = locate(m)
    part = parts.transformer(files)
    change = lora_change(files, m, part) if files.lora else None
    return fill(part, m.device, m.dtype, progress, change)


def load_vae(m: ModelSettings, progress: Progress | None = None) -> Vae:
    """The video autoencoder on `m.device` in `m.vae_dtype`. Raises CheckpointError."""
    return Vae(fill(parts.autoencoder(locate(m), m), m.device, m.vae_dtype, progress))


def load_text_encoder(m: ModelSettings, progress: Progress | None = None) -> TextEncoder:
    """The text encoder and its tokenizer, on the device and in the dtype of `m.text_encoder`.

    Raises CheckpointError.
    """
    files, spec = locate(m), m.text_encoder
    model = fill(parts.text_encoder(files, m), spec.device, spec.dtype, progress)
    return TextEncoder(model, load_tokenizer(files.tokenizer), parts.config(files).text_len)


def load_speech_encoder(m: ModelSettings, progress: Progress | None = None) -> SpeechEncoder:
    """The speech encoder on `m.device` in `m.dtype`. Raises CheckpointError."""
    files = locate(m)
    model = fill(parts.speech_encoder(files), m.device, m.dtype, progress)
    folder = files.feature_extractor.parent
    return SpeechEncoder(model, AutoFeatureExtractor.from_pretrained(folder, local_files_only=True))


def find_lora(files: Files, m: ModelSettings, part: Part[CausalDiT]) -> tuple[lora.Lora, list[str]]:
    """The LoRA, and all that keeps it from being merged into these files."""
    assert files.lora is not None
    found, problems = lora.find(files.lora, m.lora_alpha, m.lora_rank, part.shapes())
    for path in files.transformer:
        if merged_from := tensors.metadata(path).get(MERGED_FROM):
            problems.append(f"{path}: merged already, from {merged_from}; leave lora_path_dmd empty")
    return found, problems


def lora_change(files: Files, m: ModelSettings, part: Part[CausalDiT]) -> Callable[[str, Tensor], Tensor]:
    """A function of a weight's name and value that merges the LoRA. Raises CheckpointError if it cannot."""
    found, problems = find_lora(files, m, part)
    if problems:
        raise CheckpointError(*problems)
    pairs = found.tensors()
    return lambda name, weight: lora.merged(weight, pairs[name], found.scale) if name in pairs else weight


def fill(
    part: Part[M],
    device: str,
    dtype: str,
    progress: Progress | None = None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> M:
    """Fills the part's module from its files, tensor by tensor: onto the device, changed there, then cast.

    Raises CheckpointError unless the files hold exactly what the module needs.
    """
    if problems := parts.mismatches(part):
        raise CheckpointError(*problems)
    done, total = 0, sum(path.stat().st_size for path in part.files)
    own_names = {file_name: name for name, file_name in part.names.items()}
    state: dict[str, Tensor] = {}
    for path in part.files:
        names = [name for name in tensors.shapes(path) if name in own_names]
        for file_name, tensor in tensors.read(path, names):
            placed = tensor.to(device)
            if change:
                placed = change(file_name, placed)
            state[own_names[file_name]] = placed.to(_DTYPES[dtype])
            done += tensor.nbytes
            if progress:
                progress(done, total)
    part.module.load_state_dict(state, assign=True, strict=False)
    if progress:
        progress(total, total)
    return part.module.eval().requires_grad_(False)
