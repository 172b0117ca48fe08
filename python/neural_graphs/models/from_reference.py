"""Checkpoints and configurations of the reference code."""

from __future__ import annotations

import re

import torch

_NORMS = {"layernorm": "batch_graph", "layer_norm": "batch_graph", "graphlayernorm": "batch_graph", None: None}


def _option(op: str, config: dict, name: str, value, what: str) -> None:
    if config.get(name, value) != value:
        raise NotImplementedError(f"{op}.from_reference: expected {what} {name}={value!r}, got {config[name]!r}; that option is not built")


def _needed(op: str, config: dict, *names: str) -> None:
    missing = [k for k in names if k not in config]
    if missing:
        raise ValueError(f"{op}.from_reference: expected config with {', '.join(missing)}, got {', '.join(config)}")


def _constructor_options(first: dict) -> dict:
    """The options of every model that the reference keeps with its graph constructor."""
    return {
        "encoder": "fourier" if first.get("sin_emb", False) else "linear", "fourier_features": first.get("sin_emb_dim", 128),
        "fourier_sigma": first.get("inp_factor", 1), "input_layers": first.get("input_layers", 1),
        "edge_channels": first.get("d_edge_in", 1), "node_channels": first.get("d_in", 1),
        "positional": first.get("use_pos_embed", True), "num_probe_features": first.get("num_probe_features", 0),
        "zero_out_weights": first.get("zero_out_weights", False), "zero_out_biases": first.get("zero_out_bias", False),
    }  # fmt: skip


def nggnn_options(config: dict) -> dict:
    """Arguments of NGGNN from the reference's configuration.

    Raises:
        ValueError: entries missing. NotImplementedError: options that are not built.
    """
    _needed("NGGNN", config, "layout", "d_hid", "pna", "graph_constructor")
    pna, first = config["pna"], config["graph_constructor"]
    for name, value in (("divide_input", False), ("train_norm", False), ("jk", None), ("act_kwargs", None)):
        _option("NGGNN", pna, name, value, "pna")
    norm = pna.get("norm")
    if norm is not None and norm.lower() not in _NORMS:
        raise NotImplementedError(f"NGGNN.from_reference: expected pna norm layernorm or None, got {norm!r}; that norm is not built")
    modulate = "concat" if not pna.get("modulate_edges", False) else "gate" if pna.get("gating_edges", False) else "film"
    act = pna.get("act", "relu")
    return {
        **_constructor_options(first),
        "layout": [int(d) for d in config["layout"]], "d_hid": config["d_hid"], "num_layers": pna["num_layers"], "out_features": config.get("d_out"),
        "norm": None if norm is None else _NORMS[norm.lower()], "act": "identity" if act is None else act.lower(),
        "act_first": pna.get("act_first", False), "dropout": pna.get("dropout", 0.0), "pooling": tuple(config.get("pooling", ("cat", "last"))),
        "head": "classification" if "pooling" in config else "equivariant", "modulate": modulate,
        "aggregators": tuple(pna["aggregators"]), "scalers": tuple(pna["scalers"]), "towers": pna.get("towers", 1),
        "pre_layers": pna.get("pre_layers", 1), "post_layers": pna.get("post_layers", 1), "degree_histogram": pna.get("deg"),
        "update_edges": pna.get("update_edge_attr", False), "reverse_edges": config.get("rev_edge_features", False),
        "stats": first.get("stats") or config.get("stats"), "denormalize": config.get("normalize", False),
    }  # fmt: skip


