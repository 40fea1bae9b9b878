"""From what both servers made of a program to two rows."""

from collections.abc import Mapping

from benchmarks.common.schema import Row
from benchmarks.frontend.run import ProgramRun, compared_hits


def frontend_rows(
    without: Mapping[str, ProgramRun], compressed: Mapping[str, ProgramRun], budget: int, buffer: int
) -> list[Row]:
    """Return two rows a program: the server without a policy, then the one with ``rkv``."""
    rows: list[Row] = []
    for name, theirs in without.items():
        ours = compressed[name]
        hits = compared_hits(theirs, ours)
        for setting, run, sizes in (("none", theirs, (0, 0)), ("rkv", ours, (budget, buffer))):
            rows.append(
                {
                    "program": name,
                    "setting": setting,
                    "budget": sizes[0],
                    "buffer": sizes[1],
                    "variables": len(run.texts),
                    "equal_texts": sum(text == theirs.texts.get(variable) for variable, text in run.texts.items()),
                    "choices": " ".join(run.choices.values()),
                    "calls": len(run.calls),
                    "compressed": sum(call.compactions > 0 for call in run.calls),
                    "compactions": sum(call.compactions for call in run.calls),
                    "output_tokens": sum(call.output_tokens for call in run.calls),
                    "prompt_tokens": sum(call.prompt_tokens for call in run.calls),
                    "cached_tokens": sum(call.cached_tokens for call in run.calls),
                    "compared_calls": len(hits),
                    "compared_cached_tokens": sum(pair[setting == "rkv"] for pair in hits),
                }
            )
    return rows
