"""Whole lessons in one process: what comes out, what is kept, and what a second run does."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from ray_jobs import workers
from ray_jobs.plan import Refused
from ray_jobs.render import render
from tests.conftest import Course

pytestmark = pytest.mark.e2e

CUTS = {"segment_seconds": "4", "cut_search_seconds": "0.97"}
"""Settings under which a lesson of 8 s has two segments."""


def results(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def hashes(out: Path) -> dict[str, str]:
    return {row["lesson_id"]: row["sha256"] for row in results(out)}


def events(out: Path, name: str) -> list[dict[str, Any]]:
    lines = (out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_a_course_becomes_verified_files(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("001", 1.30, x_course="physics")
    course.add("第二课", 0.50)
    out = tmp_path / "out"
    assert render(course.request(weights, out)) == 0
    for row, samples in zip(results(out), (20_800, 8_000), strict=True):
        assert row["status"] == "done"
        with av.open(row["output"]) as file:
            video, sound = file.streams.video[0], file.streams.audio[0]
            assert (video.codec_context.name, video.width, video.height) == ("h264", 64, 64)
            frames = sum(1 for _ in file.decode(video))
            assert frames == -(-samples // 640)
            assert (sound.codec_context.name, sound.rate, sound.channels) == ("aac", 16_000, 1)
    assert [row["x_course"] for row in results(out)] == ["physics", ""]
    table = pq.read_table(out / "results.parquet").to_pylist()
    assert [row["lesson_id"] for row in table] == ["001", "第二课"]
    assert table[0]["frames"] == 33


def test_lessons_that_share_portrait_and_prompt_encode_each_once(
    course: Course, weights: Path, tmp_path: Path
) -> None:
    course.add("a", 0.5)
    course.add("b", 0.5)
    course.add("c", 0.5, prompt="another one")
    assert render(course.request(weights, tmp_path / "out")) == 0
    rows = results(tmp_path / "out")
    assert [(row["prompt_encodings"], row["portrait_encodings"]) for row in rows].count(("1", "1")) == 1
    assert sum(int(row["prompt_encodings"]) for row in rows) == 2
    assert sum(int(row["portrait_encodings"]) for row in rows) == 1


def test_two_fresh_runs_give_equal_files(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("a", 8.2)
    for out in ("one", "two"):
        assert render(course.request(weights, tmp_path / out, settings=CUTS)) == 0
    assert results(tmp_path / "one")[0]["segments"] == "2"
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_another_seed_gives_another_picture(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("a", 0.5, seed=1)
    course.add("b", 0.5, seed=1, base_seed="421")
    assert render(course.request(weights, tmp_path / "out")) == 0
    assert len(set(hashes(tmp_path / "out").values())) == 2


def test_a_finished_manifest_renders_nothing_and_decodes_nothing(
    course: Course, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course.add("a", 0.5)
    assert render(course.request(weights, tmp_path / "out")) == 0
    before = hashes(tmp_path / "out")

    def fail(*_: object) -> None:
        raise AssertionError("a finished lesson was looked at again")

    monkeypatch.setattr(workers.prepare, "check", fail)
    monkeypatch.setattr(workers, "mux", fail)
    assert render(course.request(weights, tmp_path / "out")) == 0
    assert [row["status"] for row in results(tmp_path / "out")] == ["reused"]
    assert hashes(tmp_path / "out") == before


def test_changing_one_row_renders_that_lesson_only(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("a", 0.5)
    course.add("b", 0.5)
    render(course.request(weights, tmp_path / "out"))
    before = hashes(tmp_path / "out")
    course.rows[1]["prompt"] = "another prompt"
    assert render(course.request(weights, tmp_path / "out")) == 0
    assert [row["status"] for row in results(tmp_path / "out")] == ["reused", "done"]
    after = hashes(tmp_path / "out")
    assert after["a"] == before["a"]
    assert after["b"] != before["b"]


def test_appended_sound_renders_only_the_last_segments(course: Course, weights: Path, tmp_path: Path) -> None:
    settings = {**CUTS, "audio_context_seconds": "0.4"}
    course.add("a", 13.0)
    render(course.request(weights, tmp_path / "out", settings=settings))
    assert results(tmp_path / "out")[0]["segments"] == "3"
    course.record(course.folder / "0.wav", 17.0, seed=0)
    assert render(course.request(weights, tmp_path / "out", settings=settings)) == 0
    row = results(tmp_path / "out")[0]
    assert (row["segments"], row["segments_rendered"]) == ("4", "2")
    fresh = course.request(weights, tmp_path / "fresh", settings=settings)
    render(fresh)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_a_lost_output_is_joined_again_from_its_segments(
    course: Course, weights: Path, tmp_path: Path
) -> None:
    course.add("a", 0.5)
    render(course.request(weights, tmp_path / "out"))
    before = hashes(tmp_path / "out")
    (tmp_path / "out" / "a.mp4").unlink()
    assert render(course.request(weights, tmp_path / "out")) == 0
    row = results(tmp_path / "out")[0]
    assert (row["status"], row["segments_rendered"]) == ("done", "0")
    assert hashes(tmp_path / "out") == before


def test_a_truncated_segment_is_rendered_again(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("a", 8.2)
    render(course.request(weights, tmp_path / "out", settings=CUTS))
    before = hashes(tmp_path / "out")
    first, *_ = sorted((tmp_path / "out/.lectern/segments").rglob("video.mov"))
    first.write_bytes(first.read_bytes()[:-10])
    (tmp_path / "out" / "a.mp4").unlink()
    assert render(course.request(weights, tmp_path / "out", settings=CUTS)) == 0
    assert results(tmp_path / "out")[0]["segments_rendered"] == "1"
    assert hashes(tmp_path / "out") == before


def test_a_segment_with_flipped_bits_is_rendered_again(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("a", 0.5)
    render(course.request(weights, tmp_path / "out"))
    before = hashes(tmp_path / "out")
    (segment,) = (tmp_path / "out/.lectern/segments").rglob("video.mov")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    (tmp_path / "out" / "a.mp4").unlink()
    assert render(course.request(weights, tmp_path / "out")) == 0
    assert hashes(tmp_path / "out") == before


def test_good_rows_are_rendered_beside_bad_ones(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("good", 0.5)
    course.add("silent", 0.5)
    (course.folder / "1.wav").write_bytes(b"not a recording")
    course.add("lost", 0.5, image="nowhere.jpg", size="704:384")
    assert render(course.request(weights, tmp_path / "out")) == 3
    rows = results(tmp_path / "out")
    assert [row["status"] for row in rows] == ["done", "invalid", "invalid"]
    assert [row["failure"] for row in rows] == ["", "input", "input"]
    assert "audio=" in rows[1]["reason"]
    assert "size='704:384'" in rows[2]["reason"]


def test_strict_renders_nothing(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("good", 0.5)
    course.add("bad", 0.5, image="nowhere.jpg")
    with pytest.raises(Refused, match="--strict"):
        render(course.request(weights, tmp_path / "out", strict=True))
    assert not (tmp_path / "out" / "good.mp4").exists()


def test_a_failed_lesson_costs_no_other_and_is_tried_again_by_the_next_run(
    course: Course, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course.add("a", 0.5)
    course.add("b", 0.5)
    real = workers.DecodeWorker.decode

    def broken(self: workers.DecodeWorker, job: object, block: int, state: object) -> int:
        if job.lesson_id == "a":  # type: ignore[attr-defined]
            raise ZeroDivisionError("a bug in decode")
        return real(self, job, block, state)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(workers.DecodeWorker, "decode", broken)
        assert render(course.request(weights, tmp_path / "out")) == 3
    failed, done = results(tmp_path / "out")
    assert (failed["status"], failed["failure"], failed["failed_tries"]) == ("failed", "bug", "3")
    assert "a bug in decode" in failed["reason"]
    assert done["status"] == "done"
    assert render(course.request(weights, tmp_path / "out")) == 0
    assert [row["status"] for row in results(tmp_path / "out")] == ["done", "reused"]


def test_max_failures_begins_no_further_lesson(
    course: Course, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        course.add(name, 0.5)
    monkeypatch.setattr(workers.DecodeWorker, "finish", lambda *_: 1 / 0)
    request = course.request(weights, tmp_path / "out", max_failures=1, settings={"max_tries": "1"})
    assert render(request) == 3
    assert sorted(row["status"] for row in results(tmp_path / "out")) == [
        "failed",
        "not_started",
        "not_started",
    ]


def test_only_and_limit_choose_lessons(course: Course, weights: Path, tmp_path: Path) -> None:
    for name in "abc":
        course.add(name, 0.5)
    assert render(course.request(weights, tmp_path / "only", only=("b",))) == 0
    assert [row["status"] for row in results(tmp_path / "only")] == ["not_started", "done", "not_started"]
    assert render(course.request(weights, tmp_path / "limit", limit=1)) == 0
    assert [row["status"] for row in results(tmp_path / "limit")] == ["done", "not_started", "not_started"]
    with pytest.raises(Refused, match="--only x"):
        render(course.request(weights, tmp_path / "none", only=("x",)))


def test_a_run_of_some_lessons_keeps_the_results_of_the_others(
    course: Course, weights: Path, tmp_path: Path
) -> None:
    for name in "abc":
        course.add(name, 0.5, x_part=name)
    assert render(course.request(weights, tmp_path / "out", only=("a", "b"))) == 0
    before = results(tmp_path / "out")
    assert [row["status"] for row in before] == ["done", "done", "not_started"]
    assert render(course.request(weights, tmp_path / "out", only=("c",))) == 0
    after = results(tmp_path / "out")
    assert [row["status"] for row in after] == ["done", "done", "done"]
    assert after[:2] == before[:2]


def test_latents_that_are_not_numbers_are_never_delivered(
    course: Course, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course.add("a", 0.5)
    real = workers.RankWorker.cell

    def overflow(self: workers.RankWorker, block: int, step: int, state: Any) -> Any:
        state = real(self, block, step, state)
        return state and dataclasses.replace(state, x=state.x * float("nan"))

    monkeypatch.setattr(workers.RankWorker, "cell", overflow)
    assert render(course.request(weights, tmp_path / "out", settings={"max_tries": "1"})) == 3
    assert "latents are not all numbers" in results(tmp_path / "out")[0]["reason"]
    assert not list((tmp_path / "out/.lectern/segments").rglob("done.json"))


@pytest.mark.parametrize("record", ["{}", "[]", "not json", '{"delivery": 1, "output": "a.mp4"}'])
def test_a_damaged_record_of_a_delivery_counts_as_none(
    course: Course, weights: Path, tmp_path: Path, record: str
) -> None:
    course.add("a", 0.5)
    render(course.request(weights, tmp_path / "out"))
    (tmp_path / "out/.lectern/lessons/a.json").write_text(record)
    (prepared,) = (tmp_path / "out/.lectern/prepared").iterdir()
    prepared.write_text('{"picture": 1}')
    assert render(course.request(weights, tmp_path / "out")) == 0
    row = results(tmp_path / "out")[0]
    assert (row["status"], row["segments_rendered"]) == ("done", "0")


def test_an_empty_name_of_an_output_folder_is_refused(course: Course, weights: Path) -> None:
    course.add("a", 0.5)
    request = course.request(weights, Path("unused"))
    with pytest.raises(Refused, match="empty"):
        render(dataclasses.replace(request, out=""))


def test_two_folders_share_one_store(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("a", 0.5)
    store = str(tmp_path / "store")
    assert render(course.request(weights, tmp_path / "one", store=store)) == 0
    assert render(course.request(weights, tmp_path / "two", store=store)) == 0
    row = results(tmp_path / "two")[0]
    assert (row["status"], row["segments_rendered"]) == ("done", "0")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_num_clip_shortens_sound_and_video_and_says_so(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("a", 6.0, num_clip="1")
    assert render(course.request(weights, tmp_path / "out")) == 0
    row = results(tmp_path / "out")[0]
    assert float(row["video_seconds"]) < 2
    assert abs(float(row["video_seconds"]) - float(row["sound_seconds"])) <= 0.04
    assert "num_clip" in row["warnings"]


def test_telephone_sound_is_rendered_with_a_warning(course: Course, weights: Path, tmp_path: Path) -> None:
    import soundfile

    course.add("a", 0.5)
    sound, rate = soundfile.read(course.folder / "0.wav")
    soundfile.write(course.folder / "0.wav", sound[::2], rate // 2)
    assert render(course.request(weights, tmp_path / "out")) == 0
    row = results(tmp_path / "out")[0]
    assert "8000 Hz" in row["warnings"]
    with av.open(row["output"]) as file:
        assert file.streams.audio[0].rate == 8000


@pytest.mark.parametrize(
    "settings",
    [
        {"reference": "keep"},
        {"reference": "first_latent_and_motion"},
        {"continuity": "independent"},
        {"sample_guide_scale": "2.0", "negative_prompt": "blurred"},
        {"sample_solver": "unipc"},
        {"lead_frames": "3"},
        {"segment_seconds": "0"},
    ],
    ids=lambda settings: ",".join(settings.values()),
)
def test_every_way_to_generate_goes_the_whole_road(
    course: Course, weights: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    course.add("a", 8.2)
    assert render(course.request(weights, tmp_path / "out", settings={**CUTS, **settings})) == 0
    plain = course.request(weights, tmp_path / "plain", settings=CUTS)
    assert render(plain) == 0
    assert hashes(tmp_path / "out") != hashes(tmp_path / "plain")


def test_a_cut_is_seamless_in_count_and_order(course: Course, weights: Path, tmp_path: Path) -> None:
    """A lesson in segments has the frames of the uncut one up to the first cut, bit for bit."""
    course.add("a", 8.2)
    render(
        course.request(
            weights, tmp_path / "cut", settings={**CUTS, "crf": "1", "audio_context_seconds": "20"}
        )
    )
    render(
        course.request(
            weights,
            tmp_path / "uncut",
            settings={"segment_seconds": "0", "crf": "1", "audio_context_seconds": "20"},
        )
    )
    frames = {}
    for name in ("cut", "uncut"):
        with av.open(tmp_path / name / "a.mp4") as file:
            frames[name] = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)]).astype(int)
    assert frames["cut"].shape == frames["uncut"].shape
    first = events(tmp_path / "cut", "segment_done")[0]["frames"]
    difference = np.abs(frames["cut"] - frames["uncut"]).mean(axis=(1, 2, 3))
    assert difference[:first].max() < 3
    assert difference[first : first + 12].mean() < 6


def test_an_output_folder_that_cannot_be_written_is_refused(
    course: Course, weights: Path, tmp_path: Path
) -> None:
    course.add("a", 0.5)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Refused, match="--out"):
        render(course.request(weights, tmp_path / "file"))


def test_missing_weights_are_refused_before_anything_else(course: Course, tmp_path: Path) -> None:
    course.add("a", 0.5)
    with pytest.raises(Refused, match="ckpt_dir"):
        render(course.request(tmp_path / "no-weights", tmp_path / "out"))


def test_a_cluster_that_is_not_there_is_refused(course: Course, weights: Path, tmp_path: Path) -> None:
    course.add("a", 0.5)
    with pytest.raises(Refused, match=r"--address 127\.0\.0\.1:1"):
        render(course.request(weights, tmp_path / "out", "127.0.0.1:1"))
    assert events(tmp_path / "out", "run_ended")[-1]["exit_code"] == 2
