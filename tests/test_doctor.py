"""What `lectern doctor` says of a machine, and that it fails when something that is needed is not there."""

import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from ray_jobs import doctor
from ray_jobs.doctor import FAIL, NONE, OK, WARNING, Finding

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Check:
    """As `model.golden.Check`."""

    set: str
    quantity: str
    difference: float
    tolerance: float
    passed: bool


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A stand-in for `model.golden` with the given outcome per set; call it with them and get a folder."""

    def install(**sets: list[Check] | Exception) -> Path:
        import model

        module = ModuleType("model.golden")
        module.run = lambda folder: sets.items()  # type: ignore[attr-defined]
        module.absent = lambda folder: ["lora"]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "model.golden", module)
        monkeypatch.setattr(model, "golden", module, raising=False)
        return tmp_path

    return install


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


def nvidia_smi(folder: Path, script: str) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_this_machine_passes_and_says_so_last(capsys, tmp_path):
    assert doctor.run(tmp_path / "not" / "yet", None) == 0
    assert re.match(r"pass\b", last_line(capsys))


def test_any_failure_is_named_last_and_gives_a_non_zero_exit(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "machine", lambda out: [Finding("disk", "full", FAIL, "Make room.")])
    assert doctor.run(tmp_path, None) != 0
    assert last_line(capsys).startswith("FAIL: disk")


def test_warnings_alone_do_not_fail(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "machine", lambda out: [Finding("disk", "small", WARNING, "Make room.")])
    assert doctor.run(tmp_path, None) == 0
    assert last_line(capsys).startswith("pass; warning: disk")


def test_full_disk(tmp_path):
    assert doctor.disk("disk", tmp_path / "new", wanted=2**80, needed=2**79).verdict == FAIL
    assert doctor.disk("disk", tmp_path / "new", wanted=2**80, needed=1).verdict == WARNING
    assert doctor.disk("disk", tmp_path / "new", wanted=1, needed=1).verdict == OK


def test_unwritable_output(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    finding = doctor.disk("disk", tmp_path / "new", wanted=1, needed=1)
    assert finding.verdict == FAIL
    assert str(tmp_path) in finding.advice


def test_small_shared_memory_is_a_warning(monkeypatch, tmp_path):
    usage = SimpleNamespace(free=64_000_000, total=64_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert doctor.shared_memory(tmp_path).verdict == WARNING
    assert doctor.shared_memory(tmp_path / "absent").verdict == NONE


def test_too_old_python():
    assert doctor.python("3.10.14", ">=3.11").verdict == FAIL
    assert doctor.python("3.12.1", ">=3.11").verdict == OK


def test_package_missing_or_too_old():
    found = doctor.packages(["numpy>=99", "no-such-package>=1", "pytest>=1", "unused>=1; extra == 'dev'"])
    assert [(f.what, f.verdict) for f in found] == [("numpy", FAIL), ("no-such-package", FAIL)]
    assert "no-such-package>=1" in found[1].advice


def test_packages_that_fit_take_one_row():
    assert [f.verdict for f in doctor.packages(["pytest>=1", "numpy>=1"])] == [OK]


def test_library_that_does_not_load_names_its_system_package():
    (found,) = doctor.libraries({"no_such_module": "libnone1"})
    assert found.verdict == FAIL
    assert "libnone1" in found.advice


def test_missing_encoder():
    assert doctor.encoders("libx264", "aac").verdict == OK
    missing = doctor.encoders("aac", "no_such_encoder")
    assert missing.verdict == FAIL
    assert "no_such_encoder" in missing.found


def test_missing_face_detector(monkeypatch):
    assert doctor.face_detector().verdict == OK
    monkeypatch.setattr("stages.faces._weights", lambda: "no-such.onnx")
    assert doctor.face_detector().verdict == FAIL


def test_package_that_is_not_installed_at_all(monkeypatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    assert [f.verdict for f in doctor.software()] == [FAIL]


def test_no_gpu_is_fine(tmp_path):
    assert [f.verdict for f in doctor.gpus("no-such-nvidia-smi", tmp_path / "no-driver")] == [NONE]


def test_driver_without_nvidia_smi_leaves_the_answer_to_torch(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (found,) = doctor.gpus("no-such-nvidia-smi", tmp_path)
    assert found.verdict == WARNING


def test_torch_lists_the_gpus_that_it_sees(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: card)
    found = doctor.torch_cuda()
    assert found.verdict == OK
    assert found.found.count("NVIDIA H200 140.0 GiB") == 2


@pytest.mark.parametrize(
    ("line", "verdict", "memory"),
    [
        ("NVIDIA H200, 580.10, 143771, 143000", OK, "of 140.4 GiB free"),
        ("NVIDIA H200, 580.10, 143771, 900", WARNING, "0.9 of 140.4 GiB free"),
        ("NVIDIA GB10, 580.10, [N/A], [N/A]", OK, "shares the host's memory"),
    ],
)
def test_gpu_is_shown_with_driver_and_memory(monkeypatch, tmp_path, line, verdict, memory):
    monkeypatch.setattr(doctor, "torch_cuda", lambda: Finding("torch on the GPU", "sees 1", OK))
    gpu, _ = doctor.gpus(nvidia_smi(tmp_path, f"echo '{line}'"))
    assert gpu.verdict == verdict
    assert "driver 580.10" in gpu.found
    assert memory in gpu.found


def test_broken_driver_is_a_warning(tmp_path):
    (found,) = doctor.gpus(nvidia_smi(tmp_path, "exit 9"))
    assert found.verdict == WARNING


def test_golden_set_out_of_tolerance_fails(capsys, golden, tmp_path):
    folder = golden(
        vae=[Check("vae", "pixels", 1e-6, 2e-5, True)],
        dit_block=[
            Check("dit_block", "velocity", 3e-6, 2e-5, True),
            Check("dit_block", "ring keys", 1e-3, 2e-5, False),
        ],
    )
    assert doctor.run(tmp_path, folder) != 0
    out = capsys.readouterr().out
    assert "1.00e-03 of 2.00e-05 in ring keys" in " ".join(out.replace("│", " ").split())
    assert out.strip().splitlines()[-1].startswith("FAIL: dit_block")


def test_golden_row_shows_what_uses_most_of_its_tolerance(golden):
    checks = [Check("vae", "latents", 1e-4, 1e-2, True), Check("vae", "pixels", 1e-5, 2e-5, True)]
    folder = golden(vae=checks)
    vae, lora = doctor.golden_sets(folder)
    assert vae.verdict == OK
    assert "pixels" in vae.found
    assert (lora.what, lora.verdict) == ("lora", NONE)


def test_golden_difference_that_is_not_a_number_fails(golden):
    checks = [Check("vae", "pixels", math.nan, 2e-5, False), Check("vae", "latents", 0.0, 0.0, True)]
    found, _ = doctor.golden_sets(golden(vae=checks))
    assert found.verdict == FAIL
    assert "pixels" in found.found


def test_golden_set_that_cannot_be_compared_fails_alone(golden, capsys, tmp_path):
    checks = [Check("lora", "weight", 1e-7, 1e-6, True)]
    folder = golden(vae=ValueError("shapes differ"), text_encoder=[], lora=checks)
    found = {finding.what: finding for finding in doctor.golden_sets(folder)}
    assert (found["vae"].verdict, found["vae"].found) == (FAIL, "ValueError: shapes differ")
    assert found["text_encoder"].verdict == FAIL
    assert doctor.run(tmp_path, folder) != 0
    assert last_line(capsys).startswith("FAIL: vae, text_encoder")


def test_golden_folder_with_a_missing_file(capsys, tmp_path):
    """The real sets: one is complete, of another the weights are there and the results are not."""
    for name in ("text_encoder.json", "text_encoder.safetensors", "text_encoder_weights.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path)
    assert doctor.run(tmp_path, tmp_path) == 0
    out = capsys.readouterr().out
    assert re.search(r"text_encoder .* pass ", out)
    assert re.match(r"pass\b", out.strip().splitlines()[-1])
    for name in ("vae.json", "vae_weights.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path)
    assert doctor.run(tmp_path, tmp_path) == 1
    out = capsys.readouterr().out
    assert re.search(r"text_encoder .* pass ", out)
    assert re.search(r"vae .* FAIL ", out)
    assert "vae.safetensors" in out
    assert out.strip().splitlines()[-1].startswith("FAIL: vae")


def test_golden_folder_that_is_missing_or_empty_fails(golden, tmp_path):
    assert [f.verdict for f in doctor.golden_sets(tmp_path / "absent")] == [FAIL]
    assert [f.verdict for f in doctor.golden_sets(golden())] == [FAIL]
