"""Which checkpoints are whole, which output directories are free, and room on the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import DiskFullError, UserError, reading
from . import files

COMPLETE = "complete.json"  # the last file of a checkpoint; one without it was cut off

Resume = str | bool | None  # --resume_from_checkpoint: true, false, or a checkpoint's path


_NAME = re.compile(r"checkpoint-(\d+)", re.ASCII)


def mark_complete(checkpoint: str | Path, step: int) -> None:
    """Call when everything else of a checkpoint is written; first that is brought to the disk.

    Size and CRC-32 of each file are kept, by which ``check_files`` and ``check_contents`` know it.
    """
    root = Path(checkpoint)
    files.remove(root / COMPLETE)  # of before, where a checkpoint was changed by hand
    names = sorted(str(item.relative_to(root)) for item in root.rglob("*") if item.is_file())
    for name in names:
        with open(root / name, "rb") as handle:
            os.fsync(handle.fileno())
    sums = _checksums(root, names)
    saved = {name: [(root / name).stat().st_size, sums[name]] for name in names}
    files.write_json(root / COMPLETE, {"step": step, "files": saved})


def _checksums(root: Path, names: list[str]) -> dict[str, int]:
    def checksum(name: str) -> int:
        found = 0
        with open(root / name, "rb", buffering=0) as handle:
            while part := handle.read(1 << 22):
                found = zlib.crc32(part, found)
        return found

    with ThreadPoolExecutor(4) as pool:  # both reading and summing leave the GIL
        return dict(zip(names, pool.map(checksum, names), strict=True))


def check_files(checkpoint: Path) -> dict[str, list[int]]:
    """UserError unless all files of a complete checkpoint are there, of the sizes they were saved
    with; reads none but ``complete.json``. Returns size and checksum of each."""
    if not (checkpoint / COMPLETE).is_file():
        raise UserError(
            f"resume_from_checkpoint: expected a complete checkpoint directory, got {checkpoint} "
            f"without {COMPLETE}; pass 'true' for the newest complete one"
        )
    with reading("resume_from_checkpoint", "what was saved", checkpoint / COMPLETE, _instead()):
        kept: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        saved = {name: [int(number) for number in pair] for name, pair in kept["files"].items()}
        if any(len(pair) != 2 for pair in saved.values()):
            raise ValueError("no sizes and checksums of files")
    for name, (size, _) in saved.items():
        path = checkpoint / name
        if not path.is_file():
            raise _damaged(checkpoint, name, "something else" if path.exists() else "none")
        if (now := path.stat().st_size) != size:
            raise _damaged(checkpoint, name, f"{now} bytes instead of {size}")
    return saved


def check_contents(checkpoint: Path) -> None:
    """UserError unless every byte of a checkpoint is as it was saved: for one process."""
    saved = check_files(checkpoint)
    with reading("resume_from_checkpoint", "a checkpoint", checkpoint, _instead()):
        sums = _checksums(checkpoint, list(saved))
    for name, (_, checksum) in saved.items():
        if sums[name] != checksum:
            raise _damaged(checkpoint, name, "other contents than were saved")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete, and every byte as it was saved."""
    try:
        check_contents(checkpoint)
    except UserError:
        return False
    return True


def _damaged(checkpoint: Path, name: str, got: str) -> UserError:
    return UserError(
        f"resume_from_checkpoint: expected {name} in {checkpoint}, got {got}; without what was "
        f"saved the run would go on as another one: {_instead()}"
    )


def _instead() -> str:
    return (
        "move that checkpoint away, and --resume_from_checkpoint true goes on from the one before"
    )


def numbered_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every directory called ``checkpoint-<step>``, oldest first; copies that
    somebody made under longer names are none."""
    found = [
        (int(match[1]), item)
        for item in Path(output_dir).glob("checkpoint-*")
        if (match := _NAME.fullmatch(item.name)) and item.is_dir()
    ]
    return sorted(found)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest ``checkpoint-<step>`` that was written to its end, or None."""
    complete = [p for _, p in numbered_checkpoints(output_dir) if (p / COMPLETE).is_file()]
    return complete[-1] if complete else None


