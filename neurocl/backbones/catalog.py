"""The registry of backbones. A factory takes ``input_shape``, ``num_classes`` and its options and returns a network."""

from neurocl.registry import Entry, Registry

BACKBONES = Registry(
    "backbones",
    [
        Entry("mlp", "neurocl.backbones.mlp:mlp", "784-100-100-K with ReLU (any input size)", ("continual",)),
        Entry(
            "resnet18",
            "neurocl.backbones.resnet:resnet18",
            "3x3 stem, width 64, 11.2 M weights",
            ("continual",),
        ),
        Entry(
            "resnet19",
            "neurocl.backbones.resnet:resnet19",
            "the ANN twin of the spiking ResNet19",
            ("continual",),
        ),
        Entry(
            "resnet-small",
            "neurocl.backbones.resnet:resnet_small",
            "twin of spiking-resnet-small",
            ("continual",),
        ),
        Entry(
            "spiking-mlp",
            "neurocl.spiking.network:spiking_mlp",
            "128-128 LIF neurons with BatchNorm",
            ("spiking",),
        ),
        Entry(
            "spiking-resnet-small",
            "neurocl.spiking.network:spiking_resnet_small",
            "two stages, 64-128 channels",
            ("spiking",),
        ),
        Entry(
            "spiking-resnet18",
            "neurocl.spiking.network:spiking_resnet18",
            "stem 64, 2-2-2-2 blocks, 11.2 M weights",
            ("spiking",),
        ),
        Entry(
            "spiking-resnet19",
            "neurocl.spiking.network:spiking_resnet19",
            "stem 128, 3-3-2 blocks, 12.6 M weights",
            ("spiking",),
        ),
    ],
)
