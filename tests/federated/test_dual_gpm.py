"""DualGPM: the protected space against the public code of InfLoRA, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neurocl.federated.dual_gpm import Memory, free_directions, remembered, threshold
from tests.conftest import reference


def gram_of(rank: int, size: int = 12, seed: int = 0) -> torch.Tensor:
    """Of inputs in a random space of that dimension, with decaying energies."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((size, rank)))[0]
    return torch.from_numpy(basis @ np.diag(0.7 ** np.arange(rank)) @ basis.T)


@pytest.mark.parametrize("name", ["dualgpm", "dualgpm_retain"])
def test_directions_and_memory_agree_with_the_public_code(name):
    case = reference(f"federated-dolfin/{name}")
    memory, tasks = Memory.empty(24), len(case["client_grams"])
    kinds = []
    for task in range(tasks):
        gram = torch.from_numpy(case["client_grams"][task].sum(0) / case["tokens"].sum())
        current = gram - memory.projector @ gram
        np.testing.assert_allclose(current.numpy(), case[f"cur_{task}"], atol=1e-8)
        rows, expected = free_directions(gram, memory, int(case["rank"])).numpy(), case[f"A_{task}"]
        signs = np.sign((rows * expected).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(rows * signs, expected, atol=1e-8)
        memory = remembered(memory, gram, threshold(float(case["lamb"]), float(case["lame"]), task, tasks))
        np.testing.assert_allclose(memory.projector.numpy(), case[f"protected_projector_{task}"], atol=1e-8)
        assert memory.complement == (str(case[f"type_{task}"]) == "retain")
        assert memory.basis.shape == case[f"basis_{task}"].shape
        kinds.append(memory.complement)
    assert any(kinds) == (name == "dualgpm_retain")


@pytest.mark.parametrize("energy", ["squared", "eigenvalues"])
def test_less_energy_than_the_threshold_leaves_is_outside_the_protected_space(energy):
    memory = remembered(Memory.empty(12), gram_of(3), 0.9, energy=energy)
    for task, share in enumerate((0.9, 0.95, 0.99), 1):
        gram = gram_of(6, seed=task)
        memory = remembered(memory, gram, share, energy=energy)
        power = 2 if energy == "squared" else 1
        outside = torch.linalg.svdvals(gram - memory.projector @ gram).pow(power).sum()
        assert outside <= (1 - share) * torch.linalg.svdvals(gram).pow(power).sum() + 1e-12


def test_new_directions_are_orthonormal_and_outside_the_protected_space():
    memory = Memory.empty(12)
    for task in range(4):
        rows = free_directions(gram_of(8, seed=task), memory, 3)
        torch.testing.assert_close(rows @ rows.T, torch.eye(3).double(), atol=1e-12, rtol=0)
        assert (rows @ memory.projector).abs().max() < 1e-12
        before = memory.num_protected
        memory = remembered(memory, gram_of(8, seed=task), 0.9)
        assert memory.num_protected >= before
        assert 2 * memory.basis.shape[1] <= 12
        identity = torch.eye(memory.basis.shape[1]).double()
        torch.testing.assert_close(memory.basis.T @ memory.basis, identity, atol=1e-10, rtol=0)


def test_rows_for_which_no_direction_is_left_are_zero():
    gram = gram_of(4)
    memory = remembered(Memory.empty(12), gram_of(4), 1.0)
    assert not free_directions(gram, memory, 3).any()
    wider = gram + 0.5 * torch.outer(memory.projector[0], memory.projector[0])
    assert not free_directions(wider, memory, 3).any()
    assert free_directions(gram_of(2), Memory.empty(12), 5).any(dim=1).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("size", [4, 9])
def test_a_threshold_of_one_protects_everything_that_was_excited(size):
    memory = remembered(Memory.empty(12), gram_of(size), 1.0)
    assert memory.num_protected == size
    assert memory.complement == (size > 6)
    assert (gram_of(size) - memory.projector @ gram_of(size)).abs().max() < 1e-12


def test_a_threshold_of_zero_protects_one_direction():
    memory = remembered(Memory.empty(12), gram_of(4), 0.0)
    assert memory.num_protected == 1
    assert remembered(memory, gram_of(4, seed=1), 0.0).num_protected == 1


def test_the_kept_basis_is_the_complement_once_more_than_half_is_protected():
    first = remembered(Memory.empty(12), gram_of(4), 1.0)
    second = remembered(first, gram_of(4, seed=1), 1.0)
    third = remembered(second, gram_of(2, seed=2), 1.0)
    assert [memory.complement for memory in (first, second, third)] == [False, True, True]
    assert [memory.num_protected for memory in (first, second, third)] == [4, 8, 10]
    assert (second.basis.T @ first.basis).abs().max() < 1e-12
    assert (third.projector @ second.projector - second.projector).abs().max() < 1e-10


def test_a_task_that_excites_nothing_changes_nothing():
    memory = remembered(Memory.empty(12), gram_of(4), 0.9)
    assert remembered(memory, torch.zeros(12, 12), 0.9) is memory
    assert remembered(memory, gram_of(1) * 0, 1.0) is memory


def test_the_scale_of_a_gram_matrix_does_not_matter():
    once, again = (remembered(Memory.empty(12), factor * gram_of(6), 0.9).projector for factor in (1.0, 1e4))
    torch.testing.assert_close(once, again, atol=1e-10, rtol=0)


def test_thresholds_rise_from_task_to_task():
    assert [threshold(0.95, 1.0, task, 5) for task in range(5)] == pytest.approx([0.95, 0.96, 0.97, 0.98, 0.99])
