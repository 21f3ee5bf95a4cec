"""What lies in docs/examples is run as a reader runs it: from another folder, and without network."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import offline
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.models import resnet18

from pml_adversarial.training.records import OF_LOSSES, STANDARD

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
OF_LIBRARIES = (
    "ignore:Converting a tensor with requires_grad:UserWarning",  # PML formats the loss
    "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning",  # Lightning, of torch's own
    "ignore:You are using `torch.load` with `weights_only=False`:FutureWarning",  # Lightning and torch 2.4
    "ignore:TypedStorage is deprecated:UserWarning",  # faiss 1.8
    "ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning",  # torch 2.4
)
EVALUATED = re.compile(r"R@1 +([\d.]+)%, at most +([\d.]+)% under attack")


@pytest.fixture
def run(tmp_path):
    """Runs Python in an empty folder; gives what it printed, and what it complained of."""
    startup = tmp_path / "startup"
    startup.mkdir()
    shutil.copy(offline.__file__, startup / "sitecustomize.py")
    path = os.pathsep.join(filter(None, [str(startup), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    env.pop("MPLBACKEND", None)  # the notebook has its own
    folder = tmp_path / "folder"
    folder.mkdir()

    def run(*command):
        options = {"cwd": folder, "env": env, "capture_output": True, "encoding": "utf-8", "timeout": 600}
        done = subprocess.run([sys.executable, *map(str, command)], **options)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    run.folder = folder
    return run


@pytest.fixture
def example(run):
    """The same for an example, in which warnings are errors."""

    def example(name, *options):
        filters = ("error", *OF_LIBRARIES)
        return run(*(part for one in filters for part in ("-W", one)), EXAMPLES / name, *options)

    example.folder = run.folder
    return example


def percents(line):
    """R@1 without attack, and under it."""
    clean, attacked = map(float, EVALUATED.search(line).groups())
    assert 0 <= attacked <= clean <= 100
    return clean, attacked


def check_report(folder, eps):
    """The report of a folder, and that its numbers can be: no attack helps, and a larger eps does not either."""
    found = json.loads((folder / "robustness.json").read_text(encoding="utf-8"))
    assert (folder / "robustness.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [worst["eps"] for worst in found["worst"]] == pytest.approx(eps)
    for measure, clean in found["clean"].items():
        curve = [clean, *(worst["measures"][measure] for worst in found["worst"])]
        assert curve == sorted(curve, reverse=True)
    return found


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Four classes to train on and four others in the layout of CUB-200-2011, six images each, one of them grey."""
    root = tmp_path_factory.mktemp("cub")
    folder, random = root / "CUB_200_2011", numpy.random.default_rng(0)
    images, labels = [], []
    for label in (1, 2, 3, 4, 101, 102, 103, 104):
        pattern = random.uniform(40, 216, (4, 4, 3)).repeat(10, 0).repeat(12, 1)
        for i in range(6):
            name = f"{label:03d}.Bird/Bird_{i}.jpg"
            pixels = (pattern + random.normal(0, 25, pattern.shape)).clip(0, 255).astype("uint8")
            path = folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert("L" if i == 5 else "RGB").save(path)
            images.append(f"{len(images) + 1} {name}\n")
            labels.append(f"{len(images)} {label}\n")
    (folder / "images.txt").write_text("".join(images), encoding="utf-8")
    (folder / "image_class_labels.txt").write_text("".join(labels), encoding="utf-8")
    return root


def test_network_is_out_of_reach(run):
    code = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    with pytest.raises(AssertionError, match="OSError: connects to"):
        run("-c", code)


@pytest.mark.slow
def test_plain_loop(example):
    out, complaints = example("plain_loop.py")
    plain, adversarial = out.splitlines()
    assert plain.startswith("plain:")
    assert adversarial.startswith("adversarial:")
    assert percents(plain)[1] < 5
    assert percents(adversarial)[1] > 20
    assert percents(adversarial)[0] > percents(plain)[0] - 2
    assert complaints == ""


