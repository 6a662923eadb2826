"""What an adapter learned: how much it changes each linear, in how many directions, and where these lie beside the base's.

dW = scale * B A is never made. With QR of B = Q_b R_b and of A^T = Q_a R_a, the singular values of dW are those of the small
R_b R_a^T, and its singular vectors are theirs, rotated by Q_b and Q_a.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from minilora.kernels.quantized import QuantizedWeight, Weight, weight_as

from ..checkpoint.factors import Factors, read_factors
from ..checkpoint.load import empty_model, read_config
from ..checkpoint.quantized import Stored
from ..config import TrainConfig
from ..errors import ModelError
from ..files.model_folder import Folder, ModelFolder
from ..lora import adapters, add_lora
from ..run.snapshot import snapshots, step_of

DEAD = 0.01  # of the median change: a linear below it has not learned
KEPT = 0.99  # of the energy, the sum of the squared singular values, that a smaller rank shall keep
TOP = 0.1  # of W's singular directions count as its strong ones
STRONGEST = 10  # singular directions of W + dW are looked at, and one is an intruder
INTRUDER = 0.5  # if none of W's has a larger cosine with it (Shuttleworth et al., 2024, arXiv 2410.21228)


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of dW: u [N, R], s [R] from the largest on, v [K, R]."""

    u: Tensor
    s: Tensor
    v: Tensor

    @staticmethod
    def of(f: Factors) -> "Spectrum":
        q_b, r_b = torch.linalg.qr(f.b)
        q_a, r_a = torch.linalg.qr(f.a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        return Spectrum(q_b @ u, abs(f.scale) * s, q_a @ vh.T)

    def first(self, rank: int) -> Factors:
        """The closest adapter of a smaller rank (Eckart and Young, 1936), of scale 1, with A and B of equal size."""
        root = self.s[:rank].sqrt()
        return Factors((self.v[:, :rank] * root).T.contiguous(), self.u[:, :rank] * root)


@dataclass(frozen=True)
class BesideBase:
    """A change beside the weight W that it is added to."""

    relative: float  # ||dW|| / ||W||, Frobenius norms
    strong: float  # share of the energy of dW in W's strong directions, of its inputs and its outputs
    by_chance: float  # the same share of a random dW
    intruders: int  # of the STRONGEST directions of W + dW


@dataclass(frozen=True)
class Change:
    """What the adapter of one linear does."""

    path: str
    shape: tuple[int, int]  # [N, K]
    r: int
    norm: float  # ||dW||, Frobenius
    values: list[float]  # the singular values of dW
    effective_rank: float
    rank_90: int  # that keeps 90 % of the energy
    rank_99: int
    dead: bool = False
    rotated: float | None = None  # 1 - overlap of what A reads with what it read at the start of the run
    base: BesideBase | None = None

    @property
    def layer(self) -> str:
        return next((part for part in self.path.split(".") if part.isdigit()), "")

    @property
    def name(self) -> str:
        return self.path.split(".")[-1]

    @property
    def rms(self) -> float:
        """Of the elements of dW, which linears of different shapes have in common."""
        return self.norm / (self.shape[0] * self.shape[1]) ** 0.5


@dataclass(frozen=True)
class Likeness:
    """Two adapters on one linear."""

    path: str
    cosine: float  # of the two dW as vectors
    outputs: float  # overlap of what they write: the mean of the squared cosines of the principal angles; 1 if one holds the other
    inputs: float  # overlap of what they read


@dataclass(frozen=True)
class Moment:
    """A checkpoint beside the adapter that is inspected, over all linears."""

    step: int
    norm: float  # ||dW|| there / ||dW||
    cosine: float


@dataclass
class AdapterInspection:
    """An adapter, linear by linear; what was not asked for is empty."""

    folder: str
    changes: list[Change]
    drift: list[Moment] = field(default_factory=list)
    other: str = ""
    likeness: list[Likeness] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_adapter(
    folder: Path,
    model: Folder | None = None,
    other: Path | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> AdapterInspection:
    """The inspection of an adapter's folder, or of a run's, which has a start and checkpoints beside it.

    With its base, each change is also compared with the weight below it; `progress` is called with (done, all) of these, since
    the singular directions of W take time. Raises ModelError for a folder that is no adapter, or of another base.
    """
    run = folder if (folder / "config.yaml").is_file() else folder.parent
    factors = read_factors(folder / "adapter" if run == folder else folder)
    spectra = {path: Spectrum.of(f) for path, f in factors.items()}
    changes = _mark_dead([_change(path, factors[path], s) for path, s in spectra.items()])
    found = AdapterInspection(str(folder), changes)
    if (run / "config.yaml").is_file():
        starts = _starts(run, factors)
        found.changes = [replace(c, rotated=starts.get(c.path)) for c in changes]
        found.drift = [_moment(p, factors) for p in sorted(snapshots(run / "checkpoints"), key=step_of)]
    if model is not None:
        found.changes = _beside_base(found.changes, factors, spectra, ModelFolder.of(model), progress)
    if other is not None:
        found.other, found.likeness = str(other), compare_adapters(spectra, factors, other)
    return found


def _change(path: str, f: Factors, spectrum: Spectrum) -> Change:
    s = spectrum.s
    return Change(
        path, f.shape, f.r, float(s.norm()), s.tolist(), effective_rank(s), rank_for(s, 0.9), rank_for(s, KEPT)
    )


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007): R if all are equal; 0 if all are 0."""
    if not s.any():
        return 0.0
    p = s / s.sum()
    return float(torch.special.entr(p).sum().exp())


def rank_for(s: Tensor, share: float) -> int:
    """The smallest rank whose singular values have this share of the energy."""
    energy = s.square().cumsum(0)
    return int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1 if s.any() else 0


def _mark_dead(changes: list[Change]) -> list[Change]:
    usual = median(c.rms for c in changes)
    return [replace(c, dead=c.rms <= DEAD * usual) for c in changes]


def overlap(one: Tensor, other: Tensor) -> float:
    """Of two spaces with orthonormal bases [n, i] and [n, j]: the mean squared cosine of their min(i, j) principal angles."""
    return float((one.T @ other).square().sum() / max(min(one.shape[1], other.shape[1]), 1))


def _starts(run: Path, factors: dict[str, Factors]) -> dict[str, float]:
    """Change.rotated by path.

    The start is drawn again from the run's seed. Empty for a run whose base is not there any more, or that began otherwise.
    """
    from ..settings import read_yaml, resolve

    config: TrainConfig = resolve(read_yaml(run / "config.yaml"))
    ranks = {f.r for f in factors.values()}
    if config.method != "lora" or config.lora_init != "kaiming" or config.lora_r not in ranks:
        return {}
    try:
        model = empty_model(read_config(config.model)).to_empty(device="cpu")  # memory that is never touched
    except ModelError:
        return {}
    add_lora(model, config.lora_targets, config.lora_r, config.lora_alpha, seed=config.seed)
    return {
        path: 1 - overlap(*(torch.linalg.qr(a.double().T)[0] for a in (start.lora_A.detach(), factors[path].a)))
        for path, start in adapters(model)
        if path in factors and start.lora_A.shape == factors[path].a.shape  # of a base that was replaced it is not
    }


def _moment(checkpoint: Path, end: dict[str, Factors]) -> Moment:
    there = read_factors(checkpoint)
    both = [(there[path], f) for path, f in end.items() if path in there and there[path].shape == f.shape]
    inner, then, now = (
        sum(x.dot(y) for x, y in pairs) for pairs in (both, [(x, x) for x, _ in both], [(y, y) for _, y in both])
    )
    return Moment(step_of(checkpoint), (then / now) ** 0.5 if now else 0.0, cosine(inner, then, now))


def cosine(inner: float, one: float, other: float) -> float:
    """Of two vectors by their inner product and their squared norms; 0 if one is 0."""
    return inner / (one * other) ** 0.5 if one > 0 and other > 0 else 0.0


def compare_adapters(spectra: dict[str, Spectrum], factors: dict[str, Factors], other: Path) -> list[Likeness]:
    """This adapter and another one, on the linears that both have; ModelError if they have none or differ in shape."""
    others = read_factors(other)
    both = [path for path in factors if path in others]
    if not both:
        raise ModelError(f"{other} has no linear in common with this adapter", "Compare adapters of one model.")
    found = []
    for path in both:
        one, two = factors[path], others[path]
        if one.shape != two.shape:
            raise ModelError(
                f"{other}: {path} has another shape than in this adapter", "Compare adapters of one model."
            )
        (u1, v1), (u2, v2) = _spaces(spectra[path]), _spaces(Spectrum.of(two))
        alike = cosine(one.dot(two), one.dot(one), two.dot(two))
        found.append(Likeness(path, alike, overlap(u1, u2), overlap(v1, v2)))
    return found


def _spaces(s: Spectrum) -> tuple[Tensor, Tensor]:
    """Bases of what dW writes and of what it reads: the directions that hold KEPT of its energy."""
    rank = rank_for(s.s, KEPT)
    return s.u[:, :rank], s.v[:, :rank]


def _beside_base(
    changes: Iterable[Change],
    factors: dict[str, Factors],
    spectra: dict[str, Spectrum],
    model: ModelFolder,
    progress: Callable[[int, int], None],
) -> list[Change]:
    changes, stored = list(changes), Stored.of(model, empty_model(read_config(model)))
    done = []
    for i, change in enumerate(changes):
        with stored.reading_linear(change.path, torch.Size(change.shape)) as value:
            w = in_fp32(value)
            if tuple(w.shape) != change.shape:
                raise ModelError(
                    f"{model}: {change.path}.weight is {list(w.shape)}, the adapter is for {list(change.shape)}",
                    "Give the base that the adapter was trained on.",
                )
            done.append(replace(change, base=beside(w, factors[change.path], spectra[change.path])))
        progress(i + 1, len(changes))
    return done


def in_fp32(value: Weight) -> Tensor:
    """A weight of a folder, quantised or not."""
    return weight_as(value, torch.float32) if isinstance(value, QuantizedWeight) else value.float()


def beside(w: Tensor, f: Factors, spectrum: Spectrum) -> BesideBase:
    """A change beside its weight W fp32 [N, K]. Singular directions are those of the shorter side, by W W^T or W^T W."""
    a, b = f.a.float(), f.b.float()
    if w.shape[0] > w.shape[1]:
        w, a, b = w.T, b.T, a.T
        spectrum = Spectrum(spectrum.v, spectrum.s, spectrum.u)
    squares, directions = torch.linalg.eigh(w @ w.T)  # ascending
    top = max(round(TOP * w.shape[0]), 1)
    strong = directions[:, -top:]
    across = (w.T @ strong) / squares[-top:].clamp(min=1e-30).sqrt()
    u, v = spectrum.u.float() * spectrum.s.float(), spectrum.v.float()
    energy = float(spectrum.s.square().sum())
    inside = float(((strong.T @ u) @ (v.T @ across)).square().sum())
    tuned = torch.addmm(w, b, a, alpha=f.scale)
    _, strongest = torch.linalg.eigh(tuned @ tuned.T)
    nearest = (directions.T @ strongest[:, -STRONGEST:]).abs().amax(0)
    return BesideBase(
        relative=energy**0.5 / max(float(w.norm()), 1e-30),
        strong=inside / energy if energy else 0.0,
        by_chance=top * top / w.numel(),
        intruders=int((nearest < INTRUDER).sum()),
    )


def in_layers(path: str) -> str:
    """A path with a star for the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", path)
