"""Pictures of a forecaster: how it learnt, which codes it uses and what they mean, how its error grows with time.

``S`` scenes, ``A`` agents, ``M`` agents that are shown, ``K`` codes, ``T_o`` and ``T_p`` observed and predicted steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from neurocl.errors import UserError
from neurocl.trajectory import metrics
from neurocl.trajectory.baselines import Baseline, ConstantVelocity, Ridge, heading_frame, target_tracks
from neurocl.trajectory.codebook import code_counts, perplexity
from neurocl.trajectory.forecaster import Forecaster, SamplingConfig
from neurocl.trajectory.plots_canvas import PALETTE
from neurocl.trajectory.scenes import Scenes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

NUM_SHOWN = 4
NUM_NUMBERED = 6
CURVES = {
    "codes": ("val_reconstruction_ade", "validation: reconstruction, mean distance"),
    "prior": ("val_min_ade", "validation: minADE of 20 samples"),
}
MARKERS = "os^Dv*"
LINE_STYLES = ("-", "--", "-.", ":")


def learning_figure(
    records: Sequence[Mapping[str, Any]], *, unit: str = "", fading: tuple[float, float] = (0, 0)
) -> Figure:
    """What a run measured on its validation scenes, and its losses, by step; one column per stage.

    Args:
        records: of ``metrics.jsonl``.
        unit: of the positions.
        fading: steps of the first stage between which the instance part of the codebook is faded in.

    Raises:
        UserError: no measurement yet.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    stages = [stage for stage in CURVES if any(record.get("stage") == stage for record in records)]
    if not stages:
        raise UserError("nothing was measured yet: the run has not reached its first validation")
    figure = Figure(figsize=(4.6 * len(stages), 5.4), layout="constrained")
    panels = figure.subplots(2, len(stages), sharex="col", squeeze=False, height_ratios=(3, 2))
    for column, stage in enumerate(stages):
        rows = [record for record in records if record.get("stage") == stage]
        steps = [row["step"] for row in rows]
        key, title = CURVES[stage]
        above, below = panels[:, column]
        values = [float(row[key]) for row in rows]
        above.plot(steps, values, color=PALETTE[0], marker="o", markersize=3)
        lowest = int(np.argmin(values))
        above.plot(steps[lowest], values[lowest], "o", markersize=8, fillstyle="none", color=PALETTE[1])
        above.set_title(
            f"{title}\nlowest {values[lowest]:.3g}{unit and ' ' + unit} at step {steps[lowest]}", fontsize=9
        )
        above.set_ylabel(unit)
        above.set_ylim(bottom=0)
        losses = [name for name in rows[0] if name not in ("stage", "step") and not name.startswith("val_")]
        for index, name in enumerate(losses):
            style, color = LINE_STYLES[index % len(LINE_STYLES)], PALETTE[index % len(PALETTE)]
            below.plot(steps, [float(row[name]) for row in rows], color=color, linestyle=style, label=name)
        below.set_yscale("log")
        below.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        below.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))
        below.set_ylabel("loss of that step")
        below.set_xlabel(f"step of the {stage} stage")
        if stage == "codes" and fading[1] > fading[0]:
            for axes in (above, below):
                axes.axvspan(*fading, color="0.92", zorder=0, label="codebook fades in" if axes is below else None)
        below.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    _tidy(panels.flat)
    return figure


def code_use(forecaster: Forecaster, scenes: Scenes, batch_size: int = 128) -> torch.Tensor:
    """How often each code stands for a step of a true future, float64 [K]; only agents that metrics count."""
    vqvae = forecaster.networks.vqvae
    counts = torch.zeros(vqvae.config.num_codes, dtype=torch.float64)
    for batch in scenes.batches(batch_size):
        moved = batch.to(forecaster.device)
        indices, context = vqvae.indices(moved)
        # The context goes up to the last target, which may be fewer agents than the scenes have.
        targets = moved.target_mask[:, : indices.shape[1]] & context.present
        counted = moved.future_mask[:, : indices.shape[1]] & targets[..., None]
        counts += code_counts(indices, len(counts), counted).cpu()
    return counts


