"""Generated documentation is current, links lead somewhere, and the table of upstream's flags is sound."""

import dataclasses
import re
import runpy
import tomllib
from pathlib import Path

import pytest

from conf.schema import Settings
from ray_jobs.upstream_flags import TABLE, line_for, table

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md", ROOT / "CHANGELOG.md"]
generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))


@pytest.mark.parametrize("page", ["settings.md", "from-liveavatar.md"])
def test_generated_page_is_current(page):
    path = ROOT / "docs" / page
    assert path.read_text(encoding="utf-8") == generate["pages"]()[path], "run: make docs"


def test_every_setting_has_a_paragraph():
    page = generate["settings_page"]()
    for field in dataclasses.fields(Settings):
        paragraph = re.search(rf"### `{field.name}`\n\n(?:(?:No default|Default)[^\n]*\n\n)?(.+)", page)
        assert paragraph, field.name
        assert len(paragraph[1]) > 20, field.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_the_text_exist(page):
    known = {field.name for field in dataclasses.fields(Settings)} | {"prompt", "image", "audio"}
    known |= {"key", "x"}  # as in "write `key=value`"
    named = re.findall(r"(?<![\w-])([a-z_]+)(?:\.\w+)?=(?=[^\s=])", page.read_text(encoding="utf-8"))
    assert set(named) <= known


def test_table_of_upstream_flags_is_installed_with_the_package():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    shipped = [
        path for pattern in tools["setuptools"]["package-data"]["conf"] for path in TABLE.parent.glob(pattern)
    ]
    assert TABLE in shipped


def test_upstream_flags_appear_once_with_a_known_verdict():
    names = [line.flag for line in table()]
    assert len(set(names)) == len(names)
    assert {line.verdict for line in table()} == {"same", "renamed", "not needed", "not offered", "not yet"}


def test_flags_called_the_same_are_settings_or_columns():
    known = {field.name for field in dataclasses.fields(Settings)} | {
        "prompt",
        "image",
        "audio",
        "HF_ENDPOINT",
    }
    for line in table():
        if line.verdict == "same":
            assert line.ours == line.flag.lstrip("-")
            assert line.ours in known


def test_flag_that_is_not_there_yet_is_no_setting():
    known = {field.name for field in dataclasses.fields(Settings)}
    assert not [line.flag for line in table() if line.verdict == "not yet" and line.flag.lstrip("-") in known]


@pytest.mark.parametrize("spelling", ["--num_gpus_dit", "num_gpus_dit", "--num-gpus-dit=4", "num_gpus_dit=4"])
def test_upstream_flag_is_explained_however_it_is_written(spelling):
    line = line_for(spelling)
    assert line is not None
    assert "--num_gpus_dit" in line
    assert "not yet" in line


def test_flag_that_upstream_does_not_have_has_no_line():
    assert line_for("--no_such_flag") is None
