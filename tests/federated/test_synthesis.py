"""Samples without data: generators, and what the server's model takes their samples for."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from neurocl.federated.synthesis import SynthesisConfig, disagreement, generator_for, synthesize

SMALL = {"steps": 3, "inner_steps": 40, "warm_up": 1, "student_steps": 5, "noise": 16}


class Linear(nn.Module):
    """Scores of five classes, linear in the sample."""

    def __init__(self, size, seed):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(5, size, generator=random))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def made(shape=(20,), classes=range(2, 4), seed=0, **changes):
    size = int(torch.Size(shape).numel())
    random = torch.Generator().manual_seed(seed)
    teacher, student = Linear(size, 0), Linear(size, 1)
    found = synthesize(teacher, student, classes, shape, SynthesisConfig(**(SMALL | changes)), random)
    return found, teacher, student


@pytest.mark.parametrize("shape", [(20,), (4, 5), (3, 9, 11), (1, 8, 8)])
def test_samples_have_the_shape_and_range_of_the_data(shape):
    found, _, _ = made(shape, low=5.0, high=6.0)
    assert found.shape == (3 * 16, *shape)
    assert not found.requires_grad
    assert 5 <= found.min() < found.max() <= 6


@pytest.mark.parametrize("shape", [(20,), (3, 9, 11)])
def test_without_a_rival_the_teacher_takes_them_for_the_wanted_classes(shape):
    found, teacher, _ = made(shape, adversarial=0)
    chosen = teacher(found)[:, :4].argmax(dim=1)
    wanted = (chosen == 2) | (chosen == 3)
    assert wanted.float().mean() > 0.9
    assert chosen[wanted].unique().tolist() == [2, 3]


def test_the_same_numbers_give_the_same_samples_and_nobody_elses_numbers_change():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, other = (made(seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_teacher_stays_and_the_student_learns_after_the_warm_up():
    _, teacher, student = made()
    assert torch.equal(teacher.weight, Linear(20, 0).weight)
    assert not torch.equal(student.weight, Linear(20, 1).weight)
    _, _, waiting = made(warm_up=3)
    assert torch.equal(waiting.weight, Linear(20, 1).weight)


def test_samples_depend_on_the_student_only_after_the_warm_up():
    short, long = (made(warm_up=warm_up)[0] for warm_up in (1, 3))
    assert torch.equal(short[:16], long[:16])
    assert not torch.equal(short[16:], long[16:])


def test_disagreement_counts_where_both_choose_the_same_class():
    teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    ours, theirs = teacher.softmax(1)[0], student.softmax(1)[0]
    wanted = (ours * (ours / theirs).log()).sum() / 2
    torch.testing.assert_close(disagreement(teacher, student), wanted)
    torch.testing.assert_close(disagreement(teacher, teacher), torch.tensor(0.0))


def test_a_very_sure_teacher_gives_finite_gradients():
    teacher = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    disagreement(teacher, torch.tensor([[900.0, 0.0]])).backward()
    assert teacher.grad.isfinite().all()


def test_generators_take_any_shape():
    random = torch.Generator().manual_seed(0)
    for shape in ((7,), (3, 5), (1, 1, 1), (3, 32, 32), (2, 7, 13)):
        assert generator_for(8, shape, random)(torch.randn(4, 8)).shape == (4, *shape)


def test_an_empty_range_is_refused():
    with pytest.raises(ValidationError, match="low must be below high"):
        SynthesisConfig(low=1.0, high=1.0)
