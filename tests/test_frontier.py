"""What is explained at which L0, beside PCA and the largest entries; steering beside a difference of means."""

import copy
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import analyze
from analyze import Point
from conftest import script
from sae import SAEConfig, SparseAutoencoder, load_sae, save_sae
from test_analyses import V, activations_at, by_hand, load, numbers_in, random_run

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def loss_by_hand(gpt, site, contexts, replacement=None):
    """Mean cross-entropy in nats of a float64 model on contexts (N, T + 1), with an array at the site."""
    def hook(name, x):
        return torch.from_numpy(replacement) if replacement is not None and name == site else None
    logits = gpt(contexts[:, :-1], hook=hook)[0].numpy()
    logits = logits - logits.max(2, keepdims=True)
    chosen = np.take_along_axis(logits, contexts[:, 1:, None].numpy(), 2)[..., 0]
    return (np.log(np.exp(logits).sum(2)) - chosen).mean()


# -----------------------------------------------------------------------------
# without a dictionary


@pytest.mark.parametrize("site", ["mlp.0", "resid.0", "attn.1"])
def test_pca_and_the_largest_entries_explain_and_recover_what_plain_numpy_says(tmp_path, site):
    """
    Components by an SVD of the training text's activations; all in float64, judged on the held-out contexts, of which
    there are two batches of unequal size.
    """
    this, _ = random_run(tmp_path, site, tokens=np.random.default_rng(0).integers(0, V, 5000))
    assert len(this.held_out) == 624
    exact = copy.deepcopy(this.gpt).double()
    text = torch.from_numpy(np.tile(np.arange(V), 100))  # what made_run wrote
    text = text[:len(text) // 8 * 8].view(-1, 8)
    trained = activations_at(exact, text, site).reshape(len(text) * 8, -1)
    x = activations_at(exact, this.held_out[:, :-1], site)
    width = x.shape[2]
    mean = trained.mean(0)
    _, _, rows = np.linalg.svd(trained - mean, full_matrices=False)
    plain = loss_by_hand(exact, site, this.held_out)
    zero = plain + 0.5  # what zero-ablation costs is given: random weights may do better without
    variance = ((x - x.mean((0, 1))) ** 2).sum()

    found = analyze.principal_components(this, 10**6)
    ks = [1, 3, width // 2, width]
    other = "neurons" if site == "mlp.0" else "entries"
    points = analyze.baseline_points(this, {"loss_plain": plain, "loss_zero_ablated": zero}, *found, ks)
    assert [point.name for point in points] == [f"{curve}, k = {k}" for k in ks for curve in ("PCA", other)]
    for point in points:
        k = int(point.name.split()[-1])
        if point.curve == "PCA":
            x_hat = mean + (x - mean) @ rows[:k].T @ rows[:k]
            l0 = k
        else:
            x_hat = np.zeros_like(x)
            for place in np.ndindex(x.shape[:2]):
                largest = sorted(range(width), key=lambda j: -abs(x[place][j]))[:k]
                x_hat[place][largest] = x[place][largest]
            l0 = (x_hat != 0).sum(2).mean()
        assert point.l0 == pytest.approx(l0)
        assert point.variance_explained == pytest.approx(1 - ((x - x_hat) ** 2).sum() / variance, abs=1e-4)
        spliced = loss_by_hand(exact, site, this.held_out, x_hat)
        assert point.loss_recovered == pytest.approx((zero - spliced) / (zero - plain), abs=1e-3)
        if k == width:
            assert point.variance_explained == pytest.approx(1, abs=1e-5)
            assert point.loss_recovered == pytest.approx(1, abs=1e-4)
    explained = [[point.variance_explained for point in points[way::2]] for way in (0, 1)]
    assert explained[0] == sorted(explained[0]) and explained[0][1] > explained[1][1]


def test_components_come_by_variance_and_the_mean_is_taken_off(tmp_path):
    """Entries of x with standard deviations 1, 3, 2 about 5: each is a direction, the second is the first."""
    this, _ = random_run(tmp_path, "resid.0")
    x = np.random.default_rng(0).standard_normal((20_000, 3)) * [1, 3, 2] + 5
    this.trained_x = lambda *_: iter(torch.from_numpy(x).float().split(3000))
    mean, directions = analyze.principal_components(this, 20_000)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(directions.abs(), np.eye(3)[[1, 2, 0]], atol=0.05)


# -----------------------------------------------------------------------------
# at one L0


def test_at_a_wanted_l0_a_curve_is_linear_in_log_l0_between_its_runs():
    """Halfway in log L0 between 4 and 16 lies 8; at a run itself it is the run's; beyond all of them there is nothing."""
    few = Point("small", "a", 4.0, 0.6, 0.8, 512, 8.0, 0.0)
    some = Point("small", "b", 16.0, 0.8, None, 512, 4.0, 0.1)
    many = Point("small", "c", 32.0, 0.85, 0.9, 512, 2.0, 0.2)
    found = analyze.at_l0([few, some, many], 8.0)
    assert (found.curve, found.l0, found.n_features) == ("small", 8.0, 512)
    assert found.variance_explained == pytest.approx(0.7) and found.l1_coeff == pytest.approx(6.0)
    assert found.loss_recovered is None
    assert analyze.at_l0([few, many], 32.0).loss_recovered == pytest.approx(0.9)
    assert analyze.at_l0([few, some, many], 4.0).variance_explained == pytest.approx(0.6)
    third = analyze.at_l0([few, some, many], 16 * 2 ** (1 / 3))
    assert third.variance_explained == pytest.approx(0.8 + 0.05 / 3)
    assert analyze.at_l0([few, some], 17.0) is analyze.at_l0([few, some], 3.9) is None
    dead = Point("small", "d", 0.0, 0.0, 0.0, 512, 99.0, 1.0)
    assert 0 < analyze.at_l0([dead, few], 2.0).variance_explained < 0.6
    assert analyze.at_l0([dead, few], 0.0).variance_explained == 0


def test_the_best_at_an_l0_comes_first_though_a_run_of_another_size_explains_more_elsewhere():
    points = [Point("PCA", "", k, k / 100, 0.0) for k in (8, 2, 64)]
    points += [Point("large", "", l0, 0.5 + l0 / 100, 0.0, 4096, 1.0) for l0 in (40.0, 5.0)]
    points += [Point("small", "", l0, 0.6, 0.0, 512, 1.0) for l0 in (3.0, 30.0)]
    points += [Point("single", "", 20.0, 0.99, 0.0, 2048, 1.0)]
    curves = analyze.curves_of(points)
    assert list(curves) == ["small", "single", "large", "PCA"]
    assert [point.l0 for point in curves["PCA"]] == [2, 8, 64]
    assert [point.curve for point in analyze.best_at(curves, 6.0)] == ["small", "large", "PCA"]
    assert [point.curve for point in analyze.best_at(curves, 29.0)] == ["large", "small", "PCA"]
    assert analyze.best_at(curves, 20.0)[0].curve == "single"
    assert analyze.best_at(curves, 100.0) == []


def test_what_has_no_meaning_is_called_undefined_and_left_out_of_the_picture(tmp_path, capsys):
    """As where zero-ablation costs the model nothing, or where all is dead."""
    points = [Point("9 features", "a", 4.0, 0.5, None, 9, 1.0), Point("9 features", "b", 0.0, None, None, 9, 2.0)]
    curves = analyze.curves_of(points + [Point("PCA", "PCA, k = 2", 2.0, 0.3, None)])
    analyze.draw_frontier(SimpleNamespace(folder=tmp_path), curves)
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    analyze.print_points(points)
    assert re.findall(r"^[ab] .*", capsys.readouterr().out, re.M) == [
        "a         9       1     4.0               0.500       undefined",
        "b         9       2     0.0           undefined       undefined"]


def test_a_curve_is_named_by_its_size_and_by_what_the_first_run_was_not_told():
    def run(n_features, **flags):
        flags = {"recipe": "a", "pre_bias": "auto", "max_iters": 10, "l1_coeff": 1.0, "seed": 0} | flags
        return SimpleNamespace(n_features=n_features, sae=SimpleNamespace(extra={"args": flags}))
    first = run(2048)
    assert analyze.curve_name(first, first) == "2,048 features"
    assert analyze.curve_name(run(512, l1_coeff=3.0, seed=1), first) == "512 features"
    assert analyze.curve_name(run(2048, recipe="b"), first) == "2,048 features, recipe b"
    assert analyze.curve_name(run(2048, pre_bias="yes", max_iters=5), first) == "2,048 features, pre_bias yes, max_iters 5"
    other = run(2048, dead_steps=9, decoder_norm=0.5)
    assert analyze.curve_name(other, first) == "2,048 features, decoder_norm 0.5, dead_steps 9"
    # what a checkpoint is too old to say is the default
    assert analyze.curve_name(run(2048, dead_steps=None, decoder_norm=0.15), first) == "2,048 features"
    assert analyze.curve_name(first, run(2048, decoder_norm=0.5)) == "2,048 features, decoder_norm 0.15"


# -----------------------------------------------------------------------------
# as users run it


@pytest.fixture(scope="module")
def swept(trained, tmp_path_factory):
    """The tiny model with autoencoders of two sizes at three thresholds each, as if of three lambdas; some of no use."""
    out = tmp_path_factory.mktemp("swept") / "out"
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("acts"))
    whole = load_sae(out / "sae/scaling/sae.pt")
    for size in (48, 96):
        for l1_coeff, lower in ((2.0, 0.0), (4.0, 0.5), (9.0, 1.5)):
            sae = SparseAutoencoder(SAEConfig(64, size))
            sae.scale.copy_(whole.scale)
            with torch.no_grad():
                sae.W_enc.copy_(whole.W_enc[:, :size])
                sae.W_dec.copy_(whole.W_dec[:size])
                sae.b_enc.copy_(whole.b_enc[:size] - lower)
                sae.b_dec.copy_(whole.b_dec)
            args = whole.extra["args"] | {"l1_coeff": l1_coeff, "n_features": size}
            log = [{"dead": 0.9}, {"dead": l1_coeff / 80}]
            saved(out, f"m{size}-{l1_coeff:g}", sae, whole.extra["source"], args, log)
    source = whole.extra["source"]
    saved(out, "unknown", whole, source, {"seed": 0})
    saved(out, "other", whole, source | {"gpt": "another"}, whole.extra["args"])
    saved(out, "resid", SparseAutoencoder(SAEConfig(16, 20)), source | {"site": "resid.0"}, whole.extra["args"])
    return out


def saved(out, name, sae, source, args, log=()):
    """Writes an autoencoder as train_sae.py would."""
    (out / "sae" / name).mkdir()
    save_sae(out / "sae" / name / "sae.pt", sae, source=source, args=args, log=list(log))


NAMES = [f"m{size}-{l1_coeff}" for size in (96, 48) for l1_coeff in (9, 2, 4)]


def test_frontier_prints_draws_and_saves_runs_beside_what_needs_no_dictionary(swept):
    with mock.patch.object(analyze, "load_run", wraps=analyze.load_run) as load_run:
        done = script("analyze.py", "frontier", f"--names={','.join(NAMES)}", f"--out_dir={swept}", "--device=cpu")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [call.args[2] for call in load_run.call_args_list] == NAMES  # each once
    numbers = numbers_in(swept / "sae/m96-9/frontier.json")
    assert (swept / "sae/m96-9/frontier.png").stat().st_size > 1000
    points = {point["name"]: point for point in numbers["points"]}
    ks = [1, 2, 4, 8, 16, 32, 64]
    # small before large, L0 rising; what needs none last
    assert list(points)[:6] == [f"m{size}-{l1_coeff}" for size in (48, 96) for l1_coeff in (9, 4, 2)]
    assert set(list(points)[6:]) == {f"{curve}, k = {k}" for curve in ("PCA", "neurons") for k in ks}
    assert numbers["l0"] is None and numbers["at_l0"] == [] and "at L0" not in done.stdout
    assert points["PCA, k = 64"]["loss_recovered"] == pytest.approx(1, abs=1e-4)
    this = load(swept)
    judged = this.held_out[:, :-1]
    assert numbers["tokens"] == judged.numel() > 300
    for name in NAMES:
        sae = load_sae(swept / "sae" / name / "sae.pt")
        x = activations_at(this.gpt, judged, this.site)
        f, directions, _ = by_hand(sae, x)
        x_hat = f @ directions + sae.b_dec.detach().double().numpy() / sae.scale.item()
        explained = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean((0, 1))) ** 2).sum()
        point = points[name]
        assert point["l0"] == pytest.approx((f > 0).sum(2).mean(), rel=1e-3)
        assert point["variance_explained"] == pytest.approx(explained, abs=1e-3)
        size, l1_coeff = name[1:].split("-")
        assert point["dead"] == float(l1_coeff) / 80
        cells = [name, size, l1_coeff, f"{point['l0']:.1f}", f"{point['variance_explained']:.3f}",
                 f"{point['loss_recovered']:.3f}", f"{point['dead']:.2%}"]
        row, = re.findall("^" + " +".join(map(re.escape, cells)) + "(.*)$", done.stdout, re.M)
        # of what is not on the first run's curve, what that curve has at the same L0
        there = ""
        if size == "48" and points["m96-9"]["l0"] <= point["l0"] <= points["m96-2"]["l0"]:
            first = [points[f"m96-{l}"] for l in (9, 4, 2)]
            there = "  " + " and ".join(
                f"{np.interp(np.log(point['l0']), [np.log(p['l0']) for p in first], [p[key] for p in first]):.3f}"
                for key in ("variance_explained", "loss_recovered"))
        assert row == there
    assert re.search(r"^m48-.* and 0\.\d+$", done.stdout, re.M) and " 96 features at this L0\n" in done.stdout


