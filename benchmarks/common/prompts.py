"""Questions for real models: those of this project, or a file's."""

import json
from pathlib import Path

PROMPTS = Path(__file__).with_name("prompts.txt")


def load_prompts(path: Path, count: int) -> list[str]:
    """Return the first ``count`` questions of a file: one a line, or JSON lines with a field ``problem``.

    Raises:
        ValueError: The file has fewer.
    """
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if len(lines) < count:
        raise ValueError(f"{path} has {len(lines)} questions: set --num-prompts to at most that")
    if path.suffix == ".jsonl":
        return [json.loads(line)["problem"] for line in lines[:count]]
    return lines[:count]
