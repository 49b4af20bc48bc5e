"""Streamed merges against mergekit: the same models, the same threads, each merge a process of its own.

    python benchmarks/merging_files.py --threads 1
    python benchmarks/merging_files.py --quick               # 2 layers instead of 12, one repeat

Four fine-tuned models and their base in the layout of a small Llama (12 layers, width 768, vocabulary 32,000: 109.5 M
values, bfloat16), made here. mergekit is installed into a virtual environment of its own, kept in ``--work``. Seconds
are user + system time of the process, memory its peak resident size, both from the operating system; the contenders
take turns, the median counts. Start-up is part of the seconds, as it is of every use. The bounds compare the same work:
mergekit writes no hashes of its inputs, so ours runs with ``--no-hashes``; the seconds with them stand beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import yaml

MERGEKIT, TRANSFORMERS, TORCH = "mergekit==0.1.5", "transformers==5.23.0", "torch==2.13.0"
WIDTH, HIDDEN, VOCABULARY, NUM_MODELS = 768, 2048, 32_000, 4
MEMORY_BOUND = 0.4


@dataclass(frozen=True)
class Contest:
    """One merge in both tools: our options, mergekit's method and parameters, the bound on the ratio of CPU seconds."""

    name: str
    ours: tuple[str, ...]
    theirs: str
    parameters: dict[str, float]
    bound: float
    num_models: int = NUM_MODELS


CONTESTS = (
    Contest("linear", ("--method", "average"), "linear", {"weight": 1.0}, 0.45),
    Contest(
        "task arithmetic", ("--method", "task-arithmetic", "--alpha", "0.3"), "task_arithmetic", {"weight": 0.3}, 0.45
    ),
    Contest(
        "ties, per tensor",
        ("--method", "ties", "--trim", "tensor", "--count", "exact", "--density", "0.2"),
        "ties",
        {"weight": 1.0, "density": 0.2},
        0.25,
    ),
    Contest("model stock", ("--method", "model-stock"), "model_stock", {}, 0.5),
    Contest("slerp", ("--method", "slerp", "--t", "0.4"), "slerp", {}, 0.5, num_models=2),
)


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    cpu_seconds: float
    wall_seconds: float
    peak_mb: float


def llama_shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with tied embeddings."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for projection in "qkvo":
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (WIDTH, WIDTH)
        for projection, shape in (("gate", (HIDDEN, WIDTH)), ("up", (HIDDEN, WIDTH)), ("down", (WIDTH, HIDDEN))):
            shapes[f"{prefix}mlp.{projection}_proj.weight"] = shape
        shapes[prefix + "input_layernorm.weight"] = (WIDTH,)
        shapes[prefix + "post_attention_layernorm.weight"] = (WIDTH,)
    shapes["model.norm.weight"] = (WIDTH,)
    return shapes


def model_paths(folder: Path) -> list[Path]:
    return [folder / name for name in ("base", *(f"expert{index}" for index in range(NUM_MODELS)))]


def make_models(folder: Path, num_layers: int) -> None:
    """The base and its experts: low-rank changes and dense noise; made once."""
    import torch
    from safetensors.torch import save_file

    paths = model_paths(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    generator = torch.Generator().manual_seed(0)
    shapes = llama_shapes(num_layers)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for path in paths:
        if (path / "model.safetensors").is_file():
            continue
        path.mkdir(parents=True, exist_ok=True)
        values = {}
        for name, value in base.items():
            change = torch.zeros(())
            if path.name != "base":
                change = 5e-4 * torch.randn(value.shape, generator=generator)
                if value.dim() == 2:
                    rows, columns = value.shape
                    low = torch.randn(rows, 64, generator=generator) @ torch.randn(64, columns, generator=generator)
                    change = change + 2e-4 * low
            values[name] = (value + change).bfloat16()
        save_file(values, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))


