"""The groups of options in the help of verbs that have many."""

from __future__ import annotations

PANELS: dict[str, dict[str, str]] = {
    "generate": {
        "What to draw": "negative prompt_2 negative_2 max_tokens seed count width height remake",
        "Model and adapters": "model adapters base comfyui",
        "Sampling": "steps sigmas guidance guidance_start guidance_stop guidance_rescale no_cfg_until "
        "embedded_guidance",
        "Memory and speed": "device quantize offload tile batch_cfg",
        "Output": "out no_metadata",
    },
    "grid": {
        "What to draw": "negative seeds width height",
        "Model and adapters": "model adapters base comfyui",
        "Sampling": "guidance steps",
        "Memory and speed": "device quantize offload",
        "Output": "out",
    },
    "prepare": {
        "Pictures": "resolution crop crops_per_picture background latents",
        "Captions": "text_padding text_cache text_precision",
        "Model": "model",
        "Memory and speed": "device shard",
        "Output": "out",
    },
    "probe": {
        "Models": "adapters against reference",
        "What is measured": "data quick pictures prompts guidance steps resolution seed",
        "Judges": "seen judge features",
        "Memory and speed": "device dtype batch",
        "Output": "out json whole",
    },
}
"""Verb to the groups of its help, in their order, and each to its parameters, in theirs."""


def panel_of(verb: str | None, parameter: str | None) -> tuple[int, int, str] | None:
    """(group, place in it, the group's title) of a parameter; None where it has none."""
    for index, (title, names) in enumerate(PANELS.get(verb or "", {}).items()):
        if parameter in (places := names.split()):
            return index, places.index(str(parameter)), title
    return None
