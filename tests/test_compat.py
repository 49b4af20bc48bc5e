"""The torchvision shim in every state a machine can be in, each tried in a process of its own."""

import subprocess
import sys

import pytest

BROKEN_TORCHVISION = """
import torch
torch.library.register_fake("torchvision::nms")(lambda *a: None)
torch.library.register_fake("torchvision::qnms")(lambda *a: None)
transforms = "usable"
"""
CASES = {
    "native": {"torchvision": "transforms = 'usable'", "torchaudio": "x = 1"},
    "shimmed": {"torchvision": BROKEN_TORCHVISION, "torchaudio": "raise OSError('libtorchaudio.so: undefined symbol')"},
    "hidden": {"torchvision": "raise RuntimeError('operator torchvision::unheard_of does not exist')"},
}
CODE = """
import sys
sys.path.insert(0, {path!r})
from neurocl.compat.torchvision import ensure_torchvision
first, second = ensure_torchvision(), ensure_torchvision()
assert first == second, (first, second)
try:
    import torchvision
    usable = torchvision.transforms
except ImportError:
    usable = "not importable"
try:
    import torchaudio
    audio = "importable"
except ImportError:
    audio = "hidden"
print(first, usable, audio, sep="|")
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(("state", "packages"), CASES.items())
def test_each_state_is_recognised_and_made_usable(tmp_path, state, packages):
    for name, text in {"torchaudio": "raise OSError('broken')", **packages}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    found, usable, audio = run(CODE.format(path=str(tmp_path))).split("|")
    assert found == state
    assert usable == ("not importable" if state == "hidden" else "usable")
    assert audio == ("importable" if state == "native" else "hidden")


def test_an_absent_torchvision_stays_absent():
    code = (
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.startswith('torch') and name != 'torch' else find(name, *a)\n"
        "from neurocl.compat.torchvision import ensure_torchvision\nprint(ensure_torchvision())"
    )
    assert run(code) == "absent"


def test_the_installed_packages_that_need_torchvision_import_behind_the_shim():
    code = (
        "from neurocl.compat.torchvision import ensure_torchvision\nensure_torchvision()\n"
        "from diffusers import UNet1DModel\n"
        "from diffusers.training_utils import EMAModel\n"
        "from spikingjelly.activation_based.model import spiking_resnet\n"
        "print('imported')"
    )
    assert run(code).splitlines()[-1] == "imported"


def test_kernels_find_a_private_cache_where_no_folder_can_be_written():
    code = (
        "import os, stat\nfrom pathlib import Path\n"
        "from neurocl.compat import numba_cache\n"
        "numba_cache.os.access = lambda path, mode: False\n"
        "chosen = numba_cache.ensure_numba_cache()\n"
        "import torch\nfrom neurocl import spiking\n"
        "assert spiking.lif(torch.ones(3, 4)).shape == (3, 4)\n"
        "print(stat.S_IMODE(os.stat(chosen).st_mode) == 0o700, any(chosen.iterdir()))"
    )
    assert run(code) == "True True"


def test_a_writable_folder_needs_no_other_cache(tmp_path, monkeypatch):
    from neurocl.compat.numba_cache import ensure_numba_cache

    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert ensure_numba_cache([tmp_path / "not" / "yet" / "there"]) is None
