"""Detection head: outputs, assignment, losses and detections, compared with the original and by hand."""

import dataclasses
import math

import pytest
import torch

from tests.golden import assert_close_to_max, load, recorded
from tests.original_boxes import boxes_from_original, boxes_to_original
from unipad import config
from unipad.batch import Batch
from unipad.boxes import encode_boxes
from unipad.model.decoder import SelfAttention, VolumeAttention, sample_volume
from unipad.model.detect import Detector, Head, Predictions, detections
from unipad.model.dropout import Dropout, drop
from unipad.model.targets import assign, assignment_cost, detection_losses, draw_noise, noisy_queries
from unipad.model.volume import ConvNormReLU3d, GatherLift
from unipad.names import from_original
from unipad.recipes.encoders import GRID_075

# Grid of the records, 20 x 18 x 5 cells (x, y, z), and their heads: with denoising (UVTR-DN) and plain (UVTR)
GRID = config.Grid(low=(-54.0, -54.0, -5.0), high=(54.0, 54.0, 3.0), cell=(5.4, 6.0, 1.6))
DENOISING = config.Detect(queries=30, layers=3, heads=4, hidden=48, dropout=0.0, max_detections=60)
PLAIN = dataclasses.replace(DENOISING, denoising=False, code_weights=(1.0,) * 10, nms=())
# For tests without a record; their volumes mostly have 8 channels and 2 x 3 x 4 cells (z, y, x)
SMALL = config.Detect(queries=12, layers=2, heads=2, hidden=16, noise_groups=3, max_detections=20)


def recorded_ground_truth(arrays):
    """Ground-truth boxes, labels and box counts of a record, as in a `Batch`."""
    boxes = [boxes_from_original(arrays[f"in/gt_boxes_{b}"]) for b in range(2)]
    labels = torch.cat([arrays[f"in/gt_labels_{b}"] for b in range(2)])
    return torch.cat(boxes), labels, torch.tensor([len(b) for b in boxes])


def recorded_head(arrays, cfg):
    head = Head(cfg, GRID, channels=32)
    head.load_state_dict(recorded(arrays, "head."))
    return head


def recorded_losses(arrays, name):
    """[L] values of a loss term per decoder layer; the original's keys have no layer prefix for the last one."""
    keys = [f"out/loss/d{l}.{name}" for l in range(2)] + [f"out/loss/{name}"]
    return torch.stack([arrays[key].reshape(()) for key in keys])


def assert_assigned_as_recorded(arrays, cfg, predictions, ground_truth):
    _, _, counts = ground_truth
    sample, query, box = assign(cfg, predictions.logits, predictions.codes, *ground_truth)
    first_box = torch.tensor([0, *counts[:-1]]).cumsum(0)  # of each sample
    for l in range(3):
        expected = torch.stack([arrays[f"out/assigned_gt_inds_{2 * l + b}"] for b in range(2)])
        ours = torch.zeros_like(expected)
        ours[sample, query[l]] = box[l] - first_box[sample] + 1  # 0: background
        assert torch.equal(ours, expected), f"layer {l}"


def assert_gradients_as_recorded(arrays, head, rel):
    expected = recorded(arrays, "head.", "grad/")
    params = dict(head.named_parameters())
    assert expected.keys() == params.keys()
    _, record = load("uvtr_dn_head_train") if head.cfg.denoising else load("uvtr_head_eval")
    keys = [key.removeprefix("grad/") for key in record["noise_only_arrays"]["arrays"]]
    zero, _ = from_original(dict.fromkeys(keys))  # our names of gradients that are 0 except for rounding
    for key, param in params.items():
        if f"head.{key}" in zero:
            assert param.grad.abs().max() < 1e-7, key
        else:
            assert_close_to_max(param.grad, expected[key], rel, key)


