"""A plugin of the tests: every process of SGLang writes again and again which modules of rkv_sglang it has loaded.

One file for each process, named after its pid, in the folder that ``RKV_CENSUS_DIR`` names: one module a line.
"""

import os
import sys
import threading
import time
from pathlib import Path

INTERVAL_S = 0.2


def register() -> None:
    """Entry point, called by SGLang in every process it starts."""
    folder = os.environ.get("RKV_CENSUS_DIR")
    if folder:
        threading.Thread(target=_write, args=(Path(folder),), daemon=True).start()


def _write(folder: Path) -> None:
    file, draft = folder / str(os.getpid()), folder / f".{os.getpid()}"
    while True:
        modules = sorted(name for name in list(sys.modules) if name.split(".")[0] == "rkv_sglang")
        draft.write_text("\n".join(modules))
        draft.replace(file)
        time.sleep(INTERVAL_S)
