"""LLaMA-shaped decoders: attention, gated MLP, RMSNorm and residual connections as blocks of a neural graph."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ngkernels import Block, NeuralGraph
from ngkernels.blocks import DENSE, DIAGONAL

from .files import CheckpointError
from .network import Channels, Network, Origin

_LAYER = re.compile(r"(?P<prefix>(?:.+\.)?)layers\.(?P<layer>\d+)\.(?P<part>.+)")
_PARTS = {
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight",
    "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
}  # fmt: skip
_BIASES = {"self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"}
_BUFFERS = ("self_attn.rotary_emb.inv_freq",)
ATTENTION = ("vector", "parallel")
NOT_MODELLED = (
    "the softmax of attention and what it does to keys and values", "rotary positions", "the product of gate and up (their neurons are joined by edges of 1)",
    "the division by the root mean square in RMSNorm",
)  # fmt: skip


def is_llama(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the names are those of a LLaMA-shaped decoder."""
    return any((match := _LAYER.fullmatch(name)) and match["part"] in _PARTS for name in state)


class _Assembly:
    """Node layers and blocks, added one after the other."""

    def __init__(self, like: torch.Tensor):
        self.like = like
        self.widths, self.layers, self.activations, self.biases, self.bias_names = [], [], [], [], []
        self.blocks, self.weights, self.block_names, self.tensors = [], [], [], []

    def layer(self, name: str, width: int, activation: str = "none", bias: tuple[str, torch.Tensor] | None = None) -> int:
        """A node layer; returns its number. Without a bias, zeros that take no memory."""
        self.widths.append(width)
        self.layers.append(name)
        self.activations.append(activation)
        self.bias_names.append("" if bias is None else bias[0])
        self.biases.append((self.like.new_zeros(1).expand(width) if bias is None else bias[1])[None, :, None])
        return len(self.widths) - 1

    def block(self, kind: str, src: int, dst: int, name: str, weight: torch.Tensor | Channels, *tensors: str) -> None:
        self.blocks.append(Block(kind, src, dst, len(self.blocks)))
        self.weights.append(weight)
        self.block_names.append(name)
        self.tensors.append(tensors)

    def dense(self, src: int, dst: int, name: str, weight: torch.Tensor) -> None:
        """`weight` (out, in), as a transposed view."""
        self.block(DENSE, src, dst, name, weight.T[None, :, :, None], name)

    def diagonal(self, src: int, dst: int, name: str, weight: torch.Tensor | None = None) -> None:
        """`weight` (n,), or None for edges of 1, which take no memory."""
        width = min(self.widths[src], self.widths[dst])
        values = self.like.new_ones(1).expand(width) if weight is None else weight
        self.block(DIAGONAL, src, dst, name, values[None, :, None], *(() if weight is None else (name,)))

    def network(self, reverse: bool, ignored: tuple[str, ...]) -> Network:
        graph = NeuralGraph.from_blocks(self.widths, self.blocks, reverse=reverse)
        names = map(tuple, (self.layers, self.block_names, self.tensors, self.bias_names))
        origin = Origin("llama", *names, ignored, NOT_MODELLED)
        return Network(graph, self.weights, self.biases[1:], self.activations[1:-1], origin)


