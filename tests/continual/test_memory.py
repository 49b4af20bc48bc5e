"""The replay memory: replacement rules against reference streams, uniformity, and complete state."""

import numpy as np
import pytest
import torch

from neurocl.continual.memory import Memory, balanced_slots, greedy_slots, reservoir_slots
from tests.conftest import reference, reference_cases

FIELDS = {"image": ((2,), torch.uint8), "label": ((), torch.int64)}


def offer(memory, first, count):
    items = torch.arange(first, first + count)
    memory.add(image=torch.stack([items % 256, items // 256], dim=1).to(torch.uint8), label=items)


@pytest.mark.parametrize("case", reference_cases("continual-protocol/reservoir"))
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_reservoir_rule_equals_the_reference_whatever_the_batch_size(case, batch):
    size, length = int(case["size"]), int(case["stream_len"])
    slots = [
        reservoir_slots(case["draws"][low : low + batch].astype(np.int64), low, size) for low in range(0, length, batch)
    ]
    np.testing.assert_array_equal(np.concatenate(slots), case["slot"])
    final = np.full(size, -1)
    for item, slot in enumerate(np.concatenate(slots)):
        if slot >= 0:
            final[slot] = item
    np.testing.assert_array_equal(final, case["final_item_per_slot"])


@pytest.mark.parametrize("batch", [1, 10, 200])
def test_balanced_rule_equals_the_reference_whatever_the_batch_size(batch):
    case = {key.removeprefix("balanced_"): value for key, value in reference("continual-protocol/reservoir").items()}
    size, labels = int(case["size"]), case["stream_labels"].astype(np.int64)
    stored = np.full(size, -1, np.int64)
    slots = [
        balanced_slots(case["draws"][low : low + batch].astype(np.int64), labels[low : low + batch], stored, low, size)
        for low in range(0, len(labels), batch)
    ]
    np.testing.assert_array_equal(np.concatenate(slots), case["slot"])
    np.testing.assert_array_equal(np.bincount(stored, minlength=len(case["final_counts"])), case["final_counts"])


def test_greedy_rule_balances_a_class_ordered_stream():
    labels = np.repeat(np.arange(5), 100)
    stored = np.full(50, -1, np.int64)
    greedy_slots(np.arange(500) * 7919 % 501, labels, stored, 0, 50)
    np.testing.assert_array_equal(np.bincount(stored), [10] * 5)


def test_every_item_of_a_stream_is_kept_with_equal_probability():
    capacity, length, runs = 20, 60, 2000
    counts = np.zeros(length)
    for seed in range(runs):
        memory = Memory(capacity, {"label": ((), torch.int64)}, seed=seed)
        for low in range(0, length, 8):
            memory.add(label=torch.arange(low, min(low + 8, length)))
        counts[memory.field("label").numpy()] += 1
    expected = runs * capacity / length
    chi_square = float(((counts - expected) ** 2 / (expected * (1 - capacity / length))).sum())
    assert chi_square < 100  # 59 degrees of freedom: p = 0.0007


def test_of_two_items_that_choose_the_same_slot_the_later_stays():
    memory = Memory(1, {"label": ((), torch.int64)}, seed=0)
    slot_rule = reservoir_slots(np.zeros(5, np.int64), 0, 1)
    np.testing.assert_array_equal(slot_rule, [0] * 5)
    memory._draw_slots = lambda values, count: np.zeros(count, np.int64)
    memory.add(label=torch.arange(5))
    assert memory.field("label").tolist() == [4]


def test_sampling_is_without_replacement_and_bounded_by_what_is_stored():
    memory = Memory(10, FIELDS, seed=0)
    offer(memory, 0, 6)
    assert sorted(memory.sample(100)["label"].tolist()) == list(range(6))
    assert len(memory.sample(4)["label"]) == 4


def test_a_half_filled_memory_is_restored_as_half_filled_and_goes_on_identically():
    memory, copy = Memory(10, FIELDS, seed=3), Memory(10, FIELDS, seed=99)
    offer(memory, 0, 7)
    memory.sample(3)
    copy.load_state_dict(memory.state_dict())
    assert len(copy) == 7
    assert copy.num_seen == 7
    for one in (memory, copy):
        offer(one, 7, 300)
    assert torch.equal(memory.field("label"), copy.field("label"))
    assert torch.equal(memory.sample(5)["label"], copy.sample(5)["label"])


def test_the_counter_survives_a_full_memory():
    memory, copy = Memory(4, FIELDS, seed=0), Memory(4, FIELDS, seed=0)
    offer(memory, 0, 1000)
    copy.load_state_dict(memory.state_dict())
    assert copy.num_seen == 1000


def test_stored_items_do_not_alias_what_was_offered():
    memory = Memory(4, FIELDS, seed=0)
    image = torch.zeros(2, 2, dtype=torch.uint8)
    memory.add(image=image, label=torch.tensor([1, 2]))
    image += 1
    assert memory.field("image").sum() == 0


def test_replace_throws_the_old_content_away():
    memory = Memory(4, FIELDS, seed=0)
    offer(memory, 0, 4)
    memory.replace(image=torch.ones(2, 2, dtype=torch.uint8), label=torch.tensor([8, 9]))
    assert memory.field("label").tolist() == [8, 9]
    with pytest.raises(ValueError, match="do not fit"):
        memory.replace(image=torch.ones(5, 2, dtype=torch.uint8), label=torch.zeros(5))


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="buffer_size must be at least 1, got 0"):
        Memory(0, FIELDS, seed=0)
    memory = Memory(4, FIELDS, seed=0)
    with pytest.raises(ValueError, match="empty memory"):
        memory.sample(1)
    with pytest.raises(ValueError, match="holds the fields"):
        memory.add(label=torch.tensor([1]))
