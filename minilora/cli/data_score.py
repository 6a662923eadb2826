"""minilora data score: the perplexity of every row under a model."""

import os
from typing import Annotated, Unpack

from ..config import DataConfig
from ..errors import UsageError
from ..terminal import say
from .arguments import Arg
from .shared_flags import Adapter, Data, DataSeed, Html, Model, Opening, Quant, check_paths, new_file


def run(
    *,
    model: Model,
    adapter: Adapter | None = None,
    quant: Quant = "keep",
    data: Data,
    settings: DataConfig,
    scores: Annotated[str | None, Arg("write a jsonl of every row with its perplexity", "FILE", parse=new_file)] = None,
    keep_below: Annotated[float | None, Arg("largest perplexity to keep", within=(0, 1e300))] = None,
    keep_above: Annotated[float | None, Arg("smallest perplexity to keep", within=(0, 1e300))] = None,
    output: Annotated[str | None, Arg("write a jsonl of the rows that are kept", "FILE", parse=new_file)] = None,
    worst: Annotated[int, Arg("rows to show", within=(0, 1000))] = 5,
    html: Html | None = None,
    cache: Annotated[str | None, Arg("folder that keeps the tokens of the rows for the next time", "DIR")] = None,
    seed: DataSeed = 42,
    **opening: Unpack[Opening],
) -> None:
    if (keep_below is None and keep_above is None) != (output is None):
        raise UsageError("--keep-below or --keep-above and --output belong together", "Give both, or none of them.")
    places = [os.path.realpath(path) for path in (scores, output, html) if path]
    if len(set(places)) < len(places):
        raise UsageError("two of --scores, --output and --html are the same file", "Give each a name of its own.")
    check_paths(model, adapter, data, settings.encoding)
    say(f"score       {data} by {model}")
    from pathlib import Path

    import numpy as np

    from ..checkpoint.open_model import folder_notes, open_model
    from ..console import Console
    from ..data import load_examples
    from ..files.atomic import write_output
    from ..files.model_folder import ModelFolder
    from ..rows.token_store import TokenCache
    from ..text.tokenizer import load_tokenizer
    from ..tools.score_data import kept, score_lines, score_rows, write_kept
    from ..tools.score_data_show import shown_progress, to_html, to_text

    console, folder = Console(), ModelFolder(model)
    tokenizer = load_tokenizer(folder, adapter)
    for name, note in folder_notes(folder, tokenizer, adapter).items():
        say(f"{name:<12}{note}")
    store = TokenCache(Path(cache), folder.path, Path(adapter) if adapter else None) if cache else None
    examples, report = load_examples(data, tokenizer, settings, seed=seed, cache=store)
    console.say(f"data        {report}")
    decoder = open_model(folder, tokenizer, adapter, quant=quant, say=lambda how: say(f"compute     {how}"), **opening)
    found = list(shown_progress(score_rows(decoder, examples, settings.max_length), len(examples), console))
    for path in filter(None, (scores, output)):
        new_file(path)  # again: another process may have made it
    if scores:
        write_output(Path(scores), "".join(score_lines(found, examples)))
    marks = {k: v for k, v in (("keep_below", keep_below), ("keep_above", keep_above)) if v is not None}
    console.say(to_text(found, examples, marks, worst))
    if output:
        keep = kept(np.array([s.perplexity for s in found]), keep_below, keep_above)
        write_kept(Path(output), found, keep, examples)
        console.say(f"kept        {keep.sum():,} of {len(keep):,} rows: {output}")
    if scores:
        console.say(f"scores      {scores}")
    if html:
        write_output(Path(html), to_html(data, model, found, examples, marks, max(worst, 20)))
        console.say(f"page        {html}")
