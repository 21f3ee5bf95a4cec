"""What is evaluated: a model that embeds queries, which search a gallery."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..runs.sharing import check_silent
from .batch import ANSWERS, SAMPLES, QueryBatch
from .copies import Copies
from .distance import Cosine, Distance, Euclidean, find_distance
from .embedder import Embedder, batches, check_finite, embed_all
from .forms import Images
from .gallery import Gallery, Targets, finite_or_zero
from .images import ImageSet
from .options import JUNK as JUNK
from .options import check_radii, description_of_mask, digest_of, to_embeddings, to_mask, to_rows, to_whole_numbers

RANDOM = "the model answers at random"  #: How the note on such a model begins.

Mask = Tensor | Callable[[Tensor], Any] | None
"""``(Q, G)`` bool, or a function of the indices ``(n,)`` of some queries that gives ``(n, G)``; None: nothing."""

_SAMPLE = 16  # items of a given gallery that are embedded anew
_ALIKE = 0.02  # of the spread of the gallery: two embeddings of one image differ by less, in half precision too
_SAME_LENGTH = 1.01  # lengths of embeddings that a model normalises differ by less
_DIFFERENT = 0.5  # percentage points of R@1
_ITEMS = {"ignore": "ignored_items", "relevant": "relevant_items"}  # names of fingerprints


@dataclass(frozen=True)
class Search:
    """How queries search: options of `evaluate_robustness`, see there."""

    distance: Any = "cosine"
    own: Sequence[int] | Tensor | str | None = None
    ignore: Mask = None
    relevant: Mask = None
    junk_label: int | None = JUNK

    def settings(self) -> dict[str, Any]:
        """The options in types that JSON knows, for a report."""
        own = self.own
        return {
            "distance": find_distance(self.distance).name,
            "own": own if own is None or isinstance(own, str) else to_whole_numbers(own, "own"),
            "ignore": description_of_mask(self.ignore),
            "relevant": description_of_mask(self.relevant),
            "junk_label": int(self.junk_label) if isinstance(self.junk_label, Integral) else self.junk_label,
        }


class RetrievalTask:
    """A model, queries and the gallery that they search, from the arguments of `evaluate_robustness`.

    Attributes:
        embed: the model.
        queries: images and labels of the queries.
        items: images and labels of the gallery; without images, they are known by their embeddings alone.
        distance: how embeddings are compared.
        gallery: embeddings of the gallery, after `set_gallery`.
        clean: ``(Q, D)`` embeddings of the queries, after `set_queries`.
        own: ``(Q,)`` index of the item that is the query itself, -1 where it is not in the gallery.
        own_by_image: whether the own items are found by comparing images.
        in_gallery: ``(Q,)`` bool, whether the gallery holds the query's image as an item that it may find.
        norm: of the perturbations.
        notes: what a reader of the report has to know.
    """

    def __init__(
        self,
        embed: Embedder,
        queries: Images,
        gallery: Images | None,
        norm: str = "Linf",
        search: Search | None = None,
    ) -> None:
        search = Search() if search is None else search
        self.embed = embed
        self.distance: Distance = find_distance(search.distance)
        self.norm = norm
        self.notes: list[str] = []
        self._queries_are_gallery = gallery is None
        self._ignore, self._relevant, self._junk = search.ignore, search.relevant, search.junk_label
        if self._junk is not None and (isinstance(self._junk, bool) or not isinstance(self._junk, Integral)):
            raise InputError(f"junk_label={self._junk!r}; expected a whole number, or None.")
        self._read(queries, gallery)
        self._note_junk()
        self.own = self._own(search.own)
        self._has_own = gallery is None or search.own is not None
        self.own_by_image = search.own is not None and not self._queries_are_gallery and isinstance(search.own, str)
        self.in_gallery = torch.zeros(len(self.queries), dtype=torch.bool, device=self.embed.device)
        self._stored_in = torch.float32  # the type of given embeddings
        self.gallery: Gallery
        self.clean: Tensor

    @property
    def leaves_own_out(self) -> bool:
        """Whether any query is in the gallery, and left out of its own list."""
        return bool((self.own >= 0).any())

    @property
    def protocol(self) -> str:
        """Who searches what, in words."""
        name = "leave-one-out" if self.leaves_own_out else "separate gallery"
        parts = [name, "ignored items" * (self._ignore is not None), "relevance given" * (self._relevant is not None)]
        parts.append("several labels per image" * (self.queries.label_sets is not None))
        return ", ".join(filter(None, parts))

    def set_gallery(self, embeddings: Tensor) -> None:
        """Uses embeddings ``(G, D)`` of all items as the gallery, if they are finite and of two classes or more."""
        if len(embeddings) != len(self.items):
            raise InputError(
                f"There are {len(embeddings)} embeddings for {len(self.items)} items of the gallery; expected one "
                "each. A gallery without images is gallery=(None, labels)."
            )
        self._embeddings = check_finite(embeddings)
        self.gallery = Gallery(embeddings, self.items.labels, distance=self.distance)
        if self._relevant is None and self.items.label_sets is None and len(self._searched_classes()) < 2:
            has_junk = len(self._searched_classes()) < len(self.gallery.classes)
            junk = f" Items of the label {self._junk} are junk; with junk_label=None, it is a label as all others."
            raise InputError(
                "All items of the gallery have one label; expected two or more, else no item is wrong."
                + junk * has_junk
            )

    def set_queries(self, rows: Tensor, embeddings: Tensor) -> None:
        """Uses clean embeddings ``(n, D)`` of the queries ``rows``, and looks for those that lie in the gallery."""
        if embeddings.shape[1] != self._embeddings.shape[1]:
            raise InputError(
                f"Queries have embeddings of {embeddings.shape[1]} dimensions, items of the gallery "
                f"{self._embeddings.shape[1]}; expected as many. Resize all images to one size."
            )
        self.clean = embeddings.new_zeros(len(self.queries), embeddings.shape[1])
        self.clean[rows] = check_finite(embeddings)
        if embeddings.shape[1] == 1 and self.distance.has_unit_length:
            raise InputError(
                f"The embeddings have one dimension, and by {self.distance.name} they are 1 or -1. Expected more "
                "dimensions, or distance='euclidean', if they are searched so."
            )
        if self.own_by_image:
            found = self._copies(rows, everywhere=True)
            self.own = self.own.index_copy(0, rows, found)
            self.notes.append(
                f"own='same': {int((found >= 0).sum())} of {len(rows)} queries have their image in the gallery, and do "
                "not find this item"
            )
            if not self.items.has_images and not bool((found >= 0).any()):
                raise InputError(
                    "own='same': no query has its embedding among those of the gallery. Expected the model's own "
                    "embeddings, or own as indices; where the gallery holds no query, leave own out."
                )
        found = self._copies(rows)
        self.in_gallery[rows] = found >= 0
        if self.in_gallery.any():
            count = int(self.in_gallery.sum())
            cure = "expected one of each image" if self._has_own else "own='same' leaves it out"
            self.notes.append(f"{count} of {len(rows)} queries find their own image in the gallery; {cure}")

    def embed_and_set(
        self,
        rows: Tensor,
        batch_size: int,
        known: Any = None,
        embedded: Callable[[ImageSet, Tensor], Tensor] | None = None,
    ) -> None:
        """Embeds and sets the gallery, of which embeddings ``(G, D)`` may be known, and the queries ``rows``.

        ``embedded`` gives the embeddings of some images; None: see `embed_all`.
        """
        if known is None and not self.items.has_images:
            raise InputError("gallery has labels only; expected gallery_embeddings (G, D) beside them, or images.")
        made = embedded or (lambda images, rows: embed_all(self.embed, images, batch_size, rows))
        items = made(self.items, torch.arange(len(self.items))) if known is None else self.check_embeddings(known)
        self.set_gallery(items)
        is_gallery = known is None and self.items is self.queries
        self.set_queries(rows, items[rows] if is_gallery else made(self.queries, rows))

    def check_clean(self, rows: Tensor) -> None:
        """Embeds some of the queries ``rows`` anew, and refuses embeddings that another model gave."""
        some = rows[_some_of(len(rows)).to(rows.device)]
        apart, spread = self._apart(self.queries, some, self.clean[some], self.gallery.embeddings)
        if not self.embed.is_random and apart.amax() > self._allowed(self.gallery.embeddings, spread):
            raise InputError(
                f"The kept embeddings are not those of this model: a query's differ by {float(apart.amax()):.3g}. Use "
                "another folder for resume, or delete this one."
            )

    def _apart(self, images: ImageSet, rows: Tensor, given: Tensor, all_items: Tensor) -> tuple[Tensor, float]:
        """How far ``given`` ``(n, D)`` are from embeddings of images that are made anew, and the gallery's spread."""
        with torch.no_grad():
            anew = self.distance.vectors(finite_or_zero(self.embed.tried(images[rows])))
        vectors, items = (self.distance.vectors(finite_or_zero(part)) for part in (given, all_items))
        return (vectors - anew.to(vectors)).norm(dim=1), float((items - items.mean(0)).square().sum(1).mean().sqrt())

    def _allowed(self, all_items: Tensor, spread: float) -> float:
        """How far two embeddings of one image may be apart, beside those of the gallery ``(G, D)``."""
        return max(_ALIKE * spread, 1e-3 * self.distance.scale(self.distance.vectors(finite_or_zero(all_items))))

    def check_embeddings(self, embeddings: Any) -> Tensor:
        """Embeddings ``(G, D)`` that the user gives, on the model's device; some of them are embedded anew."""
        given = to_embeddings(embeddings)
        given = (given.clone() if given.is_inference() else given).to(self.embed.device)
        with torch.no_grad():
            dimension = self.embed(self.queries[:1]).shape[1]
        if not given.is_floating_point() and not given.is_complex():
            given = given.float()  # as those that the model gives, such as codes
        if given.ndim != 2 or given.shape[1] != dimension or given.is_complex():
            raise InputError(
                f"gallery_embeddings are {given.dtype} {tuple(given.shape)}; expected ({len(self.items)}, {dimension}) "
                "real numbers, as the model gives them."
            )
        self._stored_in = given.dtype
        if self.items.has_images and len(given) == len(self.items):
            self._check_against_images(given)
        return given

    def targets(self, rows: Tensor) -> Targets:
        """What the queries ``rows`` should find."""
        ignored = to_mask(self._ignore, rows, (len(self.queries), len(self.items)), "ignore")
        if (junk := self._is_junk(rows)) is not None:
            ignored = junk if ignored is None else ignored | junk
        relevant = to_mask(self._relevant, rows, (len(self.queries), len(self.items)), "relevant")
        if relevant is None and self.queries.label_sets is not None and self.items.label_sets is not None:
            relevant = (self.queries.label_sets[rows].float() @ self.items.label_sets.T.float()) > 0
        return Targets(self.queries.labels[rows], self.own[rows], ignored, relevant)

    def _is_junk(self, rows: Tensor) -> Tensor | None:
        """``(n, G)`` bool, for each of some queries which items are junk; None: there is no junk."""
        junk = None if self._junk is None else self.items.labels == self._junk
        return junk.expand(len(rows), -1) if junk is not None and bool(junk.any()) else None

    def mask_digests(self, rows: Tensor) -> dict[str, str]:
        """The SHA-256 of what ``ignore`` and ``relevant`` give for the queries ``rows``, if they are functions."""
        shape, found = (len(self.queries), len(self.items)), {}
        for name, mask in (("ignore", self._ignore), ("relevant", self._relevant)):
            if callable(mask):
                parts = (to_mask(mask, rows[part], shape, name) for part in batches(len(rows), 1024))
                found[_ITEMS[name]] = digest_of(part for part in parts if part is not None)
        return found

    def rows(self, subset: Sequence[int] | Tensor | None) -> Tensor:
        """Indices of the queries of a subset; None: all."""
        return to_rows(subset, len(self.queries)).to(self.embed.device)

    def with_right_item(self, rows: Tensor) -> tuple[Tensor, int]:
        """Those of the queries ``rows`` that have a right item, one at least; how many have none."""
        self.targets(rows[:1])  # functions of the user fail now, if they do
        counts = (self._counts(self.targets(rows[part])) for part in batches(len(rows), 1024))
        right, searched = (torch.cat(found) for found in zip(*counts, strict=True))
        if not searched.any():
            raise InputError(
                f"None of {len(rows)} queries finds any item: all are its own, junk or ignored. Expected items that it "
                "may find; ignore is True for those that it may not."
            )
        if bool((right == searched).all()):
            raise InputError(
                f"None of {len(rows)} queries has a wrong item in the gallery; expected items that are not right."
            )
        if not right.any():
            raise InputError(
                f"None of {len(rows)} queries has a right item in the gallery; expected labels that occur there"
                + (" at least twice." if self.leaves_own_out else ".")
            )
        return rows[right > 0], int((right == 0).sum())

    def probe(self, radii: Iterable[float]) -> None:
        """Refuses radii beyond the images' diameter, and finds out what the model gives.

        That is, whether it has gradients, and whether it answers at random; what follows from this is noted.
        """
        check_radii(radii, self.norm, self.queries[:1].shape[1:])
        check_silent(self.embed.modules)
        self.notes.extend(self.embed.probe_gradient(self.queries[:1]))
        self.embed.probe_randomness(self.queries[:_SAMPLE])
        if self.embed.is_random:
            self.notes.append(
                f"{RANDOM}: gradients are means over {SAMPLES} draws (EOT), if no attack says "
                f"else, and measures of a query are means over {ANSWERS} draws; where it is yes or no, the majority "
                "counts. The gallery is embedded once"
            )

    def note_not_finite(self, count: int) -> None:
        """Notes how many embeddings of perturbed images, which an attack came across, were NaN or infinite."""
        if count:
            self.notes.append(
                f"{count} embeddings of perturbed images were NaN or infinite; such a query finds nothing, and counts "
                "as failed"
            )

    def note_lengths(self, rows: Tensor) -> None:
        """Notes what the queries ``rows`` would find if lengths of embeddings counted, which cosine leaves out."""
        lengths = self._embeddings.float().norm(dim=1)
        if not isinstance(self.distance, Cosine) or float(lengths.amax()) <= _SAME_LENGTH * float(lengths.amin()):
            return
        by_length = Gallery(self._embeddings, self.items.labels, distance=Euclidean())
        shares = []
        for gallery in (self.gallery, by_length):
            margins = [gallery.ranking(self.clean[part], self.targets(part), 1).margin for part in rows.split(1024)]
            shares.append(100 * float((torch.cat(margins) < 0).float().mean()))
        if abs(shares[0] - shares[1]) >= _DIFFERENT:
            self.notes.append(
                f"lengths of embeddings range from {float(lengths.amin()):.3g} to {float(lengths.amax()):.3g}: by "
                f"Euclidean distance R@1 without attack would be {shares[1]:.1f}, by cosine it is {shares[0]:.1f}; "
                "distance=... has to be that of the deployed search"
            )

    def batch(self, rows: Tensor) -> QueryBatch:
        """The queries ``rows`` with the gallery that they search, ready to be attacked."""
        return QueryBatch(
            embed=self.embed,
            modules=self.embed.modules,
            gallery=self.gallery,
            pixels_of=self.items.__getitem__,
            images=self.queries[rows],
            clean=self.clean[rows],
            targets=self.targets(rows),
            norm=self.norm,
            rows=rows,
            is_random=self.embed.is_random,
        )

    def _counts(self, targets: Targets) -> tuple[Tensor, Tensor]:
        return self.gallery.num_right(targets), self.gallery.num_searched(targets)

    def _searched_classes(self) -> Tensor:
        classes = self.gallery.classes
        return classes if self._junk is None else classes[classes != self._junk]

    @property
    def num_classes(self) -> int:
        """How many classes are searched."""
        return len(self._searched_classes())

    def _read(self, queries: Images, gallery: Images | None) -> None:
        dtype = self.embed.pixel_dtype
        self.queries = ImageSet(queries, self.embed.device, "queries", dtype)
        self.items = self.queries if gallery is None else ImageSet(gallery, self.embed.device, "gallery", dtype)
        if not self.queries.has_images:
            raise InputError("queries holds labels only; expected (images, labels), as images are what is attacked.")
        for images in (self.queries,) if gallery is None else (self.queries, self.items):
            note = images.check(self.embed.space)
            if note is not None:
                self.notes.append(note)
        self.embed.probe(self.queries[:1], self.queries.given_dtype)
        if self.items.has_images and self.items[:1].shape != self.queries[:1].shape:
            self.embed.probe(self.items[:1])
        self.notes.extend(self.embed.notes)
        for images in (self.queries, self.items):
            images.dtype = self.embed.pixel_dtype
        self._join_classes()
        self._join_label_sets()

    def _note_junk(self) -> None:
        junk = 0 if self._junk is None else int((self.items.labels == self._junk).sum())
        if junk:
            self.notes.append(f"{junk} items of the label {self._junk} are junk: no query finds them")

    def _join_classes(self) -> None:
        """Compares labels by the names of their classes, where both sets have names and their lists differ."""
        one, other = self.queries.classes, self.items.classes
        if not one or not other or one == other:
            return
        lists = [f"{len(names)} classes ({', '.join(names[:3])}{' ...' * (len(names) > 3)})" for names in (one, other)]
        found = f"The queries list {lists[0]}, the gallery {lists[1]}"
        cure = "To compare the numbers, pass (images, labels)."
        if self.queries.label_sets is not None or self.items.label_sets is not None:
            raise InputError(f"{found}, so the columns of their labels differ. Expected one list in both. {cure}")
        if len({*one}) < len(one) or len({*other}) < len(other):
            raise InputError(f"{found}, where a name occurs twice. Expected each name once, or one list. {cure}")
        both = len({*one} & {*other})
        if not both and self._relevant is None:
            raise InputError(f"{found}. Labels are compared by these names; expected some that are in both. {cure}")
        joint = list(dict.fromkeys([*other, *one]))  # labels of the gallery stay as they are
        for images in (self.queries, self.items):
            images.number_by(joint)
        self.notes.append(
            f"the queries list {len(one)} classes, the gallery {len(other)}, and {both} are in both: labels are "
            "compared by the names of the classes"
        )

    def _join_label_sets(self) -> None:
        """Numbers each combination of labels alike in both sets."""
        queries, items = self.queries, self.items
        if queries.label_sets is None and items.label_sets is None:
            return
        if (
            queries.label_sets is None
            or items.label_sets is None
            or queries.label_sets.shape[1] != items.label_sets.shape[1]
        ):
            shapes = [None if s.label_sets is None else tuple(s.label_sets.shape) for s in (queries, items)]
            raise InputError(
                f"Labels of 0 and 1 are {shapes[0]} for the queries, {shapes[1]} for the gallery; expected as many "
                "labels in both."
            )
        if self._junk not in (None, JUNK):
            raise InputError(f"junk_label={self._junk} with several labels per image; expected ignore=... instead.")
        joint = torch.cat([queries.label_sets, items.label_sets]).unique(dim=0, return_inverse=True)[1]
        queries.labels, items.labels = joint[: len(queries)], joint[-len(items) :]

    def _check_against_images(self, given: Tensor) -> None:
        rows = _some_of(len(given))
        apart, spread = self._apart(self.items, rows, given[rows.to(given.device)], given)
        if apart.amax() > self._allowed(given, spread):
            raise InputError(
                f"gallery_embeddings are not those that the model gives: item {int(rows[int(apart.argmax())])} is "
                f"{float(apart.amax()):.3g} away from the embedding of its image, and the spread of all is "
                f"{spread:.3g}. Expected embeddings of this model in the order of the gallery. To search vectors of "
                "another model, pass gallery=(None, labels)."
            )

    def _copies(self, rows: Tensor, everywhere: bool = False) -> Tensor:
        """``(n,)`` index of an item that has a query's image; -1: there is none.

        Args:
            rows: ``(n,)`` which queries.
            everywhere: whether it may be an item that ``ignore`` covers.
        """
        seek = Copies(self.queries, self.items, self.gallery, self._stored_in)

        def targets(rows: Tensor) -> Targets:
            if not everywhere:
                return self.targets(rows)
            return Targets(self.queries.labels[rows], torch.full_like(rows, -1), self._is_junk(rows))

        return torch.cat([seek(part, self.clean[part], targets(part)) for part in rows.split(256)])

    def _own(self, own: Sequence[int] | Tensor | str | None) -> Tensor:
        device, count, is_gallery = self.embed.device, len(self.queries), self._queries_are_gallery
        if own is None or (isinstance(own, str) and own == "same"):
            if is_gallery:
                return torch.arange(count, device=device)
            return torch.full((count,), -1, device=device)
        if isinstance(own, str):
            raise InputError(f"own={own!r}; expected 'same', or the index in the gallery of each query's own item.")
        found = torch.tensor(to_whole_numbers(own, "own"), dtype=torch.long, device=device)
        exists = (found >= -1) & (found < len(self.items))
        if is_gallery or len(found) != count or not bool(exists.all()):
            raise InputError(
                f"own holds {found.tolist()[:8]}...; expected, together with a gallery, for each of {count} queries "
                "the index of the item that is the query itself, or -1."
            )
        self._check_own_labels(found)
        return found

    def _check_own_labels(self, own: Tensor) -> None:
        with_own = (own >= 0).nonzero().squeeze(1)
        other = with_own[self.queries.labels[with_own] != self.items.labels[own[with_own]]]
        if not len(other) or self._relevant is not None:
            return
        text = f"own: {len(other)} of {len(with_own)} own items have another label than their query"
        if 2 * len(other) > len(with_own):
            first = int(other[0])
            raise InputError(
                f"{text}, such as item {int(own[first])} of query {first}. Expected, for each query, the index in the "
                "gallery of the same image."
            )
        self.notes.append(text)


def _some_of(total: int) -> Tensor:
    """A few indices below ``total``, spread evenly."""
    return torch.linspace(0, total - 1, min(_SAMPLE, total), dtype=torch.float64).long()