class _Reader:
    """The tensors of a state dict, with checks of names and shapes."""

    def __init__(self, state: Mapping[str, torch.Tensor], op: str):
        self.state, self.op = state, op
        first = next(match for name in state if (match := _LAYER.fullmatch(name)) and match["part"] in _PARTS)
        self.prefix = first["prefix"]
        self.ignored = tuple(sorted(n for n in state if n.endswith(_BUFFERS)))
        self.outside = (f"{self.prefix}embed_tokens.weight", f"{self.prefix}norm.weight", self._head())
        numbers, unknown = set(), []
        for name in state:
            match = _LAYER.fullmatch(name)
            if match and match["prefix"] == self.prefix and match["part"] in _PARTS | _BIASES:
                numbers.add(int(match["layer"]))
            elif name not in self.outside and name not in self.ignored:
                unknown.append(name)
        if unknown:
            raise NotImplementedError(
                f"{op}: expected the tensors of LLaMA-shaped decoder blocks, got also {', '.join(sorted(unknown)[:4])}"
                f"{' and others' if len(unknown) > 4 else ''}; biases of queries, keys and values, experts, norms of queries and keys, and adapters are not built"
            )
        if numbers != set(range(len(numbers))):
            gap = min(set(range(max(numbers))) - numbers)
            raise CheckpointError(
                f"{op}: expected decoder blocks 0 to {max(numbers)}, got none with number {gap}; a shard alone? pass its index"
            )
        self.depth = len(numbers)

    def _head(self) -> str:
        found = [name for name in ("lm_head.weight", f"{self.prefix}lm_head.weight") if name in self.state]
        return found[0] if found else "lm_head.weight"

    def name(self, layer: int, part: str) -> str:
        return f"{self.prefix}layers.{layer}.{part}"

    def tensor(self, name: str, *shape: int | None) -> torch.Tensor:
        """The tensor `name`; None stands for any size."""
        if name not in self.state:
            raise CheckpointError(f"{self.op}: expected a tensor {name!r}, got none; a shard alone? pass its index")
        t = self.state[name]
        if not t.is_floating_point() or t.dtype.itemsize == 1:
            raise NotImplementedError(
                f"{self.op}: expected {name!r} of float64, float32, float16 or bfloat16, got {t.dtype}; quantised weights are not built"
            )
        if t.dim() != len(shape) or any(want not in (None, size) for want, size in zip(shape, t.shape)):
            wanted = f"({', '.join('*' if want is None else str(want) for want in shape)}{',' * (len(shape) == 1)})"
            raise CheckpointError(f"{self.op}: expected {name!r} of shape {wanted}, got {tuple(t.shape)}")
        return t

    def bias(self, layer: int, part: str, width: int) -> tuple[str, torch.Tensor] | None:
        name = self.name(layer, part)
        return (name, self.tensor(name, width)) if name in self.state else None


def from_llama(
    state: Mapping[str, torch.Tensor],
    reverse: bool = False,
    num_heads: int | None = None,
    attention: str = "vector",
    op: str = "from_llama",
) -> Network:
    """The neural graph of a LLaMA-shaped decoder: of its blocks, and of embedding, last norm and head where they are there.

    One decoder block has the node layers x, normed, heads, x', normed', gate, up, x'': RMSNorm weights are diagonal
    blocks, queries, keys and values the edges from normed to heads, residual connections diagonal blocks of 1 from x
    to x' and from x' to x''. Tokens are input and output nodes.

    Args:
        state: tensors under the names of Hugging Face's LlamaForCausalLM, any prefix.
        reverse: add the reversed edges.
        num_heads: query heads; needed where several of them share keys and values (grouped-query attention).
        attention: "vector": one edge (q, k, v) from i to (h, j), as `Channels` of views. "parallel": an edge each for
            q, k and v, so that all weights are plain views with one number on an edge.
        op: named in errors.

    Returns:
        Network: weights are views of the tensors. `origin.not_modelled` says what the graph leaves out.

    Raises:
        CheckpointError: tensors missing or of shapes that do not fit. NotImplementedError: other tensors, quantised ones,
            "parallel" with grouped-query attention. ValueError: an unknown `attention`.

    Reference: Kofinas et al., ICLR 2024, appendix on transformers (attention, norms and residual connections as edges).
    """
    if attention not in ATTENTION:
        raise ValueError(f"{op}: expected attention in {', '.join(ATTENTION)}, got {attention!r}")
    read = _Reader(state, op)
    embedding, norm, head = read.outside
    queries = read.tensor(read.name(0, "self_attn.q_proj.weight"), None, None)
    parts, width = _Assembly(queries), queries.shape[1]
    if embedding in state:
        tokens = read.tensor(embedding, None, width)
        inputs, stream = parts.layer("tokens", tokens.shape[0]), parts.layer("embedding", width)
        parts.dense(inputs, stream, embedding, tokens.T)
    else:
        stream = parts.layer("input", width)
    for k in range(read.depth):
        stream = _decoder_block(parts, read, k, stream, width, num_heads, attention)
    if norm in state:
        last, stream = stream, parts.layer("norm", width)
        parts.diagonal(last, stream, norm, read.tensor(norm, width))
    if head in state or (embedding in state and norm in state):  # without a head of its own, the embedding is used again
        name = head if head in state else embedding
        logits = read.tensor(name, None, width)
        parts.dense(stream, parts.layer("logits", logits.shape[0]), name, logits)
    return parts.network(reverse, read.ignored)


