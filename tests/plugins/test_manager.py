import copy
import importlib
import io
from importlib.metadata import EntryPoint

import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from seed_paper import seed_paper_loss

from pml_adversarial import AdversarialLoss, AdversarialMiner, AttackError, PluginError, hookimpl
from pml_adversarial.plugins.manager import find, make_manager
from pml_adversarial.training.plan import replace_rows

plugins_module = importlib.import_module("pml_adversarial.plugins.manager")


class Recorder:
    """Records one number under a name."""

    def __init__(self, value=1.0, name="recorded"):
        self.value, self.name = value, name

    @hookimpl
    def pml_adversarial_record(self):
        return {self.name: self.value}


class Silent:
    """Has no opinion on anything and remembers what it was asked."""

    has_opinions = False

    def __init__(self, asked=None, name="silent"):
        self.asked, self.name = [] if asked is None else asked, name

    def note(self, question):
        self.asked.append((self.name, question))

    @hookimpl
    def pml_adversarial_plan(self):
        self.note("plan")

    @hookimpl
    def pml_adversarial_score(self):
        self.note("score")

    @hookimpl
    def pml_adversarial_attack(self):
        self.note("attack")

    @hookimpl
    def pml_adversarial_training_loss(self):
        self.note("training_loss")

    @hookimpl
    def pml_adversarial_record(self):
        self.note("record")


class Counter:
    """Counts steps, in its state."""

    def __init__(self):
        self.steps = 0

    @hookimpl
    def pml_adversarial_record(self):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class NoHook:
    def pml_adversarial_score(self):
        """Is not marked."""


class MisspeltHook:
    @hookimpl
    def pml_adversarial_scores(self):
        """Nobody asks this."""


class MisspeltArgument:
    @hookimpl
    def pml_adversarial_score(self, wraped):
        """The question has no such argument."""


@pytest.fixture
def installed(monkeypatch):
    """Plays installed distributions with the given entry points, name -> value."""

    def install(**values):
        entries = [EntryPoint(name, value, "pml_adversarial") for name, value in values.items()]
        monkeypatch.setattr(plugins_module, "entry_points", lambda group: entries if group == "pml_adversarial" else [])

    return install


def here(name):
    return f"{__name__}:{name}"


class TestFind:
    def test_an_object_is_itself(self):
        plugin = Recorder()
        assert find(plugin) is plugin

    def test_a_class_is_made_an_object(self):
        assert isinstance(find(Recorder), Recorder)

    def test_a_name_is_looked_up(self, installed):
        installed(other=here("Counter"), recorder=here("Recorder"))
        assert type(find("recorder")).__name__ == "Recorder"
        assert not isinstance(find("recorder"), type)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("recoder", r"No plugin named 'recoder'.*found \['counter', 'recorder'\].*Did you mean 'recorder'\?"),
            ("RECORDER", r"No plugin named 'RECORDER'.*Did you mean 'recorder'\?"),
            ("act", r"No plugin named 'act' is installed; found \['counter', 'recorder'\]\. Install"),
        ],
    )
    def test_an_unknown_name(self, installed, name, message):
        installed(recorder=here("Recorder"), counter=here("Counter"))
        with pytest.raises(PluginError, match=message):
            find(name)

    def test_nothing_is_installed(self, installed):
        installed()
        with pytest.raises(PluginError, match="found none"):
            find("act")

    @pytest.mark.parametrize("value", ["no_such_module_of_anybody:Plugin", here("NoSuchPlugin")])
    def test_a_plugin_that_cannot_be_loaded(self, installed, value):
        installed(broken=value)
        with pytest.raises(PluginError, match=r"'broken' .* cannot be loaded: .*[Nn]o"):
            find("broken")

    def test_is_a_value_error(self, installed):
        installed()
        with pytest.raises(ValueError, match="No plugin named"):
            find("act")

    def test_installed_plugins_act_only_when_named(self, installed, model):
        installed(recorder=here("Recorder"))
        loss_func = seed_paper_loss(TripletMarginLoss(), model)
        assert [type(plugin).__name__ for plugin in loss_func.adversary.hooks.plugins] == ["FixedContext"]


class TestRefusals:
    def test_no_hook(self):
        with pytest.raises(PluginError, match=r"NoHook answers no hook.*hookimpl.*pml_adversarial_score"):
            make_manager([NoHook()])

    def test_misspelt_hook(self):
        with pytest.raises(PluginError, match=r"pml_adversarial_scores.*Hooks are.*pml_adversarial_score,"):
            make_manager([MisspeltHook()])

    def test_misspelt_argument(self):
        with pytest.raises(PluginError, match="wraped"):
            make_manager([MisspeltArgument()])

    def test_the_same_object_twice(self):
        plugin = Recorder()
        with pytest.raises(PluginError, match="among the plugins twice"):
            make_manager([plugin, Silent(), plugin])

    @pytest.mark.parametrize("wrap", [AdversarialLoss, AdversarialMiner])
    def test_at_the_wrapper(self, model, wrap):
        wrapped = TripletMarginLoss() if wrap is AdversarialLoss else BatchHardMiner()
        with pytest.raises(PluginError, match="answers no hook"):
            wrap(wrapped, model, plugins=[NoHook])


