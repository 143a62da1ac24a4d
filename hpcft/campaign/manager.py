"""The manager's loop: read the records, look at the scheduler, decide, act; nothing is kept in memory between turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpcft.campaign.decide import (
    Action,
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
from hpcft.campaign.lease import is_mine
from hpcft.campaign.records import Records, StageRecord, read_records
from hpcft.campaign.scheduler import Scheduler
from hpcft.campaign.settings import campaign_of
from hpcft.campaign.tidy import tidy
from hpcft.config.site import Site
from hpcft.errors import CampaignStopped, LeaseHeld
from hpcft.stages.context import StageContext
from hpcft.stages.registry import stage_named
from hpcft.storage.atomic import create_json_once, read_json, write_json
from hpcft.storage.campaign_folder import RETRY_FAILURES, CampaignFolder, StageFolder


@dataclass(frozen=True)
class Turn:
    """What one look at the campaign found and led to."""

    records: Records
    observation: Observation
    actions: tuple[Action, ...]


class Manager:
    """Drives one campaign on one site. The caller holds the lease."""

    def __init__(
        self,
        folder: CampaignFolder,
        site: Site,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder, self.site = folder, site
        self.campaign = campaign_of(folder)
        self.scheduler = Scheduler(folder, self.campaign, site)
        self._clock, self._sleep = clock, sleep
        write_json(folder.site, site.model_dump(mode="json"))

    def run(self, on_turn: Callable[[Turn], None] = lambda turn: None) -> None:
        """Until the campaign is finished; raises CampaignStopped when it cannot go on by itself."""
        while True:
            turn = self.step()
            on_turn(turn)
            if any(isinstance(action, Finish) for action in turn.actions):
                return
            # Slurm may show a cancelled job for a while.
            if all(isinstance(action, Wait | CancelStrays) for action in turn.actions):
                self._sleep(self.site.poll_interval_s)

    def step(self) -> Turn:
        """One turn. The scheduler is asked before the records are read, so a task that ends in between has its result.

        The time is that before the question: an answer that took long must not make a submission look settled.
        """
        now = self._clock()
        observation = self.scheduler.observe(read_records(self.folder))
        records = read_records(self.folder)
        actions = decide(records, observation, now, self._limits(records.current))
        for action in actions:
            self._perform(action)
        return Turn(records, observation, tuple(actions))

    def _limits(self, stage: StageRecord | None) -> Limits:
        if stage is None:
            return Limits(self.campaign.max_attempts)
        name: Any = stage.name
        if self.site.executor == "slurm":
            asked = self.site.slurm_for(name)
            return Limits(self.campaign.max_attempts, self.site.task_limit(), asked.max_array_size)
        cores = stage_named(name).ranks(self.campaign) * self.campaign.resources_for(name).cpus_per_rank
        room = self.site.max_running_tasks or max(1, (self.site.task_limit() or 1) // cores)
        return Limits(self.campaign.max_attempts, room)

    def _perform(self, action: Action) -> None:
        if isinstance(action, Plan | Submit | Collect) and not is_mine(self.folder.leases):
            raise LeaseHeld(
                "another manager has taken over this campaign; this one stops without touching it"
            )
        if isinstance(action, Plan):
            self._plan(action)
        elif isinstance(action, Submit):
            self._submit(action)
        elif isinstance(action, Collect):
            context = self._context(action.round, action.stage)
            write_json(context.here.product, stage_named(action.stage).collect(context))
            tidy(context.here)
        elif isinstance(action, CancelStrays):
            self.scheduler.cancel(action.job_ids)
        elif isinstance(action, Stop):
            raise CampaignStopped(action.why)

    def _context(self, round_: int, stage: str) -> StageContext:
        return StageContext(self.folder, self.campaign, round_, stage, self.site.device)

    def _plan(self, action: Plan) -> None:
        context = self._context(action.round, action.stage)
        tasks = [dict(payload) for payload in stage_named(action.stage).plan(context)]
        context.here.path.mkdir(parents=True, exist_ok=True)
        write_json(context.here.plan, {"tasks": tasks})

    def _submit(self, action: Submit) -> None:
        """Intent, held submission, record of the ids, release: a kill between any two of them is mended by the next turn."""
        where = self.folder.stage(action.round, action.stage)
        where.intent(action.attempt).parent.mkdir(parents=True, exist_ok=True)
        intent = {
            "attempt": action.attempt,
            "tasks": list(action.tasks),
            "job_name": self.scheduler.job_name(action.round, action.stage, action.attempt),
            "at": self._clock(),
        }
        if not create_json_once(where.intent(action.attempt), intent):
            raise LeaseHeld(f"attempt {action.attempt} of {where.path} was submitted by another manager")
        ranks = stage_named(action.stage).ranks(self.campaign)
        job_ids = self.scheduler.submit(action.round, action.stage, action.tasks, action.attempt, ranks)
        by_task = {str(task): job_id for task, job_id in zip(action.tasks, job_ids, strict=True)}
        write_json(where.submitted(action.attempt), {"job_ids": by_task, "at": self._clock()})
        self.scheduler.release(job_ids)


def record_resume(folder: CampaignFolder, now: float) -> None:
    """Note that the user wants to go on: tasks that were given up get a new set of attempts, failed labels another try."""
    stage = read_records(folder).current
    if stage is None:
        return
    if stage.num_tasks and not stage.missing:
        _reopen_tasks_with_failures(folder.stage(stage.round, stage.name), stage.num_tasks)
    newest = max((attempt.number for attempt in stage.attempts), default=0)
    marker = {"at": now, "round": stage.round, "stage": stage.name, "attempt": newest}
    folder.resumes.mkdir(exist_ok=True)
    number = len(list(folder.resumes.glob("*.json")))
    while not create_json_once(folder.resumes / f"{number:04d}.json", marker):
        number += 1


def _reopen_tasks_with_failures(where: StageFolder, num_tasks: int) -> None:
    """All tasks are done, yet the stage could not be collected: those that report failures are run again."""
    for task in map(where.task, range(num_tasks)):
        if read_json(task.result).get("failed"):
            write_json(task.path / RETRY_FAILURES, {})
            task.result.rename(task.path / f"result-before-{time.time_ns()}.json")


def stage_line(stage: StageRecord, alive: int) -> str:
    """One plain line about a stage, for logs and pipes."""
    if stage.num_tasks is None:
        return f"round {stage.round} {stage.name}: planning"
    return f"round {stage.round} {stage.name}: {len(stage.done)} of {stage.num_tasks} tasks done, {alive} waiting or running"
