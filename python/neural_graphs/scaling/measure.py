"""One measurement: a few training steps of one method on one network, in a process of its own with a memory limit.

`measure` starts `python -m neural_graphs.scaling.measure` and returns what it found. Running out of memory is a result.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

WARM = (2, 8, 16, 3)
ROOM = 1.1, 128 << 20  # the hard limit is so much above the budget: memory that is never touched counts there, and not in the peak
LONG = 300.0  # seconds of a step that is measured by its first run alone
COMPILER = 1 << 30  # and so much more while torch.compile works in the same process
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "out of memory", "Cannot allocate memory", "MemoryError", "not enough memory")
# glibc raises its threshold for separate mappings with every large block freed, and then keeps freed blocks: peaks jump by tens of
# percent with the order of sizes. A fixed threshold makes the peak that of live memory, for every method alike.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "OMP_WAIT_POLICY": "PASSIVE"}


def measure(request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Starts a process for one measurement.

    Args:
        request: method, layout, batch (1 unless given), width, dtype, weight_grads, threads, device, limit_bytes, repeats, see
            `_measure_here`.
        timeout: seconds after which the process is ended.

    Returns:
        dict with `outcome`: "ok" (with seconds, peak_bytes, ...), "out of memory", "timeout" or "error", and then `reason`.
    """
    environment = {**os.environ, **MALLOC, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"outcome": "timeout", "reason": f"no result after {timeout:.0f} s"}
    finally:
        _end(process)
    return classify(process.returncode, out, err)


def _end(process: subprocess.Popen) -> None:
    """Ends a process that still runs, and those it started (torch.compile starts some)."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def classify(status: int, out: str, err: str) -> dict[str, Any]:
    """The result from exit status and output of the measuring process."""
    lines = out.strip().splitlines()
    if status == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    last = (err.strip().splitlines() or [f"exit status {status}"])[-1]
    if status == -signal.SIGKILL:
        return {"outcome": "out of memory", "reason": "ended by the system"}
    if any(text in err for text in OUT_OF_MEMORY):
        return {"outcome": "out of memory", "reason": last[:300]}
    return {"outcome": "error", "reason": last[:300]}


def _inputs(layout, batch: int, dtype, device: str, weight_grads: bool):
    """Weights ~ N(0, 1 / inputs) and biases of `batch` networks, and their labels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = [torch.empty(batch, i, o, 1).normal_(std=1 / math.sqrt(i), generator=generator) for i, o in zip(layout, layout[1:])]
    biases = [torch.empty(batch, o, 1).normal_(std=0.1, generator=generator) for o in layout[1:]]
    weights = [w.to(device, dtype).requires_grad_(weight_grads) for w in weights]
    return weights, [b.to(device, dtype) for b in biases], torch.zeros(batch, dtype=torch.int64, device=device)


class _Training:
    """A method's model on one network: forward, cross-entropy, backward, optimiser step (AdamW, as in the published recipe)."""

    def __init__(self, request: dict[str, Any], layout):
        import torch

        from .methods import METHODS

        method = METHODS[request["method"]]
        self.bf16, self.device = request["dtype"] == "bf16", request["device"]
        self.model = method.model(layout, request["width"]).to(self.device)
        self.call = torch.compile(self.model, dynamic=False) if method.compiled else self.model
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=5e-4, amsgrad=True)
        self.inputs = _inputs(layout, request.get("batch", 1), torch.float32, self.device, request["weight_grads"])

    def step(self) -> float:
        import torch

        weights, biases, label = self.inputs
        begin = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        for tensor in weights:
            tensor.grad = None
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            logits = self.call(weights, biases)
        loss = torch.nn.functional.cross_entropy(logits.float(), label)
        loss.backward()
        self.optimiser.step()
        value = loss.item()  # waits for a GPU
        if not math.isfinite(value):
            raise FloatingPointError(f"scale: expected a finite loss, got {value}")
        return time.perf_counter() - begin

    def held(self) -> int:
        """Bytes of parameters, optimiser state and inputs."""
        weights, biases, label = self.inputs
        state = [t for entry in self.optimiser.state.values() for t in entry.values()]
        return sum(
            t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers(), *state, *weights, *biases, label)
        )


def _limit(extra: int, device: str) -> None:
    """From now on this process may take `extra` bytes and some room; what it asks for beyond fails."""
    import torch

    if torch.device(device).type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, extra / total), device)
        return
    import resource

    from ..report.process import held_bytes

    allowed = held_bytes("VmData") + int(extra * ROOM[0]) + ROOM[1]
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def _measure_here(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the steps and measures, in this process.

    The peak counts what is resident above the process after a warm-up on a tiny network: parameters, gradients, optimiser
    state, raw weights, activations. The first step is not timed, unless it is a long one. What the compiler takes does not
    count.
    """
    import torch

    from ..report.process import held_bytes, reset_peak, trim
    from .methods import METHODS

    torch.set_num_threads(request["threads"])
    if METHODS[request["method"]].backend:
        os.environ["NGKERNELS_BACKEND"] = METHODS[request["method"]].backend
    device, compiled = request["device"], METHODS[request["method"]].compiled
    on_gpu = torch.device(device).type == "cuda"
    if not compiled:  # a compiled model warms up on the network itself
        _Training(request, WARM).step()
    _limit(request["limit_bytes"] + compiled * COMPILER, device)
    training = None
    if compiled:
        training = _Training(request, request["layout"])
        training.step()
        training.optimiser.zero_grad(set_to_none=True)
    trim()
    before = held_bytes("VmRSS") - (training.held() if training else 0)
    reset_peak()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    training = training or _Training(request, request["layout"])
    seconds = [training.step()]
    if seconds[0] < LONG:
        seconds = [training.step()]
    while len(seconds) < request["repeats"] and sum(seconds) < 1.0:
        seconds.append(training.step())
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else held_bytes("VmHWM") - before
    return {
        "outcome": "ok",
        "peak_bytes": peak,
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "parameters": sum(p.numel() for p in training.model.parameters() if p.requires_grad),
    }


def main() -> None:
    import torch

    request = json.loads(sys.argv[1])
    try:
        result = _measure_here(request)
    except (MemoryError, RuntimeError, torch.OutOfMemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        result = {"outcome": "out of memory", "reason": str(error).splitlines()[0][:300] if str(error) else "MemoryError"}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
