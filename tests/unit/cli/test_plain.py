"""``vramplan fit`` without typer reads plain arguments as typer does, and leaves the others to it."""

from __future__ import annotations

import shlex
from dataclasses import fields

import pytest

from vramplan.cli.app import SUBCOMMANDS
from vramplan.cli.options import RunOptions
from vramplan.cli.parser import make_app
from vramplan.cli.plain import read_plain

EVERY = " ".join(
    f"--{each.name.replace('_', '-').replace('assign', 'set')} {'007' if 'int' in str(each.type) else f'{each.name}=1'}"
    for each in fields(RunOptions)
)


def read_by_typer(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple:
    seen: list[tuple] = []
    monkeypatch.setattr("vramplan.cli.fit.print_fit", lambda *given: seen.append(given) or 0)
    with pytest.raises(SystemExit) as end:
        make_app(SUBCOMMANDS, "fit")(["fit", *words], prog_name="vramplan")
    assert end.value.code == 0
    return seen[0]


@pytest.mark.parametrize(
    "line",
    [
        "a/model",
        f"a/model {EVERY}",
        f"{EVERY} spec.yaml --json",
        "--json --gpu=h100 --gpus=8 'a model' --memory-cap ''",
        "m --set zero.stage=3 --set 'a=[1, 2]' --method lora --method full --lora-r=8",
    ],
)
def test_plain_arguments_are_read_as_typer_reads_them(line: str, monkeypatch: pytest.MonkeyPatch):
    words = shlex.split(line)
    assert read_plain(words) == read_by_typer(words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "a b",
        "m --help",
        "m -h",
        "m --gpu",
        "m --nope 1",
        "m --gpus x",
        "m --gpus -1",
        "m --gpu -x",
        "m --gpus 8.0",
        "m --jso",
        "m --json=1",
        "m --",
    ],
)
def test_what_is_not_plain_is_left_to_typer(line: str):
    assert read_plain(shlex.split(line)) is None
