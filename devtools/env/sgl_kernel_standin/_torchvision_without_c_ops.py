"""Let ``import torchvision`` work beside a CPU build of torch.

PyPI's torchvision wheel carries a C extension built for CUDA. Beside a CPU torch it does not load, and
``torchvision._meta_registrations`` then fails on two operators that nobody declared. This declares them, only
when the extension really is missing, just before that module runs. Loaded by the .pth file beside it.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

_library = None


class _DeclareOpsFirst(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "torchvision._meta_registrations":
            return None
        import torch
        from torchvision.extension import _has_ops

        global _library
        if _library is None and not _has_ops():
            _library = torch.library.Library("torchvision", "DEF")
            _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return PathFinder.find_spec(fullname, path)


sys.meta_path.insert(0, _DeclareOpsFirst())
