"""The worst case of each pair, and the rates that follow, recomputed from the perturbed images by loops."""

import pytest
import torch
from query_batches import Made, all_norms, images_of, length, network
from some_pairs import LISTED, TIE, rates_by_loops, similarities_by_loops, task_of, verified

from pml_adversarial.evaluation.retrieval.batch import SAMPLES
from pml_adversarial.evaluation.verification.attacks import PairAttack
from pml_adversarial.evaluation.verification.evaluator import PairEvaluator, Worst, at_thresholds, find_thresholds
from pml_adversarial.evaluation.verification.roc import ROC, PairScores

RADII = {"Linf": (0.02, 0.06), "L2": (0.1, 0.4), "L1": (0.5, 2), "L0": (1, 4), "patch": (1, 3)}
NOISE = PairAttack("noise", lambda batch, eps, restart: batch.images + eps * torch.randn_like(batch.images).sign(), 2)
STILL = PairAttack("still", lambda batch, eps, restart: batch.images)


def evaluator_of(attacks=(NOISE, STILL), radii=(0.02, 0.06), batch_size=7, rows=None, keep_attacked=True):
    rows = torch.arange(40) if rows is None else rows
    return PairEvaluator(task_of(), attacks, radii, rows, 0, batch_size, keep_attacked)


def run(**options):
    evaluator = evaluator_of(**options)
    steps = []
    evaluator.run(lambda: steps.append(None))
    assert len(steps) == evaluator.num_runs
    return evaluator


class TestWorst:
    def test_joined_by_loops(self):
        same = torch.tensor([True, True, False, False, True, False])
        first = Worst(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.5]), torch.zeros(6, 1, 1, 1))
        second = Worst(torch.tensor([0.2, 0.1, 0.4, 0.3, 0.5, 0.5]), torch.ones(6, 1, 1, 1))
        found = first.joined(second, same)
        assert found.similarities.tolist() == pytest.approx([0.1, 0.1, 0.4, 0.4, 0.5, 0.5])
        assert found.images.flatten().tolist() == [0, 1, 1, 0, 0, 0]  # of equal ones, the first

    def test_a_similarity_that_is_no_number_is_never_worse(self):
        first = Worst(torch.zeros(2), torch.zeros(2, 1))
        found = first.joined(Worst(torch.full((2,), torch.nan), torch.ones(2, 1)), torch.tensor([True, False]))
        assert found.similarities.tolist() == [0, 0]

    def test_of_a_random_model_the_means_decide(self):
        same = torch.tensor([True, True, False, False])
        first = Worst(torch.tensor([0.1, 0.9, 0.1, 0.9]), torch.zeros(4, 1), torch.tensor([0.5, 0.5, 0.5, 0.5]))
        second = Worst(torch.tensor([0.3, 0.4, 0.3, 0.4]), torch.ones(4, 1), torch.tensor([0.2, 0.8, 0.2, 0.8]))
        found = first.joined(second, same)
        assert found.images.flatten().tolist() == [1, 0, 0, 1]
        assert found.similarities.tolist() == pytest.approx([0.3, 0.9, 0.1, 0.4])
        assert found.means.tolist() == pytest.approx([0.2, 0.5, 0.5, 0.8])


