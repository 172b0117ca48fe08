"""Layers and blocks of one network: what a neural graph is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .edge_index import EdgeIndex
from .topology import DENSE, DIAGONAL, SPARSE

BLOCK_KINDS = (DENSE, DIAGONAL, SPARSE)


@dataclass(frozen=True)
class Block:
    """Weights between node layer `src` and node layer `dst` of one network.

    `kind` is "dense" (every pair; weights (n_src, n_dst, C)), "diagonal" (neuron c to neuron c, c below the smaller width;
    weights (n, C)) or "sparse" (the pairs of `index`; weights (E, C); see `sparse`). `weight` is the position in the graph's
    weight list and `reverse` marks a block that reads another block's weights against their direction. A block of pairs that
    are no edges (`edge` False, see NeuralGraph.closure) may have no weights at all: weight -1, raw features 0.
    """

    kind: str
    src: int
    dst: int
    weight: int
    reverse: bool = False
    edge: bool = True
    index: EdgeIndex | None = None

    @classmethod
    def sparse(cls, src: int, dst: int, weight: int, edge_index: torch.Tensor) -> Block:
        """The edges of `edge_index`, int64 [2, E]: row 0 neurons of layer `src`, row 1 of layer `dst`, both counted
        within their layer. Weights, readouts and stored states keep its order. It is kept, not copied: do not change it.

        Raises:
            TypeError, ValueError: another dtype, device or shape; indices beyond a layer, when the graph is built.
        """
        return cls(SPARSE, src, dst, weight, index=EdgeIndex.of(edge_index, "Block.sparse"))

    @property
    def owns(self) -> bool:
        """Whether a weight tensor has this block's shape."""
        return self.weight >= 0 and not self.reverse

    def reversed(self) -> Block:
        """The block that reads the same weights against their direction."""
        return Block(self.kind, self.dst, self.src, self.weight, not self.reverse, index=None if self.index is None else self.index.flipped())


@dataclass(frozen=True)
class Part:
    """`copies` networks of one architecture: layer widths and blocks. `token`: the first layer is no neuron but a
    token, whose pairs start from a state of 0 (see NeuralGraph.with_token)."""

    layers: tuple[int, ...]
    blocks: tuple[Block, ...]
    copies: int = 1
    token: bool = False

    @property
    def num_nodes(self) -> int:
        return sum(self.layers)

    def edges_of(self, block: Block) -> int:
        if block.kind == SPARSE:
            return len(block.index)
        n_src, n_dst = self.layers[block.src], self.layers[block.dst]
        return min(n_src, n_dst) if block.kind == DIAGONAL else n_src * n_dst

    def features_of(self, block: Block) -> int:
        """How many of a block's edges have raw features."""
        return self.edges_of(block) if block.index is None else block.index.raw

    @property
    def num_weights(self) -> int:
        return sum(b.owns for b in self.blocks)

    @property
    def weight_sizes(self) -> tuple[tuple[int, ...], ...]:
        """(copies, n_src, n_dst), (copies, n) or (copies, E) of each weight, without channels."""
        sizes = {}
        for b in self.blocks:
            if b.owns:
                n_src, n_dst = self.layers[b.src], self.layers[b.dst]
                shape = {DENSE: (n_src, n_dst), DIAGONAL: (min(n_src, n_dst),)}
                sizes[b.weight] = (self.copies, *(shape[b.kind] if b.index is None else (b.index.raw,)))
        return tuple(sizes[k] for k in range(len(sizes)))

    def opposite(self, k: int) -> int | None:
        """Number of the block that joins the layers of block k in the other direction (k itself inside a layer)."""
        b = self.blocks[k]
        return next((n for n, c in enumerate(self.blocks) if (c.src, c.dst, c.kind) == (b.dst, b.src, b.kind)), None)

    def has_reversals(self, k: int) -> bool:
        """Whether each edge of block k has its reversal."""
        other, index = self.opposite(k), self.blocks[k].index
        return other is not None and (index is None or bool((index.numbers_in(self.blocks[other].index) >= 0).all()))

    @property
    def in_degree(self) -> torch.Tensor:
        """Of the nodes of one copy, int64."""
        degree = [torch.zeros(d, dtype=torch.int64, device="cpu") for d in self.layers]
        for b in self.blocks:
            if b.kind == SPARSE:
                degree[b.dst] += torch.bincount(b.index.dst, minlength=self.layers[b.dst]).cpu()
            elif b.kind == DIAGONAL:
                degree[b.dst][: min(self.layers[b.src], self.layers[b.dst])] += 1
            else:
                degree[b.dst] += self.layers[b.src]
        return torch.cat(degree)

    @property
    def max_in_degree(self) -> int:
        if any(b.kind == SPARSE for b in self.blocks):
            return int(self.in_degree.max())
        degree = [0] * len(self.layers)  # reached by the first neurons of a layer
        for b in self.blocks:
            degree[b.dst] += 1 if b.kind == DIAGONAL else self.layers[b.src]
        return max(degree)


