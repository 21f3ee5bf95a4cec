"""The trainers and samplers of pytorch-metric-learning, unmodified, with wrapped losses and miners."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torchattacks
from pytorch_metric_learning import losses, miners, samplers, trainers
from seed_paper import seed_paper_loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pml_adversarial import AdversarialMiner, CaptureError
from pml_adversarial.training.records import OF_LOSSES, STANDARD

CLASSES, WIDTH, EPS = 4, 6, 0.1
GIVEN_OR_FOUND = pytest.mark.parametrize("given", [True, False], ids=["given models", "found models"])


def pgd(eps):
    return partial(torchattacks.PGD, eps=eps, alpha=eps / 3, steps=5)


def parts_of(*classifiers, **more):
    embedder = nn.Linear(12, WIDTH)
    heads = {f"classifier{name}": nn.Linear(width, CLASSES) for name, width in classifiers}
    return {"trunk": nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh()), "embedder": embedder, **heads, **more}


def images_and_labels(streams=1):
    """Images whose classes can be told apart, with labels in turn."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(24) % CLASSES
    means = torch.rand(CLASSES, 1, 6, 6, generator=generator)
    noise = torch.rand(streams, 24, 1, 6, 6, generator=generator)
    return *(0.1 + 0.4 * (means[labels] + noise)), labels


class Run:
    """A trainer's few iterations, and what was to be seen in each of them."""

    epochs, iterations = 1, 4
    wrapped_losses, streams = ("metric_loss",), 1

    def __init__(self, wrap_loss=lambda loss, models: loss, wrap_miner=lambda miner, models: miner):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  PML's samplers draw from it
        self.models = self.make_models()
        self.before = self.parameters()
        loss_funcs = {
            name: wrap_loss(loss, self.models) if name in self.wrapped_losses else loss
            for name, loss in self.make_losses().items()
        }
        mining_funcs = {
            name: miner if isinstance(miner, miners.HDCMiner) else wrap_miner(miner, self.models)
            for name, miner in self.make_miners().items()
        }
        self.wrappers = [w for w in (*loss_funcs.values(), *mining_funcs.values()) if hasattr(w, "adversary")]
        self.losses, self.records = [], []
        self.trainer = self.make_trainer(
            models=self.models,
            optimizers={f"{name}_optimizer": torch.optim.SGD(m.parameters(), 0.1) for name, m in self.models.items()},
            batch_size=8,
            loss_funcs=loss_funcs,
            mining_funcs=mining_funcs,
            dataset=TensorDataset(*images_and_labels(self.streams)),
            data_device="cpu",
            dataloader_num_workers=0,
            iterations_per_epoch=self.iterations,
            end_of_iteration_hook=self.look,
        )
        self.trainer.train(num_epochs=self.epochs)

    def parameters(self):
        return {
            f"{name}.{key}": value.detach().clone()
            for name, model in self.models.items()
            for key, value in model.state_dict().items()
        }

    def look(self, trainer):
        self.losses.append({name: float(torch.as_tensor(value).detach()) for name, value in trainer.losses.items()})
        self.records.append([{name: getattr(wrapper, name) for name in STANDARD} for wrapper in self.wrappers])


class OfMetricLossOnly(Run):
    def make_models(self):
        return parts_of()

    def make_losses(self):
        return {"metric_loss": losses.TripletMarginLoss(margin=0.5)}

    def make_miners(self):
        return {"tuple_miner": miners.MultiSimilarityMiner(epsilon=1.0)}

    def make_trainer(self, **options):
        return trainers.MetricLossOnly(**options)


class OfTrainWithClassifier(OfMetricLossOnly):
    def make_models(self):
        return parts_of(("", WIDTH))

    def make_losses(self):
        return {**super().make_losses(), "classifier_loss": nn.CrossEntropyLoss()}

    def make_trainer(self, **options):
        return trainers.TrainWithClassifier(**options)


class OfCascadedEmbeddings(Run):
    wrapped_losses = ("metric_loss_0", "metric_loss_1", "metric_loss_2")

    def make_models(self):
        return parts_of(("_1", 2))

    def make_losses(self):
        return {
            "metric_loss_0": losses.ContrastiveLoss(),
            "metric_loss_1": losses.TripletMarginLoss(margin=0.5),
            "metric_loss_2": losses.MultiSimilarityLoss(),
            "classifier_loss_1": nn.CrossEntropyLoss(),
        }

    def make_miners(self):
        return {
            "tuple_miner_0": miners.HDCMiner(0.9),
            "tuple_miner_1": miners.MultiSimilarityMiner(epsilon=1.0),
            "tuple_miner_2": miners.HDCMiner(0.9),
        }

    def make_trainer(self, **options):
        return trainers.CascadedEmbeddings(embedding_sizes=(2, 2, 2), **options)


