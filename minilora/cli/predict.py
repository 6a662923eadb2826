"""minilora predict: answers to the questions of a test set, and their scores."""

from typing import Annotated, Unpack

from ..config import RANK_TIMEOUT, DataConfig
from ..ranks.start import run_on, several
from ..terminal import say
from .arguments import Arg, Settings
from .shared_flags import Adapter, GPUs, Int8, Model, Opening, Quant, RankTimeout, SamplingSeed, check_paths


def run(
    *,
    model: Model,
    adapter: Adapter | None = None,
    quant: Quant = "keep",
    int8: Int8 = False,
    data: Annotated[
        str, Arg("rows; the last answer of each is the reference, one without is answered alone", "FILE", group="data")
    ],
    output: Annotated[str, Arg("folder for answers and scores; one that was stopped goes on", "DIR")],
    max_tokens: Annotated[int, Arg("longest answer", within=(1, 2**31))] = 512,
    batch: Annotated[int, Arg("answers at a time", within=(1, 4096))] = 16,
    sample: Annotated[bool, Arg("draw as generation_config.json says, instead of the likeliest token")] = False,
    seed: SamplingSeed = 0,
    reading: Annotated[DataConfig, Settings(("columns", "encoding", "ignore_keys", "define", "source_tail"))],
    overwrite: Annotated[bool, Arg("delete an older prediction in --output")] = False,
    json: Annotated[bool, Arg("print predict_results.json instead of the table")] = False,
    gpus: GPUs = 1,
    rank_timeout: RankTimeout = RANK_TIMEOUT,
    **opening: Unpack[Opening],
) -> int:
    check_paths(model, adapter, data, reading.encoding)
    if several(gpus):
        return run_on(gpus)
    say(f"predict {model} on {data}", quiet=json)
    from json import dumps

    from ..console import Console
    from ..report.record import as_written
    from ..tools.predict import predict, show_results

    console = Console(stderr=json)
    sampling = {"max_tokens": max_tokens, "batch": batch, "sample": sample, "seed": seed}
    how = {
        "int8": int8,
        "quant": quant,
        "reading": reading,
        "overwrite": overwrite,
        "console": console,
        "rank_timeout": rank_timeout,
    }
    results = predict(model, data, output, adapter, **how, **sampling, **opening)
    if json:
        say(dumps(results, ensure_ascii=False, indent=1), whole=True)
    else:
        with as_written(output):
            show_results(results, console)
    return 0
