"""What a verification is evaluated on: a model, pairs of images, and how similar the pairs are without attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...training.isolation import random_stream
from ..reports import fingerprints
from ..retrieval.batch import ANSWERS, SAMPLES
from ..retrieval.distance import Cosine, Distance, Euclidean, InnerProduct, find_distance
from ..retrieval.embedder import Embedder, batches, check_finite
from ..retrieval.gallery import tie_of
from ..retrieval.images import ImageSet
from ..retrieval.options import to_rows
from ..retrieval.task import RANDOM
from .attacks import PairBatch
from .pairs import PairChoice, Pairs, PairSet
from .roc import PairScores

_ALIKE = 1e-3  # of the size of embeddings: those of one image differ by less
_SAMPLE = 16  # images by which it is found out whether the model answers at random
_SAME_LENGTH = 1.01  # lengths of embeddings that a model normalises differ by less
_DIFFERENT = 0.5  # percent of EER


class PairTask:
    """A model and pairs of images, from the arguments of `evaluate_verification`.

    Attributes:
        embed: the model.
        pairs: the pairs.
        distance: how embeddings are compared.
        norm: of the perturbations.
        notes: what a reader of the report has to know.
        clean: ``(P, D)`` embeddings of the first images of all pairs, and of the second ones, after `embed_all`.
        scores: similarities of all pairs without attack, after `embed_all`.
    """

    def __init__(
        self,
        embed: Embedder,
        pairs: Pairs,
        norm: str = "Linf",
        distance: Any = "cosine",
        choice: PairChoice | None = None,
        seed: int = 0,
    ) -> None:
        self.embed, self.norm = embed, norm
        self.distance: Distance = find_distance(distance)
        self.pairs = PairSet(pairs, embed.device, embed.pixel_dtype, choice, seed)
        self.notes: list[str] = list(self.pairs.notes)
        for images in self.pairs.sets:
            self._read(images)
        self.notes.extend(embed.notes)
        self.notes.extend(embed.probe_gradient(self.pairs.first[:1]))
        embed.probe_randomness(self.pairs.first[:_SAMPLE])
        if embed.is_random:
            self.notes.append(
                f"{RANDOM}: gradients are means over {SAMPLES} draws (EOT). The worst attempt on a pair is the one "
                f"whose mean similarity over {ANSWERS} draws is worst; one more draw of it counts, as in use. So "
                "some pairs are dodged or impersonated by chance alone. Without attack, each image is embedded once"
            )
        self.clean: tuple[Tensor, Tensor]
        self.scores: PairScores

    @property
    def same(self) -> Tensor:
        """``(P,)`` bool, whether a pair is genuine."""
        return self.pairs.same

    def fingerprints(self) -> dict[str, Any]:
        """Of the model and of the images of all pairs."""
        names = ("first", "second") if len(self.pairs.sets) == 2 else ("images",)
        images = {name: fingerprints.of_images(part) for name, part in zip(names, self.pairs.sets, strict=True)}
        return {"model": fingerprints.of_modules(self.embed.modules), **images}

    @property
    def num_images(self) -> int:
        """How many images `embed_all` embeds."""
        if self.pairs.first is self.pairs.second:
            return len(self.pairs.indices.unique())
        return sum(map(len, self.pairs.sets))

    def embed_all(self, batch_size: int, advance: Callable[[int], object]) -> None:
        """Embeds the images of all pairs, compares them, and notes what is odd about them."""
        self.clean = self._embeddings(batch_size, advance)
        for embeddings in self.clean:
            self._check(embeddings)
        first, second = (embeddings.shape[1] for embeddings in self.clean)
        if first != second:
            raise InputError(
                f"Embeddings of first images have {first} dimensions, those of second images {second}; expected as "
                "many. Resize the images to one size."
            )
        similarities = self._similarities(self.distance, batch_size)
        self.scores = PairScores(similarities, self.same, self._tie())
        if not bool(similarities.isfinite().all()):
            raise InputError(
                f"By {self.distance.name}, similarities without attack are not finite; expected numbers that "
                f"{self.clean[0].dtype} can hold. Divide the embeddings by their length, or use distance='cosine'."
            )
        self._note_reversed()
        self._note_copies()
        self._note_lengths(batch_size)
        uses = self.pairs.most_uses()
        if uses > 1:
            self.notes.append(
                f"an image is in up to {uses} pairs; intervals presume independent pairs, so they are too narrow"
            )

    def rows(self, subset: Sequence[int] | Tensor | int | None, seed: int) -> Tensor:
        """Indices ``(A,)`` of the pairs to attack: all, those of a list, or so many of each kind, drawn at random."""
        if isinstance(subset, Integral) and not isinstance(subset, bool) and subset > 0:
            with random_stream(seed, -3):
                kinds = (torch.where(self.same.cpu() == kind)[0] for kind in (True, False))
                return torch.cat([kind[torch.randperm(len(kind))[: int(subset)]] for kind in kinds]).sort().values
        rows = to_rows(subset, len(self.pairs))
        genuine = int(self.same.cpu()[rows].sum())
        if not 0 < genuine < len(rows):
            raise InputError(
                f"subset has {genuine} genuine and {len(rows) - genuine} impostor pairs; expected one of each at "
                "least. A whole number such as subset=500 draws so many of each kind."
            )
        return rows

    def batch(self, rows: Tensor) -> PairBatch:
        """The pairs ``rows`` ``(n,)``, ready to be attacked."""
        first, second = self.pairs.indices[rows.cpu()].T
        one, other = (embeddings[rows.to(embeddings.device)] for embeddings in self.clean)
        return PairBatch(
            embed=self.embed,
            modules=self.embed.modules,
            distance=self.distance,
            images=self.pairs.first[first],
            clean=one,
            enrolled_images=self.pairs.second[second],
            enrolled=self.distance.vectors(other),
            same=self.same[rows.to(self.same.device)],
            norm=self.norm,
            is_random=self.embed.is_random,
        )

    def _read(self, images: ImageSet) -> None:
        note = images.check(self.embed.space)
        if note is not None:
            self.notes.append(note)
        self.embed.probe(images[:1], images.given_dtype)
        images.dtype = self.embed.pixel_dtype

    def _embeddings(self, batch_size: int, advance: Callable[[int], object]) -> tuple[Tensor, Tensor]:
        """``(P, D)`` embeddings of the first and of the second images. Each image is embedded once."""
        first, second = self.pairs.indices.T
        if self.pairs.first is not self.pairs.second:
            one, other = (self._embed(images, batch_size, advance) for images in self.pairs.sets)
            return one[first], other[second]
        used, places = self.pairs.indices.unique(return_inverse=True)
        found = self._embed(self.pairs.first, batch_size, advance, used)
        return found[places[:, 0]], found[places[:, 1]]

    @torch.no_grad()
    def _embed(
        self, images: ImageSet, batch_size: int, advance: Callable[[int], object], used: Tensor | None = None
    ) -> Tensor:
        used = torch.arange(len(images)) if used is None else used
        parts = []
        for rows in used.split(batch_size):
            parts.append(self.embed(images[rows]))
            advance(len(rows))
        return torch.cat(parts)

    def _check(self, embeddings: Tensor) -> None:
        check_finite(embeddings)
        if embeddings.shape[1] == 1 and self.distance.has_unit_length:
            raise InputError(
                f"The embeddings have one dimension, and by {self.distance.name} they are 1 or -1. Expected more "
                "dimensions, or distance='euclidean', if they are compared so."
            )

    def _tie(self) -> float:
        """What rounding may change, on the scale of similarities."""
        vectors = self.distance.vectors(torch.cat(self.clean))
        size = self.distance.scale(vectors)
        return tie_of(vectors.dtype) * (size**2 if isinstance(self.distance, InnerProduct) else size)

    def _similarities(self, distance: Distance, batch_size: int) -> Tensor:
        """``(P,)`` of all pairs without attack, in double precision."""
        one, other = (distance.vectors(embeddings).double() for embeddings in self.clean)
        parts = batches(len(self.pairs), batch_size)  # as some distances compare all with all
        return torch.cat([distance.to_each(one[rows], other[rows]) for rows in parts])

    def _note_lengths(self, batch_size: int) -> None:
        """Notes what the EER would be if the lengths of embeddings counted, where cosine leaves them out."""
        lengths = torch.cat(self.clean).float().norm(dim=1)
        if not isinstance(self.distance, Cosine) or float(lengths.amax()) <= _SAME_LENGTH * float(lengths.amin()):
            return
        by_length = PairScores(self._similarities(Euclidean(), batch_size), self.same)
        rates = [100 * scores.roc().equal_error_rate.rate for scores in (by_length, self.scores)]
        if abs(rates[0] - rates[1]) >= _DIFFERENT:
            self.notes.append(
                f"lengths of embeddings range from {float(lengths.amin()):.3g} to {float(lengths.amax()):.3g}: by "
                f"Euclidean distance EER without attack would be {rates[0]:.1f}, by cosine it is {rates[1]:.1f}; "
                "distance=... has to be that of the deployed verification"
            )

    def _note_reversed(self) -> None:
        """Notes pairs whose labels may mean the opposite, as 1 = different does in some data sets."""
        roc = self.scores.roc()
        if roc.is_reversed:
            given = "if 1 stands for different images in same, pass 1 - same; else " * self.pairs.is_given
            self.notes.append(
                f"genuine pairs are less similar than impostor pairs, AUC without attack is {100 * roc.auc:.1f}: "
                f"{given}look at the labels, the distance and the model"
            )

    def _note_copies(self) -> None:
        """Notes pairs of equal images; only those whose embeddings are alike are read again."""
        one, other = (self.distance.vectors(embeddings) for embeddings in self.clean)
        near = (one - other).norm(dim=1) <= _ALIKE * self.distance.scale(one)
        copies = [row for row in torch.where(near)[0].tolist() if self._is_copy(row)]
        if copies:
            impostors = int((~self.same[copies]).sum())
            self.notes.append(
                f"{len(copies)} of {len(self.pairs)} pairs hold the same image twice"
                + (f", {impostors} of them as impostors" if impostors else "")
                + "; they show nothing of the model"
            )

    def _is_copy(self, row: int) -> bool:
        first, second = self.pairs.indices[row].tolist()
        one, other = self.pairs.first[[first]], self.pairs.second[[second]]
        return one.shape == other.shape and bool((one == other).all())