def test_plain_head_matches_the_original():
    """From image features and depths through view transform, head, assignment and losses; and all gradients."""
    arrays, _ = load("uvtr_head_eval")
    features = [arrays[f"in/feat_{i}"].requires_grad_() for i in range(2)]
    depths = [arrays[f"in/depth_{i}"].requires_grad_() for i in range(2)]
    height, width = arrays["in/img_shape"][0, 0, :2].tolist()
    lift = GatherLift(GRID, config.CameraConfig(channels=32, depth_bins=16))
    volume = lift(
        [f.permute(0, 1, 3, 4, 2) for f in features],
        [d.unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2) for d in depths],
        arrays["in/lidar2img"][:, :, 0],  # of the only camera frame, the keyframe
        (height, width),
    )
    conv = ConvNormReLU3d(32, 32).eval()
    conv.load_state_dict(recorded(arrays, "encoder.lift_convs.0."))
    head = recorded_head(arrays, PLAIN).eval()

    predictions, _ = head(conv(volume))
    assert predictions.iou is None
    assert_close_to_max(predictions.logits, arrays["out/all_cls_scores"], 1e-5)
    assert_close_to_max(predictions.codes, arrays["out/all_bbox_preds"], 1e-5)
    boxes, labels, counts = recorded_ground_truth(arrays)
    listed = boxes, labels, counts.tolist()  # as the functions of `targets` take them
    assert_assigned_as_recorded(arrays, PLAIN, predictions, listed)
    losses = detection_losses(PLAIN, predictions, None, None, *listed)  # None, None: no noisy queries
    assert losses.keys() == {"class", "box"}
    assert_close_to_max(losses["class"], recorded_losses(arrays, "loss_cls"), 1e-5)
    assert_close_to_max(losses["box"], recorded_losses(arrays, "loss_bbox"), 1e-5)
    sum(t.sum() for t in losses.values()).backward()
    assert_gradients_as_recorded(arrays, head, 1e-5)
    for i in range(2):
        assert_close_to_max(features[i].grad, arrays[f"grad/feat_{i}"], 1e-5, f"feature {i}")
        assert_close_to_max(depths[i].grad, arrays[f"grad/depth_{i}"], 1e-5, f"depth {i}")
    for b, result in enumerate(detections(PLAIN, predictions)):
        assert_close_to_max(result.scores, arrays[f"out/boxes_scores_{b}"], 1e-5)
        assert torch.equal(result.labels, arrays[f"out/boxes_labels_{b}"])
        assert_same_boxes(boxes_to_original(result.boxes), arrays[f"out/boxes_{b}"], 1e-5)


def assert_same_boxes(boxes, expected, rel):
    """Assert that boxes are equal up to `rel`, and yaws up to multiples of 2 pi."""
    difference = boxes[:, 6] - expected[:, 6]
    assert torch.allclose(difference.cos(), torch.ones_like(difference), atol=1e-6)
    rest = [0, 1, 2, 3, 4, 5, 7, 8]
    assert_close_to_max(boxes[:, rest], expected[:, rest], rel)


