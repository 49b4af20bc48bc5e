"""``neurocl federated unlearn`` as a user types it."""

import json

import pytest

from tests.cli.conftest import assert_one_line

SMALL = ["--clients", 3, "--rounds", 1, "--local-epochs", 1, "--set", "classes_per_task=4", "--quiet"]


@pytest.fixture
def members(inside, tmp_path):
    """A finished run of three clients with a ledger."""
    result = inside(
        "federated", "run", "--method", "tangent", "--set", "options.ledger=true", *SMALL, "--out", "members"
    )
    assert result.returncode == 0, result.stderr
    return tmp_path / "members"


def test_a_client_leaves_and_the_table_puts_the_model_beside_one_that_never_saw_it(inside, members, tmp_path):
    result = inside("federated", "unlearn", "members", "--client", 1, "--gold", "--repair", "--out", "without")
    assert result.returncode == 0, result.stderr
    for words in ("before", "after", "repaired", "gold", "their data", "membership", "negation, alpha", "Run: without"):
        assert words in result.stdout
    assert "training again without client 1" in result.stderr
    assert (tmp_path / "without" / "result.json").exists()
    again = inside("federated", "unlearn", "without", "--client", 2, "--mode", "ledger", "--out", "fewer", "--json")
    document = json.loads(again.stdout)
    assert document["clients"] == [2]
    assert document["bytes"] == {"up": 0, "down": 0}
    assert set(document["accuracy"]) == {"before", "after"}


def test_several_clients_leave_at_once_in_any_order(inside, members):
    reports = []
    for order in ((1, 2), (2, 1)):
        flags = [word for client in order for word in ("--client", client)]
        result = inside("federated", "unlearn", "members", *flags, "--alpha", 0.2, "--json", "--out", f"w{order[0]}")
        reports.append(json.loads(result.stdout))
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
    assert reports[0]["alpha"] == {"1": 0.2, "2": 0.2}


def test_mistakes_are_one_line(inside, members):
    unlearn = ("federated", "unlearn")
    assert_one_line(inside(*unlearn, "nowhere", "--client", 1), 2, "is not a run folder")
    assert_one_line(inside(*unlearn, "members"), 2, "--client")
    assert_one_line(inside(*unlearn, "members", "--client", 7), 2, "no client 7", "0 to 2")
    assert_one_line(inside(*unlearn, "members", "--client", 1, "--mode", "exactly"), 2, "'exactly'", "ledger")
    assert_one_line(inside(*unlearn, "members", "--client", 1, "--mode", "exact"), 2, "possible: negation")
    assert_one_line(inside(*unlearn, "members", "--client", 1, "--alpha", -1), 2, "from 0 to 2", "got -1")
    assert_one_line(inside(*unlearn, "members", "--client", 1, "--alpha", 7), 2, "from 0 to 2", "got 7")
    assert inside("federated", "run", "--smoke", "--quiet", "--out", "plain").returncode == 0
    assert_one_line(inside(*unlearn, "plain", "--client", 1), 2, "no client can be removed from this run")
