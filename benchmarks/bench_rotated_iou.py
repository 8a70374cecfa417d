"""IoU of rotated boxes and NMS: kernels, references and peers.   python -m benchmarks.bench_rotated_iou

Peers of the IoU: polygon clipping that sorts edge crossings and enclosed corners by angle, as the usual CUDA kernels
do, in eager PyTorch; on a CPU also shapely, if installed. Peer of NMS: a loop over the rows of the IoU matrix.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import DEVICE, Case, compare
from unipad.kernels.rotated_iou import (
    paired_iou_3d,
    paired_iou_3d_ref,
    rotated_iou_bev,
    rotated_iou_bev_ref,
    rotated_nms,
    rotated_nms_ref,
)

# N, M: rows and columns of the IoU matrix. UniPAD: 300 decoded boxes with each other; 900 queries with the boxes of a
# busy frame; then a matrix that fills a GPU
GPU_SIZES = [(300, 300), (900, 100), (4096, 4096)]
CPU_SIZES = [(300, 300), (900, 100)]
# Boxes given to NMS. UniPAD: at most 300 decoded by the head, at most 3600 merged by test-time augmentation
GPU_NMS = [300, 1000, 3000, 10000]
CPU_NMS = [300, 3000]
THRESHOLD = 0.2  # IoU, the default of config.Detect.nms
RANGE = 54.0  # meters: half the side of the grid of the 0.075 recipes


def boxes_3d(N, objects):
    """[N, 7] boxes (x, y, z, w, l, h, yaw) as large as road users, placed around `objects` random objects.

    With N several times `objects`, some overlap.
    """
    centers = F.pad((torch.rand(objects, 2, device=DEVICE) * 2 - 1) * RANGE, (0, 1))  # z = 0
    object_idx = torch.randint(objects, (N,), device=DEVICE)
    centers = centers[object_idx] + 0.5 * torch.randn(N, 3, device=DEVICE)
    sizes = torch.tensor([1.9, 4.6, 1.7], device=DEVICE) * (0.5 + torch.rand(N, 3, device=DEVICE))
    yaw = (torch.rand(objects, device=DEVICE) * 6.3)[object_idx] + 0.2 * torch.randn(N, device=DEVICE)
    return torch.cat([centers, sizes, yaw[:, None]], dim=1)


def to_bev(boxes):
    """[N, 7] -> [N, 5] (x, y, w, l, yaw)."""
    return boxes[:, [0, 1, 3, 4, 6]].contiguous()


def iou_case(N, M):
    boxes = to_bev(boxes_3d(N + M, objects=max(M // 3, 1)))
    return Case(f"N={N} M={M}", (boxes[:N], boxes[N:]), fwd_bytes=boxes.nbytes + 4 * N * M)


def paired_case(N):
    a = boxes_3d(N, objects=N)
    # each box with a copy, moved by 0.3 m along each axis and turned by 0.3 rad (standard deviations)
    b = a + 0.3 * torch.randn_like(a) * a.new_tensor([1, 1, 1, 0, 0, 0, 1])
    return Case(f"N={N}", (a, b), fwd_bytes=a.nbytes + b.nbytes + 4 * N)


def nms_case(N):
    boxes, scores = to_bev(boxes_3d(N, objects=max(N // 5, 1))), torch.rand(N, device=DEVICE)
    return Case(f"N={N}", (boxes, scores, THRESHOLD), fwd_bytes=boxes.nbytes + scores.nbytes)


def corners(boxes):
    """Corners [..., 4, 2] of BEV boxes [..., 5], counter-clockwise."""
    x, y, w, l, yaw = (t[..., None] for t in boxes.unbind(-1))
    along, across = l / 2 * boxes.new_tensor([1, 1, -1, -1]), w / 2 * boxes.new_tensor([-1, 1, 1, -1])
    return torch.stack([x + along * yaw.cos() - across * yaw.sin(), y + along * yaw.sin() + across * yaw.cos()], dim=-1)


def cross(u, v):
    return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]


def sorted_corners(a, b):
    """IoU by the corners of the intersection polygon: of 16 edge crossings and 8 box corners, those that exist or are
    enclosed, sorted by angle."""
    N, M = len(a), len(b)
    p = (corners(a)[:, None] - a[:, None, None, :2]).expand(N, M, 4, 2)  # corners of a and b, relative to a's center
    q = corners(b)[None, :] - a[:, None, None, :2]
    dp, dq = p.roll(-1, 2) - p, q.roll(-1, 2) - q  # edges
    start = q[:, :, None, :, :] - p[:, :, :, None, :]  # [N, M, 4, 4, 2]
    ep, eq = dp[:, :, :, None, :], dq[:, :, None, :, :]
    denominator = cross(ep, eq)  # 0 where the edges are parallel
    safe = torch.where(denominator == 0, 1, denominator)
    t, s = cross(start, eq) / safe, cross(start, ep) / safe  # where lines cross: fractions of the edges of a, of b
    crossing = (p[:, :, :, None, :] + t[..., None] * ep).flatten(2, 3)
    crosses = ((denominator != 0) & (t >= 0) & (t <= 1) & (s >= 0) & (s <= 1)).flatten(2, 3)

    def enclosed(points, origin, edges):  # whether points lie in the box with these corners and edges
        side = cross(edges[:, :, None, :, :], points[:, :, :, None, :] - origin[:, :, None, :, :])
        return (side >= -1e-5).all(dim=3)

    points = torch.cat([crossing, p, q], dim=2)  # [N, M, 24, 2]
    ok = torch.cat([crosses, enclosed(p, q, dq), enclosed(q, p, dp)], dim=2)
    mean = (points * ok[..., None]).sum(dim=2, keepdim=True) / ok.sum(dim=2).clamp(min=1)[..., None, None]
    points = points - mean
    angle = torch.atan2(points[..., 1], points[..., 0]).masked_fill(~ok, 10)  # sorts after all others
    order = angle.argsort(dim=2)
    points, ok = points.gather(2, order[..., None].expand_as(points)), ok.gather(2, order)
    points = torch.where(ok[..., None], points, points[:, :, :1])  # repeat the first corner, which closes the polygon
    overlap = cross(points, points.roll(-1, 2)).sum(dim=2) / 2 * (ok.sum(dim=2) > 2)  # area, by the shoelace formula
    return overlap / ((a[:, 2] * a[:, 3])[:, None] + (b[:, 2] * b[:, 3])[None, :] - overlap)


def by_shapely(a, b):
    import shapely

    p, q = (shapely.polygons(corners(boxes).numpy())[:, None] for boxes in (a, b))
    overlap = torch.from_numpy(shapely.area(shapely.intersection(p, q.T))).to(a)
    return overlap / ((a[:, 2] * a[:, 3])[:, None] + (b[:, 2] * b[:, 3])[None, :] - overlap)


def row_by_row(boxes, scores, threshold):
    """NMS by the matrix of our IoU, then the greedy loop on the host, as in mmdet3d's nms_gpu."""
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    over = (rotated_iou_bev(ranked, ranked) > threshold).cpu().numpy()
    suppressed, kept = over[0] & False, []  # at first no box is suppressed
    for i in range(len(over)):
        if not suppressed[i]:
            kept.append(i)
            suppressed |= over[i]
    return order[torch.tensor(kept, device=order.device)]


if __name__ == "__main__":
    torch.manual_seed(0)
    on_gpu = DEVICE == "cuda"
    peers = {"sorted corners": sorted_corners} | ({} if on_gpu else {"shapely": by_shapely})
    sizes = GPU_SIZES if on_gpu else CPU_SIZES
    small = [iou_case(*size) for size in sizes if size[0] * size[1] < 10**6]
    compare("rotated_iou_bev", rotated_iou_bev_ref, rotated_iou_bev, peers, small)
    if large := [iou_case(*size) for size in sizes if size[0] * size[1] >= 10**6]:  # the peer would take about 27 GB
        compare("rotated_iou_bev", rotated_iou_bev_ref, rotated_iou_bev, {}, large)
    compare("paired_iou_3d", paired_iou_3d_ref, paired_iou_3d, {}, [paired_case(1000), paired_case(100000)])
    cases = [nms_case(N) for N in (GPU_NMS if on_gpu else CPU_NMS)]
    compare("rotated_nms", rotated_nms_ref, rotated_nms, {"row by row": row_by_row}, cases)
