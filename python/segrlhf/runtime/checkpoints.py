"""Which checkpoints are whole, which output directories are free, and room on the disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DiskFullError, UserError
from . import files

COMPLETE = "complete.json"  # the last file of a checkpoint; one without it was cut off

Resume = str | bool | None  # --resume_from_checkpoint: true, false, or a checkpoint's path


def mark_complete(checkpoint: str | Path, step: int) -> None:
    """Call when everything else of a checkpoint is written; first that is brought to the disk."""
    for item in Path(checkpoint).rglob("*"):
        if item.is_file():
            with open(item, "rb") as handle:
                os.fsync(handle.fileno())
    files.write_json(Path(checkpoint) / COMPLETE, {"step": step})


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest ``checkpoint-<step>`` that was written to its end, or None."""
    found = []
    for item in Path(output_dir).glob("checkpoint-*"):
        step = item.name.rpartition("-")[2]
        if step.isdigit() and (item / COMPLETE).is_file():
            found.append((int(step), item))
    return max(found)[1] if found else None


def check_output_dir(output_dir: str | Path, resume: Resume) -> None:
    """UserError for a file, and for a directory that holds files unless resuming.

    To be called first, by one process. Nothing is created, so that a command that is refused for
    another reason finds the directory as before when it was corrected; when resuming, what a
    killed process left there is cleared away, and what it had set aside is put back.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(
            f"output_dir: expected a directory, got the file {path}; choose another name"
        )
    if not path.is_dir():
        return
    if _resumes(resume):
        _mend(path)
    elif any(path.iterdir()):
        raise UserError(
            f"output_dir: expected a new or empty directory, got {path} with "
            f"{len(list(path.iterdir()))} entries; choose another name, or go on with "
            "--resume_from_checkpoint true"
        )


def _mend(directory: Path) -> None:
    for old, place in files.left_behind(directory, "old"):
        cut_off = (old / COMPLETE).is_file() and not (place / COMPLETE).is_file()
        if cut_off:
            files.remove(place)
        if not place.exists():
            os.replace(old, place)
    for kind in ("new", "old"):
        for item, _ in files.left_behind(directory, kind):
            files.remove(item)


def resolve_resume(output_dir: str | Path, resume: Resume) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` names: true, or a path.

    ``true`` with no complete checkpoint starts from the beginning, so that one command line can be
    repeated until it has finished.
    """
    if not _resumes(resume):
        return None
    if str(resume).lower() in ("true", "yes"):
        return last_checkpoint(output_dir)
    path = Path(str(resume))
    if not (path / COMPLETE).is_file():
        raise UserError(
            f"resume_from_checkpoint: expected a complete checkpoint directory, got {path} "
            f"without {COMPLETE}; pass 'true' for the newest complete one"
        )
    return path


def _resumes(resume: Resume) -> bool:
    return str(resume).lower() not in ("", "none", "false", "no")


def check_room(
    output_dir: str | Path,
    checkpoint_bytes: int,
    final_bytes: int,
    n_checkpoints: int,
    save_total_limit: int | None = None,
) -> str | None:
    """Whether the disk of ``output_dir`` takes what a run is about to write there.

    DiskFullError when not even one checkpoint (where there is to be any) and the final model fit;
    a warning to print when those do but not all of the ``n_checkpoints`` that will stand there at
    one time; else None. Sizes are in bytes.
    """
    if save_total_limit:
        # An older checkpoint goes when the newer one is complete.
        n_checkpoints = min(n_checkpoints, save_total_limit + 1)
    disk = Path(output_dir).absolute()
    while not disk.exists():
        disk = disk.parent
    free = shutil.disk_usage(disk).free
    least = final_bytes + (checkpoint_bytes if n_checkpoints else 0)
    if free < least:
        raise DiskFullError(
            f"output_dir: expected room for {'a checkpoint and ' if n_checkpoints else ''}the "
            f"final model, {_size(least)}, got {_size(free)} free in {disk}; free space or choose "
            "a directory on another disk"
        )
    whole = final_bytes + n_checkpoints * checkpoint_bytes
    if free < whole:
        return (
            f"output_dir: {n_checkpoints} checkpoints and the final model take {_size(whole)}, and "
            f"{disk} has {_size(free)} free; keep fewer with --save_total_limit"
        )
    return None


@contextmanager
def saving(what: str, directory: str | Path, remedy: str | None = None) -> Iterator[None]:
    """Turns a write that failed for lack of space into one clear DiskFullError.

    Without ``remedy``, ``directory`` is a run's output_dir, and its checkpoints are the remedy.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        if remedy is None:
            last = last_checkpoint(directory)
            newest = f"is {last}" if last else "does not exist"
            remedy = (
                f"the newest complete checkpoint {newest}; free space and go on with "
                "--resume_from_checkpoint true"
            )
        raise DiskFullError(
            f"disk full while saving {what} in {directory} "
            f"({_size(shutil.disk_usage(directory).free)} free); what was there is intact, {remedy}"
        ) from error


# The third is a limit that the user or the file system sets for one file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Safetensors and tokenizers name the error's number; torch.save and NumPy have words of their own.
_FAILED_WRITE = re.compile(
    r"PytorchStreamWriter failed|inline_container.* unexpected pos|\d+ requested and \d+ written"
)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for lack of space, by whatever library's exception."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    said = str(error)
    return any(f"os error {code})" in said for code in _FULL) or bool(_FAILED_WRITE.search(said))


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"
