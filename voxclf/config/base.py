"""What every configuration shares: values checked once and frozen, read from and saved to TOML."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

POSITIONAL: dict[str, Any] = {"positional": True}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_numbers(value: Any) -> Any:
    """Read ``50,4.6,4.6`` into a list of numbers; anything but text is passed on to the field's own check."""
    if not isinstance(value, str):
        return value
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise ValueError("give numbers separated by commas, for example 50,4.6,4.6") from None


def parse_shape(value: Any) -> Any:
    """Read ``32`` or ``5,32,32`` into three numbers, one number standing for all three axes."""
    numbers = parse_numbers(str(value) if isinstance(value, int) else value)
    return numbers * 3 if isinstance(numbers, list) and len(numbers) == 1 else numbers


def parse_memory(value: Any) -> Any:
    """Read ``4GB``, ``512MB`` or a number of bytes into bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", value)
    if not match or match[2].upper() not in UNITS:
        raise ValueError("give a number and a unit, for example 4GB or 512MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_duration(value: Any) -> Any:
    """Read ``90s``, ``5m``, ``1h`` or a number of seconds into seconds."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9.]+)\s*([smh]?)\s*", value.lower())
    if not match:
        raise ValueError("give a number and a unit, for example 90s, 5m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
VoxelSizeNm = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(parse_numbers)]
Lengths = Annotated[tuple[Positive, ...], BeforeValidator(parse_numbers)]
MemoryBytes = Annotated[int, BeforeValidator(parse_memory), Field(ge=150_000_000)]
PatchShape = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], BeforeValidator(parse_shape)]
VoxelCounts = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], BeforeValidator(parse_numbers)]


class Config(BaseModel):
    """What every command shares: unknown fields are refused, values are checked once and then frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: ClassVar[str]
    summary: ClassVar[str]
    examples: ClassVar[tuple[str, ...]] = ()


AnyConfig = TypeVar("AnyConfig", bound=Config)


def make_config(kind: type[AnyConfig], values: dict[str, Any]) -> AnyConfig:
    """Check values and freeze them.

    Raises
    ------
    ValueError
        With one line for each value that is wrong: which, what it was, what is allowed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(kind, detail) for detail in error.errors())) from None


def _explain(kind: type[Config], detail: Any) -> str:
    name = str(detail["loc"][0]) if detail["loc"] else "configuration"
    option = name if _is_positional(kind, name) else f"--{name.replace('_', '-')}"
    if detail["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields)
        return f"{name} is not a setting of `voxclf {kind.command}`; known are {known}"
    if detail["type"] == "missing" and len(detail["loc"]) > 1:
        return f"{option} has only {len(detail['input'])} numbers ({kind.model_fields[name].description})"
    if detail["type"] == "missing":
        return f"{option} is missing: {kind.model_fields[name].description}"
    message = detail["msg"].removeprefix("Value error, ")
    field = kind.model_fields.get(name)
    meaning = f" ({field.description})" if field else ""
    return f"{option} was {detail['input']!r}: {message[0].lower()}{message[1:]}{meaning}"


def _is_positional(kind: type[Config], name: str) -> bool:
    field = kind.model_fields.get(name)
    return bool(field and field.json_schema_extra == POSITIONAL)


def positional_names(kind: type[Config]) -> list[str]:
    """Arguments given without an option, in the order of the command line: the model first, then inputs."""
    order = {"model": 0, "prediction": 0, "before": 0, "volume": 1, "after": 1, "labels": 2, "output": 3}
    names = [name for name in kind.model_fields if _is_positional(kind, name)]
    return sorted(names, key=lambda name: order[name])


def load_config_file(path: Path) -> dict[str, Any]:
    """Read settings from TOML; names as in :class:`Config`, dashes allowed."""
    if not path.exists():
        raise FileNotFoundError(f"--config {path} does not exist; give a TOML file such as a saved config.toml")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {path} is not valid TOML: {error}; compare with a saved config.toml") from None
    return {name.replace("-", "_"): value for name, value in values.items()}


def save_config(config: Config, path: Path) -> None:
    """Write what ran, so that ``voxclf COMMAND --config`` repeats it."""
    values = config.model_dump(mode="json", exclude_none=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# voxclf {config.command} --config {path.name}\n{tomli_w.dumps(values)}", encoding="utf-8")
