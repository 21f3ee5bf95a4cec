"""The watch on collapse: what it measures, when it speaks, and how it holds the attack back."""

import logging
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torchattacks
from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss, TripletMarginLoss
from seed_paper import seed_paper_loss
from torch import nn

from pml_adversarial import AdversarialLoss
from pml_adversarial.defenses import ATTA
from pml_adversarial.training.batch import Batch
from pml_adversarial.training.monitor import EVERY, SEARCHED_EVERY, CollapseMonitor, SearchMargin, batch_recall
from pml_adversarial.training.plan import plan_rows, replace_rows

MEASUREMENTS = 20  # that make an average


def measured(recalls, attacked=None, **options):
    monitor = CollapseMonitor(**options)
    for step, recall in enumerate(recalls):
        monitor.measure(step * EVERY, recall, attacked)
    return monitor


class TestCollapseMonitor:
    def test_lets_the_attack_spend_all_at_first(self):
        assert CollapseMonitor().share == 1

    def test_falls_while_the_embedding_collapses_and_comes_back(self):
        monitor = measured([0.8] * 40)
        assert monitor.share == 1
        shares = []
        for recall in [0.0] * 60 + [0.8] * 60:
            monitor.measure(0, recall, None)
            shares.append(monitor.share)
        assert min(shares) == 0
        assert shares[:5] == [1] * 5  # the average takes a while to fall by half
        assert shares[-1] == 1
        steps = {round(b - a, 6) for a, b in pairwise(shares)}
        assert steps <= {-0.05, 0, 0.05}

    def test_does_not_where_it_is_not_guarded(self):
        assert measured([0.8] * 40 + [0.0] * 60, guarded=False).share == 1

    def test_a_half_that_is_left_is_no_collapse(self):
        assert measured([0.8] * 40 + [0.41] * 200).share == 1

    def test_an_untrained_network_is_no_collapse(self):
        assert measured([0.02] * 10 + [0.0] * 8 + [0.01] * 100).share > 0.9

    def test_averages_over_the_last_measurements(self):
        assert measured([0.2, 0.4, 0.6]).recall == pytest.approx(0.4)
        assert measured([0.0] * 50 + [1.0]).recall == pytest.approx(1 / MEASUREMENTS)

    def test_is_no_number_before_the_first(self):
        monitor = CollapseMonitor()
        assert math.isnan(monitor.recall)
        monitor.measure(0, 0.5, None)
        assert monitor.recall == 0.5
        assert math.isnan(monitor.recall_attacked)

    def test_attacked_rows_have_an_average_of_their_own(self):
        monitor = measured([0.5] * 3)
        for attacked in (0.1, 0.3):
            monitor.measure(0, 0.5, attacked)
        assert monitor.recall_attacked == pytest.approx(0.2)

    def test_state(self):
        first = measured([0.8] * 40 + [0.0] * 25, attacked=0.1)
        second = CollapseMonitor()
        second.load_state_dict(first.state_dict())
        assert vars(second) == vars(first)
        assert all(isinstance(value, int | float) for value in first.state_dict().values())


