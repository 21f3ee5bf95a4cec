import math

import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from seed_paper import seed_paper_loss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import TensorDataset

from pml_adversarial import AdversarialMiner, PluginError, hookimpl
from pml_adversarial.attacks.presets import SEED_PAPER
from pml_adversarial.training.records import OF_LOSSES, STANDARD, LossRecords, Records, clear, declare, write

EPS = 0.01


ALL = (*STANDARD, *OF_LOSSES)


class Nan:
    """Equals NaN alone."""

    def __eq__(self, other):
        return isinstance(other, float) and math.isnan(other)

    __hash__ = None


NAN = Nan()


def recorded(module):
    return {name: getattr(module, name) for name in module._record_these}


class TestWrite:
    def test_declared_names_start_at_nan(self):
        module = ModuleWithRecords()
        declare(module, ["one", "two"])
        assert recorded(module) == {"one": NAN, "two": NAN}

    def test_declaring_again_keeps_the_value(self):
        module = ModuleWithRecords()
        declare(module, ["one"])
        module.one = 5
        declare(module, ["one", "two"])
        assert recorded(module) == {"one": 5, "two": NAN}

    def test_refuses_what_is_no_number(self):
        for value in ("text", [1.0], torch.ones(2), None):
            with pytest.raises(PluginError, match="expected names with numbers"):
                write(ModuleWithRecords(), [{"name": value}])

    def test_values_become_python_numbers(self):
        module = ModuleWithRecords()
        write(module, [{"tensor": torch.tensor(0.5, requires_grad=True), "count": torch.tensor(3)}, {"plain": 2}])
        assert recorded(module) == {"tensor": 0.5, "count": 3.0, "plain": 2}
        assert not any(isinstance(value, torch.Tensor) for value in recorded(module).values())

    def test_doubles_keep_their_precision(self):
        module = ModuleWithRecords()
        write(module, [{"third": torch.tensor(1 / 3, dtype=torch.float64), "single": torch.tensor(0.1)}])
        assert module.third == 1 / 3

    @pytest.mark.parametrize("shape", [(1,), (1, 1)])
    def test_tensors_of_one_element_have_any_shape(self, shape):
        module = ModuleWithRecords()
        write(module, [{"shaped": torch.full(shape, 2.0), "scalar": torch.tensor(3.0)}])
        assert recorded(module) == {"shaped": 2.0, "scalar": 3.0}

    def test_the_first_value_of_a_name_counts(self):
        module = ModuleWithRecords()
        write(module, [{"name": torch.tensor(1.0)}, {"name": 2.0}])
        assert module.name == 1.0

    def test_names_are_declared_once(self):
        module = ModuleWithRecords()
        for value in (1, 2):
            write(module, [{"name": value}])
        assert module._record_these == ["name"]

    def test_no_answers(self):
        module = ModuleWithRecords()
        write(module, [])
        write(module, [{}])
        assert not hasattr(module, "_record_these") or module._record_these == []

    def test_clear_leaves_counts_and_the_strength(self):
        module = ModuleWithRecords()
        write(module, [{**dict.fromkeys(ALL, 7.0), "of_a_plugin": 8}])
        clear(module, strength=0.25)
        expected = {**dict.fromkeys((*ALL, "of_a_plugin"), NAN), **NOBODY, "strength": 0.25}
        assert recorded(module) == expected

    def test_clear_adds_no_names(self):
        module = ModuleWithRecords()
        declare(module, STANDARD)
        clear(module, strength=1.0)
        assert set(recorded(module)) == set(STANDARD)


NOBODY = {"num_perturbed": 0, "attack_seconds": 0}
"""What is known of a step in which no row is perturbed, besides the strength."""


class TestRecords:
    def test_is_a_mapping_of_all_numbers(self):
        found = LossRecords(strength=0.5, loss_after=2.0, of_plugins={"gain": 3.0})
        assert dict(found) == {**dict.fromkeys(ALL, NAN), "strength": 0.5, "loss_after": 2.0, "gain": 3.0}
        assert len(found) == len(ALL) + 1
        assert found["gain"] == 3.0
        with pytest.raises(KeyError):
            found["of_plugins"]
        with pytest.raises(KeyError):
            found["names"]

    def test_is_frozen(self):
        with pytest.raises(AttributeError):
            Records().strength = 1.0

    def test_of_a_miner_has_no_losses(self):
        assert not hasattr(Records(), "loss_before")
        assert set(Records()) == set(STANDARD)

    def test_reads_the_last_step(self, model, images, labels):
        loss_func = seed_paper_loss(TripletMarginLoss(), model, plugins=[RecordsStep()])
        before = loss_func.records
        loss_func(model(images), labels)
        found = loss_func.records
        assert dict(found) == recorded(loss_func)
        assert found.of_plugins == {"steps_seen": 1}
        assert set(before) == set(ALL)
        assert all(math.isnan(value) for value in before.values())  # what was read does not change


