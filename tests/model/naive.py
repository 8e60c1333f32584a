"""The reference data's README once more, in float64 and without caches, to hold other dimensions to.

Written from the README alone: every call attends over the whole recorded history of its step, and rotates
all keys anew. Slow and plain on purpose.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DiTConfig


def rotation(position: tuple[int, int, int], head_dim: int) -> Tensor:
    """Complex multipliers [head_dim / 2] of one token."""
    pairs = head_dim // 2
    widths = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    angles = [
        p * 10000.0 ** (-2 * i / width)
        for p, width in zip(position, widths, strict=True)
        for i in range(width // 2)
    ]
    assert len(angles) == pairs
    return torch.tensor([complex(np.float16(np.cos(a)), np.float16(np.sin(a))) for a in angles])


class NaiveDiT:
    """weights: float64 state dict in the checkpoint's names."""

    def __init__(self, config: DiTConfig, weights: dict[str, Tensor], height: int, width: int) -> None:
        self.c, self.w = config, weights
        self.height, self.width = height, width
        self.rows, self.columns = height // 2, width // 2

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def patch(self, name: str, x: Tensor, kernel: tuple[int, int, int]) -> Tensor:
        """Convolution with stride = kernel as a sum over patches, token order frame, row, column."""
        weight, (kt, kh, kw) = self.w[f"{name}.weight"], kernel
        frames, rows, columns = x.shape[1] // kt, x.shape[2] // kh, x.shape[3] // kw
        tokens = []
        for t in range(frames):
            for r in range(rows):
                for c in range(columns):
                    part = x[:, t * kt : (t + 1) * kt, r * kh : (r + 1) * kh, c * kw : (c + 1) * kw]
                    tokens.append((weight * part).sum(dim=(1, 2, 3, 4)) + self.w[f"{name}.bias"])
        return torch.stack(tokens)

    def norm(self, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def project(self, name: str, kind: str, x: Tensor) -> Tensor:
        x = self.linear(f"{name}.{kind}", x)
        if kind in "qk":
            # Upstream builds the injector's attentions without passing eps on.
            eps = 1e-6 if name.startswith("audio_injector") else self.c.eps
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.w[f"{name}.norm_{kind}.weight"]
        return x.view(len(x), self.c.num_heads, -1)

    def attention(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("lnd,snd->nls", q, k) / q.shape[-1] ** 0.5
        return self.linear(f"{name}.o", torch.einsum("nls,snd->lnd", scores.softmax(-1), v).flatten(1))

    def rotate(self, x: Tensor, positions: list[tuple[int, int, int]]) -> Tensor:
        turns = torch.stack([rotation(p, self.c.head_dim) for p in positions])
        return torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns[:, None]
        ).flatten(-2)

    def frame_positions(self, time: int) -> list[tuple[int, int, int]]:
        return [(time, r, c) for r in range(self.rows) for c in range(self.columns)]

    def motion_positions(self) -> list[tuple[int, int, int]]:
        def spread(start: int, end: int, count: int) -> list[int]:
            return [int(x) for x in np.linspace(start, end, count)]

        h, w = self.height, self.width
        grids = [
            ([-1], h // 2, w // 2),
            ([-3], h // 4, w // 4),
            ([-19, -14, -9, -4], h // 8, w // 8),
        ]
        return [
            (t, r, c)
            for times, rows, columns in grids
            for t in times
            for r in spread(0, h // 2 - 1, rows)
            for c in spread(0, w // 2 - 1, columns)
        ]

    def time(self, t: float) -> tuple[Tensor, Tensor]:
        half = self.c.freq_dim // 2
        angles = [t * 10000.0 ** (-i / half) for i in range(half)]
        x = torch.tensor([*np.cos(angles), *np.sin(angles)], dtype=torch.float64)
        e = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", x)))
        return e, self.linear("time_projection.1", F.silu(e)).view(6, -1)

    def text(self, context: Tensor) -> Tensor:
        padded = torch.cat((context, torch.zeros(self.c.text_len - len(context), self.c.text_dim)))
        return self.linear(
            "text_embedding.2", F.gelu(self.linear("text_embedding.0", padded), approximate="tanh")
        )

    def causal_conv(self, name: str, x: Tensor, stride: int) -> Tensor:
        padded = torch.cat((x[:1], x[:1], x))
        weight = self.w[f"{name}.conv.weight"]
        steps = range(0, len(padded) - 2, stride)
        out = [torch.einsum("oik,ki->o", weight, padded[i : i + 3]) for i in steps]
        return torch.stack(out) + self.w[f"{name}.conv.bias"]

    def compress(self, prefix: str, x: Tensor) -> Tensor:
        x = F.silu(self.norm(x, 1e-6))
        for name in ("conv2", "conv3"):
            x = F.silu(self.norm(self.causal_conv(f"{prefix}.{name}", x, 2), 1e-6))
        return x

    def speech(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[layers, audio_dim, frames of a block] -> global [3, D], local [3, tokens, D]."""
        features = torch.cat([features[:, :, :1]] * 73 + [features], dim=2)
        mix = F.silu(self.w["casual_audio_encoder.weights"].view(-1))
        x = torch.einsum("l,ldt->td", mix, features) / mix.sum()
        prefix = "casual_audio_encoder.encoder"
        streams = self.causal_conv(f"{prefix}.conv1_local", x, 1).chunk(self.c.num_audio_token, dim=-1)
        local = [self.compress(prefix, stream) for stream in streams]
        local.append(self.w[f"{prefix}.padding_tokens"].view(1, -1).expand(len(local[0]), -1))
        whole = self.compress(prefix, self.causal_conv(f"{prefix}.conv1_global", x, 1))
        return self.linear(f"{prefix}.final_linear", whole)[19:], torch.stack(local, dim=1)[19:]

    def layer(self, i: int, x: Tensor, e0: Tensor, text: Tensor, keys_values) -> Tensor:
        """keys_values: (k, v) of these tokens -> (positions of q, rotated keys, values) to attend."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.w[f"blocks.{i}.modulation"][0] + e0
        name = f"blocks.{i}.self_attn"
        y = self.norm(x, self.c.eps) * (1 + scale1) + shift1
        positions, k, v = keys_values(i, self.project(name, "k", y), self.project(name, "v", y))
        x = x + gate1 * self.attention(name, self.rotate(self.project(name, "q", y), positions), k, v)
        name = f"blocks.{i}.cross_attn"
        y = self.norm(x, self.c.eps) * self.w[f"blocks.{i}.norm3.weight"] + self.w[f"blocks.{i}.norm3.bias"]
        x = x + self.attention(
            name, self.project(name, "q", y), self.project(name, "k", text), self.project(name, "v", text)
        )
        y = self.norm(x, self.c.eps) * (1 + scale2) + shift2
        y = F.gelu(self.linear(f"blocks.{i}.ffn.0", y), approximate="tanh")
        return x + gate2 * self.linear(f"blocks.{i}.ffn.2", y)

    def inject(self, j: int, x: Tensor, whole: Tensor, local: Tensor) -> Tensor:
        frames = []
        name = f"audio_injector.injector.{j}"
        for f, tokens in enumerate(x.chunk(self.c.num_frames_per_block)):
            shift, scale = self.linear(
                f"audio_injector.injector_adain_layers.{j}.linear", F.silu(whole[f])
            ).chunk(2)
            y = self.norm(tokens, 1e-5) * (1 + scale) + shift
            k, v = self.project(name, "k", local[f]), self.project(name, "v", local[f])
            frames.append(tokens + self.attention(name, self.project(name, "q", y), k, v))
        return torch.cat(frames)

    def prefill(self, reference: Tensor, motion: Tensor, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys (not rotated) and values of the condition tokens per layer."""
        kinds = self.w["trainable_cond_mask.weight"]
        parts = [
            (motion[:, 18:], (1, 2, 2), ""),
            (motion[:, 16:18], (2, 4, 4), "_2x"),
            (motion[:, :16], (4, 8, 8), "_4x"),
        ]
        history = torch.cat(
            [self.patch(f"frame_packer.proj{suffix}", part, kernel) for part, kernel, suffix in parts]
        )
        x = torch.cat((self.patch("patch_embedding", reference, (1, 2, 2)) + kinds[1], history + kinds[2]))
        positions = self.frame_positions(30) + self.motion_positions()
        condition, (_, e0) = [], self.time(0.0)

        def keys_values(_, k, v):
            condition.append((k, v))
            return positions, self.rotate(k, positions), v

        for i in range(self.c.num_layers):
            x = self.layer(i, x, e0, text, keys_values)
        return condition

    def velocity(
        self,
        x: Tensor,
        t: float,
        frame: int,
        clip: int,
        distance: int,
        speech: Tensor,
        text: Tensor,
        condition,
        history,
    ) -> Tensor:
        """history: per layer a list of (first frame, keys, values) of this step so far; grows by this
        block."""
        e, e0 = self.time(t)
        whole, local = self.speech(speech)
        kinds = self.w["trainable_cond_mask.weight"]
        h = self.patch("patch_embedding", x, (1, 2, 2)) + self.w["cond_encoder.bias"] + kinds[0]
        count = self.c.num_frames_per_block

        def block_positions(first: int) -> list[tuple[int, int, int]]:
            return [p for f in range(first, first + count) for p in self.frame_positions(f)]

        reference = 30 + max(0, frame - (30 - distance))
        fixed = self.frame_positions(reference) + self.motion_positions()

        def keys_values(i, k, v):
            history[i].append((frame, k, v))
            seen = [entry for entry in history[i] if entry[0] > frame - clip]
            keys = [self.rotate(k, block_positions(f)) for f, k, _ in seen] + [
                self.rotate(condition[i][0], fixed)
            ]
            return (
                block_positions(frame),
                torch.cat(keys),
                torch.cat([v for _, _, v in seen] + [condition[i][1]]),
            )

        for i in range(self.c.num_layers):
            h = self.layer(i, h, e0, text, keys_values)
            if i in self.c.audio_inject_layers:
                h = self.inject(self.c.audio_inject_layers.index(i), h, whole, local)
        shift, scale = self.w["head.modulation"][0] + e
        y = self.linear("head.head", self.norm(h, self.c.eps) * (1 + scale) + shift)
        out = torch.zeros(self.c.out_dim, count, self.height, self.width)
        for index, patch in enumerate(y.view(-1, 2, 2, self.c.out_dim)):
            f, r, c = np.unravel_index(index, (count, self.rows, self.columns))
            out[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = patch.permute(2, 0, 1)
        return out
