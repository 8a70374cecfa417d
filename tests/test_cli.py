"""The scripts' command lines: every setting is a flag, and a run's folder is enough to repeat or resume the run, unless
its dataset is a class of the user's own.
"""

import dataclasses
import json
import re
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as evaluation
import finetune
import train
from tests import scripts, test_dataset
from tests.test_train import SMALL, assert_same_weights, checkpoint, curve
from unipad.checkpoint import recipe_of, take_weights
from unipad.cli import ADDED_FLAGS
from unipad.config import PretrainRecipe
from unipad.config_dict import ADDED_SETTINGS, from_dict
from unipad.errors import UserError
from unipad.model.pretrain import Pretrain
from unipad.recipes import DEFAULT_PRESET, DETECT, OCCUPANCY, PRETRAIN, SEGMENT
from unipad.run_folder import _check_same_settings, run_config

toy = test_dataset.toy  # a fixture that writes a dataset class, toy_set:Toy, into `tmp_path`
# (script, flags that choose a preset, recipe of the preset)
EVERY_PRESET = [
    (train, ["--modality", m, "--preset", p], r) for m, presets in PRETRAIN.items() for p, r in presets.items()
]
for task, table in {"detect": DETECT, "segment": SEGMENT, "occupancy": OCCUPANCY}.items():
    for m, presets in table.items():
        for p, r in presets.items():
            EVERY_PRESET.append((finetune, ["--task", task, "--modality", m, "--preset", p], r))
for_every_preset = pytest.mark.parametrize(
    "script, preset_flags, recipe",
    EVERY_PRESET,
    ids=lambda v: "-".join(v[1::2]) if v and isinstance(v, list) else "",
)


def settings(recipe):
    """Yield (dotted name, type, value) of every setting."""
    hints = typing.get_type_hints(type(recipe))
    for name, value in vars(recipe).items():
        if dataclasses.is_dataclass(value):
            yield from ((f"{name}.{inner}", hint, v) for inner, hint, v in settings(value))
        elif value is not None or not any(map(dataclasses.is_dataclass, typing.get_args(hints[name]))):
            yield name, hints[name], value  # a section that is None, such as `camera`, has no settings


def another(hint, value):
    """Another value of a setting than `value`, and the command-line arguments after the flag that set it."""
    if isinstance(value, bool):
        return not value, []
    if typing.get_origin(hint) is typing.Literal:
        value = next(choice for choice in typing.get_args(hint) if choice != value)
        return value, [value]
    if value is None:  # `data.image_size`
        return (64, 96), [64, 96]
    if isinstance(value, tuple):
        value = value or ((1, 0.5),)  # `detect.nms` may be empty
        value = tuple((c, iou / 2) for c, iou in value) if isinstance(value[0], tuple) else tuple(v + 1 for v in value)
        return value, [v for part in value for v in (part if isinstance(part, tuple) else (part,))]
    value = (value + 0.5) % 1 if isinstance(value, float) and value <= 1 else value + 1  # many must be at most 1
    return value, [value]


# Settings that another setting limits -> command-line arguments instead of those of `another`
LIMITED = {"detect.center_low": (-9.0, -8.0, -7.5), "camera.frozen_stages": (2,), "camera.fpn_start": (2,)}
LIMITED |= {"data.sources": (-2, 2), "rays.patch_step": (2,), "rays.patch": (5,)}
# Settings that the photometric loss does not allow, and those that no recipe without it may have
NOT_WITH_PHOTOMETRIC = {"rays.strategy", "augment.photometric", "augment.grid_mask"}
ONLY_WITH_PHOTOMETRIC = {"data.sources", "render.photometric_weight"}


@for_every_preset
def test_every_setting_of_a_recipe_is_a_flag(script, preset_flags, recipe):
    expected, flags = {}, []
    pretrains = isinstance(recipe, PretrainRecipe)
    photometric = pretrains and recipe.render.photometric_weight > 0
    rejected = {"data.camera_sweeps" if recipe.camera is None else "data.cameras"}
    rejected |= {"data.cameras"} if pretrains else {"data.features"}  # the former since it gets features
    rejected |= NOT_WITH_PHOTOMETRIC if photometric else ONLY_WITH_PHOTOMETRIC
    rejected.add("occupancy.classes")
    for name, hint, value in settings(recipe):
        if name in rejected:
            continue
        if name in LIMITED:
            arguments = LIMITED[name]
            value = arguments if len(arguments) > 1 else arguments[0]
        elif name == "grid.cell":  # must divide the range, whose ends `another` moves by 1 m each
            value = arguments = tuple(v / 2 for v in value)
        elif name == "data.features":
            value, arguments = Path("other"), ["other"]
        else:
            value, arguments = another(hint, value)
        *section, field = name.replace("_", "-").split(".")
        flag = ".".join([*section, f"no-{field}" if value is False else field])
        flags += [f"--{flag}", *arguments]
        expected[name] = value
    parsed = script.parse([*preset_flags, *flags]).recipe
    assert {name: value for name, _, value in settings(parsed) if name in expected} == expected
    assert type(parsed) is type(recipe) and len(expected) >= 40  # the smallest recipe has 42 settings


