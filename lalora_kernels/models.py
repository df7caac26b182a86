"""Classifiers by name: the embedded default, timm, transformers, a local folder, a weights file."""

import importlib.util
from pathlib import Path

import torch

_torchvision_schemas: list[torch.library.Library] = []  # a Library's definitions live as long as it does


def torchvision_beside_cpu_torch() -> bool:
    """Make ``import torchvision`` work beside a CPU build of torch; True where schemas stand in for compiled operators.

    PyPI's torchvision is built for CUDA torch. Beside a CPU one its compiled operators cannot be loaded and its import
    dies with "operator torchvision::nms does not exist", taking timm and parts of transformers with it. Declaring the two
    schemas that the import asks for is enough; the operators themselves stay unavailable (classifiers do not call
    them). Does nothing where torch has CUDA, torchvision is missing, or its operators load. Call it before importing
    torchvision, timm or transformers; a second call does nothing. Never imports torchvision.
    """
    if _torchvision_schemas:
        return True
    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for compiled in sorted([*Path(spec.origin).parent.glob("_C*.so"), *Path(spec.origin).parent.glob("_C*.pyd")]):
        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            continue
        return False  # a torchvision built for this torch: its own operators are there
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_schemas.append(library)
    return True
