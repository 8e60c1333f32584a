"""One segment of a video through the transformer: open, prefill, cells, carry.

Shape suffixes: C latent channels, F latent frames, H and W latent rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import attention_backend
from model.audio import SpeechTokens
from model.cache import CellExchange, KVCache, PrefillExchange, caches, condition_positions, token_layout
from model.carry import REFERENCES, Carry, CarryError, DenoiseSettings, extend_history
from model.conditions import Conditions
from model.dit import CausalDiT, Context
from model.noise import MAX_DISTANCE, block_noise, relative_distance
from model.priming import PRIMING_LATENTS
from model.rope import RopeTable, multipliers, reference_time
from model.solver import Solver, SolverState

__all__ = ["REFERENCES", "Carry", "CarryError", "Conditions", "DenoiseSettings", "Denoiser"]


@dataclass
class _Segment:
    """What is known of the open segment; replaced as a whole by the next."""

    conditions: Conditions
    first_block: int
    end_block: int
    origin_block: int
    carry: Carry | None
    rope: RopeTable
    texts: list[list[tuple[Tensor, Tensor]]]
    reference: Tensor
    motion: Tensor
    latents: Tensor
    inputs: Tensor
    next_block: list[int]
    """Block whose cell comes next, per step."""
    speech: dict[int, list[SpeechTokens]]
    """Per prompt, of the blocks between their first and last step."""
    prefill_before: int | None
    """Block that the second prefill has to come before; None where none is to come, or no more."""
    first_latent: Tensor | None = None

    @property
    def first_cell(self) -> int:
        """First block that is run, replayed ones included."""
        return self.first_block - (len(self.carry.inputs) if self.carry else 0)


class Denoiser:
    """A transformer with its caches for one size of latents; holds one segment at a time.

    Everything that grows with the size is allocated here. Calls are those of `model.schedule.calls`, or any
    order that keeps a block's steps and a step's blocks in order.
    """

    @torch.inference_mode()
    def __init__(
        self,
        dit: CausalDiT,
        settings: DenoiseSettings,
        height: int,
        width: int,
        backend: str,
        distance: Callable[[int, int, int], int] = relative_distance,
    ) -> None:
        """Latents are `height` x `width`; `backend` computes attention.

        distance: (seed, block, step) -> latent frames that the reference is ahead; recorded runs have their
        own. Raises ValueError for a size, clip or backend that cannot be.
        """
        config = dit.config
        if height % config.patch_size[1] or width % config.patch_size[2]:
            raise ValueError(f"latents of {height}x{width}: must divide into {config.patch_size[1:]} patches")
        if settings.infer_frames < 1 or settings.infer_frames % config.frames_per_block:
            raise ValueError(
                f"infer_frames={settings.infer_frames}: must be a multiple of {config.frames_per_block}"
            )
        self.dit, self.distance = dit, distance
        self.block_shape = (config.in_dim, config.num_frames_per_block, height, width)
        self.blocks_per_clip = settings.infer_frames // config.frames_per_block
        self.attend = attention_backend(backend, dit.device)
        self.configure(settings)
        self.time_zero = dit.encode_time(0.0)
        layout = token_layout(config, height, width, self.blocks_per_clip)
        positions = condition_positions(config, height, width)
        self.condition_rope = multipliers(positions, config.head_dim).to(dit.device)
        self.caches: list[list[KVCache]] = [
            caches(config, layout, settings.sample_steps, dit.device, dit.dtype)
            for _ in range(2 if settings.guided else 1)
        ]
        """One set per prompt: the prompt, and with guidance the negative one."""
        self._segment: _Segment | None = None

    @torch.inference_mode()
    def configure(self, settings: DenoiseSettings) -> None:
        """Takes settings of equal `caches` for the segments to come, and forgets the open one."""
        self._segment = None
        self.settings = settings
        self.solver = Solver(settings.sample_solver, settings.sample_steps, settings.sample_shift)
        self.times = [self.dit.encode_time(timestep) for timestep in self.solver.timesteps.tolist()]

    @property
    def segment(self) -> _Segment:
        if self._segment is None:
            raise RuntimeError("no segment is open")
        return self._segment

    @torch.inference_mode()
    def open(
        self, conditions: Conditions, first_block: int, end_block: int, carry: Carry | None = None
    ) -> None:
        """Starts the segment [first_block, end_block), whatever became of the one before.

        With a carry its last clip is to be replayed: the segment's cells begin that many blocks earlier.
        Without one, the video begins here. Raises ValueError for conditions that do not fit, and CarryError.
        """
        self._segment = None
        first_cell = first_block - (self.blocks_per_clip if carry else 0)
        self._check(conditions, first_block, end_block, carry)
        conditions.check(self.dit.config, *self.block_shape[2:], first_cell, end_block)
        origin = carry.origin_block if carry else first_block
        second_clip = origin + self.blocks_per_clip
        has_both = first_cell == origin and second_clip < end_block
        texts = [conditions.text] + ([] if conditions.negative_text is None else [conditions.negative_text])
        inputs = (self.blocks_per_clip, self.settings.sample_steps, *self.block_shape)
        segment = _Segment(
            conditions=conditions,
            first_block=first_block,
            end_block=end_block,
            origin_block=origin,
            carry=carry,
            rope=self._rope(first_cell - origin, end_block - origin),
            texts=[self.dit.encode_text(self._upload(text)) for text in texts],
            reference=(carry or conditions).reference,
            motion=(carry or conditions).motion,
            latents=self._upload(carry.latents if carry else conditions.motion[:, :PRIMING_LATENTS].float()),
            inputs=torch.empty(inputs, dtype=self.dit.dtype, device=self.dit.device),
            next_block=[first_cell] * self.settings.sample_steps,
            speech={},
            prefill_before=second_clip if has_both and self.settings.reference != "keep" else None,
        )
        self._prefill(segment)
        self._segment = segment

    @torch.inference_mode()
    def prefill(self, motion: Tensor | None = None) -> None:
        """The second prefill, between the first clip and the next: from here on the first generated latent is
        the reference. After a replayed first clip, reference and motion come from the carry.

        motion: [C, 19, h, w]; stays as it is unless given, which `first_latent_and_motion` requires. Raises
        ValueError at any other moment.
        """
        segment = self.segment
        if segment.prefill_before is None or set(segment.next_block) != {segment.prefill_before}:
            raise ValueError(
                f"prefill before block {min(segment.next_block)}: its one moment is after the first clip, "
                f"which here is {segment.prefill_before}"
            )
        if segment.carry is None:
            segment.reference, segment.motion = self._after_first_clip(segment, motion)
        else:
            segment.reference, segment.motion = segment.carry.next_reference, segment.carry.next_motion
        self._prefill(segment)
        segment.prefill_before = None

    @torch.inference_mode()
    def cell(self, block: int, step: int, state: SolverState | None = None) -> SolverState:
        """One block at one step. Returns the block's state after it: `x` is clean after the last step.

        Step 0 draws the block's noise if `state` is None. The cell of a replayed block takes its x from the
        carry, leaves its keys and values in the caches, and returns that x.
        """
        segment = self.segment
        if block != segment.next_block[step] or block >= segment.end_block:
            raise ValueError(
                f"cell ({block}, {step}): step {step} goes on at block {segment.next_block[step]}"
            )
        if block == segment.prefill_before:
            raise ValueError(f"cell ({block}, {step}): the second prefill comes first")
        replay = block < segment.first_block
        if replay:
            assert segment.carry is not None
            x = segment.carry.inputs[block - segment.first_cell, step]
            state = self.solver.start(self._upload(x))
        elif state is not None:
            state = state.to(self.dit.device)
        elif step == 0:
            noise = block_noise(self.settings.base_seed, block, self.block_shape)
            state = self.solver.start(self._upload(noise))
        else:
            raise ValueError(f"cell ({block}, {step}): only step 0 goes without a state")
        velocity = self._velocity(state.x, block, step)
        segment.inputs[(block - segment.origin_block) % self.blocks_per_clip, step].copy_(state.x)
        segment.next_block[step] = block + 1
        last = step == self.settings.sample_steps - 1
        if last:
            del segment.speech[block]
        if replay:
            return state
        state = self.solver.step(state, velocity, step)
        if last:
            segment.latents = extend_history(segment.latents, state.x)
            if block == segment.origin_block:
                segment.first_latent = state.x[:, :1]
        return state

    def _velocity(self, x_CFHW: Tensor, block: int, step: int) -> Tensor:
        """What the network says to x, guided if guidance is on; leaves the block in the caches of `step`.

        negative + scale * (positive - negative). As in the original Wan2.2-S2V, the negative branch has the
        negative prompt and hears features of zero.
        """
        segment, dit = self.segment, self.dit
        frames = self.block_shape[1]
        frame = (block - segment.origin_block) * frames
        index = block - segment.first_cell
        slot, blocks = index % self.blocks_per_clip, min(index + 1, self.blocks_per_clip)
        rope = segment.rope.frames(frame, frames)
        distance = self.distance(self.settings.base_seed, block, step)
        reference_rope = segment.rope.frames(reference_time(frame, distance), 1)
        time, velocities = self.times[step], []
        for text, speech, step_caches in zip(segment.texts, self._speech(block), self.caches, strict=True):
            exchange = CellExchange(step_caches[step // 2], step, slot, blocks, rope, reference_rope)
            hidden = dit.run_layers(
                dit.embed(x_CFHW),
                range(dit.config.num_layers),
                Context(time, text, speech, exchange, self.attend),
            )
            velocities.append(dit.velocity(hidden, *self.block_shape[2:], time))
        if len(velocities) == 1:
            return velocities[0]
        positive, negative = velocities
        return negative + self.settings.sample_guide_scale * (positive - negative)

    @torch.inference_mode()
    def carry(self, motion: Tensor | None = None) -> Carry:
        """What the next segment needs, after the last cell of a segment that ends with a clip.

        motion: as in `prefill`, for a segment that ends where the second prefill would come.
        """
        segment = self.segment
        blocks = segment.end_block - segment.origin_block
        if blocks % self.blocks_per_clip or set(segment.next_block) != {segment.end_block}:
            raise ValueError(
                f"end_block={segment.end_block}: a carry needs a finished segment of whole clips"
            )
        next_reference, next_motion = segment.reference, segment.motion
        if blocks == self.blocks_per_clip and self.settings.reference != "keep":
            next_reference, next_motion = self._after_first_clip(segment, motion)
        return Carry(
            self.settings,
            segment.end_block,
            segment.origin_block,
            inputs=segment.inputs.cpu(),
            reference=segment.reference.cpu(),
            motion=segment.motion.cpu(),
            next_reference=next_reference.cpu(),
            next_motion=next_motion.cpu(),
            latents=segment.latents.cpu(),
        )

    def _rope(self, first_block: int, end_block: int) -> RopeTable:
        """Of the blocks [first_block, end_block), counted from the video's origin, and of the reference."""
        head_dim, (_, frames, height, width) = self.dit.config.head_dim, self.block_shape
        last = reference_time(end_block * frames, MAX_DISTANCE)
        return RopeTable(
            head_dim, self.dit.config.grid(height, width), first_block * frames, last, self.dit.device
        )

    def _prefill(self, segment: _Segment) -> None:
        """Condition tokens through all layers once per prompt, at t = 0 and without speech."""
        dit = self.dit
        hidden = dit.embed_condition(self._upload(segment.reference), self._upload(segment.motion))
        for text, (first, *others) in zip(segment.texts, self.caches, strict=True):
            exchange = PrefillExchange(first, self.condition_rope)
            context = Context(self.time_zero, text, None, exchange, self.attend)
            dit.run_layers(hidden, range(dit.config.num_layers), context)
            for cache in others:
                cache.adopt_condition(first)

    def _speech(self, block: int) -> list[SpeechTokens]:
        """What each prompt's branch hears: encoded at a block's first step, used by all of them."""
        segment = self.segment
        if block not in segment.speech:
            frames = self.dit.config.frames_per_block
            start = (block - segment.conditions.speech_first_block) * frames
            features = self._upload(segment.conditions.speech[:, :, start : start + frames])
            heard = [features, torch.zeros_like(features)][: len(segment.texts)]
            segment.speech[block] = [self.dit.encode_speech(features) for features in heard]
        return segment.speech[block]

    def _after_first_clip(self, segment: _Segment, motion: Tensor | None) -> tuple[Tensor, Tensor]:
        """Reference and motion that are in force from the second clip on."""
        if motion is None and self.settings.reference == "first_latent_and_motion":
            raise ValueError("reference='first_latent_and_motion': needs re-encoded motion latents here")
        assert segment.first_latent is not None
        return segment.first_latent, segment.motion if motion is None else motion

    def _upload(self, tensor: Tensor) -> Tensor:
        """To the device without waiting for it: copies from pinned memory are queued like kernels."""
        if self.dit.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.dit.device, non_blocking=True)

    def _check(self, conditions: Conditions, first_block: int, end_block: int, carry: Carry | None) -> None:
        if not 0 <= first_block < end_block:
            raise ValueError(f"blocks {first_block}..{end_block}: must be a range of at least one block")
        if (conditions.negative_text is not None) != self.settings.guided:
            raise ValueError("negative_text: must be given with sample_guide_scale above 1, and only then")
        if carry is not None:
            carry.require(self.settings, first_block)
            carry.check(self.dit.config, self.block_shape, self.dit.dtype)
