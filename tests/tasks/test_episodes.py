"""Episodes, splits and rotations, read back from ids written into the images."""

import io

import pytest
import torch

from implicit_optim.tasks import Episodes, Stream, rotate_classes, split_classes

CLASSES, EXAMPLES = 12, 7
IDS = torch.arange(float(CLASSES * EXAMPLES)).view(CLASSES, EXAMPLES, 1)  # EXAMPLES * c + m


def make(images: torch.Tensor = IDS, **changes: int | None) -> Episodes:
    settings: dict = dict(ways=4, shots=2, queries=3, tasks=50, seed=0) | changes
    return Episodes(images, **settings)


def same(a, b) -> bool:
    pairs = zip((*a[0], *a[1]), (*b[0], *b[1]), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_shapes_and_labels_are_class_by_class():
    images = torch.rand(6, 5, 1, 3, 3)
    (x, y), (query_x, query_y) = make(images, ways=3, shots=2, queries=1, tasks=4).sample()
    assert x.shape == (4, 6, 1, 3, 3) and query_x.shape == (4, 3, 1, 3, 3)
    assert y.dtype == query_y.dtype == torch.int64
    assert y.tolist() == [[0, 0, 1, 1, 2, 2]] * 4
    assert query_y.tolist() == [[0, 1, 2]] * 4


def test_images_of_a_label_are_of_one_class_and_labels_of_different_classes():
    (x, y), (query_x, query_y) = make().sample()
    for task in range(50):
        support = [set((x[task, y[task] == k] // EXAMPLES).flatten().tolist()) for k in range(4)]
        query = [
            set((query_x[task, query_y[task] == k] // EXAMPLES).flatten().tolist())
            for k in range(4)
        ]
        assert all(len(found) == 1 for found in support)
        assert support == query
        assert len(set.union(*support)) == 4


def test_support_and_query_share_no_example_and_repeat_none():
    (x, _), (query_x, _) = make(queries=5).sample()  # all 7 examples of each class
    ids = torch.cat([x, query_x], dim=1).squeeze(-1)
    assert all(len(set(task.tolist())) == 4 * 7 for task in ids)


def test_every_ordered_choice_of_classes_is_equally_likely():
    images = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 1)
    (x, _), _ = make(images, ways=2, shots=1, queries=1, tasks=12_000, seed=1).sample()
    pairs = (4 * x[:, 0, 0] + x[:, 1, 0]).long()
    counts = torch.bincount(pairs, minlength=16).view(4, 4)
    assert counts.diagonal().tolist() == [0, 0, 0, 0]
    observed = counts[~torch.eye(4, dtype=torch.bool)].double()
    chi2 = ((observed - 1000) ** 2 / 1000).sum().item()
    assert chi2 < 31.3  # 0.999 quantile of chi-square with 11 degrees of freedom


def test_every_example_is_equally_likely_in_the_support():
    images = torch.arange(5.0).view(1, 5, 1)
    (x, _), _ = make(images, ways=1, shots=1, queries=1, tasks=10_000, seed=2).sample()
    counts = torch.bincount(x.flatten().long(), minlength=5).double()
    assert ((counts - 2000) ** 2 / 2000).sum().item() < 18.5  # 0.999 quantile, 4 degrees


def test_classes_of_a_task_choose_their_examples_independently():
    (x, _), _ = make(ways=2, shots=1, queries=1, tasks=7000, seed=3).sample()
    chosen = (x[..., 0] % EXAMPLES).long()
    counts = torch.bincount(EXAMPLES * chosen[:, 0] + chosen[:, 1], minlength=49).double()
    expected = 7000 / 49
    assert ((counts - expected) ** 2 / expected).sum().item() < 84.1  # 0.999 quantile, 48 degrees


def test_bytes_are_scaled_and_floats_are_not():
    (x, _), _ = make(torch.full((5, 5, 2), 51, dtype=torch.uint8)).sample()
    assert x.dtype == torch.float32 and x.unique().tolist() == pytest.approx([0.2])
    (x, _), _ = make(torch.full((5, 5, 2), 51.0, dtype=torch.float64)).sample()
    assert x.dtype == torch.float64 and x.unique().tolist() == [51.0]


def test_an_episode_is_the_callers_own():
    images = torch.full((5, 5, 2), 51, dtype=torch.uint8)
    episodes = make(images)
    (x, y), (query_x, query_y) = episodes.sample()
    for given in (x, y, query_x, query_y):
        given.zero_()
    assert images.unique().tolist() == [51]
    (_, y), (_, query_y) = episodes.sample()
    assert y.max() == query_y.max() == 3


def test_seed_decides_the_episodes_and_the_global_generator_does_not():
    torch.manual_seed(1)
    first = make(seed=5).sample()
    torch.manual_seed(2)
    assert same(first, make(seed=5).sample())
    assert not same(first, make(seed=6).sample())


def test_a_pass_has_steps_episodes_and_the_next_pass_has_others():
    episodes = make(steps=3)
    first, second = list(episodes), list(episodes)
    assert len(episodes) == len(first) == len(second) == 3
    distinct = {float((x * torch.arange(1, 9)[:, None]).sum()) for (x, _), _ in first + second}
    assert len(distinct) == 6


def test_a_pass_left_early_does_not_shorten_the_next():
    episodes = make(steps=3)
    next(iter(episodes))
    assert len(list(episodes)) == 3


def test_a_stream_without_end_has_no_length():
    with pytest.raises(TypeError, match="give steps="):
        len(make())
    assert len([episode for _, episode in zip(range(20), make(), strict=False)]) == 20


def test_a_resumed_run_draws_the_same_remainder():
    reference = list(make(steps=5))
    interrupted = make(steps=5)
    passes = iter(interrupted)
    next(passes), next(passes)
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)

    resumed = make(steps=5, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    remainder = list(resumed)
    assert len(remainder) == 3
    assert all(same(a, b) for a, b in zip(remainder, reference[2:], strict=True))
    assert len(list(resumed)) == 5


def test_a_foreign_state_is_refused():
    with pytest.raises(ValueError, match=r"\['seed'\].*state_dict\(\)"):
        make().load_state_dict({"seed": 0})
    with pytest.raises(ValueError, match="refuses it"):
        make().load_state_dict({"generator": torch.zeros(3, dtype=torch.uint8), "taken": 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 13}, "Invalid ways: 13, but images has 12 classes"),
        ({"shots": 5}, r"Invalid shots \+ queries: 5 \+ 3, but images has 7 examples"),
        ({"ways": 0}, "Invalid ways: 0"),
        ({"shots": -1}, "Invalid shots: -1"),
        ({"queries": 0}, "Invalid queries: 0"),
        ({"tasks": 0}, "Invalid tasks: 0"),
        ({"steps": 0}, "Invalid steps: 0"),
        ({"tasks": 1.5}, "Invalid tasks: 1.5"),
        ({"images": torch.zeros(12, 7)}, r"shape \[12, 7\] \(give \[classes, examples"),
        ({"images": torch.zeros(12, 7, 1).int()}, "torch.int32 .give uint8 or floating"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_stream_of_ones_own_needs_only_sample():
    class Ones(Stream):
        def sample(self):
            batch = torch.ones(2, 3, 1), torch.ones(2, 3, dtype=torch.int64)
            return batch, batch

    assert [float(x.sum()) for (x, _), _ in Ones(steps=2)] == [6.0, 6.0]
    with pytest.raises(TypeError, match="abstract"):
        Stream()  # type: ignore[abstract]


def test_split_is_disjoint_complete_and_seeded():
    parts = split_classes(1623, (1100, 100, 423), seed=3)
    assert [len(part) for part in parts] == [1100, 100, 423]
    assert sorted(torch.cat(parts).tolist()) == list(range(1623))
    again = split_classes(1623, (1100, 100, 423), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0], split_classes(1623, (1100, 100, 423), seed=4)[0])


def test_split_may_leave_classes_out_but_not_invent_them():
    assert len(set(torch.cat(split_classes(10, [3, 4])).tolist())) == 7
    with pytest.raises(ValueError, match="ask for 11 classes of 10"):
        split_classes(10, [7, 4])
    with pytest.raises(ValueError, match=r"Invalid sizes\[1\]: 0"):
        split_classes(10, [7, 0])


def test_rotations_are_new_classes_turned_counter_clockwise():
    images = torch.arange(2 * 3 * 1 * 4 * 4, dtype=torch.uint8).view(2, 3, 1, 4, 4)
    turned = rotate_classes(images)
    assert turned.shape == (8, 3, 1, 4, 4) and turned.dtype == torch.uint8
    for i in range(4):
        for j in range(4):
            assert torch.equal(turned[:2, ..., i, j], images[..., i, j])
            assert torch.equal(turned[2:4, ..., 3 - j, i], images[..., i, j])
            assert torch.equal(turned[4:6, ..., 3 - i, 3 - j], images[..., i, j])
            assert torch.equal(turned[6:8, ..., j, 3 - i], images[..., i, j])


@pytest.mark.parametrize("shape", [(2, 3, 1, 4, 5), (2, 4, 4)])
def test_rotation_needs_square_images(shape):
    with pytest.raises(ValueError, match="square images"):
        rotate_classes(torch.zeros(shape))
