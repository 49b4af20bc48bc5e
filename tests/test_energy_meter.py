"""The energy meter: reference integrals, RAPL zones of a folder that the test writes, failure, nesting."""

import os
import threading
import time

import numpy as np
import pytest

from neurocl.energy_meter import JOULES_PER_KWH, EnergyMeter, counter_joules, trapezoid_joules
from tests.conftest import reference


def write_zone(root, zone, name, energy_uj, range_uj=262_143_328_850):
    folder = root / zone
    folder.mkdir(exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(1000))


def test_a_wrapped_counter_gives_the_reference_energy():
    oracle = reference("continual-energy/energy")
    joules = counter_joules([int(value) for value in oracle["rapl_uj"]], int(oracle["rapl_wrap"]))
    np.testing.assert_allclose(joules, oracle["rapl_joule"], rtol=1e-10)


def test_sampled_power_is_integrated_by_trapezoids_as_in_the_reference():
    oracle = reference("continual-energy/energy")
    joules = trapezoid_joules(oracle["time_s"].tolist(), oracle["power_w"].tolist())
    np.testing.assert_allclose(joules / JOULES_PER_KWH, oracle["energy_trapezoid_kwh"], rtol=1e-10)


def test_constant_power_over_a_time_is_their_product():
    assert trapezoid_joules([0.0, 0.5, 3.0, 4.0], [20.0] * 4) == pytest.approx(80.0, rel=1e-12)
    assert trapezoid_joules([1.0], [20.0]) == 0.0
    assert counter_joules([5], 10) == 0.0


def test_rapl_adds_packages_and_memory_and_leaves_out_what_is_counted_already(tmp_path):
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
    }
    for zone, name in zones.items():
        write_zone(tmp_path, zone, name, 1_000_000)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 9_000_000, range_uj=10_000_000)
    with EnergyMeter("rapl", powercap=tmp_path) as meter:
        for zone, name in zones.items():
            write_zone(tmp_path, zone, name, 3_000_000)
        write_zone(tmp_path, "intel-rapl:1", "package-1", 4_000_000, range_uj=10_000_000)
    reading = meter.reading
    assert reading.joules == 2.0 + 2.0 + 5.0  # package-1 turned over: 1 J to its range, 4 J after
    assert (reading.backend, reading.estimated, reading.samples) == ("rapl", False, 2)
    assert reading.device == "package-0, dram, package-1"


def test_auto_reads_the_processor_on_a_cpu_and_never_estimates(tmp_path):
    with EnergyMeter(powercap=tmp_path) as meter:
        pass
    assert (meter.reading.backend, meter.reading.joules) == ("none", None)
    assert "not readable on this machine" in meter.reading.note
    write_zone(tmp_path, "intel-rapl:0", "package-0", 7)
    with EnergyMeter(powercap=tmp_path) as meter:
        pass
    assert (meter.reading.backend, meter.reading.joules) == ("rapl", 0.0)


def test_a_counter_that_vanishes_or_breaks_leaves_a_note_and_the_block_runs_on(tmp_path):
    write_zone(tmp_path, "intel-rapl:0", "package-0", 7)
    finished = False
    with EnergyMeter("rapl", powercap=tmp_path) as meter:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("nonsense")
        finished = True
    assert finished
    assert meter.reading.joules is None
    assert "not readable" in meter.reading.note
    assert meter.reading.seconds > 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_counters_of_root_are_named_as_the_reason(tmp_path):
    write_zone(tmp_path, "intel-rapl:0", "package-0", 7)
    (tmp_path / "intel-rapl:0" / "energy_uj").chmod(0)
    with EnergyMeter("rapl", powercap=tmp_path) as meter:
        pass
    assert "readable by root only" in meter.reading.note


def test_nvml_without_a_board_or_its_package_says_so():
    pytest.importorskip("torch")
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with EnergyMeter(device="cuda") as meter:
        pass
    assert meter.reading.joules is None
    assert "nvml" in meter.reading.note


@pytest.mark.gpu
def test_nvml_counts_the_energy_of_a_board():
    pytest.importorskip("pynvml")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with EnergyMeter(device="cuda") as meter:
        a = torch.randn(4096, 4096, device="cuda")
        for _ in range(200):
            a = a @ a * 1e-3
        torch.cuda.synchronize()
    assert meter.reading.backend == "nvml"
    assert meter.reading.joules is not None
    assert meter.reading.joules >= 0


def test_the_model_is_cpu_time_times_watts_and_labelled_estimated():
    with EnergyMeter("model", watts_per_core=8.0) as meter:
        burn(0.05)
    reading = meter.reading
    assert reading.estimated
    assert "8 W per core" in reading.note
    assert reading.joules == pytest.approx(8.0 * reading.cpu_seconds, abs=8.0 * 0.005)


def test_an_empty_block_takes_less_than_a_joule():
    with EnergyMeter("model") as meter:
        pass
    assert 0 <= meter.reading.joules < 1


def test_two_inner_meters_add_up_to_the_outer_one():
    with EnergyMeter("model") as whole:
        with EnergyMeter("model") as first:
            burn(0.1)
        with EnergyMeter("model") as second:
            burn(0.1)
    parts = first.reading.joules + second.reading.joules
    assert parts == pytest.approx(whole.reading.joules, rel=0.05)


def test_an_error_in_the_block_passes_through_and_is_metered():
    meter = EnergyMeter("model")
    with pytest.raises(KeyError, match="lost"), meter:
        raise KeyError("lost")
    assert meter.reading.joules >= 0


def test_no_thread_outlives_its_block(tmp_path):
    write_zone(tmp_path, "intel-rapl:0", "package-0", 7)
    before = threading.active_count()
    with EnergyMeter("rapl", powercap=tmp_path):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_wrong_arguments_and_early_readings_are_refused():
    with pytest.raises(ValueError, match="rapl, nvml, model"):
        EnergyMeter("watt")
    with pytest.raises(ValueError, match="positive, got 0"):
        EnergyMeter("model", watts_per_core=0)
    with pytest.raises(RuntimeError, match="no reading"):
        _ = EnergyMeter().reading
