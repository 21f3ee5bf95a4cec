"""``pml-adversarial evaluate``: what it passes on, what it writes, what it refuses."""

import json
import runpy
import sys
from dataclasses import dataclass

import numpy
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn
from torch.export import Dim

from pml_adversarial import InputError
from pml_adversarial.cli import evaluate as saved_model
from pml_adversarial.cli import main
from pml_adversarial.evaluation.reports.fingerprints import of_file
from pml_adversarial.evaluation.reports.report import Report

NETWORK = "from torch import nn\n\n\ndef make(width=4):\n    return nn.Sequential(nn.Flatten(), nn.Linear(36, width))\n"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a network's code, its weights, an exported program, and images of two and of three classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(NETWORK)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    torch.save(network.state_dict(), "weights.pt")
    generator = numpy.random.default_rng(0)
    images = generator.random((12, 6, 6))
    program = torch.export.export(network, (torch.rand(2, 1, 6, 6),), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, "model.pt2")
    numpy.savez("queries.npz", images=images, labels=numpy.arange(12) % 2)
    numpy.savez("gallery.npz", images=generator.random((6, 6, 6)), labels=numpy.arange(6) % 3)
    for row, pixels in enumerate((images * 255).astype(numpy.uint8)):
        folder = tmp_path / "photos" / f"class {row % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{row:02d}.png")
    return tmp_path


def run(*arguments, model="model.pt2", queries="queries.npz", eps="0.1"):
    given = ["--model", model, "--queries", queries, "--eps", eps, "--quiet", *arguments]
    return CliRunner().invoke(main, ["evaluate", *given])


@dataclass
class Written:
    """A report with nothing in it but where it comes from."""

    provenance: dict

    def save_json(self, path):
        path.write_text(json.dumps(self.provenance))

    def save_html(self, path):
        path.write_text("<html>")

    def __str__(self):
        return "the table"


@pytest.fixture
def asked(monkeypatch):
    """What `evaluate_robustness` is asked for, call by call."""
    calls = []

    def evaluate_robustness(model, queries, gallery=None, **options):
        calls.append({"model": model, "queries": queries, "gallery": gallery, **options})
        return Written({"time": "now"})

    monkeypatch.setattr(saved_model, "evaluate_robustness", evaluate_robustness)
    return calls


WEIGHTS = ["--network", "nets:make"]


