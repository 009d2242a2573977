"""What is expected of an arm before any score."""

import numpy as np
import pytest

from policies.profiling.calibration import logit
from policies.profiling.features import KINDS
from policies.profiling.prior import DeclaredQuality, prior_weights
from policies.thompson.policy import Thompson, ThompsonSettings
from policies.types import Arm, Objective, Request
from tests.support.requests import make_profile

OTHERS = tuple((kind, 0.0) for kind in KINDS if kind not in ("arithmetic", "strings"))
ARMS = (
    Arm("calculator", prior_by_kind=OTHERS),
    Arm("talker", prior_by_kind=(*((kind, 0.7) for kind, _ in OTHERS),)),
    Arm("unknown"),
)
TALK = (
    *("Hello", "Who are you?", "Write a haiku", "Bonjour", "你好", "Wie geht es dir?"),
    *("Wer bist du?", "Schreibe ein Haiku", "¿Quién eres?", "Escribe un haiku"),
    *(
        "Qui es-tu ?",
        "Écris un haïku",
        "你是谁?",
        "写一首俳句",
        "あなたは誰?",
        "俳句を書いて",
    ),
    *(
        "Кто ты?",
        "Напиши хайку",
        "من أنت؟",
        "مرحبا",
        "안녕하세요",
        "नमस्ते",
        "Olá",
        "Ciao",
    ),
)
CALCULATIONS = (
    *("What is 347 plus 586?", "Was ist 347 plus 586?", "¿Cuánto es 12 por 8?"),
    *("计算 347 加 586", "Combien font 347 et 586 ?", "347 + 586", "12×8=?"),
    *("Сколько будет 347 плюс 586?", "347 artı 586 kaç eder?", "347足す586は?"),
)


def request(text: str, score_chance: float = 1.0) -> Request:
    return Request(
        text,
        make_profile(text, embedding=np.ones(16) / 4),
        Objective(),
        score_chance=score_chance,
    )


def propensities(policy: Thompson, text: str) -> dict[str, float]:
    """The probability of each arm for a text."""
    (decision,) = policy.decide([request(text)], {}, np.random.default_rng(0), 0)
    return {estimate.arm: estimate.propensity for estimate in decision.estimates}


def test_the_weights_give_the_expected_score_of_each_kind() -> None:
    """On the scale of the linear model, for the declared kinds and for the others."""
    for link in (float, logit):
        weights = prior_weights((Arm("a", prior_by_kind=(("code", 0.2),)),), link)
        for kind, text, score in (
            ("code", "def f(x): return x", 0.2),
            ("arithmetic", "3 + 4", 0.5),
        ):
            found = make_profile(text)
            assert found.kind == kind
            assert weights[0] @ found.features == pytest.approx(link(score))


@pytest.mark.parametrize("text", TALK)
def test_before_any_score_a_declared_kind_goes_to_the_arm_that_can_do_it(
    text: str,
) -> None:
    """Almost always, also if the answer will be scored, which is when the policy explores most."""
    found = propensities(Thompson(ARMS[:2]), text)
    assert found["talker"] > 0.99
    # an arm of which nothing is declared is still explored
    assert propensities(Thompson(ARMS), text)["unknown"] > 0.05


@pytest.mark.parametrize("text", CALCULATIONS)
def test_a_calculation_in_any_language_is_arithmetic(text: str) -> None:
    """So it is not taken for talk."""
    assert make_profile(text).kind == "arithmetic"


def test_an_undeclared_kind_is_explored() -> None:
    """A prior for some kinds says nothing of the others."""
    found = propensities(Thompson(ARMS[:2]), "What is 3 + 4?")
    assert min(found.values()) > 0.2


def test_scores_overrule_what_was_declared() -> None:
    """If the declared arm is always wrong and the other one right, the other one gets the requests."""
    policy = Thompson(ARMS[:2])
    rng = np.random.default_rng(1)
    for i in range(60):
        text = TALK[i % len(TALK)]
        for k, score in ((0, 1.0), (1, 0.0)):
            policy.advance(i, i)
            (decision,) = policy.decide([request(text)], {}, rng, i)
            forced = Request(text, decision.profile, Objective(models=(ARMS[k].name,)))
            (decision,) = policy.decide([forced], {}, rng, i)
            policy.score(decision, score)
    for text in TALK:
        assert propensities(policy, text)["calculator"] > 0.9


def test_the_number_of_scores_is_the_strength() -> None:
    """N declared scores with the mean m equal the precision n/σ² at m; 0 changes nothing."""
    noise = 0.2
    requests = [request("Hello")]
    quality = (np.array([[0.5, 0.5]]), np.array([[0.1, 0.1]]))
    for scores in (0.0, 5.0):
        arms = (Arm("a", prior_by_kind=OTHERS, prior_scores=scores), Arm("b"))
        mean, variance = DeclaredQuality(arms, noise).combined(quality, requests)
        precision = 1 / 0.1 + scores / noise
        assert variance[0] == pytest.approx([1 / precision, 0.1])
        assert mean[0] == pytest.approx([0.5 / 0.1 / precision, 0.5])


def test_without_declarations_nothing_changes() -> None:
    """The very arrays come back, and the decisions are those of a policy that knows no priors by kind."""
    quality = (np.ones((1, 1)), np.ones((1, 1)))
    assert DeclaredQuality((Arm("a"),), 0.1).combined(quality, []) is quality
    none = ThompsonSettings(exploration=0.0)
    plain = Thompson((Arm("a"), Arm("b")), none)
    weak = Thompson(
        (Arm("a", prior_by_kind=(("code", 0.5),), prior_scores=0.0), Arm("b")), none
    )
    for text in TALK:
        assert propensities(plain, text) == propensities(weak, text)
