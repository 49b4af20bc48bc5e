"""Picture domains: the splits, the guises of the digits, and the real sets."""

import os
from pathlib import Path

import numpy as np
import pytest

from neurocl.data.domains import PICTURE_DOMAINS, digits_domains, first_of_each_class, load_domain
from neurocl.errors import UserError

DATA = os.environ.get("NEUROCL_DATA")


def test_first_of_each_class_keeps_order_and_counts():
    labels = np.array([2, 0, 2, 2, 1, 0, 0, 2])
    assert first_of_each_class(labels, 2).tolist() == [0, 1, 2, 4, 5]
    assert first_of_each_class(labels, 9).tolist() == list(range(8))


def test_digit_guises_show_the_same_digits_in_another_way():
    upright, turned, inverted, mirrored, wrapped = digits_domains()
    original = upright.images["test"]
    assert np.array_equal(np.rot90(turned.images["test"], -1, axes=(2, 3)), original)
    assert np.array_equal(mirrored.images["test"][..., ::-1], original)
    assert np.array_equal(np.roll(wrapped.images["test"], 4, axis=-1), original)
    assert (inverted.images["test"].astype(int) + original == original.max()).all()
    for domain in (turned, inverted, mirrored, wrapped):
        assert all(np.array_equal(domain.labels[split], upright.labels[split]) for split in ("train", "val", "test"))


def test_validation_items_are_not_training_items():
    domain = digits_domains(seed=3)[0]
    rows = {split: {picture.tobytes() for picture in domain.images[split]} for split in ("train", "val")}
    assert not rows["train"] & rows["val"]


def test_an_unknown_domain_is_named_with_the_closest_one():
    with pytest.raises(UserError, match="did you mean 'eurosat'"):
        load_domain("eurosta")


@pytest.mark.skipif(not DATA, reason="needs the real data: set NEUROCL_DATA to the folder of data sets")
@pytest.mark.parametrize("name", [*PICTURE_DOMAINS, "tiny-imagenet-100"])
def test_real_domains_load_with_three_splits(name):
    try:
        domain = load_domain(name, data_dir=Path(str(DATA)))
    except UserError as error:
        if "is not here" in str(error):
            pytest.skip(f"{name} is not among the data sets")
        raise
    for split in ("train", "val", "test"):
        assert domain.images[split].dtype == np.uint8
        assert len(domain.images[split]) == len(domain.labels[split]) > 0
        assert set(np.unique(domain.labels[split])) <= set(range(domain.num_classes))
    assert len(np.unique(domain.labels["train"])) == domain.num_classes
