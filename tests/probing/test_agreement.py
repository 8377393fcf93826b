"""A tiny random CLIP's agreement of pictures and texts, against transformers' own functions on PNGs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lettered import make_tiny_clip
from libreflux.errors import ModelError
from libreflux.probing.features import TwoTowers, agreement, features_digest, load_features
from tiny import CAPTIONS


@pytest.fixture(scope="module")
def clip(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it only."""
    return make_tiny_clip(tmp_path_factory.mktemp("towers") / "clip", tiny_model_dir / "tokenizer")


def changed(clip: Path, folder: Path) -> Path:
    """A copy that may be written into."""
    shutil.copytree(clip, folder)
    return folder


PIXELS = torch.rand(4, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2  # some beyond [-1, 1]


def test_agreement_is_the_cosine_of_transformers_own_features(clip: Path, tmp_path: Path) -> None:
    judge = load_features(clip)
    assert isinstance(judge, TwoTowers)
    long = "fox " * 200
    features, cut = judge.texts([*CAPTIONS[:3], long])
    found = agreement(judge(judge.prepare(PIXELS)).features, features)
    assert cut.tolist() == [False, False, False, True]

    model, words = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    for number, text in enumerate([*CAPTIONS[:3], long]):
        bytes_ = ((PIXELS[number].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(bytes_).save(tmp_path / "picture.png")
        with torch.no_grad(), Image.open(tmp_path / "picture.png") as picture:
            a = model.get_image_features(**processor(images=picture, return_tensors="pt")).pooler_output[0]
            tokens = words(text, truncation=True, max_length=77, return_tensors="pt")
            b = model.get_text_features(**tokens).pooler_output[0]
        assert found[number] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)
    assert np.ptp(found) > 1e-3


def test_a_siglip_agrees_too(clip: Path, tmp_path: Path) -> None:
    folder = changed(clip, tmp_path / "siglip")
    words = CLIPTokenizer.from_pretrained(clip)
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**width, "vocab_size": len(words), "max_position_embeddings": 16}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**width, "image_size": 32, "patch_size": 8}))
    model.eval().save_pretrained(folder)
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    judge = load_features(folder)
    assert isinstance(judge, TwoTowers)
    features, cut = judge.texts(CAPTIONS[:3])
    given = words(CAPTIONS[:3], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(features, model.get_text_features(**given).pooler_output)
    assert judge(judge.prepare(PIXELS)).features.shape == (4, 16)
    assert not cut.any()


def test_what_decides_the_features_decides_their_digest(clip: Path, tmp_path: Path) -> None:
    before, folder = features_digest(clip), changed(clip, tmp_path / "clip")
    assert features_digest(folder) == before
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert features_digest(folder) != before


def test_a_clip_without_a_tokenizer_is_told_and_gives_features_alone(
    clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(clip, tmp_path / "clip")
    (folder / "tokenizer.json").unlink()
    judge = load_features(folder)
    assert not isinstance(judge, TwoTowers)
    assert judge(judge.prepare(PIXELS)).features.shape == (4, 8)
    assert "the folder has no tokenizer: no agreement of pictures and prompts is measured" in caplog.text


def test_towers_that_do_not_fit_are_refused(clip: Path, tmp_path: Path) -> None:
    folder = changed(clip, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: each for name, each in weights.items() if "text_model.encoder" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"missing keys: text_model\.encoder.*both towers"):
        load_features(folder)
    shutil.copy(clip / "model.safetensors", folder)
    processor = json.loads((clip / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"do_center_crop": False}))
    with pytest.raises(ModelError, match="its processor gives 36 x 36 pixels, its model takes 32 x 32"):
        load_features(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["a.B", None]}}))
    with pytest.raises(ModelError, match="names Python code of its own"):
        load_features(folder)
