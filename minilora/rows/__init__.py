"""Files of training rows in the shapes that users have, read as messages.

    json, jsonl, csv, tsv, xlsx, txt -> values and where they stand (files, json_files, sheets) -> messages (shapes)

The keys of a row tell its shape. Every error names the file and the line or row. A row that does not say clearly what to learn is
refused; nothing is guessed.
"""

from ..errors import RowError
from .files import RowFile, find_data, open_rows, read_rows
from .shapes import Row, fill, to_messages, trainable

__all__ = ["Row", "RowError", "RowFile", "fill", "find_data", "open_rows", "read_rows", "to_messages", "trainable"]
