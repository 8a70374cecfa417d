"""docs/data.md: the example of a custom rig runs, and its dataset is read and drawn; the list of tables is complete."""

import re
from pathlib import Path

import numpy as np
import pytest

from unipad.config import Data
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.tables import TABLES
from unipad.draw import calibration

TEXT = (Path(__file__).parents[1] / "docs/data.md").read_text()
pytestmark = pytest.mark.usefixtures("own_user_cache")  # so that nothing is written outside of the test's folder


def test_the_example_of_a_custom_rig_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, example = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)  # the first one writes features
    exec(compile(example, "docs/data.md", "exec"), {})
    root, version = "data/rig", "rig-1"
    assert NuScenesDataset.train_val_splits(root, version) == ("rig_train", "rig_val")
    dataset = NuScenesDataset(root, version, "rig_train", Data())
    sample = dataset[2]
    assert len(dataset) == 3 and sample.images[0].shape == (192, 320, 3) and sample.boxes.shape == (0, 9)
    # the camera is mounted 1.5 m ahead of the LiDAR and 0.3 m below it: a point 10 m ahead of the LiDAR, at the height
    # of the camera, is 8.5 m ahead of the camera and at the principal point
    ahead = sample.lidar2image[0] @ [0, 10, -0.3, 1]
    np.testing.assert_allclose(ahead[:3] / ahead[2], [160, 96, 1], atol=1e-3)
    assert ahead[2] == pytest.approx(8.5, abs=1e-4)
    calibration.main(calibration.Args(data_root=Path(root), version=version, frames=1, out=tmp_path / "out"))
    assert "CAM_NOSE" in capsys.readouterr().out and list((tmp_path / "out").glob("*.png"))


def test_every_table_is_named():
    assert all(f"`{table}`" in TEXT for table in TABLES)
