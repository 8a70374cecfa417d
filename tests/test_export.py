"""Encoders for code outside of this project: weights for other projects' networks have the keys and shapes of lists
made with those projects' code, `tests/golden/other_projects.json`, and compute the same; `load_encoder` gives the
module. `tests/other_projects.py` makes the lists, and compares outputs with those of that code.
"""

import json
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro

from tests.golden import FOLDER
from tests.scripts import REPO
from unipad.checkpoint import read_checkpoint, write_safetensors
from unipad.config_dict import to_dict
from unipad.convert import Args, convert_ours, main
from unipad.errors import UserError
from unipad.export import PROJECTS, export, load_encoder
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.model.sparse import SparseLinear
from unipad.names import to_project
from unipad.recipes import PRETRAIN, SEGMENT
from unipad.spconv.conv import SubMConv3d
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

LAYER = "lidar.encoder.encoder_layers.encoder_layer"
# "project/recipe" -> (source, {key: shape}) of the project's networks that are like the recipe's encoders
LISTS = json.loads((FOLDER / "other_projects.json").read_text())
README = (REPO / "README.md").read_text()


def recipe_of(preset):
    """A pre-training recipe by the name of its preset."""
    return next(presets[preset] for presets in PRETRAIN.values() if preset in presets)


def weights_of(recipe):
    """The state dict of a recipe's model, without values."""
    with torch.device("meta"):
        return Pretrain(recipe).state_dict()


