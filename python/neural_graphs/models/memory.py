"""What becomes of edge states between layers: evaluated again, stored, or only their gradients handed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ngkernels import EdgeState, limits
from ngkernels.backends import kind_of
from ngkernels.planner import parse_size


@dataclass(frozen=True)
class EdgeMemory:
    """`every` k: a stored state after every k-th update; 0: none. `virtual`: gradients meet after every update.

    `restart`: a stored state where the kernels would not take a longer chain (ngkernels.limits).
    `budget`: bytes for a step; the model asks the planner which of the policies to use, graph by graph.
    """

    every: int = 0
    virtual: bool = False
    budget: int | None = None
    restart: bool = False

    @classmethod
    def parse(cls, policy: str | int) -> EdgeMemory:
        """From "auto", "auto:SIZE" (auto:8GiB), "recompute", "store", "hybrid", "every:k" or k.

        "auto" is "recompute", which needs least memory and on the C++ kernels is the fastest up to some eight layers, but on a GPU restarts
        from a stored state where a longer chain of updates would spill the registers of the Triton kernels and the CUDA kernels are not there
        to take it (ngkernels.limits). With a size, the policy of least work that fits it.

        Raises:
            ValueError: anything else.
        """
        named = {"auto": cls(restart=True), "recompute": cls(), "store": cls(every=1), "hybrid": cls(virtual=True)}
        if isinstance(policy, str) and policy in named:
            return named[policy]
        if isinstance(policy, str) and policy.startswith("auto:"):
            return cls(budget=parse_size(policy[len("auto:") :]))
        count = policy[len("every:") :] if isinstance(policy, str) and policy.startswith("every:") else policy
        if not isinstance(count, bool) and str(count).isdecimal() and int(count) > 0:
            return cls(every=int(count))
        raise ValueError(
            f"edge_memory: expected auto, auto:SIZE, recompute, store, hybrid, every:k or an integer k of at least 1, got {policy!r}"
        )

    def after(self, updates: int, edges: EdgeState, columns: int) -> EdgeState:
        """`edges`, the state after so many updates, which more than one consumer will read, in up to `columns` columns."""
        if self.virtual:
            return edges.checkpoint()
        if self.every and updates % self.every == 0:
            return edges.checkpoint(_store_dtype(edges))
        if self.restart and limits.full(edges, columns):
            return edges.checkpoint(_exact_dtype(edges))  # as the registers hold it: results are the same as without
        return edges


def _store_dtype(edges: EdgeState) -> torch.dtype:
    device = kind_of(edges.weights[0].device)
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16:
        return torch.bfloat16
    return _exact_dtype(edges)


def _exact_dtype(edges: EdgeState) -> torch.dtype:
    return torch.float64 if edges.weights[0].dtype is torch.float64 else torch.float32
