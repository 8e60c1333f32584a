"""The four models of a checkpoint: what each should hold, and in which file under which name that lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn
from transformers import UMT5EncoderModel, Wav2Vec2Model

from conf.schema import ModelSettings
from model import speech, tensors, text, vae
from model.config import DiTConfig
from model.dit import CausalDiT
from model.files import CheckpointError, Files, listed, read_json
from model.prompt import load_tokenizer

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Part(Generic[M]):
    """One model without its weights, and where those lie."""

    module: M
    """On the meta device."""
    files: tuple[Path, ...]
    names: dict[str, str]
    """The module's parameter name -> the name in the file."""
    unused: tuple[str, ...] = ()
    """Prefixes of tensors that the files hold and the module does not need."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file -> the shape that the module asks for."""
        state = self.module.state_dict()
        return {file_name: tuple(state[name].shape) for name, file_name in self.names.items()}


def transformer(files: Files) -> Part[CausalDiT]:
    with torch.device("meta"):
        module = CausalDiT(config(files))
    return Part(module, files.transformer, {name: name for name in module.state_dict()})


def config(files: Files) -> DiTConfig:
    """The transformer's dimensions. Raises CheckpointError."""
    return DiTConfig.from_file(files.config)


def autoencoder(files: Files, m: ModelSettings) -> Part[AutoencoderKLWan]:
    with torch.device("meta"):
        if files.vae_config is None:
            module = vae.build(m.vae)
            return Part(module, (files.vae,), vae.upstream_names(module))
        module = AutoencoderKLWan.from_config(read_json(files.vae_config))
    return Part(module, (files.vae,), {name: name for name in module.state_dict()})


def text_encoder(files: Files, m: ModelSettings) -> Part[UMT5EncoderModel]:
    with torch.device("meta"):
        module = text.build(m.text_encoder)
    return Part(module, (files.text_encoder,), text.upstream_names(module))


def speech_encoder(files: Files) -> Part[Wav2Vec2Model]:
    with torch.device("meta"):
        module = speech.build(read_json(files.speech_config))
    names = speech.file_names(module, tensors.shapes(files.speech_encoder))
    return Part(module, (files.speech_encoder,), names, unused=("lm_head.",))


def mismatches(part: Part) -> list[str]:
    """Tensors that are missing, unexpected, misshapen or there twice, or the files that cannot be read."""
    wanted, present = part.shapes(), dict[str, tuple[int, ...]]()
    problems, unreadable = list[str](), list[str]()
    for path in part.files:
        try:
            shapes = tensors.shapes(path)
        except CheckpointError as error:
            unreadable += error.problems
            continue
        unexpected = [name for name in shapes if name not in wanted and not name.startswith(part.unused)]
        problems += listed(path, "unexpected", unexpected)
        problems += listed(path, "in an earlier file too", [name for name in shapes if name in present])
        problems += listed(path, "misshapen", _misshapen(shapes, wanted))
        present |= shapes
    if not unreadable:
        where = part.files[0] if len(part.files) == 1 else f"{part.files[0].parent} ({len(part.files)} files)"
        problems += listed(where, "missing", [name for name in wanted if name not in present])
    return unreadable + problems


def _misshapen(shapes: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    return [
        f"{name} {list(shape)} instead of {list(wanted[name])}"
        for name, shape in shapes.items()
        if name in wanted and shape != wanted[name]
    ]


def disagreements(files: Files, m: ModelSettings) -> list[str]:
    """Dimensions on which the transformer and the encoders' settings or files differ."""
    dit, wav2vec2 = config(files), read_json(files.speech_config)
    states = wav2vec2.get("num_hidden_layers", 0) + 1
    pairs = [
        ("text_dim", dit.text_dim, "text_encoder.dim", m.text_encoder.dim),
        ("audio_dim", dit.audio_dim, "the speech encoder's hidden_size", wav2vec2.get("hidden_size")),
        ("num_wav2vec_layers", dit.num_wav2vec_layers, "the speech encoder's number of states", states),
        ("in_dim", dit.in_dim, "the VAE's z_dim", _z_dim(files, m)),
    ]
    return [
        f"{files.config}: {name}={value}, but {other} is {other_value}"
        for name, value, other, other_value in pairs
        if value != other_value
    ]


def vocabulary(files: Files, m: ModelSettings) -> list[str]:
    """A tokenizer with tokens that the text encoder does not know."""
    size = load_tokenizer(files.tokenizer).get_vocab_size()
    if size <= m.text_encoder.vocab_size:
        return []
    return [
        f"{files.tokenizer}: {size} tokens; text_encoder.vocab_size={m.text_encoder.vocab_size} are known"
    ]


def _z_dim(files: Files, m: ModelSettings) -> int | None:
    return read_json(files.vae_config).get("z_dim") if files.vae_config else m.vae.z_dim
