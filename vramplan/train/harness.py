"""What was trained, judged by EleutherAI's lm-evaluation-harness in a process of its own. Needs the extra ``eval``.

``python -m vramplan.train.harness --run-dir RUN_DIR``, or ``--check`` with an LmEvalSpec as JSON on stdin.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vramplan.errors import SpecError, nearest_names
from vramplan.measure.run_dir import RunDir, append_event, write_json
from vramplan.search.plan import Plan
from vramplan.spec.run import RunSpec
from vramplan.spec.training import LmEvalSpec


def main() -> int:
    """Checks the names of tasks, or evaluates; what is wrong stands in the last line of stderr."""
    parser = argparse.ArgumentParser(prog="python -m vramplan.train.harness", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only look the tasks up")
    parser.add_argument("--run-dir", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.check:
            find_tasks(LmEvalSpec.model_validate_json(sys.stdin.read()))
        else:
            run_dir = RunDir(arguments.run_dir)
            judge(Plan.load(run_dir.plan).run, run_dir)
    except SpecError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except Exception as error:  # noqa: BLE001  # lm_eval, datasets, the hub's client and torch raise their own
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        sys.stderr.write(f"{type(error).__name__}: {first}\n")
        return 1
    return 0


def find_tasks(asked: LmEvalSpec) -> tuple[list[str], Any]:
    """(names, with ``*`` replaced by what it stands for; the TaskManager that knows them).

    lm_eval's own tasks are read only where ``include_path`` does not hold all, for there are thousands of files.

    Raises:
        SpecError: a task is unknown; the text begins with the key below ``training.lm_eval``.
    """
    from lm_eval.tasks import TaskManager

    unknown: list[str] = []
    for with_own in [False, True] if asked.include_path is not None else [True]:
        manager = TaskManager(include_path=asked.include_path, include_defaults=with_own)
        matches = {name: manager.match_tasks([name]) for name in asked.tasks}
        unknown = [name for name, found in matches.items() if not found]
        if not unknown:
            return list(dict.fromkeys(task for found in matches.values() for task in found)), manager
    near = nearest_names(unknown[0], manager.all_tasks)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists them"
    raise SpecError(f"tasks: lm_eval knows no task {unknown[0]!r}{hint}")


def judge(run: RunSpec, run_dir: RunDir) -> None:
    """Writes ``lm_eval.json``, an event for each task, and the card anew with the scores in it.

    Raises:
        SpecError: as ``find_tasks``.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import handle_non_serializable

    from vramplan.spec.trainable import LoraMethod
    from vramplan.train.after import reload
    from vramplan.train.card import write_model_card
    from vramplan.train.pretrained import model_directory, public_name

    asked = run.training.lm_eval
    if asked is None:
        raise SpecError("tasks: the run names none")
    started = time.perf_counter()
    names, manager = find_tasks(asked)
    # given a model, HFLM takes its device (lm_eval/models/huggingface.py:217-231), so it is laid out here
    model, tokenizer = reload(run, run_dir, "auto" if torch.cuda.is_available() else None)
    batch_size = asked.batch_size or run.training.eval_micro_batch_size or run.micro_batch_size or 1
    found = simple_evaluate(
        HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size),
        tasks=names,
        task_manager=manager,
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        apply_chat_template=asked.chat_template,
        log_samples=False,
    )
    write_json(run_dir.lm_eval, json.loads(json.dumps(found, default=handle_non_serializable)))
    seconds = time.perf_counter() - started
    for event in scores_of(found):
        append_event(run_dir.metrics, "lm_eval", **event, version=version("lm-eval"), seconds=seconds)
    adapters, name = isinstance(run.method, LoraMethod), public_name(run, model_directory(run))
    write_model_card(run, run_dir, run_dir.adapter if adapters else run_dir.model, name)
    if adapters and run.training.merge_adapters:
        write_model_card(run, run_dir, run_dir.model, name, merged=True)


def scores_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each task and group its scores, standard errors (both by ``metric`` or ``metric,filter``) and number of
    examples (None for a group).

    lm_eval's keys are ``metric,filter``, and ``metric_stderr,filter`` beside them (lm_eval/evaluator_utils.py:214-225);
    the filter ``none`` is left out here, and so is what is no number ("N/A" where no error can be estimated).
    """
    events = []
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        scores: dict[str, float] = {}
        stderrs: dict[str, float] = {}
        for key, value in values.items():
            metric, comma, rule = key.partition(",")
            if not comma or isinstance(value, str):
                continue
            name = metric.removesuffix("_stderr") + ("" if rule == "none" else f",{rule}")
            (stderrs if metric.endswith("_stderr") else scores)[name] = float(value)
        counted = found["n-samples"].get(task, {}).get("effective")
        events.append({"task": task, "scores": scores, "stderrs": stderrs, "num_examples": counted})
    return events


if __name__ == "__main__":
    sys.exit(main())
