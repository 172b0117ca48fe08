"""Seeded bugs in the C++ kernels: a copy of the project, one text of csrc/ replaced, compiled and tested apart.

The text must stand in its file exactly once: whoever changes that line finds the bug listed here, and renews it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One vector instruction set is enough: all of them are the same templates.
STUBS = """
#include "schedule.h"
namespace ngk {
const Isa& isa_avx512() { return isa_avx2(); }
const Isa& isa_avx512_bf16() { return isa_avx2(); }
}
"""
SOURCES = (
    *(f"bindings_{part}.cpp" for part in ("cpu", "cuda", "edges", "fold", "nodes")),
    *(f"cpu/{part}.cpp" for part in ("schedule", "mapped", "isa_scalar", "isa_avx2", "stubs")),
)
TESTS = (
    "test_attend.py",
    "test_attend_torch.py",
    "test_aggregate.py",
    "test_fold.py",
    "test_readout.py",
    "test_checkpoint.py",
    "test_determinism.py",
    "test_graph.py",
    "test_edges.py",
    "test_random_expressions.py",
)
# AVX2, which the copy is compiled for, misses the budget of this one by 7 %.
CLOSE = "tests/test_attend.py::test_float32_within_twice_the_error_of_plain_pytorch[cpp-residual-last-without-norm]"


@dataclass(frozen=True)
class Patch:
    """In csrc/`file`, `old` becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise LookupError(f"mutant {self.name}: expected {self.old!r} once in {self.file}, got {text.count(self.old)} times; renew it")
        return text.replace(self.old, self.new)


