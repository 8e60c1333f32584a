"""The command line: `lectern init | plan | render | status | doctor | weights`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from ray_jobs.exit_codes import INTERRUPTED, NOT_ALL_DELIVERED, NOTHING_STARTED
from ray_jobs.folder import FolderError
from ray_jobs.lessons import REQUIRED
from ray_jobs.plan import Refused, Request
from ray_jobs.progress import console
from ray_jobs.settings import FIELDS, Layer, SettingsError, from_file, named, unknown
from stages.manifest import init as manifest_for


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. `ray job submit -- lectern render ...` ends here too."""
    arguments, rest = _parser().parse_known_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        # argparse gives up on positional arguments behind the first option, so `--out x key=value` ends here.
        _refuse_flags([text for text in rest if text.startswith("-")])
        arguments.values = [*getattr(arguments, "values", []), *rest]
        return command(arguments)
    except (Refused, SettingsError) as error:
        print(f"lectern: {error}", file=sys.stderr)
        return NOTHING_STARTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except FolderError as error:
        # The lessons are over, but what became of them cannot be written down.
        print(f"lectern: {error}", file=sys.stderr)
        return NOT_ALL_DELIVERED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lectern", description="Bulk production of talking-head lesson videos."
    )
    parser.add_argument("--version", action="version", version=f"lectern {version('lectern')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    render = command("render", _render, "render the lessons of a manifest")
    _add_manifest(render)
    render.add_argument("--out", required=True, help="folder or URI for the finished files")
    render.add_argument("--strict", action="store_true", help="render nothing if any row has a problem")
    render.add_argument(
        "--max-failures", type=_positive, help="begin no further lesson after so many failures"
    )
    render.add_argument("--local", action="store_true", help="render in this process, without Ray")
    render.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help="of a running Ray cluster")

    plan = command("plan", _plan, "check a manifest and show what would be rendered")
    _add_manifest(plan)
    plan.add_argument("--out", help="folder or URI of an earlier run, to see what is done already")

    init = command("init", _init, "write a manifest for a folder of recordings")
    init.add_argument("recordings")
    init.add_argument("--manifest", default="-", help="file to write; standard output if not given")
    init.add_argument("values", nargs="*", metavar="key=value", help="image=... prompt=...")

    status = command("status", _status, "what a run is doing, or did")
    status.add_argument("out")

    doctor = command("doctor", _doctor, "check this installation")
    doctor.add_argument("--out", type=Path, help="folder whose disk is checked")
    doctor.add_argument("--golden", type=Path, help="folder of golden data to compute again")

    weights = command("weights", _weights, "fetch, merge or make checkpoints")
    weights.add_argument("action", choices=("pull", "merge", "tiny"))
    weights.add_argument("folder", type=Path, nargs="?", help="where the checkpoint is to be written")
    weights.add_argument("--dry-run", action="store_true", help="only say what would be fetched")
    weights.add_argument(
        "values", nargs="*", metavar="key=value", help="model=... ckpt_dir=... lora_path_dmd=..."
    )
    return parser


def _add_manifest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", help="CSV, JSON Lines, Parquet, or Live Avatar's batch JSON or YAML")
    parser.add_argument("--store", help="folder or URI of a store that several runs share")
    parser.add_argument("--preset", help="preview, standard or long")
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    parser.add_argument("--only", default="", metavar="ID,...", help="these lessons alone")
    parser.add_argument("--limit", type=_positive, help="the first so many rows")
    parser.add_argument(
        "values", nargs="*", metavar="key=value", help="settings, and columns that rows leave empty"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


def _refuse_flags(flags: list[str]) -> None:
    """Flags that we do not have: upstream's get an explanation, our own settings their way to be written."""
    for flag in flags:
        name = flag.lstrip("-").partition("=")[0].replace("-", "_")
        raise SettingsError(f"write {name}=... without dashes" if name in FIELDS else unknown(name))


def _pairs(values: list[str]) -> dict[str, str]:
    pairs = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"{text}: settings are given as key=value")
        if name in pairs:
            raise SettingsError(f"{name}: is given twice")
        pairs[name] = value
    return pairs


def _request(arguments: argparse.Namespace, **more: object) -> Request:
    pairs = _pairs(arguments.values)
    fill = {name: pairs.pop(name) for name in list(pairs) if name in REQUIRED or name.startswith("x_")}
    if "lesson_id" in fill:
        raise SettingsError("lesson_id: every row has its own")
    layers = [named("preset", arguments.preset)] if arguments.preset else []
    layers += [from_file(arguments.config)] if arguments.config else []
    only = tuple(id for id in arguments.only.split(",") if id)
    return Request(
        arguments.manifest,
        [*layers, Layer("command line", pairs)],
        {name: _from_here(name, value) for name, value in fill.items()},
        out=arguments.out,
        store=arguments.store,
        only=only,
        limit=arguments.limit,
        **more,  # type: ignore[arg-type]
    )


def _from_here(name: str, value: str) -> str:
    """Paths on the command line are relative to where the user stands, those of a row to the manifest."""
    return str(Path(value).absolute()) if name in ("image", "audio") and "://" not in value else value


def _render(arguments: argparse.Namespace) -> int:
    from ray_jobs.render import render

    more = {name: getattr(arguments, name) for name in ("strict", "max_failures", "local", "address")}
    return render(_request(arguments, **more))


def _plan(arguments: argparse.Namespace) -> int:
    from ray_jobs.plan import plan

    return plan(_request(arguments), console())


def _init(arguments: argparse.Namespace) -> int:
    pairs = _pairs(arguments.values)
    unknown = set(pairs) - {"image", "prompt"}
    if unknown:
        raise SettingsError(f"{min(unknown)}: init takes image=... and prompt=... only")
    to_file = arguments.manifest != "-"
    folder = Path(arguments.manifest).absolute().parent if to_file else Path.cwd()
    try:
        text = manifest_for(arguments.recordings, pairs.get("image"), pairs.get("prompt"), str(folder))
        if to_file:
            with open(arguments.manifest, "x", encoding="utf-8") as file:
                file.write(text)
        else:
            sys.stdout.write(text)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from ray_jobs.status import show

    return show(arguments.out, console())


def _doctor(arguments: argparse.Namespace) -> int:
    from ray_jobs.doctor import run

    return run(arguments.out, arguments.golden)


def _weights(arguments: argparse.Namespace) -> int:
    from ray_jobs import weights

    action, folder, values = arguments.action, arguments.folder, _pairs(arguments.values)
    if folder is not None and "=" in folder.name:
        values, folder = {**_pairs([str(folder)]), **values}, None
    if action == "pull":
        return weights.pull(folder, values, arguments.dry_run)
    if folder is None:
        raise SettingsError(f"weights {action}: the folder to write is missing")
    return weights.merge(folder, values) if action == "merge" else weights.tiny(folder)


if __name__ == "__main__":
    sys.exit(main())
