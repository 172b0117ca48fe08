"""NFN: a network of linear layers that commute with the permutations of hidden neurons (the NP variant)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .checks import CHECK_FINITE, check_layout
from .from_reference import expect_options, load_parameters
from .weight_features import Each, Features, checked_features

_OP = "NFN"
BANDS, TOP = 6, 5.0  # of the position code: frequencies 1 .. TOP


class FourierFeatures(nn.Module):
    """gamma(x) = [sin(2 pi x B), cos(2 pi x B)] of every weight and bias, B ~ N(0, sigma^2) frozen; sines first."""

    def __init__(self, channels: int, count: int, sigma: float):
        super().__init__()
        self.register_buffer("_B", torch.randn(channels, count) * sigma)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        phase = 2 * math.pi * (x.transpose(1, -1) @ self._B).transpose(1, -1)  # [B, count, rows (, columns)]
        return torch.cat([phase.sin(), phase.cos()], 1)

    def forward(self, features: Features) -> Features:
        weights, biases = features
        return [self._encode(w) for w in weights], [self._encode(b) for b in biases]


def position_code(count: int, like: torch.Tensor) -> torch.Tensor:
    """enc(z) = [sin(pi z f), cos(pi z f), z] for `count` points z from -1 to 1, [2 BANDS + 1, count]."""
    z = torch.linspace(-1.0, 1.0, count, device=like.device, dtype=like.dtype)
    phase = math.pi * torch.linspace(1.0, TOP, BANDS, device=like.device, dtype=like.dtype)[:, None] * z
    return torch.cat([phase.sin(), phase.cos(), z[None]])


class PositionCode(nn.Module):
    """Appends 2 BANDS + 1 channels that tell layers, input neurons and output neurons apart.

    A layer's own code everywhere; the first weight's columns add their input neuron's, the last weight's and bias's
    rows their output neuron's.
    """

    channels = 2 * BANDS + 1

    def __init__(self, layout: Sequence[int]):
        super().__init__()
        self.layout = tuple(layout)

    def forward(self, features: Features) -> Features:
        weights, biases = (list(tensors) for tensors in features)
        last = len(weights) - 1
        of_layer = position_code(len(weights), weights[0])
        for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
            rows = of_layer[:, k, None]  # [code, 1], or one column for each output neuron
            if k == last:
                rows = rows + position_code(self.layout[-1], w)
            columns = position_code(self.layout[0], w)[:, None] if k == 0 else 0.0
            weights[k] = torch.cat([w, (rows[:, :, None] + columns).expand(len(w), -1, *w.shape[2:])], 1)
            biases[k] = torch.cat([b, rows.expand(len(b), -1, b.shape[2])], 1)
        return weights, biases


class NPLinear(nn.ModuleDict):
    """The linear maps that commute with permutations of every node layer, the inputs' and outputs' too.

        weight_l[i, j] <- K weight_l[i, j] + K_rc means + K_r [mean_i weight_l, mean_j weight_(l-1), bias_(l-1)]_j
                          + K_c [mean_j weight_l, bias_l, mean_i weight_(l+1)]_i
        bias_l[i] <- K_b [mean_j weight_l, bias_l, mean_i weight_(l+1)]_i + K_brc means

    `means`: of every weight, then of every bias. What a first or last layer lacks is left out.

    Args:
        depth: number of weights. inputs, outputs: channels.
    """

    def __init__(self, depth: int, inputs: int, outputs: int):
        super().__init__()
        for k in range(depth):
            rows, columns = inputs * (3 if k else 1), inputs * (3 if k + 1 < depth else 2)
            own = {
                f"layer_{k}": nn.Conv2d(inputs, outputs, 1),
                f"layer_{k}_rc": nn.Linear(2 * depth * inputs, outputs),
                f"layer_{k}_r": nn.Conv1d(rows, outputs, 1),
                f"layer_{k}_c": nn.Conv1d(columns, outputs, 1),
            }
            bias = {f"bias_{k}": nn.Conv1d(columns, outputs, 1), f"bias_{k}_rc": nn.Linear(2 * depth * inputs, outputs)}
            for group in (own, bias):
                bound = 1 / math.sqrt(sum(m.weight[0].numel() for m in group.values()))
                for parameter in (p for m in group.values() for p in m.parameters()):
                    nn.init.uniform_(parameter, -bound, bound)
                self.update(group)

    def forward(self, features: Features) -> Features:
        """Weights [B, inputs, d_(l+1), d_l] and biases [B, inputs, d_(l+1)] to as many `outputs`."""
        weights, biases = features
        over_rows, over_columns = [w.mean(-2) for w in weights], [w.mean(-1) for w in weights]
        means = torch.cat([w.mean((-2, -1)) for w in weights] + [b.mean(-1) for b in biases], -1)
        out_weights, out_biases = [], []
        for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
            by_column = torch.cat([over_rows[k], *((over_columns[k - 1], biases[k - 1]) if k else ())], 1)
            by_row = torch.cat([over_columns[k], b, *over_rows[k + 1 : k + 2]], 1)
            out = self[f"layer_{k}"](w) + self[f"layer_{k}_rc"](means)[..., None, None]
            out_weights.append(out + self[f"layer_{k}_r"](by_column).unsqueeze(-2) + self[f"layer_{k}_c"](by_row).unsqueeze(-1))
            out_biases.append(self[f"bias_{k}"](by_row) + self[f"bias_{k}_rc"](means)[..., None])
        return out_weights, out_biases


class NFN(nn.Module):
    """Logits of neural networks, from their weights.

    Fourier features and a code of the position, then NPLinear and ReLU a few times, then the mean of every weight
    and of every bias to an MLP. Plain PyTorch: activations of every weight are kept for backward, 4 (525 + 3 x 512)
    bytes for each weight at the default sizes, as in the published code.

    Args:
        layout: widths of the networks, inputs first.
        hidden_channels: channels after each equivariant layer. out_features: of the result.
        channels: C, numbers for each weight and each bias.
        fourier_features, fourier_sigma: number and scale of the frequencies. head_width, dropout: of the last MLP.
        check_finite: None, "warn" or "error" on NaN and infinity in the input; not looked at under torch.compile.

    Raises:
        ValueError, TypeError: options that are unknown or do not fit.

    Reference: Zhou et al., "Permutation Equivariant Neural Functionals", NeurIPS 2023, as configured for comparison by
        Kofinas et al., ICLR 2024. Parameters carry the names of that public code; `from_reference` loads its checkpoints.
    """

    def __init__(
        self,
        layout: Sequence[int],
        hidden_channels: Sequence[int] = (512, 512, 512),
        out_features: int = 10,
        *,
        channels: int = 1,
        fourier_features: int = 256,
        fourier_sigma: float = 10.0,
        head_width: int = 1000,
        dropout: float = 0.5,
        check_finite: str | None = None,
    ):
        super().__init__()
        self.layout, self.channels, self.check_finite = check_layout(_OP, layout), channels, check_finite
        hidden_channels = tuple(hidden_channels)
        if not hidden_channels or min(hidden_channels) < 1:
            raise ValueError(f"{_OP}: expected at least one hidden layer of at least 1 channel, got {hidden_channels}")
        for name, value in (
            ("out_features", out_features), ("channels", channels), ("fourier_features", fourier_features), ("head_width", head_width),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{_OP}: expected {name} of at least 1, got {value}")
        if check_finite not in CHECK_FINITE:
            raise ValueError(f"{_OP}: expected check_finite in {', '.join(map(str, CHECK_FINITE))}, got {check_finite!r}")
        depth, width = len(self.layout) - 1, 2 * fourier_features + PositionCode.channels
        layers: list[nn.Module] = [FourierFeatures(channels, fourier_features, fourier_sigma), PositionCode(self.layout)]
        for outputs in hidden_channels:
            layers += [NPLinear(depth, width, outputs), Each(torch.relu)]
            width = outputs
        self.nfnet_features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(2 * depth * width, head_width), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(head_width, head_width), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(head_width, out_features),
        )  # fmt: skip

    @classmethod
    def from_reference(cls, state_dict: dict[str, torch.Tensor], config: dict, **options) -> NFN:
        """The model of a checkpoint of the reference code: same parameters, same function.

        Args:
            state_dict: parameters and buffers under the reference's names.
            config: layout, hchannels, mode, normalize, in_channels, dropout as in its configuration.
            options: further arguments of the constructor.

        Raises:
            ValueError: tensors missing, left over or of the wrong shape. NotImplementedError: an option this model lacks.
        """
        op = f"{_OP}.from_reference"
        expect_options(op, config, ("layout", "hchannels"), {"mode": "NP", "normalize": False})
        given = {
            "layout": [int(d) for d in config["layout"]], "hidden_channels": config["hchannels"], "channels": config.get("in_channels", 1),
            "dropout": config.get("dropout", 0.0),
        }  # fmt: skip
        for option, name, axis in (
            ("fourier_features", "nfnet_features.0._B", 1),
            ("head_width", "head.1.weight", 0),
            ("out_features", "head.7.weight", 0),
        ):
            if name in state_dict:  # not in the configuration; where it is missing, load_parameters says so
                given[option] = state_dict[name].shape[axis]
        return load_parameters(op, cls(**{**given, **options}), state_dict)

    def forward(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits [B, out_features] of B networks of the layout.

        Args:
            weights: weights[l] (B, d_l, d_(l+1), C), floating, any strides. biases: biases[l] (B, d_(l+1), C).

        Raises:
            ValueError, TypeError: shapes, dtypes, devices that do not fit the layout and the model.
        """
        weights, biases = checked_features(_OP, self.layout, weights, biases, self.channels, self.head[1].weight, self.check_finite)
        features = [w.permute(0, 3, 2, 1) for w in weights], [b.mT for b in biases]
        weights, biases = self.nfnet_features(features)  # [B, C, out, in], [B, C, out]
        pooled = torch.stack([m for w, b in zip(weights, biases, strict=True) for m in (w.mean((2, 3)), b.mean(-1))], -1)
        return self.head(pooled.flatten(1))
