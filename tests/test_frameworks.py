"""Loops that are not PML's: written by hand, of Lightning and of accelerate, and with compiled models."""

import copy
import gc
from functools import partial

import accelerate
import lightning
import pytest
import torch
import torch._dynamo
import torchattacks
from accelerate.state import AcceleratorState
from notes import Notes
from pytorch_metric_learning import distances, losses, miners
from seed_paper import seed_paper_loss
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from pml_adversarial import AdversarialMiner, CaptureError, hookimpl
from pml_adversarial.training import isolation
from pml_adversarial.training.capture import InputCapture
from pml_adversarial.training.pixels import PixelSpace

EPS = 0.1
COMPILES_BUFFERS_IN = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5)  # those of the first call
GIVEN_OR_FOUND = pytest.mark.parametrize("given", [True, False], ids=["given model", "found model"])


def pgd(eps=EPS):
    return partial(torchattacks.PGD, eps=eps, alpha=eps / 3, steps=5)


def wrapped(model=None, loss=None, **options):
    loss = losses.TripletMarginLoss(margin=0.5) if loss is None else loss
    return seed_paper_loss(loss, model, **{"attack": pgd(), "seed": 3, **options})


def gradients(*models):
    return [parameter.grad.clone() for model in models for parameter in model.parameters()]


def gradients_of(loss, *models):
    """The gradients of one loss alone."""
    parameters = [parameter for model in models for parameter in model.parameters()]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def check(loss_func, eps=EPS, rose=0.9):
    assert loss_func.num_perturbed > 0
    assert eps / 2 < loss_func.perturbation_linf <= eps + 1e-6
    assert loss_func.share_score_rose > rose
    assert loss_func.share_zero_gradient == 0


def assert_same(found, expected, **tolerance):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


class Spy:
    """Keeps what the last step did."""

    @hookimpl
    def pml_adversarial_record(self, batch, plan, adversarial):
        self.batch, self.plan, self.adversarial = batch, plan, adversarial


class Columns(nn.Module):
    """The model that returns a range of another one's columns."""

    def __init__(self, model, columns):
        super().__init__()
        self.model, self.columns = model, columns

    def forward(self, images):
        return self.model(images)[:, self.columns]


