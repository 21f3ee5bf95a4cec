"""Every query under every attack, recomputed from scratch; nothing is left behind."""

import math
import random
import sys
from functools import partial

import by_loops
import numpy
import pytest
import torch
import torchattacks
from notes import Notes
from query_batches import Made, all_norms, embedded, images_of, length, network
from torch import nn
from torch.nn.functional import normalize

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import evaluate_robustness
from pml_adversarial.evaluation.attacks.gradients import (
    classifier_attack,
    demotion,
    gradient_attack,
    margin_score,
    nearest_right,
    nearest_wrong,
    promotion,
    shift_score,
)
from pml_adversarial.evaluation.attacks.kinds import GalleryAttack, QueryAttack
from pml_adversarial.evaluation.retrieval import metrics as scores
from pml_adversarial.evaluation.suites import quick, standard

EPS = (0.02, 0.05, 0.12)
RADII = {"Linf": EPS, "L2": (0.1, 0.3, 0.7)}
MARGIN = QueryAttack("margin", gradient_attack(margin_score, 6), 2)
SHIFT = QueryAttack("shift", gradient_attack(shift_score, 6))
PROMOTE = GalleryAttack("promote", nearest_wrong, promotion, 5)
DEMOTE = GalleryAttack("demote", nearest_right, demotion, 5)
NOISE = QueryAttack("noise", lambda batch, eps, restart: batch.images + eps * torch.randn_like(batch.images).sign())
FEW = (MARGIN, SHIFT, PROMOTE, DEMOTE)
APGD = QueryAttack("apgd", classifier_attack(partial(torchattacks.APGD, steps=3)), only_robust=True)
AS_CLASSES = (SHIFT, APGD)


def evaluated(model=None, queries=None, gallery=None, **options):
    options = {"eps": EPS, "attacks": FEW, "batch_size": 7, "checks": False, **options}
    return evaluate_robustness(network() if model is None else model, queries or images_of(), gallery, **options)


def without_times(report):
    found = report.to_dict()
    for attack in found["attacks"]:
        del attack["seconds"]
    found["provenance"] = {key: value for key, value in found["provenance"].items() if key != "time"}
    return found


def bits(standing):
    return [mark == "1" for mark in standing]


def stands_by_loops(model, images, labels, owns, embeddings, gallery_labels):
    queries = embedded(model, images)
    return [
        by_loops.stands(query, label, own, embeddings, gallery_labels)
        for query, label, own in zip(queries, labels.tolist(), owns, strict=True)
    ]


