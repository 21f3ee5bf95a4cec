"""The testers and the logging of pytorch-metric-learning, unmodified, with attacked queries."""

import copy
import csv
import math
import pickle

import pytest
import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.testers import (
    BaseTester,
    GlobalEmbeddingSpaceTester,
    GlobalTwoStreamEmbeddingSpaceTester,
    WithSameParentLabelTester,
)
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, FaissKNN
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from pml_adversarial import AdversarialTester, InputError, evaluate_robustness
from pml_adversarial.evaluation import Gallery
from pml_adversarial.evaluation.attacks.gradients import gradient_attack, margin_score, shift_score
from pml_adversarial.evaluation.attacks.kinds import QueryAttack
from pml_adversarial.evaluation.retrieval.classifier import RetrievalClassifier
from pml_adversarial.evaluation.retrieval.gallery import Targets
from pml_adversarial.evaluation.suites import quick, standard

EPS = 0.04
AS_PML_CALLS_IT = {
    "recall_at_1": "precision_at_1",
    "map_at_r": "mean_average_precision_at_r",
    "r_precision": "r_precision",
}


def fast():
    return quick(steps=4, restarts=1)


def images_of(labels, seed):
    """Images drawn around one pattern per class, so wide apart that some are found and some are not."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(int(labels.max()) + 1, 1, 4, 4, generator=torch.Generator().manual_seed(9)) * 0.5 + 0.25
    return (patterns[labels] + 0.16 * torch.randn(len(labels), 1, 4, 4, generator=generator)).clamp(0, 1)


def split(count, seed, classes=4):
    labels = torch.arange(count) % classes
    return images_of(labels, seed), labels


@pytest.fixture
def trunk():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh())


@pytest.fixture
def embedder():
    return nn.Linear(8, 3)


@pytest.fixture
def data():
    return {"train": TensorDataset(*split(20, 1)), "val": TensorDataset(*split(16, 2))}


def calculator():
    return AccuracyCalculator(include=tuple(AS_PML_CALLS_IT.values()))


def plain(kind=GlobalEmbeddingSpaceTester, **options):
    return kind(
        **{
            "dataloader_num_workers": 0,
            "batch_size": 7,
            "data_device": torch.device("cpu"),
            "accuracy_calculator": calculator(),
            **options,
        }
    )


def wrapped(kind=GlobalEmbeddingSpaceTester, *, eps=EPS, attacks=None, tester=None, **options):
    names = ("norm", "recall_at", "normalization", "splits", "max_queries", "checks", "seed", "attack_batch_size")
    own = {name: options.pop(name) for name in names if name in options}
    tester = plain(kind, **options) if tester is None else tester
    return AdversarialTester(tester, eps=eps, attacks=fast() if attacks is None else attacks, **own)


def same_report(found, expected, **settings):
    """Whether two reports agree, but for seconds and last digits, which batches of another size round otherwise."""
    found, expected = found.to_dict(), expected.to_dict()
    settings = {"junk_label": found["settings"]["junk_label"], **settings}  # PML knows no junk
    assert found.pop("settings") == {**expected.pop("settings"), **settings}
    del found["notes"], expected["notes"]  # a tester may give embeddings that it has normalised
    assert found.pop("provenance")["queries"] == expected.pop("provenance")["queries"]
    assert found.pop("collapse") == pytest.approx(expected.pop("collapse"), rel=1e-5)
    attacks, others = found.pop("attacks"), expected.pop("attacks")
    for result, other in zip(attacks, others, strict=True):
        assert result.pop("seconds") >= 0 <= other.pop("seconds")
        assert result.pop("shift") == pytest.approx(other.pop("shift"), rel=1e-3)
        assert result == other
    assert found == expected
    return True


def agrees_with_pml(accuracies, levels=("level0",)):
    """Whether the metrics without attack are those of PML's own calculator, and not trivially so."""
    for level in levels:
        for own, theirs in AS_PML_CALLS_IT.items():
            assert accuracies[f"clean_{own}_{level}"] == pytest.approx(accuracies[f"{theirs}_{level}"], abs=1e-6)
        assert 0 < accuracies[f"clean_recall_at_1_{level}"] < 1
        assert accuracies[f"worst_case_recall_at_1_{level}"] < accuracies[f"clean_recall_at_1_{level}"]
    return True


