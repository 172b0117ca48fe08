"""Maths of single edges in Triton: products, activations, Fourier features, the tabulated curve."""

from __future__ import annotations

import triton
import triton.language as tl

SILU, RELU, GELU, TANH, SIGMOID, LEAKY_RELU = (tl.constexpr(k) for k in range(6))  # positions in checks.ACTIVATIONS
LEAKY_SLOPE = tl.constexpr(0.01)
# Triton 3.6 lays float64 operands of a product out by the narrowest number that they were computed from, a mask's bit, and then fails; it looks
# no further than a reduction. 3.9 does not, and spills less without one.
NARROWEST = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "tf32":
        return tl.dot(a, b, acc, input_precision="tf32")
    elif PRECISION == "float64":
        if NARROWEST:
            a, b = tl.sum(a[None], 0), tl.sum(b[None], 0)
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float64)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def sigmoid(x):
    z = tl.exp(-tl.abs(x))
    r = 1 / (1 + z)
    return tl.where(x >= 0, r, z * r)


@triton.jit
def tanh(x):
    z = tl.exp(-2 * tl.abs(x))
    r = (1 - z) / (1 + z)
    return tl.where(x < 0, -r, r)


@triton.jit
def activate(x, KIND: tl.constexpr):
    if KIND == SILU:
        return x * sigmoid(x)
    elif KIND == RELU:
        return tl.where(x < 0, 0.0, x)
    elif KIND == GELU:
        return x * (0.5 * (1 + tl.erf(x * 0.70710678118654752440)))
    elif KIND == TANH:
        return tanh(x)
    elif KIND == SIGMOID:
        return sigmoid(x)
    elif KIND == LEAKY_RELU:
        return tl.where(x > 0, x, x * LEAKY_SLOPE)
    else:
        return x


@triton.jit
def slope(x, KIND: tl.constexpr):
    """The derivative of `activate`."""
    if KIND == SILU:
        s = sigmoid(x)
        return s + x * s * (1 - s)
    elif KIND == RELU:
        return tl.where(x > 0, 1.0, 0.0).to(x.dtype)
    elif KIND == GELU:
        return 0.5 * (1 + tl.erf(x * 0.70710678118654752440)) + x * (0.39894228040143267794 * tl.exp(-0.5 * x * x))
    elif KIND == TANH:
        y = tanh(x)
        return 1 - y * y
    elif KIND == SIGMOID:
        s = sigmoid(x)
        return s * (1 - s)
    elif KIND == LEAKY_RELU:
        one = tl.full(x.shape, 1.0, x.dtype)
        return tl.where(x > 0, one, one * LEAKY_SLOPE)
    else:
        return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def nearest(x):
    """A whole number next to x."""
    return tl.floor(x + 0.5)


@triton.jit
def sin_turns(t, rest, phase):
    """sin(2 pi (t + rest + phase)): whole turns are taken off exactly, of `rest` too, as it is large where t is."""
    x = (t - nearest(t)) + (rest - nearest(rest)) + phase
    x = x - nearest(x)
    if t.dtype == tl.float64:
        return tl.sin(6.283185307179586 * x)
    half = nearest(x + x)  # half turns: sin(2 pi x) = (-1)^half sin(2 pi (x - half / 2))
    y = (x - 0.5 * half) * 6.283185307179586
    z = y * y
    p = tl.fma(z, tl.full(z.shape, -2.5052108385441720e-8, z.dtype), 2.7557319223985893e-6)
    p = tl.fma(p, z, -1.9841269841269841e-4)
    p = tl.fma(p, z, 8.3333333333333333e-3)
    p = tl.fma(p, z, -1.6666666666666667e-1)
    s = tl.fma(p * z, y, y)
    return tl.where(half == 0, s, -s)


@triton.jit
def hermite(w, half, SHIFT: tl.constexpr):
    """(inside, cell, u) of weights in a table of 2 half + 1 nodes, 2^SHIFT of them a unit; outside (NaN too) cell and u are 0."""
    at = w * (1 << SHIFT)
    limit = half.to(w.dtype)
    inside = (at >= -limit) & (at < limit)
    at = tl.where(inside, at, 0.0)
    low = tl.floor(at)
    return inside, (low + limit).to(tl.int64), at - low


@triton.jit
def curve_weight(u, LINE: tl.constexpr):
    """Weights of value, slope and curvature at the cell's lower node (lines 0 to 2) and its upper one (3 to 5)."""
    v = 1 - u
    if LINE == 0:
        return v * v * v * (1 + 3 * u + 6 * u * u)
    elif LINE == 1:
        return v * v * v * u * (1 + 3 * u)
    elif LINE == 2:
        return 0.5 * (v * v * v * u * u)
    elif LINE == 3:
        return u * u * u * (1 + 3 * v + 6 * v * v)
    elif LINE == 4:
        return -(u * u * u * v * (1 + 3 * v))
    else:
        return 0.5 * (u * u * u * v * v)


@triton.jit
def rise_weight(u, LINE: tl.constexpr):
    """Derivatives of `curve_weight`."""
    v = 1 - u
    if LINE == 0:
        return -30 * u * u * v * v
    elif LINE == 1:
        return v * v * (1 + 2 * u - 15 * u * u)
    elif LINE == 2:
        return 0.5 * u * v * v * (2 - 5 * u)
    elif LINE == 3:
        return 30 * u * u * v * v
    elif LINE == 4:
        return u * u * (1 + 2 * v - 15 * v * v)
    else:
        return -0.5 * v * u * u * (2 - 5 * v)
