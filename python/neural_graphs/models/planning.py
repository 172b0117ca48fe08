"""What a model says of itself to the planner (ngkernels.plan), and the plans that it makes for a budget of its own."""

from __future__ import annotations

import copy
import weakref

import torch

from ngkernels import NeuralGraph, plan
from ngkernels.backends import kind_of
from ngkernels.planner import DryRun

from .memory import EdgeMemory


class Planned:
    """A model whose edge-memory policy can be chosen by the planner: it has `memory` and `forward_graph`.

    A subclass sets `num_updates`, how often its edge states change, and may override `policies`.
    """

    num_updates: int
    memory: EdgeMemory

    def policies(self) -> tuple[str, ...]:
        """Names of the edge-memory policies, the one that stores least first."""
        stored = range(self.num_updates - 1, 1, -1)  # the last state has one reader: nothing is gained by keeping it
        return ("recompute", "hybrid", *(f"every:{k}" for k in stored), "store") if self.num_updates > 1 else ("recompute",)

    def dry_run(self, graph: NeuralGraph, policy: str, weight_dtype: torch.dtype = torch.float32, weight_grads: bool = False) -> DryRun:
        """A step on `graph` with `policy`, on tensors without values."""
        twin = copy.deepcopy(self, {id(self._graphs): {}, id(self._policies): weakref.WeakKeyDictionary()}).to("meta")
        twin.memory, twin.budget = EdgeMemory.parse(policy), None
        weights = [torch.empty(shape, dtype=weight_dtype, device="meta") for shape in graph.weight_shapes(self.edge_channels)]
        weights = [w.requires_grad_(weight_grads) for w in weights]
        dtype = next(self.parameters()).dtype
        if any(len(p.layers) == 1 for p in graph.parts):  # no layer behind the inputs: biases come as one tensor
            biases = torch.empty(graph.num_nodes, self.node_channels, dtype=dtype, device="meta")
        else:
            biases = [torch.empty(p.copies, n, self.node_channels, dtype=dtype, device="meta") for p in graph.parts for n in p.layers[1:]]
        activations = None
        if self.construct_graph.act_emb is not None:
            activations = [["none"] * (len(p.layers) - 2) for p in graph.parts for _ in range(p.copies)]

        def run() -> list[torch.Tensor]:
            found = twin.forward_graph(graph, weights, biases, activations)
            return (
                [found] if isinstance(found, torch.Tensor) else [t for part in found for t in (part if isinstance(part, list) else [part])]
            )

        return DryRun([*twin.parameters(), *twin.buffers(), *([biases] if isinstance(biases, torch.Tensor) else biases), *weights], list(twin.parameters()), weights, run)

    @torch.compiler.disable
    def choose_memory(self, graph: NeuralGraph, weights) -> None:
        """Where `memory` has a budget: plans for `graph` (once) and uses what was chosen.

        Raises:
            BudgetError: no policy fits.
        """
        training = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        wanted = training and any(w.requires_grad for w in weights)
        chosen = self._policies.setdefault(graph, {})
        if (training, wanted) not in chosen:
            options = {"weight_grads": wanted, "weight_dtype": weights[0].dtype, "device": kind_of(weights[0].device)}
            chosen[training, wanted] = plan(self, graph, self.budget, training=training, **options).policy
        self.memory = EdgeMemory.parse(chosen[training, wanted])