@for_every_preset
def test_without_flags_a_recipe_is_the_preset(script, preset_flags, recipe):
    assert script.parse(preset_flags).recipe == recipe


@for_every_preset
def test_a_config_file_round_trip_keeps_all_arguments(script, preset_flags, recipe, tmp_path):
    args = script.parse([*preset_flags, "--seed", 3, "--precision", "fp32"])
    (tmp_path / "config.json").write_text(json.dumps(run_config(args, steps=8)))
    again = script.parse(["--config", tmp_path])
    assert replace(again, config=None) == args


def test_short_and_full_flags_set_the_same_settings():
    short = train.parse(["--lr", 0.5, "--epochs", 3, "--batch-size", 7]).recipe.optim
    assert short == train.parse(["--optim.lr", 0.5, "--optim.epochs", 3, "--optim.batch-size", 7]).recipe.optim
    assert (short.lr, short.epochs, short.batch_size) == (0.5, 3, 7)
    # a setting outside of the sections has only one flag
    assert finetune.parse(["--modality", "lidar", "--label-fraction", 0.5]).recipe.label_fraction == 0.5


def test_flags_override_a_config_but_cannot_choose_another_recipe(tmp_path):
    args = train.parse(["--modality", "lidar", "--lr", 0.5, "--init", "a.pt", "b.pt", "--stop-at", 2, "--out", "x"])
    (tmp_path / "config.json").write_text(json.dumps(run_config(args, steps=8)))
    again = train.parse(["--config", tmp_path / "config.json", "--optim.clip", 2, "--seed", 5])
    assert again.recipe.optim == replace(args.recipe.optim, clip=2) and again.init == tuple(
        path.resolve() for path in args.init
    )
    assert (again.seed, again.modality) == (5, "lidar")
    assert again.out is None and again.stop_at is None  # not taken from the config
    for flags, words in {
        ("--modality", "camera"): "--modality camera differs from the run's --modality lidar",
        ("--preset", "segment"): "--preset segment differs from the run's --preset tiny",
    }.items():
        with pytest.raises(UserError, match=words):
            train.parse(["--config", tmp_path, *flags])


def test_a_run_resumes_with_its_folder_of_features_elsewhere(tmp_path):
    here, there = (
        run_config(train.parse(["--preset", "features-tiny", "--data.features", folder]), steps=8)
        for folder in ("/old/dinov2", "/new/dinov2")
    )
    _check_same_settings(here, there, tmp_path)  # does not raise
    there["recipe"]["data"]["feature_channels"] = 8
    with pytest.raises(UserError, match="was started with --data.feature-channels 16, not 8"):
        _check_same_settings(here, there, tmp_path)


