"""Sampling steps as pure functions: what a solver remembers travels with its block.

The arithmetic is that of diffusers' schedulers. A scheduler object remembers one loop, and here the steps
of many blocks and videos interleave, so every step works on a copy that is given the block's memory and
handed back.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

MEMORY: dict[str, tuple[str, ...]] = {
    "euler": (),
    "unipc": ("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order"),
    "dpm++": ("model_outputs", "lower_order_nums"),
}
"""Attributes that a scheduler's `step` leaves for the next one, per solver."""


@dataclass(frozen=True)
class SolverState:
    """A block between two steps. Holds tensors and plain values only, so that it can be pickled."""

    x: Tensor
    """Latents [C, F, h, w] float32."""
    memory: dict[str, Any]
    """The scheduler's attributes after the last step."""

    def to(self, device: torch.device | str) -> "SolverState":
        return SolverState(self.x.to(device), {name: _to(v, device) for name, v in self.memory.items()})


class Solver:
    """`euler`, `unipc` or `dpm++` with its noise levels.

    Args:
        name: euler is what the published LoRA was distilled with.
        sample_steps: number of steps.
        sample_shift: shift of the noise levels, sigma -> shift * sigma / (1 + (shift - 1) * sigma). For
        euler,
            as upstream, the smallest level is shifted twice.
    """

    def __init__(self, name: str, sample_steps: int, sample_shift: float) -> None:
        if name not in MEMORY:
            raise ValueError(f"sample_solver={name!r}: must be one of {', '.join(MEMORY)}")
        if sample_steps < 1:
            raise ValueError(f"sample_steps={sample_steps}: must be at least 1")
        if sample_shift <= 0:
            raise ValueError(f"sample_shift={sample_shift}: must be above 0")
        self.name, self.sample_steps, self.sample_shift = name, sample_steps, sample_shift
        self._scheduler = _scheduler(name, sample_shift)
        self._scheduler.set_timesteps(sample_steps)

    @property
    def timesteps(self) -> Tensor:
        """[sample_steps] float32, from 1000 down."""
        return self._scheduler.timesteps.float()

    @property
    def sigmas(self) -> Tensor:
        """[sample_steps + 1] float32, noise levels before each step and after the last."""
        return self._scheduler.sigmas.float()

    def start(self, noise_CFHW: Tensor) -> SolverState:
        """The state before step 0."""
        scheduler = self._scheduler
        return SolverState(noise_CFHW, {name: getattr(scheduler, name, None) for name in MEMORY[self.name]})

    def step(self, state: SolverState, velocity_CFHW: Tensor, step: int) -> SolverState:
        """The state after `step`. Neither argument is changed."""
        scheduler: Any = copy.copy(self._scheduler)
        scheduler._step_index = step
        for name, value in state.memory.items():
            setattr(scheduler, name, copy.copy(value))
        velocity, x = velocity_CFHW[None], state.x[None]
        x = scheduler.step(velocity, scheduler.timesteps[step], x, return_dict=False)[0][0]
        return SolverState(x, {name: getattr(scheduler, name) for name in MEMORY[self.name]})


def _scheduler(name: str, shift: float) -> Any:
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    multistep: Any = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    return multistep(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value