class OfTwoStreamMetricLoss(OfMetricLossOnly):
    streams = 2

    def make_trainer(self, **options):
        return trainers.TwoStreamMetricLoss(**options)


class OfTwoStreamsWithoutMiner(OfTwoStreamMetricLoss):
    def make_miners(self):
        return {}


class OfDeepAdversarialMetricLearning(OfTrainWithClassifier):
    """One epoch each of the metric alone, of the generator alone, and of both."""

    epochs, iterations = 3, 2

    def make_models(self):
        return parts_of(("", WIDTH), generator=nn.Linear(36, 12))

    def make_losses(self):
        synthetic = {"synth_loss": losses.TripletMarginLoss(), "g_adv_loss": losses.TripletMarginLoss()}
        return {**super().make_losses(), **synthetic}

    def make_trainer(self, **options):
        options["loss_weights"] = dict.fromkeys((*options["loss_funcs"], "g_hard_loss", "g_reg_loss"), 0.5)
        return trainers.DeepAdversarialMetricLearning(
            metric_alone_epochs=1, g_alone_epochs=1, g_triplets_per_anchor=2, **options
        )


RUNS = [
    OfMetricLossOnly,
    OfTrainWithClassifier,
    OfCascadedEmbeddings,
    OfTwoStreamMetricLoss,
    OfTwoStreamsWithoutMiner,
    OfDeepAdversarialMetricLearning,
]


def adversarial(run, eps, given, **options):
    return run(
        lambda loss, models: seed_paper_loss(loss, models if given else None, attack=pgd(eps), **options),
        lambda miner, models: AdversarialMiner(miner, models if given else None, attack=pgd(eps), seed=5),
    )


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: run.__name__)
def plain(request):
    return request.param()


@GIVEN_OR_FOUND
class TestTrainers:
    def test_without_budget_are_as_without_wrappers(self, plain, given):
        run = adversarial(type(plain), 0.0, given)
        assert run.losses == [pytest.approx(expected, rel=1e-5) for expected in plain.losses]
        after = run.parameters()
        for name, expected in plain.parameters().items():
            torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6)

    def test_with_a_budget(self, plain, given):
        run = adversarial(type(plain), EPS, given)
        after, as_plain = run.parameters(), plain.parameters()
        assert all(not after[name].equal(value) for name, value in run.before.items())
        assert any((after[name] - value).abs().max() > 1e-4 for name, value in as_plain.items())
        assert len(run.losses) == run.epochs * run.iterations
        assert all(math.isfinite(value) for values in run.losses for value in values.values())
        assert len(run.wrappers) == len(run.wrapped_losses) + len(self.wrapped_miners(run))
        for of_wrapper in zip(*run.records, strict=True):
            for found in of_wrapper:
                assert found["num_perturbed"] > 0
                assert found["strength"] == 1
                assert EPS / 2 < found["perturbation_linf"] <= EPS + 1e-6
                assert found["embedding_shift"] > 0
                assert found["share_zero_gradient"] == 0
            assert sum(found["share_score_rose"] for found in of_wrapper) / len(of_wrapper) > 0.9

    @staticmethod
    def wrapped_miners(run):
        return [name for name, miner in run.trainer.mining_funcs.items() if isinstance(miner, AdversarialMiner)]


class TestRefused:
    @GIVEN_OR_FOUND
    def test_a_loss_of_synthetic_embeddings(self, given):
        """Each is generated from the embeddings of an anchor, a positive and a negative."""

        class Synthetic(OfDeepAdversarialMetricLearning):
            wrapped_losses = ("synth_loss",)

        with pytest.raises(CaptureError, match="depends on several inputs"):
            adversarial(Synthetic, EPS, given)

    def test_a_loss_whose_class_the_trainer_asks_for(self):
        class Generator(OfDeepAdversarialMetricLearning):
            wrapped_losses = ("g_adv_loss",)

        with pytest.raises(AssertionError):
            adversarial(Generator, EPS, True)


