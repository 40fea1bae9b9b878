"""The error that ends a start-up, and how a person sees it."""

import sys
from types import TracebackType
from typing import NoReturn


class RefusedError(ValueError):
    """A server cannot serve what was asked for; the message is one line that names the cause and the mend."""


def stop(problem: str) -> NoReturn:
    """End a start-up: the process shows ``problem`` as its last line, without a traceback, and exits with status 1.

    Callers of ``sglang.Engine`` can catch it like any other ``ValueError``.

    Raises:
        RefusedError: Always, with ``problem`` as its message.
    """
    _show_in_one_line()
    raise RefusedError(problem)


def _show_in_one_line() -> None:
    # Installed only now, so that a process without such an error keeps its interpreter as it was.
    previous = sys.excepthook
    if getattr(previous, "shows_in_one_line", False):
        return

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, RefusedError):
            print(error, file=sys.stderr)
        else:
            previous(kind, error, trace)

    show.shows_in_one_line = True  # type: ignore[attr-defined]
    sys.excepthook = show
