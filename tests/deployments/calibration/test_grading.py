"""The rules by which an answer is compared with its reference."""

import time

import pytest

from deployments.calibration.grading import grade
from deployments.calibration.records import Message, Prompt


def score(rule: str, reference: str, answer: str) -> float:
    return grade(Prompt((Message("user", "?"),), reference, rule), answer)


@pytest.mark.parametrize(
    ("rule", "reference", "right", "wrong"),
    [
        ("exact", "Paris", ["Paris", " Paris\n"], ["paris", "Paris.", "In Paris", ""]),
        (
            "regex",
            r"(?i)(in )?paris\.?",
            ["Paris", "in PARIS."],
            ["Paris, France", "London"],
        ),
        (
            "number",
            "1,250",
            ["1250", "It is 1,250.00 EUR", "1000 + 250 = 1250.", "1.25e3"],
            ["1251", "250 and 1250 make 1500", "none", "-1250"],
        ),
        ("number", "-0.5", ["-.5", "x = -0.50"], ["0.5", "-5"]),
        (
            "json",
            '{"a": [1, true], "b": null}',
            ['{"b": null, "a": [1.0, true]}', '```json\n{"a":[1,true],"b":null}\n```'],
            [
                '{"a": [1, 1], "b": null}',
                '{"a": [true, 1], "b": null}',
                '{"a": [1, true]}',
                "a",
            ],
        ),
        ("json", "1", ["1"], ["true", '"1"']),
    ],
)
def test_a_rule_accepts_right_answers_only(
    rule: str, reference: str, right: list[str], wrong: list[str]
) -> None:
    """Spaces around answer and reference do not count."""
    assert [score(rule, reference, answer) for answer in right] == [1.0] * len(right)
    assert [score(rule, reference, answer) for answer in wrong] == [0.0] * len(wrong)


def test_a_pattern_that_backtracks_is_ended() -> None:
    """It would take years; the answer counts as wrong within a second or two."""
    began = time.monotonic()
    assert score("regex", "(a|aa)+$b", "a" * 200) == 0.0
    assert time.monotonic() - began < 30


def test_deep_json_is_wrong_and_no_error() -> None:
    """Python's parser gives up on it."""
    assert score("json", "[]", "[" * 100_000) == 0.0