def save(net, file):
    """Write `net` as the checkpoint `file` of a run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    config = {"args": {"modality": "", "preset": ""}, "recipe": to_dict(net.recipe), "steps": 1}
    torch.save({"model": net.state_dict(), "step": 1, "config": config}, file)
    return file


@pytest.mark.parametrize("name", LISTS)
def test_keys_and_shapes_are_those_of_the_other_project(name):
    """Each key of the list is written or named as having no counterpart; no other key is written."""
    to, preset = name.split("/")
    recipe = recipe_of(preset)
    written, text = export(weights_of(recipe), recipe, to, "run")
    shapes = LISTS[name]["shapes"]
    prefixes = [
        PROJECTS[to].own[kind][0] for kind in (type(recipe.camera), type(recipe.lidar)) if kind in PROJECTS[to].own
    ]
    missing = {key for key in shapes if key.startswith(tuple(prefixes))}
    assert {key: list(w.shape) for key, w in written.items()} == {k: s for k, s in shapes.items() if k not in missing}
    assert len(written) > 100 and len(missing) == {"mmdet3d": 6, "openpcdet": 6, "pointcept": 2}[to] * len(prefixes)
    assert all(f"{prefix}*" in text for prefix in prefixes)


@pytest.mark.parametrize(
    "preset, to, supplied, absent",
    [
        ("lidar-0.075", "mmdet3d", 0, {f"encoder.lidar.{name}" for name in ("encoder.conv_out", "backbone", "neck")}),
        ("lidar-0.075", "openpcdet", 16, {"encoder.lidar.encoder.conv_out", "encoder.lidar.backbone"}),
        ("segment", "pointcept", 0, set()),
        ("camera-0.075", "mmdet3d", 0, {"encoder.camera.input_proj", "encoder.camera.depth_net"}),
        ("fusion-0.075", "mmdet3d", 0, {"encoder.camera.depth_net", "encoder.lidar.neck", "encoder.fuse.0"}),
        ("fusion-0.075", "openpcdet", 16, {"encoder.camera.backbone", "encoder.camera.neck", "encoder.fuse.0"}),
    ],
)  # fmt: skip
def test_each_weight_is_written_or_listed(preset, to, supplied, absent):
    recipe = recipe_of(preset)
    weights = weights_of(recipe)
    written, text = export(weights, recipe, to, "run")
    listed = dict(re.findall(r"([\w.]+) \((\d+) weights\)", text))
    assert len(written) - supplied + sum(map(int, listed.values())) == len(weights)
    assert absent | {"project", "renderer"} <= listed.keys()
    assert (f"supplied: {supplied} biases of 0" in text) == (supplied > 0)


@pytest.mark.parametrize(
    "to, ours, theirs",
    [
        ("mmdet3d", f"{LAYER}2.2.1.bias", "pts_middle_encoder.encoder_layers.encoder_layer2.2.1.bias"),
        ("mmdet3d", "camera.backbone.downsample_layers.1.0.bias", "img_backbone.downsample_layers.1.0.bias"),
        ("mmdet3d", "camera.backbone.stages.2.13.pwconv2.weight", "img_backbone.stages.2.13.pointwise_conv2.weight"),
        ("mmdet3d", "camera.backbone.stages.2.13.gamma", "img_backbone.stages.2.13.gamma"),
        ("mmdet3d", "camera.backbone.norm3.weight", "img_backbone.norm3.weight"),
        ("mmdet3d", "camera.neck.fpn_convs.3.bias", "img_neck.fpn_convs.3.conv.bias"),
        ("openpcdet", "lidar.encoder.conv_input.1.running_var", "backbone_3d.conv_input.1.running_var"),
        ("openpcdet", f"{LAYER}1.1.bn2.weight", "backbone_3d.conv1.1.bn2.weight"),
        ("openpcdet", f"{LAYER}1.2.0.weight", "backbone_3d.conv2.0.0.weight"),
        ("openpcdet", f"{LAYER}2.0.conv1.weight", "backbone_3d.conv2.1.conv1.weight"),
        ("openpcdet", f"{LAYER}3.2.1.bias", "backbone_3d.conv4.0.1.bias"),
        ("openpcdet", f"{LAYER}4.1.bn1.bias", "backbone_3d.conv4.2.bn1.bias"),
        ("pointcept", "lidar.encoder.dec.3.block1.bn1.weight", "backbone.dec.3.block1.bn1.weight"),
    ],
)  # fmt: skip
def test_names_by_hand(to, ours, theirs):
    weight = torch.rand(2, 3, 3, 3, 2) if "lidar" in ours and ours.endswith("0.weight") else torch.rand(4)
    written, unknown = to_project({"encoder." + ours: weight}, to)
    assert list(written) == [theirs] and not unknown


# project -> its weight of a 3 x 3 x 3 kernel -> that of `F.conv3d`, (Cout, Cin, z, y, x). By their code: mmcv has
# (z, y, x, Cin, Cout), which mmdet3d permutes for spconv 2 to (Cout, z, y, x, Cin); Pointcept's voxels are (x, y, z)
DENSE = {
    "mmdet3d": lambda w: w.permute(4, 3, 0, 1, 2),
    "openpcdet": lambda w: w.permute(0, 4, 1, 2, 3),
    "pointcept": lambda w: w.permute(0, 4, 3, 2, 1),
}


@pytest.mark.parametrize("to", PROJECTS)
def test_written_kernels_compute_the_same(to):
    """On a full grid, where a submanifold convolution is a dense one."""
    conv = SubMConv3d(2, 4, 3, bias=False)
    z, y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.int32) for size in (3, 4, 5)], indexing="ij")
    coords = torch.stack([torch.zeros_like(z), z, y, x], dim=-1).view(-1, 4)
    features = torch.randn(60, 2)
    ours = conv(SparseConvTensor.of(features, VoxelSet(coords, (3, 4, 5), 1))).dense()
    (theirs,) = to_project({"encoder.lidar.encoder.conv_input.0.weight": conv.weight.detach()}, to)[0].values()
    dense = F.conv3d(features.t().view(1, 2, 3, 4, 5), DENSE[to](theirs), padding=1)
    torch.testing.assert_close(ours, dense)


def test_written_1x1x1_kernels_compute_the_same():
    """spconv 2 multiplies by the matrix (Cin, Cout) that is in the memory of a 1 x 1 x 1 kernel."""
    conv, features = SparseLinear(5, 7), torch.randn(3, 5)
    name = "encoder.lidar.encoder.dec.0.block0.proj.0.weight"
    weight = to_project({name: conv.weight.detach()}, "pointcept")[0]["backbone.dec.0.block0.proj.0.weight"]
    assert weight.shape == (7, 1, 1, 1, 5)
    torch.testing.assert_close(features @ weight.view(5, 7), conv.convolve(features, None))


def test_biases_of_0_are_supplied_to_openpcdet():
    recipe = recipe_of("lidar-0.075")
    written, _ = export(weights_of(recipe), recipe, "openpcdet", "run")
    biases = {key: w for key, w in written.items() if re.search(r"\.conv[12]\.bias$", key)}
    assert len(biases) == 16 and not any(w.any() for w in biases.values())  # two per block, two blocks per stage


def test_a_single_sweep_has_no_age_channel_in_pointcept():
    """Without sweeps the fifth channel of all points is 0, so its weights change nothing."""
    recipe = recipe_of("segment-tiny")
    weights = {"encoder.lidar.encoder.conv_input.0.weight": torch.rand(16, 5, 5, 5, 5)}
    for sweeps, channels in ((1, 4), (10, 5)):
        written, text = export(weights, replace(recipe, data=replace(recipe.data, sweeps=sweeps)), "pointcept", "run")
        (stem,) = written.values()
        assert torch.equal(stem, weights["encoder.lidar.encoder.conv_input.0.weight"].transpose(1, 3)[..., :channels])
        assert f"in_channels={channels}," in text and ("points' age" in text) == (channels == 4)


@pytest.mark.parametrize(
    "preset, to, lines",
    [
        (
            "lidar-0.075",
            "mmdet3d",
            [
                "in_channels=5, base_channels=16, sparse_shape=[41, 1440, 1440], "
                "encoder_channels=[[16, 16, 32], [32, 32, 64], [64, 64, 128], [128, 128]], "
                "encoder_paddings=[[0, 0, 1], [0, 0, 1], [0, 0, [0, 1, 1]], [0, 0]], block_type='basicblock'",
                "voxel_size=[0.075, 0.075, 0.2], max_num_points=10, max_voxels=(120000, 160000)",
                "sweeps_num=9",
            ],
        ),
        ("images-tiny", "mmdet3d", ["in_channels=[48, 96, 192], out_channels=32, num_outs=3)", "[2, 2, 4, 2]"]),
        ("camera-0.1", "mmdet3d", ["add_extra_convs='on_output', relu_before_extra_convs=True, num_outs=4"]),
        ("camera-0.075", "mmdet3d", ["out_indices=[3]", "in_channels=[768], out_channels=256, num_outs=1)"]),
        ("camera-0.1", "mmdet3d", ["mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]"]),
        ("lidar-0.075", "openpcdet", ["[-54.0, -54.0, -5.0, 54.0, 54.0, 3.0]", "MAX_SWEEPS: 10"]),
        ("segment-tiny", "pointcept", ["base_channels=16, channels=(24, 32, 48, 48, 32, 32), layers=(1, 1, 1, 1,"]),
        ("segment", "pointcept", ["grid_size=0.1"]),
    ],
)  # fmt: skip
def test_a_config_that_fits_is_printed(preset, to, lines):
    recipe = recipe_of(preset)
    _, text = export(weights_of(recipe), recipe, to, "run")
    assert [line for line in lines if line not in text] == []


def test_a_sparse_encoder_of_other_widths_has_other_settings():
    recipe = PRETRAIN["lidar"]["tiny"]
    _, text = export(weights_of(recipe), recipe, "mmdet3d", "run")
    assert "base_channels=16, sparse_shape=[25, 256, 256], encoder_channels=[[16, 32], [32, 32], [32]]" in text
    assert "encoder_paddings=[[0, 1], [0, [0, 1, 1]], [0]]" in text


def read_safetensors(file):
    """{name: (type, numpy array)} of a file, read by its format's description alone."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    assert header.pop("__metadata__") == {"format": "pt"} and length % 8 == 0
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
    arrays, end = {}, 0
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        kind = np.dtype(kinds[entry["dtype"]])
        assert begin == end and begin % kind.itemsize == 0  # no holes; aligned
        end = stop
        arrays[name] = entry["dtype"], np.frombuffer(data[begin:stop], kind).reshape(entry["shape"])
    assert end == len(data)
    return arrays


