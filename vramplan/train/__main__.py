"""What the launcher starts on each rank: ``python -m vramplan.train PLAN RUN_DIR`` and options."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from vramplan.emit.launch import launch_environment
from vramplan.measure.marker import OUT_OF_MEMORY_EXIT_CODE, is_out_of_memory
from vramplan.measure.run_dir import RunDir
from vramplan.search.plan import Plan, plan_id
from vramplan.train.status import RankStatus, start_guard, write_failure


def main() -> NoReturn:
    """Runs this rank and leaves, with 0 after its end. A failure is written where the supervisor looks for it."""
    arguments = _parse()
    rank = int(os.environ.get("RANK", "0"))
    run_dir = RunDir(arguments.run_dir)
    run_dir.root.mkdir(parents=True, exist_ok=True)
    status = RankStatus(run_dir.status_of(rank), rank)
    run_dir.failure_of(rank).unlink(missing_ok=True)
    start_guard(status, run_dir.stop_of(os.environ.get("MASTER_PORT", "")))
    try:
        plan = Plan.load(arguments.plan)
        # a launcher passes few variables on to other nodes, and torch reads these as it is imported
        os.environ.update(launch_environment(plan.run, plan.node))
        from torch.distributed import barrier

        from vramplan.rank.baton import outlive_killed_compilers
        from vramplan.train.session import train

        outlive_killed_compilers()

        status.plan, status.device = plan_id(plan.run), plan.node.device.kind
        train(plan, run_dir, status, resuming=arguments.resume, probing=arguments.probe, retrying=arguments.retry)
        barrier()  # no rank leaves while another still needs it
    except BaseException as error:  # noqa: BLE001  # whatever it is, the supervisor must learn of it
        _leave(_last_words(run_dir.failure_of(rank), status, error))
    _leave(0)


def _last_words(path: Path, status: RankStatus, error: BaseException) -> int:
    """Says why this rank ends, where the supervisor looks and in its log; its exit code. Where neither can be written
    (a full disk, no memory), the code has to do: a rank that does not end holds its peers."""
    code = OUT_OF_MEMORY_EXIT_CODE if is_out_of_memory(type(error).__name__, str(error)) else 1
    with suppress(Exception):
        code = write_failure(path, status, error)
        traceback.print_exception(error)
    return code


def _leave(code: int) -> NoReturn:
    """Ends at once, with all that was done on the disk: an orderly shutdown after a failure would wait for ranks that
    wait for this one, and after success it now and then aborts ("terminate called without an active exception")."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk
            stream.flush()
    os._exit(code)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vramplan.train", description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument("--probe", action="store_true", help="run the worst batch for two steps, and nothing else")
    parser.add_argument("--no-retry", dest="retry", action="store_false", help="end at out of memory, wherever it is")
    return parser.parse_args()


if __name__ == "__main__":
    main()
