"""Files of rows to examples, with the report of what became of every row.

    sources -> rows wanted of each file -> messages, {{names}} filled -> ids and mask -> within the limits -> TokenStore

A row is trained on, or counted under the reason why it is not. Only `truncate="cut"` changes a row.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..config import PLAIN, DataConfig
from ..errors import DataError, OutputInUse, RowError, UsageError
from ..text.tokenizer import Tokenizer
from .files import RowFile, open_rows, read_row
from .preferences import to_pair
from .render import MARK, hashes, keep_tail, render_row, render_sides, render_within
from .report import Report, counted
from .shapes import TEXT, Row, check_columns, fill, to_messages, trainable
from .sources import draw, parse_sources
from .token_store import Example, Examples, TokenCache, TokenStore, Writer, shifted, unnamed_file


def load_examples(
    path: str | Path,
    tokenizer: Tokenizer,
    settings: DataConfig = PLAIN,
    seed: int = 42,
    cache: TokenCache | None = None,
    pairs: bool = False,
) -> tuple[Examples, Report]:
    """The examples of files of rows, `{{key}}` in their texts replaced by define[key], and the report on them.

    path is a file, or sources as sources.py reads them. A row longer than max_length tokens, or with more masked tokens than
    max_source_length or more trained tokens than max_target_length (each with the template's own), is left out and counted
    (truncate "drop"), shortened and counted ("cut"), or an error ("error"). Raw text is cut into pieces of max_length.
    train_end says whether the token that ends an answer is trained with it. With `pairs` each row has a chosen and a rejected
    answer (preferences.py), and the limits are those of each.
    Raises RowError for the first row that cannot be used, unless skip_bad counts those; DataError if no row is left.
    """
    check_columns(settings.columns)
    if pairs and settings.truncate == "cut":
        raise UsageError(
            "--truncate cut could make two questions of a pair's", "Say --truncate drop or --truncate error."
        )
    total, stores = Report(), []
    sources = parse_sources(path)
    for source in sources:
        file = open_rows(source.path, settings)
        numbers = draw(source, len(file), seed)
        if cache is None:
            store, report = _tokenize(file, numbers, tokenizer, settings, unnamed_file(), pairs)
        else:
            store, report = _cached(file, numbers, tokenizer, settings, cache, pairs)
        store.rate = source.rate
        if file.note:
            report.notes.insert(0, f"{source.path}: {file.note}")
        if len(sources) > 1 or source.rate != 1 or source.count is not None:
            repeats = f" x {source.rate:g}" if source.rate > 1 else ""
            report.notes.insert(0, f"{source.path}: {report.kept:,} of {len(file):,} rows{repeats}")
        total.add(report)
        stores.append(store)
    if not total.examples:
        first = total.first_dropped or total.first_broken
        why = ", ".join([*total.dropped, *total.broken])
        raise DataError(
            f"{path}: all {total.rows:,} rows are {'too long' if total.dropped else 'left out'} (first: {first}; {why})",
            "Raise the limit, or shorten the rows." if total.dropped else "Correct the rows.",
        )
    return Examples(stores), total


def render_rows(rows: Sequence[Any], tokenizer: Tokenizer, settings: DataConfig = PLAIN) -> list[Example]:
    """The examples of rows in memory; DataError for the first that cannot be used, or is over a limit and may not be cut."""
    examples = []
    for number, value in enumerate(rows, 1):
        row = trainable(to_messages(value, f"row {number}", settings))
        fill(row, settings.define)
        keep_tail(row, tokenizer, settings.source_tail)
        pieces, over = render_within(row, tokenizer, settings)
        if not pieces:
            raise DataError(f"{row.where} is over {over}", 'Raise the limit, or say truncate="cut".')
        examples += [
            Example(ids, shifted(ids, trained), row.where, tokenizer.prefix(ids.tolist())) for ids, trained in pieces
        ]
    if not examples:
        raise DataError("there are no rows", "Give at least one conversation.")
    return examples


def _cached(
    file: RowFile, numbers: np.ndarray, tokenizer: Tokenizer, settings: DataConfig, cache: TokenCache, pairs: bool
) -> tuple[TokenStore, Report]:
    """The store of a cache, which is made if it is not there, and the report that was written with it."""
    rows, template = hashlib.sha256(numbers.tobytes()).hexdigest(), repr(tokenizer.template)
    key = cache.key(file=file.sha256, rows=rows, template=template, pairs=pairs, **settings.data_settings())
    held = cache.load(key, file)
    if held is not None:
        store, written = held
        fields: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else v for k, v in written.items()}
        report = Report(**fields)
        report.notes.append(f"tokens of {file.path} from the cache")
        return store, report
    try:
        with cache.write(key) as folder:
            out = open(folder / "tokens", "w+b")  # noqa: SIM115 the store reads from it as long as it lives
            store, report = _tokenize(file, numbers, tokenizer, settings, out, pairs)
            store.records.tofile(folder / "records")
            notes = {"digest": store.digest, "report": vars(report)}
            (folder / "notes.json").write_text(json.dumps(notes, ensure_ascii=False), encoding="utf-8")
        return store, report
    except OutputInUse:  # another process, or rank, is writing them there
        return _tokenize(file, numbers, tokenizer, settings, unnamed_file(), pairs)


def _tokenize(
    file: RowFile, numbers: np.ndarray, tokenizer: Tokenizer, settings: DataConfig, out: BinaryIO, pairs: bool
) -> tuple[TokenStore, Report]:
    """Render rows of a file into `out`."""
    report = Report(ignored=Counter(dict.fromkeys(settings.ignored, 0)))
    with Writer(out) as writer:
        for number in numbers.tolist():
            report.rows += 1
            try:
                sides = [trainable(side) for side in _sides(file, number, settings, pairs)]
                row, filled = sides[0], [fill(side, settings.define) for side in sides]
                question, content = hashes(*sides)
                tails = [keep_tail(side, tokenizer, settings.source_tail) for side in sides]
                pieces, over = render_sides(sides, tokenizer, settings)
            except RowError as error:
                if not settings.skip_bad:
                    raise _all_broken(error, file, numbers[numbers > number], settings, pairs) from None
                report.broken[error.reason] += 1
                report.first_broken = report.first_broken or error.what
                continue
            for used, undefined in filled:
                report.defined.update(used)
                report.undefined.update(undefined)
            report.ignored.update(row.ignored)
            report.cut.update([f"source_tail {settings.source_tail}"] * any(tails))
            report.shapes["preferences" if pairs else row.shape] += 1
            report.unanswered += row.messages[-1]["role"] not in ("assistant", TEXT)
            report.marked += any(MARK.search(m["content"]) for m in row.messages)
            if over and settings.truncate == "error":
                raise DataError(
                    f"{row.where} is over {over}", "Raise the limit, or say --truncate drop or --truncate cut."
                )
            if over and not pieces:
                length = len(render_row(row, tokenizer, settings)[0])
                report.dropped[over] += 1
                report.first_dropped = report.first_dropped or f"{row.where}, {length:,} tokens"
            elif over:
                report.cut[over] += 1
            for ids, trained, second in pieces:
                writer.add(ids, trained, number, question, content, tokenizer.prefix(ids.tolist()), second)
                report.examples += 1
                report.tokens += len(ids)
                report.trained += int(trained[1:].sum())
                report.longest = max(report.longest, len(ids))
        return writer.finish(file), report


def _sides(file: RowFile, number: int, settings: DataConfig, pairs: bool) -> Sequence[Row]:
    """The conversation of a row, or the two that differ in their last answer."""
    return to_pair(file.value(number), file.where(number), settings) if pairs else [read_row(file, number, settings)]


def _all_broken(error: RowError, file: RowFile, rest: np.ndarray, settings: DataConfig, pairs: bool) -> DataError:
    """The error of the first row that cannot be used, with the number of those behind it."""
    more = Counter()
    for number in rest.tolist():
        try:
            for side in _sides(file, number, settings, pairs):
                trainable(side)
        except RowError as other:
            more[other.reason] += 1
    if not more:
        return error
    what = f"{error.what} (and {sum(more.values()):,} more rows cannot be used: {counted(more)})"
    return RowError(error.reason, what, f"{error.hint} --skip-bad leaves such rows out and counts them.")
