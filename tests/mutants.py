"""Seeded bugs in the Python of the engine: each is a small edit of one function, and the tests of its op must fail on it.

The text must stand there exactly once: whoever changes that line finds the bug listed here, and renews it.
"""

from __future__ import annotations
import __future__

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """In the source of `function` ("module:name" or "module:Class.name"), `old` becomes `new`."""

    function: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    name: str
    op: str
    edits: tuple[Edit, ...]
    backend: str = "reference"


def rewritten(function: str, old: str, new: str) -> tuple[object, str, object]:
    """(owner, name, the changed function)."""
    module, _, path = function.partition(":")
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = inspect.getattr_static(owner, name)
    plain = getattr(original, "__func__", original)
    source = textwrap.dedent(inspect.getsource(plain))
    if source.count(old) != 1:
        raise LookupError(
            f"mutant: expected {old!r} once in {function}, got {source.count(old)} times; the code has changed, renew the mutant"
        )
    code = compile(source.replace(old, new), f"<mutant of {function}>", "exec", __future__.annotations.compiler_flag, True)
    found: dict = {}
    exec(code, plain.__globals__, found)
    return owner, name, found[name]


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    from ngkernels import encoders

    before = []
    encoders._basis_cache.clear()
    try:
        for edit in mutant.edits:
            owner, name, changed = rewritten(edit.function, edit.old, edit.new)
            before.append((owner, name, inspect.getattr_static(owner, name)))
            setattr(owner, name, changed)
        yield
    finally:
        for owner, name, original in reversed(before):
            setattr(owner, name, original)
        encoders._basis_cache.clear()


EVALUATE, EDGES = "ngkernels.reference.evaluate", "ngkernels.reference.edge_list:EdgeList"
BUILDER, GRAPH, TOPOLOGY = "ngkernels.program:_Builder", "ngkernels.graph:NeuralGraph", "ngkernels.topology:_PartTable"


def one(name: str, op: str, function: str, old: str, new: str, backend: str = "reference") -> Mutant:
    return Mutant(name, op, (Edit(function, old, new),), backend)


