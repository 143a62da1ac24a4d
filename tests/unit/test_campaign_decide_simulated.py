"""Whole campaigns on a simulated machine on which everything goes wrong that a drawn script says; then it is healthy."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated_machine import STAGES, Machine, ManagerKilled

from hpcft.campaign.decide import (
    LIMIT_BACKOFF_S,
    SETTLING_S,
    Action,
    Adopt,
    CancelStrays,
    Collect,
    Finish,
    Observation,
    Plan,
    RecordEndings,
    SetAside,
    Stop,
    Submit,
    Wait,
    decide,
    is_open,
)
from hpcft.campaign.policy import INTERRUPTIONS, Limits
from hpcft.campaign.records import Records
from hpcft.campaign.scheduler import Scheduler
from hpcft.config.site import Site
from hpcft.errors import SchedulerUnavailable

MAX_TURNS = 3000
SITE = Site.model_validate({"name": "cluster", "executor": "slurm", "slurm": {}})


def new_scheduler(machine: Machine) -> Scheduler:
    """As of a manager that has just been started: it remembers nothing."""
    folder: Any = SimpleNamespace(read_identity=lambda: {"id": "0123abcd"})
    no_campaign: Any = None
    return Scheduler(folder, no_campaign, SITE, machine.run, lambda: machine.clock)


def has_failed(machine: Machine, task: int, limits: Limits) -> bool:
    stage = machine.stage
    endings = [e for e in stage.endings.get(task, ()) if e.attempt > stage.resumed_after]
    if not endings:
        return False
    error = stage.error(task, endings[-1].attempt)
    interrupted = sum(e.cause in INTERRUPTIONS for e in endings)
    return (
        bool(error and error["final"] and endings[-1].cause == "error")
        or len(endings) - interrupted >= limits.max_attempts
        or interrupted >= limits.max_interruptions
    )


def check_submissions(
    machine: Machine, actions: list[Submit], observation: Observation, limits: Limits
) -> None:
    stage = machine.stage
    assert observation.known, "Slurm is silent"
    tasks = [task for action in actions for task in action.tasks]
    assert len(set(tasks)) == len(tasks)
    assert all(action.tasks for action in actions)
    numbers = [action.attempt for action in actions]
    assert numbers == sorted(set(numbers))
    assert numbers[0] > max((a.number for a in stage.attempts), default=0)
    for task in tasks:
        assert task in stage.missing
        assert machine.may_run(task) == [], "a job of this task may still run"
        assert task not in machine.finished, "its result was only on its way"
        assert not has_failed(machine, task, limits)
        latest = stage.latest_attempt(task)
        if latest is not None and latest.job_ids is None:
            assert machine.clock - latest.at >= SETTLING_S, "it may still arrive"
        if latest is not None and latest.job_ids is not None:
            assert stage.ending(task, latest.number) is not None, (
                "nobody has written down how the last one ended"
            )
    packed = limits.tasks_per_job
    num_jobs = [-(-len(action.tasks) // packed) for action in actions]
    if limits.max_running is not None:
        assert (
            len({task for task in stage.missing if machine.may_run(task)}) + len(tasks) <= limits.max_running
        )
    if limits.max_array is not None:
        assert max(num_jobs) <= limits.max_array
    if limits.room is not None:
        assert sum(num_jobs) <= limits.room


def check_stop(machine: Machine, action: Stop, limits: Limits) -> None:
    """It is justified by a refusal or by tasks that have failed, and then nothing is left running unattended."""
    stage = machine.stage
    assert f"round {stage.round}, stage {stage.name}" in action.why
    newest = stage.attempts[-1]
    if newest.rejected is not None and not newest.rejected.limit and "Invalid qos" in action.why:
        assert newest.number > stage.resumed_after
        return
    failed = [task for task in stage.missing if has_failed(machine, task, limits)]
    assert len(failed) + len(stage.set_aside) > limits.tolerated
    assert [task for task in stage.missing if machine.may_run(task)] == []


def check_wait(machine: Machine, records: Records, observation: Observation, now: float) -> None:
    stage = records.current
    assert stage is not None
    newest = stage.attempts[-1] if stage.attempts else None
    backing_off = newest is not None and newest.rejected is not None and now - newest.at < LIMIT_BACKOFF_S
    waits_for_something = (
        not observation.known
        or observation.alive
        or backing_off
        or any(is_open(stage, t) for t in stage.missing)
    )
    assert waits_for_something, "nothing would ever change"


def check_endings(machine: Machine, action: RecordEndings) -> None:
    for task, ending in action.endings.items():
        latest = machine.stage.latest_attempt(task)
        assert latest is not None
        assert latest.number == ending.attempt
        assert machine.stage.ending(task, latest.number) is None
        assert machine.may_run(task) == [], "it has not ended"
        assert task not in machine.finished, "its result was only on its way"


def perform(machine: Machine, scheduler: Scheduler, action: Action) -> None:
    match action:
        case Plan():
            assert machine.stage.num_tasks is None
            machine.plan()
        case Submit():
            machine.submit(action, scheduler.release)
        case Adopt():
            attempt = next(a for a in machine.stage.attempts if a.number == action.attempt)
            assert attempt.job_ids is None
            assert all(machine.may_run(task) == [] for task in attempt.tasks)
            machine.adopt(action, scheduler.release)
        case RecordEndings():
            check_endings(machine, action)
            machine.record_endings(action)
        case SetAside():
            machine.set_aside(action)
        case Collect():
            assert machine.stage.missing == ()
            machine.collect()
        case CancelStrays():
            scheduler.cancel(action.job_ids)


def drive(
    machine: Machine, limits: Limits, resumes: int, max_submitted: int | None = None
) -> tuple[str, int]:
    """Run the campaign to its end; returns how it ended and how many resumes it took."""
    resumed = 0
    must_submit: set[int] = set()
    scheduler = new_scheduler(machine)
    for _ in range(MAX_TURNS):
        now = machine.clock
        observation = scheduler.observe(machine.records())
        machine.let_time_pass()  # between the look at the queue and that at the records
        records = machine.records()
        jobs = {queued.job_id for queued in observation.alive.values()}
        here = limits if max_submitted is None else replace(limits, room=max(0, max_submitted - len(jobs)))
        actions = decide(records, observation, now, here)
        assert actions == decide(records, observation, now, here)
        assert len(actions) == 1 or all(isinstance(action, Submit) for action in actions)
        submissions = [action for action in actions if isinstance(action, Submit)]
        if submissions:
            check_submissions(machine, submissions, observation, here)
        try:
            for action in actions:
                assert getattr(action, "round", machine.stage.round) == machine.stage.round
                assert getattr(action, "stage", machine.stage.name) == machine.stage.name
                if isinstance(action, SetAside):
                    assert all(has_failed(machine, task, limits) for task in action.why)
                    assert len(machine.stage.set_aside) + len(action.why) <= limits.tolerated
                if isinstance(action, Submit):
                    must_submit -= set(action.tasks)
                perform(machine, scheduler, action)
        except SchedulerUnavailable:
            pass
        except ManagerKilled:
            scheduler = new_scheduler(machine)
        for task in machine.stage.missing:
            assert len(machine.may_run(task)) <= 1, "two jobs of one task may run"
        if isinstance(actions[0], Finish):
            assert len(machine.stages) == len(STAGES)
            assert all(stage.product is not None and not stage.missing for stage in machine.stages)
            assert all(len(stage.set_aside) <= limits.tolerated for stage in machine.stages)
            return "finished", resumed
        if isinstance(actions[0], Wait):
            check_wait(machine, records, observation, now)
        if isinstance(actions[0], Stop):
            check_stop(machine, actions[0], limits)
            failed = {task for task in machine.stage.missing if has_failed(machine, task, limits)}
            assert not must_submit & failed, "a task that was resumed has had no new attempt"
            if resumed == resumes:
                return "stopped", resumed
            resumed += 1
            must_submit |= failed
            machine.resume()
            scheduler = new_scheduler(machine)
    raise AssertionError(f"no end after {MAX_TURNS} turns: {machine}")


counts = st.lists(st.integers(1, 5), min_size=len(STAGES), max_size=len(STAGES))
scripts = st.lists(st.integers(0, 27719), max_size=200)
few = st.one_of(st.none(), st.integers(1, 3))
bounds = st.builds(
    Limits,
    max_attempts=st.integers(1, 3),
    max_interruptions=st.integers(1, 3),
    max_running=few,
    max_array=few,
    tasks_per_job=st.sampled_from([1, 1, 2, 3]),
    tolerated=st.sampled_from([0, 0, 1, 2]),
    memory_GB=st.sampled_from([None, 2.0]),
    max_time_min=st.sampled_from([None, 200]),
    max_memory_GB=st.sampled_from([None, 16.0]),
)
capacities = st.sampled_from([10**6, 1, 2, 3])


@settings(max_examples=250)
@given(counts, scripts, bounds, st.integers(0, 2), capacities, few)
@example([1, 1, 1, 1], [], Limits(max_attempts=1, max_running=1), 0, 1, 1)
def test_a_campaign_on_a_faulty_machine_runs_no_task_twice_and_ends_with_all_results_or_a_justified_stop(
    num_tasks: list[int],
    script: list[int],
    limits: Limits,
    resumes: int,
    capacity: int,
    max_submitted: int | None,
) -> None:
    machine = Machine(num_tasks, list(script), capacity, limits.tasks_per_job)
    end, _ = drive(machine, limits, resumes, max_submitted)
    assert end in ("finished", "stopped")
    if not script:
        assert end == "finished"
        assert not any(stage.set_aside for stage in machine.stages)


@settings(max_examples=100)
@given(counts, scripts, bounds, capacities, few)
def test_a_user_who_resumes_often_enough_comes_to_the_end(
    num_tasks: list[int], script: list[int], limits: Limits, capacity: int, max_submitted: int | None
) -> None:
    machine = Machine(num_tasks, list(script), capacity, limits.tasks_per_job)
    end, resumed = drive(machine, limits, resumes=len(script), max_submitted=max_submitted)
    assert end == "finished"
    assert resumed <= len(script)
