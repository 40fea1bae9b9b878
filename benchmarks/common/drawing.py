"""Matplotlib as every plot here uses it: without a screen, and without words on the standard error."""

import logging
from types import ModuleType


def load_pyplot() -> ModuleType:
    """Return `matplotlib.pyplot` on the Agg backend; imported late, since most runs draw nothing.

    On a machine where matplotlib never ran, it may log that it builds its font cache, if that takes over five seconds.
    That is not a line about anybody's results, so it is not shown.
    """
    import matplotlib

    matplotlib.use("Agg")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib import pyplot

    return pyplot
