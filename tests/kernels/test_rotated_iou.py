from math import pi, sqrt

import numpy as np
import pytest
import torch

from tests import golden
from tests.ahead_of_time import Launch
from tests.check import check_against_ref, launches
from unipad.kernels.rotated_iou import (
    BLOCK_M,
    BLOCK_N,
    BLOCK_P,
    _greedy,
    paired_iou_3d,
    paired_iou_3d_ref,
    rotated_iou_bev,
    rotated_iou_bev_ref,
    rotated_nms,
    rotated_nms_ref,
)

BEV = [0, 1, 3, 4, 6]  # columns x, y, w, l, yaw of a 3D box
TYPES = dict(order_ptr="*i64", suppressed_ptr="*i32", kept_ptr="*i1")
# stack=32: the cosine's range reduction for huge angles takes 32 bytes of stack with Triton 3.6, none with 3.9.
# No fp64, which takes more stack and twice the registers per pair: only tests run the kernels in it.
LAUNCHES = [
    Launch(kernel, blocks, TYPES, elements=("fp32",), num_warps=warps, registers=registers, shared=shared, stack=32)
    for kernel, blocks, warps, registers, shared in [
        ("_iou_kernel", dict(BLOCK_N=BLOCK_N, BLOCK_M=BLOCK_M), 8, 64, 0),
        ("_suppress_kernel", {}, 8, 96, 128),
        ("_greedy_kernel", dict(BLOCK_W=32), 1, 96, 0),  # up to 1024 boxes: 32 words of 32 bits
        ("_greedy_kernel", dict(BLOCK_W=256), 8, 112, 32),  # up to 8192 boxes
        ("_paired_kernel", dict(BLOCK_P=BLOCK_P), 4, 48, 0),
    ]
]


def make_boxes(N, device):
    """[N, 5] fp64 (x, y, w, l, yaw), close together; six of every ten are special cases, alone or in pairs."""
    spread = torch.tensor([8, 8, 6, 6, 8], dtype=torch.float64, device=device)
    boxes = torch.rand(N, 5, dtype=torch.float64, device=device) * spread
    boxes[:, :2] -= 4
    boxes[:, 2:4] += 0.3
    boxes[:, 4] -= 4
    boxes[1::10] = (boxes[1::10] * 2).round() / 2  # on a grid of half meters: equal, touching, contained ...
    boxes[2::10] = (boxes[2::10] * 2).round() / 2
    boxes[1::10, 4] = (boxes[1::10, 4] / (pi / 2)).round() * (pi / 2)  # ... and axis-aligned
    boxes[2::10, 4] = (boxes[2::10, 4] / (pi / 2)).round() * (pi / 2)
    boxes[3::10] = boxes[2:-1:10]  # the same box as the one before
    boxes[4::10] = boxes[2:-2:10] + boxes.new_tensor([0, 0, 0, 0, 1e-7])  # almost equal to those two, or equal in fp32
    boxes[5::10, 2:4] = boxes.new_tensor([0.1, 12])  # thin
    boxes[6::10, 2 + N % 2] = 0  # no area: no width for even N, no length for odd N
    # rounded to fp32, so that every type gets the same boxes
    return boxes.float().double()


def make_boxes_3d(N, device):
    """[N, 7] fp64 (x, y, z, w, l, h, yaw), z and h on a grid of half meters: equal, touching, contained."""
    z_h = (torch.rand(N, 2, dtype=torch.float64, device=device) * 6).round() / 2
    boxes = make_boxes(N, device)
    return torch.cat([boxes[:, :2], z_h[:, :1], boxes[:, 2:4], z_h[:, 1:], boxes[:, 4:]], dim=1)


