"""Which treatment each parameter of a model gets, from its name, shape and type."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch

from neurocl.config import Config

ParameterClass = Literal["matrix", "vector", "array", "embedding", "averaged", "statistics", "kept", "buffer"]

MEANINGS: dict[ParameterClass, str] = {
    "matrix": "two dimensions: the method",
    "vector": "biases, norms, scalars: the method if it works on elements, else the mean",
    "array": "more than two dimensions, such as convolutions: the method if it works on elements, else the mean",
    "embedding": "token tables and output heads: the method if it works on elements, else the mean",
    "averaged": "named so by the recipe: the mean in matrix methods",
    "statistics": "running statistics of BatchNorm: always the mean",
    "kept": "named so by the recipe: copied from the base",
    "buffer": "integers and booleans: copied from the base",
}
EMBEDDINGS = (
    "*embed_tokens*",
    "*token_embedding*",
    "*word_embeddings*",
    "*wte.weight",
    "*lm_head*",
    "shared.weight",
    "*.shared.weight",
)


class ParameterRules(Config):
    """Glob patterns over parameter names that override the classification.

    Attributes:
        matrices: treat as matrices although they look like token embeddings or are excluded by default.
        averaged: take the mean in matrix methods. The default is what the published Iso and TSV code excludes.
        kept: copy from the base.
    """

    matrices: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ("*text_projection*",)
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def classify(name: str, spec: TensorSpec, rules: ParameterRules | None = None) -> ParameterClass:
    """The class of one parameter.

    Args:
        name: dotted name in the state dict.
        spec: its type and shape.
        rules: overrides; the first that matches of ``kept``, ``matrices``, ``averaged`` wins.
    """
    rules = rules or ParameterRules()
    if not spec.dtype.is_floating_point:
        return "buffer"
    if _matches(name, rules.kept):
        return "kept"
    if len(spec.shape) == 2 and _matches(name, rules.matrices):
        return "matrix"
    if _matches(name, rules.averaged):
        return "averaged"
    if name.endswith(("running_mean", "running_var")):
        return "statistics"
    if len(spec.shape) <= 1:
        return "vector"
    if len(spec.shape) > 2:
        return "array"
    return "embedding" if _matches(name, EMBEDDINGS) else "matrix"
