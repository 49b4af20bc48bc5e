"""Which treatment a parameter gets, by name, shape and type."""

import pytest
import torch

from neurocl.merging.parameters import MEANINGS, ParameterRules, TensorSpec, classify


def spec(*shape, dtype=torch.float32):
    return TensorSpec(dtype, shape)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (12, 4), "matrix"),
        ("visual.positional_embedding", (50, 4), "matrix"),
        ("visual.proj", (4, 3), "matrix"),
        ("model.text_projection", (4, 3), "averaged"),
        ("model.embed_tokens.weight", (9, 4), "embedding"),
        ("token_embedding.weight", (9, 4), "embedding"),
        ("bert.embeddings.word_embeddings.weight", (9, 4), "embedding"),
        ("transformer.wte.weight", (9, 4), "embedding"),
        ("shared.weight", (9, 4), "embedding"),
        ("lm_head.weight", (9, 4), "embedding"),
        ("conv1.weight", (8, 3, 2, 2), "array"),
        ("ln.weight", (4,), "vector"),
        ("logit_scale", (), "vector"),
        ("bn.running_mean", (4,), "statistics"),
        ("bn.running_var", (4,), "statistics"),
    ],
)
def test_a_floating_parameter_is_classified_by_shape_and_name(name, shape, kind):
    assert classify(name, spec(*shape)) == kind


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integers_and_booleans_are_buffers_whatever_a_rule_says(dtype):
    assert classify("w", spec(3, 3, dtype=dtype), ParameterRules(matrices=("*",))) == "buffer"


def test_kept_wins_over_matrices_and_matrices_over_averaged():
    everything = {"kept": ("*",), "matrices": ("*",), "averaged": ("*",)}
    assert classify("w", spec(3, 3), ParameterRules(**everything)) == "kept"
    assert classify("w", spec(3, 3), ParameterRules(**everything | {"kept": ()})) == "matrix"
    assert classify("w", spec(3), ParameterRules(**everything | {"kept": ()})) == "averaged"


def test_every_class_has_a_meaning():
    kinds = {classify("w", spec(*shape)) for shape in ((3,), (3, 3), (3, 3, 3))}
    assert kinds <= MEANINGS.keys()


def test_sizes_follow_from_type_and_shape():
    assert (spec(3, 4).numel, spec(3, 4).nbytes, spec().numel) == (12, 48, 1)
    assert spec(5, 0, dtype=torch.bfloat16).nbytes == 0
