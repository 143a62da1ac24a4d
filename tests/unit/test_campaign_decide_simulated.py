"""Whole campaigns on a simulated machine on which everything goes wrong that a drawn script says; then it is healthy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpcft.campaign.decide import (
    SETTLING_S,
    CancelStrays,
    Collect,
    Finish,
    Limits,
    Observation,
    Plan,
    Stop,
    Submit,
    Wait,
    decide,
)
from hpcft.campaign.records import Attempt, Records, StageRecord, TaskKey

STAGES = ((0, "probe"), (0, "evaluate"), (1, "label"), (1, "train"))
MAX_TURNS = 600


@dataclass
class Job:
    key: TaskKey
    attempt: int
    recorded: bool
    seen_from: float
    """Slurm shows a submission whose answer was lost only after a while."""


@dataclass
class Machine:
    """Truth about one campaign: what runs, what has ended, what is written down. `script` holds the disturbances."""

    num_tasks: Sequence[int]
    script: list[int]
    clock: float = 0.0
    jobs: list[Job] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=lambda: [StageRecord(*STAGES[0])])

    def draw(self, *fates: str) -> str:
        """The next fate of the script; the first, healthy one when the script has come to its end."""
        return fates[self.script.pop() % len(fates)] if self.script else fates[0]

    @property
    def stage(self) -> StageRecord:
        return self.stages[-1]

    def change(self, **values: object) -> None:
        self.stages[-1] = replace(self.stage, **values)  # type: ignore[arg-type]

    def records(self) -> Records:
        return Records(tuple(self.stages), rounds=1)

    def jobs_of(self, task: int) -> list[Job]:
        return [job for job in self.jobs if job.key == (self.stage.round, self.stage.name, task)]

    def observe(self) -> Observation:
        if self.draw("answers", "answers", "answers", "is down") == "is down":
            return Observation(known=False)
        here = [job for job in self.jobs if job.key[:2] == (self.stage.round, self.stage.name)]
        seen = [job for job in here if job.seen_from <= self.clock]
        strays = tuple(f"{job.attempt}_{job.key[2]}" for job in seen if not job.recorded)
        return Observation(frozenset(job.key for job in seen if job.recorded), True, strays)

    def let_time_pass(self) -> None:
        """Running tasks end in any order: with a result, with an error, or without a word; a held one never runs."""
        self.clock += float(self.draw("10", "0", "1", "60"))
        for job in [job for job in self.jobs if job.recorded]:
            fate = self.draw(
                "finishes", "runs", "runs", "is killed", "fails", "fails for good", "is requeued"
            )
            if fate in ("runs", "is requeued"):
                continue
            self.jobs.remove(job)
            task = job.key[2]
            if fate == "finishes":
                self.change(done=self.stage.done | {task})
            elif fate != "is killed":
                entry = {"attempt": job.attempt, "final": fate == "fails for good", "message": fate}
                known = self.stage.errors.get(task, ())
                self.change(errors={**self.stage.errors, task: (*known, entry)})

    def submit(self, action: Submit) -> None:
        fate = self.draw("recorded", "recorded", "never arrived", "answer lost", "answer lost, seen late")
        job_ids = {task: f"{action.attempt}_{task}" for task in action.tasks} if fate == "recorded" else None
        attempt = Attempt(action.attempt, action.tasks, f"job-{action.attempt}", self.clock, job_ids)
        self.change(attempts=(*self.stage.attempts, attempt))
        if fate != "never arrived":
            late = SETTLING_S if fate == "answer lost, seen late" else 0.0
            for task in action.tasks:
                key = (action.round, action.stage, task)
                self.jobs.append(Job(key, action.attempt, job_ids is not None, self.clock + late))

    def resume(self) -> None:
        self.change(resumed_after=max((a.number for a in self.stage.attempts), default=0))


def check_submission(machine: Machine, action: Submit, observation: Observation, limits: Limits) -> None:
    stage = machine.stage
    assert observation.known
    assert action.tasks
    assert len(set(action.tasks)) == len(action.tasks)
    assert action.attempt > max((a.number for a in stage.attempts), default=0)
    for task in action.tasks:
        assert task not in stage.done
        assert machine.jobs_of(task) == [], "a job of this task may still run"
        latest = stage.latest_attempt(task)
        if latest is not None:
            assert latest.job_ids is not None or machine.clock - latest.at >= SETTLING_S
        since = [a.number for a in stage.attempts if task in a.tasks and a.number > stage.resumed_after]
        assert len(since) < limits.max_attempts
        assert not any(e["final"] and e["attempt"] in since for e in stage.errors.get(task, ()))
    if limits.max_running is not None:
        assert len(machine.jobs) + len(action.tasks) <= limits.max_running
    if limits.max_array is not None:
        assert len(action.tasks) <= limits.max_array


def check_stop(machine: Machine, action: Stop, limits: Limits) -> None:
    """It is justified by a task that has failed, and nothing is left running unattended."""
    stage = machine.stage
    assert [job for job in machine.jobs if job.recorded] == []
    assert f"round {stage.round}, stage {stage.name}" in action.why

    def has_failed(task: int) -> bool:
        since = [a.number for a in stage.attempts if task in a.tasks and a.number > stage.resumed_after]
        final = any(e["final"] and e["attempt"] in since for e in stage.errors.get(task, ()))
        return final or len(since) >= limits.max_attempts

    assert any(has_failed(task) for task in stage.missing)


def drive(machine: Machine, limits: Limits, resumes: int) -> tuple[str, int]:
    """Run the campaign to its end; returns how it ended and how many resumes it took."""
    resumed = 0
    must_submit: set[int] = set()
    for _ in range(MAX_TURNS):
        now, observation = machine.clock, machine.observe()
        machine.let_time_pass()  # between the look at the queue and that at the records
        records = machine.records()
        actions = decide(records, observation, now, limits)
        assert actions == decide(records, observation, now, limits)
        assert len(actions) == 1
        match actions[0]:
            case Finish():
                assert len(machine.stages) == len(STAGES)
                assert machine.stage.product is not None
                return "finished", resumed
            case Plan(round_, name):
                assert (round_, name) == (machine.stage.round, machine.stage.name)
                assert machine.stage.num_tasks is None
                machine.change(num_tasks=machine.num_tasks[len(machine.stages) - 1])
            case Submit() as action:
                assert (action.round, action.stage) == (machine.stage.round, machine.stage.name)
                check_submission(machine, action, observation, limits)
                must_submit -= set(action.tasks)
                machine.submit(action)
            case Collect(round_, name):
                assert (round_, name) == (machine.stage.round, machine.stage.name)
                assert machine.stage.done == set(range(machine.stage.num_tasks or 0))
                machine.change(product={})
                machine.jobs.clear()  # held ones of a lost submission are worth nothing any more
                if len(machine.stages) < len(STAGES):
                    machine.stages.append(StageRecord(*STAGES[len(machine.stages)]))
            case CancelStrays(job_ids):
                named = [job for job in machine.jobs if f"{job.attempt}_{job.key[2]}" in job_ids]
                assert named
                assert not any(job.recorded for job in named)
                machine.jobs = [job for job in machine.jobs if job not in named]
            case Stop() as action:
                check_stop(machine, action, limits)
                assert not must_submit, "a task that was resumed has had no new attempt"
                if resumed == resumes:
                    return "stopped", resumed
                resumed += 1
                must_submit = {
                    task for task in machine.stage.missing if f"ask {task}" in action.why.split(" failed")[0]
                }
                machine.resume()
            case Wait():
                waits_for_something = (
                    not observation.known
                    or observation.alive
                    or any(a.job_ids is None for a in machine.stage.attempts)
                )
                assert waits_for_something, "nothing would ever change"
    raise AssertionError(f"no end after {MAX_TURNS} turns: {machine}")


counts = st.lists(st.integers(1, 4), min_size=len(STAGES), max_size=len(STAGES))
scripts = st.lists(st.integers(0, 419), max_size=150)
few = st.one_of(st.none(), st.integers(1, 3))
bounds = st.builds(Limits, st.integers(1, 3), few, few)


@settings(max_examples=250, deadline=None)
@given(counts, scripts, bounds, st.integers(0, 2))
@example([1, 1, 1, 1], [], Limits(1, 1), 0)
def test_a_campaign_on_a_faulty_machine_runs_no_task_twice_and_ends_with_all_results_or_a_justified_stop(
    num_tasks: list[int], script: list[int], limits: Limits, resumes: int
) -> None:
    machine = Machine(num_tasks, list(script))
    end, _ = drive(machine, limits, resumes)
    assert end in ("finished", "stopped")
    if not script:
        assert end == "finished"


@settings(max_examples=100, deadline=None)
@given(counts, scripts, bounds)
def test_a_user_who_resumes_often_enough_comes_to_the_end(
    num_tasks: list[int], script: list[int], limits: Limits
) -> None:
    machine = Machine(num_tasks, list(script))
    end, resumed = drive(machine, limits, resumes=len(script))
    assert end == "finished"
    assert resumed <= len(script)
