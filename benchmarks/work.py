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


def pair_state_flops(updates: int, both: bool, width: int = 32, hidden: int = 64) -> int:
    """Per ordered pair: NG-T's pair state after so many updates, from the table. `both`: that of the reversed pair is wanted too.

    An update is a product of e_ij and one of e_ji to `hidden`, back to `width`, and an MLP of the same widths. Where both directions
    are evaluated, the first two are sums and differences: one product for each direction. The first update has them from the table.
    A state that is wanted in one direction only needs both of them up to its last update.
    """
    product = 2 * width * hidden
    costs = [(3 if k == 0 else 4) * product for k in range(updates)]  # for each direction
    if both or updates == 0:
        return sum(costs)
    return 2 * sum(costs[:-1]) + (3 if updates == 1 else 5) * product


def attention_flops(layer: int, both: bool, width: int = 32, attention: int = 128, heads: int = 8) -> tuple[int, int]:
    """(forward, backward) per ordered pair of NG-T's attention of `layer`, counted from 0. both: see pair_state_flops.

    Forward: the pair state; from it the shares of query, key and factor of the value, `width` x `attention` each, which layer 0 has
    from the table; logits, weighted values and, for each head, the weighted sum of states (the additive value is then a product at
    neurons). Backward: the same again, then two products (gradient of the input, gradient of the matrix) for each.
    """
    maps = 0 if layer == 0 else 3 * 2 * width * attention
    forward = pair_state_flops(layer, both, width) + maps + 2 * attention + 2 * attention + 2 * heads * width
    return forward, 3 * forward


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


def train_step_ngt(case: Case, weight_grads: bool, layers: int = 4, weight_bytes: int = 4) -> Work:
    """Work of forward and backward of NG-T over all pairs of neurons, widths as published, with the output neurons as readout.

    Bytes: every attention reads each raw weight once forward and once backward, and adds to its gradient once (read and write); node
    states (64 floats), queries, keys, values and results (128 each) and their gradients pass once in and once out per layer and
    direction.
    """
    every = sum(sum(attention_flops(layer, both=True)) for layer in range(layers - 1))
    last = sum(attention_flops(layers - 1, both=False))
    passes = case.edges * (layers - 1) + case.last_edges
    edge_bytes = passes * (2 * weight_bytes + (2 * weight_bytes if weight_grads else 0))
    node_bytes = case.nodes * layers * 2 * 2 * 4 * (64 + 4 * 128)
    return Work(case.pairs * every + case.last_pairs * last, edge_bytes + node_bytes)