def test_denoising_head_matches_the_original():
    arrays, _ = load("uvtr_dn_head_train")
    head = recorded_head(arrays, DENOISING)
    volume = arrays["in/pts_feats"].requires_grad_()
    boxes, labels, counts = ground_truth = recorded_ground_truth(arrays)
    listed = boxes, labels, counts.tolist()  # as the functions of `targets` take them
    # 8 boxes, at most 5 in a sample: 30 queries allow 6 groups of 5 noisy ones, which come first
    noise = arrays["in/rand_0"].view(6, 8, 3)
    noisy = noisy_queries(DENOISING, GRID, *listed, noise)
    assert_close_to_max(noisy.references, arrays["out/dn_padded_reference_points"][:, :30], 1e-6)
    assert torch.equal(noisy.blocked, arrays["out/dn_attn_mask"])
    assert torch.equal(noisy.labels.flatten(), arrays["out/dn_known_labels"])
    assert torch.equal(noisy.slot.flatten(), arrays["out/dn_map_known_indice"])
    assert torch.equal(noisy.sample.repeat(6), arrays["out/dn_known_bid"])

    predictions, noisy_predictions = head(volume, noisy)
    for ours, prefix in ((predictions, "out/"), (noisy_predictions, "out/dn_")):
        assert_close_to_max(ours.logits, arrays[f"{prefix}all_cls_scores"], 1e-5)
        assert_close_to_max(ours.codes, arrays[f"{prefix}all_bbox_preds"], 1e-5)
        assert_close_to_max(ours.iou[..., None], arrays[f"{prefix}all_iou_preds"], 1e-5)
    assert_assigned_as_recorded(arrays, DENOISING, predictions, listed)
    losses = detection_losses(DENOISING, predictions, noisy_predictions, noisy, *listed)
    for name, term in {"class": "loss_cls", "box": "loss_bbox", "iou": "loss_iou"}.items():
        rel = 1e-4 if name == "iou" else 1e-5  # in fp32 an IoU is accurate to 1e-5
        assert_close_to_max(losses[name], recorded_losses(arrays, term), rel, name)
        assert_close_to_max(losses[f"noisy_{name}"], recorded_losses(arrays, f"dn_{term}"), rel, f"noisy_{name}")
    sums = head.losses(volume, *ground_truth, generators=None, noise=noise)
    assert_close_to_max(sum(sums.values()), arrays["out/total_loss"][0], 1e-5)
    sum(sums.values()).backward()
    assert_gradients_as_recorded(arrays, head, 1e-5)
    assert_close_to_max(volume.grad, arrays["grad/pts_feats"], 1e-5, "volume")


@pytest.mark.parametrize("code_weights, name", [(DENOISING.code_weights, "cw"), (PLAIN.code_weights, "nocw")])
def test_assignment_matches_the_original(code_weights, name):
    """name: part of the record's array names, for assignment with ("cw") or without ("nocw") code weights."""
    arrays, _ = load("det_box_utils")
    cfg = dataclasses.replace(DENOISING, code_weights=code_weights)
    boxes = boxes_from_original(arrays["in/assign_gt_boxes_gravity_centre"])
    boxes[:, 2] -= boxes[:, 5] / 2  # undoes the shift: the recorded z is that of the center
    logits, codes = arrays["in/coder_cls"][-1:, :1], arrays["in/coder_box"][-1:, :1]  # last layer, first sample
    ground_truth = boxes, arrays["in/assign_gt_labels"], [len(boxes)]
    expected = arrays[f"out/assign_{name}_cls_cost"] + arrays[f"out/assign_{name}_reg_cost"]
    assert_close_to_max(assignment_cost(cfg, logits, codes, *ground_truth)[0, 0], expected, 1e-5)
    _, query, box = assign(cfg, logits, codes, *ground_truth)
    ours = torch.zeros(logits.shape[2], dtype=torch.int64)  # per query, 0: background
    ours[query[0]] = box[0] + 1
    assert torch.equal(ours, arrays[f"out/assign_{name}_gt_inds"])


@pytest.mark.parametrize(
    "name, min_score, nms",
    [
        ("nmsfree", 0.0, ()),
        ("nmsfree_thr", 0.6, ()),
        ("nmsfreeiou", 0.0, DENOISING.nms),
        ("nmsfreeiou_thr", 0.4, ()),
    ],
)
def test_detections_match_the_original(name, min_score, nms):
    """nmsfree, nmsfreeiou: the original's coders of the plain and the denoising head (the latter, in spite of its name,
    with NMS); thr: with a score threshold, for the latter without NMS."""
    arrays, _ = load("det_box_utils")
    denoising = name.startswith("nmsfreeiou")
    cfg = dataclasses.replace(DENOISING, denoising=denoising, max_detections=80, min_score=min_score, nms=nms)
    predictions = Predictions(arrays["in/coder_cls"], arrays["in/coder_box"], arrays["in/coder_iou"][..., 0])
    predictions = predictions if denoising else dataclasses.replace(predictions, iou=None)
    for b, result in enumerate(detections(cfg, predictions)):
        boxes = boxes_to_original(result.boxes)
        boxes[:, 2] += boxes[:, 5] / 2  # the recorded z is that of the center
        assert_close_to_max(result.scores, arrays[f"out/{name}_{b}_scores"], 1e-6)
        assert torch.equal(result.labels, arrays[f"out/{name}_{b}_labels"])
        assert_same_boxes(boxes, arrays[f"out/{name}_{b}_bboxes"], 1e-6)


