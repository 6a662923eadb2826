"""minilora merge: base and adapter as one checkpoint, and the proof that it computes the same."""

from pathlib import Path
from typing import Annotated, Unpack

from ..terminal import say, shell
from .arguments import Arg
from .shared_flags import Adapter, Model, Opening, check_paths


def run(
    *,
    model: Model,
    adapter: Adapter,
    output: Annotated[
        str,
        Arg(
            "new folder, of the base's own names and files: PEFT, transformers and vLLM read it as they read the base; for llama.cpp, minilora export it",
            "DIR",
        ),
    ],
    shard_size: Annotated[float, Arg("largest file in 10^9 bytes", "GB", within=(0.001, 100_000))] = 5,
    **opening: Unpack[Opening],
) -> None:
    check_paths(model, adapter)
    say(f"merging {adapter} into {model}")
    from ..checkpoint.merge import merge_folder

    proof = merge_folder(model, adapter, output, int(shard_size * 1e9), say=say, **opening)
    say(
        f"merged  {output}\n"
        f"proof   over {proof.tokens} tokens of 8 prompts, read back from the disk: a logit is off by at most {proof.merged:.3g}\n"
        f"        ({proof.allowed:.3g} would be rounding; the adapter moves logits by {proof.adapter:.3g}); likeliest next token as in\n"
        f"        exact arithmetic for {proof.same:.1%} of the tokens (unmerged, in the same type: {proof.same_plain:.1%})\n"
        f"\n  {shell('chat', '--model', Path(output))}"
    )
