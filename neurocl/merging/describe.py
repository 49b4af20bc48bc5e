"""What there is to say about a merge: summary, options with bounds and defaults, needs, paper."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from neurocl.merging.catalog import MERGES
from neurocl.merging.method import MergeMethod, argument_meanings, declared, reference_in

# Arguments of merges of networks that are inputs, not options.
NETWORK_INPUTS = frozenset(
    {"base", "experts", "batches", "blocks", "stages", "heads", "logit_scale", "forward", "row_mask", "progress"}
)


def declaration(name: str) -> MergeMethod | None:
    """The declaration of a merge of weights or adapters; None for merges of networks, which are plain functions.

    Raises:
        UserError: no merge of that name, or a plug-in's that cannot be used.
    """
    entry = MERGES.entry(name)
    if "networks" in entry.areas:
        return None
    if "adapters" in entry.areas:
        from neurocl.merging.adapters import ADAPTER_MERGES

        return ADAPTER_MERGES[name]
    return declared(entry.load(), name)


def option_fields(name: str) -> dict[str, Any]:
    """Option name -> pydantic field, or parameter for merges of networks."""
    method = declaration(name)
    if method is not None:
        return dict(method.options.model_fields)
    function = MERGES.load(name)
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: parameter.replace(annotation=hints[parameter.name])
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in NETWORK_INPUTS
    }


def described(name: str) -> dict[str, Any]:
    """Everything about one merge as plain values."""
    entry = MERGES.entry(name)
    method = declaration(name)
    function = entry.load() if method is None else method.function
    text = (inspect.getdoc(function) or "").replace("``", "")
    meanings = argument_meanings(text)
    options = []
    for option, field in option_fields(name).items():
        options.append(
            {
                "name": option if method is None else "--" + option.replace("_", "-"),
                "type": _type_text(field.annotation, getattr(field, "metadata", [])),
                "default": field.default,
                "meaning": meanings.get(option, ""),
            }
        )
    return {
        "name": name,
        "works on": entry.areas[0] if entry.areas else "weights",
        "summary": text.partition("\n")[0],
        "about": _body(text),
        "needs": _needs(method, entry.areas),
        "options": options,
        "reference": method.reference if method else reference_in(text),
        "source": entry.source,
    }


def _body(text: str) -> str:
    """Paragraphs between the first line and ``Args:``."""
    body = text.partition("\n\n")[2].partition("Args:")[0]
    return "\n\n".join(" ".join(part.split()) for part in body.split("\n\n") if part.strip())


def _needs(method: MergeMethod | None, areas: tuple[str, ...]) -> list[str]:
    if method is None:
        return ["networks that run", "unlabelled data of every task"]
    if "adapters" in areas:
        return ["adapters of one base model"]
    needs = ["base"] if method.needs_base else []
    if method.num_models is not None:
        needs.append(f"exactly {method.num_models} models")
    elif method.min_models > 1:
        needs.append(f"at least {method.min_models} models")
    if method.statistic == "gram":
        needs.append("Gram matrices of every model (neurocl merging stats)")
    elif method.statistic == "fisher":
        needs.append("Fisher information of every model (neurocl merging stats)")
    return needs


def _type_text(annotation: Any, metadata: Any = ()) -> str:
    """``"mean | sum | max"``, ``"0 < number <= 1"``, ``"number"``."""
    if isinstance(annotation, str):
        return annotation
    bounds = {type(item).__name__: item for item in metadata}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_text(arguments[0], annotation.__metadata__[0].metadata)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if type(None) in arguments:
        return " | ".join([_type_text(part) for part in arguments if part is not type(None)] + ["none"])
    names = {float: "number", int: "integer", bool: "yes or no", str: "text"}
    text = names.get(annotation, getattr(annotation, "__name__", str(annotation)))
    low = f"{bounds['Gt'].gt:g} < " if "Gt" in bounds else f"{bounds['Ge'].ge:g} <= " if "Ge" in bounds else ""
    high = f" < {bounds['Lt'].lt:g}" if "Lt" in bounds else f" <= {bounds['Le'].le:g}" if "Le" in bounds else ""
    return f"{low}{text}{high}"
