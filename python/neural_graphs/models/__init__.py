"""Networks that read the weights of other networks."""

from .dws import DWS
from .nfn import NFN
from .nggnn import NGGNN
from .ngt import NGT

__all__ = ["DWS", "NFN", "NGGNN", "NGT"]
