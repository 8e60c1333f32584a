from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from model import checkpoint, lora
from model.checkpoint import CheckpointError
from tests.model import small

torch.set_num_threads(1)
SPELLINGS = [
    "base_model.model.{}.lora_{}.default.weight",
    "base_model.model.{}.lora_{}.weight",
    "{}.lora_{}.default.weight",
    "{}.lora_{}.weight",
]


@pytest.fixture
def m(tmp_path):
    return small.checkpoint(tmp_path)


def problems(m, state) -> tuple[str, ...]:
    m = small.with_lora(m, state)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check(m)
    with pytest.raises(CheckpointError):
        checkpoint.load_dit(m)
    path = f"{m.lora_path_dmd}: "
    assert all(problem.startswith(path) for problem in caught.value.problems)
    return tuple(problem.removeprefix(path) for problem in caught.value.problems)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_names_is_merged(m, spelling):
    base = checkpoint.load_dit(m).state_dict()
    state = small.lora_state(m, spelling)
    with_lora = small.with_lora(m, state)
    checkpoint.check(with_lora)
    merged = checkpoint.load_dit(with_lora).state_dict()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if small.TARGET.fullmatch(name)}
    assert len(changed) == 6 * 10 + 3 * 4
    a, b = (state[spelling.format("blocks.2.ffn.0", side)] for side in "AB")
    expected = base["blocks.2.ffn.0.weight"] + small.ALPHA / small.RANK * b @ a
    assert torch.allclose(merged["blocks.2.ffn.0.weight"], expected, atol=1e-6)


def test_merge_is_computed_in_float32_and_rounded_once():
    weight = torch.randn(8, 8).bfloat16()
    a, b = torch.randn(4, 8).bfloat16(), torch.randn(8, 4).bfloat16()
    expected = weight.double() + 0.5 * b.double() @ a.double()
    assert torch.allclose(lora.merged(weight, (a, b), 0.5).double(), expected, atol=1e-6)


def test_wrong_rank_is_named(m):
    m = replace(small.with_lora(m, small.lora_state(m)), lora_rank=128)
    with pytest.raises(CheckpointError, match=r"144 misshapen: .* \[4, 64\] instead of \[128, 64\]"):
        checkpoint.check(m)


def test_half_a_pair_is_named(m):
    state = small.lora_state(m)
    del state["base_model.model.blocks.1.cross_attn.v.lora_B.default.weight"]
    assert problems(m, state) == (
        "1 without its other half: base_model.model.blocks.1.cross_attn.v.lora_A.default.weight",
    )


def test_lost_pair_is_named(m):
    state = {name: t for name, t in small.lora_state(m).items() if "injector.2.k" not in name}
    assert problems(m, state) == ("1 without a pair: audio_injector.injector.2.k.weight",)


def test_kind_of_layer_that_is_not_adapted_at_all_is_fine(m):
    state = {name: t for name, t in small.lora_state(m).items() if "injector" not in name}
    checkpoint.check(small.with_lora(m, state))


def test_pair_for_a_layer_that_the_model_lacks_is_named(m):
    state = small.lora_state(m)
    for side in "AB":
        like = state[f"base_model.model.blocks.0.self_attn.q.lora_{side}.default.weight"]
        state[f"base_model.model.blocks.40.self_attn.q.lora_{side}.default.weight"] = like.clone()
    assert problems(m, state) == ("1 for a weight that the model lacks: blocks.40.self_attn.q.weight",)


def test_tensor_that_is_no_lora_is_named(m):
    state = small.lora_state(m) | {"blocks.0.self_attn.q.diff_b": torch.ones(64)}
    assert problems(m, state) == ("1 not of a LoRA: blocks.0.self_attn.q.diff_b",)


def test_lora_of_which_nothing_matches_is_an_error(m):
    state = small.lora_state(m, "transformer.{}.lora_{}.weight")
    assert problems(m, state)[-1] == "none of its 144 tensors belongs to the model"


def test_empty_lora_is_an_error(m):
    assert problems(m, {}) == ("none of its 0 tensors belongs to the model",)


def test_misshapen_lora_is_named(m):
    state = small.lora_state(m)
    state["base_model.model.blocks.0.ffn.2.lora_A.default.weight"] = torch.ones(4, 64)
    (problem,) = problems(m, state)
    assert problem.endswith("blocks.0.ffn.2.lora_A.default.weight [4, 64] instead of [4, 128]")


def test_lora_of_a_vector_is_an_error(m):
    state = small.lora_state(m)
    state |= {f"blocks.0.norm3.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    assert "norm3.lora_A.weight for a weight of [64]" in problems(m, state)[0]


def test_folder_gives_its_one_lora(m, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(small.lora_state(m), folder / "any.safetensors")
    m = replace(m, lora_path_dmd=str(folder), lora_alpha=small.ALPHA, lora_rank=small.RANK)
    checkpoint.check(m)
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"any\.safetensors, other\.safetensors"):
        checkpoint.check(m)
    (folder / "any.safetensors").rename(folder / "liveavatar.safetensors")
    checkpoint.check(m)


def test_lora_that_is_not_there_is_an_error(m):
    with pytest.raises(CheckpointError, match="lora_path_dmd='no/lora'"):
        checkpoint.check(replace(m, lora_path_dmd="no/lora"))


def test_tensor_under_two_spellings_is_named(m):
    state = small.lora_state(m)
    state["blocks.0.self_attn.q.lora_A.weight"] = torch.ones(4, 64)
    (problem,) = problems(m, state)
    assert problem.startswith("1 not of a LoRA: ")