def code_use_figure(counts: torch.Tensor) -> Figure:
    """How often every code is used, [K], beside even use, with the perplexity."""
    from matplotlib.figure import Figure

    number = len(counts)
    figure = Figure(figsize=(max(5.5, 0.09 * number + 3), 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(number), counts.numpy(), width=0.8, color=PALETTE[0])
    even = float(counts.sum()) / number
    axes.axhline(even, color="0.3", linestyle="--", linewidth=1)
    axes.annotate("all alike", (number - 0.4, even), ha="right", va="bottom", fontsize=8, color="0.3")
    unused = int((counts == 0).sum())
    rest = f", {unused} never used" if unused else ""
    axes.set_title(f"perplexity {perplexity(counts):.1f} of {number} codes{rest}", fontsize=10)
    axes.set_xlabel("code")
    axes.set_ylabel(f"times used, of {int(counts.sum()):,}")
    axes.set_xlim(-0.8, number - 0.2)
    _tidy([axes])
    return figure


@dataclass(frozen=True)
class CodebookView:
    """Codebooks of some agents, and what their codes mean.

    Attributes:
        books: codes of each agent, [M, K, d_z].
        static: the codes without the part that depends on the agent, [K, d_z].
        ways: what each code decodes to when it stands at every step, in the heading frame (the agent looks along +x
            from the origin), [M, K, T_p, 2].
        pasts: of the agents in that frame, [M, T_o, 2]; NaN where they were not seen.
        speeds: mean over the observed steps, in units per second, [M].
        counts: how often each code is used, [K].
        unit: of the positions.
    """

    books: torch.Tensor
    static: torch.Tensor
    ways: torch.Tensor
    pasts: torch.Tensor
    speeds: torch.Tensor
    counts: torch.Tensor
    unit: str


@torch.no_grad()
def codebook_view(forecaster: Forecaster, scenes: Scenes, num_agents: int = NUM_SHOWN) -> CodebookView:
    """Codebooks of agents that metrics count, from slow to fast ones.

    Args:
        forecaster: with the codes.
        scenes: where agents are taken from.
        num_agents: M at most.
    """
    vqvae = forecaster.networks.vqvae
    chosen = (scenes.target_mask & scenes.past_mask.all(dim=-1)).nonzero()
    if not len(chosen):
        raise UserError(f"{scenes.name}: no agent was seen in all observed steps")
    tracks = scenes.past[chosen[:, 0], chosen[:, 1]].double()
    speed = (tracks[:, 1:] - tracks[:, :-1]).norm(dim=-1).mean(dim=1) * scenes.hz
    shares = torch.linspace(0.05, 0.95, min(num_agents, len(chosen)), dtype=torch.float64)
    ranks = (shares * (len(chosen) - 1)).round().long()
    rows = speed.argsort(stable=True)[ranks]
    books, static, ways = [], None, []
    for scene, agent in chosen[rows].tolist():
        one = scenes.subset([scene]).to(forecaster.device)
        context = vqvae.encode_context(one)
        number = vqvae.config.num_codes
        codes = torch.arange(number, device=forecaster.device)[:, None, None, None]
        codes = codes.expand(-1, 1, context.anchor.shape[1], scenes.num_predicted)
        ways.append(vqvae.decode_indices(codes, context)[:, 0, agent].double().cpu())
        books.append(context.codebook[0, agent].double().cpu())
        if static is None:
            static = vqvae.encode_context(one, 0.0).codebook[0, agent].double().cpu()
    assert static is not None
    frame = heading_frame(tracks[rows])
    return CodebookView(
        books=torch.stack(books),
        static=static,
        ways=torch.einsum("mij,mktj->mkti", frame, torch.stack(ways)),
        pasts=torch.einsum("mij,mtj->mti", frame, tracks[rows] - tracks[rows, -1:]),
        speeds=speed[rows],
        counts=code_use(forecaster, scenes),
        unit=scenes.unit,
    )


def codebook_figure(view: CodebookView) -> Figure:
    """The codes of several agents in a plane, and what each code decodes to for each of them.

    On the left the first two principal components of all their codes; lines join what is the same code for different
    agents. On the right the futures that one code at every step stands for, darker where the code is used more; the
    codes that are used most carry their numbers.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    columns = (len(view.books) + 1) // 2
    figure = Figure(figsize=(5.2 + 3.3 * columns, 6.2), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(4.6, 3.3 * columns))
    left, right = parts
    axes = left.subplots()
    _plane(axes, view)
    left.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    most_used = max(2.0, float(view.counts.max()))
    colors = ScalarMappable(LogNorm(max(1.0, most_used / 300), most_used, clip=True), "viridis_r")
    panels = list(right.subplots(min(2, len(view.books)), columns, squeeze=False).flat)
    for index, panel in enumerate(panels):
        if index < len(view.books):
            _meanings(panel, view, index, colors)
        else:
            panel.set_visible(False)
    right.colorbar(colors, ax=panels, label="times used (grey: never)", fraction=0.04, pad=0.01)
    right.suptitle("What each code stands for", fontsize=10)
    _tidy([axes, *panels])
    return figure


def _plane(axes: Any, view: CodebookView) -> None:
    """All codes in the plane of their first two principal components."""
    agents, number, width = view.books.shape
    flat = view.books.reshape(-1, width)
    centre = flat.mean(dim=0)
    _, size, directions = torch.linalg.svd(flat - centre, full_matrices=False)
    share = [*(size.square() / size.square().sum().clamp(min=1e-12)).tolist(), 0.0]
    plane = torch.zeros(width, 2, dtype=flat.dtype)  # codes of width 1 have one component only
    plane[:, : len(directions[:2])] = directions[:2].T
    where, still = ((view.books - centre) @ plane).numpy(), ((view.static - centre) @ plane).numpy()
    for code in range(number):
        axes.plot(where[:, code, 0], where[:, code, 1], color="0.85", linewidth=0.8, zorder=1)
    axes.plot(still[:, 0], still[:, 1], "x", color="0.3", markersize=4, zorder=2, label="shared part alone")
    for index in range(agents):
        marker, color = MARKERS[index % len(MARKERS)], PALETTE[index % len(PALETTE)]
        label = f"agent at {view.speeds[index]:.2g} {view.unit}/s"
        axes.plot(where[index, :, 0], where[index, :, 1], marker, color=color, markersize=4, label=label, zorder=3)
    axes.set_xlabel(f"first component ({share[0]:.0%} of the variance)")
    axes.set_ylabel(f"second component ({share[1]:.0%})")
    axes.set_title(f"{number} codes of {agents} agents", fontsize=10)


def _meanings(axes: Any, view: CodebookView, index: int, colors: Any) -> None:
    """What every code decodes to for one agent, the most used ones on top."""
    ways = np.pad(view.ways[index].numpy(), ((0, 0), (1, 0), (0, 0)))
    most = view.counts.argsort(descending=True, stable=True).tolist()
    for code in reversed(most):
        used = float(view.counts[code])
        color = colors.to_rgba(used) if used else "0.85"
        axes.plot(ways[code, :, 0], ways[code, :, 1], color=color, linewidth=1.0)
        axes.plot(ways[code, -1, 0], ways[code, -1, 1], ".", color=color, markersize=4)
    for code in most[:NUM_NUMBERED]:
        axes.annotate(str(code), ways[code, -1], xytext=(2, 2), textcoords="offset points", fontsize=7)
    past = view.pasts[index].numpy()
    axes.plot(past[:, 0], past[:, 1], color="0.3", marker="o", markersize=2)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(f"agent at {view.speeds[index]:.2g} {view.unit}/s", fontsize=9)
    axes.set_xlabel(f"ahead ({view.unit})", fontsize=8)
    axes.set_ylabel(f"to the left ({view.unit})", fontsize=8)


@dataclass(frozen=True)
class HorizonErrors:
    """Errors of one forecaster when only the first 1, 2, ... T_p steps count.

    Attributes:
        name: of the forecaster.
        min_ade: smallest mean distance up to each step, mean over agents, [T_p].
        min_fde: smallest distance at each step, [T_p].
    """

    name: str
    min_ade: Floats
    min_fde: Floats


def horizon_errors(name: str, predicted: torch.Tensor, truth: torch.Tensor) -> HorizonErrors:
    """Errors by step of forecasts [K, N, T_p, 2] of truths [N, T_p, 2]."""
    steps = range(1, truth.shape[1] + 1)
    predicted, truth = predicted.double(), truth.double()
    ade = [float(metrics.min_ade(predicted, truth, horizon=step).mean()) for step in steps]
    fde = [float(metrics.min_fde(predicted, truth, horizon=step).mean()) for step in steps]
    return HorizonErrors(name, np.array(ade), np.array(fde))


def measure_horizons(
    forecaster: Forecaster,
    scenes: Scenes,
    train: Scenes,
    *,
    num_forecasts: int = 20,
    sampling: SamplingConfig | None = None,
    say: Callable[[str], None] | None = None,
) -> list[HorizonErrors]:
    """The model, constant velocity and ridge with anchors on the same scenes.

    Args:
        forecaster: the trained model.
        scenes: what to forecast.
        train: what the baselines learn from.
        num_forecasts: of the model and of ridge with anchors.
        sampling: of the model.
        say: called with the name of each before it is computed.
    """
    say = say or (lambda name: None)
    sampling = sampling or SamplingConfig()
    past, truth = target_tracks(scenes)
    say("model")
    generator = torch.Generator(forecaster.device).manual_seed(sampling.seed)
    parts = []
    for batch in scenes.batches(32):
        chosen = forecaster.forecast_scenes(batch, num_forecasts, sampling, generator=generator)
        parts.append(chosen.trajectories.cpu()[:, batch.target_mask])
    predicted = torch.cat(parts, dim=1)
    found = [horizon_errors(f"model, {num_forecasts} {sampling.select}", predicted, truth)]
    baselines: list[Baseline] = [ConstantVelocity(scenes.num_predicted), Ridge(scenes.num_predicted, anchors=True)]
    for baseline in baselines:
        say(baseline.name)
        baseline.fit(train)
        predicted = baseline.forecast(past, num_forecasts, torch.Generator().manual_seed(sampling.seed))
        name = baseline.name if baseline.deterministic else f"{baseline.name}, {num_forecasts} forecasts"
        found.append(horizon_errors(name, predicted, truth))
    return found


def horizon_figure(rows: Sequence[HorizonErrors], *, hz: float, unit: str, title: str = "") -> Figure:
    """How minADE and minFDE grow with the time that is forecast."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric, name in zip(panels, ("min_ade", "min_fde"), ("minADE", "minFDE"), strict=True):
        for index, row in enumerate(rows):
            values = getattr(row, metric)
            color, style = (PALETTE[0], PALETTE[1], PALETTE[2])[index % 3], LINE_STYLES[index % len(LINE_STYLES)]
            time = np.arange(1, len(values) + 1) / hz
            width = 2.2 if index == 0 else 1.5
            axes.plot(time, values, color=color, linestyle=style, linewidth=width, label=row.name)
        axes.set(title=name, xlabel="seconds ahead", ylabel=unit, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.25)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    figure.suptitle(title, fontsize=10)
    _tidy(panels)
    return figure


def _tidy(panels: Any) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, which="both")
