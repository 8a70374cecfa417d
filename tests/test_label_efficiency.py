"""benchmarks.label_efficiency at a small size: the arms, a repeated command, the table and the figure."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from benchmarks import label_efficiency
from benchmarks.label_efficiency import PORTABLE, Args, Row, append_rows, draw, read_rows, spread, table
from tests.other_cpus import EMULATOR, HERE, RECORD, RECORDED, portable_results, run, versions
from unipad.errors import UserError

ROW = Row(
    task="detect",
    modality="lidar",
    variant="default",
    split="val",
    arm="scratch",
    fraction=0.05,
    seed=0,
    steps=2,
    metric="NDS",
    value=0.25,
    cpu_seconds=3.0,
    commit="abc",
    flags="",
    pretrained="",
)


def test_rows_are_read_as_written(tmp_path):
    rows = [ROW, replace(ROW, seed=1, value=0.1 + 0.2, flags="--lr 1e-3")]
    for row in rows:
        append_rows(tmp_path / "results.csv", [row])
    assert read_rows(tmp_path / "results.csv") == rows
    assert read_rows(tmp_path / "none.csv") == []


def test_the_gain_is_taken_seed_by_seed():
    """Seeds differ by 0.2, the gain of each is 0.1; a seed that one arm lacks does not count in the gain."""
    rows = [replace(ROW, seed=seed, value=0.2 * seed) for seed in range(3)]
    rows += [replace(ROW, arm="pretrained", seed=seed, value=0.2 * seed + 0.1) for seed in range(2)]
    header, _, line = table(rows)
    assert header.endswith("| labels | scratch | pretrained | gain |")
    assert line.endswith("| 5 % | 0.200 ± 0.200 (3) | 0.200 ± 0.141 (2) | +0.100 ± 0.000 (2) |")
    assert spread([]) == "-" and spread([0.5]) == "0.500 (1)"


def test_the_figure_has_a_panel_for_each_metric(tmp_path):
    rows = [
        replace(ROW, task=task, metric=metric, arm=arm, fraction=fraction, seed=seed)
        for task, metric in [("detect", "NDS"), ("detect", "mAP"), ("segment", "mIoU")]
        for arm in ("scratch", "pretrained")
        for fraction in (0.05, 1.0)
        for seed in (0, 1)
    ]
    longer = [replace(row, steps=2 * row.steps) for row in rows if row.metric != "mIoU" and row.fraction == 0.05]
    for more, panels in ([], 3), (longer, 4):  # the fourth: NDS over steps
        draw(rows + more, tmp_path / "figure.png")
        picture = cv2.imread(str(tmp_path / "figure.png"))
        inked = (picture < 200).any(axis=(0, 2))  # columns
        # panels of 3.1 inches at 120 dots per inch
        assert picture.shape[1] == pytest.approx(panels * 3.1 * 120, abs=2) and picture.std() > 20
        assert all(part.mean() > 0.5 for part in np.array_split(inked, panels))
    with pytest.raises(UserError, match="nothing to draw"):
        draw([], tmp_path / "figure.png")


def test_every_task_and_modality_has_a_folder_and_a_title_of_its_own(tmp_path):
    rows = [replace(ROW, modality="camera"), ROW, replace(ROW, task="segment"), replace(ROW, task="occupancy")]
    rows.append(replace(ROW, task="occupancy", modality="fusion"))
    assert len({label_efficiency.variant_folder(tmp_path, row) for row in rows}) == len(rows)
    titles = ["Camera detection", "LiDAR detection", "LiDAR segmentation", "LiDAR occupancy", "Fusion occupancy"]
    assert [label_efficiency.title_of([row]) for row in rows] == titles
    assert label_efficiency.METRICS.keys() == label_efficiency.TASKS.keys()


@pytest.mark.slow
def test_all_arms_run_and_only_what_is_missing_runs_again(city, tmp_path, capsys):
    """Pre-training and four arms, of two steps each, on the small city; then one more seed of one arm, which runs
    alone. Other settings under the same variant are refused, and a run that fails ends the program."""
    args = Args(
        fractions=(0.5,),
        seeds=(0,),
        steps=(2,),
        pretrain_steps=2,
        pretrain_flags="--workers 0 --val-samples 1 --val-every 0",
        flags="--workers 0",
        data_root=city,
        version="v1.0-mini",
        preset="tiny",
        jobs=2,
        out=tmp_path,
    )
    args = replace(args, pretrain_flags=args.pretrain_flags + " --preset tiny")
    label_efficiency.main(args)
    rows = read_rows(tmp_path / "results.csv")
    assert {(row.arm, row.metric) for row in rows} == {
        (arm, m) for arm in label_efficiency.ARMS for m in ("NDS", "mAP")
    }
    assert all(row.value >= 0 and row.cpu_seconds > 0 and row.commit for row in rows)
    assert {row.arm: row.pretrained.endswith("pretrained, 2 steps") for row in rows} == {
        "scratch": False, "pretrained": True, "frozen-random": False, "frozen-pretrained": True,
    }  # fmt: skip
    assert "4 of 4: " in capsys.readouterr().out
    label_efficiency.main(replace(args, seeds=(0, 1), arms=("scratch",)))
    assert "1 of 1: scratch, 0.5 of the labels, seed 1" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "results.csv")) == 10  # two metrics of each of five runs
    label_efficiency.main(replace(args, arms=("scratch",), portable=True))
    assert {row.variant for row in read_rows(tmp_path / "results.csv")} == {"default", "default-portable"}
    assert (tmp_path / "lidar/default-portable/scratch-0.5-2-0/checkpoints/last.pt").exists()
    with pytest.raises(UserError, match="choose another name for --variant"):
        label_efficiency.main(replace(args, flags="--workers 0 --lr 1"))
    with pytest.raises(UserError, match="choose another name for --variant"):
        label_efficiency.main(replace(args, pretrained=tmp_path / "another"))
    label_efficiency.main(replace(args, figure=tmp_path / "figure.png"))
    frame = cv2.imread(str(tmp_path / "figure_frame.png"))
    assert frame.shape[1] == 960 and frame.std() > 20
    with pytest.raises(SystemExit):
        label_efficiency.main(
            replace(args, flags="--lr -1", variant="other", pretrained=tmp_path / "lidar/default/pretrained")
        )
    assert "--lr" in capsys.readouterr().err


@pytest.mark.slow
def test_occupancy_is_fine_tuned_from_a_pre_trained_encoder_and_from_scratch(labeled, tmp_path):
    args = Args(
        task="occupancy",
        arms=("scratch", "pretrained"),
        fractions=(0.5,),
        seeds=(0,),
        steps=(2,),
        pretrain_steps=2,
        pretrain_flags="--workers 0 --val-samples 1 --val-every 0 --preset tiny",
        flags="--workers 0 --occupancy.max-voxels 2000",
        data_root=labeled,
        version="v1.0-mini",
        preset="tiny",
        out=tmp_path,
    )
    label_efficiency.main(args)
    rows = read_rows(tmp_path / "results.csv")
    cases = {(row.arm, row.metric): row.pretrained.endswith("pretrained, 2 steps") for row in rows}
    assert cases == {(arm, m): arm == "pretrained" for arm in args.arms for m in ("mIoU", "RayIoU")}
    assert all(0 <= row.value < 0.5 and row.cpu_seconds > 0 for row in rows)
    evaluated = tmp_path / "occupancy-lidar" / "default" / "pretrained-0.5-2-0" / "eval-val"
    assert (evaluated / "occupancy_0.png").exists() and len(list((evaluated / "occupancy").glob("*.npz"))) == 3


def test_flags_that_have_a_place_of_their_own_are_refused(tmp_path):
    for flags in ({"flags": "--seed 3"}, {"pretrain_flags": "--steps 3"}):
        with pytest.raises(UserError, match="use --seeds and --steps"):
            label_efficiency.main(Args(out=tmp_path, **flags))


def test_portable_runs_have_a_city_a_variant_and_an_environment_of_their_own(tmp_path, monkeypatch):
    started = []

    def fail(command, env):
        started.append((command, env))
        return SimpleNamespace(returncode=1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(label_efficiency.subprocess, "run", fail)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for portable in (False, True):
        with pytest.raises(SystemExit):
            label_efficiency.main(Args(portable=portable))
    (default, default_environment), (command, environment) = started
    assert default_environment == dict(os.environ) and environment == dict(os.environ) | PORTABLE
    assert "data/label-efficiency" in default and "data/label-efficiency-portable" in command
    append_rows(tmp_path / "results.csv", [replace(ROW, steps=1000, pretrained="", flags="--lr 1")])
    with pytest.raises(SystemExit):  # not `UserError`: these rows are of another variant
        label_efficiency.main(Args(portable=True, out=tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(UserError, match="--portable needs an x86-64 CPU with AVX2"):
        label_efficiency.main(Args(portable=True, out=tmp_path))


CODE_PATHS = """
import ctypes, json, hashlib
import numpy, scipy.linalg, threadpoolctl, torch
from numpy.core._multiarray_umath import __cpu_features__
x = torch.linspace(0.1, 9, 4096)
pools = threadpoolctl.threadpool_info()
mkl = ctypes.CDLL(torch.__path__[0] + "/lib/libtorch_cpu.so")
print(json.dumps({
    "torch": torch.backends.cpu.get_cpu_capability(),
    "mkl": mkl.mkl_serv_cbwr_get(1),
    "roots": hashlib.sha256(x.sqrt().numpy().tobytes()).hexdigest(),
    "numpy": __cpu_features__["AVX512_SKX"],
    "openblas": sorted({pool["architecture"] for pool in pools if pool["internal_api"] == "openblas"}),
}))
"""
HAS_MKL = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@pytest.mark.skipif(not HAS_MKL, reason="--portable is for x86-64 with AVX2, and PyTorch with MKL")
def test_portable_settings_choose_the_code(monkeypatch):
    """As the libraries themselves report it. For square roots, which no library reports: the bits are others."""
    portable, default = (json.loads(run(HERE, flag, "-c", CODE_PATHS)) for flag in (True, False))
    compatible = 3  # MKL_CBWR_COMPATIBLE
    roots = portable.pop("roots")
    assert portable == {"torch": "AVX2", "mkl": compatible, "numpy": False, "openblas": ["Haswell"]}
    assert default["mkl"] != compatible and default["roots"] != roots


ROUNDED = """
import hashlib
import numpy as np
import torch
x = torch.from_numpy(np.linspace(0.1, 0.9, 90000).astype(np.float32)).requires_grad_()
image = x[:12800].reshape(1, 32, 20, 20)
values = [x.exp(), x.log(), x.sqrt(), x.atan(), x.softmax(0), x[:4900].reshape(70, 70) @ x[:4900].reshape(70, 70).T]
values += [torch.nn.functional.conv2d(image, x[:9216].reshape(32, 32, 3, 3), padding=1)]
values += torch.autograd.grad(values[-1].square().sum(), x)
angles = np.linspace(-9, 9, 9999)
values = [value.detach().numpy() for value in values]
values += [np.exp(angles), np.tan(angles), np.arctan2(angles, 2)]
values += [np.linalg.inv(np.sin(np.outer(angles, angles)[:99, :99]))]
print(*(hashlib.sha256(value.tobytes()).hexdigest()[:8] for value in values))
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MKL or not shutil.which(EMULATOR), reason=f"needs {EMULATOR} (apt-get install qemu-user)")
@pytest.mark.parametrize("cpu", ["Haswell", "EPYC"])
def test_portable_results_are_those_of_other_cpus(cpu):
    """Emulated ones, of Intel and AMD. Without the settings, they differ from this CPU's."""
    assert run(cpu, True, "-c", ROUNDED) == run(HERE, True, "-c", ROUNDED)
    assert run(cpu, False, "-c", ROUNDED) != run(HERE, False, "-c", ROUNDED)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MKL, reason="--portable is for x86-64 with AVX2, and PyTorch with MKL")
@pytest.mark.parametrize("kind", RECORDED)
def test_portable_results_are_those_on_record(kind):
    """A city, pre-training, fine-tuning and evaluation: every bit is that of the CPU that made the record. After a
    change that is meant to change results: `python -m tests.other_cpus --record`."""
    record = json.loads(RECORD.read_text())
    if versions() != record["versions"]:
        pytest.skip(f"recorded with {record['versions']}, this is {versions()}")
    assert portable_results(kind, RECORDED[kind]) == record[kind]
