"""Ray clipping, samplers and alpha compared with records of the original, for references and for kernels."""

import pytest
import torch

from tests.check import launches
from tests.conftest import HAS_GPU
from tests.golden import assert_close_to_max, load
from unipad.kernels import backend
from unipad.kernels.ray_sample import clip_rays, merge, resample, sample_pdf, stratified_edges
from unipad.kernels.sdf_alpha import laplace_density, neus_alpha, volsdf_alpha

# Tolerance for sample positions, as a fraction of the largest. Where the PDF is small, inverting the CDF magnifies
# rounding, and the original resamples in [0, 1] and converts to distances afterwards, while we resample distances.
EDGE_TOLERANCE = 3e-6


@pytest.fixture(params=["reference", "kernels"])
def device(request, monkeypatch):
    """Runs each test with the references, and with the kernels, which must be launched."""
    if request.param == "reference":
        yield "cpu"
        return
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    monkeypatch.setattr(backend, "interpret", not HAS_GPU)
    with launches() as launched:
        yield "cuda" if HAS_GPU else "cpu"
    assert launched, "the ops ran their references"


def record(name, device):
    """Arrays of a record; the last axis is dropped where it has length 1."""
    arrays = load(name)[0]
    return {k: (v.squeeze(-1) if v.ndim > 1 else v).to(device) for k, v in arrays.items()}


def assert_edges(edges, arrays, case):
    """Compare an edge list (see kernels/ray_sample.py) with the starts and ends of samples in a record."""
    assert_close_to_max(edges[:, :-1], arrays[f"out/{case}_starts"], EDGE_TOLERANCE, f"{case} starts")
    assert_close_to_max(edges[:, 1:], arrays[f"out/{case}_ends"], EDGE_TOLERANCE, f"{case} ends")


def test_near_and_far_of_rays(device):
    rec = record("render_collider", device)
    box = rec["in/scene_box_scaled"].tolist()
    near_plane = (rec["in/near_plane"] * rec["in/scale_factor"]).item()
    near, far, hit = clip_rays(rec["in/origins"], rec["in/directions"], box[:3], box[3:], near_plane)
    assert hit.all()
    assert_close_to_max(near, rec["out/nears"], 1e-6, "near")
    assert_close_to_max(far, rec["out/fars"], 1e-6, "far")


def test_rays_that_fail_an_assertion_of_the_original_are_marked_as_misses(device):
    rec = record("render_collider", device)
    assert rec["out/miss_assert_fired"].all()  # the original's
    box = rec["in/scene_box_scaled"].tolist()
    near_plane = (rec["in/near_plane"] * rec["in/scale_factor"]).item()
    near, far, hit = clip_rays(rec["in/miss_origins"], rec["in/miss_directions"], box[:3], box[3:], near_plane)
    assert not hit.any()
    # `clip_rays` gives misses far = near + 1
    torch.testing.assert_close(far - near, torch.ones_like(near))


def test_uniform_samples(device):
    rec = record("render_samplers", device)
    edges = stratified_edges(rec["in/nears"], rec["in/fars"], S=12)
    assert_edges(edges, rec, "UniformSampler_eval")


def test_importance_samples(device):
    """24 samples added to 40 uniform ones; `resample` draws and merges them in one op."""
    rec = record("render_samplers", device)
    edges = stratified_edges(rec["in/nears"], rec["in/fars"], S=40)
    new = sample_pdf(edges, rec["in/pdf_weights"], n=24)
    assert_edges(new, rec, "PDFSampler_eval")
    assert_edges(merge(edges, new)[0], rec, "merge_uniform40_pdf24")
    assert_edges(resample(edges, rec["in/pdf_weights"], n=24), rec, "merge_uniform40_pdf24")


def test_order_of_merged_samples(device):
    """The order may differ from the original's only between samples that are equal up to rounding."""
    rec = record("render_samplers", device)
    edges = stratified_edges(rec["in/nears"], rec["in/fars"], S=40)
    new = sample_pdf(edges, rec["in/pdf_weights"], n=24)
    merged, order = merge(edges, new)
    starts = torch.cat([edges[:, :-1], new[:, :-1]], dim=1)
    assert torch.equal(starts.gather(1, order), merged[:, :-1])
    in_original_order = starts.gather(1, rec["out/merge_sorted_index"])
    assert_close_to_max(in_original_order, merged[:, :-1], EDGE_TOLERANCE)
    assert (order != rec["out/merge_sorted_index"]).double().mean() < 0.01


def test_jittered_samples(device):
    rec = record("render_samplers", device)
    edges = stratified_edges(rec["in/nears"], rec["in/fars"], S=40, jitter=rec["in/rand_uniform_single_jitter"])
    assert_edges(edges, rec, "UniformSampler_train_single_jitter")
    new = sample_pdf(edges, rec["in/pdf_weights"], n=24, jitter=rec["in/rand_pdf_single_jitter"])
    assert_edges(new, rec, "PDFSampler_train_single_jitter")


def test_importance_samples_of_neus(device):
    """72 uniform samples, and 24 drawn by their recorded weights, are the 96 samples that are rendered."""
    rec = record("render_neus_eval", device)
    uniform = stratified_edges(rec["out/nears"], rec["out/fars"], S=72)
    points = rec["in/ray_o"][:, None] + uniform[:, :-1, None] * rec["in/ray_d"][:, None]
    assert_close_to_max(points, rec["out/init_sampled_points"], 1e-6)
    edges = resample(uniform, rec["out/init_weights"], n=24)
    assert_close_to_max(edges[:, :-1], rec["out/z_vals"], EDGE_TOLERANCE)
    assert_close_to_max(edges[:, 1:], rec["out/ends"], EDGE_TOLERANCE)


def test_alpha_of_neus(device):
    rec = record("render_neus_eval", device)
    # the original's parameter "variance" is log(inv_s) / 10
    inv_s = torch.exp(10 * rec["state/pts_bbox_head.render_model.field.deviation_network.variance"])
    alpha = neus_alpha(rec["out/sdf"], rec["out/gradients"], rec["in/ray_d"], rec["out/deltas"], inv_s)
    assert_close_to_max(alpha, rec["out/alphas"], 1e-6)


def test_density_and_alpha_of_volsdf(device):
    rec = record("render_volsdf_eval", device)
    field = "state/pts_bbox_head.render_model.field.laplace_density."
    beta = rec[field + "beta"].abs() + rec[field + "beta_min"]
    assert_close_to_max(laplace_density(rec["out/sdf"], beta), rec["out/density"], 1e-6)
    # the record has no alpha, but the density and the lengths of intervals that determine it
    alpha = volsdf_alpha(rec["out/sdf"], rec["out/deltas"], beta)
    assert_close_to_max(alpha, 1 - torch.exp(-rec["out/density"] * rec["out/deltas"]), 1e-6)
