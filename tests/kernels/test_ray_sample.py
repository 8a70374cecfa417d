import pytest
import torch

from tests.ahead_of_time import Launch
from tests.check import check_against_ref
from unipad.kernels.ray_sample import (
    clip_rays,
    clip_rays_ref,
    merge,
    merge_ref,
    neus_resample,
    neus_resample_ref,
    resample,
    resample_ref,
    sample_pdf,
    sample_pdf_ref,
    stratified_edges,
    stratified_edges_ref,
)

LAUNCHES = [
    Launch("_clip_rays_kernel", dict(BLOCK=512), types={"hit_ptr": "*i1"}, registers=40),
    Launch("_stratified_edges_kernel", dict(JITTER=False, BLOCK=512), registers=40),
    Launch("_stratified_edges_kernel", dict(JITTER=True, BLOCK=512), registers=40),
    Launch("_resample_kernel", dict(MERGE=True, NEUS=True, BLOCK_R=8, BLOCK_N=32), registers=64, shared=2048),
    Launch("_resample_kernel", dict(MERGE=True, NEUS=False, BLOCK_R=8, BLOCK_N=32), registers=64, shared=2048),
    Launch("_resample_kernel", dict(MERGE=False, NEUS=False, BLOCK_R=4, BLOCK_N=64), registers=40, shared=32),
    Launch("_merge_kernel", dict(BLOCK_R=4, BLOCK_N=64), types={"order_idx_ptr": "*i64"}, registers=48, shared=2048),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
JITTERED = pytest.mark.parametrize("jittered", [False, True], ids=["even", "jittered"])
SHAPES = pytest.mark.parametrize(
    "R, S, n",
    [
        (1, 1, 1),
        (7, 5, 3),  # odd sizes
        (32, 24, 7),  # exactly one block
        (33, 9, 7),  # one ray more than a block
        (3, 6, 8),  # n + 1 edges: one more than a power of two
        (3, 6, 0),  # no new samples
        (1, 2, 300),  # one ray per program
        (0, 24, 7),  # no rays
    ],
)


def uniform(*shape, device):
    return torch.rand(*shape, device=device, dtype=torch.float64)


def resample_inputs(R, S, n, jittered, device):
    """Arguments of `sample_pdf` and `resample`. The weights, with peaks and exact zeros, are cast to the tested type;
    edges and jitter are geometry and stay fp32.
    """
    weights = uniform(R, S, device=device) ** 4
    weights[:, 1::3] = 0
    edges = uniform(R, S + 1, device=device).sort(dim=1).values.float()
    return dict(edges=edges, weights=weights, n=n, jitter=uniform(R, device=device).float() if jittered else None)


@DTYPES
@pytest.mark.parametrize("R", [1, 7, 512, 513, 0])  # a block has 512 rays
def test_clip_rays_matches_reference(R, dtype, device):
    origins = uniform(R, 3, device=device)
    directions = torch.nn.functional.normalize(uniform(R, 3, device=device) - 0.5, dim=1)
    inputs = dict(origins=origins, directions=directions, low=(-2, -4, -1), high=(2, 4, 3), near=0.1)
    check_against_ref(clip_rays, clip_rays_ref, inputs, dtype, wrt=[])


@pytest.mark.filterwarnings("ignore:divide by zero")  # the ray with a component of -1e-6, in the interpreter
@pytest.mark.parametrize("fn", [clip_rays, clip_rays_ref])
@pytest.mark.parametrize(
    "origin, direction, expected",
    [
        ((0, 0, 0), (1, 0, 0), (1, 2)),  # from inside, parallel to four faces
        ((0, 0, 0), (-1, 0, 0), (1, 2)),
        ((0, 0, 0), (0.6, 0.8, 0), (1, 2 / 0.6)),  # through the nearer face
        ((0, 0, 0), (1, -1e-6, 0), (1, 2)),  # adding 1e-6 turns this component into 0: faces at infinity
        ((-5, 0, 0), (1, 0, 0), (3, 7)),  # from outside
        ((-2.5, 0, 0), (1, 0, 0), (1, 4.5)),  # enters before `near`
        ((5, 0, 0), (1, 0, 0), None),  # the box lies behind
        ((0, 5, 0), (1, 0, 0), None),  # misses it, parallel to its faces
        ((-6, 0, 0), (0.6, 0.8, 0), None),  # misses it
        ((1.5, 0, 0), (1, 0, 0), None),  # leaves it before `near`
    ],
)
def test_clip_rays_by_hand(fn, origin, direction, expected, device):
    """expected: distances of entry and exit; None: the ray misses, or leaves the box before `near` = 1."""
    origins, directions = (torch.tensor([v], device=device, dtype=torch.float32) for v in (origin, direction))
    enter, leave, hit = fn(origins, directions, low=(-2, -4, -1), high=(2, 4, 3), near=1.0)
    assert hit.tolist() == [expected is not None]
    distances = torch.stack([enter, leave]).flatten().cpu()
    expected = torch.tensor(expected or (1, 2), dtype=torch.float32)  # a ray that misses gets near and near + 1
    # the op divides by direction + 1e-6, so distances are off by up to the fraction 1e-6 / 0.6
    torch.testing.assert_close(distances, expected, rtol=3e-6, atol=0)


@DTYPES
@JITTERED
@pytest.mark.parametrize(
    "R, S",
    [
        (1, 1),
        (7, 5),  # odd sizes
        (32, 15),  # 32 * 16 edges: exactly one block
        (27, 18),  # 27 * 19 edges: one more than a block
        (0, 24),  # no rays
    ],
)
def test_stratified_edges_matches_reference(R, S, jittered, dtype, device):
    near = uniform(R, device=device)
    jitter = uniform(R, device=device) if jittered else None
    inputs = dict(near=near, far=near + uniform(R, device=device), S=S, jitter=jitter)
    check_against_ref(stratified_edges, stratified_edges_ref, inputs, dtype, wrt=[])


@pytest.mark.parametrize("fn", [stratified_edges, stratified_edges_ref])
def test_stratified_edges_by_hand(fn, device):
    near, far = torch.tensor([1.0, 2.0], device=device), torch.tensor([5.0, 10.0], device=device)
    assert fn(near, far, S=4).tolist() == [[1, 2, 3, 4, 5], [2, 4, 6, 8, 10]]
    jitter = torch.tensor([0.0, 0.5], device=device)
    assert fn(near, far, S=4, jitter=jitter).tolist() == [[1, 1.5, 2.5, 3.5, 4.5], [2.5, 4, 6, 8, 9.5]]


@pytest.mark.parametrize("fn", [stratified_edges, stratified_edges_ref])
def test_edges_of_the_shortest_rays_do_not_descend(fn, device):
    """far - near is 1e-6, the least that `clip_rays` returns: if near > 0.5, 33 edges have under 20 distinct values."""
    near = uniform(16, device=device).float()
    for jitter in (None, uniform(16, device=device).float()):
        assert (fn(near, near + 1e-6, S=32, jitter=jitter).diff(dim=1) >= 0).all()


@DTYPES
@JITTERED
@SHAPES
def test_sample_pdf_matches_reference(R, S, n, jittered, dtype, device):
    check_against_ref(sample_pdf, sample_pdf_ref, resample_inputs(R, S, n, jittered, device), dtype, wrt=[])


@DTYPES
@JITTERED
@SHAPES
def test_resample_matches_reference(R, S, n, jittered, dtype, device):
    check_against_ref(resample, resample_ref, resample_inputs(R, S, n, jittered, device), dtype, wrt=[])


def neus_inputs(R, S, n, jittered, device):
    """Arguments of `neus_resample`: surfaces that rays approach slowly, so that no interval has almost no weight, where
    rounding would move samples. The SDF is cast to the tested type; edges and jitter are geometry and stay fp32.
    """
    edges = (torch.arange(S + 1, device=device) + uniform(R, S + 1, device=device)).float()
    sdf = 0.5 - 2 * edges[:, :-1].double() / (S + 1) + 0.02 * uniform(R, S, device=device)
    jitter = uniform(R, device=device).float() if jittered else None
    return dict(edges=edges, sdf=sdf, inv_s=3.0, n=n, jitter=jitter)


@DTYPES
@JITTERED
@SHAPES
def test_neus_resample_matches_reference(R, S, n, jittered, dtype, device):
    check_against_ref(neus_resample, neus_resample_ref, neus_inputs(R, S, n, jittered, device), dtype, wrt=[])


def test_neus_resample_matches_reference_at_recipe_size(device):
    """72 stratified samples at the sampler's inverse scale of 64, in fp64: distances of a sphere along rays through it.

    In fp32, rounding would move the samples in front of the sphere, where intervals have almost no weight.
    """
    edges = (0.1 + torch.linspace(0, 2, 73, device=device, dtype=torch.float64)).repeat(5, 1)
    closest = torch.linspace(0, 0.4, 5, device=device, dtype=torch.float64)[:, None]  # of each ray to the center
    sdf = ((edges[:, :-1] - 1.2).square() + closest.square()).sqrt() - 0.5
    inputs = dict(edges=edges, sdf=sdf, inv_s=64.0, n=24, jitter=torch.linspace(0, 0.9, 5, device=device).double())
    torch.testing.assert_close(neus_resample(**inputs), neus_resample_ref(**inputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("fn", [neus_resample, neus_resample_ref])
def test_neus_resample_by_hand(fn, device):
    """SDF 1, 0, 1, -3 at unit distances and inverse scale ln 3: the opacities of `test_interval_alpha_by_hand`.

    About 1/3, 1/3, 20/21 and 0 (e = 1e-5 and 1e-7 neglected): weights 1/3, 2/9, 80/189 and 0, which sum to 185/189.
    One new sample, at the CDF values 1/4 and 3/4: in the first interval, and in the third.
    """
    edges = torch.tensor([[0.0, 1, 2, 3, 4]], device=device, dtype=torch.float64)
    sdf = torch.tensor([[1.0, 0, 1, -3]], device=device, dtype=torch.float64)
    merged = fn(edges, sdf, inv_s=torch.tensor(3.0).log().item(), n=1)
    start = (1 / 4) * (185 / 189) / (1 / 3)
    torch.testing.assert_close(merged, edges.new_tensor([[0, start, 1, 2, 3, 4]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("fn", [neus_resample, neus_resample_ref])
def test_neus_resample_on_rays_of_one_sample_and_between_coincident_edges(fn, device):
    """One sample has no interval with a known slope, so its weight is 0 and is padded: samples spread evenly."""
    edges, sdf = torch.tensor([[0.0, 4.0]], device=device), torch.tensor([[0.3]], device=device)
    assert fn(edges, sdf, inv_s=64.0, n=1).tolist() == [[0, 1, 4]]
    # the SDF jumps in an interval of length 0: finite, and the interval behind inherits its slope and all of the weight
    edges = torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0]], device=device)
    merged = fn(edges, torch.tensor([[0.5, -0.5, -0.5, -0.5]], device=device), inv_s=64.0, n=1)
    torch.testing.assert_close(merged, merged.new_tensor([[0, 0, 0.25, 1, 2, 3]]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("sample_op, resample_op", [(sample_pdf, resample), (sample_pdf_ref, resample_ref)])
def test_resample_by_hand(sample_op, resample_op, device):
    """Weights 1, 0, 1: the CDF is 0, 1/2, 1/2, 1 at the edges. One new sample: its start and its end are drawn."""
    edges, weights = torch.tensor([[0.0, 1, 2, 4]], device=device), torch.tensor([[1.0, 0, 1]], device=device)
    assert sample_op(edges, weights, n=1).tolist() == [[0.5, 3]]  # at CDF values u = 1/4, 3/4
    assert resample_op(edges, weights, n=1).tolist() == [[0, 0.5, 1, 2, 4]]
    jitter = torch.zeros(1, device=device)
    assert sample_op(edges, weights, 1, jitter).tolist() == [[0, 2]]  # u = 0, 1/2: past the empty interval
    assert resample_op(edges, weights, 1, jitter).tolist() == [[0, 0, 1, 2, 4]]


@pytest.mark.parametrize("fn", [sample_pdf, sample_pdf_ref])
def test_weights_of_almost_no_sum_are_padded_evenly(fn, device):
    edges = torch.linspace(0, 1, 5, device=device).repeat(3, 1)
    weights = torch.zeros(3, 4, device=device)
    weights[1] = 1e-8  # a sum below 1e-5 is padded evenly to 1e-5
    weights[2] = torch.tensor([0.0, 5e-6, 0.0, 0.0])  # half of 1e-5 is padding: masses 1/8, 5/8, 1/8, 1/8
    new = fn(edges, weights, n=3)
    even = torch.tensor([1, 3, 5, 7], device=device) / 8
    torch.testing.assert_close(new[:2], even.repeat(2, 1), rtol=1e-3, atol=0)
    torch.testing.assert_close(new[2], torch.tensor([0.25, 0.35, 0.45, 0.75], device=device), rtol=1e-3, atol=0)


@pytest.mark.parametrize("fn", [sample_pdf, sample_pdf_ref])
def test_samples_stay_between_the_edges_when_u_rounds_to_one(fn, device):
    """The largest jitter below 1 rounds the last CDF value u to 1 in fp32; the CDF may end below it by rounding."""
    edges = torch.linspace(0.1, 0.7, 8, device=device).repeat(20, 1)
    jitter = torch.tensor(1.0).nextafter(torch.tensor(0.0)).expand(20).to(device)
    new = fn(edges, uniform(20, 7, device=device).float(), n=24, jitter=jitter)
    assert (new.diff(dim=1) >= 0).all() and (new >= 0.1).all() and (new <= edges[:, -1:]).all()
    torch.testing.assert_close(new[:, -1], edges[:, -1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("fn", [resample, resample_ref])
def test_all_samples_lie_in_the_only_interval_with_mass(fn, device):
    """All mass lies between two equal edges, so all new samples equal these edges."""
    edges = torch.tensor([[0.0, 0.25, 0.25, 1.0]], device=device)
    weights = torch.tensor([[0.0, 1.0, 0.0]], device=device)
    assert fn(edges, weights, n=3).tolist() == [[0, 0.25, 0.25, 0.25, 0.25, 0.25, 1]]


@pytest.mark.parametrize(
    "R, S, n",
    [
        (1, 1, 1),
        (7, 5, 3),  # odd sizes
        (16, 24, 8),  # exactly one block
        (17, 9, 8),  # one ray more than a block
        (3, 5, 9),  # more new samples than old ones
        (3, 4, 0),  # no new samples
        (0, 4, 4),  # no rays
    ],
)
def test_merge_matches_reference(R, S, n, device):
    """Integers from 0 to 9, so that many starts coincide and only `order` tells old from new."""
    old, new = (torch.randint(10, (R, k + 1), device=device).sort(dim=1).values.double() for k in (S, n))
    check_against_ref(merge, merge_ref, dict(edges=old, new_edges=new), torch.float32, wrt=[])


@pytest.mark.parametrize("fn", [merge, merge_ref])
def test_merge_by_hand(fn, device):
    merged, order = fn(torch.tensor([[0.0, 1, 2, 3]], device=device), torch.tensor([[1.0, 1, 5]], device=device))
    assert merged.tolist() == [[0, 1, 1, 1, 2, 5]]
    assert order.tolist() == [[0, 1, 3, 4, 2]]


@pytest.mark.parametrize("fn", [resample, sample_pdf])
def test_rejects_mismatched_shapes(fn, device):
    with pytest.raises(AssertionError, match="do not match"):
        fn(edges=torch.rand(2, 4, device=device), weights=torch.rand(2, 4, device=device), n=3)


def test_neus_resample_rejects_mismatched_shapes(device):
    with pytest.raises(AssertionError, match=r"do not match sdf \(2, 4\)"):
        neus_resample(torch.rand(2, 4, device=device), torch.rand(2, 4, device=device), inv_s=64.0, n=3)