class TestPassesOn:
    def test_defaults(self, workplace, asked):
        result = run()
        assert result.exit_code == 0, result.output
        (call,) = asked
        model, queries = call.pop("model"), call.pop("queries")
        assert model(torch.stack([image for image, _ in queries])).shape == (12, 4)
        assert queries.labels.tolist() == [0, 1] * 6
        assert call == {
            "gallery": None,
            "eps": (0.1,),
            "attacks": "standard",
            "norm": "Linf",
            "distance": "cosine",
            "own": None,
            "recall_at": (1, 2, 4, 8),
            "normalization": None,
            "subset": None,
            "nmi": False,
            "checks": True,
            "seed": 0,
            "batch_size": 128,
            "resume": None,
            "progress": False,
        }

    @pytest.mark.parametrize(
        ("arguments", "name", "value"),
        [
            (["--norm", "l2"], "norm", "L2"),
            (["--attacks", "quick"], "attacks", "quick"),
            (["--recall-at", "1,10"], "recall_at", (1, 10)),
            (["--normalization", "0.5;0.25"], "normalization", ([0.5], [0.25])),
            (["--nmi"], "nmi", True),
            (["--no-checks"], "checks", False),
            (["--seed", "3"], "seed", 3),
            (["--batch-size", "5"], "batch_size", 5),
            (["--limit", "12"], "subset", None),
        ],
    )
    def test_option(self, workplace, asked, arguments, name, value):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert asked[0][name] == value

    @pytest.mark.parametrize(
        ("norm", "text", "eps"),
        [
            ("Linf", "8/255, 2/255,2/255", (2 / 255, 8 / 255)),
            ("Linf", "1", (1,)),
            ("L2", "0.5,1e-1,3/2", (0.1, 0.5, 1.5)),
        ],
    )
    def test_eps(self, workplace, asked, norm, text, eps):
        assert run("--norm", norm, eps=text).exit_code == 0
        assert asked[0]["eps"] == eps

    def test_attacks_by_name(self, workplace, asked):
        assert run("--attacks", "shift, square,shift").exit_code == 0
        assert [attack.name for attack in asked[0]["attacks"]] == ["shift", "square"]
        assert asked[0]["attacks"][1].black_box

    def test_imagenet(self, workplace, asked):
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).state_dict(), "color.pt")
        (workplace / "color.py").write_text(NETWORK.replace("36", "108"))
        numpy.savez("color.npz", images=numpy.zeros((4, 3, 6, 6)), labels=[0, 0, 1, 1])
        arguments = ["--network", "color:make", "--normalization", "imagenet"]
        result = run(*arguments, model="color.pt", queries="color.npz")
        assert result.exit_code == 0, result.output
        assert asked[0]["normalization"] == IMAGENET

    def test_progress_unless_quiet(self, workplace, asked):
        result = CliRunner().invoke(
            main, ["evaluate", "--model", "model.pt2", "--queries", "queries.npz", "--eps", "0.1"]
        )
        assert result.exit_code == 0, result.output
        assert asked[0]["progress"] is True

    def test_folder_to_resume_from(self, workplace, asked):
        assert run("--resume", "kept").exit_code == 0
        assert str(asked[0]["resume"]) == "kept"

    def test_threads(self, workplace, asked, monkeypatch):
        found = []
        monkeypatch.setattr(torch, "set_num_threads", found.append)
        assert run().exit_code == run("--threads", "2", "--force").exit_code == 0
        assert found == [2]

    def test_limit_draws_by_the_seed_without_replacement(self, workplace, asked):
        for seed in ("1", "1", "2"):
            assert run("--limit", "5", "--seed", seed, "--force").exit_code == 0
        first, again, other = (call["subset"] for call in asked)
        assert first == again != other
        assert len(set(first)) == len(set(other)) == 5
        assert set(first) | set(other) <= set(range(12))
        assert len(asked[0]["queries"]) == 12  # all are searched

    def test_gallery_counts_the_same_classes(self, workplace, asked):
        assert run("--gallery", "gallery.npz").exit_code == 0
        queries, gallery = asked[0]["queries"], asked[0]["gallery"]
        assert queries.classes == gallery.classes == ("0", "1", "2")
        assert gallery.labels.tolist() == [0, 1, 2, 0, 1, 2]

    def test_folder_of_photos(self, workplace, asked):
        result = run("--size", "8,6", "--grayscale", queries="photos")
        assert result.exit_code == 0, result.output
        assert [image.shape for image, _ in asked[0]["queries"]] == [(1, 6, 6)] * 12
        assert asked[0]["queries"].classes == ("class 0", "class 1")

    def test_height_and_width(self, workplace, asked):
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).state_dict(), "flat.pt")
        result = run("--size", "12x3", "--grayscale", *WEIGHTS, model="flat.pt", queries="photos")
        assert result.exit_code == 0, result.output
        assert [image.shape for image, _ in asked[0]["queries"]] == [(1, 12, 3)] * 12

    def test_results_that_are_there_are_not_replaced(self, workplace, asked):
        assert run().exit_code == 0
        before = (workplace / "pml_adversarial_evaluation" / "report.json").read_text()
        again = run()
        assert again.exit_code == 2
        assert "holds report.json, report.html already; choose another folder, or replace" in again.output
        assert len(asked) == 1
        (workplace / "pml_adversarial_evaluation" / "report.html").unlink()
        assert "holds report.json already" in run().output
        assert (workplace / "pml_adversarial_evaluation" / "report.json").read_text() == before
        assert run("--force").exit_code == 0

    def test_size_of_one_number_is_both(self, workplace, asked):
        assert run("--size", "6", "--grayscale", queries="photos").exit_code == 0
        assert asked[0]["queries"][0][0].shape == (1, 6, 6)

    def test_weights_of_a_network_in_the_current_folder(self, workplace, asked):
        result = run(*WEIGHTS, model="weights.pt")
        assert result.exit_code == 0, result.output
        inputs = torch.rand(3, 1, 6, 6)
        state = torch.load("weights.pt", weights_only=True)
        expected = inputs.flatten(1) @ state["1.weight"].T + state["1.bias"]
        torch.testing.assert_close(asked[0]["model"](inputs), expected)

    def test_options_of_the_network(self, workplace, asked):
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(36, 7)).state_dict(), "wide.pt")
        assert run("--network", "nets:make:width=7", model="wide.pt").exit_code == 0
        assert asked[0]["model"](torch.rand(2, 36)).shape == (2, 7)

    def test_what_was_given_is_written_down(self, workplace, asked):
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(36, 7)).state_dict(), "wide.pt")
        network = "nets:make:width=7"
        result = run("--network", network, "--size", "8,6", "--grayscale", model="wide.pt", queries="photos")
        assert result.exit_code == 0, result.output
        written = json.loads((workplace / "pml_adversarial_evaluation" / "report.json").read_text())
        assert written["inputs"] == {
            "model": of_file("wide.pt"),
            "network": network,
            "queries": {"path": "photos"},
            "gallery": None,
            "size": "8,6",
            "grayscale": True,
        }

    def test_report_is_written_and_printed(self, workplace, asked):
        result = run("--output", "new/folder")
        assert result.output == "the table\n\nWritten to new/folder/: report.json, report.html\n"
        assert json.loads((workplace / "new" / "folder" / "report.json").read_text()) == {
            "time": "now",
            "inputs": {
                "model": of_file("model.pt2"),
                "network": None,
                "queries": of_file("queries.npz"),
                "gallery": None,
                "size": None,
                "grayscale": False,
            },
        }
        assert (workplace / "new" / "folder" / "report.html").read_text() == "<html>"


