"""Counts who claims each page of the pool: it must be exactly one of the free list, the radix tree and one request."""

from typing import Any

import torch

# How many wrong pages one violation lists.
_MAX_LISTED = 8


def census(
    allocator: Any, tree_slots: torch.Tensor, private_pages: dict[str, torch.Tensor]
) -> list[tuple[str, dict[str, Any]]]:
    """Return what is wrong, as (kind, detail) pairs; empty if every page has one owner.

    Args:
        allocator: SGLang's token-to-KV allocator; only read.
        tree_slots: All slots of the radix tree, int64, on the CPU.
        private_pages: Page ids that each request holds past its protected prefix, int64, on the CPU.
    """
    wrong: list[tuple[str, dict[str, Any]]] = []
    page_size = allocator.page_size
    num_pages = allocator.size // page_size
    tree_pages = torch.bincount(tree_slots // page_size).nonzero().flatten()
    if tree_pages.numel() * page_size != tree_slots.numel():
        wrong.append(("tree pages", {"slots": tree_slots.numel(), "pages": tree_pages.numel()}))
    free_pages = allocator.get_all_free_pages().cpu().long()
    claims = torch.bincount(torch.cat([free_pages, tree_pages, *private_pages.values()]), minlength=num_pages + 1)
    # Page 0 is the dummy page: nobody's.
    expected = torch.ones_like(claims)
    expected[0] = 0
    expected[num_pages + 1 :] = 0
    pages = (claims != expected).nonzero().flatten().tolist()
    if pages:
        detail = {
            "num_lost": int((claims[1 : num_pages + 1] == 0).sum()),
            "num_shared": int((claims > 1).sum()),
            "pages": [[page, int(claims[page])] for page in pages[:_MAX_LISTED]],
            "free": free_pages.numel(),
            "tree": tree_pages.numel(),
            "private": {rid: held.numel() for rid, held in private_pages.items()},
            "total": num_pages,
        }
        wrong.append(("ownership", detail))
    return wrong
