"""Split files of rows into train, val and test files, with hashes that show later which row went where."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from ..errors import DataError, UsageError
from ..files.atomic import new_folder, require_empty
from ..rows import Row, RowError, open_rows, to_messages
from ..rows.duplicates import NearDuplicates
from ..rows.render import hashes
from ..rows.report import counted
from ..rows.shapes import check_answers, check_columns
from ..rows.sources import draw, parse_sources
from ..rows.split import counts_of, split


def split_files(
    data: str, wanted: dict[str, str], output: Path, settings: DataConfig, drop_duplicates: bool, seed: int
) -> list[str]:
    """Write output/train.jsonl and a file for each side wanted, rows unchanged; returns the lines that report it.

    A rate above 1 repeats no row. split.json has the seed and the hashes of each source and of each row.
    """
    require_empty(output)
    if not wanted:
        raise UsageError("neither --val nor --test is given", "For example --val 0.05 --test 200.")
    check_columns(settings.columns)
    rows, values, bad, sums, notes = _read(data, settings, seed)
    if not rows:
        raise DataError(f"{data}: no row can be used ({counted(bad) or 'there is none'})", "Correct the rows.")
    keys = np.array([hashes(row) for row in rows], dtype=np.uint64)
    keep = np.arange(len(rows))
    lines = [f"data     {data}   {len(rows):,} rows", *(f"         {note}" for note in notes)]
    if bad:
        lines.append(f"         left out {sum(bad.values()):,} rows: {counted(bad)}")
    same = len(rows) - len(np.unique(keys[:, 1]))
    if drop_duplicates:
        keep = np.sort(np.unique(keys[:, 1], return_index=True)[1])
    if same:
        lines.append(f"         {same:,} rows are duplicates" + (" and left out" if drop_duplicates else ""))
    parts = split(keys[keep, 0], counts_of(wanted, len(keep)), seed)
    sides = {name: keep[part] for name, part in zip(["train", *wanted], parts, strict=True)}
    table: dict[str, Any] = {"seed": seed, "sources": sums, "rows": {}, "near": [], "hashes": {}}
    table["near"], told = _near(sides, rows)
    with new_folder(output) as stage:
        for name, part in sides.items():
            text = "".join(json.dumps(values[i], ensure_ascii=False) + "\n" for i in part.tolist())
            (stage / f"{name}.jsonl").write_text(text, encoding="utf-8")
            table["rows"][name] = len(part)
            table["hashes"][name] = [f"{h:016x}" for h in keys[part, 1].tolist()]
            sha256 = hashlib.sha256(text.encode()).hexdigest()
            lines.append(f"{name:<9}{len(part):,} rows   {output / name}.jsonl   sha256 {sha256[:16]}")
        (stage / "split.json").write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return [*lines, *told]


def _read(
    data: str, settings: DataConfig, seed: int
) -> tuple[list[Row], list[Any], Counter, dict[str, str], list[str]]:
    rows, values, bad, sums, notes = [], [], Counter(), {}, []
    for source in parse_sources(data):
        file = open_rows(source.path, settings)
        sums[source.path] = file.sha256
        notes += [f"{source.path}: {file.note}"] * bool(file.note)
        for number in draw(source, len(file), seed).tolist():
            try:
                value = file.value(number)
                row = to_messages(value, file.where(number), settings)
                check_answers(row)
                rows.append(row)
                values.append(value)
            except RowError as error:
                if not settings.skip_bad:
                    raise
                bad[error.reason] += 1
    return rows, values, bad, sums, notes


def _near(sides: dict[str, np.ndarray], rows: list[Row]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the other sides that are nearly a training row, and the lines that report them."""
    near, found, told = NearDuplicates(), [], []
    for i in sides["train"].tolist():
        near.add(_text(rows[i]), rows[i].where)
    for name in list(sides)[1:]:
        for i in sides[name].tolist():
            like = near.like(_text(rows[i]))
            if like is not None:
                found.append({"side": name, "row": rows[i].where, "train": like[0], "alike": round(like[1], 2)})
    told.append("leakage  no question, with all that stands before it, is on two sides")
    if found:
        first = found[0]
        told.append(
            f"         {len(found):,} rows of val and test are nearly a training row (first: {first['row']}, about "
            f"{100 * first['alike']:.0f} % like {first['train']}); split.json names them"
        )
    return found, told


def _text(row: Row) -> str:
    return " ".join(m["content"] for m in row.messages)