class TestRandomModel:
    """Noise alone decides what the model says; no image is worse than another one."""

    @staticmethod
    def evaluated(attacks):
        task = task_of(Made(lambda images: torch.rand(len(images), 2) + 0 * images.flatten(1)[:, :1]))
        evaluator = PairEvaluator(task, attacks, (0.02, 0.06), torch.arange(40), 0, 40, False)
        evaluator.run(lambda: None)
        return evaluator

    def test_one_draw_counts_and_not_the_worst_of_many(self):
        evaluator = self.evaluated(tuple(PairAttack(f"still {i}", STILL.perturb, restarts=5) for i in range(6)))
        assert evaluator.task.embed.is_random
        clean, attacked = evaluator.task.scores, evaluator._worst_scores(0.06)
        for kind in (True, False):
            chosen = clean.same == kind
            before, after = (scores.similarities[chosen] for scores in (clean, attacked))
            spread = before.std() / len(before) ** 0.5
            assert abs(float(after.mean() - before.mean())) < 4 * float(spread)

    def test_what_is_worse_on_average_is_found(self):
        def grown(batch, eps, restart):
            return batch.images.clone().fill_(0.5) if restart == 1 else batch.images

        def model(images):
            near = ((images - 0.5).abs().flatten(1).amax(1) < 0.1).float()
            angle = near * torch.pi / 2 + 0.1 * torch.randn(len(images))
            return torch.stack([angle.cos(), angle.sin()], 1)

        attack = PairAttack("grown", grown, 3)
        evaluator = PairEvaluator(task_of(Made(model)), (attack,), (0.9,), torch.arange(40), 0, 40, False)
        evaluator.run(lambda: None)
        found = evaluator.reached["grown", False, 0.9]
        same = evaluator.task.same
        assert (found[same].abs() < 0.7).all()
        assert (found[~same] > 0.7).all()

    def test_gradients_are_means_over_draws(self):
        batch = task_of(Made(lambda images: images.flatten(1) + torch.rand(1))).batch(torch.arange(4))
        assert batch.objective().samples == SAMPLES
        assert task_of().batch(torch.arange(4)).objective().samples == 1


class TestRecomputed:
    @all_norms
    def test_from_the_perturbed_images(self, norm):
        model, (images, labels) = network(), images_of()
        report = verified(model, eps=RADII[norm], norm=norm, keep_attacked=True)
        model.eval()
        with torch.no_grad():
            enrolled = model(images)[LISTED[:, 1]].double()
        same = [bool(labels[i] == labels[j]) for i, j in LISTED.tolist()]
        before, clean = None, similarities_by_loops(model(images).detach()[LISTED[:, 0]].double(), enrolled)
        assert report.result().similarities == pytest.approx(clean, abs=1e-6)
        for eps in RADII[norm]:
            result, attacked = report.result(eps), report.attacked[eps]
            change = attacked - images[LISTED[:, 0]]
            assert length(change, norm).max() <= eps + 1e-5
            with torch.no_grad():
                found = similarities_by_loops(model(attacked).double(), enrolled)
            assert result.similarities == pytest.approx(found, abs=1e-6)
            for value, earlier, genuine in zip(result.similarities, before or clean, same, strict=True):
                assert value <= earlier + 1e-6 if genuine else value >= earlier - 1e-6
            before = list(result.similarities)
            for at in result.thresholds:
                wanted = rates_by_loops(result.similarities, same, at.threshold, report.tie)
                assert (at.tar.rate, at.far.rate) == pytest.approx(wanted)
            assert result.equal_error_rate == report.roc(eps).equal_error_rate
        assert before != clean

    def test_success_rates_by_loops(self):
        labels = images_of()[1]
        report = verified()
        same = [bool(labels[i] == labels[j]) for i, j in LISTED.tolist()]
        for result in report.results[1:]:
            for at in result.thresholds:
                counts = {True: [0, 0], False: [0, 0]}
                for clean, found, genuine in zip(report.result().similarities, result.similarities, same, strict=True):
                    more = 0 if genuine else report.tie
                    was_right = (clean + more >= at.threshold) == genuine
                    counts[genuine][1] += was_right
                    counts[genuine][0] += was_right and (found + more >= at.threshold) != genuine
                assert [at.dodging.count, at.dodging.total] == counts[True]
                assert [at.impersonation.count, at.impersonation.total] == counts[False]
            at = result.thresholds[-1]
            assert at.dodging.count > 0
            assert at.impersonation.count > 0


