"""What users may wrap and ask for; what is refused, and that the cure which the message tells works."""

import re

import pytest
import torchattacks
from one_step import Spy
from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pml_adversarial import AdversarialLoss, AdversarialMiner, FixedContext, InputError
from pml_adversarial.training.options import (
    check_loss,
    check_miner,
    check_processes,
    positional,
    shown,
    warmup_steps,
)


def message_of(error, call):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


class TestWarmupSteps:
    @pytest.mark.parametrize(
        ("warmup", "total_steps", "steps"),
        [
            (None, None, 7),  # the default
            (0, None, 0),
            (3, None, 3),
            (0.0, 10, 0),
            (0.5, 10, 5),
            (0.5, 11, 6),
            (1e-9, 10, 1),  # a share of none is the only one that takes no step
            (1.0, 10, 10),
        ],
    )
    def test_counts_whole_steps(self, warmup, total_steps, steps):
        found = warmup_steps(warmup, total_steps, default=7)
        assert found == steps
        assert type(found) is int


class TestWarmupAsAShare:
    @pytest.mark.parametrize(("share", "steps"), [(0.5, 5), (1.0, 10), (0.01, 1), (0.25, 3), (0.0, 0)])
    def test_grows_over_that_share(self, share, steps, model, images, labels):
        for make in (AdversarialLoss, AdversarialMiner):
            wrapped = losses.TripletMarginLoss() if make is AdversarialLoss else miners.BatchHardMiner()
            wrapper = make(wrapped, model, warmup=share, total_steps=10)
            found = []
            for _ in range(12):
                wrapper(model(images), labels)
                found.append(wrapper.records.strength)
            assert found == [min(1, step / steps) if steps else 1 for step in range(12)]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"warmup": 0.5}, r"warmup=0.5 is a share of all training steps.*Add total_steps"),
            ({"warmup": 1.5, "total_steps": 10}, r"warmup=1.5; expected"),
            ({"warmup": -0.5, "total_steps": 10}, r"warmup=-0.5; expected"),
            ({"warmup": float("nan"), "total_steps": 10}, r"warmup=nan; expected"),
            ({"warmup": True}, r"warmup=True; expected"),
            ({"warmup": "half"}, r"warmup='half'; expected"),
            ({"total_steps": 10}, r"total_steps=10 was given with warmup=None, and would change nothing"),
            ({"warmup": 5, "total_steps": 10}, r"total_steps=10 was given with warmup=5, and would change nothing"),
            ({"warmup": 0.5, "total_steps": 0}, r"total_steps=0; expected"),
            ({"warmup": 0.5, "total_steps": 10.0}, r"total_steps=10.0; expected"),
        ],
    )
    def test_that_cannot_be(self, options, message, model):
        with pytest.raises(InputError, match=message):
            AdversarialLoss(losses.TripletMarginLoss(), model, **options)
        with pytest.raises(InputError, match=message):
            AdversarialMiner(miners.BatchHardMiner(), model, **options)


class TestShown:
    def test_what_is_none_is_left_out(self):
        assert (
            shown({"eps": "8/255", "steps": None}, steps=3, guard=None, attack=False)
            == "eps=8/255, steps=3, attack=False"
        )

    def test_plugins_come_last_by_the_name_of_their_class(self):
        class Named:
            __name__ = "mine"

        assert shown({}, [Spy(), Spy, Named()], warmup="3 steps") == "warmup=3 steps, plugins=[Spy, Spy, mine]"
        assert shown({}) == shown({}, iter([])) == ""


class TestRepr:
    def test_shows_what_is_in_force(self, model):
        loss_func = AdversarialLoss(
            losses.TripletMarginLoss(), model, eps=4 / 255, plugins=["hm", Spy()], warmup=0.5, total_steps=100
        )
        first, second, *_ = (line.strip() for line in repr(loss_func).splitlines()[0:3])
        assert first == "AdversarialLoss("
        assert second == (
            "eps=4/255, steps=3, attack=PGD, perturb=all, keep_clean=True, warmup=50 steps, guard=True, "
            "plugins=[HM, Spy]"
        )
        assert "(loss): TripletMarginLoss(" in repr(loss_func)

    def test_of_a_miner(self, model):
        shown = repr(AdversarialMiner(miners.BatchHardMiner(), model, eps=0.1, perturb=("anchor", "positive")))
        assert "eps=0.1, steps=3, attack=PGD, perturb=anchor and positive, warmup=0 steps" in shown
        assert "(miner): BatchHardMiner(" in shown

    def test_of_a_method(self):
        assert repr(FixedContext(attack=torchattacks.FGSM, eps=2 / 255)) == (
            "FixedContext(eps=2/255, attack=FGSM, perturb=all, keep_clean=True)"
        )


