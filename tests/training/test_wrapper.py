"""How the wrappers stand in for what they wrap: attributes, states, and what they show of themselves."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning import losses, miners
from saved_losses import KINDS, WithLoss, same
from seed_paper import seed_paper_loss
from torch import nn

from pml_adversarial import AdversarialLoss, AdversarialMiner, CaptureError, InputError

PGD = partial(torchattacks.PGD, eps=0.05, alpha=0.02, steps=3)


class TestAccess:
    def test_attributes_and_methods_of_the_wrapped_loss(self, model, images):
        wrapped = losses.ArcFaceLoss(4, 4, margin=20)
        loss_func = AdversarialLoss(wrapped, model)
        assert loss_func.W is wrapped.W
        assert loss_func.margin == wrapped.margin
        assert loss_func.distance is wrapped.distance
        embeddings = model(images)
        assert torch.equal(loss_func.get_logits(embeddings), wrapped.get_logits(embeddings))
        assert AdversarialLoss(losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 9), model).memory_size == 9

    def test_of_the_wrapped_miner(self, model):
        miner = AdversarialMiner(miners.MultiSimilarityMiner(epsilon=0.3), model)
        assert miner.epsilon == 0.3
        assert not hasattr(miner, "epsilons")

    def test_own_ones_come_first(self, model):
        memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 9)
        loss_func = AdversarialLoss(memory, model)
        assert loss_func.loss is memory
        assert loss_func.training
        assert loss_func.forward.__self__ is loss_func

    def test_what_neither_has(self, model):
        loss_func = AdversarialLoss(losses.ArcFaceLoss(4, 4), model)
        with pytest.raises(AttributeError, match=r"neither AdversarialLoss nor the wrapped ArcFaceLoss .* 'get_logit'"):
            loss_func.get_logit  # noqa: B018
        assert not hasattr(loss_func, "_anything")
        loss_func.loss._private = 3
        assert not hasattr(loss_func, "_private")
        assert getattr(loss_func, "efficient", None) is None

    def test_setting_one_of_the_wrapped_loss_reaches_it(self, model):
        loss_func = AdversarialLoss(losses.TripletMarginLoss(margin=0.1), model)
        loss_func.loss.margin = 0.3
        assert loss_func.margin == 0.3
        loss_func.margin = 0.5
        assert loss_func.loss.margin == 0.5
        assert "margin" not in vars(loss_func)

    def test_setting_any_other_is_the_wrappers(self, model):
        loss_func = AdversarialLoss(losses.TripletMarginLoss(margin=0.1), model)
        loss_func.note = "mine"
        assert not hasattr(loss_func.loss, "note")
        loss_func.training = False
        assert loss_func.loss.training
        loss_func.loss = other = losses.ContrastiveLoss()
        assert loss_func.loss is other

    @pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda whole: pickle.loads(pickle.dumps(whole))])
    def test_copies_have_them_too(self, copied, model):
        loss_func = AdversarialLoss(losses.ArcFaceLoss(4, 4), model)
        assert torch.equal(copied(loss_func).W, loss_func.W)
        assert copied(AdversarialMiner(miners.MultiSimilarityMiner(epsilon=0.3), model)).epsilon == 0.3

    def test_before_it_is_made(self):
        with pytest.raises(AttributeError):
            AdversarialLoss.__new__(AdversarialLoss).W  # noqa: B018


class TestWatch:
    @pytest.mark.parametrize("wrap", [AdversarialLoss, AdversarialMiner])
    def test_another_model_takes_the_place_of_the_first(self, wrap, model, images, labels):
        wrapped = losses.TripletMarginLoss() if wrap is AdversarialLoss else miners.BatchHardMiner()
        wrapper, other = wrap(wrapped, model), copy.deepcopy(model)
        other_than_watched = "not made of what it returned|the model that was named did not"
        wrapper(model(images), labels)
        with pytest.raises(CaptureError, match=other_than_watched):
            wrapper(other(images), labels)
        wrapper.watch(other)
        wrapper(other(images), labels)
        assert wrapper.records.num_perturbed == 8
        with pytest.raises(CaptureError, match=other_than_watched):
            wrapper(model(images), labels)


class TestStates:
    def test_state_dict_goes_on_where_it_was(self, model, images, labels, tmp_path):
        def make():
            return seed_paper_loss(losses.ProxyAnchorLoss(4, 4), model, attack=PGD, warmup=4, seed=5)

        torch.manual_seed(0)
        first = make()
        for _ in range(3):
            first(model(images), labels)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = make()
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        embeddings = model(images)
        assert torch.equal(first(embeddings, labels), second(embeddings, labels))
        assert (first.strength, second.strength) == (0.75, 0.75)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 64),  # filled to 24 rows of 64,
            lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 16),  # filled and begun anew
            lambda: losses.MultipleLosses([losses.CrossBatchMemory(losses.TripletMarginLoss(), 4, 20)]),
        ],
    )
    def test_what_losses_remember_outside_of_their_buffers(self, make, model, labels, tmp_path):
        first, second = (seed_paper_loss(make(), model, attack=PGD, seed=5) for _ in range(2))
        batches = torch.rand(5, 8, 1, 6, 6)
        for images in batches[:3]:
            first(model(images), labels)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for images in batches[3:]:
            embeddings = model(images)
            assert torch.equal(first(embeddings, labels), second(embeddings, labels))

    def test_a_state_that_cannot_be_read_is_said_and_changes_nothing(self, model, images, labels, caplog):
        loss_func = AdversarialLoss(losses.ProxyAnchorLoss(4, 4), model, seed=5)
        loss_func(model(images), labels)
        before = loss_func.state_dict()
        broken = {**before, "_extra_state": before["_extra_state"] // 2}
        loss_func.load_state_dict(broken)
        (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert "of AdversarialLoss cannot be read, and stay what they are" in said
        assert (loss_func.adversary.step, loss_func.adversary.seed) == (1, 5)
        assert same(dict(loss_func.state_dict()), dict(before))


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


class TestPlainState:
    @pytest.mark.parametrize("prefix", ["", "parts.loss."])
    def test_of_the_plain_loss_is_loaded(self, prefix, make, model):
        plain, other = make(), make()
        for value in plain.state_dict().values():
            value.add_(1)
        wrapped = AdversarialLoss(other, model, seed=5)
        holder = nn.ModuleDict({"parts": nn.ModuleDict({"loss": wrapped})}) if prefix else wrapped
        holder.load_state_dict({prefix + name: value for name, value in plain.state_dict().items()}, strict=True)
        assert same(dict(plain.state_dict()), dict(other.state_dict()))
        assert (wrapped.adversary.step, wrapped.adversary.seed) == (0, 5)

    def test_of_the_wrapped_loss_is_that_of_the_plain_one(self, make, images, labels):
        plain, trained = make(), WithLoss(make())
        trained.step(images, labels)
        plain.load_state_dict(trained.loss.loss.state_dict(), strict=True)
        assert same(dict(plain.state_dict()), dict(trained.loss.loss.state_dict()))

    def test_of_another_loss_is_refused(self, model):
        wrapped = AdversarialLoss(losses.ArcFaceLoss(4, 4), model)
        with pytest.raises(RuntimeError, match=r"loss\.proxies"):
            wrapped.load_state_dict(losses.ProxyAnchorLoss(4, 4).state_dict())
        with pytest.raises(RuntimeError, match=r"loss\.W"):
            wrapped.load_state_dict({})

    def test_of_a_plain_miner_is_loaded(self, model):
        AdversarialMiner(miners.BatchHardMiner(), model).load_state_dict(miners.BatchHardMiner().state_dict())

    def test_without_the_steps_is_refused_unless_asked_for(self, model):
        wrapped = AdversarialLoss(losses.ArcFaceLoss(4, 4), model)
        state = {"loss.W": torch.ones(4, 4)}
        with pytest.raises(RuntimeError, match="_extra_state"):
            wrapped.load_state_dict(state)
        wrapped.load_state_dict(state, strict=False)
        assert torch.equal(wrapped.W, torch.ones(4, 4))

    def test_of_version_0_1_is_refused_with_the_way_out(self, model):
        wrapped = AdversarialLoss(losses.ArcFaceLoss(4, 4), model)
        old = {"loss.W": torch.ones(4, 4), "_extra_state": {"step": 7, "seed": 1, "strength": {}, "plugins": {}}}
        with pytest.raises(InputError, match=r"Version 0.1 .* remove the entries that end in _extra_state"):
            wrapped.load_state_dict(old)
        rest = {name: value for name, value in old.items() if not name.endswith("_extra_state")}
        wrapped.load_state_dict(rest, strict=False)
        assert torch.equal(wrapped.W, torch.ones(4, 4))