class TestWarnings:
    def test_of_a_collapse(self, caplog):
        measured([0.8] * 40 + [0.1] * 40)
        assert "R@1 within the batch fell from 80 % to" in caplog.text
        assert "held back" in caplog.text
        assert "keep_clean=True" in caplog.text

    def test_of_a_collapse_without_guard(self, caplog):
        measured([0.8] * 40 + [0.1] * 40, guarded=False)
        assert "held back" not in caplog.text

    def test_of_an_eps_out_of_reach(self, caplog):
        monitor = measured([0.8] * MEASUREMENTS, attacked=0.05)
        assert monitor.out_of_reach
        assert "after 96 steps R@1 within the batch is 80 % without attack and 5 % under it" in caplog.text
        assert len(caplog.records) == 1

    def test_which_is_repeated_every_500_steps(self, caplog):
        measured([0.8] * 6 * MEASUREMENTS, attacked=0.05)
        assert ["after 96 steps" in message for message in caplog.messages] == [True, False]
        assert ["after 596 steps" in message for message in caplog.messages] == [False, True]

    def test_not_after_fewer_measurements_at_full_strength(self, caplog):
        monitor = measured([0.8] * MEASUREMENTS)
        for step in range(MEASUREMENTS - 1):
            monitor.measure(step, 0.8, 0.05)
        assert not monitor.out_of_reach
        assert caplog.records == []
        monitor.measure(0, 0.8, 0.05)
        assert monitor.out_of_reach
        assert len(caplog.records) == 1

    def test_of_an_eps_that_an_attack_on_the_search_finds_out_of_reach(self, caplog):
        """The attack of training leaves a third of the rows found; the attack on the search, a tenth."""
        monitor = CollapseMonitor()
        for step in range(MEASUREMENTS):
            if step == 15:
                monitor.measure_searched(0.05)
            monitor.measure(step * EVERY, 0.6, 0.2)
        assert monitor.out_of_reach
        assert "is 60 % without attack and 5 % under it" in caplog.text

    def test_none_of_an_attack_on_the_search_that_leaves_enough(self, caplog):
        monitor = CollapseMonitor()
        for step in range(MEASUREMENTS):
            monitor.measure_searched(0.15)
            monitor.measure(step * EVERY, 0.6, 0.2)
        assert not monitor.out_of_reach
        assert monitor.recall_searched == pytest.approx(0.15)
        assert caplog.records == []

    def test_none_of_a_good_run(self, caplog):
        with caplog.at_level(logging.DEBUG):
            measured([0.5 + 0.004 * step for step in range(100)] + [0.9] * 200, attacked=0.3)
        assert caplog.records == []


def batch_of(embeddings, labels, num_queries=None):
    return Batch(embeddings, embeddings, embeddings, labels, None, num_queries or len(embeddings))


def recall_by_loops(queries, of, clean, labels):
    hits = []
    for query, row in zip(queries, of, strict=True):
        others = [other for other in range(len(clean)) if other != row]
        if not any(labels[other] == labels[row] for other in others):
            continue
        distance = {
            o: (nn.functional.normalize(query, dim=0) - nn.functional.normalize(clean[o], dim=0)).norm() for o in others
        }
        right = min(distance[o] for o in others if labels[o] == labels[row])
        wrong = min([distance[o] for o in others if labels[o] != labels[row]], default=torch.inf)
        hits.append(right < wrong)
    return sum(map(bool, hits)) / len(hits)


