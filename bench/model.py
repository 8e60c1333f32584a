"""Times one block of a transformer of given dimensions, by component.

    python -m bench.model --device cpu --dtype float32 --size 128*128 --dim 512 --layers 4 --out result.json

Weights are random. The ring is full when the clock starts. A matrix product of the feed-forward's shape is
timed before every block, so that a share of it is a ratio of one machine in one state.
"""

import argparse
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.denoise import SETTINGS, compile_layers, denoise, random_dit, table
from bench.dimensions import WAN_14B
from bench.measure import DTYPES, Product
from model.config import DiTConfig

LATENT = 8
"""Pixels per side of a latent."""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.splitlines()[0])
    options.add_argument("--device", required=True, choices=("cpu", "cuda"))
    options.add_argument("--dtype", required=True, choices=tuple(DTYPES))
    options.add_argument("--size", required=True, metavar="W*H", help="true size of the video in pixels")
    options.add_argument("--dim", type=int, default=512, help="width, a multiple of 128")
    options.add_argument("--ffn-dim", type=int, help="width of the feed-forward; 2.7 times --dim by default")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--text-len", type=int, default=WAN_14B.text_len)
    options.add_argument("--compile", action="store_true", help="compile the layers")
    options.add_argument("--repeats", type=int, default=7, help="blocks that are timed")
    options.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    options.add_argument("--out", type=Path, help="write the figures there as JSON")
    return options


def dimensions(dim: int, ffn_dim: int | None, layers: int, text_len: int) -> DiTConfig:
    """The 14B's architecture at another width and depth: heads of 128, speech after every third layer."""
    if dim < 128 or dim % 128:
        raise ValueError(f"dim={dim}: must be a multiple of 128, the size of a head")
    return replace(
        WAN_14B,
        dim=dim,
        ffn_dim=ffn_dim or dim * WAN_14B.ffn_dim // WAN_14B.dim,
        num_heads=dim // 128,
        num_layers=layers,
        text_len=text_len,
        audio_inject_layers=tuple(range(0, layers, 3)),
    )


def latent_size(size: str) -> tuple[int, int]:
    """`W*H` in pixels -> rows and columns of latents. Raises ValueError unless both are multiples of 16."""
    width, _, height = size.partition("*")
    if not (width.isdigit() and height.isdigit()) or int(width) % 16 or int(height) % 16:
        raise ValueError(f"size={size!r}: must be WIDTH*HEIGHT in multiples of 16, such as 128*128")
    return int(height) // LATENT, int(width) // LATENT


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        config = dimensions(options.dim, options.ffn_dim, options.layers, options.text_len)
        height, width = latent_size(options.size)
    except ValueError as error:
        raise SystemExit(f"bench.model: {error}") from error
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    tokens = 3 * (height // 2) * (width // 2)
    product = Product(device, dtype, tokens, config.dim, config.ffn_dim)
    dit = random_dit(config, device, dtype)
    if options.compile:
        compile_layers(dit, "inductor")
    times = denoise(dit, SETTINGS, height, width, product, options.repeats, 300, options.compile)
    print(f"{_machine(device)}; {options.dtype}; {'compiled' if options.compile else 'eager'}")
    print(f"dim {config.dim}, ffn {config.ffn_dim}, {config.num_layers} layers, {tokens} tokens in a block")
    print(table(times))
    if options.out:
        given = {name: str(value) for name, value in vars(options).items()}
        figures = {"options": given, "machine": _machine(device), "denoise": asdict(times)}
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


if __name__ == "__main__":
    main()
