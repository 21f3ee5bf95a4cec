"""An embedding as a classifier over its gallery, and attacks on classifiers that run on it unmodified."""

from functools import partial

import by_loops
import pytest
import torch
import torchattacks
from query_batches import bench_of, embedded, images_of, length, network

from pml_adversarial.attacks.ball import project
from pml_adversarial.evaluation.attacks.gradients import classifier_attack
from pml_adversarial.evaluation.attacks.kinds import QueryAttack
from pml_adversarial.evaluation.retrieval.classifier import RetrievalClassifier, separable_groups
from pml_adversarial.evaluation.retrieval.gallery import Gallery, Targets

EPS = 0.05


def classifier(batch):
    return RetrievalClassifier(batch.embed, batch.gallery, batch.images, batch.targets, batch.norm, *batch.modules)


def logits_by_loops(query, own, embeddings, labels, classes):
    found = by_loops.similarities(query, own, embeddings)
    return [max([value for j, value in found.items() if labels[j] == c], default=-1.0) for c in classes]


@pytest.fixture
def task():
    images, labels = images_of()
    return bench_of(network(), (images, labels * 10 - 7))


@pytest.fixture
def batch(task):
    return task.batch(torch.arange(24))


class TestLogits:
    def test_by_loops(self, batch):
        model = classifier(batch)
        embeddings, labels = batch.gallery.embeddings, batch.gallery.labels.tolist()
        found = model(batch.images) / model.scale
        wanted = [logits_by_loops(batch.clean[i], i, embeddings, labels, [-7, 3, 13, 23]) for i in range(24)]
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-6)
        assert model.num_classes == 4
        assert model.labels.tolist() == [(label + 7) // 10 for label in labels]

    def test_right_exactly_if_recall_at_1_is(self, batch):
        moved = project(batch.images + torch.randn_like(batch.images), batch.images, EPS, "Linf")
        for images in (batch.images, moved):
            right = classifier(batch)(images).argmax(1) == classifier(batch).labels
            stands = [
                by_loops.stands(query, batch.targets.labels[i], i, batch.gallery.embeddings, batch.gallery.labels)
                for i, query in enumerate(batch.embed(images))
            ]
            assert right.tolist() == stands
            assert 0 < sum(stands) < 24

    def test_a_class_of_the_query_alone_is_the_least_likely(self):
        images = torch.rand(4, 1, 2, 2)
        gallery = Gallery(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 1]]), torch.tensor([0, 1, 1, 1]))
        model = RetrievalClassifier(
            lambda x: gallery.embeddings[: len(x)], gallery, images, gallery.leave_one_out(), "Linf"
        )
        assert (model(images[:1]) / model.scale)[0, 0].item() == 0  # the lowest similarity of all items

    @pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
    def test_rows_in_any_order_each_leave_themselves_out(self, norm):
        task = bench_of(network(), images_of(), norm=norm)
        batch = task.batch(torch.arange(24).flip(0))
        radius = {"Linf": EPS, "L2": 0.3, "L1": 1.2}[norm]
        part = batch[separable_groups(batch.images, batch.targets, radius, norm)[0]]
        assert len(part) > 12
        model = classifier(part)
        rows = torch.randint(len(part), (40,), generator=torch.Generator().manual_seed(1))
        moved = project(part.images[rows] + torch.randn(40, 1, 6, 6), part.images[rows], radius, norm)
        found = model(moved) / model.scale
        for row, query, logits in zip(rows.tolist(), part.embed(moved), found, strict=True):
            own = int(part.targets.own[row])
            wanted = logits_by_loops(query, own, batch.gallery.embeddings, batch.gallery.labels.tolist(), range(4))
            torch.testing.assert_close(logits, torch.tensor(wanted), rtol=0, atol=1e-6)

    def test_separate_gallery_leaves_nothing_out(self):
        images, labels = images_of()
        task = bench_of(network(), (images[:6], labels[:6]), (images, labels))
        batch = task.batch(torch.arange(6))
        assert batch.targets.own.tolist() == [-1] * 6
        assert (classifier(batch)(batch.images) / classifier(batch).scale).amax(1).tolist() == pytest.approx([1] * 6)

    def test_logits_are_spread_alike_at_any_scale_of_similarities(self, batch):
        assert classifier(batch)(batch.images).std(1).median().item() == pytest.approx(10)

    def test_gradient_by_differences(self, task):
        task.embed.modules[0].double()
        images, labels = images_of(8)
        double = bench_of(task.embed.modules[0], (images.double(), labels)).batch(torch.arange(8))
        model = classifier(double)
        assert torch.autograd.gradcheck(lambda x: model(x).logsumexp(1), double.images[:2].clone().requires_grad_())

    def test_half_precision_images(self):
        images, labels = images_of()
        flat = torch.nn.Flatten()
        batch = bench_of(flat, (images.half(), labels)).batch(torch.arange(24))
        assert classifier(batch)(batch.images).argmax(1).shape == (24,)


