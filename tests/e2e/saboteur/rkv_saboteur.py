"""A plugin of the tests: makes rkv_sglang fail to load in scheduler processes, as a broken installation there would."""

import sys

# At import: SGLang imports all plugins before it runs any, and this one comes first, being first on the path.
if "sglang.srt.managers.scheduler" in sys.modules:
    # Importing a module that is None here raises ImportError.
    sys.modules["rkv_sglang.integration.plugin"] = None  # type: ignore[assignment]


def register() -> None:
    """Entry point, called by SGLang in every process it starts."""
