"""Robustness where PML tests, so that PML's logging and model selection see it: the drop-in `AdversarialTester`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, default_collate

from .errors import InputError
from .evaluation.attacks import AnyAttack
from .evaluation.report import TARGETS, Report
from .evaluation.robustness import check_options, evaluate_robustness, to_radii, to_suite
from .evaluation.task import whole_numbers
from .training.isolation import isolated
from .training.pixels import Normalization, PixelSpace

__all__ = ["AdversarialTester"]

_WORST = {"query": "worst_case", "gallery": "worst_case_gallery"}
_UNEQUAL = 1e-3  # lengths of embeddings that a network normalised in half precision differ by less


class _Delegate:
    """What it has not itself is another object's: read, set and deleted there."""

    def __init__(self, wrapped: Any, **own: Any) -> None:
        vars(self).update(own, _wrapped=wrapped)

    def __getattr__(self, name: str) -> Any:
        if "_wrapped" not in vars(self) or name.startswith("__"):  # copy and pickle ask before anything is there
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._wrapped, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            object.__delattr__(self, name)
        else:
            delattr(self._wrapped, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._wrapped)})

    def _is_own(self, name: str) -> bool:
        return name in vars(self) or hasattr(type(self), name)


class AdversarialTester(_Delegate):
    """Wraps a PML tester: in each `test`, queries are attacked, and what is left joins the tester's own accuracies.

    It is used as the tester that it wraps, also by ``HookContainer``, which logs the metrics below and selects models
    by any of them (``primary_metric="worst_case_recall_at_1"``). All else, read or set, is the wrapped tester's, and
    its numbers stay what they are.

    The metrics, each a mean over the attacked queries, are named for ``HookContainer`` and SQL:

    - ``clean_M`` without attack, by the rules of the others;
    - ``worst_case_M`` if each query meets the attack on the query that is worst for it;
    - ``worst_case_gallery_M`` the same of attacks on the gallery, where there are any;
    - ``A_M`` under one attack, such as ``margin_recall_at_1``, with "_" for whatever is no letter or digit.

    M is ``recall_at_1`` or another of ``recall_at``, ``map_at_r`` or ``r_precision``. These are of the first eps;
    names at each further one end in it, such as ``worst_case_recall_at_1_eps_0_0314``. What was not measured is nan:
    splits that were not attacked, attacks that need more classes.

    References are the clean gallery, in which a query never finds itself. Each label level is attacked for itself, and
    with ``WithSameParentLabelTester`` each parent label too; parents under which no query has a right item are left
    out. ``GlobalTwoStreamEmbeddingSpaceTester`` has its first stream attacked.

    Args:
        tester: any tester of pytorch-metric-learning that compares embeddings by direction: normalised, without PCA.
        eps: radius in pixels of [0, 1], or several, of which the first gives the metrics without a suffix.
        attacks: "quick", "standard" or a list, see `evaluate_robustness`.
        norm: "Linf" or "L2".
        recall_at: the k of R@k; 1 is always among them.
        normalization: ``(mean, std)`` that the images of the data sets are normalised with; None: they are pixels.
        splits: names of the splits whose queries are attacked; None: all that are tested.
        max_queries: so many queries of each split are attacked, the same in all tests; None: all.
        checks: whether to ask for signs of a false claim, see `evaluate_robustness`.
        seed: of all random choices.
        chunk: queries that are attacked together.

    Attributes:
        reports: of the last test, split -> `Report`; with several levels ``"val_level0"`` -> `Report` and so on, with
            parent labels ``"val_parent3"`` or ``"val_level0_parent3"``.
        metrics: names of the metrics that are added.

    Raises:
        InputError: here, or in `test`, for what cannot be attacked; no metric is added then.

    Example:
        >>> from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
        >>> from torch.utils.data import TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> tester = AdversarialTester(GlobalEmbeddingSpaceTester(dataloader_num_workers=0), eps=(0.02, 0.05))
        >>> data = {"val": TensorDataset(torch.rand(8, 1, 4, 4), torch.arange(8) % 2)}
        >>> found = tester.test(data, 1, nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))["val"]
        >>> found["worst_case_recall_at_1_eps_0_05_level0"] <= found["worst_case_recall_at_1_level0"]
        True
    """

    reports: dict[str, Report]
    metrics: tuple[str, ...]

    def __init__(
        self,
        tester: Any,
        *,
        eps: float | Iterable[float],
        attacks: str | Sequence[str | AnyAttack] = "quick",
        norm: str = "Linf",
        recall_at: Sequence[int] = (1,),
        normalization: Normalization | None = None,
        splits: Iterable[str] | None = None,
        max_queries: int | None = None,
        checks: bool = False,
        seed: int = 0,
        chunk: int = 128,
    ) -> None:
        _check_kind(tester)
        measures, radii = tuple(sorted({1, *whole_numbers(recall_at, "recall_at")})), _first_ahead(eps)
        check_options(norm, chunk, measures, sorted(radii))
        if max_queries is not None and (not isinstance(max_queries, int) or max_queries < 1):
            raise InputError(f"max_queries={max_queries}; expected a whole number from 1 on, or None for all.")
        members = to_suite(attacks)[1]
        naming = _Naming(radii, tuple((attack.name, attack.target) for attack in members), measures)
        super().__init__(
            tester,
            reports={},
            metrics=naming.all(),
            _naming=naming,
            _needs_gradient=not all(attack.black_box for attack in members),
            _splits=_names_of(splits),
            _max_queries=max_queries,
            _space=PixelSpace(normalization),
            _options={
                "eps": naming.radii,
                "attacks": attacks,
                "norm": norm,
                "recall_at": measures,
                "normalization": normalization,
                "checks": checks,
                "seed": seed,
                "chunk": chunk,
            },
        )

    @property
    def tester(self) -> Any:
        """The wrapped tester."""
        return self._wrapped

    @property
    def accuracy_calculator(self) -> Any:
        """The wrapped tester's, which names the added metrics too: ``HookContainer`` asks there."""
        return _Calculator(self.tester.accuracy_calculator, metrics=self.metrics)

    @accuracy_calculator.setter
    def accuracy_calculator(self, calculator: Any) -> None:
        self.tester.accuracy_calculator = calculator._wrapped if isinstance(calculator, _Calculator) else calculator

    def description_suffixes(self, base_name: str) -> str:
        """The wrapped tester's, marked: ``HookContainer`` fails on a table that was begun without these metrics."""
        return f"{self.tester.description_suffixes(base_name)}_attacked"  # longer, and record-keeper hashes the name

    def test(
        self,
        dataset_dict: Mapping[str, Any],
        epoch: int,
        trunk_model: nn.Module,
        embedder_model: nn.Module | None = None,
        splits_to_eval: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Tests as the wrapped tester does, and attacks before its ``end_of_testing_hook`` is called.

        Returns:
            ``all_accuracies``: split -> name of a metric with its label level -> value.
        """
        tester = self.tester
        self._check(dataset_dict)
        users_hook = tester.end_of_testing_hook
        model = _Embedding(tester, trunk_model, nn.Identity() if embedder_model is None else embedder_model)

        def attack_first(_: Any) -> None:
            self._attack(model, _Reader(tester, self._space, dataset_dict, collate_fn))
            if users_hook:
                users_hook(self)
            else:
                c_f.LOGGER.info(tester.all_accuracies)

        tester.end_of_testing_hook = attack_first
        try:
            return tester.test(dataset_dict, epoch, trunk_model, embedder_model, splits_to_eval, collate_fn)
        finally:
            if tester.end_of_testing_hook is attack_first:
                tester.end_of_testing_hook = users_hook
            vars(tester).pop("embeddings_and_labels", None)  # PML leaves them behind where a hook fails

    def _attack(self, model: _Embedding, reader: _Reader) -> None:
        """Adds the metrics to ``all_accuracies``, of all splits or, after an exception, of none."""
        reports: dict[str, Report] = {}
        added = []
        for split, accuracies in self.tester.all_accuracies.items():
            asked = _Asked.of(self.tester, split)
            found: dict[str, Any] = {}
            for level in asked.levels:
                means = dict.fromkeys(self.metrics, torch.nan)
                if self._splits is None or split in self._splits:
                    means = _mean(list(self._groups(model, reader, asked, level, reports)), asked)
                for name, value in means.items():
                    found[self.tester.accuracies_keyname(name, label_hierarchy_level=level)] = value
            if len(asked.levels) > 1:
                self.tester.calculate_average_accuracies(found, self.metrics, asked.levels)
            added.append((accuracies, found))
        for accuracies, found in added:
            accuracies.update(found)
        self.reports = reports

    def _groups(
        self, model: _Embedding, reader: _Reader, asked: _Asked, level: int, reports: dict[str, Report]
    ) -> Iterator[dict[str, float]]:
        """The metrics of each set of queries that is tested for itself."""
        _check_lengths(self.tester, asked.item_embeddings)
        drawn = self._drawn(len(asked.labels))
        for name, queries, items in asked.groups(level):
            chosen = torch.isin(queries, drawn)
            labels, item_labels = asked.labels[queries, level], asked.item_labels[items, level]
            if asked.by_parent and not asked.has_answer(labels[chosen], item_labels):
                continue
            if asked.by_parent and len(item_labels.unique()) == 1:
                yield dict.fromkeys(self.metrics, 1.0)  # as PML has it: nothing there is wrong
                continue
            images = reader.images([asked.split], queries, labels)
            self._check_gradient(model, images)
            themselves = asked.includes and len(queries) == len(items)
            report = evaluate_robustness(
                model,
                images,
                None if themselves else reader.images(asked.references, items, item_labels, asked.item_stream),
                subset=None if chosen.all() else chosen.nonzero().squeeze(1),
                own=torch.searchsorted(items, queries) if asked.includes and not themselves else None,
                gallery_embeddings=asked.item_embeddings[items.to(asked.item_embeddings.device)],
                **self._options,
            )
            reports[asked.split + (f"_level{level}" if len(asked.levels) > 1 else "") + name] = report
            yield self._naming.of(report)

    def _drawn(self, count: int) -> Tensor:
        if self._max_queries is None or self._max_queries >= count:
            return torch.arange(count)
        generator = torch.Generator().manual_seed(self._options["seed"])
        return torch.randperm(count, generator=generator)[: self._max_queries]

    def _check_gradient(self, model: _Embedding, images: _Images) -> None:
        if not self._needs_gradient:
            return
        with isolated(model):
            embeddings = model(self._space.to_inputs(images[0][0].unsqueeze(0).requires_grad_()))
        if not embeddings.requires_grad:
            raise InputError(
                "The embeddings have no gradient with respect to the images, and attacks with gradients were asked "
                "for. Use a model that computes them with torch and without torch.no_grad(), or black-box attacks only."
            )

    def _check(self, dataset_dict: Mapping[str, Any]) -> None:
        unknown = sorted(set(self._splits or ()) - set(dataset_dict))
        if unknown:
            raise InputError(f"splits holds {', '.join(unknown)}; the data sets are {', '.join(dataset_dict)}.")
        if self.tester.pca:
            raise InputError(
                f"The tester has pca={self.tester.pca}, which is fitted anew to all embeddings of a split, so that no "
                "single image has an embedding. Use pca=None."
            )
        if self.tester.accuracy_calculator.label_comparison_fn is not torch.eq:
            raise InputError(
                "The accuracy calculator has a label_comparison_fn; the attacks know right items by equal labels only. "
                "Use an AccuracyCalculator without it."
            )


@dataclass(frozen=True)
class _Naming:
    """Names of metrics: one attack or the worst, a measure, an eps unless it is the first.

    Attributes:
        radii: all eps, the first ahead.
        attacks: names and targets.
        recall_at: the k of R@k.
    """

    radii: tuple[float, ...]
    attacks: tuple[tuple[str, str], ...]
    recall_at: Sequence[int]

    def all(self) -> tuple[str, ...]:
        """All names.

        Raises:
            InputError: two are the same, which SQL compares without case.
        """
        measures = [*(f"recall_at_{k}" for k in self.recall_at), "map_at_r", "r_precision"]
        targets = {target for _, target in self.attacks}
        parts = [*(_WORST[target] for target in TARGETS if target in targets), *(name for name, _ in self.attacks)]
        attacked = [(part, eps) for eps in self.radii for part in parts]
        names = [self._name(part, m, eps) for part, eps in [("clean", self.radii[0]), *attacked] for m in measures]
        folded = [name.casefold() for name in names]
        twice = sorted({name for name in folded if folded.count(name) > 1})
        if twice:
            raise InputError(
                f"Several metrics would have one name: {', '.join(twice)}; expected attacks whose names differ in "
                "letters or digits, and eps that differ in the first four digits."
            )
        return tuple(names)

    def of(self, report: Report) -> dict[str, float]:
        """All names with their values, nan for attacks that were not made."""
        found = dict.fromkeys(self.all(), torch.nan)
        parts = [
            ("clean", self.radii[0], report.clean),
            *((_WORST[worst.target], worst.eps, worst.measures) for worst in report.worst),
            *((result.attack, result.eps, result.measures) for result in report.attacks),
        ]
        for part, eps, measures in parts:
            found.update({self._name(part, measure, eps): value for measure, value in measures.items()})
        return found

    def _name(self, part: str, measure: str, eps: float) -> str:
        suffix = "" if eps == self.radii[0] else f"_eps_{eps:.4g}"
        return re.sub(r"\W", "_", f"{part}_{measure}{suffix}", flags=re.ASCII)


class _Asked(NamedTuple):
    """Which queries of a split a tester asks, and what it searches.

    Attributes:
        split: name of the queries' split.
        references: names of the splits that are searched.
        labels: ``(Q, L)`` of the queries.
        item_embeddings: ``(G, D)``.
        item_labels: ``(G, L)``.
        includes: whether the first items are the queries.
        levels: of labels, that are tested.
        by_parent: whether queries are tested apart by the label of the next level.
        item_stream: which of the images that the data hold are the items.
    """

    split: str
    references: list[str]
    labels: Tensor
    item_embeddings: Tensor
    item_labels: Tensor
    includes: bool
    levels: list[int]
    by_parent: bool
    item_stream: int

    @classmethod
    def of(cls, tester: Any, split: str) -> _Asked:
        """What the tester has just asked."""
        from pytorch_metric_learning.testers import GlobalTwoStreamEmbeddingSpaceTester, WithSameParentLabelTester

        references = tester.reference_split_names[split]
        _, labels, embeddings, item_labels = tester.set_reference_and_query(
            tester.embeddings_and_labels, split, references
        )
        by_parent = isinstance(tester, WithSameParentLabelTester)
        return cls(
            split,
            references,
            _whole(labels, split),
            embeddings,
            _whole(item_labels, " and ".join(references)),
            tester.ref_includes_query(split, references),
            [
                level
                for level in tester.label_levels_to_evaluate(labels)
                if not by_parent or level + 1 < labels.shape[1]
            ],
            by_parent,
            int(isinstance(tester, GlobalTwoStreamEmbeddingSpaceTester)),
        )

    def groups(self, level: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, rows of queries and rows of items of what is tested for itself."""
        if not self.by_parent:
            yield "", torch.arange(len(self.labels)), torch.arange(len(self.item_labels))
            return
        parents, item_parents = self.labels[:, level + 1], self.item_labels[:, level + 1]
        for parent in parents.unique().tolist():
            queries, items = ((rows == parent).nonzero().squeeze(1) for rows in (parents, item_parents))
            yield f"_parent{parent}", queries, items

    def has_answer(self, labels: Tensor, item_labels: Tensor) -> bool:
        """Whether there is a right item for any of the queries, itself left out."""
        classes, sizes = item_labels.unique(return_counts=True)
        return bool((sizes[torch.isin(classes, labels)] > int(self.includes)).any())


class _Embedding(nn.Module):
    """A tester's way from images to embeddings."""

    def __init__(self, tester: Any, trunk: nn.Module, embedder: nn.Module) -> None:
        super().__init__()
        self.tester, self.trunk, self.embedder = tester, trunk, embedder

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings ``(n, D)``."""
        return self.tester.get_embeddings_for_eval(self.trunk, self.embedder, images)


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Some rows of a data set as pixels in [0, 1] with their labels, read when asked for."""

    def __init__(self, read: Callable[[int], Tensor], rows: Tensor, labels: Tensor) -> None:
        self._read, self._rows, self.labels = read, rows.tolist(), labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self._read(self._rows[row]), self.labels[row]


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads images as a tester reads them, and turns them into pixels."""

    tester: Any
    space: PixelSpace
    dataset_dict: Mapping[str, Any]
    collate_fn: Callable[[list[Any]], Any] | None

    def images(self, splits: list[str], rows: Tensor, labels: Tensor, stream: int = 0) -> _Images:
        """Rows of several splits, one after the other, of the first or the second image that they hold."""
        parts = [self.dataset_dict[split] for split in splits]
        if any(isinstance(part, IterableDataset) for part in parts):
            raise InputError(f"{' and '.join(splits)}: the data have no index; expected a data set with one.")
        dataset: Dataset[Any] = ConcatDataset(parts)
        collate = default_collate if self.collate_fn is None else self.collate_fn

        def read(row: int) -> Tensor:
            images = self.tester.data_and_label_getter(collate([dataset[row]]))[stream]
            if not isinstance(images, Tensor) or len(images) != 1:
                found = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
                raise InputError(
                    f"{' and '.join(splits)}: one row gives images {found}; expected a tensor (1, C, H, W) from the "
                    "tester's data_and_label_getter."
                )
            try:
                return self.space.to_pixels(images)[0]
            except InputError as error:
                raise InputError(f"{' and '.join(splits)}, image {row}: {error}") from error

        return _Images(read, rows, labels)


class _Calculator(_Delegate):
    """An accuracy calculator that names further metrics."""

    def get_curr_metrics(self) -> list[str]:
        """The calculator's own metrics and the further ones."""
        return [*self._wrapped.get_curr_metrics(), *self.metrics]


def _check_kind(tester: Any) -> None:
    from pytorch_metric_learning.testers import BaseTester  # brings scikit-learn, which whoever has a tester has loaded

    if not isinstance(tester, BaseTester):
        found = f"the class {tester.__name__}" if isinstance(tester, type) else type(tester).__name__
        raise InputError(
            f"tester is {found}; expected a tester of pytorch-metric-learning, such as GlobalEmbeddingSpaceTester()."
        )


def _check_lengths(tester: Any, embeddings: Tensor) -> None:
    distance = getattr(tester.accuracy_calculator.knn_func, "distance", None)
    if tester.normalize_embeddings or getattr(distance, "normalize_embeddings", False):
        return
    shortest, longest = torch.stack(torch.aminmax(embeddings.float().norm(dim=1))).tolist()
    if longest > shortest * (1 + _UNEQUAL):
        raise InputError(
            f"The tester compares embeddings as they are, and their lengths are {shortest:.3g} to {longest:.3g}; the "
            "attacks compare by cosine similarity. Use normalize_embeddings=True."
        )


def _first_ahead(eps: float | Iterable[float]) -> tuple[float, ...]:
    given = tuple(eps) if isinstance(eps, Iterable) else (eps,)
    radii = to_radii(given)
    return (float(given[0]), *(radius for radius in radii if radius != float(given[0])))


def _mean(groups: Sequence[Mapping[str, float]], asked: _Asked) -> dict[str, float]:
    if not groups:
        raise InputError(
            f"None of the chosen queries of {asked.split} has a right item under its own parent label; expected labels "
            f"that occur twice under one parent in {' and '.join(asked.references)}."
        )
    return {name: sum(group[name] for group in groups) / len(groups) for name in groups[0]}


def _names_of(splits: Iterable[str] | None) -> frozenset[str] | None:
    if isinstance(splits, str):
        raise InputError(f"splits={splits!r}; expected names, such as ({splits!r},).")
    return None if splits is None else frozenset(splits)


def _whole(labels: Tensor, role: str) -> Tensor:
    whole = labels.long()
    if not bool((whole == labels).all()):
        raise InputError(f"{role} has labels that are no whole numbers; expected one per class.")
    return whole.cpu()
