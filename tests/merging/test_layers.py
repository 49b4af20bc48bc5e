"""Merging is a layer of its own: federated and vision-language methods build on it, and it knows none of them."""

import ast
from pathlib import Path

import pytest

import neurocl

ROOT = Path(neurocl.__file__).parent
BELOW = {"compat", "config", "devices", "errors", "lazy", "registry", "runs", "stopping", "__version__"}
MAY_IMPORT = {
    "merging": BELOW | {"merging", "backbones", "data"},
    "backbones": BELOW | {"backbones", "data"},
    "trajectory": BELOW | {"trajectory", "data"},
}


def imported(file: Path) -> set[str]:
    """First part below ``neurocl`` of everything that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "neurocl":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("neurocl."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("neurocl.")}
    return found


@pytest.mark.parametrize("area", MAY_IMPORT)
def test_only_lower_layers_are_imported(area):
    files = sorted((ROOT / area).glob("**/*.py"))
    assert len(files) > 4
    assert {file.name: imported(file) - MAY_IMPORT[area] for file in files if imported(file) - MAY_IMPORT[area]} == {}


def test_nothing_unpickles():
    """``torch.load`` only where the very bytes were checked against a published digest; no ``pickle`` at all."""
    for area in ("merging", "backbones", "data"):
        for file in sorted((ROOT / area).glob("**/*.py")):
            text = file.read_text()
            assert "import pickle" not in text, file
            assert "allow_pickle=True" not in text, file
            assert ("torch.load(" in text) == (file.name == "efficientnet_lite.py"), file
