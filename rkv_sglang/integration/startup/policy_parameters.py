"""``--kv-policy-config``: the parameters of a policy, as JSON or as the path of a JSON file."""

import json
import os
from collections.abc import Mapping
from typing import Any

from rkv_sglang.messages import shown
from rkv_sglang.user_files import read_text, reason

FLAG = "--kv-policy-config"
_EXAMPLE = """write for example '{"kernel_size": 5}', or the path of a file that holds it"""


def read_parameters(given: Any) -> dict[str, Any]:
    """Return the parameters by name; whether a policy takes them is for the policy to say.

    A file is read, and one like a shell's ``<(...)`` can be read only once.

    Args:
        given: Text that starts with ``{`` is JSON, other text is a path. Callers in Python may give a mapping.

    Raises:
        ValueError: No JSON object is there; one line that names the flag, the cause and the mend.
    """
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, str):
        raise ValueError(f"{FLAG} {shown(given)} is neither text nor a mapping: {_EXAMPLE}")
    text, source = given, ""
    if not given.lstrip().startswith("{"):
        source = f" {shown(given)}"
        try:
            text = read_text(os.path.expanduser(given))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{FLAG}{source} is neither a JSON object nor a readable file ({reason(error)}): {_EXAMPLE}"
            ) from None
    try:
        parameters = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{FLAG}{source} is not JSON ({error}): {_EXAMPLE}") from None
    if not isinstance(parameters, dict):
        raise ValueError(f"{FLAG}{source} holds {shown(parameters)}, no JSON object: {_EXAMPLE}")
    return parameters


def _refuse_constant(name: str) -> Any:
    # Python reads these, JSON has none of them.
    raise ValueError(f"{name} is no number in JSON")
