"""Ahead-of-time compilation of the Triton kernels for GPUs that need not be there.

`python tests/aot.py VARIANT CAPABILITY...` compiles every launch of a variant's ops, forward and backward, and prints a line of JSON for
each kernel. A process of its own, because it must not run under TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from oracle import Network, mlp
from pair_samples import PairSample, attend, pair_state
from pair_samples import leaves as pair_leaves
from sample_list import PLAIN, PRUNED, UNEQUAL_REVERSED
from samples import Sample, cast, edge_state, leaves, message_of, pairs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import ngkernels as ngk
from ngkernels import backends
from ngkernels._triton import sizes
from ngkernels._triton.lower import Step
from ngkernels.ops import expression as ex
from ngkernels.ops.node_map import After, node_map
from ngkernels.program import LIN

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32", torch.int16: "i16"}
OP, N_IN = Step._fields.index("op"), Step._fields.index("n_in")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# ---- what is compiled ----
@dataclass(frozen=True)
class Variant:
    sample: Sample | PairSample | NodeSample
    precision: str = "bf16"  # of matrix products
    weights: torch.dtype = torch.float32


def ng_gnn(width: int, layer: int, **changes) -> Sample:
    """Message layer `layer` (from 1) of NG-GNN: a chain of layer - 1 updates, FiLM, the usual reductions."""
    given = {"networks": (mlp(2, 64, 64, 3),), "width": width, "hidden": width, "features": width, "node_width": width, "head": 0, **changes}
    return PLAIN.but(f"ng-gnn-{width}-{layer}", residual=(False,) * (layer - 1), memory=(), **given)


def ng_t(width: int, updates: int, **changes) -> PairSample:
    """Attention over the pair states of NG-T after `updates` layers."""
    given = {"networks": (mlp(2, 64, 64, 3),), "width": width, "hidden": 2 * width, "node_width": width, "heads": 8, "dk": 8, "dv": 8, **changes}
    many = dict.fromkeys(("residual", "reverse", "nodes", "norm"), (True,) * updates)
    return PairSample(name=f"ng-t-{width}-{updates}", memory=(), **many, **given)


@dataclass(frozen=True)
class NodeSample:
    """A node map: columns of x, of reduced, of the result; factors (None: 1); the norm, and whether the activation comes before it."""

    width: int = 32
    reduced: int = 128
    factors: tuple[int | None, ...] = (None, 1)
    norm: str | None = "layer"
    first: bool = False

    def run(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(results, what they depend on)."""
        rows, width = 70, self.width
        inputs, shapes = width + len(self.factors) * self.reduced, [(rows, width), (rows, self.reduced)]
        x, reduced, matrix, bias, lin, lin_bias, weight, shift = live = [
            torch.zeros(s, dtype=dtype, requires_grad=True) for s in (*shapes, (width, inputs), width, (width, width), width, width, width)
        ]
        factors = [None if f is None else torch.ones(rows, dtype=dtype) for f in self.factors]
        bounds = torch.tensor([0, 20, rows]) if self.norm == "graph" else None
        after = After("silu", self.norm, weight, shift, bounds, act_first=self.first)
        return [node_map(x, reduced, [matrix, bias, lin, lin_bias], factors, after)], live


