"""First-order expansions: exact at the start, linear in the parameters, and with the derivative of autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurocl.merging.linearised import Linearised, first_order, unit_rows
from neurocl.merging.suite import network
from tests.merging.networks import jittered
from tests.merging.tiny_suite import items, vit


def case() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model = network(vit()).double()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    return jittered(model, 1, 0.05), start, items().batch(torch.arange(6)).double()


def test_it_is_the_network_itself_at_the_start() -> None:
    model, start, x = case()
    model.load_state_dict(start)
    torch.testing.assert_close(Linearised(model)(x), model(x))
    torch.testing.assert_close(Linearised(model, output=unit_rows)(x), unit_rows(model(x)))


def test_it_is_linear_in_the_parameters() -> None:
    model, start, x = case()
    expanded = Linearised(model, start)
    far = expanded(x)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_((value + start[name]) / 2)
    half = expanded(x)
    model.load_state_dict(start)
    torch.testing.assert_close(half, (far + expanded(x)) / 2)


def test_its_derivative_is_that_of_the_network_at_the_start() -> None:
    model, start, x = case()
    deltas = {name: value.detach() - start[name] for name, value in model.named_parameters()}
    small = 1e-6
    model.load_state_dict({name: value + small * deltas[name] for name, value in start.items()})
    above = model(x).detach()
    model.load_state_dict({name: value - small * deltas[name] for name, value in start.items()})
    below = model(x).detach()
    _, change = first_order(model, start, deltas, x)
    torch.testing.assert_close(change, (above - below) / (2 * small), rtol=1e-6, atol=1e-8)


def test_gradients_reach_the_parameters_and_are_those_at_the_start_wherever_they_are() -> None:
    model, start, x = case()
    weight = torch.randn(6, 5, dtype=torch.float64)
    Linearised(model, start)(x).mul(weight).sum().backward()
    found = {name: value.grad for name, value in model.named_parameters()}
    model.load_state_dict(start)
    model.zero_grad()
    model(x).mul(weight).sum().backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.grad)


def test_it_works_where_no_gradients_are_wanted() -> None:
    model, start, x = case()
    expected = Linearised(model, start)(x)
    with torch.inference_mode():
        torch.testing.assert_close(Linearised(model, start)(x), expected)
