"""All benchmarks: the one list from which the smoke run and the plots take what there is."""

import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.schema import Table, read_table
from benchmarks.common.tables import (
    ACCURACY,
    ACCURACY_POOLED,
    DROP_COST,
    FIRST_TOKEN,
    FRONTEND,
    FUZZ,
    IDLE_COST,
    KERNELS,
    MEMORY,
    MUTATIONS,
    POOL_MACHINE,
    PREFIX_LOAD,
    PREFIX_RECALL,
    QUALITY_FORCED,
    QUALITY_FREE,
    QUALITY_POSITION,
    QUALITY_RECALL,
    RACES,
    SCORING,
    SCORING_RANDOM,
    SERVE_CHECK,
    SERVING,
    SOAK,
    THROUGHPUT,
)


@dataclass(frozen=True)
class Plot:
    """A function that takes a folder and returns the picture it wrote, by name, and the tables it draws.

    By name because the benchmarks import torch and SGLang, which takes seconds.
    """

    function: str
    tables: tuple[Table, ...]

    def is_due(self, folder: Path) -> bool:
        """Return whether the folder has any of the tables."""
        return any((folder / f"{table.name}.csv").exists() for table in self.tables)

    def draw(self, folder: Path) -> Path:
        """Draw it and return the picture's path.

        Raises:
            ValueError: A CSV does not fit its table, or is empty; one line.
        """
        for table in self.tables:
            if (folder / f"{table.name}.csv").exists() and not read_table(folder, table):
                raise ValueError(f"{table.name}.csv has no rows")
        picture: Path = pkgutil.resolve_name(self.function)(folder)
        return picture


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: ``python -m MODULE``.

    Attributes:
        name: Of its step in a smoke run.
        module: What Python runs.
        plots: What it draws, and from which of its tables.
        smoke_arguments: Behind ``--smoke --out FOLDER``; ``{out}`` is the folder.
        script: What runs it on a GPU; its smoke run is the rehearsal of that, in a folder of its own.
    """

    name: str
    module: str
    plots: tuple[Plot, ...]
    smoke_arguments: tuple[str, ...] = ()
    script: str = ""

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables that a smoke run of it writes."""
        return tuple(table for plot in self.plots for table in plot.tables)

    def smoke_folder(self, out: Path) -> Path:
        """Return where under ``out`` the tables of a smoke run lie."""
        return out / self.name if self.script else out

    def smoke_command(self, out: Path) -> list[str]:
        """Return the command line of a smoke run into a folder."""
        if self.script:
            return ["bash", self.script, "--rehearse", str(self.smoke_folder(out))]
        arguments = [argument.format(out=out) for argument in self.smoke_arguments]
        return [sys.executable, "-m", self.module, "--smoke", "--out", str(out), *arguments]


_WORK = ("--work", "{out}/work")
_QUALITY = (QUALITY_FORCED, QUALITY_POSITION, QUALITY_FREE, QUALITY_RECALL)
_ACCURACY = (
    Plot("benchmarks.accuracy.report:plot", (ACCURACY,)),
    Plot("benchmarks.accuracy.report:plot_pooled", (ACCURACY_POOLED,)),
)
# The longest smoke run first, so that side by side they end together.
BENCHMARKS = (
    Benchmark("quality", "benchmarks.quality", (Plot("benchmarks.quality.report:plot", _QUALITY),), _WORK),
    Benchmark("accuracy", "benchmarks.accuracy", _ACCURACY, _WORK),
    Benchmark("idle_cost", "benchmarks.idle_cost", (Plot("benchmarks.idle_cost:plot", (IDLE_COST, FIRST_TOKEN)),)),
    Benchmark("frontend", "benchmarks.frontend", (Plot("benchmarks.frontend.report:plot", (FRONTEND,)),)),
    Benchmark(
        "prefixes",
        "benchmarks.prefixes",
        (Plot("benchmarks.prefixes.report:plot", (PREFIX_LOAD, PREFIX_RECALL)),),
    ),
    Benchmark("memory", "benchmarks.memory", (Plot("benchmarks.memory:plot", (MEMORY,)),)),
    # What is searched is the tests' own; here by name, as all of them.
    Benchmark("fuzz", "tests.fuzz", (Plot("tests.fuzz.report:plot_schedules", (FUZZ,)),)),
    Benchmark(
        "pool_machine", "tests.fuzz.pool_machine", (Plot("tests.fuzz.report:plot_pool_machine", (POOL_MACHINE,)),)
    ),
    Benchmark("soak", "benchmarks.soak", (Plot("benchmarks.soak.report:plot", (SOAK,)),)),
    Benchmark("mutations", "tests.fuzz.mutations", (Plot("tests.fuzz.report:plot_mutations", (MUTATIONS,)),)),
    Benchmark("drop_cost", "benchmarks.drop_cost", (Plot("benchmarks.drop_cost:plot", (DROP_COST,)),)),
    Benchmark("serving", "benchmarks.serving", (Plot("benchmarks.serving.report:plot", (SERVING,)),)),
    Benchmark(
        "serve_check",
        "benchmarks.gpu.serve_check",
        (Plot("benchmarks.gpu.serve_check:plot", (SERVE_CHECK, RACES)),),
        script="benchmarks/gpu/serving.sh",
    ),
    Benchmark(
        "throughput",
        "benchmarks.gpu.throughput",
        (Plot("benchmarks.gpu.throughput:plot", (THROUGHPUT,)),),
        script="benchmarks/gpu/throughput.sh",
    ),
    Benchmark("gpu_accuracy", "benchmarks.accuracy.collect", _ACCURACY, script="benchmarks/gpu/accuracy.sh"),
    Benchmark(
        "gpu_kernels",
        "benchmarks.kernels",
        (Plot("benchmarks.kernels.kit:plot", (KERNELS,)),),
        script="benchmarks/gpu/kernels.sh",
    ),
    # On a CPU it runs benchmarks.kernels.scoring too.
    Benchmark(
        "kernels",
        "benchmarks.kernels",
        (
            Plot("benchmarks.kernels.kit:plot", (KERNELS,)),
            Plot("benchmarks.kernels.scoring:plot", (SCORING, SCORING_RANDOM)),
        ),
        ("--device", "cpu"),
    ),
)
PLOTS = tuple(dict.fromkeys(plot for benchmark in BENCHMARKS for plot in benchmark.plots))
