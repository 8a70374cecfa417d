"""Collating samples into batches, and the loader's streams of batches, with fake samples."""

import itertools

import numpy as np
import pytest
import torch

from unipad.batch import CAMERAS
from unipad.data import loader
from unipad.data.collate import collate
from unipad.data.dataset import BadFrame, DataError, Sample
from unipad.data.loader import held_out_batches, load_items, step_batches


def sample(token, points=3, boxes=2, size=(40, 33), labeled=True):
    """A sample in which every value is the number `token`; pixels have the value token + index of the view.

    points, boxes: their numbers. size: (height, width) of the images. labeled: whether the points have labels.
    """
    views = len(CAMERAS)
    return Sample(
        images=[np.full((*size, 3), token + view, np.uint8) for view in range(views)],
        lidar2image=np.full((views, 4, 4), token, np.float32),
        lidar2camera=np.full((views, 4, 4), token, np.float32),
        points=np.full((points, 5), token, np.float32),
        point_labels=np.full(points, token, np.uint8) if labeled else None,
        boxes=np.full((boxes, 9), token, np.float32),
        labels=np.full(boxes, token, np.int64),
        token=str(token),
    )


class FakeDataset(torch.utils.data.Dataset):
    """A dataset of n frames; frame i is a `sample` with token i, those in `bad` cannot be read."""

    def __init__(self, n, bad=()):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def read(self, i, rng=None, paste=True):  # the signature of `DrivingDataset.read`
        if i in self.bad:
            raise BadFrame(f"frame-{i}", "is missing")
        return sample(i, points=i, size=(8, 8))


def tokens_of(n, count, **stream):
    """Tokens of each of the first `count` micro-batches of `step_batches` over n frames, with arguments `stream`."""
    batches = itertools.islice(step_batches(FakeDataset(n), **stream), count)
    return [tuple(int(t) for t in batch.tokens) for batch, _ in batches]


def test_images_are_padded_at_the_right_and_bottom():
    batch = collate([sample(7), sample(200, size=(20, 70))]).to("cpu")
    assert batch.images.shape == (2, 6, 3, 64, 96)  # the largest height and width, rounded up to multiples of 32
    assert batch.image_sizes[:, 0].tolist() == [[40, 33], [20, 70]]
    for i, (token, h, w) in enumerate([(7, 40, 33), (200, 20, 70)]):
        for view in range(6):
            image = batch.images[i, view]
            assert (image[:, :h, :w] == torch.tensor((token + view) / 255)).all()
            assert image.count_nonzero() == 3 * h * w


def test_an_image_that_fits_is_not_padded():
    assert collate([sample(1, size=(32, 64))]).images.shape == (1, 6, 3, 32, 64)


def test_ragged_fields_are_concatenated_with_counts():
    batch = collate([sample(1, points=3, boxes=0), sample(2, points=0, boxes=4)])
    assert batch.points[:, 0].tolist() == [1, 1, 1]
    assert batch.point_counts.tolist() == [3, 0] and batch.box_counts.tolist() == [0, 4]
    assert batch.boxes.shape == (4, 9) and batch.labels.tolist() == [2] * 4
    assert batch.point_labels.tolist() == [1, 1, 1]
    assert batch.tokens == ("1", "2") and len(batch) == 2
    assert batch.points.dtype == batch.boxes.dtype == batch.lidar2image.dtype == torch.float32
    assert batch.labels.dtype == batch.image_sizes.dtype == batch.point_counts.dtype == torch.int64
    assert batch.point_labels.dtype == torch.uint8


def test_point_labels_of_unlabeled_points_are_none():
    batch = collate([sample(1, labeled=False)])
    assert batch.point_labels is None
    assert batch.to("cpu").point_labels is None


def test_to_moves_all_but_the_counts():
    batch = collate([sample(1)]).to("meta")
    devices = {name: v.device.type for name, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    assert len(devices) == 10  # tensors of a batch without camera sweeps
    assert {name for name, device in devices.items() if device == "cpu"} == {"point_counts", "box_counts"}
    assert batch.tokens == ("1",)


def test_every_frame_appears_exactly_once_per_epoch():
    order = sum(tokens_of(5, count=5, micro_batch=2), ())  # 10 samples: two epochs of 5 frames
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5))
    assert order[:5] != order[5:]
    assert order != sum(tokens_of(5, count=5, micro_batch=2, seed=1), ())  # the default seed is 0


def test_a_stream_with_start_skips_that_many_micro_batches():
    assert tokens_of(7, count=9, micro_batch=3)[4:] == tokens_of(7, count=5, micro_batch=3, start=4)


def test_two_processes_get_the_samples_of_one():
    one = tokens_of(7, count=6, micro_batch=4)
    by_rank = [tokens_of(7, count=6, micro_batch=2, rank=rank, world=2) for rank in range(2)]
    assert one == [a + b for a, b in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(workers):
    assert tokens_of(7, count=5, micro_batch=3, workers=workers) == tokens_of(7, count=5, micro_batch=3)


def test_a_micro_batch_may_be_larger_than_the_dataset():
    (order,) = tokens_of(2, count=1, micro_batch=5)  # two epochs and a half
    assert sorted(order[:2]) == sorted(order[2:4]) == [0, 1]


def test_the_stream_does_not_touch_the_global_random_generator():
    state = torch.get_rng_state()
    tokens_of(3, count=1, micro_batch=1, workers=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_worker_loads_at_most_two_batches_ahead():
    """They wait in shared memory, so their number bounds it."""
    begun = []
    keys = (begun.append(i) or i for i in range(50))
    loaded = load_items(range(50), keys, workers=2)
    assert next(loaded) == 0 and len(begun) <= 1 + 2 * 2  # the batch in use, and two of each worker


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_frames_are_replaced_and_named(workers):
    stream = step_batches(FakeDataset(5, bad={1, 2, 4}), micro_batch=5, workers=workers)
    batch, bad_frames = next(stream)
    assert set(batch.tokens) == {"0", "3"} and len(batch) == 5
    assert set(bad_frames) == {f"frame-{i}: is missing" for i in (1, 2, 4)}


def test_bad_frames_are_replaced_by_uniformly_drawn_ones():
    """Only frames 0 and 11 of twelve can be read; replacing a bad frame by the next one would favor frame 11."""
    batches = itertools.islice(step_batches(FakeDataset(12, bad=range(1, 11)), micro_batch=12), 20)
    loaded = [token for batch, _ in batches for token in batch.tokens]
    # frame 0 itself once in each of 20 batches, and as half of the 200 replacements; 5 sigma
    assert abs(loaded.count("0") - 120) < 5 * np.sqrt(200 / 4)


def test_a_dataset_without_readable_frames_is_a_data_error(monkeypatch):
    monkeypatch.setattr(loader, "TRIES", 8)  # frames that are tried, of the 100
    with pytest.raises(DataError, match=r"none of the 8 frames can be read \(frame-\d+: is missing\)"):
        next(step_batches(FakeDataset(100, bad=range(100)), micro_batch=1))


def test_held_out_frames_are_evenly_spaced_and_divided_among_processes():
    frames = [(position, batch.tokens) for position, batch in held_out_batches(FakeDataset(10), count=4)]
    assert frames == [(0, ("0",)), (1, ("2",)), (2, ("5",)), (3, ("7",))]
    by_rank = [list(held_out_batches(FakeDataset(10), count=4, rank=rank, world=2)) for rank in range(2)]
    assert [[position for position, _ in batches] for batches in by_rank] == [[0, 2], [1, 3]]
    assert len(list(held_out_batches(FakeDataset(3), count=8))) == 3  # not more than the dataset has
