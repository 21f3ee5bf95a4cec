"""Wraps a tester of pytorch-metric-learning so that each test measures robustness too."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, default_collate

from .attacks.checks import check_choice, check_whole
from .errors import InputError
from .evaluation import Report, RetrievalAttack, evaluate_robustness
from .evaluation.reports.results import TARGETS
from .evaluation.retrieval.embedder import Embedder
from .evaluation.retrieval.options import NORMS, to_radii, to_recall_at
from .evaluation.suites import find_suite
from .training.pixels import Normalization, PixelSpace

__all__ = ["AdversarialTester"]

_WORST = {"query": "worst_case", "gallery": "worst_case_gallery"}


class _Proxy:
    """Passes attributes that it does not have itself on to the wrapped object: to be read, set and deleted there."""

    def __init__(self, wrapped: Any, **own: Any) -> None:
        vars(self).update(own, _wrapped=wrapped)

    def __getattr__(self, name: str) -> Any:
        if "_wrapped" not in vars(self) or name.startswith("__"):  # copy and pickle ask before __init__
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


class AdversarialTester(_Proxy):
    """Wraps a PML tester. Each `test` attacks the queries and adds robust metrics to the tester's accuracies.

    Use it in place of the tester that it wraps, also with ``HookContainer``, which then logs the metrics and can select
    models by one of them (``primary_metric="worst_case_recall_at_1"``). All other attributes and methods are those of
    the wrapped tester, and its own accuracies do not change.

    Each metric is a mean over the attacked queries:

    - ``clean_M``: without attack, by the same rules as the other metrics here;
    - ``worst_case_M``: each query meets the attack on the query that is worst for it;
    - ``worst_case_gallery_M``: each query meets the attack on the gallery that is worst for it, if there is any;
    - ``A_M``: under the attack A, such as ``margin_recall_at_1``.

    M is ``map_at_r``, ``r_precision``, or ``recall_at_k`` for each k in ``recall_at``. These names are for the first
    eps; for each further eps a suffix is added, such as ``worst_case_recall_at_1_eps_0_0314``. Characters that are no
    letters or digits become "_", so that names are valid in SQL. A metric is nan if it was not measured: in splits that
    are not attacked, and for attacks that need more classes.

    The gallery is the reference splits, clean; a query never finds itself. Each label level is attacked separately.
    With ``WithSameParentLabelTester``, each parent label is attacked separately too, and a parent label is left out if
    no query under it has a right item. With ``GlobalTwoStreamEmbeddingSpaceTester``, the first stream is attacked.

    Args:
        tester: a tester of pytorch-metric-learning, without PCA. Embeddings are compared as it compares them.
        eps: one or more radii, in pixels of [0, 1]. The first gives the metrics without suffix.
        attacks, norm, recall_at, checks, seed: as in `evaluate_robustness`.
        normalization: ``(mean, std)`` with which the data sets normalise images. None: images are pixels in [0, 1].
        splits: names of the splits whose queries are attacked; None: all splits that are tested.
        max_queries: how many queries of each split are attacked, the same ones in each test; None: all.
        attack_batch_size: queries that are attacked together; ``batch_size`` is the wrapped tester's.

    Attributes:
        reports: of the last test, name -> `Report`. The name is that of the split, such as ``"val"``. With several
            label levels it is ``"val_level0"`` and so on; with parent labels ``"val_parent3"`` or
            ``"val_level0_parent3"``.
        metrics: names of the metrics that are added.

    Raises:
        InputError: here or in `test`, if something cannot be attacked. Then `test` adds no metric.

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
        attacks: str | Sequence[str | RetrievalAttack] = "quick",
        norm: str = "Linf",
        recall_at: Sequence[int] = (1,),
        normalization: Normalization | None = None,
        splits: Iterable[str] | None = None,
        max_queries: int | None = None,
        checks: bool = False,
        seed: int = 0,
        attack_batch_size: int = 128,
    ) -> None:
        _check_kind(tester)
        check_choice("norm", norm, NORMS)
        check_whole("attack_batch_size", attack_batch_size)
        if isinstance(splits, str):
            raise InputError(f"splits={splits!r}; expected names, such as ({splits!r},).")
        if max_queries is not None:
            check_whole("max_queries", max_queries, hint=", or None for all")
        members = find_suite(attacks)[1]
        targets = {attack.name: attack.target for attack in members}
        names = _MetricNames(_radii(eps, norm), targets, tuple(to_recall_at(recall_at)))
        super().__init__(
            tester,
            reports={},
            metrics=names.all(),
            _names=names,
            _needs_gradient=not all(attack.black_box for attack in members),
            _splits=None if splits is None else frozenset(splits),
            _max_queries=max_queries,
            _space=PixelSpace(normalization),
            _options={
                "eps": names.radii,
                "attacks": attacks,
                "norm": norm,
                "recall_at": names.recall_at,
                "normalization": normalization,
                "checks": checks,
                "seed": seed,
                "batch_size": attack_batch_size,
            },
        )

    @property
    def tester(self) -> Any:
        """The wrapped tester."""
        return self._wrapped

    @property
    def accuracy_calculator(self) -> Any:
        """The wrapped tester's calculator, with the names of the added metrics: ``HookContainer`` reads them there."""
        return _Calculator(self.tester.accuracy_calculator, metrics=self.metrics)

    @accuracy_calculator.setter
    def accuracy_calculator(self, calculator: Any) -> None:
        self.tester.accuracy_calculator = calculator._wrapped if isinstance(calculator, _Calculator) else calculator

    def description_suffixes(self, base_name: str) -> str:
        """The wrapped tester's suffixes and another one.

        ``HookContainer`` fails on a table that was started without the added metrics, so this needs a table of its own.
        """
        return f"{self.tester.description_suffixes(base_name)}_attacked"

    def test(
        self,
        dataset_dict: Mapping[str, Any],
        epoch: int,
        trunk_model: nn.Module,
        embedder_model: nn.Module | None = None,
        splits_to_eval: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Runs the wrapped tester's test, and the attacks before its ``end_of_testing_hook`` is called.

        Returns:
            ``all_accuracies``: split -> name of a metric with its label level -> value.
        """
        tester = self.tester
        self._check(dataset_dict)
        users_hook = tester.end_of_testing_hook
        model = _Embedding(tester, trunk_model, nn.Identity() if embedder_model is None else embedder_model)

        def attack_first(_: Any) -> None:
            self._attack(model, partial(_Images, tester, self._space, dataset_dict, collate_fn))
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
            vars(tester).pop("embeddings_and_labels", None)  # PML keeps them if a hook fails

    def _attack(self, model: _Embedding, read: Callable[..., _Images]) -> None:
        """Adds the metrics to ``all_accuracies``; if anything fails, nothing is added."""
        reports: dict[str, Report] = {}
        added = []
        for split, accuracies in self.tester.all_accuracies.items():
            queries = _SplitQueries(self.tester, split)
            found: dict[str, Any] = {}
            for level in queries.levels:
                means = dict.fromkeys(self.metrics, torch.nan)
                if self._splits is None or split in self._splits:
                    means = _mean(list(self._groups(model, read, queries, level, reports)), queries)
                for name, value in means.items():
                    found[self.tester.accuracies_keyname(name, label_hierarchy_level=level)] = value
            if len(queries.levels) > 1:
                self.tester.calculate_average_accuracies(found, self.metrics, queries.levels)
            added.append((accuracies, found))
        for accuracies, found in added:
            accuracies.update(found)
        self.reports = reports

    def _groups(
        self,
        model: _Embedding,
        read: Callable[..., _Images],
        split: _SplitQueries,
        level: int,
        reports: dict[str, Report],
    ) -> Iterator[dict[str, float]]:
        """The metrics of each group of queries that is tested separately."""
        generator = torch.Generator().manual_seed(self._options["seed"])
        attacked = torch.randperm(len(split.labels), generator=generator)[: self._max_queries]
        for name, queries, items in split.groups(level):
            chosen = torch.isin(queries, attacked)
            labels, item_labels = split.labels[queries, level], split.item_labels[items, level]
            if split.by_parent and not split.has_right_item(labels[chosen], item_labels):
                continue
            if split.by_parent and len(item_labels.unique()) == 1:
                yield dict.fromkeys(self.metrics, 1.0)  # no item is wrong; PML counts 1 too
                continue
            images = read([split.name], queries, labels)
            if self._needs_gradient:
                Embedder(model, self._space.normalization).check_gradient(images[0][0].unsqueeze(0))
            leave_one_out = split.includes_queries and len(queries) == len(items)
            report = evaluate_robustness(
                model,
                images,
                None if leave_one_out else read(split.references, items, item_labels, split.item_stream),
                subset=None if chosen.all() else chosen.nonzero().squeeze(1),
                own=torch.searchsorted(items, queries) if split.includes_queries and not leave_one_out else None,
                distance=_distance_of(self.tester),
                gallery_embeddings=split.item_embeddings[items.to(split.item_embeddings.device)],
                junk_label=None,  # PML knows none
                share=False,  # a tester of PML runs in each process, or in one
                **self._options,
            )
            reports[split.name + (f"_level{level}" if len(split.levels) > 1 else "") + name] = report
            yield self._names.values(report)

    def _check(self, dataset_dict: Mapping[str, Any]) -> None:
        unknown = sorted(set(self._splits or ()) - set(dataset_dict))
        if unknown:
            raise InputError(
                f"splits holds {', '.join(unknown)}; expected some of the data sets {', '.join(dataset_dict)}."
            )
        if self.tester.pca:
            raise InputError(
                f"The tester has pca={self.tester.pca}. PCA is fitted to all embeddings of a split, so a single image "
                "has no embedding of its own that could be attacked. Use pca=None."
            )
        if self.tester.accuracy_calculator.label_comparison_fn is not torch.eq:
            raise InputError(
                "The accuracy calculator has a label_comparison_fn, but for the attacks an item is right only if its "
                "label is equal. Use an AccuracyCalculator without label_comparison_fn."
            )


@dataclass(frozen=True)
class _MetricNames:
    """Names of metrics: an attack or the worst case, then a measure, then the eps unless it is the first."""

    radii: tuple[float, ...]
    attacks: Mapping[str, str]  # name -> target
    recall_at: Sequence[int]

    def all(self) -> tuple[str, ...]:
        """All names, which differ in more than upper and lower case, as SQL ignores it."""
        measures = [*(f"recall_at_{k}" for k in self.recall_at), "map_at_r", "r_precision"]
        parts = [*(_WORST[target] for target in TARGETS if target in self.attacks.values()), *self.attacks]
        attacked = [(part, eps) for eps in self.radii for part in parts]
        names = [self._name(part, m, eps) for part, eps in [("clean", self.radii[0]), *attacked] for m in measures]
        twice = sorted(name for name, count in Counter(map(str.casefold, names)).items() if count > 1)
        if twice:
            raise InputError(
                f"Several metrics would have one name: {', '.join(twice)}; expected attacks whose names differ in "
                "letters or digits, and eps that differ in the first four digits."
            )
        return tuple(names)

    def values(self, report: Report) -> dict[str, float]:
        """All names with their values; nan for attacks that were left out."""
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


class _SplitQueries:
    """The queries of a split that a tester has just tested, and the gallery that it searches for them."""

    def __init__(self, tester: Any, split: str) -> None:
        from pytorch_metric_learning.testers import GlobalTwoStreamEmbeddingSpaceTester, WithSameParentLabelTester

        self.name, self.references = split, tester.reference_split_names[split]
        _, labels, self.item_embeddings, item_labels = tester.set_reference_and_query(
            tester.embeddings_and_labels, split, self.references
        )
        self.labels = _whole(labels, split)  # (Q, L)
        self.item_labels = _whole(item_labels, " and ".join(self.references))  # (G, L)
        self.includes_queries = tester.ref_includes_query(split, self.references)  # as the first items
        self.by_parent = isinstance(tester, WithSameParentLabelTester)  # tests each label of the next level separately
        self.item_stream = int(isinstance(tester, GlobalTwoStreamEmbeddingSpaceTester))  # which has the items' images
        levels = tester.label_levels_to_evaluate(labels)
        self.levels = [level for level in levels if not self.by_parent or level + 1 < labels.shape[1]]

    def groups(self, level: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, rows of queries and rows of items of each group that is tested separately."""
        if not self.by_parent:
            yield "", torch.arange(len(self.labels)), torch.arange(len(self.item_labels))
            return
        parents, item_parents = self.labels[:, level + 1], self.item_labels[:, level + 1]
        for parent in parents.unique().tolist():
            queries, items = ((rows == parent).nonzero().squeeze(1) for rows in (parents, item_parents))
            yield f"_parent{parent}", queries, items

    def has_right_item(self, labels: Tensor, item_labels: Tensor) -> bool:
        """Whether any of the queries has a right item other than itself."""
        classes, sizes = item_labels.unique(return_counts=True)
        return bool((sizes[torch.isin(classes, labels)] > int(self.includes_queries)).any())


class _Embedding(nn.Module):
    """The model that computes a tester's embeddings, divided by their length if the tester does so."""

    def __init__(self, tester: Any, trunk: nn.Module, embedder: nn.Module) -> None:
        super().__init__()
        self.tester, self.trunk, self.embedder = tester, trunk, embedder

    def forward(self, images: Tensor) -> Tensor:
        return self.tester.maybe_normalize(self.tester.get_embeddings_for_eval(self.trunk, self.embedder, images))


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Rows of several splits, counted through, as pixels in [0, 1] with labels; read when asked for, by the tester."""

    def __init__(
        self,
        tester: Any,
        space: PixelSpace,
        dataset_dict: Mapping[str, Any],
        collate_fn: Callable[[list[Any]], Any] | None,
        splits: list[str],
        rows: Tensor,
        labels: Tensor,
        stream: int = 0,
    ) -> None:
        self.labels, self._role = labels, " and ".join(splits)
        parts = [dataset_dict[split] for split in splits]
        if any(isinstance(part, IterableDataset) for part in parts):
            raise InputError(f"{self._role}: the data set is an IterableDataset; expected one with an index.")
        self._dataset: Dataset[Any] = ConcatDataset(parts)
        self._collate = default_collate if collate_fn is None else collate_fn
        self._getter, self._stream = tester.data_and_label_getter, stream
        self._space, self._rows = space, rows.tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self._rows[index]
        images = self._getter(self._collate([self._dataset[row]]))[self._stream]
        if not isinstance(images, Tensor) or len(images) != 1:
            found = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise InputError(
                f"{self._role}: one row gives images {found}; expected a tensor (1, C, H, W) from the tester's "
                "data_and_label_getter."
            )
        try:
            return self._space.to_pixels(images)[0], self.labels[index]
        except InputError as error:
            raise InputError(f"{self._role}, image {row}: {error}") from error


class _Calculator(_Proxy):
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


_OF_FAISS = {0: "inner_product", 1: "euclidean"}
"""The number of a metric in faiss -> the name of the distance; embeddings of length 1 rank alike by both."""

_ANY_DIMENSION = 8


def _distance_of(tester: Any) -> Any:
    """How a tester's nearest neighbours are found: by its own distance, or as faiss does it."""
    knn = tester.accuracy_calculator.knn_func
    distance = getattr(knn, "distance", None)
    if distance is not None:
        return distance
    metric = None
    with suppress(Exception):  # a function of the user may raise anything; other functions have no index
        metric = knn.index_init_fn(_ANY_DIMENSION).metric_type
    if metric not in _OF_FAISS:
        raise InputError(
            f"The accuracy calculator finds neighbours by {knn!r}, and it is not known by which distance. Expected "
            "knn_func=FaissKNN() with an index of L2 distance or inner product, or CustomKNN(a distance of PML)."
        )
    return "cosine" if tester.normalize_embeddings else _OF_FAISS[metric]


def _radii(eps: float | Iterable[float], norm: str) -> tuple[float, ...]:
    """Different radii, the first that was given ahead."""
    given = tuple(eps) if isinstance(eps, Iterable) else (eps,)
    return tuple(sorted(to_radii(given, norm), key=lambda radius: radius != float(given[0])))


def _mean(groups: Sequence[Mapping[str, float]], split: _SplitQueries) -> dict[str, float]:
    if not groups:
        raise InputError(
            f"None of the chosen queries of {split.name} has a right item under its own parent label; expected labels "
            f"that occur twice under one parent in {' and '.join(split.references)}."
        )
    return {name: sum(group[name] for group in groups) / len(groups) for name in groups[0]}


def _whole(labels: Tensor, role: str) -> Tensor:
    whole = labels.long()
    if not bool((whole == labels).all()):
        raise InputError(f"{role} has labels that are no whole numbers; expected one per class.")
    return whole.cpu()
