"""Statistics read from running networks, against sums done by hand, brute force and the reference arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.merging.collector import collect
from tests.conftest import reference


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(7, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(self.act(self.first(x))))
        return out


def double(module: nn.Module, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    for value in module.parameters():
        nn.init.normal_(value, std=0.5)
    return module.double()


def rows_gram(rows: Tensor) -> Tensor:
    return rows.T @ rows


# ---- Gram matrices


def test_gram_is_the_sum_of_outer_products_of_the_inputs_whatever_the_batches() -> None:
    net, x = double(Mlp()), torch.randn(10, 5, dtype=torch.float64)
    hidden = net.first(x).relu()
    for size in (1, 3, 10):
        found = collect(net, x.split(size))
        torch.testing.assert_close(found.sum("gram", "first.weight").total, rows_gram(x))
        torch.testing.assert_close(found.sum("gram", "last.weight").total, rows_gram(hidden))
        assert found.sum("gram", "last.weight").num_samples == 10
        assert found.sum("gram", "last.weight").num_rows == 10


def test_tokens_are_rows_and_padding_is_left_out() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 4)
            self.token = nn.Linear(4, 6)
            self.pooled = nn.Linear(6, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.token(self.table(input_ids)) * attention_mask.unsqueeze(-1)
            out: Tensor = self.pooled(h.sum(1))
            return out

    net = double(Text())
    ids = torch.randint(0, 11, (3, 5))
    mask = (torch.arange(5) < torch.tensor([[5], [2], [3]])).long()
    found = collect(net, [{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(found.sum("gram", "token.weight").total, rows_gram(net.table(ids)[mask.bool()]))
    assert found.sum("gram", "token.weight").num_rows == 10
    assert found.sum("gram", "pooled.weight").num_rows == 3
    everything = collect(net, [{"input_ids": ids, "attention_mask": mask}], row_mask=lambda batch: None)
    assert everything.sum("gram", "token.weight").num_rows == 15


def test_batches_may_be_tensors_pairs_or_dicts() -> None:
    net, x = double(Mlp()), torch.randn(4, 5, dtype=torch.float64)
    expected = collect(net, [x]).sum("gram", "last.weight").total
    for batch in ((x, torch.zeros(4)), [x, torch.zeros(4)], {"x": x}):
        assert torch.equal(collect(net, [batch]).sum("gram", "last.weight").total, expected)
    doubled = collect(net, [x], forward=lambda module, batch: module(2 * batch)).sum("gram", "first.weight").total
    torch.testing.assert_close(doubled, 4 * rows_gram(x))


def test_half_precision_inputs_neither_overflow_nor_lose_digits() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False)).half()
    x = 300 * torch.randn(9000, 3).half()  # the largest half is 65504
    found = collect(net, [x]).sum("gram", "0.weight").total
    assert found.dtype == torch.float64
    expected = rows_gram(x.double())
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_only_matching_parameters_are_collected_and_the_diagonal_alone_if_asked() -> None:
    net, x = double(Mlp()), torch.randn(6, 5, dtype=torch.float64)
    found = collect(net, [x], parameters=["last.*"], diagonal=True)
    assert list(found) == [("gram", "last.weight")]
    torch.testing.assert_close(found.sum("gram", "last.weight").total, net.first(x).relu().square().sum(0))
    with pytest.raises(UserError, match="lost"):
        collect(net, [x], parameters=["lost.*"])


def test_a_layer_that_runs_twice_adds_both_inputs_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.fc(x))
            return out

    net, x = double(Twice()), torch.randn(6, 4, dtype=torch.float64)
    found = collect(net, [x]).sum("gram", "fc.weight")
    torch.testing.assert_close(found.total, rows_gram(torch.cat([x, net.fc(x)])))
    assert (found.num_samples, found.num_rows) == (6, 12)


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_the_gram_of_a_convolution_is_that_of_its_patches(padding: Any) -> None:
    conv = double(nn.Conv2d(2, 3, 3, padding=padding, padding_mode="zeros" if padding != 1 else "reflect"))
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    net = nn.Sequential(conv)
    gram = collect(net, [x], conv=True).mean("gram", "0.weight")
    weight = conv.weight.detach().reshape(3, -1)
    response = (conv(x) - conv.bias.reshape(1, -1, 1, 1)).detach()
    energy = response.square().sum() / (response.numel() / 3)
    torch.testing.assert_close((weight @ gram @ weight.T).trace(), energy)  # mean |W a|^2 over patches a


@pytest.mark.parametrize("batch_first", [True, False])
def test_both_projections_of_multi_head_attention_have_a_gram(batch_first: bool) -> None:
    attention = double(nn.MultiheadAttention(8, 2, batch_first=batch_first))
    plain = torch.randn(3, 4, 8, dtype=torch.float64)

    def forward(module: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = module(batch, batch, batch)[0]
        return out

    found = collect(attention, [plain], forward=forward)
    torch.testing.assert_close(found.sum("gram", "in_proj_weight").total, rows_gram(plain.reshape(-1, 8)))
    out_weight, out_bias = attention.out_proj.weight.detach(), attention.out_proj.bias.detach()
    response = forward(attention, plain).detach().reshape(-1, 8) - out_bias
    context = torch.linalg.solve(out_weight, response.T).T
    torch.testing.assert_close(found.sum("gram", "out_proj.weight").total, rows_gram(context))


def test_cross_attention_has_no_single_gram_for_its_fused_projection(caplog: pytest.LogCaptureFixture) -> None:
    attention = double(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    found = collect(attention, [x], forward=lambda module, batch: module(batch, 2 * batch, batch)[0])
    assert found.names("gram") == ["out_proj.weight"]
    assert "in_proj_weight" in caplog.text


def test_the_fast_path_of_pytorch_transformers_does_not_bypass_the_hooks() -> None:
    layer = double(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    found = collect(layer, [torch.randn(3, 4, 8, dtype=torch.float64)])
    assert set(found.names("gram")) == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }


def test_an_output_layer_tied_to_the_embedding_has_no_gram() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.middle = nn.Linear(4, 4)
            self.out = nn.Linear(4, 9, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.middle(self.table(x)))
            return out

    assert collect(double(Tied()), [torch.randint(0, 9, (2, 3))]).names("gram") == ["middle.weight"]


def test_the_network_comes_back_as_it_was_even_after_an_error() -> None:
    net = double(Mlp()).train()
    net.act.eval()
    weights = {name: value.clone() for name, value in net.state_dict().items()}

    def broken(module: nn.Module, batch: Tensor) -> Tensor:
        module(batch)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        collect(net, [torch.randn(2, 5).double()], kinds=("gram", "fisher"), forward=broken)
    collect(net, [torch.randn(2, 5).double()], kinds=("gram", "fisher"))
    assert net.training
    assert not net.act.training
    assert net.drop.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert all(value.grad is None and value.requires_grad for value in net.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_no_batches_and_no_linear_layers_are_user_errors() -> None:
    with pytest.raises(UserError, match="no batches"):
        collect(double(Mlp()), [])
    with pytest.raises(UserError, match="no linear layer"):
        collect(nn.Sequential(nn.LayerNorm(3)), [torch.randn(2, 3)])
    with pytest.raises(ValueError, match="kinds"):
        collect(double(Mlp()), [], kinds=("hessian",))  # type: ignore[arg-type]


# ---- diagonal Fisher


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.act = nn.ReLU(inplace=True)
        self.position = nn.Parameter(torch.zeros(9, 4))
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.token = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.conv(x)).flatten(2).transpose(1, 2) + self.position
        h = self.norm(h)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        out: Tensor = self.head(self.token(h).tanh().mean(1))
        return out


class Shared(nn.Module):
    """An embedding table that is also the output layer, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.fc = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.fc(self.fc(self.table(x)).tanh()).mean(1))
        return out


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4, padding_idx=0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(x).tanh().mean(1))
        return out