def takes(*signature):
    """A module whose forward has these arguments."""
    scope = {}
    exec(f"def forward(self, {', '.join(signature)}): pass", scope)
    return type("Takes", (nn.Module,), {"forward": scope["forward"]})()


class TestPositional:
    @pytest.mark.parametrize(
        ("signature", "names"),
        [
            ((), []),
            (("x",), ["x"]),
            (("x", "/", "y=1"), ["x", "y"]),
            (("*rest",), ["*rest"]),
            (("x", "*", "y"), ["x"]),
            (("x", "*rest", "y=1", "**options"), ["x", "*rest"]),
        ],
        ids=str,
    )
    def test_names_what_may_be_given_by_position(self, signature, names):
        assert positional(takes(*signature)) == names

    @pytest.mark.parametrize(
        ("signature", "fits"),
        [(("x",), False), (("x", "y"), True), (("*rest",), True), (("x", "*", "y"), False), (("x", "y", "z"), True)],
        ids=str,
    )
    def test_a_loss_takes_two(self, signature, fits, model):
        if fits:
            check_loss(takes(*signature), model)
            check_miner(takes(*signature), model)
        else:
            with pytest.raises(InputError, match=r"object of Takes, whose forward takes \['x'\]; expected a loss with"):
                check_loss(takes(*signature), model)
            with pytest.raises(InputError, match="object of Takes; expected a tuple miner"):
                check_miner(takes(*signature), model)


class TestWhatFits:
    """What is not refused, with a model or without one."""

    @pytest.mark.parametrize(
        "make",
        [
            losses.TripletMarginLoss,
            lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), 4),
            lambda: losses.MultipleLosses([losses.ContrastiveLoss()]),
            lambda: losses.SelfSupervisedLoss(losses.NTXentLoss()),
            lambda: DistributedLossWrapper(losses.ContrastiveLoss()),
            lambda: takes("embeddings", "labels"),
        ],
    )
    def test_losses(self, make, model):
        for given in (None, model, {"trunk": model}):
            check_loss(make(), given)
        check_processes(make())

    @pytest.mark.parametrize(
        "make",
        [
            miners.BatchHardMiner,
            lambda: DistributedMinerWrapper(miners.BatchHardMiner()),
            lambda: lambda embeddings, labels: None,
        ],
    )
    def test_miners(self, make, model):
        for given in (None, model, {"trunk": model}):
            check_miner(make(), given)

    def test_a_loss_is_no_miner(self, model):
        message = message_of(InputError, lambda: check_miner(losses.ContrastiveLoss(), model))
        assert message == (
            "miner is the loss ContrastiveLoss; expected a tuple miner. Wrap a loss in AdversarialLoss(loss, model)."
        )

    @pytest.mark.parametrize("found", [None, "hard", 3], ids=str)
    def test_what_cannot_be_called_is_no_miner(self, found, model):
        with pytest.raises(InputError, match=f"object of {type(found).__name__}; expected a tuple miner"):
            check_miner(found, model)


