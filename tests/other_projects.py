"""Builds the networks of other projects from their own code: writes the lists of keys and shapes that test_export.py
reads, and compares outputs with ours, with the weights that `unipad.convert --to` writes, loaded by their loaders.

    mkdir clones && cd clones
    git clone https://github.com/open-mmlab/mmdetection3d && git clone https://github.com/open-mmlab/mmpretrain
    git clone https://github.com/open-mmlab/OpenPCDet && git clone https://github.com/Pointcept/Pointcept && cd ..
    pip install mmengine spconv && pip install --no-deps mmcv-lite mmdet
    python -m tests.other_projects clones            # compares the lists too; --write writes them

Only the files with the networks are imported; what they import of the rest of their projects is replaced.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.golden import FOLDER
from unipad import convert
from unipad.config_dict import to_dict
from unipad.export import load_encoder
from unipad.model.pretrain import Pretrain
from unipad.recipes import PRETRAIN
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

FILE = FOLDER / "other_projects.json"


def stub(name, folder=None, **attributes):
    """Put a module `name` with these attributes in the place of the real one; its submodules are those in `folder`."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    if folder is not None:
        module.__path__ = [str(folder)]
    sys.modules[name] = module
    return module


def packages(root, *names):
    """Make the submodules of these packages importable without their __init__.py; the first is in the folder `root`."""
    for name in names:
        stub(name, Path(root, *name.split(".")[1:]))


def mmdet3d(clones):
    """(SparseEncoder of mmdet3d, FPN of mmdet), on spconv 2."""
    from mmengine.registry import MODELS, Registry

    unused = "points_in_boxes_all three_interpolate three_nn".split()
    stub("mmcv.ops", **dict.fromkeys(unused))
    (mmdet,) = importlib.util.find_spec("mmdet").submodule_search_locations
    packages(mmdet, "mmdet", "mmdet.models", "mmdet.models.backbones", "mmdet.models.necks")
    stub("mmdet.registry", MODELS=Registry("model", parent=MODELS, scope="mmdet"))
    stub("mmdet.utils", ConfigType=dict, MultiConfig=dict, OptConfigType=dict)
    stub("mmdet.models.layers", ResLayer=None)
    stub("mmdet.models.losses", sigmoid_focal_loss=None, smooth_l1_loss=None)
    models = "mmdet3d.models"
    packages(clones / "mmdetection3d/mmdet3d", "mmdet3d", models, f"{models}.middle_encoders", f"{models}.layers")
    stub("mmdet3d.registry", MODELS=Registry("model", parent=MODELS, scope="mmdet3d"))
    stub("mmdet3d.structures", BaseInstance3DBoxes=object)
    stub("mmdet3d.utils", OptConfigType=dict)
    blocks = import_module(f"{models}.layers.sparse_block")
    assert blocks.IS_SPCONV2_AVAILABLE
    layers = sys.modules[f"{models}.layers"]
    layers.SparseBasicBlock, layers.make_sparse_convmodule = blocks.SparseBasicBlock, blocks.make_sparse_convmodule
    encoder = import_module(f"{models}.middle_encoders.sparse_encoder").SparseEncoder
    return encoder, import_module("mmdet.models.necks.fpn").FPN


def mmpretrain(clones):
    """ConvNeXt."""
    from mmengine.registry import MODELS, Registry

    models = "mmpretrain.models"
    packages(clones / "mmpretrain/mmpretrain", "mmpretrain", models, f"{models}.utils", f"{models}.backbones")
    stub("mmpretrain.registry", MODELS=Registry("model", parent=MODELS, scope="mmpretrain"))
    norm, utils = import_module(f"{models}.utils.norm"), sys.modules[f"{models}.utils"]
    utils.GRN, utils.build_norm_layer = norm.GRN, norm.build_norm_layer
    return import_module(f"{models}.backbones.convnext").ConvNeXt


def openpcdet(clones):
    """(VoxelResBackBone8x; a module that loads checkpoints as OpenPCDet's detectors do)."""
    root = clones / "OpenPCDet/pcdet"
    packages(root, "pcdet", "pcdet.utils", "pcdet.models", "pcdet.models.backbones_3d")
    backbone = import_module("pcdet.models.backbones_3d.spconv_backbone").VoxelResBackBone8x
    source = (root / "models/detectors/detector3d_template.py").read_text()
    methods = source[source.index("    def _load_state_dict") : source.index("    def load_params_with_optimizer")]
    names = {"nn": nn, "os": os, "torch": torch}
    names["find_all_spconv_keys"] = sys.modules["pcdet.utils.spconv_utils"].find_all_spconv_keys
    exec(f"class Loader(nn.Module):\n{methods}", names)
    return backbone, names["Loader"]