@pytest.mark.slow
class TestPMLTrainer:
    def test(self, example):
        out, _ = example("pml_trainer.py")  # PML shows progress bars
        folder = example.folder / "pml_trainer_run"
        epoch, best = re.match(r"best epoch: (\d+), worst-case R@1 ([\d.]+)%", out).groups()
        self.check_selection(folder, int(epoch), float(best) / 100)
        self.check_records(folder)
        assert percents(out.splitlines()[-1])[1] > 15

    def check_selection(self, folder, epoch, best):
        """The epoch whose model was saved as the best is the one that withstands most."""
        (file,) = (folder / "records").glob("accuracies_*_attacked_VAL_vs_self.csv")
        tested = read(file)
        robust = [float(row["worst_case_recall_at_1_level0"]) for row in tested]
        assert len(robust) == 10
        assert best == pytest.approx(max(robust), abs=1e-3)
        assert int(tested[robust.index(max(robust))]["epoch"]) == epoch
        assert all(r <= float(row["clean_recall_at_1_level0"]) for r, row in zip(robust, tested, strict=True))
        assert (folder / "models" / f"trunk_best{epoch}.pth").exists()

    def check_records(self, folder):
        """Those of the loss are in the CSV and in TensorBoard, the same."""
        series = read(folder / "records" / "metric_loss_AdversarialLoss.csv")
        strength = [float(row["strength"]) for row in series]
        assert len(strength) == 100
        assert strength[0] == 0
        assert set(strength[50:]) == {1}
        assert float(series[-1]["loss_after"]) > float(series[-1]["loss_before"])
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        for name in (*STANDARD, *OF_LOSSES):
            scalars = [scalar.value for scalar in events.Scalars(f"metric_loss_AdversarialLoss/{name}")]
            written = [float(row[name]) for row in series]
            assert scalars == pytest.approx(written, nan_ok=True)  # NaN in both where nothing was measured


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_lightning_module(example):
    out, _ = example("lightning_module.py")  # Lightning says which devices there are
    assert percents(out.splitlines()[-1])[1] > 20
    folder = example.folder / "lightning_run" / "version_0"
    rows = read(folder / "metrics.csv")
    trained = [row for row in rows if row["train/strength"]]
    assert [float(row["train/strength"]) for row in trained[:2]] == pytest.approx([0, 1 / 60], abs=1e-4)
    assert float(trained[-1]["train/strength"]) == 1
    assert float(trained[-1]["train/loss_after"]) > float(trained[-1]["train/loss_before"])
    assert sum(bool(row["val/loss"]) for row in rows) == 15
    (checkpoint,) = folder.glob("checkpoints/*.ckpt")
    saved = torch.load(checkpoint, weights_only=False)
    assert saved["epoch"] == 14
    assert saved["hyper_parameters"] == {"eps": 0.2, "warmup": 60}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_loop(example, precision):
    out, complaints = example("accelerate_loop.py", "--mixed-precision", precision)
    *epochs, evaluated = out.splitlines()
    assert len(epochs) == 5
    for line in epochs:
        before, after = map(float, re.search(r"loss ([\d.]+), under attack ([\d.]+)", line).groups())
        assert before < after
    assert [line.rsplit(" ", 1)[1] for line in epochs] == ["(40%)", "(80%)", "(100%)", "(100%)", "(100%)"]
    assert percents(evaluated)[1] > 20
    weights = torch.load(example.folder / "accelerate_loop.pt", weights_only=True)
    assert weights["5.weight"].shape == (64, 512)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert complaints == ""


@pytest.mark.slow
def test_finetune_cub(example, birds):
    pytest.importorskip("pytorch_metric_learning.datasets", reason="since 2.9")
    small = ["--backbone", "resnet18", "--weights", "none", "--size", 32, "--epochs", 2, "--batch-size", 8, "--amp"]
    few = ["--queries", 4, "--attacks", "quick"]
    out, complaints = example("finetune_cub.py", "--root", birds, "--workers", 1, *small, *few)
    assert out.startswith("24 images to train on, 24 of other classes to search")
    assert len(re.findall(r"^epoch \d: loss [\d.]+, under attack [\d.]+", out, re.MULTILINE)) == 2
    folder = example.folder / "finetune_cub_run"
    report = check_report(folder, [2 / 255, 4 / 255, 8 / 255])
    assert (report["num_queries"], report["num_gallery"], report["num_classes"]) == (4, 24, 4)

    network = resnet18(num_classes=512)
    untrained = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights = torch.load(folder / "model.pt", weights_only=True)
    torch.nn.Sequential(torch.nn.Identity(), network).load_state_dict(weights)
    for name, tensor in network.state_dict().items():
        if "running" in name or "num_batches" in name:  # statistics of BatchNorm, which is frozen
            assert tensor.equal(untrained[name])
    assert complaints == ""


