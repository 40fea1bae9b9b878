"""Counts who claims each page of the pool: it must be exactly one of the free list, the radix tree and one request."""

from typing import Any

import numpy as np

# How many wrong pages one violation lists.
_MAX_LISTED = 8


def census(allocator: Any, tree_slots: Any, private_pages: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return what is wrong, as (kind, detail) pairs; empty if every page has one owner.

    Args:
        allocator: SGLang's token-to-KV allocator; only read.
        tree_slots: All slots of the radix tree, int64, an array or a tensor on the CPU.
        private_pages: Page ids that each request holds past its protected prefix, the same.
    """
    tree_slots = np.asarray(tree_slots)
    private = {rid: np.asarray(pages) for rid, pages in private_pages.items()}
    wrong: list[tuple[str, dict[str, Any]]] = []
    page_size = allocator.page_size
    num_pages = allocator.size // page_size
    tree_pages = np.flatnonzero(np.bincount(tree_slots // page_size)) if tree_slots.size else tree_slots
    if tree_pages.size * page_size != tree_slots.size:
        wrong.append(("tree pages", {"slots": tree_slots.size, "pages": tree_pages.size}))
    free_pages = allocator.get_all_free_pages().cpu().long().numpy()
    claims = np.bincount(np.concatenate([free_pages, tree_pages, *private.values()]), minlength=num_pages + 1)
    # Page 0 is the dummy page: nobody's.
    expected = np.ones_like(claims)
    expected[0] = 0
    expected[num_pages + 1 :] = 0
    pages = np.flatnonzero(claims != expected).tolist()
    if pages:
        detail = {
            "num_lost": int((claims[1 : num_pages + 1] == 0).sum()),
            "num_shared": int((claims > 1).sum()),
            "pages": [[page, int(claims[page])] for page in pages[:_MAX_LISTED]],
            "free": free_pages.size,
            "tree": tree_pages.size,
            "private": {rid: held.size for rid, held in private.items()},
            "total": num_pages,
        }
        wrong.append(("ownership", detail))
    return wrong