class TestRecomputed:
    @pytest.mark.parametrize("norm", ["Linf", "L2"])
    @pytest.mark.parametrize("separate", [False, True])
    @pytest.mark.parametrize("attacks", [(MARGIN, SHIFT), (NOISE, MARGIN)])
    def test_what_is_called_broken_is_broken_and_what_stands_stands(self, norm, separate, attacks):
        (images, labels), model = images_of(), network()
        gallery = images_of(30, seed=1) if separate else (images, labels)
        report = evaluated(
            model,
            gallery=gallery if separate else None,
            eps=RADII[norm],
            attacks=attacks,
            norm=norm,
            keep_attacked=True,
        )
        owns = [-1] * 24 if separate else range(24)
        embeddings = embedded(model, gallery[0])
        clean = stands_by_loops(model, images, labels, owns, embeddings, gallery[1])
        assert bits(report.clean_flags) == clean
        assert report.clean["recall_at_1"] == pytest.approx(sum(clean) / 24)
        before = clean
        for worst in report.worst:
            attacked = report.attacked[worst.eps]
            change = (attacked - images).flatten(1)
            assert (change.abs().amax(1) if norm == "Linf" else change.norm(dim=1)).max() <= worst.eps + 1e-6
            assert 0 <= attacked.min() <= attacked.max() <= 1
            stands = stands_by_loops(model, attacked, labels, owns, embeddings, gallery[1])
            assert bits(worst.robust_flags) == stands
            assert worst.measures["recall_at_1"] == pytest.approx(sum(stands) / 24)
            assert all(then or not now for then, now in zip(before, stands, strict=True))
            before = stands
        assert sum(clean) > sum(before)
        assert not all(clean)  # queries that are wrong without attack are among them

    def test_clean_measures_by_loops_whatever_the_batch_size(self):
        (images, labels), model = images_of(), network()
        embeddings = embedded(model, images)
        rows = [by_loops.measures(embeddings[i], labels[i], i, embeddings, labels, (1, 2, 4, 8)) for i in range(24)]
        wanted = {name: sum(row[name] for row in rows) / 24 for name in rows[0]}
        for batch_size in (1, 5, 24, 100):
            report = evaluated(model, attacks=(NOISE,), batch_size=batch_size)
            assert dict(report.clean) == pytest.approx(wanted, abs=1e-6)
            assert report.chance == pytest.approx(5 / 23)
            assert (report.num_queries, report.num_gallery, report.num_classes) == (24, 24, 4)

    def test_collapse_and_counts(self):
        report = evaluated(gallery=images_of(31, seed=1), attacks=(NOISE,))
        assert report.protocol == "separate gallery"
        assert (report.num_queries, report.num_gallery, report.num_classes) == (24, 31, 4)
        sizes = torch.bincount(images_of(31, seed=1)[1])
        assert report.chance == pytest.approx((sizes[images_of()[1]] / 31).mean().item())
        assert -1 <= report.collapse["mean_similarity"] <= 1
        assert evaluated(attacks=(NOISE,)).protocol == "leave-one-out"

    def test_measures_are_the_lowest_over_restarts_and_smaller_radii(self):
        report = evaluated(recall_at=(1, 3))
        for attack in FEW:
            results = [result for result in report.attacks if result.attack == attack.name]
            assert [result.eps for result in results] == list(EPS)
            for name, clean in report.clean.items():
                values = [clean, *(result.measures[name] for result in results)]
                assert values == sorted(values, reverse=True)
        assert list(report.clean) == ["recall_at_1", "recall_at_3", "map_at_r", "r_precision"]

    def test_a_collapsed_model_is_not_called_robust(self):
        report = evaluated(Made(lambda x: 0 * x.flatten(1) + torch.arange(36.0)), attacks=AS_CLASSES)
        assert set(report.clean_flags + report.worst[0].robust_flags) == {"0"}
        assert report.collapse["mean_similarity"] == pytest.approx(1)

    def test_passes_are_counted(self):
        model, rows = network(), Notes()
        model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        report = evaluated(model, attacks=(SHIFT, NOISE), eps=0.001)
        shift, noise = report.attacks
        assert (shift.forward_passes, shift.backward_passes) == (8 * 24, 6 * 24)
        assert (noise.forward_passes, noise.backward_passes) == (24, 0)
        assert sum(rows) == 3 + 2 * 16 + 24 + 8 * 24 + 24 + 7  # probes, the gallery, the attacks, and the examples

    def test_shift_by_loops(self):
        (images, labels), model = images_of(spread=0.05), network()
        report = evaluated(model, (images, labels), attacks=(SHIFT,), eps=0.05, keep_attacked=True)
        assert report.clean["recall_at_1"] == 1
        moved, clean = (normalize(embedded(model, x)) for x in (report.attacked[0.05], images))
        assert report.attacks[0].shift == pytest.approx((moved - clean).norm(dim=1).mean().item(), abs=1e-5)

    def test_examples(self):
        (images, labels), model = images_of(), network()
        report = evaluated(model, (images, labels), attacks=(MARGIN, SHIFT))
        embeddings = embedded(model, images)
        assert 0 < len(report.examples) <= 8
        for example in report.examples:
            assert example.label == labels[example.query]
            broken_at = [w.eps for w in report.worst if w.eps <= EPS[1] and w.robust_flags[example.query] == "0"]
            assert example.succeeded == bool(broken_at)
            assert example.eps == min(broken_at) if broken_at else example.eps in EPS[:2]
            assert example.attack in ("margin", "shift")
            assert example.name == str(example.label)
            assert torch.equal(example.clean, images[example.query])
            assert (example.perturbed - example.clean).abs().max() <= example.eps + 1e-6
            for image, found in ((example.clean, example.before), (example.perturbed, example.after)):
                near = by_loops.similarities(embedded(model, image.unsqueeze(0))[0], example.query, embeddings)
                assert [neighbour.item for neighbour in found] == sorted(near, key=lambda j: -near[j])[:5]
                assert all(neighbour.label == labels[neighbour.item] for neighbour in found)
                assert all(torch.equal(neighbour.image, images[neighbour.item]) for neighbour in found)


