"""The registries of areas (their configuration classes) and of methods; nothing heavy is imported until one is used."""

from neurocl.registry import Entry, Registry

BOTH = ("continual", "spiking")

AREAS = Registry(
    "areas",
    [
        Entry("continual", "neurocl.continual.config:TrainConfig", "ordinary networks"),
        Entry("spiking", "neurocl.spiking.config:SpikingTrainConfig", "spiking networks"),
    ],
)

METHODS = Registry(
    "methods",
    [
        Entry(
            "staer",
            "neurocl.spiking.staer:Staer",
            "replay with soft-DTW alignment of spiking logit series",
            ("spiking",),
        ),
        Entry("er", "neurocl.continual.er:Er", "experience replay", BOTH),
        Entry("er-ace", "neurocl.continual.er_ace:ErAce", "replay with asymmetric cross-entropy", BOTH),
        Entry("der", "neurocl.continual.der:Der", "replay of stored logits", BOTH),
        Entry("derpp", "neurocl.continual.der:Derpp", "replay of stored logits and labels", BOTH),
        Entry(
            "lwf",
            "neurocl.continual.lwf:Lwf",
            "learning without forgetting: distil the previous network",
            BOTH,
        ),
        Entry(
            "ewc-online",
            "neurocl.continual.ewc:EwcOnline",
            "penalise moving important weights",
            ("continual",),
        ),
        Entry(
            "icarl",
            "neurocl.continual.icarl:Icarl",
            "exemplars, distillation, nearest class mean",
            BOTH,
        ),
        Entry("gdumb", "neurocl.continual.gdumb:Gdumb", "balanced memory, then train from scratch on it", BOTH),
        Entry("sgd", "neurocl.continual.sgd:Sgd", "plain training on each task, the lower bound", BOTH),
        Entry("joint", "neurocl.continual.sgd:Joint", "all classes at once, the upper bound", BOTH),
    ],
)
