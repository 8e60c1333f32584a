"""Noise and distances depend on their arguments and on nothing else."""

import torch

from model.noise import block_noise, relative_distance

SHAPE = (16, 3, 8, 8)


def test_noise_is_a_function_of_seed_and_block_only():
    expected = block_noise(420, 7, SHAPE)
    torch.manual_seed(1)
    torch.randn(5)
    block_noise(420, 6, SHAPE)
    assert torch.equal(block_noise(420, 7, SHAPE), expected)
    assert (expected.dtype, expected.device.type) == (torch.float32, "cpu")


def test_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    block_noise(420, 0, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_differs_between_seeds_and_between_blocks():
    """Also where seed + block is the same."""
    drawn = [block_noise(seed, block, SHAPE) for seed in (1, 2, -1) for block in (0, 1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_noise_is_standard_normal():
    noise = torch.stack([block_noise(3, block, SHAPE) for block in range(50)])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_distances_are_uniform_in_4_to_30():
    drawn = [relative_distance(420, block, step) for block in range(2000) for step in range(4)]
    counts = [drawn.count(distance) for distance in range(4, 31)]
    assert sum(counts) == len(drawn)
    assert min(counts) > 0.75 * len(drawn) / 27


def test_distances_do_not_change_from_version_to_version():
    """They are part of what a segment's identity stands for."""
    drawn = [relative_distance(420, block, step) for block in (0, 1) for step in range(4)]
    assert drawn == [13, 19, 25, 22, 9, 7, 27, 6]
