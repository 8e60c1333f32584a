"""Predicted bytes against the storages that the real objects keep alive."""

from dataclasses import replace

import pytest
import torch

from bench.dimensions import TINY, TINY_VAE, WAN_14B, WAV2VEC2_LARGE
from bench.measure import building
from conf.spec import TextEncoderSpec, VaeSpec
from model import memory, speech, text, vae
from model.cache import token_layout
from model.denoise import Denoiser
from model.dit import CausalDiT
from model.memory import LiveBytes
from tests.model.conftest import SETTINGS
from tests.model.test_flops import conditions

DTYPES = [torch.float32, torch.bfloat16]
BLOCKS = 16
HEIGHT, WIDTH = 16, 16
SCALARS = 64
"""Bytes that do not scale with anything: the scheduler's noise levels."""

WIDE = replace(TINY, dim=256, ffn_dim=704, num_layers=2, audio_inject_layers=(1,))
LOUD = replace(TINY, audio_dim=64, num_wav2vec_layers=25)


def build(config, dtype) -> CausalDiT:
    return CausalDiT(config).to(dtype).eval().requires_grad_(False)


def prediction(config, dtype, height=HEIGHT, width=WIDTH, **changes) -> memory.DenoiserMemory:
    return memory.denoiser(config, replace(SETTINGS, **changes), height, width, BLOCKS, dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_are_those_that_are_allocated(dtype):
    with building(torch.device("cpu"), dtype), LiveBytes() as live:
        dit = CausalDiT(TINY)
    assert live.alive == prediction(TINY, dtype).parameters
    assert memory.dit_parameters(TINY).total == sum(p.numel() for p in dit.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_caches_are_those_that_are_allocated(dtype, steps, scale):
    changes = {"sample_steps": steps, "sample_guide_scale": scale}
    dit, predicted = build(TINY, dtype), prediction(TINY, dtype, **changes)
    once = Denoiser(dit, replace(SETTINGS, **changes), HEIGHT, WIDTH, "sdpa")
    allocated = 0
    for cache in [cache for prompt in once.caches for cache in prompt]:
        for buffers in (cache.keys_BSND, cache.values_BSND, cache.reference_BLND):
            allocated += sum(tensor.untyped_storage().nbytes() for tensor in buffers.values())
    assert predicted.rings + predicted.condition == allocated


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_a_running_segment_keeps_is_predicted(dtype):
    """Exactly, but for the scheduler's few numbers and, from the first prefill on, the second set of
    unrotated reference keys."""
    dit, predicted = build(TINY, dtype), prediction(TINY, dtype)
    given, settings = conditions(TINY, HEIGHT, WIDTH, blocks=BLOCKS), replace(SETTINGS, reference="keep")
    with LiveBytes() as live:
        once = Denoiser(dit, settings, HEIGHT, WIDTH, "sdpa")
        once.open(given, 0, BLOCKS)
        for block in range(BLOCKS):
            state = None
            for step in range(4):
                state = once.cell(block, step, state)
        del state
    layout = token_layout(TINY, HEIGHT, WIDTH, once.blocks_per_clip)
    given_up = memory.key_value_bytes(TINY, layout.reference, dtype.itemsize) // 2
    kept = predicted.rings + predicted.condition + predicted.text + predicted.segment - given_up
    assert 0 <= live.alive - kept <= SCALARS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("config", "height", "width"),
    [(TINY, 16, 16), (WIDE, 24, 24), (LOUD, 16, 16)],
    ids=["tiny", "wide", "loud"],
)
def test_activations_of_a_cell_are_predicted_within_a_tenth(config, height, width, dtype):
    once = Denoiser(build(config, dtype), SETTINGS, height, width, "sdpa")
    once.open(conditions(config, height, width), 0, 6)
    with LiveBytes() as live:
        once.cell(0, 0)
    layout = token_layout(config, height, width, once.blocks_per_clip)
    assert memory.cell_activations(config, layout, dtype.itemsize) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (TINY, 16, 16),
        (replace(WIDE, dim=512, ffn_dim=2048, num_layers=1, audio_inject_layers=()), 48, 48),
    ],
    ids=["packing-is-most", "a-layer-is-most"],
)
def test_activations_of_a_prefill_are_predicted_within_a_tenth(config, height, width, dtype):
    once = Denoiser(build(config, dtype).to("meta"), SETTINGS, height, width, "sdpa")
    with torch.device("meta"):
        given = conditions(config, height, width)
    once.open(given, 0, 6)
    with LiveBytes() as live, torch.inference_mode():
        once._prefill(once.segment)
    layout = token_layout(config, height, width, once.blocks_per_clip)
    predicted = memory.prefill_activations(config, layout, height, width, dtype.itemsize)
    assert predicted == pytest.approx(live.peak, rel=0.1)