PATCHES = tuple(Patch(*row) for row in (
    # aggregate
    ("variance-between-pieces-lost", "message_math.h", "(other_squares + delta * delta * (na * nb / n))", "other_squares"),
    ("ties-of-other-pieces-lost", "cpu/aggregate.h", "count = na == 0 ? 0 : n[c];", "count = 0;"),
    ("copies-share-rows", "cpu/aggregate.h", "piece.row->out + piece.copy * piece.row->out_stride", "piece.row->out"),
    ("every-tile-starts-afresh", "cpu/aggregate.h", "t.opens(first)", "first == 0"),
    ("mean-of-a-piece", "message_math.h", "*mean + delta * (nb / n)", "*mean + delta"),
    ("no-std-threshold", "message_math.h", "variance <= static_cast<T>(STD_THRESHOLD) ? T(0) : std::sqrt(variance)", "std::sqrt(variance)"),
    ("scale-for-shift", "cpu/messages.h", "V::load(er + g.F)", "V::load(er)"),
    ("first-of-a-tie-only", "message_math.h", "V::if_eq(other, *best, V::add(*ties, count), *ties)", "*ties"),
    # readout
    ("readout-drops-the-last-edge-of-a-tile", "cpu/tiler.h", "f(Tile<V>{n, half, live,", "f(Tile<V>{n > 1 ? n - 1 : n, half, live,"),
    ("channels-out-of-step", "cpu/views.h", "p[c * v.channel] = convert(buffer[", "p[(channels - 1 - c) * v.channel] = convert(buffer["),
    ("shift-for-scale", "cpu/raw_values.h", "out[k] = out[k] * scale + shift", "out[k] = out[k] * shift + scale"),
    ("last-tile-dropped", "cpu/tiler.h", "begin < edges; begin += most", "begin + most <= edges; begin += most"),
    ("beyond-the-table-without-nodes", "cpu/fourier_encoder.h", "out[c] = tj ? si[c] + tj[c] : si[c];", "out[c] = si[c];"),
    ("residual-of-the-wrong-row", "cpu/worker.h", "+ b[static_cast<int64_t>(r) * ldb + c];", "+ b[c];"),
    ("last-rows-dropped", "cpu/schedule.cpp", "i < row.n_dst; i += I)", "i + I <= row.n_dst; i += I)"),
    # backward
    ("mean-gradient-not-divided", "message_math.h", "a += grad[slots.mean * F] * inverse;", "a += grad[slots.mean * F];"),
    ("std-gradient-not-divided", "message_math.h", "* inverse / out[slots.std * F];", "* inverse;"),
    ("ties-of-the-other-extreme", "cpu/gradients.h", "ties(row, slots.max_tie, c)", "ties(row, 0, c)"),
    ("sources-of-the-first-piece", "cpu/gradients.h", "add(row.src + piece.j0,", "add(row.src,"),
    ("parameters-of-the-last-item", "cpu/gradients.h", "total_params[c] += w.params[c]", "total_params[c] = w.params[c]"),
    ("node-bias-of-the-first-row", "cpu/node_terms.h", "w.grad_s[k][static_cast<int64_t>(i) * s.ld + c];", "w.grad_s[k][c];"),
    ("second-node-of-a-cell-forgotten", "cpu/fourier_encoder.h", "for (int64_t node = 0; node < 2; ++node)", "for (int64_t node = 0; node < 1; ++node)"),
    ("derivative-twice", "cpu/backprop.h", "if (scales(k)) --k;", ""),
    ("residual-gradient-dropped", "cpu/backprop.h", "if (w.grad_add[k]) this->add(g, w.grad_add[k], g, t.rows(k), s.ld, s.ld);", ""),
    ("reversed-block-overwrites", "cpu/raw_values.h", "if (row.shared) {", "if (false) {"),
    ("statistics-not-in-the-gradient", "cpu/raw_values.h", "for (int k = 0; k < t.n * ld; ++k) g[k] *= scale;", ""),
    ("carriers-of-the-first-copy", "cpu/raw_values.h", "view(p.call.grad_carriers[at], row, side, t.piece->copy, true)", "view(p.call.grad_carriers[at], row, side, 0, true)"),
    ("last-columns-without-gradient", "cpu/gemm.h", "for (; k < K; ++k) outer_block<V, 1, NV>", "for (; k + 1 < K; ++k) outer_block<V, 1, NV>"),
    ("uncovered-gradients-not-cleared", "problem.h", "edges * e.channels >= g.numel()", "true"),
    ("gradient-tiles-too-narrow", "cpu/prepare.h", "if (padded<V>(in.n_in) > max_ld) max_ld = padded<V>(in.n_in);", ""),
    # small matrices
    ("last-columns-of-a-product", "cpu/fold.h", "for (; col < n; ++col)", "for (; col + 1 < n; ++col)"),
    ("gradient-of-a-summand-lost", "cpu/fold.h", "      for (size_t j = 0; gb && j < n.size(); ++j) gb[j] += g[j];\n", ""),
    ("gradients-of-a-matrix-overwritten", "cpu/fold.h", "ga[j] += g[j]", "ga[j] = g[j]"),
    ("transposed-leaves-as-they-lie", "cpu/fold.h", "leaf.col_stride == 1 && leaf.row_stride == n.cols", "true"),
    ("every-parameter-without-gradient", "bindings_edges.cpp", "if (p.fold.grad) isa_for(0).fold_gradients(p.fold);", ""),
    # attention, pair updates
    ("sums-not-scaled-with-the-largest-logit", "cpu/attention.h", "        n *= by;\n", ""),
    ("last-piece-of-a-row-only", "cpu/attention.h", "totals[row * H + h] = theirs * a + mine * b;", "totals[row * H + h] = mine * b;"),
    ("itself-read-twice", "cpu/attention.h", "if (!t.itself(r)) f(t.half + r);", "f(t.half + r);"),
    ("partners-rows-of-the-first-piece", "cpu/attention.h", "row.partner_out + at + piece.source(x - rows)", "row.partner_out + at + (x - rows)"),
    ("mask-in-the-normalisation", "message_math.h", "weight * dot - p * delta", "weight * (dot - delta) + 0 * p"),
    ("mask-of-the-piece", "cpu/attention.h", "i = node_of(*t.piece, t.i[r]),", "i = t.i[r],"),
    ("gradient-of-the-states-sums-lost", "cpu/attention.h", "    if (!lds) return;\n", "    return;\n"),
    ("smallest-exponent-too-large", "cpu/attention.h", "T(-87) : T(-700)", "T(-3) : T(-3)"),
    ("reverse-not-in-the-common-share", "cpu/evaluator.h", "if (p.call.instrs[until].arg1 >= 0) gemm<V>(x,", "if (false) gemm<V>(x,"),
    ("partners-take-the-sum", "cpu/evaluator.h", "V::store(b + c, V::add(V::sub(x, y),", "V::store(b + c, V::add(V::add(x, y),"),
    ("variance-of-the-padding", "cpu/evaluator.h", "V::sum(square) / static_cast<T>(n) + eps", "V::sum(square) / static_cast<T>(ld) + eps"),
    ("tokens-start-from-the-encoder", "cpu/evaluator.h", "if (t.piece->row->flags & TOKEN) {", "if (false) {"),
    ("triangles-whole", "cpu/schedule.cpp", "for (int64_t j = triangle ? i : 0; j < row.n_src;", "for (int64_t j = 0; j < row.n_src;"),
    ("norm-without-the-variances-gradient", "message_math.h", "V::sub(V::sub(d, total), V::mul(y, along))", "V::sub(V::sub(d, total), V::mul(V::zero(), V::mul(y, along)))"),
    ("residual-of-what-is-common-lost", "cpu/backprop.h", "            sum_rows(t, k, g, w.common_add[in.arg0]);\n", ""),
    ("number-read-twice-counted-once", "cpu/raw_values.h", "if ((row.flags & SAME) || t.itself(r))", "if (t.itself(r))"),
    ("sum-for-difference-of-the-matrices", "cpu/prepare.h", "g[s.g_partner + k] += plus - minus;", "g[s.g_partner + k] += plus + minus;"),
    ("second-gradient-without-memory", "cpu/engine.h", "static_cast<int>(k) == call.message_start - 1) waits(k);", "static_cast<int>(k) == call.message_start - 1 && in.op != ADD) waits(k);"),
    # determinism
    ("working-memory-not-cleared", "cpu/engine.h", "std::memset(w.coefficients, 0,", "if (false) std::memset(w.coefficients, 0,"),
    ("other-bits-in-backward", "edge_math.h", "V::store(h + k, y);\n    if (GRAD)", "V::store(h + k, GRAD ? V::mul(y, V::set1(typename V::T(1) + typename V::T(sizeof(typename V::T) == 4 ? 1.2e-7 : 2.3e-16))) : y);\n    if (GRAD)"),
    ("committed-as-they-finish", "cpu/schedule.cpp", "while (s.turn.load(std::memory_order_acquire) != m) std::this_thread::yield();", ""),
))  # fmt: skip


