"""Every test runs without the model hub, whatever the machine can reach; the longest files come first."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="vramplan-tests-")  # what tests learn is no lesson for users
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile(
    "any machine",
    deadline=None,  # how long an example takes says how busy the machine is
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any machine")

LONGEST_FIRST = (
    "tests/integration/",
    "tests/unit/simulate/",
    "tests/contract/",
    "tests/laws/",
    "tests/golden/",
    "tests/unit/cli/",
    "tests/unit/search/",
)
"""Of workers that take a file at a time none is then left alone with a long one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _place(item.nodeid))


def _place(nodeid: str) -> int:
    return next((place for place, start in enumerate(LONGEST_FIRST) if nodeid.startswith(start)), len(LONGEST_FIRST))