def test_a_leak_in_a_call_would_be_noticed(monkeypatch):
    dit, kept = build(TINY, torch.float32), []
    once = Denoiser(dit, SETTINGS, HEIGHT, WIDTH, "sdpa")
    once.open(conditions(TINY, HEIGHT, WIDTH), 0, 6)
    run_layers = CausalDiT.run_layers

    def leaky(self, x_BLD, layers, context):
        kept.append(torch.zeros(100_000))
        return run_layers(self, x_BLD, layers, context)

    monkeypatch.setattr(CausalDiT, "run_layers", leaky)
    with LiveBytes() as live:
        once.cell(0, 0)
    layout = token_layout(TINY, HEIGHT, WIDTH, once.blocks_per_clip)
    assert memory.cell_activations(TINY, layout, 4) != pytest.approx(live.peak, rel=0.1)


def test_live_bytes_counts_a_storage_once_and_forgets_it():
    outside = torch.zeros(50)
    with LiveBytes() as live:
        view = torch.zeros(100).view(10, 10)[2:]
        twice = view + 1
        assert (live.alive, live.peak) == (400 + 320, 400 + 320)
        del view
        assert live.alive == 320
        outside.add_(1)
        outside.view(5, 10)
    assert (live.alive, live.peak) == (320, 720)
    del twice
    assert live.alive == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_stream_holds_what_is_predicted(dtype):
    """The prediction runs on the meta device, this on the CPU."""
    with building(torch.device("meta"), dtype):
        on_meta = vae.build(TINY_VAE)
    with building(torch.device("cpu"), dtype):
        on_cpu = vae.build(TINY_VAE).requires_grad_(False)
    predicted, model = memory.vae(on_meta, 64, 96, 9), vae.Vae(on_cpu)
    latent, stream = torch.zeros(16, 1, 8, 12), model.stream()
    with LiveBytes() as live:
        for _ in range(5):
            stream.push(latent)
    assert live.alive == predicted.stream
    assert live.peak - live.alive == pytest.approx(predicted.decode, rel=0.1)
    pixels = torch.zeros(3, 9, 64, 96)
    with LiveBytes() as live:
        model.encode(pixels)
    assert live.peak == pytest.approx(predicted.encode, rel=0.1)


def test_decode_stream_keeps_two_frames_before_every_causal_convolution():
    """By hand, for one residual block per level: channels at the level's size. The two temporal upsamplings
    have a convolution of their own; the last level's size appears twice, as it has the output's too."""
    with torch.device("meta"):
        model = vae.build(TINY_VAE)
    frame = 4 * 6
    mid = 16 + 4 * 16
    level_0 = 4 * 16 + 16
    level_1 = 4 * (8 + 16 + 16 + 16) + 4 * 16
    level_2 = 16 * (8 + 8 + 8 + 8)
    level_3 = 64 * (4 + 4 + 4 + 4) + 64 * 4
    assert memory.vae(model, 32, 48, 1).stream == 2 * 4 * frame * (
        mid + level_0 + level_1 + level_2 + level_3
    )


def test_14b_at_704x384():
    predicted = memory.denoiser(WAN_14B, SETTINGS, 48, 88, 125, 2)
    layout = token_layout(WAN_14B, 48, 88, 4)
    parameters = memory.dit_parameters(WAN_14B)
    assert parameters.total == pytest.approx(16.296e9, abs=0.5e6)
    assert predicted.parameters == 2 * parameters.total
    assert layout.reference == 1056
    assert predicted.rings / 4 == pytest.approx(10.38e9, rel=1e-3)
    assert memory.key_value_bytes(WAN_14B, layout.condition, 2) == pytest.approx(2.16e9, rel=2e-3)
    assert predicted.text == pytest.approx(0.42e9, rel=2e-3)


def test_published_encoders():
    with building(torch.device("meta"), torch.float32):
        wav2vec2 = speech.build(WAV2VEC2_LARGE)
    with building(torch.device("meta"), torch.bfloat16):
        umt5, autoencoder = text.build(TextEncoderSpec()), vae.build(VaeSpec())
    prompt = memory.text_encoder(umt5, 512)
    assert prompt.parameters == pytest.approx(2 * 5.68e9, rel=1e-3)
    assert prompt.total == prompt.parameters + prompt.activations
    window, longer = (memory.speech_encoder(wav2vec2, seconds * 16_000) for seconds in (10, 20))
    assert window.parameters == 4 * 315_438_720
    assert longer.activations == pytest.approx(2 * window.activations, rel=0.05)
    assert memory.vae(autoencoder, 384, 704, 1).stream == pytest.approx(1.19 * 2**30, rel=1e-3)
