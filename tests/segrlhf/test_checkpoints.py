"""Checkpoints count when they are whole; output directories are never overwritten by accident."""

import json

import pytest

from segrlhf.errors import UserError
from segrlhf.runtime.checkpoints import (
    COMPLETE,
    claim_output_dir,
    last_checkpoint,
    mark_complete,
    resolve_resume,
)


def test_last_checkpoint_passes_over_one_that_was_cut_off(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_complete(tmp_path / "checkpoint-2", 2)
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    mark_complete(tmp_path / "checkpoint-10", 10)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert json.loads((tmp_path / "checkpoint-10" / COMPLETE).read_text()) == {"step": 10}


def test_output_dir_with_files_is_refused(tmp_path):
    (tmp_path / "weights").write_text("precious")
    with pytest.raises(UserError, match=r"output_dir: expected a new or empty directory.*resume"):
        claim_output_dir(tmp_path, resume=False)
    claim_output_dir(tmp_path, resume=True)
    assert (tmp_path / "weights").read_text() == "precious"
    with pytest.raises(UserError, match="expected a directory, got the file"):
        claim_output_dir(tmp_path / "weights", resume=True)
    claim_output_dir(tmp_path / "new", resume=False)
    assert (tmp_path / "new").is_dir()


def test_resuming_clears_what_a_killed_process_left(tmp_path):
    for name in (".checkpoint-2.77.part", ".checkpoint-1.77.old", ".model.77.old", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / ".metrics.jsonl.77.part").write_text("half")
    (tmp_path / "checkpoint-3").mkdir()  # being written again when the process died
    (tmp_path / ".checkpoint-3.old").mkdir()
    mark_complete(tmp_path / ".checkpoint-3.old", 3)
    claim_output_dir(tmp_path, resume=True)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["checkpoint-1", "checkpoint-3", "model"]
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == ".checkpoint-1.77.old"
    assert (tmp_path / "model" / "weights").read_text() == "model"


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