def brute_force(net: nn.Module, x: Tensor, weigh: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
    """Sum of squared gradients of log p_y for every sample and class, times ``weigh(p, sample)[y]``."""
    names = [name for name, _ in net.named_parameters()]
    values = [net.get_parameter(name) for name in names]
    totals = {name: torch.zeros_like(value) for name, value in zip(names, values, strict=True)}
    net.eval()
    for index in range(len(x)):
        log_p = net(x[index : index + 1]).log_softmax(1)[0]
        weight = weigh(log_p.exp().detach(), index)
        for label in range(len(log_p)):
            grads = torch.autograd.grad(log_p[label], values, retain_graph=True, allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    totals[name] += weight[label] * grad**2
    return totals


NETWORKS: list[tuple[type[nn.Module], Callable[[], Tensor]]] = [
    (Mlp, lambda: torch.randn(5, 5, dtype=torch.float64)),
    (Vision, lambda: torch.randn(4, 2, 6, 6, dtype=torch.float64)),
    (Words, lambda: torch.randint(0, 8, (5, 7))),
    (Shared, lambda: torch.randint(0, 6, (5, 4))),
]


@pytest.mark.parametrize(("network", "inputs"), NETWORKS)
def test_the_exact_fisher_is_the_expected_squared_gradient_of_every_sample(
    network: type[nn.Module], inputs: Callable[[], Tensor]
) -> None:
    net = double(network())
    x = inputs()
    found = collect(net, x.split(3), kinds=("fisher",))
    expected = brute_force(net, x, lambda p, index: p)
    assert set(found.names("fisher")) == set(expected)
    for name, value in expected.items():
        entry = found.sum("fisher", name)
        torch.testing.assert_close(entry.total, value, rtol=1e-9, atol=1e-14, msg=lambda text, n=name: f"{n}: {text}")
        assert entry.num_samples == len(x)


@pytest.mark.parametrize(("network", "inputs"), NETWORKS[:2])
def test_the_empirical_fisher_takes_the_labels(network: type[nn.Module], inputs: Callable[[], Tensor]) -> None:
    net = double(network())
    x = inputs()
    y = torch.arange(len(x)) % 3
    found = collect(net, [(x[:2], y[:2]), (x[2:], y[2:])], kinds=("fisher",), fisher="empirical")
    expected = brute_force(net, x, lambda p, index: F.one_hot(y[index], 3).double())
    for name, value in expected.items():
        torch.testing.assert_close(found.sum("fisher", name).total, value, rtol=1e-9, atol=1e-14)
    with pytest.raises(UserError, match="labels"):
        collect(net, [x], kinds=("fisher",), fisher="empirical")


def test_sampled_labels_approach_the_exact_fisher_and_repeat_with_the_seed() -> None:
    net, x = double(Mlp()), torch.randn(4, 5, dtype=torch.float64)
    exact = collect(net, [x], kinds=("fisher",)).mean("fisher", "last.weight")
    drawn = [collect(net, [x], kinds=("fisher",), fisher="sampled", num_draws=4000, seed=s) for s in (0, 0, 1)]
    sampled = [statistics.mean("fisher", "last.weight") for statistics in drawn]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    assert float((sampled[0] - exact).norm() / exact.norm()) < 0.05


def test_the_fisher_of_softmax_regression_is_known_in_closed_form() -> None:
    net = double(nn.Sequential(nn.Linear(4, 3)))
    x = torch.randn(6, 4, dtype=torch.float64)
    p = net(x).softmax(1).detach()
    expected = torch.einsum("nk,nd->kd", p * (1 - p), x**2)
    torch.testing.assert_close(collect(net, [x], kinds=("fisher",)).sum("fisher", "0.weight").total, expected)


def test_the_fisher_agrees_with_the_reference_arrays() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Linear(4, 5, bias=False)
            self.w2 = nn.Linear(5, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.w2(self.w1(x).tanh().mean(1))
            return out

    arrays = {key: torch.from_numpy(value) for key, value in reference("merging-ita-iel/analytic").items()}
    net = Tokens().double()
    net.load_state_dict({"w1.weight": arrays["fisher_W1"], "w2.weight": arrays["fisher_W2"]})
    found = collect(net, arrays["fisher_X"].split(4), kinds=("fisher",))
    torch.testing.assert_close(found.mean("fisher", "w1.weight"), arrays["fisher_F1_mean"], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.mean("fisher", "w2.weight"), arrays["fisher_F2_mean"], rtol=1e-10, atol=1e-14)


def test_frozen_networks_have_a_fisher_too() -> None:
    net, x = double(Mlp()), torch.randn(4, 5, dtype=torch.float64)
    expected = collect(net, [x], kinds=("fisher",)).sum("fisher", "first.weight").total
    net.requires_grad_(False)
    found = collect(net, [x], kinds=("fisher",)).sum("fisher", "first.weight").total
    torch.testing.assert_close(found, expected)


def test_an_output_that_is_no_matrix_of_logits_is_a_user_error() -> None:
    net = double(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(UserError, match=r"\[2, 5, 3\]"):
        collect(net, [torch.randn(2, 5, 4, dtype=torch.float64)], kinds=("fisher",))


def test_as_many_tokens_as_samples_are_told_apart_by_another_batch_or_by_the_user() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x.transpose(0, 1)).tanh().mean(0)
            return out

    net, x = double(SequenceFirst()), torch.randn(8, 5, 4, dtype=torch.float64)
    expected = brute_force(net, x, lambda p, index: p)["fc.weight"]
    found = collect(net, [x[:3], x[3:]], kinds=("fisher",)).sum("fisher", "fc.weight").total
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="which axis is which"):
        collect(net, [x[3:], x[:3]], kinds=("fisher",))
    given = collect(net, [x[3:], x[:3]], kinds=("fisher",), batch_first=False).sum("fisher", "fc.weight").total
    torch.testing.assert_close(given, expected)


# ---- Kronecker factors


class ClassToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, r, c = x.shape
        q, k, v = self.qkv(x).reshape(b, r, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5).softmax(-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(b, r, c))
        return out


class Mixing(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        out: Tensor = self.c_proj(h * torch.sigmoid(1.702 * h))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = Mixing(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token_layer = ClassToken(6)
        self.ln_pre, self.ln_post = nn.LayerNorm(6), nn.LayerNorm(6)
        self.blk = Block(6, 2, 10)
        self.lin_proj = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blk(self.ln_pre(self.cls_token_layer(x)))
        return F.normalize(self.lin_proj(self.ln_post(h[:, 0])), dim=-1)


@pytest.fixture(scope="module")
def kfac_case() -> tuple[Encoder, dict[str, Tensor]]:
    arrays = {key.removeprefix("x/"): torch.as_tensor(v) for key, v in reference("merging-tak-kfac/kfac").items()}
    net = Encoder().double()
    prefix = "theta0/"
    net.load_state_dict({key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)})
    return net, arrays


@pytest.mark.parametrize("task", [0, 1, 2])
@pytest.mark.parametrize("draws", [0, 1, 2])
def test_kronecker_factors_agree_with_the_reference(
    kfac_case: tuple[Encoder, dict[str, Tensor]], task: int, draws: int
) -> None:
    net, arrays = kfac_case
    probes = arrays[f"task{task}/probes_S{draws}"] if draws else None
    batches = arrays[f"task{task}/X"].split(5)
    found = collect(net, batches, kinds=("kfac",), num_probes=draws, probes=probes)
    compared = 0
    for kind, label in (("kfac_a", "aaT_sum"), ("kfac_b", f"ggT_sum_S{draws}"), ("block", f"ffT_sum_S{draws}")):
        prefix = f"task{task}/{label}/"
        names = {key.removeprefix(prefix) for key in arrays if key.startswith(prefix)}
        assert names == set(found.names(kind))
        for name in names:
            # the reference adds draws up, ours averages them
            scale = max(1, draws) if kind != "kfac_a" else 1
            entry = found.sum(kind, name)
            torch.testing.assert_close(scale * entry.total, arrays[prefix + name], rtol=0, atol=1e-9)
            assert entry.num_samples == 12
            compared += 1
    assert compared == 5 + 5 + 9


def test_dense_blocks_measure_the_drift_of_the_features_exactly(kfac_case: tuple[Encoder, dict[str, Tensor]]) -> None:
    net, arrays = kfac_case
    batches = torch.cat([arrays["task1/X"], arrays["task2/X"]]).split(7)
    found = collect(net, batches, kinds=("kfac",), num_probes=0)
    for name in found.names("block"):
        delta = arrays[f"delta/{name}"]
        drift = delta @ found.mean("block", name) @ delta
        torch.testing.assert_close(drift, arrays[f"exact_drift_block/{name}"], rtol=1e-9, atol=0)


def test_a_linear_map_has_exact_factors() -> None:
    net = double(nn.Sequential(nn.Linear(4, 3)))
    x = torch.randn(20, 4, dtype=torch.float64)
    found = collect(net, [x], kinds=("kfac",), num_probes=0)
    change = torch.randn(3, 5, dtype=torch.float64)
    a, b = found.mean("kfac_a", "0.weight"), found.mean("kfac_b", "0.weight")
    drift = (torch.cat([x, torch.ones(20, 1).double()], 1) @ change.T).square().sum(1).mean()
    torch.testing.assert_close(b, torch.eye(3).double())
    torch.testing.assert_close((b @ change @ a @ change.T).trace(), drift)


def test_probes_approach_the_exact_factor_and_half_data_sets_add_up(
    kfac_case: tuple[Encoder, dict[str, Tensor]],
) -> None:
    net, arrays = kfac_case
    x = arrays["task0/X"]
    exact = collect(net, [x], kinds=("kfac",), num_probes=0)
    halves = collect(net, [x[:6]], kinds=("kfac",), num_probes=0) + collect(net, [x[6:]], kinds=("kfac",), num_probes=0)
    many = collect(net, [x], kinds=("kfac",), num_probes=600, parameters=["lin_proj.weight"])
    for kind, name in exact:
        torch.testing.assert_close(halves.mean(kind, name), exact.mean(kind, name))
        assert float(torch.linalg.eigvalsh(exact.mean(kind, name)).min()) > -1e-12
    name = "lin_proj.weight"
    error = (many.mean("kfac_b", name) - exact.mean("kfac_b", name)).norm() / exact.mean("kfac_b", name).norm()
    assert float(error) < 0.05


def test_padding_counts_neither_in_the_factors_nor_in_the_number_of_rows() -> None:
    net = double(nn.Sequential(nn.Linear(4, 3)))

    def forward(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        kept = batch["attention_mask"].unsqueeze(-1).double()
        return (module(batch["x"]) * kept).sum(1)

    x = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([[5], [2], [3]])).long()
    found = collect(net, [{"x": x, "attention_mask": mask}], kinds=("kfac",), forward=forward, num_probes=0)
    ones = torch.cat([x, torch.ones(3, 5, 1).double()], 2)
    expected = sum(rows_gram(own[keep.bool()]) / keep.sum() for own, keep in zip(ones, mask, strict=True))
    torch.testing.assert_close(found.sum("kfac_a", "0.weight").total, expected)
    assert found.sum("kfac_a", "0.weight").num_rows == 10
