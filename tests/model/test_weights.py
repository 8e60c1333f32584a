import json
import os
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import DryRunFileInfo
from safetensors.torch import load_file

from model import checkpoint, files, tensors, weights
from model.checkpoint import CheckpointError
from tests.model import small

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def with_lora(tmp_path):
    m = small.checkpoint(tmp_path)
    return small.with_lora(m, small.lora_state(m))


class FakeHub:
    """Answers for `snapshot_download`: two files, one of which is here already."""

    def __init__(self) -> None:
        self.size = 1000
        self.fetched: list[tuple[str, Path | None]] = []

    def snapshot_download(self, id, *, local_dir=None, ignore_patterns=None, dry_run=False):
        if id.startswith("nobody/"):
            raise huggingface_hub.errors.DryRunError("the repository cannot be accessed")
        if dry_run:
            return [
                self._file("config.json", 10, here=True),
                self._file("a.safetensors", self.size, here=False),
            ]
        self.fetched.append((id, local_dir))
        return str(local_dir or "cache")

    def _file(self, name, size, here):
        return DryRunFileInfo(
            commit_hash="0",
            file_size=size,
            filename=name,
            local_path=name,
            is_cached=here,
            will_download=not here,
        )


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_pull_names_files_and_bytes_before_it_fetches(hub, tmp_path):
    lines = []

    def report(line):
        assert not hub.fetched
        lines.append(line)

    folders = weights.pull(["Wan-AI/Wan2.2-S2V-14B", "some/lora"], tmp_path, dry_run=False, report=report)
    assert lines[0].split() == ["1,000", "bytes", "Wan-AI/Wan2.2-S2V-14B/a.safetensors"]
    assert "config.json" not in "".join(lines)
    assert lines[-1].lstrip().startswith("2,000 bytes to fetch")
    assert folders == [tmp_path / "Wan2.2-S2V-14B", tmp_path / "lora"]
    assert [id for id, _ in hub.fetched] == ["Wan-AI/Wan2.2-S2V-14B", "some/lora"]


def test_dry_run_fetches_nothing(hub, tmp_path):
    assert weights.pull(["some/lora"], tmp_path / "new" / "folder", dry_run=True, report=lambda _: None) == []
    assert not hub.fetched
    assert not (tmp_path / "new").exists()


def test_pull_refuses_a_disk_that_is_too_small(hub, tmp_path):
    hub.size = 10**18
    with pytest.raises(CheckpointError, match="1,000,000,000,000,000,000 bytes are needed"):
        weights.pull(["some/lora"], tmp_path, dry_run=False, report=lambda _: None)
    assert not hub.fetched


def test_hub_that_does_not_answer_is_named(hub, tmp_path):
    with pytest.raises(CheckpointError, match="nobody/x: the Hub gave no list of files: the repository"):
        weights.pull(["nobody/x"], tmp_path, dry_run=True, report=lambda _: None)


def test_hub_id_is_found_in_the_local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="lectern weights pull"):
        files.resolve("Quark-Vision/Live-Avatar", "lora_path_dmd")
    repository = tmp_path / "models--Quark-Vision--Live-Avatar"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    assert files.resolve("Quark-Vision/Live-Avatar", "lora_path_dmd") == snapshot


def test_merged_checkpoint_loads_the_same_weights_without_the_lora(with_lora, tmp_path):
    out = tmp_path / "merged"
    weights.merge(with_lora, out)
    alone = replace(with_lora, ckpt_dir=str(out), lora_path_dmd=None)
    checkpoint.check(alone)
    expected, merged = (checkpoint.load_dit(m).state_dict() for m in (with_lora, alone))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    for load in (checkpoint.load_vae, checkpoint.load_text_encoder, checkpoint.load_speech_encoder):
        load(alone)


def test_merged_checkpoint_has_the_same_layout_and_says_what_it_was_merged_from(with_lora, tmp_path):
    out, base = tmp_path / "merged", Path(with_lora.ckpt_dir)
    weights.merge(with_lora, out)
    names = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == names
    for path in files.locate(replace(with_lora, ckpt_dir=str(out))).transformer:
        origin = json.loads(tensors.metadata(path)["merged_from"])
        assert origin["base"] == checkpoint.fingerprint(replace(with_lora, lora_path_dmd=None))
        assert origin["lora"] == files.sha256(Path(with_lora.lora_path_dmd))
        assert (origin["lora_alpha"], origin["lora_rank"]) == (small.ALPHA, small.RANK)


def test_merged_checkpoint_with_a_lora_again_is_an_error(with_lora, tmp_path):
    weights.merge(with_lora, tmp_path / "merged")
    twice = replace(with_lora, ckpt_dir=str(tmp_path / "merged"))
    with pytest.raises(CheckpointError, match="merged already"):
        checkpoint.check(twice)
    with pytest.raises(CheckpointError, match="merged already"):
        checkpoint.load_dit(twice)


def test_merge_keeps_the_files_dtype(with_lora, tmp_path):
    for path in files.locate(with_lora).transformer:
        small.edit(path, lambda state: state.update({k: v.bfloat16() for k, v in state.items()}))
    weights.merge(with_lora, tmp_path / "merged")
    for path in files.locate(replace(with_lora, ckpt_dir=str(tmp_path / "merged"))).transformer:
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}


def test_merge_without_a_lora_is_an_error(with_lora, tmp_path):
    with pytest.raises(CheckpointError, match="lora_path_dmd is empty"):
        weights.merge(replace(with_lora, lora_path_dmd=None), tmp_path / "merged")


def test_merge_into_a_folder_with_something_in_it_is_refused(with_lora, tmp_path):
    with pytest.raises(CheckpointError, match="not empty"):
        weights.merge(with_lora, Path(with_lora.ckpt_dir))


def test_merge_that_fails_leaves_no_folder(with_lora, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        weights.merge(with_lora, tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_merge_refuses_a_disk_that_is_too_small(with_lora, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_free_bytes", lambda _: 10)
    with pytest.raises(CheckpointError, match="and 10 are free"):
        weights.merge(with_lora, tmp_path / "merged")
