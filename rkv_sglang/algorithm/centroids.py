"""Real keys that stand for many: the ones nearest to the centroids of a k-means."""

import torch
from torch import Tensor

# By which part of itself a distance may be larger and count as the same.
SAME_DISTANCE = 1e-3


def nearest_to_centroids(keys: Tensor, held: Tensor, aims: Tensor, *, segment: int, most: int, rounds: int) -> Tensor:
    """Choose keys of each segment: all, if no more are held than wanted, else the one nearest to each centroid.

    The k-means of a segment starts from the key farthest from the mean, and then again and again the one farthest from
    those taken. In each round every key joins its nearest centroid, and a centroid becomes the mean of those that
    joined it, or where none did the key it started from. At last each centroid, in the order of the start, takes the
    nearest key that is not taken, the oldest of those that are as near up to ``SAME_DISTANCE``: two keys that joined
    one centroid are equally far from it. Elsewhere the first key or centroid of equal distances counts. Nothing waits
    for a GPU.

    Args:
        keys: ``[num_heads, num_tokens, head_dim]``, floating; the segments one behind the other, then whatever.
        held: Keys of each segment, ``[num_segments]``, int64; each at most ``segment``.
        aims: How many of them are wanted, the same shape; at most ``most`` where that is fewer than all.
        segment, most: See above; known on the CPU, ``most`` at least 1.
        rounds: Rounds of the k-means.

    Returns:
        Whether a key is chosen, ``[num_heads, num_tokens]``, bool; none behind the segments is.
    """
    num_heads, num_tokens, _ = keys.shape
    ends, shrinks = held.cumsum(0), held > aims
    firsts = ends - held
    tokens = torch.arange(num_tokens, device=keys.device)
    # Behind the last segment is one more, of which nothing is chosen.
    segments = torch.searchsorted(ends, tokens, right=True)
    is_whole = torch.cat([~shrinks, shrinks.new_zeros(1)])[segments].expand(num_heads, num_tokens)
    if keys.device.type != "cpu":
        looked_at = torch.arange(len(held), device=keys.device)
    # There it costs nothing to see where there is something to choose.
    elif len(looked_at := shrinks.nonzero()[:, 0]) == 0:
        return is_whole
    places = torch.arange(segment, device=keys.device)
    columns = (firsts[looked_at, None] + places).clamp(max=num_tokens - 1)
    # [num_heads * segments looked at, segment, head_dim]
    points = keys[:, columns].float().flatten(0, 1)
    is_there = (places < held[looked_at, None]).repeat(num_heads, 1)
    wanted = torch.where(shrinks, aims, 0)[looked_at].repeat(num_heads)
    best = _chosen_points(points, is_there, wanted, most, rounds).view(num_heads, len(looked_at), segment)
    own = segments.clamp(max=len(held) - 1)
    numbers = torch.zeros_like(held).scatter(0, looked_at, torch.arange(len(looked_at), device=keys.device))[own]
    of_shrinking = best[:, numbers, (tokens - firsts[own]).clamp(0, segment - 1)]
    return is_whole | (of_shrinking & shrinks[own] & (tokens < ends[-1]))


def _chosen_points(points: Tensor, is_there: Tensor, wanted: Tensor, most: int, rounds: int) -> Tensor:
    """Return which points of each set are chosen, ``[num_sets, num_points]``, bool.

    Args:
        points: ``[num_sets, num_points, head_dim]``, fp32.
        is_there: Whether there is one, ``[num_sets, num_points]``, bool.
        wanted: How many, ``[num_sets]``, int64; at most ``most`` and no more than there are.
    """
    sets, slots = (torch.arange(number, device=points.device) for number in (len(points), most))
    is_wanted = slots < wanted[:, None]
    count = is_there.sum(dim=1).clamp(min=1)[:, None]
    apart = _apart(points, (points * is_there[:, :, None]).sum(dim=1) / count)
    taken, starts = torch.zeros_like(is_there), []
    for step in range(most):
        starts.append(apart.masked_fill(taken | ~is_there, -1.0).argmax(dim=1))
        taken[sets, starts[-1]] |= is_wanted[:, step]
        from_this = _apart(points, points[sets, starts[-1]])
        apart = from_this if step == 0 else torch.minimum(apart, from_this)
    centroids = first = points[sets[:, None], torch.stack(starts, dim=1)]
    for _ in range(rounds):
        nearest = _distances(points, centroids).masked_fill(~is_wanted[:, None], torch.inf).argmin(dim=2)
        joined = ((nearest[:, :, None] == slots) & is_there[:, :, None]).float().transpose(1, 2)
        counts = joined.sum(dim=2, keepdim=True)
        centroids = torch.where(counts > 0, joined @ points / counts.clamp(min=1), first)
    distances, taken = _distances(points, centroids), torch.zeros_like(is_there)
    for step in range(most):
        own = distances[:, :, step].masked_fill(taken | ~is_there, torch.inf)
        is_nearest = own <= own.amin(dim=1, keepdim=True) * (1 + SAME_DISTANCE)
        taken[sets, is_nearest.int().argmax(dim=1)] |= is_wanted[:, step]
    return taken


def _apart(points: Tensor, others: Tensor) -> Tensor:
    """Return the squared distance of each set's points to one other, ``[num_sets, num_points]``."""
    return (points - others[:, None]).square().sum(dim=2)


def _distances(points: Tensor, centroids: Tensor) -> Tensor:
    """Return distances, ``[num_sets, num_points, num_centroids]``."""
    return torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist")
