"""The servers that are up, and what their logs say."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.settings import Setting, as_file_name
from devtools.launch import Server, launched_server

LOG_DIR = Path(".cache/logs")
FLAGS = ("--decode-log-interval", "1", "--sleep-on-idle")
# Of a tiny model's work most threads only wait for each other.
TINY = {"OMP_NUM_THREADS": "1"}
_DECODE = re.compile(r"Decode batch, #running-req: (\d+), #token: (\d+),")
_RETRACTED = re.compile(r"#retracted_reqs: (\d+)")


class Servers:
    """Servers that stay up for as long as somebody goes on with them."""

    def __init__(self) -> None:
        self._up: dict[tuple[str, str, tuple[str, ...]], tuple[contextlib.ExitStack, Server]] = {}

    def only(self, model: str, settings: Sequence[Setting], flags: tuple[str, ...]) -> dict[str, Server]:
        """Return servers of these settings by their names, started if they are not up; all others end.

        Raises:
            ServerError: One did not start.
        """
        wanted = {(model, setting.name, flags): setting for setting in settings}
        for key in self._up.keys() - wanted.keys():
            self._up.pop(key)[0].close()
        for key, setting in wanted.items():
            if key not in self._up:
                log_path = LOG_DIR / f"prefixes_{as_file_name(setting.name)}.log"
                print(f"{Path(model).name}, {setting.name}: starting a server ...", flush=True)
                with contextlib.ExitStack() as stack:
                    starting = launched_server(
                        model,
                        *FLAGS,
                        *flags,
                        *setting.flags,
                        log_path=log_path,
                        environment=TINY if Path(model).name.startswith("tiny-") else None,
                    )
                    server = stack.enter_context(starting)
                    self._up[key] = (stack.pop_all(), server)
        return {key[1]: self._up[key][1] for key in wanted}

    @classmethod
    @contextlib.contextmanager
    def ended_at_last(cls) -> Iterator["Servers"]:
        """Yield an instance whose servers end with the ``with`` block."""
        servers = cls()
        try:
            yield servers
        finally:
            servers.only("", (), ())


def decode_peaks(log: str) -> tuple[int, int, int]:
    """Return what a server's log says of its decode steps: most slots in use, most requests, requests retracted."""
    steps = [(int(running), int(tokens)) for running, tokens in _DECODE.findall(log)]
    return (
        max((tokens for _, tokens in steps), default=0),
        max((running for running, _ in steps), default=0),
        sum(int(count) for count in _RETRACTED.findall(log)),
    )
