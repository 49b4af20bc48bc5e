"""Losses of the baselines against reference values and gradients."""

import numpy as np
import pytest
import torch

from neurocl.continual.er_ace import asymmetric_cross_entropy
from neurocl.continual.icarl import herding, icarl_loss
from neurocl.continual.losses import cross_entropy, logit_distance, time_mean
from neurocl.continual.lwf import distillation
from tests.conftest import reference_cases


def tensor(array, grad=False):
    return torch.from_numpy(np.asarray(array)).requires_grad_(grad)


@pytest.mark.parametrize("case", reference_cases("staer/spiking_losses"))
def test_losses_over_time_equal_the_reference(case):
    labels = tensor(case["labels"])
    for name, loss in (
        ("tsce", lambda z: cross_entropy(z, labels, per_step=True)),
        ("ce", lambda z: cross_entropy(z, labels)),
        ("mse", lambda z: logit_distance(z, tensor(case["other"]))),
    ):
        logits = tensor(case["logits"], grad=True)
        value = loss(logits)
        value.backward()
        np.testing.assert_allclose(value.item(), case[name], rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(logits.grad.numpy(), case[f"{name}_grad"], rtol=1e-6, atol=1e-8)


def test_one_time_step_is_the_ordinary_loss():
    logits, labels = torch.randn(1, 5, 7), torch.randint(7, (5,))
    assert torch.equal(cross_entropy(logits, labels), cross_entropy(logits[0], labels))
    torch.testing.assert_close(cross_entropy(logits, labels, per_step=True), cross_entropy(logits[0], labels))
    assert time_mean(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("variant", ["intended", "official"])
@pytest.mark.parametrize("case", reference_cases("continual-protocol/er_ace_step"))
def test_er_ace_equals_the_paper_and_the_released_code(case, variant):
    logits, labels = tensor(case["logits"]), tensor(case["labels"])
    seen = torch.zeros(logits.shape[1], dtype=torch.bool)
    seen[tensor(case["seen_before"])] = True
    if int(case["task"]) == 0 and not int(case["task_free"]):
        value = cross_entropy(logits, labels)
    else:
        value = asymmetric_cross_entropy(logits, labels, seen, spare_highest=variant == "official") + cross_entropy(
            tensor(case["buf_logits"]), tensor(case["buf_labels"])
        )
    np.testing.assert_allclose(value.item(), case[f"loss_{variant}"], rtol=1e-9)


@pytest.mark.parametrize("case", reference_cases("continual-protocol/lwf_kd"))
def test_distillation_equals_the_reference(case):
    new = tensor(case["new"], grad=True)
    value = distillation(tensor(case["old"]), new, float(case["temp"]))
    value.backward()
    np.testing.assert_allclose(value.item(), case["value"], rtol=1e-9)
    np.testing.assert_allclose(new.grad.numpy(), case["grad"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", reference_cases("continual-protocol/icarl_loss"))
def test_icarl_loss_equals_the_reference(case):
    past = int(case["n_past"])
    logits = tensor(case["logits"], grad=True)
    value = icarl_loss(logits, tensor(case["labels"]), tensor(case["old_sigmoid"])[:, :past] if past else None)
    value.backward()
    np.testing.assert_allclose(value.item(), case["loss"], rtol=1e-9)
    np.testing.assert_allclose(logits.grad.numpy(), case["grad"], rtol=1e-9, atol=1e-15)


def test_herding_follows_the_mean_greedily():
    features = torch.nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    chosen = herding(features, 5).tolist()
    assert len(set(chosen)) == 5
    mean = features.mean(dim=0)
    for size in range(1, 6):
        best = min(
            (i for i in range(30) if i not in chosen[: size - 1]),
            key=lambda i: float((mean - features[[*chosen[: size - 1], i]].mean(dim=0)).norm()),
        )
        assert best == chosen[size - 1]
    assert sorted(herding(features, 30).tolist()) == list(range(30))
