"""Presets: their models, values and documentation; recipes as dicts; a run's saved launch parameters of kernels."""

import re
from pathlib import Path

import pytest
import torch

import finetune
import train
from unipad.config import AnyRecipe, Augment, DetectRecipe, Paste
from unipad.config_dict import from_dict, to_dict
from unipad.errors import UserError
from unipad.kernels import tuning
from unipad.model.pretrain import Pretrain
from unipad.recipes import DETECT, OCCUPANCY, PRETRAIN, SEGMENT
from unipad.run_folder import RunFolder
from unipad.runtime import World

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
PRETRAIN_PRESETS = [(modality, name) for modality, presets in PRETRAIN.items() for name in presets]


@pytest.mark.parametrize("modality, name", PRETRAIN_PRESETS)
def test_a_preset_builds_the_encoders_of_its_modality(modality, name):
    recipe = PRETRAIN[modality][name]
    with torch.device("meta"):  # allocates no memory for full-size models
        net = Pretrain(recipe).encoder
    assert hasattr(net, "camera") == (recipe.camera is not None) == (modality != "lidar")
    assert hasattr(net, "lidar") == (recipe.lidar is not None) == (modality != "camera")
    assert hasattr(net, "fuse") == (modality == "fusion")


def test_recipes_of_the_paper():
    """Values from the paper and the released configs."""
    camera, lidar = PRETRAIN["camera"]["camera-0.1"], PRETRAIN["lidar"]["lidar-0.075"]
    assert camera.grid.shape == (128, 128, 5) and lidar.grid.shape == (180, 180, 5)
    assert lidar.data.sweeps == 10 and lidar.render.rgb_weight == 0 and lidar.optim.batch_size == 16
    assert lidar.optim.lr * lidar.optim.start_factor == pytest.approx(2e-5)  # learning rate at step 0
    assert lidar.grid.scale == 1 / 54  # meters to the renderer's unit: the range ends at 54 m


@pytest.mark.parametrize(
    "recipe",
    [
        PRETRAIN["lidar"]["segment"],
        PRETRAIN["lidar"]["tiny"],
        PRETRAIN["lidar"]["features-tiny"],
        SEGMENT["lidar"]["tiny"],
    ],
)
def test_from_dict_chooses_the_dataclass_by_its_fields(recipe):
    """`AnyRecipe` and, inside recipes, `LidarConfig | UnetConfig` are unions, and the dict names no class."""
    assert from_dict(AnyRecipe, to_dict(recipe)) == recipe


@pytest.mark.parametrize("paste", [None, Paste(counts=(1,) * 10)])
def test_a_recipe_is_restored_from_its_dict(paste):
    """Its tuples too, which `to_dict` makes lists, and the optional section `paste`."""
    recipe = DetectRecipe(augment=Augment(translation=(0.5, 0.5, 0.0)), balanced=True, paste=paste)
    assert from_dict(DetectRecipe, to_dict(recipe)) == recipe


def test_the_recipe_of_an_older_run_has_the_defaults_of_later_settings():
    recipe = PRETRAIN["camera"]["tiny"]
    saved = to_dict(recipe)
    del saved["data"]["sources"], saved["rays"]["patch"], saved["rays"]["patch_step"]
    del saved["render"]["photometric_weight"]
    assert from_dict(AnyRecipe, saved) == recipe
    del saved["render"]["depth_weight"]
    with pytest.raises(TypeError, match="has the fields"):
        from_dict(AnyRecipe, saved)


def test_number_of_parameters_of_the_papers_final_camera_model():
    """As many as in a model of the released config uvtr_cam_vs0.075_pretrain."""
    with torch.device("meta"):
        net = Pretrain(PRETRAIN["camera"]["camera-0.075"])
    assert sum(p.numel() for p in net.parameters()) == 55_538_029


def test_a_run_reuses_the_kernel_launch_parameters_in_its_tuning_json(tmp_path):
    cpu = torch.device("cpu")
    run = RunFolder(tmp_path, config={}, world=World(rank=0, size=1, device=cpu))

    def choice():
        """The choice between two candidates for a made-up op at size 4; the first is the default."""
        # run: the function to time; never called on a CPU
        return tuning.choose(("op", 4), candidates=[(1,), (2,)], run=None, device=cpu)

    try:
        run.tune()
        assert choice() == (1,)  # on a CPU nothing is timed
        (tmp_path / "tuning.json").write_text('{"cpu": {"op 4": [2]}}')
        run.tune()
        assert choice() == (2,)
        for damaged in ('{"cpu": {"op"', "[1]", '{"cpu": 3}', "\xff"):
            (tmp_path / "tuning.json").write_text(damaged, encoding="latin-1")
            with pytest.raises(UserError, match="tuning.json is damaged; remove it"):
                run.tune()
    finally:
        run.close()
    assert choice() == (1,)  # tuning ends with the run


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`python ((?:train|finetune)\.py .*?)`", PAGE))))
def test_a_command_of_the_recipes_page_parses(command):
    script, *flags = command.split()
    args = {"train.py": train, "finetune.py": finetune}[script].parse(flags)
    has_encoders = args.recipe.camera is not None, args.recipe.lidar is not None
    assert has_encoders == (args.modality != "lidar", args.modality != "camera")
    if args.backbone:
        assert args.recipe.camera.widths[0] == 128  # of ConvNeXt-B, the only one that the page's commands name


def test_every_full_size_preset_is_on_the_recipes_page():
    tables = {f"train.py --modality {modality}": presets for modality, presets in PRETRAIN.items()}
    tables |= {f"finetune.py --modality {modality}": presets for modality, presets in DETECT.items()}
    tables |= {"finetune.py --task segment": SEGMENT["lidar"]}
    tables |= {
        f"finetune.py --task occupancy --modality {modality}": presets for modality, presets in OCCUPANCY.items()
    }
    for command, presets in tables.items():
        for name in presets.keys() - {"tiny", "segment-tiny", "images-tiny", "features-tiny", "tiny-occupancy"}:
            assert re.search(rf"{command} --preset {re.escape(name)}[` ]", PAGE), (command, name)
