"""The command line: one file per verb; each parses, calls and prints. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

from libreflux.cli.app import app, main

__all__ = ["app", "main"]
