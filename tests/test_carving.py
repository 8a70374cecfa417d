"""The loss `occupancy`: targets and losses by hand, their place in a training step, metrics and picture."""

import contextlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import eval as evaluation
from tests.test_rays import make_batch
from unipad.checkpoint import take_weights, write_checkpoint
from unipad.cli import check_recipe
from unipad.config import Data, Grid
from unipad.config_dict import to_dict
from unipad.convert import convert_ours
from unipad.data.collate import collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.draw.carving import _from_above
from unipad.draw.views import rendered_views
from unipad.errors import UserError
from unipad.evaluate.rendering import evaluate_rendering
from unipad.kernels.carve import FREE, FULL, UNKNOWN
from unipad.model.carving import Carving
from unipad.model.detect import Detector
from unipad.model.pretrain import Pretrain
from unipad.optimizer import make_optimizer
from unipad.recipes import DETECT, PRETRAIN
from unipad.runtime import generators

CPU = torch.device("cpu")
TINY, OCCUPANCY = PRETRAIN["lidar"]["tiny"], PRETRAIN["lidar"]["tiny-occupancy"]
ALONE = replace(OCCUPANCY, render=replace(OCCUPANCY.render, depth_weight=0.0))
# One row of ten cells of a meter along x, from -5 to 5; the LiDAR is in the middle
ROW = replace(
    OCCUPANCY,
    grid=Grid(low=(-5.0, -0.5, -0.5), high=(5.0, 0.5, 0.5), cell=(1.0, 1.0, 1.0)),
    rays=replace(OCCUPANCY.rays, near_radius=1.2),
    render=replace(OCCUPANCY.render, channels=2, occupancy_window=0.2),
)


def row_of_cells(samples, lidars=None, recipe=ROW, **fields):
    """The target as text, `.` unknown, `o` free, `#` full; samples: lists of (x, time lag) of their points; lidars: the
    sweeps of each sample, (x, time lag), instead of the keyframe's alone; fields: others of the batch."""
    points = torch.tensor([[x, 0.0, 0.0, 9.0, lag] for sample in samples for x, lag in sample]).view(-1, 5)
    lidars = lidars or [[(0.0, 0.0)]] * len(samples)
    batch = replace(
        make_batch([[]] * len(samples)),
        points=points,
        point_counts=torch.tensor([len(sample) for sample in samples]),
        sweep_origins=torch.tensor([[[x, 0.0, 0.0, lag] for x, lag in sweeps] for sweeps in lidars]),
        **fields,
    )
    state = Carving(recipe).target(batch)
    assert state.dtype == torch.uint8 and state.shape == (len(samples), 1, 1, 10)
    return ["".join({UNKNOWN: ".", FREE: "o", FULL: "#"}[s] for s in row.flatten().tolist()) for row in state]


def test_cells_on_the_way_to_points_are_free_and_theirs_full():
    assert row_of_cells([[(3.5, 0.0), (-2.5, 0.0)], [(-3.5, 0.0)]]) == [
        "..#ooooo#.",
        ".#ooo.....",
    ]  # the LiDAR is on a border
    assert row_of_cells([[], [(9.0, 0.0)]]) == ["..........", ".....ooooo"]  # no points; one outside the grid


def test_rays_to_points_beyond_the_grid_free_cells():
    """As `read` keeps them apart, for each sample."""
    beyond = torch.tensor([[9.0, 0, 0, 0, 0], [-7.0, 0, 0, 0, 0], [8.0, 0, 0, 0, 0]])
    fields = dict(points_beyond=beyond, beyond_counts=torch.tensor([2, 1]))
    assert row_of_cells([[(2.5, 0.0)], [(-2.5, 0.0)]], **fields) == ["ooooooo#oo", "..#ooooooo"]


def test_points_near_the_lidar_are_not_used():
    """Those on the ego vehicle, at the time of their sweep: it was 2 m further back then."""
    lidars = [[(0.0, 0.0), (-2.0, 0.05)]]
    assert row_of_cells([[(1.1, 0.0)]], lidars) == [".........."]
    assert row_of_cells([[(-1.0, 0.05)]], lidars) == [".........."]
    assert row_of_cells([[(0.6, 0.05)]], lidars) == ["...oo#...."]


