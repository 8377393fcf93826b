"""A local reader of text in pictures: rapidocr, an extra, whose wheel has its models. No network, no card."""

from __future__ import annotations

import hashlib
import importlib.util
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

import numpy as np

from libreflux.errors import OptionError, RunError
from libreflux.files import sha256_file

PACKAGES = ("rapidocr", "onnxruntime")
INSTALL = "pip install 'libreflux[ocr]'"
SETTINGS = {"Global.text_score": 0.5, "Det.limit_type": "min", "Det.limit_side_len": 736}
"""rapidocr's own: how sure it must be of a line, and the pixels to which the shorter side is enlarged at least."""
_KINDS = {"Det": "det", "Cls": "cls", "Rec": "rec"}


def require_reader() -> None:
    """Raises OptionError where the extra is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(f"needs {' and '.join(missing)}, which {_be(missing)} not installed", "ocr", hint=INSTALL)


def _be(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


class Reader:
    """Reads pictures, one at a time, on the CPU.

    Attributes:
        name: which version, with a digest of its models and settings: results of another are not compared.
    """

    def __init__(self) -> None:
        """Raises RunError if the models are not in rapidocr's folder, as its wheel has them."""
        models = _models()
        digests = [f"{kind}:{sha256_file(file)}" for kind, file in sorted(models.items())]
        told = hashlib.sha256("\n".join([str(SETTINGS), *digests]).encode()).hexdigest()[:16]
        self.name = f"rapidocr {version('rapidocr')}, {told}"
        self._models = models
        self._engine: Any = None

    def read(self, picture: np.ndarray) -> list[str]:
        """Lines of text in a picture [H, W, 3] uint8, RGB, from top to bottom."""
        if self._engine is None:
            self._engine = _engine(self._models)
        found = self._engine(np.ascontiguousarray(picture[:, :, ::-1]))  # it takes arrays as OpenCV has them: BGR
        return [] if found.txts is None else [str(line) for line in found.txts]


def _models() -> dict[str, Path]:
    """Files of the wheel by what they do; with a path given, rapidocr downloads nothing."""
    own = [Path(str(file.locate())) for file in files("rapidocr") or () if file.suffix == ".onnx"]
    found = {}
    for kind, part in _KINDS.items():
        kept = [file for file in own if part in file.name.lower() and file.is_file()]
        if len(kept) != 1:
            told = f"the rapidocr that is installed has {len(kept)} models for {part!r}, not one"
            raise RunError(told, where="rapidocr", hint="install its wheel anew, which has its models")
        found[kind] = kept[0]
    return found


def _engine(models: dict[str, Path]) -> Any:
    import torch
    from rapidocr import RapidOCR

    threads = torch.get_num_threads()
    return RapidOCR(
        params={
            "Global.log_level": "critical",  # of a picture without text it would print a warning
            **SETTINGS,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            **{f"{kind}.model_path": str(file) for kind, file in models.items()},
        }
    )
