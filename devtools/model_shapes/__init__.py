"""Shapes of the models that people serve: what their public ``config.json`` says of attention, and little else.

They stand for the model where a launch is judged without its files (``rkv-sglang doctor --model-config``).
"""

from devtools.model_shapes.builders import Shape
from devtools.model_shapes.compressed import COMPRESSED
from devtools.model_shapes.full import FULL
from devtools.model_shapes.windows import WINDOWS

SHAPES: dict[str, Shape] = {**FULL, **WINDOWS, **COMPRESSED}
