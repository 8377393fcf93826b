"""The verbs as typer sees them: empty arguments are refused, and other programs' words are understood, not obeyed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from libreflux.errors import LibrefluxError, OptionError, OptionHint, RecipeError
from libreflux.printing import WITH_OPTIONS
from libreflux.workflows.keywords import TEXTS

PATH_TYPES = ("path", "file", "directory")
"""What the older typers call parameters of paths, which are texts still when they are parsed."""
MEANT = {
    "generate": "sample draw infer inference txt2img text2image image render run remake",
    "grid": "sheet xyz compare plot",
    "prepare": "cache encode preprocess precompute",
    "caption": "captions describe tag label interrogate",
    "train": "finetune fine-tune fit resume",
    "train RECIPE --dry-run": "dryrun dry-run dry_run plan estimate",
    "merge": "fuse bake apply",
    "average": "ema lerp sweep",
    "probe": "evaluate eval measure benchmark bench test",
    "export": "convert save quantize quantise",
    "inspect attention": "attention attn attention-map heatmap look",
    "demo-data": "data dataset",
    "recipe": "keys config options settings",
    "models": "list ls",
}
_VERBS = {word: verb for verb, words in MEANT.items() for word in words.split()}


PANELS: dict[str, dict[str, str]] = {
    "generate": {
        "What to draw": "negative prompt_2 negative_2 max_tokens seed count width height prompts_from remake",
        "Model and adapters": "model adapters base comfyui",
        "Sampling": "steps sigmas guidance guidance_start guidance_stop guidance_rescale no_cfg_until "
        "embedded_guidance",
        "How guidance is done": "nag nag_tau nag_alpha guidance_rule apg_eta apg_radius apg_momentum zero_init "
        "first_steps_from first_steps_guidance",
        "Memory and speed": "device quantize offload offload_blocks compile batch tile batch_cfg",
        "Output": "out no_metadata",
    },
    "grid": {
        "What to draw": "negative seeds width height",
        "Model and adapters": "model adapters base comfyui",
        "Sampling": "guidance steps",
        "How guidance is done": "nag nag_tau nag_alpha guidance_rule apg_eta apg_radius apg_momentum zero_init "
        "first_steps_from first_steps_guidance",
        "Memory and speed": "device quantize offload offload_blocks compile",
        "Output": "out",
    },
    "prepare": {
        "Pictures": "resolution crop crops_per_picture background latents",
        "Captions": "text_padding text_cache text_precision",
        "Model": "model",
        "Memory and speed": "device shard",
        "Output": "out",
    },
    "average": {
        "One average": "width step lerp",
        "Many compared, with --sweep": "sweep lerps widths by data pictures sigmas trained_on seed",
        "Drawn by all, with --sweep": "prompts guidance seeds steps",
        "Model and memory, with --sweep": "model resolution batch device",
        "Output": "out report",
    },
    "caption": {
        "Who is asked": "model endpoint",
        "What is asked": "captions max_tokens temperature tries seed side",
        "Captions that are there": "existing",
        "Memory and speed": "device dtype quantize batch timeout shard",
        "Output": "page",
    },
    "probe": {
        "Models": "adapters against reference",
        "What is measured": "data trained_on quick pictures prompts guidance steps resolution seed",
        "Judges": "seen judge features ocr",
        "Few steps kept": "few_steps broken keep",
        "Memory and speed": "device dtype batch",
        "Output": "out csv json whole",
    },
    "attention": {
        "What to draw": "negative max_tokens seed width height",
        "Model and adapters": "adapters base comfyui",
        "What is looked at": "text_padding tokens no_causal",
        "Sampling": "guidance steps",
        "Memory and speed": "device quantize offload offload_blocks",
        "Output": "out json",
    },
    "layers": {
        "Models": "adapters against base comfyui",
        "What is measured": "data pictures sigmas resolution seed",
        "An adapter's targets": "budget measure",
        "Memory and speed": "dtype quantize device",
        "Output": "out json",
    },
}
"""Verb to the groups of its help, in their order, and each to its parameters, in theirs."""


def panel_of(verb: str | None, parameter: str | None) -> tuple[int, int, str] | None:
    """(group, place in it, the group's title) of a parameter; None where it has none."""
    for index, (title, names) in enumerate(PANELS.get(verb or "", {}).items()):
        if parameter in (places := names.split()):
            return index, places.index(str(parameter)), title
    return None


@contextmanager
def _spelled_warnings(names: Mapping[str, str]) -> Iterator[None]:
    """In the block, messages that were logged `WITH_OPTIONS` name them as they are typed."""

    def spell(record: logging.LogRecord) -> bool:
        if WITH_OPTIONS.items() <= vars(record).items():
            record.msg = OptionHint(record.msg).spelled(names)
        return True

    shown = [handler for handler in (*logging.root.handlers, logging.lastResort) if handler is not None]
    for handler in shown:
        handler.addFilter(spell)
    try:
        yield
    finally:
        for handler in shown:
            handler.removeFilter(spell)


class Verbs(TyperGroup):
    """The group of all verbs, or of some of them, which knows what other programs call them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Raises a usage error that names the verb which is meant."""
        outermost = ctx.parent is None
        verb = _VERBS.get(args[0].lower()) if outermost and args and args[0] not in self.commands else None
        if verb is not None:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {verb!r}?")
        return super().resolve_command(ctx, args)


def every_verb(group: Any) -> dict[str, Any]:
    """The commands of a group, those of the groups in it by both names: "inspect attention"."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {one}": each for one, each in inner.items()}
    return found


class Verb(TyperCommand):
    """Of typer's commands, one that takes "" for a text alone: as a path it would be the folder that one stands in.

    Its help shows options in the groups of `panels`.
    """

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        places = {param: panel_of(name, param.name) for param in self.params}
        for param, place in places.items():
            if place is not None:
                param.rich_help_panel = place[2]  # type: ignore[attr-defined]
        self.params = sorted(self.params, key=lambda param: (places[param] or (-1, 0, ""))[:2])

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, in the last of the groups."""
        option = super().get_help_option(ctx)
        if option is not None and self.name in PANELS:
            option.rich_help_panel = list(PANELS[self.name])[-1]
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for where, name, value in self._given(args):
            if not value and name not in TEXTS:
                hint = "give it a value, or leave it out; is a variable not set?"
                raise RecipeError("is empty", where=where, hint=hint)
        rest: list[str] = super().parse_args(ctx, args)
        for param in self.params:
            value, kind = ctx.params.get(param.name), getattr(param, "type", None)
            if isinstance(value, Path) or (isinstance(value, str) and getattr(kind, "name", None) in PATH_TYPES):
                ctx.params[param.name] = type(value)(os.path.expanduser(value))  # of --out=~/x the shell leaves the ~
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb; an option that a workflow refuses, or names in a warning, is named as it is typed here."""
        try:
            with _spelled_warnings(self._spellings()):
                return super().invoke(ctx)
        except OptionError as error:
            raise error.spelled(self._spellings()) from None
        except LibrefluxError as error:
            if isinstance(error.hint, OptionHint):
                error.hint = error.hint.spelled(self._spellings())
            raise

    def _spellings(self) -> dict[str, str]:
        """Parameter to how it is typed: an option's first long name, an argument's metavar."""
        found = {}
        for param in self.params:
            if param.param_type_name == "argument":
                words = re.findall(r"[A-Z]+", str(getattr(param, "metavar", None) or param.name).upper())
                found[str(param.name)] = words[0]
            else:
                found[str(param.name)] = next((text for text in param.opts if text.startswith("--")), param.opts[0])
        return found

    def _given(self, args: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """(as written, parameter, value) of what a command line gives; options without a value are left out."""
        options = {text: param for param in self.params for text in (*param.opts, *param.secondary_opts)}
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        rest = iter(args)
        for arg in rest:
            text, equals, value = arg.partition("=")
            option = options.get(text) if text.startswith("-") else None
            if option is not None and not getattr(option, "is_flag", False):
                yield text, str(option.name), value if equals else next(rest, "?")
            elif option is None and arguments and not arg.startswith("-"):
                positional = arguments[0] if len(arguments) == 1 else arguments.pop(0)  # the last one takes all others
                yield positional.metavar or str(positional.name).upper(), str(positional.name), arg
