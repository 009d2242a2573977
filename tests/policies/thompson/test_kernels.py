"""The compiled kernels: they are compiled at import, with or without a cache on disk, and accept any features."""

import os
import subprocess
import sys
from dataclasses import replace
from math import exp, inf, log1p
from pathlib import Path

import numpy as np
import pytest

from policies.events import Outcome
from policies.profiling.features import D
from policies.registry import make_policy
from policies.thompson import compiling, kernels
from policies.thompson.latency import LatencyModel
from policies.thompson.posterior import LinearPosterior
from policies.types import Arm, ModelState, Objective
from tests.support.requests import make_request

KERNELS = [
    getattr(kernels, name)
    for name in vars(kernels)
    if hasattr(getattr(kernels, name), "nopython_signatures")
]


def test_nothing_is_compiled_while_requests_wait() -> None:
    """Each kernel has the one signature that it was imported with, and takes no other."""
    assert len(KERNELS) >= 6
    policy = make_policy("thompson", [Arm("a"), Arm("b")])
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        for decision in policy.decide(
            [make_request("What is 2 plus 2?")] * batch, {}, rng, batch
        ):
            policy.learn(decision, Outcome(decision.id, "ok", 0.1, 0.2, 20, 10))
            policy.score(decision, 1.0)
    assert all(
        len(kernel.nopython_signatures) == 1 and not kernel._can_compile
        for kernel in KERNELS
    )


def test_read_only_features_are_accepted() -> None:
    """Arrays that came over the network are of another type to the compiler."""
    posterior = LinearPosterior(np.zeros((2, D)), np.ones(D), 1.0, 1.0)
    x = np.linspace(0, 1, D)
    x.setflags(write=False)
    posterior.add(0, x, 1.0, 0)
    assert posterior.predict(x[None])[0][0, 0] > 0.5


def test_features_of_another_length_are_refused() -> None:
    """Compiled code does not check the bounds of arrays."""
    posterior = LinearPosterior(np.zeros((2, 3)), np.ones(3), 1.0, 1.0)
    for wrong in (np.ones(2), np.ones(4)):
        with pytest.raises(ValueError, match="features"):
            posterior.predict(wrong[None])
        with pytest.raises(ValueError, match="shape"):
            posterior.add(0, wrong, 1.0, 0)


def test_inverse_and_determinant(rng: np.random.Generator) -> None:
    """Those of random covariances of any shape, badly conditioned ones too; what has no Cholesky factor is refused."""
    roots = rng.standard_normal((3, 2, D, D)) * np.logspace(-3, 3, D)
    matrices = roots @ roots.transpose(0, 1, 3, 2) + np.eye(D)
    inverse, half_log_det = kernels.inverse(matrices)
    assert np.allclose(inverse @ matrices, np.eye(D), atol=1e-6)
    assert np.allclose(2 * half_log_det, np.linalg.slogdet(matrices)[1])
    with pytest.raises(np.linalg.LinAlgError, match="positive definite"):
        kernels.inverse(-matrices)


def test_latency_and_cost_by_the_formulas_of_latency_py(
    rng: np.random.Generator,
) -> None:
    """Each arm at its own load, to which those of the same batch count that name it; nothing over the limits."""
    arms = [
        Arm("a", context_tokens=100, output_price_usd=2e-6),
        Arm("b", prompt_price_usd=1e-6),
    ]
    model = LatencyModel(arms, 1.0)
    for i in range(40):
        for part, dims in ((model.tokens, D), (model.ttft, 4), (model.tpot, 4)):
            part.add(i % 2, rng.uniform(0, 1, dims), rng.normal(), i)
    requests = [
        make_request("Why?"),
        replace(make_request("How?", Objective(models=("b",))), forced=True),
    ]
    features = np.array([request.profile.features for request in requests])
    live = [
        ModelState(in_flight=3, replicas=2),
        ModelState(in_flight=5, wait_s=0.7, price=0.02),
    ]
    asked = model.asked(requests, [r.objective for r in requests])
    found = model.expect(asked, features, live, total=15.0)
    for b, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        profile = requests[b].profile
        others = b == 0  # the other one of the two names b
        load = (3 / 2, 5 + others)[k]
        total = 15 + others
        x = np.array([1.0, log1p(profile.prompt_tokens) / 5, log1p(load), log1p(total)])
        log_tokens = features[b] @ model.tokens.mean[k] + 0.5 * model.tokens.noise[k]
        limit = min(
            arms[k].context_tokens - profile.prompt_tokens,
            profile.max_output_tokens or inf,
        )
        tokens = max(min((1 + profile.output_tokens) * exp(log_tokens) - 1, limit), 1.0)
        (ttft, doubt), (tpot, doubts) = (
            (
                exp(min(x @ part.mean[k] + 0.5 * part.noise[k], 8.0)),
                min(x @ part.covariance[k] @ x, kernels.DOUBT),
            )
            for part in (model.ttft, model.tpot)
        )
        decoding = (tokens - 1) * tpot
        cost = (
            profile.prompt_tokens * arms[k].prompt_price_usd
            + tokens * arms[k].output_price_usd
        )
        variance = ttft**2 * doubt + decoding**2 * doubts
        latency = (0.0, 0.7)[k] + ttft + decoding
        scarcity = (0.0, 0.02)[k] * (profile.prompt_tokens + 4 * tokens) / 1000
        assert found[b, :, k] == pytest.approx(
            [latency, variance, cost, ttft, tpot, tokens, load, total, scarcity]
        )


@pytest.mark.parametrize(
    "error", [RuntimeError("no locator available"), OSError("no space left on device")]
)
def test_without_a_cache_it_compiles_in_memory(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A folder that cannot be written to costs the time to compile, not the start."""

    def refusing(signature: str, cache: bool = False, **options: object) -> object:
        if cache:
            raise error
        return njit(signature, **options)

    njit = compiling.njit
    monkeypatch.setattr(compiling, "njit", refusing)

    @compiling.compiled("f8(f8)")
    def double(x: float) -> float:
        return 2 * x

    assert double(1.5) == 3.0


def test_kernels_compile_without_a_writable_folder(tmp_path: Path) -> None:
    """The kernels compile if no folder for numba's cache is writable: configured, beside the source, or the user's."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(blocked / "cache"),
        "HOME": str(blocked),
    }
    environment["NUMBA_CACHE_LOCATOR_CLASSES"] = "UserProvidedCacheLocator"
    code = "import numpy as np; from policies.thompson.kernels import inverse; print(inverse(2.0 * np.eye(2))[0][0, 0])"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "0.5", done.stderr
