"""benchmarks.label_efficiency at a small size: the arms, a repeated command, the table and the figure."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from benchmarks import label_efficiency
from benchmarks.label_efficiency import Args, Row, append_rows, draw, read_rows, spread, table
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
    with pytest.raises(UserError, match="name a new variant"):
        label_efficiency.main(replace(args, flags="--workers 0 --lr 1"))
    with pytest.raises(UserError, match="name a new variant"):
        label_efficiency.main(replace(args, pretrained=tmp_path / "another"))
    label_efficiency.main(replace(args, figure=tmp_path / "figure.png"))
    frame = cv2.imread(str(tmp_path / "figure_frame.png"))
    assert frame.shape[1] == 960 and frame.std() > 20
    with pytest.raises(SystemExit):
        label_efficiency.main(
            replace(args, flags="--lr -1", variant="other", pretrained=tmp_path / "lidar/default/pretrained")
        )
    assert "--lr" in capsys.readouterr().err


def test_flags_that_have_a_place_of_their_own_are_refused(tmp_path):
    for flags in ({"flags": "--seed 3"}, {"pretrain_flags": "--steps 3"}):
        with pytest.raises(UserError, match="use --seeds and --steps"):
            label_efficiency.main(Args(out=tmp_path, **flags))
