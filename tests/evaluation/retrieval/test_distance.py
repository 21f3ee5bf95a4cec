"""How embeddings are compared, against plain loops, PML's own distances, and gradients by differences."""

import math

import pytest
import torch
from pytorch_metric_learning import distances
from some_galleries import some

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.retrieval.distance import DISTANCES, Euclidean, check_unit_length, find_distance


def length(a):
    return math.sqrt(sum(x * x for x in a))


def product(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def euclidean(a, b):
    return length([x - y for x, y in zip(a, b, strict=True)])


def unit(a):
    return [x / length(a) for x in a]


BY_LOOPS = {
    "cosine": lambda a, b: product(unit(a), unit(b)),
    "euclidean": lambda a, b: -euclidean(a, b),
    "normalized_euclidean": lambda a, b: -euclidean(unit(a), unit(b)),
    "inner_product": product,
}
OF_PML = {
    "cosine": distances.CosineSimilarity(),
    "euclidean": distances.LpDistance(normalize_embeddings=False),
    "normalized_euclidean": distances.LpDistance(),
    "inner_product": distances.DotProductSimilarity(normalize_embeddings=False),
}


class Manhattan(distances.BaseDistance):
    """A distance of one's own, which has the matrix alone."""

    def compute_mat(self, query_emb, ref_emb):
        return (query_emb.unsqueeze(1) - ref_emb).abs().sum(2)


class Weighted(distances.BaseDistance):
    """Has weights, in single precision."""

    def __init__(self):
        super().__init__(normalize_embeddings=False)
        weights = torch.rand(5, 5, generator=torch.Generator().manual_seed(3))
        self.weights = torch.nn.Parameter(weights, requires_grad=False)

    def compute_mat(self, query_emb, ref_emb):
        return torch.cdist(query_emb @ self.weights, ref_emb @ self.weights)


OTHERS = [
    distances.SNRDistance(),
    distances.LpDistance(p=1, normalize_embeddings=False),
    Manhattan(),
    Manhattan(power=2),
]


def test_all_names_are_held_against_loops():
    assert set(DISTANCES) == set(BY_LOOPS)


@pytest.mark.parametrize("name", DISTANCES)
class TestNamed:
    def test_by_loops(self, name):
        one, other = some(4), some(5, 1) * torch.tensor([[0.1], [1], [3], [10], [100]])
        distance = find_distance(name)
        wanted = torch.tensor([[BY_LOOPS[name](a.tolist(), b.tolist()) for b in other] for a in one])
        one, other = distance.vectors(one), distance.vectors(other)
        torch.testing.assert_close(distance.to_all(one, other), wanted)
        torch.testing.assert_close(distance.to_each(one, other[:4]), wanted.diagonal())

    def test_of_pml_is_the_same(self, name):
        found = find_distance(OF_PML[name])
        assert type(found) is type(find_distance(name))
        assert found.name == name
        matrix = OF_PML[name](some(4).double(), some(5, 1).double())
        vectors = [found.vectors(some(4).double()), found.vectors(some(5, 1).double())]
        sign = 1 if OF_PML[name].is_inverted else -1
        torch.testing.assert_close(found.to_all(*vectors), sign * matrix)

    def test_gradient_by_differences(self, name):
        distance, items = find_distance(name), some(4, 1).double()
        for compare in (distance.to_all, distance.to_each):
            assert torch.autograd.gradcheck(
                lambda q, compare=compare: compare(distance.vectors(q), distance.vectors(items)),
                some(4).double().requires_grad_(),
            )

    def test_queries_rank_as_their_vectors_do(self, name):
        distance = find_distance(name)
        items = distance.vectors(some(30, 1))
        ranks = [
            distance.to_all(v, items).argsort(1) for v in (distance.vectors(some(5)), distance.query_vectors(some(5)))
        ]
        assert torch.equal(*ranks)

    def test_half_precision_is_raised(self, name):
        distance = find_distance(name)
        assert distance.vectors(some(3).half()).dtype == torch.float32
        assert distance.vectors(some(3).double()).dtype == torch.float64


class TestEuclidean:
    def test_small_distances_far_from_zero_are_not_rounded_away(self):
        one = torch.full((3, 64), 100.0)
        other = one.clone()
        other[:, 0] += torch.tensor([0.01, 0.02, 0.03])
        found = Euclidean().to_all(one[:1], other)
        torch.testing.assert_close(found, -(other - one)[:, 0].unsqueeze(0), rtol=1e-4, atol=0)

    def test_has_a_finite_gradient_at_0(self):
        point = some(3).requires_grad_()
        for compare in (Euclidean().to_all, Euclidean().to_each):
            (gradient,) = torch.autograd.grad(compare(point, point.detach()).sum(), point)
            assert gradient.isfinite().all()


@pytest.mark.parametrize("distance", OTHERS, ids=lambda d: f"{type(d).__name__}-{d.power}")
class TestOfPML:
    def test_values_are_its_own(self, distance):
        found, queries, items = find_distance(distance), some(4).double(), some(5, 1).double()
        matrix = distance(queries, items)
        sign = 1 if distance.is_inverted else -1
        torch.testing.assert_close(found.to_all(found.vectors(queries), found.vectors(items)), sign * matrix)
        torch.testing.assert_close(
            found.to_each(found.vectors(queries), found.vectors(items[:4])), sign * matrix.diagonal()
        )
        assert type(distance).__name__ in found.name

    def test_scale_is_of_the_size_of_its_values(self, distance):
        found = find_distance(distance)
        vectors = found.vectors(some(50))
        largest = float(distance(vectors, vectors).abs().max())
        assert found.scale(vectors) == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("options", [{"p": 1}, {"power": 2}, {"p": 3, "power": 2}])
@pytest.mark.parametrize("kind", [distances.CosineSimilarity, distances.DotProductSimilarity, distances.LpDistance])
def test_options_of_pml_that_change_similarities_are_kept(kind, options):
    distance = kind(**options)
    found, queries, items = find_distance(distance), some(4).double(), some(5, 1).double()
    sign = 1 if distance.is_inverted else -1
    torch.testing.assert_close(
        found.to_all(found.vectors(queries), found.vectors(items)), sign * distance(queries, items)
    )


class TestRefusals:
    @pytest.mark.parametrize(
        "distance",
        ["manhattan", 3, None, distances.LpDistance, distances.BatchedDistance(distances.LpDistance()), torch.cdist],
    )
    def test_what_is_no_distance(self, distance):
        with pytest.raises(
            InputError, match=r"(?s)distance=.*; expected 'cosine', .*LpDistance\(normalize_embeddings=False\)"
        ):
            find_distance(distance)

    @pytest.mark.parametrize("distance", ["cosine", "normalized_euclidean", distances.LpDistance()])
    def test_unit_length_is_asked_for(self, distance):
        check_unit_length(distance, "it holds")

    @pytest.mark.parametrize("distance", ["euclidean", "inner_product", distances.SNRDistance()])
    def test_what_has_none_is_refused(self, distance):
        with pytest.raises(InputError, match="expected 'cosine' or 'normalized_euclidean', which rank alike: it holds"):
            check_unit_length(distance, "it holds")


def test_weights_of_a_distance_keep_their_type():
    distance, one, other = Weighted(), some(4).double(), some(6, 1).double()
    found = find_distance(distance).to_all(one, other)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, -distance(one.float(), other.float()).double())


def test_a_power_is_kept_as_thresholds_are_in_its_unit():
    squared, one, other = distances.LpDistance(power=2, normalize_embeddings=False), some(4), some(6, 1)
    found = find_distance(squared)
    torch.testing.assert_close(
        found.to_all(found.vectors(one), found.vectors(other)), -torch.cdist(one, other).square()
    )
