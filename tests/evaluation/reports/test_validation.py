"""A report that was changed by hand is refused, with the place; one that an evaluation wrote is taken."""

import copy
import json

import pytest
import torch
from query_batches import images_of, network

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import Report, evaluate_robustness
from pml_adversarial.evaluation.attacks.kinds import QueryAttack
from pml_adversarial.evaluation.reports import validation
from pml_adversarial.evaluation.suites import SUITES, quick


class Noisy(torch.nn.Module):
    """A model that answers at random, so that R@1 of a query is a mean over draws."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, images):
        return self.network(images + 0.1 * torch.randn_like(images))


@pytest.fixture(scope="module")
def report():
    return evaluate_robustness(network(), images_of(40), eps=(0.02, 0.05), attacks=quick(2, 1), checks=False)


def read(found, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(found))
    return Report.load_json(path)


def test_suites_are_those_of_the_package():
    made = {version: tuple(attack.name for attack in make()) for version, make in SUITES.values()}
    assert made == validation.SUITES


@pytest.mark.parametrize("norm", ["Linf", "L0"])
def test_what_an_evaluation_writes_is_taken(norm, tmp_path):
    """With attacks that are left out, queries that are left out, and a model that answers at random."""
    labels = torch.arange(40) % 4
    labels[7] = 99
    attacks = [*quick(2, 1), "promote", QueryAttack("other", quick(2, 1)[0].perturb, norms=("L2",))]
    for model in (network(), Noisy()):
        found = evaluate_robustness(
            model, (images_of(40)[0], labels), images_of(30, seed=2), eps=2 if norm == "L0" else 0.05, norm=norm,
            attacks=attacks, checks=False
        )  # fmt: skip
        assert found.left_out == 1
        assert read(found.to_dict(), tmp_path).to_dict() == found.to_dict()


CHANGES = {
    "R@1 is": lambda found: found["clean"].update(recall_at_1=found["clean"]["recall_at_1"] - 1 / 40),
    "R@1 is .* in the worst case": lambda found: found["worst"][1]["measures"].update(recall_at_1=0.9012),
    "R@1 is .* in shift at eps 0.05": lambda found: found["attacks"][3]["measures"].update(recall_at_1=0.9012),
    "recall_at_2 of margin at eps 0.02 is 7.33, no share": lambda found: found["attacks"][0]["measures"].update(
        recall_at_2=7.33
    ),
    "map_at_r of the part without attack is -0.5": lambda found: found["clean"].update(map_at_r=-0.5),
    "r_precision .* is 'x', no share": lambda found: found["clean"].update(r_precision="x"),
    "it holds NaN": lambda found: found["clean"].update(recall_at_2=float("nan")),
    "it holds Infinity": lambda found: found["collapse"].update(effective_rank=float("inf")),
    "without attack has 3 flags for 40 queries": lambda found: found.update(clean_flags="111"),
    "worst case .* has 40 flags": lambda found: found["worst"][0].update(robust_flags="2" * 40),
    "settings has no norm": lambda found: found["settings"].pop("norm"),
    "the norm is 'l3'": lambda found: found["settings"].update(norm="l3"),
    "without attack has no map_at_r": lambda found: found["clean"].pop("map_at_r"),
    "the worst case .* has the measures": lambda found: found["worst"][0]["measures"].pop("recall_at_4"),
    "at eps 0.04, the settings have": lambda found: found["worst"][0].update(eps=0.04),
    "on 'item' at eps": lambda found: found["attacks"][0].update(target="item"),
    "and the attacks in it those of none": lambda found: found.update(attacks=[]),
    "worst cases are those of": lambda found: found["worst"].append(found["worst"][0]),
    "results of pgd, which": lambda found: found["attacks"][0].update(attack="pgd"),
    "the suite standard-v2 is not that of the attacks margin, shift": lambda found: found.update(suite="standard-v2"),
    "the suite custom": lambda found: found["settings"]["attack_settings"].pop(),
    "num_queries is 0": lambda found: found.update(num_queries=0),
    "queries holds 39 indices for 40": lambda found: found["queries"].pop(),
    "queries holds 40 indices for 40": lambda found: found["queries"].append(found["queries"][0]),
    "left_out is 1.5": lambda found: found.update(left_out=1.5),
    "chance is 2": lambda found: found.update(chance=2),
    "provenance has no threads": lambda found: found["provenance"].pop("threads"),
    r"provenance\['model'\] has no sha256": lambda found: found["provenance"]["model"].pop("sha256"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_was_changed_is_refused(report, tmp_path, message):
    found = copy.deepcopy(report.to_dict())
    CHANGES[message](found)
    with pytest.raises(InputError, match=rf"report\.json: .*{message}"):
        read(found, tmp_path)
