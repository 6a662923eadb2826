"""minilora inspect adapter: what an adapter learned, and a smaller one that does nearly the same."""

from typing import Annotated

from ..config import DataConfig
from ..errors import UsageError
from ..terminal import say, shell
from .arguments import Arg
from .shared_flags import Html, Json, adapter_folder, check_paths


def run(
    folder: Annotated[str, Arg("folder of an adapter, or of a run, whose checkpoints are read too", "DIR")],
    *,
    model: Annotated[str | None, Arg("its base: compares each change with the weight below it", "DIR")] = None,
    against: Annotated[str | None, Arg("another adapter to compare with", "DIR", parse=adapter_folder)] = None,
    to_rank: Annotated[int | None, Arg("write the closest adapter of this rank to --output", within=(1, 4096))] = None,
    output: Annotated[str | None, Arg("folder for the smaller adapter", "DIR")] = None,
    data: Annotated[
        str | None, Arg("rows to say what the smaller rank costs on, with --model", "FILE", group="data")
    ] = None,
    settings: DataConfig,
    html: Html | None = None,
    json: Json = False,
) -> None:
    adapter = adapter_folder(folder)
    check_paths(model, adapter, data)
    if (to_rank is None) != (output is None):
        raise UsageError(
            "--to-rank and --output belong together", "Give the rank and the folder of the smaller adapter."
        )
    if data and (to_rank is None or model is None):
        raise UsageError("--data says what a smaller rank costs", "Add --to-rank, --output and --model.")
    from json import dumps
    from pathlib import Path

    from rich.progress import Progress

    from ..console import Console
    from ..files.atomic import require_empty, write_output
    from ..tools.inspect_adapter import inspect_adapter
    from ..tools.inspect_adapter_show import show, to_html

    if output is not None:
        require_empty(Path(output))
    console = Console(stderr=json)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("beside the base", total=None, visible=model is not None)
        found = inspect_adapter(
            Path(folder), model, Path(against) if against else None, lambda i, n: bar.update(task, completed=i, total=n)
        )
    say(dumps(found.as_json()), whole=True) if json else show(found, console)
    if html:
        write_output(Path(html), to_html(found, model))
        say(f"\npage      {html}", quiet=json)
    if to_rank is not None and output is not None:
        from ..tools.truncate_adapter import cost_of, truncate_adapter

        kept = truncate_adapter(Path(adapter), to_rank, Path(output))
        say(f"\ntruncated {output}, rank {to_rank}: keeps {kept:.2%} of the energy", quiet=json)
        if data and model:
            for line in cost_of(Path(adapter), Path(output), model, data, settings):
                say(line, quiet=json)
        say(f"\n  {shell('chat', '--model', Path(model or 'DIR'), '--adapter', Path(output))}", quiet=json)
