"""A state machine over SGLang's real pools: random steps, thousands a second, everything checked.

    python -m tests.fuzz.pool_machine [--steps 1000000] [--first 0] [--out FOLDER] [--smoke]

Plan, move, free, insert, evict, match, copy and restore run on real pools, allocators and radix tree, without a server
(``pool/``), and so do the compaction of prompts and the making, use and deletion of named prefixes. Writes
``pool_machine.csv``, ``pool_machine.json`` and ``pool_machine.png``; a failing seed is printed, and ``--replay SEED``
repeats it.
"""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import benchmark_parser
from benchmarks.common.schema import Row, hardware_folder, run_info, write_table
from benchmarks.common.tables import POOL_MACHINE
from rkv_sglang.config import NUM_FIRST_KEPT, PolicyConfig
from tests.fuzz.report import plot_pool_machine, shares
from tests.support.harness.environment import child_environment
from tests.support.harness.scheduler import run_job

# Name of a step and how often it is tried against the others.
STEPS = {
    "decode": 60,
    "admit": 8,
    "finish": 4,
    "abort": 2,
    "retract": 4,
    "readmit": 12,
    "evict": 3,
    "match": 5,
    "flush": 1,
    "make_prefix": 3,
    "delete_prefix": 1,
}
STEPS_PER_WORLD = 2000
# All pages are counted, and every request looked at, once in so many steps.
CHECK_EVERY = 10
SMOKE_STEPS = 3000
FOLDER = Path(".cache/fuzz")
AXES = ("page_size", "radix", "window", "verify")


def make_world(seed: int) -> Any:
    """Return a world of random settings. Only where SGLang is set up: see ``set_up``."""
    from tests.fuzz.pool.world import World

    rng = random.Random(seed)
    window = rng.choice([1, 1, 2, 3, 8])
    return World(
        seed=seed,
        page_size=rng.choice([1, 1, 4, 16]),
        radix=rng.random() < 0.75,
        verify=rng.random() < 0.25,
        num_slots=rng.choice([80, 120, 240]),
        num_layers=rng.choice([1, 1, 2]),
        config=PolicyConfig(
            window=window,
            budget=window + rng.randint(1, 16),
            buffer=rng.randint(1, 12),
            prompt_budget=window + NUM_FIRST_KEPT + rng.randint(1, 6) if rng.random() < 0.4 else 0,
        ),
    )


def set_up() -> None:
    """Publish settings for this process, which SGLang's functions read; once."""
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    from devtools.tiny_models import tiny_model_path

    args = ServerArgs(
        model_path=str(tiny_model_path("llama-gqa")), device="cpu", attention_backend="torch_native", dtype="float32"
    )
    args.resolve_once()
    publish(args, role="scheduler")


