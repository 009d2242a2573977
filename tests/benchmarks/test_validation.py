"""The simulator's error on a running system: the fit of a replica's parameters, the prediction, and what is printed."""

import asyncio
from math import exp
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from benchmarks import validation as record
from benchmarks.cluster import __main__ as cluster
from benchmarks.live import validation as command
from benchmarks.live.client import send
from benchmarks.live.fit import first_guess, fit
from benchmarks.live.plan import OK, Plan, Seen
from benchmarks.live.prediction import measured, predict, simulated
from benchmarks.validation import (
    Asked,
    Bounds,
    Fitted,
    Measured,
    Row,
    Setting,
    Validation,
    read,
    sentence_of,
)
from tests.support import streams as recordings
from tests.support.live_gateway import TOKENS, LiveGateway, serving

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = Bounds(16, 16 * 512, 64, 30.0)
TRUE = Fitted(4000.0, 0.006, 0.0008, 20.0, 0.015)
CAPACITY = 18.0  # answers a second, about that of TRUE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A generated load."""
    made = tmp_path_factory.mktemp("validation")
    recordings.generate(made)
    recordings.generate_load(made, "azure_conv")
    return str(made)


def run_of(load: float, run: int = 0, noise: float = 0.0) -> Measured:
    """A run of the simulated replica with the parameters TRUE, as if it had been measured with this noise."""
    rng = np.random.default_rng(round(100 * load))
    sent_s = np.cumsum(rng.exponential(1 / (load * CAPACITY), 150))
    prompts, answers = rng.integers(15, 40, 150), rng.choice([3, 30, 60, 87], 150)
    requests = tuple(
        Asked(float(at_s), True, int(prompt), int(answer), 0.0, 0.0)
        for at_s, prompt, answer in zip(sent_s, prompts, answers, strict=True)
    )
    times = simulated(TRUE, Measured(load, run, requests), BOUNDS)
    errors = np.random.default_rng(run).normal(0.0, noise, 150)
    return Measured(
        load,
        run,
        tuple(
            structs.replace(
                one,
                answered=bool(np.isfinite(first)),
                ttft_s=float(first) * exp(error),
                latency_s=float(whole) * exp(error),
            )
            for one, first, whole, error in zip(
                requests, times.ttft_s, times.latency_s, errors, strict=True
            )
        ),
    )


# --- simulation -------------------------------------------------------------------------------------------------


def test_a_lone_request_takes_what_the_engine_says() -> None:
    """Reading 40 tokens in two steps, then a step for each further token, and the time beside the engine."""
    lone = Measured(0.1, 0, (Asked(3.0, True, 40, 11, 0.0, 0.0),))
    times = simulated(TRUE, lone, BOUNDS)
    first = 0.015 + 40 / 4000 + 2 * 0.006
    assert times.ttft_s[0] == pytest.approx(first)
    assert times.latency_s[0] == pytest.approx(first + 10 * 0.0068)


def test_the_admission_refuses_what_does_not_fit_into_the_queue() -> None:
    """Of 100 requests at once, 16 run and 48 wait, the share of normal requests in a queue of 64; 36 are refused."""
    burst = Measured(1.0, 0, (Asked(0.0, True, 20, 50, 0.0, 0.0),) * 100)
    times = simulated(TRUE, burst, BOUNDS)
    assert np.isnan(times.latency_s).sum() == np.isnan(times.ttft_s).sum() == 36


def test_a_request_that_waits_too_long_is_given_up() -> None:
    """Those that have not begun within the limit of the queue have no times."""
    burst = Measured(1.0, 0, (Asked(0.0, True, 20, 500, 0.0, 0.0),) * 60)
    kept = simulated(TRUE, burst, BOUNDS)
    impatient = simulated(TRUE, burst, structs.replace(BOUNDS, max_wait_s=2.0))
    assert not np.isnan(kept.latency_s).any()
    assert np.isnan(impatient.latency_s).sum() == 60 - 16


