"""The variable that has compactions checked says yes, no, or what is wrong with it; nothing is unchecked unsaid."""

import pytest

from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.refusals import refuse
from rkv_sglang.integration.startup.server_args import RKVServerArgs
from rkv_sglang.integration.startup.verify_switch import VERIFY_VARIABLE, is_verifying

SERVED = {"model_path": "m", "device": "cpu", "attention_backend": "torch_native"}


@pytest.mark.parametrize(("value", "is_on"), [("1", True), ("0", False), ("", False)])
def test_one_is_yes_and_nothing_is_no(monkeypatch: pytest.MonkeyPatch, value: str, is_on: bool) -> None:
    monkeypatch.setenv(VERIFY_VARIABLE, value)
    assert is_verifying() is is_on
    for settings in ({}, {"kv_granularity": "request"}):
        refuse(RKVServerArgs(**SERVED, kv_policy="rkv", **settings))


@pytest.mark.parametrize("value", ["true", " 1", "2", "x" * 1000])
def test_anything_else_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VERIFY_VARIABLE, value)
    with pytest.raises(RefusedError, match=f"^{VERIFY_VARIABLE} is '.{{1,80}}': set it to 1 .*, or unset it$"):
        refuse(RKVServerArgs(**SERVED, kv_policy="rkv"))
    refuse(RKVServerArgs(**SERVED))
