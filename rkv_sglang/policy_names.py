"""Names of policies, known without loading any of them."""

from importlib.metadata import entry_points

from rkv_sglang.config import NO_POLICY

# Other packages bring policies through an entry point in this group, the name of the policy on the left.
GROUP = "rkv_sglang.policies"
# Of this package; ``policies.registry`` has their classes.
OWN_NAMES = (
    *("rkv", "snapkv", "h2o", "streaming_llm", "keydiff", "manifoldkv", "longflow", "random", "random_attention"),
    *("gkv", "half", "triattention", "beaconkv"),
)
# Of these, those that look at places alone where one choice is made for a whole request.
BLIND_NAMES = ("streaming_llm", "random", "random_attention")


def policy_names() -> tuple[str, ...]:
    """Return every name that ``--kv-policy`` takes: ``"none"``, this package's, then other packages'."""
    others = sorted(entry_points(group=GROUP).names)
    return tuple(dict.fromkeys((NO_POLICY, *OWN_NAMES, *others)))
