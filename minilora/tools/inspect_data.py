"""What the model sees of a file of rows: its tokens, what of them is trained, how long rows are, and what looks wrong."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..errors import DataError, RowError
from ..files.model_folder import positions_note
from ..report.token_view import Token, tokens_of
from ..rows import Row, fill, open_rows, trainable
from ..rows.duplicates import NearDuplicates
from ..rows.files import read_row
from ..rows.keys import ignored_notes
from ..rows.render import MARK, hashes, keep_tail, render_row, render_within
from ..rows.report import ending_note
from ..rows.shapes import PLACEHOLDER, TEXT
from ..rows.sources import draw, parse_sources
from ..text.template import Message
from ..text.template_check import TemplateCheck, check_template
from ..text.tokenizer import Tokenizer

KEPT = 5  # places that are kept of each problem
CHECKED = 200  # rows that are compared with the folder's template
LIMITED = {  # setting -> the length that it limits, and its name
    "max_length": ("total", "tokens"),
    "max_source_length": ("source", "masked tokens"),
    "max_target_length": ("target", "trained tokens"),
}


@dataclass
class Problem:
    """One kind of trouble: in how many rows, and the first of them with what stands there."""

    rows: int = 0
    places: list[str] = field(default_factory=list)


@dataclass
class Sample:
    """A row to look at."""

    where: str
    tokens: list[Token]
    problems: list[str]


@dataclass
class Inspection:
    """All that is told about a file. lengths: int64 arrays over the usable rows, under source, target and total."""

    path: str
    settings: DataConfig
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    shapes: Counter = field(default_factory=Counter)
    problems: dict[str, Problem] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    check: TemplateCheck | None = None
    checked: list[str] = field(default_factory=list)  # the places of the compared rows

    def found(self, kind: str, where: str) -> None:
        """Count a problem of a row."""
        problem = self.problems.setdefault(kind, Problem())
        problem.rows += 1
        if len(problem.places) < KEPT:
            problem.places.append(where)

    def limits(self, name: str) -> dict[str, float]:
        """The limits on one of the lengths, by their setting's name."""
        setting = next(setting for setting, (length, _) in LIMITED.items() if length == name)
        value = getattr(self.settings, setting)
        return {} if value is None else {setting: value}


def inspect_data(
    path: str,
    model: Path,
    tokenizer: Tokenizer,
    settings: DataConfig,
    samples: int = 3,
    row: int | None = None,
    only_problems: bool = False,
    val: str | None = None,
    compare: bool = False,
    seed: int = 42,
) -> Inspection:
    """Read every row of the sources in `path` as training would, and tell what is there.

    samples: how many rows are kept to look at: the first ones, or the first with problems; row: that one alone (1, 2, ...).
    val: a file that shall share no question with these rows. compare: with the folder's own chat template.
    """
    result, scan, ignored = (
        Inspection(path, settings),
        _Scan(tokenizer, settings),
        Counter(dict.fromkeys(settings.ignored, 0)),
    )
    result.notes += list(tokenizer.notes.values())
    for source in parse_sources(path):
        file = open_rows(source.path, settings)
        result.notes += [f"{source.path}: {file.note}"] * bool(file.note)
        for number in draw(source, len(file), seed).tolist():
            result.rows += 1
            try:
                found = trainable(read_row(file, number, settings))
                scan.row(found, result)
            except RowError as error:
                result.found(f"cannot be used: {error.reason}", error.what)
                continue
            ignored.update(found.ignored)
            wanted = result.rows == row if row is not None else len(result.samples) < samples
            if wanted and (row is not None or not only_problems or scan.problems):
                result.samples.append(Sample(scan.last.where, scan.tokens(), list(scan.problems)))
    result.notes += ignored_notes(ignored)
    if row is not None and not result.samples:
        raise DataError(f"{path} has no row {row} that can be used ({result.rows:,} rows)", "Give another --row.")
    beyond = positions_note(model, max(scan.lengths["total"], default=0))
    result.notes += [beyond] if beyond else []
    result.lengths = {name: np.array(values, dtype=np.int64) for name, values in scan.lengths.items()}
    if not settings.train_end:
        result.notes.append(ending_note(result.lengths["target"]))
    if val:
        _leaks(val, scan, settings, result)
    if compare and scan.chats:
        result.check = check_template(model, tokenizer, [messages for messages, _ in scan.chats])
        result.checked = [where for _, where in scan.chats]
    return result