class TestGlobalEmbeddingSpace:
    def test_own_numbers_are_those_of_the_bare_tester(self, data, trunk, embedder):
        bare = plain().test(data, 3, trunk, embedder)
        found = wrapped().test(data, 3, trunk, embedder)
        for name, accuracies in bare.items():
            assert {key: found[name][key] for key in accuracies} == accuracies

    def test_numbers_are_those_of_evaluate_robustness(self, data, trunk, embedder):
        tester = wrapped(recall_at=(1, 2))
        found = tester.test(data, 3, trunk, embedder)
        for name, dataset in data.items():
            report = evaluate_robustness(
                nn.Sequential(trunk, embedder),
                dataset.tensors,
                eps=EPS,
                attacks=fast(),
                recall_at=(1, 2),
                checks=False,
            )
            assert same_report(tester.reports[name], report)
            for measure, value in report.worst[0].measures.items():
                assert found[name][f"worst_case_{measure}_level0"] == value
            for result in report.attacks:
                assert found[name][f"{result.attack}_recall_at_2_level0"] == result.measures["recall_at_2"]

    def test_without_attack_it_is_what_pml_finds(self, data, trunk, embedder):
        assert agrees_with_pml(wrapped().test(data, 3, trunk, embedder)["val"])

    def test_a_separate_gallery(self, data, trunk, embedder):
        tester = wrapped()
        found = tester.test(data, 3, trunk, embedder, [("val", ["train"])])
        assert list(found) == ["val"]
        assert agrees_with_pml(found["val"])
        expected = evaluate_robustness(
            nn.Sequential(trunk, embedder),
            data["val"].tensors,
            data["train"].tensors,
            eps=EPS,
            attacks=fast(),
            recall_at=(1,),
            checks=False,
        )
        assert same_report(tester.reports["val"], expected)
        assert tester.reports["val"].protocol == "separate gallery"

    def test_queries_within_a_larger_gallery_never_find_themselves(self, data, trunk, embedder):
        tester = wrapped(attacks=(*fast(), standard(steps=3)[-2]))
        found = tester.test(data, 3, trunk, embedder, [("val", ["train", "val"])])["val"]
        assert agrees_with_pml(found)
        report = tester.reports["val"]
        assert (report.num_queries, report.num_gallery, report.protocol) == (16, 36, "leave-one-out")
        for example in report.examples:
            assert example.query not in [neighbour.item for neighbour in (*example.before, *example.after)]
            assert all(
                torch.equal(
                    neighbour.image, torch.cat([data[name].tensors[0] for name in ("val", "train")])[neighbour.item]
                )
                for neighbour in example.before
            )

    def test_one_model_without_embedder(self, data, trunk):
        assert agrees_with_pml(wrapped().test(data, 3, trunk)["val"])

    def test_the_trunks_output(self, data, trunk, embedder):
        tester = wrapped(use_trunk_output=True)
        assert agrees_with_pml(tester.test(data, 3, trunk, embedder)["val"])
        direct = evaluate_robustness(trunk, data["val"].tensors, eps=EPS, attacks=fast(), recall_at=(1,), checks=False)
        assert same_report(tester.reports["val"], direct)

    def test_several_eps_and_attacks_on_the_gallery(self, data, trunk, embedder):
        gallery_attack = standard(steps=3)[-2]
        tester = wrapped(eps=(EPS, 0.01, 1 / 64), attacks=(*fast(), gallery_attack))
        found = tester.test(data, 3, trunk, embedder)["val"]
        report = tester.reports["val"]
        assert found["worst_case_recall_at_1_level0"] == report.worst_case(EPS)
        assert found["worst_case_recall_at_1_eps_0_01_level0"] == report.worst_case(0.01)
        assert found["worst_case_recall_at_1_eps_0_01562_level0"] == report.worst_case(1 / 64)
        assert found["worst_case_gallery_recall_at_1_level0"] == report.worst_case(EPS, target="gallery")
        assert found["promote_recall_at_1_eps_0_01_level0"] == report.worst_case(0.01, target="gallery")
        assert found["worst_case_recall_at_1_level0"] < found["worst_case_recall_at_1_eps_0_01_level0"]
        assert set(found) == {"epoch", *calculator_keys(), *(f"{name}_level0" for name in tester.metrics)}

    def test_l2(self, data, trunk, embedder):
        tester = wrapped(norm="L2", eps=0.3)
        assert agrees_with_pml(tester.test(data, 3, trunk, embedder)["val"])
        assert tester.reports["val"].settings["norm"] == "L2"


def calculator_keys():
    return [f"{name}_level0" for name in AS_PML_CALLS_IT.values()]


class TestWhatIsAttacked:
    def test_chosen_splits(self, data, trunk, embedder):
        tester = wrapped(splits=["val"])
        found = tester.test(data, 3, trunk, embedder)
        assert list(tester.reports) == ["val"]
        assert all(math.isnan(found["train"][f"{name}_level0"]) for name in tester.metrics)
        assert not any(math.isnan(found["val"][f"{name}_level0"]) for name in tester.metrics)

    def test_some_queries_the_same_in_each_test(self, data, trunk, embedder):
        tester = wrapped(max_queries=6, seed=4)
        first = tester.test(data, 3, trunk, embedder)["val"]
        subset = tester.reports["val"].settings["subset"]
        assert len(set(subset)) == 6
        assert tester.reports["val"].num_gallery == 16
        expected = evaluate_robustness(
            nn.Sequential(trunk, embedder),
            data["val"].tensors,
            eps=EPS,
            attacks=fast(),
            recall_at=(1,),
            subset=subset,
            checks=False,
            seed=4,
        )
        assert same_report(tester.reports["val"], expected)
        assert tester.test(data, 4, trunk, embedder)["val"] == {**first, "epoch": 4}
        assert wrapped(max_queries=6, seed=5, tester=tester.tester).test(data, 3, trunk, embedder)
        other = wrapped(max_queries=6, seed=5)
        other.test(data, 3, trunk, embedder)
        assert other.reports["val"].settings["subset"] != subset

    def test_more_queries_than_there_are_is_all(self, data, trunk, embedder):
        tester = wrapped(max_queries=16)
        tester.test(data, 3, trunk, embedder)
        assert tester.reports["val"].settings["subset"] is None

    def test_normalised_images(self, data, trunk, embedder):
        mean, std = (0.4,), (0.2,)
        normalised = {
            name: TensorDataset((part.tensors[0] - mean[0]) / std[0], part.tensors[1]) for name, part in data.items()
        }
        tester = wrapped(normalization=(mean, std))
        assert agrees_with_pml(tester.test(normalised, 3, trunk, embedder)["val"])
        direct = evaluate_robustness(
            nn.Sequential(trunk, embedder),
            data["val"].tensors,
            eps=EPS,
            attacks=fast(),
            recall_at=(1,),
            normalization=(mean, std),
            checks=False,
        )
        assert tester.reports["val"].worst[0].measures == direct.worst[0].measures
        assert min(example.perturbed.min() for example in tester.reports["val"].examples) >= 0

    def test_what_the_getter_and_the_collate_function_make_of_the_data(self, data, trunk, embedder):
        bare = wrapped()
        expected = bare.test(data, 3, trunk, embedder)["val"]
        dicts = {
            name: [{"picture": image * 255, "class": int(label)} for image, label in part]
            for name, part in data.items()
        }
        tester = wrapped(data_and_label_getter=lambda batch: (batch["picture"], batch["class"]))

        def collate(rows):
            return default_collate([{**row, "picture": row["picture"] / 255} for row in rows])

        found = tester.test(dicts, 3, trunk, embedder, collate_fn=collate)["val"]
        assert found == pytest.approx(expected, abs=1e-6)

    def test_double_precision_through_the_testers_dtype(self, data, trunk, embedder):
        tester = wrapped(dtype=torch.float64)
        assert agrees_with_pml(tester.test(data, 3, trunk.double(), embedder.double())["val"])

    def test_images_are_read_only_where_needed(self, trunk, embedder):
        class Counting(Dataset):
            def __init__(self, images, labels):
                self.images, self.labels, self.asked = images, labels, []

            def __len__(self):
                return len(self.images)

            def __getitem__(self, row):
                self.asked.append(row)
                return self.images[row], self.labels[row]

        data = {"query": Counting(*split(16, 1)), "reference": Counting(*split(200, 2))}
        wrapped(max_queries=2).test(data, 0, trunk, embedder, [("query", ["reference"])])
        # the tester's pass, 16 that are read twice and once more to be embedded anew, the size of one, up to 8 that may
        # be the image of a query, and what the examples show
        assert len(data["reference"].asked) <= 200 + 3 * 16 + 1 + 2 * 8 + 2 * 2 * 8 + 4


