"""README and docs: every command and every Python block in them runs, and the reference pages leave nothing out.

Blocks of one page run in their order, in one empty folder, the Python blocks in one namespace, as a reader who copies
them line by line would run them. ``<!-- not run: REASON -->`` right before a block leaves it out.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from neurocl import continual, data, spiking
from neurocl.continual import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("python", "console", "bash", "sh")
BLOCK = re.compile(r"^(?P<marker><!-- not run: .+ -->\n\n?)?```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)


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


def run_page(page: Path, folder: Path) -> None:
    # a plain environment: nothing of the machine's data, one thread, a cache of its own
    environment = {name: value for name, value in os.environ.items() if name != "NEUROCL_DATA"}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "NEUROCL_THREADS": "1",
        "NEUROCL_CACHE": str(folder.parent / "cache"),
        "COLUMNS": "120",
    }
    namespace = {"__name__": "page"}
    for block in to_run(page):
        place = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
            continue
        for command in block.commands:
            assert command.startswith("neurocl "), f"{place}: mark this block as not run, or use neurocl: {command}"
            done = subprocess.run(
                command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, f"{place}: {command}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=lambda page: page.stem)
def test_what_a_page_says_to_type_works(page, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("NEUROCL_DATA", raising=False)
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    run_page(page, folder)


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
        missing = [option for option in options if f"`{option}" not in page and "completion" not in option]
        assert not missing, f"{path}: {missing}"

    walk(typer.main.get_command(app), "neurocl")


def test_the_configuration_page_names_every_key():
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    models = (spiking.SpikingTrainConfig, spiking.NeuronConfig, continual.OptimizerConfig)
    keys = {name for model in models for name in model.model_fields}
    assert not {key for key in keys if f"`{key}`" not in page}


def test_the_run_folder_page_names_every_key_of_a_result():
    page = (ROOT / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    little = {"max_train_per_class": 4, "max_test_per_class": 2, "epochs": 1, "buffer_size": 8, "threads": 1}
    document = continual.train(method="er", forward_transfer=True, keep=False, **little).document
    names = {*document, *document["protocol"], *document["metrics"]["class_il"], *document["seconds"]}
    assert not {name for name in names if f"`{name}`" not in page}


def test_the_reference_pages_show_every_public_name():
    for module in (spiking, continual, data):
        name = module.__name__
        page = (ROOT / "docs" / "reference" / f"{name.rpartition('.')[2]}.md").read_text(encoding="utf-8")
        assert not {public for public in module.__all__ if public not in page}, name
