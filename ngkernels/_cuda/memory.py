"""What a block of threads has of working memory, and which of it lies in shared memory."""

from __future__ import annotations

from .lower import FROM_NORM, WIDTHS, Lowered, Unsupported
from .plan import WARPS

PLACES = ("features", "arrivals", "stash", "carry", "statistics", "sources", "sums", "waiting", "scores", "copied", "constants_copied", "staged", "gradients")  # args.h
# In this order as far as there is room, those first that kernels read with ldmatrix or cp.async.
SHARED_FIRST = ("constants_copied", "features", "arrivals", "scores", "staged", "carry", "statistics", "stash", "sources", "waiting", "sums", "copied", "gradients")
STATISTIC_PLANES, MESSAGE_PLANES, HERMITE, LANES, AHEAD, BAND = 6, 7, 16, 32, 2, 4


def sides(low: Lowered) -> int:
    """Edges, and their partners where they are evaluated too."""
    return 2 if low.live else 1


def sum_columns(low: Lowered) -> int:
    """Of a partial row of the way back: of the node terms' gradients by side, then those of q, or of k and v."""
    return low.columns * sides(low) + 2 * low.d * (low.attention is not None)


def piece_bytes(channels: int) -> int:
    """Of one source's edge values, to as many destinations as come together, in whole lines: csrc/cuda/arrivals.h."""
    return (channels * (BAND if channels < BAND else 1) * 4 + 27) // 16 * 16


def feature_row(channels: int) -> int:
    """Numbers from one edge's raw features to the next one's: csrc/cuda/inputs.h."""
    return channels if channels < 8 else (channels + 3) // 8 * 8 + 4


def sizes(low: Lowered, precision: str, backward: bool) -> dict[str, int]:
    """Bytes of each kind of working memory of a block of threads."""
    kb, warp = low.d // 16, 4 * WARPS
    element = 2 if precision == "bf16" else 4
    found = {
        "features": warp * 16 * (2 * feature_row(low.channels) + (HERMITE if low.steps >= 0 else 0)) * sides(low),
        "arrivals": WARPS * AHEAD * sides(low) * (16 * piece_bytes(low.channels) + 16 * 4),
        "stash": warp * low.slots * kb * 256 * sides(low),
        "carry": WARPS * kb * LANES * 8 * element * (4 if low.full else 3),
        "copied": low.matrices.size * element,
        "constants_copied": 4 * low.constants.size,
    }
    if low.attention:  # csrc/cuda/attention.h
        found["scores"] = warp * (16 * (low.d + 1) + 3 * 17 * low.attention.heads)
    if not backward:
        planes = (STATISTIC_PLANES + 1) * -(-low.width // 16)
        if low.attention:
            planes = -(-low.attention.d_v // 16) + low.attention.heads * kb * low.attention.summed
        return found | {"statistics": warp * planes * LANES * 4}
    held = any(s.held or s.source == FROM_NORM for s in low.stages)
    return found | {
        "sources": warp * sum_columns(low) * 16,
        "sums": warp * low.n_sums * LANES * 4,
        "waiting": warp * kb * 256 * sides(low) * held,
        "staged": (max(low.buffers) + 1) * WARPS * 16 * (low.d + 8) * element,
        "gradients": 4 * low.n_gradients * kb * kb * 256,
    }


def placed(low: Lowered, precision: str, backward: bool, limit: int) -> tuple[dict[str, tuple[int, int]], dict[str, int], int]:
    """(offset and size of what lies in shared memory, bytes of what a block has in global memory, elements of the matrices copied).

    Args:
        limit: bytes of shared memory of a block of threads.

    Raises:
        Unsupported: what must lie in shared memory does not fit.
    """
    used, copied = 0, 0
    inside, outside, found = {}, {}, sizes(low, precision, backward)
    always = {"constants_copied", "features", "arrivals", "scores"} | ({"staged"} if precision == "bf16" and low.d < WIDTHS[-1] else set())
    for name in SHARED_FIRST:
        size = -(-found.get(name, 0) // 128) * 128
        if not size:
            continue
        if used + size <= limit:
            inside[name] = (used, size)
            used += size
            copied = low.matrices.size if name == "copied" else copied
        elif name in always:
            raise Unsupported(f"{name} of {size} bytes beside {used} in {limit} bytes of shared memory: registers this wide, rounded to {precision},")
        elif name != "copied":
            outside[name] = size
    return inside, outside, copied
