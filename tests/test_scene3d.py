"""The 3D view: its geometry compared with values worked out by hand, and its vertices as TensorBoard reads them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_rays import make_batch
from unipad.draw import scene3d
from unipad.run_folder import RunFolder
from unipad.runtime import World

FACES_OF_BAR = 6  # a box edge is drawn as a bar: an open prism with three sides of two triangles


def sphere(radius, stride=1):
    """Ends [rows * columns, 3] of the panorama's rays at a constant depth. stride: degrees between rays."""
    return radius * scene3d.panorama_rays("cpu", stride).directions.numpy()


@pytest.mark.parametrize("stride", [1, 8])
def test_surface_is_a_strip_all_around(stride):
    rows, columns = (-(-size // stride) for size in scene3d.PANORAMA)
    mesh = scene3d.surface_mesh(sphere(10.0, stride), columns)
    assert mesh.vertices.shape == (rows * columns, 3) and len(mesh.faces) == 2 * (rows - 1) * columns
    sides = mesh.vertices[mesh.faces] - mesh.vertices[np.roll(mesh.faces, 1, axis=1)]
    assert np.linalg.norm(sides, axis=2).max() < 10 * np.radians(stride) * 1.5  # m: a square's diagonal is 1.41 sides
    edges = np.sort(np.concatenate([mesh.faces[:, [i, (i + 1) % 3]] for i in range(3)]), axis=1)
    _, counts = np.unique(edges, axis=0, return_counts=True)
    assert (counts == 1).sum() == 2 * columns  # edges of one triangle: only at the top and the bottom


def test_surface_has_no_triangles_across_depth_discontinuities():
    ends = sphere(10.0).reshape(*scene3d.PANORAMA, 3)
    ends[:, :100] *= 3
    mesh = scene3d.surface_mesh(ends.reshape(-1, 3))
    depth = np.linalg.norm(mesh.vertices, axis=1)[mesh.faces]
    assert (depth.max(axis=1) < 1.01 * depth.min(axis=1)).all() and len(mesh.faces) > 0


def test_edges_of_a_box():
    # center, width, length, height, yaw, velocity
    box = torch.tensor([[10.0, 20.0, 1.0, 2.0, 4.0, 6.0, np.pi / 2, 0.0, 0.0]])  # yaw 90 degrees: 2 m in x, 4 m in y
    mesh = scene3d.box_mesh(box, scene3d.TRUTH)
    assert len(mesh.faces) == 12 * FACES_OF_BAR and (mesh.colors == 0).all()
    slack = scene3d.EDGE_SIZE
    assert abs(mesh.vertices.min(axis=0) - (9, 18, -2)).max() < slack
    assert abs(mesh.vertices.max(axis=0) - (11, 22, 4)).max() < slack
    for bar in np.split(mesh.vertices, 12):  # every bar is along one axis, and 0.1 m thick in the others
        assert (np.ptp(bar, axis=0) > 1.5).sum() == 1


def test_only_keyframe_points_are_drawn_and_at_most_max_points(monkeypatch):
    points = torch.tensor([[float(i), 0.0, 0.0, 0.0, 0.1 * (i >= 5)] for i in range(7)])
    batch = replace(make_batch([[]]), points=points, point_counts=torch.tensor([7]))
    assert len(scene3d.point_mesh(batch).faces) == 5  # the other two have a time lag
    monkeypatch.setattr(scene3d, "MAX_POINTS", 2)
    colors = np.arange(5)[:, None] / [255, 255, 255]  # point i has the gray value i
    mesh = scene3d.point_mesh(batch, colors)
    # every third of the five: points 0 and 3
    np.testing.assert_allclose(mesh.vertices.reshape(-1, 3, 3).mean(axis=1)[:, 0], [0, 3], atol=1e-6)
    assert mesh.colors[:, 0].tolist() == [0] * 3 + [3] * 3


def test_no_boxes_are_an_empty_mesh_that_can_be_joined():
    nothing = scene3d.box_mesh(torch.zeros(0, 9), [])
    assert len(nothing.vertices) == len(nothing.colors) == len(nothing.faces) == 0
    one = scene3d.box_mesh(torch.ones(1, 9), scene3d.TRUTH)
    # a box has 12 bars of 6 faces and 6 vertices each, 72 faces and 72 vertices in all
    np.testing.assert_array_equal(scene3d.joined(nothing, one, one).faces[72:], one.faces + 72)


def test_tensorboard_reads_the_vertices(tmp_path):
    run = RunFolder(tmp_path, {}, World(0, 1, torch.device("cpu")))
    mesh = scene3d.box_mesh(torch.ones(1, 9), scene3d.TRUTH)
    run.scene("val", mesh, 3)
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0})  # 0: keep all
    events.Reload()
    (event,) = events.Tensors("val_VERTEX")
    assert event.step == 3
    stored = np.array(event.tensor_proto.float_val or np.frombuffer(event.tensor_proto.tensor_content, np.float32))
    np.testing.assert_array_equal(stored.reshape(-1, 3), mesh.vertices)
