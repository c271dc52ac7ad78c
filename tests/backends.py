"""The backends of the tests, each with the device that its kernels run on."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor


class Backend(str):
    """The name of a backend, and its device."""

    device: str

    def __new__(cls, name: str, device: str = "cpu") -> Backend:
        self = super().__new__(cls, name)
        self.device = device
        return self

    def place(self, *values: Tensor | float | None) -> list[Tensor | float | None]:
        """The same with the tensors on the device, views with the strides that they have."""
        return [self._move(v) if isinstance(v, Tensor) else v for v in values]

    def _move(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad or self.device == "cpu":
            return tensor.to(self.device)
        storage = tensor.new_empty(0).set_(tensor.untyped_storage()).to(self.device)
        return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _triton(device: str, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(
        Backend("triton", device), marks=[pytest.mark.triton, *marks], id=f"triton-{device}"
    )


REFERENCE = Backend("reference")
NATIVE = Backend("native")
TRITON = (_triton("cpu", pytest.mark.interpreter), _triton("cuda", pytest.mark.gpu))
