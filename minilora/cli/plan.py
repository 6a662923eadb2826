"""minilora plan: what a training needs, before anything is loaded."""

from typing import Annotated, Any

from ..terminal import say
from .arguments import Arg, Settings
from .shared_flags import ConfigFile, Json, Recipe, check_paths, settings_of_file

USAGE = "minilora plan [RUN.yaml] --model DIR [--data FILE] [--SETTING VALUE ...]"


def run(
    recipe: Recipe | None = None,
    *,
    config: ConfigFile | None = None,
    device_memory: Annotated[
        float | None, Arg("plan for a card with so many 10^9 bytes [this machine]", "GB", within=(1e-6, 100_000))
    ] = None,
    gpus: Annotated[
        int, Arg("plan for so many ranks, each with a GPU or a share of this machine", within=(1, 65_536))
    ] = 1,
    json: Json = False,
    **settings: Annotated[Any, Settings()],
) -> None:
    from json import dumps

    from ..settings import resolve

    planned = resolve(settings_of_file(recipe, config), settings)
    check_paths(planned.model, None, planned.data, planned.encoding)
    from ..tools.plan import forecast, text_of

    found = forecast(planned, device_memory, gpus)
    say(dumps(found, indent=1, ensure_ascii=False) if json else text_of(found), whole=json)