def test_a_refused_request_is_simulated_with_the_median_length() -> None:
    """What it would have taken is unknown, and it is no measurement."""
    requests = [Asked(float(n), True, 20, 30, 0.1, 0.4) for n in range(4)]
    refused = Asked(4.0, False, 0, 0, 0.0, 0.0)
    run = Measured(0.1, 0, (*requests, refused))
    assert np.isnan(measured(run).latency_s).tolist() == [False] * 4 + [True]
    times = simulated(TRUE, run, BOUNDS)
    assert times.latency_s[4] == pytest.approx(times.latency_s[3])


# --- fit --------------------------------------------------------------------------------------------------------


def test_the_fit_finds_the_parameters_that_made_the_runs() -> None:
    """From runs at three loads; it then predicts other loads within 5 %."""
    runs = [run_of(load) for load in (0.2, 0.6, 1.0)]
    found = fit(runs, BOUNDS)
    assert found.step_s == pytest.approx(TRUE.step_s, rel=0.1)
    assert found.sequence_s == pytest.approx(TRUE.sequence_s, rel=0.1)
    assert found.overhead_s == pytest.approx(TRUE.overhead_s, rel=0.2)
    guess = first_guess(runs)
    others = [run_of(load) for load in (0.4, 0.8, 1.1)]
    rows = predict(found, others, BOUNDS)
    assert max(abs(row.error) for row in rows) < 0.05
    assert max(abs(row.error) for row in predict(guess, others, BOUNDS)) > 0.15


def test_the_fit_stands_noise_of_single_requests() -> None:
    """With noise of 20 % in every request, loads that were not fitted are within 15 %."""
    runs = [run_of(load, run, 0.2) for load in (0.2, 0.6, 1.0) for run in (0, 1)]
    others = [run_of(load, run, 0.2) for load in (0.4, 0.8) for run in (0, 1)]
    rows = predict(fit(runs, BOUNDS), others, BOUNDS)
    assert max(abs(row.error) for row in rows) < 0.15
    assert all(row.spread > 0 for row in rows)


def test_runs_without_an_answer_cannot_be_fitted() -> None:
    """The message says so."""
    run = Measured(0.5, 0, (Asked(0.0, False, 0, 0, 0.0, 0.0),))
    with pytest.raises(ValueError, match="no request was answered"):
        fit([run], BOUNDS)


def test_the_spread_is_that_of_equal_runs() -> None:
    """Two runs with p50 of 1.0 and 1.2 s: their mean is measured, and they are 18 % apart."""
    runs = [
        Measured(0.5, n, (Asked(0.0, True, 20, 30, 0.1, latency_s),) * 3)
        for n, latency_s in enumerate((1.0, 1.2))
    ]
    row = next(r for r in predict(TRUE, runs, BOUNDS) if r.figure == "latency p50")
    assert row.measured_s == pytest.approx(1.1)
    assert row.spread == pytest.approx(0.2 / 1.1)


def test_a_load_without_answers_is_left_out() -> None:
    """Its percentiles are unknown; a validation without any load is refused."""
    refused = Measured(0.5, 0, (Asked(0.0, False, 0, 0, 0.0, 0.0),) * 3)
    assert {row.load for row in predict(TRUE, [refused, run_of(0.2)], BOUNDS)} == {0.2}
    setting = Setting("large", "azure_conv", "2026-11-30", 9.0, BOUNDS, (0.2,))
    with pytest.raises(SystemExit, match="no load of --predict had answers"):
        command.validated(setting, [run_of(0.2), refused])


# --- record -----------------------------------------------------------------------------------------------------


def test_an_error_is_within_the_bar_or_within_the_spread() -> None:
    """20 % is too much, unless equal runs are 25 % apart."""
    assert Row(0.4, "TTFT p50", 1.14, 1.0, 0.0).within
    assert not Row(0.4, "TTFT p50", 1.2, 1.0, 0.1).within
    assert Row(0.4, "TTFT p50", 0.8, 1.0, 0.25).within


def example() -> Validation:
    """A validation with one row outside of the bar."""
    setting = Setting("large", "azure_conv", "2026-11-30", 9.0, BOUNDS, (0.2, 1.0))
    rows = (
        Row(0.4, "TTFT p50", 1.1, 1.0, 0.0),
        Row(0.4, "latency p95", 0.7, 1.0, 0.1),
    )
    return Validation(setting, TRUE, rows, (run_of(0.2),))


