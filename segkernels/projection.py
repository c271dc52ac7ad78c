"""Products of hidden states with the output projection, piece by piece in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import native
from .layout import check_floats

# Bytes of extra memory where the caller sets none, the gradients apart.
WORKSPACE = {"native": 64 << 20, "triton": 512 << 20}


@dataclass(frozen=True)
class Tiling:
    """How the products are cut into tiles of logits; only benchmarks set others than these."""

    tile: float  # share of the workspace that a tile of logits may take
    # Where not all fit: slices of the vocabulary have a multiple of so many columns, chunks of the
    # policy loss so many rows. 0: on GPUs as ``Space`` finds best, on CPUs what memory allows.
    columns: int = 0
    rows: int = 0


# On CPUs the row kernels shall find the tile in the cache.
TILINGS = {"native": Tiling(1 / 16), "triton": Tiling(3 / 4)}

# What a processor of a GPU computes of a product at a time, rows by columns.
BLOCK = (128, 256)
PROCESSORS = 132  # of an H100; where Triton's interpreter takes the place of a GPU


@dataclass(frozen=True)
class Space:
    """Memory that one pass may take, the dtype that it computes logits in, and their tiles.

    CPUs compute in fp32: most have no half-precision product, and torch's is many times slower
    there. GPUs compute in the hidden states' dtype, as the model itself does.
    """

    dtype: torch.dtype
    total: int  # bytes
    tiling: Tiling
    gpu: torch.device | None  # None computes as CPUs do

    @classmethod
    def of(cls, backend: str, workspace: int | None, hidden: Tensor) -> Space:
        total = WORKSPACE[backend] if workspace is None else workspace
        if backend == "native":
            return cls(torch.float32, total, TILINGS[backend], None)
        return cls(hidden.dtype, total, TILINGS[backend], hidden.device)

    def beside(self, kept: Tensor) -> Space:
        """What these logits leave of it."""
        return replace(self, total=self.total - kept.nbytes)

    def row_stride(self, columns: int) -> int:
        """Elements from one row of logits to the next.

        On GPUs a multiple of 64, so that every row is aligned for vector loads and for the
        products, whatever the vocabulary; rows shorter than that stay as they are.
        """
        return columns if self.gpu is None or columns < 64 else -(-columns // 64) * 64

    @property
    def _processors(self) -> int:
        """Of the GPU, which compute a block of a product each at a time."""
        if self.gpu is None or self.gpu.type != "cuda":
            return PROCESSORS
        return torch.cuda.get_device_properties(self.gpu).multi_processor_count

    @property
    def _tile(self) -> int:
        """Elements of the largest tile."""
        return int(self.total * self.tiling.tile) // self.dtype.itemsize

    @property
    def _panel(self) -> int:
        """Bytes of hidden states, of a slice of the weight, or of one of its gradient."""
        return self.total * 3 // 16

    def height(self, rows: HiddenRows) -> int:
        """Rows of a tile that is a slice of the columns: all, or as many as fit."""
        # At most four times as many as its columns: the products want neither side short.
        most = max(1, 2 * math.isqrt(self._tile))
        if rows.copies:
            most = min(most, self._panel // (self.dtype.itemsize * rows.hidden.shape[-1]))
        return even_part(rows.count, most, 1 if self.gpu is None else BLOCK[0])

    def columns(self, height: int, rows: HiddenRows, weight: Tensor, sums: bool = False) -> int:
        """Columns of such a tile, and of slices of the weight and ``sums`` of its gradient."""
        size, (vocabulary, hidden_size) = self.dtype.itemsize, weight.shape
        copied = height * hidden_size * size if rows.copies else 0
        per_column = height * size
        most = self._tile // height
        if Projection.copies(weight, self.dtype):
            most = min(most, self._panel // (hidden_size * size))
            per_column += hidden_size * size
        if sums:
            most = min(most, self._panel // (hidden_size * 4))
            per_column += hidden_size * 4
        # A sixteenth is left to the few numbers per row, and to the buffers of the products.
        most = min(most, (self.total - self.total // 16 - copied) // per_column)
        if self.row_stride(vocabulary) <= most:
            return vocabulary
        if self.gpu is None:
            return even_part(vocabulary, most, 128)
        # dW has a block for every BLOCK of these columns and of the hidden size. A quarter as many
        # along the columns as there are processors leave none idle, where a multiple of four is
        # along the hidden size.
        width = self.tiling.columns or BLOCK[1] * self._processors // 4
        return most // width * width if width <= most else even_part(vocabulary, most, 128)

    def chunk(self, count: int, least: int, most: int, hidden_size: int) -> int:
        """Rows of a tile of whole rows, ``least`` to ``most``: ``count`` or a share of these.

        On GPUs as many as leave the fewest processors idle while dX is computed, which has few
        blocks: one for every BLOCK of these rows and of the hidden states.
        """
        if count <= most or self.gpu is None or most < BLOCK[0]:
            return even_part(count, most, 128)
        if self.tiling.rows:
            return min(self.tiling.rows, most)
        processors = self._processors

        def busy(rows: int) -> float:
            blocks = rows // BLOCK[0] * -(-hidden_size // BLOCK[1])
            return blocks / (-(-blocks // processors) * processors)

        # Each chunk reads the weight: none is less than half of what could be.
        least = max(least, most // 2, BLOCK[0])
        heights = range(-(-least // BLOCK[0]) * BLOCK[0], most + 1, BLOCK[0])
        return max(
            heights, key=lambda rows: (busy(rows), rows), default=even_part(count, most, 128)
        )


def room_for_logits(hidden: Tensor, weight: Tensor, workspace: int | None, backend: str) -> bool:
    """Whether all logits fit half the workspace: kept from the forward pass, they save the
    backward pass one product of four."""
    space = Space.of(backend, workspace, hidden)
    rows, stride = hidden.numel() // weight.shape[1], space.row_stride(weight.shape[0])
    fits = 2 * rows * stride * space.dtype.itemsize <= space.total
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(fits)
    return fits


def even_part(count: int, most: int, multiple: int = 1) -> int:
    """Size of the parts, at most ``most``, that ``count`` falls into evenly; a multiple of
    ``multiple`` where that fits."""
    parts = -(-count // max(most, 1))
    size = max(1, -(-count // max(parts, 1)))
    rounded = -(-size // multiple) * multiple
    return rounded if rounded <= min(most, count) else size


def parts_of(count: int, size: int) -> Iterator[slice]:
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def check_workspace(workspace: int | None) -> None:
    if workspace is None:
        return
    if not isinstance(workspace, int):
        raise TypeError(
            f"workspace: expected a number of bytes, got {type(workspace).__name__}; "
            "None takes the default"
        )
    if workspace <= 0:
        raise ValueError(
            f"workspace: expected a positive number of bytes, got {workspace}; "
            "None takes the default"
        )


def check_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floats("hidden", hidden)
    check_floats("weight", weight)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(
            f"hidden: expected shape [..., hidden size], got {list(hidden.shape)}; "
            "pass the last hidden state of every token"
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape [vocabulary, {hidden.shape[-1]}] to fit hidden, got "
            f"{list(weight.shape)}; pass lm_head.weight"
        )
    if weight.device != hidden.device:
        raise ValueError(
            f"weight: expected device {hidden.device} like hidden, got {weight.device}; "
            "move it with .to(hidden.device)"
        )
    if bias is None:
        return
    check_floats("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected shape {list(weight.shape[:1])} to fit weight, got "
            f"{list(bias.shape)}; pass lm_head.bias, or None"
        )
    if bias.device != hidden.device:
        raise ValueError(
            f"bias: expected device {hidden.device} like hidden, got {bias.device}; "
            "move it with .to(hidden.device)"
        )


def may_synchronise(tensor: Tensor) -> bool:
    """Not while a CUDA graph is captured: the host then learns nothing from the device."""
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


class HiddenRows:
    """The rows of hidden [..., D] that take part in the products, those that ``keep`` names.

    The others are left out, for which the host must learn how many there are: on a GPU one
    synchronisation. Where that may not be, all take part, and ``mask`` tells the row kernels which
    to pass over; their hidden states are read as zeros, since 0 times NaN is no 0.
    """

    def __init__(self, hidden: Tensor, keep: Tensor | None, dtype: torch.dtype):
        self.shape = hidden.shape[:-1]
        self.hidden = hidden if hidden.dim() > 1 else hidden[None]
        self.dtype = dtype
        self.index: Tensor | None = None  # of the rows that take part; None for all, in order
        self.mask: Tensor | None = None
        total = self.shape.numel()
        if keep is not None and may_synchronise(hidden):
            index = keep.reshape(-1).nonzero().squeeze(1)
            self.index = index if len(index) < total else None
        elif keep is not None:
            self.mask = keep.reshape(-1).contiguous()
        if self.index is None and not hidden.is_contiguous():
            self.index = torch.arange(total, device=hidden.device)
        self.count = total if self.index is None else len(self.index)
        self.copies = self.index is not None or self.mask is not None or self.hidden.dtype != dtype
        self._held: tuple[slice, Tensor] | None = None

    def read(self, block: slice) -> Tensor:
        """[B, D] hidden states of some of the rows."""
        if self._held is None or self._held[0] != block:
            self._held = None  # before the next is allocated
            self._held = block, self._read(block)
        return self._held[1]

    def _read(self, block: slice) -> Tensor:
        if self.index is None:
            x = self.hidden.view(-1, self.hidden.shape[-1])[block]
        else:
            x = self.gather(self.index[block])
        if self.mask is not None:
            x = x.masked_fill(~self.mask[block, None], 0)
        return x.to(self.dtype)

    def gather(self, positions: Tensor) -> Tensor:
        """[B, D] hidden states of rows that stand at these positions among all of hidden's."""
        x = self.hidden[torch.unravel_index(positions, self.hidden.shape[:-1])]
        return x.to(self.dtype)

    def positions(self, block: slice) -> Tensor:
        """[B] where some of the rows stand among all of hidden's."""
        if self.index is not None:
            return self.index[block]
        return torch.arange(block.start, block.stop, device=self.hidden.device)

    def take(self, values: Tensor) -> Tensor:
        """[count, *] of values [..., *] in the shape of hidden's rows, contiguous."""
        flat = values.reshape(-1, *values.shape[len(self.shape) :])
        return flat.contiguous() if self.index is None else flat[self.index]

    def put(self, values: Tensor) -> Tensor:
        """[..., *] of values [count, *] in the shape of hidden's rows, 0 for the other rows."""
        if self.index is not None:
            full = values.new_zeros(self.shape.numel(), *values.shape[1:])
            values = full.index_copy_(0, self.index, values)
        return values.view(self.shape + values.shape[1:])

    def scatter(self, out: Tensor, size: int) -> None:
        """Moves rows [0, count) of out [rows of hidden, *] to their places; the others get 0.

        In place: no row moves towards the front, so going from the last to the first overwrites
        none that has yet to move.
        """
        if self.index is None:
            return
        for block in reversed(list(parts_of(self.count, size))):
            out[self.index[block]] = out[block].clone()
        empty = torch.ones(len(out), dtype=torch.bool, device=out.device)
        empty[self.index] = False
        out.masked_fill_(empty[:, None], 0)