def step(model, images, labels, *plugins, **options):
    loss_func = seed_paper_loss(TripletMarginLoss(), model, plugins=plugins, seed=0, **options)
    return loss_func, loss_func(model(images), labels)


class TestOrder:
    def test_the_first_given_is_asked_first(self, model, images, labels):
        asked = []
        step(model, images, labels, Silent(asked, "first"), Silent(asked, "second"))
        for question in ("plan", "score", "attack", "training_loss", "record"):
            who = [name for name, what in asked if what == question]
            assert who[:2] == ["first", "second"]

    def test_the_first_record_of_a_name_counts(self, model, images, labels):
        loss_func, _ = step(model, images, labels, Recorder(1.0), Recorder(2.0), Recorder(3.0, "strength"))
        assert loss_func.recorded == 1.0
        assert loss_func.strength == 3.0

    def test_the_first_answer_counts(self, model, images, labels):
        class Answers:
            def __init__(self, value):
                self.value = value

            @hookimpl
            def pml_adversarial_training_loss(self):
                return torch.tensor(self.value)

        class AnswersTwo(Answers):
            @hookimpl(wrapper=True)
            def pml_adversarial_plan(self):  # so that it counts all the same
                return (yield)

        _, loss = step(model, images, labels, Silent(), Answers(1.0), AnswersTwo(2.0))
        assert loss == 1.0

    def test_one_that_would_never_be_asked_is_refused(self, model, images, labels):
        class Answers:
            @hookimpl
            def pml_adversarial_training_loss(self):
                return torch.tensor(1.0)

        class Other(Answers):
            pass

        with pytest.raises(PluginError, match=r"Other would never be asked: Answers, which is named before it"):
            step(model, images, labels, Answers(), Silent(), Other())

    def test_what_was_refused_is_refused_again(self, model, images, labels):
        loss_func = AdversarialLoss(TripletMarginLoss(), model, plugins=["hm"], perturb="anchor")
        for _ in range(2):
            with pytest.raises(PluginError, match="so perturb would change nothing"):
                loss_func(model(images), labels)

    def test_one_without_an_opinion_leaves_it_to_the_next(self, model, images, labels):
        class None_:
            @hookimpl
            def pml_adversarial_training_loss(self):
                return None

        class Answers:
            @hookimpl
            def pml_adversarial_training_loss(self):
                return torch.tensor(1.0)

        _, loss = step(model, images, labels, None_(), Answers())
        assert loss == 1.0

    def test_no_opinion_changes_nothing(self, model, images, labels):
        _, alone = step(model, images, labels)
        _, beside = step(model, images, labels, Silent())
        assert alone == beside

    def test_by_name_class_and_object_at_once(self, installed, model, images, labels):
        installed(recorder=here("Recorder"))
        loss_func, _ = step(model, images, labels, Recorder(5.0, "mine"), "recorder", Counter)
        names = [type(plugin).__name__ for plugin in loss_func.adversary.hooks.plugins]
        assert names == ["Recorder", "Recorder", "Counter", "FixedContext"]
        assert (loss_func.mine, loss_func.recorded) == (5.0, 1.0)


class TestTwoWrappers:
    def test_do_not_influence_one_another(self, model, images, labels):
        _, expected = step(model, images, labels)
        one_plugin, other_plugin = Silent(), Recorder()
        one = seed_paper_loss(TripletMarginLoss(), model, plugins=[one_plugin], seed=0)
        other = seed_paper_loss(TripletMarginLoss(), model, plugins=[other_plugin, MovesAllBy(0.05)], seed=0)
        embeddings = model(images)
        other(embeddings, labels)
        assert one_plugin.asked == []
        assert one(embeddings, labels) == expected
        assert not hasattr(one, "recorded")
        assert other.perturbation_linf == pytest.approx(0.05)

    def test_copies_have_plugins_of_their_own(self, model, images, labels):
        plugin = Counter()
        loss_func = seed_paper_loss(TripletMarginLoss(), model, plugins=[plugin])
        copied = copy.deepcopy(loss_func)
        copied(model(images), labels)
        assert plugin.steps == 0
        assert copied.adversary.hooks.plugins[0].steps == 1


class PerturbsRows:
    def __init__(self, *rows):
        self.rows = rows

    @hookimpl
    def pml_adversarial_plan(self, batch):
        return replace_rows(torch.tensor(self.rows, dtype=torch.long), len(batch), batch.indices_tuple)


class MovesAllBy:
    def __init__(self, change):
        self.change = change

    @hookimpl
    def pml_adversarial_attack(self):
        return lambda inputs, labels: inputs + self.change


class ScoresFirstCoordinate:
    @hookimpl
    def pml_adversarial_score(self):
        return lambda embeddings: embeddings[:, 0]


class SumsEmbeddings:
    @hookimpl
    def pml_adversarial_training_loss(self, adversarial):
        self.embeddings = adversarial.embeddings
        return adversarial.embeddings.sum()


