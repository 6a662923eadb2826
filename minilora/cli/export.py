"""minilora export: an adapter, or for llama.cpp also a model, in the format of the program that will run it."""

from typing import Annotated, Literal

from ..errors import UsageError
from ..terminal import say
from .arguments import Arg
from .shared_flags import Adapter, Model, check_paths


def run(
    *,
    model: Model,
    adapter: Adapter | None = None,
    for_: Annotated[
        Literal["peft", "vllm", "gguf"],
        Arg(
            "the program: PEFT with AutoModelForCausalLM, vLLM, or gguf for llama.cpp and Ollama, which also take a model"
        ),
    ],
    output: Annotated[str, Arg("new folder", "DIR")],
    type_: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None, Arg("of the weights of a model for gguf [as stored]")
    ] = None,
    from_: Annotated[
        str | None,
        Arg(
            "for gguf, the base of an adapter in the Modelfile: a GGUF file, or the name of a model of Ollama's", "GGUF"
        ),
    ] = None,
) -> None:
    check_paths(model, adapter)
    if for_ == "gguf":
        _gguf(model, adapter, output, type_, from_)
        return
    if not adapter or type_ or from_:
        raise UsageError(
            f"--for {for_} takes an adapter, and neither --type nor --from",
            "A model is read by PEFT and vLLM as it is.",
        )
    from ..checkpoint.consumers import vllm_rank
    from ..checkpoint.export import export_adapter

    found = export_adapter(model, adapter, output, for_)
    say(
        f"wrote   {output}: adapters on {found.adapted} of {found.linears} linears, by the names that {for_} gives them"
    )
    if found.made_alike:
        say(f"        all of rank {found.r} and of one scale now: {for_} reads no rank_pattern or alpha_pattern")
    if for_ == "vllm" and found.r > 16:
        say(f"        vLLM takes ranks up to 16 unless told: --max-lora-rank {vllm_rank(found.r)}")


def _gguf(model: str, adapter: str | None, output: str, kind: str | None, base: str | None) -> None:
    if (kind and adapter) or (base and not adapter):
        raise UsageError("--type is of a model, --from of an adapter", "An adapter is written in f32.")
    from ..checkpoint.gguf import GGUF_ADAPTER, GGUF_MODEL, export_lora, export_model

    written = export_lora(model, adapter, output, base) if adapter else export_model(model, output, kind)
    kinds = ", ".join(f"{count} in {kind}" for kind, count in written.kinds.most_common())
    name = GGUF_ADAPTER if adapter else GGUF_MODEL
    say(f"wrote   {output}/{name}: {kinds}; {written.size / 1e6:,.1f} MB, and a Modelfile for Ollama")
    if not adapter:
        say(f"\n  llama-cli -m {output}/{name}\n  ollama create NAME -f {output}/Modelfile")
        return
    if not base:
        say(
            f"        the Modelfile asks for the model as {GGUF_MODEL} beside it: minilora export --for gguf without --adapter"
        )
    say(f"\n  llama-cli -m {base or GGUF_MODEL} --lora {output}/{name}")
