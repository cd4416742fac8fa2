"""The page's map of features and their neighbours: each against plain numpy and against planted truths."""

import json
import math
import re

import numpy as np
import pytest
import torch

import analyze
from test_analyses import fires, lookup_run, random_run

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def drawn(m, n, seed=0, dtype=torch.float64):
    return torch.from_numpy(unit(np.random.default_rng(seed).standard_normal((m, n)))).to(dtype)


# -----------------------------------------------------------------------------
# t-SNE


@pytest.mark.parametrize("perplexity", [5.0, 30.0])
def test_each_direction_has_as_many_soft_neighbours_as_the_perplexity_says(perplexity):
    """From P alone a Gaussian of each row is recovered, and 2 to its entropy in bits is the perplexity."""
    X = drawn(300, 12)
    P = analyze.affinities(X, perplexity)
    # the conditional probabilities by hand: bisection of the width, one row after the other
    squared = np.square(X.numpy()[:, None] - X.numpy()).sum(2)
    conditional = np.zeros_like(squared)
    for i, row in enumerate(squared):
        low, high = 1e-3, 1e3
        others = np.delete(row, i)
        for _ in range(100):
            beta = math.sqrt(low * high)
            p = np.exp(-beta * others) / np.exp(-beta * others).sum()
            bits = -(p * np.log2(p)).sum()
            low, high = (beta, high) if 2**bits > perplexity else (low, beta)
        assert 2**bits == pytest.approx(perplexity)
        conditional[i] = np.insert(p, i, 0)
    np.testing.assert_allclose(P.numpy(), (conditional + conditional.T) / 600, rtol=1e-5, atol=1e-12)
    assert P.sum().item() == pytest.approx(1) and P.diagonal().abs().max() == 0


def divergence(P, y, exaggeration=1.0):
    """sum p log (p / q), of which the gradient has p exaggerated where it stands before the logarithm of q."""
    squared = np.square(y[:, None] - y).sum(2)
    kernel = 1 / (1 + squared)
    np.fill_diagonal(kernel, 0)
    off = ~np.eye(len(y), dtype=bool)
    # exaggeration: log q = log kernel - log sum; the first is weighed by e P, the second by 1
    return (-exaggeration * P[off] * np.log(kernel[off])).sum() + math.log(kernel.sum())


@pytest.mark.parametrize("exaggeration", [1.0, 4.0])
def test_tsne_gradient_is_that_of_finite_differences(exaggeration):
    m = 300  # more than a block
    P = analyze.affinities(drawn(m, 12), 20.0)
    y = 3 * np.random.default_rng(1).standard_normal((m, 2))
    gradient = analyze.tsne_gradient(P, torch.from_numpy(y), exaggeration).numpy()
    for i, axis in ((0, 0), (17, 1), (255, 0), (256, 1), (299, 0)):
        step = np.zeros_like(y)
        step[i, axis] = 1e-5
        up, down = (divergence(P.numpy(), y + sign * step, exaggeration) for sign in (1, -1))
        assert gradient[i, axis] == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-9)


