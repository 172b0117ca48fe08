"""DWS: a network of linear layers that commute with the permutations of hidden neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .checks import CHECK_FINITE, check_layout
from .dws_maps import REDUCTIONS, SET_LAYERS, MapBlock, MapOptions, mlp, reduce
from .from_reference import expect_options, load_parameters
from .weight_features import Each, Features, checked_features

_OP = "DWS"


class DWSLayer(nn.Module):
    """Each weight and bias from all of them: the sum of the maps, divided by the number of tensors.

    Args: those of DWS; inputs, outputs: channels.
    """

    def __init__(self, layout: Sequence[int], inputs: int, outputs: int, options: MapOptions, diagonal: bool, init_scale: float):
        super().__init__()
        args = (layout, inputs, outputs, options, diagonal)
        self.weight_to_weight = MapBlock("weight_to_weight", *args)
        self.bias_to_bias = MapBlock("bias_to_bias", *args)
        self.bias_to_weight = MapBlock("bias_to_weight", *args)
        self.weight_to_bias = MapBlock("weight_to_bias", *args)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight, init_scale * math.sqrt(2 * module.in_features / module.out_features))
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -1e-4, 1e-4)

    def forward(self, features: Features) -> Features:
        """Weights [B, d_l, d_(l+1), inputs] and biases [B, d_(l+1), inputs] to as many `outputs`."""
        weights, biases = features
        count = len(weights) + len(biases)
        new_weights = zip(self.weight_to_weight(weights), self.bias_to_weight(biases), strict=True)
        new_biases = zip(self.bias_to_bias(biases), self.weight_to_bias(weights), strict=True)
        return [(a + b) / count for a, b in new_weights], [(a + b) / count for a, b in new_biases]


class FeatureNorm(nn.Module):
    """Batch norm of each weight and each bias by itself, over networks and positions."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        self.weights_bn = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(depth))
        self.biases_bn = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(depth))

    def forward(self, features: Features) -> Features:
        pairs = zip((self.weights_bn, self.biases_bn), features, strict=True)
        return tuple([norm(x.flatten(1, -2).mT).mT.reshape(x.shape) for norm, x in zip(norms, of, strict=True)] for norms, of in pairs)


class DWSFeatures(nn.Module):
    """The equivariant part: DWSLayer, then n_hidden times norm, ReLU, dropout, DWSLayer."""

    def __init__(
        self, layout, channels: int, width: int, n_hidden: int, options: MapOptions, heads: int, norm: bool, dropout: float,
        diagonal: bool, init_scale: float,
    ):  # fmt: skip
        super().__init__()
        by_heads = [
            MapOptions(options.reduction, options.set_layer, h, options.layers) for h in (*[heads] * n_hidden, 1 if n_hidden else heads)
        ]
        layers: list[nn.Module] = [DWSLayer(layout, channels, width, by_heads[0], diagonal, init_scale)]
        for of_layer in by_heads[1:]:
            layers += [FeatureNorm(width, len(layout) - 1)] if norm else []
            layers += [Each(torch.relu), Each(nn.Dropout(dropout)), DWSLayer(layout, width, width, of_layer, diagonal, init_scale)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Features) -> Features:
        return self.layers(features)


class InvariantHead(nn.Module):
    """An MLP of what permutations leave: reductions over hidden neurons, input and output neurons one by one."""

    def __init__(self, layout: Sequence[int], width: int, outputs: int, layers: int, reduction: str):
        super().__init__()
        self.reduction = reduction
        self.layer = mlp(width * (2 * len(layout) - 5 + layout[0] + 2 * layout[-1]), outputs, layers)

    def forward(self, features: Features) -> torch.Tensor:
        (first, *middle, last), biases = features
        pooled = [reduce(w.flatten(1, 2), 1, self.reduction) for w in middle]
        pooled += [reduce(first, 2, self.reduction).flatten(1), reduce(last, 1, self.reduction).flatten(1)]
        pooled += [reduce(b, 1, self.reduction) for b in biases[:-1]]
        return self.layer(torch.cat([*pooled, biases[-1].flatten(1)], 1))


