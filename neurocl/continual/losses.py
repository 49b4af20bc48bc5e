"""Classification losses that accept logits with or without a time axis.

Letters: T time steps, B batch, K classes. Spiking networks give logits [T, B, K], others [B, K].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def time_mean(logits: Tensor) -> Tensor:
    """[T, B, K] -> [B, K] mean over time; [B, K] is returned as it is. Always float32 or wider."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return logits.mean(dim=0) if logits.ndim == 3 else logits


def cross_entropy(logits: Tensor, labels: Tensor, *, per_step: bool = False) -> Tensor:
    """Cross-entropy of the time-averaged logits, or averaged over all T*B rows if ``per_step``.

    Args:
        logits: [B, K] or [T, B, K].
        labels: [B] class indices.
        per_step: temporal separation (``temp_sep`` of the STAER code): every step has its own loss.
    """
    if per_step and logits.ndim == 3:
        rows = logits.flatten(0, 1)
        rows = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
        return F.cross_entropy(rows, labels.repeat(logits.shape[0]))
    return F.cross_entropy(time_mean(logits), labels)


def logit_distance(logits: Tensor, stored: Tensor) -> Tensor:
    """Mean squared error between (time-averaged) logits and stored ones, over batch and classes.

    Reference: Buzzega et al., "Dark experience for general continual learning", 2020, eq. 4.
    """
    return F.mse_loss(time_mean(logits), time_mean(stored))
