"""Measures how robust the features of a trained timm model are, on a folder of images.

python evaluate_timm.py --model resnet50 --pretrained --images path/to/images
python evaluate_timm.py --model resnet18 --checkpoint weights.pth --images path/to/images

The folder has one subfolder per class. Each query searches all other images. An image's embedding is what the model
computes before its classifier. The script prints a table, and writes robustness.json and robustness.html to the folder
--output. It needs `pip install "pml-adversarial[cli]" timm`.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import load_state_dict

from pml_adversarial import evaluate_robustness
from pml_adversarial.cli.images import images_from

EPS = [1 / 255, 2 / 255, 4 / 255, 8 / 255]


def load_model(name, pretrained, checkpoint):
    model = timm.create_model(name, pretrained=pretrained, num_classes=0)  # no classifier: images -> features
    if checkpoint is not None:
        weights = load_state_dict(checkpoint, weights_only=True)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if missing:
            raise SystemExit(f"{checkpoint} holds no weights of {name}: it lacks {', '.join(missing[:5])}, ...")
        unused = ", ".join(unexpected) or "nothing"  # expected: the weights of the classifier
        print(f"not used from {checkpoint}: {unused}")
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name in timm, such as resnet18")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="timm's own weights, downloaded")
    weights.add_argument("--checkpoint", help="file of weights (.pth, .pt, .safetensors)")
    parser.add_argument("--images", required=True, help="folder with one subfolder per class")
    parser.add_argument("--queries", type=int, default=200, help="images to attack, drawn at random; all are searched")
    parser.add_argument("--attacks", choices=["quick", "standard"], default="standard")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default="evaluate_timm_run")
    args = parser.parse_args()

    model = load_model(args.model, args.pretrained, args.checkpoint).to(args.device)
    config = resolve_model_data_config(model)
    side = config["input_size"][-1]
    images = images_from(args.images, size=(round(side / config["crop_pct"]), side))  # pixels, not normalised
    print(f"{len(images)} images of {len(images.classes)} classes, {side}x{side}, on {args.device}")

    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: args.queries].sort().values
    report = evaluate_robustness(
        model,
        images,
        eps=EPS,
        attacks=args.attacks,
        normalization=(config["mean"], config["std"]),
        subset=drawn,
        batch_size=32,
        progress=True,
    )
    print(report)
    args.output.mkdir(parents=True, exist_ok=True)
    report.save_json(args.output / "robustness.json")
    report.save_html(args.output / "robustness.html")
    print(f"written to {args.output}: robustness.json, robustness.html")


if __name__ == "__main__":
    main()
