"""The benchmarks at tiny dimensions: that they run, and that they print and write what they should."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import model as bench_model
from bench.components import Components
from bench.denoise import SETTINGS, denoise, random_conditions, random_dit, run_block
from bench.dimensions import TINY
from bench.measure import Product, Spread
from bench.report import Report
from bench.sections import check
from model.denoise import Denoiser
from model.golden import Check

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = ["--device=cpu", "--dtype=float32", "--size=64*64", "--dim=128", "--layers=1", "--text-len=16"]
PARTS = ["projections", "self_attention", "text", "ffn", "injection"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_block_is_timed_by_component(tmp_path, capsys):
    bench_model.main([*SMALL, "--repeats=2", "--out", str(tmp_path / "result.json")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    times = result["denoise"]
    for name in PARTS:
        assert f"  {name}" in printed
        assert times["components"][name]["tflops"] > 0
    assert sum(part["share"] for part in times["components"].values()) == pytest.approx(1, abs=0.3)
    assert times["components"]["rest"]["seconds"]["min"] > 0
    assert times["block"]["min"] <= times["block"]["median"] <= times["block"]["max"]
    assert times["block"]["samples"] == 2
    assert times["fps"] == pytest.approx(12 / times["block"]["median"])
    assert times["same_bits"] is True
    assert times["predicted_bytes"] == pytest.approx(times["measured_bytes"], rel=0.1)
    assert "of the matrix product before each block" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dim", "100"], "dim=100: must be a multiple of 128"),
        (["--size", "64x"], "size='64x': must be WIDTH.HEIGHT in multiples of 16"),
        (["--size", "72*64"], "size='72.64': must be WIDTH.HEIGHT in multiples of 16"),
    ],
)
def test_dimensions_that_cannot_be_are_refused(change, message):
    with pytest.raises(SystemExit, match=message):
        bench_model.main([*SMALL, *change])


def test_components_leave_the_denoiser_as_it_was():
    denoiser = Denoiser(random_dit(TINY, CPU, torch.float32), SETTINGS, 8, 8, "sdpa")
    denoiser.open(random_conditions(TINY, 8, 8, 3), 0, 3)
    attend = denoiser.attend
    with Components(denoiser, compiled=False) as clock:
        run_block(denoiser, 0)
    once = clock.seconds()
    assert set(once) == {*PARTS, "embeddings"}
    run_block(denoiser, 1)
    assert clock.seconds() == once
    assert denoiser.attend is attend


def test_as_many_rounds_are_timed_as_the_budget_allows():
    dit, product = random_dit(TINY, CPU, torch.float32), Product(CPU, torch.float32, 8, 8, 8)
    assert denoise(dit, SETTINGS, 8, 8, product, 3, 60, compiled=False).block.samples == 3
    assert denoise(dit, SETTINGS, 8, 8, product, 3, 0, compiled=False).block.samples == 1


def test_gpu_script_runs_every_section(tmp_path):
    """As a script of its own, the way it runs on a bare machine."""
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--tiny"]
    command += ["--golden", "tests/golden", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all sections done"
    results = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))
    assert not [name for name, result in results.items() if "error" in result]
    eager, compiled, decode = (results[f"{name} 64*64"] for name in ("eager", "compiled", "decode"))
    assert eager["same_bits"]
    assert compiled["same_bits"]
    assert eager["measured_bytes"] == pytest.approx(eager["predicted_bytes"], rel=0.1)
    assert eager["share_of_product"]["min"] > 0
    assert set(eager["components"]) == {*PARTS, "embeddings", "rest"}
    whole = {"project", "finish"}
    assert set(compiled["components"]) == whole | {"self_attention", "injection", "embeddings", "rest"}
    held = decode["predicted"]["stream"] + decode["predicted"]["decode"]
    assert decode["measured_bytes"] == pytest.approx(held, rel=0.1)
    assert decode["fps"] > 0
    assert {each["set"] for each in results["golden transformer"]["checks"]} >= {"dit_block", "denoise_loop"}
    assert results["matrix products"]["flops"]["64x64x64"] > 0
    assert results["build"]["measured_bytes"] == results["build"]["predicted_bytes"]


def test_a_failed_section_is_written_down_and_the_next_one_runs(tmp_path, capsys):
    report = Report(tmp_path, time.monotonic() + 60)

    def fail() -> dict:
        raise ValueError("no such thing")

    report.section("first", 10, fail)
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["first"]["error"] == "ValueError: no such thing"
    report.section("second", 10, lambda: {"fps": 1.0})
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["second"]["fps"] == 1.0
    assert report.failed == ["first"]


def test_a_section_that_takes_too_long_is_stopped(tmp_path, capsys):
    report = Report(tmp_path, time.monotonic() + 60)

    def sleep() -> dict:
        time.sleep(30)
        return {}

    start = time.monotonic()
    report.section("endless", 0.2, sleep)
    assert time.monotonic() - start < 10
    assert "TimeoutError: longer than" in report.results["endless"]["error"]


def test_no_section_begins_after_the_end(tmp_path, capsys):
    report = Report(tmp_path, time.monotonic() - 1)
    report.section("late", 10, lambda: pytest.fail("it began"))
    assert report.results["late"]["error"] == "TimeoutError: no time is left"


def test_a_golden_difference_out_of_tolerance_fails_the_section(capsys):
    fine, wrong = Check("vae", "latents", 1e-6, 1e-5), Check("vae", "pixels", 2e-5, 1e-5)
    assert check(lambda: [fine])["checks"][0]["set"] == "vae"
    with pytest.raises(AssertionError, match=r"vae pixels: 2.00e-05"):
        check(lambda: [fine, wrong])
    with pytest.raises(AssertionError, match="no golden set"):
        check(list)


def test_spread_says_how_noisy_it_was():
    spread = Spread.of([2.0, 1.0, 4.0])
    assert (spread.median, spread.min, spread.max, spread.samples) == (2.0, 1.0, 4.0, 3)
    assert spread.noise == 1.5
