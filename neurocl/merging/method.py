"""What a merge is: one decorated pure function, from which its name, options, checks and documentation are read.

``N`` models, ``*shape`` the shape of one parameter. A task vector is a fine-tuned tensor less the base tensor.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from pydantic import Field, create_model

from neurocl.config import Config, validate
from neurocl.errors import UserError

Scope = Literal["elements", "tensor", "matrix"]
Statistic = Literal["gram", "fisher"]
MeasureScope = Literal["tensor", "model"]

# Keyword arguments that the engine fills in when a merge declares them; everything else is an option of the user.
SUPPLIED = frozenset({"name", "offset", "measured", "gram", "fisher", "weights"})


class Measurement(Protocol):
    """Numbers that a merge needs about whole tensors before it can work on pieces of them.

    It is built with ``num_models``, with those options of the merge that its constructor names and with ``weights``
    if it names that; then it is shown every piece of the data, in order, pass after pass, and finally handed to the
    merge as ``measured``. One whose attribute ``reads_data`` is false needs to see nothing with its options.
    """

    def update(self, base: torch.Tensor, models: torch.Tensor) -> None:
        """Take in one piece: ``base`` [n] and ``models`` [N, n], flattened, in the compute dtype.

        A measurement whose ``update`` also has the keyword arguments ``name`` (of the tensor) or ``offset`` (of the
        piece in the flattened tensor) is given them: see :func:`whereabouts`.
        """

    def another_pass(self) -> bool:
        """Called when all pieces were shown; true asks to see them once more."""


class Copies(NamedTuple):
    """Memory that a merge of whole tensors takes at its peak, measured in copies of the tensor.

    Attributes:
        per_model: for each model.
        besides: whatever the number of models.
        square: of matrices [inputs, inputs], for merges that make such.
    """

    per_model: float = 5.3
    besides: float = 16.0
    square: float = 0.0


MOST_COPIES = Copies()


@dataclass(frozen=True)
class MergeMethod:
    """A merge function with what the engine and the documentation need to know about it.

    Attributes:
        name: what the user types.
        function: ``(base [*shape], models [N, *shape], *, options) -> merged [*shape]``, all in one floating dtype.
        reference: the paper.
        scope: ``"elements"``: any slice of the flattened tensors can be merged by itself (once ``measure`` was
            taken, if there is one). ``"tensor"``: whole tensors of any shape. ``"matrix"``: whole matrices; every
            parameter that is not a matrix gets the mean of the models.
        needs_base: the function reads ``base``; without one the engine passes zeros.
        num_models: exact number of models, or None for any.
        min_models: smallest number of models that makes sense.
        statistic: per-layer statistics that must be given (``"gram"``: input Gram matrices, mean over tokens,
            [N, d, d]; ``"fisher"``: diagonal Fisher, [N, *shape]), or None.
        measure: class of the :class:`Measurement` that the function takes as ``measured``, or None.
        measure_scope: whether one measurement is taken per tensor or over the whole model (all floating tensors, in
            the order of their sorted names); the option ``trim`` of the function overrides it when there is one.
        spreads_nan: NaN or infinity in any entry of base or models makes that entry of the result NaN or infinity, so
            that looking at the result is enough.
        order_matters: permuting the models changes the result.
        returns_single: one expert merged alone is returned unchanged.
        copies: memory of a merge of whole tensors, for the estimate before it runs; the default is the most that any
            built-in one takes.
    """

    name: str
    function: Callable[..., torch.Tensor]
    reference: str
    scope: Scope = "elements"
    needs_base: bool = True
    num_models: int | None = None
    min_models: int = 1
    statistic: Statistic | None = None
    measure: Callable[..., Measurement] | None = None
    measure_scope: MeasureScope = "tensor"
    spreads_nan: bool = False
    order_matters: bool = False
    returns_single: bool = True
    copies: Copies = MOST_COPIES

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def supplied(self) -> frozenset[str]:
        """Which of :data:`SUPPLIED` the function declares."""
        return SUPPLIED & set(inspect.signature(self.function).parameters)

    @cached_property
    def options(self) -> type[Config]:
        """The function's keyword options as a validated configuration class."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        meanings = argument_meanings(inspect.getdoc(self.function) or "")
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(self.function).parameters.values():
            if parameter.kind is not parameter.KEYWORD_ONLY or parameter.name in SUPPLIED:
                continue
            fields[parameter.name] = (
                hints[parameter.name],
                Field(default=parameter.default, description=meanings.get(parameter.name, "")),
            )
        return create_model(f"{self.name}-options", __base__=Config, **fields)

    def resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults filled in and values checked.

        Raises:
            UserError: an unknown option or a value of the wrong kind or range, named.
        """
        return validate(self.options, options, source=f"merge {self.name!r}").model_dump()


def declared(function: Any, name: str) -> MergeMethod:
    """The declaration that :func:`merge_method` left on ``function``, which is registered under ``name``.

    Raises:
        UserError: there is none.
    """
    found = getattr(function, "merge", None)
    if not isinstance(found, MergeMethod):
        raise UserError(f"merge {name!r} is registered, but it is no function declared with @merge_method")
    return found


FunctionT = TypeVar("FunctionT", bound=Callable[..., torch.Tensor])


def merge_method(name: str, **properties: Any) -> Callable[[FunctionT], FunctionT]:
    """Declare a function to be the merge ``name``; it stays an ordinary function, with the declaration in ``.merge``.

    Args:
        name: lower case with hyphens.
        properties: the other fields of :class:`MergeMethod`. ``reference`` may be left out when the docstring has a
            line ``Reference: ...``.

    Options are the function's keyword-only arguments: give each a type (``Annotated[float, Field(ge=0, le=1)]`` to
    bound it, ``Literal[...]`` for choices), a default and a line under ``Args:``.
    """

    def declare(function: FunctionT) -> FunctionT:
        reference = properties.pop("reference", None) or reference_in(inspect.getdoc(function) or "")
        function.merge = MergeMethod(name, function, reference, **properties)  # type: ignore[attr-defined]
        return function

    return declare


def argument_meanings(text: str) -> dict[str, str]:
    """The ``Args:`` section of a docstring as name -> meaning."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    meanings: dict[str, str] = {}
    if section is None:
        return meanings
    current = ""
    for line in section.group(1).splitlines():
        start = re.match(r"^ {4}(\w+): (.*)$", line)
        if start:
            current = start.group(1)
            meanings[current] = start.group(2).strip()
        elif current and line.strip():
            meanings[current] += " " + line.strip()
    return meanings


def reference_in(text: str) -> str:
    """The ``Reference:`` paragraph of a docstring on one line, empty if there is none."""
    found = re.search(r"^Reference: (.*?)(?=\n\s*\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


MeasurementT = TypeVar("MeasurementT", bound=Measurement)


def whereabouts(measurement: Measurement, name: str, offset: int) -> dict[str, Any]:
    """Those of ``name`` and ``offset`` that ``measurement.update`` asks for, as keyword arguments."""
    asked = inspect.signature(measurement.update).parameters
    return {key: value for key, value in (("name", name), ("offset", offset)) if key in asked}


def measured_on(measurement: MeasurementT, base: torch.Tensor, models: torch.Tensor, *, name: str = "") -> MeasurementT:
    """``measurement`` after it has seen the whole of the tensor ``name``: ``base`` [*shape], ``models`` [N, *shape]."""
    flat, stacked = base.reshape(-1), models.reshape(len(models), -1)
    where = whereabouts(measurement, name, 0)
    while True:
        measurement.update(flat, stacked, **where)
        if not measurement.another_pass():
            return measurement
