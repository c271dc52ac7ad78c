"""Where the host would wait for a GPU, seen on a CPU."""

import inspect
import os
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from segrlhf import presets
from segrlhf.data import batch


class Waits(TorchDispatchMode):
    """Counts the calls of segrlhf's own lines that would make the host wait for a GPU."""

    HOME = str(Path(presets.__file__).parent)
    # The last makes a tensor of numbers, which would have to be copied to the device.
    WAITS = ("nonzero", "masked_select", "_local_scalar_dense", "equal", "lift_fresh")
    # Its tensors are made on the host, and their copies queued.
    ON_THE_HOST = str(Path(batch.__file__))

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if name in self.WAITS or by_mask:
            file = self._file()
            ours = file.startswith(self.HOME)
            self.count += ours and not (name == "lift_fresh" and file == self.ON_THE_HOST)
            import traceback

            traceback.print_stack(limit=14)
            print(name)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _file():
        """Where the innermost line outside torch stands."""
        frame = inspect.currentframe().f_back.f_back
        while f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
            frame = frame.f_back
        return frame.f_code.co_filename
