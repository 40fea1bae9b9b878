"""A file of query statistics comes back bit by bit, and only for what it was made from."""

from pathlib import Path

import pytest
import torch

from rkv_sglang.algorithm.query_statistics import QueryStatistics
from rkv_sglang.cache.statistics_file import load_bounds, load_statistics, save_bounds, save_statistics

MADE_FROM = {"model": "abc", "questions": "32x2048", "rank": "0of1"}


def some_statistics() -> QueryStatistics:
    means = torch.randn(2, 4, 8, dtype=torch.complex64)
    return QueryStatistics(means, means.abs() + torch.rand(2, 4, 8))


def test_what_is_read_is_what_was_written(tmp_path: Path, rng) -> None:
    torch.manual_seed(rng.randrange(2**31))
    statistics, path = some_statistics(), tmp_path / "folder" / "file.safetensors"
    save_statistics(path, statistics, MADE_FROM)
    found = load_statistics(path, MADE_FROM, "cpu")
    assert torch.equal(found.means, statistics.means) and torch.equal(found.mean_lengths, statistics.mean_lengths)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "what was written on the way stays"


@pytest.mark.parametrize("name", MADE_FROM)
def test_a_file_made_from_something_else_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file.safetensors"
    save_statistics(path, some_statistics(), MADE_FROM)
    with pytest.raises(
        ValueError, match=rf"^{path} does not hold .*: its {name} is .*, and here it is other$"
    ) as error:
        load_statistics(path, MADE_FROM | {name: "other"}, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", b"\0" * 64])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not hold statistics of this model's queries: "):
        load_statistics(path, MADE_FROM, "cpu")


@pytest.mark.parametrize(
    ("means", "lengths", "problem"),
    [
        (torch.zeros(2, 4, dtype=torch.complex64), torch.zeros(2, 4), "means must be torch.complex64"),
        (torch.zeros(1, 2, 4, dtype=torch.complex64), torch.zeros(1, 2, 3), "mean_lengths must be torch.float32"),
        (torch.full((1, 1, 1), torch.nan + 0j), torch.ones(1, 1, 1), "must be finite"),
        (torch.full((1, 1, 1), 2 + 0j), torch.ones(1, 1, 1), "longer than the mean length"),
    ],
)
def test_statistics_that_cannot_be_are_refused(means: torch.Tensor, lengths: torch.Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        QueryStatistics(means, lengths).check_numbers()


def test_bounds_come_back_bit_by_bit_and_only_for_what_they_were_made_from(tmp_path: Path) -> None:
    path, bounds = tmp_path / "file.safetensors", (0.1 + 0.2, 2 / 3)
    save_bounds(path, bounds, MADE_FROM)
    assert load_bounds(path, MADE_FROM) == bounds
    with pytest.raises(ValueError, match=r"does not hold bounds of this model's thoughts: its model is abc, and here"):
        load_bounds(path, MADE_FROM | {"model": "other"})
    for wrong in ((0.9, 0.1), (float("nan"), 1.0), (0.0, float("inf"))):
        save_bounds(path, wrong, MADE_FROM)
        with pytest.raises(ValueError, match=r"does not hold .*: bounds must be two ascending numbers"):
            load_bounds(path, MADE_FROM)
    save_statistics(path, some_statistics(), MADE_FROM)
    with pytest.raises(ValueError, match=r"^[^\n]*does not hold bounds of this model's thoughts: [^\n]*$"):
        load_bounds(path, MADE_FROM)
