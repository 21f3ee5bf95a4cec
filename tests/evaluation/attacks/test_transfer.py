"""Images that were made elsewhere: which query gets which, what is changed about them, and who is asked."""

import by_loops
import pytest
import torch
from query_batches import RADIUS, bench_of, both_norms, embedded, images_of, length, network
from torch import nn

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import evaluate_robustness
from pml_adversarial.evaluation.attacks.gradients import gradient_attack, margin_score, shift_score
from pml_adversarial.evaluation.attacks.transfer import transfer_attack, transferred
from pml_adversarial.evaluation.suites import quick

QUICK = quick(steps=6, restarts=1)


def evaluated(attacks, model=None, queries=None, gallery=None, **options):
    options = {"eps": 0.05, "batch_size": 7, "checks": False, **options}
    model = network() if model is None else model
    return evaluate_robustness(model, queries or images_of(), gallery, attacks=attacks, **options)


def stands(model, images, rows):
    """For each of some queries, whether it is right, by a plain loop."""
    clean, labels = images_of()
    items, queries = embedded(model, clean), embedded(model, images)
    return "".join("01"[by_loops.stands(queries[i], labels[i], i, items, labels)] for i in rows)


def noisy(size, seed=1):
    images, _ = images_of()
    noise = size * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + noise).clamp(0, 1)


