"""constraints.txt pins what pyproject.toml asks for, and nothing but plain public versions."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for pin in [Requirement(line)]
}


def version(pin: Requirement) -> str:
    (clause,) = pin.specifier
    assert clause.operator == "=="
    return clause.version


def test_every_dependency_is_pinned_to_a_version_that_it_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(version(PINS[canonicalize_name(wanted.name)])), text


@pytest.mark.parametrize("name", PINS)
def test_pins_hold_no_address_and_no_local_version(name):
    assert PINS[name].url is None
    assert "+" not in version(PINS[name])


def test_torch_comes_without_its_companions():
    assert "torch" in PINS
    assert not {"torchvision", "torchaudio"} & set(PINS)
