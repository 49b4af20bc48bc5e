"""README and docs: every command and every Python block in them runs, and the reference pages leave nothing out.

Blocks of one page run in their order, in one empty folder, the Python blocks in one namespace, as a reader who copies
them line by line would run them. ``<!-- not run: REASON -->`` right before a block leaves it out.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from neurocl import continual, data, federated, merging, spiking, trajectory
from neurocl.continual import METHODS
from neurocl.merging.recipe import ModelEntry
from neurocl.merging.suite import SuiteConfig
from neurocl.trajectory.config import AugmentConfig, StageConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("python", "console", "bash", "sh")
BLOCK = re.compile(
    r"^(?P<marker><!-- not run: [^\n]+ -->\n\n?)?```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    line: int
    left_out: bool

    @property
    def commands(self) -> list[str]:
        """The lines to type; in a ``console`` block those after ``$``, the others are output."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["text"], text[: match.start("text")].count("\n") + 1, bool(match["marker"]))
        for match in BLOCK.finditer(text)
        if match["language"] in RUN
    ]


def to_run(page: Path) -> list[Block]:
    return [block for block in blocks(page) if not block.left_out]


def in_a_process(command: str) -> None:
    """As a reader's shell would; the environment's own ``neurocl`` comes first in the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def in_this_process(command: str) -> None:
    """The same command without a start of Python and torch, so that many of them take little time."""
    from neurocl.cli.main import app

    assert not set(command) & set("*|<>$~"), f"needs a shell: {command}"
    code = app(shlex.split(command)[1:], standalone_mode=False)
    assert not code, f"exit code {code}"


def run_page(page: Path, run_command: Callable[[str], None]) -> None:
    namespace = {"__name__": "page"}
    for block in to_run(page):
        place = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
            continue
        for command in block.commands:
            assert command.startswith("neurocl "), f"{place}: mark this block as not run, or use neurocl: {command}"
            try:
                run_command(command)
            except Exception as error:
                raise AssertionError(f"{place}: {command}") from error


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """An empty folder, one thread, none of the machine's data, a cache of its own, registries put back afterwards."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("NEUROCL_DATA", raising=False)
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "NEUROCL_THREADS": "1",
        "NEUROCL_CACHE": str(tmp_path / "cache"),
        "COLUMNS": "120",
    }.items():
        monkeypatch.setenv(name, value)
    for registry in (METHODS, data.DATASETS, merging.MERGES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.mark.slow
def test_what_the_readme_says_to_type_works(plain):
    assert {"console", "python"} <= {block.language for block in to_run(ROOT / "README.md")}
    run_page(ROOT / "README.md", in_a_process)


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if to_run(page)], ids=lambda page: page.stem)
def test_what_a_page_says_to_type_works(plain, page):
    run_page(page, in_this_process)


def test_pages_have_no_block_of_a_language_that_nobody_runs():
    known = {*RUN, "text", "yaml", "toml", "json", "bibtex", "make"}
    for page in PAGES:
        found = set(re.findall(r"^ *```(\w+)", page.read_text(encoding="utf-8"), re.M))
        assert found <= known, f"{page.name}: {found - known}"


def test_links_between_pages_and_to_pictures_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_command_line_page_names_every_command_and_option():
    import typer

    from neurocl.cli.main import app

    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")

    def walk(command, path):
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{path} {name}")
        if not hasattr(command, "commands"):
            assert f"`{path}" in page, path
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        missing = [option for option in options if not re.search(rf"{option}(?![\w-])", page)]
        assert not missing, f"{path}: {missing}"

    walk(typer.main.get_command(app), "neurocl")


def test_the_configuration_page_names_every_key():
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    training = (spiking.SpikingTrainConfig, spiking.NeuronConfig, continual.OptimizerConfig)
    models = (*training, merging.Recipe, ModelEntry, merging.ParameterRules, SuiteConfig)
    models += (trajectory.TrajectoryConfig, StageConfig, AugmentConfig)
    models += (federated.FederatedConfig, federated.PartitionConfig)
    keys = {name for model in models for name in model.model_fields}
    keys |= {f"privacy.{key}" for key in federated.PrivacyConfig.model_fields}
    keys |= {f"secure_sum.{key}" for key in federated.SecureSumConfig.model_fields}
    assert not {key for key in keys if f"`{key}`" not in page}


def test_the_table_of_what_a_federated_server_learns_is_what_the_methods_say():
    from neurocl.federated.method import FederatedMethod
    from neurocl.federated.privacy import averages_only

    def word(value):
        return "yes" if value else "no"

    page = (ROOT / "docs" / "explanation" / "federated-privacy.md").read_text(encoding="utf-8")
    wanted = []
    for entry in sorted(federated.FEDERATED.entries(), key=lambda entry: entry.name):
        kind = federated.FEDERATED.load(entry.name)
        private = averages_only(kind) and entry.name != "joint"  # which refuses: there are no clients
        forgets = kind.forget is not FederatedMethod.forget
        cells = (f"`{entry.name}`", kind.reveals, word(kind.sum_only), word(private), word(forgets))
        wanted.append(f"| {' | '.join(cells)} |")
    assert [line for line in page.splitlines() if line.startswith("| `")] == wanted


def test_the_run_folder_page_names_every_key_of_a_result():
    page = (ROOT / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    little = {"max_train_per_class": 4, "max_test_per_class": 2, "epochs": 1, "buffer_size": 8, "threads": 1}
    document = continual.train(method="er", forward_transfer=True, keep=False, **little).document
    names = {*document, *document["protocol"], *document["metrics"]["class_il"], *document["seconds"]}
    assert not {name for name in names if f"`{name}`" not in page}


def test_the_reference_pages_show_every_public_name():
    for module in (spiking, continual, data, federated, merging, trajectory):
        name = module.__name__
        page = (ROOT / "docs" / "reference" / f"{name.rpartition('.')[2]}.md").read_text(encoding="utf-8")
        assert not {public for public in module.__all__ if public not in page}, name
