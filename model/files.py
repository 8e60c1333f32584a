"""Where a checkpoint's files lie, what is missing, and which weights they are. No torch here.

The layout is Wan2.2-S2V-14B's, as `huggingface-cli download` leaves it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.schema import ModelSettings
from model.config import DiTConfig
from model.errors import CheckpointError

TRANSFORMER = "diffusion_pytorch_model.safetensors"
LORA_FILE = "liveavatar.safetensors"
NOT_NEEDED = ("*.msgpack", "assets/*")
"""Files of the published models that are left on the Hub."""
TENSOR_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def listed(where: Path | str, what: str, names: Sequence[str], shown: int = 8) -> list[str]:
    """One line for all tensors that have one thing wrong with them; none if there are none."""
    if not names:
        return []
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return [f"{where}: {len(names)} {what}: {', '.join(names[:shown])}{more}"]


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint; whether they exist is for `missing` to say."""

    root: Path
    config: Path
    index: Path | None
    transformer: tuple[Path, ...]
    vae_config: Path | None
    """Only where the autoencoder is a folder in diffusers' format."""
    vae: Path
    text_encoder: Path
    tokenizer: Path
    speech_encoder: Path
    speech_config: Path
    feature_extractor: Path
    lora: Path | None

    def all(self) -> list[Path]:
        optional = [path for path in (self.index, self.vae_config, self.lora) if path]
        speech = [self.speech_encoder, self.speech_config, self.feature_extractor]
        return [
            self.config,
            *self.transformer,
            self.vae,
            self.text_encoder,
            self.tokenizer,
            *speech,
            *optional,
        ]

    def missing(self) -> list[str]:
        return [f"{path}: missing" for path in self.all() if not path.is_file()]


def resolve(name: str, setting: str) -> Path:
    """A local path, or a Hub id's snapshot in the local cache. Raises CheckpointError; never downloads."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        with suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(name, local_files_only=True, ignore_patterns=list(NOT_NEEDED)))
    raise CheckpointError(
        f"{setting}={name!r}: neither a path here nor a model in the local Hub cache; "
        "`lectern weights pull` fetches published weights, `lectern weights tiny` writes random ones"
    )


def locate(m: ModelSettings) -> Files:
    """Raises CheckpointError if the folder itself, the LoRA, or a readable index is not there."""
    root = resolve(m.ckpt_dir, "ckpt_dir")
    if not root.is_dir():
        raise CheckpointError(f"ckpt_dir={m.ckpt_dir!r}: a file; the folder that holds config.json is needed")
    index, transformer = _transformer(root)
    vae_config, vae = root / m.vae.file / "config.json", root / m.vae.file
    speech = root / m.audio_encoder
    return Files(
        root=root,
        config=root / "config.json",
        index=index,
        transformer=transformer,
        vae_config=vae_config if vae.is_dir() else None,
        vae=vae / TRANSFORMER if vae.is_dir() else vae,
        text_encoder=root / m.text_encoder.file,
        tokenizer=root / m.text_encoder.tokenizer / "tokenizer.json",
        speech_encoder=_first_of(speech / "model.safetensors", speech / "pytorch_model.bin"),
        speech_config=speech / "config.json",
        feature_extractor=speech / "preprocessor_config.json",
        lora=_lora(m.lora_path_dmd) if m.lora_path_dmd else None,
    )


def _transformer(root: Path) -> tuple[Path | None, tuple[Path, ...]]:
    index = root / f"{TRANSFORMER}.index.json"
    if not index.is_file():
        return None, (root / TRANSFORMER,)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    return index, tuple(root / shard for shard in sorted(set(weight_map.values())))


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if the file is missing or holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: no JSON object")
    return content


def _first_of(*paths: Path) -> Path:
    return next((path for path in paths if path.is_file()), paths[0])


def _lora(name: str) -> Path:
    path = resolve(name, "lora_path_dmd")
    if path.is_file():
        return path
    candidates = sorted(p for p in path.iterdir() if p.suffix in TENSOR_SUFFIXES)
    if path / LORA_FILE in candidates:
        return path / LORA_FILE
    if len(candidates) != 1:
        names = ", ".join(p.name for p in candidates) or "none"
        raise CheckpointError(f"lora_path_dmd={name!r}: name the file; tensor files there: {names}")
    return candidates[0]


def describe(root: Path) -> str | None:
    """What a folder that is not a speech-to-video checkpoint looks like; None if nothing can be said."""
    if (root / "model_index.json").is_file():
        return "a diffusers pipeline (model_index.json)"
    if (root / "adapter_config.json").is_file():
        return "a LoRA (adapter_config.json); that goes into lora_path_dmd"
    try:
        config = read_json(root / "config.json")
    except CheckpointError:
        return None
    kind = config.get("model_type")
    if architectures := config.get("architectures"):
        return f"a transformers model ({', '.join(architectures)})"
    if kind not in (None, "s2v"):
        return f"Wan's {kind!r} model ({config.get('_class_name')}); the speech-to-video model is needed"
    return None


def fingerprint(m: ModelSettings) -> str:
    """Identity of the weights: hex sha256 over every file's sha256, the LoRA's scale and the specs.

    Moving a checkpoint does not change it. Files are hashed once and remembered by path, size and time of
    change in the user's cache folder; files of the Hub cache carry their hash in their name. Raises
    CheckpointError for files that are missing and for a `config.json` that no transformer can be built from.
    """
    files = locate(m)
    if missing := files.missing():
        raise CheckpointError(*missing)
    DiTConfig.from_file(files.config)
    identity = {
        "files": [sha256(path) for path in files.all() if path != files.lora],
        "lora": [sha256(files.lora), m.lora_alpha, m.lora_rank] if files.lora else None,
        "vae": asdict(m.vae),
        "text_encoder": asdict(m.text_encoder),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, remembered between calls."""
    path = path.resolve()
    if path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name):
        return path.name
    stat = path.stat()
    key = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    remembered = Path.home() / ".cache" / "lectern" / "sha256" / key
    with suppress(OSError):
        return remembered.read_text()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):
        _write_whole(remembered, digest)
    return digest


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes otherwise.

    Raises CheckpointError if `folder` is there and not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: not empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(temporary, path)