def intersection_area(a, b):
    """Intersection areas [P] of boxes [P, 5] each, by shapely."""
    shapely = pytest.importorskip("shapely")
    a, b = a.cpu().double().numpy(), b.cpu().double().numpy()
    area = np.zeros(len(a))
    solid = (a[:, 2:4].min(axis=1) > 0) & (b[:, 2:4].min(axis=1) > 0)  # boxes without area are not valid polygons
    polygons = [shapely.polygons(corners(boxes[solid])) for boxes in (a, b)]
    area[solid] = shapely.area(shapely.intersection(*polygons))
    return torch.from_numpy(area)


def corners(boxes):
    """[P, 4, 2] (x, y) of the corners, counter-clockwise."""
    x, y, w, l, yaw = boxes.T[..., None]
    along, across = l / 2 * np.array([1, 1, -1, -1]), w / 2 * np.array([-1, 1, 1, -1])
    return np.stack([x + along * np.cos(yaw) - across * np.sin(yaw), y + along * np.sin(yaw) + across * np.cos(yaw)], 2)


@pytest.mark.parametrize("N, M", [(1, 1), (7, 5), (BLOCK_N, BLOCK_M), (BLOCK_N + 1, 2 * BLOCK_M + 1), (0, 3), (3, 0)])
def test_iou_matches_reference(N, M, device):
    inputs = dict(a=make_boxes(N, device), b=make_boxes(M, device))
    check_against_ref(rotated_iou_bev, rotated_iou_bev_ref, inputs, torch.float32)


@pytest.mark.parametrize("N", [1, 7, BLOCK_P, BLOCK_P + 1, 0])
def test_paired_matches_reference(N, device):
    inputs = dict(a=make_boxes_3d(N, device), b=make_boxes_3d(N, device))
    check_against_ref(paired_iou_3d, paired_iou_3d_ref, inputs, torch.float32)


