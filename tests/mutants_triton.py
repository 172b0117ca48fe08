"""Seeded bugs in the Triton kernels: a copy of the project, one text of ngkernels/_triton replaced, tested in the interpreter.

The text must stand in its file exactly once: whoever changes that line finds the bug listed here, and renews it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from interpreted import FILES
from mutants_cpp import Patch

ROOT = Path(__file__).resolve().parent.parent

PATCHES = tuple(Patch(*row) for row in (
    # aggregate
    ("variance-between-tiles-lost", "messages.py", "squares + (other_squares + delta * delta * (na * nb / n))", "squares + other_squares"),
    ("ties-of-other-tiles-lost", "messages.py", "tl.where(better, count, ties + tl.where(other == best, count, 0))", "tl.where(better, count, ties)"),
    ("scale-for-shift", "messages.py", "tl.fma(regs[EDGE + c], regs[QUERY + c], regs[EDGE + N + c])", "tl.fma(regs[EDGE + N + c], regs[QUERY + c], regs[EDGE + c])"),
    ("no-std-threshold", "aggregate.py", "tl.where(var <= STD_THRESHOLD, 0, tl.sqrt(var))", "tl.sqrt(var)"),
    ("last-tile-dropped", "aggregate.py", "while j < last:", "while j + BJ <= last:"),
    ("copies-share-nodes", "tiles.py", "first = copy * tl.load(row + NODE_STRIDE)", "first = 0 * copy"),
    ("second-chunk-reads-the-first", "evaluator.py", "product(regs[STEP[FIRST_IN] + c], at[PARAMS]", "product(regs[STEP[FIRST_IN]], at[PARAMS]"),
    ("reversed-not-transposed", "tiles.py", "flip = not own and end.axis == 2", "flip = False"),
    ("shift-forgotten", "evaluator.py", "x * tl.load(pair) + tl.load(pair + 1)", "x * tl.load(pair)"),
    # evaluate
    ("diagonal-is-dense", "tiles.py", "(tl.load(row + DIAGONAL) * (i - j) == 0)", "(i >= 0)"),
    ("packed-in-the-weights-places", "tiles.py", "offset = end.emit_offset if own else end.offset", "offset = end.offset"),
    # the table
    ("upper-node-forgotten", "table.py", "grad_table[:, 1:] += total[:, :-1, 3:]", "pass"),
    ("beyond-the-table-clamped", "evaluator.py", "acc = tl.where(inside[:, None], acc, beyond_table(", "acc = tl.where(inside[:, None] | True, acc, beyond_table("),
    ("slope-in-steps", "encoder_back.py", "(rise_weight(u, k) * (1 << STEP[ARG0]) *", "(rise_weight(u, k) *"),
    # backward
    ("mean-gradient-not-divided", "messages.py", "constant += tl.load(grad + here + SLOTS[MEAN] * WIDTH, mask=live, other=0) * inverse", "constant += tl.load(grad + here + SLOTS[MEAN] * WIDTH, mask=live, other=0)"),
    ("sources-as-destinations", "linear_back.py", "to[ROW_J], to[END_J], STEP[NODE]", "to[ROW_J], to[END_I], STEP[NODE]"),
    ("later-blocks-overwrite", "blocks.py", "later = row.weight >= 0 and reads[0] in seen[0]", "later = False"),
    ("residual-gradient-dropped", "backprop.py", "g = added(g, held,", "held = added(g, held,"),
    ("statistics-not-in-the-gradient", "backprop.py", "scaled = scaled + (g[c] * scale,)", "scaled = scaled + (g[c],)"),
    ("first-piece-only", "gradients.py", "call.grad_params += sums.sum(0)", "call.grad_params.copy_(sums.sum(0))"),
    ("sums-in-another-order", "fold.py", "e += 1", "e += 2"),
    ("uncovered-gradients-not-cleared", "gradients.py", "t.zero_()\n\n\nclass Saved", "pass\n\n\nclass Saved"),
    # pairs and attention
    ("partners-matrix-on-the-edges", "evaluator.py", "product(others[STEP[FIRST_IN] + c], at[PARAMS] + STEP[ARG1]", "product(regs[STEP[FIRST_IN] + c], at[PARAMS] + STEP[ARG1]"),
    ("partners-give-no-gradient", "backprop.py", "below = below_linear(regs, g, h, at, True, PAIRED, STEP", "below = below_linear(regs, g, h, at, True, False, STEP"),
    ("partners-weights-overwritten", "gradients.py", "call.grad_weights[k] += t", "call.grad_weights[k].copy_(t)"),
    ("a-neuron-with-itself-twice", "attention.py", "return at[OK] & (at[ITSELF] == 0)", "return at[OK]"),
    ("old-sums-not-scaled", "attention.py", "tl.load(to, mask=exists, other=0) * shrink + by_row", "tl.load(to, mask=exists, other=0) + by_row"),
    ("panels-not-scaled", "attend.py", "total = total * tl.exp(top - base) +", "total = total +"),
    ("softmax-gradient-without-its-sum", "attention.py", "(w * s - p * of_row(", "(w * s - 0 * p * of_row("),
    ("dropout-scales-nothing", "attention.py", "p * (1 / (1 - DROPOUT))", "p"),
    ("heads-share-their-sums", "attention.py", "column_of(p, h) * regs[EDGE + c]", "column_of(p, 0) * regs[EDGE + c]"),
    ("one-weight-read-twice-counted-once", "backprop.py", "g = joined(g, h, once, STEP[COUNT])", "g = joined(g, g, at[OK] & (at[OK] == 0), STEP[COUNT])"),
    # the node side
    ("factors-forgotten", "node_map.py", "acc += scale * times(reduced", "acc += times(reduced"),
    ("segments-spread-within-alone", "node_map.py", " + width * tl.sum(between, 0)", ""),
    ("activation-twice", "node_map.py", "k.act if k.first else IDENTITY, size()", "k.act, size()"),
    ("layer-norm-without-its-mean", "node_map_back.py", "d = d * w * inverse - a - n * b", "d = d * w * inverse - n * b"),
    ("derivative-of-the-activation-lost", "node_map_back.py", "if FIRST or not NORM:", "if not NORM:"),
    ("rows-of-the-last-part-lost", "node_map_back.py", "return triton.cdiv(rows, share), share", "return max(1, rows // share), share"),
    ("equal-states-have-a-slope", "node_map_back.py", "tl.where(spread > 0, along, 0)", "along"),
    ("lin-bias-not-in-lin", "node_map_back.py", "torch.addr(matrix.double() @ first.T, bias.double(), first_bias)", "matrix.double() @ first.T"),
    # sparse blocks
    ("lines-of-a-hub-dropped", "blocks.py", "parts = -(-degree // width)", "parts = np.minimum(1, degree)"),
    ("numbers-by-place", "tiles.py", "tl.load(entry + 2, mask=ok, other=0), tl.load(entry + 1, mask=ok, other=0)", "tl.load(entry + 2, mask=ok, other=0), (entry - lists - tl.load(row + ENTRIES)) // 3"),
    ("sources-of-a-line-are-one", "plan.py", "node, place = lines.src[np.repeat(lines.first[line], count) + k]", "node, place = lines.src[np.repeat(lines.first[line], count)]"),
    ("norm-without-its-mean", "backprop.py", "(d - total / STEP[N_OUT] - y * (along / STEP[N_OUT])) * scale", "(d - y * (along / STEP[N_OUT])) * scale"),
))  # fmt: skip


class Copy:
    """A copy of the project in `folder`, with one patched file at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("ngkernels", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "golden"))
        shutil.copy(ROOT / "pyproject.toml", folder)

    def test(self, patch: Patch | None) -> subprocess.CompletedProcess:
        """Runs the quick tests of the interpreter on the copy with `patch`, until the first failure."""
        path = None if patch is None else self.folder / "ngkernels" / "_triton" / patch.file
        original = "" if path is None else path.read_text()
        try:
            if patch is not None:
                if original.count(patch.old) != 1:
                    raise LookupError(f"mutant {patch.name}: expected {patch.old!r} once in {patch.file}, got {original.count(patch.old)} times; renew it")
                path.write_text(original.replace(patch.old, patch.new))
            env = {**os.environ, "PYTHONPATH": str(self.folder), "TRITON_INTERPRET": "1", "NGKERNELS_TEST_BACKENDS": "triton", "PYTHONDONTWRITEBYTECODE": "1"}
            likely = "pairs" if patch is not None and (patch.file.startswith("att") or patch.name.startswith("partners")) else "values"
            files = sorted(FILES, key=lambda file: likely not in file)  # soonest noticed
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-m", "not slow and not big", *files]
            return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        finally:
            if path is not None:
                path.write_text(original)
