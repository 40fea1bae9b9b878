"""Write ``docs/launch-lines.md``: which models start with a policy on which GPU, as ``rkv-sglang doctor`` judges it.

Usage: ``python -m devtools.launch_lines`` writes it; it takes a minute or two.
"""

import io
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from devtools.model_shapes import SHAPES
from rkv_sglang.integration.doctor.hardware import AMD, HARDWARE
from rkv_sglang.integration.doctor.launch import check_command

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "launch-lines.md"
# GPUs for which SGLang decides alike, each named after one.
KINDS = {
    "H100": "A100, H100, H200",
    "B200": "B200, B300, GB200, GB300",
    "MI300X": "MI300X, MI325X",
    "MI350X": "MI350X, MI355X",
}
# What SGLang chooses by itself there, and what may be chosen instead.
INSTEAD = dict.fromkeys(AMD, "--attention-backend triton")


@dataclass(frozen=True)
class Verdict:
    """Whether a launch starts; ``flag`` is what had to be added for it, ``reasons`` are why it doesn't."""

    flag: str = ""
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.reasons:
            return "refused"
        return f"with `{self.flag}`" if self.flag else "starts"


@dataclass(frozen=True)
class Line:
    """A launch: the model's shape, and the flags it is usually served with."""

    shape: str
    flags: str
    policy: str = "rkv"

    @property
    def shown(self) -> str:
        return f"--kv-policy {self.policy} {self.flags}".strip()


LINES = (
    Line("Qwen3", "--reasoning-parser qwen3"),
    Line("Qwen3", "--dp-size 2"),
    Line("Qwen3-MoE", "--tp-size 4 --ep-size 4 --reasoning-parser qwen3"),
    Line("Qwen3-MoE", "--tp-size 8 --dp-size 8 --enable-dp-attention"),
    Line("Llama-3.1", "--tp-size 4"),
    Line("Llama-3.1", "--tp-size 4 --kv-cache-dtype fp8_e4m3"),
    Line("Mistral-Large", "--tp-size 8"),
    Line("Mistral-Nemo", "--context-length 65536"),
    Line("Mistral-Small-3", "--context-length 32768 --tool-call-parser mistral"),
    Line("GLM-4.6", "--tp-size 8 --reasoning-parser glm45 --tool-call-parser glm45"),
    Line("GLM-4.6", "--tp-size 8 --speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1"),
    Line("MiniMax-M2", "--tp-size 4 --mem-fraction-static 0.85"),
    Line("MiniMax-M2.7", "--tp-size 8 --ep-size 8 --tool-call-parser minimax-m2"),
    Line("Qwen3-VL", "--tp-size 1"),
    Line("Qwen3-VL-MoE", "--tp-size 4 --ep-size 4"),
    Line("GLM-4.6V", "--tp-size 4 --mm-enable-dp-encoder"),
    Line("GLM-4.6V-Flash", "--tp-size 1"),
    Line("Intern-S1", "--tp-size 8 --trust-remote-code"),
    Line("LLaDA-2.1", "--trust-remote-code --dllm-algorithm LowConfidence"),
    Line("gpt-oss", "--tp-size 2 --reasoning-parser gpt-oss"),
    Line("Mellum", "--tp-size 1"),
    Line("Llama-4-Scout", "--tp-size 8 --context-length 65536"),
    Line("Gemma-3", "--tp-size 2"),
    Line("Gemma-3", "--tp-size 2 --kv-budget 512"),
    Line("Gemma-4", "--tp-size 2"),
    Line("Step-3.5-Flash", "--tp-size 4 --trust-remote-code"),
    Line("Step-3.5-Flash", "--tp-size 4 --trust-remote-code --kv-window 512", policy="random_attention"),
    Line("MiMo-V2-Flash", "--tp-size 4"),
    Line("DeepSeek-R1", "--tp-size 8"),
    Line("DeepSeek-R1", "--tp-size 8 --attention-backend triton", policy="random_attention"),
    Line("DeepSeek-V3.2", "--tp-size 8"),
    Line("DeepSeek-Math-V2", "--tp-size 8 --dp-size 8 --enable-dp-attention"),
    Line("Mistral-Small-4", "--tp-size 2 --tool-call-parser mistral --reasoning-parser mistral"),
    Line("Kimi-K2", "--tp-size 8 --tool-call-parser kimi_k2"),
    Line("Kimi-K2.5", "--tp-size 8"),
    Line("Kimi-K2.6", "--tp-size 8 --kv-cache-dtype fp8_e4m3"),
    Line("GLM-5", "--tp-size 8"),
    Line("GLM-5.1", "--tp-size 8 --reasoning-parser glm45"),
    Line("Qwen3-Next", "--tp-size 4"),
    Line("Qwen3-Coder-Next", "--tp-size 4 --tool-call-parser qwen3_coder"),
    Line("Qwen3.5", "--tp-size 8"),
    Line("Qwen3.6", "--tp-size 2 --reasoning-parser qwen3"),
    Line("Nemotron-3-Nano", "--tp-size 1"),
    Line("Nemotron-3-Super", "--tp-size 4 --kv-cache-dtype fp8_e4m3"),
    Line("Ring-2.5", "--tp-size 8"),
)

