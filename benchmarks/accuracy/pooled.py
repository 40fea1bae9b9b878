"""One variant of a policy over several budgets against another: of each problem the mean over the budgets."""

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import mean

from benchmarks.accuracy.kept import Comparisons
from benchmarks.accuracy.rows import CONTROL, ByProblem, columns, held_share, kept_shares, paired, pass_at_1, unlikeness
from benchmarks.common.schema import Row
from benchmarks.common.settings import Setting, without_sizes
from benchmarks.common.statistics import mean_interval

# The settings of one variant by budget and buffer.
BySize = dict[tuple[int, int], Setting]
FEWEST_SIZES = 2


def pooled_rows(
    dataset: str,
    results: Mapping[Setting, ByProblem],
    kept: Mapping[Setting, Comparisons],
    named_control: str = "",
) -> list[Row]:
    """Return one row for each variant that has two budgets or more, of those that its control has, too.

    A problem counts once, by its mean over those budgets, for what it gives at one tells of what it gives at another.

    Args:
        results: Of every setting, the same problems in the same order.
        kept: Of every setting, how its answers compare with the full cache's.
        named_control: The variant to hold all others against, or a setting of it; empty: the nearest one of
            ``random_attention`` (``unlikeness``).
    """
    variants: dict[str, BySize] = {}
    for setting in results:
        if setting.config is not None:
            variants.setdefault(without_sizes(setting.name), {})[setting.budget, setting.buffer] = setting
    rows = []
    for name, by_size in variants.items():
        control, sizes = _control_of(by_size, variants, named_control)
        if len(sizes) < FEWEST_SIZES:
            continue
        ours = [by_size[size] for size in sizes]
        theirs = [variants[control][size] for size in sizes] if control else []
        right, right_theirs = (_means([pass_at_1(results[one]) for one in several]) for several in (ours, theirs))
        same, same_theirs = (_means([kept_shares(kept[one]) for one in several]) for several in (ours, theirs))
        rows.append(
            {
                "dataset": dataset,
                "variant": name,
                "sizes": " ".join(f"{budget}:{buffer}" for budget, buffer in sizes),
                "problems": len(right),
                "held": round(mean(held_share(chain(*results[setting].values())) for setting in ours), 4),
                **columns("pass_at_1", mean_interval(right), 4),
                **columns("kept", mean_interval(same), 4),
                "control": control,
                **columns("pass_less_control", paired(right, right_theirs), 4),
                **columns("kept_less_control", paired(same, same_theirs), 4),
            }
        )
    return rows


def _control_of(by_size: BySize, variants: Mapping[str, BySize], named: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a variant's control and the budgets and buffers of both; an empty name and its own if it has none."""
    if named:
        wanted = [named if named in variants else without_sizes(named)]
    else:
        draws = {name: _any(sizes) for name, sizes in variants.items() if _any(sizes).policy == CONTROL}
        wanted = sorted(draws, key=lambda name: unlikeness(_any(by_size), draws[name]))
    for name in wanted:
        sizes = sorted(by_size.keys() & variants.get(name, {}).keys())
        if len(sizes) >= FEWEST_SIZES:
            return name, sizes
    return "", sorted(by_size)


def _any(by_size: BySize) -> Setting:
    return next(iter(by_size.values()))


def _means(of_each: Sequence[Sequence[float]]) -> list[float]:
    return [mean(of_one) for of_one in zip(*of_each, strict=True)]