EMIT = {"reduce": (), "head": 2, "head_nodes": True}
VARIANTS = {
    "layer-1": Variant(ng_gnn(32, 1)),
    "layer-2": Variant(ng_gnn(32, 2)),
    "layer-3": Variant(ng_gnn(32, 3)),
    "layer-4": Variant(ng_gnn(32, 4)),
    "layer-3-tf32": Variant(ng_gnn(32, 3), "tf32"),
    "layer-3-exact": Variant(ng_gnn(32, 3), "ieee"),
    "layer-2-double": Variant(ng_gnn(16, 2), "float64", torch.float64),
    "layer-8": Variant(ng_gnn(32, 8)),
    "width-8": Variant(ng_gnn(8, 3)),
    "width-17-exact": Variant(ng_gnn(17, 2), "ieee"),
    "width-64": Variant(ng_gnn(64, 3)),
    "width-64-exact": Variant(ng_gnn(64, 2), "ieee"),
    "width-128": Variant(ng_gnn(128, 2)),
    "width-130-exact": Variant(ng_gnn(130, 2), "ieee"),
    "width-256": Variant(ng_gnn(256, 2)),
    "all-reductions": Variant(ng_gnn(32, 1, reduce=("sum", "mean", "min", "max", "std", "var"))),
    "gate": Variant(ng_gnn(32, 2, kind="gate", mlp=1, activation="gelu")),
    "product": Variant(ng_gnn(32, 2, kind="product", activation="tanh")),
    "concat": Variant(ng_gnn(32, 2, kind="concat", mlp=2, reduce=("sum",))),
    "table": Variant(ng_gnn(32, 2, encoder="fourier", table="auto", table_range=2.0, frequencies=64, networks=(mlp(2, 64, 64, 3, reverse=True),), reciprocal=True)),
    "fourier": Variant(ng_gnn(32, 2, encoder="fourier", channels=3, frequencies=32)),
    "channels-9": Variant(ng_gnn(32, 2, channels=9, affine=True)),
    "residual-layers": Variant(PLAIN.but("residual", networks=(mlp(2, 64, 3),), width=32, hidden=32, features=32, node_width=32, layers=2, residual=(True, True), head=0)),
    "packed": Variant(ng_gnn(32, 2, networks=UNEQUAL_REVERSED, packed=True), weights=torch.bfloat16),
    "virtual": Variant(PLAIN.but("virtual", width=32, hidden=32, features=32, node_width=32, memory=("virtual", None), residual=(False, False), head=0)),
    "readout": Variant(ng_gnn(32, 3, **EMIT), weights=torch.float16),
    "readout-64": Variant(ng_gnn(64, 2, **EMIT), "tf32"),
    "sparse": Variant(ng_gnn(32, 2, networks=(PRUNED,))),
    "attend": Variant(ng_t(64, 2)),
    "attend-small": Variant(ng_t(16, 0, heads=2, add=False, over="edges")),
    "attend-edges-table": Variant(ng_t(16, 1, heads=2, over="edges", encoder="fourier", table="auto", table_range=2.0, frequencies=64)),
    "attend-exact": Variant(ng_t(32, 1), "ieee"),
    "attend-odd": Variant(ng_t(17, 1, dk=5, dv=12, heads=3, multiply=False)),
    "attend-dropout": Variant(ng_t(32, 1, dropout=0.1, over="in")),
    "attend-sparse": Variant(ng_t(32, 1, over="edges", networks=(Network((9,), (("sparse", 0, 0, ((3, 1), (0, 1), (5, 5), (8, 1), (1, 0))),)),))),
    "nodes": Variant(NodeSample(), "ieee"),
    "nodes-segments": Variant(NodeSample(norm="graph", first=True), "ieee"),
    "nodes-plain-double": Variant(NodeSample(17, 19, (1, None, 1), None), "float64"),
    "nodes-wide": Variant(NodeSample(256, 1024, (None, 1, 1), "graph"), "ieee"),
    "messages-of-pairs": Variant(ng_t(32, 2, over=None, reduce=("mean", "max"), features=32)),
}  # fmt: skip


# ---- launches, written down instead of run ----
@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: all that its compilation depends on."""

    kernel: JITFunction
    signature: tuple[tuple[str, object], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int
    options: tuple[tuple[str, object], ...]


def _type(value):
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return tuple(_type(v) for v in value) if isinstance(value, tuple) else "i32"


def _launch(kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    constant = {p.name for p in kernel.params if p.is_constexpr}
    given = dict(zip([p.name for p in kernel.params], args, strict=True))
    signature = tuple((n, "constexpr" if n in constant else _type(v)) for n, v in given.items())
    options = tuple(sorted((k, v) for k, v in kwargs.items() if k != "num_warps"))
    return Launch(kernel, signature, tuple((n, v) for n, v in given.items() if n in constant), kwargs["num_warps"], options)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside the context are noted and not made: tensors lie on the CPU, and results are not there."""
    launches: list[Launch] = []
    before = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        launches.append(_launch(self, args, kwargs))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = before