class Workshop:
    """A copy of the project in `folder`, whose library is built from a patched csrc/."""

    def __init__(self, folder: Path):
        from torch.utils.cpp_extension import include_paths, library_paths

        facts = json.loads((ROOT / "ngkernels" / "_build_info.json").read_text())
        self.folder = folder
        self.compiler = shlex.split(os.environ.get("CXX", "")) or [facts["compiler"].split()[0]]
        self.flags = [
            "-fPIC",
            "-O1",
            *(f for f in facts["flags"] if not f.startswith("-O")),
            *(f"-I{p}" for p in [*include_paths(), folder / "csrc"]),
        ]
        self.libraries = [*(f"-L{p}" for p in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"]
        for name in ("ngkernels", "csrc", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "golden"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "csrc" / "cpu" / "stubs.cpp").write_text(STUBS)
        self.patched: Path | None = None
        self.original = ""

    def build(self, patch: Patch | None) -> None:
        """Restores the last patched file, applies `patch`, compiles what has changed."""
        stale = set(SOURCES) if self.patched is None and patch is None else set()
        if self.patched is not None:
            self.patched.write_text(self.original)
            stale |= depending_on(self.patched)
            self.patched = None
        if patch is not None:
            path = self.folder / "csrc" / patch.file
            self.patched, self.original = path, path.read_text()
            path.write_text(patch.applied(self.original))
            stale |= depending_on(path)
        for source in sorted(stale):
            self.run([*self.compiler, *self.flags, "-c", f"csrc/{source}", "-o", self.object(source)])
        self.run([*self.compiler, "-shared", *map(self.object, SOURCES), *self.libraries, "-o", "ngkernels/_C.abi3.so"])

    @staticmethod
    def object(source: str) -> str:
        return source.replace("/", "_") + ".o"

    def run(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    def test(self) -> subprocess.CompletedProcess:
        """Runs the engine's tests on the copy until the first failure."""
        env = {**os.environ, "PYTHONPATH": str(self.folder), "NGKERNELS_TEST_BACKENDS": "cpp", "PYTHONDONTWRITEBYTECODE": "1"}
        files = [f"tests/{name}" for name in TESTS]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow and not big",
            f"--deselect={CLOSE}",
            *files,
        ]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)


def depending_on(path: Path) -> set[str]:
    """The sources to compile when a file has changed: itself, or those that see a header of the kernels."""
    if path.suffix == ".cpp":
        return {path.relative_to(path.parents[1] if path.parent.name == "cpu" else path.parent).as_posix()}
    return {"cpu/isa_scalar.cpp", "cpu/isa_avx2.cpp"}
