"""Metrics against the fixtures, scipy, brute force and cases whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from neurocl.trajectory import metrics
from tests.conftest import reference

NAMES = ["metrics_0", "metrics_1", "metrics_2"]


def load(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    case = reference(f"trajectory/{name}")
    pred, truth = torch.from_numpy(case["pred"]).double(), torch.from_numpy(case["gt"]).double()
    return pred, truth, torch.arange(len(truth)) // int(case["n_agents"]), case


def close(ours: torch.Tensor | float, case: dict[str, Any], key: str) -> None:
    np.testing.assert_allclose(np.asarray(ours), case[key], rtol=1e-5, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_distances_are_those_of_the_reference(name: str) -> None:
    pred, truth, scene, case = load(name)
    half = truth.shape[1] // 2
    close(metrics.min_ade(pred, truth), case, "minADE_per_agent")
    close(metrics.min_fde(pred, truth), case, "minFDE_per_agent")
    close(metrics.min_ade(pred, truth).mean(), case, "minADE")
    close(metrics.min_fde(pred, truth).mean(), case, "minFDE")
    close(metrics.min_ade(pred, truth).median(), case, "minADE_median")
    close(metrics.min_ade(pred[:5], truth).mean(), case, "minADE_first5")
    close(metrics.min_ade(pred, truth, horizon=half).mean(), case, "minADE_half")
    close(metrics.min_fde(pred, truth, horizon=half).mean(), case, "minFDE_half")
    ade, fde = metrics.errors(pred, truth)
    close(ade.mean(), case, "meanADE")
    close(fde.mean(), case, "meanFDE")
    joint_ade, joint_fde = metrics.joint_errors(pred, truth, scene)
    close(joint_ade.mean(), case, "minJADE")
    close(joint_fde.mean(), case, "minJFDE")
    close(metrics.misses(pred, truth, 2.0).mean(), case, "miss_rate_2.0")


@pytest.mark.parametrize("name", NAMES)
def test_diversity_collisions_and_likelihood_are_those_of_the_reference(name: str) -> None:
    pred, truth, scene, case = load(name)
    spread = metrics.diversity(pred)
    close(spread.apd.mean(), case, "APD")
    close(spread.apd_ade.mean(), case, "APD_ade")
    close(spread.fsd.mean(), case, "FSD")
    scenes, agents = metrics.collisions(pred, scene, 0.1)
    close(scenes.double().mean(), case, "collision_rate_0.1")
    close(agents.double().mean(), case, "collision_agent_rate_0.1")
    close(metrics.kde_nll(pred, truth), case, "KDE_NLL_per_agent")
    close(metrics.kde_nll(pred, truth).mean(), case, "KDE_NLL")


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_agents_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pred, truth, scene, _ = load(name)
    levels = torch.tensor([0.2, 0.5, 0.9])

    def everything() -> list[torch.Tensor]:
        return [
            metrics.kde_nll(pred, truth),
            metrics.energy_score(pred, truth),
            *metrics.diversity(pred),
            metrics.coverage(pred, truth, levels),
            *(value.double() for value in metrics.collisions(pred, scene)),
        ]

    whole = everything()
    monkeypatch.setattr(metrics, "MAX_ELEMENTS", 5000)
    for first, second in zip(whole, everything(), strict=True):
        torch.testing.assert_close(first, second)


def test_the_two_minima_are_taken_apart() -> None:
    truth = torch.zeros(1, 2, 2)
    pred = torch.tensor([[[[0.0, 0.0], [3.0, 0.0]]], [[[4.0, 0.0], [1.0, 0.0]]]])
    assert float(metrics.min_ade(pred, truth)) == 1.5
    assert float(metrics.min_fde(pred, truth)) == 1.0


def test_unknown_steps_do_not_count_and_the_last_known_one_is_the_end() -> None:
    pred, truth, scene, _ = load("metrics_0")
    mask = torch.ones(truth.shape[:2], dtype=torch.bool)
    mask[0, 12:] = False
    mask[1, 3] = False
    mask[2] = False
    spoilt = torch.where(mask[..., None], truth, torch.tensor(1e6, dtype=truth.dtype))
    ade, fde = metrics.errors(pred, spoilt, mask)
    short = metrics.errors(pred[:, :1, :12], truth[:1, :12])
    torch.testing.assert_close(ade[:, :1], short[0])
    torch.testing.assert_close(fde[:, :1], short[1])
    distance = (pred[:, 1] - truth[1]).norm(dim=-1)
    torch.testing.assert_close(ade[:, 1], distance[:, mask[1]].mean(dim=1))
    assert ade[:, 2].isnan().all()
    assert fde[:, 2].isnan().all()
    others = torch.arange(len(truth)) != 2
    torch.testing.assert_close(
        metrics.joint_errors(pred, spoilt, scene, mask)[0],
        metrics.joint_errors(pred[:, others], spoilt[others], scene[others], mask[others])[0],
    )
    for score in (metrics.kde_nll(pred, spoilt, mask=mask), metrics.energy_score(pred, spoilt, mask)):
        assert score[2].isnan()
        assert torch.isfinite(score[others]).all()
    torch.testing.assert_close(
        metrics.kde_nll(pred, spoilt, mask=mask)[:1], metrics.kde_nll(pred[:, :1, :12], truth[:1, :12])
    )


def test_density_is_that_of_scipy_with_and_without_weights() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(15, 4, 3, 2, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 0.3])
    truth = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    share = torch.rand(15, 4, generator=generator, dtype=torch.float64)
    share = share / share.sum(dim=0)
    for weights in (None, share):
        ours = metrics.kde_nll(pred, truth, weights)
        for agent in range(4):
            logs = [
                stats.gaussian_kde(
                    pred[:, agent, step].T.numpy(), weights=None if weights is None else weights[:, agent].numpy()
                ).logpdf(truth[agent, step].numpy())[0]
                for step in range(3)
            ]
            assert float(ours[agent]) == pytest.approx(-np.mean(np.maximum(logs, -20)), rel=1e-6)


def test_forecasts_that_coincide_have_a_likelihood() -> None:
    pred, truth = torch.zeros(20, 2, 3, 2), torch.zeros(2, 3, 2)
    truth[1] = 5
    nll = metrics.kde_nll(pred, truth)
    assert float(nll[1]) == 20
    assert float(nll[0]) < 0


def test_the_energy_score_of_one_forecast_is_its_distance() -> None:
    pred, truth = torch.randn(1, 5, 4, 2), torch.randn(5, 4, 2)
    torch.testing.assert_close(metrics.energy_score(pred, truth), (pred[0] - truth).flatten(1).norm(dim=-1))


def test_the_energy_score_prefers_the_true_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3000, 2, 2, generator=generator)
    scores = [
        float(metrics.energy_score(torch.randn(40, 3000, 2, 2, generator=generator) * scale, truth).mean())
        for scale in (0.3, 1.0, 3.0)
    ]
    assert scores[1] == min(scores)


def test_brier_adds_the_doubt_about_the_best_forecast() -> None:
    truth = torch.zeros(1, 1, 2)
    pred = torch.tensor([[[[3.0, 4.0]]], [[[1.0, 0.0]]]])
    score = metrics.brier_fde(pred, truth, torch.tensor([[0.75], [0.25]]))
    assert float(score) == pytest.approx(1 + 0.75**2)


def test_collisions_are_those_of_a_loop_over_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    pred = torch.rand(4, 12, 3, 2, generator=generator)
    scene = torch.tensor([5, 5, 5, 2, 2, 9, 7, 7, 7, 7, 2, 5])
    scenes, agents = metrics.collisions(pred, scene, 0.2)
    expected = torch.zeros(4, 12, dtype=torch.bool)
    for k in range(4):
        for i in range(12):
            for j in range(12):
                if i != j and scene[i] == scene[j] and (pred[k, i] - pred[k, j]).norm(dim=-1).min() < 0.2:
                    expected[k, i] = True
    assert torch.equal(agents, expected)
    for column, name in enumerate((2, 5, 7, 9)):
        assert torch.equal(scenes[:, column], expected[:, scene == name].any(dim=1))


def test_leaving_the_field_is_counted_per_forecast() -> None:
    pred = torch.zeros(4, 1, 3, 2)
    pred[0, 0, 1, 0] = 11
    assert float(metrics.outside(pred, (0, 0, 10, 5))) == 0.25


def test_calibrated_forecasts_cover_what_they_claim_and_narrow_ones_do_not() -> None:
    generator = torch.Generator().manual_seed(2)
    truth = torch.randn(2000, 2, 2, generator=generator)
    pred = torch.randn(50, 2000, 2, 2, generator=generator)
    levels = torch.tensor([0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(metrics.coverage(pred, truth, levels), levels, rtol=0, atol=0.035)
    assert (metrics.coverage(pred * 0.3, truth, levels) < levels - 0.15).all()


def test_reliability_finds_right_and_wrong_probabilities() -> None:
    generator = torch.Generator().manual_seed(3)
    share = torch.rand(4, 20_000, generator=generator).softmax(dim=0).double()
    which = torch.multinomial(share.T, 1, generator=generator)[:, 0]
    pred = torch.arange(4.0)[:, None, None, None].expand(4, 20_000, 1, 2).contiguous()
    truth = pred[which, torch.arange(20_000)]
    assert metrics.reliability(pred, truth, share).error < 0.02
    assert metrics.reliability(pred, truth, share.flip(0)).error > 0.02
    assert float(metrics.reliability(pred, truth, share).num_forecasts.sum()) == 80_000


def test_conformal_radii_hold_for_new_agents() -> None:
    generator = torch.Generator().manual_seed(4)
    pred, truth = torch.randn(5, 4000, 3, 2, generator=generator), torch.randn(4000, 3, 2, generator=generator) * 3
    radii = metrics.conformal_radii(pred[:, :2000], truth[:2000], 0.9)
    inside = (pred[:, 2000:] - truth[2000:]).norm(dim=-1).min(dim=0).values <= radii
    torch.testing.assert_close(inside.float().mean(dim=0), torch.full((3,), 0.9), rtol=0, atol=0.03)
    assert metrics.conformal_radii(pred[:, :5], truth[:5], 0.9).isinf().all()


def test_the_bootstrap_resamples_scenes_not_agents() -> None:
    generator = torch.Generator().manual_seed(5)
    scene = torch.arange(40).repeat_interleave(50)
    values = torch.randn(40, generator=generator).repeat_interleave(50)
    found = metrics.bootstrap(values, scene)
    assert found == metrics.bootstrap(values, scene)
    assert found.mean == pytest.approx(float(values.double().mean()))
    error = float(values[::50].std()) / 40**0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    single = metrics.bootstrap(torch.cat([values, torch.tensor([torch.nan])]), torch.cat([scene, torch.tensor([99])]))
    assert single.mean == pytest.approx(found.mean)


def test_wrong_shapes_and_horizons_are_refused() -> None:
    with pytest.raises(ValueError, match="expected forecasts"):
        metrics.min_ade(torch.zeros(2, 3, 4, 2), torch.zeros(3, 5, 2))
    with pytest.raises(ValueError, match="horizon must be"):
        metrics.min_ade(torch.zeros(2, 3, 4, 2), torch.zeros(3, 4, 2), horizon=5)
