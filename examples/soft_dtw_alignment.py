"""Fit series to others that run at another pace: the soft-DTW divergence as a loss, and the alignment it finds."""

import argparse
import math

import torch

from neurocl import spiking

SHADES = " .:-=+*#%@"


def bumps(steps: int, centres: torch.Tensor) -> torch.Tensor:
    """One smooth bump per series at ``centres`` (0..1 of its length), [B, steps, 1]."""
    time = torch.linspace(0, 1, steps)
    return (-((time - centres[:, None]) ** 2) / 0.01).exp()[..., None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", metavar="FILE", help="also draw the alignment into this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    target = bumps(32, torch.tensor([0.3, 0.5, 0.7]))
    series = (0.1 * torch.randn(3, 16, 1)).requires_grad_()  # half as many steps: a squared error is not defined
    optimizer = torch.optim.Adam([series], lr=0.05)
    for step in range(201):
        loss = spiking.soft_dtw_divergence(series, target, gamma=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3d}: divergence {loss.item():.5f}")

    fitted = series.detach()
    # The divergence of series of unequal lengths stays above 0 even where they match as well as they can.
    peaks = ", ".join(f"{value:.2f}" for value in fitted[..., 0].argmax(dim=1) / 15)
    print(f"\nthe bumps are at {peaks} of the length; 0.30, 0.50, 0.70 in the target")
    alignment = spiking.soft_dtw_alignment(fitted, target, gamma=0.05)[0]
    print("\nWhich step of the fitted series (rows) matches which step of the target (columns):")
    for row in alignment:
        print("".join(SHADES[math.floor(value * (len(SHADES) - 1) + 0.5)] for value in row.tolist()))

    if arguments.plot:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 3.2))
        picture = axes.imshow(alignment, cmap="viridis", aspect="auto")
        axes.set(xlabel="step of the target", ylabel="step of the fitted series")
        figure.colorbar(picture, label="probability of a match")
        figure.savefig(arguments.plot, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