class TestRun:
    def test_of_each_attack_the_worst_over_restarts_and_smaller_eps(self):
        evaluator = run(attacks=(NOISE,))
        alone = {eps: run(attacks=(NOISE,), radii=(eps,)).reached["noise", False, eps] for eps in (0.02, 0.06)}
        small, large = (evaluator.reached["noise", False, eps] for eps in (0.02, 0.06))
        assert torch.equal(small, alone[0.02])
        same = evaluator.task.same
        wanted = torch.where(same, small.minimum(alone[0.06]), small.maximum(alone[0.06]))
        assert torch.equal(large, wanted)
        assert not torch.equal(large, alone[0.06])

    def test_an_attack_that_does_nothing_reaches_what_is_there(self):
        evaluator = run(attacks=(STILL,))
        assert torch.equal(evaluator.reached["still", False, 0.06], evaluator.task.scores.similarities)
        assert torch.equal(evaluator.attacked()[0.06], evaluator.task.batch(torch.arange(40)).images)

    def test_more_attacks_are_never_weaker(self):
        one, both = (run(attacks=attacks) for attacks in ((NOISE,), (NOISE, PairAttack("grey", grey))))
        thresholds = find_thresholds(one.task.scores.roc(), (0.1,))
        for few, more in zip(one.results(thresholds)[1:], both.results(thresholds)[1:], strict=True):
            assert more.equal_error_rate.rate >= few.equal_error_rate.rate
            assert more.auc <= few.auc
            for a, b in zip(few.thresholds, more.thresholds, strict=True):
                assert b.tar.count <= a.tar.count
                assert b.far.count >= a.far.count

    @pytest.mark.parametrize("batch_size", [1, 13, 100])
    def test_batches_change_nothing(self, batch_size):
        grey_alone = (PairAttack("grey", grey),)
        wanted, found = run(attacks=grey_alone), run(attacks=grey_alone, batch_size=batch_size)
        key = ("grey", False, 0.06)
        assert torch.allclose(found.reached[key], wanted.reached[key], atol=1e-6)
        assert torch.equal(found.attacked()[0.06], wanted.attacked()[0.06])

    def test_some_pairs_only(self):
        rows, grey_alone = torch.tensor([33, 3, 8]), (PairAttack("grey", grey),)
        some, everyone = run(attacks=grey_alone, rows=rows), run(attacks=grey_alone)
        key = ("grey", False, 0.06)
        assert torch.allclose(some.reached[key], everyone.reached[key][rows], atol=1e-6)
        clean, worst, _ = some.results(find_thresholds(some.task.scores.roc(), ()))
        assert (clean.thresholds[0].tar.total, clean.thresholds[0].far.total) == (20, 20)
        assert (worst.thresholds[0].tar.total, worst.thresholds[0].far.total) == (2, 1)

    def test_runs_start_from_different_points(self):
        starts = []

        def record(batch, eps, restart):
            starts.append(torch.rand(()).item())
            return batch.images

        run(attacks=(PairAttack("one", record, 2), PairAttack("two", record)), batch_size=9)
        assert len(set(starts)) == len(starts) == 2 * 3 * 5

    def test_cost(self):
        found = run(attacks=(NOISE, STILL)).attack_results({"EER": 0.5})
        assert [result.forward_passes for result in found] == [80, 40, 80, 40]
        assert [(result.backward_passes, result.black_box) for result in found] == [(0, False)] * 4
        assert all(result.seconds > 0 for result in found)

    def test_images_are_kept_if_asked_for(self):
        assert run(keep_attacked=False).attacked() is None


def grey(batch, eps, restart):
    return torch.full_like(batch.images, 0.5)


def test_thresholds_are_those_of_the_roc():
    genuine, impostors = torch.rand(20) + 0.3, torch.rand(30)
    found = find_thresholds(ROC(genuine, impostors), (0.5, 0.1, 0.01))
    roc = ROC(genuine, impostors)
    assert found == {
        0.5: roc.threshold_at(0.5),
        0.1: roc.threshold_at(0.1),
        "EER": roc.equal_error_rate.threshold,
    }
    assert list(found)[-1] == "EER"


def test_without_attack_nothing_is_dodged():
    scores = PairScores(torch.tensor([0.9, 0.1]).double(), torch.tensor([True, False]), TIE)
    (found,) = at_thresholds({"EER": 0.5}, scores)
    assert (found.dodging, found.impersonation) == (None, None)
    (found,) = at_thresholds({"EER": 0.95}, scores, scores)
    assert (found.dodging.rate, found.impersonation.rate) == (None, 0)  # no pair was accepted that could be dodged
