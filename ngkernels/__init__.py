"""ngkernels: edge-feature message passing over neural graphs, with edge states that are never stored."""

from . import encoders
from .backends import use_backend
from .blocks import Block
from .edges import EdgeState, Message, NodeTerm, Norm
from .graph import NeuralGraph
from .ops import tabulate as _tabulate  # noqa: F401  registers the op
from .ops.aggregate import aggregate
from .ops.attend import attend
from .ops.checkpoint import checkpoint
from .ops.readout import readout
from .planner import BudgetError, Plan, plan

__version__ = "0.1.0"
__all__ = [
    "Block", "BudgetError", "EdgeState", "Message", "NeuralGraph", "NodeTerm", "Norm", "Plan", "aggregate", "attend", "checkpoint", "encoders", "plan",
    "readout", "use_backend",
]  # fmt: skip
