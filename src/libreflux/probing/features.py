"""Features of a local vision model in the judge's place: distances and diversity of real pictures, no accuracy.

A whole CLIP or SigLIP says too how well a picture agrees with its prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from libreflux.errors import ModelError
from libreflux.files import sha256_file
from libreflux.model.latents import to_bytes
from libreflux.model.load import quiet
from libreflux.model.parts import check_part, json_object, visible
from libreflux.places import did_you_mean
from libreflux.printing import get_logger
from libreflux.probing.judges import Judge, Verdict

logger = get_logger(__name__)

MOST_SIDE = 4096
"""Pixels per side that a vision model may ask for."""
WHOLE: dict[str, str | bool] = {"clip": True, "siglip": "max_length"}
"""Models of both towers that give agreement, by config.json's `model_type`: how their texts are padded."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
FORMULA = 1
"""Raised when the same whole CLIP comes to give other features, of pictures or of texts."""


class Features(Judge):
    """CLIP, DINO or another vision model of transformers as a judge that knows no names.

    Args:
        model: gives `get_image_features`, a pooled output, or hidden states whose first token stands for the picture.
        mean, std: [3], of its inputs.
        side: of its inputs, pixels.
    """

    def __init__(self, model: nn.Module, mean: list[float], std: list[float], side: int) -> None:
        nn.Module.__init__(self)
        self.questions, self.side = {}, side
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor) -> Verdict:
        """Looks at pixels [B, 3, side, side] in [-1, 1]; the verdict has features [B, D] alone."""
        inputs = (pixels / 2 + 0.5 - self.get_buffer("mean")) / self.get_buffer("std")
        if hasattr(self.model, "get_image_features"):
            found = _pooled(self.model.get_image_features(pixel_values=inputs))  # type: ignore[operator]
        else:
            found = _pooled(self.model(pixel_values=inputs))
        return Verdict({}, found.float())


class TwoTowers(Features):
    """A whole CLIP or SigLIP: features of pictures, and of texts in the same space.

    Args:
        model: gives `get_image_features` and `get_text_features`.
        processor: the folder's own, of pictures: it resizes, crops and scales them.
        tokenizer: the folder's own.
        padding: of texts, as the tokenizer takes it.
        side: of the inputs, pixels.
        tokens: that the text's tower reads at most.
    """

    def __init__(
        self, model: nn.Module, processor: Any, tokenizer: Any, *, padding: str | bool, side: int, tokens: int
    ) -> None:
        super().__init__(model, list(processor.image_mean), list(processor.image_std), side)
        self.processor, self.tokenizer = processor, tokenizer
        self.padding, self.tokens = padding, tokens
        self._known: dict[tuple[str, ...], tuple[Tensor, np.ndarray]] = {}

    def prepare(self, pixels: Tensor) -> Tensor:
        """Decoded pictures [B, 3, H, W] in [-1, 1], rounded to bytes as a PNG has them, through the processor."""
        pictures = list(to_bytes(pixels).numpy())
        made = self.processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
        inputs: Tensor = made["pixel_values"]
        return inputs

    def forward(self, pixels: Tensor) -> Verdict:
        """Looks at what `prepare` gives; the verdict has features [B, D] alone, not normalised."""
        found = _pooled(self.model.get_image_features(pixel_values=pixels))  # type: ignore[operator]
        return Verdict({}, found.float())

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, np.ndarray]:
        """Features of N texts, computed once.

        Returns:
            [N, D] fp32, not normalised, and [N] bool: which texts are longer than `tokens` and were cut there.
        """
        key = tuple(texts)
        if key not in self._known:
            self._known[key] = self._texts(key)
        return self._known[key]

    @torch.no_grad()
    def _texts(self, texts: Sequence[str], batch: int = 64) -> tuple[Tensor, np.ndarray]:
        with quiet():  # transformers would tell of the first long text alone
            lengths = [len(ids) for ids in self.tokenizer(list(texts))["input_ids"]]
            parts = []
            for start in range(0, len(texts), batch):
                given = self.tokenizer(
                    list(texts[start : start + batch]),
                    padding=self.padding,
                    truncation=True,
                    max_length=self.tokens,
                    return_tensors="pt",
                )
                parts.append(_pooled(self.model.get_text_features(**given)).float())  # type: ignore[operator]
        return torch.cat(parts), np.array([length > self.tokens for length in lengths])


def agreement(pictures: Tensor, texts: Tensor) -> np.ndarray:
    """[N] fp64 in [-1, 1]: cosine of each picture's features [N, D] and its text's [N, D].

    2.5 · max(cosine, 0) is CLIPScore (Hessel et al. 2021, arXiv 2104.08718, eq. 1), without its "A photo depicts".
    """
    found: np.ndarray = torch.nn.functional.cosine_similarity(pictures.double(), texts.double()).numpy()
    return found


