"""Files are whole or untouched; output directories are never overwritten by accident."""

import errno
import json

import pytest

from segrlhf import files
from segrlhf.errors import UserError


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


def test_last_checkpoint_passes_over_one_that_was_cut_off(tmp_path):
    assert files.last_checkpoint(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    files.mark_complete(tmp_path / "checkpoint-2", 2)
    assert files.last_checkpoint(tmp_path).name == "checkpoint-2"
    files.mark_complete(tmp_path / "checkpoint-10", 10)
    assert files.last_checkpoint(tmp_path).name == "checkpoint-10"
    assert json.loads((tmp_path / "checkpoint-10" / files.COMPLETE).read_text()) == {"step": 10}


def test_output_dir_with_files_is_refused(tmp_path):
    (tmp_path / "weights").write_text("precious")
    with pytest.raises(UserError, match=r"output_dir: expected a new or empty directory.*resume"):
        files.claim_output_dir(tmp_path, resume=False)
    files.claim_output_dir(tmp_path, resume=True)
    assert (tmp_path / "weights").read_text() == "precious"
    with pytest.raises(UserError, match="expected a directory, got the file"):
        files.claim_output_dir(tmp_path / "weights", resume=True)
    files.claim_output_dir(tmp_path / "new", resume=False)
    assert (tmp_path / "new").is_dir()


def test_resuming_clears_what_a_killed_process_left(tmp_path):
    for name in (".checkpoint-2.77.part", ".checkpoint-1.77.old", ".model.77.old", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / ".metrics.jsonl.77.part").write_text("half")
    (tmp_path / "checkpoint-3").mkdir()  # being written again when the process died
    (tmp_path / ".checkpoint-3.old").mkdir()
    files.mark_complete(tmp_path / ".checkpoint-3.old", 3)
    files.claim_output_dir(tmp_path, resume=True)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["checkpoint-1", "checkpoint-3", "model"]
    assert files.last_checkpoint(tmp_path).name == "checkpoint-3"
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == ".checkpoint-1.77.old"
    assert (tmp_path / "model" / "weights").read_text() == "model"


def test_resume_from(tmp_path):
    assert files.resolve_resume(tmp_path, None) is None
    assert files.resolve_resume(tmp_path, "false") is None
    assert files.resolve_resume(tmp_path, "true") is None
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match="resume_from_checkpoint: expected a complete checkpoint"):
        files.resolve_resume(tmp_path, str(tmp_path / "checkpoint-3"))
    files.mark_complete(tmp_path / "checkpoint-3", 3)
    assert files.resolve_resume(tmp_path, True).name == "checkpoint-3"
    assert files.resolve_resume(tmp_path, str(tmp_path / "checkpoint-3")).name == "checkpoint-3"
