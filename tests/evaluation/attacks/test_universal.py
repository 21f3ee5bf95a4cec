"""One perturbation for all queries: how it is learned, what it does to others, and on which it may be measured."""

import by_loops
import pytest
import torch
from query_batches import RADIUS, bench_of, both_norms, embedded, images_of, network
from torch import nn

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import evaluate_robustness, universal_attack, universal_perturbation
from pml_adversarial.evaluation.attacks.gradients import margin_score, shift_score
from pml_adversarial.evaluation.attacks.universal import _gradient
from pml_adversarial.evaluation.suites import quick


def size(delta, norm):
    return float(delta.abs().max() if norm == "Linf" else delta.norm())


def learned(model=None, images=None, **options):
    options = {"eps": 0.1, "epochs": 5, "restarts": 1, "batch_size": 16, **options}
    return universal_perturbation(network() if model is None else model, images or images_of(48, seed=7), **options)


def evaluated(attack, queries=None, **options):
    options = {"eps": 0.1, "checks": False, "batch_size": 7, **options}
    return evaluate_robustness(network(), queries or images_of(), attacks=[attack], **options)


class TestLearning:
    @both_norms
    @pytest.mark.parametrize("score", [margin_score, shift_score])
    def test_gradient_is_that_of_the_mean_by_loops(self, norm, score):
        model, eps = network(), RADIUS[norm]
        batch = bench_of(model, images_of(), norm=norm).batch(torch.arange(24))
        delta = 0.1 * torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        found = _gradient(batch, delta, score)
        total = torch.zeros(1, 1, 6, 6)
        items, labels = batch.gallery.embeddings, batch.gallery.labels
        for i in range(24):
            moved = delta.clone().requires_grad_()
            query = nn.functional.normalize(model((batch.images[i] + moved).clamp(0, 1))[0], dim=0)
            near = [(float(query.detach() @ items[j]), j) for j in range(24) if j != i]
            wrong = max((value, j) for value, j in near if labels[j] != labels[i])[1]
            right = max((value, j) for value, j in near if labels[j] == labels[i])[1]
            margin = query @ (items[wrong] - items[right])
            shift = (query - nn.functional.normalize(batch.clean[i], dim=0)).square().sum()
            (gradient,) = torch.autograd.grad(margin if score is margin_score else shift, moved)
            total += gradient / 24
        torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-6)
        assert eps > 0

    @both_norms
    def test_lies_within_the_radius_and_uses_it(self, norm):
        found = learned(norm=norm, eps=RADIUS[norm])
        assert found.delta.shape == (1, 6, 6)
        assert 0.99 * RADIUS[norm] < size(found.delta, norm) <= RADIUS[norm] * (1 + 1e-6)
        assert (found.eps, found.norm) == (RADIUS[norm], norm)

    @both_norms
    @pytest.mark.parametrize("seed", range(3))
    def test_raises_the_mean_margin_nearly_as_far_as_the_best_of_a_fine_grid(self, norm, seed):
        """Images of two pixels: all perturbations of a grid of the ball are tried."""
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
        labels, eps = torch.arange(30) % 3, 0.05
        images = (torch.rand(3, 1, 1, 2) * 0.6 + 0.2)[labels] + 0.05 * torch.randn(30, 1, 1, 2)
        images = images.clamp(0, 1)
        found = universal_perturbation(model, (images, labels), eps=eps, norm=norm, epochs=20, restarts=1)
        with torch.no_grad():
            items = nn.functional.normalize(model(images))

            def mean_margin(delta):
                near = nn.functional.normalize(model((images + delta).clamp(0, 1))) @ items.T
                near.fill_diagonal_(-9)
                same = labels.unsqueeze(1) == labels
                return (near.masked_fill(same, -9).amax(1) - near.masked_fill(~same, -9).amax(1)).mean().item()

            axis = torch.linspace(-eps, eps, 31)
            grid = torch.cartesian_prod(axis, axis).reshape(-1, 1, 1, 2)
            grid = [delta for delta in grid if size(delta, norm) <= eps + 1e-6]
            start, best = mean_margin(torch.zeros(1, 1, 2)), max(map(mean_margin, grid))
            assert mean_margin(found.delta) > start + 0.95 * (best - start)

    def test_of_all_restarts_the_one_that_breaks_most_is_kept(self):
        shares = [[learned(restarts=n, eps=0.06, epochs=1, seed=seed).broken for n in (1, 2, 6)] for seed in range(4)]
        assert all(share == sorted(share) for share in shares)
        assert any(share[0] < share[2] for share in shares)

    def test_share_that_is_broken_by_loops(self):
        model, (images, labels) = network(), images_of(48, seed=7)
        found = learned(model)
        items, queries = embedded(model, images), embedded(model, (images + found.delta).clamp(0, 1))
        stands = [by_loops.stands(queries[i], labels[i], i, items, labels) for i in range(48)]
        assert found.broken == pytest.approx(1 - sum(stands) / 48)

    def test_a_seed_fixes_it_and_the_model_is_left_alone(self):
        model, state = network(), torch.get_rng_state()
        first, again, other = (learned(model, seed=seed).delta for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_separate_gallery_and_normalised_images(self):
        (images, labels), gallery = images_of(48, seed=7), images_of(30, seed=1)
        plain = learned(images=(images, labels), gallery=gallery)
        scaled = [((part - 0.4) / 0.2, own) for part, own in ((images, labels), gallery)]

        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = network()

            def forward(self, x):
                return self.model(x * 0.2 + 0.4)

        other = learned(Scaled(), scaled[0], gallery=scaled[1], normalization=([0.4], [0.2]))
        assert other.learned_on == plain.learned_on
        assert (other.delta - plain.delta).abs().mean() < 0.02  # signs of gradients near 0 may differ


class TestAttack:
    @both_norms
    def test_breaks_other_queries_by_loops(self, norm):
        model, (images, labels), eps = network(), images_of(), 2 * RADIUS[norm]
        found = learned(norm=norm, eps=eps, epochs=10, restarts=2)
        report = evaluated(universal_attack(found), eps=eps, norm=norm)
        items, queries = embedded(model, images), embedded(model, (images + found.delta).clamp(0, 1))
        stands = "".join("01"[by_loops.stands(queries[i], labels[i], i, items, labels)] for i in range(24))
        worst = "".join(map(min, zip(stands, report.clean_flags, strict=True)))
        assert report.attacks[0].robust_flags == worst
        assert worst.count("1") < report.clean_flags.count("1") - 5
        assert report.attacks[0].forward_passes == 24
        assert report.notes == ()

    def test_joins_the_worst_case(self):
        report = evaluate_robustness(
            network(), images_of(), eps=0.1, attacks=[*quick(2, 1), universal_attack(learned())], checks=False
        )
        flags = zip(*(result.robust_flags for result in report.attacks), strict=True)
        assert report.worst[0].robust_flags == "".join(map(min, flags))

    def test_is_cut_to_a_smaller_budget_and_says_so(self):
        report = evaluated(universal_attack(learned(eps=0.1)), eps=(0.02, 0.05, 0.1, 0.2), keep_attacked=True)
        assert report.notes == (
            "universal: of size 0.1, it is cut to the budget at eps 0.02, 0.05",
            "universal: of size 0.1, it leaves some of the budget unused at eps 0.2",
        )
        for eps, attacked in report.attacked.items():
            assert (attacked - images_of()[0]).abs().max() <= min(eps, 0.1) + 1e-6

    def test_queries_on_which_it_was_learned_are_refused(self):
        images, labels = images_of(48, seed=7)
        attack = universal_attack(learned(images=(images, labels)))
        mixed = torch.cat([images_of()[0], images[:5]]), torch.cat([images_of()[1], labels[:5]])
        with pytest.raises(InputError, match="5 of 29 queries are images on which the universal perturbation was"):
            evaluated(attack, mixed)
        assert evaluated(attack, mixed, subset=range(24)).num_queries == 24  # the cure

    def test_rounding_hides_no_image(self):
        images, labels = images_of(48, seed=7)
        attack = universal_attack(learned(images=((images * 255).round() / 255, labels)))
        read_again = (images * 255).round().to(torch.float64).div(255).float() * (1 - 1e-6)
        with pytest.raises(InputError, match="48 of 48 queries"):
            evaluated(attack, (read_again, labels))

    def test_a_tensor_will_do_with_a_note(self):
        delta = 0.1 * torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(0)).sign()
        report = evaluated(universal_attack(delta, "mine"), keep_attacked=True)
        assert report.notes[0].startswith("mine: it is not known on which images it was learned")
        right = [i for i, flag in enumerate(report.clean_flags) if flag == "1"]
        torch.testing.assert_close(report.attacked[0.1][right], (images_of()[0] + delta).clamp(0, 1)[right])

    @pytest.mark.parametrize("perturbation", [None, 0.1, torch.ones(1, 6, 6).long(), torch.full((1, 6, 6), torch.nan)])
    def test_something_else_is_refused(self, perturbation):
        with pytest.raises(InputError, match="expected what universal_perturbation returned"):
            universal_attack(perturbation)

    def test_of_another_shape_is_refused(self):
        with pytest.raises(InputError, match=r"is \(1, 5, 5\), the queries are \(1, 6, 6\)"):
            evaluated(universal_attack(torch.zeros(1, 5, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L1"}, "norm='L1'; expected 'Linf' or 'L2'"),
        ({"eps": (0.1, 0.2)}, "eps holds 2 radii; expected one"),
        ({"eps": 0}, "eps=0; expected"),
        ({"epochs": 0}, "epochs=0; expected"),
        ({"restarts": 0}, "restarts=0; expected"),
        ({"batch_size": 0}, "batch_size=0; expected"),
        ({"model": lambda x: x.flatten(1).detach()}, "no gradient"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        learned(**options)
