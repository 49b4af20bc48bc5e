"""RegMean++: RegMean block by block, each on what comes out of the blocks merged before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from neurocl.errors import UserError
from neurocl.merging.activation_chain import (
    Invocation,
    Walker,
    check_sequence,
    invocations,
    mean_model,
    one_block,
    repeatable,
    stacked,
    whole_network,
)
from neurocl.merging.linear_inputs import (
    Batch,
    Forward,
    RowMask,
    Tap,
    add_gram,
    evaluating,
    find_taps,
    rows_of,
    watched,
)
from neurocl.merging.regmean import merge_responses, shrunk


def regmean_pp(
    experts: Sequence[nn.Module],
    batches: Sequence[Iterable[Batch]],
    blocks: Sequence[str],
    *,
    off_diagonal: float = 0.95,
    ridge: float = 0.0,
    gram_reduction: Literal["mean", "sum"] = "mean",
    first_inputs: Literal["merged", "expert"] = "merged",
    forward: Forward | None = None,
    row_mask: RowMask | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """Merge the linear layers of one block after the other with Gram matrices on refreshed block inputs.

    A block's input on the data of a task is the output of the blocks merged so far; its layers' Gram matrices are those
    of the expert's block on that input. All other parameters are averaged first.

    Args:
        experts: fine-tuned networks of one architecture, on one device.
        batches: unlabelled calibration data of each expert, the same batches each time they are walked through.
        blocks: names of the submodules that run one after the other, each on the output of the one before.
        off_diagonal: factor on the Gram matrices' entries off the diagonal, 0 to 1.
        ridge: pull towards the mean, relative to the mean of the system's diagonal; 0 uses the pseudo-inverse.
        gram_reduction: mean over rows (tasks weigh equally) or sum (they weigh by their rows).
        first_inputs: what precedes the first block: the averaged layers, or each expert's own as in the published
            code.
        forward: from network and batch to output, where calling the network on the batch is not enough.
        row_mask: from a batch to [B, S], zero where a token is padding; by default ``attention_mask`` of a dict.
        progress: called with the number of blocks done, of all blocks, and the name of the next.
    Returns: the merged network, in evaluation mode.
    Raises:
        UserError: networks or data that do not fit together, BatchNorm, blocks that are no sequence.
        ValueError: an option outside its range.
    Reference: Nguyen et al., "RegMean++: enhancing effectiveness and generalization of regression mean for model
    merging", arXiv 2508.03121.
    """
    if not 0 <= off_diagonal <= 1 or ridge < 0:
        raise ValueError(f"off_diagonal in [0, 1] and ridge from 0 expected, got {off_diagonal} and {ridge}")
    if len(experts) != len(batches):
        raise UserError(f"{len(experts)} experts but {len(batches)} data sets")
    if not blocks:
        raise UserError("RegMean++ needs the names of the blocks that run one after the other")
    merged = mean_model(None, experts)
    data = repeatable(batches)
    device = next(merged.parameters()).device
    check_sequence(merged, whole_network(forward), next(iter(invocations(data[0], row_mask, device))), blocks)
    walkers = [
        Walker(merged, lambda own=own: invocations(own, row_mask, device), forward)  # type: ignore[misc]
        for own in data
    ]
    for position, block in enumerate(blocks):
        if progress is not None:
            progress(position, len(blocks), block)
        for walker, expert in zip(walkers, experts, strict=True):
            walker.network = expert if position == 0 and first_inputs == "expert" else merged
            walker.enter(block)
            walker.network = merged
        _merge_block(merged, experts, block, [walker.cached for walker in walkers], off_diagonal, ridge, gram_reduction)
    return merged


def _merge_block(
    merged: nn.Module,
    experts: Sequence[nn.Module],
    block: str,
    calls: Sequence[Sequence[Invocation]],
    off_diagonal: float,
    ridge: float,
    gram_reduction: Literal["mean", "sum"],
) -> None:
    """Write the RegMean solution of every linear layer of ``block`` into ``merged``."""
    taps = [tap for tap in find_taps(merged) if f"{tap.module}.".startswith(f"{block}.")]
    grams: dict[Tap, list[torch.Tensor]] = {}
    for expert, own in zip(experts, calls, strict=True):
        sums = _block_grams(expert, block, taps, own, diagonal=off_diagonal == 0)
        for tap, (total, num_rows) in sums.items():
            grams.setdefault(tap, []).append(total / max(1, num_rows) if gram_reduction == "mean" else total)
    with torch.no_grad():
        for tap, found in grams.items():
            solution = merge_responses(
                stacked(experts, tap.weight), shrunk(torch.stack(found), off_diagonal), ridge=ridge
            )
            merged.get_parameter(tap.weight).copy_(solution)


def _block_grams(
    expert: nn.Module, block: str, taps: list[Tap], calls: Sequence[Invocation], *, diagonal: bool
) -> dict[Tap, tuple[torch.Tensor, int]]:
    """Gram matrices (or diagonals) and row counts of the layers of an expert's block."""
    totals: dict[Tap, torch.Tensor] = {}
    counts: dict[Tap, int] = {}
    for call in calls:

        def receive(tap: Tap, value: torch.Tensor, mask: torch.Tensor | None = call.mask) -> None:
            rows = rows_of(value, mask)
            if tap not in totals:
                shape = (rows.shape[1],) * (1 if diagonal else 2)
                totals[tap] = torch.zeros(shape, dtype=torch.float64, device=rows.device)
            add_gram(totals[tap], rows)
            counts[tap] = counts.get(tap, 0) + len(rows)

        with evaluating(expert), torch.no_grad(), watched(expert, taps, receive):
            one_block(block)(expert, call)
    return {tap: (total, counts[tap]) for tap, total in totals.items()}
