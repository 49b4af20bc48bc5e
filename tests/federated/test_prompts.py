"""Prompts against a reference in float64, and what they leave alone."""

import pytest
import torch
from torch import nn

from neurocl.backbones.vit import Attention, VisionTransformer, VitConfig
from neurocl.errors import UserError
from neurocl.federated.network import Classifier
from neurocl.federated.prompts import PrefixAttention, ShiftedInput, initial_prompt, with_prompts
from tests.conftest import reference


@pytest.fixture
def case():
    return {name: torch.tensor(value) for name, value in reference("federated-hgp/prefix_attention").items()}


def attention_of(case):
    width = case["x"].shape[-1]
    attention = Attention(width, int(case["heads"])).double()
    weights = {"qkv.weight": "Wqkv", "qkv.bias": "bqkv", "proj.weight": "Wo", "proj.bias": "bo"}
    attention.load_state_dict({name: case[key] for name, key in weights.items()})
    return attention


def test_prefix_attention_agrees_with_the_reference(case):
    out = PrefixAttention(attention_of(case), case["prompt"])(case["x"])
    torch.testing.assert_close(out, case["out"], rtol=0, atol=1e-10)


def test_a_prompt_of_length_zero_is_plain_attention(case):
    attention = attention_of(case)
    out = PrefixAttention(attention, case["prompt"][:0])(case["x"])
    torch.testing.assert_close(out, attention(case["x"]), rtol=0, atol=1e-12)


def test_zero_prompts_dilute_by_the_share_of_attention_that_they_draw(case):
    attention = attention_of(case)
    x, heads = case["x"], attention.heads
    batch, tokens, width = x.shape
    q, k, v = attention.qkv(x).view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    mass = (q @ k.mT / (width // heads) ** 0.5).exp()
    extra = len(case["prompt"]) // 2
    share = mass.sum(-1, keepdim=True) / (mass.sum(-1, keepdim=True) + extra)
    plain = (mass / mass.sum(-1, keepdim=True)) @ v
    expected = attention.proj((share * plain).transpose(1, 2).reshape(batch, tokens, width))
    out = PrefixAttention(attention, torch.zeros_like(case["prompt"]))(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def vit(**changes):
    config = VitConfig(input_shape=(3, 16, 16), width=32, depth=3, heads=2, embed_dim=16, **changes)
    torch.manual_seed(0)
    return Classifier(VisionTransformer(config), 16, 4)


def prompted(network, **options):
    options = {"length": None, "blocks": None, "init": "zeros", "generator": torch.Generator().manual_seed(0)} | options
    return with_prompts(network, torch.Size((3, 16, 16)), **options)


def test_a_small_transformer_gets_eight_numbers_of_its_width_in_two_blocks():
    network = vit()
    names = prompted(network)
    assert names == ["backbone.blocks.0.attn.prompt", "backbone.blocks.1.attn.prompt"]
    assert [tuple(network.get_parameter(name).shape) for name in names] == [(8, 32), (8, 32)]
    assert isinstance(network.get_submodule("backbone.blocks.2.attn"), Attention)


def test_only_prompts_and_head_can_be_trained():
    network = vit()
    names = prompted(network)
    trainable = [name for name, value in network.named_parameters() if value.requires_grad]
    assert sorted(trainable) == sorted([*names, "head.weight", "head.bias"])


def test_prompts_of_length_zero_leave_the_network_as_it_was():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    network = vit()
    before = network(x)
    prompted(network, length=0)
    torch.testing.assert_close(network(x), before)


def test_gradients_reach_prompts():
    network = vit()
    names = prompted(network, init="uniform")
    network(torch.ones(2, 3, 16, 16)).square().sum().backward()
    assert all(network.get_parameter(name).grad.abs().sum() > 0 for name in names)


def test_more_blocks_than_there_are_is_the_users_mistake():
    with pytest.raises(UserError, match="4 blocks, the transformer has 3"):
        prompted(vit(), blocks=4)


def test_a_perceptron_gets_a_shift_of_its_input():
    network = Classifier(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), 5, 3)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    before = network(x + 0.5)
    names = with_prompts(network, x.shape[1:], length=None, blocks=None, init="zeros", generator=torch.Generator())
    assert names == ["backbone.shift"]
    assert isinstance(network.backbone, ShiftedInput)
    with torch.no_grad():
        network.backbone.shift.fill_(0.5)
    torch.testing.assert_close(network(x), before)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (1, 7)])
def test_orthonormal_prompts_are_orthonormal_and_uniform_ones_bounded(shape):
    drawn = initial_prompt(*shape, "orthonormal", torch.Generator().manual_seed(3))
    gram = drawn @ drawn.mT if shape[0] <= shape[1] else drawn.mT @ drawn
    torch.testing.assert_close(gram, torch.eye(min(shape)))
    uniform = initial_prompt(*shape, "uniform", torch.Generator().manual_seed(3))
    assert 0 < uniform.abs().max() <= shape[1] ** -0.5
    assert not initial_prompt(*shape, "zeros", torch.Generator()).any()
