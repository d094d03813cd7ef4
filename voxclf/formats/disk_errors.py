"""What the operating system refused, said so that a user knows what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_AGAIN = "and run the same command again"
_ELSEWHERE = "choose a folder that you may write to"
_ADVICE = {
    errno.ENOSPC: f"the disk is full: free some space {_AGAIN}",
    errno.EDQUOT: f"your disk quota is used up: free some space {_AGAIN}",
    errno.EFBIG: f"the file is larger than allowed here: raise the limit (ulimit -f) {_AGAIN}",
    errno.EMFILE: f"too many open files: raise the limit (ulimit -n) {_AGAIN}",
    errno.EACCES: f"permission denied: {_ELSEWHERE}",
    errno.EPERM: f"permission denied: {_ELSEWHERE}",
    errno.EROFS: f"the file system is read-only: {_ELSEWHERE}",
}


def disk_error(number: int, doing: str, path: str) -> OSError:
    """Build the exception (a subclass of OSError) for a system error number."""
    return OSError(number, f"cannot {doing} {path}: {_ADVICE.get(number, os.strerror(number))}")


@contextmanager
def explained_disk_errors(doing: str, path: str) -> Iterator[None]:
    """Give OSErrors of a block of code the file's name and advice; other exceptions pass.

    Raises
    ------
    OSError
        Of the same kind (``PermissionError`` stays one), with the better message.
    """
    try:
        yield
    except OSError as error:
        # NumPy reports a write that stopped half-way without a number; a full disk is what causes it.
        raise disk_error(error.errno or errno.ENOSPC, doing, path) from error