@pytest.mark.parametrize("fn", [rotated_iou_bev, rotated_iou_bev_ref])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_iou_matches_polygon_clipping(fn, dtype, atol, device):
    """10,000 pairs: a sixth on a common grid, a third with a thin box or one without area, dozens equal."""
    a, b = make_boxes(100, device), make_boxes(100, device)
    b[::4] = a[::4]
    i, j = torch.cartesian_prod(torch.arange(100), torch.arange(100)).T
    intersection = intersection_area(a[i], b[j]).to(device)
    union = (a[:, 2] * a[:, 3])[i] + (b[:, 2] * b[:, 3])[j] - intersection
    expected = torch.where(union > 0, intersection / union, 0).view(100, 100)
    assert (expected > 0).float().mean() > 0.3 and (expected > 0.999).sum() > 10
    iou = fn(a.to(dtype), b.to(dtype))
    assert iou.dtype == dtype and iou.min() >= 0 and iou.max() <= 1
    torch.testing.assert_close(iou.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("bev, paired", [(rotated_iou_bev, paired_iou_3d), (rotated_iou_bev_ref, paired_iou_3d_ref)])
def test_boxes_of_negative_size_have_no_area(bev, paired, device):
    """Also compared with themselves, and with two negative sizes, whose product is positive."""
    solid = torch.tensor([0.0, 0, 0, 2, 4, 1, 0.3], device=device)
    boxes = solid.repeat(8, 1) * torch.tensor(
        [[1, 1, 1, w, l, h, 1] for w in (1, -1) for l in (1, -1) for h in (1, -1)], device=device
    )
    expected = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0], device=device)  # only the first has no negative size
    flat = boxes[::2, BEV]  # those of positive height
    torch.testing.assert_close(bev(flat, flat), torch.diag(expected[::2]), rtol=0, atol=1e-6)
    for a, b in ((boxes, solid.expand(8, 7)), (solid.expand(8, 7), boxes), (boxes, boxes)):
        torch.testing.assert_close(paired(a, b), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fn", [paired_iou_3d, paired_iou_3d_ref])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_paired_matches_polygon_clipping_times_height(fn, dtype, atol, device):
    N = 10000 if fn is paired_iou_3d_ref else 2000  # the interpreter is slow
    a, b = make_boxes_3d(N, device), make_boxes_3d(N, device)
    b[::9] = a[::9]
    height = torch.minimum(a[:, 2] + a[:, 5] / 2, b[:, 2] + b[:, 5] / 2)
    height = (height - torch.maximum(a[:, 2] - a[:, 5] / 2, b[:, 2] - b[:, 5] / 2)).clamp(min=0)
    intersection = intersection_area(a[:, BEV], b[:, BEV]).to(device) * height
    union = a[:, 3:6].prod(dim=1) + b[:, 3:6].prod(dim=1) - intersection
    expected = torch.where(union > 0, intersection / union, 0)
    iou = fn(a.to(dtype), b.to(dtype))
    assert iou.min() >= 0 and iou.max() <= 1
    torch.testing.assert_close(iou.double(), expected, rtol=0, atol=atol)


BY_HAND = [  # a and b, each x, y, w, l, yaw; their IoU
    ((0, 0, 1, 1, 0), (0.5, 0, 1, 1, 0), 1 / 3),
    ((0, 0, 1, 1, 0), (0.5, 0.5, 1, 1, 0), 1 / 7),
    ((0, 0, 2, 2, 0), (0, 0, 2, 2, pi / 4), 1 / sqrt(2)),  # the intersection is an octagon of area 8 (sqrt 2 - 1)
    ((0, 0, 1, 4, pi / 2), (0, 0, 4, 1, 0), 1),  # l lies along the heading
    ((0, 0, 2, 8, pi / 4), (2, 2, 1, 1, 0.3), 1 / 16),  # counter-clockwise yaw: a contains b ...
    ((0, 0, 2, 8, pi / 4), (2, -2, 1, 1, 0.3), 0),  # ... but not b mirrored
    ((0, 0, 4, 4, 0), (1, 0, 1, 2, 0), 1 / 8),  # contained, one edge on an edge
    ((5, 5, 4, 2, 1.1), (5, 5, 4, 2, 1.1), 1),
    ((5, 5, 4, 2, 1.1), (5, 5, 4, 2, 1.1 + pi), 1),  # rotated by pi
    ((0, 0, 2, 2, 0), (2, 0, 2, 2, 0), 0),  # one edge in common
    ((0, 0, 2, 2, 0), (2, 2, 2, 2, 0), 0),  # one corner
    ((0, 0, 2, 2, 0), (1 + sqrt(2), 0, 2, 2, pi / 4), 0),  # a corner on an edge
    ((0, 0, 0, 4, 0.3), (0, 0, 0, 4, 0.3), 0),  # two boxes without area
    ((0, 0, 0, 0, 0), (0, 0, 2, 2, 0.3), 0),  # a point
    ((0, 0, 1e-3, 1e3, 0), (0, 0, 1e-3, 1e3, pi / 2), 1e-6 / (2 - 1e-6)),  # a cross
    ((1e6, -1e6, 2, 2, 0), (1e6 + 1, -1e6, 2, 2, 0), 1 / 3),
    ((-1e30, 1e30, 2, 2, 0.1), (1e30, 1e30, 2, 2, 0.7), 0),
]


@pytest.mark.parametrize("fn", [rotated_iou_bev, rotated_iou_bev_ref])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 5e-7), (torch.float64, 1e-14)], ids=str)
def test_iou_by_hand(fn, dtype, atol, device):
    a, b, expected = (torch.tensor(t, dtype=torch.float64, device=device).to(dtype) for t in zip(*BY_HAND, strict=True))
    for first, second in ((a, b), (b, a)):
        torch.testing.assert_close(fn(first, second).diagonal(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("fn", [paired_iou_3d, paired_iou_3d_ref])
def test_paired_by_hand(fn, device):
    """Pairs: equal; half the height apart; twice the height, half the length; stacked; far above; without height."""
    a = torch.tensor([[1.0, 2, 3, 2, 4, 2, 0.7]], device=device).repeat(6, 1)
    b = a.clone()
    b[1, 2] += 1
    b[2, 5], b[2, 4] = 4, 2
    b[3, 2] += 2
    b[4, 2] += 1e9
    b[5, 5] = a[5, 5] = 0
    expected = a.new_tensor([1, 1 / 3, 1 / 3, 0, 0, 0])
    torch.testing.assert_close(fn(a, b), expected, rtol=0, atol=5e-7)


def test_iou_is_symmetric_and_invariant_to_similarity_transforms(device):
    """Up to fp32 rounding; exactly for a shift, which does not round centers that are multiples of 1/64 m.

    Also the same if a box is written with width and length swapped and the yaw a quarter turn further.
    """
    a, b = (make_boxes(40, device).float() for _ in range(2))
    for boxes in (a, b):
        boxes[:, :2] = (boxes[:, :2] * 64).round() / 64
        boxes[:, 2:4] = boxes[:, 2:4].clamp(min=0.3)  # IoUs of thinner boxes are less accurate
    iou = rotated_iou_bev(a, b)
    close = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated_iou_bev(b, a).T, iou, **close)
    shift = a.new_tensor([4096, -8192, 0, 0, 0])
    assert torch.equal(rotated_iou_bev(a + shift, b + shift), iou)
    rotated = [rotate(boxes.double(), 0.777).float() for boxes in (a, b)]
    torch.testing.assert_close(rotated_iou_bev(*rotated), iou, **close)
    mirror = a.new_tensor([1, -1, 1, 1, -1])
    torch.testing.assert_close(rotated_iou_bev(a * mirror, b * mirror), iou, **close)
    scale = a.new_tensor([8, 8, 8, 8, 1])
    torch.testing.assert_close(rotated_iou_bev(a * scale, b * scale), iou, **close)
    swapped = a[:, [0, 1, 3, 2, 4]] + a.new_tensor([0, 0, 0, 0, pi / 2])
    torch.testing.assert_close(rotated_iou_bev(swapped, b), iou, **close)


def rotate(boxes, angle):
    """Boxes [N, 5] rotated about the origin."""
    x, y, w, l, yaw = boxes.unbind(1)
    angle = torch.tensor(angle, dtype=boxes.dtype)
    c, s = angle.cos(), angle.sin()
    return torch.stack([c * x - s * y, s * x + c * y, w, l, yaw + angle], dim=1)


def kept_by_definition(boxes, scores, threshold):
    """Rows that are kept, by the definition of greedy NMS."""
    iou = rotated_iou_bev_ref(boxes.double(), boxes.double())
    rows = sorted(range(len(boxes)), key=lambda row: (-scores[row].item(), row))
    kept = []
    for row in rows:
        if all(iou[row, other] <= threshold for other in kept):
            kept.append(row)
    return kept


@pytest.mark.parametrize("fn", [rotated_nms, rotated_nms_ref])
@pytest.mark.parametrize("N", [1, 31, 32, 33, 80])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7])
def test_nms_is_greedy(fn, N, threshold, device):
    boxes, scores = make_boxes(N, device).float(), (torch.rand(N, device=device) * 20).round()  # many ties
    with launches() as launched:
        rows = fn(boxes, scores, threshold)
    assert bool(launched) == (fn is rotated_nms)
    assert rows.dtype == torch.int64 and rows.tolist() == kept_by_definition(boxes, scores, threshold)
    assert torch.equal(fn(boxes, scores, threshold), rows)  # deterministic


