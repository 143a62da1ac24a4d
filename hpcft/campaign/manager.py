"""The manager's loop: read the records, look at the scheduler, decide, act; nothing is kept in memory between turns."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpcft import __version__
from hpcft.campaign.decide import (
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
)
from hpcft.campaign.lease import is_mine
from hpcft.campaign.policy import Limits
from hpcft.campaign.records import Records, StageRecord, read_attempt, read_records
from hpcft.campaign.scheduler import Scheduler
from hpcft.campaign.settings import settings_of
from hpcft.campaign.tidy import is_tidy, tidy
from hpcft.config.site import Site
from hpcft.errors import CampaignStopped, LeaseHeld, SchedulerUnavailable, SubmissionRefused
from hpcft.stages.context import Stage, StageContext
from hpcft.stages.registry import stage_named
from hpcft.storage.atomic import create_json_once, read_json, write_json
from hpcft.storage.campaign_folder import RETRY_FAILURES, CampaignFolder, StageFolder

# How often the folder of results is looked at between two questions to the scheduler.
_GLANCE_S = 1.0
_LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True)
class Turn:
    """What one look at the campaign found and led to."""

    records: Records
    observation: Observation
    actions: tuple[Action, ...]
    unconfirmed: str = ""
    """What Slurm did not confirm in this turn, such as a submission."""

    @property
    def silence(self) -> str:
        """What Slurm said instead of an answer."""
        return self.unconfirmed or self.observation.silence

    @property
    def scheduler_answers(self) -> bool:
        return self.observation.known and not self.unconfirmed

    @property
    def is_last(self) -> bool:
        """The campaign is finished."""
        return any(isinstance(action, Finish) for action in self.actions)

    @property
    def is_idle(self) -> bool:
        """Nothing was done that could lead to something else at once. (Slurm may show a cancelled job for a while.)"""
        return bool(self.unconfirmed) or all(isinstance(a, Wait | CancelStrays) for a in self.actions)


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
        self.settings = settings_of(folder)
        self.scheduler = Scheduler(folder, self.settings, site)
        self._clock, self._sleep = clock, sleep
        self.leaves_controller = False
        """One place in the queue is a controller's, which has yet to be submitted."""
        if not folder.site.exists() or read_records(folder).current is not None:
            # A finished campaign stays where it ran: a call that does nothing must not decide where a later one goes on.
            write_json(folder.site, site.model_dump(mode="json"))

    def run(self, on_turn: Callable[[Turn], None] = lambda turn: None) -> None:
        """Until the campaign is finished; raises CampaignStopped when it cannot go on by itself.

        While Slurm does not answer it is asked less and less often; SchedulerUnavailable once the site's patience
        is at its end.
        """
        silent_since: float | None = None
        while True:
            turn = self.step()
            on_turn(turn)
            if turn.is_idle or turn.is_last:
                self.tidy_finished(turn.records)
            if turn.is_last:
                return
            now = self._clock()
            silent_since = None if turn.scheduler_answers else now if silent_since is None else silent_since
            if silent_since is not None and now - silent_since > self.site.patience_min * 60:
                raise SchedulerUnavailable(
                    f"Slurm has not answered for {self.site.patience_min:g} minutes. Nothing is lost, jobs may go on: "
                    "look whether it is back, then go on with hpcft resume."
                )
            if turn.is_idle:
                silence = 0.0 if silent_since is None else now - silent_since
                self.wait(turn, min(_LONGEST_PAUSE_S, silence / 4))

    def wait(self, turn: Turn, at_least_s: float = 0.0) -> None:
        """Until it is time to ask the scheduler again, or until all tasks of the stage have a result."""
        stage = turn.records.current
        left = max(self.site.poll_interval_s, at_least_s)
        glance_s = _GLANCE_S
        while left > 0:
            self._sleep(min(left, glance_s))
            left -= glance_s
            if stage is None or not stage.num_tasks:
                return
            start = time.monotonic()
            outcomes = self.folder.stage(stage.round, stage.name).list_outcomes()
            if len(outcomes.done | outcomes.set_aside) >= stage.num_tasks:
                return
            # Ten thousand names on a busy file system are not listed every second.
            glance_s = max(_GLANCE_S, 50 * (time.monotonic() - start))

    def step(self) -> Turn:
        """One turn. The scheduler is asked before the records are read, so a task that ends in between has its result.

        The time is that before the question: an answer that took long must not make a submission look settled.
        """
        now = self._clock()
        records = read_records(self.folder)
        if records.current is not None and records.current.missing:
            observation = self.scheduler.observe(records)
            records = read_records(self.folder)
            if observation.known:
                self._note_observation(records, observation, now)
        else:
            observation = Observation()
        limits = self._limits(records.current, observation) if observation.known else Limits()
        actions = decide(records, observation, now, limits)
        unconfirmed = ""
        for action in actions:
            try:
                self._perform(action)
            except CampaignStopped as stop:
                self._record_stop(records, str(stop))
                raise
            except SchedulerUnavailable as error:
                unconfirmed = str(error)  # the next turn sees what came of it
                break
            except SubmissionRefused:
                break  # it is on record; the rest of the turn would be refused as well
        return Turn(records, observation, tuple(actions), unconfirmed)

    def _record_stop(self, records: Records, why: str) -> None:
        """For `status`, and for `resume`: only what has stopped a campaign is tried again with everything in it."""
        stage = records.current
        if stage is not None:
            about = {"round": stage.round, "stage": stage.name, "why": why, "at": self._clock()}
            write_json(self.folder.stopped, about)

    def tidy_finished(self, records: Records) -> None:
        """Pack the stages that have a product, also those that a killed manager has left.

        For the drivers to call once the next stage is under way: packing thousands of tasks takes a while.
        """
        for stage in records.stages:
            where = self.folder.stage(stage.round, stage.name)
            if stage.product is not None and not is_tidy(where):
                tidy(where)

    def _note_observation(self, records: Records, observation: Observation, now: float) -> None:
        """For readers while Slurm does not answer them: what was seen last, and when."""
        stage = records.current
        if stage is None or not self.scheduler.is_slurm:
            return
        reasons = Counter(queued.reason for queued in observation.alive.values() if not queued.is_running)
        seen = {
            "at": now,
            "round": stage.round,
            "stage": stage.name,
            "running": sum(queued.is_running for queued in observation.alive.values()),
            "pending": dict(reasons),
        }
        write_json(self.folder.observed, seen)

    def _limits(self, stage: StageRecord | None, observation: Observation) -> Limits:
        if stage is None:
            return Limits()
        name: Any = stage.name
        resources = self.settings.resources_for(name)
        common = Limits(
            self.settings.max_attempts,
            self.settings.max_interruptions,
            tolerated=int(self.settings.tolerated_tasks(name) * (stage.num_tasks or 0)),
            time_min=resources.time_min,
            memory_GB=resources.memory_GB,
        )
        ranks = self._stage(name).ranks(self.settings)
        if self.site.executor == "slurm":
            allowed = self.scheduler.limits(name)
            return replace(
                common,
                max_running=self.site.task_limit(),
                max_array=allowed.max_array_size,
                room=self._room(allowed.max_submitted, observation),
                tasks_per_job=self.scheduler.tasks_per_job(name, ranks),
                # Where Slurm names no limit there is none; where Slurm was not heard none is known.
                max_time_min=allowed.max_time_min or (math.inf if self.scheduler.knows_limits else None),
                max_memory_GB=allowed.max_memory_GB,
                num_nodes=self.scheduler.num_nodes(name),
            )
        cores = ranks * resources.cpus_per_rank
        room = self.site.max_running_tasks or max(1, (self.site.task_limit() or 1) // cores)
        return replace(common, max_running=room)

    def _room(self, most: int | None, observation: Observation) -> int | None:
        """Jobs that may be submitted now. With none of ours in the queue one is tried: a refusal does no harm."""
        if most is None:
            return None
        left = most - observation.num_queued - (1 if self.leaves_controller else 0)
        return max(left, 0 if observation.alive else 1)

    def _perform(self, action: Action) -> None:
        if isinstance(action, Plan | Submit | Adopt | RecordEndings | SetAside | Collect) and not is_mine(
            self.folder.leases
        ):
            raise LeaseHeld(
                "another manager has taken over this campaign; this one stops without touching it"
            )
        if isinstance(action, Plan):
            self._plan(action)
        elif isinstance(action, Submit):
            self._submit(action)
        elif isinstance(action, Adopt):
            self._adopt(action)
        elif isinstance(action, RecordEndings):
            self._record_endings(action)
        elif isinstance(action, SetAside):
            where = self.folder.stage(action.round, action.stage)
            for task, why in action.why.items():
                create_json_once(where.task(task).aside, {"why": why, "at": self._clock()})
        elif isinstance(action, Collect):
            context = self._context(action.round, action.stage)
            tasks = len(context.plan())
            write_json(context.here.product, {**self._stage(action.stage).collect(context), "tasks": tasks})
        elif isinstance(action, CancelStrays):
            self.scheduler.cancel(action.job_ids)
        elif isinstance(action, Stop):
            raise CampaignStopped(action.why)

    def _stage(self, name: str) -> Stage:
        return stage_named(name, self.settings.kind)

    def _context(self, round_: int, stage: str) -> StageContext:
        return StageContext(
            self.folder, self.settings, round_, stage, self.site.device, self.site.mpi_launcher
        )

    def _plan(self, action: Plan) -> None:
        context = self._context(action.round, action.stage)
        tasks = [dict(payload) for payload in self._stage(action.stage).plan(context)]
        context.here.attempts.mkdir(parents=True, exist_ok=True)
        context.here.outcomes.mkdir(exist_ok=True)
        write_json(context.here.plan, {"tasks": tasks})

    def _submit(self, action: Submit) -> None:
        """Intent, held submission, record of the ids, release: a kill between any two of them is mended by the next turn."""
        where = self.folder.stage(action.round, action.stage)
        ranks = self._stage(action.stage).ranks(self.settings)
        intent = {
            "attempt": action.attempt,
            "tasks": list(action.tasks),
            "tasks_per_job": self.scheduler.tasks_per_job(action.stage, ranks),
            "job_name": self.scheduler.job_name(action.round, action.stage, action.attempt),
            "at": self._clock(),
            "needs": vars(action.needs),
            "hpcft_version": __version__,
        }
        if not create_json_once(where.intent(action.attempt), intent):
            raise LeaseHeld(f"attempt {action.attempt} of {where.path} was submitted by another manager")
        try:
            elements = self.scheduler.submit(
                action.round, action.stage, action.tasks, action.attempt, ranks, action.needs
            )
        except SubmissionRefused as refusal:
            write_json(where.rejected(action.attempt), {"limit": refusal.is_limit, "message": str(refusal)})
            raise
        except SchedulerUnavailable as silence:
            write_json(where.unconfirmed(action.attempt), {"message": str(silence)})
            raise
        self._record_jobs(where, action.attempt, elements)
        self.scheduler.release(elements)

    def _adopt(self, action: Adopt) -> None:
        where = self.folder.stage(action.round, action.stage)
        attempt = read_attempt(where, action.attempt)
        self.scheduler.adopt(action.round, action.stage, attempt, action.elements)
        self._record_jobs(where, action.attempt, list(action.elements))
        self.scheduler.release(action.elements)

    def _record_jobs(self, where: StageFolder, number: int, elements: list[str]) -> None:
        attempt = read_attempt(where, number)
        job_ids = {str(task): job_id for task, job_id in attempt.job_ids_of(elements).items()}
        write_json(where.submitted(number), {"job_ids": job_ids, "at": self._clock()})

    def _record_endings(self, action: RecordEndings) -> None:
        where = self.folder.stage(action.round, action.stage)
        tasks = {
            str(task): {key: value for key, value in vars(ending).items() if key != "at"}
            for task, ending in action.endings.items()
        }
        number = len(where.endings())
        while not create_json_once(
            where.attempts / f"ended-{number:06d}.json", {"at": self._clock(), "tasks": tasks}
        ):
            number += 1


def record_resume(folder: CampaignFolder, now: float) -> None:
    """Note that the user wants to go on: tasks that were given up get a new set of attempts, failed labels another try."""
    stage = read_records(folder).current
    if stage is None:
        return
    where = folder.stage(stage.round, stage.name)
    write_marker(folder, stage, now)
    if has_stopped(folder, stage):
        for task in sorted(stage.set_aside):
            bring_back(where, task)
        if not stage.missing:
            reopen_failures(where, range(stage.num_tasks or 0))
        folder.stopped.unlink()


def has_stopped(folder: CampaignFolder, stage: StageRecord) -> bool:
    """Whether this stage could not go on by itself when a manager looked last."""
    if not folder.stopped.exists():
        return False
    stopped = read_json(folder.stopped)
    return bool((stopped["round"], stopped["stage"]) == (stage.round, stage.name))


def bring_back(where: StageFolder, task: int) -> None:
    """A task that was set aside is missing again; why it was is kept in its folder."""
    folder = where.task(task)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.aside.rename(folder.path / f"aside-before-{time.time_ns()}.json")


def write_marker(
    folder: CampaignFolder, stage: StageRecord, now: float, tasks: Sequence[int] | None = None
) -> None:
    """Attempts so far do not count any more: those at the whole stage, or at `tasks` only."""
    newest = max((attempt.number for attempt in stage.attempts), default=0)
    marker: dict[str, Any] = {"at": now, "round": stage.round, "stage": stage.name, "attempt": newest}
    if tasks is not None:
        marker["tasks"] = list(tasks)
    folder.resumes.mkdir(exist_ok=True)
    number = len(list(folder.resumes.glob("*.json")))
    while not create_json_once(folder.resumes / f"{number:04d}.json", marker):
        number += 1


def reopen_failures(where: StageFolder, tasks: Iterable[int], cause: str | None = None) -> list[int]:
    """Run tasks that are done again for their failed items, of one cause or of any; returns which tasks."""
    from hpcft.labelling.reopened import reopen_shard

    reopened = []
    for task in map(where.task, tasks):
        if not task.result.exists():
            continue
        causes = [c for c in read_json(task.result).get("causes", ()) if cause in (None, c)]
        if causes:
            reopen_shard(task.path)  # of a finished run, whose journals are gone
            write_json(task.path / RETRY_FAILURES, {"causes": causes})
            task.result.rename(task.path / f"result-before-{time.time_ns()}.json")
            reopened.append(task.index)
    return reopened


def stage_line(turn: Turn) -> str:
    """One plain line about the stage in progress, for logs and pipes."""
    stage = turn.records.current
    if stage is None:
        return "finished"
    if stage.num_tasks is None:
        return f"round {stage.round} {stage.name}: planning"
    line = f"round {stage.round} {stage.name}: {len(stage.done)} of {stage.num_tasks} tasks done"
    line += f", {len(stage.set_aside)} set aside" * bool(stage.set_aside)
    waiting = next((action.why for action in turn.actions if isinstance(action, Wait)), "")
    return f"{line}, {waiting}" if waiting else line
