"""``segrlhf <command>``: runs a command, and says what went wrong in one line."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from contextlib import suppress

from .configs import Range
from .errors import (
    EXIT_DISK,
    EXIT_FAULT,
    EXIT_NON_FINITE,
    EXIT_PIPE,
    EXIT_SIGNAL,
    EXIT_STATUS,
    EXIT_USER,
    DiskFullError,
    NonFiniteError,
    UserError,
    first_line,
)
from .flags import COMMANDS, parse
from .runtime.checkpoints import is_disk_full
from .runtime.interrupt import Interrupt

# Numbers that launchers pass by the environment, read here and by torch and accelerate.
ENVIRONMENT = {
    "WORLD_SIZE": Range(min=1),
    "RANK": Range(min=0),
    "LOCAL_WORLD_SIZE": Range(min=1),
    "LOCAL_RANK": Range(min=-1),
    "MASTER_PORT": Range(min=0, max=65535),
    "OMP_NUM_THREADS": Range(min=1),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; its exit status, see ``EXIT_STATUS``."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as by >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no letter is worth a run
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE


def _main(argv: list[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("segkernels"))
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return _fail("", f"expected one of {', '.join(COMMANDS)}, got {name!r}{hint}", EXIT_USER)
    try:
        _check_environment()
        with Interrupt():
            configs = parse(name, rest)
            importlib.import_module(f".{COMMANDS[name].module}", __package__).run(*configs)
    except UserError as error:
        return _fail(name, error, EXIT_USER)
    except NonFiniteError as error:
        return _fail(name, error, EXIT_NON_FINITE)
    except KeyboardInterrupt as stop:
        text = f"interrupted; {stop}" if str(stop) else "interrupted"
        return _fail(name, text, EXIT_SIGNAL + getattr(stop, "signal", signal.SIGINT))
    except DiskFullError as error:
        return _fail(name, error, EXIT_DISK)
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("SEGRLHF_TRACEBACK", "0") not in ("", "0"):
            raise
        return _fail(name, *_explained(error))
    return 0


def _explained(error: Exception) -> tuple[str, int]:
    """What a library raised, in words for a person, and the exit status."""
    if is_disk_full(error):
        return f"disk full: {error}; what was there before is intact, free some space", EXIT_DISK
    if isinstance(error, OSError):
        return (
            f"file: expected one that can be read or written, got {first_line(error)}; check its "
            "name and permissions",
            EXIT_USER,
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = f"memory: expected enough, got {first_line(error)}; choose smaller batches"
        return text, EXIT_USER
    if isinstance(error, ValueError | ImportError) or type(error).__name__ == "BackendError":
        return f"{first_line(error)}; SEGRLHF_TRACEBACK=1 shows where that was said", EXIT_USER
    return (
        f"unexpected {type(error).__name__}: {first_line(error)}; please report it with what "
        "SEGRLHF_TRACEBACK=1 shows",
        EXIT_FAULT,
    )


def _fail(name: str, error: object, status: int) -> int:
    text = " ".join(str(error).split("\n"))
    print(f"{f'segrlhf {name}'.strip()}: {text}", file=sys.stderr)
    return status


def _check_environment() -> None:
    if asked := os.environ.get("SEGKERNELS_BACKEND"):
        from segkernels.backend import NAMES

        if asked not in NAMES:
            raise UserError(
                f"SEGKERNELS_BACKEND: expected one of {', '.join(NAMES)}, got {asked!r}; unset it "
                "to choose by device"
            )
    for name, limits in ENVIRONMENT.items():
        text = os.environ.get(name, "")
        if not text:
            continue
        # OpenMP takes a list, a number for each level of nesting.
        for word in text.split(",") if name.startswith("OMP_") else [text]:
            number: object = word
            with suppress(ValueError):
                number = int(word)
            if expected := limits.refuses(number, whole=True):
                raise UserError(
                    f"{name}: expected {expected} in the environment, got {text!r}; unset it, or "
                    "let torchrun or accelerate launch set it"
                )


def _usage() -> str:
    lines = ["usage: segrlhf <command> [--config run.yaml] [--preset NAME] [flags]", ""]
    lines += [f"  {name:15} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "segrlhf <command> --help lists the flags of a command.", "", EXIT_STATUS]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