def test_safetensors_of_every_type(tmp_path):
    weights = {
        "half": torch.randn(3, dtype=torch.float16),
        "bf16": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "turned": torch.randn(2, 3).t(),
        "empty": torch.zeros(0, 4),
        "double": torch.randn(1, dtype=torch.float64),
    }
    write_safetensors(weights, tmp_path / "a.safetensors")
    arrays = read_safetensors(tmp_path / "a.safetensors")
    assert {name: kind for name, (kind, _) in arrays.items()} == {
        "half": "F16", "bf16": "BF16", "count": "I64", "turned": "F32", "empty": "F32", "double": "F64"
    }  # fmt: skip
    bits = arrays.pop("bf16")[1]
    assert bits.tolist() == [0x3F80, 0xC000]  # the upper halves of 1.0 and -2.0 in fp32
    assert all(np.array_equal(values, weights[name].numpy()) for name, (_, values) in arrays.items())


@pytest.mark.parametrize("to, wrapper", [("mmdet3d", "state_dict"), ("pointcept", "state_dict")])
def test_both_formats_have_the_same_weights(to, wrapper, tmp_path, capsys):
    net = Pretrain(PRETRAIN["lidar"]["tiny" if to == "mmdet3d" else "segment-tiny"])
    save(net, tmp_path / "runs/1/checkpoints/last.pt")
    expected, text = export(net.state_dict(), net.recipe, to, tmp_path / "runs")
    for name in ("out.pth", "out.safetensors"):
        main(Args((tmp_path / "runs", tmp_path / name), to=to))
        assert text in capsys.readouterr().out
    saved = read_checkpoint(tmp_path / "out.pth")
    assert list(saved) == [wrapper] and saved[wrapper].keys() == expected.keys()
    assert all(torch.equal(saved[wrapper][key], w) for key, w in expected.items())
    assert not hasattr(saved[wrapper], "_metadata")  # with module versions, mmdet3d would not permute for spconv 2
    arrays = read_safetensors(tmp_path / "out.safetensors")
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[key][1], w.numpy()) for key, w in expected.items())


