"""The example course is small, sound, and what `make demo` and its README promise of it."""

from pathlib import Path

import pytest

from conf.schema import Settings
from stages import manifest, portrait, sound

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    found, problems = manifest.read(str(EXAMPLES / "lessons.csv"))
    assert problems == []
    return [row.values for row in found]


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir()) < 400_000


def test_three_lessons_of_which_two_share_portrait_and_prompt(rows):
    assert [row["lesson_id"] for row in rows] == ["001", "002", "003"]
    assert len({(row["image"], row["prompt"]) for row in rows}) == 2


def test_every_file_is_named_in_the_readme_with_its_source(rows):
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    media = {row[column] for row in rows for column in ("image", "audio")}
    assert media == {path.name for path in EXAMPLES.iterdir()} - {"README.md", "lessons.csv"}
    assert [name for name in media if f"`{name}`" not in readme] == []


def test_every_portrait_has_a_face_and_needs_no_warning(rows):
    for name in {row["image"] for row in rows}:
        _, warnings = portrait.prepare(str(EXAMPLES / name), Settings(size="384*256"))
        assert warnings == []


def test_recordings_differ_in_rate_and_channels_and_last_a_few_seconds(rows):
    recordings = [sound.read(str(EXAMPLES / row["audio"])) for row in rows]
    assert [(r.rate, r.channels) for r in recordings] == [(16_000, 1), (44_100, 2), (48_000, 2)]
    assert all(3 < r.seconds < 6 for r in recordings)
