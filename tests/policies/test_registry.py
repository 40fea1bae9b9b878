"""Policies by name: what a config builds, what other packages bring, and one line for everything that does not fit."""

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from rkv_sglang import policy_names as names
from rkv_sglang.config import PolicyConfig
from rkv_sglang.policies import (
    POLICIES,
    RKV,
    ScoreInputs,
    SnapKV,
    granularities_of,
    is_blind,
    is_stateful,
    make_policy,
    needs_values,
    policy_names,
)
from rkv_sglang.policies.parameters import check_parameters
from rkv_sglang.policy_names import BLIND_NAMES
from tests.policies.cases import CASES, policy_of
from tests.support.harness.environment import PROJECT_ROOT

THIRD_PARTY_DIR = PROJECT_ROOT / "tests" / "policies" / "third_party"
BUILT_IN = (
    *("rkv", "snapkv", "h2o", "streaming_llm", "keydiff", "manifoldkv", "longflow", "random", "random_attention"),
    *("gkv", "half", "triattention", "beaconkv", "thinkv"),
)


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(THIRD_PARTY_DIR))


def bring(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, entry_point: str, module: str = "") -> None:
    """Install, for this test, a package with one entry point and one module ``rkv_<package>``."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[rkv_sglang.policies]\n{entry_point}\n")
    (folder / f"rkv_{package}.py").write_text(module)
    monkeypatch.syspath_prepend(str(folder))


def problem_of(name: str, parameters: dict[str, Any] | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        make_policy(PolicyConfig(policy=name, parameters=parameters or {}))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_names() -> None:
    assert tuple(POLICIES) == BUILT_IN
    assert policy_names() == ("none", *BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_class_says_where_it_is_from_what_it_computes_and_what_its_parameters_are(name: str) -> None:
    policy_class: Any = POLICIES[name]
    assert "``score_j = " in policy_class.__doc__
    assert ("arXiv " in policy_class.__doc__) == (name != "random")
    for field in fields(policy_class):
        assert f"        {field.name}: " in policy_class.__doc__


def test_what_compaction_must_hand_over() -> None:
    policies = {name: policy_of(name, parameters) for name, parameters in CASES}
    assert {name for name, policy in policies.items() if needs_values(policy)} == {"longflow"}
    assert {name for name, policy in policies.items() if is_stateful(policy)} == {"h2o", "random", "gkv"}
    assert {name for name, policy in policies.items() if is_blind(policy)} == {*BLIND_NAMES}


def test_where_each_choice_can_be_made() -> None:
    class OfAnotherPackage:
        """Says nothing of it."""

    granularities = {name: granularities_of(policy) for name, policy in POLICIES.items()}
    assert granularities == {
        **dict.fromkeys(BUILT_IN, ("head", "request")),
        **dict.fromkeys(("manifoldkv", "longflow", "gkv", "half", "triattention", "beaconkv", "thinkv"), ("head",)),
        "random_attention": ("request", "head"),
    }
    assert granularities_of(OfAnotherPackage) == ("head",)
    for name, own in granularities.items():
        for granularity in {"head", "request"} - {*own}:
            with pytest.raises(
                ValueError, match=f"^--kv-granularity {granularity} does not go with --kv-policy {name}:"
            ):
                make_policy(PolicyConfig(policy=name, granularity=granularity))


def test_settings_with_a_flag_reach_the_policies_that_have_them() -> None:
    settings: dict[str, Any] = {"mix_lambda": 0.7, "kernel_size": 3, "similarity_threshold": 0.25}
    assert make_policy(PolicyConfig(**settings)) == RKV(**settings)
    assert make_policy(PolicyConfig()) == RKV()
    assert make_policy(PolicyConfig(policy="snapkv", **settings)) == SnapKV(kernel_size=3)
    for name in BUILT_IN:
        assert make_policy(PolicyConfig(policy=name)) == POLICIES[name]()


def test_parameters_come_before_the_settings_with_a_flag() -> None:
    config = PolicyConfig(mix_lambda=0.7, kernel_size=3, parameters={"kernel_size": 9, "similarity_threshold": 1})
    assert make_policy(config) == RKV(mix_lambda=0.7, kernel_size=9, similarity_threshold=1)


def test_snapkv_is_rkv_without_redundancy() -> None:
    torch.manual_seed(1)
    inputs = ScoreInputs(torch.randn(3, 4, 8), torch.randn(40, 2, 8), 5)
    assert torch.equal(SnapKV().score(inputs), RKV(mix_lambda=1.0).score(inputs))


@pytest.mark.parametrize(
    ("name", "parameters", "problem"),
    [
        ("h2o", {"mix_lambda": 0.1}, "there is no parameter 'mix_lambda': it has no parameters"),
        ("snapkv", {"mix_lambda": 0.1}, "there is no parameter 'mix_lambda': its parameters are kernel_size (int)"),
        ("random", {"seed": 1.0}, "seed must be int, got 1.0: its parameters are seed (int)"),
        ("random", {"seed": True}, "seed must be int, got True"),
        ("random", {"seed": None}, "seed must be int, got None"),
        ("random", {"seed": -1}, "seed must be at least 0, got -1"),
        ("random", {"seed": 2**32}, "seed must be below 2^32, got 4294967296"),
        ("streaming_llm", {"num_sinks": -1}, "num_sinks must be at least 0, got -1"),
        ("manifoldkv", {"mean_tokens": 0}, "mean_tokens must be at least 1, got 0"),
        ("manifoldkv", {"mean_tokens": "9"}, "mean_tokens must be int, got '9'"),
        ("snapkv", {"kernel_size": 2}, "--rkv-kernel-size 2 is even"),
        ("rkv", {"mix_lambda": "0.1"}, "mix_lambda must be float, got '0.1': its parameters are mix_lambda (float), k"),
        ("rkv", {"mix_lambda": float("nan")}, "mix_lambda must be float, got nan"),
        ("rkv", {"mix_lambda": 1.5}, "--rkv-mix-lambda 1.5 is not a number in [0, 1]"),
        ("half", {"seed": 2**32}, "seed must be below 2^32, got 4294967296"),
        ("beaconkv", {"num_recent": 0}, "num_recent must be at least 1, got 0"),
        ("beaconkv", {"num_beacons": 61}, "num_recent 4 and num_beacons 61 are together more than 64"),
        ("triattention", {"questions": 33}, "questions must be at most 32, got 33"),
        ("triattention", {"answer_tokens": 0}, "answer_tokens must be at least 1, got 0"),
        ("thinkv", {"buffer": 129}, "buffer must be at most 128, the tokens of a segment, got 129"),
        ("thinkv", {"rounds": -1}, "rounds must be at least 0, got -1"),
        ("thinkv", {"questions": 33}, "questions must be at most 32, got 33"),
        ("thinkv", {"transition_above": 0.9}, "execution_up_to and transition_above are two bounds of one measure"),
        (
            "thinkv",
            {"execution_up_to": 0.9, "transition_above": 0.1},
            "execution_up_to 0.9 must be a number of at most transition_above 0.1",
        ),
        ("gkv", {"decay": 1.1}, "decay must be in [0, 1], got 1.1"),
        ("gkv", {"importance_weight": -1}, "importance_weight must be in [0, 1], got -1"),
        ("gkv", {"kernel_size": 4}, "--rkv-kernel-size 4 is even"),
        ("rkv", {"score": 1}, "there is no parameter 'score'"),
        ("h2o", {"stateful": False}, "there is no parameter 'stateful'"),
    ],
)
def test_parameters_that_do_not_fit(name: str, parameters: dict[str, Any], problem: str) -> None:
    assert problem_of(name, parameters).startswith(f"--kv-policy-config does not fit --kv-policy {name}: {problem}")


@pytest.mark.parametrize("name", ["h20", "RKV", "rkv ", "../rkv", "rkv_sglang.policies.rkv"])
def test_an_unknown_policy(name: str) -> None:
    assert problem_of(name) == f"--kv-policy {name!r} is unknown: choose one of none, {', '.join(BUILT_IN)}"


def test_no_policy_is_built_for_none() -> None:
    assert problem_of("none") == f"policy 'none' scores nothing: choose one of {', '.join(BUILT_IN)}"


@pytest.mark.parametrize("name", ["", None, 3, ("rkv",)])
def test_a_name_that_is_none(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^--kv-policy .* is not a name: set --kv-policy to"):
        PolicyConfig(policy=name)


def test_a_config_with_parameters_can_be_compared_and_hashed() -> None:
    config = PolicyConfig(policy="random", parameters={"seed": 1})
    assert config != PolicyConfig(policy="random", parameters={"seed": 2})
    assert {config: 1}[PolicyConfig(policy="random", parameters={"seed": 1})] == 1


@pytest.mark.usefixtures("third_party")
def test_another_package_brings_a_policy() -> None:
    assert policy_names() == ("none", *BUILT_IN, "every_nth")
    policy: Any = make_policy(PolicyConfig(policy="every_nth", kernel_size=11, parameters={"stride": 3}))
    # The flags are for the policies of this package; another's parameters are its own affair.
    assert (policy.stride, policy.kernel_size) == (3, 5)
    assert not needs_values(policy) and not is_stateful(policy)
    scores = policy.score(ScoreInputs(torch.zeros(2, 4, 8), torch.zeros(9, 2, 8), 1))
    assert scores.tolist() == [[1, 0, 0, 1, 0, 0, 1]] * 2


@pytest.mark.usefixtures("third_party")
def test_parameters_of_another_package_are_checked_too() -> None:
    start = "--kv-policy-config does not fit --kv-policy every_nth: "
    assert problem_of("every_nth") == f"{start}stride must be given: its parameters are stride (int), kernel_size (int)"
    assert problem_of("every_nth", {"stride": 0}) == f"{start}stride must be at least 1, got 0"
    assert problem_of("every_nth", {"stride": 0.5}).startswith(f"{start}stride must be int, got 0.5")


def test_a_process_that_finds_the_package_on_its_path_has_the_policy() -> None:
    code = (
        "from rkv_sglang.config import PolicyConfig; from rkv_sglang.policies import make_policy; "
        "print(make_policy(PolicyConfig(policy='every_nth', parameters={'stride': 4})))"
    )
    env = {"PYTHONPATH": f"{THIRD_PARTY_DIR}:{PROJECT_ROOT}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("EveryNth(stride=4, kernel_size=5)\n", 0), done.stderr


def test_packages_are_looked_through_again_only_when_one_came_or_went(tmp_path, monkeypatch) -> None:
    num_looks, look = [], names.entry_points
    monkeypatch.setattr(names, "entry_points", lambda **asked: num_looks.append(1) or look(**asked))
    for name in ("first", "second"):
        for _ in range(3):
            assert problem_of(name).startswith(f"--kv-policy {name!r} is unknown: ")
        # Into the same folder, which is on the path already the second time.
        bring(tmp_path, monkeypatch, name, f"{name} = json:loads")
        for _ in range(3):
            assert "is not a dataclass" in problem_of(name)
    shutil.rmtree(tmp_path / "first-1.0.dist-info")
    assert problem_of("first").startswith("--kv-policy 'first' is unknown: ")
    assert len(num_looks) == 4


@pytest.mark.parametrize(
    ("entry_point", "module", "problem"),
    [
        ("broken = rkv_pack:Policy", "raise RuntimeError('two\\nlines')", "RuntimeError: two lines; mend or uninstall"),
        ("broken = rkv_pack:Policy", "", "cannot be loaded: AttributeError: "),
        ("broken = rkv_missing:Policy", "", "cannot be loaded: ModuleNotFoundError: No module named 'rkv_missing'"),
        ("broken = rkv_pack", "", "is not a dataclass with a method score"),
        ("broken = rkv_pack:score", "def score(inputs): ...", "is not a dataclass with a method score"),
        ("broken = rkv_pack:Policy", "class Policy:\n    def score(self, inputs): ...", "is not a dataclass with"),
        (
            "broken = rkv_pack:Policy",
            "import dataclasses\n@dataclasses.dataclass\nclass Policy: ...",
            "is not a dataclass with a method score",
        ),
    ],
)
def test_a_package_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry_point: str, module: str, problem: str
) -> None:
    bring(tmp_path, monkeypatch, "pack", entry_point, module)
    monkeypatch.delitem(sys.modules, "rkv_pack", raising=False)
    message = problem_of("broken")
    assert message.startswith("--kv-policy 'broken', which package pack brings as rkv_") and problem in message
    # It is nobody's problem until it is asked for.
    assert make_policy(PolicyConfig()) == RKV()


def test_a_name_that_two_bring_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(tmp_path / "a", monkeypatch, "first", "rkv = rkv_first:Policy")
    bring(tmp_path / "b", monkeypatch, "second", "mine = rkv_second:Policy")
    bring(tmp_path / "c", monkeypatch, "third", "mine = rkv_third:Policy")
    assert policy_names() == ("none", *BUILT_IN, "mine")
    assert problem_of("rkv") == "--kv-policy 'rkv' comes from rkv_sglang and first: choose one, uninstall the others"
    assert problem_of("mine") == "--kv-policy 'mine' comes from third and second: choose one, uninstall the others"


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [0, -3], [1.0, True, "1", None]),
        ("float", [0, 0.5], [True, "1", None, float("inf")]),
        ("bool", [True], [1, 0.0, "true", None]),
        ("str", ["", "a"], [1, True, None]),
        ("int | None", [1, None], [1.5, "1", True]),
        ("float | str", [1, "auto"], [None, True, []]),
        ("list[int]", [[1], [True]], []),
    ],
)
def test_the_types_that_parameters_may_have(annotation: str, good: list[Any], bad: list[Any]) -> None:
    namespace: dict[str, Any] = {}
    exec(f"from dataclasses import dataclass\n@dataclass\nclass Policy:\n    x: {annotation}", namespace)
    for value in good:
        check_parameters(namespace["Policy"], {"x": value})
    for value in bad:
        with pytest.raises(ValueError, match=r"^x must be .*, got .*: its parameters are x"):
            check_parameters(namespace["Policy"], {"x": value})
