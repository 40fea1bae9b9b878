"""Every place where the plugin meets SGLang, in the order in which it comes to pass.

The register in ``patches/`` is made from this table.
"""

from rkv_sglang.integration.hooking.hook import Hook
from rkv_sglang.integration.hooks.admission import ADMISSION_HOOKS
from rkv_sglang.integration.hooks.answers import META_INFO_HOOKS, STREAMER_HOOKS
from rkv_sglang.integration.hooks.flags import ARGS_HOOKS
from rkv_sglang.integration.hooks.metrics import METRICS_HOOKS
from rkv_sglang.integration.hooks.model import MODEL_HOOKS
from rkv_sglang.integration.hooks.processes import CONTROLLER_HOOKS, LAUNCHER_HOOKS, PROCESS_HOOKS
from rkv_sglang.integration.hooks.restore import RESTORE_HOOKS
from rkv_sglang.integration.hooks.scheduler import SCHEDULER_HOOKS

HOOKS: tuple[Hook, ...] = (
    *ARGS_HOOKS,
    *LAUNCHER_HOOKS,
    *META_INFO_HOOKS,
    *PROCESS_HOOKS,
    *CONTROLLER_HOOKS,
    *MODEL_HOOKS,
    *ADMISSION_HOOKS,
    *RESTORE_HOOKS,
    *SCHEDULER_HOOKS,
    *STREAMER_HOOKS,
    *METRICS_HOOKS,
)