def mergekit_command(work: Path) -> Path:
    """mergekit in an environment of its own; installed the first time."""
    command = work / "mergekit-venv" / "bin" / "mergekit-yaml"
    if not command.is_file():
        print(f"installing {MERGEKIT} into {command.parent.parent}", flush=True)
        venv.create(command.parent.parent, with_pip=True)
        pip = [str(command.parent / "pip"), "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, MERGEKIT, TRANSFORMERS, TORCH], check=True)
    return command


def measured(command: list[str], threads: int) -> Cost:
    """Run a process to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):  # each tool with the allocator it sets itself
        environment.pop(name, None)
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read().decode()[-2000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss / 1024)


def our_command(contest: Contest, models: list[Path], out: Path, extra: list[str]) -> list[str]:
    base, *experts = models
    command = [sys.executable, "-m", "neurocl", "merging", "merge", *contest.ours, "--quiet", *extra, "--out", str(out)]
    if contest.name != "slerp":
        command += ["--base", str(base)]
    return [*command, *map(str, experts[: contest.num_models])]


def write_recipe(contest: Contest, models: list[Path], file: Path) -> None:
    base, *experts = models
    entries = [{"model": str(path), "parameters": contest.parameters} for path in experts[: contest.num_models]]
    recipe: dict[str, object] = {"models": entries, "merge_method": contest.theirs, "dtype": "bfloat16"}
    if contest.theirs == "slerp":
        recipe.update(base_model=str(experts[0]), parameters={"t": 0.4})
    elif contest.theirs != "linear":
        recipe["base_model"] = str(base)
    file.write_text(yaml.safe_dump(recipe))


def differing(first: Path, second: Path) -> float:
    """Share of the values in which two merged models differ, in percent."""
    from safetensors import safe_open

    total = different = 0
    with safe_open(first / "model.safetensors", "pt") as ours, safe_open(second / "model.safetensors", "pt") as theirs:
        for name in ours.keys():  # noqa: SIM118  (not a mapping)
            a, b = ours.get_tensor(name), theirs.get_tensor(name)
            total += a.numel()
            different += int((a != b).sum())
    return 100 * different / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "neurocl-merging-bench")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--make", type=int, metavar="LAYERS", help=argparse.SUPPRESS)
    parser.add_argument("--differing", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    layers, repeats = (2, 1) if options.quick else (12, options.repeats)
    folder = options.work / f"layers-{options.make or layers}"
    if options.make:
        make_models(folder, options.make)
        return
    if options.differing:
        print(differing(*options.differing))
        return
    in_between = [sys.executable, __file__, "--work", str(options.work)]
    subprocess.run([*in_between, "--make", str(layers)], check=True)
    models = model_paths(folder)
    mergekit = mergekit_command(options.work)
    floor = measured([sys.executable, "-c", "import torch, safetensors"], options.threads)
    ours_start = measured([sys.executable, "-m", "neurocl", "merging", "merge", "--help"], options.threads)
    theirs_start = measured([str(mergekit), "--help"], options.threads)
    size = sum(path.stat().st_size for path in models[0].glob("*.safetensors")) / 2**20
    print(
        f"{layers} layers, {size:.0f} MB a model, {NUM_MODELS} models and base, bfloat16, {options.threads} thread(s), "
        f"median of {repeats}; seconds are user + system"
    )
    print(
        f"  start-up alone: neurocl --help {ours_start.cpu_seconds:.2f} s, mergekit --help "
        f"{theirs_start.cpu_seconds:.2f} s, import torch {floor.cpu_seconds:.2f} s {floor.peak_mb:.0f} MB"
    )
    header = f"  {'':18} {'mergekit s':>10} {'ours s':>7} {'ratio':>6} {'bound':>6} {'with hashes':>11}"
    print(f"{header} {'mergekit MB':>11} {'ours MB':>8} {'ratio':>6} {'values that differ':>18}")
    worst_memory, missed = 0.0, []
    for contest in CONTESTS:
        recipe = options.work / "recipe.yaml"
        write_recipe(contest, models, recipe)
        ours, theirs, with_hashes = [], [], []
        out, peer_out = options.work / "ours", options.work / "theirs"
        for _ in range(repeats):
            for folder in (out, peer_out):
                shutil.rmtree(folder, ignore_errors=True)
            theirs.append(
                measured([str(mergekit), str(recipe), str(peer_out), "--no-copy-tokenizer", "--quiet"], options.threads)
            )
            ours.append(measured(our_command(contest, models, out, ["--no-hashes"]), options.threads))
            shutil.rmtree(out)
            with_hashes.append(measured(our_command(contest, models, out, []), options.threads).cpu_seconds)
        seconds = [statistics.median(cost.cpu_seconds for cost in side) for side in (theirs, ours)]
        memory = [statistics.median(cost.peak_mb for cost in side) for side in (theirs, ours)]
        compared = subprocess.run(
            [*in_between, "--differing", str(out), str(peer_out)], check=True, capture_output=True, text=True
        )
        share = float(compared.stdout)
        ratio, memory_ratio = seconds[1] / seconds[0], memory[1] / memory[0]
        print(
            f"  {contest.name:18} {seconds[0]:10.2f} {seconds[1]:7.2f} {ratio:6.2f} {contest.bound:6.2f} "
            f"{statistics.median(with_hashes):11.2f} "
            f"{memory[0]:11.0f} {memory[1]:8.0f} {memory_ratio:6.2f} {share:17.3f}%",
            flush=True,
        )
        worst_memory = max(worst_memory, memory_ratio)
        if ratio > contest.bound:
            missed.append(contest.name)
    print(
        f"  seconds within their bounds: {'met' if not missed else 'MISSED by ' + ', '.join(missed)}; "
        f"memory at most {MEMORY_BOUND} x: {'met' if worst_memory <= MEMORY_BOUND else 'MISSED'} ({worst_memory:.2f})"
    )
    shutil.rmtree(options.work / "ours", ignore_errors=True)
    shutil.rmtree(options.work / "theirs", ignore_errors=True)


if __name__ == "__main__":
    main()
