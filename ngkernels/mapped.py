"""Files in memory: tensors that are views of a file, whose pages the C++ kernels give back once they are done with them.

A kernel reads raw weights in place, piece by piece; of a mapped tensor it hands back the pages of each finished row panel, so that a
network of any size takes the memory of a few panels. What is computed is bit by bit what it is for tensors in memory. Gradients of mapped
weights go to a file of the same layout: see `MappedFile.open_gradients`.
"""

from __future__ import annotations

import bisect
import errno
import math
import mmap
import os
import shutil
import warnings
from pathlib import Path

import torch

from . import backends, journal

CHUNK = 1 << 20  # bytes that are looked at or added at a time
_files: dict[int, MappedFile] = {}  # by the address where each begins
_starts: list[int] = []


class MappedFile:
    """A file whose bytes are a tensor; until `close`, kernels give its pages back after use.

    Args:
        path: of the file. size: None to read it; else it is made, or opened if it has that size, for writing, and its room on the disk is
            taken at once.

    Raises:
        OSError: it cannot be opened, or the disk has no room for it. NotImplementedError: without the C++ library, or not on Linux.

    Note: a file to be read must not be written meanwhile, here or elsewhere: an in-place operation on its tensors ends the process.
    """

    def __init__(self, path: str | os.PathLike, size: int | None = None):
        reason = backends.why_not("cpp")
        if reason is not None or not hasattr(os, "posix_fallocate"):
            raise NotImplementedError(
                f"MappedFile: expected Linux and the C++ kernels, which give pages back, got none: {reason or os.name}"
            )
        self.path, self.written = Path(path), size is not None
        if size is not None:
            _take_room(self.path, size)
        with open(path, "r+b" if self.written else "rb") as file:
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if self.written else 0)
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=prot)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.begin = self.bytes.data_ptr()
        self.gradients: Gradients | None = None
        self._extremes: dict[tuple, tuple[float, float]] = {}
        torch.ops.ngkernels_C.map_pages(self.bytes, True)
        _files[self.begin] = self
        bisect.insort(_starts, self.begin)

    def close(self, finished: bool = True) -> None:
        """From now on, pages stay. Tensors remain valid. `finished`: gradients are complete; what an interrupted run needs may go."""
        if self.begin in _files:
            torch.ops.ngkernels_C.map_pages(self.bytes, False)
            del _files[self.begin]
            _starts.remove(self.begin)
            if self.gradients is not None:
                self.gradients.close(finished)

    def view(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of `shape` whose values begin at byte `begin`."""
        return self.bytes[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def twin(self, t: torch.Tensor, other: MappedFile) -> torch.Tensor:
        """The tensor that lies in `other` where `t` lies here."""
        at = t.data_ptr() - self.begin
        flat = other.bytes[at : at + extent(t) * t.element_size()].view(t.dtype)
        return flat.as_strided(t.shape, t.stride())

    def extremes(self, t: torch.Tensor) -> tuple[float, float]:
        """Smallest and largest value of `t`; looked at once, some pages at a time. NaN where there is one."""
        key = (t.data_ptr(), t.dtype, extent(t))
        if key not in self._extremes:
            low, high = math.inf, -math.inf
            for chunk in pieces(t.detach()):
                a, b = (float(v) for v in chunk.aminmax())
                low, high = (a, b) if a != a else (min(low, a), max(high, b)) if low == low else (low, high)
                drop(chunk)
            self._extremes[key] = low, high
        return self._extremes[key]

    def open_gradients(self, path: str | os.PathLike) -> Gradients:
        """From now on, gradients of this file's tensors are added up in a file of the same layout instead of in memory.

        Raises:
            OSError: no room on the disk (twice the size of this file is needed: for the sum and for the gradient that comes next).
        """
        self.gradients = Gradients(self, Path(path))
        return self.gradients


class Gradients:
    """Sums of the gradients of a mapped file's tensors, at the same places of another file; bytes that are of no weight stay 0.

    Autograd gets none of them: `tensor.grad` stays None. Sums are made in the order and dtype in which autograd makes them.
    """

    def __init__(self, source: MappedFile, path: Path):
        size, scratch = source.bytes.numel(), path.with_name(path.name + ".next")
        if not journal.is_continued():  # all zeros
            path.unlink(missing_ok=True)
            scratch.unlink(missing_ok=True)
        _check_room(path, 2 * size)
        self.source, self.sums = source, MappedFile(path, size)
        try:
            self.next = MappedFile(scratch, size)
        except OSError:
            self.sums.close()
            raise
        self.seen: set[int] = set()

    def empty_like(self, weight: torch.Tensor) -> torch.Tensor:
        """Where an op writes a gradient."""
        return self.source.twin(weight, self.next)

    def add(self, weight: torch.Tensor, grad: torch.Tensor) -> None:
        """Adds what an op wrote; the first gradient of a weight takes the place of what was there."""
        total, at = self.source.twin(weight, self.sums), weight.data_ptr()
        first = at not in self.seen
        parts = list(zip(pieces(total), pieces(grad), strict=True))
        new = [lambda a=a, b=b: b.clone() if first else a + b for a, b in parts]
        journal.once(new, [a.copy_ for a, _ in parts], lambda k: [drop(t) for t in parts[k]])
        self.seen.add(at)

    def close(self, finished: bool) -> None:
        """The file of sums stays; the other goes, unless the next run continues with it."""
        self.sums.close()
        self.next.close()
        if finished or not journal.is_open():
            self.next.path.unlink(missing_ok=True)


def find(t: torch.Tensor) -> MappedFile | None:
    """The file that `t` lies in, or None."""
    if not _starts or t.device.type != "cpu":
        return None
    k = bisect.bisect_right(_starts, t.data_ptr()) - 1
    if k < 0:
        return None
    file = _files[_starts[k]]
    return file if t.data_ptr() < file.begin + file.bytes.numel() else None


def gradient_like(weight: torch.Tensor) -> torch.Tensor | None:
    """Where the gradient of a weight goes, if that is a file."""
    file = find(weight)
    return None if file is None or file.gradients is None else file.gradients.empty_like(weight)


def take(weight: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor | None:
    """What autograd gets of a gradient: nothing, where it goes to a file."""
    if grad is None or (file := find(weight)) is None or file.gradients is None:
        return grad
    file.gradients.add(weight, grad)
    return None


def extent(t: torch.Tensor) -> int:
    """Numbers from the first to the last of a tensor, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) if t.numel() else 0


def pieces(t: torch.Tensor) -> list[torch.Tensor]:
    """The numbers between the first and the last of `t`, flat, CHUNK bytes at a time."""
    flat = t.as_strided((extent(t),), (1,))
    return list(flat.split(CHUNK // t.element_size()))


def drop(t: torch.Tensor) -> None:
    """Gives the pages of a contiguous tensor of a file back."""
    torch.ops.ngkernels_C.drop_pages(t.view(torch.uint8))


def _check_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    there = sum(p.stat().st_blocks * 512 for p in (path, path.with_name(path.name + ".next")) if p.exists())
    if size > free + there:
        raise OSError(
            errno.ENOSPC, f"stream: expected {size} bytes free in {str(path.parent)!r}, got {free}; make room or choose another folder"
        )


def _take_room(path: Path, size: int) -> None:
    """Makes a file of `size` zeros, unless there is one; what the disk does not have fails now, not on the way."""
    if path.exists() and path.stat().st_size == size:
        return
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    error.errno,
                    f"stream: expected room for {size} bytes in {str(path.parent)!r}, got {error.strerror}; make room or choose another folder",
                ) from error
            raise
