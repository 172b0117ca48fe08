"""Random networks and comparisons that several test files use."""

from __future__ import annotations

import torch

import ngkernels as ngk


def networks(layout, batch=2, dtype=torch.float32, scale=0.5):
    """Weights (batch, in, out, 1) and biases (batch, out, 1) of random networks."""
    weights = [scale * torch.randn(batch, i, o, 1, dtype=dtype) for i, o in zip(layout, layout[1:])]
    return weights, [scale * torch.randn(batch, o, 1, dtype=dtype) for o in layout[1:]]


def separate(layouts, dtype=torch.float32, reverse=False):
    """Random networks of unequal layouts: (weights, biases) of each, their graphs, and all weights and biases in one list each."""
    inputs = [networks(layout, 1, dtype) for layout in layouts]
    graphs = [ngk.NeuralGraph.mlp(layout, reverse=reverse) for layout in layouts]
    return inputs, graphs, [w for ws, _ in inputs for w in ws], [b for _, bs in inputs for b in bs]


def check_unequal(model, reverse: bool) -> None:
    """A batch of unequal networks gives what each gives alone, packed or not."""
    inputs, graphs, weights, biases = separate([[2, 5, 3], [2, 6, 4, 3], [2, 5, 3]], reverse=reverse)
    unpacked, packed = ngk.NeuralGraph.batch(graphs), ngk.NeuralGraph.batch(graphs, packed=True)
    alone = torch.cat([model.forward_graph(g, *i) for g, i in zip(graphs, inputs, strict=True)])
    assert relative(model.forward_graph(unpacked, weights, biases), alone) <= 1e-6
    values = torch.cat([torch.cat([torch.zeros(2, 1), *(b[0] for b in bs)]) for _, bs in inputs])
    assert relative(model.forward_graph(packed, unpacked.pack(weights), values), alone) <= 1e-6


def check_low_precision(model) -> None:
    """Weights in bfloat16, and a step under autocast; the model reads [2, 16, 3]."""
    weights, biases = networks([2, 16, 3], 2)
    wanted = model(weights, biases)
    assert relative(model([w.bfloat16() for w in weights], [b.bfloat16() for b in biases]), wanted) < 0.3
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(weights, biases)
    logits.float().sum().backward()
    assert relative(logits.float(), wanted) < 0.1


def check_compiles(model) -> None:
    """In one piece; the model reads [2, 5, 3]."""
    torch._dynamo.reset()
    weights, biases = networks([2, 5, 3], 2)
    with ngk.use_backend("reference"):
        model.graph(2)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert relative(compiled(weights, biases), model(weights, biases)) < 1e-5


def flat(result) -> list[torch.Tensor]:
    """The tensors of a model's result: logits, or updates of weights and biases."""
    return [result] if isinstance(result, torch.Tensor) else [*result[0], *result[1]]


def relative(found: torch.Tensor, wanted: torch.Tensor, least: float = 1e-30) -> float:
    """Largest error over the largest wanted value, or over `least` if that is more."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=least)).item()


def permuted(weights, biases, layout):
    """The same functions with the hidden neurons in another order, and the orders."""
    orders = [torch.arange(layout[0]), *(torch.randperm(d) for d in layout[1:-1]), torch.arange(layout[-1])]
    weights = [w[:, a][:, :, b] for w, a, b in zip(weights, orders, orders[1:])]
    return weights, [b[:, o] for b, o in zip(biases, orders[1:])], orders


def saved_tensors(model, weights, biases) -> list[torch.Tensor]:
    """What a step of `model` keeps for its backward pass, each storage once."""
    saved: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(weights, biases)
    sum(t.sum() for t in flat(out)).backward()
    return list(saved.values())
