"""Boxes in our format, as the head's codes, as the original's (mmdet3d 0.17) and as nuScenes' global boxes.

yaw is counterclockwise from +x; the original's, yaw' = -yaw - pi / 2, is clockwise from -y.
"""

import math

import numpy as np
import pytest
import torch
from pyquaternion import Quaternion

from tests.golden import assert_close_to_max, load
from tests.original_boxes import boxes_from_original, boxes_to_original
from unipad.boxes import (
    box_corners,
    boxes_from_global,
    boxes_to_global,
    decode_boxes,
    encode_boxes,
    footprint,
)

# One box: x, y, z of the center, w, l, h, yaw (30 degrees), vx, vy
BOX = torch.tensor([[1.0, 2.0, 3.0, 2.0, 4.0, 1.5, math.pi / 6, 5.0, -6.0]], dtype=torch.float64)


def random_boxes(n):
    boxes = torch.randn(n, 9, dtype=torch.float64) * 10
    boxes[:, 3:6] = 0.2 + 5 * torch.rand(n, 3, dtype=torch.float64)
    boxes[:, 6] = (2 * torch.rand(n, dtype=torch.float64) - 1) * math.pi
    return boxes


def at_center(boxes):
    """Boxes of the original's box coder as in `Batch`.

    Its z is that of the center; elsewhere in the original it is that of the bottom, as `boxes_from_original` assumes.
    """
    ours = boxes_from_original(boxes)
    ours[..., 2] -= ours[..., 5] / 2  # undoes the shift from the bottom to the center
    return ours


def test_conversions_by_hand():
    # x, y, log w, log l, z, log h, sin and cos of yaw' = -30 - 90 degrees, vx, vy
    code = torch.tensor([[1, 2, math.log(2), math.log(4), 3, math.log(1.5), -(0.75**0.5), -0.5, 5, -6]])
    assert torch.allclose(encode_boxes(BOX), code.double(), rtol=0, atol=1e-7)
    original = boxes_to_original(BOX)
    # z of the bottom: 3 - 1.5 / 2
    assert original[0, 2] == 2.25 and original[0, 6].item() == pytest.approx(-2 * math.pi / 3)
    assert footprint(BOX).tolist() == [[1, 2, 2, 4, math.pi / 6]]


@pytest.mark.parametrize("yaw, original_yaw", [(-math.pi / 2, 0.0), (math.pi, math.pi / 2), (0.0, -math.pi / 2)])
def test_the_originals_yaw_is_clockwise_from_minus_y(yaw, original_yaw):
    box = BOX.clone()
    box[0, 6] = yaw
    assert boxes_to_original(box)[0, 6].item() == pytest.approx(original_yaw)


def test_inverse_conversions_restore_the_boxes():
    boxes = random_boxes(50)
    for convert, invert in ((encode_boxes, decode_boxes), (boxes_to_original, boxes_from_original)):
        assert torch.allclose(invert(convert(boxes)), boxes, rtol=0, atol=1e-12)
        assert invert(convert(boxes[:0])).shape == (0, 9)
    stretched = encode_boxes(boxes)
    stretched[:, 6:8] *= 3  # sin and cos as a network predicts them
    assert torch.allclose(decode_boxes(stretched), boxes, rtol=0, atol=1e-12)


def test_box_codes_match_the_original():
    arrays, _ = load("det_box_utils")
    boxes = at_center(arrays["in/boxes"])
    assert_close_to_max(encode_boxes(boxes), arrays["out/normalized"], 1e-6)
    decoded = decode_boxes(arrays["out/normalized"])
    yaw_error = (decoded - at_center(arrays["out/denormalized"]))[:, 6]
    assert torch.allclose(yaw_error.cos(), torch.ones(40))  # equal up to multiples of 2 pi
    rest = [0, 1, 2, 3, 4, 5, 7, 8]  # all but yaw
    assert_close_to_max(decoded[:, rest], boxes[:, rest], 1e-6)


def test_the_front_left_corner_is_where_the_original_has_it():
    """mmdet3d 0.17 puts w along x and l along y, then rotates clockwise by yaw'."""
    boxes = random_boxes(20)
    for box, original in zip(boxes, boxes_to_original(boxes), strict=True):
        w, l, yaw = box[3], box[4], box[6]
        ahead, left = torch.stack([yaw.cos(), yaw.sin()]), torch.stack([-yaw.sin(), yaw.cos()])
        front_left = box[:2] + l / 2 * ahead + w / 2 * left
        cos, sin = original[6].cos(), original[6].sin()
        dx, dy = original[3] / 2, -original[4] / 2  # w / 2, -l / 2: front left, since yaw' = 0 heads along -y
        rotated = torch.stack([dx * cos + dy * sin, -dx * sin + dy * cos])
        assert torch.allclose(original[:2] + rotated, front_left, atol=1e-12)


def test_to_global_is_the_inverse_of_from_global():
    lidar2global = Quaternion(axis=(0.01, -0.02, 1), angle=2.2).transformation_matrix
    lidar2global[:3, 3] = (400.0, 1100.0, 1.8)
    boxes = random_boxes(8).float()
    translation, size, rotation, velocity = boxes_to_global(boxes, lidar2global)
    box2global = np.tile(np.eye(4), (8, 1, 1))
    box2global[:, :3, :3] = [Quaternion(q).rotation_matrix for q in rotation]
    box2global[:, :3, 3] = translation
    back = boxes_from_global(box2global, size, velocity, np.tile(lidar2global, (8, 1, 1)))
    np.testing.assert_allclose(back[:, :7], boxes[:, :7], rtol=0, atol=2e-5)
    np.testing.assert_allclose(back[:, 7:], boxes[:, 7:], rtol=0, atol=0.05)  # m/s: the LiDAR is tilted, and vz is lost
    assert [len(t) for t in boxes_to_global(boxes[:0], lidar2global)] == [0, 0, 0, 0]


def test_to_global_by_hand():
    lidar2global = np.eye(4)
    lidar2global[:2, :2] = [[0, -1], [1, 0]]  # 90 degrees counterclockwise
    lidar2global[:3, 3] = (10, 20, 30)
    translation, size, rotation, velocity = boxes_to_global(BOX, lidar2global)
    assert translation.tolist() == [[8, 21, 33]] and size.tolist() == [[2, 4, 1.5]] and velocity.tolist() == [[6, 5]]
    expected = Quaternion(axis=(0, 0, 1), degrees=120)  # the box's 30 + 90
    assert Quaternion(rotation[0]).rotation_matrix == pytest.approx(expected.rotation_matrix)


def test_corners_by_hand():
    """A box that heads along +y, so that its left side is at -x."""
    corners = box_corners(np.array([[1.0, 2, 3, 2, 4, 6, math.pi / 2, 0, 0]]))
    bottom = [[0, 4], [2, 4], [2, 0], [0, 0]]  # front left, front right, back right, back left
    expected = [[x, y, z] for z in (0, 6) for x, y in bottom]
    np.testing.assert_allclose(corners, [expected], rtol=0, atol=1e-12)
    assert box_corners(np.zeros((0, 9))).shape == (0, 8, 3)
