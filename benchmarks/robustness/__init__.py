"""All training methods under one protocol: trained, attacked alike, and put into one table.

From the root of the repository:

    python -m benchmarks.robustness --data digits
    python -m benchmarks.robustness --data omniglot --download --seeds 0 1 2
    python -m benchmarks.robustness --data cub --root data --download --pretrained --precision bfloat16
    python -m benchmarks.robustness --data tiny-imagenet --file tiny-imagenet-200.zip --protocol helped --compiled
    python -m benchmarks.robustness --data cars --file cars196.zip --size 64 --backbone lite0 --pretrained lite0.pth

Every method and seed has a folder of its own under ``--out``, with its weights, its report and what it takes to go on.
What is finished is not made again: repeat a command that was cut off. Several may share the folder, each with other
methods or seeds.
``results.json`` and ``table.md`` there hold all runs with the settings of the command.
"""