class TestEvaluates:
    @pytest.mark.parametrize(
        "model",
        [["model.pt2"], ["weights.pt", *WEIGHTS, "--no-checks", "--batch-size", "4"]],
    )
    def test_to_the_end(self, workplace, model):
        result = run(*model[1:], "--attacks", "quick", "--limit", "6", model=model[0], eps="0.02,0.2")
        assert result.exit_code == 0, result.output
        report = json.loads((workplace / "pml_adversarial_evaluation" / "report.json").read_text())
        assert (report["num_queries"], report["num_gallery"]) == (6, 12)
        page = (workplace / "pml_adversarial_evaluation" / "report.html").read_text(encoding="utf-8")
        assert page.lower().startswith("<!doctype html>")
        assert report["settings"]["eps"] == [0.02, 0.2]
        small, large = (worst["measures"]["recall_at_1"] for worst in report["worst"])
        assert large <= small <= report["clean"]["recall_at_1"]
        assert result.output.startswith(str(Report.load_json(workplace / "pml_adversarial_evaluation" / "report.json")))

    @pytest.mark.slow
    def test_exported_program_meets_the_whole_suite(self, workplace):
        found = []
        for model, arguments in (("model.pt2", []), ("weights.pt", WEIGHTS)):
            result = run(*arguments, "--limit", "4", "--output", model[:5], model=model, eps="0.05")
            assert result.exit_code == 0, result.output
            report = json.loads((workplace / model[:5] / "report.json").read_text())
            assert {attack["attack"] for attack in report["attacks"]} >= {"margin", "square", "promote"}
            found.append((report["clean_flags"], report["worst"]))
        assert found[0] == found[1]

    def test_photos_and_arrays_give_the_same(self, workplace):
        images = numpy.stack([numpy.asarray(Image.open(path)) for path in sorted(workplace.glob("photos/*/*.png"))])
        numpy.savez("bytes.npz", images=images, labels=numpy.arange(12) // 6)
        found = []
        for queries, options in (("photos", ["--grayscale"]), ("bytes.npz", [])):
            assert (
                run(*options, "--attacks", "margin", "--no-checks", "--output", queries[:5], queries=queries).exit_code
                == 0
            )
            report = json.loads((workplace / queries[:5] / "report.json").read_text())
            found.append((report["clean"], report["worst"], report["clean_flags"]))
        assert found[0] == found[1]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model", "nowhere.pt2"], "There is no file nowhere.pt2"),
            (
                ["--model", "nets.py"],
                "is Python code; expected the saved weights, and beside them what builds the network",
            ),
            (["--model", "weights.pt"], "holds weights only"),
            (["--network", "nets:make"], "is a whole model; expected no network"),
            (["--queries", "nowhere"], "There is no nowhere; expected a folder"),
            (["--queries", "nets.py"], "nets.py is no npz, which is a zip file"),
            (["--queries", "empty"], "no subfolders (0 images"),
            (["--queries", "photos/class 0"], "no subfolders (6 images"),
            (["--queries", "photos/class 0/00.png"], "is a single image; expected a folder"),
            (["--queries", "one"], "are of one class, 'a'"),
            (["--queries", "single"], "one image of each of the 2 classes"),
            (["--queries", "broken", "--grayscale"], "broken/a/1.png cannot be read as an image"),
            (["--queries", "photos"], "does not take 1 image(s) of (3, 6, 6)"),
            (["--queries", "photos", "--grayscale", "--size", "4"], "choose them with --size and --grayscale"),
            (["--queries", "unlabelled.npz"], "for 4 images; expected one integer or word per image"),
            (["--queries", "nan.npz"], "1 of 4 hold NaN"),
            (["--size", "4"], "sizes and grayscale are for folders"),
            (["--size", "4x4"], "sizes and grayscale are for folders"),
            (["--gallery", "nowhere"], "There is no nowhere"),
            (["--gallery", "strangers.npz"], "No class of the queries (0, 1) is in the gallery (8, 9)"),
            (["--gallery", "larger.npz"], "does not take 1 image(s) of (1, 7, 7)"),
            (["--network", "nets"], "expected module:callable"),
            (["--network", ":make"], "expected module:callable"),
            (["--network", "nests:make"], "nests cannot be imported: ModuleNotFoundError"),
            (["--network", "faulty:make"], "faulty cannot be imported: ZeroDivisionError"),
            (["--network", "nets:mak"], "nets has no mak. Did you mean make?"),
            (["--network", "nets:__name__"], "__name__ of nets is str; expected a callable"),
            (["--network", "nets:make:width"], "cannot be read"),
            (["--model", "weights.pt", "--network", "nets:make:depth=7"], "TypeError"),
            (["--model", "weights.pt", "--network", "nets:make:width=7"], "of another shape (1.weight of (4, 36)"),
            (
                ["--model", "weights.pt", "--network", "nets:nn.Linear:in_features=3,out_features=4"],
                "does not fit Linear",
            ),
            (["--model", "weights.pt", "--network", "builtins:dict"], "The network is a dict"),
            (["--eps", "a"], "expected numbers with commas"),
            (["--eps", "1/0"], "expected numbers with commas"),
            (["--eps", "nan"], "expected numbers with commas"),
            (["--eps", "2"], "expected 1 at most in Linf"),
            (["--eps", "0,0.1"], "expected one or more radii above 0"),
            (["--eps", "0", "--norm", "L2"], "expected one or more radii above 0"),
            (["--eps", ""], "expected numbers with commas"),
            (["--norm", "L3"], "--norm"),
            (["--attacks", "margn"], "no attack named 'margn'. Did you mean margin? There are: "),
            (["--attacks", "quik"], "Did you mean quick?"),
            (["--normalization", "imgnet"], "expected imagenet or"),
            (["--normalization", "0.5"], "expected imagenet or"),
            (["--normalization", "0.5;0"], "std above 0"),
            (["--normalization", "imagenet"], "normalization has 3 channels"),
            (["--size", "x"], "--size: 'x'; expected 224, or 256,224"),
            (["--size", "0"], "--size: '0'; expected 224, or 256,224"),
            (["--size", "9,8,7"], "expected 224, or 256,224 (shorter side, square within), or 256x128"),
            (["--size", "9x8x7"], "or 256x128 (height, width)"),
            (["--size", "4x"], "--size: '4x'; expected 224"),
            (["--queries", "photos", "--size", "4,6"], "a square that fits in it"),
            (["--recall-at", "1,x"], "--recall-at: '1,x'; expected whole numbers"),
            (["--recall-at", "0"], "expected numbers above 0"),
            (["--limit", "0"], "--limit"),
            (["--batch-size", "0"], "--batch-size"),
            (["--device", "gpu"], "--device"),
            (["--device", "meta"], "--device"),
            (["--output", "nets.py"], "--output"),
            (["--output", "/dev/null/folder"], "--output"),
        ],
    )
    def test_say_what_is_wrong_in_one_line(self, workplace, asked, arguments, message):
        spoil(workplace)
        result = run(*arguments)
        assert isinstance(result.exception, SystemExit)
        assert asked == []
        (line,) = [
            line for line in result.output.splitlines() if not line.startswith(("Usage:", "Try ", "\n")) and line
        ]
        assert line.startswith("Error: ")
        assert message in line

    @pytest.mark.parametrize("option", ["--model", "--queries", "--eps"])
    def test_what_has_to_be_given(self, option):
        given = {"--model": "m", "--queries": "q", "--eps": "0.1"}
        del given[option]
        result = CliRunner().invoke(main, ["evaluate", *(word for pair in given.items() for word in pair)])
        assert result.exit_code == 2
        assert f"Missing option '{option}'" in result.output

    def test_what_the_evaluation_refuses(self, workplace, monkeypatch):
        def refuse(*arguments, **options):
            raise InputError("No, because.")

        monkeypatch.setattr(saved_model, "evaluate_robustness", refuse)
        result = run()
        assert (result.exit_code, result.output) == (1, "Error: No, because.\n")

    def test_memory_that_does_not_suffice(self, workplace, monkeypatch):
        def fill(*arguments, **options):
            raise torch.cuda.OutOfMemoryError("a page of numbers")

        monkeypatch.setattr(saved_model, "evaluate_robustness", fill)
        assert run().output == "Error: cpu has not enough memory for --batch-size 128; try half of it.\n"


