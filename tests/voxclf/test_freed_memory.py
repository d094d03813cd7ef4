import ctypes
import subprocess
import sys

import pytest

from voxclf import freed_memory

FAULTS = """
import resource, threading
import numpy as np
from voxclf.freed_memory import keep_freed_memory, share_freed_memory
{before}
def work():
    for _ in range(5):
        np.ones(5_000_000)
work()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults() - first)
"""


def count_faults(before):
    """Pages that a thread had to be given while it made and freed five arrays of 40 MB."""
    answer = subprocess.run([sys.executable, "-c", FAULTS.format(before=before)], capture_output=True, check=True)
    return int(answer.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is for Linux")
def test_a_thread_uses_memory_again_that_another_has_freed():
    usual = count_faults("")  # 100 at least, where the system gives pages of 2 MB
    assert count_faults("share_freed_memory(); keep_freed_memory()") < usual / 5


def missing(name):
    raise OSError(name)


@pytest.mark.parametrize(("platform", "library"), [("darwin", ctypes.CDLL), ("linux", missing)])
def test_elsewhere_nothing_happens(platform, library, monkeypatch):
    monkeypatch.setattr(freed_memory.sys, "platform", platform)
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", library)
    assert not freed_memory.share_freed_memory()
    assert not freed_memory.keep_freed_memory()
    freed_memory.give_back_freed_memory()
