"""Names and layouts of weights in other projects and in ours.

One table is for checkpoints of the original UniPAD code, with sparse convolutions of spconv 1 or 2, and is read in both
directions; one is for ImageNet weights of ConvNeXt from four libraries, and is only read towards ours; those of
`PROJECTS` are for encoders in other projects, and are only read from ours.
"""

import re
from functools import cache

import torch

DECODER = "pts_bbox_head.transformer.decoder.layers.*."
# The original's heads without and with denoising name their reference points differently, ours alike
PLAIN_REFERENCES = ("pts_bbox_head.transformer.reference_points.", "head.reference_points.")
DENOISING_REFERENCES = ("pts_bbox_head.reference_points.", "head.reference_points.")
THEIRS, OURS = 0, 1  # columns of the tables
# (prefix of the original's keys, prefix of ours); * matches a number. In both directions, the first match counts.
# A third entry is the key in `LAYOUTS` of weights whose layout differs.
UNIPAD = [
    ("img_backbone.", "encoder.camera.backbone."),
    ("img_neck.lateral_convs.*.conv.", "encoder.camera.neck.lateral_convs.*."),
    ("img_neck.fpn_convs.*.conv.", "encoder.camera.neck.fpn_convs.*."),
    ("input_proj.", "encoder.camera.input_proj."),
    ("depth_net.", "encoder.camera.depth_net."),
    ("pts_middle_encoder.mtoken", "encoder.lidar.mask_token"),
    ("pts_middle_encoder.", "encoder.lidar.encoder.", "sparse"),
    ("pts_backbone.", "encoder.lidar.backbone.", "slices_2d"),
    # The original: one list of three entries per block (convolution, norm, ReLU; at most four blocks). Ours: blocks
    *[(f"pts_neck.extra_blocks.{3 * i + j}.", f"encoder.lidar_convs.{i}.{j}.") for i in range(4) for j in range(2)],
    ("pts_neck.", "encoder.lidar.neck.", "slices_2d"),
    ("pts_bbox_head.view_trans.time_conv.", "encoder.frame_fusion.time_conv."),
    ("pts_bbox_head.view_trans.trans_conv.", "encoder.frame_fusion.trans_conv."),
    ("pts_bbox_head.view_trans.conv_layer.", "encoder.lift_convs."),
    ("pts_bbox_head.conv_trans_head_1.", "encoder.fuse."),
    ("pts_bbox_head.render_conv.", "project."),
    ("pts_bbox_head.render_model.field.", "renderer.field."),
    (DECODER + "attentions.0.attn.in_proj_", "head.layers.*.attention.in_proj."),
    (DECODER + "attentions.0.attn.", "head.layers.*.attention."),
    (DECODER + "attentions.1.", "head.layers.*.cross."),
    (DECODER + "ffns.0.layers.0.0.", "head.layers.*.expand."),
    (DECODER + "ffns.0.layers.1.", "head.layers.*.contract."),
    (DECODER + "norms.", "head.layers.*.norms."),
    ("pts_bbox_head.cls_branches.", "head.cls_branches."),
    ("pts_bbox_head.reg_branches.", "head.reg_branches."),
    ("pts_bbox_head.iou_branches.", "head.iou_branches."),
    ("pts_bbox_head.query_embedding.", "head.query_embedding."),
    PLAIN_REFERENCES,
    DENOISING_REFERENCES,
]
# A setting that the original keeps among the weights; `unipad.convert` handles it, so the tables do not have it
CODE_WEIGHTS = "pts_bbox_head.code_weights"

