"""Files of query statistics: written once, and read only for the model that they are of."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.messages import one_line


def save_statistics(path: Path, statistics: QueryStatistics, made_from: Mapping[str, str]) -> None:
    """Write statistics and what they were made from, in one step: the file is there as a whole or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "means": torch.view_as_real(statistics.means).cpu().contiguous(),
        "mean_lengths": statistics.mean_lengths.cpu().contiguous(),
    }
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, partial, dict(made_from))
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(one_line(error)) from None
    finally:
        Path(partial).unlink(missing_ok=True)


def load_statistics(path: Path, made_from: Mapping[str, str], device: torch.device | str) -> QueryStatistics:
    """Read statistics that were made from just this.

    Raises:
        ValueError: The file cannot be read, holds something else, or was made from something else; one line.
    """
    try:
        # Whatever else stands there might be read for ever.
        if not path.is_file():
            raise ValueError("there is no such file")
        with safe_open(str(path), framework="pt", device="cpu") as file:
            found = file.metadata() or {}
            for name, value in made_from.items():
                if found.get(name) != value:
                    raise ValueError(f"its {name} is {found.get(name, 'not named')}, and here it is {value}")
            statistics = QueryStatistics(
                torch.view_as_complex(file.get_tensor("means")).to(device), file.get_tensor("mean_lengths").to(device)
            )
            statistics.check_numbers()
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not hold statistics of this model's queries: {one_line(error)}") from None
    return statistics
