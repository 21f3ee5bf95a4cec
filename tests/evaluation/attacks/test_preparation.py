"""Attacks that are told before they run what is evaluated."""

from dataclasses import dataclass

import torch
from query_batches import bench_of, images_of, network

from pml_adversarial.evaluation import evaluate_robustness
from pml_adversarial.evaluation.attacks.gradients import nearest_wrong, promotion
from pml_adversarial.evaluation.attacks.kinds import GalleryAttack, QueryAttack
from pml_adversarial.evaluation.attacks.preparation import prepared


@dataclass(frozen=True)
class Asks:
    """Does nothing until it was told how many queries there are; then it shifts all pixels by one of so many."""

    count: int = 0

    def __call__(self, batch, eps, restart):
        return batch.images + (1 / self.count if self.count else 0)

    def prepared(self, task, rows, radii):
        return Asks(len(rows)), [f"{len(rows)} of {len(task.queries)} queries", f"{len(radii)} radii"]


def unchanged(batch, eps, restart):
    return batch.images


def test_what_runs_is_what_was_prepared_and_its_notes_have_its_name():
    task = bench_of(network(), images_of())
    attack = prepared(QueryAttack("asks", Asks(), restarts=3), task, torch.arange(20), (0.1, 0.2))
    assert (attack.name, attack.restarts) == ("asks", 3)
    assert attack.perturb == Asks(20)
    assert task.notes == ["asks: 20 of 24 queries", "asks: 2 radii"]


def test_others_stay_as_they_are():
    task = bench_of(network(), images_of())
    for attack in (QueryAttack("still", unchanged), GalleryAttack("promote", nearest_wrong, promotion, 2)):
        assert prepared(attack, task, torch.arange(24), (0.1,)) is attack
    assert task.notes == []


def test_in_an_evaluation():
    options = {"eps": 0.5, "attacks": [QueryAttack("asks", Asks())], "subset": range(4), "keep_attacked": True}
    report = evaluate_robustness(network(), images_of(), checks=False, **options)
    assert "asks: 4 of 24 queries" in report.notes
    right = [row for row in range(4) if report.clean_flags[row] == "1"]  # the others fail as they are
    torch.testing.assert_close(report.attacked[0.5][right], (images_of()[0][right] + 0.25).clamp(0, 1))
    assert len(right) > 1