class TestLabelLevels:
    @pytest.fixture
    def data(self):
        fine = torch.arange(24) % 6
        return {"val": TensorDataset(images_of(fine, 2), torch.stack([fine, fine // 3, fine // 3 * 0], 1))}

    def test_one(self, data, trunk, embedder):
        tester = wrapped(label_hierarchy_level=1)
        assert agrees_with_pml(tester.test(data, 3, trunk, embedder)["val"], ["level1"])
        assert list(tester.reports) == ["val"]
        assert tester.reports["val"].num_classes == 2

    def test_several(self, data, trunk, embedder):
        tester = wrapped(label_hierarchy_level=[0, 1])
        found = tester.test(data, 3, trunk, embedder)["val"]
        assert agrees_with_pml(found, ["level0", "level1"])
        assert [report.num_classes for report in tester.reports.values()] == [6, 2]
        assert list(tester.reports) == ["val_level0", "val_level1"]
        for name in tester.metrics:
            assert found[f"AVERAGE_{name}"] == (found[f"{name}_level0"] + found[f"{name}_level1"]) / 2

    def test_all(self, data, trunk, embedder):
        images, labels = data["val"].tensors
        tester = wrapped(label_hierarchy_level="all")
        found = tester.test({"val": TensorDataset(images, labels[:, :2])}, 3, trunk, embedder)["val"]
        assert agrees_with_pml(found, ["level0", "level1"])
        assert "AVERAGE_worst_case_recall_at_1" in found

    def test_each_is_that_of_evaluate_robustness(self, data, trunk, embedder):
        tester = wrapped(label_hierarchy_level=[0, 1])
        tester.test(data, 3, trunk, embedder)
        images, labels = data["val"].tensors
        for level in (0, 1):
            direct = evaluate_robustness(
                nn.Sequential(trunk, embedder),
                (images, labels[:, level]),
                eps=EPS,
                attacks=fast(),
                recall_at=(1,),
                checks=False,
            )
            assert same_report(tester.reports[f"val_level{level}"], direct)

    def test_an_attack_that_needs_more_classes_is_nan(self, data, trunk, embedder):
        needy = QueryAttack("needy", gradient_attack(shift_score, 2), num_classes=4)
        found = wrapped(label_hierarchy_level=[0, 1], attacks=(*fast(), needy)).test(data, 3, trunk, embedder)["val"]
        assert found["needy_recall_at_1_level0"] >= 0
        assert math.isnan(found["needy_recall_at_1_level1"])
        assert math.isnan(found["AVERAGE_needy_recall_at_1"])
        assert found["AVERAGE_worst_case_recall_at_1"] >= 0

    def test_one_label_for_all_is_refused(self, data, trunk, embedder):
        with pytest.raises(InputError, match="one label"):
            wrapped(label_hierarchy_level=2).test(data, 3, trunk, embedder)


class TestWithSameParentLabel:
    @pytest.fixture
    def labels(self):
        fine = torch.arange(32) % 8
        return torch.stack([fine, fine % 3, torch.zeros_like(fine)], 1)  # parents of 3, 3 and 2 classes

    @pytest.fixture
    def data(self, labels):
        return {"val": TensorDataset(images_of(labels[:, 0], 2), labels)}

    def test_without_attack_it_is_what_pml_finds(self, data, trunk, embedder):
        assert agrees_with_pml(wrapped(WithSameParentLabelTester).test(data, 3, trunk, embedder)["val"])

    def test_each_parent_is_searched_for_itself(self, data, labels, trunk, embedder):
        tester = wrapped(WithSameParentLabelTester)
        found = tester.test(data, 3, trunk, embedder)["val"]
        assert list(tester.reports) == ["val_parent0", "val_parent1", "val_parent2"]
        expected = []
        for parent in range(3):
            rows = labels[:, 1] == parent
            direct = evaluate_robustness(
                nn.Sequential(trunk, embedder),
                (data["val"].tensors[0][rows], labels[rows, 0]),
                eps=EPS,
                attacks=fast(),
                recall_at=(1,),
                checks=False,
            )
            assert same_report(tester.reports[f"val_parent{parent}"], direct)
            expected.append(direct.worst_case(EPS))
        assert found["worst_case_recall_at_1_level0"] == pytest.approx(sum(expected) / 3)

    def test_among_further_references(self, data, labels, trunk, embedder):
        data["more"] = TensorDataset(images_of(labels[:20, 0], 5), labels[:20])
        found = wrapped(WithSameParentLabelTester).test(data, 3, trunk, embedder, [("val", ["more", "val"])])
        assert agrees_with_pml(found["val"])

    def test_levels(self, data, labels, trunk, embedder):
        tester = wrapped(WithSameParentLabelTester, label_hierarchy_level="all")
        found = tester.test(data, 3, trunk, embedder)["val"]
        assert agrees_with_pml(found, ["level0", "level1"])
        assert list(tester.reports) == [*(f"val_level0_parent{parent}" for parent in range(3)), "val_level1_parent0"]

    def test_a_parent_of_one_class_is_right_whatever_happens(self, data, labels, trunk, embedder):
        labels[labels[:, 0] == 7, 1] = 5
        tester = wrapped(WithSameParentLabelTester)
        found = tester.test(data, 3, trunk, embedder)["val"]
        assert agrees_with_pml(found)
        assert list(tester.reports) == ["val_parent0", "val_parent1", "val_parent2"]
        others = [report.worst_case(EPS) for report in tester.reports.values()]
        assert found["worst_case_recall_at_1_level0"] == pytest.approx((sum(others) + 1) / 4)

    def test_a_parent_without_any_answer_is_left_out(self, data, labels, trunk, embedder):
        labels[:2] = torch.tensor([[20, 9, 0], [21, 9, 0]])  # two classes of one image
        tester = wrapped(WithSameParentLabelTester)
        found = tester.test(data, 3, trunk, embedder)["val"]
        assert math.isnan(found["precision_at_1_level0"])  # PML's
        assert list(tester.reports) == ["val_parent0", "val_parent1", "val_parent2"]
        mean = sum(report.clean["recall_at_1"] for report in tester.reports.values()) / 3
        assert found["clean_recall_at_1_level0"] == pytest.approx(mean)

    def test_no_parent_with_an_answer_is_refused(self, data, labels, trunk, embedder):
        labels[:, 0] = torch.arange(32)
        with pytest.raises(InputError, match="None of the chosen queries of val"):
            wrapped(WithSameParentLabelTester).test(data, 3, trunk, embedder)

    def test_parents_of_whom_no_query_was_chosen_are_left_out(self, data, trunk, embedder):
        tester = wrapped(WithSameParentLabelTester, max_queries=1)
        tester.test(data, 3, trunk, embedder)
        (report,) = tester.reports.values()
        assert report.num_queries == 1
        assert report.num_gallery > 1


class TestTwoStreams:
    @pytest.fixture
    def data(self):
        labels = torch.arange(16) % 4
        return {"val": TensorDataset(images_of(labels, 1), images_of(labels, 2), labels)}

    def test_without_attack_it_is_what_pml_finds(self, data, trunk, embedder):
        tester = wrapped(GlobalTwoStreamEmbeddingSpaceTester)
        assert agrees_with_pml(tester.test(data, 3, trunk, embedder)["val"])

    def test_queries_are_of_the_first_stream_and_items_of_the_second(self, data, trunk, embedder):
        tester = wrapped(GlobalTwoStreamEmbeddingSpaceTester, attacks=(*fast(), standard(steps=3)[-2]))
        tester.test(data, 3, trunk, embedder)
        first, second, labels = data["val"].tensors
        direct = evaluate_robustness(
            nn.Sequential(trunk, embedder),
            (first, labels),
            (second, labels),
            eps=EPS,
            attacks=(*fast(), standard(steps=3)[-2]),
            recall_at=(1,),
            checks=False,
        )
        assert same_report(tester.reports["val"], direct)


class TestDelegation:
    def test_reads_are_the_wrapped_testers(self):
        tester = wrapped(batch_size=5, set_min_label_to_zero=False)
        assert (tester.batch_size, tester.normalize_embeddings) == (5, True)
        assert tester.label_hierarchy_level_to_str([0, 2]) == "0_2"
        assert {"batch_size", "reports", "maybe_normalize"} <= set(dir(tester))
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            tester.nothing_of_the_kind  # noqa: B018

    def test_writes_reach_it(self):
        tester = wrapped()
        tester.batch_size, tester.reports = 11, {"own": 1}
        assert tester.tester.batch_size == 11
        assert tester.reports == {"own": 1}
        assert not hasattr(tester.tester, "reports")
        tester.note = 3
        del tester.note
        assert not hasattr(tester.tester, "note")
        with pytest.raises(AttributeError):
            tester.tester = plain()

    def test_the_calculator_names_all_metrics(self):
        tester = wrapped()
        own = tester.tester.accuracy_calculator
        assert tester.accuracy_calculator.get_curr_metrics() == [*own.get_curr_metrics(), *tester.metrics]
        assert set(own.get_curr_metrics()) == set(AS_PML_CALLS_IT.values())
        tester.accuracy_calculator.k = 2
        assert own.k == 2

    def test_the_calculator_can_be_exchanged(self):
        tester, other = wrapped(), AccuracyCalculator(include=("precision_at_1",))
        tester.accuracy_calculator = other
        assert tester.tester.accuracy_calculator is other
        tester.accuracy_calculator = tester.accuracy_calculator
        assert tester.tester.accuracy_calculator is other

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda tester: pickle.loads(pickle.dumps(tester))])
    def test_copies(self, data, trunk, embedder, duplicate):
        tester = wrapped(attacks="quick", max_queries=1, splits=["val"], batch_size=3)
        found = duplicate(tester)
        assert found.batch_size == 3
        accuracies = tester.test(data, 3, trunk, embedder)["val"]
        assert found.reports == {}
        assert found.test(data, 3, trunk, embedder)["val"] == accuracies

    def test_a_testers_way_to_be_copied_is_its_own(self):
        class Single(GlobalEmbeddingSpaceTester):
            def __deepcopy__(self, memo):
                return self

        tester = wrapped(tester=plain(Single))
        found = copy.deepcopy(tester)
        assert isinstance(found, AdversarialTester)
        assert found is not tester
        assert found.tester is tester.tester

    def test_names_can_be_columns(self):
        names = wrapped(eps=(8 / 255, 1e-5, 0.5), attacks=standard()).metrics
        assert all(name.isidentifier() and name.isascii() for name in names)
        assert {"apgd_ce_map_at_r", "fab_t_recall_at_1_eps_1e_05", "square_r_precision_eps_0_5"} <= set(names)

    def test_each_metric_that_is_named_is_found(self, data, trunk, embedder):
        tester = wrapped(attacks=standard(2, 1, 3, 2))
        found = tester.test(data, 3, trunk, embedder)["val"]
        assert not any(math.isnan(found[f"{name}_level0"]) for name in tester.metrics)


class TestHooks:
    def test_the_users_hook_gets_this_tester_with_everything_there(self, data, trunk, embedder):
        seen = []

        def hook(tester):
            keys = list(tester.all_accuracies["val"])
            seen.append((tester, keys, set(tester.embeddings_and_labels), set(tester.reports)))

        tester = wrapped(end_of_testing_hook=hook)
        assert tester.test(data, 3, trunk, embedder) is tester.all_accuracies
        assert len(seen) == 1
        assert seen[0][0] is tester
        assert seen[0][1] == list(tester.all_accuracies["val"])
        assert "worst_case_recall_at_1_level0" in seen[0][1]
        assert seen[0][2] == seen[0][3] == {"train", "val"}
        assert tester.end_of_testing_hook is tester.tester.end_of_testing_hook is hook
        assert not hasattr(tester, "embeddings_and_labels")

    def test_a_hook_that_is_set_later_is_called(self, data, trunk, embedder):
        seen, tester = [], wrapped()
        tester.end_of_testing_hook = seen.append
        tester.test(data, 3, trunk, embedder)
        assert seen == [tester]

    def test_a_hook_may_set_another(self, data, trunk, embedder):
        tester = wrapped()

        def other(_):
            pass

        def hook(tester):
            tester.end_of_testing_hook = other

        tester.end_of_testing_hook = hook
        tester.test(data, 3, trunk, embedder)
        assert tester.tester.end_of_testing_hook is other

    def test_without_a_hook_accuracies_are_logged(self, data, trunk, embedder, caplog):
        with caplog.at_level("INFO", "PML"):
            wrapped().test(data, 3, trunk, embedder)
        assert any("worst_case_recall_at_1_level0" in record.getMessage() for record in caplog.records)


def state_of(*modules):
    return [
        (
            {
                name: (value.detach().clone(), value.requires_grad)
                for name, value in module.state_dict(keep_vars=True).items()
            },
            [part.training for part in module.modules()],
        )
        for module in modules
    ]


def same(first, second):
    for (tensors, modes), (others, other_modes) in zip(first, second, strict=True):
        assert modes == other_modes
        for name, (value, gradient) in tensors.items():
            assert torch.equal(value, others[name][0])
            assert gradient == others[name][1]
    return True


class TestNothingStaysBehind:
    def test_models_are_as_the_bare_tester_leaves_them(self, data, trunk, embedder):
        states = []
        for tester in (plain(), wrapped()):
            torch.manual_seed(5)
            trunk.train(), embedder.train()
            tester.test(data, 3, trunk, embedder)
            states.append((state_of(trunk, embedder), torch.get_rng_state()))
        (expected, generator), (found, found_generator) = states
        assert same(found, expected)
        assert torch.equal(found_generator, generator)
        assert all(parameter.grad is None for parameter in (*trunk.parameters(), *embedder.parameters()))

    def failing(self, at_call):
        calls = []

        def find(batch, eps, restart):
            calls.append(batch)
            if len(calls) == at_call:
                raise RuntimeError("no power")
            return batch.images

        return QueryAttack("failing", find)

    @pytest.mark.parametrize("at_call", [1, 2], ids=["first split", "second split"])
    def test_after_an_exception_either(self, data, trunk, embedder, at_call):
        def hook(tester):
            pass

        tester = wrapped(attacks=[self.failing(at_call)], end_of_testing_hook=hook)
        trunk.eval(), embedder.eval()
        before = state_of(trunk, embedder)
        with pytest.raises(RuntimeError, match="no power"):
            tester.test(data, 3, trunk, embedder)
        assert same(state_of(trunk, embedder), before)
        assert tester.tester.end_of_testing_hook is hook
        assert tester.reports == {}
        assert not hasattr(tester, "embeddings_and_labels")
        bare = plain().test(data, 3, trunk, embedder)
        assert tester.all_accuracies == bare
        assert "failing_recall_at_1_level0" in tester.test(data, 3, trunk, embedder)["val"]

    def test_after_the_users_hook_failed(self, data, trunk, embedder):
        def hook(tester):
            raise OSError("disk full")

        tester = wrapped(end_of_testing_hook=hook)
        with pytest.raises(OSError, match="disk full"):
            tester.test(data, 3, trunk, embedder)
        assert tester.tester.end_of_testing_hook is hook
        assert not hasattr(tester, "embeddings_and_labels")


class Numpy(nn.Module):
    def forward(self, images):
        return torch.from_numpy(images.detach().flatten(1).numpy()) - 0.5


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eps": 0}, "eps=.*above 0"),
            ({"eps": ()}, "eps="),
            ({"attacks": "strong"}, "attacks='strong'"),
            ({"norm": "L3"}, "norm='L3'"),
            ({"attack_batch_size": 0}, "attack_batch_size=0"),
            ({"max_queries": 0}, "max_queries=0"),
            ({"max_queries": 0.5}, "max_queries=0.5"),
            ({"recall_at": (1.5,)}, "recall_at"),
            ({"eps": "0.1"}, "eps="),
            ({"eps": 2}, "eps=2 is wider"),
            ({"splits": "val"}, r"splits='val'.*\('val',\)"),
            ({"normalization": ((0.5,), (0.0,))}, "normalization"),
            ({"eps": (0.031371, 0.031372)}, "one name: .*_eps_0_03137"),
            (
                {"attacks": [QueryAttack(name, gradient_attack(shift_score, 1)) for name in ("a-b", "A_B")]},
                "one name: a_b",
            ),
        ],
    )
    def test_at_once(self, options, message):
        if options.get("eps") == (0.031371, 0.031372):
            options = {"eps": (0.01, *options["eps"])}
        with pytest.raises(InputError, match=message):
            wrapped(**options)

    @pytest.mark.parametrize("wrong", [GlobalEmbeddingSpaceTester, losses.TripletMarginLoss(), None])
    def test_no_tester(self, wrong):
        with pytest.raises(InputError, match="expected a tester"):
            AdversarialTester(wrong, eps=EPS)

    def test_a_wrapped_one(self):
        with pytest.raises(InputError, match="tester is AdversarialTester"):
            AdversarialTester(wrapped(), eps=EPS)

    def test_unknown_split(self, data, trunk, embedder):
        with pytest.raises(InputError, match="splits holds test; expected some of the data sets train, val"):
            wrapped(splits=("test", "val")).test(data, 3, trunk, embedder)

    def test_pca(self, data, trunk, embedder):
        with pytest.raises(InputError, match="pca=2"):
            wrapped(pca=2).test(data, 3, trunk, embedder)

    def test_labels_compared_by_a_function(self, data, trunk, embedder):
        own = AccuracyCalculator(include=("precision_at_1",), label_comparison_fn=lambda a, b: a == b)
        with pytest.raises(InputError, match="label_comparison_fn"):
            wrapped(accuracy_calculator=own).test(data, 3, trunk, embedder)

    @pytest.mark.parametrize(
        ("knn", "distance"),
        [
            (None, "euclidean"),
            (CustomKNN(CosineSimilarity()), "cosine"),
            (
                CustomKNN(LpDistance(normalize_embeddings=False, p=1)),
                "LpDistance(normalize_embeddings=False, p=1, power=1)",
            ),
            (CustomKNN(DotProductSimilarity(normalize_embeddings=False)), "inner_product"),
        ],
    )
    def test_embeddings_of_different_lengths_are_compared_as_the_tester_does(
        self, data, trunk, embedder, knn, distance
    ):
        own = calculator()
        if knn is not None:
            own.knn_func = knn
        tester = wrapped(normalize_embeddings=False, accuracy_calculator=own)
        assert agrees_with_pml(tester.test(data, 3, trunk, embedder)["val"])
        assert {report.settings["distance"] for report in tester.reports.values()} == {distance}

    @pytest.mark.parametrize(
        "distance", [DotProductSimilarity(normalize_embeddings=False), LpDistance(normalize_embeddings=False, p=1)]
    )
    def test_embeddings_that_the_tester_normalises_before_another_distance(self, data, trunk, embedder, distance):
        own = calculator()
        own.knn_func = CustomKNN(distance)
        tester = wrapped(accuracy_calculator=own)
        assert tester.normalize_embeddings
        assert agrees_with_pml(tester.test(data, 3, trunk, embedder)["val"])

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize(("metric", "name"), [("IP", "inner_product"), ("L2", "euclidean")])
    def test_the_metric_is_that_of_the_index(self, data, trunk, embedder, metric, name, normalize):
        faiss = pytest.importorskip("faiss")
        own = calculator()
        own.knn_func = FaissKNN(index_init_fn=lambda size: getattr(faiss, f"IndexFlat{metric}")(size))
        tester = wrapped(normalize_embeddings=normalize, accuracy_calculator=own)
        assert agrees_with_pml(tester.test(data, 3, trunk, embedder)["val"])
        expected = "cosine" if normalize else name
        assert {report.settings["distance"] for report in tester.reports.values()} == {expected}

    @pytest.mark.parametrize("kind", ["another metric", "a function"])
    def test_a_distance_that_is_not_known_is_refused(self, data, trunk, embedder, kind):
        faiss, own = pytest.importorskip("faiss"), calculator()
        known = FaissKNN()
        own.knn_func = (
            FaissKNN(index_init_fn=lambda size: faiss.IndexFlat(size, faiss.METRIC_L1))
            if kind == "another metric"
            else lambda *given: known(*given)
        )
        with pytest.raises(InputError, match=r"not known by which distance.*CustomKNN"):
            wrapped(accuracy_calculator=own).test(data, 3, trunk, embedder)

    def test_equal_lengths_or_a_cosine_will_do(self, data, trunk, embedder):
        class Unit(nn.Module):
            def forward(self, embeddings):
                return nn.functional.normalize(embeddings)

        normalised = nn.Sequential(embedder, Unit())
        assert agrees_with_pml(wrapped(normalize_embeddings=False).test(data, 3, trunk, normalised)["val"])
        own = calculator()
        own.knn_func = CustomKNN(CosineSimilarity())
        tester = wrapped(normalize_embeddings=False, accuracy_calculator=own)
        assert agrees_with_pml(tester.test(data, 3, trunk, embedder)["val"])

    def test_images_that_are_no_pixels(self, data, trunk, embedder):
        data["val"] = TensorDataset(data["val"].tensors[0] * 4, data["val"].tensors[1])
        with pytest.raises(InputError, match=r"val, image 0: .*normalization=\(mean, std\)"):
            wrapped(splits=["val"]).test(data, 3, trunk, embedder)

    def test_inputs_that_are_no_tensors(self, data, trunk, embedder):
        class Pairs(BaseTester):
            def do_knn_and_accuracies(self, *args):
                pass

            def get_embeddings_for_eval(self, trunk, embedder, images):
                return super().get_embeddings_for_eval(trunk, embedder, images["left"])

        tester = wrapped(Pairs, data_and_label_getter=lambda batch: ({"left": batch[0]}, batch[1]))
        with pytest.raises(InputError, match="images dict; expected a tensor"):
            tester.test(data, 3, trunk, embedder)

    def test_a_model_without_gradient(self, data):
        with pytest.raises(InputError, match="no gradient with respect to the images"):
            wrapped().test(data, 3, Numpy())

    def test_which_black_boxes_can_attack(self, data):
        (square,) = [attack for attack in standard(queries=5) if attack.black_box]
        found = wrapped(attacks=[square]).test(data, 3, Numpy())["val"]
        assert 0 <= found["worst_case_recall_at_1_level0"] <= found["clean_recall_at_1_level0"]

    def test_data_without_an_index(self, data, trunk, embedder):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(data["val"])

            def __len__(self):
                return len(data["val"])

        with pytest.raises(InputError, match="val: the data set is an IterableDataset"):
            wrapped().test({"val": Stream()}, 3, trunk, embedder)

    def test_labels_that_are_no_numbers_of_classes(self, data, trunk, embedder):
        images, labels = data["val"].tensors
        with pytest.raises(InputError, match="no whole numbers"):
            wrapped().test({"val": TensorDataset(images, labels + 0.5)}, 3, trunk, embedder)
        assert agrees_with_pml(
            wrapped().test({"val": TensorDataset(images, labels.double())}, 3, trunk, embedder)["val"]
        )


