"""`minilora sweep`: several runs that differ in a setting, and one page that compares them. The file:

    base: {model: DIR, data: rows.json, lr: 2e-4}      # settings of minilora train
    zip: {max_source_length: [512, 1024], max_target_length: [128, 256]}      # values in step: two runs
    product: {lora_r: [8, 16]}                         # every combination: times two
    test: {rows: 100, max_tokens: 256}                 # rows set aside before any limit, or data: FILE; before: true asks each base model
    question: {ask: ..., compare: [lora_r], ...}       # what the page says of the runs, seed by seed (report/experiment.py)
    smoke: {base: {max_steps: 4}, ...}                 # with --smoke these take the place of the above

Runs go one after the other, each in its own process, so that peak memory is measured for each. A finished run is not run again,
a stopped one is resumed. `minilora:demo/mini` is a path inside the package.
"""

import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TrainConfig, must_match, to_yaml
from ..console import Console
from ..errors import DataError, Diverged, MiniloraError, OutOfMemory, OutputInUse, RowError, Stopped, UsageError
from ..files.atomic import atomic_folder, locked, require_place, sha256, write_file
from ..files.regular import read_file
from ..isolated import environment
from ..report.compare import compare
from ..report.experiment import Question
from ..report.page import check_page
from ..report.record import LETTERS, read_json_file, read_record
from ..report.score_table import shortened, show_scores
from ..rows.files import find_data, open_rows, read_row, validation_file
from ..rows.render import hashes
from ..rows.shapes import trainable
from ..rows.sources import draw, parse_sources
from ..rows.split import count_of, split
from ..run.signals import StopSignal
from ..settings import canonical, read_yaml, resolve
from ..terminal import as_words

PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE / "recipes"
# settings that a run which is kept must share beside must_match; files, which a resume knows by what they hold, go by their names
SAME_RUN = ("model", "data", "encoding", "val", "test", "mix_general", "define", "keep")
SECTIONS = ("base", "zip", "product", "test", "question", "smoke")
MOST_COMPARED, MOST_OF_A_QUESTION = len(LETTERS) - 1, 1000  # runs
MOST_OF_A_TEST = {"max_tokens": 2**31, "batch": 4096}  # as predict takes them
TEST_KEYS = {"data", "rows", "max_tokens", "batch", "before"}
GOES_ON_AFTER = {Diverged.code, OutOfMemory.code}  # a value that cannot be trained is a result as well


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, which is its folder's, and its settings."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Sweep:
    """The runs, the test and the question of a sweep file."""

    points: list[Point]
    test: dict[str, Any]
    question: dict[str, Any]  # checked; empty if it asks nothing


def read_sweep(given: str, output: Path, flags: dict[str, Any], smoke: bool = False) -> Sweep:
    """The Sweep of a file, or of a recipe by name; `flags` win over its base. UsageError before anything is run."""
    path = Path(given)
    if not path.is_file() and (RECIPES / f"{given}.yaml").is_file():
        path = RECIPES / f"{given}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise UsageError(f"{given} is not there", f"Give a yaml file, or one of the recipes: {names}.")
    spec = read_yaml(path)
    wrong = next((key for key in spec if key not in SECTIONS), None)
    if wrong is not None:
        raise UsageError(f"{path}: unknown section {wrong!r}", f"Sections are {', '.join(SECTIONS)}.")
    over = _section(spec, "smoke", path) if smoke else {}
    if smoke and not over:
        raise UsageError(f"{path} has no section smoke", "Leave --smoke out.")
    base = _section(spec, "base", path) | _section(over, "base", path) | flags
    varied = over if over.keys() & {"zip", "product"} else spec
    test = _section(spec, "test", path) | _section(over, "test", path)
    if test.keys() - TEST_KEYS or ("data" in test and "rows" in test):
        raise UsageError(
            f"{path}: test is {test}",
            f"It holds data or rows, and perhaps {', '.join(sorted(TEST_KEYS - {'data', 'rows'}))}.",
        )
    if not all(type(test[key]) is int and 0 < test[key] <= most for key, most in MOST_OF_A_TEST.items() if key in test):
        allowed = " and ".join(f"{key} is a whole number from 1 to {most:,}" for key, most in MOST_OF_A_TEST.items())
        raise UsageError(f"{path}: test is {test}", f"{allowed}.")
    question = _section(spec, "question", path)
    most = MOST_OF_A_QUESTION if question else MOST_COMPARED
    values = combinations(_lists(varied, "zip", path), _lists(varied, "product", path), str(path), most)
    names = [name_of(v) for v in values]
    points = []
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        if {canonical(k) for k in value} & {canonical(k) for k in flags}:
            raise UsageError(f"{path} varies {', '.join(value)}", "A flag cannot set what is varied.")
        name = f"{name}-{i + 1}" if names.count(name) > 1 else name
        settings = {k: v for k, v in base.items() if canonical(k) not in {canonical(x) for x in value}}
        config = resolve(_placed(settings | value), {"output": output / name})
        points.append(Point(name, config))
    if "rows" in test and any(point.config.objective == "dpo" for point in points):
        raise UsageError(f"{path}: rows of preferences cannot be asked", "Give test: data: FILE, of questions.")
    if question:
        Question.of(question, str(path)).places({point.name: vars(point.config) for point in points})
    elif test.get("before") and len(points) + len(bases := bases_of(points)) > len(LETTERS):
        what = f"{path} means {len(points):,} runs and {len(bases):,} base models that are asked too"
        raise UsageError(what, f"Its page shows at most {len(LETTERS)}: make several sweeps of it.")
    return Sweep(points, _placed(test), question)


