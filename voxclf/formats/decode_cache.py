"""A bounded memory of decoded pages, so that blockwise reading does not decode the same page again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from voxclf.formats.source import READ_CACHE_BYTES


class DecodeCache:
    """Keeps the arrays used last, up to a number of bytes; safe for use by several threads.

    A thread that asks for an array which another thread is decoding waits for it instead of decoding it too.
    An array larger than the whole cache is handed out but not kept.
    """

    def __init__(self, limit_bytes: int = READ_CACHE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[Hashable, Future[NDArray[Any]]] = OrderedDict()
        self._held_bytes = 0
        self._lock = Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the arrays kept now."""
        return self._held_bytes

    def get(self, key: Hashable, decode: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return the array of ``key``, calling ``decode`` if it is not here. Callers must not change it."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                is_mine = False
            else:
                entry = self._entries[key] = Future()
                is_mine = True
        if is_mine:
            self._fill(key, entry, decode)
        return entry.result()

    def _fill(self, key: Hashable, entry: Future[NDArray[Any]], decode: Callable[[], NDArray[Any]]) -> None:
        try:
            array = decode()
        except BaseException as error:
            with self._lock:
                self._entries.pop(key, None)
            entry.set_exception(error)
            return
        array.flags.writeable = False
        with self._lock:
            self._held_bytes += array.nbytes
            entry.set_result(array)
            self._evict()

    def _evict(self) -> None:
        for key in list(self._entries):
            if self._held_bytes <= self._limit_bytes:
                return
            entry = self._entries[key]
            # An entry without a result is being decoded by another thread; its bytes are not counted yet.
            if entry.done():
                del self._entries[key]
                self._held_bytes -= entry.result().nbytes