def pointcept(clones):
    """SpUNet-v1m1."""
    from mmengine.registry import Registry

    def offset2batch(offset):
        return torch.repeat_interleave(torch.arange(len(offset)), offset.diff(prepend=offset.new_zeros(1)))

    stub("torch_geometric")
    stub("torch_geometric.utils", scatter=None)
    stub("timm")
    stub("timm.layers", trunc_normal_=nn.init.trunc_normal_)
    packages(clones / "Pointcept/pointcept", "pointcept", "pointcept.models", "pointcept.models.sparse_unet")
    stub("pointcept.models.builder", MODELS=Registry("pointcept"))
    stub("pointcept.models.utils", offset2batch=offset2batch)
    return import_module("pointcept.models.sparse_unet.spconv_unet_v1m1_base").SpUNetBase


def make_lists(clones, networks):
    """{"project/recipe": {"source": text, "shapes": {key: shape}}} of the networks of published configs."""
    encoder, fpn, convnext, backbone, spunet = networks

    def keys(**modules):
        return {f"{name}.{key}": list(w.shape) for name, net in modules.items() for key, w in net.state_dict().items()}

    def commit(name):
        command = ["git", "-C", clones / name, "rev-parse", "HEAD"]
        return f"{name} {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}"

    lidar = keys(
        pts_middle_encoder=encoder(
            in_channels=5,
            sparse_shape=[41, 1024, 1024],
            encoder_channels=((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),
            encoder_paddings=((0, 0, 1), (0, 0, 1), (0, 0, [0, 1, 1]), (0, 0)),
            block_type="basicblock",
        )
    )
    # mmcv's own convolutions (mmcv/ops/sparse_conv.py) are (z, y, x, Cin, Cout), spconv's (Cout, z, y, x, Cin)
    lidar = {key: shape[1:] + shape[:1] if len(shape) == 5 else shape for key, shape in lidar.items()}
    small = partial(convnext, arch="small", gap_before_final_norm=False)
    four_levels = fpn([192, 384, 768], 128, 4, add_extra_convs="on_output", relu_before_extra_convs=True)
    spunet_sizes = dict(channels=(32, 64, 128, 256, 256, 128, 96, 96), layers=(2, 3, 4, 6, 2, 2, 2, 2))
    grid_size = np.array([1440, 1440, 40])
    return {
        "mmdet3d/lidar-0.075": {
            "source": f"{commit('mmdetection3d')}: SparseEncoder of centerpoint_voxel01_second_secfpn_nus, with the "
            "layout of mmcv's own sparse convolutions",
            "shapes": lidar,
        },
        "mmdet3d/camera-0.1": {
            "source": f"{commit('mmpretrain')}: ConvNeXt, mmdet {version('mmdet')}: FPN with four outputs",
            "shapes": keys(img_backbone=small(out_indices=[1, 2, 3]), img_neck=four_levels),
        },
        "mmdet3d/camera-0.075": {
            "source": "the same, FPN with one output",
            "shapes": keys(img_backbone=small(out_indices=[3]), img_neck=fpn([768], 256, 1)),
        },
        "openpcdet/lidar-0.075": {
            "source": f"{commit('OpenPCDet')}: VoxelResBackBone8x of cbgs_voxel0075_res3d_centerpoint, spconv 2",
            "shapes": keys(backbone_3d=backbone({}, 5, grid_size)),
        },
        "pointcept/segment": {
            "source": f"{commit('Pointcept')}: SpUNet-v1m1 of semseg-spunet-v1m1-0-base, spconv 2",
            "shapes": keys(backbone=spunet(in_channels=4, num_classes=16, **spunet_sizes)),
        },
    }


def write(lists, file):
    """As JSON with a line for each key."""
    entries = []
    for name, entry in lists.items():
        keys = ",\n".join(f"  {json.dumps(key)}: {json.dumps(shape)}" for key, shape in entry["shapes"].items())
        entries.append(
            f'{json.dumps(name)}: {{\n "source": {json.dumps(entry["source"])},\n "shapes": {{\n{keys}\n }}\n}}'
        )
    file.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    assert json.loads(file.read_text()) == lists


def exported(modality, preset, to, folder):
    """(our encoder with random weights, the file with these weights for project `to`, its dict, what was printed)."""
    net = Pretrain(PRETRAIN[modality][preset])
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith("running_var") or name.endswith("gamma") or value.dim() == 1 and name.endswith("weight"):
            value.data.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            value.data.normal_(0, 0.3)
    run, out = folder / "run.pt", folder / "encoder.pth"
    config = {"args": {"modality": modality, "preset": preset}, "recipe": to_dict(net.recipe), "steps": 0}
    torch.save({"model": net.state_dict(), "step": 0, "config": config}, run)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        convert.main(convert.Args((run, out), to=to, overwrite=True))
    return load_encoder(run), out, torch.load(out, weights_only=True), text.getvalue()


def printed(text, name):
    """The arguments of a module in the config that `unipad.convert` printed."""
    arguments = eval(re.search(rf"^ +{name}=(dict\(.*\)),$", text, re.M)[1])
    return {key: value for key, value in arguments.items() if key != "type"}


def voxels(shape, channels=5):
    """Random ([N, 4] int32 (b, ...) in two grids of `shape`, in ascending order; [N, channels] features)."""
    coords = torch.stack([torch.randint(0, size, (600,)) for size in (2, *shape)], dim=1).int().unique(dim=0)
    return coords, torch.randn(len(coords), channels)


def sparse_stages(encoder, coords, features, shape):
    """Dense output of the last stage of our sparse encoder, before its last convolution."""
    net = encoder.lidar.encoder
    return net.encoder_layers(net.conv_input(SparseConvTensor.of(features, VoxelSet(coords, shape, 2)))).dense()


def compare(name, theirs, ours):
    assert theirs.shape == ours.shape
    error = ((theirs - ours).abs().max() / ours.abs().max()).item()
    print(f"{name:<32} {tuple(ours.shape)!s:<24} largest difference / largest entry {error:.1e}")
    assert error < 1e-5


def compare_mmdet3d(networks, folder):
    from mmengine.runner.checkpoint import load_state_dict  # calls mmdet3d's function that permutes for spconv 2

    encoder, fpn, convnext = networks
    for preset in ("tiny", "lidar-0.075"):
        ours, _, saved, text = exported("lidar", preset, "mmdet3d", folder)
        settings = printed(text, "pts_middle_encoder")
        shape = [2 ** (len(settings["encoder_channels"]) + 1) + 1, 48, 48]
        net = encoder(**settings | {"sparse_shape": shape}, return_middle_feats=True)
        model = nn.ModuleDict({"pts_middle_encoder": net}).eval()
        load_state_dict(model, saved["state_dict"])  # prints the keys of conv_out, which are missing
        coords, features = voxels(shape)
        _, stages = net(features, coords, 2)
        compare(f"mmdet3d {preset}", stages[-1].dense(), sparse_stages(ours, coords, features, shape))
    for preset in ("tiny", "camera-0.1", "camera-0.075"):
        ours, _, saved, text = exported("camera", preset, "mmdet3d", folder)
        parts = {
            "img_backbone": convnext(**printed(text, "img_backbone")),
            "img_neck": fpn(**printed(text, "img_neck")),
        }
        model = nn.ModuleDict(parts).eval()
        load_state_dict(model, saved["state_dict"], strict=True)
        images = torch.randn(2, 3, 64, 96)
        levels = zip(
            model.img_neck(model.img_backbone(images)), ours.camera.neck(ours.camera.backbone(images)), strict=True
        )
        for i, (theirs, level) in enumerate(levels):
            compare(f"mmdet3d {preset}, level {i}", theirs, level)


def compare_openpcdet(networks, folder):
    backbone, loader = networks
    ours, file, *_ = exported("lidar", "lidar-0.075", "openpcdet", folder)
    for config in ({}, {"USE_BIAS": False}):
        model = loader()
        model.backbone_3d = backbone(config, 5, np.array([48, 48, 32]))
        model.eval().load_params_from_file(file, types.SimpleNamespace(info=print), to_cpu=True)
        for conv in model.modules():
            if hasattr(conv, "indice_key") and conv.bias is not None:
                assert not conv.bias.any()
                conv.bias = None  # which spconv's CPU build cannot add
        coords, features = voxels([33, 48, 48])
        theirs = model.backbone_3d({"voxel_features": features, "voxel_coords": coords, "batch_size": 2})
        theirs = theirs["multi_scale_3d_features"]["x_conv4"].dense()
        compare(f"OpenPCDet {config}", theirs, sparse_stages(ours, coords, features, [33, 48, 48]))


def compare_pointcept(spunet, folder):
    for preset in ("segment-tiny", "segment"):
        ours, _, saved, text = exported("lidar", preset, "pointcept", folder)
        net = spunet(**printed(text, "backbone"), num_classes=0)
        nn.ModuleDict({"backbone": net}).load_state_dict(saved["state_dict"])
        shape = [2 ** (len(net.channels) // 2 + 1)] * 3
        coords, features = voxels(shape)
        features[:, 4] = 0  # the age
        inputs = {"grid_coord": coords[:, 1:].flip(1), "feat": features[:, : net.in_channels]}  # x, y, z
        theirs = net.eval()(inputs | {"offset": coords[:, 0].long().bincount().cumsum(0)})
        voxel_set = VoxelSet(coords, shape, 2)
        compare(f"Pointcept {preset}", theirs, ours.lidar.encoder(SparseConvTensor.of(features, voxel_set)).features)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, help="folder with the repositories")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} instead of comparing it")
    args = parser.parse_args()
    torch.manual_seed(0)
    # mmdet3d changes how spconv's modules load weights, so it comes last
    pcdet, spunet, convnext = openpcdet(args.clones), pointcept(args.clones), mmpretrain(args.clones)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = Path(folder)
        compare_openpcdet(pcdet, folder)
        compare_pointcept(spunet, folder)
        encoder, fpn = mmdet3d(args.clones)
        compare_mmdet3d((encoder, fpn, convnext), folder)
    lists = make_lists(args.clones, (encoder, fpn, convnext, pcdet[0], spunet))
    if args.write:
        write(lists, FILE)
    else:
        assert lists == json.loads(FILE.read_text()), f"{FILE} differs: see with --write and git diff"
    print("keys:", ", ".join(f"{name} {len(entry['shapes'])}" for name, entry in lists.items()))


if __name__ == "__main__":
    main()
