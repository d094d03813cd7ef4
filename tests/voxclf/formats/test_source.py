"""Facts about a volume that budgets rely on."""

import numpy as np
import pytest

from voxclf.formats.source import CHUNK_CACHE_BYTES, READ_CACHE_BYTES, SourceInfo


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((1, 10, 20, 30), {}, 12_000),
        ((2, 1000, 1000, 1000), {}, READ_CACHE_BYTES),
        ((2, 1000, 1000, 1000), {"cache_bytes": CHUNK_CACHE_BYTES}, CHUNK_CACHE_BYTES),
    ],
)
def test_a_file_keeps_its_cache_or_itself_decoded(shape, options, expected):
    assert SourceInfo(shape, np.dtype(np.uint16), (1, 1, 1), **options).most_cached_bytes == expected
