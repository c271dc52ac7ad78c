"""Checkpoints count when they are whole; output directories are never overwritten by accident."""

import errno
import json
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from segrlhf.errors import DiskFullError, UserError
from segrlhf.runtime import files
from segrlhf.runtime.checkpoints import (
    COMPLETE,
    check_output_dir,
    check_room,
    claimed,
    drop_old_checkpoints,
    is_disk_full,
    last_checkpoint,
    mark_complete,
    resolve_resume,
    saving,
)


def test_last_checkpoint_passes_over_one_that_was_cut_off(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_complete(tmp_path / "checkpoint-2", 2)
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    mark_complete(tmp_path / "checkpoint-10", 10)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert json.loads((tmp_path / "checkpoint-10" / COMPLETE).read_text())["step"] == 10
    for name in ("checkpoint-11-copy", "my-checkpoint-12", "checkpoint-²"):  # are somebody's own
        (tmp_path / name).mkdir()
        mark_complete(tmp_path / name, 12)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"


def test_old_checkpoints_are_dropped_and_nothing_else(tmp_path):
    for name in (*(f"checkpoint-{step}" for step in range(1, 5)), "checkpoint-1-copy", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-0").symlink_to("notes")
    drop_old_checkpoints(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 7
    drop_old_checkpoints(tmp_path, 2, keep=tmp_path / "checkpoint-2")
    left = {item.name for item in tmp_path.iterdir()}
    assert left == {"checkpoint-2", "checkpoint-4", "checkpoint-1-copy", "notes"}


def test_output_dir_with_files_is_refused(tmp_path):
    (tmp_path / "weights").write_text("precious")
    with pytest.raises(UserError, match=r"output_dir: expected a new or empty directory.*resume"):
        check_output_dir(tmp_path, resume=False, sign="log")
    check_output_dir(tmp_path, resume=True, sign="log")
    assert (tmp_path / "weights").read_text() == "precious"
    with pytest.raises(UserError, match="expected a directory, got the file"):
        check_output_dir(tmp_path / "weights", resume=True, sign="log")
    (tmp_path / "config.json").write_text("of somebody's model")
    with pytest.raises(UserError, match=r"with a model, but neither a checkpoint nor log; choose"):
        check_output_dir(tmp_path, resume=True, sign="log")
    (tmp_path / "log").touch()
    check_output_dir(tmp_path, resume=True, sign="log")
    check_output_dir(tmp_path / "new", resume=False, sign="log")
    assert not (tmp_path / "new").exists()  # nothing to stand in the way of a corrected command


def test_one_run_at_a_time_uses_a_directory(tmp_path):
    place = tmp_path / "new" / "run"
    in_use = pytest.raises(UserError, match="expected a directory that no other run is using")
    with claimed(place):
        with in_use, claimed(place):
            pytest.fail("got it")
        with claimed(place, here=False):
            pass
    assert not place.parent.exists()  # nothing was written
    with claimed(place):
        (place / "weights").touch()
    assert (place / "weights").exists()


def test_resuming_clears_what_a_killed_process_left(tmp_path):
    def temporary(name, kind):
        path = files.temporary_path(tmp_path / name, kind)
        path.mkdir()
        (path / "weights").write_text(f"{kind} {name}")
        return path

    temporary("checkpoint-2", "new")
    for name in ("checkpoint-1", "model", "checkpoint-3"):
        temporary(name, "old")
    mark_complete(next(tmp_path.glob(".checkpoint-3.*")), 3)
    (tmp_path / "checkpoint-3").mkdir()  # being written again when the process died
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("model")
    files.temporary_path(tmp_path / "metrics.jsonl", "new").write_text("half")
    # Somebody else's, of names that are no more than like ours.
    others = [".keep.part", ".notes.old", ".git.old", ".x.77.part", ".segrlhf-new"]
    for name in others:
        (tmp_path / name).write_text("mine")
    check_output_dir(tmp_path, resume="true", sign="log")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {*others, "checkpoint-1", "checkpoint-3", "model"}
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "old checkpoint-1"
    assert (tmp_path / "model" / "weights").read_text() == "model"


def test_room_is_tried_where_the_directory_will_be(tmp_path, monkeypatch):
    seen = []

    def disk_usage(path):
        seen.append(path)
        return SimpleNamespace(free=100 * 2**20)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    run = tmp_path / "new" / "run"
    mib = 2**20
    assert check_room(run, 20 * mib, 10 * mib, n_checkpoints=4) is None
    assert seen == [tmp_path]
    assert "5 checkpoints and the final model take 110 MiB" in check_room(
        run, 20 * mib, 10 * mib, 5
    )
    assert check_room(run, 20 * mib, 10 * mib, 5, save_total_limit=3) is None
    assert check_room(run, 200 * mib, 10 * mib, n_checkpoints=0) is None
    with pytest.raises(DiskFullError, match="room for a checkpoint and the final model, 110 MiB"):
        check_room(run, 100 * mib, 10 * mib, n_checkpoints=1)
    with pytest.raises(DiskFullError, match="room for the final model, 101 MiB, got 100 MiB free"):
        check_room(run, 0, 101 * mib, n_checkpoints=0)


WRITERS = {
    "torch": lambda path: torch.save(torch.zeros(100_000), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "tokenizers": lambda path: Tokenizer(
        models.BPE(vocab={str(i): i for i in range(10_000)}, merges=[])
    ).save(str(path)),
    "numpy": lambda path: np.save(path, np.zeros(100_000)),
    "python": lambda path: files.write_text(path, "0" * 100_000),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_library_s_word_for_a_failed_write_is_known(writer, tmp_path):
    """A limit on the size of files stands for a full disk: it needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with (
            pytest.raises(DiskFullError, match=f"saving it in {tmp_path} .*not exist; free space"),
            saving("it", tmp_path),
        ):
            WRITERS[writer](tmp_path / "file.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_are_not_a_full_disk():
    assert not is_disk_full(OSError(errno.EACCES, "No space for you"))
    assert not is_disk_full(RuntimeError("PytorchStreamReader failed reading zip archive"))
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))


def test_resume_from(tmp_path):
    assert resolve_resume(tmp_path, None) is None
    assert resolve_resume(tmp_path, "false") is None
    assert resolve_resume(tmp_path, "true") is None
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match="resume_from_checkpoint: expected a complete checkpoint"):
        resolve_resume(tmp_path, str(tmp_path / "checkpoint-3"))
    mark_complete(tmp_path / "checkpoint-3", 3)
    assert resolve_resume(tmp_path, True).name == "checkpoint-3"
    assert resolve_resume(tmp_path, str(tmp_path / "checkpoint-3")).name == "checkpoint-3"