def test_a_run_from_before_a_flag_existed_is_read_with_its_default(tmp_path):
    config = run_config(train.parse([]), steps=8)
    for name in ADDED_FLAGS:
        del config["args"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train.parse(["--config", tmp_path]).compile is False
    _check_same_settings(config, run_config(train.parse([]), steps=8), tmp_path)  # as with --resume: does not raise


@pytest.mark.parametrize(
    "script, flags",
    [(train, []), (finetune, ["--modality", "lidar"]), (finetune, ["--task", "segment"])],
    ids=["pretrain", "detect", "segment"],
)
def test_a_run_from_before_a_setting_existed_is_read_with_its_default(script, flags, tmp_path):
    """By --config, --resume and, for its encoder, --pretrained."""
    config = run_config(script.parse(flags), steps=8)
    sections = [section for section in config["recipe"].values() if isinstance(section, dict)]
    removed = {name for section in sections for name in ADDED_SETTINGS if section.pop(name, section) is not section}
    assert removed == (ADDED_SETTINGS if script is train else {"sources", "features", "feature_channels"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert script.parse(["--config", tmp_path]).recipe == recipe_of(config) == script.parse(flags).recipe
    _check_same_settings(config, run_config(script.parse(flags), steps=8), tmp_path)  # does not raise
    if script is not train:
        return
    with pytest.raises(UserError, match="was started with --render.occupancy-weight 0.0, not 2.0"):
        changed = run_config(train.parse(["--render.occupancy-weight", 2]), steps=8)
        _check_same_settings(config, changed, tmp_path)


def test_a_recipe_with_a_missing_field_is_rejected(tmp_path):
    config = run_config(train.parse([]), steps=8)
    del config["recipe"]["optim"]["clip"]
    with pytest.raises(TypeError):
        from_dict(PretrainRecipe, config["recipe"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json is from another script or another version"):
        train.parse(["--config", tmp_path])


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda c: c["recipe"]["optim"].update(lr="fast"), r"recipe.optim.lr is 'fast'"),
        (lambda c: c["recipe"]["grid"].update(cell=[1, 2]), r"recipe.grid.cell is '\[1, 2\]'"),
        (lambda c: c["recipe"]["render"].update(method="nerf"), "recipe.render.method is 'nerf'"),
        (lambda c: c["args"].update(workers=1.5), "workers is '1.5'"),
        (lambda c: c["args"].pop("seed"), "has the fields"),
        (lambda c: c.pop("args"), "'args'"),
        (lambda c: c["recipe"]["optim"].update(lr=float("inf")), "--optim.lr inf is out of range"),
    ],
)
def test_a_config_edited_by_hand_is_checked(edit, words, tmp_path):
    config = run_config(train.parse([]), steps=8)
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as error:
        train.parse(["--config", tmp_path])
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_json_is_rejected(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"args": \xff')
    with pytest.raises(UserError, match="config.json is not JSON"):
        train.parse(["--config", tmp_path])


def test_default_presets_exist():
    for tables in (PRETRAIN, DETECT, OCCUPANCY):
        for modality, presets in tables.items():
            assert DEFAULT_PRESET[modality] in presets and "tiny" in presets
    assert DEFAULT_PRESET["segment"] in SEGMENT["lidar"]
    assert train.parse(["--data-root", "x"]).preset == "camera-0.1" and train.parse([]).preset == "tiny"
    assert finetune.parse(["--data-root", "x", "--task", "segment"]).preset == "segment"
    assert finetune.parse(["--data-root", "x", "--task", "occupancy"]).preset == "camera-0.1"


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (train, ["--modality", "lidar", "--camera.mask-ratio", 0.5], "--camera.mask-ratio has no effect.* no camera"),
        (train, ["--lidar.cell", 1, 1, 1], "--lidar.cell has no effect: this recipe has no lidar"),
        (finetune, ["--modality", "lidar", "--paste.off-epochs", 1], "--paste.off-epochs has no effect.* no paste"),
        (train, ["--modality", "lidar", "--backbone", "base"], "--backbone does not work with --modality lidar"),
        (train, ["--modality", "lidar", "--data.camera-sweeps", 2], "--data.camera-sweeps needs a camera encoder"),
        (finetune, ["--data.no-cameras"], "--data.no-cameras does not work with a camera encoder"),
        (train, ["--camera.mask-ratio", 1], "--camera.mask-ratio 1.0 must be from 0 to below 1"),
        (train, ["--preset", "huge"], "--preset huge is not known; use tiny, camera-0.075"),
        (train, ["--lr", 0], "--optim.lr 0.0 must be above 0"),
        (
            train,
            ["--grid.cell", 0.7, 1.25, 2.0],
            r"--grid.cell \(0.7, 1.25, 2.0\): cells of 0.7 m do not divide the range along x, .* 0.70",
        ),
        (train, ["--grid.low", 50, -40, -3], "--grid.cell .* along x, the range from 50.0 to 40.0 m cannot be cut"),
        (train, ["--grid.cell", 1.25, 1.25, 0], "--grid.cell .* along z, .* into cells of 0.0 m"),
        (train, ["--rays.per-view", 0], "--rays.per-view 0 must be above 0"),
        (train, ["--render.rgb-weight", -1], "--render.rgb-weight -1.0 must not be below 0"),
        (train, ["--camera.widths", 24, -64, 96, 192], "--camera.widths -64 must be at least 1"),
        (finetune, ["--modality", "lidar", "--detect.heads", 0], "--detect.heads 0 must be at least 1"),
        (train, ["--camera.frozen-stages", -1], "--camera.frozen-stages -1 must be at least 0"),
        (train, ["--lr", "inf"], "--optim.lr inf is out of range"),
        (
            train,
            ["--grid.cell", "nan", 1, 1],
            "--grid.cell .nan, 1.0, 1.0.: along x, the range from .* cannot be cut",
        ),
        (train, ["--epochs", "1e20"], r"--optim.epochs 1e\+20 is out of range"),
        (train, ["--steps", 10**20], "--steps 1000*0 is too large; use at most"),
        (train, ["--seed", 2**64], "--seed 18446744073709551616 is too large"),
        (train, ["--workers", 10**5], "--workers 100000 is too large for this machine; use at most"),
        (train, ["--config", "nowhere"], "--config nowhere: there is no nowhere; give the folder of a run"),
        (train, ["--resume", "nowhere"], "--resume nowhere: there is no nowhere/config.json"),
        (finetune, ["--task", "segment", "--modality", "camera"], "--modality camera does not work with --task"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "",
)
def test_a_flag_that_does_not_fit_is_rejected_in_one_sentence(script, flags, words):
    with pytest.raises(UserError, match=words) as error:
        script.parse(flags)
    assert "\n" not in str(error.value)


LIDAR = ["--modality", "lidar"]


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (train, ["--rays.near-radius", 60], "--rays.near-radius 60.0 must be below --rays.far-radius 50.0"),
        (train, ["--rays.near-radius", 5, "--rays.far-radius", 5], "--rays.near-radius 5.0 must be below"),
        (train, [*LIDAR, "--augment.scale", 1.1, 0.9], "--augment.scale .1.1, 0.9. must be the smallest and the larg"),
        (train, [*LIDAR, "--augment.scale", 0, 1], "--augment.scale .* above 0"),
        (finetune, [*LIDAR, "--detect.center-low", 0, 99, 0], "--detect.center-low .* below --detect.center-high .61"),
        (train, ["--optim.momentum", 0.5], "--optim.min-momentum 0.8.* must not be above --optim.momentum 0.5"),
        (train, ["--camera.depths", 1, 1], "--camera.depths .* and --camera.widths .* need one number per stage"),
        (train, ["--camera.fpn-start", 4], "--camera.fpn-start 4 must be below the number of stages, 4"),
        (train, ["--camera.frozen-stages", 5], "--camera.frozen-stages 5 must not be above the number of stages, 4"),
        (train, [*LIDAR, "--lidar.neck-strides", 1], "--lidar.neck-widths .* and --lidar.neck-strides .* need one"),
        (finetune, [*LIDAR, "--detect.code-weights", 1, 1], "--detect.code-weights has 2 weights; a box has 10 code"),
        (train, [*LIDAR, "--augment.flip-x", 1.5], "--augment.flip-x 1.5 must be from 0 to 1"),
        (train, [*LIDAR, "--augment.translation", 0, -1, 0], "--augment.translation -1.0 must not be below 0"),
        (train, ["--camera.drop-path", 1], "--camera.drop-path 1.0 must be from 0 to below 1"),
        (finetune, [*LIDAR, "--detect.nms", 5, 1.2], "--detect.nms 1.2 must be from 0 to 1"),
        (train, ["--render.truncation", -0.1], "--render.truncation -0.1 must not be below 0"),
        (train, ["--optim.rise", 2], "--optim.rise 2.0 must be from 0 to 1"),
        (train, ["--optim.momentum", 1], "--optim.momentum 1.0 must be from 0 to below 1"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "",
)
def test_settings_with_a_wrong_order_range_or_count_are_rejected(script, flags, words):
    with pytest.raises(UserError, match=words) as error:
        script.parse(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--camera.fpn-levels", 1], "--camera.fpn-levels 1 is less than the 3 stages.* --camera.fpn-start"),
        (["--camera.depth-range", 60, 1], "--camera.depth-range 60.0 1.0 must be the nearest and the farthest"),
        (["--camera.view", "pool"], "--camera.view pool takes one level of features, not 3"),
        (
            ["--modality", "fusion", "--camera.channels", 16],
            "have 16 and 32 channels; make --camera.channels",
        ),
        (["--modality", "lidar", "--grid.cell", 1, 1, 2], "--lidar.cell .* makes .* voxels .*; use voxels of"),
        (
            ["--modality", "lidar", "--lidar.cell", 0.31251, 0.3125, 0.5],
            "--lidar.cell .* do not divide the range along x",
        ),
        (["--modality", "lidar", "--preset", "segment-tiny", "--lidar.cell", 0], "--lidar.cell 0.0 must be above 0"),
        (["--modality", "lidar", "--lidar.neck-strides", 1, 3], "--lidar.neck-strides .* multiples of 3"),
        (
            ["--modality", "lidar", "--preset", "segment-tiny", "--lidar.blocks", 1, 1],
            "--lidar.widths .* as many up as down",
        ),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "",
)
def test_errors_of_incompatible_settings_name_their_flags(flags, words):
    """Of settings that only the model finds incompatible, when it is built."""
    with pytest.raises(UserError, match=words), torch.device("meta"):
        Pretrain(train.parse(flags).recipe)


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (train, ["--modality", "radar"], ["'radar'", "--modality", "'camera'", "'fusion'"]),
        (train, ["--render.method", "nerf"], ["'nerf'", "--render.method", "'volsdf'"]),
        (train, ["--data.camera-sweeps", 7], ["'7'", "--data.camera-sweeps", "'6'"]),
        (train, ["--precision", "fp8"], ["fp8", "--precision", "bf16"]),
        (train, ["--optim.lr", "fast"], ["--optim.lr", "'fast'"]),
        (train, ["--detect.queries", 9], ["--detect.queries"]),
        (finetune, ["--task", "boxes"], ["'boxes'", "--task", "'segment'"]),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) and v[0].startswith("--") else "",
)
def test_an_invalid_value_or_flag_is_rejected(script, flags, words, capsys):
    """By tyro, which exits with code 2 and prints to stderr."""
    with pytest.raises(SystemExit) as end:
        script.parse(flags)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and all(word in err for word in words), err


@pytest.mark.parametrize(
    "script, flags",
    [
        (train, ["--modality", "fusion"]),
        (train, ["--modality", "lidar", "--preset", "segment"]),
        (finetune, ["--modality", "lidar", "--preset", "lidar-0.075"]),
        (finetune, ["--task", "segment"]),
        (finetune, ["--task", "occupancy"]),
        (evaluation, []),
    ],
    ids=lambda v: "-".join(v[1::2]) if isinstance(v, list) else v.__name__,
)
def test_every_flag_has_a_help_text(script, flags, capsys):
    """tyro takes help texts from the comments after fields, but not if a field spans several lines."""
    with pytest.raises(SystemExit):
        script.parse([*flags, "--help"])
    printed = capsys.readouterr().out
    # one entry per flag, which begins with it; --help itself is left out
    entries = re.split(r"\n\W{1,2}(?=--\w)", printed.split("show this help message")[1])[1:]
    for entry in entries:
        text = entry.split("\n╰")[0].split("(default")[0]  # ╰: the end of a section's frame
        # two words in a row: flags and types have none
        assert re.search(r"[a-z]{2,} [a-z]", " ".join(re.sub("[│─]", " ", text).split())), entry
    own = [field.name for field in dataclasses.fields(script.Args) if field.name not in ("recipe", "checkpoint")]
    of_recipe = [name for name, *_ in settings(script.parse(flags).recipe)] if flags else []
    assert len(entries) == len(own) + len(of_recipe)
    order = [printed.index("--" + name.replace("_", "-") + " ") for name in ("preset", "seed", "device") if name in own]
    assert flags == [] or max(order) < printed.index("--grid.cell")  # the script's flags first, then the recipe's
    assert "Recipe(" not in printed  # no default is a whole recipe


def run(script, *flags, path=""):
    """Run a script as a user does, without Triton's interpreter, which the test suite turns on.

    path: an additional folder to import from.
    """
    done = scripts.run(f"{script}.py", *flags, path=path)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_run_is_resumed_and_repeated_from_its_folder_alone(city, tmp_path):
    """A run resumed with only its folder given is bitwise equal to an uninterrupted one; --config repeats it."""
    flags = [*SMALL, "--modality", "lidar", "--preset", "tiny", "--data-root", city, "--steps", 2, "--lr", 1e-3]
    flags += ["--val-every", 9]  # more than the steps: validates only at the start and at the end
    run("train", *flags, "--out", tmp_path / "straight")
    run("train", *flags, "--out", tmp_path / "run", "--stop-at", 1)
    assert checkpoint(tmp_path / "run")["step"] == 1
    run("train", "--resume", tmp_path / "run")
    assert_same_weights(tmp_path / "run", tmp_path / "straight")
    run("train", "--config", tmp_path / "run" / "config.json", "--out", tmp_path / "again")
    assert curve(tmp_path / "again") == curve(tmp_path / "straight")
    run("eval", tmp_path / "run", "--device", "cpu", "--workers", 0, "--picture-stride", 16, "--pictures", 1)
    assert json.loads((tmp_path / "run" / "eval" / "render.json").read_text())["depth_rmse"] > 0


@pytest.mark.parametrize(
    "script, flags, weights_flag",
    [
        (train, ["--modality", "camera"], "--init"),
        (train, ["--modality", "fusion"], "--init"),
        (finetune, ["--modality", "camera"], "--pretrained"),
    ],
    ids=["train camera", "train fusion", "finetune"],
)
def test_a_frozen_stage_needs_trained_weights(script, flags, weights_flag, city, tmp_path):
    """The presets of the paper freeze the first stage: without trained weights it would stay random."""
    args = [*flags, "--data-root", city, "--device", "cpu", "--out", tmp_path / "run"]
    for resume in ("never", "auto"):
        with pytest.raises(UserError, match=f"first stages, so their weights must come from {weights_flag}"):
            script.main(script.parse([*args, "--resume", resume]))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="there is no checkpoint nowhere.pt"):  # any path is accepted until it is opened
        script.main(script.parse([*args, "--preset", "tiny", "--camera.frozen-stages", 1, weights_flag, "nowhere.pt"]))


