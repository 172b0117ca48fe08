"""Messages in Triton: what registers combine to, their running statistics by destination, and the gradients of the reductions."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import program as prog
from .edge_math import sigmoid
from .evaluator import PADDED, columns, used

PLAIN, FILM, GATE, PRODUCT, EMIT, ATTEND = (tl.constexpr(k) for k in range(6))
if (prog.PLAIN, prog.FILM, prog.GATE, prog.PRODUCT, prog.EMIT, prog.ATTEND) != tuple(range(6)) or prog.REDUCE != ("sum", "mean", "min", "max", "std", "var"):
    raise ImportError("ngkernels._triton.messages: messages or reductions of ngkernels.program have changed")

# Of SLOTS, positions in out [rows, K, F] or -1; whether the mean is kept in aux; positions of ties.
SUM, MEAN, MIN, MAX, STD, VAR, MEAN_AUX, MIN_TIES, MAX_TIES, RESULTS, TIES = (tl.constexpr(k) for k in range(11))
PLANES = tl.constexpr(6)  # of running statistics: mean or sum, squares, minimum, its count, maximum, its count
STD_THRESHOLD = tl.constexpr(1e-5)


def slots_of(mask: int) -> tuple[int, ...]:
    """The constexpr SLOTS of a set of reductions."""
    names = prog.reductions(mask)
    mean_aux, ties = prog.aux_slots(mask)
    low = 0 if "min" in names else -1
    high = int("min" in names) if "max" in names else -1
    return (*(names.index(r) if r in names else -1 for r in prog.REDUCE), mean_aux, low, high, len(names), ties)


@triton.jit
def scale_of(s, COMBINE: tl.constexpr):
    return sigmoid(s) if COMBINE == GATE else s


@triton.jit
def message(regs, c: tl.constexpr, EDGE: tl.constexpr, QUERY: tl.constexpr, N: tl.constexpr, COMBINE: tl.constexpr):
    """Chunk c of m = e, s q + t, sigmoid(s) q or s q."""
    if COMBINE == PLAIN:
        return regs[EDGE + c]
    elif COMBINE == FILM:
        return tl.fma(regs[EDGE + c], regs[QUERY + c], regs[EDGE + N + c])
    else:
        return scale_of(regs[EDGE + c], COMBINE) * regs[QUERY + c]


@triton.jit
def empty(BI: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """Statistics of no messages."""
    zero = tl.zeros((BI, P), T)
    return zero, zero, zero + float("inf"), zero, zero - float("inf"), zero


@triton.jit
def merge_spread(mean, squares, na, other_mean, other_squares, nb):
    """Chan's update of mean and squares of na values by those of nb more."""
    n = tl.maximum(na + nb, 1)
    delta = other_mean - mean
    return mean + delta * (nb / n), squares + (other_squares + delta * delta * (na * nb / n))


@triton.jit
def merge_extreme(best, ties, other, count, MAXIMUM: tl.constexpr):
    better = other > best if MAXIMUM else other < best
    return tl.where(better, other, best), tl.where(better, count, ties + tl.where(other == best, count, 0))


@triton.jit
def merge(a, na, b, nb, SLOTS: tl.constexpr):
    """Statistics of na messages and nb more, in this order."""
    first, squares, low, low_ties, high, high_ties = a[0], a[1], a[2], a[3], a[4], a[5]
    if SLOTS[STD] >= 0 or SLOTS[VAR] >= 0:
        first, squares = merge_spread(first, squares, na, b[0], b[1], nb)
    else:
        first = first + b[0]
    if SLOTS[MIN] >= 0:
        low, low_ties = merge_extreme(low, low_ties, b[2], b[3], False)
    if SLOTS[MAX] >= 0:
        high, high_ties = merge_extreme(high, high_ties, b[4], b[5], True)
    return first, squares, low, low_ties, high, high_ties


@triton.jit
def statistics(m, ok, count, SLOTS: tl.constexpr):
    """Of the messages m [BI, BJ, P], as far as they exist (ok [BI, BJ]); count [BI, 1] of them."""
    there = ok[:, :, None]
    first = tl.sum(tl.where(there, m, 0), 1)
    squares, low, low_ties, high, high_ties = first, first, first, first, first
    if SLOTS[STD] >= 0 or SLOTS[VAR] >= 0:
        first = first / tl.maximum(count, 1)
        d = tl.where(there, m - first[:, None, :], 0)
        squares = tl.sum(d * d, 1)
    if SLOTS[MIN] >= 0:
        low = tl.min(tl.where(there & (m == m), m, float("inf")), 1)
        low_ties = tl.sum(tl.where(there & (m == low[:, None, :]), 1, 0).to(m.dtype), 1)
    if SLOTS[MAX] >= 0:
        high = tl.max(tl.where(there & (m == m), m, -float("inf")), 1)
        high_ties = tl.sum(tl.where(there & (m == high[:, None, :]), 1, 0).to(m.dtype), 1)
    return first, squares, low, low_ties, high, high_ties


