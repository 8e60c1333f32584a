import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from conf.spec import VaeSpec
from model import vae
from model.priming import DECODER_HISTORY

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**options) -> vae.Vae:
    options = {"base_dim": 4, "z_dim": 16, "num_res_blocks": 1, **options}
    return vae.Vae(AutoencoderKLWan(**options))


def published_blocks() -> vae.Vae:
    return small(num_res_blocks=2, dim_mult=[1, 2, 4, 4])


def residual_and_patched() -> vae.Vae:
    return small(is_residual=True, patch_size=2, in_channels=12, out_channels=12)


VARIANTS = [published_blocks, residual_and_patched, lambda: small(is_residual=True)]


def latents(model: vae.Vae, frames: int) -> torch.Tensor:
    return torch.randn(model.z_dim, frames, 3, 2)


def primed(model: vae.Vae, z: torch.Tensor, cut: int, priming: int) -> torch.Tensor:
    """What a fresh stream makes of z from `cut` on after seeing the `priming` latents before it."""
    stream = model.stream()
    stream.push(z[:, cut - priming : cut])
    return stream.push(z[:, cut:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_in_pieces_equals_full_decode(variant):
    model = variant()
    z = latents(model, 7)
    stream = model.stream()
    pieces = torch.cat([stream.push(piece) for piece in z.split([1, 3, 1, 2], dim=1)], dim=1)
    assert torch.equal(pieces, model.stream().push(z))
    with torch.no_grad():
        librarys = model.model.decode((z * model.std_C + model.mean_C)[None]).sample[0]
    assert (pieces - librarys).abs().max() < 2e-5
    assert pieces.shape == (3, 25, 3 * model.spatial_compression, 2 * model.spatial_compression)


@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_equals_the_librarys_mode_normalised(variant):
    model = variant()
    pixels = torch.rand(3, 9, 3 * model.spatial_compression, 2 * model.spatial_compression) * 2 - 1
    with torch.no_grad():
        mode = model.model.encode(pixels[None]).latent_dist.mode()[0]
    assert torch.equal(model.encode(pixels), (mode - model.mean_C) / model.std_C)
    assert model.encode(pixels).shape == (16, 3, *model.latent_hw(*pixels.shape[2:]))


def test_interleaved_streams_give_the_bits_of_separate_ones():
    model = published_blocks()
    a, b = latents(model, 4), latents(model, 4)
    alone_a, alone_b = model.stream().push(a), model.stream().push(b)
    first, second = model.stream(), model.stream()
    together_a, together_b = [], []
    for step in range(4):
        together_a.append(first.push(a[:, step : step + 1]))
        model.encode(torch.zeros(3, 5, 24, 16))
        together_b.append(second.push(b[:, step : step + 1]))
    assert torch.equal(torch.cat(together_a, dim=1), alone_a)
    assert torch.equal(torch.cat(together_b, dim=1), alone_b)


def test_second_video_starts_at_its_own_first_frame():
    model = published_blocks()
    z = latents(model, 3)
    used = model.stream()
    used.push(latents(model, 5))
    assert used.push(z).shape[1] == 12
    assert torch.equal(model.stream().push(z), model.stream().push(z))
    assert model.stream().push(z).shape[1] == 9


def test_stream_primed_with_38_latents_goes_on_with_the_bits_of_an_uncut_one():
    model = published_blocks()
    z = latents(model, 46)
    uncut = model.stream().push(z)[:, -8:]
    assert torch.equal(primed(model, z, 44, DECODER_HISTORY), uncut)


def test_stream_primed_with_37_latents_differs_from_an_uncut_one():
    model = published_blocks()
    z = latents(model, 46)
    uncut = model.stream().push(z)[:, -8:]
    assert not torch.equal(primed(model, z, 44, DECODER_HISTORY - 1), uncut)


def test_receptive_field_is_exact_for_fewer_blocks_too():
    model = small(num_res_blocks=1)
    reach = vae.receptive_field(model.model.config)
    assert reach < DECODER_HISTORY
    z = latents(model, 38)
    uncut = model.stream().push(z)[:, -8:]
    assert torch.equal(primed(model, z, 36, reach), uncut)
    assert not torch.equal(primed(model, z, 36, reach - 1), uncut)


def test_receptive_field_of_the_published_vae_is_the_constant():
    with torch.device("meta"):
        assert vae.receptive_field(AutoencoderKLWan().config) == DECODER_HISTORY


def test_decoder_that_looks_further_back_than_a_carry_decodes_whole_videos_only():
    model = small(num_res_blocks=3)
    assert model.stream().push(latents(model, 3)).shape[1] == 9
    with pytest.raises(ValueError, match="num_res_blocks=3: its decoder looks"):
        model.require_carried()
    published_blocks().require_carried()


def test_upstream_names_are_those_that_diffusers_converts():
    with torch.device("meta"):
        model = vae.build(VaeSpec())
    names = vae.upstream_names(model)
    assert len(names) == 194
    converted = convert_wan_vae_to_diffusers({upstream: own for own, upstream in names.items()})
    assert all(own == name for name, own in converted.items())


@pytest.mark.parametrize(
    "spec", [VaeSpec(base_dim=2, num_res_blocks=1), VaeSpec(base_dim=4, dim_mult=[1, 2, 2, 4])]
)
def test_upstream_names_stay_distinct_in_other_shapes(spec):
    with torch.device("meta"):
        model = vae.build(spec)
    names = vae.upstream_names(model)
    assert len(set(names.values())) == len(names)
    assert all("blocks" not in name and "resnets" not in name for name in names.values())


def test_frames_that_the_vae_would_drop_are_refused():
    with pytest.raises(ValueError, match="8 frames"):
        small().encode(torch.zeros(3, 8, 16, 16))


def test_sides_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="20x16"):
        small().encode(torch.zeros(3, 1, 16, 20))


def test_bfloat16_vae_takes_and_gives_float32():
    model = vae.Vae(vae.build(VaeSpec(base_dim=2, num_res_blocks=1)).bfloat16())
    z = model.encode(torch.rand(3, 1, 16, 16) * 2 - 1)
    pixels = model.stream().push(z)
    assert z.dtype == pixels.dtype == torch.float32
    assert pixels.isfinite().all()
    assert pixels.abs().max() <= 1
