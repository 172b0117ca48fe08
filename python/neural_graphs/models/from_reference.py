"""Checkpoints and configurations of the reference code."""

from __future__ import annotations

import re

import torch

_NORMS = {"layernorm": "batch_graph", "layer_norm": "batch_graph", "graphlayernorm": "batch_graph", None: None}


def _option(config: dict, name: str, value, what: str) -> None:
    if config.get(name, value) != value:
        raise NotImplementedError(f"NGGNN.from_reference: expected {what} {name}={value!r}, got {config[name]!r}; that option is not built")


def options_of(config: dict) -> dict:
    """Arguments of NGGNN from the reference's configuration.

    Raises:
        ValueError: entries missing. NotImplementedError: options that are not built.
    """
    missing = [k for k in ("layout", "d_hid", "pna", "graph_constructor") if k not in config]
    if missing:
        raise ValueError(f"NGGNN.from_reference: expected config with {', '.join(missing)}, got {', '.join(config)}")
    pna, first = config["pna"], config["graph_constructor"]
    for name, value in (("divide_input", False), ("train_norm", False), ("jk", None), ("act_kwargs", None)):
        _option(pna, name, value, "pna")
    norm = pna.get("norm")
    if norm is not None and norm.lower() not in _NORMS:
        raise NotImplementedError(f"NGGNN.from_reference: expected pna norm layernorm or None, got {norm!r}; that norm is not built")
    modulate = "concat" if not pna.get("modulate_edges", False) else "gate" if pna.get("gating_edges", False) else "film"
    act = pna.get("act", "relu")
    return {
        "layout": [int(d) for d in config["layout"]], "d_hid": config["d_hid"], "num_layers": pna["num_layers"], "out_features": config.get("d_out"),
        "encoder": "fourier" if first.get("sin_emb", False) else "linear", "fourier_features": first.get("sin_emb_dim", 128),
        "fourier_sigma": first.get("inp_factor", 1), "input_layers": first.get("input_layers", 1),
        "edge_channels": first.get("d_edge_in", 1), "node_channels": first.get("d_in", 1),
        "norm": None if norm is None else _NORMS[norm.lower()], "act": "identity" if act is None else act.lower(),
        "act_first": pna.get("act_first", False), "dropout": pna.get("dropout", 0.0), "pooling": tuple(config.get("pooling", ("cat", "last"))),
        "head": "classification" if "pooling" in config else "equivariant", "modulate": modulate,
        "aggregators": tuple(pna["aggregators"]), "scalers": tuple(pna["scalers"]), "towers": pna.get("towers", 1),
        "pre_layers": pna.get("pre_layers", 1), "post_layers": pna.get("post_layers", 1), "degree_histogram": pna.get("deg"),
        "update_edges": pna.get("update_edge_attr", False), "reverse_edges": config.get("rev_edge_features", False),
        "positional": first.get("use_pos_embed", True), "num_probe_features": first.get("num_probe_features", 0),
        "zero_out_weights": first.get("zero_out_weights", False), "zero_out_biases": first.get("zero_out_bias", False),
        "stats": first.get("stats") or config.get("stats"), "denormalize": config.get("normalize", False),
    }  # fmt: skip


def load(cls, state_dict: dict[str, torch.Tensor], config: dict, options: dict):
    """See NGGNN.from_reference."""
    model = cls(**{**options_of(config), **options})
    given = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): t for name, t in state_dict.items()}
    wanted = model.state_dict()
    return load_parameters("NGGNN.from_reference", model, {n: t for n, t in given.items() if n in wanted or not _never_read(n, model)})


def load_parameters(op: str, model, given: dict[str, torch.Tensor]):
    """`model` with the tensors `given`, in float64 if they are.

    Raises:
        ValueError: tensors missing, left over or of the wrong shape.
    """
    wanted = model.state_dict()
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or extra:
        text = "; ".join(f"{what}: {', '.join(names)}" for what, names in (("missing", missing), ("left over", extra)) if names)
        raise ValueError(f"{op}: expected the tensors of this config, got others ({text}); does the config belong to the checkpoint?")
    wrong = [f"{n} {tuple(given[n].shape)} instead of {tuple(wanted[n].shape)}" for n in wanted if given[n].shape != wanted[n].shape]
    if wrong:
        raise ValueError(f"{op}: expected tensors of the config's shapes, got {'; '.join(wrong)}")
    dtypes = {t.dtype for t in given.values() if t.is_floating_point()}
    if dtypes == {torch.float64}:
        model.double()
    model.load_state_dict(given)
    return model


def expect_options(op: str, config: dict, needed: tuple[str, ...], only: dict) -> None:
    """A configuration that has what is `needed`, and of what is not built (`only`) the one value that is.

    Raises:
        ValueError: entries missing. NotImplementedError: another value.
    """
    missing = [k for k in needed if k not in config]
    if missing:
        raise ValueError(f"{op}: expected config with {', '.join(missing)}, got {', '.join(config)}")
    for name, value in only.items():
        if config.get(name, value) != value:
            raise NotImplementedError(f"{op}: expected {name}={value!r}, got {config[name]!r}; that option is not built")


def _never_read(name: str, model) -> bool:
    """Parameters that the reference creates and never reads."""
    final = f"gnn.edge_update.{len(model.gnn.convs) - 1}."
    return name.startswith((final, "construct_graph.proj_mlp_")) or name in ("construct_graph.pos_embed", "edge_index")
