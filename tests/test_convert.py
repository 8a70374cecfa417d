"""Checkpoints of the original are converted to ours and back, and ConvNeXt weights to ours, bit for bit; encoders are
merged; all other files are rejected.
"""

import json
import lzma
from pathlib import Path

import pytest
import torch
import tyro

from tests.golden import FOLDER
from unipad.checkpoint import read_checkpoint, take_weights
from unipad.config import CONVNEXT, DetectRecipe, PretrainRecipe
from unipad.config_dict import from_dict, to_dict
from unipad.convert import Args, convert_ours, convert_unipad, main, merge
from unipad.errors import UserError
from unipad.model.camera import ConvNeXt
from unipad.model.detect import Detector
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.names import from_original, to_original
from unipad.recipes import DETECT, PRETRAIN, SEGMENT

# Released config -> its state dict (key -> (shape, dtype)), or the name of another config with the same keys and shapes
RELEASED = json.loads(lzma.decompress((FOLDER / "state_dicts.json.xz").read_bytes()))
PRESET_OF = {  # released config that has a state dict of its own in `RELEASED` -> preset
    "uvtr_cam_vs0.075_pretrain": "camera-0.075",
    "uvtr_cam_vs0.1_pretrain": "camera-0.1",
    "uvtr_lidar_vs0.075_pretrain": "lidar-0.075",
    "abl_uvtr_cam_vs0.1_finetune": "camera-0.1",
    "abl_uvtr_fusion_vs0.075_finetune": "fusion-0.075",
    "abl_uvtr_lidar_vs0.075_finetune": "lidar-0.075",
    "final_uvtr_cam_vs0.075_finetune": "camera-0.075",
}


def released(name):
    """A full-size state dict of random numbers: overlapping views of one buffer, to save memory."""
    noise = torch.rand(1 << 23)  # more numbers than the largest weight has
    state = {}
    for i, (key, (shape, dtype)) in enumerate(RELEASED[name].items()):
        shape = torch.Size(shape)
        state[key] = noise[i : i + shape.numel()].view(shape) if dtype == "float32" else torch.tensor(i)
        if "norm0" in key:  # of a stage that the FPN never reads: untrained, so it has its initial values
            state[key] = torch.full(shape, float(key.endswith("weight")))
    return state


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_every_released_config_has_a_preset():
    assert len(RELEASED) == 15
    assert {RELEASED[name] if isinstance(RELEASED[name], str) else name for name in RELEASED} == PRESET_OF.keys()


@pytest.mark.parametrize("name", PRESET_OF)
def test_every_released_config_converts_to_ours_and_back_bit_for_bit(name):
    state = released(name)
    ours, report = convert_unipad(state)
    assert not report.faults, report
    assert ours["config"]["args"]["preset"] == PRESET_OF[name]
    dropped = {k for k, w in state.items() if not from_original({k: w})[0].keys() & ours["model"].keys()}
    # restored on the way back: norm0 with its initial values, code_weights from the recipe
    assert dropped == {k for k in state if "norm0" in k or k.endswith("code_weights")}
    back, report = convert_ours(ours)
    assert not report.faults and back.keys() == {"meta", "state_dict"}
    assert_same(back["state_dict"], state)
    back, _ = convert_ours(ours, spconv=2)  # the released files have the layout of spconv 1
    again, report = convert_unipad(back["state_dict"])
    assert not report.faults
    assert_same(again["model"], ours["model"])