def test_weights_must_include_the_frozen_stages(tmp_path):
    """A checkpoint of a LiDAR run has no weights for the camera encoder of a fusion model."""
    recipe = PRETRAIN["fusion"]["tiny"]
    weights = Pretrain(recipe).state_dict()
    for name in ("lidar", "camera"):
        state = {"model": {n: w for n, w in weights.items() if n.startswith(f"encoder.{name}.")}}
        torch.save(state, tmp_path / f"{name}.pt")
    net = Pretrain(replace(recipe, camera=replace(recipe.camera, frozen_stages=1)))
    with pytest.raises(UserError, match="lidar.pt has no weights of encoder.camera.backbone, whose first stages"):
        take_weights(net, "encoder.", [tmp_path / "lidar.pt"], "--init", print)
    assert take_weights(net, "encoder.", [tmp_path / "lidar.pt", tmp_path / "camera.pt"], "--init", print)


def test_a_custom_dataset_is_chosen_by_its_class(toy, tmp_path):
    """The class has one camera and no fine-tuning task: train.py and eval.py run, finetune.py raises a user error."""
    choice = ["--dataset", "toy_set:Toy"]
    flags = [*choice, "--data-root", tmp_path]
    one_step = ["--preset", "tiny", "--version", "any", "--steps", 1, "--val-every", 1, "--out", tmp_path / "run"]
    run("train", *SMALL, *flags, *one_step, path=tmp_path)
    assert curve(tmp_path / "run")[1] > 0 and (tmp_path / "run" / "images" / "val_000001.png").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["args"]["dataset"] == "toy_set:Toy"
    one_picture = ["--device", "cpu", "--workers", 0, "--picture-stride", 16, "--pictures", 1]
    run("eval", tmp_path / "run", *one_picture, *choice, path=tmp_path)
    with pytest.raises(UserError, match="--dataset toy_set:Toy does not support --task detect"):
        finetune.main(finetune.parse([*flags, "--device", "cpu", "--preset", "tiny"]))
    assert train.parse(["--resume", tmp_path / "run", *choice]).dataset == "toy_set:Toy"


def test_a_run_folder_does_not_import_its_dataset_unless_the_flag_is_repeated(tmp_path):
    """The folder may come from someone else: only classes of `unipad.data` are imported without --dataset."""
    recipe = PRETRAIN["lidar"]["tiny"]
    args = replace(train.parse(["--modality", "lidar"]), dataset="unipad.other.evil:Class")
    config = run_config(args, steps=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {"model": Pretrain(recipe).state_dict(), "config": config, "step": 1}
    torch.save(state, tmp_path / "last.pt")
    words = "used --dataset unipad.other.evil:Class, which is code: repeat this flag"
    for flag in ("--config", "--resume"):
        with pytest.raises(UserError, match=words):
            train.parse([flag, tmp_path])
    with pytest.raises(UserError, match=words):
        evaluation.main(evaluation.parse([tmp_path / "last.pt", "--device", "cpu"]))