class TestWorstCase:
    def test_is_no_better_than_any_attack_for_any_query_and_falls_with_eps(self):
        report = evaluated()
        for target in ("query", "gallery"):
            before = bits(report.clean_flags)
            for worst in (worst for worst in report.worst if worst.target == target):
                found = [bits(r.robust_flags) for r in report.attacks if (r.eps, r.target) == (worst.eps, target)]
                assert len(found) == 2
                every = [all(marks) for marks in zip(before, *found, strict=True)]
                assert bits(worst.robust_flags) == every
                for result in report.attacks:
                    if (result.eps, result.target) == (worst.eps, target):
                        assert all(worst.measures[name] <= result.measures[name] for name in worst.measures)
                assert report.worst_case(worst.eps, target=target) == pytest.approx(sum(every) / 24)
                before = every
            assert sum(before) < sum(bits(report.clean_flags))

    def test_is_below_the_lowest_attack_where_attacks_break_different_queries(self):
        def only(parity):
            def find(batch, eps, restart):
                moved = MARGIN.perturb(batch, eps, restart)
                chosen = (torch.arange(len(batch)) % 2 == parity).reshape(-1, 1, 1, 1)
                return torch.where(chosen, moved, batch.images)

            return QueryAttack(f"only {parity}", find)

        report = evaluated(attacks=(only(0), only(1)), batch_size=24)
        assert report.worst_case(EPS[2]) < min(r.measures["recall_at_1"] for r in report.attacks)

    def test_wrong_without_attack_is_broken(self):
        images, labels = images_of()
        still = QueryAttack("still", lambda batch, eps, restart: batch.images)
        report = evaluated(network(), (images, labels), attacks=(still,))
        assert "0" in report.clean_flags
        assert all(result.robust_flags == report.clean_flags for result in (*report.attacks, *report.worst))

    def test_a_wrong_query_that_an_attack_sets_right_stays_wrong(self):
        def rescue(batch, eps, restart):
            right = batch.gallery.hardest(batch.clean, batch.targets)[1]
            return batch.pixels_of(right)

        (images, labels), model = images_of(), network()
        rescued = QueryAttack("rescue", rescue)
        report = evaluated(model, (images, labels), attacks=(rescued,), eps=1.0, keep_attacked=True)
        assert report.worst[0].robust_flags == report.clean_flags
        clean = embedded(model, images)
        assert bits(report.worst[0].robust_flags) == stands_by_loops(
            model, report.attacked[1.0], labels, range(24), clean, labels
        )


class TestStrength:
    @pytest.mark.parametrize("norm", ["Linf", "L2"])
    def test_an_attack_that_knows_nothing_of_this_package_breaks_no_more(self, norm):
        images, labels = images_of()
        model, eps = network(), 0.03 if norm == "Linf" else 0.15
        report = evaluated(model, (images, labels), eps=eps, norm=norm, attacks=quick(steps=40), batch_size=24)
        model.eval()
        gallery, broken = normalize(embedded(model.eval(), images)), []
        model.eval()
        for i in range(24):
            right = [j for j in range(24) if labels[j] == labels[i] and j != i]
            wrong = [j for j in range(24) if labels[j] != labels[i]]
            moved, fails = images[i].clone(), False
            for _ in range(40):
                moved.requires_grad_()
                near = gallery @ normalize(model(moved[None]))[0]
                value = near[wrong].max() - near[right].max()
                fails = fails or value.item() >= 0
                (gradient,) = torch.autograd.grad(value, moved)
                if norm == "Linf":
                    moved = moved.detach() + 0.1 * eps * gradient.sign()
                    moved = (images[i] + (moved - images[i]).clamp(-eps, eps)).clamp(0, 1)
                else:
                    moved = moved.detach() + 0.2 * eps * gradient / gradient.norm()
                    change = moved - images[i]
                    moved = (images[i] + change * min(1.0, eps / float(change.norm()))).clamp(0, 1)
            broken.append(fails)
        ours = [not stands for stands in bits(report.worst[0].robust_flags)]
        clean = [not stands for stands in bits(report.clean_flags)]
        assert sum(clean) < sum(broken) < 24
        assert sum(ours) >= sum(broken)
        assert sum(theirs and not own for theirs, own in zip(broken, ours, strict=True)) <= 1

    @pytest.mark.slow
    def test_the_standard_suite_breaks_what_each_of_its_members_breaks(self):
        attacks = standard(steps=10, restarts=2, queries=50, targets=3)
        report = evaluated(attacks=attacks, eps=(0.02, 0.05))
        assert {result.attack for result in report.attacks} == {attack.name for attack in attacks}
        for result in report.attacks:
            assert result.forward_passes > 0
            assert (result.backward_passes > 0) != result.black_box
        assert report.worst_case(0.05) < report.worst_case(0.02) < report.clean["recall_at_1"]


