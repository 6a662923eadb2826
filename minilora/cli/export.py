"""minilora export: an adapter as the program that will run it reads it."""

from typing import Annotated, Literal

from ..terminal import say
from .arguments import Arg
from .shared_flags import Adapter, Model, check_paths


def run(
    *,
    model: Model,
    adapter: Adapter,
    for_: Annotated[Literal["peft", "vllm"], Arg("who reads it: PEFT with AutoModelForCausalLM, or vLLM")],
    output: Annotated[str, Arg("new folder for the adapter", "DIR")],
) -> None:
    check_paths(model, adapter)
    from ..checkpoint.adapter import export_adapter

    found = export_adapter(model, adapter, output, for_)
    say(
        f"wrote   {output}: adapters on {found.adapted} of {found.linears} linears, by the names that {for_} gives them"
    )
    if found.made_alike:
        say(f"        all of rank {found.r} and of one scale now: {for_} reads no rank_pattern or alpha_pattern")
    if for_ == "vllm" and found.r > 16:
        say(f"        vLLM takes ranks up to 16 unless told: --max-lora-rank {found.r}")