def test_tsne_keeps_three_planted_clusters_apart_and_is_the_same_again():
    """Every direction's nearest places are of its own cluster, and no place is far from its cluster's middle."""
    rng = np.random.default_rng(0)
    centres = np.eye(24)[:3]
    cluster = np.repeat([0, 1, 2], [90, 60, 30])
    X = torch.from_numpy(unit(centres[cluster] + 0.1 * rng.standard_normal((180, 24)))).float()
    y = analyze.tsne(X)
    assert torch.equal(analyze.tsne(X), y)
    y = y.numpy()
    distances = np.linalg.norm(y[:, None] - y, axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (cluster[distances.argsort(1)[:, :10]] == cluster[:, None]).all()
    middles = np.array([y[cluster == k].mean(0) for k in range(3)])
    radii = [np.linalg.norm(y[cluster == k] - middles[k], axis=1).max() for k in range(3)]
    for k, other in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(middles[k] - middles[other]) > radii[k] + radii[other]


def test_tsne_lowers_the_divergence_far_below_that_of_its_start():
    X = drawn(400, 6, dtype=torch.float32)
    P = analyze.affinities(X.double(), 30.0).numpy()
    start = 1e-4 * np.random.default_rng(0).standard_normal((400, 2))
    entropy = (P * np.log(np.where(P > 0, P, 1))).sum()
    before, after = (entropy + divergence(P, y) for y in (start, analyze.tsne(X).double().numpy()))
    assert 0 < after < 0.5 * before


@pytest.mark.parametrize("m", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("kind", ["drawn", "all alike", "orthogonal"])
def test_tsne_of_few_or_of_equal_directions_is_finite(m, kind):
    X = {
        "drawn": drawn(m, 8),
        "all alike": drawn(1, 8).expand(m, 8),
        "orthogonal": torch.eye(m, 40, dtype=torch.float64),
    }[kind].float()
    assert analyze.tsne(X).isfinite().all()


# -----------------------------------------------------------------------------
# neighbours


def test_the_nearest_features_are_those_of_the_highest_cosines():
    X = drawn(300, 10)
    cosines = X.numpy() @ X.numpy().T
    np.fill_diagonal(cosines, -1)
    for row, found in zip(cosines, analyze.nearest_features(X)):
        best = np.argsort(-row)[:5]
        assert [k for k, _ in found] == best.tolist()
        assert [value for _, value in found] == pytest.approx(row[best])


@pytest.mark.parametrize("densest", [0.05, 0.4])  # as sparse matrices, and as dense ones
def test_features_are_active_together_as_their_correlation_says(densest):
    """Against numpy's correlation of being active; one that is never active and one that always is have none."""
    rng = np.random.default_rng(0)
    active = rng.random((1100, 900)) < rng.uniform(0.01, densest, 1100)[:, None]
    active[1] = active[0] & (rng.random(900) < 0.8)  # together far more often than by chance
    active[1050] = active[0]
    active[7] = False
    active[8] = True
    found = analyze.active_together(torch.from_numpy(active).float().to_sparse())
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.nan_to_num(np.corrcoef(active.astype(float)))
    np.fill_diagonal(phi, 0)
    for row, pairs in zip(phi, found):
        best = np.sort(row[row > 1e-6])[::-1][:5]
        assert [value for _, value in pairs] == pytest.approx(best, abs=1e-5)
        assert [row[k] for k, _ in pairs] == pytest.approx(best, abs=1e-5)
    assert [k for k, _ in found[0]][:2] == [1050, 1] and found[0][0][1] == pytest.approx(1)
    assert found[7] == found[8] == []


def test_what_is_always_active_is_with_nothing_on_any_number_of_tokens():
    """float32 cannot hold the products of such counts, and nothing may be left of the difference."""
    active = np.random.default_rng(0).random((3, 99_990)) < 0.9
    active[1] = True
    found = analyze.active_together(torch.from_numpy(active).float().to_sparse())
    phi = pytest.approx(np.corrcoef(active[0], active[2])[0, 1], abs=1e-7)  # by chance a bit over 0
    assert found == [[(2, phi)], [], [(0, phi)]]


# -----------------------------------------------------------------------------
# motifs


@pytest.mark.parametrize("by_token, by_pair, expected", [
    (0.5, 0.9, "single token"),
    (0.49, 0.5, "token in context"),
    (0.49, 0.499, "context"),
    (0.6, 0.4, "single token"),
    (-0.1, -0.2, "context"),
    (np.nan, np.nan, None),
])
def test_a_motif_is_what_explains_half_of_the_variance(by_token, by_pair, expected):
    assert analyze.motif(by_token, by_pair) == expected


# -----------------------------------------------------------------------------
# the page's data


def page_data(out):
    html = (out / "sae/scaling/features.html").read_text(encoding="utf-8")
    return json.loads(re.search('id="data">(.*?)</script>', html, re.S).group(1))


@pytest.mark.parametrize("numbers", [np.arange(14), np.array([0, 2, 3, 5, 6, 9, 12])], ids=["all", "some"])
def test_the_page_has_neighbours_motifs_and_places_of_its_features(tmp_path, numbers):
    """Feature 3 is never active, so it is nobody's neighbour; feature 0 is dead by its density, so it has no place."""
    this, _ = random_run(tmp_path, "resid.0", tokens=np.random.default_rng(0).integers(0, 9, 2000), block_size=30)
    with torch.no_grad():
        this.sae.b_enc[3] = -100.0
    density = np.arange(14) / 1e6
    analyze.write_page(this, "tiny", [], density, numbers)
    data = page_data(tmp_path)
    acts = this.activations(np.arange(14))
    seen = [i for i in numbers.tolist() if acts[i].any()]
    assert 3 not in seen and len(seen) == len(numbers) - 1
    W = this.sae.W_dec.detach().numpy()
    phi = np.corrcoef(acts[seen] > 0)
    explained = analyze.explained_by_tokens(this, acts)
    for i, feature in enumerate(data["features"]):
        if i not in numbers:
            assert feature is None
            continue
        assert ("map" in feature) == (i > 0)
        if i not in seen:
            assert set(feature) == {"density", "map"}
            continue
        k = seen.index(i)
        for name, likeness in (("nearest", W[seen] @ W[i]), ("together", phi[k])):
            others = {other: likeness[j] for j, other in enumerate(seen) if other != i and likeness[j] > 1e-6}
            found = dict(feature[name])
            assert len(found) == min(5, len(others))
            assert sorted(found.values()) == pytest.approx(sorted(others.values())[-len(found):], rel=6e-3), name
            assert found == pytest.approx({other: others[other] for other in found}, rel=6e-3)
        by_token, by_pair = explained[i]
        assert feature["explained_by_token"] == pytest.approx(by_token, rel=6e-3)
        assert feature["explained"] == pytest.approx(by_pair, rel=6e-3)
        assert feature["motif"] == analyze.motif(by_token, by_pair)
    places = np.array([feature["map"] for feature in data["features"] if feature and "map" in feature])
    assert places.min() == 0 and places.max() == 1  # in the middle, as large as there is room
    assert places.min(0) + places.max(0) == pytest.approx(np.ones(2), abs=2e-3)
    assert len(np.unique(places.round(2), axis=0)) == len(places) == len(numbers) - 1


def test_the_page_has_the_training_curves_of_the_log_thinned_to_its_last_line(tmp_path):
    this = lookup_run(tmp_path, "bar foo\n" * 60, fires({7: {" foo": 1.0}}))
    log = [{"step": 10 * k, "l0": 1e4 / k, "dead": k / 2000, "variance_explained": math.nan} for k in range(1, 1002)]
    with open(tmp_path / "sae/scaling/log.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in log)
    analyze.write_page(this, "tiny", [], np.ones(300), np.arange(300))
    data = page_data(tmp_path)
    assert (data["features"][7]["explained_by_token"], data["features"][7]["motif"]) == (1, "single token")
    curves = data["training"]
    assert set(curves) == {"step", "l0", "dead", "variance_explained"}
    lines = log[::-1][::6][::-1]
    assert 100 < len(lines) == len(curves["step"]) <= 200
    for name in ("step", "l0", "dead"):
        assert curves[name] == pytest.approx([line[name] for line in lines], rel=6e-3)
    assert set(curves["variance_explained"]) == {None}
    (tmp_path / "sae/scaling/log.jsonl").unlink()
    analyze.write_page(this, "tiny", [], np.zeros(300), np.arange(300))
    data = page_data(tmp_path)
    assert data["training"] == {} and not any("map" in feature for feature in data["features"])
    assert data["contexts"] == this.contexts[:, :-1].tolist()
