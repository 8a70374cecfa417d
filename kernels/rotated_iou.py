"""IoU of boxes rotated about z, in bird's-eye view and in 3D, and non-maximum suppression.

A BEV box is x, y, w, l, yaw: center and size in meters (a negative size counts as 0), and yaw in radians
counter-clockwise from x to the heading; l lies along the heading, w across. A 3D box is x, y, z, w, l, h, yaw: x, y, z
of the center.

The area of the intersection of a and b is an integral along the outline of b alone (Green's theorem). In a's frame, x
along its heading and l, w its size, a is |x| <= l / 2, |y| <= w / 2, and

    area = sum over the edges of b, counter-clockwise, of   integral of clamp(x, -l / 2, l / 2) dy

each over the part of the edge with |y| <= w / 2, because clamp(x) has derivative 1 for |x| < l / 2 and 0 beyond. No
polygon is built, no corners are sorted, and there is no list of vertices to index. The integral is continuous in the
corners, so an edge on the border of a, parallel to it, or of length 0 needs no special case, as it would in polygon
clipping. Corners are relative to a's center, so that no precision is lost far from the origin.

Sizes: N and M boxes, or N pairs of boxes; in suppression, W words of 32 bits, one bit per box.
"""

import torch
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, tl, triton


@torch.no_grad()
def rotated_iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union, in bird's-eye view, of every box of one set with every box of another.

    Args:
        a: [N, 5] fp32 or fp64 x, y, w, l, yaw; finite.
        b: [M, 5] the same.

    Returns:
        iou: [N, M] in [0, 1]; 0 for disjoint boxes and for boxes without area.

    In fp32 the IoU's error is at most 1e-5 for boxes of usual shape; corners are off by about 1e-7 of the box size,
    which matters for thin boxes. Deterministic. Not differentiable. Raises AssertionError on other shapes or types.
    """
    _check(5, a, b)
    if not on_triton(a):
        return rotated_iou_bev_ref(a, b)
    iou = a.new_empty(len(a), len(b))
    if iou.numel():
        grid = (triton.cdiv(len(a), BLOCK_N), triton.cdiv(len(b), BLOCK_M))
        blocks = dict(BLOCK_N=BLOCK_N, BLOCK_M=BLOCK_M, num_warps=8)
        _iou_kernel[grid](a_ptr=a.contiguous(), b_ptr=b.contiguous(), iou_ptr=iou, N=len(a), M=len(b), **blocks)
    return iou


@torch.no_grad()
def rotated_iou_bev_ref(a, b):
    """`rotated_iou_bev` in plain PyTorch; computes only pairs whose circumscribed circles intersect."""
    a, b = _clamp_sizes(a, 2, 4), _clamp_sizes(b, 2, 4)
    iou = a.new_zeros(len(a), len(b))
    radius_a, radius_b = (boxes[:, 2:4].norm(dim=1) / 2 for boxes in (a, b))
    distance = (a[:, None, :2] - b[None, :, :2]).norm(dim=2)
    i, j = (distance < radius_a[:, None] + radius_b[None, :]).nonzero(as_tuple=True)
    a, b = a.index_select(0, i), b.index_select(0, j)
    iou[i, j] = _ratio_ref(_overlap_ref(a, b), a[:, 2] * a[:, 3], b[:, 2] * b[:, 3])
    return iou


@torch.no_grad()
def paired_iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union in 3D of each row of `a` with the same row of `b`.

    Args:
        a: [N, 7] fp32 or fp64 x, y, z, w, l, h, yaw; finite.
        b: [N, 7] the same.

    Returns:
        iou: [N] in [0, 1]; 0 for disjoint boxes and for boxes without volume.

    As accurate as `rotated_iou_bev`. Deterministic. Not differentiable. Raises AssertionError on other shapes or types.
    """
    _check(7, a, b)
    assert len(a) == len(b), f"{len(a)} boxes do not match {len(b)} partners"
    if not on_triton(a):
        return paired_iou_3d_ref(a, b)
    iou = a.new_empty(len(a))
    if len(a):
        _paired_kernel[(triton.cdiv(len(a), BLOCK_P),)](
            a_ptr=a.contiguous(), b_ptr=b.contiguous(), iou_ptr=iou, N=len(a), BLOCK_P=BLOCK_P
        )
    return iou


