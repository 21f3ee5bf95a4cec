"""Makes a deployed timm encoder robust, without labels, and without a new index (FARE, arXiv 2402.12336).

python harden_timm.py --model resnet50 --pretrained --train path/to/images --search path/to/others
python harden_timm.py --model resnet18 --checkpoint weights.pth --train path/to/images --search path/to/others

A copy of the encoder learns to give perturbed images nearly the embeddings that the original gives to the clean ones.
Then the copy embeds the queries, and the gallery keeps the embeddings of the original. The folders have one subfolder
per class; the classes count in the evaluation only. The script prints R@1 with the original and with the copy, without
and under attack, and writes robust.pt, robustness.json and robustness.html to the folder --output. It needs
`pip install "pml-adversarial[cli]" timm`.
"""

import argparse
import copy
from pathlib import Path

import timm
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import Normalize

from pml_adversarial import AdversarialLoss, evaluate_robustness
from pml_adversarial.cli.images import images_from
from pml_adversarial.defenses import FARE


def load_model(name, pretrained, checkpoint):
    """Pixels in [0, 1] -> features, and the sizes to which images are resized and cut."""
    model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    if checkpoint is not None:
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
    config = resolve_model_data_config(model)
    side = config["input_size"][-1]
    return nn.Sequential(Normalize(config["mean"], config["std"]), model), (round(side / config["crop_pct"]), side)


def train(model, original, images, args, device):
    loader = DataLoader(images, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True)
    steps = args.epochs * len(loader)
    loss_func = AdversarialLoss(  # FARE does not use the loss that is wrapped
        MultiSimilarityLoss(), model, eps=args.eps / 255, steps=2, plugins=[FARE()], warmup=0.3, total_steps=steps
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for epoch in range(1, args.epochs + 1):
        for batch, _ in loader:
            batch = batch.to(device)
            with torch.no_grad():
                targets = original(batch)
            loss = loss_func(model(batch), ref_emb=targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: squared distance from the original under attack {loss_func.shift:.4f}", flush=True)


@torch.no_grad()
def embedded(model, images, args, device):
    loader = DataLoader(images, args.batch_size, num_workers=args.workers)
    return torch.cat([model(batch.to(device)) for batch, _ in loader])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name in timm, such as resnet18")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="timm's own weights, downloaded")
    weights.add_argument("--checkpoint", help="file of the model's state dict, without a classifier")
    parser.add_argument("--train", required=True, help="folder of images to train on")
    parser.add_argument("--search", required=True, help="folder of images that search one another")
    parser.add_argument("--eps", type=float, default=4, help="of the training attack, in 255ths")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--queries", type=int, default=200, help="images to attack, drawn at random; all are searched")
    parser.add_argument("--attacks", choices=["quick", "standard"], default="standard")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default="harden_timm_run")
    args = parser.parse_args()

    torch.manual_seed(0)
    original, size = load_model(args.model, args.pretrained, args.checkpoint)
    original = original.to(args.device).eval().requires_grad_(False)
    model = copy.deepcopy(original).requires_grad_(True)
    train(model, original, images_from(args.train, size=size), args, args.device)

    images = images_from(args.search, size=size)
    index = embedded(original, images, args, args.device)
    radii = [args.eps / 4, args.eps / 2]  # a network withstands less than it trains with
    drawn = torch.randperm(len(images))[: args.queries].sort().values
    for name, encoder in (("original", original), ("robust", model.eval())):
        report = evaluate_robustness(
            encoder,
            images,
            (None, images.labels),  # the gallery is known by the embeddings of the original alone
            gallery_embeddings=index,
            own=torch.arange(len(images)),  # no query finds itself
            eps=[radius / 255 for radius in radii],
            attacks=args.attacks,
            subset=drawn,
            batch_size=32,
        )
        curve = " / ".join(f"{rate:.1%}" for rate in report.curve().values())
        print(f"{name}: R@1 in the original's gallery, at eps 0 / {radii[0]:g}/255 / {radii[1]:g}/255: {curve}")
    args.output.mkdir(parents=True, exist_ok=True)
    torch.save(model[1].state_dict(), args.output / "robust.pt")
    report.save_json(args.output / "robustness.json")
    report.save_html(args.output / "robustness.html")
    print(f"written to {args.output}: robust.pt, robustness.json, robustness.html")


if __name__ == "__main__":
    main()
