"""A campaign's settings, and the site that it ran on last, as its folder keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hpcft import __version__
from hpcft.config.campaign import Campaign
from hpcft.config.label_run import LabelRun
from hpcft.config.settings import Settings
from hpcft.config.site import Site, default_site
from hpcft.errors import UserError
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder, kind_of

_Model = TypeVar("_Model", bound=BaseModel)


def settings_of(folder: CampaignFolder) -> Settings:
    """UserError when the settings are those of another version of hpcft, or were edited by hand."""
    identity = folder.read_identity()
    writer = f", written by hpcft {identity['hpcft_version']}," if "hpcft_version" in identity else ""
    return _validated(model_of(identity), identity.get("config"), folder.identity, writer)


def model_of(identity: Mapping[str, Any]) -> type[Campaign] | type[LabelRun]:
    """The model of the settings in a campaign.json."""
    return LabelRun if kind_of(identity) == "label" else Campaign


def site_of(folder: CampaignFolder) -> Site:
    """This machine, if the campaign has not run yet."""
    if not folder.site.exists():
        return default_site()
    return _validated(Site, read_json(folder.site), folder.site, "")


def _validated(kind: type[_Model], content: Any, path: Path, writer: str) -> _Model:
    try:
        return kind.model_validate(content)
    except ValidationError as failure:
        first = failure.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path}{writer} does not fit this hpcft ({__version__}): {key}: {first['msg']}. Use the version that "
            "wrote it, or give the campaign a new folder."
        ) from failure