def drop_old_checkpoints(
    output_dir: str | Path, limit: int | None, keep: str | Path | None = None
) -> None:
    """Removes the oldest checkpoints until ``limit`` are left, never the newest nor ``keep``;
    None removes none."""
    if limit is None:
        return
    paths = [path for _, path in numbered_checkpoints(output_dir)]
    old = [p for p in paths[:-1] if keep is None or p.resolve() != Path(keep).resolve()]
    for path in old[: max(len(paths) - limit, 0)]:
        files.remove(path)


def check_newest(output_dir: str | Path, checkpoint: Path) -> None:
    """UserError where ``output_dir`` has newer checkpoints than the one from which a run is about
    to go on with other settings: the next resumption would take them for this run's."""
    steps = {path.resolve(): step for step, path in numbered_checkpoints(checkpoint.parent)}
    step = steps.get(checkpoint.resolve(), -1)
    newer = [path.name for at, path in numbered_checkpoints(output_dir) if at > step >= 0]
    if newer:
        raise UserError(
            f"resume_from_checkpoint: expected the newest checkpoint of {output_dir} to go on from "
            f"with other settings, got {checkpoint}, and {', '.join(newer)} beside it, which would "
            "be taken for this run's; move those away, or choose a new output_dir"
        )


@contextmanager
def claimed(output_dir: str | Path, here: bool = True) -> Iterator[None]:
    """Holds ``output_dir`` for the runs of one command; UserError where another one has it.

    The directory is made, and removed again by a block that left it empty. To be called before
    ``check_output_dir``, with ``here`` on one process of a launch. File systems that have no locks
    of directories are not guarded.
    """
    path = Path(output_dir)
    if not here or (path.exists() and not path.is_dir()):
        yield
        return
    made = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"output_dir: expected a directory that no other run is using, got {path}; wait "
                "for its end, or choose another name"
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
        with suppress(OSError):  # the first that is not empty
            for place in made:
                place.rmdir()


def check_output_dir(output_dir: str | Path, resume: Resume, sign: str) -> None:
    """UserError for a file, and for a directory that holds files unless resuming; then for one
    with a model in it that is not from a run of this command, which leaves a file named ``sign``.

    To be called first, by one process. Nothing is created, so that a command that is refused for
    another reason finds the directory as before when it was corrected; when resuming, what a
    killed process left there is cleared away, and what it had set aside is put back.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(
            f"output_dir: expected a directory, got the file {path}; choose another name"
        )
    if _resumes(resume):
        if path.is_dir():
            _mend(path)
        found = _found(path, resume)
        if found is None and (path / "config.json").exists() and not (path / sign).exists():
            raise UserError(
                f"output_dir: expected a directory of the run that is to go on, got {path} with a "
                f"model, but neither a checkpoint nor {sign}; choose another name"
            )
    elif path.is_dir() and any(path.iterdir()):
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
    """The checkpoint that ``--resume_from_checkpoint`` names: true, or a path; says which.

    ``true`` with no complete checkpoint starts from the beginning, so that one command line can be
    repeated until it has finished. Raises UserError for one with other files than were saved.
    """
    if not _resumes(resume):
        return None
    found = _found(output_dir, resume)
    if _newest(resume) and os.environ.get("RANK", "0") == "0":
        text = (
            f"resuming from {found}" if found else f"nothing to resume in {output_dir}: a new run"
        )
        checkpoints = [path for _, path in numbered_checkpoints(output_dir)]
        newer = checkpoints[checkpoints.index(found) + 1 :] if found else checkpoints
        if newer:
            names = ", ".join(path.name for path in newer)
            text += f" (without {names}, cut off before {COMPLETE} was written)"
        print(text, flush=True)
    return found


def _found(output_dir: str | Path, resume: Resume) -> Path | None:
    found = last_checkpoint(output_dir) if _newest(resume) else Path(str(resume))
    if found is not None:
        check_files(found)
    return found


def _newest(resume: Resume) -> bool:
    return str(resume).lower() in ("true", "yes")


def _resumes(resume: Resume) -> bool:
    return str(resume).lower() not in ("", "none", "false", "no")


def check_not_beyond(done: int, end: int, unit: str) -> None:
    """UserError for a checkpoint of more steps than the run is to have."""
    if done > end:
        raise UserError(
            f"resume_from_checkpoint: expected a checkpoint of at most {unit} {end}, where this "
            f"run ends, got one of {unit} {done}; name an older one, or let the run go further"
        )


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
