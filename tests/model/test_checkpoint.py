import json
import multiprocessing
import os
import pickle
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import nn

from conf.spec import VaeSpec
from model import checkpoint, files, tensors, tiny, vae
from model.checkpoint import CheckpointError, check
from tests.model import small

torch.set_num_threads(1)
LOADERS = (
    checkpoint.load_dit,
    checkpoint.load_vae,
    checkpoint.load_text_encoder,
    checkpoint.load_speech_encoder,
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def m(tmp_path):
    return small.checkpoint(tmp_path)


def problems(m) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        check(m)
    return caught.value.problems


def root(m) -> Path:
    return Path(m.ckpt_dir)


# Loading what is right.


def test_every_part_holds_the_files_values_in_the_dtype_asked_for(m):
    check(m)
    dit = checkpoint.load_dit(replace(m, dtype="bfloat16"))
    shard = small.shard_with(m, "blocks.5.ffn.2.weight")
    stored = load_file(shard)["blocks.5.ffn.2.weight"]
    assert torch.equal(dit.state_dict()["blocks.5.ffn.2.weight"], stored.bfloat16())
    assert {p.dtype for p in dit.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in checkpoint.load_vae(m).model.parameters()} == {torch.float32}
    for load in LOADERS:
        loaded: Any = load(m)
        module: nn.Module = getattr(loaded, "model", loaded)
        assert not any(p.is_meta or p.requires_grad for p in module.parameters())
        assert not any(b.is_meta for b in module.buffers())


def test_single_file_without_an_index_loads_the_same(m):
    whole = checkpoint.load_dit(m).state_dict()
    paths = files.locate(m)
    state = {name: tensor for path in paths.transformer for name, tensor in load_file(path).items()}
    for path in root(m).glob(f"{Path(files.TRANSFORMER).stem}*"):
        path.unlink()
    save_file(state, root(m) / files.TRANSFORMER)
    check(m)
    assert all(
        torch.equal(tensor, whole[name]) for name, tensor in checkpoint.load_dit(m).state_dict().items()
    )


def test_progress_ends_at_all_bytes(m):
    for load in LOADERS:
        calls: list[tuple[int, int]] = []
        load(m, lambda *call, calls=calls: calls.append(call))  # type: ignore[misc]
        done, totals = zip(*calls, strict=True)
        assert list(done) == sorted(done)
        assert len(set(totals)) == 1
        assert done[-1] == totals[0]


def test_diffusers_folder_is_loaded_by_its_own_config(m):
    torch.manual_seed(0)
    module = AutoencoderKLWan(
        base_dim=2,
        num_res_blocks=1,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.5] * 16,
    )
    module.save_pretrained(root(m) / "vae")
    m = replace(m, vae=VaeSpec(file="vae"))
    check(m)
    loaded = checkpoint.load_vae(m)
    assert loaded.mean_C.unique().tolist() == [0.5]
    assert loaded.spatial_compression == 16
    pixels = torch.rand(3, 1, 32, 32)
    assert torch.equal(loaded.encode(pixels), vae.Vae(module).encode(pixels))
    small.edit(root(m) / "vae" / files.TRANSFORMER, lambda state: state.pop("quant_conv.bias"))
    assert problems(m)[0].endswith("1 missing: quant_conv.bias")


def test_speech_encoder_as_a_torch_pickle_loads_the_same(m):
    before = checkpoint.load_speech_encoder(m).model.state_dict()
    folder = root(m) / m.audio_encoder
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    check(m)
    after = checkpoint.load_speech_encoder(m).model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_loading_does_not_hold_the_weights_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "TRANSFORMER", tiny.TRANSFORMER | {"dim": 512, "ffn_dim": 2048})
    m = small.checkpoint(tmp_path)
    size = sum(path.stat().st_size for path in files.locate(m).transformer)
    assert size > 50e6
    held, process = [], psutil.Process()
    before = process.memory_info().rss - process.memory_info().shared

    def watch(done: int, total: int) -> None:
        held.append(process.memory_info().rss - process.memory_info().shared - before)

    dit = checkpoint.load_dit(replace(m, dtype="bfloat16"), watch)
    assert max(held) < 0.75 * size
    assert sum(p.nbytes for p in dit.parameters()) < 0.51 * size


