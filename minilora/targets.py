"""Which linears adapters go on: what add_lora's targets mean."""

import re

from .errors import UsageError, quote
from .patterns import simple

ROUTER = "gate"
GROUPS = {
    "attention": ("self_attn", "linear_attn", "self_attention", "attention", "attn"),
    "mlp": ("mlp",),
    "experts": ("experts",),
}


def short(path: str) -> str:
    """The last name of a linear's path without _proj; c_proj stays as it is."""
    leaf = path.rpartition(".")[2]
    return leaf if leaf == "c_proj" else leaf.removesuffix("_proj")


def chosen(paths: list[str], targets: str | list[str]) -> list[str]:
    """The paths of linears that `targets` selects, in their order; UsageError with the names that exist if one is not there."""
    if isinstance(targets, str) and re.search(r"[\\*+?^$|()\[\]{}]", targets):
        try:
            re.compile(targets)
        except (re.error, OverflowError, RecursionError) as error:
            what = f"lora_targets {quote(targets)} is not a regular expression: {error}"
            raise UsageError(what, "Correct it, or give names.") from None
        pattern = simple(targets)
        if pattern is None:
            what = f"lora_targets {quote(targets)} could be tried for ever"
            raise UsageError(what, "Write it without a repeated group in which there is a choice, or give names.")
        found = {targets: {p for p in paths if pattern.fullmatch(p)}}
    else:
        names = [n.strip() for n in targets.split(",")] if isinstance(targets, str) else targets
        found = {name: {p for p in paths if _selects(name, p)} for name in names}
    missing = [name for name, selected in found.items() if not selected]
    if missing or not found:
        leaves = ", ".join(dict.fromkeys(p.split(".")[-1] for p in paths))
        what = f"no linear is called {', '.join(missing)}" if missing else "no targets are given"
        raise UsageError(what, f"The model has {leaves}; or give all-linear, attention, mlp, experts.")
    return [p for p in paths if any(p in selected for selected in found.values())]


def _selects(name: str, path: str) -> bool:
    *above, leaf = path.split(".")
    if name in GROUPS:
        return leaf != ROUTER and bool(set(above) & set(GROUPS[name]))
    return (name in ("all-linear", "all") and leaf != ROUTER) or path == name or path.endswith("." + name)
