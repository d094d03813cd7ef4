"""What every benchmark records: where it ran, how long a command took and how much memory, and the table of results."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
SAMPLING_S = 0.05
WIDTH = 118

# --- where and when ---


def describe_run(libraries: Sequence[str], **more: Any) -> dict[str, Any]:
    """Date, command line, commit, machine and versions; call it first, so that the load is the one met at the start."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": command_line(),
        "commit": commit(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load at start": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown",
        **more,
        "python": platform.python_version(),
        **installed(libraries),
    }


def command_line() -> str:
    """What was typed, with the last part only of absolute paths: those of one machine help nobody."""
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def commit() -> str:
    """Return the commit that is checked out, and whether files differ from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(BENCHMARKS), *arguments], capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
    except FileNotFoundError:
        return "unknown"
    if head.returncode:
        return "none yet"
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def processor_name() -> str:
    """Model name of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(known, platform.processor() or platform.machine())


def installed(libraries: Sequence[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# --- how a command did ---


@dataclass(frozen=True)
class Measured:
    """A finished command.

    Parameters
    ----------
    seconds : float
        From start to exit, the interpreter's start included.
    peak_bytes : int
        Most resident memory. Of several processes the sum of each one's own peak: memory they share counts twice.
    output : str
        What it printed.
    """

    seconds: float
    peak_bytes: int
    output: str

    @property
    def values(self) -> Any:
        """The output read as JSON."""
        return json.loads(self.output)


def run_measured(command: Sequence[str]) -> Measured:
    """Run a command to its end and watch its memory.

    Raises
    ------
    RuntimeError
        If it fails, with what it wrote to standard error.
    """
    import psutil

    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = psutil.Popen(command, stdout=output, stderr=errors)
        while process.poll() is None:
            _note_peaks(process, peaks)
            try:
                process.wait(SAMPLING_S)
            except psutil.TimeoutExpired:
                continue
        seconds = time.perf_counter() - started
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}):\n{errors.read()}")
        return Measured(seconds, sum(peaks.values()), output.read())


def _note_peaks(process: Any, peaks: dict[int, int]) -> None:
    import psutil

    try:
        for member in (process, *process.children(recursive=True)):
            peaks[member.pid] = max(peaks.get(member.pid, 0), high_water(member.pid) or member.memory_info().rss)
    except psutil.Error:  # it ended meanwhile
        return


def high_water(pid: int | str = "self") -> int:
    """Most resident memory of a process so far, bytes, as Linux counts it; 0 where it does not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def run_voxclf(*arguments: object) -> Measured:
    """Run a voxclf command that prints JSON, and watch it."""
    return run_measured([sys.executable, "-m", "voxclf.cli", *map(str, arguments), "--json"])


# --- results ---


def markdown_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lay out rows by column name; what a row lacks stays empty."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in rows)]


def page(title: str, explanation: str, facts: Mapping[str, Any], table: Sequence[str]) -> str:
    """Compose the Markdown page of a benchmark: what was done, on what, and the table."""
    explained = textwrap.fill(f"`{facts['command']}`. {explanation}", WIDTH, break_on_hyphens=False)
    described = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "command")
    return "\n".join([f"# {title}", "", explained, "", described, "", *table]) + "\n"


def publish(
    name: str,
    title: str,
    explanation: str,
    facts: Mapping[str, Any],
    rows: Sequence[Any],
    table: Sequence[str],
    folder: Path = RESULTS,
) -> None:
    """Print the table, and write both files: all that was measured, and the page that shows it."""
    print("\n".join(table), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(page(title, explanation, facts, table))