def near(model, size=0.02, seed=3):
    """A model with almost the same weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        other = network()
        other.load_state_dict(model.state_dict())
        for parameter in other.parameters():
            parameter.data += size * torch.randn_like(parameter)
    return other


class TestSaved:
    def test_images_of_the_evaluated_queries_alone(self):
        rows, given = [22, 3, 4, 0, 17, 9], noisy(0.05)
        expected = evaluated([transferred(given)], subset=rows, keep_attacked=True)
        found = evaluated([transferred(given[rows])], subset=rows, keep_attacked=True)
        assert found.attacks[0].robust_flags == expected.attacks[0].robust_flags
        assert torch.equal(found.attacked[0.05], expected.attacked[0.05])
        with pytest.raises(InputError, match="for each of all queries, or for each of the 6 that are evaluated"):
            evaluated([transferred(given[:5])], subset=rows)

    @both_norms
    def test_each_query_gets_its_own_within_the_budget_by_loops(self, norm):
        clean, given, eps = images_of()[0], noisy(0.2), RADIUS[norm]
        rows = [22, 3, 4, 0, 17, 9, 8, 14, 1, 21, 11]
        report = evaluated([transferred(given)], eps=eps, norm=norm, subset=rows, keep_attacked=True)
        held = []
        for i in range(24):
            change = given[i] - clean[i]
            change = change.clamp(-eps, eps) if norm == "Linf" else change * min(1, eps / float(change.norm()))
            held.append((clean[i] + change).clamp(0, 1))
        held = torch.stack(held)
        assert report.attacks[0].robust_flags == stands(network(), held, rows) != stands(network(), clean, rows)
        right = [i for i, row in enumerate(rows) if stands(network(), clean, [row]) == "1"]
        torch.testing.assert_close(report.attacked[eps][right], held[rows][right], rtol=0, atol=1e-6)

    def test_what_one_evaluation_found_breaks_the_same_in_another(self):
        first = evaluated(QUICK, keep_attacked=True)
        again = evaluated([transferred(first.attacked[0.05])])
        assert again.worst[0].robust_flags == first.worst[0].robust_flags
        assert "1" in first.worst[0].robust_flags
        assert again.attacks[0].forward_passes == 24  # to rank them, and for nothing else
        assert again.attacks[0].backward_passes == 0
        assert again.attacks[0].black_box
        assert again.notes == ()

    def test_joins_the_worst_case(self):
        found = evaluated([*QUICK, transferred(noisy(0.2))])
        flags = [result.robust_flags for result in found.attacks]
        assert found.worst[0].robust_flags == "".join(map(min, zip(*flags, strict=True)))

    @both_norms
    def test_notes_say_how_many_lay_outside_and_by_how_much(self, norm):
        clean, given, radii = images_of()[0], noisy(0.02), {"Linf": (0.03, 0.06, 0.3), "L2": (0.1, 0.13, 1.0)}[norm]
        rows = [5, 2, 19, 23, 7, 12]
        report = evaluated([transferred(given)], eps=radii, norm=norm, subset=rows)
        expected = []
        for eps in radii:
            changes = []
            for i in rows:
                change = given[i] - clean[i]
                if length(change.unsqueeze(0), norm) > eps:
                    held = change.clamp(-eps, eps) if norm == "Linf" else change * eps / change.norm()
                    changes.append(float((change - held).abs().max()))
            if changes:
                told = f"moving them inside changed pixels by up to {max(changes):.2g}"
                expected.append(f"transferred: {len(changes)} of 6 images lie outside of eps {eps:.4g}; {told}")
        assert list(report.notes) == expected
        assert 0 < len(expected) < 3

    def test_may_be_normalised_as_the_queries_are(self):
        clean, labels = images_of()
        mean, std, given = 0.4, 0.2, noisy(0.2)
        options = {"normalization": ([mean], [std]), "queries": ((clean - mean) / std, labels)}
        as_pixels, normalised = (
            evaluated([transferred(images)], **options) for images in (given, (given - mean) / std)
        )
        assert as_pixels.attacks[0].robust_flags == normalised.attacks[0].robust_flags != normalised.clean_flags
        assert any("transferred images: normalised images" in note for note in normalised.notes)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (images_of(23)[0], r"are \(23, 1, 6, 6\), but the queries are \(24, 1, 6, 6\)"),
            (images_of(24, size=5)[0], r"are \(24, 1, 5, 5\), but the queries are \(24, 1, 6, 6\)"),
            (images_of()[0] * 255, r"transferred images, images 0 to .* expected pixels in \[0, 1\]"),
            (images_of()[0] / 0, "transferred images, images 0 to .* NaN or infinite"),
        ],
    )
    def test_that_do_not_fit_are_refused(self, images, message):
        with pytest.raises(InputError, match=message):
            evaluated([transferred(images)])

    @pytest.mark.parametrize("images", [None, "adversarial.pt", [1, 2], torch.zeros(24)])
    def test_that_are_no_images_are_refused_at_once(self, images):
        with pytest.raises(InputError, match="expected a tensor or an array"):
            transferred(images)

    def test_others_are_another_attack(self):
        one, same, other = (transferred(noisy(0.2, seed)).perturb.digest for seed in (1, 1, 2))
        assert one == same != other


class TestSurrogate:
    @both_norms
    @pytest.mark.parametrize("score", [margin_score, shift_score])
    def test_makes_the_images_of_the_attack_on_the_surrogate_itself(self, score, norm):
        attacked, other = network(), network(8, dimension=9)
        images = images_of(30, seed=1)
        batch, there = (bench_of(m, images_of(), images, norm).batch(torch.arange(24)) for m in (attacked, other))
        found = []
        for attack, on in [
            (transfer_attack(other.train(), score=score, steps=5).perturb, batch),
            (gradient_attack(score, 5), there),
        ]:
            torch.manual_seed(6)
            found.append(attack(on, RADIUS[norm], 0))
            other.eval()
        torch.testing.assert_close(*found, rtol=0, atol=1e-6)
        assert length(found[0] - batch.images, norm).min() > 0.5 * RADIUS[norm]

    def test_asks_the_attacked_model_nothing(self):
        report = evaluated([transfer_attack(near(network()), steps=6, restarts=2)])
        (result,) = report.attacks
        assert result.black_box
        assert result.backward_passes == 0
        first, again = 24, sum(mark == "1" for mark in report.clean_flags)
        assert first < result.forward_passes <= first + again  # to rank what it made, once in each run

    def test_a_near_model_breaks_more_than_a_far_one(self):
        flags = {
            kind: evaluated([transfer_attack(model, steps=10)]).attacks[0].robust_flags.count("1")
            for kind, model in {"same": network(), "near": near(network()), "far": network(9)}.items()
        }
        assert max(flags["same"], flags["near"]) < flags["far"] / 2

    def test_of_normalised_inputs(self):
        class Denormalised(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x):
                return self.model(x * 0.2 + 0.4)

        plain = evaluated([transfer_attack(near(network()), steps=6)])
        other = evaluated([transfer_attack(Denormalised(near(network())), steps=6, normalization=([0.4], [0.2]))])
        assert plain.attacks[0].robust_flags == other.attacks[0].robust_flags

    def test_may_be_a_function_and_comes_back_in_its_own_mode(self):
        surrogate = near(network())
        state = {name: value.clone() for name, value in surrogate.state_dict().items()}
        asked = [
            evaluated([transfer_attack(model, steps=6)]).attacks[0].robust_flags
            for model in (surrogate, lambda x: surrogate(x))
        ]
        assert asked[0] == asked[1]
        assert surrogate.training
        assert all(parameter.requires_grad and parameter.grad is None for parameter in surrogate.parameters())
        assert all(torch.equal(value, state[name]) for name, value in surrogate.state_dict().items())

    def test_is_left_out_where_the_gallery_has_no_images(self):
        model, (images, labels) = network(), images_of()
        options = {"gallery": (None, labels), "gallery_embeddings": embedded(model, images)}
        report = evaluated([*QUICK, transfer_attack(near(model))], model, own=range(24), **options)
        assert [result.attack for result in report.attacks] == ["margin", "shift"]
        assert any(note.startswith("transfer is left out: it needs images") for note in report.notes)

    @pytest.mark.parametrize(
        ("surrogate", "message"),
        [
            (lambda x: x.flatten(1).detach(), "no gradient"),
            (lambda x: x, r"expected embeddings \(1, D\)"),
            (nn.Linear(7, 3), "fails on 1 image"),
        ],
    )
    def test_that_cannot_be_attacked_is_refused(self, surrogate, message):
        with pytest.raises(InputError, match=message):
            evaluated([transfer_attack(surrogate)])

    @pytest.mark.parametrize("options", [{"steps": 0}, {"restarts": 0}, {"steps": 1.5}, {"normalization": (0, 1)}])
    def test_options_are_checked_at_once(self, options):
        with pytest.raises(InputError, match="expected"):
            transfer_attack(network(), **options)

    def test_other_weights_are_another_attack(self):
        one, same, other = (transfer_attack(near(network(), seed=seed)).perturb.digest for seed in (1, 1, 2))
        assert one == same != other