class TestBatchRecall:
    @pytest.mark.parametrize("seed", range(3))
    def test_by_loops(self, seed):
        generator = torch.Generator().manual_seed(seed)
        clean, labels = torch.randn(12, 3, generator=generator), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 5])
        copies, rows = torch.randn(5, 3, generator=generator), torch.tensor([1, 4, 9, 10, 4])
        plan = replace_rows(rows[:4], 12, None)
        plan = type(plan)(rows, plan.pool_indices, None)
        found = batch_recall(TripletMarginLoss(), batch_of(clean, labels), plan, copies)
        expected = [recall_by_loops(clean, range(12), clean, labels), recall_by_loops(copies, rows, clean, labels)]
        assert found.tolist() == pytest.approx(expected)

    def test_a_similarity_counts_the_other_way(self):
        from pytorch_metric_learning.distances import CosineSimilarity

        clean, labels = torch.randn(8, 3), torch.arange(8) // 2
        plan = replace_rows(torch.arange(8), 8, None)
        by_distance, by_similarity = (
            batch_recall(loss, batch_of(clean, labels), plan, clean + 0.3)
            for loss in (ContrastiveLoss(), ContrastiveLoss(0.9, 0.1, distance=CosineSimilarity()))
        )
        assert by_distance.tolist() == by_similarity.tolist()

    def test_equal_embeddings_find_nothing(self):
        plan = replace_rows(torch.arange(6), 6, None)
        found = batch_recall(
            TripletMarginLoss(), batch_of(torch.ones(6, 2), torch.arange(6) // 2), plan, torch.ones(6, 2)
        )
        assert found.tolist() == [0, 0]

    def test_no_copies_are_no_number(self):
        plan = plan_rows((torch.empty(0, dtype=torch.long),) * 3, ["anchor"], 4)
        found = batch_recall(
            TripletMarginLoss(), batch_of(torch.randn(4, 2), torch.arange(4) // 2), plan, torch.empty(0, 2)
        )
        assert found[1].isnan()
        assert not found[0].isnan()


class TestSearchMargin:
    @pytest.mark.parametrize("seed", range(3))
    def test_by_loops(self, seed):
        generator = torch.Generator().manual_seed(seed)
        clean, labels = torch.randn(9, 3, generator=generator), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
        rows = torch.tensor([1, 4, 7, 8])
        copies = torch.randn(4, 3, generator=generator)
        score = SearchMargin(TripletMarginLoss(), batch_of(clean, labels), rows)
        unit = nn.functional.normalize
        for value, copy, row in zip(score(copies).tolist(), copies, rows.tolist(), strict=True):
            away = [(unit(copy, dim=0) - unit(clean[o], dim=0)).norm().item() for o in range(9)]
            right = [away[o] for o in range(9) if o != row and labels[o] == labels[row]]
            wrong = [away[o] for o in range(9) if labels[o] != labels[row]]
            assert value == pytest.approx(min(right) - min(wrong) if right else 0, abs=1e-6)
        expected = recall_by_loops(copies, rows.tolist(), clean, labels)
        assert score.recall(copies).item() == pytest.approx(expected)

    def test_has_a_finite_gradient_where_there_is_nothing_to_find(self):
        for labels in (torch.zeros(4, dtype=torch.long), torch.arange(4)):
            embeddings = torch.randn(4, 2, requires_grad=True)
            score = SearchMargin(TripletMarginLoss(), batch_of(embeddings.detach(), labels), torch.arange(4))
            (gradient,) = torch.autograd.grad(score(embeddings).sum(), embeddings)
            assert not gradient.any()


def tiny(perturb="all", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8))
    attack = partial(torchattacks.PGD, eps=0.05, alpha=0.05, steps=1)
    return model, seed_paper_loss(TripletMarginLoss(), model, attack=attack, perturb=perturb, seed=0, **options)


class TestInTraining:
    def test_measures_every_few_steps(self, images, labels, monkeypatch):
        model, loss_func = tiny()
        looks = []
        monkeypatch.setattr(loss_func.adversary.monitor, "measure", lambda *found: looks.append(found))
        for _ in range(2 * EVERY + 1):
            loss_func(model(images), labels)
        assert [step for step, *_ in looks] == [0, EVERY, 2 * EVERY]

    def test_attacked_counts_at_full_strength_alone(self, images, labels, monkeypatch):
        model, loss_func = tiny(warmup=EVERY)
        found = []
        monkeypatch.setattr(loss_func.adversary.monitor, "measure", lambda step, recall, hit, losses: found.append(hit))
        for _ in range(EVERY + 1):
            loss_func(model(images), labels)
        assert found[0] is None
        assert 0 <= found[1] <= 1

    def test_the_search_is_attacked_now_and_then(self, images, labels):
        model, loss_func = tiny()
        assert math.isnan(loss_func.records.batch_recall_searched)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for step in range(SEARCHED_EVERY + 1):
            assert math.isnan(loss_func.batch_recall_searched), step
            loss_func(model(images), labels)
        found = loss_func.adversary.monitor
        assert found.searched_measurements == 1
        assert loss_func.records.batch_recall_searched == found.recall_searched <= found.recall
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())

    def test_the_search_is_attacked_as_by_hand(self, images, labels):
        model, loss_func = tiny()
        for _ in range(SEARCHED_EVERY + 1):
            loss_func(model(images), labels)
        clean = model(images).detach()
        score = SearchMargin(TripletMarginLoss(), batch_of(clean, labels), torch.arange(8))
        moved = images.clone().requires_grad_()
        with torch.random.fork_rng():
            (gradient,) = torch.autograd.grad(score(model(moved)).sum(), moved)
        changed = (images + 0.05 * gradient.sign()).clamp(0, 1)
        expected = recall_by_loops(model(changed).detach(), range(8), clean, labels)
        assert abs(loss_func.batch_recall_searched - expected) <= 2 / 8  # it starts at a random point of the ball

    def test_the_search_is_not_attacked_where_a_plugin_brings_the_attack(self, images, labels):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8))
        loss_func = AdversarialLoss(TripletMarginLoss(), model, plugins=[ATTA(0.05)], warmup=0, guard=False)
        for _ in range(SEARCHED_EVERY + 1):
            loss_func.adversary.hooks.named[0].next(torch.arange(8))
            loss_func(model(images), labels)
        assert math.isnan(loss_func.batch_recall_searched)

    def test_the_search_is_attacked_in_eval_mode_and_without_a_trace(self, moody_model, images, labels):
        loss_func = AdversarialLoss(ContrastiveLoss(), moody_model, eps=0.05, warmup=0)
        for step in range(SEARCHED_EVERY + 1):
            loss_func(moody_model(images), labels)
            if step == SEARCHED_EVERY - 1:
                seen = int(moody_model[1].num_batches_tracked)
        assert int(moody_model[1].num_batches_tracked) == seen + 2  # clean and perturbed rows, as in every step
        assert all(module.training for module in moody_model.modules())

    def test_what_is_seen_is_recorded(self, images, labels):
        model, loss_func = tiny()
        embeddings = model(images)
        loss_func(embeddings, labels)
        assert loss_func.batch_recall == pytest.approx(
            recall_by_loops(embeddings.detach(), range(8), embeddings.detach(), labels)
        )
        assert {"batch_recall", "batch_recall_attacked", "batch_recall_searched"} <= set(loss_func._record_these)

    def test_the_attack_is_held_back(self, images, labels):
        model, loss_func = tiny(guard=True)
        loss_func.adversary.monitor.share = 0.5
        loss_func(model(images), labels)
        assert loss_func.perturbation_linf == pytest.approx(0.025, rel=1e-4)

    def test_an_attack_without_eps_cannot_be(self, images, labels):
        def attack(objective):
            return lambda inputs, labels: (inputs + 0.1).clamp(0, 1)

        model = tiny()[0]
        loss_func = AdversarialLoss(TripletMarginLoss(), model, attack=attack, guard=True)
        assert not loss_func.adversary.monitor.guarded

    def test_without_labels_nothing_is_seen(self, images):
        from pytorch_metric_learning.losses import VICRegLoss

        model, _ = tiny()
        loss_func = AdversarialLoss(VICRegLoss(), model)
        loss_func(model(images), ref_emb=model(images * 0.9))
        assert math.isnan(loss_func.batch_recall)
        assert loss_func.adversary.monitor.measurements == 0

    def test_it_is_part_of_the_state(self, images, labels):
        model, loss_func = tiny(guard=True)
        for _ in range(EVERY + 1):
            loss_func(model(images), labels)
        loss_func.adversary.monitor.share = 0.3
        loss_func.adversary.monitor.measure_searched(0.25)
        _, other = tiny(guard=True)
        other.load_state_dict(loss_func.state_dict())
        assert vars(other.adversary.monitor) == vars(loss_func.adversary.monitor)


