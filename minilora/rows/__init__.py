"""Files of training rows in the shapes that users have, read as messages.

    json, jsonl, csv, tsv, xlsx, txt -> values with their places (files, json_files, sheets) -> messages (shapes)

The keys of a row tell its shape. Every complaint names the file and the line or row; a row that does not say clearly what is
to be learnt is refused, never guessed.
"""

from ..errors import RowError, quote
from .files import RowFile, find_data, open_rows, read_rows
from .shapes import Row, fill, to_messages, trainable

__all__ = [
    "Row",
    "RowError",
    "RowFile",
    "fill",
    "find_data",
    "open_rows",
    "quote",
    "read_rows",
    "to_messages",
    "trainable",
]
