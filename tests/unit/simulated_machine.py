"""A Slurm that a drawn script makes go wrong, and the truth about one campaign's jobs and records on it.

It answers the commands that hpcft runs, in Slurm's own formats. When the script has come to its end, all is well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from hpcft.campaign.decide import Adopt, RecordEndings, SetAside, Submit
from hpcft.campaign.records import Attempt, Records, Rejection, StageRecord
from hpcft.errors import SchedulerUnavailable, SubmissionRefused

STAGES = ((0, "probe"), (0, "evaluate"), (1, "label"), (1, "train"))
PREFIX = "hpcft-0123abcd-"
# Results and accounting arrive with a delay; that of results is below what hpcft waits for.
RESULT_LAG_S, ACCOUNTING_LAG_S = 4.0, 20.0
MIN_JOB_AGE_S = 100.0
TOO_MANY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


class ManagerKilled(Exception):
    """Whatever it had in hand is not done."""


@dataclass
class Job:
    """One job or array element. `state` is Slurm's; a held one waits until it is released."""

    job_id: str
    attempt: int
    tasks: tuple[int, ...]
    """Those of its tasks that have not come to an end."""
    seen_from: float
    state: str = "HELD"
    ended_at: float = 0.0
    all_tasks: tuple[int, ...] = ()
    out_of_memory: bool = False

    @property
    def array(self) -> str:
        return self.job_id.split("_")[0]

    @property
    def is_over(self) -> bool:
        return self.state not in ("HELD", "PENDING", "RUNNING")


