"""What typer knows of an argument, kept from click, which from 8.5 on has a field of that name and empties it."""

from __future__ import annotations

import functools
from typing import Any

from typer.core import TyperArgument


def ensure_argument_help() -> None:
    """Make ``--help`` show the help texts of arguments, whatever versions of typer and click meet."""
    original = TyperArgument.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.help = options.get("help")

    TyperArgument.__init__ = initialise  # type: ignore[method-assign]
