"""Start-up: help is fast because nothing heavy is imported."""

import os
import resource
import statistics
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "scipy", "sklearn", "matplotlib", "pandas", "numba", "tslearn", "snntorch", "spikingjelly")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["spiking", "train", "--help"], ["data", "--help"], ["merging", "merge", "--help"], ["--version"]],
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['neurocl', *{arguments!r}]\n"
        "try:\n    runpy.run_module('neurocl', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("HEAVY []")


def test_listing_names_imports_no_network_code():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['neurocl', 'list']\n"
        "try:\n    runpy.run_module('neurocl', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [name for name in ('torch', 'transformers', 'numba') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("HEAVY []")


def test_help_takes_less_than_0_3_seconds_of_processor_time():
    def measure():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "neurocl", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    measure()
    assert statistics.median(measure() for _ in range(5)) < 0.3


def test_importing_the_package_costs_nothing():
    code = f"import sys, neurocl; print([name for name in {HEAVY!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_every_public_name_can_be_imported():
    import neurocl

    for area in ("spiking", "continual", "data", "merging"):
        package = getattr(neurocl, area)
        for name in package.__all__:
            assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = neurocl.nothing


def test_functions_are_not_hidden_by_modules_of_their_name():
    code = (
        "import neurocl.spiking.staer, neurocl.continual.training, neurocl.data.catalog\n"
        "from neurocl import continual, data, spiking\n"
        "print(all(map(callable, (spiking.soft_dtw, spiking.lif, continual.train, data.download))))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.strip() == "True"
