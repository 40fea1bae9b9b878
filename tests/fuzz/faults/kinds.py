"""Faults in what only some servers have: positions of three numbers, ranks of their own, several tokenizer workers."""

from tests.fuzz.faults.mutant import Mutant

_SHARE_A_REQUEST = """\
    if scheduler.attn_tp_group.world_size > 1:
        # Ranks that have heads of this request must agree on whether it goes on; others know nothing of it.
        is_saved = torch.tensor(int(copy is not None))
        torch.distributed.all_reduce(is_saved, torch.distributed.ReduceOp.MIN, group=scheduler.attn_tp_cpu_group)
"""

KINDS = (
    Mutant(
        "of positions of three numbers each counts resident tokens",
        "integration/hooks/model.py",
        "result.mrope_positions = result.mrope_positions + (result.positions - resident)",
        "pass",
        ("tests/e2e/test_mrope.py", "-k", "drop"),
    ),
    Mutant(
        "of a restored token the positions of three numbers are those of a resident one",
        "integration/runtime/restore.py",
        "forward_batch.mrope_positions = forward_batch.mrope_positions + offsets",
        "pass",
        ("tests/e2e/test_mrope.py", "-k", "gather"),
    ),
    Mutant(
        "a rank that decodes votes for one prefill of all",
        "integration/hooks/scheduler.py",
        "local_batch.forward_mode.is_decode():\n        return False",
        "local_batch.forward_mode.is_decode():\n        pass",
        ("tests/e2e/test_attention_ranks.py", "-k", "votes"),
    ),
    Mutant(
        "ranks that have no request in common are asked whether they could copy it",
        "integration/runtime/restore.py",
        _SHARE_A_REQUEST,
        _SHARE_A_REQUEST.replace("attn_tp", "tp"),
        ("tests/e2e/test_attention_ranks.py", "-k", "preempted and one-each"),
    ),
    Mutant(
        "only the first tokenizer worker has the plugin's part of it",
        "integration/hooks/flags.py",
        "        install_answer_hooks()\n",
        "        pass\n",
        ("tests/e2e/test_many_processes.py", "-k", "counters_add_up"),
    ),
)