def test_number_of_parameters():
    """As in the heads of final_uvtr_fusion_vs0.075_finetune (denoising) and abl_uvtr_cam_vs0.1_finetune (plain)."""
    with torch.device("meta"):
        denoising = Head(config.Detect(), GRID_075, channels=256)
        plain = Head(config.Detect(denoising=False), config.Grid(), channels=128)
    assert sum(p.numel() for p in denoising.parameters()) == 6_445_584
    assert sum(p.numel() for p in plain.parameters()) == 2_041_857


def some_boxes(counts):
    """Random boxes in the range, labels and counts."""
    M = sum(counts)
    boxes = torch.zeros(M, 9)
    boxes[:, :3] = torch.tensor(GRID.low) + torch.rand(M, 3) * (torch.tensor(GRID.high) - torch.tensor(GRID.low))
    boxes[:, 3:6] = 1 + 3 * torch.rand(M, 3)
    boxes[:, 6:] = torch.randn(M, 3)
    return boxes, torch.randint(10, (M,)), torch.tensor(counts)


def seeded(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.mark.parametrize("denoising", [False, True])
@pytest.mark.parametrize("counts", [[3, 0], [0, 0], [0, 2], [1, 14]])
def test_frames_without_and_with_too_many_boxes(counts, denoising):
    """14 boxes in a sample are more than its 12 queries: then there are no noisy queries."""
    head = Head(dataclasses.replace(SMALL, denoising=denoising), GRID, channels=8)
    losses = head.losses(torch.randn(2, 8, 2, 3, 4), *some_boxes(counts), seeded(0, 1))
    names = {"class", "box"} | ({"iou", "noisy_class", "noisy_box", "noisy_iou"} if denoising else set())
    assert losses.keys() == names
    assert all(torch.isfinite(value) and value.dim() == 0 for value in losses.values())
    assert (losses["box"] > 0) == (sum(counts) > 0)
    if denoising:
        assert (losses["noisy_box"] > 0) == (0 < max(counts) <= 12)
    sum(losses.values()).backward()
    for key, param in head.named_parameters():  # DistributedDataParallel waits for all of them
        assert param.grad is not None and torch.isfinite(param.grad).all(), key


def test_losses_depend_only_on_the_generators():
    head = Head(SMALL, GRID, channels=8)
    volume, ground_truth = torch.randn(2, 8, 2, 3, 4), some_boxes([3, 2])
    first, again, other = (head.losses(volume, *ground_truth, seeded(*seeds)) for seeds in ((0, 1), (0, 1), (0, 2)))
    assert first == again
    for name in ("class", "box", "noisy_class", "noisy_box"):  # IoU losses are 0 without an overlap
        assert first[name] != other[name], name


def test_noise_of_a_sample_does_not_depend_on_the_others():
    # [groups, boxes, 3] of two samples with 3 and 2 boxes, and of the second one alone
    both, second = draw_noise(SMALL, [3, 2], seeded(0, 1)), draw_noise(SMALL, [2], seeded(1))
    assert both.shape == (3, 5, 3) and torch.equal(both[:, 3:], second)


def test_samples_are_independent():
    head = Head(SMALL, GRID, channels=8)
    volume = torch.randn(3, 8, 2, 3, 4)
    together, _ = head(volume, generators=seeded(0, 1, 2))
    alone, _ = head(volume[1:2], generators=seeded(1))
    for name in ("logits", "codes", "iou"):
        assert torch.allclose(getattr(together, name)[:, 1:2], getattr(alone, name), rtol=1e-5, atol=1e-5), name


def test_noisy_queries_do_not_change_the_others():
    head = Head(SMALL, GRID, channels=8)
    volume, (boxes, labels, counts) = torch.randn(2, 8, 2, 3, 4), some_boxes([3, 2])
    noisy = noisy_queries(SMALL, GRID, boxes, labels, counts.tolist(), torch.rand(3, 5, 3))
    assert len(noisy) == 9  # 3 groups of 3, the largest number of boxes
    (with_noisy, of_noisy), (without_noisy, none) = head(volume, noisy), head(volume)
    assert torch.allclose(with_noisy.codes, without_noisy.codes, rtol=1e-5, atol=1e-5) and none is None
    assert of_noisy.codes.shape == (2, 2, 9, 10) and of_noisy.iou.shape == (2, 2, 9)  # [L, B, queries, ...]


def test_noisy_queries_by_hand():
    """Two boxes of 2 x 4 x 1 m in the first of two samples, one in the middle of the range. Noise 0.5 is no shift, 1 is
    a shift by half the box's size."""
    boxes = torch.tensor([[0.0, 0, -1, 2, 4, 1, 0.3, 0, 0], [53.5, 0, -1, 2, 4, 1, 0.3, 0, 0]])
    noise = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.5, 0.5]]).expand(2, 2, 3)
    noisy = noisy_queries(dataclasses.replace(SMALL, noise_groups=2), GRID, boxes, torch.tensor([4, 7]), [2, 0], noise)
    middle = torch.tensor([0.5, 0.5, 0.5])
    expected = torch.stack([middle, torch.tensor([1.0, 0.5, 0.5])] * 2)  # 53.5 + 1 m is clamped to the range
    assert torch.allclose(noisy.references[0], expected) and (noisy.references[1] == 0).all()
    assert noisy.labels.tolist() == [[4, 10], [4, 10]]  # shifted by more than noise_split: background
    assert noisy.slot.tolist() == [[0, 1], [2, 3]] and noisy.sample.tolist() == [0, 0]