class TestQueriesAndSubsets:
    def test_queries_without_a_right_item_are_left_out_and_counted(self):
        images, labels = images_of()
        labels = labels.clone()
        labels[[3, 10]] = torch.tensor([77, 78])
        report = evaluated(network(), (images, labels), attacks=(MARGIN,), keep_attacked=True)
        assert (report.left_out, report.num_queries, report.num_gallery) == (2, 22, 24)
        assert len(report.clean_flags) == len(report.worst[0].robust_flags) == len(report.attacked[EPS[0]]) == 22

    def test_labels_that_the_gallery_does_not_hold(self):
        images, labels = images_of()
        gallery = images_of(30, 3, seed=1)
        report = evaluated(network(), (images, labels), gallery, attacks=(NOISE,))
        assert report.left_out == 6
        assert report.num_queries == 18

    def test_a_subset_is_searched_among_all(self):
        (images, labels), model = images_of(), network()
        whole = evaluated(model, (images, labels), attacks=(NOISE,))
        rows = [20, 3, 11]
        for subset in (rows, torch.tensor(rows), numpy.array(rows), tuple(rows)):
            report = evaluated(model, (images, labels), attacks=(NOISE,), subset=subset)
            assert report.clean_flags == "".join(whole.clean_flags[row] for row in rows)
            assert (report.num_queries, report.num_gallery) == (3, 24)
            assert report.settings["subset"] == rows
            assert report.provenance["gallery"] == whole.provenance["gallery"]
            assert report.provenance["queries"] != whole.provenance["queries"]
        assert evaluated(model, attacks=(NOISE,), subset=range(24)).clean == whole.clean

    @pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int64])
    def test_labels_of_any_whole_kind(self, kind):
        images, labels = images_of()
        gallery = images_of(30, seed=1)
        found = evaluated(queries=(images, labels.to(kind)), gallery=gallery, attacks=AS_CLASSES)
        assert without_times(found) == without_times(evaluated(gallery=gallery, attacks=AS_CLASSES))

    def test_a_gallery_that_holds_some_queries_finds_all_but_these(self):
        (images, labels), model = images_of(), network()
        pixels, names = images_of(30, seed=1)
        pixels[5:15], names[5:15] = images[:10], labels[:10]
        owns = [*range(5, 15), *[-1] * 14]
        attacks = (MARGIN, APGD)
        report = evaluated(model, (images, labels), (pixels, names), own=owns, attacks=attacks, keep_attacked=True)
        embeddings = embedded(model, pixels)
        clean = stands_by_loops(model, images, labels, owns, embeddings, names)
        assert bits(report.clean_flags) == clean
        for worst in report.worst:
            attacked = report.attacked[worst.eps]
            assert bits(worst.robust_flags) == stands_by_loops(model, attacked, labels, owns, embeddings, names)
        assert sum(clean) > sum(bits(report.worst[0].robust_flags)) > 0

    def test_normalised_models_are_given_pixels(self):
        images, labels = images_of()
        model = network()
        plain = evaluated(nn.Sequential(Shifted(), model), (images, labels), attacks=(SHIFT,))
        normalised = evaluated(model, (images, labels), attacks=(SHIFT,), normalization=([0.4], [0.5]))
        assert plain.worst_case(EPS[1]) == normalised.worst_case(EPS[1])
        assert plain.clean == normalised.clean
        assert normalised.settings["normalization"] == [[0.4], [0.5]]

    @pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
    def test_precision(self, kind):
        images, labels = images_of()
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 6)).to(kind)
        report = evaluated(model, (images.to(kind), labels), attacks=(PROMOTE, *standard(2, 1, 2, 2)[:-2]))
        assert report.worst_case(EPS[2]) < report.clean["recall_at_1"]

    def test_images_that_require_gradient(self):
        images, labels = images_of()
        watched = images.clone().requires_grad_()
        found = evaluated(queries=(watched, labels), attacks=AS_CLASSES)
        assert without_times(found) == without_times(evaluated(attacks=AS_CLASSES))
        assert watched.grad is None

    def test_nmi(self):
        report = evaluated(attacks=(MARGIN,), nmi=True)
        assert 0 < report.worst[-1].nmi < report.nmi <= 1
        (images, labels), model = images_of(), network()
        some = evaluated(model, (images, labels), attacks=(MARGIN,), nmi=True, subset=range(0, 24, 2)).nmi
        assert some == pytest.approx(scores.nmi(normalize(embedded(model, images))[::2], labels[::2]))

    def test_attacks_by_name(self):
        report = evaluated(attacks=["shift", quick(steps=3, restarts=1)[0]])
        assert [result.attack for result in report.attacks] == ["shift", "margin"] * len(EPS)
        assert report.suite == "custom"

    def test_an_exported_program_as_torch_loads_it(self):
        (images, labels), model = images_of(), network().eval()
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(model, (images,), dynamic_shapes=(batch,)).module()
        attacks = ["apgd-ce"]  # torchattacks asks for the mode, and the program refuses
        exported, plain = (evaluated(m, (images, labels), attacks=attacks, eps=0.05) for m in (program, model))
        assert exported.worst_case(0.05) == pytest.approx(plain.worst_case(0.05), abs=1 / 24)
        assert exported.worst_case(0.05) < exported.clean["recall_at_1"]

        assert evaluated(attacks=(MARGIN,)).nmi is None

    def test_attacks_that_need_more_classes_than_there_are_sit_out(self):
        needs = QueryAttack("needs five", NOISE.perturb, num_classes=5)
        assert {result.attack for result in evaluated(attacks=(needs, NOISE)).attacks} == {"noise"}


