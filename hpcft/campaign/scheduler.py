"""The two ways to run tasks, seen alike: submit, look, cancel."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hpcft.campaign.decide import FoundSubmission, Observation, QueuedTask, is_open
from hpcft.campaign.policy import Needs
from hpcft.campaign.records import Attempt, Cause, Ending, Records, StageRecord
from hpcft.campaign.worker import run_tasks
from hpcft.cluster import local, slurm
from hpcft.cluster.executors import JobSpec, submit, write_inputs
from hpcft.cluster.limits import Cluster, StageLimits, effective, read_cluster, suitable_nodes, terms_of
from hpcft.config.settings import Settings
from hpcft.config.site import Site
from hpcft.errors import SchedulerUnavailable
from hpcft.storage.campaign_folder import CampaignFolder

_CAUSES: dict[str, Cause] = {
    "TIMEOUT": "time-limit",
    "DEADLINE": "time-limit",
    "OUT_OF_MEMORY": "out-of-memory",
    "NODE_FAIL": "node-failure",
    "BOOT_FAIL": "node-failure",
    "PREEMPTED": "preempted",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
}
# Their names alone do not say enough: memory that ran out in a step shows as FAILED, and no word of a completed job
# says where its result is.
_UNCLEAR = ("FAILED", "COMPLETED")
# A manager may live for weeks, and limits change.
_LIMITS_AGE_S = 3600.0


class Scheduler:
    """Submits the tasks of one campaign to one site, and says which of them wait, run or have ended."""

    def __init__(
        self,
        folder: CampaignFolder,
        settings: Settings,
        site: Site,
        run: slurm.Run = slurm.run_command,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.settings, self.site = folder, settings, site
        self.name_prefix = f"hpcft-{folder.read_identity()['id']}-"
        self._run, self._clock = run, clock
        self._cluster: Cluster | None = None
        self._cluster_read_at = -math.inf
        self._gone_since: dict[tuple[int, str, int, int], float] = {}

    @property
    def is_slurm(self) -> bool:
        return self.site.executor == "slurm"

    def job_name(self, round_: int, stage: str, attempt: int) -> str:
        return f"{self.name_prefix}r{round_}-{stage}-{attempt}"

    def tasks_per_job(self, stage: str, ranks: int) -> int:
        """Tasks that share a job: only tasks of one rank, and only on Slurm."""
        return self.site.slurm_for(stage).tasks_per_job if self.is_slurm and ranks == 1 else 1  # type: ignore[arg-type]

    def submit(
        self, round_: int, stage: str, tasks: Sequence[int], attempt: int, ranks: int, needs: Needs
    ) -> list[str]:
        """Job ids, one for each job; held on Slurm until `release`."""
        packed = self.tasks_per_job(stage, ranks)
        resources = self.settings.resources_for(stage)  # type: ignore[arg-type]
        changes = {"time_min": needs.time_min, "memory_GB": needs.memory_GB}
        spec = JobSpec(
            name=self.job_name(round_, stage, attempt),
            stage=stage,
            ranks=ranks if packed == 1 else min(packed, len(tasks)),
            resources=resources.model_copy(update={k: v for k, v in changes.items() if v is not None}),
            folder=self.folder.stage(round_, stage).logs(attempt),
            are_packed=packed > 1,
            exclude=needs.exclude,
        )
        arguments = self._arguments(round_, stage, tasks, attempt, packed)
        return submit(self.site, spec, run_tasks, arguments)

    def adopt(self, round_: int, stage: str, attempt: Attempt, elements: Sequence[str]) -> None:
        """Write the inputs for which the jobs of an unrecorded submission will look."""
        arguments = self._arguments(round_, stage, attempt.tasks, attempt.number, attempt.tasks_per_job)
        write_inputs(self.folder.stage(round_, stage).logs(attempt.number), elements, run_tasks, arguments)

    def _arguments(
        self, round_: int, stage: str, tasks: Sequence[int], attempt: int, packed: int
    ) -> list[tuple[object, ...]]:
        root = str(self.folder.root)
        shares = [tuple(tasks[start : start + packed]) for start in range(0, len(tasks), packed)]
        return [(root, round_, stage, share, attempt) for share in shares]

    def limits(self, stage: str) -> StageLimits:
        """What the site config and Slurm itself allow a stage; nothing is known on this machine."""
        if not self.is_slurm:
            return StageLimits()
        now = self._clock()
        if now - self._cluster_read_at > (_LIMITS_AGE_S if self._cluster else _LIMITS_AGE_S / 60):
            self._cluster_read_at = now
            with contextlib.suppress(SchedulerUnavailable):
                self._cluster = read_cluster(self._run)
        return effective(self.site, stage, self._cluster)  # type: ignore[arg-type]

    @property
    def knows_limits(self) -> bool:
        return self._cluster is not None

    def num_nodes(self, stage: str) -> int | None:
        """Nodes that suit a stage; None where that is not known."""
        if self._cluster is None:
            return None
        asked = self.site.slurm_for(stage)  # type: ignore[arg-type]
        nodes = suitable_nodes(asked, terms_of(asked, self._cluster), self._cluster)
        return sum(group.num_nodes for group in nodes) or None

    def release(self, job_ids: Sequence[str]) -> None:
        """Let jobs start; where Slurm does not answer, the next look tries again."""
        if self.is_slurm and job_ids:
            with contextlib.suppress(SchedulerUnavailable):
                slurm.release(job_ids, self._run)

    def cancel(self, job_ids: Sequence[str]) -> None:
        if job_ids and self.is_slurm:
            slurm.cancel(job_ids, self._run)

    def cancel_all(self) -> int:
        """End everything of this campaign that waits or runs; returns how many jobs that were."""
        if self.is_slurm:
            jobs = [j.job_id for j in slurm.queue(self.name_prefix, self._run) if not j.is_over]
            self.cancel(jobs)
            return len(jobs)
        return local.cancel_below(self.folder.root)

    def observe(self, records: Records) -> Observation:
        """What waits or runs now, and how the rest has ended; `known` is False when Slurm did not answer."""
        stage = records.current
        if stage is None or not stage.num_tasks or not stage.missing:
            return Observation()
        if not self.is_slurm:
            return self._observe_locally(stage)
        try:
            jobs = slurm.queue("", self._run)
        except SchedulerUnavailable as error:
            return Observation(known=False, silence=str(error))
        observation = self._from_queue(stage, [job for job in jobs if job.name.startswith(self.name_prefix)])
        asked = self.site.slurm_for(stage.name)  # type: ignore[arg-type]
        queued = [job for job in jobs if not job.is_over and _shares_limit(job, asked.account, asked.qos)]
        return replace(observation, num_queued=len(queued))

    def _observe_locally(self, stage: StageRecord) -> Observation:
        where = self.folder.stage(stage.round, stage.name)
        alive: dict[int, QueuedTask] = {}
        ended: dict[int, Ending] = {}
        for task in stage.missing:
            attempt = stage.latest_attempt(task)
            if attempt is None:
                continue
            job_id = (attempt.job_ids or {}).get(task)
            lock = where.task(task).lock
            started = job_id is not None and local.job_is_alive(job_id, where.logs(attempt.number))
            if started or (lock.exists() and local.lock_is_held(lock)):
                alive[task] = QueuedTask(job_id or "", is_running=True)
            else:
                ended[task] = Ending(attempt.number, "lost")
        return Observation(alive=alive, ended=ended, gone_for_s=dict.fromkeys(ended, float("inf")))

    def _from_queue(self, stage: StageRecord, jobs: Sequence[slurm.QueuedJob]) -> Observation:
        """Match by name and id; release what was recorded but not released; report what was never recorded.

        Jobs of earlier stages may still be completing: they are nobody's business any more.
        """
        by_name: dict[str, list[slurm.QueuedJob]] = defaultdict(list)
        for job in jobs:
            by_name[job.name].append(job)
        alive: dict[int, QueuedTask] = {}
        over: dict[int, slurm.QueuedJob] = {}
        found: dict[int, tuple[FoundSubmission, ...]] = {}
        held: list[str] = []
        for attempt in stage.attempts:
            mine = by_name.get(attempt.job_name, [])
            recorded = _tasks_by_job(attempt.job_ids or {})
            for job in mine:
                for task in recorded.get(job.job_id, ()):
                    if not job.is_over:
                        alive[task] = QueuedTask(job.job_id, job.is_running, job.reason, job.node)
                    elif stage.latest_attempt(task) is attempt:  # Slurm shows earlier ones for a while
                        over[task] = job
                if job.is_held and job.job_id in recorded:
                    held.append(job.job_id)
            strays = [j for j in mine if j.job_id not in recorded and not j.is_over]
            if strays:
                found[attempt.number] = _submissions(strays)
        self.release(held)
        gone = self._gone(stage, alive)
        return Observation(alive=alive, ended=self._ended(stage, gone, over), gone_for_s=gone, found=found)

    def _gone(self, stage: StageRecord, alive: Mapping[int, QueuedTask]) -> dict[int, float]:
        """For how long each recorded, unfinished task has had no job any more, as far as this process has watched."""
        now = self._clock()
        since: dict[tuple[int, str, int, int], float] = {}
        gone: dict[int, float] = {}
        for task in stage.missing:
            latest = stage.latest_attempt(task)
            if latest is None or latest.job_ids is None or task in alive or not is_open(stage, task):
                continue
            key = (stage.round, stage.name, task, latest.number)
            since[key] = self._gone_since.get(key, now)
            gone[task] = now - since[key]
        self._gone_since = since
        return gone

    def _ended(
        self, stage: StageRecord, gone: Mapping[int, float], over: Mapping[int, slurm.QueuedJob]
    ) -> dict[int, Ending]:
        """How the jobs of tasks that are gone have ended: as the queue still shows, or as accounting knows."""
        ended: dict[int, Ending] = {}
        unclear: dict[int, Attempt] = {}
        for task in gone:
            latest = stage.latest_attempt(task)
            if latest is None or latest.job_ids is None or stage.error(task, latest.number):
                continue
            job = over.get(task)
            if job is None or job.state in (*_UNCLEAR, "OUT_OF_MEMORY"):
                unclear[task] = latest
            if job is not None and job.state == "COMPLETED" and latest.number <= stage.counted_after(task):
                # It had a result, which a user has put away to have failed labels tried again.
                ended[task] = Ending(latest.number, "lost", 0.0, job.node or None)
                unclear.pop(task)
            elif job is not None and job.state not in _UNCLEAR:
                ended[task] = Ending(latest.number, _CAUSES.get(job.state, "lost"), 0.0, job.node or None)
        return ended | (self._accounted(unclear) if unclear else {})

    def _accounted(self, attempts: Mapping[int, Attempt]) -> dict[int, Ending]:
        """What accounting says of how these tasks ended; only it knows what memory a job got by default."""
        ids = {task: attempt.job_ids[task] for task, attempt in attempts.items() if attempt.job_ids}
        try:
            jobs = slurm.accounting(ids.values(), self._run)
        except SchedulerUnavailable:
            return {}  # no accounting here, or not now: time will tell
        ended = {}
        for task, attempt in attempts.items():
            job = jobs.get(ids[task])
            # The number may have been used before, by another job.
            if job is not None and job.name == attempt.job_name and (cause := _cause(job)) is not None:
                sharers = min(attempt.tasks_per_job, len(attempt.tasks))
                memory_GB = None if job.memory_GB is None else job.memory_GB / sharers
                ended[task] = Ending(
                    attempt.number, cause, 0.0, job.node or None, f"exit code {job.exit_code}", memory_GB
                )
        return ended


def _cause(job: slurm.AccountedJob) -> Cause | None:
    """None while accounting does not say that the job is over, or says only that it completed."""
    if "OUT_OF_MEMORY" in job.step_states and job.state in ("FAILED", "OUT_OF_MEMORY"):
        return "out-of-memory"
    return _CAUSES.get(job.state)


def _shares_limit(job: slurm.QueuedJob, account: str | None, qos: str | None) -> bool:
    """Whether a job counts against the same limit on submitted jobs, as far as the site config says which that is."""
    return (not account or job.account == account) and (not qos or job.qos == qos)


def _tasks_by_job(job_ids: Mapping[int, str]) -> dict[str, list[int]]:
    tasks: dict[str, list[int]] = defaultdict(list)
    for task, job_id in job_ids.items():
        tasks[job_id].append(task)
    return tasks


def _submissions(jobs: Sequence[slurm.QueuedJob]) -> tuple[FoundSubmission, ...]:
    """Elements of an array together, in order; a single job alone."""
    arrays: dict[str, list[str]] = defaultdict(list)
    for job in jobs:
        arrays[job.job_id.split("_")[0]].append(job.job_id)
    return tuple(
        FoundSubmission(base, tuple(sorted(ids, key=lambda i: int(i.partition("_")[2] or 0))))
        for base, ids in sorted(arrays.items(), key=lambda item: int(item[0]))
    )