def test_assignment_by_hand():
    """Two boxes and three queries: 0 and 1 are at boxes 1 and 0; 2 is farther from box 0 and has its class.

    `assign` returns sample, query per layer, box per layer.
    """
    boxes, _, _ = some_boxes([2])
    codes = encode_boxes(boxes[[1, 0, 0]])[None, None].clone()
    codes[..., 2, :] += 1
    logits = torch.full((1, 1, 3, 10), -4.0)
    logits[0, 0, 2, 3] = 4.0
    cfg = dataclasses.replace(SMALL, class_weight=0.0)
    assert [t.tolist() for t in assign(cfg, logits, codes, boxes, torch.tensor([3, 5]), [2])] == [
        [0, 0],
        [[0, 1]],
        [[1, 0]],
    ]
    cfg = dataclasses.replace(SMALL, class_weight=100.0)
    assert [t.tolist() for t in assign(cfg, logits, codes, boxes, torch.tensor([3, 5]), [2])] == [
        [0, 0],
        [[0, 2]],
        [[1, 0]],
    ]


def test_losses_by_hand():
    """One box, two queries; the first is assigned: off by 0.5 m in x and by 1 m/s in vx, predicted IoU 0.5."""
    box = torch.tensor([[1.0, 2.0, 0.0, 2.0, 4.0, 1.5, 0.0, 0.0, 0.0]])
    codes = encode_boxes(box).repeat(1, 1, 2, 1)  # [1, 1, 2, 10]
    codes[0, 0, 0, 0] += 0.5
    codes[0, 0, 0, 8] += 1.0
    codes[0, 0, 1, :2] += 20
    logits = torch.zeros(1, 1, 2, 10)
    predictions = Predictions(logits, codes, torch.zeros(1, 1, 2))
    losses = detection_losses(SMALL, predictions, None, None, box, torch.tensor([2]), [1])
    # class_weight 2; focal loss at p = 1/2: ln 2 * (1/2)^2, times alpha = 1/4 for one positive, 3/4 for 19 negatives
    assert losses["class"].item() == pytest.approx(2 * math.log(2) / 4 * (0.25 + 19 * 0.75))
    # box_weight 0.25; code weights 2 of x and 0.2 of vx
    assert losses["box"].item() == pytest.approx(0.25 * (2 * 0.5 + 0.2 * 1))
    iou = 3.5 / (8 - 3.5)  # 4 m long, shifted by 0.5 m
    # iou_weight 0.5; IoUs are predicted as 2 IoU - 1
    assert losses["iou"].item() == pytest.approx(0.5 * abs(0 - (2 * iou - 1)), rel=1e-4)


