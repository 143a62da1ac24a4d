"""What `hpcft label` does: a file of structures, labelled or relaxed by a reference, without a campaign."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hpcft.config.campaign import StageName
from hpcft.config.common import Resources
from hpcft.config.fingerprint import files_of, fingerprint, normalised
from hpcft.config.reference import Label, Reference
from hpcft.config.validate import Count, InputFile, Name, Positive, Section, Unit
from hpcft.config.yaml_file import KeyPath


class LabelTasks(Label):
    """How the reference calculations are spread and what their tasks ask for."""

    tolerated_failures: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the structures that may fail for good with the command's exit code still 0."""


class ReferenceFile(Reference):
    """The file of `--reference`: a campaign's section `reference`, and its section `label` below it if need be."""

    label: LabelTasks = LabelTasks()
    """How the reference calculations are spread and what their tasks ask for."""
    max_attempts: Count = 3
    """Attempts at each task before it is given up; lost nodes and preemptions do not count."""
    max_interruptions: Count = 20
    """Lost nodes and preemptions of each task before it is given up."""

    @property
    def reference(self) -> Reference:
        """The calculator alone."""
        return Reference.model_validate(self.model_dump(include=set(Reference.model_fields)))


class Relaxation(Section):
    """Relaxing the structures instead of labelling them as they are."""

    fmax: Annotated[Positive, Unit("eV/Å")] = 0.01
    """Largest force on an atom at which a structure counts as relaxed, in eV/Å."""
    max_steps: Count = 300
    """Steps after which a relaxation gives up."""
    cell: bool = False
    """Whether the cell relaxes with the atoms, at zero pressure; all are periodic in all directions then."""


class LabelRun(Section):
    """Labels of a file of structures."""

    name: Name
    """Name of the run."""
    structures: InputFile
    """Structures to label."""
    reference: Reference
    """The calculator whose results count as the truth."""
    label: LabelTasks = LabelTasks()
    """Reference calculations."""
    relaxation: Relaxation | None = None
    """Left out: the structures are labelled as they are."""
    max_attempts: Count = 3
    """Attempts at each task before it is given up; lost nodes and preemptions do not count."""
    max_interruptions: Count = 20
    """Lost nodes and preemptions of each task before it is given up."""

    @property
    def kind(self) -> Literal["label"]:
        """What tells it from other work in a folder of its own."""
        return "label"

    @property
    def rounds(self) -> int:
        """Rounds after the first, which is all there is."""
        return 0

    @property
    def stages(self) -> tuple[StageName, ...]:
        """Stages of a round, in order."""
        return ("label",)

    def resources_for(self, stage: StageName) -> Resources:
        """What one task asks of the machine."""
        return self.label.resources

    def tolerated_tasks(self, stage: StageName) -> float:
        """All: what the others can label is not held up by a task that was given up; its structures count as failed."""
        return 1.0

    def structure_files(self) -> dict[str, Path]:
        """The files of structures, by the name that each has in the run's folder."""
        return {"structures": self.structures}

    def files(self) -> dict[KeyPath, Path]:
        """Every input file by the key path that names it."""
        return files_of(self)

    def normalised(self) -> dict[str, Any]:
        """The content as plain JSON data; see fingerprint.normalised."""
        return normalised(self)

    def fingerprint(self) -> str:
        """Equal for the same work, wherever its files are."""
        return fingerprint(self.normalised())
