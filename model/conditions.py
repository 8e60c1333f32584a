"""What a segment is made from, and whether it fits the transformer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import DiTConfig


@dataclass(frozen=True)
class Conditions:
    """What a segment is made from. Tensors on the CPU."""

    text: Tensor
    """[tokens, text_dim], the prompt's encoding without padding."""
    negative_text: Tensor | None
    """Likewise, what guidance steers away from; None without guidance."""
    reference: Tensor
    """[C, 1, h, w] float32, the portrait."""
    motion: Tensor
    """[C, 19, h, w] float32, the portrait standing still."""
    speech: Tensor
    """[layers, audio_dim, video frames]; replayed blocks need theirs too."""
    speech_first_block: int
    """Block that the first column of `speech` belongs to."""

    def check(self, config: DiTConfig, height: int, width: int, first_cell: int, end_block: int) -> None:
        """Raises ValueError unless they serve the blocks [first_cell, end_block) at that size of latents."""
        channels, motion = config.in_dim, config.motion_frames_latent
        check_tensor("reference", self.reference, (channels, 1, height, width), torch.float32)
        check_tensor("motion", self.motion, (channels, motion, height, width), torch.float32)
        layers, dim, frames = self.speech.shape
        if (layers, dim) != (config.num_wav2vec_layers, config.audio_dim):
            raise ValueError(
                f"speech of {layers} layers x {dim}: must be {config.num_wav2vec_layers} x {config.audio_dim}"
            )
        needed = (end_block - self.speech_first_block) * config.frames_per_block
        if self.speech_first_block > first_cell or frames < needed:
            raise ValueError(
                f"speech of {frames} frames from block {self.speech_first_block} on: "
                f"must span blocks {first_cell}..{end_block}"
            )


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError that names the tensor unless it has that shape and dtype."""
    if tensor.shape != shape:
        raise ValueError(f"{name} of shape {list(tensor.shape)}: must be {list(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} of {tensor.dtype}: must be {dtype}")