class TestNextToNothing:
    """An attack that changes nothing is said to be one: eps in the wrong unit, or a loss that is satisfied."""

    def spoken(self, caplog, losses, recall=0.8, attacked=0.8, count=20):
        caplog.clear()
        monitor = CollapseMonitor()
        with caplog.at_level(logging.WARNING, "pml_adversarial"):
            for step in range(count):
                monitor.measure(step * EVERY, recall, attacked, losses)
        return [record.getMessage() for record in caplog.records]

    @pytest.mark.parametrize("losses", [(1.0, 1.0002), (1.0, 0.9998), (-2.0, -1.9995), (0.0, 0.0)])
    def test_is_said_after_100_steps_at_full_strength(self, caplog, losses):
        (message,) = self.spoken(caplog, losses)
        assert message.startswith("The attack does next to nothing: in the last 100 steps it changed the loss from ")
        assert self.spoken(caplog, losses, count=19) == []
        assert len(self.spoken(caplog, losses, count=120)) == 2  # and in each 500 steps after

    @pytest.mark.parametrize("losses", [(1.0, 1.001), (0.0, 1e-6), (-2.0, -1.99), None])
    def test_is_not_said_where_the_loss_rises(self, caplog, losses):
        assert self.spoken(caplog, losses) == []

    def test_eps_in_a_wrong_unit_is_found_in_training(self, caplog):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        images, labels = torch.rand(16, 1, 4, 4), torch.arange(16) // 2
        for eps, said in ((8 / 255 / 255, True), (8 / 255, False)):
            caplog.clear()
            loss_func = AdversarialLoss(MultiSimilarityLoss(), model, eps=eps, warmup=0)
            with caplog.at_level(logging.WARNING, "pml_adversarial"):
                for _ in range(100):
                    loss_func(model(images), labels)
            assert any("next to nothing" in record.getMessage() for record in caplog.records) == said
