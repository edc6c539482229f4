"""A disk that is full: told from other errors whichever writer met it, with room kept to say so."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from vramplan.train.progress import tell
from vramplan.units import format_bytes

_NOT_WRITTEN = ("inline_container.cc", "PytorchStreamWriter", "iostream error")
"""In what torch's writer of archives raises where a file does not grow any further."""
_SAFETENSORS = "I/O error: "
"""In what safetensors raises (SafetensorError, which is no OSError), before the system's own words."""
_TOKENIZERS = re.compile(r"^(?P<said>.+) \(os error (?P<code>\d+)\)$")
"""What tokenizers' writer raises, as a plain Exception: Rust's words for an error of the system."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_RESERVE_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 28
_WAIT_WRITE_WAIT = 1 | 2 | 4
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER (linux/fs.h)."""
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE)


def why_not_written(error: Exception, directory: Path) -> str | None:
    """What the system said, and how much is free; None where the error is not about writing."""
    text = str(error)
    if isinstance(error, OSError):
        said = error.strerror or text
    elif type(error).__name__ == "SafetensorError" and _SAFETENSORS in text:
        said = text.partition(_SAFETENSORS)[2].partition(" (os error")[0]
    elif type(error) is Exception and (found := _TOKENIZERS.match(text)):
        said = found["said"]
    elif isinstance(error, RuntimeError) and any(words in text for words in _NOT_WRITTEN):
        said = "a file could not be written to its end"  # torch's writer does not pass on why
    else:
        return None
    return f"{said}; {format_bytes(shutil.disk_usage(directory).free)} free"


def full_disk_sentence(error: BaseException) -> str | None:
    """What to tell of any file that a full disk (or a quota) did not take; None where it is another error."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    what = "the run's files" if error.filename is None else str(error.filename)
    return f"{what} cannot be written ({error.strerror}): make room, then --resume goes on from the last checkpoint"


def write_back(descriptor: int) -> None:
    """Waits until a file's bytes are written, and tells of every chunk: ``fsync`` alone says nothing for as long as a
    slow disk takes for tens of GiB. It is still called afterwards, for the file's size and the disk's own cache.

    Raises:
        OSError: the disk did not take them; ``fsync`` would not say so again (sync_file_range(2), fs/sync.c).
    """
    write_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if write_range is None:
        return
    for start in range(0, os.fstat(descriptor).st_size, _CHUNK_BYTES):
        offsets = ctypes.c_int64(start), ctypes.c_int64(_CHUNK_BYTES)
        if write_range(descriptor, *offsets, ctypes.c_uint(_WAIT_WRITE_WAIT)) != 0:
            code = ctypes.get_errno()
            if code in _CANNOT:
                return
            raise OSError(code, os.strerror(code))
        tell()


class DiskReserve:
    """A file that is given up when the disk is full, so that the failure can still be told."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with suppress(OSError):  # then the disk is full already, and the first file that matters says so
            path.write_bytes(b"\0" * _RESERVE_BYTES)

    def release(self) -> None:
        """Gives its room back."""
        self._path.unlink(missing_ok=True)