class TestHDCMiner:
    """CascadedEmbeddings hands on tuples to miners of this very class only."""

    def test_is_handed_tuples_while_it_is_not_wrapped(self):
        seen = []

        class Asked(miners.HDCMiner):
            def set_idx_externally(self, external_indices_tuple, labels):
                seen.append(external_indices_tuple)
                super().set_idx_externally(external_indices_tuple, labels)

        class Cascade(OfCascadedEmbeddings):
            def make_miners(self):
                return {
                    "tuple_miner_0": Asked(0.5),
                    "tuple_miner_1": self.wrap(Asked(0.5)),
                    "tuple_miner_2": Asked(0.5),
                }

        Cascade.wrap = staticmethod(lambda miner: miner)
        adversarial(Cascade, EPS, True)
        assert len(seen) == 3 * Cascade.iterations
        seen.clear()
        Cascade.wrap = staticmethod(AdversarialMiner)
        Cascade()
        assert len(seen) == 2 * Cascade.iterations


def loop(loader, loss, miner=None, model=None):
    """A plain loop over one epoch; gives the batches, and the records of each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches, records = [], []
    for images, labels in loader:
        embeddings = model(images)
        value = loss(embeddings, labels, miner and miner(embeddings, labels))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        batches.append((images, labels))
        records.append({name: getattr(loss, name) for name in (*STANDARD, *OF_LOSSES)})
        assert math.isfinite(value.item())
    return batches, records


def check(records):
    for found in records:
        assert found["num_perturbed"] > 0
        assert EPS / 2 < found["perturbation_linf"] <= EPS + 1e-6
        assert found["share_score_rose"] > 0.9


@pytest.fixture
def dataset():
    np.random.seed(0)  # noqa: NPY002
    return TensorDataset(*images_and_labels())


@pytest.fixture
def loss_func(model):
    return seed_paper_loss(losses.TripletMarginLoss(margin=0.5), model, attack=pgd(EPS))


class TestSamplers:
    def test_m_per_class_in_a_trainer(self):
        class Sampled(OfMetricLossOnly):
            def make_trainer(self, **options):
                labels = options["dataset"].tensors[-1]
                sampler = samplers.MPerClassSampler(labels, m=2, batch_size=8, length_before_new_iter=16)
                return super().make_trainer(sampler=sampler, **options)

        run = adversarial(Sampled, EPS, given=False)
        assert len(run.records) == 4  # two passes of two batches
        check(loss_record for loss_record, _ in run.records)
        assert all(loss_record["num_perturbed"] == 8 for loss_record, _ in run.records)  # each has its positive

    def test_hierarchical(self, dataset, model, loss_func):
        inner = dataset.tensors[1]
        sampler = samplers.HierarchicalSampler(torch.stack([inner, inner // 2], 1), 8, 2, 3)
        batches, records = loop(DataLoader(dataset, batch_sampler=sampler), loss_func, model=model)
        assert len(batches) == 3
        assert all(labels.bincount(minlength=CLASSES).tolist() == [2] * CLASSES for _, labels in batches)
        check(records)

    def test_fixed_set_of_triplets(self, dataset, model, loss_func):
        sampler = samplers.FixedSetOfTriplets(dataset.tensors[1], 8)
        loader = DataLoader(dataset, batch_size=12, sampler=sampler)
        batches, records = loop(loader, loss_func, miners.EmbeddingsAlreadyPackagedAsTriplets(), model)
        assert len(batches) == 2
        check(records)
        assert all(found["num_perturbed"] == 4 for found in records)  # of each triplet its positive

    @pytest.mark.parametrize("mode", ["plain", "eval", "train"])
    def test_tuples_to_weights(self, dataset, model, loss_func, mode):
        miner = miners.TripletMarginMiner(margin=0.2)
        if mode != "plain":
            miner = AdversarialMiner(miner, model).train(mode == "train")
        sampler = samplers.TuplesToWeightsSampler(
            model, miner, dataset, batch_size=8, dataloader_num_workers=0, data_device="cpu"
        )
        loader = DataLoader(dataset, batch_size=8, sampler=sampler, drop_last=True)
        if mode == "train":  # the sampler embeds without gradient
            with pytest.raises(CaptureError, match="computed without gradient"):
                loop(loader, loss_func, model=model)
            return
        batches, records = loop(loader, loss_func, model=model)
        assert len(batches) == 3
        check(records)