def test_non_finite_values_neither_raise_nor_spread():
    boxes, labels, _ = some_boxes([2])
    boxes[1, 7], boxes[0, 3] = torch.nan, 0.0  # one has an unknown velocity, the other no width
    codes = torch.randn(1, 1, 4, 10)
    predictions = Predictions(torch.randn(1, 1, 4, 10), codes, torch.zeros(1, 1, 4))
    losses = detection_losses(SMALL, predictions, None, None, boxes, labels, [2])
    assert all(torch.isfinite(value).all() for value in losses.values()) and losses["box"] == 0
    _, _, box = assign(SMALL, predictions.logits * torch.nan, codes, boxes, labels, [2])
    assert sorted(box[0].tolist()) == [0, 1]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_matches_torch(masked):
    ours, theirs = SelfAttention(channels=8, heads=2), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.load_state_dict({k.replace("in_proj.", "in_proj_"): v for k, v in ours.state_dict().items()})
    x, position = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    blocked = torch.rand(5, 5) > 0.6 if masked else None
    if masked:
        blocked.fill_diagonal_(False)
    expected, _ = theirs(x + position, x + position, x, attn_mask=blocked)
    assert torch.allclose(ours(x, position, blocked), expected, atol=1e-6)
    # with a mask of dropout, attention is not computed by `scaled_dot_product_attention`
    (kept,) = Dropout(1e-12, seeded(0, 1)).masks((2, 2, 5, 5))
    assert torch.allclose(ours(x, position, blocked, kept, 1e-12), expected, atol=1e-6)


def test_volume_attention_samples_like_grid_sample():
    attention = VolumeAttention(6)
    volume, reference = torch.randn(2, 6, 3, 4, 5), 4 * torch.randn(2, 40, 3)
    grid = (2 * reference.sigmoid() - 1)[:, None, None]
    expected = torch.nn.functional.grid_sample(volume, grid, align_corners=False)[:, :, 0, 0].transpose(1, 2)
    x = torch.zeros(2, 40, 6)  # with the initial bias of 0, the gate is sigmoid(0) = 1/2
    expected = torch.nn.functional.linear(expected / 2, attention.output_proj.weight)
    assert torch.allclose(attention(x, sample_volume(volume.permute(0, 2, 3, 4, 1), reference)), expected, atol=1e-6)