def test_rays_start_where_the_lidar_was_in_their_sweep():
    lidars = [[(0.0, 0.0), (-3.5, 0.05), (0.0, -1.0)], [(0.0, 0.0), (2.5, 0.1), (4.5, 0.15)]]
    assert row_of_cells([[(-1.5, 0.05)], [(0.5, 0.15)]], lidars) == [".oo#......", ".....#oooo"]
    assert row_of_cells([[(-1.5, 0.1)], [(0.5, 0.05)]], lidars) == [".........."] * 2  # lags of no sweep: not used


def test_newer_windows_decide_and_in_a_window_full_beats_free():
    """The window is 0.2 s: a point ends in cell 2.5, and a ray crosses it that is 0.1 s or 0.3 s newer, or older."""
    lidars = [[(0.0, lag) for lag in (0.0, 0.1, 0.3)]] * 3
    moved = [[(2.5, 0.1), (4.5, 0.0)], [(2.5, 0.3), (4.5, 0.0)], [(2.5, 0.0), (4.5, 0.3)]]
    assert row_of_cells(moved, lidars) == [".....oo#o#", ".....oooo#", ".....oo#o#"]
    one_window = replace(ROW, render=replace(ROW.render, occupancy_window=1.0))
    assert row_of_cells(moved, lidars, one_window) == [".....oo#o#"] * 3


def test_loss_by_hand():
    """One full cell and three free ones; one of each; free ones only, whose other mean counts as 0; no points."""
    net = Carving(replace(ROW, rays=replace(ROW.rays, near_radius=0.1)))
    batch = replace(
        make_batch([[]] * 4),
        points=torch.tensor([[x, 0, 0, 0, 0] for x in (3.5, 1.5, 9.0)]),
        point_counts=torch.tensor([1, 1, 1, 0]),
        sweep_origins=torch.zeros(4, 1, 4),
    )
    with torch.no_grad():
        net.linear.weight.copy_(torch.tensor([[1.0, 0.0]]))
        net.linear.bias.zero_()
    volume = torch.zeros(4, 2, 1, 1, 10)
    volume[0, 0, 0, 0] = torch.tensor([9.0, 9, 9, 9, 9, -1, 0.5, 2, 3, 9])  # logits; cells of 9 are unknown
    full, free = (lambda x: math.log1p(math.exp(-x))), (lambda x: math.log1p(math.exp(x)))
    first = (full(3) + (free(-1) + free(0.5) + free(2)) / 3) / 2
    assert net.loss(volume, batch).item() == pytest.approx((first + math.log(2) + math.log(2) / 2) / 4, rel=1e-6)
    volume.requires_grad_()
    net.loss(volume, batch).backward()
    assert (volume.grad[:, 0] != 0).flatten(1).sum(1).tolist() == [4, 2, 5, 0]
    assert volume.grad[0, 0, 0, 0, 8] < 0 < volume.grad[0, 0, 0, 0, 5]


def test_the_window_must_be_above_0():
    with pytest.raises(UserError, match=r"--render.occupancy-window 0.0 must be above 0\."):
        replace(OCCUPANCY.render, occupancy_window=0.0)


def test_some_loss_must_have_a_weight():
    with pytest.raises(UserError, match="no loss has a weight above 0"):
        check_recipe(replace(ALONE, render=replace(ALONE.render, occupancy_weight=0.0)))
    check_recipe(ALONE)


def test_a_batch_without_origins_is_rejected():
    with pytest.raises(UserError, match=r"does not say where the LiDAR was .* return Sample.sweep_origins"):
        Carving(ROW).target(make_batch([[]]))


def test_logits_are_not_rounded_under_autocast():
    net, volume = Carving(ROW), torch.randn(1, 2, 1, 1, 10)
    expected = net(volume)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(volume), expected) and net(volume.bfloat16()).dtype == torch.float32


@pytest.fixture(scope="module")
def samples(city):
    """A scene's first keyframe, which has no sweeps, and the next one."""
    box, data = (TINY.grid.low, TINY.grid.high), Data(sweeps=3, cameras=False)
    dataset = NuScenesDataset(city, "v1.0-mini", "mini_train", data, point_range=box).with_points_beyond()
    return dataset[0], dataset[1]


@pytest.fixture(scope="module")
def batch(samples):
    return collate(list(samples)).to(CPU)


@pytest.mark.parametrize("name", ["points", "points_beyond"])
def test_a_lag_of_no_sweep_is_refused(name, samples):
    """Also one that differs in its last bit alone."""
    points = getattr(samples[1], name).copy()
    row = points[:, 4].argmax()
    assert points[row, 4] > 0
    points[row, 4] = np.nextafter(points[row, 4], np.float32(1))
    with pytest.raises(UserError, match=f"{samples[1].token} has points with the time lag 0.*, which is not in Sample"):
        collate([samples[0], replace(samples[1], **{name: points})])