_HEAD = """\
# Launch lines

Made by `python -m devtools.launch_lines` from the table in `devtools/launch_lines.py`; do not edit it by hand.

Whether a server starts with a policy, for the families of models that people serve and the GPUs they serve them on, as
`rkv-sglang doctor --command "..." --model-config config.json --hardware GPU` says it: SGLang's own resolution of the
arguments, told of that GPU, and every refusal. Models stand for their family by the shape that their public
`config.json` gives (Mistral-Small-4: its `params.json`). What it cannot see are the weights, the memory that they
leave, and how the kernels of a GPU that the project has not run on behave: [compatibility](compatibility.md) says what
has run where.

"with `FLAG`" starts if that flag is added to the line. Every line begins with `sglang serve MODEL`.

| model | line | {kinds} |
|---|---|{rules}|
"""


def judge(line: Line, hardware: str) -> Verdict:
    """Ask the doctor about a line on a GPU."""
    flags = INSTEAD.get(hardware, "")
    first = _ask(line.shown, line.shape, hardware)
    if not first or not flags or "--attention-backend" in line.flags:
        return Verdict(reasons=first)
    return Verdict(flag=flags) if not _ask(f"{line.shown} {flags}", line.shape, hardware) else Verdict(reasons=first)


def _ask(flags: str, shape: str, hardware: str) -> tuple[str, ...]:
    out = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        # What has no kind is of Mistral's own making.
        config = Path(folder) / ("config.json" if "model_type" in SHAPES[shape] else "params.json")
        config.write_text(json.dumps(SHAPES[shape]))
        # SGLang looks at a model's name, too.
        status = check_command(f"sglang serve {shape} {flags}", str(config), out, hardware=hardware)
    return tuple(map(_reason, out.getvalue().splitlines())) if status else ()


def _reason(line: str) -> str:
    """Return what of a refusal is of no one model and no one GPU alone."""
    line = re.sub(r"^--model-path \S+ \(\w+\) cannot", "This model cannot", line)
    return re.sub(rf"\bon ({'|'.join(HARDWARE)}) the", "there the", line)


def render() -> str:
    """Return the page's text."""
    reasons: list[str] = []
    rows = []
    for line in LINES:
        cells = []
        for hardware in KINDS:
            verdict = judge(line, hardware)
            reasons += [reason for reason in verdict.reasons if reason not in reasons]
            numbers = ", ".join(str(reasons.index(reason) + 1) for reason in verdict.reasons)
            cells.append(f"{verdict}: {numbers}" if numbers else str(verdict))
        rows.append(f"| {line.shape} | `{line.shown}` | {' | '.join(cells)} |")
    head = _HEAD.format(kinds=" | ".join(KINDS.values()), rules="|".join(["---"] * len(KINDS)))
    listed = "\n".join(f"| {number} | {reason} |" for number, reason in enumerate(reasons, start=1))
    return head + "\n".join(rows) + "\n\n## Why a line is refused\n\n| number | reason |\n|---|---|\n" + listed + "\n"


def main() -> int:
    """Write the page."""
    PAGE.write_text(render())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
