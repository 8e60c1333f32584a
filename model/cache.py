"""Keys and values that outlive a call.

What a call attends lies side by side, so that it is one slice and nothing is joined or copied per call. Two
denoising steps share one copy of the condition (reference and motion tokens) between their rings, in every
layer:

    [ last .. first slot of the even step's ring | reference | motion | first .. last slot of the odd's ]

Every slot holds one block. A ring fills from the condition outwards, therefore the blocks written so far
and the condition are contiguous from the first block on. Which side a step has depends on the step alone,
so that a cache of one step gives the same bits as one of two: the order of keys is the same.

Keys of blocks and of motion are stored rotated. The reference moves with the video: its keys are kept
unrotated beside, and are rotated into their place at every call.

Shape suffixes: B batch (always 1), L tokens of the call, S tokens in the cache, N heads, D head size,
C = D / 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import DiTConfig
from model.framepack import motion_positions
from model.rope import REFERENCE_TIME, grid_positions, rotate


@dataclass(frozen=True)
class TokenLayout:
    """Numbers of tokens for one size of latents."""

    reference: int
    """Tokens of the reference, which are those of any latent frame."""
    condition: int
    """Tokens of reference and motion."""
    block: int
    blocks: int
    """Blocks of a clip, which is what a ring holds."""

    @property
    def ring(self) -> int:
        return self.block * self.blocks


def condition_positions(config: DiTConfig, height: int, width: int) -> Tensor:
    """RoPE positions [L, 3] of the condition tokens in a prefill, for latents of `height` x `width`."""
    rows, columns = config.grid(height, width)
    reference = grid_positions([REFERENCE_TIME], list(range(rows)), list(range(columns)))
    return torch.cat((reference, motion_positions(height, width, config.framepack_zip_frame_buckets)))


def token_layout(config: DiTConfig, height: int, width: int, blocks: int) -> TokenLayout:
    """Layout for latents of `height` x `width` and clips of `blocks` blocks."""
    rows, columns = config.grid(height, width)
    condition = len(condition_positions(config, height, width))
    return TokenLayout(rows * columns, condition, config.num_frames_per_block * rows * columns, blocks)


class KVCache:
    """Condition and rings of one or two denoising steps, for some of the layers.

    `steps` is one step, or an even step and the odd one after it. A cell of one step does not touch the
    ring of the other, but both see the same condition. Where steps of different clips are under way at
    once, one of them may need a newer condition than the other: such layouts make a cache for each step.
    """

    def __init__(
        self,
        config: DiTConfig,
        layout: TokenLayout,
        steps: tuple[int, ...],
        layers: range,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if len(steps) != len({step % 2 for step in steps}) or len({step // 2 for step in steps}) != 1:
            raise ValueError(f"steps={steps}: must be one step, or an even step and the one after it")
        self.layout, self.steps = layout, steps
        rings = {step % 2 for step in steps}
        self._start = layout.ring if 0 in rings else 0
        """First token of the condition."""
        self._end = self._start + layout.condition
        tokens = self._end + (layout.ring if 1 in rings else 0)

        def buffers(count: int) -> dict[int, Tensor]:
            shape = (1, count, config.num_heads, config.head_dim)
            return {layer: torch.zeros(shape, device=device, dtype=dtype) for layer in layers}

        self.keys_BSND, self.values_BSND = buffers(tokens), buffers(tokens)
        self.reference_BLND = buffers(layout.reference)

    def slot(self, step: int, index: int) -> slice:
        """Tokens of slot `index` in the ring of `step`."""
        block = self.layout.block
        if step % 2:
            return slice(self._end + index * block, self._end + (index + 1) * block)
        return slice(self._start - (index + 1) * block, self._start - index * block)

    def visible(self, step: int, blocks: int) -> slice:
        """The condition and the first `blocks` slots of `step`."""
        tokens = blocks * self.layout.block
        return slice(self._start, self._end + tokens) if step % 2 else slice(self._start - tokens, self._end)

    @property
    def condition(self) -> slice:
        return slice(self._start, self._end)

    @property
    def reference(self) -> slice:
        return slice(self._start, self._start + self.layout.reference)

    def adopt_condition(self, other: "KVCache") -> None:
        """Takes over the condition that `other` was prefilled with. Unrotated keys are shared, not copied."""
        for layer, keys in self.keys_BSND.items():
            keys[:, self.condition].copy_(other.keys_BSND[layer][:, other.condition])
            self.values_BSND[layer][:, self.condition].copy_(other.values_BSND[layer][:, other.condition])
        self.reference_BLND = other.reference_BLND


class PrefillExchange:
    """Fills the condition of a cache: its tokens attend each other."""

    def __init__(self, cache: KVCache, rope_LC2: Tensor) -> None:
        self.cache, self.rope_LC2 = cache, rope_LC2

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cache = self.cache
        cache.reference_BLND[layer].copy_(k[:, : cache.layout.reference])
        keys = cache.keys_BSND[layer][:, cache.condition].copy_(rotate(k, self.rope_LC2))
        values = cache.values_BSND[layer][:, cache.condition].copy_(v)
        return rotate(q, self.rope_LC2), keys, values


class CellExchange:
    """Writes one block into its slot; its tokens attend the condition, the blocks before it and each other.

    `slot` is overwritten in place; `blocks` counts the slots written so far, this one included.
    """

    def __init__(
        self, cache: KVCache, step: int, slot: int, blocks: int, rope_LC2: Tensor, reference_rope_LC2: Tensor
    ) -> None:
        self.cache = cache
        self.slot, self.visible = cache.slot(step, slot), cache.visible(step, blocks)
        self.rope_LC2, self.reference_rope_LC2 = rope_LC2, reference_rope_LC2

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cache, keys, values = self.cache, self.cache.keys_BSND[layer], self.cache.values_BSND[layer]
        keys[:, self.slot].copy_(rotate(k, self.rope_LC2))
        values[:, self.slot].copy_(v)
        keys[:, cache.reference].copy_(rotate(cache.reference_BLND[layer], self.reference_rope_LC2))
        return rotate(q, self.rope_LC2), keys[:, self.visible], values[:, self.visible]


def caches(
    config: DiTConfig, layout: TokenLayout, sample_steps: int, device: torch.device, dtype: torch.dtype
) -> list[KVCache]:
    """Caches of all layers for all denoising steps; step s has its ring in number s // 2."""
    steps = range(sample_steps)
    pairs = [tuple(steps[even : even + 2]) for even in steps[::2]]
    return [KVCache(config, layout, pair, range(config.num_layers), device, dtype) for pair in pairs]
