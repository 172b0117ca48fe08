"""Thin modules over the engine's ops: parameters, no numerics of their own over edges."""

from .attention import PairUpdate, RelationalAttention, RelationalLayer, xavier_linear
from .encoder import Encoder, GaussianEncoding, diagonal_graph
from .norm import NORMS, NodeNorm
from .norm_act import ACTIVATIONS, NormAct
from .pna import DegreeScalers, PNALayer
from .recompute import recompute
from .update import EdgeUpdate

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "DegreeScalers",
    "EdgeUpdate",
    "Encoder",
    "GaussianEncoding",
    "NodeNorm",
    "NormAct",
    "PNALayer",
    "PairUpdate",
    "RelationalAttention",
    "RelationalLayer",
    "diagonal_graph",
    "recompute",
    "xavier_linear",
]