@dataclass
class Machine:
    """Truth about one campaign: what runs, what has ended, what is written down. `script` holds the disturbances."""

    num_tasks: Sequence[int]
    script: list[int]
    capacity: int = 10**6
    """Jobs that may be in the queue; one more is refused."""
    tasks_per_job: int = 1
    clock: float = 0.0
    jobs: list[Job] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=lambda: [StageRecord(*STAGES[0])])
    finished: set[int] = field(default_factory=set)
    """Tasks of the stage in progress that have their result, whether or not others can see it yet."""
    on_their_way: list[tuple[float, int]] = field(default_factory=list)
    living_on: list[int] = field(default_factory=list)
    """Tasks of jobs that Slurm has given up with their node."""
    next_id: int = 100

    def draw(self, *fates: str) -> str:
        """The next fate of the script; the first, healthy one when the script has come to its end."""
        return fates[self.script.pop() % len(fates)] if self.script else fates[0]

    @property
    def stage(self) -> StageRecord:
        return self.stages[-1]

    def change(self, **values: object) -> None:
        self.stages[-1] = replace(self.stage, **values)  # type: ignore[arg-type]

    def records(self) -> Records:
        """What can be read by now."""
        arrived = {task for at, task in self.on_their_way if at <= self.clock}
        self.on_their_way = [(at, task) for at, task in self.on_their_way if at > self.clock]
        self.change(done=self.stage.done | arrived)
        return Records(tuple(self.stages), rounds=1)

    def name(self, attempt: int) -> str:
        return f"{PREFIX}r{self.stage.round}-{self.stage.name}-{attempt}"

    def is_recorded(self, job: Job) -> bool:
        return any(job.job_id in (a.job_ids or {}).values() for a in self.stage.attempts)

    def may_run(self, task: int) -> list[Job]:
        """Jobs that run the task, or will: one that is held and of which no record speaks never does."""
        return [
            job
            for job in self.jobs
            if task in job.all_tasks and not job.is_over and (job.state != "HELD" or self.is_recorded(job))
        ]

    def run(self, argv: Sequence[str]) -> str:
        """What Slurm answers to a command."""
        if argv[0] == "sacct":
            if self.draw("answers", "is down") == "is down":
                raise SchedulerUnavailable(
                    "sacct: error: Problem talking to the database: Connection refused"
                )
            return self._accounting(argv[-1].removeprefix("--jobs=").split(","))
        if self.draw("answers", "answers", "answers", "is down") == "is down":
            raise SchedulerUnavailable(
                f"{argv[0]}: error: Unable to contact slurm controller (connect failure)"
            )
        if argv[0] == "squeue":
            assert "--states=all" in argv
            return self._queue()
        named = [job for job in self.jobs if job.array in argv[1:] and not job.is_over]
        if argv[0] == "scancel":
            assert all(job.state == "HELD" and not self.is_recorded(job) for job in named), "this one may run"
            for job in named:
                self._end(job, "CANCELLED")
        else:
            assert argv[:2] == ["scontrol", "release"]
            assert all(self.is_recorded(job) for job in named), "nobody knows of this one"
            for job in named:
                job.state = "PENDING" if job.state == "HELD" else job.state
        return ""

    def _queue(self) -> str:
        lines = ["1|bash|RUNNING|None|login1", f"2|{PREFIX[:-2]}9-r0-probe-1|RUNNING|None|n1"]
        for job in self.jobs:
            if job.seen_from > self.clock or (job.is_over and self.clock - job.ended_at > MIN_JOB_AGE_S):
                continue
            state, reason = ("PENDING", "JobHeldUser") if job.state == "HELD" else (job.state, "None")
            lines.append(f"{job.job_id}|{self.name(job.attempt)}|{state}|{reason}|n1")
        return "\n".join(lines)

    def _accounting(self, arrays: Sequence[str]) -> str:
        lines = []
        for job in self.jobs:
            if job.array not in arrays or job.seen_from > self.clock:
                continue
            known = job.is_over and self.clock - job.ended_at > ACCOUNTING_LAG_S
            state = job.state if known else "RUNNING"
            step = "OUT_OF_MEMORY" if job.out_of_memory else state
            lines.append(f"{job.job_id}|{self.name(job.attempt)}|{state}|1:0|n1|4G")
            lines += [f"{job.job_id}.{name}|{name}|{step}|0:9|n1|" for name in ("batch", "extern", "0")]
        return "\n".join(lines)

    def let_time_pass(self) -> None:
        """Jobs that may run end in any order and way; those that are held never do anything."""
        self.clock += float(self.draw("10", "0", "1", "60", "3700"))
        for task in self.living_on[:]:
            fate = self.draw("ends", "goes on", "finishes")
            if fate == "goes on":
                continue
            self.living_on.remove(task)
            # A newer execution of the task has made this one end.
            if fate == "finishes" and not any(job.state == "RUNNING" for job in self.may_run(task)):
                self.change(done=self.stage.done | {task})
        for job in [job for job in self.jobs if job.state in ("PENDING", "RUNNING")]:
            self._go_on(job)

    def _go_on(self, job: Job) -> None:
        fate = self.draw("goes on", "goes on", "goes on", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OOM", "back to queue",
                         "CANCELLED", "waits", "COMPLETED")  # fmt: skip
        if fate == "back to queue":
            job.state = "PENDING"
        elif fate == "goes on":
            job.state = "RUNNING"
            for task in job.tasks:
                self._work(job, task)
            if not job.tasks:
                failed = any(task not in self.finished for task in job.all_tasks)
                self._end(job, "FAILED" if failed else "COMPLETED")
        elif fate == "OOM":
            job.out_of_memory = True
            self._end(job, self.draw("OUT_OF_MEMORY", "FAILED"))
        elif fate != "waits":
            if fate == "NODE_FAIL" and job.state == "RUNNING":
                self.living_on += job.tasks
            self._end(job, fate)

    def _work(self, job: Job, task: int) -> None:
        fate = self.draw("finishes", "runs", "runs", "is killed", "fails", "fails for good")
        if fate == "runs":
            return
        job.tasks = tuple(t for t in job.tasks if t != task)
        if fate == "finishes":
            self.finished.add(task)
            self.on_their_way.append((self.clock + RESULT_LAG_S, task))
        elif fate != "is killed" and self.stage.error(task, job.attempt) is None:
            entry = {"attempt": job.attempt, "final": fate == "fails for good", "message": fate}
            known = self.stage.errors.get(task, ())
            self.change(errors={**self.stage.errors, task: (*known, entry)})

    def _end(self, job: Job, state: str) -> None:
        job.state, job.ended_at, job.tasks = state, self.clock, ()

    def plan(self) -> None:
        self.change(num_tasks=self.num_tasks[len(self.stages) - 1])

    def submit(self, action: Submit, release: Callable[[list[str]], None]) -> None:
        """As the manager does it: intent, held submission, record of the ids, release."""
        attempt = Attempt(action.attempt, action.tasks, self.name(action.attempt), self.clock, None, None,
                          self.tasks_per_job)  # fmt: skip
        self.change(attempts=(*self.stage.attempts, attempt))
        fate = self.draw("works", "works", "killed before", "answer lost", "killed after", "seen late", "arrives twice",
            "loses an element",
                         "is invalid")  # fmt: skip
        if fate == "killed before":
            raise ManagerKilled
        try:
            elements = self._accept(
                attempt, 0.0 if fate != "seen late" else float(self.draw("10", "20", "200"))
            )
            if fate == "arrives twice":
                self._accept(attempt, 0.0)
            if fate == "loses an element":
                self._end(next(job for job in self.jobs if job.job_id == elements[-1]), "CANCELLED")
            if fate == "is invalid":
                self.jobs = [job for job in self.jobs if job.job_id not in elements]
                raise SubmissionRefused("Invalid qos specification")
        except SubmissionRefused as refusal:
            self._record(action.attempt, rejected=Rejection(refusal.is_limit, str(refusal)))
            return
        if fate == "killed after":
            raise ManagerKilled
        if fate != "works":
            raise SchedulerUnavailable("sbatch: error: Socket timed out on send/recv operation")
        self._note_jobs(action.attempt, elements, release)

    def _accept(self, attempt: Attempt, late_s: float) -> list[str]:
        if sum(not job.is_over for job in self.jobs) + attempt.num_jobs > self.capacity:
            raise SubmissionRefused(TOO_MANY, is_limit=True)
        self.next_id += 1
        elements = [f"{self.next_id}_{number}" for number in range(attempt.num_jobs)]
        elements = elements if len(elements) > 1 else [str(self.next_id)]
        for number, element in enumerate(elements):
            tasks = attempt.tasks[number * self.tasks_per_job :][: self.tasks_per_job]
            self.jobs.append(Job(element, attempt.number, tasks, self.clock + late_s, all_tasks=tasks))
        return elements

    def adopt(self, action: Adopt, release: Callable[[list[str]], None]) -> None:
        self._note_jobs(action.attempt, list(action.elements), release)

    def _note_jobs(self, number: int, elements: list[str], release: Callable[[list[str]], None]) -> None:
        if self.draw("goes on", "goes on", "is killed") == "is killed":
            raise ManagerKilled
        attempt = next(a for a in self.stage.attempts if a.number == number)
        job_ids = attempt.job_ids_of(elements)
        assert job_ids == {
            t: job.job_id for job in self.jobs if job.job_id in elements for t in job.all_tasks
        }
        self._record(number, job_ids=job_ids)
        if self.draw("goes on", "goes on", "is killed") == "is killed":
            raise ManagerKilled
        release(elements)

    def _record(self, number: int, **values: object) -> None:
        changed = [replace(a, **values) if a.number == number else a for a in self.stage.attempts]  # type: ignore[arg-type]
        self.change(attempts=tuple(changed))

    def record_endings(self, action: RecordEndings) -> None:
        endings = dict(self.stage.endings)
        for task, ending in action.endings.items():
            endings[task] = (*endings.get(task, ()), replace(ending, at=self.clock))
        self.change(endings=endings)

    def set_aside(self, action: SetAside) -> None:
        self.change(set_aside=self.stage.set_aside | action.why.keys())

    def collect(self) -> None:
        self.change(product={})
        if len(self.stages) < len(STAGES):
            self.stages.append(StageRecord(*STAGES[len(self.stages)]))
        # What is left of the stage is worth nothing any more.
        self.jobs, self.on_their_way, self.living_on, self.finished = [], [], [], set()

    def resume(self) -> None:
        self.change(resumed_after=max((a.number for a in self.stage.attempts), default=0))
