"""Diffusion over codes against exact posteriors, the released numbers, diffusers, and its own definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurocl.trajectory.diffusion import MaskReplaceDiffusion, guided
from tests.conftest import reference

LINEAR = ["diffusion_K16_T100_linear", "diffusion_K64_T50_linear", "diffusion_K8_T20_linear"]
ALL = [*LINEAR, "diffusion_K16_T100_cosine"]


def load(name: str) -> tuple[MaskReplaceDiffusion, dict[str, Any]]:
    case = {key: torch.from_numpy(value) for key, value in reference(f"trajectory/{name}").items()}
    schedule: Any = name.rpartition("_")[2]
    return MaskReplaceDiffusion(int(case["K"]), int(case["T"]), schedule), case


def belief(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    p: Tensor = case["logits"].to(dtype).softmax(dim=1).transpose(1, 2)
    return p


@pytest.mark.parametrize("name", ALL)
def test_schedules_are_those_of_the_reference(name: str) -> None:
    process, case = load(name)
    # The cosine tables of the reference were made in single precision.
    tolerance = 1e-5 if name.endswith("cosine") else 1e-12
    for ours, key in ((process.keep, "att"), (process.replace, "btt"), (process.mask, "ctt")):
        torch.testing.assert_close(ours, case[key].roll(1), rtol=0, atol=tolerance)
    for ours, key in zip(process.one_step(), ("at", "bt", "ct"), strict=True):
        torch.testing.assert_close(ours, case[key], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", LINEAR)
def test_forward_probabilities_are_those_of_the_reference(name: str) -> None:
    process, case = load(name)
    ours = process.marginal(case["x0"], case["t"][:, None]).transpose(1, 2)
    torch.testing.assert_close(ours, case["log_q_xt_given_x0"].double().exp(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_posteriors_over_one_step_and_many_are_those_of_exact_matrices(name: str, dtype: torch.dtype) -> None:
    process, case = load(name)
    for table, key in (("keep", "att"), ("replace", "btt"), ("mask", "ctt")):
        setattr(process, table, case[key].roll(1))
    t, s = case["t"][:, None], case["stride_target_index"][:, None]
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    for target, key in ((t - 1, "posterior_prob_exact"), (s, "posterior_strided_prob")):
        ours = process.posterior(case["xt"], belief(case, dtype), t, target).transpose(1, 2).double()
        torch.testing.assert_close(ours, case[key], rtol=0, atol=tolerance)
        torch.testing.assert_close(ours.sum(dim=1), torch.ones_like(ours[:, 0]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", LINEAR)
def test_posteriors_and_losses_agree_with_the_released_code(name: str) -> None:
    process, case = load(name)
    t, p = case["t"][:, None], belief(case, torch.float32)
    model = process.posterior(case["xt"], p, t, t - 1).transpose(1, 2)
    torch.testing.assert_close(model, case["log_posterior_model"].exp(), rtol=0, atol=1e-5)
    clean = nn.functional.one_hot(case["x0"], process.num_codes).float()
    true = process.posterior(case["xt"], clean, t, t - 1).transpose(1, 2)
    torch.testing.assert_close(true, case["log_posterior_true"].exp(), rtol=0, atol=1e-5)
    variational, cross_entropy = process.terms(case["logits"].double().transpose(1, 2), case["x0"], case["xt"], t)
    torch.testing.assert_close(cross_entropy.float(), case["kl_aux_per_token"], rtol=1e-5, atol=1e-5)
    expected = torch.where(t == 0, case["nll_per_token"], case["kl_per_token"])
    torch.testing.assert_close(variational.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_posterior_agrees_with_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    process, case = load(name)
    scheduler = diffusers.VQDiffusionScheduler(process.num_codes + 1, process.num_steps)
    log_p = case["logits"].log_softmax(dim=1)
    for row, t in enumerate(case["t"].tolist()):
        if t == 0:
            continue
        theirs = scheduler.q_posterior(log_p[row : row + 1], case["xt"][row : row + 1], t).exp()
        ours = process.posterior(
            case["xt"][row : row + 1], log_p[row : row + 1].exp().transpose(1, 2), torch.tensor(t), torch.tensor(t - 1)
        )
        torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("num_codes", "num_steps"), [(5, 12), (16, 100)])
@pytest.mark.parametrize(("late", "early"), [(1.0, 0.4), (0.7, 0.65), (0.5, -1.0), (0.1, 0.0)])
def test_posterior_is_the_bayes_rule_written_with_matrices(
    schedule: Any, num_codes: int, num_steps: int, late: float, early: float
) -> None:
    process = MaskReplaceDiffusion(num_codes, num_steps, schedule)
    t, s = round(late * (num_steps - 1)), max(-1, round(early * (num_steps - 1)))

    def matrix(keep: Tensor, replace: Tensor, mask: Tensor) -> Tensor:
        full = torch.zeros(num_codes + 1, num_codes + 1, dtype=torch.float64)
        full[:-1, :-1] = keep * torch.eye(num_codes, dtype=torch.float64) + replace
        full[:-1, -1], full[-1, -1] = mask, 1
        return full

    def product(first: int, last: int) -> Tensor:
        total = torch.eye(num_codes + 1, dtype=torch.float64)
        for step in range(first, last + 1):
            total = total @ matrix(*(table[step] for table in process.one_step()))
        return total

    to_s, onward, to_t = product(0, s), product(s + 1, t), product(0, t)
    codes = torch.arange(num_codes)
    torch.testing.assert_close(process.marginal(codes, torch.tensor(t)), to_t[:-1], rtol=0, atol=1e-12)
    p = torch.rand(num_codes + 1, num_codes, dtype=torch.float64).softmax(dim=-1)
    # joint[i, k, j] = p(x_0 = k) q(x_s = j | k) q(x_t = i | x_s = j) / q(x_t = i | k)
    joint = p[:, :, None] * to_s[None, :-1] * onward.T[:, None] / to_t[:-1].T[:, :, None]
    ours = process.posterior(torch.arange(num_codes + 1), p, torch.tensor(t), torch.tensor(s))
    torch.testing.assert_close(ours, joint.sum(dim=1), rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.sum(dim=-1), torch.ones(num_codes + 1, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t", [0, 7, 19])
def test_corrupted_tokens_follow_the_marginal(schedule: Any, t: int) -> None:
    process = MaskReplaceDiffusion(4, 20, schedule)
    count = 200_000
    x_t = process.corrupt(torch.full((count,), 2), torch.tensor(t), torch.Generator().manual_seed(t))
    expected = process.marginal(torch.tensor(2), torch.tensor(t)) * count
    seen = torch.bincount(x_t, minlength=5).double()
    large = expected > 5
    statistic = ((seen - expected)[large].square() / expected[large]).sum()
    assert float(statistic) < 20  # 99.9 % of chi-square with 4 degrees of freedom is below 18.5
    assert int(seen[~large].sum()) < 20


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("t", "s"), [(19, 12), (12, 11), (6, -1), (1, 0)])
@pytest.mark.parametrize("token", [1, 4])
def test_drawing_step_by_step_follows_the_posterior(schedule: Any, t: int, s: int, token: int) -> None:
    process = MaskReplaceDiffusion(4, 20, schedule)
    p = torch.tensor([0.05, 0.15, 0.2, 0.6], dtype=torch.float64)
    times = torch.tensor(t), torch.tensor(s)
    count = 200_000
    drawn = process.draw_earlier(
        torch.full((count,), token), p[None].expand(count, -1), *times, torch.Generator().manual_seed(0)
    )
    expected = process.posterior(torch.tensor(token), p, *times) * count
    seen = torch.bincount(drawn, minlength=5).double()
    large = expected > 5
    assert float(((seen - expected)[large].square() / expected[large]).sum()) < 20
    assert int(seen[~large].sum()) < 20


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_a_perfect_denoiser_recovers_the_codes(schedule: Any, steps: int) -> None:
    process = MaskReplaceDiffusion(16, 100, schedule)
    clean = torch.randint(0, 16, (1, 2, 3, 12))
    logits = nn.functional.one_hot(clean, 16) * 200.0
    drawn = process.sample(lambda x, t: logits.expand(len(x), -1, -1, -1, -1), (4, 2, 3, 12), steps=steps)
    assert torch.equal(drawn, clean.expand(4, -1, -1, -1))
    unmasked = process.unmask(lambda x, t: logits.expand(len(x), -1, -1, -1, -1), (4, 2, 3, 12), steps=min(steps, 8))
    assert torch.equal(unmasked, clean.expand(4, -1, -1, -1))


def fixed_logits(num_codes: int, generator: torch.Generator) -> Tensor:
    return torch.randn(1, 1, 2, 6, num_codes, generator=generator)


@pytest.mark.parametrize("method", ["sample", "unmask"])
def test_samplers_are_seeded_and_leave_no_mask(method: str) -> None:
    process = MaskReplaceDiffusion(8, 50)
    logits = fixed_logits(8, torch.Generator().manual_seed(1))
    first, again, other = (
        getattr(process, method)(
            lambda x, t: logits.expand(len(x), -1, -1, -1, -1),
            (50, 1, 2, 6),
            steps=5,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert int(first.max()) < 8
    assert int(first.min()) >= 0


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_samples_follow_a_denoiser_that_does_not_look(steps: int) -> None:
    process = MaskReplaceDiffusion(6, 50)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.0]).expand(1, 1, 1, 1, -1)
    drawn = process.sample(
        lambda x, t: logits.expand(*x.shape, -1), (100_000, 1, 1, 1), steps=steps, generator=torch.Generator()
    )
    expected = logits.flatten().softmax(dim=0).double() * 100_000
    seen = torch.bincount(drawn.flatten(), minlength=6).double()
    # A belief that ignores the token also re-draws tokens already set, which does not change their distribution.
    assert float(((seen - expected).square() / expected).sum()) < 25


@pytest.mark.parametrize("method", ["sample", "unmask"])
def test_given_codes_stay_in_every_sample(method: str) -> None:
    process = MaskReplaceDiffusion(8, 50)
    prefix = torch.tensor([[[3, 1, -1, 7], [0, -1, -1, 2]]])
    drawn = getattr(process, method)(
        lambda x, t: torch.zeros(*x.shape, 8), (20, 1, 2, 6), steps=4, prefix=prefix, generator=torch.Generator()
    )
    assert (drawn[..., :4] == prefix)[:, prefix >= 0].all()
    assert len(drawn[:, 0, 0, 2].unique()) > 1
    with pytest.raises(ValueError, match="does not fit"):
        process.sample(lambda x, t: x, (20, 1, 2, 3), prefix=prefix)


def test_temperature_zero_and_a_small_top_p_take_the_likeliest_code() -> None:
    process = MaskReplaceDiffusion(8, 50)
    logits = fixed_logits(8, torch.Generator().manual_seed(2))
    best = logits.argmax(dim=-1).expand(10, -1, -1, -1)
    for options in ({"temperature": 0.0}, {"top_p": 1e-6}):
        drawn = process.sample(lambda x, t: logits.expand(len(x), -1, -1, -1, -1), (10, 1, 2, 6), steps=1, **options)
        assert torch.equal(drawn, best)


def test_times_run_from_the_last_to_the_first_and_cover_all_when_asked() -> None:
    process = MaskReplaceDiffusion(4, 100)
    assert process.times(100) == list(range(99, -1, -1))
    assert process.times(1) == [99]
    for steps in (2, 5, 10, 25, 50):
        times = process.times(steps)
        assert len(set(times)) == steps
        assert times[0] == 99
        assert times[-1] == 0
    with pytest.raises(ValueError, match="between 1 and 100"):
        process.times(101)


def test_the_first_step_sees_one_sample_only() -> None:
    seen = []
    process = MaskReplaceDiffusion(4, 10)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.zeros(*x.shape, 4)

    process.sample(denoise, (7, 1, 1, 3), steps=3)
    assert seen == [1, 7, 7]


def test_important_times_are_drawn_more_often_and_the_record_is_saved() -> None:
    process = MaskReplaceDiffusion(4, 10)
    t, probability = process.draw_times((1000,), torch.Generator().manual_seed(0))
    assert torch.equal(probability, torch.full_like(probability, 0.1))
    everything = torch.arange(10).repeat(11)
    process.record(everything, torch.where(everything == 7, 10.0, 1.0))
    t, probability = process.draw_times((20_000,), torch.Generator().manual_seed(0))
    share = torch.bincount(t, minlength=10) / 20_000
    mean = 0.1 * torch.where(torch.arange(10) == 7, 100.0, 1.0)
    expected = torch.sqrt(mean + 1e-10) + 1e-4
    torch.testing.assert_close(share.double(), (expected / expected.sum()).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(probability, (expected / expected.sum()).double()[t], rtol=1e-6, atol=0)
    other = MaskReplaceDiffusion(4, 10)
    other.load_state_dict(process.state_dict())
    assert torch.equal(
        other.draw_times((50,), torch.Generator().manual_seed(3))[0],
        process.draw_times((50,), torch.Generator().manual_seed(3))[0],
    )


def test_agents_that_do_not_count_change_neither_loss_nor_record() -> None:
    process, other = MaskReplaceDiffusion(4, 10), MaskReplaceDiffusion(4, 10)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 4, (3, 2, 5), generator=generator)
    t, probability = process.draw_times((3, 2), generator)
    x_t = process.corrupt(x0, t[..., None], generator)
    logits = torch.randn(3, 2, 5, 4, generator=generator)
    mask = torch.tensor([[True, False]] * 3)
    spoilt = torch.where(mask[..., None, None], logits, 50 * logits)
    for kind in ("kl", "weighted_ce"):
        first = process.loss(logits, x0, x_t, t, probability, kind=kind, mask=mask)  # type: ignore[arg-type]
        second = other.loss(spoilt, x0, x_t, t, probability, kind=kind, mask=mask)  # type: ignore[arg-type]
        assert float(first) == pytest.approx(float(second))
        assert torch.equal(process.loss_mean, other.loss_mean)


def test_both_losses_estimate_the_same_bound_when_replacement_is_rare() -> None:
    process = MaskReplaceDiffusion(4, 100)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 4, (4000, 1, 6), generator=generator)
    # A denoiser that knows what a token shows, and otherwise believes the same everywhere.
    unknown = torch.tensor([0.5, 0.0, -0.5, 1.0]).log_softmax(dim=0)
    values = {}
    for kind in ("kl", "weighted_ce"):
        t = torch.randint(0, 100, (4000, 1), generator=torch.Generator().manual_seed(1))
        x_t = process.corrupt(x0, t[..., None], torch.Generator().manual_seed(2))
        shown = nn.functional.one_hot(x_t.clamp(max=3), 4) * 60.0
        logits = torch.where((x_t == 4)[..., None], unknown, shown)
        share = torch.full((4000, 1), 0.01, dtype=torch.float64)
        values[kind] = float(process.loss(logits, x0, x_t, t, share, kind=kind, record=False))  # type: ignore[arg-type]
    assert values["kl"] == pytest.approx(values["weighted_ce"], rel=0.02)
    assert values["kl"] == pytest.approx(float(-unknown.mean()) * 1.07, rel=0.1)


@pytest.mark.parametrize("kind", ["kl", "weighted_ce"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_training_learns_the_distribution_of_codes(kind: Any, schedule: Any) -> None:
    process = MaskReplaceDiffusion(4, 20, schedule)
    table = nn.Parameter(torch.zeros(5, 4))
    optimizer = torch.optim.Adam([table], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor([0.6, 0.3, 0.1, 0.0])
    losses = []
    for _ in range(120):
        x0 = torch.multinomial(share.expand(256, -1), 4, replacement=True, generator=generator)[:, None]
        loss = process.training_loss(lambda x, t: table[x], x0, kind=kind, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    torch.testing.assert_close(table[4].softmax(dim=0).detach(), share, rtol=0, atol=0.1)


def test_guidance_of_zero_changes_nothing_and_more_pushes_away() -> None:
    x, t = torch.zeros(1), torch.tensor(0)
    with_past, without = (lambda x, t: torch.tensor([2.0, 1.0])), (lambda x, t: torch.tensor([1.0, 1.0]))
    assert torch.equal(guided(with_past, without, 0.0)(x, t), torch.tensor([2.0, 1.0]))
    assert torch.equal(guided(with_past, without, 2.0)(x, t), torch.tensor([4.0, 1.0]))
