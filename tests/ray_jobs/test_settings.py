"""One configuration from many layers: default < model < preset < file < command line < row."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from conf.schema import Settings
from ray_jobs.settings import CONF, Layer, SettingsError, from_file, named, override, resolve

WEIGHTS = Layer("command line", {"ckpt_dir": "weights"})


def test_later_layers_win_and_origins_are_known(tmp_path: Path) -> None:
    file = tmp_path / "night.yaml"
    file.write_text("sample_steps: 5\ncrf: 20\n")
    effective = resolve([named("preset", "preview"), from_file(file), Layer("command line", {"crf": "21"})])
    assert effective.settings.num_clip == 10
    assert effective.settings.sample_steps == 5
    assert effective.settings.crf == 21
    assert effective.origins["num_clip"] == "preset preview"
    assert effective.origins["sample_steps"] == str(file)
    assert effective.origins["crf"] == "command line"
    assert effective.origins["device"] == "model tiny"
    assert effective.origins["threads"] == "default"


def test_the_model_may_be_named_by_any_layer() -> None:
    effective = resolve([Layer("command line", {"model": "liveavatar-14b"})])
    assert (effective.settings.device, effective.settings.dtype) == ("cuda", "bfloat16")


@pytest.mark.parametrize("preset", ["preview", "standard", "long"])
def test_presets_have_the_values_of_the_design(preset: str) -> None:
    settings = resolve([named("preset", preset), WEIGHTS]).settings
    assert settings.size == {"preview": "384*256"}.get(preset, "688*368")
    assert settings.sample_steps == {"preview": 3}.get(preset, 4)
    assert settings.sample_solver == "euler"


def test_a_row_wins_over_all() -> None:
    base = resolve([Layer("command line", {"crf": "21"})]).settings
    assert override(base, {"crf": "30", "num_clip": "2"}, "row 1").crf == 30
    assert override(base, {"num_clip": ""}, "row 1").num_clip is None


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"sampel_steps": "4"}, "did you mean sample_steps"),
        ({"sample_steps": "four"}, "sample_steps=four"),
        ({"enable_vae_parallel": "true"}, "Live Avatar"),
        ({"size": "704:384"}, "size=704:384"),
        ({"model": "nope"}, "there are: "),
        ({"vae": {"nope": 1}}, "vae"),
        ({"vae.nope": 1}, "vae"),
        ({"size": "${oc.env:HOME}"}, "plain value"),
        ({"vae": {"file": "${oc.env:HOME}"}}, r"vae\.file"),
        ({"text_encoder": {"device": "tpu"}}, r"text_encoder\.device=tpu"),
        ({"attention_backend": "flash"}, "device=cuda"),
    ],
)
def test_settings_that_cannot_be(layer: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        resolve([Layer("command line", layer)])


def test_a_config_file_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        from_file(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2\n")
    with pytest.raises(SettingsError, match="YAML"):
        from_file(broken)
    listed = tmp_path / "list.yaml"
    listed.write_text("- 1\n")
    with pytest.raises(SettingsError, match="key: value"):
        from_file(listed)


def test_every_field_has_a_paragraph() -> None:
    import ast

    tree = ast.parse((CONF / "schema.py").read_text())
    described = set()
    for group in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        for field, text in zip(group.body, group.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                assert len(text.value.value.split()) >= 5  # type: ignore[attr-defined]
                described.add(field.target.id)
    assert described == {f.name for f in dataclasses.fields(Settings)}


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve([WEIGHTS]).settings.crf = 1  # type: ignore[misc]


def test_parts_of_a_group_can_be_given_alone() -> None:
    effective = resolve([WEIGHTS, Layer("command line", {"text_encoder.device": "cuda"})])
    assert effective.settings.text_encoder.device == "cuda"
    assert effective.settings.text_encoder.dim == 32, "the model's own values stay"
    assert effective.origins["text_encoder"] == "command line"
