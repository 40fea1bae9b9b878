"""Files of what was measured of a model: written once, and read only for the model that they are of."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.messages import one_line

FoundT = TypeVar("FoundT")


def save_statistics(path: Path, statistics: QueryStatistics, made_from: Mapping[str, str]) -> None:
    """Write statistics and what they were made from, in one step: the file is there as a whole or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    tensors = {"means": torch.view_as_real(statistics.means), "mean_lengths": statistics.mean_lengths}
    _save(path, tensors, made_from)


def load_statistics(path: Path, made_from: Mapping[str, str], device: torch.device | str) -> QueryStatistics:
    """Read statistics that were made from just this.

    Raises:
        ValueError: The file cannot be read, holds something else, or was made from something else; one line.
    """

    def read(tensor_of: Callable[[str], Tensor]) -> QueryStatistics:
        means, lengths = torch.view_as_complex(tensor_of("means")), tensor_of("mean_lengths")
        statistics = QueryStatistics(means.to(device), lengths.to(device))
        statistics.check_numbers()
        return statistics

    return _load(path, made_from, read, "statistics of this model's queries")


def save_bounds(path: Path, bounds: tuple[float, float], made_from: Mapping[str, str]) -> None:
    """Write the bounds between kinds of thoughts, as ``save_statistics`` does.

    Raises:
        OSError: The file cannot be written.
    """
    _save(path, {"bounds": torch.tensor(bounds, dtype=torch.float64)}, made_from)


def load_bounds(path: Path, made_from: Mapping[str, str], device: torch.device | str = "cpu") -> tuple[float, float]:
    """Read bounds that were made from just this; ``device`` is not needed.

    Raises:
        ValueError: As ``load_statistics``.
    """
    del device

    def read(tensor_of: Callable[[str], Tensor]) -> tuple[float, float]:
        bounds = tensor_of("bounds")
        is_right = bounds.dtype == torch.float64 and list(bounds.shape) == [2] and bool(bounds.isfinite().all())
        if not is_right or bool(bounds[0] > bounds[1]):
            raise ValueError(f"bounds must be two ascending numbers of float64, got {bounds.dtype} {bounds.tolist()}")
        low, high = bounds.tolist()
        return low, high

    return _load(path, made_from, read, "bounds of this model's thoughts")


def _save(path: Path, tensors: Mapping[str, Tensor], made_from: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, dict(made_from))
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(one_line(error)) from None
    finally:
        Path(partial).unlink(missing_ok=True)


def _load(
    path: Path, made_from: Mapping[str, str], read: Callable[[Callable[[str], Tensor]], FoundT], what: str
) -> FoundT:
    try:
        # Whatever else stands there might be read for ever.
        if not path.is_file():
            raise ValueError("there is no such file")
        with safe_open(str(path), framework="pt", device="cpu") as file:
            found = file.metadata() or {}
            for name, value in made_from.items():
                if found.get(name) != value:
                    raise ValueError(f"its {name} is {found.get(name, 'not named')}, and here it is {value}")
            return read(file.get_tensor)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not hold {what}: {one_line(error)}") from None
