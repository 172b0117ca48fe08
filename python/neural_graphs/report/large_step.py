"""One training step on one large network, measured in a process of its own: time and peak resident memory.

`measure` starts `python -m neural_graphs.report.large_step` and returns what that process measured. A fresh process makes the peak of
one backend independent of what ran before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .process import held_bytes, reset_peak

MODEL = {"d_hid": 32, "num_layers": 4, "fourier_features": 32, "fourier_sigma": 0.5}
EAGER_BYTES_PER_EDGE = 4_000  # a safe round-up of what the eager backend needs for one training step with 4 layers of 32


class MeasurementError(RuntimeError):
    """The measuring process failed; the message carries its last line."""


def measure(
    network: Path | str, backend: str, edge_memory: str = "recompute", repeats: int = 1, threads: int | None = None, timeout: float = 900
) -> dict[str, Any]:
    """Returns {backend, edges, nodes, seconds, peak_bytes, ...} of one training step on a packed network file.

    Args:
        edge_memory: what NGGNN does with edge states: "recompute" keeps none, "store" keeps them as usual PyTorch code does.
        repeats: steps timed; `seconds` is the fastest, `peak_bytes` the peak over all, above the process before the network was read.

    Raises:
        MeasurementError: the process failed, ran out of memory, or took longer than `timeout` seconds.
    """
    command = [sys.executable, "-m", __name__, str(network), "--backend", backend, "--edge-memory", edge_memory, "--repeats", str(repeats)]
    if threads is not None:
        command += ["--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"large step: backend {backend} took longer than {timeout:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"killed (exit status {done.returncode}), probably out of memory"]
        raise MeasurementError(f"large step: backend {backend} failed: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _step(model, weights, biases) -> float:
    import torch

    begin = time.perf_counter()
    torch.nn.functional.cross_entropy(model(weights, biases), torch.zeros(1, dtype=torch.int64)).backward()
    seconds = time.perf_counter() - begin
    model.zero_grad(set_to_none=True)
    for tensor in (*weights, *biases):
        tensor.grad = None
    return seconds


def _inputs(network) -> tuple[list, list]:
    """The network's own tensors as leaves that want gradients, normalised per layer as for training."""
    from ..data.transforms import Normalisation, canonical_signs

    weights, biases = canonical_signs(network.weights, network.biases)
    weights, biases = Normalisation.measure(weights, biases)(weights, biases)
    return [w.unsqueeze(-1).requires_grad_() for w in weights], [b.unsqueeze(-1).requires_grad_() for b in biases]


def _measure_here(path: str, backend: str, edge_memory: str, repeats: int) -> dict[str, Any]:
    import torch

    import ngkernels

    from ..data.inr_set import InrSet, unpack
    from ..data.siren import SirenConfig, init_siren
    from ..data.storage import read_tensors
    from ..models import NGGNN

    def model_for(layout):
        torch.manual_seed(0)
        return NGGNN(layout=list(layout), out_features=10, encoder="fourier", norm="layer", pooling="cat", edge_memory=edge_memory, **MODEL)

    with ngkernels.use_backend(backend):
        none = torch.zeros(1, dtype=torch.int64)
        tiny = init_siren(SirenConfig(layout=(2, 16, 16, 3)), 1, torch.Generator().manual_seed(0))
        _step(model_for((2, 16, 16, 3)), *_inputs(InrSet(tuple(tiny[0]), tuple(tiny[1]), none, none, none.float())))
        reset_peak()
        before = held_bytes("VmRSS")
        network = unpack(read_tensors(path)[0], path)
        layout, edges = network.layout, network.num_edges
        model, inputs = model_for(layout), _inputs(network)
        del network
        seconds = [_step(model, *inputs) for _ in range(repeats)]
        peak = held_bytes("VmHWM")
    return {
        "backend": backend,
        "edge_memory": edge_memory,
        "layout": list(layout),
        "edges": edges,
        "nodes": sum(layout),
        "seconds": min(seconds),
        "all_seconds": seconds,
        "peak_bytes": peak - before,
        "process_peak_bytes": peak,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--edge-memory", default="recompute")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(arguments.threads)
    sys.stdout.write(json.dumps(_measure_here(arguments.network, arguments.backend, arguments.edge_memory, arguments.repeats)) + "\n")


if __name__ == "__main__":
    main()
