"""How robust is this embedding: every query under every attack, and each under its worst."""

from __future__ import annotations

import math
import platform
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..isolation import isolated, random_stream
from ..pixels import Normalization, PixelSpace
from ..plan import rank_in_group
from . import scores
from .bench import Bench, whole_numbers
from .checks import run_checks
from .images import Images
from .report import TARGETS, AttackResult, Example, Neighbour, Report, WorstCase
from .resume import Folder
from .retrieval import chunks, embed_all, unit
from .scores import PerQuery
from .suites import SUITES, AnyAttack, Scene, like

NORMS = ("Linf", "L2")
_NEIGHBOURS, _EXAMPLES = 5, 8

Part = dict[str, Any]
"""What is known of a chunk, in tensors: per-query measures, costs, and what is to be shown."""


def evaluate_robustness(
    model: nn.Module,
    queries: Images,
    gallery: Images | None = None,
    *,
    eps: float | Iterable[float],
    attacks: str | Sequence[AnyAttack] = "standard",
    norm: str = "Linf",
    recall_at: Sequence[int] = (1, 2, 4, 8),
    normalization: Normalization | None = None,
    subset: Sequence[int] | Tensor | None = None,
    own: Sequence[int] | Tensor | None = None,
    gallery_embeddings: Tensor | None = None,
    nmi: bool = False,
    checks: bool = True,
    keep_attacked: bool = False,
    seed: int = 0,
    chunk: int = 128,
    resume: str | Path | None = None,
    progress: bool = False,
) -> Report:
    """Attacks every query, and items of the gallery for every query, and says what is left of retrieval.

    A query stands if its nearest item is right, without attack and under every attack from every start. Ties count
    against it. The gallery is embedded once; items are compared by cosine similarity. What fails at one eps fails
    at every larger one, since its perturbation is allowed there.

    Args:
        model: images -> embeddings ``(N, D)``; attacked in eval mode, and it comes back as it was.
        queries: ``(images, labels)`` or a data set of pairs; pixels in [0, 1].
        gallery: the same; None: the queries themselves, of which none ever finds itself (leave one out).
        eps: radii, in pixels of [0, 1].
        attacks: "standard", "quick", or attacks such as `suites.standard` returns.
        norm: "Linf" or "L2".
        recall_at: the k of R@k; 1 is always among them.
        normalization: ``(mean, std)`` if the model takes normalised inputs; images are given as pixels all the same.
        subset: indices of the queries to attack; None: all. Without a gallery all others are searched nevertheless.
        own: where queries are in the gallery that is given: each query's index there, -1 for one that is not. It is
            never found.
        gallery_embeddings: ``(G, D)``, if the model's embeddings of the gallery are known.
        nmi: whether to cluster the embeddings too (needs faiss).
        checks: whether to ask for signs of a false claim, see `checks`.
        keep_attacked: whether to keep the perturbed queries, all at once in memory.
        seed: of all random choices.
        chunk: queries that are attacked together.
        resume: folder in which finished chunks are kept; a run that was cut off goes on from there.
        progress: whether to show progress bars (needs tqdm).

    Raises:
        InputError: inputs that cannot be evaluated, or a ``resume`` folder of another evaluation.
    """
    radii = to_radii(eps)
    suite, members = to_suite(attacks)
    recall_at = sorted({1, *whole_numbers(recall_at, "recall_at")})
    check_options(norm, chunk, recall_at, radii)
    PixelSpace(normalization)  # checks it
    bar = _bars(progress)
    settings: dict[str, Any] = {
        "eps": list(radii),
        "norm": norm,
        "attacks": [attack.name for attack in members],
        "recall_at": recall_at,
        "normalization": None if normalization is None else [list(map(float, part)) for part in normalization],
        "subset": None if subset is None else whole_numbers(subset, "subset"),
        "own": None if own is None else whole_numbers(own, "own"),
        "nmi": nmi,
        "checks": checks,
        "keep_attacked": keep_attacked,
        "seed": seed,
        "chunk": chunk,
    }
    with isolated(model), random_stream(seed, -1):
        bench = Bench(model, queries, gallery, norm, normalization, own)
        folder = Folder(resume, settings, bench, members)
        known = None if gallery_embeddings is None else gallery_embeddings.to(bench.items.labels.device)
        bench.search(folder.once("gallery", lambda: _embed_gallery(bench, chunk, bar)) if known is None else known)
        rows, left_out = bench.answerable(subset)
        members = tuple(attack for attack in members if attack.num_classes <= len(bench.gallery.classes))
        run = _Run(bench, members, radii, recall_at, seed, keep_attacked, nmi)
        pieces = [rows[piece] for piece in chunks(len(rows), chunk)]
        with bar(total=len(pieces) * run.num_steps, desc=suite) as shown:
            parts = []
            for number, piece in enumerate(pieces):
                parts.append(folder.once(f"chunk_{number:05d}", lambda: run.chunk(piece, number == 0, shown.update)))  # noqa: B023
                shown.update((number + 1) * run.num_steps - shown.n)
        results = run.results(parts)
        clean, labels = _joined(parts, "clean"), bench.queries.labels[rows]
        return Report(
            suite=suite,
            protocol="leave-one-out" if bench.leave_one_out else "separate gallery",
            num_queries=len(rows),
            num_gallery=len(bench.gallery),
            num_classes=len(bench.gallery.classes),
            left_out=left_out,
            clean=_means(clean),
            chance=_chance(bench, rows),
            attacks=results,
            worst=run.worst(parts, labels),
            collapse=scores.collapse(bench.gallery),
            nmi=run.nmi_of(parts, "clean", labels) if nmi else None,
            checks=run_checks(bench, rows, _marks(clean), results, seed, chunk) if checks else (),
            settings={**settings, "device": str(bench.gallery.embeddings.device)},
            versions=_versions(),
            clean_standing=_marks(clean),
            examples=_examples(bench, parts[0], members),
            attacked={eps: torch.cat([part["attacked"][str(eps)] for part in parts]) for eps in radii}
            if keep_attacked
            else None,
        )


