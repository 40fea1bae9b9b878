"""A file that can be read only once, as a shell's ``<(...)`` is."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def served_once(path: Path, content: bytes, pauses: int = 0) -> Iterator[Path]:
    """Make a FIFO and write ``content`` into it once, with pauses, for the length of a ``with`` block.

    Whoever reads it again finds nobody who writes. The block ends when all was read.
    """
    os.mkfifo(path)

    def write() -> None:
        # It opens when somebody reads.
        with path.open("wb", buffering=0) as fifo:
            step = len(content) // (pauses + 1) + 1
            for start in range(0, len(content), step):
                fifo.write(content[start : start + step])
                time.sleep(0.02 * bool(pauses))

    # A daemon: where nobody reads, the test fails by itself.
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    yield path
    writer.join(10)
    assert not writer.is_alive(), "nobody has read it"
