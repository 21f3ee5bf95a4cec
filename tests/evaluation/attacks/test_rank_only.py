"""A black-box attack that sees a list of items: what it asks, what it lowers, and what it breaks."""

from dataclasses import replace

import by_loops
import pytest
import torch
from query_batches import RADIUS, bench_of, both_norms, embedded, images_of, network

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import evaluate_robustness
from pml_adversarial.evaluation.attacks.rank_only import rank_only_attack
from pml_adversarial.evaluation.suites import quick


class Catalogue:
    """All that the attacker sees: the labels of the items, and which ones are found, nearest first."""

    def __init__(self, gallery):
        self.labels, self._gallery, self.lists = gallery.labels, gallery, []

    def nearest(self, queries, targets, count):
        assert not queries.requires_grad
        self.lists.append(self._gallery.nearest(queries, targets, count))
        return self.lists[-1]


class Camera:
    """A model that takes images without gradient, and notes how many."""

    def __init__(self, embed):
        self.embed, self.asked = embed, []

    def __call__(self, images):
        assert not images.requires_grad
        self.asked.append(images.clone())
        with torch.no_grad():
            return self.embed(images)


def seen(batch):
    """The batch with nothing but what a rank-only attacker sees."""
    return replace(
        batch, embed=Camera(batch.embed), gallery=Catalogue(batch.gallery), modules=(), clean=batch.clean * 0
    )


@pytest.fixture
def batch():
    return bench_of(network(), images_of()).batch(torch.arange(24))


class TestSeesTheListAlone:
    def test_nothing_else_is_asked(self, batch):
        part, whole = seen(batch), rank_only_attack(20, listed=6)
        torch.manual_seed(0)
        blind = whole.perturb(part, 0.05, 0)
        torch.manual_seed(0)
        assert torch.equal(blind, whole.perturb(batch, 0.05, 0))
        assert len(part.embed.asked) == len(part.gallery.lists) == 20
        assert {items.shape[1] for items in part.gallery.lists} == {6}

    def test_stops_when_the_first_item_is_wrong_and_lowers_the_relevance_by_loops(self, batch):
        """The search is followed from what was asked and answered alone."""
        part, labels = seen(batch), batch.gallery.labels.tolist()
        torch.manual_seed(0)
        found = rank_only_attack(25, listed=7).perturb(part, 0.05, 0)
        kept = dict.fromkeys(range(24))
        lowest, left, stopped = dict.fromkeys(range(24), 99.0), list(range(24)), 0
        for images, lists in zip(part.embed.asked, part.gallery.lists, strict=True):
            assert len(images) == len(left)
            still = []
            for row, image, items in zip(left, images, lists.tolist(), strict=True):
                right = [labels[item] == labels[row] for item in items]
                relevance = sum(0.5 ** (place + 1) for place, is_right in enumerate(right) if is_right)
                if not right[0] or relevance <= lowest[row]:
                    lowest[row], kept[row] = relevance, image
                if right[0]:
                    still.append(row)
            stopped += len(left) - len(still)
            left = still
        assert 5 < stopped < 24
        assert all(torch.equal(found[row], kept[row]) for row in range(24))


class TestInAnEvaluation:
    @both_norms
    def test_breaks_queries_and_joins_the_worst_case(self, norm):
        model, (images, labels) = network(), images_of()
        attacks, eps = (*quick(3, 1), rank_only_attack(100)), RADIUS[norm]
        report = evaluate_robustness(model, (images, labels), eps=eps, attacks=attacks, norm=norm, checks=False)
        result = report.attacks[2]
        assert (result.attack, result.black_box, result.backward_passes) == ("rank-only", True, 0)
        assert 0 < result.forward_passes <= 101 * 24
        assert result.robust_flags.count("1") < report.clean_flags.count("1") - 3
        flags = zip(*(one.robust_flags for one in report.attacks), strict=True)
        assert report.worst[0].robust_flags == "".join(map(min, flags))

    def test_breaks_a_model_without_gradient_by_loops(self):
        model = network().eval()
        images, labels = images_of()

        def model_without_gradient(x):
            return torch.from_numpy(model(x).detach().numpy())

        attacks = [rank_only_attack(150)]
        options = {"eps": 0.05, "attacks": attacks, "keep_attacked": True, "checks": False}
        report = evaluate_robustness(model_without_gradient, (images, labels), **options)
        items, queries = embedded(model, images), embedded(model, report.attacked[0.05])
        stands = ["01"[by_loops.stands(queries[i], labels[i], i, items, labels)] for i in range(24)]
        assert report.worst[0].robust_flags == "".join(stands)
        assert stands.count("1") < report.clean_flags.count("1") / 2

    def test_a_longer_list_than_there_are_items(self):
        report = evaluate_robustness(
            network(), images_of(9, 3), eps=0.05, attacks=[rank_only_attack(10, listed=50)], checks=False
        )
        assert report.attacks[0].forward_passes > 9

    @pytest.mark.parametrize("options", [{"queries": 0}, {"queries": 1.5}, {"listed": 0}, {"listed": "all"}])
    def test_options_are_checked(self, options):
        with pytest.raises(InputError, match="expected a whole number"):
            rank_only_attack(**options)
