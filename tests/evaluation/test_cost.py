"""The bound on the passes of an evaluation holds, and is reached where no attack succeeds."""

import pytest
import torch
from notes import Notes
from query_batches import bench_of, images_of, network
from torch import nn

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import estimate_cost, evaluate_robustness, robustness
from pml_adversarial.evaluation.attacks.kinds import QueryAttack
from pml_adversarial.evaluation.checks import passes_of_checks
from pml_adversarial.evaluation.cost import Cost
from pml_adversarial.evaluation.evaluator import most_passes
from pml_adversarial.evaluation.suites import quick, standard

TINY = 1e-6  # an eps at which no attack succeeds
NOISE = QueryAttack("noise", lambda batch, eps, restart: batch.images)


def right_queries():
    """Queries that are right without attack, of six classes, so that all attacks can be made."""
    task = bench_of(network(), images_of(36, classes=6))
    batch = task.batch(torch.arange(36))
    return task, batch[(task.gallery.ranking(batch.clean, batch.targets, 1).margin < 0).nonzero().squeeze(1)]


class TestBound:
    @pytest.mark.parametrize("suite", [standard(4, 1, 6, 3), standard(9, 2, 30, 2), quick(3, 1)])
    def test_of_each_attack_is_nearly_what_it_takes(self, suite):
        task, batch = right_queries()
        for attack in suite:
            before = task.embed.forward_passes + task.embed.backward_passes
            attack.run(batch, TINY, 0, 3)
            taken = (task.embed.forward_passes + task.embed.backward_passes - before) / len(batch)
            assert attack.passes - 2 <= taken <= attack.passes, attack.name

    def test_of_an_evaluation_is_nearly_what_it_takes(self):
        images, suite = images_of(36, classes=6), standard(4, 2, 6, 3)
        report = evaluate_robustness(network(), images, eps=(TINY, 2 * TINY), attacks=suite, checks=False)
        taken = sum(result.forward_passes + result.backward_passes for result in report.attacks)
        right = round(36 * report.clean["recall_at_1"])
        of_right = most_passes(suite, right, 2)
        assert right < 36
        assert 0.9 * of_right < taken <= most_passes(suite, 36, 2)

    def test_is_unknown_if_an_attack_does_not_say_it(self):
        assert most_passes((*quick(), NOISE), 5, 1) is None
        assert most_passes((), 5, 1) == 0

    def test_of_checks_is_about_what_they_take(self, monkeypatch):
        taken = []

        def noted(task, rows, right, *rest):
            before = task.embed.forward_passes + task.embed.backward_passes
            found = made(task, rows, right, *rest)
            taken.append((int(right.sum()), task.embed.forward_passes + task.embed.backward_passes - before))
            return found

        made = robustness.run_checks
        monkeypatch.setattr(robustness, "run_checks", noted)
        evaluate_robustness(network(), images_of(36, classes=6), eps=0.02, attacks=quick(2, 1))
        ((right, passes),) = taken
        assert 0.85 * passes_of_checks(right) < passes <= passes_of_checks(right)  # searches end where they succeed
        assert passes_of_checks(1000) == passes_of_checks(64)


class TestEstimate:
    def test_adds_all_up(self):
        images, gallery = images_of(10), images_of(30, seed=1)
        attacks = quick(3, 2)
        each = 2 * 2 * (2 * 3 + 4)  # attacks, restarts, passes of a run
        options = {"eps": (0.1, 0.2, 0.3), "attacks": attacks}
        assert estimate_cost(network(), images, checks=False, **options).passes == 10 + 10 * 3 * each
        assert estimate_cost(network(), images, **options).passes == 10 + 10 * 3 * each + passes_of_checks(10)
        found = estimate_cost(network(), images, gallery, subset=[1, 4], checks=False, **options)
        assert found.passes == 30 + 2 + 2 * 3 * each

    def test_measures_a_pass(self):
        calls = Notes()
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        model.register_forward_hook(lambda module, args, out: calls.append((len(args[0]), out.requires_grad)))
        found = estimate_cost(model, images_of(20), eps=0.1, batch_size=8)
        assert list(calls)[-2:] == [(8, True), (8, True)]
        assert found.seconds_per_pass > 0
        assert found.seconds == found.passes * found.seconds_per_pass

    def test_of_attacks_that_do_not_say_it(self):
        found = estimate_cost(network(), images_of(), eps=0.1, attacks=(NOISE,))
        assert (found.passes, found.seconds) == (None, None)
        assert str(Cost(None, 0.0123)) == "an unknown number of image passes of 12.3 ms"

    def test_takes_all_options_of_an_evaluation(self):
        options = {"eps": 3, "norm": "L0", "distance": "euclidean", "own": "same", "junk_label": None, "seed": 3}
        found = estimate_cost(network(), images_of(20), images_of(20), attacks=quick(3, 1), checks=False, **options)
        report = evaluate_robustness(
            network(), images_of(20), images_of(20), attacks=quick(3, 1), checks=False, **options
        )
        assert 0 < sum(one.forward_passes + one.backward_passes for one in report.attacks) <= found.passes
        with pytest.raises(InputError, match=r"^distanse, sead: expected options of evaluate_robustness"):
            estimate_cost(network(), images_of(20), eps=0.1, sead=3, distanse="cosine")

    def test_leaves_no_trace(self):
        model, before = network(), torch.get_rng_state()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        estimate_cost(model, images_of(), eps=0.1, attacks="quick")
        assert model.training
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        "options", [{"eps": 0}, {"attacks": "best"}, {"batch_size": 0}, {"subset": [99]}, {"eps": 2}]
    )
    def test_refuses_what_the_evaluation_refuses(self, options):
        options = {"eps": 0.1, **options}
        for function in (estimate_cost, evaluate_robustness):
            with pytest.raises(InputError):
                function(network(), images_of(), **options)
