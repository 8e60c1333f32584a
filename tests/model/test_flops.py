"""Formulas of the work against torch's own counter, which counts attention on the meta device only."""

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.dimensions import TINY, TINY_VAE, WAN_14B
from conf.spec import VaeSpec
from model import flops, vae
from model.cache import TokenLayout, token_layout
from model.config import DiTConfig
from model.denoise import Conditions, Denoiser
from model.dit import CausalDiT
from tests.model.conftest import SETTINGS

BLOCKS = 6
OTHER = replace(
    TINY,
    dim=96,
    num_heads=2,
    num_layers=4,
    audio_inject_layers=(3,),
    audio_dim=24,
    num_audio_token=3,
    text_len=9,
)


def conditions(config: DiTConfig, height: int, width: int, blocks: int = BLOCKS) -> Conditions:
    return Conditions(
        text=torch.zeros(7, config.text_dim),
        negative_text=None,
        reference=torch.zeros(config.in_dim, 1, height, width),
        motion=torch.zeros(config.in_dim, config.motion_frames_latent, height, width),
        speech=torch.zeros(config.num_wav2vec_layers, config.audio_dim, blocks * config.frames_per_block),
        speech_first_block=0,
    )


def on_meta(config: DiTConfig, height: int, width: int) -> tuple[Denoiser, TokenLayout]:
    """With an open segment of `BLOCKS` blocks."""
    with torch.device("meta"):
        dit = CausalDiT(config).eval()
    once = Denoiser(dit, replace(SETTINGS, reference="keep"), height, width, "sdpa")
    once.open(conditions(config, height, width), 0, BLOCKS)
    return once, token_layout(config, height, width, once.blocks_per_clip)


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "height", "width"), [(TINY, 16, 16), (OTHER, 12, 20)], ids=["tiny", "other-dimensions"]
)
def test_formulas_are_what_the_counter_counts(config, height, width):
    once, layout = on_meta(config, height, width)
    opening = counted(lambda: once.open(conditions(config, height, width), 0, BLOCKS))
    assert opening == flops.prefill(config, layout, height, width).total + flops.encode_text(config)
    for block in range(BLOCKS):
        blocks = min(block + 1, once.blocks_per_clip)
        expected = flops.cell(config, layout, blocks).total
        assert counted(partial(once.cell, block, 0)) == expected + flops.speech(config)


def test_a_block_is_all_of_its_calls():
    once, layout = on_meta(TINY, 16, 16)
    once.segment.next_block = [3] * SETTINGS.sample_steps
    state = once.cell(3, 0)
    first = flops.cell(TINY, layout, 4).total + flops.speech(TINY)
    later = counted(lambda: [once.cell(3, step, state) for step in (1, 2, 3)])
    assert flops.block(TINY, layout, SETTINGS.sample_steps) == first + later


def test_14b_at_704x384_is_what_the_counter_counts_there():
    once, layout = on_meta(WAN_14B, 48, 88)
    once.segment.next_block = [3] * 4
    expected = flops.cell(WAN_14B, layout, 4).total + flops.speech(WAN_14B)
    assert counted(lambda: once.cell(3, 0)) == expected


def test_14b_at_704x384():
    layout = token_layout(WAN_14B, 48, 88, 4)
    cell = flops.cell(WAN_14B, layout, 4)
    as_upstream = flops.cell(WAN_14B, layout, 4, text_cached=False)
    assert cell.total == pytest.approx(120.8e12, rel=1e-3)
    assert as_upstream.total == pytest.approx(123.0e12, rel=1e-3)
    assert flops.block(WAN_14B, layout, 4) == pytest.approx(483.3e12, rel=1e-3)
    assert flops.prefill(WAN_14B, layout, 48, 88).total == pytest.approx(69.9e12, rel=1e-3)
    assert sum(astuple(cell)) == cell.total


def test_text_without_cache_is_encoded_in_every_call():
    layout = token_layout(TINY, 16, 16, 4)
    extra = flops.cell(TINY, layout, 4, text_cached=False).total - flops.cell(TINY, layout, 4).total
    with torch.device("meta"):
        dit = CausalDiT(TINY)
    assert extra == counted(lambda: dit.encode_text(torch.zeros(3, TINY.text_dim, device="meta")))


def test_wan_vae_decodes_a_frame_with_2_29_tflop():
    with torch.device("meta"):
        model = vae.build(VaeSpec())
    assert flops.vae_decode(model, 384, 704) == pytest.approx(2.29e12, rel=1e-3)


def test_vae_decode_is_the_sum_of_its_convolutions_and_attention():
    """By hand: a convolution is 2 * weights of one output channel * outputs; the attention is one frame's."""
    with torch.device("meta"):
        model = vae.build(TINY_VAE)
    ours = flops.vae_decode(model, 32, 48) * 4
    latent = torch.zeros(16, 1, 4, 6, device="meta")
    stream = vae.Vae(model).stream()
    stream.push(latent)
    widest = TINY_VAE.base_dim * TINY_VAE.dim_mult[-1]
    expected = [4 * (4 * 6) ** 2 * widest]

    def add(convolution, _, out):
        expected.append(2 * convolution.weight[0].numel() * out.numel())

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            module.register_forward_hook(add)
    stream.push(latent)
    assert ours == sum(expected)
