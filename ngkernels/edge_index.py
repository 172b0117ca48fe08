"""Edges given one by one: how a sparse block numbers them, and the lists that kernels read them from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

PIECE, PAIRED_PIECE = 4096, 1024  # most entries of a piece; with partners, the nodes of both sides are kept twice
LOCAL, NUMBER = 12, 39  # bits of an entry: destination and source in their piece's nodes, number of the edge
DIRECTORY = 6  # integers a piece: where its destinations begin and how many, the same of its sources and of its entries


@dataclass(frozen=True, eq=False)
class EdgeIndex:
    """Pairs of neurons from a source layer to a destination layer, numbered as they come. Compared by identity.

    The first `edges` are edges, the rest pairs that NeuralGraph.closure added; the first `raw` have raw features. With `mirror`
    (reciprocal encoders) a pair without any reads those of the pair that it reverses. Lists are made on the device of the tensors.
    """

    src: torch.Tensor  # int64 [P], within its layer
    dst: torch.Tensor  # int64 [P]
    edges: int
    raw: int
    mirror: bool = False
    _cache: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, edge_index: torch.Tensor, op: str) -> EdgeIndex:
        """From an int64 tensor [2, E], sources first."""
        if not isinstance(edge_index, torch.Tensor) or edge_index.dtype != torch.int64:
            got = edge_index.dtype if isinstance(edge_index, torch.Tensor) else type(edge_index).__name__
            raise TypeError(f"{op}: expected edge_index to be an int64 tensor, got {got}")
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"{op}: expected edge_index of shape (2, E), sources in row 0, got {tuple(edge_index.shape)}")
        if edge_index.device.type == "meta":
            raise TypeError(f"{op}: expected edge_index with values, got one on meta")
        if edge_index.shape[1] >= 1 << NUMBER:
            raise ValueError(f"{op}: expected fewer than 2^{NUMBER} edges, got {edge_index.shape[1]}")
        return cls(edge_index[0], edge_index[1], edge_index.shape[1], edge_index.shape[1])

    def __len__(self) -> int:
        return len(self.src)

    def check(self, op: str, n_src: int, n_dst: int) -> None:
        """Raises ValueError where an index names no neuron of the layer."""
        if self._cache.get("checked") == (n_src, n_dst):
            return
        for name, values, n in (("source", self.src, n_src), ("destination", self.dst, n_dst)):
            low, high = (0, -1) if not len(values) else (int(v) for v in values.aminmax())
            if low < 0 or high >= n:
                raise ValueError(f"{op}: expected {name} indices of edge_index between 0 and {n - 1}, got {low} to {high}")
        self._cache["checked"] = (n_src, n_dst)

    def check_unique(self, op: str) -> None:
        """Raises ValueError where two edges join one neuron to another."""
        if "unique" not in self._cache:
            span = 1 + max([0, *(int(v.max()) for v in (self.src, self.dst) if len(v))])
            self._cache["unique"] = len((self.src * span + self.dst).unique()) == len(self)
        if not self._cache["unique"]:
            raise ValueError(
                f"{op}: expected one edge from a neuron to another, got duplicates in edge_index; "
                "a pair of neurons has one state (attention and pair updates)"
            )

    def flipped(self) -> EdgeIndex:
        """The same pairs, with the same numbers, against their direction."""
        if "flipped" not in self._cache:
            self._cache["flipped"] = EdgeIndex(self.dst, self.src, self.edges, self.raw, self.mirror, {"flipped": self})
        return self._cache["flipped"]

    def owned(self) -> EdgeIndex:
        """With raw features for every pair: of a stored edge state."""
        return self.but(raw=len(self), mirror=False)

    def but(self, **changes) -> EdgeIndex:
        return replace(self, _cache={}, **changes)

    def closed(self, other: EdgeIndex, width: int | None, mirror: bool) -> EdgeIndex:
        """Also what `other`, the block in the opposite direction, has and this one has not; and inside a layer of `width` neurons
        (None: between two layers) the pair of each neuron with itself.

        Raises:
            ValueError: two edges from one neuron to another: a pair has one state.
        """
        src, dst = other.dst.to(self.src.device), other.src.to(self.src.device)
        if width is not None:
            loop = torch.arange(width, device=src.device)
            src, dst = torch.cat([src, loop]), torch.cat([dst, loop])
        span = 1 + max([0, *(int(v.max()) for v in (self.src, self.dst, src, dst) if len(v))])
        mine, theirs = self.src * span + self.dst, (src * span + dst).unique()
        self.check_unique("NeuralGraph.closure")
        more = theirs[~torch.isin(theirs, mine)]
        return self.but(src=torch.cat([self.src, more // span]), dst=torch.cat([self.dst, more % span]), mirror=mirror)

    def numbers_in(self, other: EdgeIndex) -> torch.Tensor:
        """The number of each pair's reversal in `other`, or -1."""
        span = 1 + max([0, *(int(v.max()) for v in (self.src, self.dst, other.src, other.dst) if len(v))])
        if not len(other):
            return torch.full_like(self.src, -1)
        keys, order = (other.dst * span + other.src).to(self.src.device).sort()
        wanted = self.src * span + self.dst
        at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where(keys[at] == wanted, order[at], -1)


