"""Files are whole or untouched."""

import errno

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
