"""Names for everything that can be chosen by name: built-ins and what installed wheels add.

A built-in is stored as ``"module:attribute"`` and imported when somebody asks for it, so listing
names costs nothing. Other packages join through the entry-point group ``neurocl.<kind>``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from neurocl.errors import UserError


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice closest to ``word``, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        name: what the user types, lower case with hyphens.
        target: the object itself, or ``"module:attribute"`` to import it from.
        summary: one line for listings.
        areas: the command groups that accept the name, such as ``("spiking", "continual")``.
        source: ``"neurocl"`` or the distribution that added it.
    """

    name: str
    target: Any
    summary: str
    areas: tuple[str, ...] = ()
    source: str = "neurocl"

    def load(self) -> Any:
        """Import and return the registered object.

        Raises:
            UserError: what another distribution registered cannot be imported.
        """
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if self.source == "neurocl":
                raise
            raise UserError(f"{self.name!r} of {self.source} cannot be imported ({error})") from error


class Registry:
    """A table of names of one kind (``methods``, ``datasets``, ``backbones`` ...).

    Args:
        kind: also the entry-point group ``neurocl.<kind>``.
        builtins: the names to begin with.
        word: what a message calls one of them; None for ``kind`` without its last s.
    """

    def __init__(self, kind: str, builtins: Iterable[Entry] = (), *, word: str | None = None) -> None:
        self.kind = kind
        self.word = word or kind.removesuffix("s")
        self._entries = {entry.name: entry for entry in builtins}

    @cached_property
    def _plugins(self) -> dict[str, Entry]:
        from importlib.metadata import entry_points  # dear, and not needed for --help

        found = {}
        for point in entry_points(group=f"neurocl.{self.kind}"):
            source = point.dist.name if point.dist is not None else "plug-in"
            found[point.name] = Entry(point.name, point.value, f"from {source}", source=source)
        return found

    def register(
        self, name: str, target: Any, summary: str, areas: tuple[str, ...] = (), *, replace: bool = False
    ) -> None:
        """Add ``name``.

        Raises:
            ValueError: the name is taken and ``replace`` is false.
        """
        if name in self._entries and not replace:
            raise ValueError(f"{self.kind} {name!r} is registered already; pass replace=True to override it")
        self._entries[name] = Entry(name, target, summary, areas)

    def entries(self, area: str | None = None) -> list[Entry]:
        """All entries, built-ins first; only those that serve ``area`` if it is given."""
        merged = {**self._plugins, **self._entries}
        ordered = sorted(merged.values(), key=lambda entry: (entry.name not in self._entries, entry.name))
        return [entry for entry in ordered if area is None or not entry.areas or area in entry.areas]

    def names(self, area: str | None = None) -> list[str]:
        return [entry.name for entry in self.entries(area)]

    def entry(self, name: str, area: str | None = None) -> Entry:
        """Look a name up.

        Raises:
            UserError: nothing of that name; the message lists the choices.
        """
        for entry in self.entries(area):
            if entry.name == name:
                return entry
        choices = self.names(area)
        for entry in self.entries():
            if entry.name == name:
                raise UserError(
                    f"{self.word} {name!r} is for `neurocl {' or '.join(entry.areas)}`, not for `neurocl {area}`"
                )
        raise UserError(f"unknown {self.word} {name!r}{did_you_mean(name, choices)} (choose from {', '.join(choices)})")

    def load(self, name: str, area: str | None = None) -> Any:
        """Import and return what is registered under ``name``; raises UserError if nothing is."""
        return self.entry(name, area).load()
