"""Reads a run's data in a process of its own: a RunSpec as JSON on stdin, what it is trained on as JSON on stdout.

``python -m vramplan.train.look [--examples N]``
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from vramplan.data.view import describe_data
from vramplan.errors import VramplanError
from vramplan.spec.run import RunSpec
from vramplan.train.pretrained import load_tokenizer, model_directory


def main() -> int:
    """Prints the description; one sentence on stderr and the error's exit code where it cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m vramplan.train.look", description=__doc__)
    parser.add_argument("--examples", type=int, default=0)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print progress; stdout is for the answer alone
    run = RunSpec.model_validate_json(sys.stdin.read())
    try:
        described = describe_data(run, load_tokenizer(model_directory(run), run), arguments.examples)
    except VramplanError as error:
        answers.write(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    finally:
        answers.flush()
    answers.write(json.dumps(described))
    answers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
