"""Every place where the plugin meets SGLang, in the order of a server's start and then of a request's life.

The page ``docs/hooks.md`` is made from this table.
"""

from rkv_sglang.integration.hooking.hook import Hook
from rkv_sglang.integration.hooks.admission import ADMISSION_HOOKS
from rkv_sglang.integration.hooks.answers import META_INFO_HOOKS, STREAMER_HOOKS
from rkv_sglang.integration.hooks.flags import ARGS_HOOKS
from rkv_sglang.integration.hooks.metrics import METRICS_HOOKS
from rkv_sglang.integration.hooks.model import CAPTURE_HOOKS, MODEL_HOOKS
from rkv_sglang.integration.hooks.processes import CONTROLLER_HOOKS, LAUNCHER_HOOKS, PROCESS_HOOKS
from rkv_sglang.integration.hooks.restore import RESTORE_HOOKS
from rkv_sglang.integration.hooks.scheduler import SCHEDULER_HOOKS
from rkv_sglang.integration.hooks.steps import STEP_HOOKS

HOOKS: tuple[Hook, ...] = (
    *ARGS_HOOKS,
    *STEP_HOOKS,
    *PROCESS_HOOKS,
    *MODEL_HOOKS,
    *CAPTURE_HOOKS,
    *CONTROLLER_HOOKS,
    *LAUNCHER_HOOKS,
    *ADMISSION_HOOKS,
    *SCHEDULER_HOOKS,
    *RESTORE_HOOKS,
    *STREAMER_HOOKS,
    *META_INFO_HOOKS,
    *METRICS_HOOKS,
)
