"""How much arithmetic and how much traffic a training step needs: what the shares of the roofline refer to.

Counted is the strict scheme: no edge state is stored, every pass evaluates it again from the raw weight; small matrices are folded,
layer 0 is a table of the raw weight, and what nothing reads (the last layer's rows other than the output neurons') is not computed.
Multiplications and additions of matrix products count, 2 per multiply-add; activations, tables and node-level products do not.
Every provider is held against the same count, so the share says how far it is from the problem's bound, not how busy it keeps the core.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import Case


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of one training step."""

    flops: int
    bytes: int

    def bound_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The roofline: no machine of those rates takes less."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def conv_flops(layer: int, width: int) -> tuple[int, int]:
    """(forward, backward) per edge of convolution `layer`, counted from 0, for node and edge states `width` wide.

    Forward: `layer` - 1 folded updates of width x width, then scale and shift, 2 width x width, from the last hidden state.
    Backward: the same again, then two products (gradient of the input, gradient of the matrix) for each.
    """
    if layer == 0:
        return 0, 0
    chain = (layer - 1) * 2 * width * width + 4 * width * width
    return chain, 3 * chain


def train_step(case: Case, weight_grads: bool, width: int = 32, layers: int = 4, weight_bytes: int = 4) -> Work:
    """Work of forward and backward of NG-GNN with the output neurons as readout.

    Bytes: every convolution reads each raw weight once forward and once backward, and adds to its gradient once (read and write);
    node states and their gradients, `width` floats, pass once in and once out per convolution and direction.
    """
    per_edge = sum(sum(conv_flops(layer, width)) for layer in range(layers - 1))
    last = sum(conv_flops(layers - 1, width))
    flops = case.edges * per_edge + case.last_edges * last
    passes = case.edges * (layers - 1) + case.last_edges
    edge_bytes = passes * (2 * weight_bytes + (2 * weight_bytes if weight_grads else 0))
    node_bytes = case.nodes * layers * 2 * 2 * 4 * width
    return Work(flops, edge_bytes + node_bytes)