def _section(spec: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = spec.get(name) or {}
    if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
        raise UsageError(f"{path}: {name} is {section!r}", "Write lines of `name: value` under it.")
    return section


def _lists(spec: dict[str, Any], name: str, path: Path) -> dict[str, list[Any]]:
    section = _section(spec, name, path)
    wrong = next((key for key, values in section.items() if not values or not isinstance(values, list)), None)
    if wrong is not None:
        raise UsageError(f"{path}: {name} has {wrong}: {section[wrong]!r}", "A list of values belongs there: [1, 2].")
    return section


def _placed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with paths inside the package resolved."""
    inside = {
        k: str(PACKAGE / v.removeprefix("minilora:")) for k, v in settings.items() if str(v).startswith("minilora:")
    }
    return settings | inside


def combinations(
    zipped: dict[str, list[Any]], crossed: dict[str, list[Any]], path: str, most: int
) -> list[dict[str, Any]]:
    """The values of `zipped` in step, times every combination of `crossed`; one empty point if nothing varies.

    UsageError for more than `most`, before any is made.
    """
    lengths = {key: len(values) for key, values in zipped.items()}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"{path}: zip has lists of {lengths}", "Lists that go in step are of one length.")
    if zipped.keys() & crossed.keys():
        raise UsageError(f"{path}: {min(zipped.keys() & crossed.keys())} stands in zip and in product", "Give it once.")
    runs = next(iter(lengths.values()), 1) * math.prod(map(len, crossed.values()))
    if runs > most:
        raise UsageError(
            f"{path} means {runs:,} runs, and its page shows at most {most:,}", "Make several sweeps of it."
        )
    steps = [dict(zip(zipped, values, strict=True)) for values in zip(*zipped.values(), strict=True)] or [{}]
    crosses = [dict(zip(crossed, values, strict=True)) for values in product(*crossed.values())]
    return [step | cross for step in steps for cross in crosses]


def name_of(values: dict[str, Any]) -> str:
    """A safe folder name made of the values."""
    text = ",".join(f"{key}={value}" for key, value in values.items()) or "run"
    return re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)[:100].strip(".") or "run"


def sweep(given: str, output: str, flags: dict[str, Any], smoke: bool = False, console: Console | None = None) -> Path:
    """Run a sweep, or the rest of it, into a folder; returns the page that compares its runs.

    A run that diverged or had too little memory does not end it, unless all did: what cannot be trained is a result as well.
    """
    console, folder = console or Console(), Path(output)
    plan = read_sweep(given, folder, flags, smoke)
    require_place(folder)
    if folder.is_dir() and not _is_sweep(folder) and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise OutputInUse(f"{folder} is not empty and holds no sweep", "Give another --output.")
    check_page(folder / "compare.html", twin=True)
    files = _hashes(plan)
    with locked(folder):
        files = _unchanged(folder, files)
        about = {"file": given, "smoke": smoke, "runs": [p.name for p in plan.points], "question": plan.question}
        write_file(folder / "sweep.json", json.dumps(about | {"files": files}) + "\n")
        points, test = _with_test(plan, folder, console)
        bases: dict[str, str] = {}  # of each model
        failed, names = [], shortened([p.name for p in points], max(console.width - 24, 8))
        for number, (point, name) in enumerate(zip(points, names, strict=True), 1):
            console.rule(f"{number} of {len(points)}: {name}", characters="-")
            code = _train(point)
            if code:
                failed.append((point.name, code))
                continue
            model, base = point.config.model, read_record(folder / point.name).base
            if bases.setdefault(model, base) != base:
                hint = "Give another --output, or put the old model back and delete the runs of the new one."
                raise OutputInUse(f"{model} has changed since {folder} was begun", hint)
            if test:
                _predict(point.config, test, folder / point.name / "predict", adapter=True)
        if len(failed) == len(points):
            raise _failure(failed[0][1], "each run")
        trained = [p for p in points if p.name not in dict(failed)]
        asked = bases_of(trained) if test and test.get("before") else {}
        for name, config in asked.items():
            _predict(config, test, folder / name, adapter=False)
        runs, before = [folder / p.name for p in trained], [folder / name for name in asked]
        compared = [] if plan.question else [*before, *runs] if len(runs) == 1 else [*runs, *before]
        page = folder / "compare.html"
        told = [f"{name} failed with exit code {code}" for name, code in failed]
        if plan.question:
            from .experiment import write_experiment  # has torch, for spectra; a wrong file is told without

            for line in write_experiment(folder, page, told):
                console.say(f"\n{line}")
        for line in compare([str(run) for run in compared], page, told) if len(compared) > 1 else []:
            console.say(line)
        if compared:
            console.print()
            show_scores([read_record(run) for run in compared], console)
        console.print()
        if plan.question or len(compared) > 1:
            console.say(f"page  {page}")
        for line in told:
            console.say(f"{line}; the same command tries it again")
    return page


def _is_sweep(folder: Path) -> bool:
    """Whether the sweep.json of a folder is what a sweep writes: other tools have a file of this name, and it may be the one that is read."""
    return (folder / "sweep.json").is_file() and {"file", "runs"} <= read_json_file(folder / "sweep.json").keys()


def _hashes(plan: Sweep) -> dict[str, str]:
    """sha256 of each file of rows that a sweep reads, by its path."""
    configs = [point.config for point in plan.points]
    texts = {t for c in configs for t in (c.data, c.mix_general)} | {str(plan.test.get("data", ""))}
    paths = {find_data(source.path)[0] for text in texts if text for source in parse_sources(text)}
    paths |= {validation_file(c.val or c.data) for c in configs if c.val or Path(c.data).is_dir()}
    return {str(path): sha256(path) for path in sorted(paths) if path.is_file()}  # a share of rows is none


def _unchanged(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """The files with those of before; OutputInUse if a sweep was begun with other rows in files of these names: runs that are finished have not seen the new ones."""
    about = read_json_file(folder / "sweep.json") if (folder / "sweep.json").is_file() else {}
    then = found if isinstance(found := about.get("files"), dict) else {}
    changed = [path for path in files if then.get(path, files[path]) != files[path]]
    if changed:
        what = f"{', '.join(changed)} has changed since {folder} was begun"
        raise OutputInUse(what, "Give another --output, or put the old rows back.")
    return then | files


def _with_test(plan: Sweep, folder: Path, console: Console) -> tuple[list[Point], dict[str, Any]]:
    """The points, and the test set: rows set aside from the data file before any limit, the same for every run."""
    if "rows" not in plan.test:
        return plan.points, plan.test
    sources = {p.config.data for p in plan.points}
    if len(sources) > 1:
        raise UsageError("test rows cannot be set aside of several data files", "Give test: data: FILE.")
    config, target = plan.points[0].config, folder / "data"
    sides = {f"{name}.jsonl": text.encode() for name, text in _sides(config, str(plan.test["rows"]), console).items()}
    if not target.is_dir():
        with atomic_folder(target) as stage:
            for name, content in sides.items():
                (stage / name).write_bytes(content)
    elif any(read_file(target / name, DataError) != content for name, content in sides.items()):
        raise OutputInUse(f"{target} holds the division of other rows, or by another seed", "Give another --output.")
    points = [
        Point(p.name, resolve(p.config.__dict__, {"data": target / "train.jsonl", "encoding": ""})) for p in plan.points
    ]
    return points, plan.test | {"data": str(target / "test.jsonl")}


def _sides(config: TrainConfig, wanted: str, console: Console) -> dict[str, str]:
    """The rows of a run's data file that are trained, and those set aside for the test, as the texts of two jsonl files."""
    source, *more = parse_sources(config.data)
    if more or source.rate != 1:
        raise UsageError(
            f"test rows cannot be set aside of {config.data}", "Give one file (path#n is), or test: data: FILE."
        )
    file = open_rows(source.path, config)
    if file.note:
        console.say(f"{source.path}: {file.note}")
    numbers = draw(source, len(file), config.seed)
    rows, kept = [], []
    for i in numbers.tolist():
        try:
            rows.append(trainable(read_row(file, i, config)))
        except RowError:
            if not config.skip_bad:
                raise
        else:
            kept.append(i)
    numbers = np.array(kept, np.int64)
    questions = np.array([hashes(row)[0] for row in rows], np.uint64)
    parts = split(questions, [count_of("test", wanted, len(rows))], config.seed)
    lines = ((json.dumps(file.value(i), ensure_ascii=False) + "\n" for i in sorted(numbers[p].tolist())) for p in parts)
    return dict(zip(("train", "test"), map("".join, lines), strict=True))


def _train(point: Point) -> int:
    """Train a point, or the rest of it; returns 0, or the exit code of a failure that does not end the sweep."""
    folder = Path(point.config.output)
    if (folder / "config.yaml").is_file():
        then = resolve(read_yaml(folder / "config.yaml"))
        same = all(getattr(then, name) == getattr(point.config, name) for name in SAME_RUN)
        if not same or must_match(then) != must_match(point.config):
            raise OutputInUse(f"{folder} holds a run of other settings", "Give another --output, or delete that run.")
        saved, finished = any(folder.glob("checkpoints/step-*")), read_record(folder).finished
        if finished and any((folder / name).is_dir() for name in ("adapter", "model")):
            return 0
        # a run that was killed before its first snapshot has no link to one, and no answers
        kept = saved or (folder / "checkpoints" / "last").is_symlink() or (folder / "predict").is_dir()
        if finished and kept and not saved:
            raise OutputInUse(
                f"{folder} holds a finished run whose weights are gone",
                "Delete it to train it again, or put them back.",
            )
    if any(folder.glob("checkpoints/step-*")):
        return _child("train", "--output", folder, "--resume")
    settings = folder.parent / f"{point.name}.yaml"
    write_file(settings, to_yaml(point.config))
    return _child("train", "-c", settings, *(["--overwrite"] if folder.is_dir() and any(folder.glob("*")) else []))


def bases_of(points: list[Point]) -> dict[str, TrainConfig]:
    """Each base that the runs started from, with how it is asked, as a run's settings by the name of a folder: the first run's of those that share it."""
    firsts: dict[tuple[str, ...], Point] = {}
    for point in points:
        firsts.setdefault((point.config.model, *_base_flags(point.config)), point)
    return {f"before-{p.name}" if len(firsts) > 1 else "before": p.config for p in firsts.values()}


def _base_flags(config: TrainConfig) -> list[str]:
    """The flags with which predict loads the base and reads rows as a run did."""
    quant = [] if config.quant == "keep" else ["--quant", config.quant]
    return quant + config.reading_flags() + ([] if config.device == "auto" else ["--device", config.device])


def _predict(config: TrainConfig, test: dict[str, Any], output: Path, adapter: bool) -> None:
    """Answer the test set with the run's adapter (or its whole model), or with the base model."""
    run = Path(config.output)
    model = run / "model" if adapter and config.method == "full" else config.model
    words: list[object] = ["--model", Path(model), "--data", Path(test["data"]), "--output", output]
    words += _base_flags(config)
    if adapter and config.method != "full":
        words += ["--adapter", run / "adapter"]
    for key in ("max_tokens", "batch"):
        words += [f"--{key.replace('_', '-')}", test[key]] if key in test else []
    code = _child("predict", *words, "--json")  # one table at the end has the scores of all runs
    if code:
        raise _failure(code, f"minilora predict into {output}")


def _child(*words: object) -> int:
    """Run minilora in its own process and pass a stop signal on to it, once; Stopped or an error ends the sweep."""
    command = [sys.executable, "-m", "minilora", *as_words(words)]
    with StopSignal() as stop:
        # its own process group: it must not get Ctrl-C from the terminal as well, because a second signal ends a run at once
        out = subprocess.DEVNULL if "--json" in words else None
        child = subprocess.Popen(command, env=environment(), process_group=0, stdout=out)
        passed_on = False
        while True:
            try:
                code = child.wait(0.3)
                break
            except subprocess.TimeoutExpired:
                if stop.requested and not passed_on:
                    child.send_signal(signal.SIGTERM)
                    passed_on = True
    if stop.requested or code == Stopped.code:
        raise Stopped(
            f"stopped by {stop.name or 'a signal'}; what was done is kept", "The same command goes on from there."
        )
    if code and code not in GOES_ON_AFTER:
        raise _failure(code, f"minilora {words[0]}")
    return code


def _failure(code: int, what: str) -> MiniloraError:
    error = MiniloraError(f"{what} failed", "The line above says why; the same command goes on after it is put right.")
    error.code = code
    return error
