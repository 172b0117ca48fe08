"""Weight-space transformations: they leave what a network draws unchanged, or move it exactly as they say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_graphs.data import (
    Normalisation,
    PictureMotion,
    SirenConfig,
    canonical_signs,
    flatten,
    init_siren,
    move_picture,
    permute_hidden,
    pixel_grid,
    random_orders,
    siren_forward,
    sorted_orders,
)

pytestmark = pytest.mark.usefixtures("one_thread")
POINTS = pixel_grid(6, 7).double()


def networks(seed, layout=(2, 6, 5, 3), count=4):
    config = SirenConfig(layout=layout, first_bound=None, bias_bound=None)
    weights, biases = init_siren(config, count, torch.Generator().manual_seed(seed))
    return [w.double() for w in weights], [b.double() for b in biases]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_signs_and_order_do_not_change_the_picture(seed):
    weights, biases = networks(seed)
    before = siren_forward(weights, biases, POINTS)
    signed = canonical_signs(weights, biases)
    assert all((bias >= 0).all() for bias in signed[1][:-1])
    torch.testing.assert_close(siren_forward(*signed, POINTS), before, rtol=1e-9, atol=1e-11)
    shuffled = permute_hidden(*signed, random_orders(biases, torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(siren_forward(*shuffled, POINTS), before, rtol=1e-9, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_sorting_undoes_any_permutation_and_signs_undo_any_flip(seed):
    weights, biases = networks(seed)
    generator = torch.Generator().manual_seed(seed)
    flips = [torch.randint(0, 2, b.shape, generator=generator).double() * 2 - 1 for b in biases[:-1]]
    other_w, other_b = [w.clone() for w in weights], [b.clone() for b in biases]
    for layer, flip in enumerate(flips):
        other_w[layer] *= flip.unsqueeze(1)
        other_b[layer] *= flip
        other_w[layer + 1] *= flip.unsqueeze(2)
    other_w, other_b = permute_hidden(other_w, other_b, random_orders(biases, generator))

    def canonical(w, b):
        w, b = canonical_signs(w, b)
        return flatten(*permute_hidden(w, b, sorted_orders(b)))

    assert torch.equal(canonical(weights, biases), canonical(other_w, other_b))


def test_moving_the_picture_is_exact():
    weights, biases = networks(1)
    motion, seed = PictureMotion(turn=0.4, scale=0.3, shift=0.2), 5
    moved = move_picture(weights, biases, motion, torch.Generator().manual_seed(seed))
    draw = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)).mul(2).sub(1).double()
    for k in range(4):
        angle, scale = draw[k, 0] * motion.turn, torch.exp(draw[k, 1] * torch.log1p(torch.tensor(motion.scale, dtype=torch.float64)))
        turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]) * scale
        there = POINTS @ turn.t() + draw[k, 2:] * motion.shift
        expected = siren_forward([w[k : k + 1] for w in weights], [b[k : k + 1] for b in biases], there)
        got = siren_forward([w[k : k + 1] for w in moved[0]], [b[k : k + 1] for b in moved[1]], POINTS)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(moved[0][1:], weights[1:]))


def test_motion_needs_two_coordinates():
    with pytest.raises(ValueError, match="expected networks of 2-D coordinates, got 3 inputs"):
        move_picture(*networks(0, layout=(3, 4, 1)), PictureMotion(), torch.Generator())


def test_transforms_leave_their_input_alone():
    weights, biases = networks(2)
    copies = [w.clone() for w in weights], [b.clone() for b in biases]
    generator = torch.Generator().manual_seed(0)
    canonical_signs(weights, biases)
    move_picture(weights, biases, PictureMotion(), generator)
    permute_hidden(weights, biases, random_orders(biases, generator))
    Normalisation.measure(weights, biases)(weights, biases)
    assert all(torch.equal(a, b) for a, b in zip([*weights, *biases], [*copies[0], *copies[1]]))


def test_normalisation_is_one_mean_and_deviation_per_layer():
    weights, biases = networks(3, count=50)
    weights, biases = Normalisation.measure(weights, biases)(weights, biases)
    for tensor in weights + biases:
        assert abs(float(tensor.mean())) < 1e-9 and abs(float(tensor.std(correction=0)) - 1) < 1e-9


def test_normalisation_of_a_constant_layer():
    weights, biases = [torch.ones(1, 2, 1)], [torch.full((1, 1), 3.0)]
    weights, biases = Normalisation.measure(weights, biases)(weights, biases)
    assert (weights[0] == 0).all() and (biases[0] == 0).all()