def test_dropout_is_drawn_per_sample_and_keeps_the_mean():
    x = torch.ones(2, 300, 40)
    dropped = Dropout(0.25, seeded(0, 1))(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(dropped[1:], Dropout(0.25, seeded(1))(x[1:])) and not torch.equal(dropped[0], dropped[1])
    (mask,) = Dropout(0.25, seeded(0, 1)).masks(x.shape)
    assert torch.equal(drop(x, mask, 0.25), dropped)
    assert Dropout(0.25)(x) is x and Dropout(0.0, seeded(0, 1))(x) is x and Dropout(0.25).masks(x.shape) == [None]


def test_no_dropout_in_evaluation():
    head = Head(SMALL, GRID, channels=8).eval()
    volume = torch.randn(1, 8, 2, 3, 4)
    assert torch.equal(head(volume, generators=seeded(0))[0].codes, head(volume)[0].codes)


def test_the_head_computes_in_fp32_under_autocast():
    head = Head(SMALL, GRID, channels=8)
    volume = torch.randn(1, 8, 2, 3, 4).bfloat16()
    expected, _ = head(volume.float())
    with torch.autocast("cpu", torch.bfloat16):
        predictions, _ = head(volume)
    assert predictions.codes.dtype == torch.float32
    assert torch.allclose(predictions.codes, expected.codes, rtol=1e-5, atol=1e-4)


def test_nms_of_some_classes_and_limits_of_box_centers():
    """Two boxes of class 0 and two of class 5, each pair 1 m apart in x; the last box is out of range. Of these classes
    only 5 has NMS."""
    boxes = torch.zeros(1, 1, 5, 9)
    boxes[..., 3:6] = 4.0
    boxes[..., [1, 3], 0] = 1.0
    boxes[..., 4, 0] = 70.0
    logits = torch.full((1, 1, 5, 10), -20.0)
    for query, (label, logit) in enumerate([(0, 3.0), (0, 2.0), (5, 1.0), (5, 2.5), (1, 4.0)]):
        logits[0, 0, query, label] = logit
    predictions = Predictions(logits, encode_boxes(boxes), None)
    (kept,) = detections(dataclasses.replace(SMALL, max_detections=5), predictions)
    assert kept.labels.tolist() == [0, 5, 0] and kept.boxes[:, 0].tolist() == [0, 1, 1]
    assert kept.scores.tolist() == torch.tensor([3.0, 2.5, 2.0]).sigmoid().tolist()
    (none,) = detections(dataclasses.replace(SMALL, min_score=0.99), predictions)
    assert none.boxes.shape == (0, 9)


def test_a_head_learns_to_find_boxes():
    """150 steps cut the losses of class and box to less than a quarter; for four of five boxes, the best detection of
    the box's class is within 3 m of it."""
    cfg = dataclasses.replace(SMALL, queries=20, dropout=0.0)
    head, (boxes, _, counts) = Head(cfg, GRID, channels=16), some_boxes([3, 2])
    labels = torch.tensor([4, 7, 8, 2, 7])
    volume = torch.randn(2, 16, 3, 6, 6)
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    history = []
    for step in range(150):
        losses = head.losses(volume, boxes, labels, counts, seeded(step, 1000 + step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 35.0)
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    for name in ("class", "box"):
        assert history[-1][name] < history[0][name] / 4, name
    detected = detections(cfg, head.eval()(volume)[0])
    hits = 0
    for box, label, result in zip(boxes, labels, [detected[0]] * 3 + [detected[1]] * 2, strict=True):
        best = result.boxes[result.labels == label][:1]
        hits += len(best) == 1 and (best[0, :2] - box[:2]).norm().item() < 3
    assert hits >= 4


def test_a_lidar_detector_trains_and_detects():
    """All parameters get gradients in training; detections do not require gradients."""
    recipe = config.DetectRecipe(
        grid=GRID,
        lidar=config.LidarConfig(
            cell=tuple(c / 2 for c in GRID.cell),
            widths=(4, 4),
            blocks=1,
            sparse_channels=8,
            neck_widths=(8,),
            neck_strides=(1,),
            neck_layers=0,
            channels=8,
            volume_convs=1,
        ),
        detect=SMALL,
    )
    boxes, labels, counts = some_boxes([2, 0])
    no_images, points = torch.zeros(2, 0), torch.rand(40, 5)
    batch = Batch(
        images=no_images,
        image_sizes=no_images,
        lidar2image=no_images,
        lidar2camera=no_images,
        points=points,
        point_counts=torch.tensor([10, 30]),
        boxes=boxes,
        labels=labels,
        box_counts=counts,
        point_labels=None,
        tokens=("a", "b"),
    )
    model = Detector(recipe)
    sum(model(batch, seeded(0, 1)).values()).backward()
    assert all(param.grad is not None for param in model.parameters())
    detected = model.eval().detect(batch)
    assert len(detected) == 2 and all(not t.requires_grad for d in detected for t in (d.boxes, d.scores))
