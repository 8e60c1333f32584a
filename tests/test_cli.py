"""The command line as a user types it: exit codes, and errors that say what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs.cli import main
from tests.conftest import EXAMPLES, Course
from tests.test_render_local import results

TINY = "size=64*64"


def test_render_from_the_command_line(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("001", 0.5)
    del course.rows[0]["image"], course.rows[0]["prompt"]
    out = tmp_path / "out"
    arguments = ["render", str(course.manifest), "--out", str(out), "--local", TINY, f"ckpt_dir={weights}"]
    image = (
        EXAMPLES.relative_to(Path.cwd()) / "astronaut.jpg"
        if EXAMPLES.is_relative_to(Path.cwd())
        else EXAMPLES
    )
    assert main([*arguments, f"image={image}", "prompt=a calm teacher"]) == 0
    assert [row["status"] for row in results(out)] == ["done"]


def test_plan_shows_sizes_segments_and_what_is_done(
    course: Course, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    course.add("001", 0.5)
    course.add("002", 0.5, size="704:384")
    arguments = [str(course.manifest), TINY, f"ckpt_dir={weights}", "--out", str(tmp_path / "out")]
    assert main(["plan", *arguments]) == 3
    told = capsys.readouterr().out
    assert "64x64" in told
    assert "size='704:384'" in told
    assert "(13 frames) are not in the store yet" in " ".join(told.split())
    assert main(["render", *arguments, "--local"]) == 3
    assert main(["plan", *arguments]) == 3
    assert "(0 frames) are not in the store yet" in " ".join(capsys.readouterr().out.split())


def test_plan_loads_no_model(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("001", 0.5)
    code = (
        "import sys; from ray_jobs.cli import main; "
        f"main(['plan', {str(course.manifest)!r}, 'ckpt_dir={weights}']); "
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_plan_works_before_there_are_weights(
    course: Course, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    course.add("001", 0.5)
    assert main(["plan", str(course.manifest), f"ckpt_dir={tmp_path / 'none'}", TINY]) == 0
    told = capsys.readouterr().out
    assert "there are no weights" in told
    assert "64x64" in told


def test_init_writes_a_manifest_that_render_takes(
    course: Course, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course.add("a", 0.5)
    course.add("b", 0.5)
    manifest = tmp_path / "lessons.csv"
    image = EXAMPLES / "astronaut.jpg"
    init = ["init", str(course.folder), "--manifest", str(manifest), f"image={image}", "prompt=a teacher"]
    assert main(init) == 0
    assert main(init) == 2, "an existing manifest is not overwritten"
    monkeypatch.chdir("/")
    assert main(["plan", str(manifest), TINY, f"ckpt_dir={weights}"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ulysses_size", "4"], "--ulysses_size of Live Avatar"),
        (["--sample-steps", "4"], "write sample_steps=... without dashes"),
        (["sampel_steps=4"], "did you mean sample_steps"),
        (["sample_steps"], "key=value"),
        (["crf=18", "crf=19"], "given twice"),
        (["lesson_id=1"], "every row has its own"),
        (["--preset", "fast"], "there are: long, preview, standard"),
        (["size=704:384"], "size=704:384"),
        (["--only", "nobody"], "no lesson of that id"),
        (["model=nope"], "no such model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_start_exits_with_2_and_a_reason(
    course: Course, weights: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    course.add("001", 0.5)
    assert main(["plan", str(course.manifest), f"ckpt_dir={weights}", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_manifest_that_is_not_there(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.csv"
    assert (
        main(["render", str(missing), "--out", str(tmp_path / "out"), "--local", f"ckpt_dir={weights}"]) == 2
    )
    assert "no such file" in capsys.readouterr().err


def test_status_of_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "no run has been started here" in capsys.readouterr().err


def test_weights_tiny_writes_what_render_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "tiny", str(tmp_path / "tiny")]) == 0
    assert (tmp_path / "tiny/config.json").is_file()
    assert main(["weights", "tiny", str(tmp_path / "tiny")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_weights_merge_without_a_lora(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "merge", str(tmp_path / "merged"), f"ckpt_dir={weights}"]) == 2
    assert "lora_path_dmd" in capsys.readouterr().err


def test_the_light_commands_import_no_torch() -> None:
    """`lectern status` and a run that finds all done answer at once."""
    code = (
        "import sys, ray_jobs.cli, ray_jobs.render; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_limit_must_be_a_number_above_0(course: Course, capsys: pytest.CaptureFixture[str]) -> None:
    course.add("001", 0.5)
    with pytest.raises(SystemExit):
        main(["plan", str(course.manifest), "--limit", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_sigterm_while_rows_are_checked_ends_with_130(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("001", 0.5)
    code = (
        "import os, signal, sys, ray_jobs.workers as workers; from ray_jobs.cli import main; "
        "workers.prepare.check = lambda *_: os.kill(os.getpid(), signal.SIGTERM); "
        f"sys.exit(main(['render', {str(course.manifest)!r}, '--out', {str(tmp_path / 'out')!r}, '--local', "
        f"'{TINY}', 'ckpt_dir={weights}']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 130, ended.stderr
    last = (tmp_path / "out/events.jsonl").read_text().splitlines()[-1]
    assert '"exit_code": 130' in last