@pytest.mark.parametrize("fn", [rotated_nms, rotated_nms_ref])
def test_nms_by_hand(fn, device):
    """Squares of 1 m on a line. At threshold 0.2 box 2 suppresses box 1, so that box 0, which overlaps box 1, is kept;
    box 3 equals box 2, but is in a later row."""
    boxes = torch.zeros(5, 5, device=device)
    boxes[:, 0] = torch.tensor([0.8, 0.4, 0, 0, 1.6], device=device)
    boxes[:, 2:4] = 1
    scores = torch.tensor([0.1, 0.5, 0.9, 0.9, 0.05], device=device)
    assert fn(boxes, scores, 0.2).tolist() == [2, 0, 4]  # IoU is 3 / 7 at 0.4 m, 1 / 9 at 0.8 m
    assert fn(boxes, scores, 0.45).tolist() == [2, 1, 0, 4]
    assert fn(boxes, scores, 1.0).tolist() == [2, 3, 1, 0, 4]  # no IoU is greater than 1
    assert fn(boxes[:0], scores[:0], 0.2).tolist() == []


@pytest.mark.parametrize("fn", [rotated_nms, rotated_nms_ref])
def test_nms_keeps_every_other_box_of_a_chain(fn, device):
    """Each box overlaps the next: every other one is kept, the last decided after all others."""
    boxes = torch.tensor([[0, 0, 1, 1, 0.0]], device=device).repeat(101, 1)
    boxes[:, 0] = torch.arange(101, device=device) * 0.6
    rows = fn(boxes, -torch.arange(101.0, device=device), 0.2)
    assert rows.tolist() == list(range(0, 101, 2))


