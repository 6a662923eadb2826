"""Files of rows to examples, with the report of what became of every row.

    sources -> rows wanted of each file -> messages, {{names}} filled -> ids and mask -> within the limits -> TokenStore

A row is trained on, or counted under the reason why it is not; none is changed unless `truncate` says that it may be cut.
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from ..errors import DataError
from ..text.template_glm import CHATGLM
from ..text.tokenizer import Tokenizer
from . import Row, RowError, RowFile, fill, open_rows, to_messages, trainable
from .keys import ignored_notes
from .shapes import TEXT, check_columns
from .sources import draw, parse_sources
from .token_store import Example, Examples, TokenCache, TokenStore, Writer, shifted, unnamed_file


@dataclass
class Report:
    """What became of the rows of a data set."""

    rows: int = 0
    examples: int = 0  # more than the rows that were kept if raw texts were cut into pieces
    shapes: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)  # limit -> rows over it
    first_dropped: str = ""
    broken: Counter = field(default_factory=Counter)  # reason -> rows that could not be used
    first_broken: str = ""
    cut: Counter = field(default_factory=Counter)  # limit -> rows shortened to it
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    defined: Counter = field(default_factory=Counter)  # {{key}} -> times it was filled
    undefined: Counter = field(default_factory=Counter)  # {{key}} -> rows that hold it unfilled
    ignored: Counter = field(default_factory=Counter)  # key -> rows that hold it and leave it out on request
    unanswered: int = 0  # rows whose last message no answer follows
    marked: int = 0  # rows whose texts hold marks of a chat format
    notes: list[str] = field(default_factory=list)  # how a file was read

    def add(self, other: "Report") -> None:
        """Take in the report on another file."""
        self.rows += other.rows
        self.examples += other.examples
        self.tokens += other.tokens
        self.trained += other.trained
        self.longest = max(self.longest, other.longest)
        self.unanswered += other.unanswered
        self.marked += other.marked
        self.first_dropped = self.first_dropped or other.first_dropped
        self.first_broken = self.first_broken or other.first_broken
        self.notes += other.notes
        for name in ("shapes", "dropped", "broken", "cut", "defined", "undefined", "ignored"):
            getattr(self, name).update(getattr(other, name))

    @property
    def kept(self) -> int:
        """Rows that are examples."""
        return self.rows - sum(self.dropped.values()) - sum(self.broken.values())

    def __str__(self) -> str:
        shapes = ", ".join(self.shapes)
        share = 100 * self.trained / max(self.tokens, 1)
        text = f"{self.kept:,} rows ({shapes})  {self.tokens:,} tokens, {self.trained:,} trained ({share:.0f} %)  longest {self.longest:,}"
        if self.examples > self.kept:
            text += f"\nraw text in {self.examples:,} pieces"
        for note in self.notes + ignored_notes(self.ignored):
            text += f"\n{note}"
        if self.dropped:
            text += f"\ndropped {sum(self.dropped.values()):,} of {self.rows:,} rows: {_over(self.dropped)} (first: {self.first_dropped})"
        if self.cut:
            text += f"\ncut {sum(self.cut.values()):,} of {self.rows:,} rows: {_over(self.cut)}"
        if self.broken:
            text += f"\nleft out {sum(self.broken.values()):,} of {self.rows:,} rows: {counted(self.broken)} (first: {self.first_broken})"
        if self.unanswered:
            text += f"\nnote: {self.unanswered:,} rows end with a message that no answer follows; it teaches nothing"
        if self.marked:
            text += f"\nnote: {self.marked:,} rows hold marks such as <|im_start|>, which are plain text to the model; inspect data shows them"
        for key, rows in self.undefined.items():
            text += f"\nnote: {rows:,} rows hold {{{{{key}}}}} as it is; --define {key}=TEXT fills it"
        return text


def _over(limits: Counter) -> str:
    return ", ".join(f"{n:,} over {limit}" for limit, n in limits.items())


def counted(reasons: Counter) -> str:
    """3 empty answer, 1 broken JSON."""
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())


# marks of chat formats; words of a thought and of a tool call may stand in an answer
MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>",
         "[gMASK]", "<sop>", "<eop>", "[INST]", "[/INST]", "<<SYS>>", "### Instruction:", "### Response:", "<s>", "</s>")  # fmt: skip
MARK = re.compile("|".join(map(re.escape, MARKS)))
PLAIN = DataConfig()


def load_examples(
    path: str | Path,
    tokenizer: Tokenizer,
    settings: DataConfig = PLAIN,
    seed: int = 42,
    cache: TokenCache | None = None,
) -> tuple[Examples, Report]:
    """The examples of files of rows, `{{key}}` in their texts replaced by define[key], and the report on them.

    path is a file, or sources as sources.py reads them. A row longer than max_length tokens, or with more masked tokens than
    max_source_length or more trained tokens than max_target_length (each with the template's own), is left out and counted
    (truncate "drop"), shortened and counted ("cut"), or an error ("error"). Raw text is laid out in pieces of max_length.
    train_end says whether the token that ends an answer is trained with it.
    Raises RowError for the first row that cannot be used, unless skip_bad counts those; DataError if no row is left.
    """
    check_columns(settings.columns)
    total, stores = Report(), []
    sources = parse_sources(path)
    for source in sources:
        file = open_rows(source.path, settings.columns, settings.encoding)
        numbers = draw(source, len(file), seed)
        key = (
            ""
            if cache is None
            else cache.key(
                file=file.sha256,
                rows=hashlib.sha256(numbers.tobytes()).hexdigest(),
                template=repr(tokenizer.template),
                **settings.data_settings(),
            )
        )
        held = cache.load(key, file, source.rate) if cache is not None else None
        if held is None:
            store, report = _tokenize(file, numbers, tokenizer, settings, source.rate, cache, key)
        else:
            store, report = held[0], _report_of(held[1]["report"])
            report.notes.append(f"tokens of {source.path} from the cache")
        if file.note:
            report.notes.insert(0, f"{source.path}: {file.note}")
        if len(sources) > 1 or source.rate != 1 or source.count is not None:
            report.notes.insert(
                0, f"{source.path}: {report.kept:,} of {len(file):,} rows" + f" x {source.rate:g}" * (source.rate > 1)
            )
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
        row = trainable(to_messages(value, f"row {number}", settings.columns, settings.ignored))
        fill(row, settings.define)
        pieces, over = render_within(row, tokenizer, settings)
        if not pieces:
            raise DataError(f"{row.where} is over {over}", 'Raise the limit, or say truncate="cut".')
        examples += [
            Example(ids, shifted(ids, trained), row.where, tokenizer.prefix(ids.tolist())) for ids, trained in pieces
        ]
    if not examples:
        raise DataError("there are no rows", "Give at least one conversation.")
    return examples


def ending_note(trained: np.ndarray) -> str:
    """What a header says where the token that ends an answer is not trained; `trained` counts the trained tokens of rows."""
    one = int((trained == 1).sum())
    return f"the token that ends an answer is not trained; {one:,} of {len(trained):,} rows have one trained token"


def _report_of(notes: dict[str, Any]) -> Report:
    values: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else v for k, v in notes.items()}
    return Report(**values)


def _tokenize(
    file: RowFile,
    numbers: np.ndarray,
    tokenizer: Tokenizer,
    settings: DataConfig,
    rate: float,
    cache: TokenCache | None,
    key: str,
) -> tuple[TokenStore, Report]:
    """Render the rows of a file into a store, in the cache's folder if there is a cache."""
    report = Report(ignored=Counter(dict.fromkeys(settings.ignored, 0)))
    if cache is None:
        with contextlib.ExitStack() as undo:
            out = undo.enter_context(unnamed_file())
            records, digest = _write(file, numbers, tokenizer, settings, report, Writer(out))
            undo.pop_all()
        return TokenStore(out, records, digest, file, rate), report
    with cache.write(key) as folder:
        with open(folder / "tokens", "wb") as out:
            records, digest = _write(file, numbers, tokenizer, settings, report, Writer(out))
        records.tofile(folder / "records")
        notes = {"digest": digest, "report": vars(report)}
        (folder / "notes.json").write_text(json.dumps(notes, ensure_ascii=False), encoding="utf-8")
    return TokenStore(open(cache.folder / key / "tokens", "rb"), records, digest, file, rate), report


def _write(
    file: RowFile, numbers: np.ndarray, tokenizer: Tokenizer, settings: DataConfig, report: Report, writer: Writer
) -> tuple[np.ndarray, str]:
    for number in numbers.tolist():
        report.rows += 1
        try:
            row = trainable(to_messages(file.value(number), file.where(number), settings.columns, settings.ignored))
            used, undefined = fill(row, settings.define)
            question, content = hashes(row)
            pieces, over = render_within(row, tokenizer, settings)
        except RowError as error:
            if not settings.skip_bad:
                raise _all_broken(error, file, numbers[numbers > number], settings) from None
            report.broken[error.reason] += 1
            report.first_broken = report.first_broken or error.what
            continue
        report.defined.update(used)
        report.ignored.update(row.ignored)
        report.undefined.update(undefined)
        report.shapes[row.shape] += 1
        report.unanswered += row.messages[-1]["role"] not in ("assistant", TEXT)
        report.marked += any(MARK.search(m["content"]) for m in row.messages)
        if over and settings.truncate == "error":
            raise DataError(f"{row.where} is over {over}", "Raise the limit, or say --truncate drop or --truncate cut.")
        if over and not pieces:
            report.dropped[over] += 1
            report.first_dropped = report.first_dropped or f"{row.where}, {_length(row, tokenizer, settings):,} tokens"
        elif over:
            report.cut[over] += 1
        for ids, trained in pieces:
            writer.add(ids, trained, number, question, content, tokenizer.prefix(ids.tolist()))
            report.examples += 1
            report.tokens += len(ids)
            report.trained += int(trained[1:].sum())
            report.longest = max(report.longest, len(ids))
    return writer.finish()


def _all_broken(error: RowError, file: RowFile, rest: np.ndarray, settings: DataConfig) -> DataError:
    """The error of the first row that cannot be used, with the number of those behind it."""
    more = Counter()
    for number in rest.tolist():
        try:
            trainable(to_messages(file.value(number), file.where(number), settings.columns, settings.ignored))
        except RowError as other:
            more[other.reason] += 1
    if not more:
        return error
    what = f"{error.what} (and {sum(more.values()):,} more rows cannot be used: {counted(more)})"
    return RowError(error.reason, what, f"{error.hint} --skip-bad leaves such rows out and counts them.")


Piece = tuple[np.ndarray, np.ndarray]


def render_within(row: Row, tokenizer: Tokenizer, settings: DataConfig) -> tuple[list[Piece], str | None]:
    """The (ids int64 [n], trained bool [n]) of a row within the limits, and the limit that it was over, if any.

    No piece if the row is over and may not be cut. RowError if the chat format does not take it or nothing of it is trained.
    """
    if row.shape == TEXT:
        return _text_pieces(row, tokenizer, settings.max_length), None
    ids, trained = render_row(row, tokenizer, settings)
    over = first = settings.over(int((~trained).sum()), int(trained.sum()))
    while over and settings.truncate == "cut":
        shorter = _shorten(row, tokenizer, settings, ids, trained)
        if shorter is None:
            break
        row = shorter
        ids, trained = render_row(row, tokenizer, settings)
        over = settings.over(int((~trained).sum()), int(trained.sum()))
    return ([] if over else [(ids, trained)]), first


def check_thoughts(row: Row, tokenizer: Tokenizer) -> None:
    """RowError if a message has a thought and the chat format has no place for one."""
    if any(m.get("thought") for m in row.messages) and not tokenizer.template.thinks:
        what = (
            f"{row.where}: a message has a thought, and the chat format {tokenizer.template.name} has no place for one"
        )
        hint = "Take a model that thinks, or leave the thoughts out: --ignore-keys reasoning_content (or as the key is called)."
        raise RowError("a thought without a place", what, hint)


def render_row(row: Row, tokenizer: Tokenizer, settings: DataConfig) -> Piece:
    check_thoughts(row, tokenizer)
    with _placed(row.where):
        rendered, mask = tokenizer.render(row.messages, loss_on=settings.loss_on, train_end=settings.train_end)
    ids, trained = np.array(rendered, dtype=np.int64), np.array(mask, dtype=bool)
    if not trained.any():
        what = f"{row.where}: there is nothing to learn, no token is trained"
        raise RowError("nothing trained", what, "Check loss_on and the row's loss keys.")
    return ids, trained


@contextlib.contextmanager
def _placed(where: str) -> Iterator[None]:
    """Name the row in what a chat format complains of."""
    try:
        yield
    except DataError as error:
        raise RowError("not for this chat format", f"{where}: {error.what}", error.hint) from None


def _length(row: Row, tokenizer: Tokenizer, settings: DataConfig) -> int:
    return len(render_row(row, tokenizer, settings)[0])


def _text_pieces(row: Row, tokenizer: Tokenizer, longest: int) -> list[Piece]:
    """A raw text and the token that ends a text, in pieces of `longest` tokens; all is trained but what opens a piece."""
    known = tokenizer.specials
    opening = [known[t] for t in ("[gMASK]", "<sop>", "sop") if t in known]
    ending = [known[t] for t in ("<|endoftext|>", "</s>", *tokenizer.template.stops) if t in known][:1]
    if tokenizer.template == CHATGLM:
        what = f"{row.where}: ChatGLM-6B's format has no place for raw text"
        raise RowError("not for this chat format", what, "Write it as prompt and response.")
    ids = tokenizer.encode_answer(row.messages[0]["content"]) + ending
    step = max(longest - len(opening), 2)
    pieces = [np.array(opening + ids[i : i + step], dtype=np.int64) for i in range(0, len(ids), step)]
    least = max(len(opening), 1)
    return [(piece, np.arange(len(piece)) >= least) for piece in pieces if len(piece) > least]


def _shorten(row: Row, tokenizer: Tokenizer, settings: DataConfig, ids: np.ndarray, trained: np.ndarray) -> Row | None:
    """The row with one text shortened at its end by what is too much: the last answer, or the question before it.

    The template around the texts stays whole, the stop token too. None if there is not enough to cut.
    """
    masked, targets = int((~trained).sum()), int(trained.sum())
    source_over = masked - (settings.max_source_length or masked)
    target_over = targets - (settings.max_target_length or targets)
    answer = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("loss", True))
    question = max((i for i, m in enumerate(row.messages[:answer]) if m["role"] == "user"), default=None)
    if target_over > 0:
        place, much = answer, target_over
    elif source_over > 0:
        place, much = question, source_over
    else:
        place, much = (answer if targets > masked or question is None else question), len(ids) - settings.max_length
    if place is None:
        return None
    content = tokenizer.encode(row.messages[place]["content"])
    text = tokenizer.decode(content[: max(len(content) - much, 0)]).rstrip("\ufffd")
    if not text.strip():
        return None
    messages = [m | {"content": text} if i == place else m for i, m in enumerate(row.messages)]
    return row._replace(messages=messages)


def hashes(row: Row) -> tuple[int, int]:
    """64-bit hashes of a row's question (all that stands before its last answer) and of the whole row."""
    texts = [(m["role"], m["content"]) for m in row.messages]
    last = max((i for i, (role, _) in enumerate(texts) if role == "assistant"), default=len(texts))
    return _hash64(texts[:last]), _hash64(texts)


def _hash64(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest(), "little")
