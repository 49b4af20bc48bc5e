"""Online EWC: the Fisher against a loop over samples, the penalty's gradient against its formula."""

import pytest
import torch
import torch.nn.functional as F

from neurocl.backbones.mlp import Mlp
from neurocl.backbones.resnet import resnet_small
from neurocl.continual.ewc import EwcConfig, EwcOnline
from tests.spiking.test_staer import make_setting


def make_method(network, **options):
    return EwcOnline(network, make_setting(), EwcConfig(**options))


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_the_fisher_equals_a_loop_over_samples(kind):
    torch.manual_seed(0)
    shape = (3, 8, 8)
    network = Mlp(shape, 10) if kind == "mlp" else resnet_small(shape, 10, stem=4, channels=(4, 8))
    method = make_method(network)
    images, labels = torch.randint(256, (9, *shape), dtype=torch.uint8), torch.randint(10, (9,))
    fisher = method.fisher(images, labels)
    network.eval()
    expected = [torch.zeros_like(value) for value in network.parameters()]
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(network(image[None].float() / 255), label[None])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        for total, gradient in zip(expected, gradients, strict=True):
            total += torch.exp(-loss).detach() * gradient**2 / len(labels)
    for ours, theirs in zip(fisher, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_the_penalty_pulls_with_twice_fisher_times_distance():
    network = Mlp((3, 4, 4), 10)
    method = make_method(network, penalty=7.0)
    for index, value in enumerate(network.parameters()):
        method.get_buffer(f"fisher_{index}").copy_(torch.rand_like(value))
        method.get_buffer(f"anchor_{index}").copy_(torch.randn_like(value))
    (method.options.penalty * method.penalty()).backward()
    for index, value in enumerate(network.parameters()):
        distance = value.detach() - method.get_buffer(f"anchor_{index}")
        torch.testing.assert_close(value.grad, 2 * 7.0 * method.get_buffer(f"fisher_{index}") * distance)
