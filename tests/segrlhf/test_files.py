"""Files are whole or untouched."""

import errno
import fcntl
import os

import pytest

from segrlhf.runtime import files


def _fill_the_disk(saving):
    """Writes half of what it wants to, then finds no space."""
    with saving as part:
        (part / "weights" if part.is_dir() else part).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_write_text_replaces_whole(tmp_path):
    path = tmp_path / "a" / "b.txt"
    files.write_text(path, "one")
    files.write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "b.txt"
    files.write_text(path, "old")
    with pytest.raises(OSError, match="No space left"):
        _fill_the_disk(files.whole_file(path))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["b.txt"]


def test_a_failed_directory_leaves_the_old_one(tmp_path):
    path = tmp_path / "model"
    with files.whole_dir(path) as part:
        (part / "weights").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        _fill_the_disk(files.whole_dir(path))
    assert (path / "weights").read_text() == "old"
    with files.whole_dir(path) as part:
        (part / "other").write_text("new")
    assert [p.name for p in path.iterdir()] == ["other"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_files_into_keeps_neighbours_and_writes_all_or_nothing(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "weights").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        _fill_the_disk(files.files_into(tmp_path))
    assert (tmp_path / "weights").read_text() == "old"
    with files.files_into(tmp_path) as part:
        (part / "weights").write_text("new")
    assert (tmp_path / "weights").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "weights"]


def test_temporary_files_are_new_and_no_links(tmp_path, monkeypatch):
    """Somebody who guesses the name finds that it is refused, not written through."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * (2 * n))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name, whole in (("a.json", files.whole_file), ("model", files.whole_dir)):
        trap = tmp_path / f".{name}.0000000000000000.segrlhf-new"
        trap.symlink_to(victim)
        with pytest.raises(FileExistsError), whole(tmp_path / name):
            pytest.fail("went on")
        assert trap.is_symlink()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "a.json").exists()


def test_a_lock_is_no_link_and_nothing_but_a_file(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "link.lock").symlink_to(victim)
    (tmp_path / "folder.lock").mkdir()
    os.mkfifo(tmp_path / "pipe.lock")
    for name in ("link.lock", "folder.lock", "pipe.lock"):
        with pytest.raises(OSError), files.lock_file(tmp_path / name):  # noqa: PT011
            pytest.fail("went on")
    assert victim.read_text() == "precious"
    for _ in range(2):  # the second finds the first one's file
        with files.lock_file(tmp_path / "new.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