class Pairs(NamedTuple):
    """Pairs of a row: source and destination within their layers, number, and their reversals' numbers (-1: none), or None."""

    src: torch.Tensor
    dst: torch.Tensor
    number: torch.Tensor
    partner: torch.Tensor | None = None

    @classmethod
    def of(cls, index: EdgeIndex, partner: torch.Tensor | None = None) -> Pairs:
        return cls(index.src, index.dst, torch.arange(len(index), device=index.src.device), partner)

    def where(self, chosen: torch.Tensor | slice) -> Pairs:
        return Pairs(*(None if t is None else t[chosen] for t in self))

    def first(self, count: int) -> Pairs:
        return self.where(slice(count))

    def flipped(self) -> Pairs:
        return Pairs(self.dst, self.src, self.partner, self.number)

    def split(self, *properties: torch.Tensor) -> Iterator[tuple[tuple[bool, ...], Pairs]]:
        """The pairs of each combination of properties that occurs; if there are no pairs, as if they had all."""
        code = sum(p.long() << k for k, p in enumerate(properties))
        for value in code.unique().tolist() or [(1 << len(properties)) - 1]:
            yield tuple(bool(value >> k & 1) for k in range(len(properties))), self.where(code == value)


def make_lists(pairs: Pairs, n_src: int) -> torch.Tensor:
    """The lists of a sparse row: entries in the order of their destinations, cut into pieces.

        pieces, 1 with partners | directory [pieces, DIRECTORY] | destinations | sources | entries | partners' numbers, where given

    Destinations and sources are those that a piece has, each once; positions in the directory count from the start. An entry
    is destination << (LOCAL + NUMBER) | source << NUMBER | number, the first two as positions in their piece's lists. That is 8
    bytes an entry and 8 for each neuron of a piece: at most 24 an edge, about 16 where neurons have many edges.
    """
    src, dst, number, partner = pairs
    n = len(src)
    device = src.device
    if n == 0:
        return torch.tensor([0, int(partner is not None)], device=device)
    key = dst * n_src + src
    if bool((key[1:] < key[:-1]).any()):
        order = key.argsort(stable=True)
        src, dst, number = src[order], dst[order], number[order]
        partner = None if partner is None else partner[order]
        del order
    del key
    pieces = -(-n // (PIECE if partner is None else PAIRED_PIECE))
    size = -(-n // pieces)
    first = torch.arange(0, n, size, device=device)
    pieces = len(first)
    piece = torch.arange(n, device=device) // size
    begins = torch.ones(n, dtype=torch.bool, device=device)
    begins[1:] = dst[1:] != dst[:-1]
    begins[first] = True
    rank, destinations = begins.cumsum(0) - 1, dst[begins]
    first_dst = rank[first]
    sources, at = torch.unique(piece * n_src + src, return_inverse=True)
    first_src = torch.searchsorted(sources, torch.arange(pieces, device=device) * n_src)
    entries = (rank - first_dst[piece]) << (LOCAL + NUMBER) | (at - first_src[piece]) << NUMBER | number
    start, columns = 2 + DIRECTORY * pieces, []
    for begin, total in ((first_dst, len(destinations)), (first_src, len(sources)), (first, n)):
        columns += [start + begin, torch.diff(begin, append=torch.tensor([total], device=device))]
        start += total
    lists = [torch.tensor([pieces, int(partner is not None)], device=device), torch.stack(columns, 1).flatten(), destinations, sources % n_src, entries]
    return torch.cat(lists if partner is None else [*lists, partner])


def read_lists(lists: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Destination, source, number and partner's number (where lists have them, else the number) of the entries of the row whose
    lists begin there."""
    pieces, paired = lists[:2].tolist()
    directory = lists[2 : 2 + DIRECTORY * pieces].reshape(pieces, DIRECTORY)
    start = 2 + DIRECTORY * pieces + int(directory[:, 1::2].sum()) - count
    entries = lists[start : start + count]
    piece = torch.repeat_interleave(directory[:, 5])
    mask = (1 << LOCAL) - 1
    dst = lists[directory[piece, 0] + (entries >> (LOCAL + NUMBER) & mask)]
    src = lists[directory[piece, 2] + (entries >> NUMBER & mask)]
    number = entries & ((1 << NUMBER) - 1)
    return dst, src, number, lists[start + count : start + 2 * count] if paired else number
