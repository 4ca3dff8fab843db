"""Table 3: Mini-ImageNet, five methods.

    python -m benchmarks.paper table3 --data DIR --method imaml-gd

The defaults are the paper's: 5-way 1-shot, lam = 0.5, 10 inner steps, 5 CG steps, 32 filters and
max-pooling, Adam at 1e-3. DIR holds Mini-ImageNet as `implicit_optim.tasks.mini_imagenet` reads it.
"""

from tqdm import tqdm

from benchmarks.paper import table2
from implicit_optim.tasks import ConvNet, Splits, mini_imagenet

PAPER = {  # accuracy and half-width by method, 5-way 1-shot
    "maml": (48.70, 1.84),
    "fomaml": (48.07, 1.75),
    "reptile": (49.97, 0.32),
    "imaml-gd": (48.96, 1.84),
    "imaml-hf": (49.30, 1.88),
}


def arguments(parser):
    table2.arguments(parser)
    parser.set_defaults(lam=0.5, inner_steps=10)


def main(args):
    with tqdm(desc="decoding", leave=False) as bar:

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        images = mini_imagenet(args.data, progress=progress)
    split = Splits(*(part.to(args.device) for part in images))
    size = split.train.shape[-1]
    table2.run(args, "table3", split, lambda s: network(s, size), published(args))


def network(s, size):
    return ConvNet(
        s.way,
        in_channels=3,
        image_size=size,
        filters=32,
        max_pool=True,
        zero_head=s.zero_head,
    )


def published(args):
    return PAPER[args.method] if (args.way, args.shot) == (5, 1) else None