def test_a_dataset_keeps_points_beyond_only_where_a_loss_reads_them(city):
    box = TINY.grid.low, TINY.grid.high
    data = Data(sweeps=2, cameras=False)
    everything = NuScenesDataset(city, "v1.0-mini", "mini_val", data)[1]
    for recipe in (replace(TINY, data=data), replace(OCCUPANCY, data=data)):
        for dataset in NuScenesDataset.train_and_val(city, "v1.0-mini", recipe, 1.0, box):
            assert dataset.keeps_beyond == (recipe.render.occupancy_weight > 0)
        sample, batch = dataset[1], collate([dataset[1], dataset[0]])  # of the validation set, without augmentation
        if not dataset.keeps_beyond:
            fields = "sweep_origins", "points_beyond", "beyond_counts"
            assert all(getattr(batch, name) is None for name in fields) and sample.points_beyond is None
            continue
        xyz, (low, high) = everything.points[:, :3], np.float32(box)
        inside = ((xyz > low) & (xyz < high)).all(axis=1)
        assert (~inside).sum() > 100 and np.array_equal(sample.points, everything.points[inside])
        assert np.array_equal(sample.points_beyond, everything.points[~inside])
        assert batch.beyond_counts.tolist() == [len(dataset[i].points_beyond) for i in (1, 0)]
        assert torch.equal(batch.points_beyond[: len(sample.points_beyond)], torch.from_numpy(sample.points_beyond))
        assert batch.to("cpu").beyond_counts is batch.beyond_counts  # counts stay on the host


def losses_of(recipe, batch):
    torch.manual_seed(0)
    net = Pretrain(recipe)
    return net, *net(batch, generators(0, 0, range(len(batch)), CPU))


def test_other_losses_and_initial_weights_do_not_change(batch):
    plain, expected, missed = losses_of(TINY, batch)
    net, losses, with_occupancy = losses_of(OCCUPANCY, batch)
    weights = net.state_dict()
    assert weights.keys() - plain.state_dict().keys() == {"carving.linear.weight", "carving.linear.bias"}
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    assert expected.keys() == {"depth"} and losses.keys() == {"depth", "occupancy"}
    assert torch.equal(losses["depth"], expected["depth"]) and torch.equal(missed, with_occupancy)


def test_loss_is_the_mean_of_the_samples_losses(samples, batch):
    """So micro-batches and processes average to the loss of the whole batch."""
    net, volume = Carving(OCCUPANCY), torch.randn(2, OCCUPANCY.render.channels, 6, 64, 64)
    singles = [net.loss(volume[b : b + 1], collate([sample]).to(CPU)) for b, sample in enumerate(samples)]
    assert abs(singles[0] - singles[1]) > 1e-4
    torch.testing.assert_close(net.loss(volume, batch), sum(singles) / 2)


def test_without_other_losses_no_ray_is_cast(batch, monkeypatch):
    monkeypatch.setattr("unipad.model.render.Renderer.forward", None)  # fails if called
    net, losses, missed = losses_of(ALONE, batch)
    assert losses.keys() == {"occupancy"} and missed == 0
    sum(losses.values()).backward()
    # else DDP would wait for their gradients
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    trained = {id(p) for group in make_optimizer(net, ALONE.optim).param_groups for p in group["params"]}
    assert trained == {id(p) for p in net.parameters() if p.requires_grad}
    assert evaluate_rendering(net, [(0, batch)], 0, CPU).keys() == {"occupancy_iou_full", "occupancy_iou_free"}
    assert rendered_views(net, batch, None).std() > 10  # without rows of what would be rendered


LOSSES = "depth", "rgb", "free_space", "sdf", "eikonal", "points", "photometric", "features", "occupancy"


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_but_occupancy_casts_rays(loss, batch, monkeypatch):
    """As `Render.renders` says and as a training step does; with no loss there is nothing to render."""

    class Rendered(Exception):
        pass

    def forward(*args, **kwargs):
        raise Rendered

    monkeypatch.setattr("unipad.model.render.Renderer.forward", forward)
    nothing = replace(TINY.render, **{f"{name}_weight": 0.0 for name in LOSSES})
    assert not nothing.renders and not any(v for name, v in vars(nothing).items() if name.endswith("_weight"))
    render, data = replace(nothing, **{f"{loss}_weight": 0.1}), replace(TINY.data, feature_channels=3)
    alone = replace(TINY, render=render, data=data)
    assert alone.render.renders == (loss != "occupancy")
    with pytest.raises(Rendered) if alone.render.renders else contextlib.nullcontext():
        losses_of(alone, batch)


