"""What options of the command line say: classes with options, radii, devices."""

from types import SimpleNamespace

import click
import pytest
import torchattacks
from pytorch_metric_learning import losses, miners
from torch import nn
from torchattacks.attack import Attack

from pml_adversarial.cli.options import check_device, did_you_mean, parse_call, parse_class, parse_radii, try_option


def refusal(call, *arguments, **options):
    """What the user reads."""
    with pytest.raises(click.BadParameter) as refused:
        call(*arguments, **options)
    return refused.value.format_message()


class TestParseCall:
    @pytest.mark.parametrize(
        ("text", "name", "options"),
        [
            ("PGD", "PGD", {}),
            ("PGD:", "PGD", {}),
            ("PGD:steps=5", "PGD", {"steps": 5}),
            ("PGD: steps = 5 , eps = 1e-2", "PGD", {"steps": 5, "eps": 0.01}),
            ("A:x=-1,y=None,z=[1, 2],w='a:b,c=d'", "A", {"x": -1, "y": None, "z": [1, 2], "w": "a:b,c=d"}),
        ],
    )
    def test_name_and_options(self, text, name, options):
        assert parse_call(text) == (name, options)

    @pytest.mark.parametrize(
        "text",
        [
            "A:x",
            "A:1",
            "A:x=1 y=2",
            "A:x=a.b",
            "A:x=1+y",
            "A:x=f(1)",
            "A:*x",
            "A:x=1)+f(y=2",
            "A:x=(",
            "A:x=\0",
            "A:x={[]:1}",
            "A:**{'x':1}",
            "A:x=1,x=2",
        ],
    )
    def test_anything_else_cannot_be_read(self, text):
        said = refusal(parse_call, text)
        assert said.startswith(f"Invalid value: {text!r} cannot be read; expected Name or Name:key=value,key=value")
        assert "for example TripletMarginLoss:margin=0.2" in said


def test_options_are_literals_not_code():
    assert parse_call("A:x=1.5,y=(2, 'b'),z=word,t=True") == ("A", {"x": 1.5, "y": (2, "b"), "z": "word", "t": True})
    with pytest.raises(Exception, match="cannot be read"):
        parse_call("A:x=__import__('os').getcwd()")


class TestParseClass:
    def test_makes_what_the_text_says(self):
        make = parse_class(losses, nn.Module, "TripletMarginLoss:margin=0.3,swap=True", "loss")
        one, other = make(), make()
        assert one is not other
        assert type(one) is losses.TripletMarginLoss
        assert (one.margin, one.swap) == (0.3, True)

    def test_words_are_text(self):
        make = parse_class(miners, nn.Module, "BatchEasyHardMiner:pos_strategy=easy,neg_strategy=hard", "miner")
        assert (make().pos_strategy, make().neg_strategy) == ("easy", "hard")

    def test_what_is_filled_in_is_for_those_who_take_it_and_do_not_say_otherwise(self):
        filled = {"eps": 0.1, "alpha": 0.03, "num_classes": 5}
        assert parse_class(torchattacks, Attack, "PGD:eps=0.2", "attack", **filled).keywords == {
            "eps": 0.2,
            "alpha": 0.03,
        }
        assert parse_class(torchattacks, Attack, "DeepFool:steps=2", "attack", **filled).keywords == {"steps": 2}
        assert parse_class(losses, nn.Module, "ArcFaceLoss:embedding_size=8", "loss", **filled)().num_classes == 5

    def test_an_unknown_name_is_answered_with_the_known_ones(self):
        module = SimpleNamespace(
            First=type("First", (nn.Module,), {}),
            Second=type("Second", (nn.Module,), {}),
            BaseFirst=type("BaseFirst", (nn.Module,), {}),
            GenericFirst=type("GenericFirst", (nn.Module,), {}),
            Other=type("Other", (), {}),
            first=nn.Flatten(),
        )
        for name in ("Frist", "BaseFirst", "GenericFirst"):
            said = refusal(parse_class, module, nn.Module, f"{name}:x=1", "thing")
            assert said == f"Invalid value: no thing named {name!r}. Did you mean First? There are: First, Second."
        for name in ("", "Other", "first"):
            said = refusal(parse_class, module, nn.Module, name, "thing")
            assert f"no thing named {name!r}." in said
            assert said.endswith("There are: First, Second.")

    def test_unknown_options_are_answered_with_the_known_ones(self):
        said = refusal(parse_class, torchattacks, Attack, "PGD:stepz=3,epz=1", "attack")
        assert "PGD takes no epz, stepz; it is (model, eps=" in said

    def test_a_class_that_takes_any_option_is_given_any(self):
        class Any(nn.Module):
            def __init__(self, **options):
                super().__init__()
                self.options = options

        make = parse_class(SimpleNamespace(Any=Any), nn.Module, "Any:x=1", "thing", y=2)
        assert make().options == {"x": 1}  # what is filled in has to be taken by name


@pytest.mark.parametrize(
    ("name", "known", "sentence"),
    [
        ("PDG", ["FGSM", "PGD"], " Did you mean PGD?"),
        ("TripletLoss", {"TripletMarginLoss": 1, "ContrastiveLoss": 2}, " Did you mean TripletMarginLoss?"),
        ("xyz", ["FGSM", "PGD"], ""),
        ("PGD", [], ""),
    ],
)
def test_the_most_similar_name_is_offered(name, known, sentence):
    assert did_you_mean(name, known) == sentence


class TestParseRadii:
    @pytest.mark.parametrize(
        ("text", "radii"),
        [
            ("0.1", (0.1,)),
            ("8/255", (8 / 255,)),
            (" 0.2 , 1/10,5e-2 ", (0.05, 0.1, 0.2)),
            ("0.1,0.1,1/10", (0.1,)),
            ("1", (1.0,)),
        ],
    )
    def test_are_numbers_or_fractions_in_order(self, text, radii):
        assert parse_radii(text) == radii

    def test_depend_on_the_norm(self):
        assert parse_radii("3,0.5", "L2") == (0.5, 3.0)
        assert refusal(parse_radii, "3,0.5").startswith("Invalid value for --eps: eps=3 is wider than all pixels")

    @pytest.mark.parametrize("text", ["", "a", "0.1,", "0.1;0.2", "1/0", "nan", "inf", "1e400", "0x1"])
    def test_what_is_no_number(self, text):
        expected = f"Invalid value for --eps: {text!r}; expected numbers with commas, such as 0.05,0.1 or 8/255"
        assert refusal(parse_radii, text) == expected

    @pytest.mark.parametrize("text", ["0", "-0.1", "0.1,0", "1e-400"])
    def test_what_is_no_radius(self, text):
        assert "expected one or more radii above 0" in refusal(parse_radii, text)


def test_a_device_that_can_be_used_is_itself():
    assert check_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta"])
def test_a_device_that_cannot_be_used_is_refused_in_one_line(name):
    said = refusal(check_device, name)
    assert said.startswith("Invalid value for --device: ")
    assert "\n" not in said


def test_an_option_that_can_be_made_is_what_was_made():
    made = object()
    assert try_option(lambda: made, "--loss") is made


def test_of_an_error_of_many_lines_the_first_is_shown():
    def fail():
        raise RuntimeError("no such device\nCUDA kernel errors might be ...")

    with pytest.raises(click.BadParameter) as refused:
        try_option(fail, "--device")
    assert refused.value.format_message() == "Invalid value for --device: no such device"
