"""How long a chain of updates the Triton kernels evaluate at once. Beyond, registers spill heavily: the CUDA kernels take it where they are there,
else a state is stored first."""

from __future__ import annotations

import torch

from . import backends
from .edges import Activate, EdgeState, Mark, Update

WIDTHS = (32, 64, 128, 1 << 30)  # classes of states: columns of the widest
# Most products of a chain, by class. An update that is a residual one or has a norm is two products, others are one (the matrix behind the
# activation is folded into what follows); a single update is always taken. From the bytes that a thread of gradient_kernel spills in tiles
# of 4 x 4 edges, the worse of sm_80 and sm_90, Triton 3.9 (tests/aot.py); heavy is more than 1024, what its registers hold:
#   bf16        32 columns: 7 products 568   64: 7 products 416   128: 3 products 376    256: 1 product 616
#   exact       32: 5 products 408           64: 3 products 192   128: 1 product 5240 (sm_90: 1944)
#   pairs       attention over edges: one update 992 (32 columns, sm_90), two 1176, three 1464 (16 columns); on sm_80 one update 2176
#               a layer of NG-T, a pair update and an update: 1984 (sm_90), 3824 (sm_80), exact 3344
LOW = {32: 7, 64: 7, 128: 3}
EXACT = {32: 5, 64: 3}
PAIRS = 4  # of a chain with a pair update, of which there is one at most: a layer of NG-T
# Most columns of the CUDA kernels' registers, by bytes of shared memory that a block can have (sm_90 and later, sm_80, others), and raw features.
COLUMNS, CHANNELS = {200_000: 128, 160_000: 64, 0: 32}, 8


def _steps(edges: EdgeState) -> list[Update | Activate]:
    """What is evaluated after the weights or the stored state that the expression starts from."""
    return [s for s in edges.steps if not isinstance(s, Mark)]


def widths(step: Update | Activate) -> tuple[int, ...]:
    return (step.weight_edge.shape[0], step.weight_out.shape[0]) if isinstance(step, Update) else (step.weight.shape[0],)


def products(step: Update | Activate) -> int:
    return 2 if isinstance(step, Update) and (step.residual or step.norm is not None) else 1


def most(edges: EdgeState, exact: bool) -> int:
    """Most products of a chain like this one; 0: of one update alone."""
    steps = _steps(edges)
    if edges.paired:
        return PAIRS
    widest = max(width for s in steps for width in widths(s))
    return (EXACT if exact else LOW).get(next(w for w in WIDTHS if widest <= w), 0)


def too_long(edges: EdgeState, exact: bool, more: int = 0) -> bool:
    """Whether the chain, with `more` updates like its last one, would spill heavily."""
    steps = _steps(edges)
    steps += steps[-1:] * more
    if sum(isinstance(s, Update) for s in steps) <= 1:
        return False
    pairs = sum(isinstance(s, Update) and s.weight_reverse is not None for s in steps)
    return pairs > 1 or sum(map(products, steps)) > most(edges, exact)


def exact_products(edges: EdgeState) -> bool:
    """Whether matrix products on a GPU are exact now: neither bfloat16 autocast nor tf32 is on."""
    low = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is torch.bfloat16
    return edges.weights[0].dtype is torch.float64 or not (low or backends.tf32())


def applies(edges: EdgeState, backend: str) -> bool:
    """The rule is for Triton's kernels on a GPU, and for chains that can be stored: not those over all pairs of neurons."""
    return backend == "triton" and backends.kind_of(edges.weights[0].device) == "cuda" and edges.graph.closed != "all"


def why_not(edges: EdgeState, backend: str) -> str | None:
    """None where `backend` evaluates the chain of these edge states, else the reason and what to do."""
    if not applies(edges, backend):
        return None
    exact = exact_products(edges)
    if not too_long(edges, exact):
        return None
    steps = _steps(edges)
    what = "pair updates" if edges.paired else f"updates ({'exact' if exact else 'bfloat16 or tf32'} products)"
    return (
        f"a chain of {len(steps)} {what} from the last stored state would spill its registers; store one in between: edges.checkpoint(torch.float32), "
        "or edge_memory='auto' or 'every:k' of a model"
    )


def heavy(edges: EdgeState, backend: str) -> bool:
    """Whether `backend` would spill heavily, be it that the chain cannot be cut: within a layer of NG-T, over all pairs of neurons."""
    if backend != "triton" or backends.kind_of(edges.weights[0].device) != "cuda":
        return False
    several = sum(isinstance(s, Update) for s in _steps(edges)) > 1
    return edges.paired and several or too_long(edges, exact_products(edges))


def taken_by_cuda(edges: EdgeState, columns: int = 0) -> bool:
    """Whether the CUDA kernels, which hold chains of any length in registers, run what Triton's would spill, read in up to `columns` columns."""
    weights = edges.weights[0]
    if weights.dtype is torch.float64 or 2 * weights.shape[-1] > CHANNELS or backends.forced() is not None:
        return False
    return max([columns, *(width for s in _steps(edges) for width in widths(s))]) <= _columns(weights.device)


@torch.compiler.assume_constant_result
def _columns(device: torch.device) -> int:
    """Most columns of the CUDA kernels' registers on a GPU; 0: they are not there."""
    if backends.why_not("cuda", torch.device(backends.kind_of(device))) is not None:
        return 0
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else max(COLUMNS)
    return next(n for least, n in COLUMNS.items() if shared >= least)


def full(edges: EdgeState, columns: int = 0) -> bool:
    """Whether a state is to be stored here, because with one more update the chain would be too long for the kernels that run here.

    Args:
        columns: the most in which it will be read: of messages, of queries, of values.
    """
    device = edges.weights[0].device
    if backends.kind_of(device) != "cuda" or not applies(edges, backends.BACKENDS[backends.choose("checkpoint", device)]):
        return False
    return too_long(edges, exact_products(edges), more=1) and not taken_by_cuda(edges, columns)
