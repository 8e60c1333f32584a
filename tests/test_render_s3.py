"""Manifest, inputs, store and finished files on an object store."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import pytest

from ray_jobs.cli import main
from ray_jobs.folder import Folder, join
from tests.conftest import EXAMPLES, Course

pytestmark = pytest.mark.e2e


def render(manifest: str, out: str, weights: Path) -> int:
    return main(["render", manifest, "--out", out, "--local", "size=64*64", f"ckpt_dir={weights}"])


def test_a_course_on_s3_is_rendered_to_s3(
    course: Course, weights: Path, s3_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    course.add("第一课", 0.5, image="astronaut.jpg")
    source = Folder(join(s3_uri, "course"))
    for path in (course.manifest, course.folder / "0.wav", EXAMPLES / "astronaut.jpg"):
        source.write(path.name, path.read_bytes())
    manifest, out = join(s3_uri, "course/lessons.csv"), join(s3_uri, "out")
    assert render(manifest, out, weights) == 0
    finished = Folder(out)
    with av.open(io.BytesIO(finished.read("第一课.mp4")), "r") as file:
        assert sum(1 for _ in file.decode(video=0)) == 13
    assert finished.names(".lectern/lessons") == [".lectern/lessons/第一课.json"]
    events = [json.loads(line) for line in finished.read("events.jsonl").splitlines()]
    assert events[-1]["exit_code"] == 0
    assert render(manifest, out, weights) == 0
    assert b"reused" in finished.read("results.csv")
    assert main(["status", out]) == 0
    told = capsys.readouterr()
    assert "1 reused" in told.out
    assert "endpoint_override" not in finished.read("results.csv").decode() + told.out


def test_a_bucket_that_is_not_there_is_refused(
    course: Course, weights: Path, s3_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    course.add("a", 0.5)
    missing = s3_uri.replace("s3://courses/", "s3://nobodys/").replace("&allow_bucket_creation=true", "")
    assert render(str(course.manifest), missing, weights) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "name", "joined"),
    [
        ("out", "a.mp4", "out/a.mp4"),
        ("/out/", ".lectern", "/out/.lectern"),
        ("s3://bucket/out?region=eu", "a.mp4", "s3://bucket/out/a.mp4?region=eu"),
        ("/what?/out", "a.mp4", "/what?/out/a.mp4"),
    ],
)
def test_options_of_a_uri_stay_behind_the_path(uri: str, name: str, joined: str) -> None:
    assert join(uri, name) == joined
