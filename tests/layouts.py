"""How weights [copies, .., C] may lie in memory: it changes no bit, and nothing beyond them is read."""

from __future__ import annotations

import ctypes
import mmap

import torch
from oracle import Network

# those of a diagonal block are few beside the pairs that have none
NETWORK = Network((18, 7, 3), (("dense", 0, 1), ("dense", 1, 2), ("diagonal", 0, 2)))


def transposed(w: torch.Tensor) -> torch.Tensor:
    """As the (out, in) parameter of a Linear layer."""
    return w.transpose(1, 2).contiguous().transpose(1, 2)


def shifted(w: torch.Tensor) -> torch.Tensor:
    """A view into a larger buffer that starts in its middle."""
    buffer = torch.full((w.numel() + 7,), torch.nan, dtype=w.dtype)
    buffer[5 : 5 + w.numel()] = w.flatten()
    return buffer[5 : 5 + w.numel()].view(w.shape)


def sliced(w: torch.Tensor) -> torch.Tensor:
    """Every second row and column of a larger tensor, whose channels are more."""
    copies, *shape, channels = w.shape
    big = torch.full((copies, *(2 * n for n in shape), channels + 1), torch.nan, dtype=w.dtype)
    view = big[(slice(None), *[slice(1, None, 2)] * len(shape), slice(-1))]
    view.copy_(w)
    return view


def channels_first(w: torch.Tensor) -> torch.Tensor:
    """As a convolution's weight: channels in front."""
    order = [w.dim() - 1, *range(w.dim() - 2, -1, -1)]  # destinations before sources
    return w.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())


def guarded(w: torch.Tensor) -> torch.Tensor:
    """Up to the end of a page of memory: whoever reads beyond faults."""
    size, page = w.numel() * w.element_size(), mmap.PAGESIZE
    own = -(-size // page) * page
    memory = mmap.mmap(-1, own + page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + own
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(end), page, 0) == 0
    return torch.frombuffer(memory, dtype=w.dtype, count=w.numel(), offset=own - size).view_as(w).copy_(w)


def guarded_transposed(w: torch.Tensor) -> torch.Tensor:
    return guarded(w.transpose(1, 2).contiguous()).transpose(1, 2)


LAYOUTS = (transposed, shifted, sliced, channels_first, guarded, guarded_transposed)