def test_the_package_safetensors_reads_our_files(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    weights = {"b": torch.randn(3, 2, dtype=torch.bfloat16), "a": torch.randn(5), "n": torch.tensor(3)}
    write_safetensors(weights, tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], w) for name, w in weights.items())


def test_a_checkpoint_of_the_original_is_written_for_other_projects(tmp_path):
    """The same weights, whether a run or its conversion to the original's keys is the source."""
    net = Pretrain(PRETRAIN["camera"]["tiny"])
    file = save(net, tmp_path / "run.pt")
    torch.save(convert_ours(read_checkpoint(file))[0], tmp_path / "original.pth")
    for source in ("run.pt", "original.pth"):
        main(Args((tmp_path / source, tmp_path / f"{source}.out"), to="mmdet3d"))
    a, b = (read_checkpoint(tmp_path / f"{source}.out")["state_dict"] for source in ("run.pt", "original.pth"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "net, flags, words",
    [
        ("camera", {"to": "openpcdet"}, "has no network like ConvNeXt and FPN of .*run.pt; .* like the sparse enc"),
        ("camera", {"to": "pointcept"}, "Pointcept has no network like ConvNeXt and FPN of .*run.pt; .* like SpUNet"),
        ("lidar", {"to": "pointcept"}, "Pointcept has no network like the sparse encoder of "),
        ("lidar", {"to": "openpcdet"}, r"always has \(16, 32, 64, 128\) channels and 2 .* has \(16, 32, 32\) and 1; "),
        ("segment", {"to": "mmdet3d"}, "has no network like SpUNet of .* ConvNeXt and FPN, the sparse encoder"),
        ("lidar", {"to": "mmdet3d", "spconv": 2}, "leave --merge and --spconv out"),
        ("lidar", {"to": "mmdet3d", "kind": "unipad"}, "--kind unipad: .* is of kind ours"),
        ("a weight less", {"to": "mmdet3d"}, "1 weights are missing"),
        ("a NaN", {"to": "mmdet3d"}, "such as encoder.lidar.encoder.conv_input.1.bias has values that are not finite"),
        ("convnext", {"to": "mmdet3d"}, "--to mmdet3d .* is an ImageNet ConvNeXt; give trained encoders"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_rejected_in_one_sentence(net, flags, words, tmp_path):
    file = tmp_path / "run.pt"
    if net == "convnext":
        model = Pretrain(PRETRAIN["camera"]["tiny"]).state_dict()
        prefix = "encoder.camera.backbone."
        torch.save({name.removeprefix(prefix): w for name, w in model.items() if name.startswith(prefix)}, file)
    elif net == "segment":
        save(Segmenter(SEGMENT["lidar"]["tiny"]), file)
    else:
        model = Pretrain(PRETRAIN["camera" if net == "camera" else "lidar"]["tiny"])
        if net == "a weight less":
            del model.encoder.lidar.encoder.conv_input[1].bias
            model.encoder.lidar.encoder.conv_input[1].bias = None
        elif net == "a NaN":
            model.encoder.lidar.encoder.conv_input[1].bias.data.fill_(torch.nan)
        save(model, file)
    with pytest.raises(UserError, match=words) as caught:
        main(Args((file, tmp_path / "out.pth"), **flags))
    assert "\n" not in str(caught.value) and not (tmp_path / "out.pth").exists()


def test_only_encoders_for_other_projects_are_written_as_safetensors(tmp_path):
    with pytest.raises(UserError, match="out.safetensors would have no config"):
        main(Args((tmp_path / "run.pt", tmp_path / "out.safetensors")))


def test_an_unknown_project_is_rejected_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as caught:
        tyro.cli(Args, args=["run", "out.pth", "--to", "detectron2"])
    error = " ".join(capsys.readouterr().err.split())
    assert caught.value.code == 2 and "detectron2" in error and all(name in error for name in PROJECTS)


def clouds():
    """Points of two samples in the tiny recipes' grid, and their counts."""
    points = torch.rand(500, 5) * torch.tensor([60.0, 60, 8, 255, 0]) - torch.tensor([30.0, 30, 2, 0, 0])
    return points, torch.tensor([300, 200])


@pytest.mark.parametrize("kind", ["camera", "lidar", "fusion", "segment", "finetuned"])
def test_an_encoder_is_loaded_from_a_run(kind, tmp_path):
    """With its weights, in evaluation mode; its parts compute what those of the trained model do."""
    if kind == "finetuned":
        net = Segmenter(SEGMENT["lidar"]["tiny"])
    else:
        net = Pretrain(PRETRAIN["lidar"]["segment-tiny"] if kind == "segment" else PRETRAIN[kind]["tiny"])
    save(net, tmp_path / "run/checkpoints/last.pt")
    encoder = load_encoder(tmp_path)
    assert not encoder.training and encoder.recipe == net.recipe
    trained, loaded = net.encoder.state_dict(), encoder.state_dict()
    assert loaded.keys() == trained.keys() and all(torch.equal(loaded[name], w) for name, w in trained.items())
    net.eval()
    with torch.no_grad():
        if kind in ("camera", "fusion"):
            images, sizes = torch.rand(1, 2, 3, 64, 96), torch.tensor([[[64, 96], [60, 90]]])
            (features, depths), expected = encoder.camera(images, sizes), net.encoder.camera(images, sizes)
            assert all(map(torch.equal, [*features, *depths], [*expected[0], *expected[1]]))
        if kind in ("lidar", "fusion", "segment"):
            volume, coords = encoder.lidar(*clouds())
            assert volume.shape[0] == 2 and coords.shape[1] == 4
        if kind in ("segment", "finetuned"):
            features, rows, voxel_of = encoder.lidar.voxel_features(*clouds())
            assert features[voxel_of].shape == (500, encoder.channels) and len(rows) == len(features)


def test_an_encoder_that_is_not_there_is_not_loaded(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint|is a folder without"):
        load_encoder(tmp_path / "absent")
    net = Pretrain(PRETRAIN["lidar"]["tiny"])
    torch.save({"model": {}, "step": 1, "config": {"args": {}, "recipe": to_dict(net.recipe)}}, tmp_path / "run.pt")
    with pytest.raises(UserError, match="run.pt do not fit the recipe: .* are missing"):
        load_encoder(tmp_path / "run.pt")


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    save(Pretrain(PRETRAIN["lidar"]["tiny"]), tmp_path / "outputs/train-lidar/run/checkpoints/last.pt")
    monkeypatch.chdir(tmp_path)
    points, point_counts = clouds()
    names = {"points": points, "point_counts": point_counts}
    exec(compile(example, "README.md", "exec"), names)
    assert names["volume"].shape == (2, 32, 6, 64, 64)