AGGREGATE = tuple(one(name, "aggregate", *rest) for name, *rest in (
    ("last-edge-dropped", f"{EVALUATE}:messages", "return e[:, :width] * q + e[:, width:], edges", "m = e[:, :width] * q + e[:, width:]; m = torch.cat([m[:-1], 0 * m[-1:]]); return m, edges"),
    ("source-for-destination", f"{EVALUATE}:Evaluator.node_term", "dst[self.edges.dst] + src[self.edges.src]", "dst[self.edges.src] + src[self.edges.dst]"),
    ("scale-for-shift", f"{EVALUATE}:messages", "e[:, :width] * q + e[:, width:]", "e[:, width:] * q + e[:, :width]"),
    ("gate-without-sigmoid", f"{EVALUATE}:messages", "torch.sigmoid(e) * q", "e * q"),
    ("ties-not-shared", f"{EVALUATE}:_extreme", "share = tied / ties.clamp(min=1)[out]", "share = tied"),
    ("unbiased-variance", f"{EVALUATE}:reduce_messages", "centred * centred) / count", "centred * centred) / (count - 1).clamp(min=1)"),
    ("no-std-threshold", f"{EVALUATE}:reduce_messages", "~(var <= STD_THRESHOLD)", "~(var <= 0)"),
    ("mean-over-one-more", f"{EVALUATE}:reduce_messages", '"mean": total / count', '"mean": total / (count + 1)'),
    ("uncentred-variance", f"{EVALUATE}:reduce_messages", "index_add(0, out, centred * centred) / count", "index_add(0, out, m * m) / count - results['mean'] ** 2"),
    ("max-is-min", f"{EVALUATE}:_extreme", '"a" + name', '"amin"'),
    ("bias-not-folded", f"{BUILDER}.linear", "b = w.times(c) if b is None else b.plus(w.times(c))", "b = b"),
    ("residual-forgotten", f"{BUILDER}.step", "self.emit(ADD, self.width, self.width, arg0=kept)", "pass"),
    ("copies-share-nodes", f"{EDGES}.__init__", 'row["dst"] + node + i', 'row["dst"] + 0 * node + i'),
    ("reverse-not-transposed", f"{EDGES}._read", '(j, i) if row["src_axis"] == 1 else (i, j)', "(j, i)"),
    ("reverse-axis-lost", f"{TOPOLOGY}.reads", "2 if block.reverse else 1", "1"),
    ("reciprocal-exchanged", "ngkernels.program:expansion", "if direction == 0", "if direction == 1"),
    ("sine-before-cosine", f"{EVALUATE}:Evaluator.fourier", "[arg.cos(), arg.sin()]", "[arg.sin(), arg.cos()]"),
    ("shift-forgotten", f"{EVALUATE}:Evaluator.load", "raw * scale[:, None] + shift[:, None]", "raw * scale[:, None]"),
    ("restricted-by-source", f"{TOPOLOGY}.edge_rows", "not in (None, b.dst)", "not in (None, b.src)"),
    ("order-of-reductions-ignored", "ngkernels:aggregate", "return out if natural == reduce else", "return out if True else"),
    ("packed-from-the-start", f"{EDGES}._read", 'row["offset"] + copy', "copy"),
    ("table-one-cell-off", "ngkernels.ops.tabulate:grid_basis", "torch.arange(-inner, inner + 1,", "torch.arange(-inner + 1, inner + 2,", "cpp"),
    ("table-too-coarse", "ngkernels.encoders:table_step", "max(0, ", "max(0, -2 + ", "cpp"),
    ("table-that-is-not-complete", "ngkernels.program:make_table", "enc.table_range is None and limit is not None and half", "half", "cpp"),
    ("autocast-reaches-the-folding", "ngkernels.program:full_precision", "torch.autocast(kind, enabled=False)", "nullcontext()"),
))  # fmt: skip

READOUT = tuple(one(name, "readout", *rest) for name, *rest in (
    ("source-for-destination", f"{EVALUATE}:Evaluator.node_term", "dst[self.edges.dst] + src[self.edges.src]", "dst[self.edges.src] + src[self.edges.dst]"),
    ("no-first-activation", "ngkernels.ops.readout:build_state", "if k:", "if k > 1:"),
    ("no-biases", "ngkernels.ops.readout:build_state", "b.linear(w, bias,", "b.linear(w, None,"),
    ("edges-in-another-order", f"{EVALUATE}:emit", "piece.reshape(row", "piece.flip(0).reshape(row"),
    ("packed-in-the-weights-places", f"{EDGES}.block_index", 'row["emit_offset" if', 'row["offset" if'),
    ("dtype-ignored", "ngkernels.ops.readout:run", "dtype = e.table.dtype if dtype is None else dtype", "dtype = e.table.dtype"),
    ("reverse-axis-lost", f"{TOPOLOGY}.reads", "2 if block.reverse else 1", "1"),
    ("unread-blocks-not-skipped", "ngkernels.ops.expression:reference_gradients", "o.requires_grad and g.numel()", "o.requires_grad"),
    ("only-the-first-output-counts", "ngkernels.ops.expression:reference_gradients", "for o, g in zip(outputs, grads, strict=True)", "for o, g in list(zip(outputs, grads, strict=True))[:1]"),
    ("shift-forgotten", f"{EVALUATE}:Evaluator.load", "raw * scale[:, None] + shift[:, None]", "raw * scale[:, None]"),
))  # fmt: skip