def layer_index(op: str, part: Part, layer: int) -> int:
    n = len(part.layers)
    if not -n <= layer < n:
        raise ValueError(f"{op}: expected layer between {-n} and {n - 1} ({n} node layers), got {layer}")
    return layer % n


def check_part(part: Part) -> None:
    for width in part.layers:
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"NeuralGraph: expected layer widths to be integers of at least 1, got {width!r} in {part.layers}")
    if part.copies < 1:
        raise ValueError(f"NeuralGraph: expected copies of at least 1, got {part.copies}")
    owners: set[int] = set()
    for b in part.blocks:
        if b.kind not in BLOCK_KINDS:
            raise NotImplementedError(f"NeuralGraph: block kind {b.kind!r} is not built; available: {', '.join(BLOCK_KINDS)}")
        for name, layer in (("src", b.src), ("dst", b.dst)):
            if not 0 <= layer < len(part.layers):
                raise ValueError(f"NeuralGraph: expected block {name} below {len(part.layers)} (number of layers), got {layer}")
        if (b.kind == SPARSE) != (b.index is not None):
            raise ValueError(f"NeuralGraph: expected an edge index for sparse blocks and for no others, got a {b.kind} block; use Block.sparse")
        if b.index is not None:
            b.index.check("NeuralGraph", part.layers[b.src], part.layers[b.dst])
        if b.weight < 0 and b.edge:
            raise ValueError(f"NeuralGraph: expected the weight of a block of edges to be at least 0, got {b.weight}")
        if b.owns:
            if b.weight in owners:
                raise ValueError(f"NeuralGraph: expected one forward block for each weight, got two for weight {b.weight}")
            owners.add(b.weight)
    named = 1 + max([-1, *[b.weight for b in part.blocks]])
    if owners != set(range(named)):
        raise ValueError(f"NeuralGraph: expected weights 0..{named - 1} to have a forward block each, got {sorted(owners)}")


def closed_part(part: Part, over: str, reciprocal: bool) -> Part:
    """See NeuralGraph.closure."""
    blocks = list(part.blocks)
    joined: dict[tuple[int, int], Block] = {}
    for b in blocks:
        if (b.src, b.dst) in joined or joined.get((b.dst, b.src), b).kind != b.kind:
            raise ValueError(
                f"NeuralGraph.closure: expected at most one block between two node layers, got several between {b.src} and {b.dst}; "
                "a pair of neurons has one state (attention and pair updates)"
            )
        joined[b.src, b.dst] = b

    def add(block: Block) -> None:
        if (block.src, block.dst) not in joined:
            joined[block.src, block.dst] = block
            blocks.append(block)

    if over == "all" and any(b.kind == SPARSE for b in part.blocks):
        raise ValueError("NeuralGraph.closure: expected over edges for a graph with sparse blocks, got all; make the state dense first (EdgeState.dense)")
    layers = range(len(part.layers))
    blocks = [_closed_index(b, joined, part.layers, reciprocal) for b in blocks]
    for b in part.blocks:
        add(_reversal(b, reciprocal))
    for a in layers:
        add(Block(DENSE if over == "all" else DIAGONAL, a, a, -1, False, False))
    for a in layers:
        for b in layers if over == "all" or (part.token and a == 0) else ():
            add(Block(DENSE, a, b, -1, False, False))
            add(Block(DENSE, b, a, -1, False, False))
    return Part(part.layers, tuple(blocks), part.copies, part.token)


def _reversal(block: Block, reciprocal: bool) -> Block:
    """The pairs of a block in the other direction, which are no edges."""
    index = None if block.index is None else block.index.flipped().but(edges=0, raw=len(block.index) if reciprocal else 0)
    if reciprocal and block.weight >= 0:
        return replace(block.reversed(), edge=False, index=index)
    return Block(block.kind, block.dst, block.src, -1, False, False, index)


def _closed_index(block: Block, joined: dict[tuple[int, int], Block], layers: tuple[int, ...], reciprocal: bool) -> Block:
    """A sparse block with the reversals of the edges of its opposite; those that one of the two has not are no edges."""
    opposite = joined.get((block.dst, block.src))
    if block.kind != SPARSE or opposite is None or opposite.index is block.index.flipped():
        return block
    return replace(block, index=block.index.closed(opposite.index, layers[block.dst] if block.src == block.dst else None, reciprocal))
