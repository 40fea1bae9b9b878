"""An SGLang plugin that serves reasoning models with a bounded KV cache.

Installing the package is enough: SGLang finds it through its plugin entry point and gains ``--kv-policy``. Importing it
needs neither SGLang nor CUDA.
"""

from rkv_sglang.config import PolicyConfig

__all__ = ["PolicyConfig", "__version__"]
__version__ = "0.1.0"
