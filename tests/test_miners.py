import copy
import gc
import weakref
from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning import losses, miners
from torch.nn.functional import normalize

from pml_adversarial import (
    AdversarialMiner,
    CaptureError,
    InputError,
    Plan,
    PlanError,
    PluginError,
    ReplayError,
    hookimpl,
)

PGD = partial(torchattacks.PGD, eps=0.1, alpha=0.05, steps=4)
MINERS = {
    "batch hard": miners.BatchHardMiner,
    "multi-similarity": miners.MultiSimilarityMiner,
    "triplet margin": partial(miners.TripletMarginMiner, margin=0.5),
    "pair margin": miners.PairMarginMiner,
    "angular": miners.AngularMiner,
}
every_miner = pytest.mark.parametrize("make", MINERS.values(), ids=MINERS)


class Spy:
    @hookimpl
    def pml_adversarial_record(self, batch, plan, adversarial):
        self.plan, self.adversarial = plan, adversarial


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@every_miner
def test_is_the_wrapped_miner_in_eval_mode(make, model, images, labels):
    embeddings = model(images)
    assert same(AdversarialMiner(make(), model).eval()(embeddings, labels), make()(embeddings, labels))


@every_miner
def test_is_the_wrapped_miner_at_eps_0(make, model, images, labels):
    miner = AdversarialMiner(make(), model, attack=partial(PGD, eps=0.0))
    embeddings = model(images)
    assert same(miner(embeddings, labels), make()(embeddings, labels))


@every_miner
@pytest.mark.parametrize("perturb", ["all", "positive"])
def test_mines_again_with_the_attacked_rows_in_their_places(make, perturb, model, images, labels):
    spy = Spy()
    miner = AdversarialMiner(make(), model, attack=PGD, perturb=perturb, plugins=[spy])
    embeddings = model(images)
    found = miner(embeddings, labels)
    attacked = images.clone()
    attacked[spy.plan.rows] = spy.adversarial.inputs
    with torch.no_grad():
        assert same(found, make()(model(attacked), labels))
    assert losses.ContrastiveLoss()(embeddings, labels, found).requires_grad


def test_hardest_negatives_of_the_attacked_batch_are_harder(model, images, labels):
    spy = Spy()
    miner = AdversarialMiner(miners.BatchHardMiner(), model, attack=PGD, plugins=[spy])
    unit = normalize(model(images).detach())
    anchors, positives, negatives = miner(model(images), labels)
    assert miner.share_score_rose == 1
    attacked = normalize(spy.adversarial.embeddings)
    for a, p, n in zip(anchors.tolist(), positives.tolist(), negatives.tolist(), strict=True):
        assert labels[a] == labels[p]
        assert labels[a] != labels[n]
        wrong = [(attacked[a] - attacked[j]).norm() for j in range(8) if labels[j] != labels[a]]
        assert (attacked[a] - attacked[n]).norm() == min(wrong)
    assert not torch.equal(unit, attacked)


def test_with_a_reference(model, images, labels):
    miner = AdversarialMiner(miners.BatchHardMiner(), model, attack=PGD)
    queries, reference = model(images), model(images.flip(3))
    anchors, positives, negatives = miner(queries, labels, reference, labels.clone())
    assert miner.num_perturbed > 8
    assert int(anchors.max()) < 8
    assert int(max(positives.max(), negatives.max())) < 8


def test_leaves_modes_buffers_and_random_numbers(moody_model, images, labels):
    miner = AdversarialMiner(miners.BatchHardMiner(), moody_model, attack=PGD)
    embeddings = moody_model(images)
    statistics = {name: buffer.clone() for name, buffer in moody_model.named_buffers()}
    assert statistics.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    generator = torch.get_rng_state()
    miner(embeddings, labels)
    assert miner.num_perturbed == len(images)
    assert all(module.training for module in moody_model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in moody_model.parameters())
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in moody_model.named_buffers())
    assert torch.equal(torch.get_rng_state(), generator)


def test_without_tuples_nobody_is_perturbed(model, images):
    miner = AdversarialMiner(miners.BatchHardMiner(), model)
    found = miner(model(images), torch.zeros(8, dtype=torch.long))
    assert [len(member) for member in found] == [0, 0, 0]
    assert miner.num_perturbed == 0


def test_states_and_copies(model, images, labels):
    miner = AdversarialMiner(miners.BatchHardMiner(), model, attack=PGD, warmup=4, seed=1)
    for _ in range(2):
        miner(model(images), labels)
    copied = copy.deepcopy(miner)
    loaded = AdversarialMiner(miners.BatchHardMiner(), model, attack=PGD, warmup=4, seed=2)
    loaded.load_state_dict(miner.state_dict())
    embeddings = model(images)
    expected = miner(embeddings, labels)
    assert same(copied(embeddings, labels), expected)
    assert same(loaded(embeddings, labels), expected)
    assert (miner.strength, loaded.strength) == (0.5, 0.5)


def told(model, **options):
    """A miner that is told pixels, of which a function of ours makes what the model takes."""
    embed = lambda pixels: normalize(model(4 * pixels - 1))  # noqa: E731
    return AdversarialMiner(miners.BatchHardMiner(), embed, attack=PGD, seed=1, **options), embed


