"""Named random streams: the same in every process, different for every name."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from neurocl.federated.randomness import stream, torch_stream


def test_a_stream_is_the_documented_function_of_its_names():
    # CRC-32 of "123456789" is the check value 0xCBF43926 of every CRC-32 table.
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([5, 0xCBF43926, 2, 3])))
    np.testing.assert_array_equal(stream(5, "123456789", 2, 3).random(4), expected.random(4))


def test_another_process_draws_the_same_numbers():
    code = (
        "from neurocl.federated.randomness import stream, torch_stream\n"
        "import torch\n"
        "print(stream(3, 'shuffle', 1, 2).integers(2**62), torch_stream(3, 'shuffle', 1, 2).initial_seed(),"
        " torch.randint(2**62, (1,), generator=torch_stream(3, 'shuffle', 1, 2)).item())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    generator = torch_stream(3, "shuffle", 1, 2)
    here = [stream(3, "shuffle", 1, 2).integers(2**62), generator.initial_seed()]
    here.append(torch.randint(2**62, (1,), generator=generator).item())
    assert [int(value) for value in there] == here


def test_seed_label_and_every_number_change_the_stream():
    names = [(0, "split", 1, 2), (1, "split", 1, 2), (0, "shuffle", 1, 2), (0, "split", 2, 2), (0, "split", 1, 3)]
    names.append((0, "split", 2, 1))
    assert len({stream(*name).integers(2**62) for name in names}) == len(names)
    assert len({torch_stream(*name).initial_seed() for name in names}) == len(names)


def test_neighbouring_streams_are_uncorrelated():
    draws = np.stack([stream(0, "noise", client).normal(size=4000) for client in range(20)])
    correlation = np.corrcoef(draws)[~np.eye(20, dtype=bool)]
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)  # five standard deviations of an uncorrelated pair


def test_global_generators_are_neither_read_nor_moved():
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = torch_stream(0, "a").initial_seed()
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    torch.manual_seed(1)
    assert torch_stream(0, "a").initial_seed() == first


def test_numpy_integers_name_the_same_stream():
    assert stream(np.int64(4), "a", np.int32(1)).random() == stream(4, "a", 1).random()


@pytest.mark.parametrize("arguments", [(-1, "a"), (2**32, "a"), (0, "a", -1), (0, "a", 2**32)])
def test_numbers_outside_32_bits_are_refused(arguments):
    with pytest.raises(ValueError, match="2\\^32"):
        stream(*arguments)


def test_importing_the_streams_does_not_import_torch():
    code = "import sys, neurocl.federated.randomness, neurocl.federated.partition; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
