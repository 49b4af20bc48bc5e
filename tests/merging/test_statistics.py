"""Sums of layer statistics: what they add up to, and what a file of them may hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neurocl.errors import RunError, UserError
from neurocl.merging.statistics import HEADER_KEY, Statistics


def gram(rows: Tensor) -> Tensor:
    return rows.T @ rows


def example() -> Statistics:
    torch.manual_seed(0)
    statistics = Statistics()
    statistics.add("gram", "fc.weight", gram(torch.randn(12, 3).double()), num_samples=4, num_rows=12)
    statistics.add("fisher", "fc.bias", torch.rand(5).double(), num_samples=4, num_rows=12)
    statistics.add("kfac_a", "fc.weight", torch.eye(4).double(), num_samples=4, num_rows=12)
    return statistics


def write(path: Path, tensors: dict[str, Tensor], counts: object, schema: int = 1) -> Path:
    save_file(tensors, path, metadata={HEADER_KEY: json.dumps({"schema": schema, "counts": counts})})
    return path


def test_gram_means_are_over_rows_and_the_others_over_samples() -> None:
    statistics = example()
    assert torch.equal(statistics.mean("gram", "fc.weight"), statistics.sum("gram", "fc.weight").total / 12)
    assert torch.equal(statistics.mean("fisher", "fc.bias"), statistics.sum("fisher", "fc.bias").total / 4)
    assert torch.equal(statistics.mean("kfac_a", "fc.weight"), torch.eye(4).double() / 4)


def test_sums_of_two_machines_are_the_sums_of_all_their_data() -> None:
    rows = torch.randn(10, 3, dtype=torch.float64)
    here, there, whole = Statistics(), Statistics(), Statistics()
    here.add("gram", "w", gram(rows[:6]), num_samples=6, num_rows=6)
    there.add("gram", "w", gram(rows[6:]), num_samples=4, num_rows=4)
    there.add("gram", "v", gram(rows[6:]), num_samples=4, num_rows=4)
    whole.add("gram", "w", gram(rows), num_samples=10, num_rows=10)
    both = here + there
    torch.testing.assert_close(both.mean("gram", "w"), whole.mean("gram", "w"), rtol=1e-14, atol=1e-14)
    assert both.sum("gram", "w").num_samples == 10
    assert both.names("gram") == ["w", "v"]
    assert here.sum("gram", "w").num_samples == 6


def test_the_diagonal_keeps_d_numbers_and_comes_back_as_a_diagonal_matrix() -> None:
    thin = example().diagonal()
    full = example().mean("gram", "fc.weight")
    assert thin.sum("gram", "fc.weight").total.shape == (3,)
    assert torch.equal(thin.mean("gram", "fc.weight"), torch.diag(full.diagonal()))
    assert torch.equal(thin.mean("kfac_a", "fc.weight"), example().mean("kfac_a", "fc.weight"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 1e-6)])
def test_a_saved_file_gives_the_same_numbers_and_counts(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    statistics = example()
    statistics.save(tmp_path / "s.safetensors", dtype=dtype)
    back = Statistics.load(tmp_path / "s.safetensors")
    assert set(back) == set(statistics)
    for kind, name in statistics:
        mine, read = statistics.sum(kind, name), back.sum(kind, name)
        assert (read.num_samples, read.num_rows) == (mine.num_samples, mine.num_rows)
        assert read.total.dtype == torch.float64
        torch.testing.assert_close(read.total, mine.total, rtol=tolerance, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_saving_into_a_folder_that_is_not_there_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        example().save(tmp_path / "absent" / "s.safetensors")


def test_only_float64_and_float32_files_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float16"):
        example().save(tmp_path / "s.safetensors", dtype=torch.float16)


def test_a_missing_sum_names_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no gram of 'fc\.weigth'; did you mean 'fc\.weight'"):
        example().mean("gram", "fc.weigth")


def test_sums_of_different_shapes_do_not_add() -> None:
    with pytest.raises(UserError, match=r"'fc.bias'.*\[5\] and \[6\]"):
        example().add("fisher", "fc.bias", torch.zeros(6).double())


def test_an_unknown_kind_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="hessian"):
        Statistics().add("hessian", "w", torch.zeros(2))


@pytest.mark.parametrize(
    ("tensors", "counts", "message"),
    [
        ({"gram/w": torch.full((2, 2), torch.nan)}, {"gram/w": [1, 1]}, "'gram/w'.*not finite"),
        ({"gram/w": torch.zeros(2, 3)}, {"gram/w": [1, 1]}, "'gram/w'.*square"),
        ({"kfac_b/w": torch.zeros(2)}, {"kfac_b/w": [1, 1]}, "'kfac_b/w'.*square"),
        ({"gram/w": torch.zeros(2, 2, dtype=torch.int64)}, {"gram/w": [1, 1]}, "'gram/w'.*float64 or float32"),
        ({"gram/w": torch.zeros(2, 2)}, {"gram/w": [1, -1]}, "'gram/w'.*whole numbers"),
        ({"gram/w": torch.zeros(2, 2)}, {"gram/w": [True, 1]}, "'gram/w'.*whole numbers"),
        ({"gram/w": torch.zeros(2, 2)}, {}, "'gram/w'.*only one"),
        ({"w": torch.zeros(2, 2)}, {"w": [1, 1]}, "'w'.*KIND/PARAMETER"),
    ],
)
def test_a_bad_entry_is_named(tmp_path: Path, tensors: dict[str, Tensor], counts: object, message: str) -> None:
    path = write(tmp_path / "bad.safetensors", tensors, counts)
    with pytest.raises(UserError, match=message) as caught:
        Statistics.load(path)
    assert "bad.safetensors" in str(caught.value)


def test_files_that_hold_no_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Statistics.load(tmp_path / "absent.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="not a file of layer statistics"):
        Statistics.load(tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("hello there, this is no tensor file")
    with pytest.raises(UserError, match="not a safetensors file"):
        Statistics.load(tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="schema 9"):
        Statistics.load(write(tmp_path / "new.safetensors", {}, {}, schema=9))
