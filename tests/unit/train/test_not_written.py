"""A checkpoint that cannot be written is told from other errors, whatever torch's writer says of it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from vramplan.train import disk
from vramplan.train.disk import why_not_written
from vramplan.train.progress import Told

LIMITED = """
import resource, sys, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
from pathlib import Path
from vramplan.train.disk import why_not_written
try:
    torch.save({"a": torch.zeros(100_000), "b": list(range(20_000))}, sys.argv[1])
except (OSError, RuntimeError) as error:
    print(why_not_written(error, Path(sys.argv[1]).parent))
"""


@pytest.mark.parametrize("size", [10, 1000, 100_000])
def test_a_file_that_cannot_grow_is_said_with_what_is_free(tmp_path, size):
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "x.pt"), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "free" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


SAFETENSORS = """
import resource, sys, torch
from pathlib import Path
from vramplan.errors import CheckpointError
from vramplan.train.export import replaced_directory
from safetensors.torch import save_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    with replaced_directory(Path(sys.argv[1])) as temporary:
        save_file({"a": torch.zeros(100_000)}, temporary / "x.safetensors")
except CheckpointError as error:
    print(error)
"""


def test_an_export_that_cannot_be_written_leaves_nothing_half_done(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "before").touch()
    command = [sys.executable, "-c", SAFETENSORS, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot be written (File too large; " in done.stdout
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "before"]


@pytest.mark.parametrize("text", ["[enforce fail at inline_container.cc:672] .", "basic_ios::clear: iostream error"])
def test_the_words_of_torchs_writer(tmp_path, text):
    assert "could not be written to its end" in why_not_written(RuntimeError(text), tmp_path)


def test_another_error_is_not_about_writing(tmp_path):
    assert why_not_written(RuntimeError("shapes do not match"), tmp_path) is None


def test_a_file_is_put_on_the_disk_chunk_by_chunk_and_each_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "_CHUNK_BYTES", 1 << 20)
    before, path = Told.count, tmp_path / "file"
    path.write_bytes(bytes(5 << 19))
    with path.open("rb") as file:
        disk.write_back(file.fileno())
    assert Told.count - before == 3


def test_what_tokenizers_raise_is_a_full_disk(tmp_path):
    error = Exception("No space left on device (os error 28)")
    assert why_not_written(error, tmp_path).startswith("No space left on device; ")
    assert why_not_written(Exception("something else"), tmp_path) is None
    assert why_not_written(ValueError("No space left on device (os error 28)"), tmp_path) is None
