"""Take a shell's command line apart: which variables it sets, and which arguments it hands to SGLang."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from rkv_sglang.messages import one_line

_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=", re.ASCII)
# Words of a shell that run the rest of the line as it is.
_PREFIXES = ("env", "exec", "nohup", "time")
_OPERATORS = "();<>|&"
# Options of the interpreter that take the next word.
_WITH_VALUE = ("-W", "-X")
_EXAMPLE = "give one launch, as in 'python -m sglang.launch_server ...' or 'sglang serve ...'"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launch of SGLang, as a shell would read it.

    Attributes:
        environment: The variables that stand in front of the command.
        arguments: What follows the command.
        is_serve: Whether it is ``sglang serve``, which also takes the model without a flag.
    """

    environment: dict[str, str]
    arguments: tuple[str, ...]
    is_serve: bool


def read_launch(text: str) -> Launch:
    """Read a command line; nothing in it is run or expanded.

    Raises:
        ValueError: It is not one launch of an SGLang server; one line that names the mend.
    """
    # Wrapped lines are joined as a shell does.
    reader = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=_OPERATORS)
    reader.whitespace_split = True
    reader.commenters = ""
    try:
        words = list(reader)
    except ValueError as error:
        raise ValueError(f"--command cannot be read ({str(error).lower()}): close its quotes") from None
    for word in words:
        if word and not word.strip(_OPERATORS):
            raise ValueError(f"--command has the shell's {word} in it: {_EXAMPLE}")
    environment = {}
    rest = iter(words)
    for word in rest:
        if _ASSIGNMENT.match(word):
            name, _, value = word.partition("=")
            environment[name] = value
        elif word not in _PREFIXES:
            return Launch(environment=environment, is_serve=_is_serve(word, rest), arguments=tuple(rest))
    raise ValueError(f"--command runs nothing: {_EXAMPLE}")


def _is_serve(program: str, rest: Iterator[str]) -> bool:
    """Read on to where SGLang's own arguments begin; return whether it is ``sglang serve``."""
    name = program.rpartition("/")[2]
    if name == "sglang":
        if next(rest, None) == "serve":
            return True
    elif re.fullmatch(r"python[\d.]*", name):
        for word in rest:
            if word in _WITH_VALUE:
                next(rest, None)
            elif word == "-m":
                if next(rest, None) == "sglang.launch_server":
                    return False
                break
            elif not word.startswith("-"):
                break
    raise ValueError(f"--command starts no SGLang server with {one_line(program)}: {_EXAMPLE}")
