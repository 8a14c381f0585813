"""Each rule is broken by its examples in `tests/spec/examples`, but not by their neighbours."""

from __future__ import annotations

import pytest

from lem.spec.rules import EXPERIMENT_RULES, RULES, Objection
from tests.hosts import CPU, ONE, P100, TWO, machine
from tests.spec.examples import EXAMPLES
from tests.spec.examples.example import asks, server, simulated, vllm
from tests.spec.examples.openai import STARTED


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    monkeypatch.chdir(files)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.code}-{example.path}")
def test_rule(example):
    code, path, provoked_by, not_by = example
    (found,) = [o for o in provoked_by.objections() if (o.code, o.path) == (code, path)]
    assert found.severity == RULES[code].severity
    assert str(found) == f"{path}: {found.message} [{code}]"
    # The neighbour may break other rules, but not this one.
    assert (code, path) not in [(o.code, o.path) for o in not_by.objections()]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.code}-{example.path}")
def test_a_message_is_the_fact_and_the_remedy_each_a_sentence(example):
    for found in example.provoked_by.objections():
        remedy = EXPERIMENT_RULES[found.code].remedy
        assert found.fact.endswith((".", "?"))
        assert found.message == f"{found.fact} {remedy}"
        assert remedy not in found.fact


def test_every_rule_is_provoked_by_an_example():
    assert {example.code for example in EXAMPLES} == set(EXPERIMENT_RULES)


@pytest.mark.parametrize("host", [CPU, ONE, TWO, machine(P100)], ids=["CPU", "one GPU", "two", "an old one"])
@pytest.mark.parametrize(
    "defaults",
    [asks, simulated, vllm, lambda **on: server(STARTED, **on)],
    ids=["pytorch", "simulated", "vllm", "openai"],
)
def test_nothing_is_wrong_with_the_defaults(host, defaults):
    assert defaults(host=host).objections() == []


def test_an_objection_without_a_rule_cannot_be_made():
    with pytest.raises(KeyError):
        Objection("of_my_own", "model", "it is wrong.")


@pytest.mark.parametrize("code", RULES)
def test_rules_are_written_in_sentences(code):
    rule = RULES[code]
    assert code == code.lower()
    assert rule.meaning.endswith(".")
    assert rule.remedy.endswith(".")
