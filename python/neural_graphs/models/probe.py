"""Probe features: what every neuron of the input network does on a few learned inputs."""

from __future__ import annotations

import torch
from torch import nn


class ProbeFeatures(nn.Module):
    """Activations of SIRENs on learned points, projected for each layer: LayerNorm(Linear(activations)).

        a_0 = points;  a_(l+1) = sin(30 (W_l a_l + b_l)) below the last layer, W_l a_l + b_l + 0.5 there

    Args:
        layout: widths of the SIREN. count: number of points. width: of the result.

    Note: plain PyTorch over batches of equal networks; differentiable with respect to weights, biases and points.

    Reference: Kofinas et al., ICLR 2024 (probe features); Sitzmann et al., NeurIPS 2020 (SIREN).
    """

    def __init__(self, layout, count: int, width: int, w0: float = 30.0, offset: float = 0.5):
        super().__init__()
        self.w0, self.offset = w0, offset
        self.inputs = nn.Parameter(2 * torch.rand(1, count, layout[0]) - 1)
        self.proj = nn.ModuleList(nn.Sequential(nn.Linear(count, width), nn.LayerNorm(width)) for _ in layout)

    def forward(self, weights, biases) -> torch.Tensor:
        """[B, n, width] from weights[l] (B, d_l, d_(l+1), 1) and biases[l] (B, d_(l+1), 1), unnormalised."""
        a = self.inputs.expand(weights[0].shape[0], -1, -1)  # [B, points, d_0]
        layers = [a]
        for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
            a = torch.baddbmm(b.to(a.dtype).mT, a, w.squeeze(-1).to(a.dtype))
            a = torch.sin(self.w0 * a) if k + 1 < len(weights) else a + self.offset
            layers.append(a)
        return torch.cat([proj(a.mT) for proj, a in zip(self.proj, layers, strict=True)], 1)
