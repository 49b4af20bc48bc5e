"""HGP, prompt and CCVR: what is sent, kept and drawn, and what re-training the head is worth on digits."""

from functools import cache

import numpy as np
import pytest
import torch

from neurocl.backbones.vit import VisionTransformer, VitConfig
from neurocl.errors import UserError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.class_table import CLASSES, COUNTS, MEANS, SPREADS, ClassTable
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import SequentialExchange, Stores, client_of
from neurocl.federated.method import Phase, Place, Reply, Samples
from neurocl.federated.network import HEAD_BIAS, HEAD_WEIGHT, Classifier
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload, encode
from neurocl.federated.problem import Problem, Source
from neurocl.federated.prototypes import KEPT

ROUND = Phase("round", 2)


def setup(method="hgp", *, seed=0, beta=0.5, rounds=1, epochs=1, **options):
    config = FederatedConfig(
        method=method,
        options=options,
        partition=PartitionConfig(num_clients=5, beta=beta, seed=seed),
        rounds=rounds,
        local_epochs=epochs,
        seed=seed,
    )
    problem = problem_for(config)
    return problem, method_for(problem)


def run(problem, method):
    stores = Stores(None)
    run = FederatedRun(problem, method, SequentialExchange(problem, method, stores), stores)
    return run.run(), run.state


def replies_of(problem, method, state, task=0, number=0, clients=range(5)):
    place = Place(problem.tasks[task], ROUND, number)
    message = method.message(state, place)
    replies = [Reply(k, method.client(client_of(problem, k, place, {}), place, message)) for k in clients]
    assert not any(method.objection(state, place, reply.payload) for reply in replies)
    return place, replies


def test_a_reply_is_prompts_head_and_two_numbers_for_each_feature_of_each_class():
    problem, method = setup()
    state = method.initial_state()
    place, replies = replies_of(problem, method, state)
    assert sorted(method.message(state, place).arrays) == ["backbone.shift", HEAD_BIAS, HEAD_WEIGHT]
    for reply in replies:
        size = sum(array.nbytes for array in reply.payload.arrays.values())
        trained = 64 + 10 * 128 + 10
        assert size == 4 * (trained + (2 * 128 + 1) * len(reply.payload.meta[CLASSES]))


def test_prompt_is_the_same_without_anything_about_classes():
    problem, method = setup("prompt")
    _, replies = replies_of(problem, method, method.initial_state())
    assert all(sorted(r.payload.arrays) == ["backbone.shift", HEAD_BIAS, HEAD_WEIGHT] for r in replies)


def test_full_covariances_cost_more_and_work():
    problem, method = setup(covariance="full", epochs=1)
    place, replies = replies_of(problem, method, method.initial_state(), clients=[0, 1])
    rows = len(replies[0].payload.meta[CLASSES])
    assert replies[0].payload.arrays[SPREADS].shape == (rows, 128, 128)
    state = method.aggregate(method.initial_state(), place, replies)
    assert np.isfinite(state.arrays[HEAD_WEIGHT]).all()


def test_finished_tasks_keep_their_gaussians_and_the_current_one_replaces_them():
    problem, method = setup()
    state = method.initial_state()
    place, replies = replies_of(problem, method, state, task=0)
    state = method.aggregate(state, place, replies)
    first = ClassTable.kept(state.arrays, KEPT)
    for number in range(2):
        place, replies = replies_of(problem, method, state, task=1, number=number)
        state = method.aggregate(state, place, replies)
    kept = ClassTable.kept(state.arrays, KEPT)
    np.testing.assert_array_equal(kept.rows(kept.classes < 2).means, first.means)
    told = ClassTable.received(replies)
    np.testing.assert_array_equal(kept.rows(kept.classes >= 2).means, told.means)


@pytest.mark.parametrize("keep_absent", [False, True])
def test_an_absent_client_is_dropped_or_kept_on_request(keep_absent):
    problem, method = setup(keep_absent=keep_absent)
    state = method.initial_state()
    place, replies = replies_of(problem, method, state)
    state = method.aggregate(state, place, replies)
    state = method.aggregate(state, place, replies[1:])
    owners = set(ClassTable.kept(state.arrays, KEPT).clients.tolist())
    assert (0 in owners) is keep_absent


def test_a_class_without_news_keeps_its_last_mixture():
    problem, method = setup()
    state = method.initial_state()
    place, replies = replies_of(problem, method, state)
    state = method.aggregate(state, place, replies)
    payload = replies[0].payload
    nothing = {name: payload.arrays[name][:0] for name in (COUNTS, MEANS, SPREADS)}
    silent = Payload({**payload.arrays, **nothing}, {**payload.meta, CLASSES: []})
    assert method.objection(state, place, silent) == ""
    after = method.aggregate(state, place, [Reply(0, silent)])
    np.testing.assert_array_equal(after.arrays[f"{KEPT}means"], state.arrays[f"{KEPT}means"])


