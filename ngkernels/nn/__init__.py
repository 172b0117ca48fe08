"""Thin modules over the engine's ops: parameters, no numerics of their own over edges."""

from .encoder import Encoder, GaussianEncoding, diagonal_graph
from .pna import DegreeScalers, PNALayer
from .recompute import recompute
from .update import EdgeUpdate

__all__ = ["DegreeScalers", "EdgeUpdate", "Encoder", "GaussianEncoding", "PNALayer", "diagonal_graph", "recompute"]
