"""What can go wrong and be told to a user: what happened, to which object, what to do about it."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user wrote or asked for; the command line shows it without a traceback (exit code 2)."""


class MissingInput(UserError):
    """A file that the settings name is not there or not readable; to a task, which runs once that was checked, the file
    system may be away for a while, so it is tried again.
    """


class LabelError(ValueError):
    """A reference calculation gave no label; `cause` is one word that records and tables group by."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class CampaignStopped(RuntimeError):
    """A campaign cannot go on by itself; the message names the stage, the tasks and the remedy (exit code 1)."""


class LeaseHeld(RuntimeError):
    """Another live manager drives this campaign; the message names its host and process (exit code 3)."""


class SchedulerUnavailable(RuntimeError):
    """Slurm did not answer, so what is known may be old; nothing was changed (exit code 4)."""


class SubmissionRefused(RuntimeError):
    """Slurm has said no to a submission. `is_limit`: only because there are too many jobs already."""

    def __init__(self, message: str, *, is_limit: bool = False) -> None:
        super().__init__(message)
        self.is_limit = is_limit
