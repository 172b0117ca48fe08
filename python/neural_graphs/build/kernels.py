"""Convolution kernels of unequal size as edge features of one length."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pad_kernel(kernel: torch.Tensor, max_kernel: tuple[int, int]) -> torch.Tensor:
    """`kernel` in the middle of zeros, flattened row by row: the features of each channel pair's edge.

    Of p missing rows (or columns), floor(p / 2) go before the kernel and the rest after it.

    Args:
        kernel: [..., kh, kw], floating; (in, out, kh, kw) for a transposed torch.nn.Conv2d weight.
        max_kernel: (KH, KW), at least (kh, kw).

    Returns:
        Tensor [..., KH KW], same dtype, differentiable.

    Raises:
        ValueError: no such axes, a kernel beyond max_kernel.

    Note: unlike the reference code, rows and columns are not mixed up where kernels are not square.

    Reference: Kofinas et al., ICLR 2024, appendix on convolutional networks.
    """
    if kernel.dim() < 2:
        raise ValueError(f"pad_kernel: expected kernel of shape (*, kh, kw), got {tuple(kernel.shape)}")
    rows, columns = (m - k for m, k in zip(max_kernel, kernel.shape[-2:], strict=True))
    if min(rows, columns) < 0:
        raise ValueError(
            f"pad_kernel: expected a kernel of at most {tuple(max_kernel)}, got {tuple(kernel.shape[-2:])}; use a larger max_kernel"
        )
    padded = F.pad(kernel, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))  # last axis first
    return padded.flatten(-2)
