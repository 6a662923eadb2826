"""minilora chat: talk with a model and its adapter."""

from typing import Annotated, Unpack

from ..terminal import say
from .arguments import Arg
from .shared_flags import Adapter, Int8, Model, Opening, Quant, SamplingSeed, check_paths


def run(
    *,
    model: Model,
    adapter: Adapter | None = None,
    quant: Quant = "keep",
    int8: Int8 = False,
    system: Annotated[str | None, Arg("system prompt [the template's]")] = None,
    tools: Annotated[
        str | None, Arg("tools that the model may call, in OpenAI's form; you type what they return", "FILE.json")
    ] = None,
    prompt: Annotated[list[str] | None, Arg("say this and leave; may be given several times")] = None,
    greedy: Annotated[bool, Arg("take the likeliest token instead of sampling")] = False,
    temperature: Annotated[float | None, Arg("[generation_config.json]", within=(0, 100))] = None,
    top_p: Annotated[float | None, Arg("[generation_config.json]", within=(0, 1))] = None,
    top_k: Annotated[int | None, Arg("[generation_config.json]", within=(0, 2**31))] = None,
    max_tokens: Annotated[int, Arg("longest answer", within=(1, 2**31))] = 1024,
    think: Annotated[bool, Arg("let a model that can think do so")] = False,
    seed: SamplingSeed = 0,
    **opening: Unpack[Opening],
) -> None:
    check_paths(model, adapter)
    say(f"loading {model}")
    from ..tools.chat import chat

    sampling = {"greedy": greedy, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    chat(
        model,
        adapter,
        system,
        prompt,
        max_tokens=max_tokens,
        think=think,
        int8=int8,
        quant=quant,
        tools=tools,
        **sampling,
        **opening,
    )