def test_of_a_long_text_frontier_takes_evenly_spread_contexts(swept):
    """Of N contexts of 32 tokens every third, to have no more than a third of the tokens."""
    n_contexts = len(load(swept).held_out)
    few = (n_contexts * 32 // 3 + 1,)
    with mock.patch.object(analyze.show_frontier, "__defaults__", few):
        with mock.patch.object(analyze, "measure", wraps=analyze.measure) as measure:
            done = script("analyze.py", "frontier", "--name=m96-2", f"--out_dir={swept}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    judged = measure.call_args.args[0].held_out
    assert torch.equal(judged, load(swept).held_out[::3]) and n_contexts > 6
    assert numbers_in(swept / "sae/m96-2/frontier.json")["tokens"] == judged.shape[0] * 32


def test_frontier_says_what_is_best_at_one_l0(swept):
    """By hand from the runs' own values, linear in log L0 between the two around it."""
    command = ("analyze.py", "frontier", f"--names={','.join(NAMES)}", f"--out_dir={swept}", "--device=cpu")
    script(*command)
    before = numbers_in(swept / "sae/m96-9/frontier.json")["points"]
    wanted = np.mean(sorted(point["l0"] for point in before if point["n_features"] == 96)[:2])
    done = script(*command, f"--l0={wanted}")
    assert done.returncode == 0, done.stderr
    table = done.stdout.split(f"\nat L0 {wanted:g}, linear in log L0")[1]
    rows = re.findall(r"^(\d+ features|PCA|neurons) +", table, re.M)
    at = {point["curve"]: point for point in numbers_in(swept / "sae/m96-9/frontier.json")["at_l0"]}
    for curve in ("96 features", "48 features", "PCA", "neurons"):
        mine = sorted((p for p in before if p["curve"] == curve), key=lambda p: p["l0"])
        l0s = [point["l0"] for point in mine]
        if not l0s[0] <= wanted <= l0s[-1]:
            assert curve not in at
            continue
        k = next(k for k in range(len(l0s)) if l0s[k] > wanted)
        share = np.log(wanted / l0s[k - 1]) / np.log(l0s[k] / l0s[k - 1])
        for key in ("variance_explained", "loss_recovered"):
            expected = (1 - share) * mine[k - 1][key] + share * mine[k][key]
            assert at[curve][key] == pytest.approx(expected)
            assert f"{expected:.3f}" in table
    assert "96 features" in at and rows == list(at)
    explained = [point["variance_explained"] for point in at.values()]
    assert explained == sorted(explained, reverse=True)
    missing = table.split("\nnot between two runs")[1] if len(at) < 4 else ""
    for curve in ("96 features", "48 features", "PCA", "neurons"):
        l0s = sorted(point["l0"] for point in before if point["curve"] == curve)
        line = f"\n  {curve}, L0 {', '.join(f'{l0:.1f}' for l0 in l0s)}\n"
        assert (line in missing) == (curve not in at)
    done = script(*command, "--l0=1000")
    assert done.returncode == 0 and "\nat L0 1000" not in done.stdout
    for curve in ("96 features", "48 features", "PCA", "neurons"):
        assert f"\n  {curve}, L0 " in done.stdout.split("\nnot between two runs at L0 1000 (")[1]


def test_a_curve_of_one_run_has_no_column_beside_the_others(swept):
    done = script("analyze.py", "frontier", "--names=m96-9,m48-4", f"--out_dir={swept}", "--device=cpu")
    assert done.returncode == 0 and "dead\n" in done.stdout and "at this L0" not in done.stdout


@pytest.mark.parametrize("names, words", [
    ("scaling,resid", ["resid", "site", "scaling"]),
    ("scaling,other", ["other", "gpt.pt"]),
    ("scaling,unknown", ["unknown", "lambda"]),
    ("unknown,scaling", ["unknown", "lambda"]),
    ("scaling,nobody", ["nobody", "train_sae.py"]),
])
def test_runs_that_cannot_be_compared_are_one_line(swept, names, words):
    done = script("analyze.py", "frontier", f"--names={names}", f"--out_dir={swept}", "--device=cpu")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words)


# -----------------------------------------------------------------------------
# steering along a difference of means


def test_the_difference_of_means_is_plain_numpys(tmp_path):
    """Each text's mean over its tokens counts once, however long the text is; of a marked one that token."""
    this, _ = random_run(tmp_path, "mlp.1")
    having, lacking = ["foo bar", "foo", "foo« bar» baz"], ["bar baz foo", "baz", "x"]

    def read(text):
        idx = torch.tensor([this.tokenizer.encode_ordinary(text)])
        return activations_at(this.gpt, idx, "mlp.1")[0]
    assert len(read("foo bar baz")) == 3
    with_it = np.mean([read("foo bar").mean(0), read("foo").mean(0), read("foo bar baz")[1]], 0)
    expected = with_it - np.mean([read(text).mean(0) for text in lacking], 0)
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(analyze.difference_of_means(this, having, lacking), expected, atol=1e-5)
    np.testing.assert_allclose(analyze.difference_of_means(this, lacking, having), -expected, atol=1e-5)


@pytest.mark.parametrize("input_norm", ["dataset", "token"])
def test_pushes_along_the_means_are_as_long_as_the_clamps(tmp_path, input_norm):
    this, _ = random_run(tmp_path, "resid.0", input_norm=input_norm)
    vector = analyze.difference_of_means(this, ["foo"], ["bar"])
    x = torch.randn(2, 5, 8)
    for value in (-1.0, 2.5):
        own = analyze.clamp(this, [3], value)("resid.0", x) - x
        along = analyze.clamp(this, [3], value, vector[None])("resid.0", x) - x
        np.testing.assert_allclose(along.norm(dim=2), own.norm(dim=2), rtol=1e-4)
        signs = own @ this.sae.W_dec[3]
        np.testing.assert_allclose(along, signs[..., None] * vector, rtol=1e-3, atol=1e-5)


def test_steer_compares_with_the_difference_of_means_in_probability_and_in_the_loss(swept):
    """The table's numbers are those of hooks made by hand; in the texts each clamp is followed by its push."""
    this = load(swept)
    x = activations_at(this.gpt, this.contexts[:, :-1], this.site)
    f = by_hand(this.sae, x)[0]
    i = int(f.max((0, 1)).argmax())
    command = ("analyze.py", "steer", f"--feature={i}", "--value=-1,2", f"--out_dir={swept}", "--device=cpu")
    plain = script(*command)
    assert plain.returncode == 0 and "means" not in plain.stdout
    done = script(*command, "--vector", "return self", "self.total", "--without", "def add", "--target=self")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    result, = numbers_in(swept / "sae/scaling/steer.json")["features"]

    contexts = this.contexts[::max(1, len(this.contexts) // 16)]
    own = torch.from_numpy(by_hand(this.sae, activations_at(this.gpt, contexts[:, :-1], this.site))[0][..., [i]]).float()
    largest = float(f[..., i].max())
    vector = analyze.difference_of_means(this, ["return self", "self.total"], ["def add"])
    token = this.tokenizer.encode_ordinary("self")[0]

    def outcome(multiple, direction):
        def hook(site, x):
            return x + (multiple * largest - own) * direction if site == this.site else None
        logits, _ = this.gpt(contexts[:, :-1], hook=hook if multiple is not None else None)
        loss = F.cross_entropy(logits.flatten(0, 1).double(), contexts[:, 1:].flatten()).item()
        return pytest.approx(logits.softmax(2)[..., token].mean().item(), rel=1e-3), pytest.approx(loss, rel=1e-4)
    assert (result["unsteered"], result["loss"]) == outcome(None, None)
    assert result["cosine"] == pytest.approx(float(vector @ this.sae.W_dec[i]), abs=1e-5)
    directions = analyze.random_directions(this, 20, 1337)
    for row in result["clamped"]:
        assert (row["probability"], row["loss"]) == outcome(row["multiple"], this.sae.W_dec[i])
        assert (row["vector_probability"], row["vector_loss"]) == outcome(row["multiple"], vector)
        losses = [outcome(row["multiple"], direction)[1].expected for direction in directions]
        assert row["random_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert row["random_loss_spread"] == pytest.approx(np.std(losses, ddof=1), rel=1e-2)
        cells = [f"{row['multiple']:+g} x max", f"{row['probability']:.5f}", f"{row['vector_probability']:.5f}",
                 f"{row['random_mean']:.5f} ± {row['random_spread']:.5f}", f"{row['loss']:.3f}",
                 f"{row['vector_loss']:.3f}", f"{row['random_loss']:.3f} ± {row['random_loss_spread']:.3f}"]
        assert re.search(" +".join(map(re.escape, cells)) + "$", done.stdout, re.M), done.stdout
    names = re.findall(r"\n\n +(unsteered|\S+ x max|along means)  ", done.stdout)
    assert names == ["unsteered", "-1 x max", "along means", "+2 x max", "along means"]
    assert f"cosine of feature {i} with the means: {result['cosine']:+.2f}\n" in done.stdout


@pytest.mark.parametrize("flags, words", [
    (["--vector", "self"], ["--vector", "--without"]),
    (["--without", "self"], ["--vector", "--without"]),
    (["--vector", "self", "--without", ""], ["0 tokens"]),
    (["--vector", "self", "--without", "self"], ["--vector", "same"]),
])
def test_a_difference_needs_texts_with_and_without(swept, flags, words):
    done = script("analyze.py", "steer", "--feature=0", *flags, f"--out_dir={swept}", "--device=cpu")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words)
