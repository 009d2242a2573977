"""The history of roles: what changed, when, by whom and why; and what the state says of the router itself."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from deployments.journal.rollout_state import AUTOMATIC, RoleChange
from deployments.router.role_table import MAX_HISTORY
from deployments.tracking.tracker import Tracker
from policies.rollout.roles import CHALLENGER
from policies.types import Objective, Request
from tests.deployments.router.test_rollout import System, make_settings
from tests.support.fakes import Remote
from tests.support.requests import make_profile


def lines(system: System) -> list[tuple[str, int, str | None, int | None]]:
    """What changed, which version, by whom, and the first of several registrations."""
    history = system.rollout.summary().history
    return [(c.what, c.version, c.by, c.first) for c in history]


async def test_each_change_has_a_time_and_an_author(tmp_path: Path) -> None:
    """Operators by the name of their key, the router itself as automatic; a restart keeps all of it."""

    began = time.time()
    system = System(make_settings(tmp_path))
    router = system.router
    await system.serve(20)
    await router.record_published(1, 0)
    version = await system.version(5)
    await router.assign_role(CHALLENGER, version, 0.1, "", "ann")
    await router.promote("better", "ann")
    await router.roll_back("it is Friday", "ben")
    assert lines(system) == [
        ("registered", 1, AUTOMATIC, None),
        ("seated", 5, "ann", None),
        ("promoted", 5, "ann", None),
        ("rolled back", 1, "ben", None),
        ("retired", 5, "ben", None),
    ]
    history = system.rollout.summary().history
    assert history[3].loser == 5 and history[3].account == "by ben: it is Friday"
    times = [change.time_s or 0.0 for change in history]
    assert began <= times[0] and times == sorted(times)
    assert System(system.settings).rollout.summary().history == history


async def test_what_the_router_does_by_itself_is_automatic(tmp_path: Path) -> None:
    """A regression rolls back with its reason; another policy in the settings is in the history, too."""

    system = System(make_settings(tmp_path, watch_share=0.2))
    await system.serve(100)
    version = await system.version(5)
    worse = replace(version, policy="always", options={"arm": "small"}, state={})
    await system.assign(role=CHALLENGER, snapshot=worse, share=0.1)
    await system.router.promote("because", "ann")
    served = 0
    while system.rollout.watch is not None:
        served += len(await system.serve(50))
        assert served < 3000
    last = system.rollout.summary().history[-2]
    assert last.what == "rolled back" and last.by == AUTOMATIC
    assert last.account == last.reason and "rolls back" in last.reason
    settings = system.settings.model_copy(
        update={"policy": system.settings.policy.model_copy(update={"name": "uniform"})}
    )
    await system.router.configure(settings)
    assert lines(system)[-1] == ("configured", 0, AUTOMATIC, None)


async def test_registrations_do_not_push_the_changes_of_roles_out(
    tmp_path: Path,
) -> None:
    """Those that follow one another without an operator are one entry, with the first and the last number."""

    system = System(make_settings(tmp_path))
    router = system.router
    await router.assign_role(CHALLENGER, await system.version(90), 0.1, "", "ann")
    for number in range(1, 3 * MAX_HISTORY):
        await router.record_published(number, number - 1)
    last = 3 * MAX_HISTORY - 1
    assert lines(system) == [
        ("seated", 90, "ann", None),
        ("registered", last, AUTOMATIC, 1),
    ]
    await router.record_published(last + 1, last, "ann")
    await router.record_published(last + 2, None, "ann")
    await router.record_published(last + 3, last + 1)
    assert [line[0:3] for line in lines(system)[2:]] == [
        ("registered", last + 1, "ann"),
        ("registered", last + 2, "ann"),
        ("registered", last + 3, AUTOMATIC),
    ]
    assert [c.role for c in system.rollout.summary().history][-2:] == [
        "",
        "champion",
    ]
    assert system.rollout.version == last + 3


async def test_a_version_that_a_new_router_adopts_is_in_the_history(
    tmp_path: Path,
) -> None:
    """So its champion does not come from nowhere."""

    old = System(make_settings(tmp_path / "old"))
    await old.serve(50)
    version = await old.version(7)
    new = System(make_settings(tmp_path / "new"))
    assert await new.router.adopt(version)
    assert lines(new) == [("adopted", 7, AUTOMATIC, None)]
    assert System(new.settings).rollout.version == 7


def test_a_history_of_an_earlier_release_is_read() -> None:
    """Its entries have neither a time nor an author, and are stored again as they were."""
    old: dict[str, Any] = {
        "what": "promoted",
        "role": "champion",
        "version": 3,
        "reason": "by ann",
    }
    change = msgspec.convert(old, RoleChange)
    assert change.time_s is None and change.by is None and change.account == "by ann"
    assert msgspec.to_builtins(change) == old


async def test_the_state_has_the_age_the_export_and_the_last_use(
    tmp_path: Path,
) -> None:
    """The export is unknown until the tracker reports; a failure keeps the time of the last success."""

    system = System(make_settings(tmp_path))
    router = system.router
    await system.serve(20)
    plain = (await router.summary()).plain()
    assert plain["uptime_s"] >= 0 and plain["journal"]["waiting_rows"] == 0
    unknown = {
        "row": None,
        "waiting_rows": None,
        "succeeded_s": None,
        "reported_s": None,
        "problem": "",
    }
    assert plain["export"] == unknown and plain["last_used_s"] == {}
    last = system.learner.journal.last_row
    began = time.time()
    await router.record_export(last - 3)
    export = (await router.summary()).export
    assert (export.row, export.waiting_rows) == (last - 3, 3)
    assert export.succeeded_s == export.reported_s and not export.problem
    await router.record_export(last - 3, "MlflowException")
    failed = (await router.summary()).export
    assert failed.problem == "MlflowException"
    assert failed.succeeded_s == export.succeeded_s
    assert (failed.reported_s or 0.0) >= (export.reported_s or 0.0) >= began
    request = Request(
        system.learner.ids.new_id(time.time()),
        make_profile(),
        Objective(),
        owner="ann",
    )
    (decision,) = await router.decide([request], "test", {})
    used = (await router.summary()).last_used_s
    assert used == {"ann": decision.time_s}
    await system.learner.journal.flush()
    again = System(system.settings)
    assert (await again.router.summary()).last_used_s == used


async def test_the_tracker_reports_its_export(tmp_path: Path, mlflow_uri: str) -> None:
    """With the last exported row; a failure with the kind of the error; nothing without MLflow."""

    settings = make_settings(tmp_path).model_copy(
        update={"mlflow_uri": mlflow_uri, "experiment": "test"}
    )
    system = System(settings)
    await system.serve(20)
    tracker = Tracker(settings, Remote(system.router), 0.0)
    await tracker._track()
    await tracker._report_export()
    export = (await system.router.summary()).export
    assert export.waiting_rows == 0 and export.row == system.learner.journal.last_row
    await tracker._report_export("MlflowException")
    assert (await system.router.summary()).export.problem == "MlflowException"
    broken = Remote(system.router)
    broken.broken = True
    tracker._router = broken
    await tracker._report_export()  # the next turn reports again
    bare = System(make_settings(tmp_path / "bare"))
    await Tracker(bare.settings, Remote(bare.router), 0.0)._report_export()
    assert (await bare.router.summary()).export.row is None
