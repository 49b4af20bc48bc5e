"""A method of your own: replay that weighs old and new items apart, registered by name and compared with ER."""

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from neurocl import continual
from neurocl.continual import METHODS, Batch, Method, MethodConfig, Setting


class WeighedReplayConfig(MethodConfig):
    """Each field becomes an option: ``--set options.replay_weight=0.8``."""

    replay_weight: float = Field(0.5, ge=0, le=1, description="share of replayed items in the loss")


class WeighedReplay(Method):
    """L = (1 - w) CE(batch) + w CE(memory draw)."""

    Config: ClassVar[type[MethodConfig]] = WeighedReplayConfig

    def __init__(self, network: nn.Module, setting: Setting, config: WeighedReplayConfig) -> None:
        super().__init__(network, setting, config)
        self.weight = config.replay_weight
        self.memory = self.make_memory()  # a submodule: saved and restored with every checkpoint

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        new = self.classification_loss(self.network(batch.x), batch.y)
        if not len(self.memory):
            return {"new": new}
        drawn = self.memory.sample(self.setting.replay_batch)
        old = self.classification_loss(self.network(self.augmented(drawn["image"])), drawn["label"])
        return {"new": (1 - self.weight) * new, "old": self.weight * old}

    def after_step(self, batch: Batch) -> None:
        self.memory.add(image=batch.raw, label=batch.y)


def main() -> None:
    METHODS.register("weighed-replay", WeighedReplay, "replay with a weight", areas=("continual", "spiking"))
    shared: dict[str, Any] = {"dataset": "seq-digits", "buffer_size": 50, "epochs": 5, "threads": 1, "keep": False}
    for weight in (0.2, 0.5, 0.8):
        result = continual.train(method="weighed-replay", options={"replay_weight": weight}, **shared)
        accuracy = result.metrics["class_il"]["final_average_accuracy"]
        print(f"weighed-replay, w = {weight}: {accuracy:.1f} % Class-IL")
    result = continual.train(method="er", **shared)
    print(f"er:                      {result.metrics['class_il']['final_average_accuracy']:.1f} % Class-IL")


if __name__ == "__main__":
    main()
