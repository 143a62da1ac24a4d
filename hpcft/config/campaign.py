"""What a campaign is: the settings of every stage, checked key by key and against each other.

Units are eV, Å, amu, fs and K; any other stands in the name of the key. A round is explore, select, label,
train, probe and evaluate; the reference relaxes its structures once for all rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from hpcft.config.common import Resources
from hpcft.config.fingerprint import files_of, fingerprint, normalised
from hpcft.config.reference import Label, Reference
from hpcft.config.training import Train
from hpcft.config.validate import (
    Count,
    Fraction,
    InputFile,
    Name,
    Positive,
    Section,
    Seed,
    Unit,
    shown,
    validate,
)
from hpcft.config.yaml_file import KeyPath, load_yaml

StageName = Literal["explore", "select", "label", "train", "probe", "reference", "evaluate"]
STAGES: tuple[StageName, ...] = get_args(StageName)

_ROUNDING = 1e-9  # 100 * (1 - 0.9) is 9.999999999999998 and means 10


class Explore(Section):
    """Molecular dynamics with the round's model, on which new frames are found."""

    tasks: Count = 1
    """Tasks over which the replicas are spread."""
    temperature_K: Annotated[Positive, Unit("K")]
    """Temperature of the thermostat in K."""
    timestep: Annotated[Positive, Unit("fs")]
    """Time step in fs."""
    ensemble: Literal["nvt", "nvt-svr", "nve", "npt", "npt-full"] = "nvt"
    """nvt: Langevin; nvt-svr: velocity rescaling; nve: none; npt, npt-full: and the volume or the whole cell moves."""
    friction_per_ps: Annotated[Positive, Unit("1/ps")] = 10.0
    """Friction of the Langevin thermostat (nvt) in 1/ps."""
    thermostat_fs: Annotated[Positive, Unit("fs")] = 100.0
    """Relaxation time of velocity rescaling (nvt-svr, npt, npt-full) in fs."""
    pressure_GPa: Annotated[float, Unit("GPa")] = 0.0
    """Pressure of npt and npt-full in GPa."""
    barostat_fs: Annotated[Positive, Unit("fs")] = 1000.0
    """Relaxation time of the volume (npt, npt-full) in fs."""
    steps: Count
    """Time steps of each replica in each round."""
    frame_every: Count = 10
    """Time steps between two stored frames."""
    precision: Literal["float32", "float64"] = "float32"
    """Floating-point type of the model in molecular dynamics, and in all that probe does."""
    segment_frames: Count = 10
    """Frames that are committed to disk at once; a killed task loses at most these."""
    max_temperature_K: Annotated[Positive, Unit("K")] | None = None
    """Guard: a replica hotter than this has exploded and is stopped, in K; left out: 5 temperature_K."""
    min_distance: Annotated[Positive, Unit("Å")] = 0.8
    """Guard: a replica with two atoms closer than this is stopped, in Å."""
    max_q_residual: Positive | None = None
    """Guard: a replica with an atom of a larger Q-residual waits for the next round (1: that of the farthest known atom)."""
    tolerated_failures: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fraction of the stage's tasks that may be given up before the campaign stops; it goes on without their replicas."""
    resources: Resources = Resources()
    """What one task asks of the machine."""

    @property
    def temperature_limit_K(self) -> float:
        """The guard's temperature in K, given or by default."""
        return self.max_temperature_K or 5 * self.temperature_K

    @property
    def num_frames(self) -> int:
        """Frames that a replica stores in a round."""
        return self.steps // self.frame_every

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.steps < self.frame_every:
            problem = f"{self.steps} steps with a frame every {self.frame_every} give no frame"
            yield ("steps",), f"{problem}; raise steps, or lower frame_every"
        if self.temperature_limit_K <= self.temperature_K:
            problem = f"must be greater than temperature_K ({shown(self.temperature_K)} K)"
            yield ("max_temperature_K",), f"{problem}, or every replica is stopped at once; raise it"


class Select(Section):
    """The choice of the frames that are worth a reference calculation."""

    frames: Count
    """Frames to label in each round, over all replicas."""
    exclude_first: Fraction = 0.0
    """Fraction of each trajectory, from its start, that is not chosen from."""
    method: Literal["farthest-point", "random"] = "farthest-point"
    """How frames are chosen: far from each other and from what is labelled already, or at random."""
    resources: Resources = Resources()
    """What the task asks of the machine."""


class Relaxations(Section):
    """Structures that the reference relaxes once: what the model's own relaxations are compared with."""

    train: InputFile | None = None
    """Start structures whose relaxations the model is trained on (needed by train.relaxation)."""
    test: InputFile | None = None
    """Start structures whose relaxations only judge the model (Delta Q)."""
    fmax: Annotated[Positive, Unit("eV/Å")] = 0.01
    """Largest force on an atom at which a structure counts as relaxed, in eV/Å."""
    max_steps: Count = 300
    """Steps after which a relaxation gives up."""
    learn_frames: bool = False
    """Whether the frames on the way of the training relaxations are labels to train on, like those of explore."""
    cell: bool = False
    """Whether the cell relaxes with the atoms, at zero pressure; all are periodic in all directions then."""

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.train is not None and self.train == self.test:
            problem = "is the file of relaxations.train, and structures that were trained on prove nothing"
            yield ("test",), f"{problem}; name another file"


