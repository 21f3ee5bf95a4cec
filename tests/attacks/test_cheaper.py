import math
from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss, TripletMarginLoss
from torch import nn

from pml_adversarial import AdversarialLoss, AttackError, InputError, PluginError, attacks, hookimpl
from pml_adversarial.attacks.autocast import Autocast
from pml_adversarial.attacks.friendly import FriendlyPGD
from pml_adversarial.attacks.nfgsm import NFGSM
from pml_adversarial.defenses.atta import ATTA
from pml_adversarial.defenses.free import FreeAT
from pml_adversarial.defenses.hard_rows import HardRows
from pml_adversarial.training.plan import plan_roles, replace_rows

EPS, ROWS = 0.05, 12


class Counted(nn.Module):
    """A small network that knows how many rows passed it, and in which types."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4))
        self.passed, self.types = [], []

    def forward(self, images):
        self.passed.append(len(images))
        found = self.layers(images)
        self.types.append(found.dtype)
        return found


class Watch:
    """A plugin that keeps what a step was made of."""

    @hookimpl
    def pml_adversarial_record(self, batch, plan, adversarial):
        self.batch, self.plan, self.adversarial = batch, plan, adversarial
        return {}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Counted()


@pytest.fixture
def images():
    return torch.rand(ROWS, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.arange(ROWS) // 3


def wrapped(model, *plugins, attack=attacks.PRESET, loss=None, **options):
    watch = Watch()
    options = {"warmup": 0, "guard": False, **options}
    loss_func = AdversarialLoss(
        loss or MultiSimilarityLoss(), model, attack=attack, plugins=[*plugins, watch], **options
    )
    return loss_func, watch


def score_of(embedding, row, context, labels):
    """Similarity to the nearest row of another label, less that to the furthest of one's own, in the loss's cosine."""
    similar = [nn.functional.cosine_similarity(embedding, other, dim=0) for other in context]
    others = [other for other in range(ROWS) if other != row]
    same = [similar[other] for other in others if labels[other] == labels[row]]
    different = [similar[other] for other in others if labels[other] != labels[row]]
    return max(different) - min(same)


def signs_by_hand(model, points, context, labels):
    gradients = []
    for row in range(len(points)):
        point = points[row : row + 1].clone().requires_grad_()
        score = score_of(model.layers(point)[0], row, context, labels)
        gradients.append(torch.autograd.grad(score, point)[0])
    return torch.cat(gradients).sign()


ATTACKS = {
    "noisy step": partial(NFGSM, eps=EPS),
    "early stop": partial(FriendlyPGD, eps=EPS),
    "bfloat16": Autocast(attacks.preset(EPS)),
    "float16": Autocast(attacks.preset(EPS), torch.float16),
}
PLUGINS = {"hard rows": HardRows, "reuse": partial(ATTA, eps=EPS), "replay": partial(FreeAT, eps=EPS)}


class TestAll:
    @pytest.mark.parametrize("name", [*ATTACKS, *PLUGINS])
    def test_trains_from_nothing_and_leaves_no_trace(self, name, model, images, labels):
        plugins = [PLUGINS[name]()] if name in PLUGINS else []
        loss_func, watch = wrapped(model, *plugins, attack=ATTACKS.get(name, attacks.preset(EPS)), warmup=4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(6):
            for reuse in (plugin for plugin in plugins if isinstance(plugin, ATTA)):
                reuse.next(torch.arange(ROWS))
            random_state = torch.get_rng_state()
            loss = loss_func(model(images), labels)
            assert torch.equal(torch.get_rng_state(), random_state)
            assert all(p.requires_grad and p.grad is None for p in model.parameters())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert math.isfinite(loss.item())
            assert loss_func.strength == min(1, step / 4)
        assert not images.requires_grad
        assert loss_func.num_perturbed == (ROWS / 2 if name == "hard rows" else ROWS)
        assert watch.adversarial.inputs.min() >= 0
        assert watch.adversarial.inputs.max() <= 1

    @pytest.mark.parametrize("name", [*ATTACKS, "hard rows", "reuse"])
    def test_what_it_perturbs_is_worse_off(self, name, model, images, labels):
        plugins = [PLUGINS[name]()] if name in PLUGINS else []
        loss_func, watch = wrapped(model, *plugins, attack=ATTACKS.get(name, attacks.preset(EPS)))
        for reuse in (plugin for plugin in plugins if isinstance(plugin, ATTA)):
            reuse.next(torch.arange(ROWS))
        loss_func(model(images), labels)
        broken = watch.adversarial.score_before > 0 if name == "early stop" else torch.zeros(1, dtype=torch.bool)
        rose = watch.adversarial.score_after > watch.adversarial.score_before
        assert (rose | broken).float().mean() > 0.9


class TestNoisyStep:
    def test_is_one_uncut_sign_step_from_wide_noise(self, model, images, labels):
        loss_func, watch = wrapped(model, attack=partial(NFGSM, eps=EPS, alpha=0.03, spread=1.5), seed=7)
        context = model(images)
        drawn = []
        uniform = torch.Tensor.uniform_

        def kept(self, *args):
            drawn.append(uniform(self, *args).clone())
            return self.copy_(drawn[-1])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", kept)
            loss_func(context, labels)
        (unit,) = drawn
        start = images + 1.5 * EPS * unit
        expected = start + 0.03 * signs_by_hand(model, start, context.detach(), labels)
        assert unit.min() < -0.9
        assert 0.9 < unit.max() <= 1
        assert torch.allclose(watch.adversarial.inputs, expected.clamp(0, 1), atol=1e-6)
        assert loss_func.perturbation_linf > EPS

    def test_passes_each_row_once(self, model, images, labels):
        loss_func, _ = wrapped(model, attack=partial(NFGSM, eps=EPS))
        loss_func(model(images), labels)
        assert model.passed == [ROWS] * 3  # the batch, one step, the perturbed rows


class TestEarlyStop:
    def test_never_resting_it_is_pgd_from_the_same_start(self, model, images, labels):
        """Written out with all rows, and the score of each by hand."""
        loss_func, watch = wrapped(
            model, attack=partial(FriendlyPGD, eps=EPS, alpha=0.02, steps=3, enough=math.inf), seed=7
        )
        starts = []
        uniform = torch.Tensor.uniform_
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", lambda t, *a: (starts.append(uniform(t, *a).clone()), t)[1])
            loss_func(context := model(images), labels)
        points = (images + EPS * starts[0]).clamp(0, 1)
        for _ in range(3):
            points = points + 0.02 * signs_by_hand(model, points, context.detach(), labels)
            points = (images + (points - images).clamp(-EPS, EPS)).clamp(0, 1)
        assert torch.allclose(watch.adversarial.inputs, points, atol=1e-6)

    @pytest.mark.parametrize("steps", [0, 1.5, None])
    def test_other_numbers_of_steps_are_refused(self, model, images, labels, steps):
        loss_func, _ = wrapped(model, attack=partial(FriendlyPGD, eps=EPS, steps=steps))
        with pytest.raises(AttackError, match="expected a whole number of attack steps"):
            loss_func(model(images), labels)

    def test_rows_at_rest_are_where_they_stopped_and_pass_no_more(self, model, images, labels):
        loss_func, watch = wrapped(model, attack=partial(FriendlyPGD, eps=0.02, alpha=0.01, steps=8), keep_clean=False)
        context = model(images).detach()
        model.passed.clear()
        loss_func(model(images), labels)
        _, *steps, again = model.passed
        assert steps[0] == again == ROWS
        assert steps == sorted(steps, reverse=True)
        assert steps[-1] < ROWS  # else the test shows nothing
        assert len(steps) > 1
        scores = [
            score_of(model.layers(x)[0], i, context, labels) for i, x in enumerate(watch.adversarial.inputs.split(1))
        ]
        at_rest = ROWS - steps[-1]
        assert sum(score > -1e-6 for score in scores) >= at_rest

    def test_gradient_is_watched_in_the_rows_that_go_on(self, model, images, labels):
        loss_func, watch = wrapped(model, attack=partial(FriendlyPGD, eps=EPS, steps=5))
        loss_func(model(images), labels)
        assert not watch.adversarial.zero_gradient.any()


class TestHardRows:
    @pytest.mark.parametrize("share", [0.25, 0.5, 1])
    def test_are_those_with_the_longest_gradient(self, share, model, images, labels):
        loss = MultiSimilarityLoss()
        loss_func, watch = wrapped(model, HardRows(share), loss=loss)
        embeddings = model(images)
        loss_func(embeddings, labels)
        lengths = {}
        for row in range(ROWS):
            mine = embeddings[row].detach().clone().requires_grad_()
            others = [embeddings[i].detach() if i != row else mine for i in range(ROWS)]
            (gradient,) = torch.autograd.grad(loss(torch.stack(others), labels), mine)
            lengths[row] = gradient.norm().item()
        expected = sorted(sorted(lengths, key=lengths.get)[-round(share * ROWS) :])
        assert watch.plan.rows.tolist() == expected

    def test_others_stay_unperturbed_in_their_places(self, model, images, labels):
        loss_func, watch = wrapped(model, HardRows(0.5), keep_clean=False)
        loss = loss_func(embeddings := model(images), labels)
        rows = [row.detach() for row in embeddings]
        for row, copy in zip(watch.plan.rows.tolist(), watch.adversarial.embeddings, strict=True):
            rows[row] = copy.detach()
        assert loss.item() == pytest.approx(MultiSimilarityLoss()(torch.stack(rows), labels).item(), rel=1e-5)

    def test_only_they_are_passed(self, model, images, labels):
        loss_func, _ = wrapped(model, HardRows(0.5))
        loss_func(model(images), labels)
        assert model.passed == [ROWS, *[ROWS // 2] * 4]

    def test_keeps_tuples_of_copies_that_stand_beside_their_rows(self, model, images, labels):
        loss_func, watch = wrapped(model, HardRows(0.5), loss=ContrastiveLoss(), perturb="positive", keep_clean=False)
        embeddings = model(images)
        loss = loss_func(embeddings, labels)
        pool = [*embeddings.detach(), *watch.adversarial.embeddings.detach()]
        standing = [pool[address] for address in watch.plan.pool_indices.tolist()]
        a, p, b, n = watch.plan.indices_tuple
        assert any(watch.plan.pool_indices[i] < ROWS for i in p.tolist())  # some positives are clean again
        expected = ContrastiveLoss()(torch.stack(standing), None, (a, p, b, n))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("share", [0, -1, 1.5, "half", True, None])
    def test_refuses_what_is_no_share(self, share):
        with pytest.raises(InputError, match="expected a share"):
            HardRows(share)


class TestPlanKeep:
    @pytest.mark.parametrize("copies", [[0, 2], [], [3, 1], [0, 1, 2, 3]])
    def test_of_plans_that_append(self, copies):
        tuples = torch.tensor([0, 1, 0]), torch.tensor([1, 0, 2]), torch.tensor([2, 3, 3])
        plan = plan_roles(tuples, ["positive", "negative"], num_rows=4)
        copies = torch.tensor(copies, dtype=torch.long)
        kept = plan.keep(copies, 4)
        assert kept.rows.tolist() == [plan.rows[c] for c in copies]
        for before, after in zip(plan.pool_indices.tolist(), kept.pool_indices.tolist(), strict=True):
            if before < 4:
                assert after == before
            elif before - 4 in copies.tolist():
                assert after == 4 + copies.tolist().index(before - 4)
            else:
                assert after == plan.rows[before - 4]
        assert all(torch.equal(x, y) for x, y in zip(plan.indices_tuple, kept.indices_tuple, strict=True))

    def test_of_plans_with_a_reference(self):
        plan = replace_rows(torch.arange(4), 6, None).split(3)
        kept = plan.keep(torch.tensor([0, 3]), 6)
        assert kept.pool_indices.tolist() == [6, 1, 2]
        assert kept.ref_pool_indices.tolist() == [7, 4, 5]


class TestInPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_only_attack_steps_are_in_it(self, dtype, model, images, labels):
        loss_func, _ = wrapped(model, attack=Autocast(attacks.preset(EPS), dtype))
        loss_func(model(images), labels)
        assert model.types == [torch.float32, *[dtype] * 3, torch.float32]

    def test_is_scaled_as_the_attack_itself(self, model, images, labels):
        loss_func, _ = wrapped(model, attack=Autocast(attacks.preset(EPS)), warmup=2)
        seen = []
        for _ in range(3):
            loss_func(model(images), labels)
            seen.append(loss_func.perturbation_linf)
        assert seen == pytest.approx([0, EPS / 2, EPS], rel=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "bfloat16", None])
    def test_refuses_other_types(self, dtype):
        with pytest.raises(AttackError, match="expected one of torch"):
            Autocast(attacks.PRESET, dtype)

    @pytest.mark.parametrize("factory", [torchattacks.DeepFool, "PGD"])
    def test_refuses_what_is_refused_without_it(self, factory):
        with pytest.raises(AttackError):
            Autocast(factory)


class TestReuse:
    def test_starts_where_the_image_was_left(self, model, images, labels):
        reuse = ATTA(eps=EPS, alpha=0.0)  # it stays where it starts
        loss_func, watch = wrapped(model, reuse)
        reuse.next(torch.arange(ROWS) + 5)
        loss_func(model(images), labels)
        first = watch.adversarial.inputs
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
        reuse.next(order + 5)
        loss_func(model(images[order]), labels[order])
        assert torch.allclose(watch.adversarial.inputs, first[order], atol=1e-6)
        reuse.next(torch.arange(ROWS) + 100)
        loss_func(model(images), labels)
        assert (watch.adversarial.inputs - first).abs().max() > 0.01
        assert reuse.known.nonzero().flatten().tolist() == [*range(5, 5 + ROWS), *range(100, 100 + ROWS)]

    def test_steps_add_up_over_epochs(self, model, images, labels):
        reuse = ATTA(eps=EPS, alpha=0.01)
        loss_func, watch = wrapped(model, reuse)
        context, scores = model(images).detach(), []
        for _ in range(8):
            reuse.next(torch.arange(ROWS))
            loss_func(model(images), labels)
            scores.append(watch.adversarial.score_after.mean().item())
        assert scores[-1] > scores[0]
        before = watch.adversarial.inputs
        expected = before + 0.01 * signs_by_hand(model, before, context, labels)
        reuse.next(torch.arange(ROWS))
        loss_func(model(images), labels)
        expected = (images + (expected - images).clamp(-EPS, EPS)).clamp(0, 1)
        assert torch.allclose(watch.adversarial.inputs, expected, atol=1e-5)

    def test_goes_on_from_a_saved_state(self, model, images, labels, tmp_path):
        reuse = ATTA(eps=EPS)
        loss_func, _ = wrapped(model, reuse)
        reuse.next(torch.arange(ROWS))
        loss_func(model(images), labels)
        torch.save(loss_func.state_dict(), tmp_path / "loss.pt")
        found = []
        for plugin, func in ((reuse, loss_func), (ATTA(eps=EPS), None)):
            if func is None:
                func, _ = wrapped(model, plugin)
                func.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
            plugin.next(torch.arange(ROWS))
            found.append(func(model(images), labels).item())
        assert found[0] == found[1]

    def test_has_to_be_told_each_time(self, model, images, labels):
        reuse = ATTA(eps=EPS)
        loss_func, _ = wrapped(model, reuse)
        with pytest.raises(PluginError, match="told nothing"):
            loss_func(model(images), labels)
        reuse.next(torch.arange(3))
        with pytest.raises(PluginError, match="told 3 places before a call with 12 inputs"):
            loss_func(model(images), labels)
        reuse.next(torch.arange(ROWS))
        loss_func(model(images), labels)
        with pytest.raises(PluginError, match="told nothing"):
            loss_func(model(images), labels)

    @pytest.mark.parametrize("index", [torch.tensor([-1]), torch.tensor([0.5]), torch.tensor([[1]]), [1, 2], None])
    def test_refuses_what_is_no_index(self, index):
        with pytest.raises(InputError, match="index is"):
            ATTA().next(index)

    @pytest.mark.parametrize("options", [{"eps": 0}, {"eps": 8}, {"eps": None}, {"steps": 0}, {"steps": 1.5}])
    def test_refuses_nonsense(self, options):
        with pytest.raises(InputError, match="expected eps"):
            ATTA(**options)


class TestReplay:
    def test_moves_by_the_gradient_of_training(self, model, images, labels):
        replay = FreeAT(eps=EPS, alpha=0.01)
        loss_func, watch = wrapped(model, replay, keep_clean=False)
        loss_func(model(images), labels).backward()
        first = watch.adversarial.inputs.detach()
        again = first.clone().requires_grad_()
        MultiSimilarityLoss()(model.layers(again), labels).backward()
        expected = first + 0.01 * again.grad.sign()
        loss_func(model(images), labels)
        expected = (images + (expected - images).clamp(-EPS, EPS)).clamp(0, 1)
        assert torch.allclose(watch.adversarial.inputs, expected, atol=1e-6)

    def test_attacks_without_a_pass(self, model, images, labels):
        loss_func, _ = wrapped(model, FreeAT(eps=EPS))
        loss_func(model(images), labels).backward()
        assert model.passed == [ROWS, ROWS]

    def test_raises_the_loss_from_time_to_time(self, model, images, labels):
        loss_func, _ = wrapped(model, FreeAT(eps=EPS, alpha=0.02), keep_clean=False)
        losses = []
        for _ in range(6):
            losses.append(loss_func(model(images), labels))
            losses[-1].backward()
        assert losses[-1] > losses[0]

    def test_another_batch_size_starts_anew(self, model, images, labels):
        loss_func, watch = wrapped(model, FreeAT(eps=EPS))
        loss_func(model(images), labels).backward()
        loss_func(model(images[:6]), labels[:6]).backward()
        assert watch.adversarial.inputs.shape == images[:6].shape

    @pytest.mark.parametrize("eps", [0, -1, 8, None])
    def test_refuses_what_is_no_radius(self, eps):
        with pytest.raises(InputError, match="expected a radius"):
            FreeAT(eps)


class TestTheyCombine:
    def test_hard_rows_with_reuse(self, model, images, labels):
        reuse = ATTA(eps=EPS, alpha=0.0)
        loss_func, watch = wrapped(model, HardRows(0.5), reuse, loss=TripletMarginLoss())
        reuse.next(torch.arange(ROWS))
        loss_func(model(images), labels)
        assert reuse.known.nonzero().flatten().tolist() == watch.plan.rows.tolist()

    def test_early_stop_in_bfloat16(self, model, images, labels):
        loss_func, _ = wrapped(model, attack=Autocast(partial(FriendlyPGD, eps=EPS)))
        loss_func(model(images), labels)
        assert model.types[1] == torch.bfloat16
        assert loss_func.share_zero_gradient < 1
