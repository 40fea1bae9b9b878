"""Compile every kernel at its shipped configurations for GPUs that need not be here, and count what they use.

    python -m tests.kernels.aot [--filter NAME] [--json FILE] [--jobs N] [--instructions]

Prints one row per kernel, configuration and target, and ends with 1 if one does not compile, or if one spills more than
it may. Triton's interpreter must be off.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import rkv_sglang.kernels

# Shared memory that one program may have, in bytes.
TARGETS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MAX_REGISTERS = 255
# By the release that the programs were sized with nothing is; by others a few registers, which costs next to nothing.
MOST_SPILLED_BYTES = 0 if triton.__version__.startswith("3.8.") else 32
CUOBJDUMP, NVDISASM = (
    Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name for name in ("cuobjdump", "nvdisasm")
)


@dataclass(frozen=True)
class Usage:
    """What one program of a compiled kernel uses.

    Bytes of local memory are registers spilled (or arrays indexed). Instructions, -1 if not counted, are those of the
    listing, which a warp executes once each only where there are neither loops nor branches.
    """

    name: str
    target: int
    num_warps: int
    registers: int
    shared_bytes: int
    local_bytes: int
    widest_access_bytes: int
    instructions: int


def shipped_cases() -> list[tuple[str, Any, dict[str, Any], dict[str, Any], int, int]]:
    """Return the ``AOT_CASES`` of every module in ``rkv_sglang.kernels``, at any depth."""
    modules = pkgutil.walk_packages(rkv_sglang.kernels.__path__, "rkv_sglang.kernels.")
    names = [module.name for module in modules]
    return [case for name in names for case in getattr(importlib.import_module(name), "AOT_CASES", [])]


def _pointer_paths(index: int, given: Any) -> list[tuple[int, ...]]:
    """Return where an argument has pointers: the elements of a tuple have a path each."""
    if isinstance(given, tuple):
        return [(index, i) for i, element in enumerate(given) if element.startswith("*")]
    return [(index,)] if given.startswith("*") else []


def _count_instructions(cubin: str) -> int:
    listing = subprocess.run([NVDISASM, "-c", cubin], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", listing, re.MULTILINE))


def compile_case(
    case: tuple[str, Any, dict[str, Any], dict[str, Any], int, int], target: int, *, with_instructions: bool = False
) -> Usage:
    """Compile for one target with pointers aligned as torch's allocator aligns them."""
    name, kernel, types, constexprs, num_warps, num_stages = case
    signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
    unaligned = {param.name for param in kernel.params if param.do_not_specialize_on_alignment}
    attrs = {
        path: [["tt.divisibility", 16]]
        for index, (arg, given) in enumerate(signature.items())
        if arg not in unaligned
        for path in _pointer_paths(index, given)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        instructions = _count_instructions(file.name) if with_instructions else -1
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
    vectors = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    return Usage(
        name=name,
        target=target,
        num_warps=num_warps,
        registers=used["REG"],
        # Shared memory is asked for at launch; the cubin knows only what is static.
        shared_bytes=max(used["SHARED"], int(compiled.metadata.shared)),
        local_bytes=used["STACK"] + used["LOCAL"],
        widest_access_bytes=max((int(count or 1) * int(bits) // 8 for count, bits in vectors), default=0),
        instructions=instructions,
    )


def _compile_numbered(number: int, target: int, with_instructions: bool) -> Usage | str:
    """Return what a case uses, or in a line why it does not compile."""
    case = shipped_cases()[number]
    try:
        return compile_case(case, target, with_instructions=with_instructions)
    except Exception as error:
        return f"{case[0]} does not compile for sm_{target}: {error!r:.200}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="only configurations whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="how many to compile at a time")
    parser.add_argument("--instructions", action="store_true", help="count them, which takes longer than compiling")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: unset it, there is nothing to compile under the interpreter")
    numbers = [number for number, case in enumerate(shipped_cases()) if args.filter in case[0]]
    asked = [(number, target, args.instructions) for number in numbers for target in TARGETS]
    usages, faults = [], []
    print(f"Triton {triton.__version__}")
    print(f"{'kernel':56} {'sm':>4} {'warps':>5} {'regs':>5} {'shared':>7} {'spill':>6} {'widest':>6} {'instr':>6}")
    with ProcessPoolExecutor(args.jobs) as executor:
        for usage in executor.map(_compile_numbered, *zip(*asked, strict=True)):
            if isinstance(usage, str):
                faults.append(usage)
                continue
            usages.append(usage)
            print(
                f"{usage.name:56} {usage.target:4} {usage.num_warps:5} {usage.registers:5} {usage.shared_bytes:7} "
                f"{usage.local_bytes:6} {usage.widest_access_bytes:6} {usage.instructions:6}",
                flush=True,
            )
            if usage.local_bytes > MOST_SPILLED_BYTES:
                faults.append(f"{usage.name} spills {usage.local_bytes} bytes on sm_{usage.target}")
    if args.json:
        args.json.write_text(json.dumps([asdict(usage) for usage in usages]))
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