def ngt_options(state: dict[str, torch.Tensor], config: dict) -> dict:
    """Arguments of NGT from the reference's configuration; what the tensors show is read from them.

    Raises:
        ValueError: entries missing. NotImplementedError: options that are not built.
    """
    config = {**config, "layout": config["layer_layout"]} if "layer_layout" in config else config
    _needed("NGT", config, "layout", "d_node", "d_edge", "d_attn_hid", "d_node_hid", "d_edge_hid", "n_layers", "n_heads")
    _option("NGT", config, "node_update_type", "rt", "config")
    first = {
        "sin_emb": any(re.fullmatch(r"construct_graph\.proj_\w+\.0\.b", name) for name in state),
        **config,
        **config.get("graph_constructor", {}),
    }
    reverse, pooling = config.get("rev_edge_features", False), config.get("pooling")
    if "cls_token" in state:
        pooling = "cls_token"
    elif pooling is None:
        pooling = (config.get("pooling_method", "cat"), config.get("pooling_layer_idx", "last"))
    head = [t for name, t in state.items() if re.fullmatch(r"proj_out\.\d+\.weight", name)]
    return {
        **_constructor_options(first), **_encoder_shown(state, 3 if reverse else 1),
        "layout": [int(d) for d in config["layout"]], "d_node": config["d_node"], "d_edge": config["d_edge"], "d_attn_hid": config["d_attn_hid"],
        "d_node_hid": config["d_node_hid"], "d_edge_hid": config["d_edge_hid"], "num_heads": config["n_heads"], "num_layers": config["n_layers"],
        "modulate_v": _rows(state, "layers.0.self_attn.qkv_edge.weight") != 3 * config["d_attn_hid"],
        "norm": "layer" if "layers.0.node_ln0.weight" in state else None, "dropout": config.get("dropout", 0.0),
        "update_edges": any(name.startswith("layers.0.edge_updates.") for name in state), "reverse_edges": reverse,
        "pooling": pooling if isinstance(pooling, str) else tuple(pooling),
        "head": "equivariant" if "proj_edge.0.weight" in state else "classification",
        "d_out_hid": config.get("d_out_hid", 128), "out_layers": max(1, len(head)), "out_features": head[-1].shape[0] if head else None,
        "stats": first.get("stats"), "denormalize": config.get("normalize", False),
    }  # fmt: skip


def _rows(state: dict[str, torch.Tensor], name: str) -> int:
    return state[name].shape[0] if name in state else 0


def _encoder_shown(state: dict[str, torch.Tensor], expansion: int) -> dict:
    """Options of the encoders that the tensors' names and shapes show; nothing where they are not there."""
    found = {}
    for kind, channels in (("weight", "edge_channels"), ("bias", "node_channels")):
        own = {n: t for n, t in state.items() if n.startswith(f"construct_graph.proj_{kind}.")}
        found["zero_out_weights" if kind == "weight" else "zero_out_biases"] = not own
        if own:
            first = own.get(f"construct_graph.proj_{kind}.0.b", own.get(f"construct_graph.proj_{kind}.0.weight"))
            found[channels] = first.shape[1] // (expansion if kind == "weight" else 1)
            found["input_layers"] = sum(n.endswith(".weight") for n in own)
            if f"construct_graph.proj_{kind}.0.b" in own:
                found["fourier_features"] = first.shape[0]
    if "construct_graph.gpf.inputs" in state:
        found["num_probe_features"] = state["construct_graph.gpf.inputs"].shape[1]
    return found


def own_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors without what torch.compile adds to their names."""
    return {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): t for name, t in state_dict.items()}


def load(model, state_dict: dict[str, torch.Tensor]):
    """`model` with the tensors of a checkpoint; its never_read(name) says which of the reference's parameters nobody reads.

    Raises:
        ValueError: tensors missing, left over or of the wrong shape.
    """
    given, wanted = own_names(state_dict), model.state_dict()
    for name in [n for n in given if n not in wanted and (_never_read(n) or model.never_read(n))]:
        del given[name]
    return load_parameters(f"{model.op}.from_reference", model, given)


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


def _never_read(name: str) -> bool:
    """Parameters of every model that the reference creates and never reads."""
    return name.startswith("construct_graph.proj_mlp_") or name in ("construct_graph.pos_embed", "edge_index")
