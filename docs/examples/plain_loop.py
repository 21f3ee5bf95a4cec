"""Plain and adversarial training in a plain PyTorch loop, and R@1 of both models under attack.

python plain_loop.py

Handwritten digits: the model is trained on 0-4 and tested on 5-9, which it never sees in training. The script takes
about half a minute on one core, most of it for the attacks of the evaluation. It needs
`pip install "pml-adversarial[cli]"`, which brings the digits.
"""

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pml_adversarial import AdversarialLoss, evaluate_robustness
from pml_adversarial.cli.images import digits

EPOCHS = 25
EPS = 0.1  # in evaluation, in pixels of [0, 1]; training uses twice as much


def train(images, labels, adversarial):
    torch.manual_seed(0)  # both models start from the same weights
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
    )
    loader = DataLoader(TensorDataset(images, labels), batch_size=112, shuffle=True, drop_last=True)
    steps = EPOCHS * len(loader)
    loss_func = MultiSimilarityLoss(alpha=2, beta=40, base=0.5)
    if adversarial:
        loss_func = AdversarialLoss(loss_func, model, eps=2 * EPS, warmup=steps // 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for _ in range(EPOCHS):
        for inputs, targets in loader:
            loss = loss_func(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def main():
    data = digits()
    for name, adversarial in (("plain", False), ("adversarial", True)):
        model = train(data.train_images, data.train_labels, adversarial)
        report = evaluate_robustness(
            model, (data.test_images, data.test_labels), eps=EPS, attacks="quick", checks=False, batch_size=512
        )
        clean, attacked = report.clean["recall_at_1"], report.worst_case(EPS)
        print(f"{name + ':':12} R@1 {clean:6.1%}, at most {attacked:6.1%} under attack at eps {EPS}", flush=True)


if __name__ == "__main__":
    main()