@torch.no_grad()
def paired_iou_3d_ref(a, b):
    """`paired_iou_3d` in plain PyTorch."""
    a, b = _clamp_sizes(a, 3, 6), _clamp_sizes(b, 3, 6)
    bev = [0, 1, 3, 4, 6]  # x, y, w, l, yaw
    area = _overlap_ref(a[:, bev], b[:, bev])
    dz, half_a, half_b = b[:, 2] - a[:, 2], a[:, 5] / 2, b[:, 5] / 2
    height = (torch.minimum(half_a, dz + half_b) - torch.maximum(-half_a, dz - half_b)).clamp(min=0)
    return _ratio_ref(area * height, a[:, 3:6].prod(dim=1), b[:, 3:6].prod(dim=1))


@torch.no_grad()
def rotated_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression in bird's-eye view.

    Args:
        boxes:     [N, 5] fp32 or fp64 x, y, w, l, yaw; finite.
        scores:    [N], not NaN. Of equal scores, the one in the earlier row ranks higher.
        threshold: a box is suppressed if its IoU with a kept box that ranks higher is greater than this.

    Returns:
        rows: [K] int64 rows of `boxes` that are kept, by descending score.

    Deterministic. Waits for the device once, for K. Allocates N^2 / 8 bytes. Not differentiable.
    """
    _check(5, boxes)
    assert scores.shape == boxes.shape[:1], f"scores {tuple(scores.shape)} do not match boxes {tuple(boxes.shape)}"
    if not on_triton(boxes):
        return rotated_nms_ref(boxes, scores, threshold)
    order = _best_first(scores)
    N = len(boxes)
    if not N:
        return order
    W = triton.cdiv(N, 32)
    suppressed = torch.empty(32 * W, W, dtype=torch.int32, device=boxes.device)
    _suppress_kernel[(W, W)](
        boxes_ptr=boxes.contiguous(), order_ptr=order, suppressed_ptr=suppressed,
        N=N, W=W, threshold=float(threshold), num_warps=8,
    )  # fmt: skip
    return order[_greedy(suppressed, N)]


@torch.no_grad()
def rotated_nms_ref(boxes, scores, threshold):
    """`rotated_nms` in plain PyTorch.

    Each round decides all boxes at once from the decisions of the previous round. The decision on the i-th best box is
    final after at most i rounds; when a round changes nothing, all are final. The longest chain of boxes that each
    overlap the next by more than the threshold limits the number of rounds.
    """
    order = _best_first(scores)
    ranked = boxes.index_select(0, order)
    # ranks of the two boxes of each pair that exceeds the threshold
    better, worse = (rotated_iou_bev_ref(ranked, ranked) > threshold).triu(diagonal=1).nonzero(as_tuple=True)
    kept, before = torch.ones_like(order, dtype=torch.bool), None
    while before is None or not torch.equal(kept, before):
        before = kept
        kept = torch.ones_like(before).index_fill_(0, worse[before[better]], False)
    return order[kept]


def _greedy(suppressed, N):
    """[N] bool: which ranked boxes are kept, from the bit masks of `_suppress_kernel`."""
    W = suppressed.shape[1]
    block_w = triton.next_power_of_2(W)
    warps = min(max(block_w // 32, 1), 8)  # one word per lane while possible
    kept = torch.empty(N, dtype=torch.bool, device=suppressed.device)
    _greedy_kernel[(1,)](suppressed_ptr=suppressed, kept_ptr=kept, N=N, W=W, BLOCK_W=block_w, num_warps=warps)
    return kept


def _best_first(scores):
    """[N] int64 rows by descending score."""
    return scores.argsort(descending=True, stable=True)


def _check(columns, *boxes):
    for t in boxes:
        assert t.dim() == 2 and t.shape[1] == columns, f"boxes are [N, {columns}], not {tuple(t.shape)}"
        assert t.dtype in (torch.float32, torch.float64), f"boxes are float32 or float64, not {t.dtype}"
        assert t.dtype == boxes[0].dtype, f"boxes of different types: {boxes[0].dtype}, {t.dtype}"


def _clamp_sizes(boxes, first, end):
    """The boxes, with negative sizes (columns `first` to `end` - 1) set to 0."""
    return torch.cat([boxes[:, :first], boxes[:, first:end].clamp(min=0), boxes[:, end:]], dim=1)


def _overlap_ref(a, b):
    """[P] areas in square meters of the intersections of P pairs of boxes, a [P, 5] with b [P, 5]."""
    (dx, dy), (half_w, half_l), (half_w_b, half_l_b) = (b - a)[:, :2].T, a[:, 2:4].T / 2, b[:, 2:4].T / 2
    cos_a, sin_a, yaw = a[:, 4].cos(), a[:, 4].sin(), b[:, 4] - a[:, 4]
    # b in a's frame: center, heading, half axes along and across the heading
    x, y = dx * cos_a + dy * sin_a, dy * cos_a - dx * sin_a
    cos, sin = yaw.cos(), yaw.sin()
    along_x, along_y, across_x, across_y = cos * half_l_b, sin * half_l_b, -sin * half_w_b, cos * half_w_b
    # b's corners front right, front left, back left, back right: [P, 4]
    px = x[:, None] + torch.stack([along_x - across_x, along_x + across_x, across_x - along_x, -along_x - across_x], 1)
    py = y[:, None] + torch.stack([along_y - across_y, along_y + across_y, across_y - along_y, -along_y - across_y], 1)
    area = _edges_ref(px, py, px.roll(-1, 1), py.roll(-1, 1), half_l[:, None], half_w[:, None]).sum(dim=1)

    # disjoint boxes are separated along one of their four axes; `area` then is not 0 but the sum's rounding errors
    disjoint = x.abs() >= half_l + along_x.abs() + across_x.abs()
    disjoint |= y.abs() >= half_w + along_y.abs() + across_y.abs()
    disjoint |= (x * cos + y * sin).abs() >= half_l_b + half_l * cos.abs() + half_w * sin.abs()
    disjoint |= (y * cos - x * sin).abs() >= half_w_b + half_l * sin.abs() + half_w * cos.abs()
    max_area = torch.minimum(a[:, 2] * a[:, 3], b[:, 2] * b[:, 3])
    return torch.where(disjoint, 0, torch.minimum(area.clamp(min=0), max_area))


def _edges_ref(px, py, qx, qy, half_l, half_w):
    """The integral of the file's header over edges from p to q."""
    # the part of the edge within |y| <= half_w goes from (x0, y0) to (x1, y1)
    y0, y1 = torch.clamp(py, -half_w, half_w), torch.clamp(qy, -half_w, half_w)
    slope = (qx - px) / torch.where(py == qy, 1, qy - py)
    x0, x1 = px + (y0 - py) * slope, qx + (y1 - qy) * slope
    low, high = torch.minimum(x0, x1), torch.maximum(x0, x1)
    low_in, high_in = torch.clamp(low, -half_l, half_l), torch.clamp(high, -half_l, half_l)
    # of that part's extent along x: length in front of a (x > half_l) minus length behind it (x < -half_l)
    beyond = torch.maximum(high, half_l) - torch.maximum(low, half_l)
    beyond = beyond - (torch.minimum(high, -half_l) - torch.minimum(low, -half_l))
    integral = (high_in + low_in) * (high_in - low_in) / 2 + half_l * beyond  # of clamp(x) dx
    # mean of clamp(x) over that part; times its extent along y it is the integral over dy
    mean = torch.where(high > low, integral / torch.where(high > low, high - low, 1), low_in)
    return (y1 - y0) * mean


