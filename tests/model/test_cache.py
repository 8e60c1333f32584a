"""Where keys and values lie."""

import pytest
import torch

from model.cache import CellExchange, KVCache, PrefillExchange, TokenLayout, caches, token_layout
from model.rope import multipliers

LAYOUT = TokenLayout(reference=2, condition=5, block=3, blocks=4)
CPU = torch.device("cpu")


def cache_of(config, steps) -> KVCache:
    return KVCache(config, LAYOUT, steps, range(2), CPU, torch.float32)


def test_layout_of_the_14b_at_704x384(config):
    layout = token_layout(config, 48, 88, 4)
    assert (layout.reference, layout.condition, layout.block, layout.ring) == (1056, 2640, 3168, 12672)


def test_slots_and_condition_do_not_overlap(config):
    cache = cache_of(config, (2, 3))
    parts = [cache.condition, *(cache.slot(step, index) for step in (2, 3) for index in range(4))]
    tokens = sorted(token for part in parts for token in range(part.start, part.stop))
    assert tokens == list(range(cache.keys_BSND[0].shape[1]))


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_what_is_visible_is_the_condition_and_the_first_slots(config, step, blocks):
    cache = cache_of(config, (0, 1))
    parts = [cache.condition, *(cache.slot(step, index) for index in range(blocks))]
    visible = cache.visible(step, blocks)
    assert sorted(t for part in parts for t in range(part.start, part.stop)) == list(
        range(visible.start, visible.stop)
    )


@pytest.mark.parametrize("steps", [(0, 2), (1, 2), (0, 1, 2), ()])
def test_only_neighbouring_steps_share_a_condition(config, steps):
    with pytest.raises(ValueError, match="must be one step, or an even step and the one after it"):
        cache_of(config, steps)


def test_an_odd_number_of_steps_leaves_one_alone(config):
    assert [c.steps for c in caches(config, LAYOUT, 5, CPU, torch.float32)] == [(0, 1), (2, 3), (4,)]


@pytest.mark.parametrize("step", [0, 1])
def test_cache_of_one_step_shows_the_same_keys_in_the_same_order_as_one_of_two(config, step):
    """So a rank with one step gives the bits of a rank with all."""
    alone, shared = cache_of(config, (step,)), cache_of(config, (0, 1))
    other = 1 - step
    for block in range(6):
        seen = []
        for cache in (alone, shared):
            exchange = filled(cache, step, block)
            seen.append(exchange)
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
        filled(shared, other, block, seed=9)


def filled(cache, step, block, seed=1):
    """Prefills at block 0, writes a block, and returns what it attends."""
    generator = torch.Generator().manual_seed(seed + block)

    def tokens(count):
        return [torch.randn(1, count, 4, 16, generator=generator) for _ in range(3)]

    def rope(count):
        return multipliers(torch.randint(0, 50, (count, 3), generator=generator), 16)

    if block == 0 and seed == 1:
        PrefillExchange(cache, rope(5))(0, *tokens(5))
    exchange = CellExchange(cache, step, block % 4, min(block + 1, 4), rope(3), rope(2))
    return exchange(0, *tokens(3))


def test_adopted_condition_is_that_of_the_other(config):
    first, second = cache_of(config, (0, 1)), cache_of(config, (2,))
    filled(first, 0, 0)
    second.adopt_condition(first)
    for ours, theirs in [(second.keys_BSND, first.keys_BSND), (second.values_BSND, first.values_BSND)]:
        assert torch.equal(ours[0][:, second.condition], theirs[0][:, first.condition])
    assert second.reference_BLND[0] is first.reference_BLND[0]


def test_a_block_is_written_in_place(config):
    cache = cache_of(config, (0, 1))
    places = {layer: keys.data_ptr() for layer, keys in cache.keys_BSND.items()}
    _, keys, _ = filled(cache, 0, 0)
    assert keys.untyped_storage().data_ptr() == cache.keys_BSND[0].untyped_storage().data_ptr()
    assert {layer: keys.data_ptr() for layer, keys in cache.keys_BSND.items()} == places