class Probe(Section):
    """Molecular dynamics of the new model by itself, on which its bias is measured and nothing is trained."""

    tasks: Count = 1
    """Tasks over which the replicas are spread."""
    steps: Count
    """Time steps of each replica."""
    frames: Count
    """Frames of each replica that the reference labels."""
    discard: Fraction = 0.5
    """Fraction of each trajectory, from its start, that is not labelled."""
    temperature_K: Annotated[Positive, Unit("K")] | None = None
    """Temperature of the thermostat in K; left out: that of explore."""
    tolerated_failures: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fraction of the stage's tasks that may be given up before the campaign stops; it is judged without their replicas."""
    resources: Resources = Resources()
    """What one task asks of the machine."""

    @property
    def discarded_steps(self) -> int:
        """Steps at the start of each trajectory that are not labelled."""
        return math.ceil(self.steps * self.discard - _ROUNDING)

    @property
    def frame_every(self) -> int:
        """Steps between two labelled frames; the last one is within `steps`."""
        return (self.steps - self.discarded_steps) // self.frames

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.frame_every < 1:
            num_left = self.steps - self.discarded_steps
            problem = f"{self.frames} frames do not fit into the {num_left} steps that discard leaves"
            yield ("frames",), f"{problem} of {self.steps}; raise steps, or lower frames or discard"


class Evaluate(Section):
    """Statistics of the bias."""

    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the bootstrap."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals."""
    resources: Resources = Resources()
    """What the task asks of the machine."""


class Campaign(Section):
    """An iterated fine-tuning of a foundation model."""

    name: Name
    """Name of the campaign."""
    seed: Seed = 0
    """Every random number of the campaign follows from it."""
    rounds: Annotated[int, Field(ge=1, le=1000)]
    """Rounds after which the campaign ends."""
    foundation: InputFile
    """File of the foundation model."""
    structures: InputFile
    """Start structures; each is one replica."""
    reference: Reference
    """The calculator whose results count as the truth."""
    explore: Explore
    """Molecular dynamics that finds new frames."""
    select: Select
    """Choice of the frames to label."""
    label: Label = Label()
    """Reference calculations."""
    relaxations: Relaxations = Relaxations()
    """Structures that the reference relaxes."""
    train: Train
    """Fine-tuning."""
    probe: Probe
    """Molecular dynamics on which bias is measured."""
    evaluate: Evaluate = Evaluate()
    """Statistics of the bias."""
    max_attempts: Count = 3
    """Attempts at each task before it is given up; lost nodes and preemptions do not count."""
    max_interruptions: Count = 20
    """Lost nodes and preemptions of each task before it is given up."""

    @property
    def probe_temperature_K(self) -> float:
        """Temperature of the probe in K, given or that of explore."""
        return self.probe.temperature_K or self.explore.temperature_K

    def resources_for(self, stage: StageName) -> Resources:
        """What one task of the stage asks of the machine."""
        section = self.label if stage == "reference" else getattr(self, stage)
        resources: Resources = section.resources
        return resources

    def tolerated_tasks(self, stage: StageName) -> float:
        """Fraction of a stage's tasks without which the campaign goes on."""
        section = self.label if stage == "reference" else getattr(self, stage)
        return float(getattr(section, "tolerated_failures", 0.0))

    @property
    def kind(self) -> Literal["campaign"]:
        """What tells it from other work in a folder of its own."""
        return "campaign"

    @property
    def stages(self) -> tuple[StageName, ...]:
        """Stages of a round, in order."""
        return STAGES

    def structure_files(self) -> dict[str, Path]:
        """The files of structures, by the name that each has in the campaign's folder."""
        wanted = {
            "structures": self.structures,
            "relaxations-train": self.relaxations.train,
            "relaxations-test": self.relaxations.test,
            "replay": self.train.replay.file if self.train.replay is not None else None,
        }
        return {name: path for name, path in wanted.items() if path is not None}

    def files(self) -> dict[KeyPath, Path]:
        """Every input file by the key path that names it."""
        return files_of(self)

    def normalised(self) -> dict[str, Any]:
        """The content as plain JSON data, what is given by default elsewhere written out; see fingerprint.normalised."""
        content = normalised(self)
        content["explore"]["max_temperature_K"] = self.explore.temperature_limit_K
        content["probe"]["temperature_K"] = self.probe_temperature_K
        return content

    def fingerprint(self) -> str:
        """Equal for the same campaign, wherever its files are."""
        return fingerprint(self.normalised())

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.train.relaxation is not None and self.relaxations.train is None:
            problem = "needs structures to relax; name their file in relaxations.train"
            yield ("train", "relaxation"), f"{problem}, or leave this section out"
        if self.label.shards > self.select.frames:
            problem = f"{self.label.shards} shards for {self.select.frames} frames (select.frames)"
            yield ("label", "shards"), f"{problem} would leave some empty; lower shards"
        if self.explore.num_frames * (1 - self.select.exclude_first) < 1 - _ROUNDING:
            problem = f"leaves none of the {self.explore.num_frames} frames that a replica stores"
            yield ("select", "exclude_first"), f"{problem}; lower it, or raise explore.steps"


def load_campaign(path: Path) -> Campaign:
    """The campaign in the YAML file, its input files found and absolute; a UserError lists every problem."""
    return validate(Campaign, load_yaml(path), path)