class TestQueriesInAGivenGallery:
    """`evaluate_robustness` with ``own``."""

    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    @pytest.mark.parametrize("attacks", [fast(), standard(2, 1, 3, 2)], ids=["quick", "standard"])
    def test_all_of_them_is_leave_one_out(self, attacks):
        model, queries = self.model(), split(16, 2)
        options = {"eps": EPS, "attacks": attacks, "checks": False}
        expected = evaluate_robustness(model, queries, **options)
        found = evaluate_robustness(model, queries, queries, own=range(16), **options)
        assert same_report(found, expected, own=list(range(16)))

    @pytest.mark.parametrize("attacks", [fast(), standard(2, 1, 3, 2)], ids=["quick", "standard"])
    def test_some_of_them(self, attacks):
        """Of those that are not in the gallery, none is left out: they find their duplicate, which is right."""
        model, (images, labels) = self.model(), split(16, 2)
        own = [row if row < 8 else -1 for row in range(16)]
        report = evaluate_robustness(
            model, (images, labels), (images, labels), own=own, eps=1e-6, attacks=attacks, checks=False
        )
        alone = evaluate_robustness(model, (images, labels), eps=1e-6, attacks=attacks, checks=False)
        assert report.clean_flags == alone.clean_flags[:8] + "1" * 8
        assert "0" in alone.clean_flags[:8]
        right = torch.tensor([3 / 15] * 8 + [4 / 16] * 8)
        assert report.chance == pytest.approx(right.mean().item())

    def test_some_of_them_seen_as_by_a_classifier(self):
        embeddings = nn.functional.normalize(torch.randn(6, 3), dim=1)
        gallery = Gallery(embeddings, torch.tensor([0, 0, 1, 1, 2, 2]))
        own = [1, -1, 3]
        queries = embeddings[[1, 0, 3]]
        classifier = RetrievalClassifier(
            lambda rows: rows, gallery, queries, Targets(torch.tensor([0, 0, 1]), torch.tensor(own)), "L2"
        )
        logits = [
            classifier.scale
            * max(float(query @ embeddings[j]) for j in range(6) if j != own[row] and gallery.labels[j] == label)
            for row, query in enumerate(queries)
            for label in range(3)
        ]
        torch.testing.assert_close(classifier(queries).flatten(), torch.tensor(logits))

    def test_embeddings_that_are_known_are_taken(self):
        model, queries, gallery = self.model(), split(16, 2), split(20, 1)
        options = {"eps": EPS, "attacks": fast(), "checks": False}
        with torch.no_grad():
            embeddings = model(gallery[0])
        expected = evaluate_robustness(model, queries, gallery, **options)
        found = evaluate_robustness(model, queries, gallery, gallery_embeddings=embeddings, **options)
        assert same_report(found, expected)
        vectors = (None, gallery[1])
        turned = evaluate_robustness(model, queries, vectors, gallery_embeddings=-embeddings, **options)
        assert turned.clean != expected.clean

    @pytest.mark.parametrize(
        "own", [range(15), [0.5] * 16, [True] * 16, [20] * 16, [-2] * 16], ids=["few", "halves", "marks", "high", "low"]
    )
    def test_wrong_indices(self, own):
        with pytest.raises(InputError, match=r"own (is|holds) .*expected.* (whole numbers|for each of 16 queries)"):
            evaluate_robustness(self.model(), split(16, 2), split(20, 1), own=own, eps=EPS, attacks=fast())

    def test_a_run_that_was_cut_off_goes_on_with_the_same_gallery_only(self, tmp_path):
        model, queries, other = self.model(), split(16, 2), split(20, 1)
        gallery = tuple(torch.cat(parts) for parts in zip(queries, other, strict=True))
        options = {"eps": EPS, "attacks": fast(), "resume": tmp_path}
        first = evaluate_robustness(model, queries, gallery, own=range(16), **options)
        assert same_report(evaluate_robustness(model, queries, gallery, own=range(16), **options), first)
        with pytest.raises(InputError, match="another evaluation"):
            evaluate_robustness(model, queries, (gallery[0].flip(0), gallery[1]), own=range(16), **options)
        with pytest.raises(InputError, match="another evaluation"):
            evaluate_robustness(model, queries, gallery, **options)

    def test_without_a_gallery(self):
        with pytest.raises(InputError, match="together with a gallery"):
            evaluate_robustness(self.model(), split(16, 2), own=range(16), eps=EPS, attacks=fast())

    def test_embeddings_of_another_number(self):
        with pytest.raises(InputError, match="3 embeddings for 20 items"):
            evaluate_robustness(
                self.model(), split(16, 2), split(20, 1), gallery_embeddings=torch.rand(3, 3), eps=EPS, attacks=fast()
            )