def run_world(world: Any, num_steps: int, tell: Callable[[str], None] = lambda name: None) -> Counter[str]:
    """Take random steps; return how often each was taken.

    Raises:
        Wrong: Something that must hold does not.
    """
    rng = random.Random(f"steps {world.seed}")
    names, weights = list(STEPS), list(STEPS.values())
    if rng.random() < 0.5:
        # Requests live long enough to see more than the pool holds, so that some are restored.
        weights = [weight / 6 if name in ("finish", "abort") else weight for name, weight in STEPS.items()]
    counts: Counter[str] = Counter()
    while counts.total() < num_steps:
        (name,) = rng.choices(names, weights)
        tell(name)
        if getattr(world, name)():
            counts[name] += 1
            if counts.total() % CHECK_EVERY == 0 or name not in ("decode", "match"):
                world.check_all()
    counts["compaction"] = world.runtime.stats.compactions
    counts["restore"] = world.runtime.stats.requests_restored
    return counts


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Run worlds in a process that has SGLang; ``job`` has ``first`` and ``steps``."""
    set_up()
    rows: list[Row] = []
    seed, taken = job["first"], 0
    while taken < job["steps"]:
        steps = min(STEPS_PER_WORLD, job["steps"] - taken)
        started = time.perf_counter()
        world = make_world(seed)
        try:
            counts = run_world(world, steps)
        except Exception as error:
            return {"status": "wrong", "seed": seed, "message": f"{type(error).__name__}: {error}", "rows": rows}
        seconds = time.perf_counter() - started
        settings = {
            "page_size": world.page_size,
            "radix": int(world.radix),
            "window": world.config.window,
            "verify": int(world.verify),
        }
        rows += [
            {"seed": seed, **settings, "step": name, "count": count, "seconds": round(seconds, 3)}
            for name, count in sorted(counts.items())
        ]
        seed, taken = seed + 1, taken + steps
    return {"status": "ok", "rows": rows}


def search(job: dict[str, Any]) -> dict[str, Any]:
    """Have hypothesis choose the steps, so that a failing sequence is short; ``job`` has ``examples`` and ``steps``."""
    from hypothesis import HealthCheck, settings
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

    set_up()
    taken = Counter[str]()

    class Machine(RuleBasedStateMachine):
        @initialize(seed=st.integers(0, 2**20))
        def start(self, seed: int) -> None:
            self.world = make_world(seed)
            taken["admit"] += self.world.admit() + self.world.admit()

        def teardown(self) -> None:
            self.world.check_all()

    def a_rule(name: str) -> Any:
        def step(self: Any, choices: int) -> None:
            self.world.rng.seed(choices)
            if getattr(self.world, name)():
                taken[name] += 1
                self.world.check_all()

        return rule(choices=st.integers(0, 2**20))(step)

    def decode_on(self: Any, times: int) -> None:
        for _ in range(times):
            taken["decode"] += self.world.decode()

    for name in STEPS:
        setattr(Machine, name, a_rule(name))
    # Single steps seldom lead to a compaction.
    Machine.decode_on = rule(times=st.integers(2, 40))(decode_on)  # type: ignore[attr-defined]
    checks = list(HealthCheck)
    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=job["examples"],
                stateful_step_count=job["steps"],
                deadline=None,
                suppress_health_check=checks,
                database=None,
            ),
        )
    except Exception as error:
        return {"status": "wrong", "message": f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"}
    return {"status": "ok", "taken": dict(taken)}


def run_steps(first: int, steps: int) -> dict[str, Any]:
    """Take so many steps in another process, in worlds from the seed ``first`` on; return what ``work`` does."""
    return _elsewhere("work", 240 + steps / 20, first=first, steps=steps)


def run_search(examples: int, steps: int) -> dict[str, Any]:
    """Have hypothesis choose the steps of so many worlds, in another process; return what ``search`` does."""
    return _elsewhere("search", 240 + examples * steps, examples=examples, steps=steps)


def _elsewhere(function: str, timeout: float, **arguments: Any) -> dict[str, Any]:
    folder = tempfile.mkdtemp(prefix="rkv-pool-")
    job = {"call": f"tests.fuzz.pool_machine:{function}", "folder": folder, "env": child_environment(), **arguments}
    try:
        answer = run_job(job, timeout)
        if answer["status"] not in ("ok", "wrong"):
            answer["log"] = (Path(folder) / "log").read_text(errors="replace")[-6000:]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return answer


def main() -> int:
    """Run from the command line."""
    parser = benchmark_parser(__doc__, smoke=f"{SMOKE_STEPS} steps; into .cache/fuzz unless told otherwise")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--replay", type=int, metavar="SEED")
    options = parser.parse_args()
    if options.replay is not None:
        answer = run_steps(options.replay, STEPS_PER_WORLD)
        print(f"seed {options.replay}: {answer['status']} {answer.get('message', '')}{answer.get('log', '')}")
        return int(answer["status"] != "ok")
    if options.smoke:
        vars(options).update(steps=SMOKE_STEPS, out=options.out or FOLDER)
    out = options.out or hardware_folder()
    started = time.monotonic()
    answer = run_steps(options.first, options.steps)
    if answer["status"] != "ok":
        print(f"seed {answer.get('seed')} fails: {answer.get('message', '')}{answer.get('log', '')}")
        print(f"again with: python -m tests.fuzz.pool_machine --replay {answer.get('seed')}")
    rows = answer.get("rows", [])
    if not rows:
        return 1
    seconds = time.monotonic() - started
    taken = sum(int(row["count"]) for row in rows if row["step"] in STEPS)
    info = run_info(
        first=options.first,
        steps=taken,
        violations=int(answer["status"] != "ok"),
        seconds=round(seconds),
        steps_per_s=round(taken / sum({row["seed"]: float(row["seconds"]) for row in rows}.values())),
        shares_of_steps=shares([row for row in rows if row["step"] == "decode"], AXES),
    )
    write_table(out, POOL_MACHINE, rows, info)
    plot_pool_machine(out)
    print(f"{taken} steps in {seconds:.0f} s, {info['settings']['steps_per_s']} a second; {answer['status']}")
    return int(answer["status"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
