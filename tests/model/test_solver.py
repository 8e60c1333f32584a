"""Pure steps equal a plain loop over diffusers' schedulers, however many blocks interleave."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from model.solver import Solver

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
}


def velocity(x, timestep):
    """Any function of both."""
    return torch.sin(3 * x) + timestep.item() / 1000


def plain_loop(name, steps, noise):
    scheduler, x = SCHEDULERS[name](), noise[None]
    scheduler.set_timesteps(steps)
    seen = []
    for timestep in scheduler.timesteps:
        seen.append(x[0])
        x = scheduler.step(velocity(x, timestep), timestep, x, return_dict=False)[0]
    return [*seen[1:], x[0]]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_interleaved_blocks_equal_plain_loops(name, steps):
    solver = Solver(name, steps, 3.0)
    noises = [torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    states = [solver.start(noise) for noise in noises]
    seen: list[list] = [[], [], []]
    for step in range(steps):
        for block in (2, 0, 1):
            state = pickle.loads(pickle.dumps(states[block]))
            states[block] = solver.step(state, velocity(state.x, solver.timesteps[step]), step)
            seen[block].append(states[block].x)
    for noise, ours in zip(noises, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain_loop(name, steps, noise), strict=True))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_changes_neither_its_state_nor_the_solver(name):
    solver = Solver(name, 4, 3.0)
    first = solver.step(solver.start(torch.randn(4, 3, 2, 2)), torch.randn(4, 3, 2, 2), 0)
    before, given = pickle.dumps(first), torch.randn(4, 3, 2, 2)
    once, again = (solver.step(first, given, 1) for _ in range(2))
    assert pickle.dumps(first) == before
    assert torch.equal(once.x, again.x)
    assert pickle.dumps(solver.start(given)) == pickle.dumps(Solver(name, 4, 3.0).start(given))


def test_timesteps_are_upstreams_with_the_last_shifted_twice():
    expected = torch.tensor([1000.0, 857.6923, 602.1506, 8.9286])
    timesteps = Solver("euler", 4, 3.0).timesteps
    torch.testing.assert_close(timesteps, expected, rtol=0, atol=1e-3)
    assert timesteps.dtype == torch.float32
    once = 3 * 0.001 / (1 + 2 * 0.001) * 1000
    assert abs(timesteps[-1] - once) > 5


def test_shift_is_honoured():
    assert Solver("euler", 4, 5.0).timesteps[1] > Solver("euler", 4, 3.0).timesteps[1]


def test_state_moves_with_all_that_it_remembers():
    solver = Solver("unipc", 4, 3.0)
    state = solver.step(solver.start(torch.randn(4, 3, 2, 2)), torch.randn(4, 3, 2, 2), 0).to("meta")
    assert {
        t.device.type for t in [state.x, state.memory["last_sample"], state.memory["model_outputs"][-1]]
    } == {"meta"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("heun", 4, 3.0), "sample_solver='heun': must be one of euler, unipc, dpm"),
        (("euler", 0, 3.0), "sample_steps=0: must be at least 1"),
        (("euler", 4, 0.0), "sample_shift=0.0: must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Solver(*arguments)