def spoil(workplace):
    """Images and networks that cannot be used."""
    pixels = Image.fromarray(numpy.zeros((6, 6), dtype=numpy.uint8))
    for folder, files in {"one": "a0 a1", "single": "a0 b0", "broken": "a0 a1 b0 b1", "empty": ""}.items():
        (workplace / folder).mkdir()
        for file in files.split():
            (workplace / folder / file[0]).mkdir(exist_ok=True)
            pixels.save(workplace / folder / file[0] / f"{file[1]}.png")
    (workplace / "broken" / "a" / "1.png").write_bytes(b"\x89PNG")
    (workplace / "faulty.py").write_text("1 / 0\n")
    images, labels = numpy.zeros((4, 6, 6)), numpy.array([0, 0, 1, 1])
    numpy.savez("unlabelled.npz", images=images, labels=labels[:3])
    numpy.savez("strangers.npz", images=images, labels=labels + 8)
    numpy.savez("larger.npz", images=numpy.zeros((4, 7, 7)), labels=labels)
    numpy.savez("nan.npz", images=numpy.where(numpy.arange(4)[:, None, None] == 2, numpy.nan, images), labels=labels)


def test_as_a_module(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "evaluate", "--model", "m.pt2", "--queries", "q", "--eps", "1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("pml_adversarial", run_name="__main__")
    assert ended.value.code == 1
    assert (
        capsys.readouterr().err == "Error: There is no q; expected a folder with one subfolder per class, or an npz.\n"
    )
