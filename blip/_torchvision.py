"""Makes torchvision importable beside a CPU build of torch.

The package index carries one Linux build of torchvision, linked against CUDA. Beside a CPU build of torch its C++ library does
not load, and its import then fails because it registers shape functions for two operators that nobody defined; timm,
torchmetrics and lightning import it. Defining the two schemas is enough: nothing here calls them, and torchvision's own `ops`
still say clearly that the library is missing. Where the library loads, nothing is defined.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util

import torch

_stand_in: torch.library.Library | None = None


def make_importable() -> None:
    """Loads torchvision's operators or, where that fails, declares the two that its import needs. May be called again."""
    global _stand_in
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or hasattr(torch.ops.torchvision, "nms"):
        return
    compiled = importlib.machinery.PathFinder.find_spec("_C", list(spec.submodule_search_locations))
    if compiled is not None and compiled.origin:
        try:
            torch.ops.load_library(compiled.origin)
            return
        except OSError:
            pass  # linked against CUDA libraries that this torch does not bring
    _stand_in = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _stand_in.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


make_importable()