class TestEachHook:
    def test_plan(self, model, images, labels):
        loss_func, loss = step(model, images, labels, PerturbsRows(1, 4, 6))
        assert loss_func.num_perturbed == 3
        assert loss.requires_grad

    def test_plan_of_nobody(self, model, images, labels):
        loss_func, loss = step(model, images, labels, PerturbsRows())
        assert loss == TripletMarginLoss()(model(images), labels)
        assert loss_func.num_perturbed == 0

    def test_score(self, model, images, labels):
        plugin = SumsEmbeddings()
        step(model, images, labels, ScoresFirstCoordinate(), plugin, PerturbsRows(*range(8)))
        assert (plugin.embeddings[:, 0] > model(images)[:, 0]).all()

    def test_attack(self, model, images, labels):
        loss_func, _ = step(model, images, labels, MovesAllBy(0.05))
        assert loss_func.perturbation_linf == pytest.approx(0.05)
        assert loss_func.perturbation_l2 == pytest.approx(0.05 * 36**0.5)

    def test_training_loss(self, model, images, labels):
        plugin = SumsEmbeddings()
        _, loss = step(model, images, labels, plugin)
        assert loss == plugin.embeddings.sum()
        loss.backward()
        assert model[3].bias.grad.tolist() == [len(plugin.embeddings)] * 4

    def test_record(self, model, images, labels):
        loss_func, _ = step(model, images, labels, Recorder(torch.tensor(2.5)))
        assert loss_func.recorded == 2.5
        assert isinstance(loss_func.recorded, float)
        assert "recorded" in loss_func._record_these

    def test_in_a_miner(self, model, images, labels):
        miner = AdversarialMiner(
            BatchHardMiner(), model, plugins=[PerturbsRows(2, 3), MovesAllBy(0.05), Recorder(), Silent()]
        )
        anchors, _, _ = miner(model(images), labels)
        assert anchors.tolist() == list(range(8))
        assert miner.num_perturbed == 2
        assert miner.perturbation_linf == pytest.approx(0.05)
        assert miner.recorded == 1.0
        asked = {question for _, question in miner.adversary.hooks.plugins[3].asked}
        assert asked == {"score", "record"}  # the plan and the attack were answered before; no loss is taken


class TestWrongAnswers:
    @pytest.mark.parametrize(
        ("question", "expected"),
        [
            ("plan", "Plan"),
            ("score", "Callable"),
            ("attack", "Callable"),
            ("training_loss", "Tensor"),
            ("record", "Mapping"),
        ],
    )
    def test_of_another_type(self, question, expected, model, images, labels):
        answers = type("Answers", (), {f"pml_adversarial_{question}": hookimpl(lambda self: 3)})
        with pytest.raises(PluginError, match=f"pml_adversarial_{question} with int; expected {expected}"):
            step(model, images, labels, answers())

    @pytest.mark.parametrize("answer", [None, "high", 1.0])
    def test_scores_that_are_no_tensors(self, answer, model, images, labels):
        answers = type("Answers", (), {"pml_adversarial_score": hookimpl(lambda self: lambda embeddings: answer)})
        with pytest.raises(AttackError, match=f"A score {type(answer).__name__} was given"):
            step(model, images, labels, answers())

    @pytest.mark.parametrize(("name", "value"), [("several", torch.rand(3)), (3, 1.0), ("turned", torch.tensor(1j))])
    def test_records(self, name, value, model, images, labels):
        with pytest.raises(PluginError, match=rf"records \[{name!r}\]; expected names with numbers"):
            step(model, images, labels, Recorder(value, name))


class TestState:
    def build(self, model, *plugins):
        return seed_paper_loss(TripletMarginLoss(), model, plugins=plugins, seed=3)

    def test_round_trip(self, model, images, labels):
        saved = self.build(model, Silent(), Counter())
        for _ in range(3):
            saved(model(images), labels)
        file = io.BytesIO()
        torch.save(saved.state_dict(), file)
        file.seek(0)
        loaded = self.build(model, Silent(), Counter())
        loaded.load_state_dict(torch.load(file, weights_only=True))
        assert loaded.adversary.hooks.plugins[1].steps == 3
        assert loaded.adversary.step == 3
        assert loaded(model(images), labels) == saved(model(images), labels)

    @pytest.mark.parametrize("others", [[], [Counter, Counter], [Silent, Counter]])
    def test_of_other_plugins_is_refused(self, model, others):
        state = self.build(model, Counter()).state_dict()
        with pytest.raises(PluginError, match="0_Counter"):
            self.build(model, *others).load_state_dict(state)

    def test_half_a_protocol_is_no_state(self, model):
        class SavesOnly(Recorder):
            def state_dict(self):
                return {}

        assert self.build(model, SavesOnly).adversary.state_dict()["plugins"] == {}


def test_a_class_that_needs_arguments():
    class Needy:
        def __init__(self, weight):
            self.weight = weight

    with pytest.raises(PluginError, match=r"Needy.*pass an object"):
        find(Needy)
