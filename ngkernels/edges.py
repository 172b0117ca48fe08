"""EdgeState: an edge's hidden state as an expression of its raw weight and its two neurons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from . import backends
from .checks import check_activation, check_bias, check_matrix, check_tensor
from .dense import dense
from .encoders import Fourier, Identity, Linear, Table, make_table
from .graph import CLOSE_FIRST, NeuralGraph

MESSAGES = ("film", "gate", "product", "concat")
Affine = tuple[torch.Tensor, torch.Tensor | None]  # weight [out, in], bias [out]


@dataclass(frozen=True)
class NodeTerm:
    """weight_dst x_i + weight_src x_j + bias, projected inside the kernels. x [N, d_x], weights [out, d_x]."""

    x: torch.Tensor
    weight_dst: torch.Tensor
    weight_src: torch.Tensor
    bias: torch.Tensor | None = None

    def check(self, op: str, graph: NeuralGraph, width: int, device: torch.device) -> None:
        for name in ("x", "weight_dst", "weight_src"):
            check_tensor(op, name, getattr(self, name), device)
        if self.x.dim() != 2 or self.x.shape[0] != graph.num_nodes:
            raise ValueError(f"{op}: expected x of shape ({graph.num_nodes}, d) (the graph's nodes), got {tuple(self.x.shape)}")
        for name in ("weight_dst", "weight_src"):
            w = getattr(self, name)
            if tuple(w.shape) != (width, self.x.shape[1]):
                raise ValueError(f"{op}: expected {name} of shape ({width}, {self.x.shape[1]}), got {tuple(w.shape)}")
        check_bias(op, "bias", self.bias, width)


@dataclass(frozen=True)
class Norm:
    """Layer norm: (y - mean) / sqrt(var + eps) weight + bias over the D numbers of an edge. weight, bias [D]; var biased."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float = 1e-5


