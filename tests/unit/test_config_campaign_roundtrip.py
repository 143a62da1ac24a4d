from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.config import campaign as config
from hpcft.config import training
from hpcft.config.campaign import Campaign, load_campaign
from hpcft.config.common import Resources
from hpcft.config.yaml_file import dump_yaml

positive = st.floats(1e-6, 1e6)
fraction = st.floats(0, 0.9)
count = st.integers(1, 10**6)
text = st.sampled_from(["No", "1e-3", "1:00", "~", "", "null", "<<", "08", "\x85", "{"]) | st.text(
    max_size=10
)
scalar: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
json_value = scalar | st.lists(scalar, max_size=3) | st.dictionaries(text, scalar, max_size=3)
resources = st.builds(Resources, time_min=count, cpus_per_rank=count, memory_GB=st.none() | positive)
weights = st.builds(training.Weights, energy=positive, forces=st.floats(0, 10), stress=st.floats(0, 10))


@st.composite
def campaigns(draw: st.DrawFn, folder: Path) -> Campaign:
    """Any campaign that passes the checks across keys, with input files that exist."""
    path = st.sampled_from([folder / "small.model", folder / "start.xyz"])
    temperature_K, frame_every, ranks = draw(positive), draw(st.integers(1, 1000)), draw(st.integers(1, 64))
    sections: dict[str, Any] = {
        "reference": config.Reference(
            calculator=draw(st.from_regex(r"\A[a-z_]{1,9}(\.[A-Za-z_][a-z0-9]{0,9}){1,3}\Z")),
            arguments=draw(st.dictionaries(text, json_value, max_size=3)),
            elements=draw(st.sampled_from([None, ("Cu",), ("No", "Y", "N")])),
            time_limit_s=draw(positive),
        ),
        "explore": config.Explore(
            tasks=draw(count),
            temperature_K=temperature_K,
            timestep=draw(positive),
            friction_per_ps=draw(positive),
            steps=10 * frame_every * draw(st.integers(1, 1000)),
            frame_every=frame_every,
            segment_frames=draw(count),
            max_temperature_K=draw(st.none() | st.floats(2, 9).map(lambda factor: factor * temperature_K)),
            min_distance=draw(positive),
            resources=draw(resources),
        ),
        "select": config.Select(
            frames=draw(st.integers(100, 10**6)),
            exclude_first=draw(fraction),
            method=draw(st.sampled_from(["farthest-point", "random"])),
        ),
        "label": config.Label(shards=draw(st.integers(1, 100)), tolerated_failures=draw(st.floats(0, 1))),
        "relaxations": config.Relaxations(
            train=folder / "other.xyz", test=draw(st.none() | path), fmax=draw(positive)
        ),
        "train": training.Train(
            ranks=ranks,
            epochs=draw(count),
            steps_per_epoch=draw(st.none() | count),
            batch_size=ranks * draw(st.integers(1, 10)),
            learning_rate=draw(positive),
            weights=draw(weights),
            precision=draw(st.sampled_from(["float32", "float64"])),
            replay=draw(st.none() | st.builds(training.Replay, file=path, batch_size=count, weight=positive)),
            relaxation=draw(
                st.none() | st.builds(training.RelaxationTraining, weight=positive, momentum=fraction)
            ),
            rates=draw(st.dictionaries(text, st.floats(0, 10), max_size=2)),
            lora=draw(st.none() | st.builds(training.Lora, rank=count, alpha=positive)),
            ema=draw(st.none() | st.floats(0.01, 0.99)),
            huber=draw(st.none() | st.builds(training.Huber, energy=positive, forces=positive)),
            energy_zero=draw(
                st.sampled_from(["keep", "fit"])
                | st.dictionaries(st.sampled_from(["No", "Cu"]), st.floats(-1e4, 1e4), min_size=1)
            ),
            validation=draw(st.none() | st.builds(training.Validation, patience=st.none() | count)),
            max_edges=draw(st.none() | count),
            gradient_clip=draw(st.none() | positive),
        ),
        "probe": config.Probe(
            steps=draw(st.integers(1000, 10**6)),
            frames=draw(st.integers(1, 100)),
            discard=draw(fraction),
            temperature_K=draw(st.none() | positive),
        ),
        "evaluate": config.Evaluate(
            bootstrap=draw(st.integers(100, 10**6)), confidence=draw(st.floats(0.01, 0.99))
        ),
    }
    return Campaign(
        name=draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")),
        seed=draw(st.integers(0, 2**63 - 1)),
        rounds=draw(st.integers(1, 1000)),
        foundation=draw(path),
        structures=draw(path),
        max_attempts=draw(count),
        **sections,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("campaigns")
    for name in ("small.model", "start.xyz", "other.xyz"):
        (folder / name).write_text(name)
    return folder


@given(data=st.data())
def test_any_campaign_dumped_to_yaml_and_loaded_again_is_equal(folder: Path, data: st.DataObject) -> None:
    campaign = data.draw(campaigns(folder))
    path = folder / "dumped.yaml"
    path.write_text(dump_yaml(campaign.model_dump(mode="json")), encoding="utf-8", newline="")
    loaded = load_campaign(path)
    assert loaded == campaign
    assert loaded.fingerprint() == campaign.fingerprint()