class TestWrongArguments:
    """What is no metric loss is refused, and the cure that the message tells runs."""

    def train(self, loss_func, model, images, labels):
        loss_func(model(images), labels).backward()
        assert loss_func.records.num_perturbed == 8

    def follow(self, message, pattern, model):
        """Runs the code that a message tells, with the names of PML at hand."""
        code = re.search(pattern, message).group(0)
        return eval(code, {**vars(losses), **vars(miners), "AdversarialLoss": AdversarialLoss, "model": model})

    @pytest.mark.parametrize(
        ("criterion", "kind"),
        [
            (nn.CrossEntropyLoss(), "NormalizedSoftmaxLoss"),
            (nn.NLLLoss(), "NormalizedSoftmaxLoss"),
            (nn.TripletMarginLoss(), "TripletMarginLoss"),
            (nn.CosineEmbeddingLoss(), "ContrastiveLoss"),
            (nn.MSELoss(), "ContrastiveLoss"),
        ],
        ids=str,
    )
    def test_a_criterion_of_torch(self, criterion, kind, model, images, labels):
        message = message_of(InputError, lambda: AdversarialLoss(criterion, model))
        assert f"{type(criterion).__name__} of torch.nn is no metric loss" in message
        wide = nn.Sequential(*model, nn.Linear(4, 128))
        loss_func = self.follow(message, r"AdversarialLoss\(.*\), model\)", wide)
        assert type(loss_func.loss).__name__ == kind
        self.train(loss_func, wide, images, labels)

    def test_a_class(self, model, images, labels):
        message = message_of(InputError, lambda: AdversarialLoss(losses.ContrastiveLoss, model))
        assert "loss is the class ContrastiveLoss; expected an object" in message
        self.train(self.follow(message, r"AdversarialLoss\(.*\), model\)", model), model, images, labels)
        message = message_of(InputError, lambda: AdversarialLoss(losses.ArcFaceLoss, model))
        assert "AdversarialLoss(ArcFaceLoss(num_classes=..., embedding_size=...), model)" in message

    def test_the_wrong_order(self, model, images, labels):
        for wrapped in (losses.ContrastiveLoss(), losses.CrossBatchMemory(losses.ContrastiveLoss(), 4)):
            message = message_of(InputError, lambda wrapped=wrapped: AdversarialLoss(model, wrapped))
            name = type(wrapped).__name__
            assert (
                f"wrong order: loss is Sequential, model is {name}. Write AdversarialLoss({name}(...), model)"
                in message
            )
            self.train(AdversarialLoss(wrapped, model), model, images, labels)
        with pytest.raises(InputError, match=r"wrong order: miner is Sequential, .*AdversarialMiner\(BatchHardMiner"):
            AdversarialMiner(model, miners.BatchHardMiner())

    def test_a_miner(self, model, images, labels):
        miner = miners.BatchHardMiner()
        message = message_of(InputError, lambda: AdversarialLoss(miner, model))
        assert "loss is the miner BatchHardMiner" in message
        assert "loss_func(embeddings, labels, miner(embeddings, labels))" in message
        assert "AdversarialMiner(miner, model)" in message
        loss_func, miner = AdversarialLoss(losses.ContrastiveLoss(), model), AdversarialMiner(miner, model)
        embeddings = model(images)
        assert loss_func(embeddings, labels, miner(embeddings, labels)).isfinite()

    @pytest.mark.parametrize(
        "found", [None, "triplet", lambda embeddings, labels: embeddings.sum()], ids=["none", "a word", "a function"]
    )
    def test_what_is_no_module(self, found, model):
        with pytest.raises(InputError, match=r"expected a loss of pytorch-metric-learning, .* or a torch.nn.Module"):
            AdversarialLoss(found, model)

    def test_a_model_alone(self, model):
        with pytest.raises(InputError, match=r"object of Sequential, whose forward takes \['input'\]"):
            AdversarialLoss(model)
        with pytest.raises(InputError, match="object of Sequential; expected a tuple miner"):
            AdversarialMiner(model)

    @pytest.mark.parametrize("given", [losses.ContrastiveLoss(), miners.BatchHardMiner()], ids=str)
    def test_no_model(self, given):
        with pytest.raises(InputError, match=f"model is {type(given).__name__}; expected the module that turns images"):
            AdversarialLoss(losses.TripletMarginLoss(), given)
        with pytest.raises(InputError, match=f"model is {type(given).__name__}; expected the module that turns images"):
            AdversarialMiner(miners.BatchHardMiner(), given)
        with pytest.raises(InputError, match="model is the class Linear; expected an object"):
            AdversarialLoss(losses.TripletMarginLoss(), nn.Linear)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: losses.TripletMarginLoss(reducer=reducers.DoNothingReducer()),
            lambda: losses.CrossBatchMemory(losses.TripletMarginLoss(reducer=reducers.DoNothingReducer()), 4),
            lambda: losses.ContrastiveLoss(reducer=reducers.PerAnchorReducer(reducers.DoNothingReducer())),
            lambda: losses.MultipleLosses([losses.ContrastiveLoss(reducer=reducers.DoNothingReducer())]),
        ],
    )
    def test_a_reducer_that_returns_a_dict_is_refused_before_the_first_step(self, make, model):
        with pytest.raises(InputError, match=r"has a DoNothingReducer at .*reducer=MeanReducer\(\)"):
            AdversarialLoss(make(), model)


class TestSeveralProcesses:
    def test_efficient_wrappers(self, model):
        with pytest.raises(InputError, match=r"DistributedLossWrapper has efficient=True.*Use efficient=False"):
            AdversarialLoss(DistributedLossWrapper(losses.ContrastiveLoss(), efficient=True), model)
        with pytest.raises(InputError, match=r"DistributedMinerWrapper has efficient=True.*Use efficient=False"):
            AdversarialMiner(DistributedMinerWrapper(miners.BatchHardMiner(), efficient=True), model)

    def test_wrapper_inside_of_another_loss(self, model):
        inner = losses.MultipleLosses([DistributedLossWrapper(losses.ContrastiveLoss())])
        with pytest.raises(InputError, match=r"expected AdversarialLoss\(DistributedLossWrapper\(loss\), model\)"):
            AdversarialLoss(inner, model)

    @pytest.mark.usefixtures("single")
    @pytest.mark.parametrize("wrap", [lambda loss: loss, DistributedLossWrapper], ids=["loss", "wrapper"])
    def test_loss_in_ddp(self, wrap, model):
        with pytest.raises(InputError, match="put DistributedDataParallel around the AdversarialLoss"):
            AdversarialLoss(DistributedDataParallel(wrap(losses.ProxyAnchorLoss(4, 4))), model)