@pytest.fixture
def train_loader(images):
    """Four batches of eight."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.rand(4, *images.shape, generator=generator) * 0.1
    return DataLoader(TensorDataset((images + noise).flatten(0, 1), (torch.arange(8) // 2).repeat(4)), batch_size=8)


class TestRowsOfSeveralCalls:
    """The loss of concatenated embeddings is that of one batch."""

    @GIVEN_OR_FOUND
    @pytest.mark.parametrize("perturb", ["positive", "all"])
    def test_loss_and_gradients(self, model, images, labels, given, perturb):
        def loss_of(embed):
            loss_func = wrapped(model if given else None, perturb=perturb)
            loss = loss_func(embed(), labels)
            check(loss_func)
            return loss

        expected = loss_of(lambda: model(images))
        found = loss_of(lambda: torch.cat([model(images[:3]), model(images[3:])]))
        torch.testing.assert_close(found, expected)
        assert_same(gradients_of(found, model), gradients_of(expected, model), rtol=1e-4, atol=1e-6)

    def test_miner(self, model, images, labels):
        def mine(embed):
            miner = AdversarialMiner(miners.BatchHardMiner(), model, attack=pgd(0.3), seed=1)
            return miner(embed(), labels)

        expected = mine(lambda: model(images))
        found = mine(lambda: torch.cat([model(part) for part in images.split(2)]))
        assert all(mine.equal(theirs) for mine, theirs in zip(found, expected, strict=True))

    def test_copies_of_each_call_are_a_batch_of_their_own_to_batchnorm(self, moody_model, images, labels):
        batchnorm, seen = moody_model[1], Notes()
        batchnorm.register_forward_hook(lambda module, args, output: seen.append((module.training, len(args[0]))))
        loss_func = wrapped(moody_model, perturb="all")
        for tracked, checks in ((4, [3, 5]), (8, [])):
            loss_func(torch.cat([moody_model(images[:3]), moody_model(images[3:])]), labels)
            # as they came, in the first step again to be checked, and with the copies in their places
            assert [rows for training, rows in seen.taken() if training] == [3, 5, *checks, 3, 5]
            assert batchnorm.num_batches_tracked == tracked  # the check leaves no trace

    def test_sides_of_a_pair_as_queries_and_reference(self, model, images, labels):
        loss_func = wrapped(model, losses.ContrastiveLoss(), perturb=("anchor", "positive"))
        loss = loss_func(
            model(images), labels, ref_emb=torch.cat([model(images[:4]), model(images[4:])]), ref_labels=labels
        )
        check(loss_func)
        assert loss_func.num_perturbed > 8
        assert loss.isfinite()


class TestColumns:
    """The loss of columns is that of a model which returns these columns only.

    Two columns are on a circle, on which larger steps overshoot.
    """

    @GIVEN_OR_FOUND
    @pytest.mark.parametrize("columns", [slice(0, 2), slice(1, 4), slice(0, 4)], ids=str)
    @pytest.mark.parametrize("perturb", ["positive", "all"])
    def test_loss_and_gradients(self, model, images, labels, given, columns, perturb):
        narrow = Columns(model, columns)
        expected_func = wrapped(narrow, perturb=perturb, attack=pgd(0.02))
        expected = expected_func(narrow(images), labels)
        loss_func = wrapped(model if given else None, perturb=perturb, attack=pgd(0.02))
        found = loss_func(model(images)[:, columns], labels)
        check(loss_func, eps=0.02, rose=0.6)
        torch.testing.assert_close(found, expected)
        assert loss_func.embedding_shift == pytest.approx(expected_func.embedding_shift)
        assert_same(gradients_of(found, model), gradients_of(expected, model), rtol=1e-4, atol=1e-6)

    def test_of_a_model_that_depends_on_its_mode(self, moody_model, images, labels):
        moody_model[3].p = 0.0
        narrow = Columns(moody_model, slice(1, 3))
        before = copy.deepcopy(moody_model.state_dict())
        expected = wrapped(narrow)(narrow(images), labels)
        moody_model.load_state_dict(before)
        torch.testing.assert_close(wrapped(moody_model)(moody_model(images)[:, 1:3], labels), expected)

    def test_miner(self, model, images, labels):
        def mine(watched, embed):
            miner = AdversarialMiner(miners.BatchHardMiner(), watched, attack=pgd(0.3), seed=1)
            return miner(embed(), labels)

        narrow = Columns(model, slice(1, 3))
        expected = mine(narrow, lambda: narrow(images))
        found = mine(model, lambda: model(images)[:, 1:3])
        assert all(mine.equal(theirs) for mine, theirs in zip(found, expected, strict=True))

    @pytest.mark.parametrize("perturb", ["positive", "anchor", "all"])
    def test_of_the_reference_are_those_of_the_queries(self, model, images, labels, perturb):
        def loss_of(watched, embed):
            loss_func = wrapped(watched, losses.ContrastiveLoss(), perturb=perturb, attack=pgd(0.02))
            reference = embed(images.flip(0))
            loss = loss_func(embed(images), labels, ref_emb=reference, ref_labels=labels.flip(0))
            check(loss_func, eps=0.02, rose=0.6)
            return loss

        narrow = Columns(model, slice(1, 3))
        torch.testing.assert_close(loss_of(model, lambda x: model(x)[:, 1:3]), loss_of(narrow, narrow))

    def test_other_columns_as_the_reference_are_held_fixed(self, model, images, labels):
        def loss_of(fix):
            loss_func = wrapped(model, losses.ContrastiveLoss(), perturb="anchor", attack=pgd(0.02))
            embeddings = model(images)
            loss = loss_func(embeddings[:, :2], labels, ref_emb=fix(embeddings[:, 2:]), ref_labels=labels)
            check(loss_func, eps=0.02, rose=0.6)
            return loss

        torch.testing.assert_close(loss_of(lambda reference: reference), loss_of(torch.clone))

    @GIVEN_OR_FOUND
    @pytest.mark.parametrize("perturb", ["positive", "anchor"])
    def test_other_columns_as_the_reference_are_perturbed_as_the_other_columns(
        self, model, images, labels, given, perturb
    ):
        def loss_of(loss_func, queries, reference):
            return loss_func(queries, labels, ref_emb=reference, ref_labels=labels.clone())

        own, other, spy = Columns(model, slice(0, 2)), Columns(model, slice(2, 4)), Spy()
        options = {"loss": losses.ContrastiveLoss(), "perturb": perturb, "attack": pgd(0.02)}
        expected = loss_of(wrapped(**options), own(images), other(images.clone()))
        loss_func = wrapped(model if given else None, **options, plugins=[spy])
        found = loss_of(loss_func, *model(images).split(2, 1))
        check(loss_func, eps=0.02, rose=0.6)
        torch.testing.assert_close(found, expected)
        assert_same(gradients_of(found, model), gradients_of(expected, model), rtol=1e-4, atol=1e-6)
        whole, in_reference = model(spy.adversarial.inputs), spy.plan.rows[:, None] >= 8
        torch.testing.assert_close(spy.adversarial.embeddings, torch.where(in_reference, whole[:, 2:], whole[:, :2]))

    def test_of_one_model_to_each_loss_its_own(self, model, images, labels):
        ranges = slice(0, 2), slice(2, 4)
        loss_funcs = [wrapped(seed=columns.start, attack=pgd(0.02)) for columns in ranges]
        embeddings = model(images)
        found = [
            loss_func(embeddings[:, columns], labels) for loss_func, columns in zip(loss_funcs, ranges, strict=True)
        ]
        for loss, loss_func, columns in zip(found, loss_funcs, ranges, strict=True):
            narrow = Columns(model, columns)
            check(loss_func, eps=0.02, rose=0.6)
            torch.testing.assert_close(
                loss, wrapped(narrow, seed=columns.start, attack=pgd(0.02))(narrow(images), labels)
            )


class TestMixedPrecision:
    """In bfloat16, similarities of close embeddings are one number; the attack has to tell them apart."""

    @pytest.mark.parametrize("cast", [True, False], ids=["autocast", "model in bfloat16"])
    def test_attack_works_on_close_embeddings(self, model, images, labels, cast):
        with torch.no_grad():
            model[3].bias += torch.tensor([4.0, 0, 0, 0])
        model = model if cast else model.bfloat16()
        loss_func = wrapped(model, losses.TripletMarginLoss(distance=distances.CosineSimilarity()))
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            embeddings = model(images if cast else images.bfloat16())
            similarities = nn.functional.normalize(embeddings) @ nn.functional.normalize(embeddings).T
            assert len(similarities.unique()) < 5
            loss_func(embeddings, labels)
        assert embeddings.dtype == torch.bfloat16
        assert loss_func.share_score_rose == 1


class TestGradientAccumulation:
    @pytest.mark.parametrize("clean_weight", [0.0, 0.5])
    def test_is_the_sum_of_the_losses_gradients(self, model, train_loader, clean_weight):
        loss_func = wrapped(model, clean_weight=clean_weight)
        for images, labels in train_loader:
            loss_func(model(images), labels).backward()
        accumulated = gradients(model)
        loss_func = wrapped(model, clean_weight=clean_weight)
        alone = [gradients_of(loss_func(model(images), labels), model) for images, labels in train_loader]
        assert_same(accumulated, [sum(parts) for parts in zip(*alone, strict=True)], rtol=1e-5, atol=1e-7)

    def test_of_losses_that_are_walked_back_at_once(self, model, train_loader):
        loss_func = wrapped(model)
        one, other = ([gradients_of(loss_func(model(x), y), model) for x, y in train_loader] for _ in range(2))
        assert not any(a.equal(b) for a, b in zip(one[0], other[0], strict=True))  # other noise in later steps
        loss_func = wrapped(model)
        sum(loss_func(model(images), labels) for images, labels in train_loader).backward()
        assert_same(gradients(model), [sum(parts) for parts in zip(*one, strict=True)], rtol=1e-5, atol=1e-7)

    def test_a_miner_leaves_what_was_accumulated(self, model, images, labels):
        model(images).sum().backward()
        before = [parameter.grad for parameter in model.parameters()]
        values = gradients(model)
        AdversarialMiner(miners.BatchHardMiner(), model)(model(images), labels)
        assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), before, strict=True))
        assert_same(gradients(model), values, rtol=0, atol=0)


class TestSeveralLosses:
    KINDS = (
        {"loss": losses.TripletMarginLoss(margin=0.5), "perturb": "positive"},
        {
            "loss": losses.MultiSimilarityLoss(),
            "perturb": "all",
            "attack": partial(torchattacks.FGSM, eps=EPS),
            "seed": 8,
        },
        {
            "loss": losses.ContrastiveLoss(),
            "perturb": "negative",
            "attack": partial(torchattacks.PGDL2, eps=0.5, alpha=0.2),
        },
    )
    WEIGHTS = (1.0, 0.5, 2.0)

    @GIVEN_OR_FOUND
    def test_on_the_same_embeddings(self, model, images, labels, given):
        expected = [wrapped(model, **kind)(model(images), labels) for kind in self.KINDS]
        loss_funcs = [wrapped(model if given else None, **kind) for kind in self.KINDS]
        embeddings = model(images)
        total = sum(w * loss_func(embeddings, labels) for w, loss_func in zip(self.WEIGHTS, loss_funcs, strict=True))
        assert all(loss_func.num_perturbed == 8 for loss_func in loss_funcs)
        assert [loss_func.share_score_rose > 0.7 for loss_func in loss_funcs] == [True] * 3
        total.backward()
        alone = [[w * g for g in gradients_of(x, model)] for w, x in zip(self.WEIGHTS, expected, strict=True)]
        assert_same(gradients(model), [sum(parts) for parts in zip(*alone, strict=True)], rtol=1e-5, atol=1e-6)

    def test_walked_back_one_after_the_other(self, model, images, labels):
        loss_funcs = [wrapped(model, **kind) for kind in self.KINDS]
        embeddings = model(images)
        for loss_func in loss_funcs:
            loss_func(embeddings, labels).backward(retain_graph=True)
        expected = [gradients_of(wrapped(model, **kind)(model(images), labels), model) for kind in self.KINDS]
        assert_same(gradients(model), [sum(parts) for parts in zip(*expected, strict=True)], rtol=1e-5, atol=1e-6)

    @GIVEN_OR_FOUND
    def test_one_per_head(self, images, labels, given):
        trunk, heads = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh()), (nn.Linear(8, 4), nn.Linear(8, 3))
        spies = Spy(), Spy()
        loss_funcs = [
            wrapped([trunk, head] if given else None, plugins=[spy], **kind)
            for head, kind, spy in zip(heads, self.KINDS[:2], spies, strict=True)
        ]
        features = trunk(images)
        total = sum(loss_func(head(features), labels) for head, loss_func in zip(heads, loss_funcs, strict=True))
        for head, loss_func, spy in zip(heads, loss_funcs, spies, strict=True):
            check(loss_func)
            assert spy.batch.replay.modules == (trunk, head)
        total.backward()
        whole = [nn.Sequential(trunk, head) for head in heads]
        alone = [
            gradients_of(wrapped(model, **kind)(model(images), labels), trunk, *heads)
            for model, kind in zip(whole, self.KINDS[:2], strict=True)
        ]
        assert_same(gradients(trunk, *heads), [a + b for a, b in zip(*alone, strict=True)], rtol=1e-5, atol=1e-6)


class Metric(lightning.LightningModule):
    """A LightningModule as one writes it, with the wrapped loss among its modules."""

    def __init__(self, model, given=True, by_forward=False, **options):
        super().__init__()
        self.model, self.by_forward = model, by_forward
        self.loss_func = wrapped(model if given else None, losses.ProxyAnchorLoss(4, 4), **options)
        self.miner = AdversarialMiner(miners.MultiSimilarityMiner(1.0), model if given else None, attack=pgd(), seed=1)
        self.steps, self.validated = [], []

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        embeddings = self(images) if self.by_forward else self.model(images)
        loss = self.loss_func(embeddings, labels, self.miner(embeddings, labels))
        check(self.loss_func)
        check(self.miner)
        self.steps.append((loss.detach(), embeddings.dtype, self.loss_func.strength))
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        embeddings = self.model(images)
        self.validated.append((self.loss_func(embeddings, labels), self.loss_func.loss(embeddings, labels)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, loader, folder, epochs=1, ckpt_path=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer


def by_hand(module, loader, accumulate=1, epochs=1):
    """What Lightning's trainer does, as a plain loop."""
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for i, batch in enumerate(loader):
            (module.training_step(batch, i) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return list(module.parameters())


class TestLightning:
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("by_forward", [False, True])
    @GIVEN_OR_FOUND
    def test_trains_as_a_plain_loop(self, model, train_loader, tmp_path, given, by_forward, accumulate):
        expected = Metric(copy.deepcopy(model))
        module = Metric(model, given, by_forward)
        module.load_state_dict(expected.state_dict())
        before = [parameter.clone() for parameter in module.parameters()]
        fit(module, train_loader, tmp_path, accumulate_grad_batches=accumulate)
        assert len(module.steps) == 4
        assert not any(p.equal(b) for p, b in zip(module.parameters(), before, strict=True))
        assert_same(list(module.parameters()), by_hand(expected, train_loader, accumulate), rtol=0, atol=1e-6)
        assert list(tmp_path.iterdir()) == []

    def test_validates_with_the_wrapped_loss(self, model, train_loader, tmp_path):
        module = Metric(model)
        fit(module, train_loader, tmp_path)
        assert len(module.validated) >= 4
        assert all(found.equal(expected) for found, expected in module.validated)
        assert module.loss_func.adversary.step == 4  # training steps alone count
        assert module.loss_func.training

    def test_in_mixed_precision(self, model, train_loader, tmp_path):
        module = Metric(model)
        before = [parameter.clone() for parameter in module.parameters()]
        fit(module, train_loader, tmp_path, precision="bf16-mixed")
        assert [(bool(loss.isfinite()), dtype) for loss, dtype, _ in module.steps] == [(True, torch.bfloat16)] * 4
        assert not any(p.equal(b) for p, b in zip(module.parameters(), before, strict=True))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())

    @GIVEN_OR_FOUND
    def test_goes_on_from_its_checkpoint(self, model, train_loader, tmp_path, given):
        unbroken = Metric(copy.deepcopy(model), given, warmup=40)
        unbroken.loss_func.adversary.step = 30
        module, resumed = (Metric(copy.deepcopy(model), given, warmup=40) for _ in range(2))
        module.load_state_dict(unbroken.state_dict())
        fit(unbroken, train_loader, tmp_path, epochs=2)
        fit(module, train_loader, tmp_path).save_checkpoint(tmp_path / "last.ckpt")
        fit(resumed, train_loader, tmp_path, epochs=2, ckpt_path=tmp_path / "last.ckpt")
        assert resumed.loss_func.adversary.step == unbroken.loss_func.adversary.step == 38
        assert [strength for _, _, strength in resumed.steps] == [(34 + i) / 40 for i in range(4)]
        assert_same(list(resumed.parameters()), list(unbroken.parameters()), rtol=0, atol=0)