class DWS(nn.Module):
    """Logits of neural networks, from their weights.

    Linear maps from every weight and bias to every other that commute with permutations of hidden neurons, with norm
    and ReLU between. Plain PyTorch: activations of every weight and every head's n x n attention over the neurons of
    a layer are kept for backward, as in the published code.

    Args:
        layout: widths of the networks, inputs first; at least two hidden layers.
        hidden_dim: channels. n_hidden: layers after the first. out_features: of the result.
        in_channels: C, numbers for each weight and each bias.
        reduction: "max", "mean" or "sum" over neurons. set_layer: "sab" (SetAttention) or "ds" (DeepSet).
        num_heads: of the attention; 1 in the last layer. n_fc_layers, n_out_fc: Linears of the maps, of the head.
        batch_norm: over networks and positions; in training a prediction then depends on its batch mates.
        diagonal: maps between tensors that touch only. dropout: in training.
        init_scale: of the first weights of all maps.
        check_finite: None, "warn" or "error" on NaN and infinity in the input; not looked at under torch.compile.

    Raises:
        ValueError, TypeError: options that are unknown or do not fit.

    Reference: Navon et al., "Equivariant Architectures for Learning in Deep Weight Spaces", ICML 2023, as configured for
        comparison by Kofinas et al., ICLR 2024. Parameters carry the names of that public code; `from_reference` loads
        its checkpoints.
    """

    def __init__(
        self, layout: Sequence[int], hidden_dim: int = 32, n_hidden: int = 4, out_features: int = 10, *, in_channels: int = 1,
        reduction: str = "max", set_layer: str = "sab", num_heads: int = 8, n_fc_layers: int = 1, n_out_fc: int = 1,
        batch_norm: bool = True, diagonal: bool = False, dropout: float = 0.0, init_scale: float = 1.0, check_finite: str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.layout, self.in_channels, self.check_finite = check_layout(_OP, layout), in_channels, check_finite
        if len(self.layout) < 4:
            raise ValueError(f"{_OP}: expected layout of at least 4 layers (3 weights), got {self.layout}")
        for name, value, known in (
            ("reduction", reduction, REDUCTIONS), ("set_layer", set_layer, SET_LAYERS), ("check_finite", check_finite, CHECK_FINITE),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{_OP}: expected {name} in {', '.join(map(str, known))}, got {value!r}")
        for name, value in (
            ("hidden_dim", hidden_dim), ("n_hidden", n_hidden), ("out_features", out_features), ("in_channels", in_channels),
            ("num_heads", num_heads), ("n_fc_layers", n_fc_layers), ("n_out_fc", n_out_fc),
        ):  # fmt: skip
            least = 0 if name == "n_hidden" else 1
            if value < least:
                raise ValueError(f"{_OP}: expected {name} of at least {least}, got {value}")
        options = MapOptions(reduction, set_layer, num_heads, n_fc_layers)
        self.layers = DWSFeatures(
            self.layout, in_channels, hidden_dim, n_hidden, options, num_heads, batch_norm, dropout, diagonal, init_scale
        )
        self.relu, self.dropout = Each(torch.relu), Each(nn.Dropout(dropout))
        self.clf = InvariantHead(self.layout, hidden_dim, out_features, n_out_fc, reduction)

    @classmethod
    def from_reference(cls, state_dict: dict[str, torch.Tensor], config: dict, **options) -> DWS:
        """The model of a checkpoint of the reference code: same parameters, same function.

        Args:
            state_dict: parameters and buffers under the reference's names.
            config: layout, input_features, hidden_dim, n_hidden, reduction, ... as in its configuration.
            options: further arguments of the constructor.

        Raises:
            ValueError: tensors missing, left over or of the wrong shape. NotImplementedError: an option this model lacks.

        Note: dropout acts in training only; in the reference it acts in evaluation too.
        """
        op = f"{_OP}.from_reference"
        fixed = {"bias": True, "add_skip": False, "add_layer_skip": False, "input_dim_downsample": None, "equiv_out_features": None}
        expect_options(op, config, ("layout", "hidden_dim"), fixed)
        head = sorted(name for name in state_dict if name.startswith("clf.layer.") and name.endswith(".weight"))
        given = {
            "layout": [int(d) for d in config["layout"]], "hidden_dim": config["hidden_dim"], "n_hidden": config.get("n_hidden", 2),
            "in_channels": config.get("input_features", 1), "reduction": config.get("reduction", "max"),
            "set_layer": config.get("set_layer", "sab"), "num_heads": config.get("num_heads", 8),
            "n_fc_layers": config.get("n_fc_layers", 1), "n_out_fc": config.get("n_out_fc", 1), "batch_norm": config.get("bn", False),
            "diagonal": config.get("diagonal", False), "dropout": config.get("dropout_rate", 0.0),
            "out_features": config.get("n_classes", state_dict[head[-1]].shape[0] if head else 10),
        }  # fmt: skip
        return load_parameters(op, cls(**{**given, **options}), state_dict)

    def forward(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits [B, out_features] of B networks of the layout.

        Args:
            weights: weights[l] (B, d_l, d_(l+1), C), floating, any strides. biases: biases[l] (B, d_(l+1), C).

        Raises:
            ValueError, TypeError: shapes, dtypes, devices that do not fit the layout and the model.
        """
        weights, biases = checked_features(_OP, self.layout, weights, biases, self.in_channels, self.clf.layer[0].weight, self.check_finite)
        features = self.layers((weights, biases))
        return self.clf(self.dropout(self.relu(features)))
