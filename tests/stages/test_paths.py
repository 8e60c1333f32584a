import io
import os
from pathlib import Path

import pytest

from stages import paths
from stages.types import RowError


def test_relative_paths_are_relative_to_the_manifest_not_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "course").mkdir()
    monkeypatch.chdir(tmp_path)
    assert paths.resolve("media/a.wav", "course/lessons.csv") == str(tmp_path / "course" / "media" / "a.wav")


def test_an_absolute_path_is_not_glued_to_any_folder(tmp_path):
    assert paths.resolve("/data/a.wav", str(tmp_path / "lessons.csv")) == "/data/a.wav"
    assert paths.resolve("/data/a.wav", "s3://bucket/lessons.csv") == "/data/a.wav"


def test_uris_stay_and_a_manifest_in_a_bucket_has_its_files_there():
    assert paths.resolve("s3://other/a.wav", "/data/lessons.csv") == "s3://other/a.wav"
    assert paths.resolve("media/a b.wav", "s3://bucket/c/lessons.csv") == "s3://bucket/c/media/a b.wav"


def test_options_of_the_manifests_uri_hold_for_its_files():
    manifest = "s3://bucket/c/lessons.csv?endpoint_override=http://host/"
    assert paths.resolve("a.wav", manifest) == "s3://bucket/c/a.wav?endpoint_override=http://host/"


def test_uri_with_spaces_chinese_and_signs_is_opened_literally(tmp_path):
    file = tmp_path / "第 1 课 #2 100%.wav"
    file.write_bytes(b"sound")
    with paths.open_binary(f"file://{file}") as opened:
        assert opened.read() == b"sound"
        assert opened.seek(1, io.SEEK_SET) == 1


def test_missing_file_is_a_row_error(tmp_path):
    for path in (str(tmp_path / "no.wav"), f"file://{tmp_path}/no.wav"):
        with pytest.raises(RowError, match="no such file"):
            paths.open_input("audio", path)


def test_empty_file_is_a_row_error(tmp_path):
    Path(tmp_path / "empty.png").touch()
    with pytest.raises(RowError, match="empty file") as caught:
        paths.open_input("image", str(tmp_path / "empty.png"))
    assert caught.value.field == "image"


def test_folder_instead_of_a_file_is_a_row_error(tmp_path):
    for path in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(RowError, match="is a folder"):
            paths.open_input("audio", path)


def test_name_that_no_file_can_have_is_a_row_error(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for path in ("A teacher speaks. " * 50, "a\0b", f"{tmp_path}/file/a.wav"):
        with pytest.raises(RowError, match="cannot be opened"):
            paths.open_input("audio", path)


def test_unknown_kind_of_uri_is_a_row_error():
    with pytest.raises(RowError, match="cannot be opened"):
        paths.open_input("audio", "gopher://host/a.wav")


def test_a_pipe_or_device_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", "/dev/zero"):
        with pytest.raises(RowError, match="not a regular file"):
            paths.open_input("audio", str(path))


def test_file_uris_are_unescaped(tmp_path):
    path = tmp_path / "课 1.wav"
    path.write_bytes(b"sound")
    with paths.open_input("audio", path.as_uri()) as file:
        assert file.read() == b"sound"
