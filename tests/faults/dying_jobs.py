"""A campaign's first stages on a real Slurm whose jobs die in every way, driven by a manager inside the test."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "slurm"))

from conftest import SlurmCluster  # type: ignore[attr-defined]
