"""The transformer's recorded sets, and that the comparison itself can fail."""

import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import golden as golden_sets
from model.golden import dit as sets


def copy_of(golden, folder):
    for path in golden.glob("d*_*"):
        shutil.copy(path, folder)
    for path in [*golden.glob("audio_encoder.*"), *golden.glob("framepack.*")]:
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("name", ["dit_block", "denoise_loop", "audio_encoder", "framepack"])
def test_recorded_set_is_reproduced(golden, name):
    checks = [check for check in sets.checks(golden) if check.set == name]
    assert checks
    assert [check for check in checks if not check.passed] == []


def test_every_recorded_result_of_the_transformer_is_compared(golden):
    compared = {(check.set, check.quantity) for check in sets.checks(golden)}
    arguments = {"sigmas", "timesteps", "relative_dist_sequence", "runA.x_in", "prefill.rope_cos_sin"}
    not_upstream = {"runA.block_final_exact_rope"}
    for name in ("dit_block", "denoise_loop"):
        recorded = {q for q in load_file(golden / f"{name}.safetensors") if not q.startswith("input.")}
        assert {(name, quantity) for quantity in recorded - arguments - not_upstream} <= compared


def test_sets_without_any_file_are_left_out_and_named(golden, tmp_path):
    folder = copy_of(golden, tmp_path)
    for path in folder.glob("framepack.*"):
        path.unlink()
    assert {check.set for check in sets.checks(folder)} == {"dit_block", "denoise_loop", "audio_encoder"}
    assert "framepack" in golden_sets.absent(folder)
    assert "dit_block" not in golden_sets.absent(folder)


@pytest.mark.parametrize("file", ["framepack.safetensors", "framepack.json"])
def test_set_of_which_a_file_is_missing_fails_by_name_and_alone(golden, tmp_path, file):
    folder = copy_of(golden, tmp_path)
    (folder / file).unlink()
    outcomes = dict(golden_sets.run(folder))
    assert list(outcomes) == ["dit_block", "denoise_loop", "audio_encoder", "framepack"]
    error = outcomes.pop("framepack")
    assert isinstance(error, FileNotFoundError)
    assert str(error) == f"missing {file}"
    assert all(isinstance(checks, list) and checks for checks in outcomes.values())


@pytest.mark.parametrize("file", ["dit_weights.safetensors", "dit_config.json"])
def test_missing_model_is_named_by_every_set_that_needs_it(golden, tmp_path, file):
    folder = copy_of(golden, tmp_path)
    (folder / file).unlink()
    for outcome in dict(golden_sets.run(folder)).values():
        assert file in str(outcome)


@pytest.mark.parametrize(
    ("words", "reference"),
    [
        (False, "keep"),
        ("before clip 1, ref = first latent frame, motion unchanged", "first_latent"),
        ("as ref_replaced", "first_latent"),
        ("before clip 1, motion = input.motion_latents_clip1", "first_latent_and_motion"),
        ("as ref_and_motion_replaced", "first_latent_and_motion"),
    ],
)
def test_second_prefill_is_read_from_its_description(words, reference):
    assert sets._reference(words) == reference


def test_wrong_noise_levels_fail(golden, tmp_path):
    folder = copy_of(golden, tmp_path)
    recorded = load_file(folder / "denoise_loop.safetensors")
    recorded["sigmas"][1] += 1e-5
    save_file(recorded, folder / "denoise_loop.safetensors")
    failed = {(check.set, check.quantity) for check in sets.checks(folder) if not check.passed}
    assert failed == {("denoise_loop", "sigmas")}


def test_a_folder_without_any_set_gives_no_checks(tmp_path):
    assert sets.checks(tmp_path) == []
    assert golden_sets.absent(tmp_path) == list(golden_sets.SETS)


def test_a_truncated_file_is_an_error_and_not_a_pass(golden, tmp_path):
    folder = copy_of(golden, tmp_path)
    path = folder / "dit_block.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SafetensorError):
        sets.checks(folder)


def test_one_wrong_weight_fails(golden, tmp_path):
    folder = copy_of(golden, tmp_path)
    weights = load_file(folder / "dit_weights.safetensors")
    weights["blocks.3.self_attn.v.bias"][5] += 0.01
    save_file(weights, folder / "dit_weights.safetensors")
    failed = {check.set for check in sets.checks(folder) if not check.passed}
    assert failed == {"dit_block", "denoise_loop"}


def test_nan_is_not_within_any_tolerance():
    check = golden_sets.compare("s", "q", torch.tensor([0.0, torch.nan]), torch.zeros(2), 1.0)
    assert not check.passed


def test_a_result_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"s q: \[3\], recorded \[2\]"):
        golden_sets.compare("s", "q", torch.zeros(3), torch.zeros(2), 1.0)
