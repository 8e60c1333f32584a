"""Reads the configuration once: default < model < preset < file < command line < row.

Everything below `ray_jobs` receives the frozen `Settings` made here and reads no file or environment variable
to learn a setting.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import conf
from conf.schema import (
    DeliverySettings,
    GenerationSettings,
    PortraitSettings,
    RunSettings,
    Settings,
    SoundSettings,
    VideoSettings,
)
from ray_jobs.upstream_flags import line_for
from stages.validate import validate

CONF = Path(conf.__file__).parent
FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
ROW_FIELDS = {
    f.name
    for group in (PortraitSettings, SoundSettings, GenerationSettings, VideoSettings, DeliverySettings)
    for f in dataclasses.fields(group)
}
"""Settings that a row may override: those that concern one lesson and not the run."""

RUN_FIELDS = {f.name for f in dataclasses.fields(RunSettings)}
"""Settings that say how the work is spread and change no picture."""


class SettingsError(Exception):
    """The configuration is wrong; the text names the setting, the value and the rule."""


@dataclass(frozen=True)
class Layer:
    """One source of settings, such as a preset or the command line."""

    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Effective:
    """Settings in force and where each came from."""

    settings: Settings
    origins: dict[str, str]
    """Setting -> name of the layer that gave its value."""


def named(kind: str, name: str) -> Layer:
    """The shipped file `conf/<kind>/<name>.yaml` as a layer."""
    path = CONF / kind / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (CONF / kind).glob("*.yaml")))
        raise SettingsError(f"{kind}={name}: there is no such {kind}; there are: {known}")
    return Layer(f"{kind} {name}", _load(path))


def from_file(path: Path) -> Layer:
    """A user's YAML file as a layer."""
    if not path.is_file():
        raise SettingsError(f"--config {path}: no such file")
    return Layer(str(path), _load(path))


def _load(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: must hold `key: value` lines")
    return {str(key): value for key, value in values.items()}


def resolve(layers: list[Layer]) -> Effective:
    """Merge the layers, later ones over earlier ones, onto the defaults and the file of the model they name.

    Raises SettingsError for unknown settings, values that are not allowed, and settings that nobody gave.
    """
    model = next((str(layer.values["model"]) for layer in reversed(layers) if "model" in layer.values), None)
    if model is None:
        model = str(FIELDS["model"].default)
    layers = [named("model", model), *layers]
    merged = OmegaConf.structured(Settings)
    OmegaConf.set_readonly(merged, False)
    origins = dict.fromkeys(FIELDS, "default")
    for layer in layers:
        merged = merge(merged, layer)
        origins.update(dict.fromkeys((name.partition(".")[0] for name in layer.values), layer.name))
    missing = [name for name in FIELDS if OmegaConf.is_missing(merged, name)]
    if missing:
        raise SettingsError(
            f"{missing[0]}: is not set anywhere; give {missing[0]}=... or a preset that has it"
        )
    settings: Settings = OmegaConf.to_object(merged)  # type: ignore[assignment]
    wrong = [
        f"{name}={value}: {rule} (from {origins[name.partition('.')[0]]})"
        for name, value, rule in validate(settings)
    ]
    if wrong:
        raise SettingsError("; ".join(wrong))
    return Effective(settings, origins)


def override(base: Settings, values: Mapping[str, str], source: str) -> Settings:
    """`base` with some settings of a row put over it. Raises SettingsError as `resolve` does."""
    if not values:
        return base
    for name in values:
        if name in FIELDS and name not in ROW_FIELDS:
            raise SettingsError(f"{name}={values[name]}: is a setting of the whole run, not of a row")
    merged = OmegaConf.structured(base)
    OmegaConf.set_readonly(merged, False)
    return OmegaConf.to_object(merge(merged, Layer(source, values)))  # type: ignore[return-value]


def merge(config: DictConfig, layer: Layer) -> DictConfig:
    """`config` with one layer put over it."""
    for name, given in layer.values.items():
        group, dot, part = name.partition(".")
        if group not in FIELDS:
            raise SettingsError(f"{layer.name}: {unknown(name)}")
        _require_literal(layer.name, name, given)
        value = _plain(group, given)
        try:
            config = OmegaConf.merge(config, {group: {part: value} if dot else value})  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise SettingsError(f"{layer.name}: {name}={value}: {reason}") from error
    return config


def unknown(name: str) -> str:
    """What to say of a setting that does not exist: upstream's flag explained, or the nearest name."""
    line = line_for(name)
    if line is not None:
        return line
    close = difflib.get_close_matches(name, FIELDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; `docs/settings.md` has them all"
    return f"{name}: there is no such setting{hint}"


def _require_literal(layer: str, name: str, given: Any) -> None:
    """Manifests come from strangers: `${oc.env:SECRET}` is no value, and neither is OmegaConf's `???`."""
    if isinstance(given, dict):
        for key, value in given.items():
            _require_literal(layer, f"{name}.{key}", value)
    elif isinstance(given, str) and ("${" in given or given == str(MISSING)):
        raise SettingsError(f"{layer}: {name}={given}: must be a plain value, without ${{...}} or ???")


def _plain(name: str, given: Any) -> Any:
    """`given` without the ways in which tables spell nothing (`null`) and whole numbers (`4.0`)."""
    if FIELDS[name].default is None and str(given).lower() in ("", "null", "none"):
        return None
    is_whole = FIELDS[name].type in (int, int | None)
    return given[:-2] if is_whole and isinstance(given, str) and given.endswith(".0") else given