def launches_of(variant: Variant, capability: int | None = None) -> list[Launch]:
    """Every different launch of the variant's op and of its backward pass, with the sizes that it has on a GPU of that capability."""
    sizes.capability_of = lambda device: capability and divmod(capability, 10)
    s, dtype = variant.sample, torch.float64 if variant.precision == "float64" else torch.float32
    paired, of_nodes = isinstance(s, PairSample), isinstance(s, NodeSample)
    t = {} if of_nodes else cast((pair_leaves if paired else leaves)(s), dtype, variant.weights)
    compute = ex.LOW * (variant.precision == "bf16") + ex.TF32 * (variant.precision == "tf32") + 2 * backends.BACKENDS.index("triton")
    with recorded() as launches, ngk.use_backend("triton"), pretended(compute):
        live = {name: v.requires_grad_() for name, v in t.items()}
        state = None if of_nodes else pair_state(s, live) if paired else edge_state(s, live)
        if of_nodes:
            out, inputs = s.run(dtype)
            live = dict(enumerate(inputs))
        elif paired and s.over:
            out = [attend(s, live, state)]
        elif s.reduce:
            out = [ngk.aggregate(state, message_of(s, live), s.reduce)]
        else:
            out = ngk.readout(state, pairs(live, "head", s.head), *((live["x"], live["head.dst"], live["head.src"]) if s.head_nodes else ()), activation=s.activation)
        torch.autograd.grad(sum(o.sum() for o in out), list(live.values()), allow_unused=True)
    return list({repr((x.kernel.__name__, x.signature, x.constants, x.warps)): x for x in launches}.values())


@contextlib.contextmanager
def pretended(compute: int) -> Iterator[None]:
    """Ops take the Triton kernels with CPU tensors, which a launch that is written down never reads."""
    before = backends.why_not, ex.compute_mode
    backends.why_not, ex.compute_mode = (lambda *_, **__: None), (lambda _: compute)
    try:
        yield
    finally:
        backends.why_not, ex.compute_mode = before


# ---- compilation ----
@dataclass(frozen=True)
class Compiled:
    kernel: str
    capability: int
    tile: str  # destinations x sources
    warps: int
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    tensor_memory: int  # columns, sm_100
    instructions: int
    mma: int  # matrix instructions
    products: bool  # whether there are matrix products: a first layer of one channel has none
    seconds: float


def _plain(value):
    """A number out of the constexpr that holds it."""
    return getattr(value, "value", value)


def compile_for(launch: Launch, capability: int) -> Compiled:
    start = time.perf_counter()
    attributes = {(k,): [["tt.divisibility", 16]] for k, (_, t) in enumerate(launch.signature) if isinstance(t, str) and t.startswith("*")}
    source = ASTSource(launch.kernel, dict(launch.signature), constexprs=dict(launch.constants), attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps, **dict(launch.options)})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(done.asm["cubin"])
        f.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))
    constants = dict(launch.constants)
    return Compiled(
        launch.kernel.__name__, capability, f"{constants.get('BI', '-')}x{constants.get('BJ', '-')}", launch.warps, registers, stack, done.metadata.shared,
        getattr(done.metadata, "tmem_size", 0) or 0, len(re.findall(r"^\s+/\*[0-9a-f]+\*/", sass, re.M)), len(re.findall(r"\b(?:HMMA|HGMMA|DMMA|UTCHMMA|UTCMMA)", sass)),
        "STEPS" in constants and any(_plain(step[OP]) == LIN and _plain(step[N_IN]) >= 9 for step in constants["STEPS"]),
        round(time.perf_counter() - start, 1),
    )  # fmt: skip


def main() -> None:
    name, *capabilities = sys.argv[1:]
    for capability in map(int, capabilities):
        for launch in launches_of(VARIANTS[name], capability):
            print(json.dumps(asdict(compile_for(launch, capability))), flush=True)


if __name__ == "__main__":
    main()