@dataclass(frozen=True)
class _Run:
    """All attacks at all eps, on one chunk of queries after the other."""

    bench: Bench
    members: tuple[AnyAttack, ...]
    radii: tuple[float, ...]
    recall_at: Sequence[int]
    seed: int
    keep_attacked: bool
    nmi: bool

    @property
    def num_steps(self) -> int:
        """How often a chunk reports progress."""
        return len(self.radii) * sum(attack.restarts for attack in self.members)

    def chunk(self, rows: Tensor, first: bool, advance: Callable[[], object]) -> Part:
        """Attacks some queries; the first chunk also gives the examples."""
        scene = self.bench.scene(rows)
        depth = max(int(self.bench.gallery.num_right(scene.sought).max()), *self.recall_at)
        clean = scores.per_query(self.bench.gallery.ranking(scene.clean, scene.sought, depth), self.recall_at)
        part: Part = {"clean": clean, "attacked": {}, "embeddings": {"clean": scene.clean} if self.nmi else {}}
        measures = dict.fromkeys((attack.name for attack in self.members), clean)
        worst, by, at = scene.images.clone(), torch.full_like(rows, -1), torch.zeros(len(rows), dtype=torch.float64)
        for eps in self.radii:
            for number, attack in enumerate(self.members):
                stream = partial(_stream, attack.name, eps, int(rows[0]))
                result, images = self._attack(attack, scene, eps, measures[attack.name], depth, stream, advance)
                measures[attack.name] = result["measures"]
                part[_key(attack, eps)] = result
                if attack.target == "query":
                    taken = (by < 0) & ~result["shift"].isnan()
                    worst = torch.where(like(taken, worst), images, worst)
                    fell = taken & (result["measures"]["recall_at_1"] == 0)
                    by[fell], at[taken.cpu()] = number, eps
            if self.keep_attacked:
                part["attacked"][str(eps)] = worst.clone()
            if self.nmi:
                part["embeddings"][str(eps)] = embed_all(self.bench.embed, worst, len(worst))
            if first and eps == self.radii[len(self.radii) // 2]:
                part["examples"] = self._examples(scene, rows, clean, worst, by, at)
        return part

    def _attack(
        self,
        attack: AnyAttack,
        scene: Scene,
        eps: float,
        before: PerQuery,
        depth: int,
        stream: Callable[[int], int],
        advance: Callable[[], object],
    ) -> tuple[Part, Tensor]:
        """One attack, all its restarts: of each query's measures the lowest, and what it was perturbed to."""
        embed, start = self.bench.embed, time.perf_counter()
        passes = embed.forward_passes, embed.backward_passes
        measures = {name: values.clone() for name, values in before.items()}
        images = scene.images.clone()
        shift = torch.full((len(scene),), torch.nan, device=images.device)
        for restart in range(attack.restarts):
            standing = measures["recall_at_1"] > 0
            everyone = restart == 0 and not attack.only_standing
            chosen = (torch.ones_like(standing) if everyone else standing).nonzero().squeeze(1)
            if len(chosen):
                with random_stream(self.seed, stream(restart)):
                    outcome = attack.run(scene[chosen], eps, restart, depth)
                found = scores.per_query(outcome.ranking, self.recall_at)
                met = (standing[chosen] | (found["recall_at_1"] == 0)).nonzero().squeeze(1)  # not: failed, now stands
                images[chosen[met]] = outcome.images[met]
                for name, values in found.items():
                    measures[name][chosen] = torch.minimum(measures[name][chosen], values)
                shift[chosen] = outcome.shift.to(shift).fmax(shift[chosen])
            advance()
        cost = [embed.forward_passes - passes[0], embed.backward_passes - passes[1], time.perf_counter() - start]
        return {"measures": measures, "shift": shift, "cost": torch.tensor(cost, dtype=torch.float64)}, images

    def _examples(self, scene: Scene, rows: Tensor, clean: PerQuery, worst: Tensor, by: Tensor, at: Tensor) -> Part:
        chosen = choose_queries(scene.sought.labels, (by >= 0) & (clean["recall_at_1"] > 0), _EXAMPLES)
        part = scene[chosen]
        gallery, count = self.bench.gallery, min(_NEIGHBOURS, len(self.bench.gallery) - 1)
        return {
            "eps": at[chosen.cpu()],
            "queries": rows[chosen],
            "by": by[chosen],
            "clean": part.images,
            "perturbed": worst[chosen],
            "before": gallery.nearest(part.clean, part.sought.own, count),
            "after": gallery.nearest(embed_all(self.bench.embed, worst[chosen], len(chosen)), part.sought.own, count),
        }

    def results(self, parts: Sequence[Part]) -> tuple[AttackResult, ...]:
        """What is left under each attack."""
        found = []
        for eps in self.radii:
            for attack in self.members:
                key = _key(attack, eps)
                measures = _joined([part[key] for part in parts], "measures")
                shift = torch.cat([part[key]["shift"] for part in parts])
                forward, backward, seconds = torch.stack([part[key]["cost"] for part in parts]).sum(0).tolist()
                found.append(
                    AttackResult(
                        attack=attack.name,
                        target=attack.target,
                        black_box=attack.black_box,
                        eps=eps,
                        measures=_means(measures),
                        shift=shift.nanmean().nan_to_num(0.0).item(),
                        forward_passes=int(forward),
                        backward_passes=int(backward),
                        seconds=seconds,
                        standing=_marks(measures),
                    )
                )
        return tuple(found)

    def worst(self, parts: Sequence[Part], labels: Tensor) -> tuple[WorstCase, ...]:
        """What is left if each query meets the worst attack for it, by target and eps."""
        found = []
        for target in TARGETS:
            lowest = _joined(parts, "clean")
            members = [attack for attack in self.members if attack.target == target]
            for eps in self.radii if members else ():
                for attack in members:
                    measures = _joined([part[_key(attack, eps)] for part in parts], "measures")
                    lowest = {name: torch.minimum(values, measures[name]) for name, values in lowest.items()}
                nmi = self.nmi_of(parts, str(eps), labels) if self.nmi and target == "query" else None
                found.append(WorstCase(target, eps, _means(lowest), _marks(lowest), nmi))
        return tuple(found)

    def nmi_of(self, parts: Sequence[Part], key: str, labels: Tensor) -> float:
        """Of the queries, clean or each under its worst attack."""
        return scores.nmi(unit(torch.cat([part["embeddings"][key] for part in parts])), labels)


def choose_queries(labels: Tensor, preferred: Tensor, count: int) -> Tensor:
    """Up to ``count`` queries to show: one of each class before a second of any, preferred ones first."""
    order = preferred.to(torch.uint8).argsort(descending=True, stable=True)
    return order[rank_in_group(labels[order]).argsort(stable=True)][:count]


def _embed_gallery(bench: Bench, chunk: int, bar: Callable[..., Any]) -> Tensor:
    parts = []
    with torch.no_grad(), bar(total=len(bench.items), desc="gallery") as shown:
        for piece in chunks(len(bench.items), chunk):
            parts.append(bench.embed(bench.items.pixels(range(piece.start, piece.stop))))
            shown.update(piece.stop - piece.start)
    return torch.cat(parts)


def _examples(bench: Bench, part: Part, members: Sequence[AnyAttack]) -> tuple[Example, ...]:
    def neighbours(items: Tensor) -> tuple[Neighbour, ...]:
        pixels, labels = bench.items.pixels(items).cpu(), bench.items.labels[items].tolist()
        return tuple(Neighbour(*parts) for parts in zip(items.tolist(), labels, pixels, strict=True))

    found = part["examples"]
    return tuple(
        Example(
            query=query,
            label=int(bench.queries.labels[query]),
            eps=eps,
            attack=members[by].name if by >= 0 else "none",
            clean=clean.cpu(),
            perturbed=perturbed.cpu(),
            before=neighbours(before),
            after=neighbours(after),
        )
        for eps, query, by, clean, perturbed, before, after in zip(
            found["eps"].tolist(),
            found["queries"].tolist(),
            found["by"].tolist(),
            *(found[key] for key in ("clean", "perturbed", "before", "after")),
            strict=True,
        )
    )


def _joined(parts: Sequence[Part], key: str) -> PerQuery:
    return {name: torch.cat([part[key][name] for part in parts]) for name in parts[0][key]}


def _means(measures: PerQuery) -> dict[str, float]:
    return {name: values.double().mean().item() for name, values in measures.items()}


def _marks(measures: PerQuery) -> str:
    return "".join("1" if stands else "0" for stands in (measures["recall_at_1"] > 0).tolist())


def _key(attack: AnyAttack, eps: float) -> str:
    return f"{attack.name}@{eps}"


def _stream(name: str, eps: float, first_row: int, restart: int) -> int:
    return zlib.crc32(repr((name, eps, restart, first_row)).encode())


def _chance(bench: Bench, rows: Tensor) -> float:
    sought = bench.sought(rows)
    others = len(bench.gallery) - (sought.own >= 0).double()
    return (bench.gallery.num_right(sought) / others).mean().item()


def _versions() -> dict[str, str]:
    packages = ("pml-adversarial", "torch", "pytorch-metric-learning", "torchattacks")
    return {**{package: _version(package) for package in packages}, "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # imported from a folder
        return "not installed"


def to_radii(eps: float | Iterable[float]) -> tuple[float, ...]:
    """Different radii, ascending."""
    try:
        radii = tuple(sorted({float(radius) for radius in ([eps] if isinstance(eps, int | float | str) else eps)}))
    except (TypeError, ValueError):
        radii = ()
    if isinstance(eps, str) or not radii or not all(0 < radius < math.inf for radius in radii):
        raise InputError(f"eps={eps!r}; expected a radius above 0, or several, in pixels of [0, 1], such as 8/255.")
    return radii


def to_suite(attacks: str | Sequence[AnyAttack]) -> tuple[str, tuple[AnyAttack, ...]]:
    """The suite's name in reports, and its attacks."""
    if isinstance(attacks, str):
        if attacks not in SUITES:
            raise InputError(f"attacks={attacks!r}; expected one of {', '.join(SUITES)}, or a list of attacks.")
        name, make = SUITES[attacks]
        return name, make()
    members = tuple(attacks)
    names = [getattr(attack, "name", None) for attack in members]
    if not members or not all(isinstance(attack, AnyAttack) for attack in members) or len(set(names)) < len(names):
        found = ", ".join(str(getattr(attack, "name", repr(attack))) for attack in members) or "none"
        raise InputError(f"attacks holds {found}; expected QueryAttack and GalleryAttack objects of different names.")
    return "custom", members


def check_options(norm: str, chunk: int, recall_at: Sequence[int], radii: Sequence[float]) -> None:
    """Refuses what no evaluation can be made with; ``recall_at`` ascending."""
    if norm not in NORMS:
        raise InputError(f"norm={norm!r}; expected one of {', '.join(NORMS)}.")
    if norm == "Linf" and radii[-1] > 1:
        raise InputError(f"eps={radii[-1]:g} is wider than all pixels; expected 1 at most in Linf, such as 8/255.")
    if not isinstance(chunk, int) or chunk < 1 or recall_at[0] < 1:
        raise InputError(f"chunk={chunk}, recall_at={recall_at}; expected whole numbers from 1 on.")


def _bars(shown: bool) -> Callable[..., Any]:
    if not shown:
        return _NoBar
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise InputError("progress=True needs tqdm; install it with `pip install tqdm`.") from error
    return tqdm


class _NoBar:
    """A progress bar that nobody sees."""

    def __init__(self, total: int, desc: str) -> None:
        self.total, self.desc, self.n = total, desc, 0

    def update(self, steps: int = 1) -> None:
        self.n += steps

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass
