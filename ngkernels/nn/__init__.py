"""Thin modules over the engine's ops: parameters, no numerics of their own over edges."""

from .attention import PairUpdate, RelationalAttention, RelationalLayer
from .encoder import Encoder, GaussianEncoding, diagonal_graph
from .norm import NORMS, NodeNorm
from .pna import DegreeScalers, PNALayer
from .recompute import recompute
from .update import EdgeUpdate

__all__ = [
    "NORMS",
    "DegreeScalers",
    "EdgeUpdate",
    "Encoder",
    "GaussianEncoding",
    "NodeNorm",
    "PNALayer",
    "PairUpdate",
    "RelationalAttention",
    "RelationalLayer",
    "diagonal_graph",
    "recompute",
]
