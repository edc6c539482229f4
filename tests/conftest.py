"""Every test runs without the model hub, whatever the machine can reach."""

from __future__ import annotations

import os
import tempfile

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