def test_iou_by_hand(batch):
    """Of a model that calls every cell full, and one that calls every cell free."""
    net, *_ = losses_of(ALONE, batch)
    state = net.carving.target(batch)
    full, free = (state == FULL).sum().item(), (state == FREE).sum().item()
    assert min(full, free) > 100
    with torch.no_grad():
        net.carving.linear.weight.zero_()
    for bias, expected in ((1.0, [full / (full + free), 0]), (-1.0, [0, free / (full + free)])):
        net.carving.linear.bias.data.fill_(bias)
        metrics = evaluate_rendering(net, [(0, batch)], 0, CPU)
        assert list(metrics.values()) == pytest.approx(expected)

    def rows(volume):  # full where y is even
        logits = torch.full(state.shape, -1.0)
        logits[:, :, ::2] = 1.0
        return logits

    net.carving.forward = rows
    even = torch.zeros_like(state, dtype=torch.bool)
    even[:, :, ::2] = True
    metrics = evaluate_rendering(net, [(0, batch)], 0, CPU)
    right, known = ((state == FULL) & even).sum().item(), full + free
    missed, false = full - right, ((state == FREE) & even).sum().item()
    assert metrics["occupancy_iou_full"] == pytest.approx(right / (right + missed + false))
    assert metrics["occupancy_iou_free"] == pytest.approx((free - false) / (known - right))


def test_only_the_encoder_is_taken_for_fine_tuning_and_the_original_gets_no_carving(batch, tmp_path):
    net, *_ = losses_of(OCCUPANCY, batch)
    saved = {"model": net.state_dict(), "step": 1, "config": {"recipe": to_dict(OCCUPANCY), "args": {}, "steps": 1}}
    converted, report = convert_ours(saved)
    assert report.faults == 0 and not any("carving" in name for name in converted["state_dict"])
    assert "dropped: carving.linear.weight, which the original does not have" in report.notes
    write_checkpoint(saved, tmp_path / "run.pt")
    detector = Detector(DETECT["lidar"]["tiny"])
    take_weights(detector, "encoder.", [tmp_path / "run.pt"], "--pretrained", print)
    assert all(torch.equal(t, net.encoder.state_dict()[name]) for name, t in detector.encoder.state_dict().items())


def test_picture_from_above():
    """Columns of a carved and a predicted state: forward is at the top, the highest full cell gives the color."""
    state = torch.tensor([[[UNKNOWN, FREE], [FULL, FULL]], [[UNKNOWN, FULL], [FREE, FULL]]]).numpy()  # [Z, Y, X]
    shown = _from_above(state, Grid((0, 0, 0), (2, 2, 2), (1, 1, 1)), lambda z: z, lambda z: z[..., None].repeat(4, -1))
    assert shown[..., 0].tolist() == [[0, 1.5], [0.5, 1.5]] and shown[0, 0].tolist() == [0, 0, 0]


def test_a_run_of_occupancy_alone_is_evaluated_without_a_mesh(city, tmp_path):
    config = {"args": {"data_root": str(city), "version": "v1.0-mini"}, "recipe": to_dict(ALONE), "steps": 1}
    write_checkpoint({"model": Pretrain(ALONE).state_dict(), "step": 1, "config": config}, tmp_path / "run.pt")
    flags = [tmp_path / "run.pt", "--device", "cpu", "--workers", 0, "--pictures", 1]
    evaluation.main(evaluation.parse(flags))
    metrics = json.loads((tmp_path / "eval" / "render.json").read_text())
    assert metrics.keys() == {"frames", "occupancy_iou_full", "occupancy_iou_free"}
    assert (tmp_path / "eval" / "frame_00000.png").exists()
    with pytest.raises(UserError, match="--mesh needs a run that learned to render"):
        evaluation.main(evaluation.parse([*flags, "--mesh"]))


def test_pictures_have_cells_from_above_below_the_views(batch):
    net, *_ = losses_of(OCCUPANCY, batch)
    plain, *_ = losses_of(TINY, batch)
    sheet, picture = rendered_views(plain, batch, None), rendered_views(net, batch, None)
    assert picture.dtype == sheet.dtype and (picture[: len(sheet)] == sheet).all()
    assert picture[len(sheet) :].std() > 10 and net.training
