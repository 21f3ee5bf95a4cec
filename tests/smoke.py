"""Uses an installed pml_adversarial as a stranger would, in an environment that need have nothing else.

python smoke.py
"""

import importlib.metadata
import importlib.resources
import platform
import socket
import sys


def refuse(*arguments, **options):
    raise AssertionError(f"A connection was asked for: {arguments}")


if __name__ == "__main__":  # before anything else is imported
    socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

import pytorch_metric_learning
import torch
import torchattacks
from pytorch_metric_learning import losses, miners

import pml_adversarial
from pml_adversarial import AdversarialLoss, AdversarialMiner, evaluate_robustness
from pml_adversarial.evaluation.suites import quick


def main():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16))
    images, labels = torch.rand(32, 1, 8, 8), torch.arange(32) // 4
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    miner = AdversarialMiner(miners.MultiSimilarityMiner(), model)
    installed = {entry.name for entry in importlib.metadata.entry_points(group="pml_adversarial")}
    assert {"hm", "ics", "act", "tride", "amd", "ramd", "est", "ses", "trades"} <= installed, installed
    for plugins in ([], ["hm", "ics"], ["trades"]):
        loss_func = AdversarialLoss(losses.TripletMarginLoss(margin=0.2), model, plugins=plugins, warmup=0)
        before = model[1].weight.detach().clone()
        embeddings = model(images)
        loss_func(embeddings, labels, miner(embeddings, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss_func.num_perturbed > 0
        assert 0 < loss_func.perturbation_linf <= 8 / 255 + 1e-6
        assert not torch.equal(before, model[1].weight)
    report = evaluate_robustness(model, (images, labels), eps=8 / 255, attacks=quick(steps=5, restarts=1))
    assert report.worst_case(8 / 255) <= report.clean["recall_at_1"]

    version = importlib.metadata.version("pml-adversarial")
    assert pml_adversarial.__version__ == version
    assert (importlib.resources.files("pml_adversarial") / "py.typed").is_file()
    assert "requests" not in sys.modules  # which torchattacks 3.4 to 3.5.1 require, and nobody imports
    with_versions = {"torch": torch, "pytorch-metric-learning": pytorch_metric_learning, "torchattacks": torchattacks}
    others = ", ".join(f"{name} {module.__version__}" for name, module in with_versions.items())
    print(f"works: pml_adversarial {version}, Python {platform.python_version()}, {others}")


if __name__ == "__main__":
    main()