@pytest.mark.parametrize(
    "modality, finetuned", [("camera", False), ("lidar", False), ("lidar", True), ("fusion", True)]
)
def test_checkpoint_files_are_converted_to_ours_and_back(modality, finetuned, tmp_path, capsys):
    """A checkpoint of a tiny model as mmcv saves it, with the original's keys; the converted one loads strictly."""
    detect, pretrain = (DetectRecipe, DETECT, Detector), (PretrainRecipe, PRETRAIN, Pretrain)
    recipe_type, presets, build = detect if finetuned else pretrain
    net = build(presets[modality]["tiny"])
    state, unknown = to_original(net.state_dict())
    assert not unknown
    if finetuned:
        state["pts_bbox_head.code_weights"] = torch.rand(10)
    if modality != "lidar":  # norm0 is of the first stage (24 channels), which the FPN never reads
        state |= {"img_backbone.norm0.weight": torch.ones(24), "img_backbone.norm0.bias": torch.zeros(24)}
    source, ours, back = (tmp_path / name for name in ("epoch_12.pth", "ours.pt", "back.pth"))
    torch.save({"meta": {"epoch": 12}, "state_dict": state, "optimizer": {"state": {0: {"step": 7}}}}, source)
    main(Args((source, ours)))
    saved = read_checkpoint(ours)
    assert f"{modality} tiny" in capsys.readouterr().out and saved["config"]["args"]["modality"] == modality
    recipe = from_dict(recipe_type, saved["config"]["recipe"])
    if finetuned:
        assert torch.equal(torch.tensor(recipe.detect.code_weights), state["pts_bbox_head.code_weights"])
    assert_same(saved["model"], net.state_dict())
    build(recipe).load_state_dict(saved["model"])
    main(Args((ours, back)))
    assert_same(read_checkpoint(back)["state_dict"], state)


def test_converted_recipes_truncate_voxel_coordinates_as_the_original():
    ours, _ = convert_unipad(released("uvtr_cam_vs0.075_pretrain"))
    recipe = from_dict(PretrainRecipe, ours["config"]["recipe"])
    assert recipe.camera.truncate and not PRETRAIN["camera"]["camera-0.075"].camera.truncate


def test_a_larger_convnext_is_recognized():
    state = released("uvtr_cam_vs0.1_pretrain")
    wider = {k: torch.zeros(_wider(v.shape)) if k.startswith("img_backbone") else v for k, v in state.items()}
    _, widths = CONVNEXT["base"]  # channels per stage
    for i, width in enumerate(widths[1:]):  # the FPN reads stages 1 to 3, each with a 1 x 1 convolution to 128 channels
        wider[f"img_neck.lateral_convs.{i}.conv.weight"] = torch.zeros(128, width, 1, 1)
    ours, report = convert_unipad(wider)
    assert not report.faults, report
    recipe = from_dict(PretrainRecipe, ours["config"]["recipe"])
    assert (recipe.camera.depths, recipe.camera.widths) == CONVNEXT["base"]


