"""minilora verify: whether PEFT or vLLM would apply an adapter as it was trained."""

from typing import Annotated, Literal

from ..errors import ModelError
from ..terminal import say
from .arguments import Arg
from .shared_flags import Model, adapter_folder, check_paths

UNTRAINED = "Train it, or give the folder of one that was trained."


def run(
    adapter: Annotated[str, Arg("folder of an adapter, such as export wrote", "DIR", parse=adapter_folder)],
    *,
    model: Model,
    for_: Annotated[Literal["peft", "vllm"], Arg("the program that will run it")] = "vllm",
    any_base: Annotated[bool, Arg("take an adapter that was trained on another base")] = False,
    logits: Annotated[bool, Arg("check that the adapter changes the logits, if --model has weights")] = True,
) -> None:
    check_paths(model, adapter)
    from ..checkpoint.check_export import check_export, logits_moved
    from ..checkpoint.consumers import vllm_rank
    from ..checkpoint.save import has_weights

    check = check_export(model, adapter, for_)
    found, names = sum(check.found.values()), ", ".join(f"{n} {name}" for name, n in check.found.items())
    say(f"keys    adapters of rank {check.r} on {found} of {check.linears} linears: {names}")
    if check.zero:
        say(f"        B is zero on {check.zero} of them")
    if check.problems:
        raise ModelError(
            f"{adapter}: {for_} would not apply it as it was trained\n  " + "\n  ".join(check.problems),
            f"Write it again with minilora export --for {for_}; what {for_} does not have, minilora merge puts into the weights.",
        )
    if check.zero == found:
        raise ModelError(f"{adapter}: B is zero everywhere, so that it changes nothing", UNTRAINED)
    if logits and has_weights(model):
        moved, largest = logits_moved(model, adapter, any_base)
        if not moved:
            raise ModelError(f"{adapter} moves no logit of {model}", UNTRAINED)
        say(f"logits  move by up to {moved:.3g}, the largest is {largest:.3g}")
    needed = f" with --max-lora-rank {vllm_rank(check.r)}" if for_ == "vllm" and check.r > 16 else ""
    say(f"good    {for_} takes it{needed}")
