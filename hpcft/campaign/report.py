"""The figure of a campaign's rounds, and where its last model is."""

from __future__ import annotations

from pathlib import Path

from hpcft.report.results import read_results
from hpcft.storage.campaign_folder import CampaignFolder


def figure_of(folder: CampaignFolder) -> Path:
    return folder.report / "bias.png"


def last_model(folder: CampaignFolder) -> Path:
    """The model of the last round, there once the campaign is finished."""
    return folder.stage(int(folder.read_identity()["rounds"]), "train").task(0).path / "model.pt"


def confidence_of(folder: CampaignFolder) -> float:
    return float(folder.read_identity()["config"]["evaluate"]["confidence"])


def write_report(folder: CampaignFolder) -> Path:
    """The figure of all rounds that are evaluated; returns its path."""
    from hpcft.report.figure import write_figure  # matplotlib

    folder.report.mkdir(exist_ok=True)
    figure = figure_of(folder)
    name = str(folder.read_identity()["name"])
    write_figure(read_results(folder), figure, name, confidence_of(folder))
    return figure