def _wider(shape):
    """The shape in ConvNeXt-B of a weight of ConvNeXt-S: channels times 4/3, but not kernel sizes (at most 7), the 3
    colors and the 1 of depthwise convolutions."""
    return [n if n <= 7 else n * 4 // 3 for n in shape]


def test_names_and_layouts_by_hand():
    state = {
        "pts_middle_encoder.mtoken": torch.randn(1, 5),
        "pts_middle_encoder.conv_input.0.weight": torch.randn(3, 3, 3, 5, 8),
        "pts_middle_encoder.conv_out.0.weight": torch.randn(1, 1, 1, 8, 6),
        "pts_neck.deblocks.1.0.weight": torch.randn(4, 6, 1, 2, 2),
        "pts_neck.extra_blocks.7.bias": torch.randn(4),  # 7 = 3 * 2 + 1: a block is convolution, norm, ReLU
        "pts_bbox_head.transformer.decoder.layers.2.attentions.0.attn.in_proj_weight": torch.randn(6, 2),
        "pts_bbox_head.loss.weight": torch.randn(3),  # not a weight of the original
    }
    ours, unknown = from_original(state)
    assert unknown == ["pts_bbox_head.loss.weight"]
    assert {name: tuple(w.shape) for name, w in ours.items()} == {
        "encoder.lidar.mask_token": (1, 5),
        "encoder.lidar.encoder.conv_input.0.weight": (8, 3, 3, 3, 5),
        "encoder.lidar.encoder.conv_out.0.weight": (6, 1, 1, 1, 8),
        "encoder.lidar.neck.deblocks.1.0.weight": (4, 6, 2, 2),
        "encoder.lidar_convs.2.1.bias": (4,),
        "head.layers.2.attention.in_proj.weight": (6, 2),
    }
    theirs = state["pts_middle_encoder.conv_input.0.weight"]
    converted = ours["encoder.lidar.encoder.conv_input.0.weight"]
    assert torch.equal(converted[7, 2, 1, 0], theirs[2, 1, 0, :, 7])


def test_1x1x1_kernels_of_spconv_2_are_transposed():
    """spconv 2 stores 1 x 1 x 1 kernels as (Cout, 1, 1, 1, Cin), but computes x @ weight.view(Cin, Cout)."""
    weight = torch.randn(6, 1, 1, 1, 8)
    ours = from_original({"pts_middle_encoder.conv_out.0.weight": weight})[0]["encoder.lidar.encoder.conv_out.0.weight"]
    x = torch.randn(3, 8)
    assert torch.equal(x @ weight.view(8, 6), x @ ours[:, 0, 0, 0].t())
    assert torch.equal(to_original({"encoder.lidar.encoder.a": ours}, spconv=2)[0]["pts_middle_encoder.a"], weight)


# library -> its names of the modules of a ConvNeXt of two stages with one block each, all in the official file's order
MODULES = {
    "official": """downsample_layers.0.0 downsample_layers.0.1 downsample_layers.1.0 downsample_layers.1.1
        stages.0.0.dwconv stages.0.0.norm stages.0.0.pwconv1 stages.0.0.pwconv2
        stages.1.0.dwconv stages.1.0.norm stages.1.0.pwconv1 stages.1.0.pwconv2 norm head""",
    "timm": """stem.0 stem.1 stages.1.downsample.0 stages.1.downsample.1
        stages.0.blocks.0.conv_dw stages.0.blocks.0.norm stages.0.blocks.0.mlp.fc1 stages.0.blocks.0.mlp.fc2
        stages.1.blocks.0.conv_dw stages.1.blocks.0.norm stages.1.blocks.0.mlp.fc1 stages.1.blocks.0.mlp.fc2
        head.norm head.fc""",
    "torchvision": """features.0.0 features.0.1 features.2.0 features.2.1
        features.1.0.block.0 features.1.0.block.2 features.1.0.block.3 features.1.0.block.5
        features.3.0.block.0 features.3.0.block.2 features.3.0.block.3 features.3.0.block.5
        classifier.0 classifier.2""",
    "mmpretrain": """backbone.downsample_layers.0.0 backbone.downsample_layers.0.1 backbone.downsample_layers.1.0
        backbone.downsample_layers.1.1 backbone.stages.0.0.depthwise_conv backbone.stages.0.0.norm
        backbone.stages.0.0.pointwise_conv1 backbone.stages.0.0.pointwise_conv2 backbone.stages.1.0.depthwise_conv
        backbone.stages.1.0.norm backbone.stages.1.0.pointwise_conv1 backbone.stages.1.0.pointwise_conv2
        backbone.norm1 head.fc""",
}
SCALES = {  # library -> its name of the layer scale of a stage's block; {} is `index` in `imagenet`
    "official": "stages.{}.0.gamma",
    "timm": "stages.{}.blocks.0.gamma",
    "torchvision": "features.{}.0.layer_scale",
    "mmpretrain": "backbone.stages.{}.0.gamma",
}
WRAPPERS = {"official": "model", "mmpretrain": "state_dict"}  # key of the state dict in the files of these libraries


def imagenet(library, net):
    """The checkpoint of a library with the weights of `net`, a `ConvNeXt` of two stages with one block each.

    The classifier and the norm before it, which `net` lacks, are zeros.
    """
    state, weights = {}, net.state_dict()
    for ours, theirs in zip(MODULES["official"].split(), MODULES[library].split(), strict=True):
        for end in ("weight", "bias"):
            state[f"{theirs}.{end}"] = weights.get(f"{ours}.{end}", torch.zeros(8))  # official names are ours too
    for i in range(2):
        gamma = weights[f"stages.{i}.0.gamma"]
        index = 2 * i + 1 if library == "torchvision" else i
        state[SCALES[library].format(index)] = gamma[:, None, None] if library == "torchvision" else gamma
    return {WRAPPERS[library]: state} if library in WRAPPERS else state


@pytest.mark.parametrize("library", MODULES)
def test_imagenet_weights_of_every_library(library, tmp_path):
    net = ConvNeXt((1, 1), (4, 8), out_stages=())
    for param in net.parameters():
        torch.nn.init.normal_(param)
    torch.save(imagenet(library, net), tmp_path / "weights.pth")
    main(Args((tmp_path / "weights.pth", tmp_path / "convnext.pt")))
    expected = {f"encoder.camera.backbone.{name}": w for name, w in net.state_dict().items()}
    assert_same(read_checkpoint(tmp_path / "convnext.pt")["model"], expected)


def test_a_camera_encoder_starts_from_imagenet_weights(tmp_path):
    camera = PRETRAIN["camera"]["tiny"].camera
    torch.save({"model": ConvNeXt(camera.depths, camera.widths, out_stages=()).state_dict()}, tmp_path / "small.pth")
    main(Args((tmp_path / "small.pth", tmp_path / "convnext.pt")))
    net, lines = Pretrain(PRETRAIN["camera"]["tiny"]), []
    taken = take_weights(net, "encoder.", [tmp_path / "convnext.pt"], "--init", lines.append)
    new = {n for n in net.state_dict() if n.startswith("encoder.camera.backbone.")} - taken
    # ImageNet checkpoints have no norm per stage; the FPN reads stages 1 to 3
    assert new == {f"encoder.camera.backbone.norm{i}.{end}" for i in (1, 2, 3) for end in ("weight", "bias")}
    weights = read_checkpoint(tmp_path / "convnext.pt")["model"]
    assert_same({n: net.state_dict()[n] for n in taken}, weights)
    assert lines[1].startswith("new, from scratch: encoder.camera.depth_net") and "backbone.norm1.weight" in lines[1]


def test_a_fusion_model_starts_from_merged_encoders(tmp_path, capsys):
    sources = []
    for modality in ("camera", "lidar"):
        net = Detector(DETECT[modality]["tiny"])
        sources.append(net.state_dict())
        torch.save({"state_dict": to_original(net.state_dict())[0]}, tmp_path / f"{modality}.pth")
    main(Args(tuple(tmp_path / name for name in ("camera.pth", "lidar.pth", "fusion.pt")), merge=True))
    assert "dropped: head" in capsys.readouterr().out
    saved = read_checkpoint(tmp_path / "fusion.pt")
    net = Detector(from_dict(DetectRecipe, saved["config"]["recipe"]))
    taken = take_weights(net, "encoder.", [tmp_path / "fusion.pt"], "--pretrained", lambda _: None)
    expected = {name: w for source in sources for name, w in source.items() if name.startswith("encoder.")}
    assert_same({name: net.state_dict()[name] for name in taken}, expected)
    assert {n for n in net.state_dict() if n not in taken and not n.startswith("head.")} == {
        n for n in net.state_dict() if n.startswith("encoder.fuse.")
    }


def test_merging_lists_all_parts_that_it_drops():
    """Of a fusion checkpoint given as CAMERA the LiDAR encoder is dropped; given as LIDAR, the camera encoder."""
    net = Detector(DETECT["fusion"]["tiny"])
    fusion = {"model": net.state_dict(), "config": {"args": {}, "recipe": to_dict(net.recipe)}}
    _, report = merge(fusion, fusion)
    assert [note for note in report.notes if note.startswith("dropped: encoder.camera")]
    assert [note for note in report.notes if note.startswith("dropped: encoder.lidar")]


def test_an_encoder_with_values_that_are_not_finite_is_not_merged(tmp_path):
    net = Detector(DETECT["lidar"]["tiny"])
    net.state_dict()["encoder.lidar.encoder.conv_input.1.bias"].fill_(torch.nan)
    file = tmp_path / "lidar.pt"
    torch.save({"model": net.state_dict(), "config": {"args": {}, "recipe": to_dict(net.recipe)}}, file)
    with pytest.raises(UserError, match="lidar.pt does not fit.* 1 unfit, such as encoder.lidar.*not finite"):
        main(Args((file, file, tmp_path / "fusion.pt"), merge=True))


class Code:
    """Unpickling it would create a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def broken(fault, folder):
    """The path of a file that cannot be converted because of `fault`; "whole": it can; "absent": there is none."""
    file = folder / f"{fault}.pth"
    shapes = {key: shape for key, (shape, _) in RELEASED["uvtr_cam_vs0.1_pretrain"].items()}
    state = {"state_dict": {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}}
    if fault == "truncated":
        torch.save(state, folder / "whole.pth")
        file.write_bytes((folder / "whole.pth").read_bytes()[:-200])
    elif fault == "code":
        torch.save(state | {"meta": Code()}, file)
    elif fault == "code in an old file":
        torch.save(state | {"meta": Code()}, file, _use_new_zipfile_serialization=False)
    elif fault == "text":
        file.write_text("<!DOCTYPE html><title>Not found</title>")
    elif fault == "another project":
        torch.save({"state_dict": {"layer1.0.conv1.weight": torch.zeros(2)}}, file)
    elif fault == "a list":
        torch.save([torch.zeros(2)], file)
    elif fault == "one key less":
        state["state_dict"].pop("input_proj.bias")
        torch.save(state, file)
    elif fault == "one key more":
        state["state_dict"]["img_backbone.mtoken3"] = torch.zeros(1)
        torch.save(state, file)
    elif fault == "no blocks":
        torch.save({"stem.conv.weight": torch.zeros(2)}, file)
    elif fault == "newer recipe":
        torch.save({"model": {}, "config": {"recipe": {"rays": {}, "radar": {"channels": 3}}}}, file)
    elif fault == "whole":
        torch.save(state, file)
    return file


@pytest.mark.parametrize(
    "fault, flags, words",
    [
        ("absent", {}, "there is no checkpoint"),
        ("truncated", {}, "is truncated or damaged"),
        ("code", {}, r"contains code besides weights \(.*\) and was not opened.*torch.save\("),
        ("code in an old file", {}, "contains code besides weights"),
        ("text", {}, "is not a checkpoint"),
        ("another project", {}, r"is not a checkpoint of UniPAD.*none of its 1 weights \(such as layer1"),
        ("a list", {}, "has no weights: it is a list"),
        ("one key less", {}, "1 weights are missing, 0 unexpected, 0 unfit.*input_proj.bias; --no-strict"),
        ("one key more", {}, "0 weights are missing, 1 unexpected, .*such as .*mtoken3"),
        ("no blocks", {}, "no ConvNeXt blocks"),
        ("newer recipe", {}, r"from another version of this project \(.*\): train or convert again"),
        ("whole", {"preset": "camera-0.075"}, "does not fit preset camera-0.075: .* unfit, such as .* the shape"),
        ("whole", {"preset": "lidar-0.075"}, "--preset lidar-0.075 is not known; use tiny, camera-0.075, "),
        ("whole", {"kind": "convnext"}, "--kind convnext: .* is of kind unipad"),
    ],
)  # fmt: skip
def test_unusable_files_are_rejected_in_one_sentence_and_not_executed(fault, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        main(Args((broken(fault, tmp_path), tmp_path / "out.pt"), **flags))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out.pt").exists()


def test_no_strict_converts_what_fits(tmp_path, capsys):
    main(Args((broken("one key less", tmp_path), tmp_path / "out.pt"), strict=False))
    out = capsys.readouterr().out
    assert "missing: encoder.camera.input_proj.bias" in out
    # the config has 420 weights; without the missing one and the two of norm0, which our model lacks
    assert len(read_checkpoint(tmp_path / "out.pt")["model"]) == 417


@pytest.mark.parametrize("paths, merge", [("", False), ("a", False), ("abc", False), ("ab", True)])
def test_a_wrong_number_of_paths_is_rejected(paths, merge):
    """paths: each letter is a path."""
    with pytest.raises(UserError, match="SOURCE OUT"):
        main(Args(tuple(map(Path, paths)), merge=merge))


def test_nothing_is_overwritten_without_overwrite(tmp_path):
    file = broken("whole", tmp_path)
    with pytest.raises(UserError, match="overwrite its own source"):
        main(Args((file, file)))
    with pytest.raises(UserError, match="is a folder; give the name of the file"):
        main(Args((file, tmp_path)))
    out = tmp_path / "out.pt"
    out.write_text("precious")
    with pytest.raises(UserError, match="out.pt exists; give another file, or --overwrite"):
        main(Args((file, out)))
    assert out.read_text() == "precious"
    (tmp_path / ".out.pt.999999999").write_text("what a killed conversion left")  # named after its process
    main(Args((file, out), overwrite=True))
    assert read_checkpoint(out)["model"] and not list(tmp_path.glob(".out*"))


def test_merging_takes_no_preset():
    with pytest.raises(UserError, match="--preset tiny has no effect with --merge"):
        main(Args((Path("a"), Path("b"), Path("c")), merge=True, preset="tiny"))


def test_only_encoders_with_the_same_grid_are_merged(tmp_path):
    full, _ = convert_unipad(released("uvtr_lidar_vs0.075_pretrain"))
    tiny = {"model": {}, "config": {"recipe": to_dict(PRETRAIN["camera"]["tiny"])}}
    with pytest.raises(UserError, match="the same grid"):
        merge(tiny, full)
    with pytest.raises(UserError, match="camera encoder first"):
        merge(full, tiny)


@pytest.mark.parametrize(
    "line, args",
    [
        ("epoch_12.pth out.pt", Args((Path("epoch_12.pth"), Path("out.pt")))),
        ("--kind convnext a b --no-strict", Args((Path("a"), Path("b")), kind="convnext", strict=False)),
        ("--merge c l out.pt", Args((Path("c"), Path("l"), Path("out.pt")), merge=True)),
        ("run out.pth --spconv 2", Args((Path("run"), Path("out.pth")), spconv=2)),
    ],
)
def test_command_lines_are_parsed(line, args):
    assert tyro.cli(Args, args=line.split()) == args


def test_a_unet_is_converted_to_the_originals_keys_without_its_head_and_is_not_merged():
    """The original has no segmentation head. A U-Net is not merged with a camera encoder: no fusion recipe has one."""
    recipe = SEGMENT["lidar"]["tiny"]
    saved = {"model": Segmenter(recipe).state_dict(), "config": {"recipe": to_dict(recipe)}}
    theirs, report = convert_ours(saved, spconv=2)
    assert not report.faults and "head.weight" in str(report)
    back, unknown = from_original(theirs["state_dict"])
    assert not unknown and back.keys() == {name for name in saved["model"] if name.startswith("encoder.")}
    assert all(torch.equal(back[name], saved["model"][name]) for name in back)
    camera = {"model": {}, "config": {"recipe": to_dict(DETECT["camera"]["tiny"])}}
    with pytest.raises(UserError, match="a LiDAR encoder second"):
        merge(camera, saved)
