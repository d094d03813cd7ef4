"""Which blocks are done: what makes a killed run resume where it stopped.

A ledger is a folder beside the output with ``job.json`` (what is being computed, as a fingerprint), ``blocks.json``
(how it is cut into blocks) and ``done.log``, one line per finished block: index, hash of the written voxels, and a
checksum of the line. A line is appended only after the block's chunks are on disk, and a torn last line fails its
checksum and is ignored, so that block is simply computed again. Only the process that runs the engine writes the log.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxclf.errors import OutputExistsError
from voxclf.geometry import Zyx


def fingerprint(description: Mapping[str, Any]) -> str:
    """Hash of a JSON-able description of a job: equal jobs give equal fingerprints."""
    text = json.dumps(description, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader (or a crash) sees the old text or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@dataclass
class Ledger:
    """The done-markers of one job. Open it with :meth:`open`."""

    folder: Path
    done: dict[int, str]

    @classmethod
    def open(cls, folder: Path, job: Mapping[str, Any]) -> Ledger:
        """Open the ledger of a job, or start it.

        Raises
        ------
        OutputExistsError
            If the folder holds the ledger of another job: the output there was made with other settings.
        """
        job_file = folder / "job.json"
        wanted = {"fingerprint": fingerprint(job), "job": job}
        if not job_file.exists():
            write_atomically(job_file, json.dumps(wanted, indent=2, default=str) + "\n")
        found = json.loads(job_file.read_text(encoding="utf-8"))
        if found["fingerprint"] != wanted["fingerprint"]:
            raise OutputExistsError(
                f"{folder.parent} was written by another job ({_first_difference(found['job'], job)}); "
                "use --overwrite to replace it, give another output folder, or repeat the old settings to resume"
            )
        return cls(folder, _read_log(folder / "done.log"))

    def keep_core_shape(self, wanted: Zyx) -> Zyx:
        """Return how the job was cut into blocks when it began; ``wanted`` if it begins now.

        So a resumed job may go on with another memory budget or number of workers.
        """
        path = self.folder / "blocks.json"
        if not path.exists():
            write_atomically(path, json.dumps({"core_shape": wanted}) + "\n")
        z, y, x = json.loads(path.read_text(encoding="utf-8"))["core_shape"]
        return z, y, x

    @property
    def _log(self) -> Path:
        return self.folder / "done.log"

    def mark_done(self, index: int, digest: str) -> None:
        """Record a block whose voxels are on disk."""
        line = f"{index} {digest}"
        with self._log.open("ab") as log:
            # One write call: a line is in the file whole or, after a crash, detectably torn.
            log.write(f"{line} {zlib.crc32(line.encode()):08x}\n".encode())
            log.flush()
            os.fsync(log.fileno())
        self.done[index] = digest


def _read_log(path: Path) -> dict[int, str]:
    done: dict[int, str] = {}
    if not path.exists():
        return done
    content = path.read_bytes()
    intact = content[: content.rfind(b"\n") + 1]
    if len(intact) < len(content):
        # A torn last line would swallow the next one appended to it.
        with path.open("r+b") as log:
            log.truncate(len(intact))
    for line in intact.decode("ascii", "replace").splitlines():
        parts = line.split(" ")
        if len(parts) == 3 and parts[2] == f"{zlib.crc32(f'{parts[0]} {parts[1]}'.encode()):08x}":
            done[int(parts[0])] = parts[1]
    return done


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for key in sorted(set(old) | set(new)):
        before, now = (json.dumps(job.get(key), sort_keys=True, default=str) for job in (old, new))
        if before != now:
            return f"{key} was {before[:120]}, now {now[:120]}"
    return "its description differs"
