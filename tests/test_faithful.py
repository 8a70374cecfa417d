"""docs/faithfulness.md lists every record, and no error in it exceeds its tolerance."""

import re

import pytest

from tests.faithfulness import RECORDS, TABLE, loads_a_record, table
from tests.golden import FOLDER

LINES = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
ROWS = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in LINES]
CELLS = {row[0]: row[1:] for row in ROWS}


def test_every_record_has_a_row():
    files = {file.stem for file in FOLDER.glob("*.npz")}
    assert files == RECORDS.keys() == CELLS.keys()


@pytest.mark.parametrize("record", RECORDS)
def test_errors_are_within_their_tolerances(record):
    contents, comparisons, median, largest, of_tolerance = CELLS[record]
    assert contents == RECORDS[record]
    if largest == "equal":
        assert comparisons == of_tolerance == "" and median == "equal"
    else:
        assert int(comparisons) > 0
        assert float(median) <= float(largest) < 2e-2  # the largest tolerance, a fraction of an array's largest entry
        assert float(of_tolerance.removesuffix("%")) <= 100


def test_rows_equal_those_computed_by_hand():
    """The last column is the largest ratio of error to tolerance; a record that tests compare bit
    by bit only, without a tolerance, counts as no comparison and is marked "equal"."""
    pairs = [(2e-4, 1e-3), (9e-6, 1e-5), (0.0, 1e-5)]  # error, tolerance
    errors = {name: [] for name in RECORDS} | {"fpn_vs01": pairs}
    page = table(errors)
    assert "| `fpn_vs01` | FPN of `camera-0.1` (four levels) | 3 | 9.0e-06 | 2.0e-04 | 90% |" in page
    assert re.search(r"\| `grid_mask` \| .* \| \| equal \| equal \| \|", page)


def test_tests_that_load_records_are_found():
    """`tests.faithfulness` runs the tests whose source calls `golden.load`, directly or through a helper."""
    from tests import test_camera, test_golden_samplers

    assert loads_a_record(test_camera.test_convnext_matches_the_original)
    assert loads_a_record(test_golden_samplers.test_near_and_far_of_rays)  # through a helper
    assert not loads_a_record(test_camera.test_each_fpn_level_halves_the_resolution)