@pytest.mark.slow
def test_evaluate_timm(example, birds):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", pretrained=False, num_classes=7)
    torch.save({"state_dict": model.state_dict()}, example.folder / "weights.pth")
    images = birds / "CUB_200_2011" / "images"
    few = ["--queries", 2, "--attacks", "quick", "--device", "cpu"]
    out, _ = example(  # shows progress bars
        "evaluate_timm.py", "--model", "test_resnet", "--checkpoint", "weights.pth", "--images", images, *few
    )
    assert "not used from weights.pth: fc.weight, fc.bias\n" in out
    assert "48 images of 8 classes, 160x160, on cpu\n" in out
    report = check_report(example.folder / "evaluate_timm_run", [1 / 255, 2 / 255, 4 / 255, 8 / 255])
    assert (report["num_queries"], report["num_gallery"]) == (2, 48)
    assert report["settings"]["normalization"] == [list(model.default_cfg[key]) for key in ("mean", "std")]


@pytest.mark.slow
def test_harden_timm(example, birds):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_resnet", pretrained=False, num_classes=0).state_dict(), example.folder / "w.pth")
    images = birds / "CUB_200_2011" / "images"
    few = ["--epochs", 1, "--batch-size", 16, "--queries", 4, "--attacks", "quick", "--device", "cpu"]
    folders = ["--train", images, "--search", images]
    out, _ = example("harden_timm.py", "--model", "test_resnet", "--checkpoint", "w.pth", *folders, *few)
    shift = float(re.search(r"epoch 1: squared distance from the original under attack ([\d.]+)", out)[1])
    assert 0 < shift < 4
    assert [line.split(":")[0] for line in out.splitlines() if "R@1 in the original" in line] == ["original", "robust"]
    report = check_report(example.folder / "harden_timm_run", [1 / 255, 2 / 255])
    assert (report["num_queries"], report["num_gallery"]) == (4, 48)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    network.load_state_dict(torch.load(example.folder / "harden_timm_run" / "robust.pt", weights_only=True))


@pytest.mark.slow
def test_evaluate_timm_refuses_weights_of_another_model(example):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), example.folder / "weights.pth")
    with pytest.raises(AssertionError, match=r"weights\.pth holds no weights of test_resnet: it lacks conv1"):
        example("evaluate_timm.py", "--model", "test_resnet", "--checkpoint", "weights.pth", "--images", "none")


@pytest.mark.slow
def test_evaluate_torchrun(run):
    reports = []
    for processes in (2, 1):
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
        out, _ = run(*launch, EXAMPLES / "evaluate_torchrun.py")
        assert out.count("quick-v1, Linf") == 1  # one process prints
        folder = run.folder / "evaluate_torchrun_run"
        reports.append(check_report(folder, [0.01, 0.02]))
        assert len(list(folder.glob("batch_*.pt"))) == 10
        shutil.rmtree(folder)
    for report in reports:
        for attack in report["attacks"]:
            del attack["seconds"]
        for name in ("time", "command"):
            del report["provenance"][name]
    assert reports[0] == reports[1]


NOTEBOOK = EXAMPLES / "first_steps.ipynb"


def test_notebook_is_stored_with_what_it_shows():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    install, *code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert (install.metadata["tags"], install.outputs, install.execution_count) == (["install"], [], None)
    assert all("tags" not in cell.metadata and cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    text = "".join(output["text"] for output in outputs if output.output_type == "stream")
    assert [name for name, _ in lines_of(text)] == ["plain", "adversarial"]
    assert not re.search(r"/(?:home|root|tmp|work)/", NOTEBOOK.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_notebook_runs(run):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    notebook["cells"] = [cell for cell in notebook["cells"] if "install" not in cell["metadata"].get("tags", [])]
    (run.folder / "first_steps.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    run("-m", "jupyter", "execute", "--inplace", "first_steps.ipynb")
    ran = json.loads((run.folder / "first_steps.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in ran["cells"] for output in cell.get("outputs", [])]
    text = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    curves = {name: list(map(float, re.findall(r"([\d.]+)%", line))) for name, line in lines_of(text)}
    assert [len(curve) for curve in curves.values()] == [4, 4]
    assert curves["plain"][2] < 5
    assert curves["adversarial"][2] > 20


def lines_of(text):
    return re.findall(r"^(plain|adversarial) (.*)", text, re.MULTILINE)


def test_every_example_is_run():
    here = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {"train_torchrun.py"}  # in test_distributed.py, by two processes
    found = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert found - elsewhere == set(re.findall(r'"(\w+\.(?:py|ipynb))"', here)) - elsewhere - {"sitecustomize.py"}