# The same for ConvNeXt, whose names here are those of the official repository; read from left to right only
IMAGENET = [
    # mmpretrain
    ("backbone.downsample_layers.", "downsample_layers."),
    ("backbone.stages.*.*.depthwise_conv.", "stages.*.*.dwconv."),
    ("backbone.stages.*.*.pointwise_conv1.", "stages.*.*.pwconv1.", "matrix"),
    ("backbone.stages.*.*.pointwise_conv2.", "stages.*.*.pwconv2.", "matrix"),
    ("backbone.stages.*.*.", "stages.*.*."),
    # timm
    ("stem.", "downsample_layers.0."),
    ("stages.*.downsample.", "downsample_layers.*."),
    ("stages.*.blocks.*.conv_dw.", "stages.*.*.dwconv."),
    ("stages.*.blocks.*.mlp.fc1.", "stages.*.*.pwconv1.", "matrix"),
    ("stages.*.blocks.*.mlp.fc2.", "stages.*.*.pwconv2.", "matrix"),
    ("stages.*.blocks.*.", "stages.*.*."),
    # torchvision
    *[
        row
        for i in range(4)  # stages
        for row in [
            (f"features.{2 * i}.", f"downsample_layers.{i}."),
            (f"features.{2 * i + 1}.*.block.0.", f"stages.{i}.*.dwconv."),
            (f"features.{2 * i + 1}.*.block.2.", f"stages.{i}.*.norm."),
            (f"features.{2 * i + 1}.*.block.3.", f"stages.{i}.*.pwconv1."),
            (f"features.{2 * i + 1}.*.block.5.", f"stages.{i}.*.pwconv2."),
            (f"features.{2 * i + 1}.*.layer_scale", f"stages.{i}.*.gamma", "vector"),
        ]
    ],
    # official
    ("downsample_layers.", "downsample_layers."),
    ("stages.*.*.", "stages.*.*."),
]

# Encoders as parts of a detector or segmentor of other projects; weights without a row have no counterpart there.
ENCODER, STAGE = "encoder.lidar.encoder.", "encoder.lidar.encoder.encoder_layers.encoder_layer"
# mmdet3d 1.4 with mmpretrain's ConvNeXt and mmdet's FPN
MMDET3D = [
    ("img_backbone.stages.*.*.depthwise_conv.", "encoder.camera.backbone.stages.*.*.dwconv."),
    ("img_backbone.stages.*.*.pointwise_conv1.", "encoder.camera.backbone.stages.*.*.pwconv1."),
    ("img_backbone.stages.*.*.pointwise_conv2.", "encoder.camera.backbone.stages.*.*.pwconv2."),
    ("img_backbone.", "encoder.camera.backbone."),
    ("img_neck.lateral_convs.*.conv.", "encoder.camera.neck.lateral_convs.*."),
    ("img_neck.fpn_convs.*.conv.", "encoder.camera.neck.fpn_convs.*."),
    ("pts_middle_encoder.conv_input.", ENCODER + "conv_input.", "sparse"),
    ("pts_middle_encoder.encoder_layers.", ENCODER + "encoder_layers.", "sparse"),
]
# VoxelResBackBone8x of OpenPCDet 0.6. The strided convolution between two stages is the first of the later stage's
# three modules; here, it is the last of the earlier stage's.
OPENPCDET = [
    ("backbone_3d.conv_input.", ENCODER + "conv_input.", "sparse"),
    *[(f"backbone_3d.conv1.{i}.", f"{STAGE}1.{i}.", "sparse") for i in range(2)],
    *[
        (f"backbone_3d.conv{stage}.{i}.", f"{STAGE}{stage}.{i - 1}." if i else f"{STAGE}{stage - 1}.2.", "sparse")
        for stage in (2, 3, 4)
        for i in range(3)
    ],
]
# SpUNet-v1m1 of Pointcept 1.7, whose voxel coordinates, and so the axes of its kernels, are x, y, z
POINTCEPT = [("backbone.", ENCODER, "sparse_xyz")]
# Table, and the version of spconv whose layout weights get. mmcv's own sparse convolutions, which mmdet3d uses without
# spconv 2, have that of spconv 1. With spconv 2, mmdet3d permutes the weights of a file that does not have the module
# versions which `state_dict()` records (write_spconv2.py, `_load_from_state_dict`): so one layout fits both.
PROJECTS = {"mmdet3d": (MMDET3D, 1), "openpcdet": (OPENPCDET, 2), "pointcept": (POINTCEPT, 2)}


