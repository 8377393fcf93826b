"""What measures are called, and how their numbers are written."""

from __future__ import annotations

import math
from collections.abc import Mapping

from libreflux.probing.results import Coordinate, Measure

MEANINGS = {
    "loss": "Error on the measured pictures, by noise level sigma. Lower is better.",
    "slope": "Calibration: by what factor the model's answer would have to be scaled to fit best. "
    "1 is right; below 1 it exaggerates, as guided and distilled models do.",
    "prompt_gain": "By how much knowing the prompt lowers the loss.",
    "guidance_response": "How much the prompt changes the model's answer: what guidance has to work with.",
    "clipped": "Share of colour values too dark or too bright to be shown: burnt pictures.",
    "latents_std": "Spread of the latents; grows as pictures are over-driven.",
    "held_out_clipped": "Clipping of real pictures that only went through the VAE: as low as it gets.",
    "held_out_latents_std": "Spread of the latents of real pictures.",
    "judge_ceiling": "The judge's accuracy on real pictures: no model can be shown to be better.",
    "accuracy": "Share of pictures in which the judge finds what the prompt asked for.",
    "agreement": "How well pictures agree with their prompts, as a CLIP sees them: a cosine. Compares models only.",
    "held_out_agreement": "The agreement of real pictures with their captions.",
    "agreement_cut": "Share of texts that are longer than the CLIP reads: what is beyond does not count.",
    "letters": "Share of the letters right of what the prompt quotes, as a reader of text reads the picture.",
    "letters_extra": "Letters read beside what was asked for.",
    "held_out_letters": "What the reader reads of the texts in real pictures: no model can be shown to be better.",
    "distance": "Distance from the drawn pictures to real ones in the judge's features. Compares models only.",
    "best_guidance": "The guidance at which pictures are best.",
    "saturation_guidance": "The lowest guidance at which clipping is twice that of real pictures.",
    "step_gap": "How far pictures of few steps are from those of many, at the model's own guidance.",
    "straightness": "How bent the path from noise to picture is; 0 is straight.",
    "diversity": "How far apart pictures of one prompt are that differ in their seed.",
    "padding": "How much the answer depends on the text's padding, which says nothing.",
    "padding_batch": "How much the answer depends on what else is in the batch.",
    "negative": "What a negative prompt does: for a colour or subject, the judge's belief that it is still there.",
}
"""Name of a measure to one line for a reader who knows nothing."""


def place(at: Mapping[str, Coordinate]) -> str:
    """{"sigma": 0.5, "text": "caption"} as "sigma 0.5, caption"."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, int | float) else f"{key} {value}" if key in NAMED else str(value)
        for key, value in at.items()
    )


NAMED = ("sigma", "guidance")
"""Coordinates whose words need their name beside them: "guidance own"."""


def title(name: str, at: Mapping[str, Coordinate], family: str = "") -> tuple[str, Mapping[str, Coordinate]]:
    """A measure's name and place as shown: a distance is "FD-emoji" for a probe of "emoji", never FID."""
    if name != "distance":
        return name, at
    rest = {key: value for key, value in at.items() if key != "kind"}
    return f"{at.get('kind', 'distance')}-{family}" if family else str(at.get("kind", "distance")), rest


def figure(one: Measure) -> str:
    """The value with its interval, to as many digits as matter."""
    if not math.isfinite(one.value):
        return "none" if one.name == "saturation_guidance" else "not finite"
    return f"{number(one.value)} [{number(one.low)}, {number(one.high)}]"


def number(value: float) -> str:
    """Three decimals, or four digits of what is too small for them; a dash for what is not finite."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.4g}" if abs(value) < 1e-3 and value else f"{value:.3f}"
