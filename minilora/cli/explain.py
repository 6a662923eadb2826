"""minilora explain: one step of training through one linear, number by number."""

from typing import Annotated

from ..config import DataConfig
from ..terminal import say
from .arguments import Arg
from .shared_flags import adapter_folder, check_paths


def run(
    *,
    model: Annotated[
        str | None, Arg("folder of a checkpoint; default the tiny one of the demo", "DIR", group="model")
    ] = None,
    adapter: Annotated[str | None, Arg("an adapter to go on with", "DIR", group="model", parse=adapter_folder)] = None,
    linear: Annotated[str | None, Arg("path of a linear, such as model.layers.0.mlp.down_proj", "PATH")] = None,
    data: Annotated[str | None, Arg("rows; default the demo's", "FILE", group="data")] = None,
    row: Annotated[int, Arg("which of them: 1, 2, ...", within=(1, 2**31))] = 1,
    settings: DataConfig,
    lora_r: Annotated[int, Arg("rank of a new adapter", within=(1, 4096))] = 4,
    lora_alpha: Annotated[float, Arg("its scale is alpha / r", within=(1e-6, 1e6))] = 8,
) -> None:
    check_paths(model, adapter, data, settings.encoding)
    from rich.table import Table

    from ..checkpoint.adapter import load_adapter
    from ..checkpoint.load import load_model
    from ..console import Console
    from ..data import load_examples
    from ..demo.show import MODEL, ROWS
    from ..errors import UsageError
    from ..lora import add_lora
    from ..text.tokenizer import load_tokenizer
    from ..tools.explain import explain, usual_linear, where

    tokenizer = load_tokenizer(model or MODEL, adapter)
    examples, _ = load_examples(data or ROWS, tokenizer, settings)
    if row > len(examples):
        raise UsageError(f"--row is {row}, and there are {len(examples)} rows", f"Give one up to {len(examples)}.")
    decoder = load_model(model or MODEL)
    if adapter:
        load_adapter(decoder, adapter)
    else:
        add_lora(decoder, r=lora_r, alpha=lora_alpha)
    found = explain(decoder, examples[row - 1], linear or usual_linear(decoder))
    console = Console()
    say(f"row     {row} of {data or ROWS}: T = {found.tokens} tokens, {found.targets} of them to be predicted")
    say(f"linear  {found.path}, {found.place}; s = alpha / r = {found.scale:g}")
    say(f"loss    {found.loss:.4f} nats, the mean over the predicted tokens\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "formula", "shape", "bytes", "flops", "norm", "first numbers", "off by"):
        table.add_column(name, justify="right" if name in ("bytes", "flops", "norm", "off by") else "left")
    for q in found.quantities:
        first = " ".join(f"{v:.2g}" for v in q.value.flatten()[:3].tolist())
        shape = "[" + ", ".join(map(str, q.value.shape)) + "]"
        off = "" if q.error is None else f"{q.error:.0e}"
        table.add_row(
            q.name,
            q.formula,
            shape,
            f"{q.bytes:,}",
            f"{q.flops:,}" if q.flops else "",
            f"{float(q.value.norm()):.3g}",
            first,
            off,
        )
    console.print(table)
    say(f"\nThe adapter takes {found.adapter_share:.1%} of the arithmetic; W takes the rest, and gets no gradient.")
    dtype = str(decoder.compute_dtype).removeprefix("torch.")
    say(f'"off by": how far the call that training makes ({found.called}, {dtype}) is from these formulas in fp64,')
    say("as a share of the largest element.")
    say("A fresh B is 0, which makes dS and dA 0: what is shown is the step after the first.\n")
    for what, place in where():
        say(f"{what:<29}{place}")
