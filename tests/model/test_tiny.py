from dataclasses import fields
from pathlib import Path

import conf
import pytest
import torch
from conf.schema import ModelSettings
from model import checkpoint, tiny
from model.files import locate
from omegaconf import OmegaConf

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


def test_shipped_settings_describe_what_is_written():
    path = Path(conf.__file__).parent / "model" / "tiny.yaml"
    known = {field.name for field in fields(ModelSettings)}
    values = {name: value for name, value in OmegaConf.load(path).items() if name in known}
    shipped = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelSettings), values))
    assert shipped == tiny.settings(Path("build/tiny"))


def test_published_model_settings_are_complete():
    path = Path(conf.__file__).parent / "model" / "liveavatar-14b.yaml"
    values = OmegaConf.load(path)
    del values["size"]
    shipped = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelSettings), values))
    assert shipped.lora_alpha / shipped.lora_rank == 0.5
    assert (shipped.ckpt_dir, shipped.dtype, shipped.device) == ("Wan-AI/Wan2.2-S2V-14B", "bfloat16", "cuda")


def test_folder_with_something_in_it_is_not_written_over(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
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