def _decoder_block(parts: _Assembly, read: _Reader, k: int, stream: int, width: int, num_heads: int | None, attention: str) -> int:
    """Adds block k to the node layer `stream`; returns the layer of its result."""

    def linear(src: int, part: str, label: str, outputs: int | None, activation: str = "none") -> int:
        weight = read.tensor(read.name(k, f"{part}.weight"), outputs, parts.widths[src])
        dst = parts.layer(f"layers.{k}.{label}", weight.shape[0], activation, read.bias(k, f"{part}.bias", weight.shape[0]))
        parts.dense(src, dst, read.name(k, f"{part}.weight"), weight)
        return dst

    def normed(src: int, part: str, label: str) -> int:
        name = read.name(k, f"{part}.weight")
        dst = parts.layer(f"layers.{k}.{label}", width)
        parts.diagonal(src, dst, name, read.tensor(name, width))
        return dst

    heads = _attention(parts, read, k, normed(stream, "input_layernorm", "normed"), num_heads, attention)
    attended = linear(heads, "self_attn.o_proj", "attended", width)
    parts.diagonal(stream, attended, f"layers.{k}.residual of attention")
    second = normed(attended, "post_attention_layernorm", "normed'")
    gate = linear(second, "mlp.gate_proj", "gate", None, "silu")
    up = linear(second, "mlp.up_proj", "up", parts.widths[gate])
    parts.diagonal(gate, up, f"layers.{k}.gate times up")
    out = linear(up, "mlp.down_proj", "out", width)
    parts.diagonal(attended, out, f"layers.{k}.residual of MLP")
    return out


def _attention(parts: _Assembly, read: _Reader, k: int, src: int, num_heads: int | None, attention: str) -> int:
    """Adds queries, keys and values of block k; returns the node layer of the heads."""
    names = [read.name(k, f"self_attn.{n}_proj.weight") for n in "qkv"]
    q = read.tensor(names[0], None, parts.widths[src])
    key = read.tensor(names[1], None, parts.widths[src])
    value = read.tensor(names[2], *key.shape)
    queries, shared = q.shape[0], key.shape[0]
    dst = parts.layer(f"layers.{k}.heads", queries)
    if queries == shared:
        planes = [t.T for t in (q, key, value)]
    else:
        planes = _grouped(read.op, names[0], q, key, value, num_heads)
    if attention == "vector":
        parts.block(DENSE, src, dst, read.name(k, "self_attn.qkv"), Channels(tuple(planes)), *names)
        return dst
    if queries != shared:
        raise NotImplementedError(
            f"{read.op}: expected as many keys as queries with attention='parallel', got {shared} and {queries} (grouped-query attention); use 'vector'"
        )
    for name, plane in zip(names, planes, strict=True):
        parts.block(DENSE, src, dst, name, plane[None, :, :, None], name)
    return dst


def _grouped(op: str, name: str, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int | None) -> list[torch.Tensor]:
    """Views (in, key heads, queries of each, head width) of queries, and of keys and values repeated."""
    queries, shared = q.shape[0], key.shape[0]
    if num_heads is None:
        raise CheckpointError(
            f"{op}: expected num_heads where queries share keys and values, got none ({name!r} has {queries} rows, its keys {shared}); "
            "pass num_heads, or keep config.json beside the file"
        )
    size = queries // num_heads if num_heads > 0 and queries % num_heads == 0 else 0
    if not size or shared % size or num_heads % (shared // size):
        raise CheckpointError(f"{op}: expected num_heads that fits {queries} rows of queries and {shared} of keys, got {num_heads}")
    groups = shared // size
    each = num_heads // groups
    spread = [t.view(groups, 1, size, -1).expand(groups, each, size, -1) for t in (key, value)]
    return [t.permute(3, 0, 1, 2) for t in (q.view(groups, each, size, -1), *spread)]
