"""README.md of a model that leaves us: what the hub reads in its head, and how to draw with it."""

from __future__ import annotations

import json

from libreflux.model.facts import Facts
from libreflux.printing import printable
from libreflux.recipe.yaml_text import scalar

_PADDING = {
    "drop": "no padding: neither T5 nor the transformer saw any",
    "trim": "padded for T5, not for the transformer",
    "bias": "padded, with 1 added to the attention logits of all that is not padding",
    "keep": "padded, as FLUX.1 was released",
}


def model_card(facts: Facts, name: str, draw: str | None) -> str:
    """The text of README.md.

    Args:
        facts: the model's.
        name: what the user called it.
        draw: a command that draws with it; None where only libreflux does.
    """
    base = facts.lineage.get("base")
    licence = scalar(facts.licence)
    head = [f"license: {licence}", "pipeline_tag: text-to-image", "tags: [flux, flow-matching, libreflux]"]
    if isinstance(base, str) and "/" in base and not base.startswith((".", "/")):
        head.append(f"base_model: {scalar(base.partition('@')[0])}")
    rows = {
        "steps": facts.steps,
        "guidance scale": f"{facts.guidance:g}{' (embedded)' if facts.guidance_embeds else ''}",
        "shift of the sigmas": "by size, as FLUX.1-dev" if facts.shift is None else f"{facts.shift:g}",
        "text": f"up to {facts.max_tokens} T5 tokens; {_PADDING[facts.text_padding]} (`{facts.text_padding}`)",
        "licence": printable(facts.licence),
    }
    lines = ["---", *head, "---", "", f"# {name}", "", "| used with | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    commands = ['libreflux generate "a red apple on blue" --model .', *([draw] if draw else [])]
    lines += ["", "```sh", *commands, "```", ""]
    if facts.lineage:
        lines += ["How it was made:", "", "```json", json.dumps(facts.lineage, indent=2, ensure_ascii=False), "```", ""]
    return "\n".join(lines)
