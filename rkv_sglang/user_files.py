"""Text files that a user names: read once, as they are, whatever stands behind the name."""

import errno
import os
import select
import stat
import time
from pathlib import Path

from rkv_sglang.messages import one_line

# Of settings and prompts; a file of more is not one.
MOST_BYTES = 16 * 2**20
# Where a pipe's other end is slow, or nobody is there.
PATIENCE_S = 30.0
_CHUNK = 2**16


def read_text(path: str | Path, *, most_bytes: int = MOST_BYTES, patience_s: float = PATIENCE_S) -> str:
    """Return the text of a file, a FIFO, or a shell's ``<(...)``, which can be read only once.

    Line ends stay as they are. A byte order mark at the beginning is no part of the text.

    Args:
        most_bytes: A longer one is refused instead of read, because a device has no end.
        patience_s: Seconds for which nothing may come through a pipe.

    Raises:
        OSError: It cannot be read; ``strerror`` says why. ``TimeoutError`` if nothing came for ``patience_s``.
        ValueError: It is longer, no text in UTF-8, or its name cannot be one.
    """
    # Not blocking: to open a FIFO that nobody writes to would take forever.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        content = bytearray()
        is_regular = stat.S_ISREG(os.fstat(file).st_mode)
        while chunk := os.read(file, _CHUNK) if is_regular else _read_when_there(file, patience_s):
            content += chunk
            if len(content) > most_bytes:
                raise ValueError(f"it is longer than {most_bytes} bytes")
    finally:
        os.close(file)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None


def read_flag_text(flag: str, path: Path) -> str:
    """Return the text of a file that a flag names, as ``read_text``; ``ValueError``, one line, if it cannot be read."""
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path} cannot be read ({reason(error)})") from error


def check_flag_text(flag: str, text: str) -> None:
    """Raise ``ValueError``, one line, unless what a flag gives is text."""
    # Python keeps bytes of a command line that are no text as halves of characters, which no server takes.
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{flag} is not text in UTF-8")


def check_writable(path: Path) -> None:
    """Raise ``ValueError``, one line, unless a file can be written there; nothing is made."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: name a file in a folder that exists and is yours")


def reason(error: Exception) -> str:
    """Return why a file could not be used, in a few words for a message."""
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def _read_when_there(file: int, patience_s: float) -> bytes:
    deadline = time.monotonic() + patience_s
    waiting = select.poll()
    waiting.register(file, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        # An empty answer to a FIFO that had no writer yet would look like its end.
        if waiting.poll(1000 * left):
            try:
                return os.read(file, _CHUNK)
            except BlockingIOError:
                # Another reader was quicker.
                continue
    raise TimeoutError(errno.ETIMEDOUT, f"nothing came through it for {patience_s:g} s")
