"""Small checkpoints and LoRAs, and ways to damage them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.schema import ModelSettings
from model import parts, tiny
from model.files import locate

TARGET = re.compile(r"(blocks|audio_injector\.injector)\.\d+\..*\b(q|k|v|o|ffn\.0|ffn\.2)\.weight")
RANK, ALPHA = 4, 8.0
State = dict[str, Tensor]


def checkpoint(folder: Path) -> ModelSettings:
    tiny.write(folder / "checkpoint")
    return tiny.settings(folder / "checkpoint")


def lora_state(m: ModelSettings, pattern: str = "base_model.model.{}.lora_{}.default.weight") -> State:
    """A pair for each of the attention and feed-forward weights, under names made by `pattern`."""
    generator, state = torch.Generator().manual_seed(1), State()
    for name, shape in parts.transformer(locate(m)).shapes().items():
        if TARGET.fullmatch(name):
            module = name.removesuffix(".weight")
            state[pattern.format(module, "A")] = torch.randn(RANK, shape[1], generator=generator) / 8
            state[pattern.format(module, "B")] = torch.randn(shape[0], RANK, generator=generator) / 8
    return state


def with_lora(m: ModelSettings, state: State) -> ModelSettings:
    path = Path(m.ckpt_dir).parent / "lora.safetensors"
    save_file(state, path)
    return replace(m, lora_path_dmd=str(path), lora_alpha=ALPHA, lora_rank=RANK)


def edit(path: Path, change: Callable[[State], object]) -> None:
    """Rewrites a file of tensors after changing them in place."""
    if path.suffix == ".safetensors":
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(state)
        save_file(state, path, metadata={"format": "pt"})
    else:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)


def shard_with(m: ModelSettings, name: str) -> Path:
    return next(path for path in locate(m).transformer if name in load_file(path))