class Shifted(nn.Module):
    def forward(self, pixels):
        return (pixels - 0.4) / 0.5


class TestRandomness:
    def test_same_seed_same_numbers_other_seed_others(self):
        first, again, other = (evaluated(attacks=(NOISE,), keep_attacked=True, seed=seed) for seed in (0, 0, 1))
        assert without_times(first) == without_times(again)
        assert all(torch.equal(first.attacked[eps], again.attacked[eps]) for eps in EPS)
        assert not torch.equal(first.attacked[EPS[0]], other.attacked[EPS[0]])

    def test_does_not_depend_on_the_state_of_the_generators(self):
        attacks = (NOISE, APGD)
        first = evaluated(attacks=attacks)
        torch.manual_seed(123)
        numpy.random.seed(5)  # noqa: NPY002
        random.seed(7)
        assert without_times(evaluated(attacks=attacks)) == without_times(first)

    def test_other_attacks_in_the_list_do_not_change_the_starts_of_one(self):
        alone = evaluated(attacks=(NOISE,))
        among = evaluated(attacks=(MARGIN, PROMOTE, NOISE))
        marks = [[r.robust_flags for r in report.attacks if r.attack == "noise"] for report in (alone, among)]
        assert marks[0] == marks[1]

    def test_other_radii_do_not_change_those_of_one(self):
        alone, among = evaluated(attacks=(NOISE,), eps=EPS[0]), evaluated(attacks=(NOISE,))
        assert alone.attacks[0].robust_flags == among.attacks[0].robust_flags

    def test_batches_and_restarts_start_from_different_points(self):
        starts = []

        def record(batch, eps, restart):
            starts.append(torch.rand(()).item())
            return batch.images

        gallery = images_of(30, seed=1)
        evaluated(gallery=gallery, attacks=(QueryAttack("r", record, 2),), batch_size=8)
        assert len(set(starts)) == len(starts) == 3 * 3 * 2


