"""RegMean++ against Chain of Merges, RegMean and the definition worked out step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.merging.activation_chain import mean_model
from neurocl.merging.collector import collect
from neurocl.merging.regmean import regmean
from neurocl.merging.regmean_plus import regmean_pp
from tests.merging.networks import Transformer, jittered, reference_networks


class LayerBlocks(nn.Module):
    """The reference MLP with every linear layer (and the ReLU in front of it) as a block."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        layers = list(mlp.fc)
        self.blocks = nn.ModuleList(
            [nn.Sequential(layers[0]), *(nn.Sequential(nn.ReLU(), layer) for layer in layers[1:])]
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def transformers() -> tuple[list[Any], list[list[Tensor]]]:
    torch.manual_seed(0)
    base = Transformer(3).double()
    experts = [jittered(copy.deepcopy(base), seed, 0.2) for seed in range(3)]
    return experts, [[torch.randn(10, 4, 5, dtype=torch.float64)] for _ in range(3)]


def test_blocks_of_one_layer_make_it_the_chain_of_merges_of_the_reference() -> None:
    arrays, _, experts, batches = reference_networks("mlp")
    wrapped = [LayerBlocks(model) for model in experts]
    names = ["blocks.0", "blocks.1", "blocks.2"]
    merged = regmean_pp(wrapped, batches, names, off_diagonal=0.9, ridge=1e-3)
    for index, where in enumerate(("blocks.0.0", "blocks.1.1", "blocks.2.1")):
        for part in ("weight", "bias"):
            expected = arrays[f"mlp/com_self_alpha0.9_ridge0.001/fc.{index}.{part}"]
            found = merged.get_parameter(f"{where}.{part}").detach()
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("first_inputs", ["merged", "expert"])
def test_it_is_regmean_of_every_block_on_the_output_of_the_merged_blocks(first_inputs: Any) -> None:
    experts, batches = transformers()
    merged: Any = regmean_pp(experts, batches, ["blocks.0", "blocks.1"], first_inputs=first_inputs)
    expected: Any = mean_model(None, experts)
    for index in range(2):
        grams: dict[str, list[Tensor]] = {}
        for expert, (x,) in zip(experts, batches, strict=True):
            stem = expert.emb if first_inputs == "expert" else expected.emb
            h = stem(x)
            for block in expected.blocks[:index]:
                h = block(h)
            statistics = collect(expert.blocks[index], [h])
            for name in statistics.names("gram"):
                grams.setdefault(name, []).append(statistics.mean("gram", name))
        assert set(grams) == {"qkv.weight", "out.weight", "fc1.weight", "fc2.weight"}
        for name, found in grams.items():
            models = torch.stack([expert.blocks[index].get_parameter(name).detach() for expert in experts])
            solution = regmean(models[0], models, gram=torch.stack(found), off_diagonal=0.95)
            expected.blocks[index].get_parameter(name).data.copy_(solution)
    for name, value in merged.named_parameters():
        torch.testing.assert_close(value.detach(), expected.get_parameter(name).detach(), rtol=1e-8, atol=1e-10)


def test_a_single_expert_or_identical_ones_are_returned_exactly() -> None:
    experts, batches = transformers()
    for count in (1, 3):
        merged = regmean_pp([experts[0]] * count, batches[:count], ["blocks.0", "blocks.1"])
        for name, value in merged.named_parameters():
            assert torch.equal(value, experts[0].get_parameter(name))


def test_diagonals_suffice_for_an_off_diagonal_of_zero() -> None:
    experts, batches = transformers()
    cheap = regmean_pp(experts, batches, ["blocks.0"], off_diagonal=0.0)
    near = regmean_pp(experts, batches, ["blocks.0"], off_diagonal=1e-13)
    for name, value in cheap.named_parameters():
        torch.testing.assert_close(value, near.get_parameter(name), rtol=1e-8, atol=1e-10)


def test_what_does_not_fit_is_refused() -> None:
    experts, batches = transformers()
    with pytest.raises(UserError, match="names of the blocks"):
        regmean_pp(experts, batches, [])
    with pytest.raises(UserError, match="3 experts but 2 data sets"):
        regmean_pp(experts, batches[:2], ["blocks.0"])
    with pytest.raises(UserError, match="does not run on the output"):
        regmean_pp(experts, batches, ["blocks.1", "blocks.0"])
    with pytest.raises(ValueError, match="ridge"):
        regmean_pp(experts, batches, ["blocks.0"], ridge=-1.0)