class TwoPixels(nn.Module):
    """Looks at one of two pixels: the first tells the class to most, by much; the second to all, by little."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("aside", torch.tensor([0.4]))

    def forward(self, images):
        seen = ((images.flatten(1) - 0.5) * self.weight).sum(1, keepdim=True)
        return torch.cat([seen, self.aside.expand_as(seen)], 1)


WEIGHTS = {1: (1.0, 0.0), 2: (0.0, 20.0), 3: (0.02, 0.2), 4: (0.0, 20.0), 5: (1.0, 0.0)}


def two_pixels():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(40) % 2
    side = 2.0 * labels - 1
    much = torch.where(torch.arange(40) < 4, -side, side)  # misleads in four images of forty
    pixels = torch.stack([0.5 + 0.3 * much, 0.5 + 0.02 * side], 1)
    noise = torch.rand(40, 2, generator=generator) * torch.tensor([0.1, 0.01])
    return TensorDataset((pixels + noise).reshape(40, 1, 1, 2), labels)


class Training:
    """A trainer of PML with its logging, in which weights are set by hand before each epoch is tested."""

    def __init__(self, folder, metric, patience=None, wrap=True, epochs=5, **options):
        self.keeper, self.writer, _ = logging_presets.get_record_keeper(str(folder / "csv"))
        self.hooks = logging_presets.get_hook_container(self.keeper, primary_metric=metric)
        self.models = {"trunk": TwoPixels(), "embedder": nn.Identity()}
        tester = plain(end_of_testing_hook=self.hooks.end_of_testing_hook, **options.pop("of_tester", {}))
        self.tester = AdversarialTester(tester, eps=0.05, attacks=fast(), **options) if wrap else tester
        self.folder, self.reports = folder, []
        data = two_pixels()
        end_of_epoch = self.hooks.end_of_epoch_hook(
            self.tester, {"val": data, "train": data}, str(folder / "models"), patience=patience
        )

        def set_weights_and_test(trainer):
            with torch.no_grad():
                self.models["trunk"].weight.copy_(torch.tensor(WEIGHTS[trainer.epoch]))
            going_on = end_of_epoch(trainer)
            self.reports.append(self.tester.reports["val"] if wrap else None)
            return going_on

        self.trainer = MetricLossOnly(
            self.models,
            {"trunk_optimizer": torch.optim.SGD(self.models["trunk"].parameters(), lr=0.1)},
            8,
            {"metric_loss": losses.TripletMarginLoss()},
            data,
            iterations_per_epoch=1,
            data_device="cpu",
            dataloader_num_workers=0,
            end_of_iteration_hook=self.hooks.end_of_iteration_hook,
            end_of_epoch_hook=set_weights_and_test,
        )
        self.trainer.train(num_epochs=epochs)

    def best_epoch(self):
        return self.hooks.get_best_epoch_and_accuracy(self.tester, "val")[0]

    def saved(self):
        return sorted(path.name for path in (self.folder / "models").glob("trunk_best*"))

    def table(self, split="val"):
        name = self.hooks.record_group_name(self.tester, split)
        return name, self.writer.query(f"SELECT * FROM {name} ORDER BY epoch", return_dict=True)


@pytest.fixture(scope="module")
def robust(tmp_path_factory):
    torch.manual_seed(0)
    return Training(tmp_path_factory.mktemp("robust"), "worst_case_recall_at_1")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    torch.manual_seed(0)
    return Training(tmp_path_factory.mktemp("bare"), "precision_at_1", wrap=False)


class TestInTrainer:
    def test_another_epoch_is_best(self, robust, bare):
        assert (robust.best_epoch(), robust.saved()) == (1, ["trunk_best1.pth"])
        assert (bare.best_epoch(), bare.saved()) == (2, ["trunk_best2.pth"])
        for training, epoch in ((robust, 1), (bare, 2)):
            saved = torch.load(training.folder / "models" / f"trunk_best{epoch}.pth", weights_only=True)
            assert saved["weight"].tolist() == pytest.approx(WEIGHTS[epoch])

    def test_because_what_is_best_without_attack_does_not_stand_one(self, robust):
        _, found = robust.table()
        clean, attacked = found["clean_recall_at_1_level0"], found["worst_case_recall_at_1_level0"]
        assert clean == pytest.approx(found["precision_at_1_level0"])
        assert 0.7 < clean[0] < clean[1] == 1
        assert attacked[1] == 0 < 0.4 < attacked[0]

    def test_every_epoch_is_in_the_database(self, robust):
        _, found = robust.table()
        assert found["epoch"] == [1, 2, 3, 4, 5]
        for name in robust.tester.metrics:
            assert f"{name}_level0" in found
        assert found["worst_case_map_at_r_level0"] == [report.worst_case(0.05, "map_at_r") for report in robust.reports]
        assert found["best_epoch"] == [1] * 5
        assert found["best_accuracy"] == found["worst_case_recall_at_1_level0"][:1] * 5

    def test_and_in_the_csv(self, robust):
        name, found = robust.table()
        with (robust.folder / "csv" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        column = [float(row["shift_recall_at_1_level0"]) for row in rows]
        assert column == found["shift_recall_at_1_level0"]

    def test_own_numbers_are_the_same_in_a_table_of_its_own(self, robust, bare):
        (name, found), (bare_name, expected) = robust.table(), bare.table()
        assert name == bare_name.replace("_VAL_vs_self", "_attacked_VAL_vs_self") != bare_name
        for column in calculator_keys():
            assert found[column] == expected[column]

    def test_training_goes_the_same_way(self, robust, bare):
        assert robust.hooks.get_loss_history() == bare.hooks.get_loss_history() != {}

    def test_stops_when_the_robust_metric_no_longer_rises(self, tmp_path):
        stopped = Training(tmp_path / "robust", "worst_case_recall_at_1", patience=1, splits=["val"])
        assert stopped.trainer.epoch == 3
        stopped = Training(tmp_path / "clean", "clean_recall_at_1", patience=1, splits=["val"])
        assert stopped.trainer.epoch == 4

    def test_the_other_split_need_not_be_attacked(self, tmp_path):
        training = Training(tmp_path, "worst_case_recall_at_1", splits=["val"], epochs=3)
        assert (training.best_epoch(), training.saved()) == (1, ["trunk_best1.pth"])
        assert training.table("train")[1]["worst_case_recall_at_1_level0"] == [None] * 3  # nan, as SQLite keeps it
        assert training.table("train")[1]["precision_at_1_level0"] == training.table()[1]["precision_at_1_level0"]

    def test_an_experiment_that_began_without_attacks_goes_on(self, tmp_path):
        Training(tmp_path, "precision_at_1", wrap=False, epochs=1)
        training = Training(tmp_path, "worst_case_recall_at_1", epochs=2)
        assert training.table()[1]["epoch"] == [1, 2]
        assert training.best_epoch() == 1

    def test_every_level_counts(self, tmp_path):
        training = Training(tmp_path, "worst_case_recall_at_1", of_tester={"label_hierarchy_level": "all"}, epochs=2)
        assert training.best_epoch() == 1

    @pytest.mark.parametrize(
        "metric", ["worst_case_recall_at_1_eps_0_01", "margin_map_at_r", "shift_r_precision_eps_0_01"]
    )
    def test_any_metric_can_be_primary(self, tmp_path, metric):
        keeper, _, _ = logging_presets.get_record_keeper(str(tmp_path))
        hooks = logging_presets.get_hook_container(keeper, primary_metric=metric, validation_split_name="val")
        tester = AdversarialTester(
            plain(end_of_testing_hook=hooks.end_of_testing_hook), eps=(0.05, 0.01), attacks=fast()
        )
        assert callable(hooks.end_of_epoch_hook(tester, {}, str(tmp_path)))
        model, history = TwoPixels(), []
        for epoch in (1, 2):
            model.weight.data = torch.tensor(WEIGHTS[3 - epoch])
            found = tester.test({"val": two_pixels()}, epoch, model)["val"]
            keeper.save_records()
            history.append(found[f"{metric}_level0"])
        assert hooks.get_accuracy_history(tester, "val")[f"{metric}_level0"] == history
        assert hooks.get_best_epoch_and_accuracy(tester, "val") == (history.index(max(history)) + 1, max(history))
        assert history[0] != history[1]

    def test_a_metric_that_is_none_is_refused(self, tmp_path):
        hooks = logging_presets.HookContainer(None, primary_metric="worst_case")
        with pytest.raises(ValueError, match="worst_case_recall_at_1"):
            hooks.end_of_epoch_hook(wrapped(), {}, str(tmp_path))


def test_the_margin_attack_is_what_breaks(data, trunk, embedder):
    """A query that stands without attack and fails under it is shown as perturbed within the budget."""
    tester = wrapped(attacks=[QueryAttack("margin", gradient_attack(margin_score, 8))])
    tester.test(data, 3, trunk, embedder)
    examples = tester.reports["val"].examples
    images, labels = data["val"].tensors
    broken = [example for example in examples if example.attack == "margin"]
    assert broken
    for example in broken:
        assert torch.equal(example.clean, images[example.query])
        assert example.label == labels[example.query]
        assert (example.perturbed - example.clean).abs().max() <= EPS + 1e-6
