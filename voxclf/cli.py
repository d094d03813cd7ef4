"""The command line: arguments → configuration → one call → exit code. It touches no array.

Exit codes: 0 done · 2 bad input · 3 the output exists · 4 the model does not fit or is damaged · 5 a block
failed (what is finished is kept; the same command goes on) · 130 interrupted (likewise).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from voxclf import __version__
from voxclf.config import COMMANDS, Config, load_config_file, make_config, positional_names
from voxclf.errors import BlockError, ModelError, OutputExistsError, VoxclfError
from voxclf.freed_memory import share_freed_memory

Item = TypeVar("Item")

RESUMABLE = {"run", "compare", "predict", "features", "convert", "crf-refine", "demo"}
EXIT_BAD_INPUT = 2
EXIT_OUTPUT_EXISTS = 3
EXIT_MODEL = 4
EXIT_BLOCK = 5
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    # Read when OpenMP loads: idle threads then sleep instead of spinning on cores that others need (3-7x).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    share_freed_memory()
    parser = build_parser()
    given = vars(parser.parse_args(arguments))
    kind: type[Config] | None = given.pop("kind", None)
    if kind is None:
        parser.print_help()
        return EXIT_BAD_INPUT
    as_json, show_traceback = given.pop("json"), given.pop("traceback")
    config_file = given.pop("config", None)
    warnings.showwarning = _show_warning
    try:
        values = load_config_file(Path(config_file)) if config_file else {}
        config = make_config(kind, {**values, **given})
        from voxclf.commands import run_command

        result = run_command(config, _show_nothing if as_json else RichProgress())
    except (Exception, KeyboardInterrupt) as error:
        if show_traceback:
            raise
        return _report_failure(error, can_resume=kind.command in RESUMABLE)
    print(json.dumps(result.values, indent=2) if as_json else "\n".join(result.lines))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the parser off the configurations: one command each, one option per field."""
    parser = argparse.ArgumentParser(
        prog="voxclf",
        description="Class probabilities and labels for every voxel of a 3D electron-microscopy volume, "
        "from labels on a few slices.",
        epilog="start with: voxclf demo    your own data: voxclf run VOLUME LABELS -o OUT",
    )
    parser.add_argument("--version", action="version", version=f"voxclf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for kind in COMMANDS:
        _add_command(commands, kind)
    return parser


def _add_command(commands: Any, kind: type[Config]) -> None:
    examples = "\n".join(f"  {example}" for example in kind.examples)
    command = commands.add_parser(
        kind.command,
        help=kind.summary,
        description=f"{kind.summary[0].upper()}{kind.summary[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    command.set_defaults(kind=kind, json=False, traceback=False)
    positional = positional_names(kind)
    for name in positional:
        # Optional for argparse, because --config may give it; make_config says what is missing.
        command.add_argument(name, nargs="?", metavar=name.upper(), help=kind.model_fields[name].description)
    groups: dict[str, Any] = {"": command}
    for name in _by_importance(kind):
        if name not in positional:
            title = _help_group(kind, name)
            if title not in groups:
                groups[title] = command.add_argument_group(title)
            _add_option(groups[title], name, kind.model_fields[name])
    command.add_argument("--config", metavar="FILE", help="TOML file with any of these settings")
    command.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")
    command.add_argument("--traceback", action="store_true", help="show where in the program an error arose")


def _by_importance(kind: type[Config]) -> list[str]:
    """Fields of a command: its own first, then those it shares with others, how it is run last."""
    declared = (name for part in kind.__mro__ for name in vars(part).get("__annotations__", {}))
    return [name for name in dict.fromkeys(declared) if name in kind.model_fields]


def _help_group(kind: type[Config], name: str) -> str:
    """Heading that an option stands under in the help: that of the class which declares it, if it has one."""
    declaring = next(part for part in kind.__mro__ if name in vars(part).get("__annotations__", {}))
    return str(vars(declaring).get("help_group", ""))


def _add_option(command: Any, name: str, field: Any) -> None:
    flags = [f"--{name.replace('_', '-')}"]
    if name == "output":
        flags.insert(0, "-o")
    text = (field.description or "").replace("%", "%%")
    if field.annotation is bool:
        command.add_argument(
            *flags, action=argparse.BooleanOptionalAction, help=f"{text} (default: {_spell(field.default)})"
        )
        return
    required = field.is_required()
    shown = "" if required or field.default is None else f" (default: {_spell(field.default)})"
    choices = _choices(field.annotation)
    command.add_argument(
        *flags,
        metavar="{" + ",".join(choices) + "}" if choices else name.upper().replace("_", "-"),
        help=f"{text}{' (required)' if required else ''}{shown}",
        type=_literal_type(field.annotation),
    )


def _choices(annotation: Any) -> list[str]:
    for part in _union_parts(annotation):
        if typing.get_origin(part) is Literal:
            return [str(value) for value in typing.get_args(part)]
    return []


def _literal_type(annotation: Any) -> Any:
    """Text becomes a number where the choices are numbers; pydantic checks everything else."""
    for part in _union_parts(annotation):
        if typing.get_origin(part) is Literal and isinstance(typing.get_args(part)[0], int):
            return int
    return str


def _union_parts(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value // 10**6}MB" if isinstance(value, int) and value >= 10**8 else str(value)


def _report_failure(error: BaseException, can_resume: bool) -> int:
    codes: list[tuple[type[BaseException], int]] = [
        (KeyboardInterrupt, EXIT_INTERRUPTED),
        (OutputExistsError, EXIT_OUTPUT_EXISTS),
        (ModelError, EXIT_MODEL),
        (BlockError, EXIT_BLOCK),
        (VoxclfError, EXIT_BAD_INPUT),
        (OSError, EXIT_BAD_INPUT),
        (ValueError, EXIT_BAD_INPUT),
        (TypeError, EXIT_BAD_INPUT),
    ]
    for kind, code in codes:
        if isinstance(error, kind):
            message = "interrupted" if code == EXIT_INTERRUPTED else str(error)
            print(f"voxclf: {message}", file=sys.stderr)
            if can_resume and code in (EXIT_BLOCK, EXIT_INTERRUPTED):
                print("voxclf: what is finished is kept; run the same command again to go on", file=sys.stderr)
            return code
    raise error


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"voxclf: warning: {message}", file=sys.stderr)


def _show_nothing(stage: str, results: Iterable[Item], total: float, unit: str) -> Iterator[Item]:
    return iter(results)


class RichProgress:
    """A bar per stage on standard error, with rate and time left; silent where that is not a terminal."""

    def __call__(self, stage: str, results: Iterable[Item], total: float, unit: str) -> Iterator[Item]:
        """Hand on results and draw how far they are."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        # Rates over the whole stage: blocks take seconds to minutes and come in bursts, which rich's own rate over
        # the last half minute makes hundreds of times too high.
        columns = (
            TextColumn(f"{stage:<16}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[time]}"),
        )
        started, done = time.monotonic(), 0.0
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(stage, total=total, rate="", time="-:--:--")
            for item in results:
                done += getattr(item, "n_voxels", 1)
                rate = done / max(time.monotonic() - started, 1e-9)
                left = _format_time(max(0.0, total - done) / rate) if rate else "-:--:--"
                bar.update(task, completed=done, rate=_format_rate(rate, unit), time=left)
                yield item
            bar.update(task, completed=total, time=_format_time(time.monotonic() - started))


def _format_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _format_rate(per_second: float, unit: str) -> str:
    if unit == "voxel":
        return f"{per_second / 1e6:.2f} Mvoxel/s"
    return f"{per_second:.2f} {unit}/s"


if __name__ == "__main__":
    sys.exit(main())