def trace(model):
    return {
        "modes": [module.training for module in model.modules()],
        "buffers": [(id(buffer), buffer.clone().tolist()) for buffer in model.buffers()],
        "parameters": [(id(p), p.requires_grad, id(p.grad), p.detach().clone().tolist()) for p in model.parameters()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": [x.tolist() if hasattr(x, "tolist") else x for x in numpy.random.get_state()],  # noqa: NPY002
        "python": random.getstate(),
        "gradient": torch.is_grad_enabled(),
    }


class Fails(nn.Module):
    """Raises in its n-th forward pass."""

    def __init__(self, model, at):
        super().__init__()
        self.model, self.at, self.calls = model, at, 0

    def forward(self, images):
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("out of luck")
        return self.model(images)


class TestLeavesNoTrace:
    def prepared(self):
        model = network()
        model[1].eval()
        model[0].weight.requires_grad_(False)
        model[5].weight.grad = torch.ones_like(model[5].weight)
        return model

    def test_after_all_attacks(self):
        model, (images, labels) = self.prepared(), images_of()
        before, pixels = trace(model), images.clone()
        evaluated(model, (images, labels), attacks=standard(3, 1, 5, 2), eps=0.05, nmi=True, keep_attacked=True)
        assert trace(model) == before
        assert torch.equal(images, pixels)

    @pytest.mark.parametrize("at", [1, 3, 5, 9, 17, 40])
    def test_after_an_exception_at_the_nth_forward_pass(self, at):
        model = self.prepared()
        failing = Fails(model, at)
        failing.training = True
        before = trace(model)
        with pytest.raises(Exception, match="out of luck"):
            evaluated(failing)
        assert trace(model) == before
        assert failing.training

    def test_without_gradient_outside(self):
        with torch.no_grad():
            found = evaluated(attacks=AS_CLASSES)
            assert not torch.is_grad_enabled()
        assert without_times(found) == without_times(evaluated(attacks=AS_CLASSES))


class TestRefusals:
    def test_eps_in_levels(self):
        with pytest.raises(InputError, match=r"eps=8 is wider than all pixels; expected 1 at most in Linf, such as"):
            evaluated(eps=8)
        assert evaluated(eps=3.0, norm="L2", attacks=(NOISE,)).worst[0].eps == 3

    @pytest.mark.parametrize("norm", ["linf", "L3", None, 2])
    def test_norm(self, norm):
        with pytest.raises(InputError, match=r"norm=.*; expected 'Linf', 'L2', 'L1', 'L0' or 'patch'"):
            evaluated(norm=norm)

    @pytest.mark.parametrize("batch_size", [0, -1, 2.5, None])
    def test_batch_size(self, batch_size):
        with pytest.raises(InputError, match=r"batch_size=.*; expected a whole number from 1 on"):
            evaluated(batch_size=batch_size)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"eps": (0.1, 0)}, r"eps=\(0\.1, 0\); expected one or more radii above 0 in pixels"),
            ({"recall_at": (1, -2)}, r"recall_at=\(1, -2\); expected whole numbers from 1 on"),
            ({"subset": [1, 24]}, r"subset=\[1, 24\]; expected different indices, one at least, below 24"),
            ({"own": [0] * 24}, r"own holds .*; expected, together with a gallery, for each of 24 queries"),
        ],
    )
    def test_numbers(self, option, message):
        with pytest.raises(InputError, match=message):
            evaluated(**option)

    def test_unknown_suite(self):
        with pytest.raises(InputError, match=r"attacks='hard'; expected one of standard, fast, quick, or a list"):
            evaluated(attacks="hard")

    @pytest.mark.parametrize("attacks", [[], [3], [MARGIN, MARGIN], [MARGIN, "shifty"], ["shift", "shift"]])
    def test_attacks(self, attacks):
        with pytest.raises(InputError, match="expected QueryAttack and GalleryAttack objects of different names"):
            evaluated(attacks=attacks)

    @pytest.mark.parametrize(
        ("queries", "message"),
        [
            (torch.rand(4, 1, 6, 6), r"queries is Tensor; expected \(images, labels\) or a data set"),
            ((torch.randn(4, 1, 6, 6), torch.arange(4) // 2), r"queries, image 0: .* pass normalization="),
            ((torch.rand(4, 1, 6, 6), torch.zeros(4).long()), "All items of the gallery have one label"),
            ((torch.rand(4, 1, 6, 6), torch.arange(4)), r"None of 4 queries has a right item.*at least twice\."),
        ],
    )
    def test_images(self, queries, message):
        with pytest.raises(InputError, match=message):
            evaluate_robustness(network(), queries, eps=0.05, attacks=(NOISE,))

    def test_gallery_is_named(self):
        with pytest.raises(InputError, match=r"gallery, image 0: "):
            evaluated(gallery=(torch.randn(24, 1, 6, 6), torch.arange(24) // 2))
        with pytest.raises(InputError, match=r"None of 24 queries has a right item.*labels that occur there\.$"):
            evaluated(gallery=(torch.rand(24, 1, 6, 6), 50 + torch.arange(24) // 2))

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (lambda x: x, r"The model returned \(1, 1, 6, 6\) for 1 images; expected embeddings \(1, D\)"),
            (lambda x: x.flatten(1) * math.nan, r"NaN or infinite embeddings for 24 of 24 images without attack"),
            (lambda x: x.flatten(1) / 0, r"NaN or infinite embeddings for 24 of 24 images without attack"),
        ],
    )
    def test_models(self, made, message):
        with pytest.raises(InputError, match=message):
            evaluated(Made(made))

    def test_clean_queries_that_are_not_finite(self):
        model = Made(lambda x: torch.where(x[:, :1, 0, 0] == 0.5, math.nan, x.flatten(1)))
        images, labels = images_of()
        images[13, 0, 0, 0] = 0.5
        with pytest.raises(InputError, match="NaN or infinite embeddings for 1 of"):
            evaluated(model, (images, labels), images_of(seed=1))

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((24, 7), r"gallery_embeddings are torch.float32 \(24, 7\); expected \(24, 6\)"),
            ((23, 6), "There are 23 embeddings for 24"),
        ],
    )
    def test_known_embeddings(self, shape, message):
        with pytest.raises(InputError, match=message):
            evaluated(gallery=images_of(seed=1), gallery_embeddings=torch.rand(shape))

    @pytest.mark.parametrize("normalization", [([0.5],), (0.5, 0.5), ([0.5], [0.0]), "imagenet"])
    def test_normalization(self, normalization):
        with pytest.raises(InputError, match=r"normalization=.*; expected \(mean, std\)"):
            evaluated(normalization=normalization)

    def test_without_faiss(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(InputError, match="needs faiss"):
            evaluated(attacks=(NOISE,), nmi=True)

    def test_progress(self, capsys):
        evaluated(attacks=(NOISE, MARGIN), progress=True)
        assert "custom: margin, eps 0.12: 100%" in capsys.readouterr().err


class TestNorms:
    """Budgets beyond l-inf and l2."""

    @all_norms
    def test_worst_case_is_within_the_budget_and_again_by_loops(self, norm):
        images, labels = images_of()
        model, eps = network(), {"Linf": 0.05, "L2": 0.3, "L1": 0.4, "L0": 1, "patch": 1}[norm]
        attacks = (MARGIN, SHIFT, PROMOTE)
        report = evaluated(model, (images, labels), eps=eps, norm=norm, attacks=attacks, keep_attacked=True)
        assert (length(report.attacked[eps] - images, norm) <= eps * (1 + 1e-5)).all()
        items, moved = embedded(model, images), embedded(model, report.attacked[eps])
        stands = [by_loops.stands(moved[i], labels[i], i, items, labels) for i in range(len(images))]
        flags = [bits(found.robust_flags) for found in report.attacks if found.target == "query"]
        assert stands == [all(of) for of in zip(*flags, strict=True)]
        assert 0 < sum(stands) < sum(bits(report.clean_flags))

    @pytest.mark.parametrize("norm", ["L1", "L0", "patch"])
    def test_attacks_that_do_not_know_a_norm_are_left_out(self, norm):
        report = evaluated(eps=2, norm=norm, attacks=[MARGIN, "apgd-ce", PROMOTE])
        assert f"apgd-ce is left out: it is made for Linf and L2, not for {norm}" in report.notes
        assert [found.attack for found in report.attacks] == ["margin", "promote"]

    def test_none_left_is_an_error(self):
        with pytest.raises(InputError, match=r"None of the attacks can be made here: fab-t is left out"):
            evaluated(eps=2, norm="L1", attacks=["fab-t"])

    def test_classes_of_torchattacks_that_take_no_norm_are_held_to_any(self):
        report = evaluated(eps=2, norm="L0", attacks=[torchattacks.FGSM, torchattacks.APGD])
        assert [found.attack for found in report.attacks] == ["FGSM"]
        assert report.attacks[0].shift > 0

    @pytest.mark.parametrize(("norm", "eps"), [("L2", 8), ("L1", 37), ("L0", 37), ("patch", 7)])
    def test_radii_wider_than_the_images_are_refused(self, norm, eps):
        with pytest.raises(InputError, match=rf"eps={eps} in norm='{norm}' is wider than images of shape \(1, 6, 6\)"):
            evaluated(eps=(1, eps), norm=norm)
