"""The ledger: what is marked done stays done, whatever happens to the file."""

import pytest

from voxclf.engine.ledger import Ledger, fingerprint, write_atomically
from voxclf.errors import OutputExistsError

JOB = {"model": "abc", "region": "0:1,0:1,0:1"}


def test_marks_survive_reopening(tmp_path):
    ledger = Ledger.open(tmp_path, JOB)
    ledger.mark_done(3, "aa")
    ledger.mark_done(0, "bb")
    assert Ledger.open(tmp_path, JOB).done == {3: "aa", 0: "bb"}


@pytest.mark.parametrize("cut", range(1, 16))
def test_a_torn_last_line_is_forgotten(tmp_path, cut):
    ledger = Ledger.open(tmp_path, JOB)
    ledger.mark_done(3, "aa")
    ledger.mark_done(12, "bb")
    log = tmp_path / "done.log"
    log.write_bytes(log.read_bytes()[:-cut])
    resumed = Ledger.open(tmp_path, JOB)
    assert resumed.done == {3: "aa"}
    resumed.mark_done(12, "bb")
    assert Ledger.open(tmp_path, JOB).done == {3: "aa", 12: "bb"}


def test_a_changed_line_is_forgotten(tmp_path):
    ledger = Ledger.open(tmp_path, JOB)
    ledger.mark_done(3, "aa")
    ledger.mark_done(4, "bb")
    log = tmp_path / "done.log"
    log.write_text(log.read_text().replace("3 aa", "7 aa"))
    assert Ledger.open(tmp_path, JOB).done == {4: "bb"}


def test_another_job_is_refused_with_the_difference(tmp_path):
    Ledger.open(tmp_path / "ledger", JOB)
    with pytest.raises(OutputExistsError, match=r'model was "abc", now "xyz".*--overwrite'):
        Ledger.open(tmp_path / "ledger", {**JOB, "model": "xyz"})


def test_a_resumed_job_keeps_its_blocks(tmp_path):
    assert Ledger.open(tmp_path, JOB).keep_core_shape((8, 8, 8)) == (8, 8, 8)
    assert Ledger.open(tmp_path, JOB).keep_core_shape((64, 64, 64)) == (8, 8, 8)


def test_fingerprints_do_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_atomic_writing_replaces_and_leaves_nothing_behind(tmp_path):
    write_atomically(tmp_path / "sub" / "f.json", "one")
    write_atomically(tmp_path / "sub" / "f.json", "two")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["f.json"]
    assert (tmp_path / "sub" / "f.json").read_text() == "two"
