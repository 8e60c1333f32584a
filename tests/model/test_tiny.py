from pathlib import Path

import pytest
import torch
import yaml

import conf
from conf.schema import ModelSettings
from conf.spec import TextEncoderSpec, VaeSpec
from model import checkpoint, tiny
from model.files import CheckpointError, locate

torch.set_num_threads(1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_seed_writes_the_same_bytes(tmp_path):
    tiny.write(tmp_path / "a", seed=3)
    torch.manual_seed(99)
    tiny.write(tmp_path / "b", seed=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_seed_writes_other_weights(tmp_path):
    tiny.write(tmp_path / "a")
    tiny.write(tmp_path / "b", seed=1)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a.keys() == b.keys()
    assert {name for name in a if a[name] != b[name]} == {
        name for name in a if name.endswith((".pth", ".safetensors"))
    }


def test_layout_is_the_published_one(tmp_path):
    tiny.write(tmp_path / "a")
    names = contents(tmp_path / "a").keys()
    assert {
        "config.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/tokenizer.json",
        "google/umt5-xxl/tokenizer_config.json",
        "wav2vec2-large-xlsr-53-english/config.json",
        "wav2vec2-large-xlsr-53-english/preprocessor_config.json",
        "wav2vec2-large-xlsr-53-english/model.safetensors",
    } <= names
    assert len(locate(tiny.settings(tmp_path / "a")).transformer) > 1
    checkpoint.check(tiny.settings(tmp_path / "a"))


def shipped(model: str) -> ModelSettings:
    values = yaml.safe_load((Path(conf.__file__).parent / "model" / f"{model}.yaml").read_text())
    assert values.pop("size")
    return ModelSettings(
        **values
        | {
            "vae": VaeSpec(**values.get("vae", {})),
            "text_encoder": TextEncoderSpec(**values.get("text_encoder", {})),
        }
    )


def test_shipped_settings_describe_what_is_written():
    assert shipped("tiny") == tiny.settings(Path("build/tiny"))


def test_published_model_has_the_published_scale_and_dtypes():
    m = shipped("liveavatar-14b")
    assert m.lora_alpha / m.lora_rank == 0.5
    assert (m.ckpt_dir, m.dtype, m.vae_dtype) == ("Wan-AI/Wan2.2-S2V-14B", "bfloat16", "bfloat16")
    assert (m.vae, m.text_encoder) == (VaeSpec(), TextEncoderSpec())


def test_folder_with_something_in_it_is_not_written_over(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        tiny.write(tmp_path)


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "_write_speech_encoder", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_pictures_differ_from_place_to_place_and_from_frame_to_frame(tmp_path):
    tiny.write(tmp_path / "a")
    vae = checkpoint.load_vae(tiny.settings(tmp_path / "a"))
    pixels = vae.stream().push(torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert pixels.std(dim=(2, 3)).min() > 0.05
    assert (pixels[:, 1:] - pixels[:, :-1]).abs().mean() > 0.05
    assert (pixels.abs() == 1).float().mean() < 0.5
