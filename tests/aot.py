"""Ahead-of-time compilation of the Triton kernels for GPUs that need not be there.

`python tests/aot.py --capabilities 80 90 --jobs 2 [VARIANT...]` compiles every launch of the variants' ops, forward and backward (of all
variants of aot_list.py, or the quick ones: QUICK), and prints a line of JSON for each kernel. What was compiled before of the very same
kernel, with the same Triton, is read from build/aot. A process of its own, because it must not run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import struct
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from addresses import narrow
from aot_features import features, plain
from aot_list import QUICK, SLOW, VARIANTS, NodeSample, Variant
from pair_samples import PairSample, attend, pair_state
from pair_samples import leaves as pair_leaves
from samples import cast, edge_state, leaves, message_of, pairs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import ngkernels as ngk
from ngkernels import backends
from ngkernels._triton import sizes
from ngkernels._triton.lower import Step
from ngkernels.ops import expression as ex
from ngkernels.program import LIN

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32", torch.int16: "i16"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KEPT = Path(__file__).resolve().parent.parent / "build" / "aot"
RECORD = Path(__file__).with_name("triton_resources.json")
RECORDED = ("registers", "spilled", "shared", "tensor_memory", "instructions", "mma", "narrow")  # of a Compiled
SLOWEST = ("gradient_kernel", "attend_kernel", "evaluate_kernel", "aggregate_kernel")  # to compile, in this order


# ---- launches, written down instead of run ----
@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: all that its compilation depends on."""

    kernel: JITFunction
    signature: tuple[tuple[str, object], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int
    options: tuple[tuple[str, object], ...]

    @property
    def fingerprint(self) -> str:
        """The same for launches of the same code, wherever it stands and however it is laid out."""
        options = (self.signature, [(name, plain(value)) for name, value in self.constants], self.warps, self.options)
        return hashlib.sha256(repr((code_of(self.kernel), options)).encode()).hexdigest()[:20]

    @property
    def source(self) -> str:
        """The same for launches that Triton's own representation is the same of: neither warps nor options of the assembler are in it."""
        return repr((self.kernel.cache_key, self.signature, self.constants))

    @property
    def products(self) -> bool:
        """Whether there are matrix products: a first layer of one channel has none."""
        steps = [Step(*step) for step in plain(dict(self.constants).get("STEPS", ()))]
        return any(step.op == LIN and step.n_in >= 9 for step in steps)

    @property
    def features(self) -> dict[str, list[str]]:
        return {axis: sorted(values) for axis, values in features(self.kernel.__name__, dict(self.signature), dict(self.constants)).items()}


@functools.lru_cache(None)
def code_of(function: JITFunction) -> str:
    """The text of a kernel without comments, with that of the functions that it calls and the numbers that it names."""
    tree = ast.parse(textwrap.dedent(function.src))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    texts = [ast.unparse(_undocumented(tree))]
    for name in sorted(names & set(function.fn.__globals__)):
        value = function.fn.__globals__[name]
        if isinstance(value, JITFunction):
            texts.append(code_of(value))
        elif isinstance(value, (int, float, tl.constexpr)):
            texts.append(f"{name} = {plain(value)}")
    return "\n".join(texts)


def _undocumented(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


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


def outputs_of(variant: Variant) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """(results of the variant's op, the leaves that they depend on)."""
    s = variant.sample
    if isinstance(s, NodeSample):
        out, inputs = s.run(variant.dtype)
        return out, {str(k): v for k, v in enumerate(inputs)}
    paired = isinstance(s, PairSample)
    live = cast((pair_leaves if paired else leaves)(s), variant.dtype, variant.weights)
    for name, v in live.items():
        v.requires_grad_(name.startswith(variant.wanted))
    state = pair_state(s, live) if paired else edge_state(s, live)
    if paired and s.over:
        return [attend(s, live, state)], live
    if s.reduce:
        return [ngk.aggregate(state, message_of(s, live), s.reduce)], live
    nodes = (live["x"], live["head.dst"], live["head.src"]) if s.head_nodes else ()
    return ngk.readout(state, pairs(live, "head", s.head), *nodes, activation=s.activation), live


def launches_of(variant: Variant, capability: int | None = None) -> list[Launch]:
    """Every different launch of the variant's op and of its backward pass, with the sizes that it has on a GPU of that capability."""
    sizes.capability_of = lambda device: capability and divmod(capability, 10)
    compute = ex.LOW * (variant.precision == "bf16") + ex.TF32 * (variant.precision == "tf32") + 2 * backends.BACKENDS.index("triton")
    forced = sizes.forced(sizes.Size(*variant.size)) if variant.size[0] else contextlib.nullcontext()
    with recorded() as launches, ngk.use_backend("triton"), pretended(compute), forced:
        out, live = outputs_of(variant)
        torch.autograd.grad(sum(o.sum() for o in out), [v for v in live.values() if v.requires_grad], allow_unused=True)
    return list({x.fingerprint: x for x in launches}.values())


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
    narrow: list[str]  # addresses that 32 bits may not hold
    features: dict[str, list[str]]
    seconds: float


def code_bytes(cubin: bytes) -> int:
    """Bytes of machine code, 16 an instruction: of the sections .text* of an ELF file. A disassembler takes as long as the assembler."""
    start, size, count, names = struct.unpack_from("<Q", cubin, 0x28) + struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<II4Q", cubin, start + k * size) for k in range(count)]  # name, type, flags, address, offset, bytes
    return sum(s[5] for s in sections if cubin[sections[names][4] + s[0] :].startswith(b".text"))


def _compiled(launch: Launch, capability: int, source, addresses: list[str] | None) -> tuple[Compiled, str]:
    """(what came of `source`, its Triton IR)."""
    start = time.perf_counter()
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps, **dict(launch.options)})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(done.asm["cubin"])
        f.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))
    constants = {name: plain(value) for name, value in launch.constants}
    ir = done.asm["ttir"]
    return Compiled(
        launch.kernel.__name__, capability, f"{constants.get('BI', '-')}x{constants.get('BJ', '-')}", launch.warps, registers, stack, done.metadata.shared,
        getattr(done.metadata, "tmem_size", 0) or 0, code_bytes(done.asm["cubin"]) // 16, len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", done.asm["ptx"])),
        narrow(ir) if addresses is None else addresses, launch.features,
        round(time.perf_counter() - start, 1),
    ), ir  # fmt: skip