def test_three_processes_read_the_weights_from_disk_once(tmp_path, monkeypatch):
    """Bytes are counted by the kernel, in `read_bytes` of /proc/self/io: what really came from the disk."""
    monkeypatch.setattr(tiny, "TRANSFORMER", tiny.TRANSFORMER | {"dim": 512, "ffn_dim": 2048})
    m = small.checkpoint(tmp_path)
    paths = files.locate(m).transformer
    size = sum(path.stat().st_size for path in paths)
    forget(paths)
    if not Path("/proc/self/io").exists() or bytes_read(paths[0].read_bytes) == 0:
        pytest.skip("this file system does not count what is read from it")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["model.checkpoint"])
    together, counts = context.Barrier(4), context.Queue()
    processes = [context.Process(target=count_one_load, args=(m, together, counts)) for _ in range(3)]
    for process in processes:
        process.start()
    forget(paths)
    together.wait(timeout=120)
    read = sum(counts.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=30)
    assert 0.9 * size < read <= 1.05 * size


def count_one_load(m, together, counts) -> None:
    together.wait(timeout=120)
    counts.put(bytes_read(lambda: [p.sum().item() for p in checkpoint.load_dit(m).parameters()]))


def forget(paths) -> None:
    """Drops files from the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read(action) -> int:
    def counter() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))

    before = counter()
    action()
    return counter() - before


# What is wrong is named.


def test_missing_files_are_all_named_at_once(m):
    shard = files.locate(m).transformer[1]
    for path in (shard, root(m) / "google/umt5-xxl/tokenizer.json", root(m) / m.vae.file):
        path.unlink()
    text = "\n".join(problems(m))
    assert "tokenizer.json: missing" in text
    assert f"{shard.name}: missing" in text
    assert "Wan2.1_VAE.pth: missing" in text
    assert "unexpected" not in text


def test_renamed_tensor_is_named_as_unexpected_and_missing(m):
    name = "blocks.3.self_attn.q.weight"
    shard = small.shard_with(m, name)
    small.edit(shard, lambda state: state.update({"blocks.3.self_attn.query.weight": state.pop(name)}))
    unexpected, missing = problems(m)
    assert unexpected == f"{shard}: 1 unexpected: blocks.3.self_attn.query.weight"
    assert missing.endswith(f"1 missing: {name}")
    with pytest.raises(CheckpointError, match="unexpected"):
        checkpoint.load_dit(m)


def test_missing_tensors_are_named(m):
    shard = small.shard_with(m, "head.head.bias")
    small.edit(shard, lambda state: (state.pop("head.head.bias"), state.pop("head.head.weight")))
    assert "2 missing: head.head." in problems(m)[0]


def test_surplus_tensor_is_named(m):
    path = root(m) / m.text_encoder.file
    small.edit(path, lambda state: state.update({"blocks.9.norm1.weight": torch.ones(32)}))
    assert problems(m) == (f"{path}: 1 unexpected: blocks.9.norm1.weight",)


def test_misshapen_tensor_is_named_with_both_shapes(m):
    path = root(m) / m.vae.file
    small.edit(path, lambda state: state.update({"conv1.bias": torch.ones(31)}))
    assert problems(m) == (f"{path}: 1 misshapen: conv1.bias [31] instead of [32]",)


def test_tensor_in_two_shards_is_named(m):
    first, second = files.locate(m).transformer[:2]
    name = next(iter(load_file(first)))
    small.edit(second, lambda state: state.update({name: load_file(first)[name]}))
    assert problems(m) == (f"{second}: 1 in an earlier file too: {name}",)


def test_long_lists_of_tensors_are_cut(m):
    path = root(m) / m.audio_encoder / "model.safetensors"
    small.edit(path, lambda state: [state.pop(name) for name in list(state) if "attention" in name])
    assert problems(m)[0].startswith(f"{path}: 32 missing: ")
    assert problems(m)[0].endswith("and 24 more")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model-00002-of-00005.safetensors", "Wan2.1_VAE.pth"])
def test_truncated_file_is_named_and_its_tensors_are_not_called_missing(m, name):
    path = root(m) / name
    path.write_bytes(path.read_bytes()[:-1000])
    (problem,) = problems(m)
    assert problem.startswith(f"{path}: truncated or not a tensor file")
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.load_dit(m) if name.startswith("diffusion") else checkpoint.load_vae(m)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model-00002-of-00005.safetensors", "Wan2.1_VAE.pth"])
def test_empty_file_is_named(m, name):
    path = root(m) / name
    path.write_bytes(b"")
    assert problems(m)[0].startswith(f"{path}: truncated or not a tensor file: ")


def test_git_lfs_pointer_instead_of_the_weights_is_told_apart(m):
    path = files.locate(m).transformer[0]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "Git LFS pointer" in problems(m)[0]


def test_pickle_that_runs_code_is_refused(m, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"conv1.bias": Trap()}, root(m) / m.vae.file, pickle_module=pickle)
    assert "not a tensor file" in problems(m)[0]
    assert not (tmp_path / "ran").exists()


def test_pickle_that_holds_no_tensors_is_refused(m):
    torch.save({"state_dict": {"conv1.bias": torch.ones(3)}}, root(m) / m.vae.file)
    assert "not a dictionary of tensors" in problems(m)[0]


def test_everything_wrong_is_said_at_once(m):
    (root(m) / m.text_encoder.file).unlink()
    small.edit(root(m) / m.vae.file, lambda state: state.pop("conv1.bias"))
    small.edit(small.shard_with(m, "head.head.bias"), lambda state: state.pop("head.head.bias"))
    text = "\n".join(problems(m))
    assert "models_t5_umt5-xxl-enc-bf16.pth: missing" in text
    assert "missing: conv1.bias" in text
    assert "missing: head.head.bias" in text


def test_text_to_video_checkpoint_is_called_what_it_is(m):
    config = json.loads((root(m) / "config.json").read_text())
    config |= {"model_type": "t2v", "_class_name": "WanModel"}
    (root(m) / "config.json").write_text(json.dumps(config))
    assert "looks like Wan's 't2v' model" in problems(m)[0]
    with pytest.raises(CheckpointError, match="model_type='t2v'"):
        checkpoint.load_dit(m)


def test_diffusers_pipeline_folder_is_called_what_it_is(m):
    shutil.rmtree(root(m))
    root(m).mkdir()
    (root(m) / "model_index.json").write_text("{}")
    found = problems(m)
    assert "looks like a diffusers pipeline" in found[0]
    assert f"{root(m) / 'config.json'}: missing" in found


def test_speech_encoder_given_as_checkpoint_is_called_what_it_is(m):
    m = replace(m, ckpt_dir=str(root(m) / m.audio_encoder))
    assert "looks like a transformers model (Wav2Vec2ForCTC)" in problems(m)[0]


def test_lora_folder_given_as_checkpoint_is_called_what_it_is(m):
    (root(m) / "config.json").rename(root(m) / "adapter_config.json")
    assert "looks like a LoRA" in problems(m)[0]


def test_folder_that_is_not_there_names_the_way_to_get_it(m):
    with pytest.raises(CheckpointError, match=r"ckpt_dir='no/such'.*lectern weights pull"):
        check(replace(m, ckpt_dir="no/such"))


def test_file_given_as_checkpoint_folder_is_refused(m):
    with pytest.raises(CheckpointError, match="the folder that holds"):
        check(replace(m, ckpt_dir=str(root(m) / "config.json")))


def test_config_that_is_not_json_is_named(m):
    (root(m) / "config.json").write_text("{")
    assert any("config.json" in problem and "JSON" in problem for problem in problems(m))


def test_index_without_a_weight_map_is_named(m):
    (root(m) / f"{files.TRANSFORMER}.index.json").write_text("{}")
    assert "no weight_map" in problems(m)[0]


def test_parts_that_disagree_are_named(m):
    config = json.loads((root(m) / "config.json").read_text())
    (root(m) / "config.json").write_text(json.dumps(config | {"num_wav2vec_layers": 25, "text_dim": 48}))
    text = "\n".join(problems(m))
    assert "text_dim=48, but text_encoder.dim is 32" in text
    assert "num_wav2vec_layers=25, but the speech encoder's number of states is 5" in text


def test_tokenizer_that_cannot_be_read_is_named(m):
    path = root(m) / "google/umt5-xxl/tokenizer.json"
    path.write_text(path.read_text()[:-100])
    assert problems(m)[0].startswith(f"{path}: ")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        checkpoint.load_text_encoder(m)


def test_tokenizer_with_more_tokens_than_embeddings_is_named(m):
    path = root(m) / "google/umt5-xxl/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] += [[f"x{i}", -9.0] for i in range(200)]
    path.write_text(json.dumps(content))
    assert "tokens; text_encoder.vocab_size=512 are known" in problems(m)[0]


# Identity.


def test_fingerprint_stays_when_the_folder_moves_and_changes_with_one_value(m, tmp_path):
    before = checkpoint.fingerprint(m)
    moved = replace(m, ckpt_dir=str(shutil.copytree(root(m), tmp_path / "elsewhere")))
    assert checkpoint.fingerprint(moved) == before
    small.edit(Path(moved.ckpt_dir) / m.vae.file, lambda state: state["conv1.bias"].add_(1e-3))
    assert checkpoint.fingerprint(moved) != before


def test_fingerprint_depends_on_lora_scale_and_specs(m):
    lora = small.with_lora(m, small.lora_state(m))
    variants = [m, lora, replace(lora, lora_alpha=1.0), replace(m, vae=replace(m.vae, base_dim=3))]
    assert len({checkpoint.fingerprint(variant) for variant in variants}) == 4


def test_files_are_hashed_once(m, monkeypatch):
    before = checkpoint.fingerprint(m)
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert checkpoint.fingerprint(m) == before


def test_changed_file_of_the_same_size_is_hashed_again(m):
    path = files.locate(m).transformer[0]
    before = checkpoint.fingerprint(m)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert checkpoint.fingerprint(m) != before


def test_home_that_cannot_be_written_only_costs_time(m, monkeypatch, tmp_path):
    (tmp_path / "home").write_text("a file")
    assert checkpoint.fingerprint(m) == checkpoint.fingerprint(m)


def test_hashes_of_the_hub_cache_are_taken_from_its_names(tmp_path, monkeypatch):
    digest = "ab" * 32
    blob = tmp_path / "blobs" / digest
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert files.sha256(tmp_path / "model.safetensors") == digest


def test_fingerprint_of_an_incomplete_checkpoint_is_refused(m):
    (root(m) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        checkpoint.fingerprint(m)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "t2v"}'])
def test_fingerprint_of_an_unusable_config_is_refused(m, text):
    path = Path(m.ckpt_dir) / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        files.fingerprint(m)


def test_second_fingerprint_is_cheap(m):
    checkpoint.fingerprint(m)
    began = time.perf_counter()
    checkpoint.fingerprint(m)
    assert time.perf_counter() - began < 0.2


def test_shapes_come_without_reading_data(m):
    path = root(m) / m.vae.file
    assert tensors.shapes(path)["conv1.bias"] == (32,)
    assert tensors.metadata(path) == {}
