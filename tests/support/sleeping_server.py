"""A fork server whose jobs write down their process id and sleep: ``python -m support.sleeping_server``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vramplan.forkserver import serve


def sleep(request: dict[str, Any]) -> None:
    out = Path(request["out"])
    out.with_suffix(".part").write_text(str(os.getpid()), encoding="utf-8")
    out.with_suffix(".part").rename(out)
    time.sleep(600)


if __name__ == "__main__":
    serve(sleep)
