"""Names of policies, known without loading any of them."""

import os
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from rkv_sglang.config import NO_POLICY

# Other packages bring policies through an entry point in this group, the name of the policy on the left.
GROUP = "rkv_sglang.policies"
# Of this package; ``policies.registry`` has their classes.
OWN_NAMES = (
    *("rkv", "snapkv", "h2o", "streaming_llm", "keydiff", "manifoldkv", "longflow", "random", "random_attention"),
    *("gkv", "half", "triattention", "beaconkv", "thinkv"),
)
# Of these, those that look at places alone where one choice is made for a whole request.
BLIND_NAMES = ("streaming_llm", "random", "random_attention")


def policy_names() -> tuple[str, ...]:
    """Return every name that ``--kv-policy`` takes: ``"none"``, this package's, then other packages'."""
    others = sorted(point.name for point in brought_policies())
    return tuple(dict.fromkeys((NO_POLICY, *OWN_NAMES, *others)))


def brought_policies() -> tuple[EntryPoint, ...]:
    """Return the policies that other packages bring."""
    return _read(entry_points, tuple((folder, _changed_at(folder)) for folder in sys.path))


# A start asks a dozen times, and all packages are looked through to answer: again only if one may have come or gone.
@lru_cache(maxsize=1)
def _read(find: Callable[..., Iterable[EntryPoint]], folders: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    return tuple(find(group=GROUP))


def _changed_at(folder: str) -> int:
    try:
        return os.stat(folder or os.curdir).st_mtime_ns
    except OSError:
        return 0
