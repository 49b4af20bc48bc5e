"""``neurocl doctor``: what this machine has, what is broken, and how to mend it."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import typer

from neurocl.cli.options import JsonOption

REQUIRED = (
    "torch",
    "numpy",
    "numba",
    "safetensors",
    "pydantic",
    "typer",
    "rich",
    "snntorch",
    "spikingjelly",
    "tslearn",
)
OPTIONAL = {
    "tensorboard": ("tensorboard", "neurocl[track]", "TensorBoard event files"),
    "nir": ("nir", "neurocl[nir]", "export of spiking networks"),
    "onnxruntime": ("onnxruntime", "neurocl[export]", "export of forecasters to ONNX"),
    "pynvml": ("nvidia-ml-py", "neurocl[gpu-energy]", "energy counters of NVIDIA devices"),
    "triton": ("triton", "the CUDA build of torch", "fused kernels on NVIDIA devices"),
}


def doctor(as_json: JsonOption = False) -> None:
    """Check versions, devices, threads, data folder and optional packages."""
    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for row in findings:
        mark = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "broken": "[red]broken[/red]"}[row["state"]]
        table.add_row(mark, row["what"], escape(row["found"]))
    Console(highlight=False).print(table)
    if any(row["state"] == "broken" for row in findings):
        raise typer.Exit(1)


def examine() -> list[dict[str, str]]:
    """Every finding: ``state`` is ``ok``, ``note`` (works with less) or ``broken``."""
    found: list[dict[str, str]] = []

    def add(state: str, what: str, text: Any) -> None:
        found.append({"state": state, "what": what, "found": str(text)})

    from importlib.metadata import PackageNotFoundError, version

    from neurocl import __version__

    add("ok", "neurocl", __version__)
    for name in REQUIRED:
        try:
            add("ok", name, version(name))
        except PackageNotFoundError:
            add("broken", name, "not installed: pip install -c constraints.txt -e .")
    import torch

    from neurocl.compat.torchvision import ensure_torchvision
    from neurocl.devices import cpu_name

    add("ok", "processor", f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        add("ok", "CUDA", f"{torch.version.cuda}: {names}")
    else:
        add("note", "CUDA", "no device; everything runs on the CPU")
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # type: ignore[no-untyped-call]
    add(
        "ok" if bf16 else "note",
        "bf16 on the CPU",
        "in hardware" if bf16 else "emulated: --precision bf16 will be slow",
    )
    add(*_torchvision(ensure_torchvision()))
    for module, (package, extra, purpose) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            add("note", package, f"not installed; needed for {purpose}: {extra}")
        else:
            add("ok", package, f"installed ({purpose})")
    add(*_data_folder())
    return found


def _torchvision(state: str) -> tuple[str, str, str]:
    explanation = {
        "native": ("ok", "imports as it is"),
        "absent": ("ok", "not installed (nothing of neurocl needs it)"),
        "shimmed": (
            "note",
            "its compiled part does not fit this torch; neurocl's shim makes its Python part importable",
        ),
        "hidden": ("note", "cannot be imported and is hidden from other packages"),
    }[state]
    return explanation[0], "torchvision", explanation[1]


def _data_folder() -> tuple[str, str, str]:
    folder = os.environ.get("NEUROCL_DATA")
    if not folder:
        return "note", "data", "$NEUROCL_DATA is not set; data sets are looked for in the user's cache"
    if not Path(folder).is_dir():
        return "broken", "data", f"$NEUROCL_DATA is {folder}, which is not a folder"
    return "ok", "data", folder