def test_a_validation_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """Its sentence has the largest errors of both percentiles."""
    example().save(tmp_path / "deep" / "v.json")
    assert read(tmp_path / "deep" / "v.json") == example()
    assert sentence_of(tmp_path / "deep" / "v.json") == (
        "Error of the simulator on a running system (large, azure_conv, loads 0.4, fitted at 0.2, 1, 2026-11-30): "
        "p50 at most 10%, p95 at most 30%; 1 of 2 figures within 15% or the spread of equal runs, which is at most "
        "10%."
    )


def test_an_unknown_error_is_said_to_be_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual file may be missing; one that was named may not."""
    monkeypatch.setattr(record, "DEFAULT_FILE", tmp_path / "none.json")
    assert "not measured here" in sentence_of(None)
    with pytest.raises(SystemExit, match="no validation of the simulator in"):
        sentence_of(tmp_path / "none.json")
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(SystemExit, match="no validation of the simulator in"):
        sentence_of(None)


def test_the_simulated_cluster_prints_the_error_with_every_table(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two loads, two tables, two times the sentence; the figures have it, too."""
    example().save(tmp_path / "v.json")
    options = ["--portfolio", "routellm_gsm8k", "--requests", "40", "--seeds", "1"]
    options += ["--load", "0.3", "0.6", "--calibrate", "20", "--router", "static"]
    options += ["--validation", str(tmp_path / "v.json"), "--data", folder]
    cluster.main([*options, "--json", str(tmp_path / "c.json")])
    assert capsys.readouterr().out.count(example().sentence()) == 2
    assert example().sentence() in (tmp_path / "c.json").read_text()


# --- command ----------------------------------------------------------------------------------------------------


def test_the_bounds_are_those_of_the_configuration() -> None:
    """serve_config.yaml: 32 sequences of 512 tokens, and two ingresses with queues of 64."""
    found = command.bounds_of(ROOT / "serve_config.yaml", "large")
    assert found == Bounds(32, 32 * 512, 128, 30.0)
    with pytest.raises(SystemExit, match="of 'tiny'"):
        command.bounds_of(ROOT / "serve_config.yaml", "tiny")


def test_times_count_from_the_real_time_of_sending() -> None:
    """The lag of the client is not a part of the system."""
    one = Seen(0, OK, 2.0, 0.25, 1.0, 3.0, "large", "d", "so 2", 20, 30)
    assert command.asked(one) == Asked(2.0, True, 20, 30, 0.75, 2.75)
    refused = command.asked(Seen(0, "429", 2.0, 0.25))
    assert not refused.answered and refused.latency_s == 0.0


def test_a_load_is_fitted_or_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    """A load of both would be no test of the prediction."""
    with pytest.raises(SystemExit):
        command.parse(["--fit", "0.2", "0.5", "--predict", "0.5"])
    assert "load 0.5 is both fitted and predicted" in capsys.readouterr().err


def test_the_command_measures_every_load_and_can_fit_its_file_anew(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each load has two runs with the same arrivals, a table is printed, and --again needs no gateway."""
    out = tmp_path / "v.json"
    options = ["--data", folder, "--seconds", "0.4", "--capacity", "50"]
    options += ["--fit", "0.5", "--predict", "0.4", "--out", str(out)]
    options += ["--config", str(ROOT / "serve_config.yaml")]

    def in_process(plan: Plan) -> list[Seen]:
        return asyncio.run(send(plan))

    with serving(LiveGateway({})) as gateway:
        command.main(["--url", gateway.url, *options], in_process)
    found = read(out)
    assert [(run.run, run.load) for run in found.runs] == [
        (0, 0.4),
        (0, 0.5),
        (1, 0.4),
        (1, 0.5),
    ]
    assert [len(run.requests) for run in found.runs] == [8, 10, 8, 10]
    assert found.runs[0].requests[0].prompt == TOKENS[0]
    assert {model for model, _ in gateway.asked} == {"large"}
    first = [question for _, question in gateway.asked[:8]]
    assert {question for _, question in gateway.asked[18:26]} == set(first)
    text = capsys.readouterr().out
    assert "| 0.4 " in text and "latency p95" in text and found.sentence() in text
    command.main(["--again", str(out), "--out", str(tmp_path / "w.json")])
    assert read(tmp_path / "w.json").runs == found.runs
