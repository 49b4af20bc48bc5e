"""SGD (fine-tuning, the lower bound) and joint training (all classes at once, the upper bound)."""

from __future__ import annotations

from neurocl.continual.method import Method


class Sgd(Method):
    """Cross-entropy on the current batch and nothing against forgetting."""


class Joint(Method):
    """The same loss on a stream whose tasks were merged into one; the loop merges them."""
