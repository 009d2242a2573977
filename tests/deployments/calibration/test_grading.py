"""The rules by which an answer is compared with its reference."""

import time

import pytest

from deployments.calibration.grading import (
    MAX_GROUPS,
    check_pattern,
    check_reference,
    grade,
)
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


@pytest.mark.parametrize(
    ("rule", "reference", "why"),
    [
        ("regex", "(?:" * 60 + "a" + "){1,30}" * 60, "characters"),
        ("regex", "(" * 20 + "a" + "){2}" * 20, "groups"),
        # the class ends after the bracket, so the groups behind it are nested
        ("regex", "(" * 6 + "[])))))]" + "(" * 6 + "a" + ")" * 12, "groups"),
        ("regex", "a" * 501, "characters"),
        ("json", "[" * 100_000, "nested"),
        ("number", "1e999", "finite"),
    ],
)
def test_a_reference_that_costs_much_is_refused(
    rule: str, reference: str, why: str
) -> None:
    """It is refused before it is compiled: the first two took gigabytes."""
    with pytest.raises(ValueError, match=why):
        check_reference(rule, reference)


def test_a_pattern_is_compiled_when_it_is_checked() -> None:
    """Groups up to the limit are accepted, brackets with a backslash are no groups, and a syntax error is refused."""
    check_pattern("(" * MAX_GROUPS + "a" + "){2}" * MAX_GROUPS)
    check_pattern(r"\(" * 40)
    check_reference("regex", "(")
    with pytest.raises(ValueError, match="regular expression"):
        check_pattern("(")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("```\n1\n```", 1.0),
        ("``` \n 1 ```", 1.0),
        ("```json\n1```", 1.0),
        ("```1", 0.0),
        ("``````", 0.0),
        ("`````", 0.0),
        ("```json\n" + "\n" * 100_000 + "1", 0.0),
    ],
)
def test_a_code_fence_is_found_in_linear_time(answer: str, right: float) -> None:
    """100,000 line breaks behind a fence that does not end would take a pattern minutes."""
    assert score("json", "1", answer) == right
