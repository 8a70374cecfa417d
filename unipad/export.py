"""Pre-trained encoders for code outside of this project: as modules, or as weights for networks of other projects.

    from unipad.export import load_encoder
    encoder = load_encoder("outputs/train-lidar")

    python -m unipad.convert outputs/train-lidar encoder.pth --to mmdet3d    # or openpcdet, pointcept

Where another project has the same network, its weights are written under that project's keys (`unipad.names`), and the
lines of a config that make the network and its input the same are printed.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unipad.checkpoint import load_weights, part_of, read_run
from unipad.config import CameraConfig, LidarConfig, Recipe, UnetConfig, cells_of_range
from unipad.errors import UserError
from unipad.model.camera import MEAN, STD
from unipad.model.encoder import Encoder
from unipad.names import to_project


@dataclass(frozen=True)
class Project:
    """A project that has networks like these encoders."""

    name: str
    encoders: tuple[type, ...]  # configs of the encoders that it has
    wrapper: str  # key of the weights in its checkpoints
    # config of an encoder -> prefix of the keys of that network which have no counterpart here, and why not
    own: dict[type, tuple[str, str]]


PROJECTS = {
    "mmdet3d": Project(
        "MMDetection3D",
        (CameraConfig, LidarConfig),
        "state_dict",
        {LidarConfig: ("pts_middle_encoder.conv_out.", "3 x 1 x 1, merges slices in z; here 1 x 1 x 1")},
    ),
    "openpcdet": Project(
        "OpenPCDet",
        (LidarConfig,),
        "model_state",
        {LidarConfig: ("backbone_3d.conv_out.", "3 x 1 x 1, merges slices in z; here 1 x 1 x 1")},
    ),
    "pointcept": Project("Pointcept", (UnetConfig,), "state_dict", {UnetConfig: ("backbone.final.", "the classifier")}),
}
NAMES = {CameraConfig: "ConvNeXt and FPN", LidarConfig: "the sparse encoder", UnetConfig: "SpUNet"}
WIDTHS, BLOCKS = (16, 32, 64, 128), 2  # of OpenPCDet's VoxelResBackBone8x, where they are no settings
POINT = "x, y, z in meters in the LiDAR's frame (nuScenes: x right, y forward), intensity 0 to 255"


def load_encoder(path: Path | str) -> Encoder:
    """The encoder of a run, pre-trained or fine-tuned, in evaluation mode and on the CPU.

    `encoder(batch, None)[0]` is the volume [B, C, Z, Y, X] of a `unipad.batch.Batch`. Without a batch, call its parts:
    `encoder.camera(images, image_sizes)`, `encoder.lidar(points, point_counts)` or, of a SpUNet,
    `encoder.lidar.voxel_features(points, point_counts)`. Its settings are `encoder.recipe`.

    path: a run's folder, a folder of several runs to use the newest, or a checkpoint.
    Raises `UserError` if there is none, or it does not fit its recipe.
    """
    saved, recipe, _ = read_run(Path(path))
    encoder = Encoder(recipe)
    weights = {name: w for name, w in saved["model"].items() if str(name).startswith("encoder.")}
    load_weights(encoder, {name.removeprefix("encoder."): w for name, w in weights.items()}, Path(path))
    return encoder.eval()


def export(weights: dict[str, Tensor], recipe: Recipe, to: str, source: Path | str) -> tuple[dict[str, Tensor], str]:
    """(Weights by the keys of project `to`, a key of `PROJECTS`; text: what has no counterpart, and a config).

    weights: of a model, by their names in it; only those of its encoder are used.
    source:  where they are from, for messages.
    Raises `UserError` if the project has no network like the encoder.
    """
    project = PROJECTS[to]
    encoders = [type(cfg) for cfg in (recipe.camera, recipe.lidar) if cfg is not None]
    common = [encoder for encoder in encoders if encoder in project.encoders]
    if not common:
        raise UserError(
            f"--to {to}: {project.name} has no network like {_names(encoders)} of {source}; it has one like "
            f"{_names(project.encoders)}."
        )
    if to == "openpcdet" and (recipe.lidar.widths, recipe.lidar.blocks) != (WIDTHS, BLOCKS):
        raise UserError(
            f"--to openpcdet: its VoxelResBackBone8x always has {WIDTHS} channels and {BLOCKS} blocks per stage, the "
            f"sparse encoder of {source} has {recipe.lidar.widths} and {recipe.lidar.blocks}; --to mmdet3d takes any."
        )
    theirs, unknown = to_project(weights, to)
    lines = []
    if to == "openpcdet":
        # zeros change nothing; without them, its own random ones would stay
        convs = [key for key in theirs if key.endswith((".conv1.weight", ".conv2.weight"))]
        theirs |= {key.replace(".weight", ".bias"): torch.zeros(len(theirs[key])) for key in convs}
        lines.append(f"supplied: {len(convs)} biases of 0, which its convolutions have unless USE_BIAS is False")
    elif to == "pointcept" and recipe.data.sweeps == 1:
        stem = "backbone.conv_input.0.weight"
        theirs |= {key: w[..., :4].contiguous() for key, w in theirs.items() if key == stem}
        lines.append("left out: the fifth input channel, the points' age, which is always 0 without sweeps")
    if parts := Counter(_part(name) for name in unknown):
        counts = ", ".join(f"{part} ({count} weights)" for part, count in parts.items())
        lines.append(f"not written, since {project.name} has no such modules: {counts}")
    for prefix, why in (project.own[encoder] for encoder in common if encoder in project.own):
        lines.append(f"not written, since only {project.name} has such modules: {prefix}* ({why})")
    lines.append(f"{project.name}'s config needs:")
    lines += ["    " + line for encoder in common for line in CONFIGS[to, encoder](recipe)]
    return theirs, "\n".join(lines)


def _names(encoders):
    return ", ".join(NAMES[encoder] for encoder in encoders)


def _part(name):
    """The part of a model that a weight belongs to, as by `part_of`; of a sparse encoder, the module in it."""
    return ".".join(name.split(".")[:4]) if name.startswith("encoder.lidar.encoder.") else part_of(name)


def _mmdet3d_camera(recipe):
    camera = recipe.camera
    stages = list(range(camera.fpn_start, len(camera.widths)))
    arch = {"depths": list(camera.depths), "channels": list(camera.widths)}
    extra = dict(add_extra_convs="on_output", relu_before_extra_convs=True) if camera.fpn_levels > len(stages) else {}
    neck = dict(in_channels=[camera.widths[i] for i in stages], out_channels=camera.channels, **extra)
    mean, std = ([round(255 * value, 3) for value in values] for values in (MEAN, STD))
    return [
        "custom_imports = dict(imports=['mmpretrain.models'])",
        _setting("img_backbone", "mmpretrain.ConvNeXt", arch=arch, out_indices=stages, gap_before_final_norm=False),
        _setting("img_neck", "mmdet.FPN", **neck, num_outs=camera.fpn_levels),
        f"data_preprocessor: mean={mean}, std={std}, bgr_to_rgb=True, pad_size_divisor=32",
    ]


def _mmdet3d_lidar(recipe):
    lidar, channels, paddings = recipe.lidar, [], []  # per stage: of its blocks, then of the strided convolution
    for stage, width in enumerate(lidar.widths):
        channels.append([width] * lidar.blocks + list(lidar.widths[stage + 1 : stage + 2]))
        paddings.append([0] * lidar.blocks + [1] * (stage < len(lidar.widths) - 1))
    if len(lidar.widths) > 1:
        paddings[-2][-1] = [0, 1, 1]
    cells = cells_of_range(recipe.grid.low, recipe.grid.high, lidar.cell, "--lidar.cell")  # x, y, z
    return [
        _setting(
            "pts_middle_encoder",
            "SparseEncoder",
            in_channels=5,
            base_channels=lidar.widths[0],
            sparse_shape=[cells[2] + 1, cells[1], cells[0]],
            encoder_channels=channels,
            encoder_paddings=paddings,
            block_type="basicblock",
        ),
        _setting("pts_voxel_encoder", "HardSimpleVFE", num_features=5),
        f"data_preprocessor: voxel=True, voxel_layer=dict(point_cloud_range={_range(recipe)}, "
        f"voxel_size={list(lidar.cell)}, max_num_points={lidar.max_points}, max_voxels={lidar.max_voxels})",
        f"points: {POINT}, seconds before the keyframe: "
        f"LoadPointsFromMultiSweeps with sweeps_num={recipe.data.sweeps - 1}, use_dim=[0, 1, 2, 3, 4]",
    ]


def _openpcdet_lidar(recipe):
    lidar = recipe.lidar
    train, test = lidar.max_voxels
    return [
        "BACKBONE_3D: {NAME: VoxelResBackBone8x}",
        "VFE: {NAME: MeanVFE}",
        f"POINT_CLOUD_RANGE: {_range(recipe)}",
        f"VOXEL_SIZE: {list(lidar.cell)}",
        f"MAX_POINTS_PER_VOXEL: {lidar.max_points}",
        f"MAX_NUMBER_OF_VOXELS: {{'train': {train}, 'test': {test}}}",
        f"MAX_SWEEPS: {recipe.data.sweeps}",
        f"used_feature_list: [x, y, z, intensity, timestamp]: {POINT}, seconds before the keyframe",
    ]


def _pointcept_unet(recipe):
    unet, with_age = recipe.lidar, recipe.data.sweeps > 1
    sizes = dict(base_channels=unet.stem, channels=unet.widths, layers=unet.blocks)
    age = ", then seconds before the keyframe, which its NuScenesDataset lacks" if with_age else ""
    return [
        _setting("backbone", "SpUNet-v1m1", in_channels=4 + with_age, **sizes),
        f"GridSample: grid_size={unet.cell}",
        f'feat_keys=("coord", "strength"): {POINT} divided by 255{age}',
    ]


CONFIGS = {
    ("mmdet3d", CameraConfig): _mmdet3d_camera,
    ("mmdet3d", LidarConfig): _mmdet3d_lidar,
    ("openpcdet", LidarConfig): _openpcdet_lidar,
    ("pointcept", UnetConfig): _pointcept_unet,
}


def _setting(name, kind, **settings):
    """A line of a config in Python: the module `name`, of type `kind`."""
    return f"{name}=dict(type={kind!r}, " + ", ".join(f"{key}={value!r}" for key, value in settings.items()) + "),"


def _range(recipe):
    return [*recipe.grid.low, *recipe.grid.high]