def _ratio_ref(intersection, size_a, size_b):
    union = size_a + size_b - intersection
    return torch.where(union > 0, intersection / union, 0)


BLOCK_N = 16  # boxes of a per program of the IoU kernel, of 8 warps: two pairs per lane, in at most 64 registers
BLOCK_M = 32  # boxes of b per program
BLOCK_P = 128  # pairs per program of `paired_iou_3d`, of 4 warps: one per lane


@jit(varying=("N", "M"))
def _iou_kernel(
    a_ptr, b_ptr, iou_ptr,  # [N, 5], [M, 5], [N, M]
    N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_ok, m_ok = n < N, m < M
    iou = _iou_tile(a_ptr, n, n_ok, b_ptr, m, m_ok)
    tl.store(iou_ptr + n[:, None] * M + m[None, :], iou, mask=n_ok[:, None] & m_ok[None, :])


@jit(varying=("N", "W"))
def _suppress_kernel(
    boxes_ptr, order_ptr,  # [N, 5], [N]
    suppressed_ptr,  # [32 W, W], by rank: bit k of word w of row i is set if box i, if kept, suppresses box 32 w + k
    N, W, threshold,
):  # fmt: skip
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    word = tl.program_id(1)
    k = tl.arange(0, 32)
    j = word * 32 + k
    # words left of the diagonal are neither written nor read
    if word >= tl.program_id(0):
        i_ok, j_ok = i < N, j < N
        row_i = tl.load(order_ptr + i, mask=i_ok, other=0)
        row_j = tl.load(order_ptr + j, mask=j_ok, other=0)
        iou = _iou_tile(boxes_ptr, row_i, i_ok, boxes_ptr, row_j, j_ok)
        suppresses = (iou > threshold) & (i[:, None] < j[None, :]) & j_ok[None, :]
        bits = tl.sum(suppresses.to(tl.int32) << k[None, :], axis=1)
        tl.store(suppressed_ptr + i.to(tl.int64) * W + word, bits)  # 0 in rows from N on


@jit(varying=("N", "W"))
def _greedy_kernel(
    suppressed_ptr, kept_ptr,  # [32 W, W], [N]
    N, W, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program decides 32 boxes at a time, in order, in registers; no load depends on a decision."""
    words = tl.arange(0, BLOCK_W)
    k = tl.arange(0, 32)
    removed = tl.zeros((BLOCK_W,), tl.int32)  # bits of the boxes that a kept box suppresses
    row_ptr = suppressed_ptr
    for word in range(W):
        own = tl.sum(tl.where(words == word, removed, 0), axis=0)  # `removed` of these 32 boxes
        for bit in tl.static_range(32):
            later_words = tl.load(row_ptr + words, mask=(words > word) & (words < W), other=0)
            own_word = tl.load(row_ptr + word)
            keep = ((own >> bit) & 1) - 1  # all bits set if the box is kept, else none
            removed |= later_words & keep
            own |= own_word & keep
            row_ptr += W
        tl.store(kept_ptr + word * 32 + k, ((own >> k) & 1) == 0, mask=word * 32 + k < N)


@jit(varying=("N",))
def _paired_kernel(
    a_ptr, b_ptr, iou_ptr,  # [N, 7], [N, 7], [N]
    N, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n_ok = n < N
    a, b = a_ptr + n * 7, b_ptr + n * 7
    w_a, l_a, h_a, cos_a, sin_a = _shape_3d(a + 3, n_ok)
    w_b, l_b, h_b, cos_b, sin_b = _shape_3d(b + 3, n_ok)
    dx = _column(b, n_ok) - _column(a, n_ok)
    dy = _column(b + 1, n_ok) - _column(a + 1, n_ok)
    dz = _column(b + 2, n_ok) - _column(a + 2, n_ok)
    area = _overlap(dx, dy, w_a, l_a, cos_a, sin_a, w_b, l_b, cos_b, sin_b)
    height = tl.minimum(h_a / 2, dz + h_b / 2) - tl.maximum(-h_a / 2, dz - h_b / 2)
    iou = _ratio(area * tl.maximum(height, 0.0), w_a * l_a * h_a, w_b * l_b * h_b)
    tl.store(iou_ptr + n, iou, mask=n_ok)


@triton.jit
def _iou_tile(a_ptr, n, n_ok, b_ptr, m, m_ok):
    """IoU of rows n of a with rows m of b: [BLOCK_N, BLOCK_M]."""
    a, b = a_ptr + n * 5, b_ptr + m * 5
    w_a, l_a, cos_a, sin_a = _shape(a + 2, n_ok)
    w_b, l_b, cos_b, sin_b = _shape(b + 2, m_ok)
    dx = _column(b, m_ok)[None, :] - _column(a, n_ok)[:, None]
    dy = _column(b + 1, m_ok)[None, :] - _column(a + 1, n_ok)[:, None]
    area = _overlap(
        dx, dy,
        w_a[:, None], l_a[:, None], cos_a[:, None], sin_a[:, None],
        w_b[None, :], l_b[None, :], cos_b[None, :], sin_b[None, :],
    )  # fmt: skip
    return _ratio(area, (w_a * l_a)[:, None], (w_b * l_b)[None, :])


@triton.jit
def _column(ptr, ok):
    return tl.load(ptr, mask=ok, other=0.0)


@triton.jit
def _size(ptr, ok):
    return tl.maximum(_column(ptr, ok), 0.0)


@triton.jit
def _shape(ptr, ok):
    """w, l, cos(yaw), sin(yaw); ptr: to w, of the columns w, l, yaw."""
    yaw = _column(ptr + 2, ok)
    return _size(ptr, ok), _size(ptr + 1, ok), tl.cos(yaw), tl.sin(yaw)


@triton.jit
def _shape_3d(ptr, ok):
    """w, l, h, cos(yaw), sin(yaw); ptr: to w, of the columns w, l, h, yaw."""
    yaw = _column(ptr + 3, ok)
    w, l, h = _size(ptr, ok), _size(ptr + 1, ok), _size(ptr + 2, ok)
    return w, l, h, tl.cos(yaw), tl.sin(yaw)


@triton.jit
def _overlap(dx, dy, w_a, l_a, cos_a, sin_a, w_b, l_b, cos_b, sin_b):
    """Area of the intersection of a and b; dx, dy from the center of a to that of b."""
    half_w, half_l = w_a / 2, l_a / 2
    # b in a's frame: center, heading, half axes along and across the heading
    x, y = dx * cos_a + dy * sin_a, dy * cos_a - dx * sin_a
    cos, sin = cos_b * cos_a + sin_b * sin_a, sin_b * cos_a - cos_b * sin_a
    along_x, along_y = cos * (l_b / 2), sin * (l_b / 2)
    across_x, across_y = -sin * (w_b / 2), cos * (w_b / 2)

    # front right and front left corner of b, relative to its center; the back ones are opposite
    right_x, right_y = along_x - across_x, along_y - across_y
    left_x, left_y = along_x + across_x, along_y + across_y
    area = _edge(x + right_x, y + right_y, x + left_x, y + left_y, half_l, half_w)
    area += _edge(x + left_x, y + left_y, x - right_x, y - right_y, half_l, half_w)
    area += _edge(x - right_x, y - right_y, x - left_x, y - left_y, half_l, half_w)
    area += _edge(x - left_x, y - left_y, x + right_x, y + right_y, half_l, half_w)

    # disjoint boxes are separated along one of their four axes; `area` then is not 0 but the sum's rounding errors
    disjoint = tl.abs(x) >= half_l + tl.abs(along_x) + tl.abs(across_x)
    disjoint |= tl.abs(y) >= half_w + tl.abs(along_y) + tl.abs(across_y)
    disjoint |= tl.abs(x * cos + y * sin) >= l_b / 2 + half_l * tl.abs(cos) + half_w * tl.abs(sin)
    disjoint |= tl.abs(y * cos - x * sin) >= w_b / 2 + half_l * tl.abs(sin) + half_w * tl.abs(cos)
    return tl.where(disjoint, 0.0, tl.minimum(tl.maximum(area, 0.0), tl.minimum(w_a * l_a, w_b * l_b)))


@triton.jit
def _edge(px, py, qx, qy, half_l, half_w):
    """The integral of the file's header over one edge, from p to q."""
    # the part of the edge within |y| <= half_w goes from (x0, y0) to (x1, y1)
    y0, y1 = _clamp(py, half_w), _clamp(qy, half_w)
    slope = (qx - px) / tl.where(py == qy, 1.0, qy - py)
    x0, x1 = px + (y0 - py) * slope, qx + (y1 - qy) * slope
    low, high = tl.minimum(x0, x1), tl.maximum(x0, x1)
    low_in, high_in = _clamp(low, half_l), _clamp(high, half_l)
    # of that part's extent along x: length in front of a (x > half_l) minus length behind it (x < -half_l)
    beyond = tl.maximum(high, half_l) - tl.maximum(low, half_l)
    beyond -= tl.minimum(high, -half_l) - tl.minimum(low, -half_l)
    integral = (high_in + low_in) * (high_in - low_in) / 2 + half_l * beyond  # of clamp(x) dx
    # mean of clamp(x) over that part; times its extent along y it is the integral over dy
    mean = tl.where(high > low, integral / tl.where(high > low, high - low, 1.0), low_in)
    return (y1 - y0) * mean


@triton.jit
def _clamp(value, half):
    return tl.minimum(tl.maximum(value, -half), half)


@triton.jit
def _ratio(intersection, size_a, size_b):
    union = size_a + size_b - intersection
    return tl.where(union > 0, intersection / tl.where(union > 0, union, 1.0), 0.0)
