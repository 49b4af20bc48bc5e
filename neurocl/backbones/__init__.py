"""Networks that methods train: CNNs and multi-layer perceptrons."""