def test_inputs_may_be_told(model, images, labels):
    spy = Spy()
    miner, embed = told(model, plugins=[spy])
    found = miner(embeddings := embed(images), labels, inputs=images)
    assert miner.num_perturbed == 8
    assert torch.equal(spy.adversarial.clean_inputs, images)  # pixels, and not what the model took
    with torch.no_grad():
        torch.testing.assert_close(spy.adversarial.embeddings, embed(spy.adversarial.inputs))
        assert same(found, miners.BatchHardMiner()(embed(spy.adversarial.inputs), labels))
    assert same(miner.eval()(embeddings, labels, inputs=images), miners.BatchHardMiner()(embeddings, labels))


def test_inputs_are_told_of_one_batch_alone(model, images, labels):
    miner, embed = told(model)
    miner(embed(images), labels, inputs=images)
    with pytest.raises(InputError, match="range from"):  # what the model took is found, and is no pixels
        miner(embed(images), labels)
    with pytest.raises(ValueError, match="must equal number of labels"):
        miner(embed(images), labels[:7], inputs=images)
    with pytest.raises(InputError, match="range from"):  # after a call that failed, too
        miner(embed(images), labels)


def test_inputs_are_not_held_after_the_call(model, labels):
    miner, embed = told(model)
    pixels = torch.rand(8, 1, 6, 6)
    embeddings, held = embed(pixels), weakref.ref(pixels)
    miner(embeddings, labels, inputs=pixels)
    assert held() is pixels
    del pixels, embeddings
    gc.collect()
    assert held() is None


def test_inputs_of_the_queries_beside_a_reference(model, images, labels):
    spy = Spy()
    miner, embed = told(model, plugins=[spy], perturb="anchor")
    reference, ref_labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    miner(embed(images), labels, reference, ref_labels, inputs=images)
    assert miner.num_perturbed == 8
    assert torch.equal(spy.adversarial.clean_inputs, images)


def test_other_inputs_than_those_of_the_embeddings_are_refused(model, images, labels):
    miner, embed = told(model)
    with pytest.raises(ReplayError, match="in the order of the embeddings"):
        miner(embed(images), labels, inputs=images.flip(0))
    with pytest.raises(InputError, match="one row for each of 8 embeddings"):
        miner(embed(images), labels, inputs=images[:7])
    with pytest.raises(InputError, match="inputs is a list"):
        miner(embed(images), labels, inputs=[images])
    with pytest.raises(CaptureError, match="not known what makes embeddings"):
        AdversarialMiner(miners.BatchHardMiner())(embed(images), labels, inputs=images)


def test_bad_input(model, images, labels):
    with pytest.raises(InputError, match="miner is the class BatchHardMiner; expected an object"):
        AdversarialMiner(miners.BatchHardMiner, model)
    with pytest.raises(InputError, match="miner is the loss ContrastiveLoss"):
        AdversarialMiner(losses.ContrastiveLoss(), model)
    with pytest.raises(InputError, match="miner is an AdversarialMiner already"):
        AdversarialMiner(AdversarialMiner(miners.BatchHardMiner(), model), model)
    with pytest.raises(PluginError, match="expected a list"):
        AdversarialMiner(miners.BatchHardMiner(), model, plugins="hm")
    with pytest.raises(CaptureError):
        AdversarialMiner(miners.BatchHardMiner(), model)(torch.randn(8, 4), labels)
    with pytest.raises(InputError, match="range from"):
        AdversarialMiner(miners.BatchHardMiner(), model)(model(images * 9), labels)


@pytest.mark.parametrize("with_reference", [False, True])
def test_refuses_plans_in_which_rows_are_not_in_their_places(with_reference, model, images, labels):
    class Planner:
        @hookimpl
        def pml_adversarial_plan(self):
            return self.plan

        @hookimpl
        def pml_adversarial_score(self):
            return lambda embeddings: embeddings.sum(1)

    planner, rows = Planner(), torch.arange(8)
    miner = AdversarialMiner(miners.BatchHardMiner(), model, attack=PGD, plugins=[planner])
    one = torch.tensor([3])
    reference = (model(images), labels.clone()) if with_reference else ()
    in_place = torch.cat([rows[:3], rows[:1] + (16 if with_reference else 8), rows[4:]])
    others = rows + 8 if with_reference else None
    planner.plan = Plan(one, in_place, None, others)
    miner(model(images), labels, *reference)
    elsewhere = in_place.flip(0)
    for layout, ref_pool_indices in ((in_place[:-1], others), (in_place[[*range(8), 0]], others), (elsewhere, others)):
        planner.plan = Plan(one, layout, None, ref_pool_indices)
        with pytest.raises(PlanError, match="expected a plan that replaces rows in place"):
            miner(model(images), labels, *reference)
    one_batch = torch.cat([in_place, others]) if with_reference else None  # the reference among the queries
    planner.plan = Plan(one, in_place, None, rows) if one_batch is None else Plan(one, one_batch, None)
    with pytest.raises(PlanError, match="expected a plan that replaces rows in place"):
        miner(model(images), labels, *reference)


def test_a_reference_that_is_the_batch_with_labels_of_its_own_is_that_of_the_wrapped_miner(model, images, labels):
    miner = miners.PairMarginMiner(pos_margin=-1.0, neg_margin=10.0)
    adversarial = AdversarialMiner(miner, model, eps=1e-6, steps=1, warmup=0)
    embeddings = model(images)
    expected = miner(embeddings, labels, embeddings, labels.clone())
    found = adversarial(embeddings, labels, embeddings, labels.clone())
    assert [len(members) for members in found] == [len(members) for members in expected]
    assert len(expected[0]) == 16  # a row is a partner of itself
