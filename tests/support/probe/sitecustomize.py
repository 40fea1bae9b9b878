"""Python reads it at the start of every process of the tests.

An import of SGLang makes a million objects that stay. Looking through them again and again takes a sixth of its time.
"""

import gc

gc.set_threshold(20_000)
