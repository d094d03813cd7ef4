"""Pages, tables and numbers as text files: what every command that writes a page for people shares.

A page is one HTML file that refers to nothing outside itself, so it can be mailed, archived and printed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from voxclf.engine.ledger import write_atomically
from voxclf.json_values import to_json_values


def write_texts(folder: Path, texts: Mapping[str, str]) -> tuple[Path, ...]:
    """Write files into a folder, in this order and each whole or not at all; return their paths."""
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return tuple(folder / name for name in texts)


def render_template(
    package: str,
    name: str,
    values: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]] | None = None,
    tests: Mapping[str, Callable[..., bool]] | None = None,
) -> str:
    """Fill in a Jinja template that lies in ``package``; a name that it uses and nobody gave is an error.

    Its name ``style`` is ``pages.css``, what all pages share.

    Parameters
    ----------
    package, name : str
        As in ``"voxclf"`` and ``"report.html.jinja"``.
    values : mapping
        What the template may name. Text is escaped for HTML.
    filters, tests : mapping of str to function, optional
        What the template may apply beside Jinja's own.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= dict(filters or {})
    environment.tests |= dict(tests or {})
    template = environment.from_string(files(package).joinpath(name).read_text("utf-8"))
    return template.render(values, style=Markup(files("voxclf").joinpath("pages.css").read_text("utf-8")))


def render_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table for scripts and spreadsheets."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def render_json(values: Mapping[str, Any]) -> str:
    """Values as JSON text; what is not finite becomes null."""
    return json.dumps(to_json_values(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