class _Scan:
    """What is remembered from row to row, and the last row's tokens and problems."""

    def __init__(self, tokenizer: Tokenizer, settings: DataConfig):
        self.tokenizer, self.settings = tokenizer, settings
        self.lengths: dict[str, list[int]] = {"total": [], "source": [], "target": []}
        self.questions: dict[int, tuple[int, str]] = {}  # hash of a question -> hash of its row, its place
        self.contents: dict[int, str] = {}
        self.near = NearDuplicates()
        self.chats: list[tuple[list[Message], str]] = []
        self.problems: list[str] = []

    def row(self, row: Row, result: Inspection) -> None:
        """Look at a row; RowError if nothing of it can be trained."""
        fill(row, self.settings.define)
        keep_tail(row, self.tokenizer, self.settings.source_tail)
        pieces, over = render_within(row, self.tokenizer, self.settings)
        self.last, self.problems = row, []
        self.ids, self.trained = pieces[0] if pieces else render_row(row, self.tokenizer, self.settings)
        # a raw text has as many pieces as it needs, a conversation one
        for ids, trained in pieces or [(self.ids, self.trained)]:
            self.lengths["total"].append(len(ids))
            self.lengths["target"].append(int(trained.sum()))
            self.lengths["source"].append(len(ids) - int(trained.sum()))
        result.shapes[row.shape] += 1
        for kind, detail in self._problems(over):
            self.problems.append(f"{kind}: {detail}" if detail else kind)
            result.found(kind, f"{row.where}{f': {detail}' if detail else ''}")
        if len(self.chats) < CHECKED and row.shape != TEXT and not _mark(row):
            self.chats.append((row.messages, row.where))

    def tokens(self) -> list[Token]:
        return tokens_of(self.last, self.ids, self.trained, self.tokenizer)

    def _problems(self, over: str | None) -> list[tuple[str, str]]:
        row, ids, known = self.last, self.ids.tolist(), set(self.tokenizer.specials.values())
        found: list[tuple[str, str]] = []
        if over:
            length, words = LIMITED[over.split()[0]]
            cut = ", cut" if self.settings.truncate == "cut" else ""
            found.append((f"over {over}{cut}", f"{self.lengths[length][-1]:,} {words}"))
        if row.shape != TEXT and self.settings.train_end and not self._stops():
            found.append(("no stop token at the end of an answer", ""))
        if len(ids) > 1 and ids[0] == ids[1] and ids[0] in known:
            found.append(("the first token appears twice", self.tokenizer.decode(ids[:1], specials=True)))
        mark = _mark(row)
        if mark:
            found.append(("the words of a chat format in a text", mark))
        if any(m["role"] == "user" and not m["content"].strip() for m in row.messages):
            found.append(("an empty question", ""))
        texts = [m["content"] for m in row.messages]
        if any("\ufffd" in text for text in texts):
            found.append(("a character was lost (U+FFFD) before the file was written", ""))
        names = sorted({name for text in texts for name in PLACEHOLDER.findall(text)})
        if names:
            found.append(("{{names}} are not filled", ", ".join(names)))
        return found + self._seen_before(row, texts)

    def _seen_before(self, row: Row, texts: list[str]) -> list[tuple[str, str]]:
        question, content = hashes(row)
        first = self.contents.setdefault(content, row.where)
        if first != row.where:
            return [("a duplicate", f"of {first}")]
        found = []
        asked, place = self.questions.setdefault(question, (content, row.where))
        if asked != content and row.shape != TEXT:
            found.append(("the same question with another answer", f"in {place}"))
        near = self.near.add(" ".join(texts), row.where)
        if near is not None:
            found.append(("nearly a duplicate", f"of {near[0]}, about {100 * near[1]:.0f} % alike"))
        return found

    def _stops(self) -> bool:
        """Whether each trained stretch ends in a token that ends a turn."""
        ends = self.trained & ~np.append(self.trained[1:], False)
        return set(self.ids[ends].tolist()) <= self.tokenizer.stop_ids


def _mark(row: Row) -> str | None:
    """The first mark of a chat format that stands in a text of a row."""
    found = next((m for m in (MARK.search(message["content"]) for message in row.messages) if m), None)
    return found[0] if found else None


def _leaks(val: str, scan: _Scan, settings: DataConfig, result: Inspection) -> None:
    """Count the validation rows whose question, or nearly whose text, is among the rows that were scanned."""
    file = open_rows(val, settings)
    for number in range(len(file)):
        try:
            row = trainable(read_row(file, number, settings))
        except RowError as error:
            result.found(f"validation row cannot be used: {error.reason}", error.what)
            continue
        fill(row, settings.define)
        seen = scan.questions.get(hashes(row)[0])
        near = scan.near.like(" ".join(m["content"] for m in row.messages))
        if seen is not None:
            result.found("a validation row asks what a training row asks", f"{row.where}: {seen[1]}")
        elif near is not None:
            result.found(
                "a validation row is nearly a training row",
                f"{row.where}: {near[0]}, about {100 * near[1]:.0f} % alike",
            )