class Remembers:
    """Keeps what the record hook is given."""

    @hookimpl
    def pml_adversarial_record(self, batch, plan, adversarial):
        self.batch, self.plan, self.adversarial = batch, plan, adversarial


def check_moves(module, seen):
    """The standard records, recomputed row by row."""
    changes = [
        (seen.adversarial.inputs[m] - seen.batch.inputs[row]).flatten() for m, row in enumerate(seen.plan.rows.tolist())
    ]
    shifts = [
        (seen.adversarial.embeddings[m] - seen.batch.embeddings[row]).norm().item()
        for m, row in enumerate(seen.plan.rows.tolist())
    ]
    rose = [b < a for b, a in zip(seen.adversarial.score_before, seen.adversarial.score_after, strict=True)]
    assert module.num_perturbed == len(changes)
    assert module.perturbation_linf == pytest.approx(max(change.abs().max().item() for change in changes))
    assert module.perturbation_l2 == pytest.approx(sum(c.norm().item() for c in changes) / len(changes))
    assert module.embedding_shift == pytest.approx(sum(shifts) / len(shifts))
    assert module.share_score_rose == pytest.approx(sum(rose).item() / len(rose))
    assert module.share_zero_gradient == 0
    assert module.attack_seconds > 0


class TestOfLoss:
    def test_all_names_are_there_before_the_first_step(self, model):
        loss_func = seed_paper_loss(TripletMarginLoss(), model)
        assert recorded(loss_func) == dict.fromkeys(ALL, NAN)

    def test_values(self, model, images, labels):
        seen = Remembers()
        loss_func = seed_paper_loss(TripletMarginLoss(margin=1.0), model, plugins=[seen])
        loss = loss_func(model(images), labels)
        check_moves(loss_func, seen)
        assert loss_func.strength == 1.0
        assert loss_func.perturbation_linf == pytest.approx(EPS, rel=1e-4)
        assert loss_func.share_score_rose == 1.0
        assert loss_func.loss_after == pytest.approx(loss.item())
        assert loss_func.loss_before == pytest.approx(TripletMarginLoss(margin=1.0)(model(images), labels).item())
        assert loss_func.loss_after > loss_func.loss_before

    def test_loss_values_are_of_all_that_is_minimised(self, model, images, labels):
        alone = seed_paper_loss(TripletMarginLoss(margin=1.0), model, seed=1)
        alone(model(images), labels)
        loss_func = seed_paper_loss(TripletMarginLoss(margin=1.0), model, clean_weight=2.0, seed=1)
        loss = loss_func(model(images), labels)
        clean = TripletMarginLoss(margin=1.0)(model(images), labels).item()
        assert loss.item() == pytest.approx(loss_func.loss_after) == pytest.approx(alone.loss_after + 2 * clean)
        assert loss_func.loss_before == pytest.approx(3 * clean)

    def test_numbers_are_pythons(self, model, images, labels):
        loss_func = seed_paper_loss(TripletMarginLoss(), model)
        loss_func(model(images), labels)
        assert {type(value) for value in recorded(loss_func).values()} <= {int, float}

    def test_warmup(self, model, images, labels):
        loss_func = seed_paper_loss(TripletMarginLoss(), model, warmup=4)
        found = []
        for _ in range(6):
            loss_func(model(images), labels)
            found.append((loss_func.strength, loss_func.perturbation_linf))
        strengths = [0, 0.25, 0.5, 0.75, 1, 1]
        assert [strength for strength, _ in found] == strengths
        assert [linf for _, linf in found] == pytest.approx([EPS * strength for strength in strengths], rel=1e-4)

    def test_a_step_without_strength(self, model, images, labels):
        loss_func = seed_paper_loss(TripletMarginLoss(margin=1.0), model, warmup=1)
        loss = loss_func(model(images), labels)
        zeros = {*STANDARD, "attack_seconds"} - {"num_perturbed"}
        assert {name: value for name, value in recorded(loss_func).items() if name in zeros} == dict.fromkeys(zeros, 0)
        assert loss_func.num_perturbed == 8
        assert loss_func.loss_before == loss_func.loss_after == pytest.approx(loss.item())

    def test_a_step_in_which_nobody_is_perturbed(self, model, images):
        loss_func = seed_paper_loss(TripletMarginLoss(), model)
        loss_func(model(images), torch.arange(8) // 2)
        assert loss_func.num_perturbed == 8
        loss_func(model(images), torch.arange(8))
        kept = {name: value for name, value in recorded(loss_func).items() if name.startswith("batch_recall")}
        assert recorded(loss_func) == {**dict.fromkeys(ALL, NAN), **NOBODY, "strength": 1.0, **kept}
        assert kept["batch_recall"] > 0

    def test_what_was_not_looked_at_is_nan(self, model, images, labels):
        loss_func = seed_paper_loss(TripletMarginLoss(), model, warmup=10)
        loss_func(model(images), labels)
        assert 0 <= loss_func.batch_recall <= 1
        assert math.isnan(loss_func.batch_recall_attacked)  # the strength was 0

    def test_eval_mode_records_nothing(self, model, images, labels):
        loss_func = seed_paper_loss(TripletMarginLoss(), model).eval()
        loss_func(model(images), labels)
        assert recorded(loss_func) == dict.fromkeys(ALL, NAN)


class TestOfMiner:
    def test_all_names_are_there_before_the_first_step(self, model):
        miner = AdversarialMiner(BatchHardMiner(), model)
        assert {name: value for name, value in recorded(miner).items() if name in STANDARD} == dict.fromkeys(
            STANDARD, NAN
        )
        assert not set(OF_LOSSES) & set(recorded(miner))

    def test_values(self, model, images, labels):
        seen = Remembers()
        miner = AdversarialMiner(BatchHardMiner(), model, plugins=[seen])
        miner(model(images), labels)
        check_moves(miner, seen)
        assert miner.num_perturbed == 8
        assert miner.strength == 1.0

    def test_a_step_in_which_nobody_is_perturbed(self, model, images, labels):
        miner = AdversarialMiner(BatchHardMiner(), model)
        miner(model(images), labels)
        miner(model(images), torch.arange(8))
        assert dict(miner.records) == {**dict.fromkeys(STANDARD, NAN), **NOBODY, "strength": 1.0}


class RecordsStep:
    """Records the number of steps that it saw."""

    def __init__(self):
        self.steps = 0

    @hookimpl
    def pml_adversarial_record(self):
        self.steps += 1
        return {"steps_seen": self.steps}


class Run:
    """A small trainer with PML's logging, which keeps what the wrappers recorded in each iteration."""

    epochs, iterations = 2, 3

    def __init__(self, folder, name_model=True):
        models = {"trunk": nn.Sequential(nn.Flatten(), nn.Linear(36, 8)), "embedder": nn.Linear(8, 4)}
        images, labels = torch.rand(24, 1, 6, 6), torch.arange(24) % 4
        watched = models if name_model else None
        self.loss = seed_paper_loss(TripletMarginLoss(margin=1.0), watched, plugins=[RecordsStep()], warmup=2)
        self.miner = AdversarialMiner(BatchHardMiner(), watched, attack=SEED_PAPER, seed=1)
        keeper, self.writer, self.tensorboard = logging_presets.get_record_keeper(
            str(folder / "csv"), str(folder / "tensorboard")
        )
        hooks = logging_presets.get_hook_container(keeper, log_freq=1)
        self.kept = []

        def end_of_iteration(trainer):
            hooks.end_of_iteration_hook(trainer)
            self.kept.append((recorded(self.loss), recorded(self.miner)))

        MetricLossOnly(
            models,
            {f"{name}_optimizer": torch.optim.SGD(m.parameters(), lr=0.1) for name, m in models.items()},
            8,
            {"metric_loss": self.loss},
            TensorDataset(images, labels),
            mining_funcs={"tuple_miner": self.miner},
            iterations_per_epoch=self.iterations,
            data_device="cpu",
            dataloader_num_workers=0,
            end_of_iteration_hook=end_of_iteration,
            end_of_epoch_hook=lambda trainer: keeper.save_records(),
        ).train(num_epochs=self.epochs)
        self.tensorboard.close()

    def series(self, table):
        return self.writer.query(f"SELECT * FROM {table} ORDER BY [~iteration~]", return_dict=True)


@pytest.fixture(scope="module", params=[True, False], ids=["given models", "found models"])
def run(request, tmp_path_factory):
    torch.manual_seed(0)
    return Run(tmp_path_factory.mktemp("run"), request.param)


def as_in_sql(value):
    """SQLite has no NaN, and stores NULL."""
    return None if math.isnan(value) else value


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # PML formats the loss
class TestInTrainer:
    def test_every_iteration_is_in_the_database(self, run):
        assert len(run.kept) == run.epochs * run.iterations
        for table in ("metric_loss_AdversarialLoss", "tuple_miner_AdversarialMiner"):
            assert len(run.series(table)["~iteration~"]) == run.epochs * run.iterations

    @pytest.mark.parametrize("name", [*STANDARD, *OF_LOSSES, "steps_seen"])
    def test_records_of_the_loss_read_back(self, run, name):
        series = run.series("metric_loss_AdversarialLoss")[name]
        assert series == [as_in_sql(of_loss[name]) for of_loss, _ in run.kept]

    @pytest.mark.parametrize("name", STANDARD)
    def test_records_of_the_miner_read_back(self, run, name):
        series = run.series("tuple_miner_AdversarialMiner")[name]
        assert series == [of_miner[name] for _, of_miner in run.kept]

    def test_they_tell_what_happened(self, run):
        series = run.series("metric_loss_AdversarialLoss")
        assert series["strength"] == [0, 0.5, 1, 1, 1, 1]
        assert series["steps_seen"] == [1, 2, 3, 4, 5, 6]
        assert series["perturbation_linf"] == pytest.approx([0, EPS / 2, *[EPS] * 4], rel=1e-3)
        rise = [after - before for before, after in zip(series["loss_before"], series["loss_after"], strict=True)]
        assert rise[0] == 0
        assert all(change > 0 for change in rise[1:])

    def test_losses_that_were_optimised_read_back(self, run):
        series = run.series("loss_histories")
        assert series["metric_loss"] == pytest.approx(run.series("metric_loss_AdversarialLoss")["loss_after"])
        assert not any(math.isnan(value) for value in series["metric_loss"])

    def test_records_of_the_wrapped_loss_are_there(self, run):
        assert run.writer.table_exists("metric_loss_AdversarialLoss__modules_loss_TripletMarginLoss")

    def test_tensorboard_has_them_too(self, run):
        events = EventAccumulator(run.tensorboard.log_dir).Reload()
        for name, values in run.series("metric_loss_AdversarialLoss").items():
            if name in (*STANDARD, *OF_LOSSES):
                scalars = events.Scalars(f"metric_loss_AdversarialLoss/{name}")
                found = [as_in_sql(scalar.value) for scalar in scalars]
                assert found == [value if value is None else pytest.approx(value) for value in values]


class TestNames:
    @pytest.mark.parametrize("name", ["training", "loss", "forward"])
    def test_that_the_wrapper_has_for_itself_are_refused(self, name, model, images, labels):
        class Rude:
            @hookimpl
            def pml_adversarial_record(self):
                return {name: 5.0}

        with pytest.raises(PluginError, match=f"'{name}'.*expected other names"):
            seed_paper_loss(TripletMarginLoss(), model, plugins=[Rude])(model(images), labels)

    def test_of_plugins_are_cleared_too(self, model, images, labels):
        class Polite:
            @hookimpl
            def pml_adversarial_record(self):
                return {"answer": 42}

        loss_func = seed_paper_loss(TripletMarginLoss(), model, plugins=[Polite])
        loss_func(model(images), labels)
        assert loss_func.answer == 42
        loss_func(model(images), torch.zeros(8, dtype=torch.long))
        assert math.isnan(loss_func.answer)

    def test_that_the_wrapped_loss_has_are_free(self, model, images, labels):
        class Shares:
            @hookimpl
            def pml_adversarial_record(self):
                return {"margin": 5.0}

        loss_func = seed_paper_loss(TripletMarginLoss(margin=0.3), model, plugins=[Shares])
        loss_func(model(images), labels)
        assert (loss_func.records["margin"], loss_func.loss.margin) == (5.0, 0.3)