class TestApart:
    def images(self, *values):
        return torch.tensor(values).reshape(-1, 1, 1, 1)

    def groups(self, images, eps, labels=None, own=None):
        count = len(images)
        targets = Targets(
            torch.zeros(count).long() if labels is None else torch.tensor(labels),
            torch.arange(count) if own is None else own,
        )
        return [group.tolist() for group in separable_groups(images, targets, eps, "Linf")]

    def test_near_images_are_in_different_groups(self):
        assert self.groups(self.images(0.1, 0.15, 0.5, 0.2), 0.04) == [[0, 2, 3], [1]]

    def test_none_closer_than_twice_the_radius_in_any_group(self):
        images, labels = images_of(40)
        for norm, eps in (("Linf", 0.22), ("L2", 0.7), ("L1", 3.0)):
            found = separable_groups(images, Targets(labels, torch.arange(40)), eps, norm)
            assert sorted(torch.cat(found).tolist()) == list(range(40))
            assert 1 < len(found) < 40
            for group in found:
                flat = images[group].flatten(1)
                for i in range(len(group)):
                    for j in range(i):
                        change = flat[i] - flat[j]
                        assert length(change[None], norm) > 2 * eps

    @pytest.mark.parametrize("norm", ["L0", "patch"])
    def test_where_positions_count_each_is_alone(self, norm):
        targets = Targets(torch.zeros(3).long(), torch.arange(3))
        found = separable_groups(torch.rand(3, 1, 2, 2), targets, 1, norm)
        assert [group.tolist() for group in found] == [[0], [1], [2]]

    def test_duplicates_of_one_label_may_share_a_group(self):
        assert self.groups(self.images(0.1, 0.1, 0.1), 0.04, [5, 5, 6]) == [[0, 1], [2]]

    def test_without_queries_in_the_gallery_nothing_need_be_told_apart(self):
        assert self.groups(self.images(0.1, 0.1, 0.12), 0.4, own=torch.full((3,), -1)) == [[0, 1, 2]]

    def test_small_differences_of_large_images_count(self):
        base = torch.rand(1, 3, 64, 64)
        images = torch.cat([base, base + 1e-3])  # far less than products of such vectors resolve
        targets = Targets(torch.zeros(2).long(), torch.arange(2))
        distance = 1e-3 * images[0].numel() ** 0.5
        assert len(separable_groups(images, targets, distance / 2 * 1.01, "L2")) == 2
        assert len(separable_groups(images, targets, distance / 2 * 0.99, "L2")) == 1


ATTACKS = {
    "PGD": (partial(torchattacks.PGD, alpha=0.02, steps=10), None),
    "APGD": (partial(torchattacks.APGD, steps=10), None),
    "APGDT": (partial(torchattacks.APGDT, steps=10), 3),
    "FAB": (partial(torchattacks.FAB, steps=5), 3),
    "FAB targeted": (partial(torchattacks.FAB, multi_targeted=True, steps=5), 3),
    "Square": (partial(torchattacks.Square, n_queries=60), None),
}


