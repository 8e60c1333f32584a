"""Each surprise of the reference data's README, got wrong: the recorded sets must tell."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import audio, cache, denoise, framepack, rope
from model import dit as dit_module
from model.audio import AdaptiveNorm, CausalConv1d
from model.cache import CellExchange, KVCache
from model.dit import CausalDiT
from model.golden import dit as sets
from model.golden import dit_block
from model.golden import recorded as recorded_sets
from model.layers import Attention


def failing(golden) -> set[tuple[str, str]]:
    return {(check.set, check.quantity) for check in sets.checks(golden) if not check.passed}


def with_weights(monkeypatch, change) -> None:
    """Lets `change` loose on the transformer after it is loaded."""
    load = sets.load_dit

    def load_changed(folder, device):
        dit = load(folder, device)
        with torch.no_grad():
            change(dit)
        return dit

    monkeypatch.setattr(sets, "load_dit", load_changed)


def with_reference_time(monkeypatch, wrong) -> None:
    """Also widens the table, since a wrong time may lie outside of it."""
    init = rope.RopeTable.__init__
    monkeypatch.setattr(
        rope.RopeTable,
        "__init__",
        lambda self, head_dim, grid, first, last, device: init(
            self, head_dim, grid, first, last + 80, device
        ),
    )
    for module in (dit_block, denoise):
        monkeypatch.setattr(module, "reference_time", wrong)


def test_rope_multipliers_are_rounded_to_half_precision(golden, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "half", lambda tensor: tensor)
    failed = failing(golden)
    assert {("dit_block", "prefill.rope"), ("dit_block", "runA.velocity")} <= failed
    assert ("dit_block", "prefill.layer0.cond_v") not in failed


def test_without_rounding_the_clean_blocks_are_those_recorded_without_rounding(golden, dit, monkeypatch):
    """So rounding is all that is between the two recorded results."""
    monkeypatch.setattr(torch.Tensor, "half", lambda tensor: tensor)
    values, recorded = recorded_sets.read(golden, "dit_block")
    sigmas, finals = recorded["sigmas"], []
    with torch.inference_mode():
        run = dit_block.BlockRun(dit, values, recorded)
        run.prefill()
        for block in range(8):
            x = recorded["input.noise"][block // 4][:, block % 4 * 3 : block % 4 * 3 + 3]
            for step in range(4):
                x = x + (sigmas[step + 1] - sigmas[step]) * run.call(x, block, step, distance=30)
            finals.append(x)
    clips = torch.stack([torch.cat(finals[:4], dim=1), torch.cat(finals[4:], dim=1)])
    exact, rounded = recorded["runA.block_final_exact_rope"], recorded["runA.block_final"]
    assert (clips - exact).abs().max() < 2e-5 < (clips - rounded).abs().max()


def test_condition_keys_are_rotated_anew_at_every_call(golden, monkeypatch):
    """Wrong: the reference stays where the prefill put it."""
    with_reference_time(monkeypatch, lambda frame, distance: 30)
    assert ("dit_block", "runA.velocity") in failing(golden)


def test_condition_keys_are_kept_without_rotation(golden, monkeypatch):
    """Wrong: the cell rotates keys that the prefill has rotated already."""
    prefill = cache.PrefillExchange.__call__

    def keep_rotated(self, layer, q, k, v):
        result = prefill(self, layer, q, k, v)
        self.cache.reference_BLND[layer].copy_(result[1][:, : self.cache.layout.reference])
        return result

    monkeypatch.setattr(cache.PrefillExchange, "__call__", keep_rotated)
    assert ("dit_block", "runA.velocity") in failing(golden)


@pytest.mark.parametrize("wrong", [lambda d: 10, lambda d: d - 1])
def test_the_reference_keeps_its_distance(golden, monkeypatch, wrong):
    right = rope.reference_time
    with_reference_time(monkeypatch, lambda frame, distance: right(frame, wrong(distance)))
    failed = failing(golden)
    assert {("dit_block", "runA.velocity"), ("denoise_loop", "final.ref_replaced_random_dist")} <= failed


def test_motion_tokens_do_not_move_with_the_video(golden, monkeypatch):
    call = CellExchange.__call__

    def move(self, layer, q, k, v):
        q, keys, values = call(self, layer, q, k, v)
        held = self.cache.keys_BSND[layer]
        motion = slice(self.cache.reference.stop, self.cache.condition.stop)
        one_frame = rope.multipliers(torch.tensor([[1, 0, 0]]), q.shape[-1])
        held[:, motion] = rope.rotate(held[:, motion], one_frame)
        return q, keys, values

    monkeypatch.setattr(CellExchange, "__call__", move)
    assert ("dit_block", "runA.velocity") in failing(golden)


def test_motion_positions_are_truncated_and_not_centred(golden, monkeypatch):
    def rounded(start, end, count):
        edges = np.linspace(start, end + np.sign(end - start), count, endpoint=False)
        return np.round(edges).astype(int).tolist()

    monkeypatch.setattr(framepack, "_spread", rounded)
    assert {("framepack", "positions"), ("framepack", "rope")} <= failing(golden)


def test_every_step_has_a_ring_of_its_own(golden, monkeypatch):
    slot, visible = KVCache.slot, KVCache.visible
    monkeypatch.setattr(KVCache, "slot", lambda self, step, index: slot(self, 0, index))
    monkeypatch.setattr(KVCache, "visible", lambda self, step, blocks: visible(self, 0, blocks))
    failed = failing(golden)
    assert {("dit_block", "runA.velocity"), ("denoise_loop", "final.no_replacement")} <= failed


def test_the_whole_clip_is_attended(golden, monkeypatch):
    visible = KVCache.visible
    monkeypatch.setattr(
        KVCache,
        "visible",
        lambda self, step, blocks: visible(self, step, min(blocks, self.layout.blocks - 1)),
    )
    assert ("dit_block", "runA.velocity") in failing(golden)


def test_condition_tokens_have_timestep_zero(golden, monkeypatch):
    encode = CausalDiT.encode_time
    monkeypatch.setattr(CausalDiT, "encode_time", lambda self, timestep: encode(self, timestep or 1000.0))
    assert ("dit_block", "prefill.layer0.cond_v") in failing(golden)


def test_kinds_of_tokens_are_video_reference_motion(golden, monkeypatch):
    monkeypatch.setattr(dit_module, "REFERENCE", dit_module.MOTION)
    monkeypatch.setattr(dit_module, "MOTION", 1)
    assert ("dit_block", "prefill.layer0.cond_k") in failing(golden)


def test_pose_encoder_adds_its_bias_without_a_pose(golden, monkeypatch):
    embed = CausalDiT.embed

    def without_bias(self, x, pose=None):
        return embed(self, x, pose) - (self.cond_encoder.bias if pose is None else 0)

    monkeypatch.setattr(CausalDiT, "embed", without_bias)
    failed = failing(golden)
    assert ("denoise_loop", "final.no_replacement") in failed
    assert ("dit_block", "runA.velocity") not in failed


def test_padding_of_the_text_is_attended(golden, monkeypatch):
    def masked(self, text):
        embedded = self.text_embedding(text[None])
        return [block.cross_attn.key_value(embedded) for block in self.blocks]

    monkeypatch.setattr(CausalDiT, "encode_text", masked)
    assert ("dit_block", "runA.velocity") in failing(golden)


def test_a_block_hears_copies_of_its_own_first_frame(golden, monkeypatch):
    encode = CausalDiT.encode_speech

    def after_silence(self, speech):
        silent = torch.cat((torch.zeros_like(speech[:, :, :1]), speech), dim=2)
        whole, local = self.casual_audio_encoder(
            torch.cat((silent[:, :, :1].expand(-1, -1, 72), silent), dim=2)
        )
        return replace(encode(self, speech), whole=whole[19:], local=local[19:])

    monkeypatch.setattr(CausalDiT, "encode_speech", after_silence)
    assert ("dit_block", "runA.velocity") in failing(golden)


def test_audio_convolutions_repeat_the_first_value(golden, monkeypatch):
    def zero_padded(self, x):
        return F.conv1d(
            F.pad(x.transpose(1, 2), (2, 0)), self.conv.weight, self.conv.bias, self.conv.stride
        ).mT

    monkeypatch.setattr(CausalConv1d, "forward", zero_padded)
    assert ("audio_encoder", "local_21") in failing(golden)


def test_epsilon_of_the_adaptive_norm_is_1e_5(dit, monkeypatch):
    """Of the recorded tokens too few have a small variance to tell; these do."""
    norm: AdaptiveNorm = dit.audio_injector.injector_adain_layers[0]
    tokens, whole = 0.01 * torch.randn(3, 24, 64), torch.randn(3, 64)
    shift, scale = (part[:, None] for part in norm.linear(F.silu(whole)).chunk(2, dim=-1))
    expected = F.layer_norm(tokens, (64,), eps=1e-5) * (1 + scale) + shift
    torch.testing.assert_close(norm(tokens, whole), expected, rtol=0, atol=2e-5)
    monkeypatch.setattr(audio, "ADAPTIVE_NORM_EPS", 1e-6)
    assert (norm(tokens, whole) - expected).abs().max() > 1e-3


def test_adaptive_norm_takes_shift_before_scale(golden, monkeypatch):
    def swap(dit):
        for norm in dit.audio_injector.injector_adain_layers:
            for parameter in norm.linear.parameters():
                parameter.copy_(parameter.roll(len(parameter) // 2, dims=0))

    with_weights(monkeypatch, swap)
    assert ("dit_block", "debug.audio_adain0.out") in failing(golden)


@pytest.mark.parametrize("kind", ["query", "key_value"])
def test_queries_and_keys_are_normalised_over_all_heads(golden, monkeypatch, kind):
    def per_head(norm, x):
        heads = x.unflatten(-1, (4, 16))
        return F.rms_norm(heads, (16,), norm.weight.view(4, 16)[0], norm.eps) * (
            norm.weight.view(4, 16) / norm.weight.view(4, 16)[0]
        )

    wrong = {
        "query": lambda self, x: per_head(self.norm_q, self.q(x)),
        "key_value": lambda self, x: (per_head(self.norm_k, self.k(x)), self.v(x).unflatten(-1, (4, 16))),
    }
    monkeypatch.setattr(Attention, kind, wrong[kind])
    assert ("dit_block", "runA.velocity") in failing(golden)


def test_head_is_modulated_by_the_time_embedding_itself(golden, monkeypatch):
    encode = CausalDiT.encode_time

    def projected(self, timestep):
        time = encode(self, timestep)
        return replace(time, embedded=time.projected[0])

    monkeypatch.setattr(CausalDiT, "encode_time", projected)
    assert ("dit_block", "runA.velocity") in failing(golden)


def test_feed_forward_uses_the_tanh_form_of_gelu(golden, monkeypatch):
    def exact(dit):
        for block in dit.blocks:
            block.ffn[1].approximate = "none"

    with_weights(monkeypatch, exact)
    assert ("dit_block", "runA.velocity") in failing(golden)


def test_the_reference_is_replaced_at_the_second_clip(golden, monkeypatch):
    def keep(self, motion=None):
        self.segment.prefill_before = None

    monkeypatch.setattr("model.denoise.Denoiser.prefill", keep)
    failed = failing(golden)
    assert ("denoise_loop", "final.ref_replaced") in failed
    assert ("denoise_loop", "final.no_replacement") not in failed