class Projection:
    """The output projection in slices of the vocabulary."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, columns: int):
        self.weight = weight
        self.bias = None if bias is None else bias.to(dtype)
        self.columns = columns
        self.panel = self.scratch(dtype) if self.copies(weight, dtype) else None

    @staticmethod
    def copies(weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether a slice of the weight is copied before the products take it.

        Those of other strides than rows one after the other, too: they may be summed in another
        order, so that equal numbers would not give equal results.
        """
        return weight.dtype != dtype or not weight.is_contiguous()

    def scratch(self, dtype: torch.dtype) -> Tensor:
        return native.empty(self.weight, self.columns, self.weight.shape[1], dtype=dtype)

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, weight [C, D] of them); valid until the next."""
        for part in parts_of(self.weight.shape[0], self.columns):
            panel = self.weight[part]
            if self.panel is not None:
                panel = self.panel[: len(panel)].copy_(panel)
            yield part, panel

    def logits(self, x: Tensor, part: slice, panel: Tensor, out: Tensor) -> None:
        """[B, C] of hidden states [B, D]."""
        if self.bias is None:
            torch.mm(x, panel.t(), out=out)
        else:
            torch.addmm(self.bias[part], x, panel.t(), out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
    """out += a b, or = where it starts; summed in fp32 and rounded to the dtype of out once."""
    beta = 0 if start else 1
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:  # the interpreter of Triton; torch has no such product for CPUs
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
