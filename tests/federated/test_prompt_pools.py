"""L2P, DualPrompt and CODA-Prompt: what is chosen for whom, what learns, and what stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neurocl.backbones.vit import VisionTransformer, VitConfig
from neurocl.errors import UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.coda_prompt import CodaPromptConfig, ComponentPool, orthonormal_rows
from neurocl.federated.dualprompt import DualPromptConfig, DualPrompts
from neurocl.federated.exchange import client_of
from neurocl.federated.l2p import L2pConfig, NearestPrompts
from neurocl.federated.method import Phase, Place
from neurocl.federated.prompt_pool import Choice, Pool, PoolMethod, PromptedTransformer, Sizes, prompted_of
from neurocl.federated.prompts import PrefixAttention, prefixed
from tests.federated.small_problem import config, in_memory

POOLED = ("l2p", "dualprompt", "coda-prompt")
SIZES = Sizes(query=12, width=8, depth=3, tasks=2, scale=1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_transformer() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(VitConfig(input_shape=(5, 7), width=8, depth=3, heads=2, embed_dim=6)).double()


def a_method(name: str, backbone: str = "vit", **options: Any) -> PoolMethod:
    found = method_for(problem_for(config(method=name, backbone=backbone, options=options)))
    assert isinstance(found, PoolMethod)
    return found


class Fixed(Pool):
    """A pool that chooses what it is told to."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice

    def forward(self, query: torch.Tensor) -> Choice:
        self.query = query
        return self.choice


# the transformer