def compile_for(launches: dict[int, Launch]) -> list[Compiled]:
    """Launches of one source, by the architecture that each is compiled for. Triton's own representation is made once for all."""
    (capability, launch), *others = launches.items()
    attributes = {(k,): [["tt.divisibility", 16]] for k, (_, t) in enumerate(launch.signature) if isinstance(t, str) and t.startswith("*")}
    source = ASTSource(launch.kernel, dict(launch.signature), constexprs=dict(launch.constants), attrs=attributes)
    first, ir = _compiled(launch, capability, source, None)
    found = [first]
    with tempfile.NamedTemporaryFile("w", suffix=".ttir") as f:
        f.write(ir)
        f.flush()
        for capability, launch in others:
            found.append(_compiled(launch, capability, f.name, first.narrow)[0])
    return found


def kept(launch: Launch, capability: int) -> Path:
    """Where the result for an architecture lies between runs; how it is read from a kernel is part of the name."""
    return KEPT / hashlib.sha256(f"{launch.fingerprint} {triton.__version__} {capability} {READ}".encode()).hexdigest()


READ = hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in ("aot.py", "addresses.py", "aot_features.py"))).hexdigest()
_work: list[dict[int, tuple[Launch, list[str]]]] = []  # for each source: of each architecture the launch, and the variants that have it


def _run(number: int) -> list[str]:
    """Lines of the launches of one source. In a process of the pool, which has _work from its parent."""
    launches = _work[number]
    missing = {c: launch for c, (launch, _) in launches.items() if not kept(launch, c).exists()}
    for found in compile_for(missing) if missing else ():
        to = kept(missing[found.capability], found.capability)
        to.with_suffix(f".{os.getpid()}").write_text(json.dumps(asdict(found)))
        to.with_suffix(f".{os.getpid()}").rename(to)
    return [json.dumps({**about(launch, c, names), **json.loads(kept(launch, c).read_text())}) for c, (launch, names) in launches.items()]


def about(launch: Launch, capability: int, names: Sequence[str]) -> dict:
    return {"variants": names, "fingerprint": launch.fingerprint, "kernel": launch.kernel.__name__, "capability": capability, "products": launch.products}


def collect(names: Sequence[str], capabilities: Sequence[int]) -> None:
    """Every different launch of the variants into _work, those first that take long."""
    found: dict[tuple, dict[int, tuple[Launch, list[str]]]] = {}
    for name in names:
        for capability in capabilities:
            for launch in launches_of(VARIANTS[name], capability):
                found.setdefault((launch.source, launch.warps), {}).setdefault(capability, (launch, []))[1].append(name)
    order = {kernel: k for k, kernel in enumerate(SLOWEST)}
    _work[:] = sorted(found.values(), key=lambda w: _length(next(iter(w.values()))[0], order))


def _length(launch: Launch, order: dict[str, int]) -> tuple[int, int]:
    return order.get(launch.kernel.__name__, len(order)), -len(repr(launch.constants))


def compiled(jobs: int) -> Iterator[str]:
    """A line for each launch of _work and architecture."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # Triton's own cache would only grow
        os.environ["TRITON_CACHE_DIR"] = folder
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            for lines in pool.imap_unordered(_run, range(len(_work))):
                yield from lines


def record(lines: Sequence[str]) -> None:
    found = sorted((f"{k['fingerprint']} {k['capability']}", [k[name] for name in RECORDED]) for k in map(json.loads, lines))
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in dict(found).items())
    RECORD.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "columns": {json.dumps(RECORDED)}, "kernels": {{\n{rows}\n}}}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--list", action="store_true", help="print the launches without compiling them")
    parser.add_argument("--record", action="store_true", help="compile those of SLOW and write down what came of them")
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    given = parser.parse_args()
    names = ["SLOW"] if given.record else given.variants
    collect([n for name in names for n in {"QUICK": QUICK, "SLOW": SLOW}.get(name, [name])], given.capabilities)
    if given.list:
        print(*(json.dumps(about(launch, c, names)) for work in _work for c, (launch, names) in work.items()), sep="\n")
        return
    lines = []
    for line in compiled(given.jobs):
        lines.append(line)
        print(line, flush=True)
    if given.record:
        record(lines)


if __name__ == "__main__":
    main()