class TestAttacksOnClassifiers:
    @pytest.mark.parametrize("name", ATTACKS)
    @pytest.mark.parametrize("norm", ["Linf", "L2"])
    @pytest.mark.parametrize("separate", [False, True])
    def test_break_queries_within_the_budget(self, name, norm, separate):
        make, targets = ATTACKS[name]
        if name == "PGD":
            if norm == "L2":
                make = partial(torchattacks.PGDL2, alpha=0.05, steps=10)
            made = make

            def make(model, norm, seed, eps):
                return made(model, eps=eps)

        labels = images_of()[1]
        task = bench_of(network(), images_of(), images_of(seed=1) if separate else None, norm)
        batch, eps = task.batch(torch.arange(24)), EPS if norm == "Linf" else 0.3
        outcome = QueryAttack(name, classifier_attack(make, targets)).run(batch, eps, 0, 6)
        change = (outcome.images - batch.images).flatten(1)
        assert (change.abs().amax(1) if norm == "Linf" else change.norm(dim=1)).max() <= eps + 1e-6
        assert 0 <= outcome.images.min() <= outcome.images.max() <= 1
        clean = batch.gallery.ranking(batch.clean, batch.targets, 6).margin < 0
        stands = outcome.ranking.margin < 0
        again = [
            by_loops.stands(query, labels[i], int(batch.targets.own[i]), batch.gallery.embeddings, labels)
            for i, query in enumerate(embedded(task.embed.modules[0], outcome.images))
        ]
        assert stands.tolist() == again
        assert (stands & clean).sum() < clean.sum()

    @pytest.mark.slow
    def test_autoattack(self):
        task = bench_of(network(), images_of(12))
        batch = task.batch(torch.arange(12))

        def make(model, eps, norm, seed, n_classes):
            return torchattacks.AutoAttack(model, norm=norm, eps=eps, n_classes=n_classes, seed=seed)

        outcome = QueryAttack("autoattack", classifier_attack(make, 3)).run(batch, 0.03, 0, 6)
        assert (outcome.images - batch.images).abs().max() <= 0.03 + 1e-6
        clean = batch.gallery.ranking(batch.clean, batch.targets, 6).margin < 0
        assert ((outcome.ranking.margin < 0) & clean).sum() < clean.sum()

    def test_leave_the_model_in_eval_mode(self, batch):
        batch.embed.modules[0].eval()
        classifier_attack(partial(torchattacks.APGD, steps=2))(batch, EPS, 0)
        assert not any(module.training for module in batch.embed.modules[0].modules())

    def test_large_radii_leave_the_right_item_out_all_the_same(self):
        """In one group no two rows could be mistaken, so the found broken rows are those of each row alone."""
        task = bench_of(network(), images_of(8))
        batch, eps = task.batch(torch.arange(8)), 0.45
        assert len(separable_groups(batch.images, batch.targets, eps, "Linf")) > 4
        asked = []

        def make(model, eps, norm, seed):
            def attack(images, labels):
                moved = project(images + 2 * eps * (torch.rand_like(images) - 0.5).sign(), images, eps, norm)
                asked.append((moved, model(moved) / model.scale))
                return moved

            return attack

        classifier_attack(make)(batch, eps, 0)
        rows = torch.cat(separable_groups(batch.images, batch.targets, eps, "Linf")).tolist()
        labels = batch.gallery.labels.tolist()
        for row, moved, logits in zip(
            rows, torch.cat([m for m, _ in asked]), torch.cat([x for _, x in asked]), strict=True
        ):
            query = batch.embed(moved.unsqueeze(0))[0]
            wanted = logits_by_loops(query, row, batch.gallery.embeddings, labels, range(4))
            torch.testing.assert_close(logits, torch.tensor(wanted), rtol=0, atol=1e-5)
