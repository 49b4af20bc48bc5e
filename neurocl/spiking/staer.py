"""STAER: replay in which old logit series guide new ones through the soft-DTW divergence.

For every stored image the memory keeps three series of logits, of T/2, T and 2T steps, computed when the
image was first seen. The current T-step series is pulled towards all three, so that the representation
survives both time and a change of temporal resolution.

Letters: T time steps (even), B batch, K classes, M capacity. Networks give time-major series [T, B, K],
memories keep batch-major ones [B, T, K].

Reference: arXiv 2601.20870; the defaults reproduce the authors' code where it and the text are known to agree.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from neurocl.continual.losses import logit_distance, time_mean
from neurocl.continual.memory import Field as MemoryField
from neurocl.continual.memory import Memory
from neurocl.continual.method import Batch, Method, MethodConfig, Setting
from neurocl.errors import UserError
from neurocl.spiking.encoding import resample
from neurocl.spiking.network import SpikingClassifier, frozen_statistics
from neurocl.spiking.softdtw import soft_dtw_divergence


class StaerConfig(MethodConfig):
    """Hyper-parameters of STAER; the defaults are those of the published runs."""

    beta: float = Field(1e-4, ge=0, description="weight of the alignment")
    alpha1: float = Field(0.5, ge=0, description="weight of the T/2-step series (contraction)")
    alpha2: float = Field(0.5, ge=0, description="weight of the 2T-step series (expansion)")
    gamma: float = Field(1.0, gt=0, description="smoothing of soft-DTW")
    normalize: bool = Field(True, description="divide each divergence by the mean length of its two series")
    alignment: Literal["full", "same", "contraction", "expansion", "stepwise", "time-mean", "none"] = Field(
        "full",
        description="full: all three lengths; same, contraction, expansion: the same length alone or with one other; "
        "stepwise or time-mean: squared error instead of soft-DTW; none: replay only",
    )
    memory: Literal["shared", "split"] = Field(
        "shared",
        description="one reservoir for labels and series, or two independent ones as in the authors' code",
    )
    storage_bn: Literal["track", "frozen"] = Field(
        "track",
        description="whether storage passes update BatchNorm's running statistics (they do in the authors' code)",
    )
    storage_view: Literal["augmented", "raw"] = Field("augmented", description="what the storage passes look at")
    storage_passes: Literal["separate", "single"] = Field(
        "separate",
        description="single (fast): one 2T-step pass gives all three series; differs through BatchNorm",
    )
    half_forward: Literal["separate", "slice"] = Field(
        "separate",
        description="slice (fast): reuse the first half of the replayed series; differs through BatchNorm",
    )


class Alignment(NamedTuple):
    """The three divergences and their weighted mean, all scalars."""

    same: Tensor
    half: Tensor
    double: Tensor
    total: Tensor


def alignment_loss(
    series: Tensor,
    half_series: Tensor,
    past_half: Tensor,
    past_same: Tensor,
    past_double: Tensor,
    *,
    alpha1: float = 0.5,
    alpha2: float = 0.5,
    gamma: float = 1.0,
    normalize: bool = True,
) -> Alignment:
    """STAER's alignment term, (D(Z, P_s) + a1 D(Z', P_h) + a2 D(Z', P_d)) / (1 + a1 + a2).

    Args:
        series: Z, fresh logits of the replayed batch [T, B, K].
        half_series: Z', fresh logits of its first b items [T, b, K].
        past_half, past_same, past_double: stored series [B, T/2, K], [B, T, K], [B, 2T, K]; of the first and
            the last, the first b items are used.
        alpha1, alpha2: weights of contraction and expansion; a term of weight 0 is not computed.
        gamma: smoothing of soft-DTW.
        normalize: divide each divergence by the mean length of its series.
    """
    count = half_series.shape[1]
    fresh, fresh_half = (value.transpose(0, 1).to(past_same.dtype) for value in (series, half_series))
    zero = past_same.new_zeros(())
    same = soft_dtw_divergence(fresh, past_same, gamma, normalize=normalize)
    half = soft_dtw_divergence(fresh_half, past_half[:count], gamma, normalize=normalize) if alpha1 else zero
    double = soft_dtw_divergence(fresh_half, past_double[:count], gamma, normalize=normalize) if alpha2 else zero
    total = (same + alpha1 * half + alpha2 * double) / (1.0 + alpha1 + alpha2)
    return Alignment(same, half, double, total)


class Staer(Method):
    """L = CE(batch and replay) + beta * alignment; reservoirs are filled after each step.

    Args:
        network: a spiking classifier with an even number of time steps.
        setting: the stream.
        config: hyper-parameters.

    Raises:
        UserError: T is odd or the network does not spike.
    """

    Config: ClassVar[type[MethodConfig]] = StaerConfig
    network: SpikingClassifier

    def __init__(self, network: nn.Module, setting: Setting, config: StaerConfig) -> None:
        super().__init__(network, setting, config)
        if not isinstance(network, SpikingClassifier):
            raise UserError("staer trains spiking networks; choose a spiking backbone")
        steps = network.timesteps
        if steps < 2 or steps % 2:
            raise UserError(f"staer needs an even number of timesteps, at least 2, got {steps}; er and derpp take any")
        self.options = config
        self.aligned = config.alignment != "none"
        self.alpha1 = config.alpha1 if config.alignment in ("full", "contraction") else 0.0
        self.alpha2 = config.alpha2 if config.alignment in ("full", "expansion") else 0.0
        classes = setting.num_classes
        series: dict[str, MemoryField] = {
            "half": ((steps // 2, classes), torch.float32),
            "same": ((steps, classes), torch.float32),
            "double": ((2 * steps, classes), torch.float32),
        }
        self.series_names = tuple(series)
        self.memory: Memory
        self.series_memory: Memory | None = None
        if config.memory == "shared":
            self.memory = self.make_memory(series if self.aligned else None)
        else:
            self.memory = self.make_memory()
            if self.aligned:
                self.series_memory = self.make_memory(series, stream=1)
        self._stream_series: dict[str, Tensor] = {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        x, y = batch.x, batch.y
        if len(self.memory):
            drawn = self.memory.sample(self.setting.replay_batch)
            x, y = torch.cat([x, self.augmented(drawn["image"])]), torch.cat([y, drawn["label"]])
        x_seq = self.network.encoder(x)
        terms = {"ce": self.classification_loss(self.network.network(x_seq), y)}
        if self.aligned:
            self._stream_series = self.storage_series(batch, x_seq[:, : len(batch.y)])
            memory = self.series_memory or self.memory
            if len(memory):
                terms["alignment"] = self.options.beta * self.replayed_alignment(memory, len(batch.y))
        return terms

    @torch.no_grad()
    def storage_series(self, batch: Batch, x_seq: Tensor) -> dict[str, Tensor]:
        """Logit series of the current batch at T/2, T and 2T steps, as the memory keeps them [B, steps, K]."""
        network, steps = self.network.network, self.network.timesteps
        if self.options.storage_view == "raw":
            x_seq = self.network.encoder(self.setting.augment.normalise(batch.raw))
        lengths = dict(zip(self.series_names, (steps // 2, steps, 2 * steps), strict=True))
        with frozen_statistics(network, self.options.storage_bn == "frozen"):
            if self.options.storage_passes == "single":
                longest = network(resample(x_seq, 2 * steps))
                series = {name: longest[:length] for name, length in lengths.items()}
            else:
                series = {name: network(resample(x_seq, length)) for name, length in lengths.items()}
        return {name: value.transpose(0, 1).float() for name, value in series.items()}

    def replayed_alignment(self, memory: Memory, batch_size: int) -> Tensor:
        """Alignment of fresh series on replayed images with the stored ones, before weighting by beta."""
        drawn = memory.sample(self.setting.replay_batch)
        x = self.augmented(drawn["image"])
        series = self.network(x)
        if self.options.alignment == "stepwise":
            return nn.functional.mse_loss(series.transpose(0, 1).float(), drawn["same"])
        if self.options.alignment == "time-mean":
            return logit_distance(time_mean(series), drawn["same"].mean(dim=1))
        # half of the *current* batch, as in the authors' step; a batch of one still aligns one series
        count = min(max(1, batch_size // 2), len(x))
        if self.options.half_forward == "slice" or not (self.alpha1 or self.alpha2):
            half_series = series[:, :count]
        else:
            half_series = self.network(x[:count])
        return alignment_loss(
            series,
            half_series,
            drawn["half"],
            drawn["same"],
            drawn["double"],
            alpha1=self.alpha1,
            alpha2=self.alpha2,
            gamma=self.options.gamma,
            normalize=self.options.normalize,
        ).total

    def after_step(self, batch: Batch) -> None:
        if self.series_memory is not None:
            self.memory.add(image=batch.raw, label=batch.y)
            self.series_memory.add(image=batch.raw, label=batch.y, **self._stream_series)
        else:
            self.memory.add(image=batch.raw, label=batch.y, **self._stream_series)
