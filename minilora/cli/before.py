"""What every command that computes does before torch is imported, which takes seconds: look at its paths, and say what it does."""

from pathlib import Path

from ..files.model_folder import ModelFolder, check_adapter
from ..terminal import say  # noqa: F401 for all commands


def check_paths(
    model: str | None = None, adapter: str | None = None, data: str | None = None, encoding: str = ""
) -> None:
    """ModelError or DataError for a path of a command that is not what it should be, UsageError for an encoding; None is not looked at."""
    if model:
        ModelFolder(model).config  # noqa: B018 read, or refused
    if adapter:
        check_adapter(Path(adapter))
    if data:
        from ..rows import find_data
        from ..rows.encodings import check_encoding
        from ..rows.files import check_file
        from ..rows.sources import parse_sources

        check_encoding(encoding)
        for source in parse_sources(data):
            check_file(find_data(source.path)[0])