def _check_norm(op: str, norm: Norm, width: int, device: torch.device) -> None:
    if not isinstance(norm, Norm):
        raise TypeError(f"{op}: expected norm to be a Norm or None, got {type(norm).__name__}")
    for name, t in (("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        check_tensor(op, name, t, device)
        check_bias(op, name, t, width)
    if not norm.eps >= 0:
        raise ValueError(f"{op}: expected norm.eps of at least 0, got {norm.eps}")


@dataclass(frozen=True)
class Update:
    """z = weight_edge e [+ weight_reverse e_ji] + node term; e' = [norm]([e +] weight_out act(z) + bias_out)."""

    weight_edge: torch.Tensor  # [H, D]
    weight_reverse: torch.Tensor | None  # [H, D]
    bias: torch.Tensor | None  # [H], for steps without a node term
    node: NodeTerm | None
    activation: str
    weight_out: torch.Tensor  # [D', H]
    bias_out: torch.Tensor | None
    residual: bool
    norm: Norm | None


@dataclass(frozen=True)
class Activate:
    """e' = weight act(e) + bias: one more layer of an encoder MLP."""

    activation: str
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Mark:
    """A virtual checkpoint: gradients of what follows arrive in `carriers` instead of going further back."""

    carriers: tuple[torch.Tensor, ...]


def _encoder_width(encoder, channels: int, device: torch.device) -> int:
    op = "EdgeState"
    if not isinstance(encoder, (Linear, Fourier, Identity)):
        raise TypeError(f"{op}: expected encoder Linear, Fourier or Identity of ngkernels.encoders, got {type(encoder).__name__}")
    expanded = 3 * channels if encoder.reciprocal else channels
    if isinstance(encoder, Identity):
        return expanded
    columns = expanded
    if isinstance(encoder, Fourier):
        if encoder.table not in ("auto", "never"):
            raise ValueError(f"{op}: expected encoder.table to be auto or never, got {encoder.table!r}")
        check_matrix(op, "encoder.frequencies", encoder.frequencies, expanded, device)
        if encoder.frequencies.requires_grad:
            raise NotImplementedError(f"{op}: gradients of encoder.frequencies are not available (they are frozen in Gaussian Fourier features); detach them")
        columns = 2 * encoder.frequencies.shape[0]
    check_matrix(op, "encoder.weight", encoder.weight, columns, device)
    check_bias(op, "encoder.bias", encoder.bias, encoder.weight.shape[0])
    return encoder.weight.shape[0]


def _with_copies(w: torch.Tensor, sparse: bool) -> torch.Tensor:
    if not sparse:
        return w[None, :, :, None] if w.dim() == 2 else w
    return w[None, :, None] if w.dim() == 1 else w[None] if w.dim() == 2 else w


def _canonical(graph: NeuralGraph, weights) -> tuple[torch.Tensor, ...]:
    """Weight tensors as (copies, n_src, n_dst, C) views; 2-D (n_src, n_dst) is taken as one copy, one channel. Of sparse blocks
    (copies, E, C), where [E, C] is one copy and [E] one channel too."""
    weights = (weights,) if isinstance(weights, torch.Tensor) else tuple(weights)
    for k, w in enumerate(weights):
        if not isinstance(w, torch.Tensor):
            raise TypeError(f"EdgeState: expected weights[{k}] to be a tensor, got {type(w).__name__}")
        if w.layout is not torch.strided:
            raise NotImplementedError(f"EdgeState: expected weights[{k}] to be a strided tensor, got {w.layout}; sparse weights are not built yet, use .to_dense()")
    if len(weights) != graph.num_weights:
        raise ValueError(f"EdgeState: expected {graph.num_weights} weight tensors (one for each forward block), got {len(weights)}")
    if not weights:
        raise ValueError("EdgeState: expected a graph with at least one block, got none")
    if not graph.packed:
        weights = tuple(_with_copies(w, sparse) for w, sparse in zip(weights, graph.sparse_weights, strict=True))
    channels = weights[0].shape[-1] if weights[0].dim() else 0
    for k, (w, shape) in enumerate(zip(weights, graph.weight_shapes(channels), strict=True)):
        if tuple(w.shape) != shape:
            raise ValueError(f"EdgeState: expected weights[{k}] of shape {shape} (copies, n_src, n_dst, channels), got {tuple(w.shape)}")
        check_tensor("EdgeState", f"weights[{k}]", w, weights[0].device)
        if w.dtype == torch.float64 and weights[0].dtype != torch.float64 or w.dtype != torch.float64 and weights[0].dtype == torch.float64:
            raise TypeError(f"EdgeState: expected weights all float64 or none, got {weights[0].dtype} and {w.dtype}")
    if channels < 1:
        raise ValueError("EdgeState: expected weights with at least one channel, got 0")
    return weights


@dataclass(frozen=True)
class EdgeState:
    """The hidden state of every edge, as an expression: nothing of shape [E, D] exists until a consumer asks.

        e0 = encoder(scale w + shift);   e(l+1) = update_l(e(l), x_i, x_j)

    Args:
        graph: the neural graph.
        weights: one tensor for each forward block, (copies, n_src, n_dst, C) dense, (copies, n, C) diagonal,
            (copies, E, C) or [E, C] or [E] sparse, any strides (a transposed view of an (out, in) parameter is free),
            float32/bfloat16/float16/float64; or one tensor [E, C] for a packed graph. Weights on the CPU, in memory or in files, under
            everything else on a GPU pass through it in panels: for networks larger than its memory (ngkernels.panels).
        encoder: encoders.Linear, encoders.Fourier or encoders.Identity.
        affine: None, or (scale, shift), each one number per weight tensor: input statistics, no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Note: `update` and `checkpoint` return new states. Memory: the weights, the node states x, small matrices.
    """

    graph: NeuralGraph
    weights: tuple[torch.Tensor, ...]
    encoder: Linear | Fourier | Identity
    affine: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    steps: tuple[Update | Activate | Mark, ...] = ()
    width: int = field(default=-1)
    table: Table | None = None

    def __post_init__(self):
        if self.width >= 0:
            return
        object.__setattr__(self, "weights", _canonical(self.graph, self.weights))
        channels = self.weights[0].shape[-1]
        object.__setattr__(self, "width", _encoder_width(self.encoder, channels, self.device))
        if self.affine is not None:
            if len(self.affine) != 2:
                raise ValueError(f"EdgeState: expected affine to be (scale, shift), got {len(self.affine)} entries")
            for name, values in zip(("scale", "shift"), self.affine, strict=True):
                if len(values) != len(self.weights):
                    raise ValueError(f"EdgeState: expected {len(self.weights)} affine {name} values, got {len(values)}")

    def then(self, activation: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> EdgeState:
        """e' = weight act(e) + bias: a further layer of the encoder. weight [D', D], bias [D']."""
        check_activation("EdgeState.then", activation)
        check_matrix("EdgeState.then", "weight", weight, self.width, self.device)
        check_bias("EdgeState.then", "bias", bias, weight.shape[0])
        return replace(self, steps=(*self.steps, Activate(activation, weight, bias)), width=weight.shape[0])

    def update(
        self,
        x: torch.Tensor | None,
        weight_edge: torch.Tensor,
        weight_dst: torch.Tensor | None,
        weight_src: torch.Tensor | None,
        bias: torch.Tensor | None,
        weight_out: torch.Tensor,
        bias_out: torch.Tensor | None,
        activation: str = "silu",
        residual: bool = False,
        weight_reverse: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> EdgeState:
        """z = weight_edge e_ij + weight_reverse e_ji + weight_dst x_i + weight_src x_j + bias;
        e'_ij = norm([e_ij +] weight_out act(z) + bias_out).

        Args:
            x: node states [N, d_x]; i is the destination of the edge, j its source. None, with weight_dst and weight_src:
                a step of the edge alone.
            weight_edge: [H, D]. weight_dst, weight_src: [H, d_x]. bias: [H]. weight_out: [D', H]. bias_out: [D'].
            activation: one of silu, relu, gelu, tanh, sigmoid, leaky_relu, identity.
            residual: add e (D' = D).
            weight_reverse: [H, D], or None. e_ji is the state of the same two neurons in the other direction; where there
                is no such edge, it starts from the encoding of 0 and takes part in every update.
            norm: Norm of width D', or None.

        Returns:
            EdgeState: of width D'. Computes nothing.

        Raises:
            ValueError: shapes that do not fit, an unknown activation, weight_reverse where two blocks join the same layers.

        Reference: Kofinas et al., ICLR 2024, section 3 (edge updates of NG-GNN), appendix (edge updates of NG-T).
        """
        op, device = "EdgeState.update", self.device
        check_activation(op, activation)
        check_matrix(op, "weight_edge", weight_edge, self.width, device)
        hidden, width = weight_edge.shape[0], weight_out.shape[0]
        check_matrix(op, "weight_out", weight_out, hidden, device)
        if weight_reverse is not None:
            check_matrix(op, "weight_reverse", weight_reverse, self.width, device)
            if weight_reverse.shape[0] != hidden:
                raise ValueError(f"{op}: expected weight_reverse with {hidden} rows (as weight_edge), got {weight_reverse.shape[0]}")
            self.graph.check_pairs(self.encoder.reciprocal)
        if residual and width != self.width:
            raise ValueError(f"{op}: expected weight_out with {self.width} rows (residual), got {width}")
        given = [t is not None for t in (x, weight_dst, weight_src)]
        if any(given) and not all(given):
            raise ValueError(f"{op}: expected x, weight_dst and weight_src together or none of them, got {sum(given)} of 3")
        node = NodeTerm(x, weight_dst, weight_src, bias) if all(given) else None
        if node is not None:
            node.check(op, self.graph, hidden, device)
        else:
            check_bias(op, "bias", bias, hidden)
        check_bias(op, "bias_out", bias_out, width)
        if norm is not None:
            _check_norm(op, norm, width, device)
        step = Update(weight_edge, weight_reverse, None if node else bias, node, activation, weight_out, bias_out, residual, norm)
        table = self.table
        if table is not None and not self.steps and not residual and weight_reverse is None:
            table = self._table_through(table, weight_edge)
        return replace(self, steps=(*self.steps, step), width=width, table=table)

    @staticmethod
    def _table_through(table: Table, weight: torch.Tensor) -> Table:
        from .program import full_precision  # which imports this module

        with full_precision(weight.device):
            return table.times(weight, through=True)

    def tabulate(self) -> EdgeState:
        """The same state with the table of its Fourier encoder made now, once for all that consume it, instead of by each consumer.

        Returns:
            EdgeState: holds a tensor [directions, nodes, 3, D] computed from the encoder's matrix: like any computed tensor it serves one
                backward pass (or several with retain_graph), and does not follow later changes of the matrix. Itself where nothing is
                tabulated: other encoders, float64, several channels, the reference backend.

        Raises:
            NotImplementedError: a forced backend that cannot run.
        """
        from .program import _dtype, full_precision  # which imports this module

        device = self.device
        if not isinstance(self.encoder, Fourier) or self.steps or backends.BACKENDS[backends.choose("tabulate", device)] == "reference":
            return self
        with full_precision(device):
            return replace(self, table=make_table(self.encoder, self.weights, self.affine, _dtype(self), 2))

    @property
    def device(self) -> torch.device:
        """Where states are evaluated: where the weights are, or the encoder's matrix on a GPU that reads weights on the CPU (ngkernels.panels)."""
        here, matrix = self.weights[0].device, getattr(self.encoder, "weight", None)
        return matrix.device if here.type == "cpu" and matrix is not None and matrix.is_cuda else here

    @property
    def paired(self) -> bool:
        """Whether a state depends on the state of the reversed edge."""
        return any(isinstance(s, Update) and s.weight_reverse is not None for s in self.steps)

    def closure(self, over: str = "edges") -> EdgeState:
        """The same state on every pair that attention over `over` reads (NeuralGraph.closure).

        Raises:
            ValueError: as NeuralGraph.closure; a state that was checkpointed before.
        """
        if not self.graph.closed and any(isinstance(s, Mark) for s in self.steps):
            raise ValueError(CLOSE_FIRST)
        return replace(self, graph=self.graph.closure(over, self.encoder.reciprocal))

    def dense(self) -> EdgeState:
        """The same state with sparse blocks made dense, every pair of their layers an edge: raw feature 0 (after `affine`) where there
        was none. Takes one raw feature a pair, of a packed graph one tensor a block; three features a pair, closed over all pairs,
        where an encoder reads both directions and both may have an edge. Attention over all pairs reads sparse graphs through it.

        Raises:
            ValueError: two edges from one neuron to another, a state that is checkpointed or closed.
        """
        return dense(self)

    def checkpoint(self, store: torch.dtype | None = None) -> EdgeState:
        """The same state, restarted: from stored values (`store` a dtype), or virtually (None).

        Stored: the state is evaluated once, [E, D] in `store`, and later consumers start from it. Virtual:
        nothing is stored; forward evaluation still starts at the weights, while gradients stop here, meet in
        one transient buffer [E, D] and go on to the weights once. Both give the gradients of `self`.
        """
        from .ops.checkpoint import checkpoint  # ops import this module

        return checkpoint(self, store)

    def restrict(self, layer: int = -1) -> EdgeState:
        """The same state on the edges into node layer `layer` only."""
        return replace(self, graph=self.graph.restrict(layer))


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value):
    """The same description with function(t) for every tensor t, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(function, v) for v in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{name: map_tensors(function, getattr(value, name)) for name in value.__dataclass_fields__})
    return value


@dataclass(frozen=True)
class Message:
    """How edge (j -> i) turns e_ij, x_i and x_j into a message of F numbers; build it with a class method.

    q = mlp(weight_dst x_i + weight_src x_j + bias);  [s | t] = weight_edge e + bias_edge
    film: s q + t    gate: sigmoid(s) q    product: s q    concat: mlp(s + weight_dst x_i + weight_src x_j + bias)
    """

    kind: str
    weight_edge: torch.Tensor
    bias_edge: torch.Tensor | None
    node: NodeTerm
    mlp: tuple[Affine, ...] = ()
    activation: str = "relu"

    @classmethod
    def film(cls, x, weight_edge, bias_edge, weight_dst, weight_src, bias=None, mlp: Sequence[Affine] = (), activation: str = "relu") -> Message:
        """m = s q + t. weight_edge [2F, D] (scale rows first), weight_dst/src [F, d_x]; mlp: further (W, b) after act."""
        return cls("film", weight_edge, bias_edge, NodeTerm(x, weight_dst, weight_src, bias), tuple(mlp), activation)

    @classmethod
    def gate(cls, x, weight_edge, bias_edge, weight_dst, weight_src, bias=None, mlp: Sequence[Affine] = (), activation: str = "relu") -> Message:
        """m = sigmoid(s) q. weight_edge [F, D]."""
        return cls("gate", weight_edge, bias_edge, NodeTerm(x, weight_dst, weight_src, bias), tuple(mlp), activation)

    @classmethod
    def product(cls, x, weight_edge, bias_edge, weight_dst, weight_src, bias=None, mlp: Sequence[Affine] = (), activation: str = "relu") -> Message:
        """m = s q. weight_edge [F, D]."""
        return cls("product", weight_edge, bias_edge, NodeTerm(x, weight_dst, weight_src, bias), tuple(mlp), activation)

    @classmethod
    def concat(cls, x, weight_edge, bias_edge, weight_dst, weight_src, bias=None, mlp: Sequence[Affine] = (), activation: str = "relu") -> Message:
        """m = mlp(weight_edge e + bias_edge + weight_dst x_i + weight_src x_j + bias). weight_edge [F, D]."""
        return cls("concat", weight_edge, bias_edge, NodeTerm(x, weight_dst, weight_src, bias), tuple(mlp), activation)

    @property
    def width(self) -> int:
        """F."""
        return self.mlp[-1][0].shape[0] if self.mlp else self.node.weight_dst.shape[0]

    def check(self, op: str, edges: EdgeState) -> None:
        """Raises ValueError when the matrices do not fit `edges`."""
        if self.kind not in MESSAGES:
            raise ValueError(f"{op}: expected a message of kind {', '.join(MESSAGES)}, got {self.kind!r}")
        check_activation(op, self.activation)
        device = edges.device
        check_matrix(op, "weight_edge", self.weight_edge, edges.width, device)
        check_bias(op, "bias_edge", self.bias_edge, self.weight_edge.shape[0])
        check_matrix(op, "weight_dst", self.node.weight_dst, None)
        hidden = self.node.weight_dst.shape[0]
        self.node.check(op, edges.graph, hidden, device)
        width = hidden
        for k, (w, b) in enumerate(self.mlp):
            check_matrix(op, f"mlp[{k}] weight", w, width, device)
            width = w.shape[0]
            check_bias(op, f"mlp[{k}] bias", b, width)
        rows = {"film": 2 * width, "concat": hidden}.get(self.kind, width)
        if self.weight_edge.shape[0] != rows:
            raise ValueError(f"{op}: expected weight_edge with {rows} rows for a {self.kind} message, got {self.weight_edge.shape[0]}")