@pytest.fixture
def accelerator(request):
    AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the process, and keeps its precision
    yield accelerate.Accelerator(cpu=True, **getattr(request, "param", {}))
    AcceleratorState._reset_state(reset_partial_state=True)


class TestAccelerate:
    @pytest.mark.parametrize(
        "accelerator", [{}, {"gradient_accumulation_steps": 2}], indirect=True, ids=["each step", "accumulated"]
    )
    @pytest.mark.parametrize("named", ["before", "after", "never"])
    def test_trains_as_a_plain_loop(self, model, train_loader, accelerator, named):
        expected = Metric(copy.deepcopy(model))
        accumulate = accelerator.gradient_accumulation_steps
        watched = model if named == "before" else None
        prepared, loader = accelerator.prepare(model, train_loader)
        loss_func, miner = Metric(model).loss_func, expected.miner
        loss_func = wrapped(prepared if named == "after" else watched, losses.ProxyAnchorLoss(4, 4))
        loss_func.load_state_dict(expected.loss_func.state_dict())
        miner = AdversarialMiner(miners.MultiSimilarityMiner(1.0), watched, attack=pgd(), seed=1)
        loss_func = accelerator.prepare(loss_func)
        parameters = [*prepared.parameters(), *loss_func.parameters()]
        optimizer = accelerator.prepare(torch.optim.SGD(parameters, lr=0.1))
        for images, labels in loader:
            with accelerator.accumulate(prepared):
                embeddings = prepared(images)
                loss = loss_func(embeddings, labels, miner(embeddings, labels))
                check(loss_func)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        assert_same(parameters, by_hand(expected, train_loader, accumulate), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("accelerator", [{"mixed_precision": "bf16"}], indirect=True)
    @GIVEN_OR_FOUND
    def test_in_mixed_precision(self, model, train_loader, accelerator, given):
        inner = Notes()
        model[1].register_forward_hook(lambda module, args, output: inner.append(output.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, train_loader)
        loss_func = wrapped(prepared if given else None)
        before = [parameter.clone() for parameter in model.parameters()]
        for images, labels in loader:
            embeddings = prepared(images)
            with accelerator.autocast():
                loss = loss_func(embeddings, labels)
            check(loss_func)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            assert loss.isfinite()
        assert embeddings.dtype == torch.float32  # accelerate casts what the model returns
        assert set(inner) == {torch.bfloat16}  # in the attack and when copies are embedded, too
        assert not any(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.fixture
def _fresh_compiler():
    gc.collect()  # captures that still search have hooks on every module
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def convolutional():
    torch.manual_seed(0)
    normalise = nn.Identity() if COMPILES_BUFFERS_IN else nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(1, 4, 3), normalise, nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def steps(model, watched, parameters, seed=4):
    """Endless training steps on batches of changing labels, so that the number of copies changes."""
    loss_func = wrapped(watched)
    miner = AdversarialMiner(miners.BatchHardMiner(), watched, attack=pgd(), seed=1)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        images = torch.rand(8, 1, 6, 6, generator=generator)
        labels = torch.randint(0, 4, (8,), generator=generator)
        embeddings = model(images)
        loss = loss_func(embeddings, labels, miner(embeddings, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss_func.num_perturbed


GLOBAL_HOOKS = pytest.mark.filterwarnings(
    "ignore:Using `torch.compile.module.` when there are global hooks:UserWarning"
)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.slow
class TestCompiled:
    @pytest.fixture
    def expected(self):
        model = convolutional()
        training = steps(model, model, model.parameters())
        counts = [next(training) for _ in range(8)]
        assert len(set(counts)) > 1
        return model.state_dict()

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("watched", ["compiled", "inner", pytest.param("found", marks=GLOBAL_HOOKS)])
    def test_trains_as_it_does_uncompiled(self, expected, backend, watched):
        model = convolutional()
        compiled = torch.compile(model, backend=backend)
        training = steps(compiled, {"compiled": compiled, "inner": model, "found": None}[watched], model.parameters())
        for _ in range(8):
            next(training)
        assert counters["stats"]["unique_graphs"] > 0 or watched == "inner"  # not with torch 2.4
        assert_same(list(model.state_dict().values()), list(expected.values()), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("fullgraph", [True, False])
    def test_compilation_comes_to_an_end(self, fullgraph):
        model = convolutional()
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        training = steps(compiled, compiled, model.parameters())
        for _ in range(6):
            next(training)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs < torch._dynamo.config.cache_size_limit  # else the rest would run uncompiled
        with torch._dynamo.config.patch(error_on_recompile=True):
            counts = {next(training) for _ in range(10)}
        assert len(counts) > 1
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]

    def test_part_of_a_model(self, expected):
        model = convolutional()
        outer = nn.Sequential(torch.compile(model, backend="eager"))
        training = steps(outer, outer, model.parameters())
        for _ in range(8):
            next(training)
        assert_same(list(model.state_dict().values()), list(expected.values()), rtol=1e-5, atol=1e-6)

    def test_in_place(self, expected):
        model = convolutional()
        model.compile(backend="eager")
        training = steps(model, model, model.parameters())
        for _ in range(8):
            next(training)
        assert counters["stats"]["unique_graphs"] > 0
        assert_same(list(model.state_dict().values()), list(expected.values()), rtol=1e-5, atol=1e-6)

    def test_in_place_it_has_to_be_named(self, model, images):
        model.compile(backend="eager")
        watching = InputCapture()
        with pytest.raises(CaptureError, match=r"model\.compile\(\).*name it"):
            watching.replay(PixelSpace(), model(images))

    @pytest.mark.parametrize("outer", [lambda m: m, nn.Sequential], ids=["model", "part of it"])
    def test_buffers_that_are_compiled_in_are_refused(self, monkeypatch, model, moody_model, outer):
        monkeypatch.setattr(isolation, "_COMPILES_BUFFERS_IN", True)
        InputCapture(outer(torch.compile(model, backend="eager")))
        InputCapture(moody_model)
        with pytest.raises(CaptureError, match=r"torch .* compiles the buffers .*2\.5"):
            InputCapture(outer(torch.compile(moody_model, backend="eager")))

    @GLOBAL_HOOKS
    def test_search_does_not_cut_it_to_pieces(self, model, images):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        watching = InputCapture()
        embeddings = compiled(images)
        assert counters["stats"]["unique_graphs"] == 1
        replay = watching.replay(PixelSpace(), embeddings)
        assert replay.inputs.equal(images)
        assert replay.modules == (compiled,)
        # in the check: without gradient, with weights as they are and frozen; then with gradient of the inputs
        assert counters["stats"]["unique_graphs"] == 4
        assert not counters["graph_break"]

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch hides it from users
    def test_rows_and_columns(self, model, images):
        compiled = torch.compile(model, backend="aot_eager")
        watching = InputCapture(compiled)
        rows = watching.replay(PixelSpace(), torch.cat([compiled(images[:4]), compiled(images[4:])]))
        assert rows.inputs.equal(images)
        columns = watching.replay(PixelSpace(), compiled(images)[:, 1:3])
        assert columns.inputs.equal(images)
        for replay, expected in ((rows, model), (columns, Columns(model, slice(1, 3)))):
            torch.testing.assert_close(replay.embed(images.flip(0)), expected(images.flip(0)))
