"""Rows become lessons, or problems that name row, lesson, field, value and rule."""

from __future__ import annotations

import pytest

from ray_jobs.lessons import Course, output_name, read_rows
from ray_jobs.settings import Layer, resolve
from stages.types import Row

EFFECTIVE = resolve([Layer("test", {"ckpt_dir": "weights"})])
GOOD = {"lesson_id": "001", "image": "a.jpg", "audio": "a.wav", "prompt": "a teacher"}


def read(*rows: dict[str, str], **fill: str) -> Course:
    return read_rows([Row(n, r) for n, r in enumerate(rows, 1)], "/course/lessons.csv", EFFECTIVE, fill, [])


def test_a_good_row_is_a_lesson_with_paths_relative_to_the_manifest() -> None:
    course = read({**GOOD, "x_teacher": "Ada"})
    (lesson,) = course.lessons
    assert not course.problems
    assert (lesson.lesson_id, lesson.image, lesson.audio) == ("001", "/course/a.jpg", "/course/a.wav")
    assert lesson.extras == {"x_teacher": "Ada"}


def test_an_absolute_path_is_not_glued_to_the_working_directory() -> None:
    """Upstream joins every path to where it was started."""
    (lesson,) = read({**GOOD, "audio": "/media/a.wav"}).lessons
    assert lesson.audio == "/media/a.wav"


def test_the_command_line_fills_empty_fields_and_a_row_wins() -> None:
    bare = {"lesson_id": "1", "audio": "a.wav"}
    course = read(bare, {**GOOD, "prompt": "its own"}, image="/b.jpg", prompt="shared")
    assert [lesson.prompt for lesson in course.lessons] == ["shared", "its own"]
    assert [lesson.image for lesson in course.lessons] == ["/b.jpg", "/course/a.jpg"]


def test_all_problems_of_a_row_are_reported_together() -> None:
    course = read({"lesson_id": "a", "size": "704:384", "colour": "red"})
    assert {problem.field for problem in course.problems} == {"image", "audio", "prompt", "size", "colour"}
    assert all(problem.row == 1 and problem.lesson_id == "a" for problem in course.problems)


@pytest.mark.parametrize(
    "lesson_id",
    [
        "../up",
        "a/b",
        "/root",
        "..",
        ".hidden",
        "a\\b",
        "C:x",
        " a",
        "a.",
        "a\x7f",
        "a\u202eb",
        "a\0",
        "x" * 300,
    ],
)
def test_ids_that_would_escape_the_output_folder(lesson_id: str) -> None:
    course = read({**GOOD, "lesson_id": lesson_id})
    assert not course.lessons
    assert {problem.field for problem in course.problems} >= {"lesson_id"}


@pytest.mark.parametrize("lesson_id", ["第一课", "001", "Übung 3", "a.b-c_d", "レッスン"])
def test_ids_in_any_script(lesson_id: str) -> None:
    (lesson,) = read({**GOOD, "lesson_id": lesson_id}).lessons
    assert output_name(lesson) == f"{lesson_id}.mp4"


def test_duplicate_ids_name_the_other_row_and_cost_no_third() -> None:
    course = read(GOOD, GOOD, {**GOOD, "lesson_id": "002"})
    assert [lesson.lesson_id for lesson in course.lessons] == ["002"]
    assert [(problem.row, "row 2" in problem.rule) for problem in course.problems] == [(1, True), (2, False)]


def test_ids_that_differ_in_case_only_would_be_one_file_on_some_disks() -> None:
    assert len(read({**GOOD, "lesson_id": "A"}, {**GOOD, "lesson_id": "a"}).problems) == 2


def test_two_lessons_with_the_same_output_name() -> None:
    effective = resolve([Layer("test", {"ckpt_dir": "w", "output_name": "{x_title}.mp4"})])
    rows = [Row(n, {**GOOD, "lesson_id": str(n), "x_title": "same"}) for n in (1, 2)]
    course = read_rows(rows, "m.csv", effective, {}, [])
    assert [problem.field for problem in course.problems] == ["output_name", "output_name"]


@pytest.mark.parametrize(
    "pattern",
    [
        "{x_missing}.mp4",
        "{lesson_id}/x.mp4",
        "{lesson_id}.mov",
        "{0}.mp4",
        "{lesson_id",
        "{x_a.b}.mp4",
        "{x_a[0]}.mp4",
        "{lesson_id!r}.mp4",
        "{lesson_id:>99999999}.mp4",
    ],
)
def test_output_names_that_cannot_be(pattern: str) -> None:
    course = read({**GOOD, "output_name": pattern})
    assert [problem.field for problem in course.problems] == ["output_name"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "704:384"),
        ("size", "0*0"),
        ("size", "99999*99999"),
        ("infer_frames", "50"),
        ("infer_frames", "many"),
        ("sample_solver", "heun"),
        ("crf", "77"),
        ("reference", "none"),
        ("sample_steps", "0"),
        ("sample_guide_scale", "1000.0"),
        ("crop", "???"),
    ],
)
def test_values_that_are_not_allowed(field: str, value: str) -> None:
    course = read({**GOOD, field: value})
    (problem,) = course.problems
    assert (problem.field, problem.value) == (field, value)


def test_a_setting_of_the_run_in_a_row() -> None:
    (problem,) = read({**GOOD, "num_groups": "4"}).problems
    assert problem.field == "num_groups"
    assert "whole run" in problem.rule


def test_an_upstream_flag_as_a_column_is_explained() -> None:
    (problem,) = read({**GOOD, "ulysses_size": "4"}).problems
    assert "Live Avatar" in problem.rule


@pytest.mark.parametrize("value", ["${oc.env:HOME}{lesson_id}.mp4", "${x}", "???"])
def test_a_manifest_cannot_read_the_environment(value: str) -> None:
    """OmegaConf would put the value of a variable into the name of a file, or of a message."""
    course = read({**GOOD, "output_name": value})
    assert not course.lessons
    (problem,) = course.problems
    assert (problem.field, problem.value) == ("output_name", value)


def test_a_row_cannot_lift_the_limit_against_bombs() -> None:
    (problem,) = read({**GOOD, "max_image_pixels": "999999999999"}).problems
    assert "whole run" in problem.rule


def test_a_column_in_other_letters_is_recognised() -> None:
    row = {"Lesson_ID": "1", "image": "a", "audio": "b", "prompt": "c"}
    assert any("did you mean lesson_id" in problem.rule for problem in read(row).problems)


def test_whole_numbers_as_tables_with_gaps_write_them() -> None:
    (lesson,) = read({**GOOD, "num_clip": "2.0"}).lessons
    assert lesson.settings.num_clip == 2


def test_ids_that_are_spelt_alike_on_some_disks() -> None:
    composed, decomposed = "\u00dcbung", "U\u0308bung"
    assert len(read({**GOOD, "lesson_id": composed}, {**GOOD, "lesson_id": decomposed}).problems) == 2