def load_features(folder: Path) -> Features:
    """A vision model from a local transformers folder: safetensors, config.json, preprocessor_config.json.

    A CLIP or SigLIP with both towers and its tokenizer becomes `TwoTowers`.

    Raises:
        ModelError: no such folder, or not such a model.
    """
    if not folder.is_dir():
        raise ModelError(
            "no such folder", where=folder, hint=did_you_mean(folder, "name a local folder of CLIP, DINO or the like")
        )
    check_part(folder)
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in json_object(folder / name):
            what = "names Python code of its own (auto_map), which is not run"
            raise ModelError(what, where=folder / name, hint="use a model that transformers has itself")
    try:
        with quiet():
            made = _two_towers(folder) if is_whole(folder) else _image_tower(folder)
    except ModelError:
        raise
    except Exception as error:  # transformers' own, safetensors', the disk's: no common ancestor
        hint = "name a folder with config.json, preprocessor_config.json and safetensors"
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"no vision model ({told[0][:200]})", where=folder, hint=hint) from error
    if not isinstance(made, TwoTowers) and hasattr(made.model, "get_text_features"):
        kind = str(json_object(folder / "config.json").get("model_type"))
        lacks = (
            "the folder has no tokenizer" if kind in WHOLE else f"a model of type {kind!r} is read for pictures alone"
        )
        logger.warning("%s: %s: no agreement of pictures and prompts is measured", folder, lacks)
    return made.eval().requires_grad_(False)


def is_whole(folder: Path) -> bool:
    """Whether a folder has a CLIP or SigLIP with both towers, by its config.json, and a tokenizer."""
    kind = json_object(folder / "config.json").get("model_type")
    return kind in WHOLE and any((folder / name).is_file() for name in VOCABULARIES)


_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def _image_tower(folder: Path) -> Features:
    """With a picture tried."""
    # Not `from transformers import AutoImageProcessor`: that name asks for torchvision, in 5.12 still.
    processor = AutoImageProcessor.from_pretrained(folder, **_LOCAL)
    model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **_LOCAL)
    size = getattr(processor, "crop_size", None) or processor.size
    side = size["height"] if "height" in size else size["shortest_edge"]
    if not 1 <= int(side) <= MOST_SIDE:
        raise ValueError(f"inputs of {side} pixels")
    made = Features(model.eval(), list(processor.image_mean), list(processor.image_std), int(side))
    with torch.no_grad():
        made(torch.zeros(1, 3, made.side, made.side))  # a text model, or one whose pictures come in another form, fails
    return made


def _two_towers(folder: Path) -> TwoTowers:
    """With a picture and a text tried."""
    # Pillow's: torchvision, where it is installed, would resize a little differently.
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **_LOCAL)
    tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    model, told = AutoModel.from_pretrained(
        folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **_LOCAL
    )
    for kind in ("missing_keys", "mismatched_keys"):  # transformers would make them up
        if names := [str(name) for name in told.get(kind) or ()]:
            raise ModelError(f"{kind.replace('_', ' ')}: {min(names)}", where=folder, hint=_BOTH)
    config = model.config
    if len(tokenizer) > config.text_config.vocab_size:
        raise ModelError(
            f"its tokenizer knows {len(tokenizer)} tokens, its text tower {config.text_config.vocab_size}",
            where=folder,
            hint="use the files as the model's makers published them",
        )
    side = int(config.vision_config.image_size)
    if not 1 <= side <= MOST_SIDE:
        raise ValueError(f"inputs of {side} pixels")
    tokens = int(config.text_config.max_position_embeddings)
    padding = WHOLE[config.model_type]
    made = TwoTowers(model.eval(), processor, tokenizer, padding=padding, side=side, tokens=tokens)
    inputs = made.prepare(torch.zeros(1, 3, side, side))
    if inputs.shape[-2:] != (side, side):
        what = f"its processor gives {inputs.shape[-1]} x {inputs.shape[-2]} pixels, its model takes {side} x {side}"
        raise ModelError(what, where=folder, hint="use the files as the model's makers published them")
    with torch.no_grad():
        agreement(made(inputs).features, made.texts(["a"])[0])
    return made


_BOTH = "give the whole model: both towers, as config.json says"


def _pooled(found: Any) -> Tensor:
    """[B, D] of whatever a model of transformers gives for pictures or texts."""
    if not isinstance(found, Tensor):
        pooled = getattr(found, "pooler_output", None)
        found = found.last_hidden_state[:, 0] if pooled is None else pooled
    flat: Tensor = found.flatten(1)
    return flat


def features_digest(folder: Path) -> str:
    """SHA-256 over the folder's JSON and safetensors files, a whole CLIP's vocabulary too: which features they are."""
    total = hashlib.sha256()
    files = [*visible(folder, "*.json"), *visible(folder, "*.safetensors")]
    if is_whole(folder):
        files += [*visible(folder, "*.txt"), *visible(folder, "*.model")]
        total.update(f"agreement {FORMULA}\n".encode())
    for file in sorted(files):
        total.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return total.hexdigest()
