"""Episodes: N-way K-shot tasks as index gathers on a tensor that already sits on the device."""

from collections.abc import Sequence
from itertools import accumulate
from typing import final

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from implicit_optim.tasks._checks import check_positive
from implicit_optim.tasks._stream import Episode, Stream


@final
class Episodes(Stream):
    r"""N-way K-shot classification tasks from labelled images, T tasks at once.

    For each task `ways` classes are drawn without replacement, and for each class `shots + queries`
    examples without replacement: the first `shots` are the support, the others the query, so no
    drawing is in both. Every ordered choice is equally likely:

    $$(c_1, \dots, c_W) = \mathrm{top}_W(u), \quad u \sim U[0, 1]^C$$

    The classes of a task are labelled 0 to ways - 1 in the order drawn, and both batches are
    class by class: `y = [0, 0, ..., 1, 1, ...]`. All the work is two `topk` and two gathers on the
    device of `images`; nothing loops over tasks or images.

    Args:
        images: `[classes, examples, *shape]` on the device where episodes are wanted. Floating
            point is given as it is; uint8 is scaled from 0..255 to [0, 1] after the gather, in
            torch's default dtype, so that a data set costs one byte a pixel.
        ways: classes in a task.
        shots: support examples of each class.
        queries: query examples of each class.
        tasks: T, tasks in an episode.
        seed: seed of the stream's own generator. CPU and CUDA draw different episodes from it.
        steps: episodes in one pass; None for a stream without end.

    Raises:
        ValueError: if a count is not positive, `images` has too few dimensions, classes or
            examples, or is neither uint8 nor floating point.

    Examples:
        >>> images = torch.arange(10.0 * 4).reshape(10, 4, 1)  # example m of class c is 4 c + m
        >>> episodes = Episodes(images, ways=3, shots=1, queries=2, tasks=2, seed=0)
        >>> (x, y), (query_x, query_y) = episodes.sample()
        >>> x.shape, query_x.shape
        (torch.Size([2, 3, 1]), torch.Size([2, 6, 1]))
        >>> y.tolist(), query_y.tolist()
        ([[0, 1, 2], [0, 1, 2]], [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]])
        >>> (
        ...     (x[0, :, 0] // 4).tolist(),
        ...     (query_x[0, :, 0] // 4).tolist(),
        ... )  # classes of the first task
        ([7.0, 1.0, 5.0], [7.0, 7.0, 1.0, 1.0, 5.0, 5.0])

    Source: Vinyals et al., "Matching Networks for One Shot Learning" (2016), section 4.1.
    """

    def __init__(
        self,
        images: Shaped[Tensor, "classes examples *shape"],
        *,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        steps: int | None = None,
    ) -> None:
        check_positive(ways=ways, shots=shots, queries=queries, tasks=tasks)
        if images.ndim < 3:
            raise ValueError(
                f"Invalid images: shape {list(images.shape)} (give [classes, examples, *shape])"
            )
        if not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(f"Invalid images: {images.dtype} (give uint8 or floating point)")
        classes, examples = images.shape[:2]
        if ways > classes:
            raise ValueError(f"Invalid ways: {ways}, but images has {classes} classes (lower ways)")
        if shots + queries > examples:
            raise ValueError(
                f"Invalid shots + queries: {shots} + {queries}, but images has {examples} examples "
                "of each class (lower shots or queries)"
            )
        super().__init__(seed=seed, device=images.device, steps=steps)
        self.images = images
        self.ways, self.shots, self.queries, self.tasks = ways, shots, queries, tasks
        labels = torch.arange(ways, device=images.device)
        self._support_y = labels.repeat_interleave(shots).repeat(tasks, 1)
        self._query_y = labels.repeat_interleave(queries).repeat(tasks, 1)

    def sample(self) -> Episode:
        """Draw one episode of T tasks.

        Returns:
            `(support, query)`: `x [T, ways * shots, *shape]`, `y [T, ways * shots]` (int64), and
            the same with `queries` in place of `shots`.
        """
        classes, examples = self.images.shape[:2]
        which = self._choose(self.ways, self.tasks, classes)[..., None]  # [T, ways, 1]
        drawings = self._choose(self.shots + self.queries, self.tasks, self.ways, examples)
        support_x = self._gather(which, drawings[..., : self.shots])
        query_x = self._gather(which, drawings[..., self.shots :])
        return (support_x, self._support_y.clone()), (query_x, self._query_y.clone())

    def _choose(self, count: int, *shape: int) -> Int64[Tensor, "*batch count"]:
        """Choose `count` of the last dimension without replacement, in uniformly random order."""
        keys = torch.rand(shape, generator=self.generator, device=self.images.device)
        return keys.topk(count).indices

    def _gather(
        self, classes: Int64[Tensor, "T ways 1"], examples: Int64[Tensor, "T ways count"]
    ) -> Shaped[Tensor, "T ways*count *shape"]:
        x = self.images[classes, examples].flatten(1, 2)
        return x if x.is_floating_point() else x.to(torch.get_default_dtype()).div_(255)


def split_classes(
    classes: int, sizes: Sequence[int], seed: int = 0
) -> tuple[Int64[Tensor, " size"], ...]:
    """Split class indices at random into disjoint sets.

    Args:
        classes: number of classes, numbered from 0.
        sizes: size of each set; classes beyond their sum are left out.
        seed: seed of the split, which is drawn on the CPU and hence the same on every machine.

    Returns:
        One index tensor `[size]` for each of `sizes`, in random order.

    Raises:
        ValueError: if a size is not positive, or the sizes ask for more classes than there are.

    Examples:
        >>> [part.tolist() for part in split_classes(6, (3, 1, 2), seed=0)]
        [[2, 5, 3], [0], [1, 4]]
    """
    check_positive(classes=classes, **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
    total = sum(sizes)
    if total > classes:
        raise ValueError(
            f"Invalid sizes: {tuple(sizes)} ask for {total} classes of {classes} (lower the sizes)"
        )
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    ends = accumulate(sizes)
    return tuple(order[end - size : end] for size, end in zip(sizes, ends, strict=True))


def rotate_classes(
    images: Shaped[Tensor, "classes examples *channels size size"],
) -> Shaped[Tensor, "4*classes examples *channels size size"]:
    """Make a new class of every rotation by 90 degrees.

    Class `r * classes + c` is class `c` turned counter-clockwise by `90 r` degrees. Split classes
    first and rotate each part: then the four rotations of a character stay in one part.

    Args:
        images: `[classes, examples, *channels, size, size]`, square.

    Returns:
        `[4 * classes, examples, *channels, size, size]`, of the same dtype and on the same device.

    Raises:
        ValueError: if the images are not square.

    Examples:
        >>> rotate_classes(torch.tensor([[[[1, 2], [3, 4]]]])).flatten(1).tolist()
        [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]

    Source: Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks" (2016), section 4.
    """
    if images.ndim < 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"Invalid images: shape {list(images.shape)} "
            "(give [classes, examples, *channels, size, size] with square images)"
        )
    return torch.cat([images.rot90(turns, (-2, -1)) for turns in range(4)])
