"""Which servers run one after the other, and which side by side."""

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality import __main__ as quality

POLICIES = ("rkv", "snapkv", "h2o")


@pytest.mark.parametrize("num_servers", [1, 2, 3])
def test_only_the_reference_is_waited_for(monkeypatch: pytest.MonkeyPatch, num_servers: int) -> None:
    ran: list[dict[str, list[tuple[str, str]]]] = []
    monkeypatch.setattr(quality, "_run_servers", lambda study, todo: ran.append(todo))
    study: Any = SimpleNamespace(num_servers=num_servers)

    def servers(**todo: list[tuple[str, str]]) -> list[list[str]]:
        ran.clear()
        monkeypatch.setattr(
            quality, "missing_parts", lambda *_: {policy: list(parts) for policy, parts in todo.items()}
        )
        quality.measure(study, POLICIES, ("recall",))
        return [sorted(group) for group in ran]

    own = {policy: [(policy, "recall")] for policy in POLICIES}
    together = [sorted(POLICIES[start : start + num_servers]) for start in range(0, 3, num_servers)]
    # Recall without compression is the first server's, before its own.
    assert servers(none=[("none", "recall")], **own) == together
    assert next(iter(ran[0].values())) == [("none", "recall"), ("rkv", "recall")]
    # Nobody can be compared with a reference that there is not yet; a server alone goes on with its own parts.
    alone = [] if num_servers == 1 else [["rkv"]]
    assert servers(none=[("none", "reference")], **own) == [*alone, *together]
    assert next(iter(ran[0].values()))[0] == ("none", "reference")
    assert servers(**own) == together
