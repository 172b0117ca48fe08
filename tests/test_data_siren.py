"""The batched SIREN fitter: its hand-written gradients, its quality, and what its networks draw."""

import pytest
import torch

from neural_graphs.data import SirenConfig, fit_sirens, init_siren, load_digit_pictures, pixel_grid, psnr, siren_forward
from neural_graphs.data.siren import _gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("layout", [(2, 8, 8, 1), (2, 5, 3), (3, 4, 6, 5, 2)])
def test_gradients_equal_autograd(layout):
    config = SirenConfig(layout=layout)
    weights, biases = init_siren(config, 4, generator())
    weights, biases = [w.double() for w in weights], [b.double() for b in biases]
    points, wanted = torch.rand(4, 11, layout[0]).double(), torch.rand(4, 11, layout[-1]).double()
    parameters = [p.requires_grad_() for w, b in zip(weights, biases) for p in (w, b.unsqueeze(1))]
    drawn = siren_forward(parameters[0::2], [b.squeeze(1) for b in parameters[1::2]], points, config.omega, config.offset)
    expected = torch.autograd.grad((drawn - wanted).square().mean((1, 2)).sum(), parameters)
    with torch.no_grad():
        found = _gradients(parameters, points, wanted, config)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_forward_equals_a_torch_module():
    config = SirenConfig(layout=(2, 6, 4, 3))
    weights, biases = init_siren(config, 3, generator())
    points = pixel_grid(5, 4)
    drawn = siren_forward(weights, biases, points)
    for k in range(3):
        x = points
        for layer in range(3):
            linear = torch.nn.Linear(weights[layer].shape[1], weights[layer].shape[2])
            linear.load_state_dict({"weight": weights[layer][k].t(), "bias": biases[layer][k]})
            x = linear(x) + 0.5 if layer == 2 else torch.sin(30 * linear(x))
        torch.testing.assert_close(drawn[k], x, rtol=1e-4, atol=1e-5)


def test_digits_are_fitted_well_and_the_same_each_time():
    pictures, _ = load_digit_pictures()
    targets = pictures[:96].reshape(96, 64, 1)
    weights, _, error = fit_sirens(targets, pixel_grid(8, 8), SirenConfig(), generator(3))
    assert psnr(error).median() > 26.5
    assert psnr(error).quantile(0.05) > 20
    again, _, _ = fit_sirens(targets, pixel_grid(8, 8), SirenConfig(), generator(3))
    assert all(torch.equal(a, b) for a, b in zip(weights, again))


def test_every_network_has_its_own_start_unless_shared():
    weights, biases = init_siren(SirenConfig(), 5, generator())
    assert not torch.equal(weights[1][0], weights[1][1])
    weights, biases = init_siren(SirenConfig(), 5, generator(), shared=True)
    assert all((t == t[:1]).all() for t in weights + biases)


def test_progress_and_points_per_step():
    calls = []
    config = SirenConfig(layout=(2, 16, 3), steps=40, points_per_step=7)
    fit_sirens(torch.rand(1, 20, 3), pixel_grid(4, 5), config, generator(), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (40, 40) and len(calls) == 20


def test_errors():
    with pytest.raises(ValueError, match=r"expected targets of shape \[M, 64, 1\], got \[3, 63, 1\]"):
        fit_sirens(torch.zeros(3, 63, 1), pixel_grid(8, 8), SirenConfig(), generator())
    with pytest.raises(ValueError, match=r"expected points of shape \[P, 2\], got \[64, 3\]"):
        fit_sirens(torch.zeros(3, 64, 1), torch.zeros(64, 3), SirenConfig(), generator())
    with pytest.raises(ValueError, match=r"expected layout to be at least two positive widths, got \[2\]"):
        SirenConfig(layout=(2,))
    with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
        SirenConfig(steps=0)