def test_without_prompts_the_transformer_is_itself_and_the_query_its_class_token() -> None:
    transformer, x = small_transformer(), torch.randn(4, 5, 7, dtype=torch.float64, generator=generator())
    pool = Fixed(Choice())
    prompted = PromptedTransformer(transformer, pool)
    torch.testing.assert_close(prompted(x), transformer(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(transformer.head(pool.query), transformer(x), rtol=0, atol=1e-12)


def test_prefixes_are_those_of_prefix_tuning_in_their_blocks_alone() -> None:
    transformer, x = small_transformer(), torch.randn(4, 5, 7, dtype=torch.float64, generator=generator())
    prompt = torch.randn(6, 8, dtype=torch.float64, generator=generator(1))
    prompted = PromptedTransformer(transformer, Fixed(Choice(prefixes={1: prompt.expand(4, -1, -1)})))
    found = prompted(x)
    attention = transformer.blocks[1].attn
    transformer.blocks[1].register_module("attn", PrefixAttention(attention, prompt))  # type: ignore[arg-type]
    torch.testing.assert_close(found, transformer(x), rtol=0, atol=1e-12)


def test_samples_may_have_prefixes_of_their_own() -> None:
    attention = small_transformer().blocks[0].attn
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=generator())
    prompts = torch.randn(3, 4, 8, dtype=torch.float64, generator=generator(1))
    together = prefixed(attention, x, prompts)  # type: ignore[arg-type]
    for index in range(3):
        alone = prefixed(attention, x[index : index + 1], prompts[index : index + 1])  # type: ignore[arg-type]
        torch.testing.assert_close(together[index], alone[0], rtol=0, atol=1e-12)


def test_tokens_in_front_have_no_position_and_their_outputs_are_averaged() -> None:
    transformer, x = small_transformer(), torch.randn(2, 5, 7, dtype=torch.float64, generator=generator())
    tokens = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator(1))
    found = PromptedTransformer(transformer, Fixed(Choice(tokens=tokens)))(x)
    swapped = PromptedTransformer(transformer, Fixed(Choice(tokens=tokens.flip(1))))(x)
    torch.testing.assert_close(found, swapped, rtol=0, atol=1e-12)
    embedded = (
        torch.cat([transformer.cls_token.expand(2, -1, -1), transformer.patch_embed(x)], 1) + transformer.pos_embed
    )
    out = torch.cat([embedded, tokens], dim=1)
    for block in transformer.blocks:
        out = block(out)
    expected = transformer.head(transformer.norm(out)[:, -3:].mean(dim=1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# what is chosen


def test_l2p_takes_the_prompts_of_the_nearest_keys_sample_by_sample() -> None:
    pool = NearestPrompts(L2pConfig(pool=6, length=2, chosen=3), SIZES, generator())
    query = torch.randn(5, 12, generator=generator(1))
    choice = pool(query)
    total = 0.0
    for index in range(5):
        near = [float(F.cosine_similarity(query[index], key, dim=0)) for key in pool.keys]
        order = sorted(range(6), key=lambda number: -near[number])[:3]
        expected = torch.cat([pool.prompts[number] for number in order])
        assert choice.tokens is not None
        torch.testing.assert_close(choice.tokens[index], expected)
        total += sum(near[number] for number in order)
    assert float(choice.closeness) == pytest.approx(total / 5, abs=1e-6)  # type: ignore[arg-type]


def test_dualprompt_is_told_the_task_in_training_and_looks_among_seen_tasks_after() -> None:
    pool = DualPrompts(DualPromptConfig(general_length=1, expert_length=2), SIZES, generator())
    query = pool.keys.detach()[[0, 1, 1]] * 3.0  # each sample looks exactly like a task
    pool.task, pool.seen = 0, 2
    told = pool(query).prefixes
    assert set(told) == {0, 1, 2}
    torch.testing.assert_close(told[2], pool.expert[0][[0, 0, 0]])
    pool.task = None
    asked = pool(query).prefixes
    torch.testing.assert_close(asked[2], pool.expert[0][[0, 1, 1]])
    torch.testing.assert_close(asked[0], pool.general[0].expand(3, -1, -1))
    pool.seen = 1
    torch.testing.assert_close(pool(query).prefixes[2], pool.expert[0][[0, 0, 0]])


def test_coda_prompts_are_sums_of_components_by_attended_cosines() -> None:
    settings = CodaPromptConfig(pool=6, length=2, blocks=2)
    pool = ComponentPool(settings, SIZES)
    with torch.no_grad():
        for value in pool.parameters():
            value.normal_(generator=generator())
    pool.task, pool.seen = 1, 2
    query = torch.randn(4, 12, generator=generator(1))
    choice = pool(query)
    assert set(choice.prefixes) == {0, 1}
    for index, block in enumerate(pool.blocks):
        for sample in range(4):
            expected = torch.zeros(2, 8)
            for number in range(6):
                looked = query[sample] * block.attentions[number]
                expected += F.cosine_similarity(looked, block.keys[number], dim=0) * block.prompts[number].view(2, 8)
            torch.testing.assert_close(choice.prefixes[index][sample], expected, rtol=1e-5, atol=1e-5)


def test_components_of_later_tasks_play_no_part_and_those_of_earlier_ones_do_not_learn() -> None:
    pool = ComponentPool(CodaPromptConfig(pool=6, length=2, blocks=1), SIZES)
    with torch.no_grad():
        for value in pool.parameters():
            value.normal_(generator=generator())
    query = torch.randn(4, 12, generator=generator(1))
    pool.task, pool.seen = 0, 1
    before = pool(query).prefixes[0].clone()
    with torch.no_grad():
        for value in pool.parameters():
            value[3:].add_(1.0)
    torch.testing.assert_close(pool(query).prefixes[0], before)
    pool.task, pool.seen = 1, 2
    pool(query).prefixes[0].square().sum().backward()
    for value in pool.parameters():
        assert not value.grad[:3].any()  # type: ignore[index]
        assert value.grad[3:].any()  # type: ignore[index]


def test_new_components_are_orthonormal_and_orthogonal_to_the_old_ones() -> None:
    before = torch.randn(4, 20, generator=generator())
    rows = orthonormal_rows(before, 5, generator(1))
    torch.testing.assert_close(rows @ rows.mT, torch.eye(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows @ before.mT, torch.zeros(5, 4), rtol=0, atol=1e-5)


def test_components_that_cannot_be_orthogonal_are_one_line() -> None:
    with pytest.raises(UserError, match="cannot be orthogonal among queries of 12 numbers"):
        ComponentPool(CodaPromptConfig(pool=20), SIZES)
    with pytest.raises(UserError, match="has none for each of 2 tasks"):
        ComponentPool(CodaPromptConfig(pool=1), SIZES)
    with pytest.raises(UserError, match="chosen must be at most pool"):
        a_method("l2p", pool=2, chosen=3)


# the methods


@pytest.mark.parametrize("backbone", ["vit", "perceptron"])
@pytest.mark.parametrize("name", POOLED)
def test_only_pool_and_head_are_trained_and_sent(name: str, backbone: str) -> None:
    method = a_method(name, backbone)
    state = method.begin_task(method.initial_state(), method.problem.tasks[0])
    network = method.network()
    pool = {key for key, _ in network.named_parameters() if ".pool." in key}
    assert set(state.arrays) == pool | {"head.weight", "head.bias"}
    where = Place(method.problem.tasks[0], Phase("round"), 0)
    message = method.message(state, where)
    reply = method.client(client_of(method.problem, 0, where, {}), where, message)
    assert set(reply.arrays) == set(state.arrays)
    assert any((reply.arrays[key] != message.arrays[key]).any() for key in pool)


@pytest.mark.parametrize("name", ["l2p", "dualprompt"])
def test_keys_learn_through_the_pull_alone(name: str) -> None:
    for pull in (0.0, 0.5):
        method = a_method(name, "perceptron", pull=pull)
        where = Place(method.problem.tasks[0], Phase("round"), 0)
        message = method.message(method.initial_state(), where)
        reply = method.client(client_of(method.problem, 0, where, {}), where, message)
        (keys,) = (key for key in message.arrays if key.endswith(".keys"))
        assert (reply.arrays[keys] != message.arrays[keys]).any() == (pull > 0)


def test_the_second_task_leaves_the_first_ones_prompts_and_components_as_they_were() -> None:
    for name, own in (("dualprompt", "expert"), ("coda-prompt", "blocks")):
        run, _ = in_memory(config(method=name, backbone="perceptron", weight_decay=0.1))
        kept: list[dict[str, np.ndarray]] = []
        inner = run.method.end_task
        run.method.end_task = lambda state, task, inner=inner, kept=kept: (  # type: ignore[method-assign]
            kept.append({key: array.copy() for key, array in state.arrays.items()}) or inner(state, task)
        )
        run.run()
        first, second = kept
        for key in first:
            if f".{own}." in key:
                half = 1 if name == "dualprompt" else len(first[key]) // 2
                assert np.array_equal(first[key][:half], second[key][:half])
                assert not np.array_equal(first[key][half:], second[key][half:])


def test_forecasts_are_not_told_the_task() -> None:
    method = a_method("dualprompt", "perceptron")
    network = method.model(method.initial_state(), method.problem.tasks[1])
    assert (prompted_of(network).pool.task, prompted_of(network).pool.seen) == (None, 2)


@pytest.mark.parametrize("name", POOLED)
def test_a_run_learns_the_digits(name: str) -> None:
    run, _ = in_memory(config(method=name, backbone="perceptron", classes_per_task=(4,), rounds=3, local_epochs=5))
    assert run.run()["metrics"]["class_il"]["final_average_accuracy"] > 60  # of four classes


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda-prompt"])
def test_weight_decay_shrinks_what_learns_and_leaves_the_rest_as_it_was(name: str) -> None:
    found = {}
    for decay in (0.0, 20.0):
        method = method_for(problem_for(config(method=name, weight_decay=decay, lr=1e-3, rounds=1)))
        task, state = method.problem.tasks[0], method.initial_state()
        state = method.begin_task(state, task)
        where = Place(task, Phase("round"), 0)
        message = method.message(state, where)
        reply = method.client(client_of(method.problem, 0, where, {}), where, message)
        found[decay] = {array: (message.arrays[array], reply.arrays[array]) for array in reply.arrays}
    shrunk = 0
    for array, (before, free) in found[0.0].items():
        decayed = found[20.0][array][1]
        if "head" in array:
            continue
        for first, plain, less in zip(before, free, decayed, strict=True):
            if np.array_equal(first, plain):
                # Of another task, or of a prompt that nobody chose.
                assert np.array_equal(first, less)
            elif first.any():
                assert np.linalg.norm(less) < np.linalg.norm(plain)
                shrunk += 1
    assert shrunk