def test_nms_of_more_boxes_than_a_warp_holds(device):
    """1100 boxes are 35 words of 32 bits, the last ones in a second warp. Which box suppresses which is random."""
    N, W = 1100, 35
    suppresses = torch.zeros(32 * W, 32 * W, dtype=torch.bool, device=device)
    suppresses[:N, :N] = (torch.rand(N, N, device=device) < 0.01).triu(diagonal=1)
    bits = suppresses.view(32 * W, W, 32) * 2 ** torch.arange(32, device=device)
    with launches() as launched:
        kept = _greedy(bits.sum(dim=2).int(), N)
    assert launched == ["_greedy_kernel"]
    expected = torch.ones(N, dtype=torch.bool, device=device)
    for i in range(N):
        expected &= ~(suppresses[i, :N] & expected[i])
    assert torch.equal(kept, expected) and 100 < expected.sum() < 1000


def from_mmdet3d(boxes):
    """Our [N, 7] boxes from those of mmdet3d 0.17, whose z is at the bottom and whose yaw is clockwise from -y."""
    x, y, z, w, l, h, yaw = boxes[:, :7].unbind(1)
    return torch.stack([x, y, z + h / 2, w, l, h, -yaw - pi / 2], dim=1)


@pytest.mark.parametrize("bev, paired, nms", [
    (rotated_iou_bev, paired_iou_3d, rotated_nms),
    (rotated_iou_bev_ref, paired_iou_3d_ref, rotated_nms_ref),
])  # fmt: skip
def test_matches_the_original(bev, paired, nms, device):
    arrays, _ = golden.load("det_box_utils")
    a, b, to_nms = (from_mmdet3d(arrays[f"in/{name}"]).to(device) for name in ("boxes", "boxes_b", "nms_boxes"))
    golden.assert_close_to_max(bev(a[:, BEV], b[:, BEV]).cpu(), arrays["out/bev_iou"], 1e-5)
    golden.assert_close_to_max(paired(a, b).cpu(), arrays["out/paired_iou3d"], 1e-5)
    rows = nms(to_nms[:, BEV], arrays["in/nms_scores"].to(device), arrays["in/nms_threshold"].item())
    assert torch.equal(rows.cpu(), arrays["out/nms_keep"])


@pytest.mark.parametrize("fn, columns", [(rotated_iou_bev, 5), (paired_iou_3d, 7)])
def test_rejects_boxes_of_wrong_shape_or_type(fn, columns, device):
    boxes = torch.rand(4, columns, device=device)
    with pytest.raises(AssertionError, match=rf"\[N, {columns}\]"):
        fn(boxes, boxes[:, :4])
    with pytest.raises(AssertionError, match="float32 or float64"):
        fn(boxes.half(), boxes.half())
    with pytest.raises(AssertionError, match="different types"):
        fn(boxes, boxes.double())
