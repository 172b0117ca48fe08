"""Networks that read the weights of other networks."""

from .nggnn import NGGNN

__all__ = ["NGGNN"]