CHECKPOINT = (
    Mutant("counted-twice", "checkpoint", (
        Edit(f"{EVALUATE}:Evaluator.one", "last.detach() + self.carried(last)", "last + self.carried(last)"),
        Edit("ngkernels.ops.checkpoint:_detached", "\"weights\": edges.weights, ", ""),
    )),
    *(one(name, "checkpoint", *rest) for name, *rest in (
        ("hands-nothing-on", f"{EDGES}.block_values", "[index].flatten(0, 1)", "[index].flatten(0, 1).detach()"),
        ("restricted-carriers-misnumbered", f"{BUILDER}.finish", "self.carriers[k] for k in self.topology.used_blocks", "self.carriers[k] for k in range(len(self.topology.used_blocks))"),
        ("reversed-blocks-stored-forward", f"{GRAPH}.without_sharing", "Block(b.kind, b.src, b.dst, k,", "Block(b.kind, b.dst, b.src, k,"),
        ("another-dtype", "ngkernels.ops.checkpoint:checkpoint", '"identity", store, "checkpoint"', '"identity", torch.bfloat16, "checkpoint"'),
        ("one-update-too-early", "ngkernels.ops.checkpoint:checkpoint", "values = run(edges,", "values = run(replace(edges, steps=edges.steps[:-1]),"),
        ("statistics-applied-again", "ngkernels.ops.checkpoint:checkpoint", "tuple(values), Identity())", "tuple(values), Identity(), edges.affine)"),
        ("stored-without-gradient", "ngkernels.ops.checkpoint:checkpoint", "tuple(values), Identity())", "tuple(v.detach() for v in values), Identity())"),
        ("pending-map-lost", f"{BUILDER}.step", "if isinstance(step, Mark):\n        self.materialise()", "if isinstance(step, Mark):\n        pass"),
        ("packed-carriers-from-the-start", f"{EDGES}.block_index", "return (offset + copy", "return (copy"),
    )),
)  # fmt: skip

ATTEND = "ngkernels.reference.attend"
ATTENTION = tuple(one(name, "attend", *rest) for name, *rest in (
    ("keys-of-the-reader", f"{ATTEND}:attend", "k[j] + shares", "k[i] + shares"),
    ("values-of-the-reader", f"{ATTEND}:attend", "v[j] * shares", "v[i] * shares"),
    ("one-softmax-for-all-heads", f"{ATTEND}:attend", "torch.where(empty, 1.0, total)[out]", "torch.where(empty, 1.0, total).mean(1, keepdim=True)[out]"),
    ("rows-that-read-nothing", f"{ATTEND}:attend", "p / torch.where(empty, 1.0, total)[out]", "p / total.mean(0)"),
    ("mask-of-unordered-pairs", f"{ATTEND}:kept", "j[:, None] * 0x85EBCA77", "j[:, None] * 0x9E3779B1"),
    ("dropped-weights-not-scaled", f"{ATTEND}:kept", ".double() / (1 - dropout)", ".double()"),
    ("in-is-out", f"{TOPOLOGY}.used", "return block.edge", "return self.part.blocks[self.part.opposite(self.part.blocks.index(block))].edge"),
    ("itself-always", f"{TOPOLOGY}.used", "return include_self", "return True"),
    ("tokens-start-from-the-encoder", f"{TOPOLOGY}.row", "flags |= TOKEN", "pass"),
    ("checkpointed-tokens-start-again", f"{BUILDER}.__init__", "edges.graph.stored or not any", "not any"),
    ("checkpointed-tokens-forgotten", f"{GRAPH}.without_sharing", "p.copies, p.token)", "p.copies)"),
    ("messages-along-no-edges", f"{TOPOLOGY}.edge_rows", "(messages and not b.edge)", "False"),
    ("reversed-pairs-read-nothing", "ngkernels.blocks:_reversal", "if reciprocal and block.weight >= 0:", "if False:"),
    ("bias-of-the-reverse-not-folded", f"{BUILDER}.pair", "both = w.plus(reverse).times(c)", "both = w.times(c)"),
    ("norm-after-the-next-update", f"{BUILDER}.step", "if step.norm is not None:", "if step.norm is not None and step.residual:"),
))  # fmt: skip

PYTHON = (*AGGREGATE, *READOUT, *CHECKPOINT, *ATTENTION)
