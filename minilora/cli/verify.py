"""minilora verify: whether PEFT or vLLM would apply an adapter as it was trained."""

from typing import Annotated, Literal

from ..errors import ModelError
from ..terminal import say
from .arguments import Arg
from .shared_flags import Model, adapter_folder, check_paths


def run(
    adapter: Annotated[str, Arg("folder of an adapter, such as export wrote", "DIR", parse=adapter_folder)],
    *,
    model: Model,
    for_: Annotated[Literal["peft", "vllm"], Arg("who reads it")] = "vllm",
    logits: Annotated[bool, Arg("open the model and see whether the adapter moves its logits")] = True,
) -> None:
    check_paths(model, adapter)
    from ..checkpoint.check_export import check_export, logits_moved
    from ..checkpoint.consumers import vllm_rank

    check = check_export(model, adapter, for_)
    found = sum(check.found.values())
    say(
        f"keys    adapters on {found} of {check.linears} linears: {', '.join(f'{n} {name}' for name, n in check.found.items())}"
    )
    say(f"        rank {check.r}" + (f"; B is zero on {check.zero}" if check.zero else ""))
    if check.problems:
        raise ModelError(
            f"{adapter}: {for_} would not apply it as it was trained\n  " + "\n  ".join(check.problems),
            f"Write it again with minilora export --for {for_}; what {for_} does not have, minilora merge puts into the weights.",
        )
    if logits:
        moved, largest = logits_moved(model, adapter)
        if not moved:
            raise ModelError(
                f"{adapter} moves no logit of {model}", "Train it, or give the folder of one that was trained."
            )
        say(f"logits  move by up to {moved:.3g}, the largest is {largest:.3g}")
    say(
        f"good    {for_} takes it"
        + (f" with --max-lora-rank {vllm_rank(check.r)}" if for_ == "vllm" and check.r > 16 else "")
    )