def test_single_samples_travel_only_on_request():
    def with_one_sample(single):
        problem, method = setup(single=single)
        place = Place(problem.tasks[0], ROUND, 0)
        client = client_of(problem, 0, place, {})
        one = torch.cat([torch.nonzero(client.data.y == 0)[:1, 0], torch.nonzero(client.data.y == 1)[:5, 0]])
        client = type(client)(0, Samples(client.data.x[one], client.data.y[one]), 0)
        return method.client(client, place, method.message(method.initial_state(), place)).meta[CLASSES]

    assert 0 not in with_one_sample("skip")
    assert 0 in with_one_sample("pooled")


def test_pooled_singles_and_a_larger_least_count_contradict_each_other():
    with pytest.raises(UserError, match="min_count"):
        setup(single="pooled", min_count=5)


def test_wild_gaussians_do_not_spoil_the_head():
    problem, method = setup()
    state = method.initial_state()
    place, replies = replies_of(problem, method, state)
    arrays = replies[0].payload.arrays
    wild = Payload({**arrays, SPREADS: np.full_like(arrays[SPREADS], 3e38)}, replies[0].payload.meta)
    assert method.objection(state, place, wild) == ""
    after = method.aggregate(state, place, [Reply(0, wild), *replies[1:]])
    assert all(np.isfinite(array).all() for array in after.arrays.values())


def test_negative_variances_are_refused():
    problem, method = setup()
    state = method.initial_state()
    place, replies = replies_of(problem, method, state)
    arrays = replies[0].payload.arrays
    bad = Payload({**arrays, SPREADS: -arrays[SPREADS] - 1}, replies[0].payload.meta)
    assert "negative" in method.objection(state, place, bad)


def test_the_same_seed_gives_the_same_bytes():
    states = [encode(run(*setup(draws=16))[1]) for _ in range(2)]
    assert states[0] == states[1]


def test_a_head_of_zeros_gets_a_direction_that_normalised_logits_need():
    problem, method = setup()
    assert not problem.network().head.weight.any()
    weight = method.initial_state().arrays[HEAD_WEIGHT]
    assert 0 < np.abs(weight).max() <= 128**-0.5


def test_the_backbone_cannot_be_trained():
    with pytest.raises(UserError, match="train"):
        setup(train="all")


def transformer_source():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 4
    x = torch.randn(80, 1, 8, 8, generator=generator) + y[:, None, None, None]

    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = VitConfig(input_shape=(1, 8, 8), patch_size=4, width=16, depth=2, heads=2, embed_dim=12)
            return Classifier(VisionTransformer(config), 12, 4)

    return Source("noise", Samples(x, y), Samples(x, y), ("a", "b", "c", "d"), build)


@pytest.mark.parametrize("init", ["zeros", "orthonormal"])
def test_in_a_transformer_prefixes_are_trained_and_sent(init):
    partition = PartitionConfig(num_clients=2, beta=10)
    config = FederatedConfig(method="hgp", options={"init": init}, partition=partition, rounds=1, local_epochs=1)
    problem = Problem(config, transformer_source())
    method = method_for(problem)
    before = method.initial_state()
    result, state = run(problem, method)
    prompts = [name for name in state.arrays if name.endswith("attn.prompt")]
    assert prompts == ["backbone.blocks.0.attn.prompt", "backbone.blocks.1.attn.prompt"]
    assert all(state.arrays[name].shape == (8, 16) for name in prompts)
    assert all(not np.array_equal(state.arrays[name], before.arrays[name]) for name in prompts)
    assert result["failures"] == {}


@pytest.mark.parametrize("classes", ["task", "seen"])
def test_ccvr_draws_from_the_current_task_or_from_all_so_far(classes):
    problem, method = setup("ccvr", classes=classes, train="head")
    state = method.initial_state()
    place, replies = replies_of(problem, method, state)
    state = method.aggregate(state, place, replies)
    place, replies = replies_of(problem, method, state, task=1)
    moved = Payload({**state.arrays, f"{KEPT}means": state.arrays[f"{KEPT}means"] + 1}, state.meta)
    heads = [method.aggregate(before, place, replies).arrays[HEAD_WEIGHT] for before in (state, moved)]
    # Whether the Gaussians of the first task matter.
    assert np.array_equal(*heads) is (classes == "task")


@cache
def average(name, beta):
    """Final average accuracy on digits, mean of three seeds."""
    results = [run(*setup(name, seed=seed, beta=beta, rounds=5, epochs=5))[0] for seed in range(3)]
    found = [result["metrics"]["class_il"]["final_average_accuracy"] for result in results]
    print(f"{name} beta {beta}: {np.round(found, 1)}")
    return float(np.mean(found))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_on_digits_re_training_on_all_classes_is_worth_twenty_points(beta):
    assert average("hgp", beta) >= average("prompt", beta) + 20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_on_digits_hgp_is_ten_points_above_fedavg(beta):
    assert average("hgp", beta) >= average("fedavg", beta) + 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_on_digits_re_training_on_the_current_task_alone_is_not(beta):
    assert average("ccvr", beta) < average("prompt", beta) + 20
