"""Named prefixes: a document compressed once, stored in slots of the radix tree, and shared by whoever names it."""