def from_original(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights of the original, converted to our names and layouts.

    state: of a whole model or a part of it, under the original's keys; weights of sparse convolutions may be
        spconv 1's, (kz, ky, kx, Cin, Cout), or spconv 2's, (Cout, kz, ky, kx, Cin).

    Returns (tensors by name, keys without a name here).
    """
    return _renamed(state, UNIPAD, THEIRS, OURS)


def to_original(state: dict[str, torch.Tensor], spconv: int = 1) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The inverse of `from_original`; spconv: 1 or 2, the layout of the weights of sparse convolutions."""
    # reference points are a linear layer, which has a bias, in the head without denoising, else an embedding
    unused = DENOISING_REFERENCES if "head.reference_points.bias" in state else PLAIN_REFERENCES
    return _renamed(state, [row for row in UNIPAD if row is not unused], OURS, THEIRS, spconv)


def to_project(state: dict[str, torch.Tensor], project: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights of ours in the names and layouts of `project`, a key of `PROJECTS`.

    Returns (tensors by key, our names without a counterpart there).
    """
    rows, spconv = PROJECTS[project]
    return _renamed(state, rows, OURS, THEIRS, spconv)


def from_imagenet(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights of an ImageNet ConvNeXt in the names of `model.camera.ConvNeXt`; returns what `from_original` does."""
    return _renamed(state, IMAGENET, THEIRS, OURS)


def _renamed(state, rows, source, target, spconv=1):
    """(tensors by new key, keys without one).

    source, target: columns of `rows` to convert from and to; spconv: layout to write, if the target is the original.
    """
    renamed, unknown = {}, []
    for key, value in state.items():
        name, layout = _rename(key, rows, source, target)
        if name is None:
            unknown.append(key)
        else:
            renamed[name] = LAYOUTS[layout](value, target == OURS, spconv) if layout else value
    return renamed, unknown


def _rename(key, rows, source, target):
    """(new key, layout or None) by the first of `rows` that matches; (None, None) if none does."""
    for row in rows:
        if found := _regex(row[source]).match(key):
            numbers = iter(found.groups())  # those that * matched
            prefix = "".join(next(numbers) if c == "*" else c for c in row[target])
            return prefix + key[found.end() :], row[2] if len(row) > 2 else None
    return None, None


@cache
def _regex(prefix):
    return re.compile(re.escape(prefix).replace(r"\*", r"(\d+)"))


def _sparse(weight, to_ours, spconv):
    """Sparse convolutions: here (Cout, kz, ky, kx, Cin).

    spconv 1 has (kz, ky, kx, Cin, Cout). spconv 2 has the same as here, except for 1 x 1 x 1: the shape says
    (Cout, 1, 1, 1, Cin), but the memory is a matrix (Cin, Cout).
    """
    if weight.dim() != 5:
        return weight
    if not to_ours and spconv == 1:
        return weight.permute(1, 2, 3, 4, 0).contiguous()
    # The shape shows that it is spconv 1's, since the original's kernels are all cubes (mmdet3d's conv_out is not).
    if to_ours and weight.shape[0] == weight.shape[1] == weight.shape[2]:
        return weight.permute(4, 0, 1, 2, 3).contiguous()
    if weight.shape[1:4].numel() > 1:
        return weight
    # 1 x 1 x 1 of spconv 2
    out, *_, channels = weight.shape
    if to_ours:
        return weight.reshape(channels, out).t().reshape(weight.shape)
    return weight.reshape(out, channels).t().reshape(weight.shape)


def _sparse_xyz(weight, to_ours, spconv):
    """From here to networks whose kernels are (x, y, z)."""
    return _sparse(weight.transpose(1, 3).contiguous() if weight.dim() == 5 else weight, to_ours, spconv)


def _slices(weight, to_ours, _):
    """3D convolutions, also transposed ones, whose kernel has size 1 in z are 2D convolutions here."""
    if to_ours:
        return weight.squeeze(2) if weight.dim() == 5 else weight
    return weight.unsqueeze(2) if weight.dim() == 4 else weight


LAYOUTS = {
    "sparse": _sparse,
    "sparse_xyz": _sparse_xyz,
    "slices_2d": _slices,
    # 1 x 1 convolutions of other libraries are linear layers here
    "matrix": lambda weight, *_: weight.flatten(1) if weight.dim() > 1 else weight,
    "vector": lambda weight, *_: weight.flatten(),  # torchvision's layer_scale is (C, 1, 1)
}