@triton.jit
def coefficients(out, aux, ties, grad, degrees, rows, mask, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr):
    """What turns a message m of the output rows `rows` [BI] into its gradient, each [BI, P]:
    constant + slope (m - mean) + [m == low] low_share + [m == high] high_share."""
    column = columns(CHUNK)
    live = mask[:, None] & used(CHUNK)[None, :]
    here = (rows * (SLOTS[RESULTS] * WIDTH))[:, None] + column[None, :]
    inverse = 1 / tl.load(degrees + rows, mask=mask, other=1)[:, None]
    zero = tl.zeros((rows.shape[0], CHUNK[PADDED]), inverse.dtype)
    constant, slope, mean, low, low_share, high, high_share = zero, zero, zero, zero, zero, zero, zero
    if SLOTS[SUM] >= 0:
        constant = tl.load(grad + here + SLOTS[SUM] * WIDTH, mask=live, other=0)
    if SLOTS[MEAN] >= 0:
        mean = tl.load(out + here + SLOTS[MEAN] * WIDTH, mask=live, other=0)
        constant += tl.load(grad + here + SLOTS[MEAN] * WIDTH, mask=live, other=0) * inverse
    if SLOTS[MEAN_AUX]:
        mean = tl.load(aux + (rows * WIDTH)[:, None] + column[None, :], mask=live, other=0)
    if SLOTS[STD] >= 0:
        std = tl.load(out + here + SLOTS[STD] * WIDTH, mask=live, other=0)
        slope = tl.where(std > 0, tl.load(grad + here + SLOTS[STD] * WIDTH, mask=live, other=0) * inverse / tl.where(std > 0, std, 1), 0)
    if SLOTS[VAR] >= 0:
        slope += 2 * tl.load(grad + here + SLOTS[VAR] * WIDTH, mask=live, other=0) * inverse
    if SLOTS[MIN] >= 0:
        low, low_share = shared(out, ties, grad, here, rows, column, live, SLOTS[MIN], SLOTS[MIN_TIES], WIDTH, SLOTS)
    if SLOTS[MAX] >= 0:
        high, high_share = shared(out, ties, grad, here, rows, column, live, SLOTS[MAX], SLOTS[MAX_TIES], WIDTH, SLOTS)
    return constant, slope, mean, low, low_share, high, high_share


@triton.jit
def shared(out, ties, grad, here, rows, column, live, SLOT: tl.constexpr, TIE: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr):
    """An extreme and the share of its gradient that each message equal to it gets."""
    value = tl.load(out + here + SLOT * WIDTH, mask=live, other=0)
    n = tl.load(ties + ((rows * SLOTS[TIES] + TIE) * WIDTH)[:, None] + column[None, :], mask=live, other=1).to(value.dtype)
    return value, tl.load(grad + here + SLOT * WIDTH, mask=live, other=0) / tl.maximum(n, 1)


@triton.jit
def message_gradient(m, ok, k, SLOTS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, P: tl.constexpr):
    """Gradient [size, P] of the messages m [size, P] by the coefficients k of their destinations."""
    m3 = tl.reshape(m, (BI, BJ, P))
    g = k[0][:, None, :] + k[1][:, None, :] * (m3 - k[2][:, None, :])
    if SLOTS[MIN] >= 0:
        g += tl.where(m3 == k[3][:, None, :], k[4][:, None, :], 0)
    if SLOTS[MAX] >= 0:
        g += tl.where(m3 == k[5][:, None, :], k[6][:, None, :], 0)
    return tl.where(ok[:, None], tl.reshape(g, (BI * BJ, P)), 0)


@triton.jit
def register_gradients(regs, g, EDGE: tl.constexpr, QUERY: tl.constexpr, N: tl.constexpr, COMBINE: tl.constexpr):
    """(of the edge register, of the message register) from the gradients of the messages, as tuples of chunks."""
    if COMBINE == PLAIN:
        return g, g
    else:
        scales, shifts, queries = (), (), ()
        for c in tl.static_range(N):
            s = scale_of(regs[EDGE + c], COMBINE)
            d = g[c] * regs[QUERY + c]
            scales = scales + (d * (s * (1 - s)) if COMBINE == GATE else d,)
            shifts = shifts + (g[c],)
            queries = queries + (g[c] * s,)
        if COMBINE == FILM:
            return scales + shifts, queries
        else:
            return scales, queries
