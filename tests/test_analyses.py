"""What the papers do with the features: each against slow references and planted data, then as users run it."""

import copy
import json
import math
import re
import shutil
from collections import defaultdict
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import analyze
import train_sae
from conftest import SMALL_GPT, SMALL_SAE, script
from model import GPT, GPTConfig, bpe_tokenizer, save_checkpoint, save_tokenizer
from sae import SAEConfig, SparseAutoencoder, load_sae, own_source, save_sae
from test_scripts import hashes

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a user would see numpy's warnings, too

WORDS = (b"foo", b" foo", b" bar", b" baz")  # tokens besides the 256 bytes and the end of text
TOKENIZER = bpe_tokenizer({bytes([i]): i for i in range(256)} | {word: 256 + i for i, word in enumerate(WORDS)})
V = TOKENIZER.n_vocab


# -----------------------------------------------------------------------------
# models and autoencoders made by hand, on disk as the scripts leave them

def load(out):
    """What analyze.py's commands are given as their run."""
    given = []
    command = analyze.Command(lambda run, args: given.append(run), kinds=("model", "own", "toy"))
    with mock.patch.dict(analyze.COMMANDS, feature=command):
        done = script("analyze.py", "feature", f"--out_dir={out}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    return given[0]


def made_run(out, gpt, sae, site, tokens):
    """Writes an out_dir with this model, autoencoder and held-out tokens, and loads it. No token is rare in training."""
    (out / "sae/scaling").mkdir(parents=True)
    save_tokenizer(out / "tokenizer.json", TOKENIZER)
    np.asarray(tokens, dtype=np.uint16).tofile(out / "val.bin")
    np.tile(np.arange(V, dtype=np.uint16), 100).tofile(out / "train.bin")
    (out / "data.json").write_text("{}")
    save_checkpoint(out / "gpt.pt", model=gpt.state_dict(), config=asdict(gpt.config))
    save_sae(out / "sae/scaling/sae.pt", sae, source={"site": site, "gpt": gpt.fingerprint()}, args={"seed": 0})
    return load(out)


def random_run(out, site="mlp.0", recipe="scaling", input_norm="dataset", tokens=range(200), block_size=8):
    """A run of random weights, none of them 0 or 1, and its autoencoder before it was folded."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size, V, n_layer=2, n_head=2, n_embd=8))
    sae = SparseAutoencoder(SAEConfig(gpt.site_width(site), 14, recipe, input_norm))
    with torch.no_grad():
        for p in gpt.parameters():
            p += 0.3 * torch.randn_like(p)
        sae.scale.fill_(3.0)
        sae.W_enc += 0.2 * torch.randn_like(sae.W_enc)
        sae.b_enc.uniform_(-0.5, 0.5)
        sae.b_dec.uniform_(-0.3, 0.3)
    return made_run(out, gpt, sae, site, tokens), sae


def lookup_run(out, text, table):
    """
    A run whose feature k has activation table[t, k] at every token t, whatever stands around it: the residual stream
    of its model is the token's one-hot vector.
    """
    torch.manual_seed(0)
    gpt, sae = GPT(GPTConfig(32, V, 1, 1, V)), SparseAutoencoder(SAEConfig(V, table.shape[1], "towards", "none"))
    with torch.no_grad():
        for p in (gpt.wpe.weight, gpt.blocks[0].attn_proj.weight, gpt.blocks[0].mlp_proj.weight):
            p.zero_()
        gpt.wte.weight.copy_(torch.eye(V))
        sae.W_enc.copy_(torch.from_numpy(table))
    return made_run(out, gpt, sae, "resid.0", TOKENIZER.encode_ordinary(text))


def fires(features, n_features=300):
    """{feature: {token as text: activation}} -> table for lookup_run (V, n_features)."""
    table = np.zeros((V, n_features))
    for k, activations in features.items():
        for text, value in activations.items():
            t, = TOKENIZER.encode_ordinary(text)
            table[t, k] = value
    return table


def by_hand(sae, x):
    """x (..., n) raw -> f_i ||W_dec_i|| (..., m), directions (m, n), what one unit of f adds along them (..., 1)."""
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, name).detach().double().numpy()
                                  for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    norms, scale = np.linalg.norm(W_dec, axis=1), np.full(x.shape[:-1] + (1,), sae.scale.item())
    if sae.config.input_norm == "token":
        scale = np.sqrt(x.shape[-1]) / np.linalg.norm(x, axis=-1, keepdims=True)
    f = np.maximum((x * scale - b_dec * sae.config.pre_bias) @ W_enc + b_enc, 0) * norms
    if sae.config.input_norm == "token":
        return f, W_dec / norms[:, None], 1 / scale
    return f / scale, W_dec / norms[:, None], np.ones_like(scale)


def activations_at(gpt, idx, site):
    """What the model's hook shows at a site: (B, T, n) float64."""
    kept = {}
    gpt(idx, hook=lambda name, x: kept.update({name: x}))
    return kept[site].double().numpy()


def all_by_hand(this):
    """Every feature and every neuron of the first MLP on every held-out token: (m, tokens), (n_neurons, tokens)."""
    x, neurons = (activations_at(this.gpt, this.contexts[:, :-1], site) for site in (this.site, "mlp.0"))
    return by_hand(this.sae, x)[0].reshape(-1, this.n_features).T, neurons.reshape(-1, neurons.shape[2]).T


# -----------------------------------------------------------------------------
# cause: ablation and attribution

IDX = torch.randint(V, (3, 8), generator=torch.Generator().manual_seed(0))
P, TARGETS = torch.tensor([7, 0, 4]), torch.tensor([5, 250, 31])


def contrast_by_hand(gpt, site, b, changes, at=None, baseline=None):
    """
    Logit of TARGETS[b] over the mean logit (or a baseline's) at token P[b] of IDX[b] after each of changes (k, n) to it
    (or to the token `at`) -> (k,).
    """
    def hook(name, x):
        if name == site:
            x = x.clone()
            x[:, P[b] if at is None else at] += torch.from_numpy(changes)
            return x
    logits = gpt(IDX[b].expand(len(changes), -1), hook=hook)[0][:, P[b]].numpy()
    return logits[:, TARGETS[b]] - (logits.mean(1) if baseline is None else logits[:, baseline])


@pytest.mark.parametrize("recipe, input_norm", [("scaling", "dataset"), ("towards", "token")])
@pytest.mark.parametrize("site", ["attn.0", "mlp.0", "resid.0", "attn.1", "mlp.1", "resid.1"])
def test_ablation_is_a_pass_without_the_feature_and_attribution_its_slope(tmp_path, site, recipe, input_norm):
    """Against float64 passes without f_i W_dec_i at one token, the error kept, and against a central difference."""
    this, sae = random_run(tmp_path, site, recipe, input_norm)
    e, exact = analyze.effects(this, IDX, P, TARGETS), copy.deepcopy(this.gpt).double()
    x, n_active = activations_at(exact, IDX, site), 0
    for b in range(3):
        f, directions, unit = by_hand(sae, x[b, P[b]])
        on, mine = np.flatnonzero(f), np.flatnonzero(e.row == b)
        mine = mine[np.argsort(e.feature[mine])]
        assert e.feature[mine].tolist() == on.tolist()  # each active one once, none that is off
        parts = f[on, None] * directions[on] * unit
        plain = contrast_by_hand(exact, site, b, 0 * parts[:1])
        ablation = plain - contrast_by_hand(exact, site, b, -parts)
        slope = sum(sign * contrast_by_hand(exact, site, b, sign * 1e-4 * parts) for sign in (1, -1)) / 2e-4
        np.testing.assert_allclose(e.activation[mine], f[on], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(e.ablation[mine], ablation, rtol=1e-3, atol=1e-4 * np.abs(ablation).max())
        np.testing.assert_allclose(e.attribution[mine], slope, rtol=1e-3, atol=1e-4 * np.abs(slope).max())
        n_active += len(on)
    assert 0 < n_active == len(e.row) < 3 * sae.config.n_features


@pytest.mark.parametrize("site", ["attn.0", "mlp.0", "resid.0", "mlp.1"])
def test_ablation_is_that_of_the_difference_of_two_logits_from_every_earlier_token(tmp_path, site):
    """Each pair of a token up to P[b] and a feature once; what is active after the last block at another token: 0."""
    this, sae = random_run(tmp_path, site)
    baselines = torch.tensor([9, 3, 200])
    e = analyze.effects(this, IDX, P, TARGETS, baselines, everywhere=True)
    exact, pairs = copy.deepcopy(this.gpt).double(), []
    x = activations_at(exact, IDX, site)
    for b in range(3):
        for at in range(P[b] + 1):
            f, directions, unit = by_hand(sae, x[b, at])
            on = np.flatnonzero(f)
            mine = np.flatnonzero((e.row == b) & (e.position == at))
            mine = mine[np.argsort(e.feature[mine])]
            assert e.feature[mine].tolist() == on.tolist()
            parts = f[on, None] * directions[on] * unit
            def after(changes):
                return contrast_by_hand(exact, site, b, changes, at, baselines[b])
            ablation, slope = after(0 * parts) - after(-parts), (after(1e-4 * parts) - after(-1e-4 * parts)) / 2e-4
            np.testing.assert_allclose(e.activation[mine], f[on], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(e.ablation[mine], ablation, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(e.attribution[mine], slope, rtol=1e-3, atol=1e-5)
            assert len(on) and (np.abs(ablation) > 1e-3).any() == (site != "mlp.1" or at == P[b])
            pairs += [(b, at, i) for i in on]
    assert sorted(zip(e.row, e.position, e.feature)) == sorted(pairs) and len(pairs) > 40


@pytest.mark.parametrize("site, first", [("mlp.0", 0), ("mlp.1", 3)])
def test_cause_of_a_prompt_lists_every_token_that_can_reach_the_last(tmp_path, site, first):
    """From the last block none but the last token can. The logits are those of the two tokens that were named."""
    this, _ = random_run(tmp_path, site, tokens=TOKENIZER.encode_ordinary(LINE * 33))
    prompt, target, baseline = (TOKENIZER.encode_ordinary(text) for text in ("foo bar, baz", " foo", "\n"))
    done = script("analyze.py", "cause", "--prompt=foo bar, baz", "--target= foo", "--baseline=\n", "--show=999",
                  f"--out_dir={tmp_path}", "--device=cpu")
    assert done.returncode == 0 and len(prompt) == 4, done.stderr
    chances = this.gpt(torch.tensor([prompt]))[0][0, -1].softmax(0)
    assert f"' foo' with probability {chances[target[0]]:.3f}\n" in done.stdout
    assert f"against '⏎' with {chances[baseline[0]]:.3f}, by feature" in done.stdout
    last, target, baseline = torch.tensor([3]), torch.tensor(target), torch.tensor(baseline)
    e = analyze.effects(this, torch.tensor([prompt]), last, target, baseline, everywhere=True)
    expected = {(at, i): [f, a, effect] for _, at, i, f, a, effect in zip(*vars(e).values()) if at >= first}
    rows = re.findall(r"(\S+) +(\S+) +(\S+) +(\d) '(.*)' +feature (\d+) ", done.stdout)
    assert [token for *_, token, _ in rows] == [["foo", " bar", ",", " baz"][int(row[3])] for row in rows]
    printed = {(int(row[3]), int(row[5])): [float(value) for value in row[:3]] for row in rows}
    assert printed.keys() == expected.keys() and len(printed) == len(rows) and {at for at, _ in printed} == {*range(first, 4)}
    for pair in printed:
        assert printed[pair] == pytest.approx(expected[pair], abs=6e-3)
    sizes = [abs(float(row[2])) for row in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_correlations_are_pearsons_and_spearmans_with_shared_ranks():
    """Equal values share the mean of their ranks; what is constant correlates with nothing."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 6, 50).astype(np.float32)
    b = a**5 + rng.integers(0, 60, 50)
    pearson, rank = analyze.correlations(a, b)
    assert pearson == pytest.approx(np.corrcoef(a, b)[0, 1])
    ranks = [[(v < value).sum() + (v == value).sum() / 2 for value in v] for v in (a, b)]
    assert rank == pytest.approx(np.corrcoef(*ranks)[0, 1]) and abs(rank - pearson) > 0.01
    assert analyze.correlations(a, 0 * b) == analyze.correlations(a[:1], b[:1]) == (None, None)


def test_the_strongest_features_in_common_are_counted_token_by_token():
    """
    Of 12 features those with effects 12, -11, ..., 3 are the ten strongest. Attribution has the same magnitudes, but for
    the weakest that is its strongest; activation has the opposite order. The second token has only ten features.
    """
    sizes = np.arange(12.0, 0, -1)
    ablation = sizes * np.where(np.arange(12) % 2, -1, 1)
    attribution = -ablation
    attribution[11] = 99
    columns = [np.append(a, np.ones(10)) for a in (13 - sizes, attribution, ablation)]
    order = np.random.default_rng(0).permutation(22)
    row, feature = np.append(np.full(12, 4), np.full(10, 7)), np.arange(22)
    found = analyze.Effects(*(a[order] for a in (row, 0 * row, feature, *columns)))
    assert analyze.top_overlaps(found) == pytest.approx(
        {"tokens": 1, "attribution": 9.0, "activation": 8.0, "chance": 100 / 12})
    few = analyze.Effects(*(a[row == 7] for a in (row, 0 * row, feature, *columns)))
    assert analyze.top_overlaps(few) == {"tokens": 0, "attribution": None, "activation": None, "chance": None}


@pytest.mark.parametrize("site", ["mlp.1", "resid.1"])
def test_attribution_is_ablation_where_all_that_follows_is_linear(tmp_path, site):
    this, _ = random_run(tmp_path, site)
    e = analyze.effects(this, IDX, P, TARGETS)
    assert np.abs(e.attribution - e.ablation).max() > 0.003 * np.abs(e.ablation).max()  # the last LayerNorm is not
    this.gpt.ln_f = torch.nn.Identity()
    e = analyze.effects(this, IDX, P, TARGETS)
    np.testing.assert_allclose(e.attribution, e.ablation, rtol=1e-3, atol=1e-4 * np.abs(e.ablation).max())


def test_what_raises_all_logits_alike_has_no_effect(tmp_path):
    """One vector added to every row of the unembedding adds the same to every logit: effects are about their mean."""
    this, _ = random_run(tmp_path)
    before = analyze.effects(this, IDX, P, TARGETS)
    this.gpt.lm_head.weight += torch.randn(8)
    after = analyze.effects(this, IDX, P, TARGETS)
    np.testing.assert_allclose(after.ablation, before.ablation, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(after.attribution, before.attribution, rtol=1e-3, atol=1e-4)


def test_where_no_feature_is_active_there_are_no_effects(tmp_path):
    this, _ = random_run(tmp_path)
    this.sae.b_enc.fill_(-1e6)
    e = analyze.effects(this, IDX, P, TARGETS)
    assert {name: len(values) for name, values in vars(e).items()} == dict.fromkeys(vars(e), 0)


# -----------------------------------------------------------------------------
# steer and search

@pytest.mark.parametrize("recipe, input_norm", [("scaling", "dataset"), ("towards", "token")])
@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_clamping_replaces_one_activation_and_keeps_the_error(tmp_path, value, recipe, input_norm):
    """x becomes decode(f with f_i = value) + x - decode(f)."""
    this, sae = random_run(tmp_path, "resid.0", recipe, input_norm)
    x = torch.randn(2, 5, 8)
    f, directions, unit = by_hand(sae, x.double().numpy())
    assert 0 < (f[..., :5] > 0).mean() < 1
    for i in range(5):
        hook, clamped = analyze.clamp(this, [i], value), f.copy()
        clamped[..., i] = value
        expected = x.double().numpy() + (clamped @ directions - f @ directions) * unit
        np.testing.assert_allclose(hook("resid.0", x), expected, rtol=1e-4, atol=1e-5)
        for site in ("resid.1", "mlp.0"):
            y = hook(site, x)
            assert y is None or torch.equal(y, x)


@pytest.mark.parametrize("text, read", [
    ("foo bar", " bar"), ("« foo» bar", " foo"), ("é 世«界 foo» bar baz", " foo"), ("é «foo» bar baz", " foo"),
    ("é 世界 «fo»o baz", " foo"), ("«zap» foo", "p"), ("ü« bar\n» 世", "\n")])
def test_search_reads_the_token_of_the_last_marked_character_and_the_mean_over_the_text(tmp_path, text, read):
    """Each token has a feature of its own, so the scores tell which was read; several texts are averaged."""
    table = np.diag(1 + np.arange(V) / 100)
    this = lookup_run(tmp_path, "foo bar baz\n" * 20, table)
    ids = TOKENIZER.encode_ordinary(re.sub("[«»]", "", text))
    at, = [t for t in ids if TOKENIZER.decode([t]) == read]
    expected = table[at] + table[ids].mean(0)
    scores, n_active = analyze.search_scores(this, [text])
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert set(np.flatnonzero(n_active)) == set(ids) and n_active.max() == 1
    x = table[ord("x")]  # a text of one token: read, and the mean
    scores, n_active = analyze.search_scores(this, [text, "x"])
    np.testing.assert_allclose(scores, (expected + 2 * x) / 2, rtol=1e-5, atol=1e-6)
    assert n_active.sum() == len(set(ids)) + 1


@pytest.mark.parametrize("rival", [
    dict.fromkeys(["x", "y", "z", "~", " foo", " bar", " baz"], 5.0), {" foo": 3.0, " baz": 3.0}],
    ids=["everywhere", "in one of the texts without"])
def test_search_finds_a_concept_behind_stronger_features_that_texts_without_it_have_too(tmp_path, rival):
    this = lookup_run(tmp_path, "foo bar baz\n" * 20, fires({7: {" foo": 1.0}, 280: rival}))
    texts, without = ["x foo", "~ bar« foo» bar"], ["x bar", "y bar baz", "~ bar", "z"]
    assert analyze.search_scores(this, texts)[0].argmax() == 280
    scores, n_active = analyze.search_scores(this, texts, without)
    assert scores.argmax() == 7 and np.flatnonzero(n_active).tolist() == [7]


def test_search_lists_what_all_texts_have_first_and_nothing_that_a_text_without_has(tmp_path):
    """
    Feature 3 is strongest, but on one of three texts; 5 is on two of them, 7 and 8 on all, 8 the stronger; 9 is on
    all, and in the middle of a text without the concept just so.
    """
    table = fires({3: {"x": 9.0}, 5: {"x": 5.0, "y": 5.0}, 7: dict.fromkeys("xyz", 1.0), 8: dict.fromkeys("xyz", 2.0),
                   9: dict.fromkeys("xyz", 8.0) | {"~": 0.01}})
    lookup_run(tmp_path, "foo bar baz xyz\n" * 20, table)
    texts, without = ("x foo", "« y» bar", "z"), ("foo bar", "foo ~ bar")
    printed = analyzed(tmp_path, "search", *texts, "--without", *without)
    assert re.findall(r"feature (\d+) .*active on (\d) of 3 texts", printed) == [
        ("8", "3"), ("7", "3"), ("5", "2"), ("3", "1")]
    hits = numbers_in(tmp_path / "sae/scaling/search.json")["hits"]
    assert [[i, n] for i, _, n in hits] == [[8, 3], [7, 3], [5, 2], [3, 1]]
    # of x, " ", "foo": the last is 0, so a third of 9; of y, marked, 0 at the others: averaged over three texts
    ids = [TOKENIZER.encode_ordinary(re.sub("[«»]", "", text)) for text in texts]
    by_hand = {8: 2 / len(ids[0]) + 2 + 2 / len(ids[1]) + 4, 3: 9 / len(ids[0])}
    assert {i: score for i, score, _ in hits if i in by_hand} == pytest.approx({i: v / 3 for i, v in by_hand.items()})
    printed = analyzed(tmp_path, "search", *texts, "--show=2")
    assert re.findall(r"feature (\d+) ", printed) == ["9", "8"]


def test_search_prints_the_planted_feature_first_and_says_when_there_is_none(tmp_path):
    lookup_run(tmp_path, "foo bar baz\n" * 20, fires({7: {" foo": 1.0}, 280: {" bar": 1.0, " foo": 0.5}}))
    done = script("analyze.py", "search", "x foo", "y« foo» bar", f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert [int(i) for i in re.findall(r"feature (\d+) ", done.stdout)] == [7, 280]
    done = script("analyze.py", "search", "xyz", f"--out_dir={tmp_path}")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("no feature is active there\n") and "feature 0" not in done.stdout


def test_steer_measures_what_follows_in_the_text_not_what_the_feature_writes(tmp_path):
    """
    Feature 7 is on " foo" alone, which " bar" follows, and writes "~". So " bar" becomes no likelier, "~" does, and
    random directions do neither.
    """
    this = lookup_run(tmp_path, "foo bar foo bar baz foo, " * 40, fires({7: {" foo": 1.0}}))
    bar, tilde = (TOKENIZER.encode_ordinary(text)[0] for text in (" bar", "~"))
    this.sae.W_dec[7] = torch.nn.functional.one_hot(torch.tensor(tilde), V)
    this.gpt.lm_head.weight.copy_(3 * torch.eye(V))
    assert analyze.logit_effects(this, this.sae.W_dec[7:8]).argmax() == tilde
    acts = this.activations([7])[0]
    assert analyze.following_token(this, acts) == bar
    contexts, directions = this.contexts[:2], analyze.random_directions(this, 20, 0)
    for token, raised in ((bar, False), (tilde, True)):
        result = analyze.steered(this, 7, acts, token, [0, 20], contexts, directions)
        nothing, much = result["clamped"]
        assert nothing["multiple"] == 0 and much["multiple"] == 20 and result["feature"] == 7
        assert (much["probability"] > 10 * result["unsteered"]) == raised
        assert (much["probability"] > much["random_mean"] + 5 * much["random_spread"]) == raised


def test_features_are_counted_that_move_their_token_further_than_random_directions_do():
    """Two standard deviations are 0.2 about 0.5, and 0.02 about 0.1."""
    def row(probability, mean, spread):
        return {"multiple": 2, "probability": probability, "random_mean": mean, "random_spread": spread}
    rows = [row(0.71, 0.5, 0.1), row(0.69, 0.5, 0.1), row(0.13, 0.1, 0.01), row(0.29, 0.5, 0.1), row(0.31, 0.5, 0.1)]
    results = [{"clamped": [row(0.5, 0.5, 0.0) | {"multiple": 0}, chosen]} for chosen in rows]
    assert analyze.beyond_random(results) == [
        {"multiple": 0, "higher": 0, "lower": 0}, {"multiple": 2, "higher": 2, "lower": 1}]


# -----------------------------------------------------------------------------
# correlations, and what tokens explain

def correlations(a, b):
    """Those of the rows of a (k, n) with those of b (l, n) -> (k, l), by analyze.unit_columns."""
    a, b = [analyze.unit_columns(torch.from_numpy(rows).t()) for rows in (a, b)]
    return (a.t() @ b).numpy()


@pytest.mark.parametrize("n", [2, 1000, 20_011])
def test_correlations_are_numpys_even_far_from_zero(n):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((5, n))
    b = rng.standard_normal((3, n)) + np.stack([a[0], -2 * a[1], 0 * a[2]])
    a, b = (1e3 + a).astype(np.float32), (300 * b - 1e5).astype(np.float32)
    expected = np.corrcoef(a.astype(np.float64), b.astype(np.float64))[:5, 5:]
    np.testing.assert_allclose(correlations(a, b), expected, atol=2e-4)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_correlations_do_not_depend_on_the_unit(scale):
    a, b = np.random.default_rng(0).random((2, 3, 1000))
    expected = np.corrcoef(a, b)[:3, 3:]
    found = correlations((scale * a).astype(np.float32), b.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.1])
def test_what_is_constant_correlates_with_nothing(constant):
    a = np.random.default_rng(0).standard_normal((2, 10_001)).astype(np.float32)
    b = np.stack([np.full(10_001, constant, dtype=np.float32), a[0]])
    found = correlations(a, b)
    np.testing.assert_allclose(found[:, 0], 0, atol=0.1)
    assert found[0, 1] == pytest.approx(1, abs=1e-4)
    assert np.abs(correlations(b[:1], b[:1])).max() <= 1.001  # 0 by 0 is finite, too


def explained_by_hand(tokens, acts):
    """tokens, acts (contexts, T): means learned on contexts 0, 2, 4 ..., R^2 on 1, 3, 5 ... -> given token, pair."""
    def keys(c, t):
        return (tokens[c, t - 1] if t else "nothing", tokens[c, t]), tokens[c, t], "any"
    seen = defaultdict(list)
    for c in range(0, len(tokens), 2):
        for t in range(tokens.shape[1]):
            for key in keys(c, t):
                seen[key].append(acts[c, t])
    truth, guesses = [], ([], [])
    for c in range(1, len(tokens), 2):
        for t in range(tokens.shape[1]):
            truth.append(acts[c, t])
            for guess, names in zip(guesses, (keys(c, t)[1:], keys(c, t))):
                guess.append(np.mean(seen[next(name for name in names if name in seen)]))
    truth = np.array(truth)
    return [1 - ((truth - guess) ** 2).sum() / ((truth - truth.mean()) ** 2).sum() for guess in map(np.array, guesses)]


def test_explained_by_tokens_is_a_dictionary_of_means_learned_on_even_and_judged_on_odd_contexts(tmp_path):
    """Rare tokens make odd contexts hold tokens and pairs that were never seen; each context starts after nothing."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.08, (61, 7)), 200)
    assert set(tokens[1::2].flat) - set(tokens[::2].flat)
    this, _ = random_run(tmp_path, tokens=[*tokens.flat, 0], block_size=7)
    noise, strength = rng.random((4, 61, 7)), rng.random(201)
    pair = strength[tokens] * strength[np.roll(tokens, 1, axis=1)]
    acts = [strength[tokens] + 0.3 * noise[0], pair + 0.1 * noise[1], noise[2], strength[tokens] * (noise[3] > 0.9)]
    acts = np.stack(acts).astype(np.float32)
    found = analyze.explained_by_tokens(this, acts.reshape(4, -1))
    expected = [explained_by_hand(tokens, row.astype(np.float64)) for row in acts]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_means_given_tokens_predict_every_place_of_the_contexts_that_are_judged(tmp_path):
    """Against a dictionary; of a token that was not seen the mean of all, of a pair that of its token."""
    rng = np.random.default_rng(1)
    tokens = np.minimum(rng.geometric(0.1, (60, 5)), 200)
    this, _ = random_run(tmp_path, tokens=[*tokens.flat, 0], block_size=5)
    acts = (rng.standard_normal((3, 60, 5)) * (rng.random((3, 60, 5)) < 0.4)).astype(np.float32)
    by_token, by_pair = analyze.means_given_tokens(this, acts.reshape(3, -1))
    judge = this.token_pairs[0][1::2]
    unseen = set()
    for i in range(3):
        seen = defaultdict(list)
        for c in range(0, 60, 2):
            for t in range(5):
                previous = tokens[c, t - 1] if t else None
                for key in ((), (tokens[c, t],), (previous, tokens[c, t])):
                    seen[key].append(acts[i, c, t])
        for k, c in enumerate(range(1, 60, 2)):
            for t in range(5):
                keys = [(), (tokens[c, t],), (tokens[c, t - 1] if t else None, tokens[c, t])]
                unseen |= {len(key) for key in keys if key not in seen}
                token, pair = (np.mean(seen[[key for key in keys[:n] if key in seen][-1]]) for n in (2, 3))
                assert by_token[i, judge[k, t]] == pytest.approx(token, abs=1e-6)
                assert by_pair[i, judge[k, t]] == pytest.approx(pair, abs=1e-6)
    assert unseen == {1, 2}


@pytest.mark.parametrize("kind, expected", [("token", (1, 1)), ("pair", (0, 1)), ("noise", (0, 0))])
def test_what_the_token_or_the_pair_decides_is_explained_and_noise_is_not(tmp_path, kind, expected):
    """0 0 1 1 0 holds every pair once, so in "is it the token before again?" a token tells nothing, a pair all."""
    tokens = np.tile([0, 0, 1, 1, 0], (400, 1))
    acts = {"token": 1 + 2.0 * tokens, "pair": np.tile([0.5, 1, 0, 1, 0], (400, 1)),
            "noise": np.random.default_rng(0).random((400, 5))}[kind].astype(np.float32)
    this, _ = random_run(tmp_path, tokens=[*tokens.flat, 0], block_size=5)
    found, = analyze.explained_by_tokens(this, acts.reshape(1, -1))
    np.testing.assert_allclose(found, expected, atol=0.02 if kind == "noise" else 1e-9)


# -----------------------------------------------------------------------------
# neurons

@pytest.mark.parametrize("site, sites, words", [
    ("mlp.1", ["mlp.1"], "the 32 neurons of the same layer"),
    ("resid.0", ["mlp.0"], "the 32 neurons of all layers before (0)"),
    ("resid.1", ["mlp.0", "mlp.1"], "the 64 neurons of all layers before (0, 1)"),
    ("attn.1", ["mlp.0"], "the 32 neurons of all layers before (0)")])
def test_features_are_compared_with_the_neurons_that_come_before_the_site(tmp_path, site, sites, words):
    """Highest correlations, and R^2 of the whole range and of the highest activations, of all features and neurons."""
    tokens = np.random.default_rng(0).integers(0, 5, 8 * 20 + 1)
    this, sae = random_run(tmp_path, site, tokens=tokens)
    idx = this.contexts[:, :-1]
    neurons = np.concatenate([activations_at(this.gpt, idx, name).reshape(160, -1).T for name in sites])
    np.testing.assert_allclose(this.neurons().T, neurons, rtol=1e-4, atol=1e-5)
    printed, numbers = analyzed(tmp_path, "neurons"), numbers_in(tmp_path / "sae/scaling/neurons.json")
    x = activations_at(this.gpt, idx, site).reshape(160, -1)
    features = by_hand(sae, x)[0].T
    features = features[features.any(1)]
    highest = np.corrcoef(features, neurons[neurons.any(1)])[:len(features), len(features):].max(1)
    assert numbers["share_at_most_03"] == pytest.approx((highest <= 0.3).mean())
    assert (numbers["site"], numbers["against"], numbers["n_neurons"]) == (site, sites, len(neurons))
    assert f"{len(features)} alive features of {site} against {words}:\n" in printed

    directions = np.random.default_rng(1337).standard_normal((x.shape[1], 256)).astype(np.float32)
    kinds = {"features": features, "neurons": neurons, "random directions": (x @ directions).T}
    density = np.median((features > 0).mean(1))
    assert numbers["density"] == pytest.approx(density)
    for kind, rows in kinds.items():
        cut = [np.maximum(row - np.quantile(row, 1 - density), 0) for row in rows]
        for name, values in (("whole", rows), ("cut", cut)):
            values = [row.reshape(20, 8) for row in values]
            scores = [explained_by_hand(idx.numpy(), row) for row in values if row[1::2].std() > 1e-9]
            assert numbers["explained"][kind][name] == pytest.approx(np.median(scores, axis=0), abs=2e-3), (kind, name)
        line, = [line.split() for line in printed.splitlines() if line.startswith(f"  {kind}")]
        whole, cut = numbers["explained"][kind].values()
        assert line[-4:] == [f"{value:.2f}" for value in (whole[0], cut[0], whole[1], cut[1])]


@pytest.mark.parametrize("factor", [1, 1e18])
def test_the_closest_is_that_of_the_highest_pearson_correlation(factor):
    """Of what is active seldom, often, never, and always as much, which correlates with nothing."""
    rng = np.random.default_rng(0)
    acts = np.maximum(rng.standard_normal((6, 400)) - [[1.5], [2], [0], [-1], [9], [9]], 0)
    acts[5] = 3.0
    columns = rng.standard_normal((400, 7)) + 5
    columns[:, 4] += 3 * acts[2]
    columns = columns * factor
    exact = np.corrcoef(acts[:4], columns.T)[:4, 4:]
    others = analyze.unit_columns(torch.from_numpy(columns.astype(np.float32)))
    found = analyze.closest((acts * factor).astype(np.float32), others)
    np.testing.assert_allclose(found, [*exact.max(1), 0, 0], atol=1e-5)
    assert found[2] > 0.7


def test_at_attn_0_no_neuron_comes_before_and_the_page_says_nothing_of_them(tmp_path):
    this, _ = random_run(tmp_path, "attn.0", tokens=np.random.default_rng(0).integers(0, V, 2000), block_size=30)
    done = script("analyze.py", "neurons", f"--out_dir={tmp_path}")
    assert done.returncode == 2 and "attn.0, which no neuron comes before" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    analyze.write_page(this, "tiny", [], np.zeros(14), np.arange(14))
    html = (tmp_path / "sae/scaling/features.html").read_text(encoding="utf-8")
    data = json.loads(re.search('id="data">(.*?)</script>', html, re.S).group(1))
    alive = [feature for feature in data["features"] if "examples" in feature]
    assert len(alive) > 5 and {feature["neuron_correlation"] for feature in alive} == {None}


def test_scores_of_what_is_never_active_are_left_out_of_the_median_and_of_the_cumulative_shares():
    scores = np.array([[0.1, 0.2], [np.nan, np.nan], [0.3, 0.8], [0.2, 0.3]])
    assert analyze.median_scores(scores) == pytest.approx([0.2, 0.3])
    assert analyze.median_scores(scores[1:2]) == [None, None]
    ax = mock.Mock()
    analyze.draw_explained(ax, {"features": {"whole": scores, "cut": scores[1:2]}})
    (values, shares, _), (none, *_) = [call.args for call in ax.plot.call_args_list]
    assert values.tolist() == [0.2, 0.3, 0.8] and shares.tolist() == [0, 0.5, 1] and len(none) == 0


# -----------------------------------------------------------------------------
# compare

def masked_by_hand(a, b):
    """a (k, tokens), b (l, tokens) -> cosines (k, l) on the tokens where a's is active, and where b's is; 0: never."""
    by_a, by_b = np.zeros((2, len(a), len(b)))
    for i, ours in enumerate(a):
        for j, theirs in enumerate(b):
            for found, where in ((by_a, ours > 0), (by_b, theirs > 0)):
                lengths = np.linalg.norm(ours[where]) * np.linalg.norm(theirs[where])
                found[i, j] = ours[where] @ theirs[where] / lengths if lengths else 0
    return by_a, by_b


@pytest.mark.parametrize("sparse", [False, True])
def test_masked_cosines_are_those_on_the_tokens_of_one_of_the_two(sparse):
    rng = np.random.default_rng(0)
    a, b = (np.maximum(rng.standard_normal((n, 50)), 0) * (rng.random((n, 1)) > 0.2) for n in (7, 9))
    a[2] = 3 * b[4] * (b[4] < np.median(b[4][b[4] > 0]))  # a part of another, and in proportion to it
    assert not a.any(1).all() and not b.any(1).all()
    left, right = torch.from_numpy(a).float(), torch.from_numpy(b).float()
    found = analyze.masked_cosines(left.to_sparse_csr() if sparse else left, right)
    expected = masked_by_hand(a, b)
    for values, exact in zip(found, expected):
        np.testing.assert_allclose(values, exact, atol=1e-5)
    assert found[0][2, 4] == pytest.approx(1) and 0.1 < found[1][2, 4] < 0.9


def test_a_feature_that_is_split_into_three_has_three_and_shuffled_none(tmp_path):
    """
    Of the small dictionary 0 is active on three tokens and split into 4, 5, 7 of the large one, 1 is 2 of the large one
    at another scale, 2 has no counterpart and 3 is dead. All other directions are random in 261 dimensions.
    """
    tokens = {" foo": 1.0, " bar": 2.0, " baz": 0.5}
    text = np.random.default_rng(0).choice([*tokens, *"abcdefghijklmnopqrstu"], 8000)
    small = fires({0: tokens, 1: {"a": 1.0, "b": 0.5}, 2: {"c": 1.0}}, 4)
    pieces = {k: {name: value} for k, (name, value) in zip((4, 5, 7), tokens.items())}
    large = fires(pieces | {2: {"a": 4.0, "b": 2.0}, 6: {"d": 1.0}}, 8)
    this = lookup_run(tmp_path, "".join(text), small)
    sae, wide = (SparseAutoencoder(SAEConfig(V, m, "towards", "none")) for m in (4, 8))
    with torch.no_grad():
        wide.W_dec[[4, 5, 7]] += 2 * sae.W_dec[0]
        wide.W_dec[2] = sae.W_dec[1]
        wide.normalize_decoder()
        sae.W_enc.copy_(torch.from_numpy(small))
        wide.W_enc.copy_(torch.from_numpy(large))
    (tmp_path / "sae/large").mkdir()
    for name, made in (("scaling", sae), ("large", wide)):
        save_sae(tmp_path / f"sae/{name}/sae.pt", made, source=this.source, args={"seed": 0})
    printed = analyzed(tmp_path, "compare", "scaling", "large")
    kinds = numbers_in(tmp_path / "sae/scaling/compare.json")["kinds"]
    assert {kind: found["counts"] for kind, found in kinds.items()} == {
        "directions": [2, 1, 0, 1],
        "masked_by_small": [2, 2],  # " bar", of twice the activation, holds 4 / 5.25 of the energy
        "masked_by_large": [2, 1, 0, 1],
        "masked_by_small_shuffled": [4],
        "masked_by_large_shuffled": [4]}
    ours, theirs = small[this.tokens].T, large[this.tokens].T
    for kind, exact in zip(("masked_by_small", "masked_by_large"), masked_by_hand(ours, theirs)):
        highest = exact.max(1)
        assert kinds[kind]["median"] == pytest.approx(np.median(highest), abs=1e-5)
        assert kinds[kind]["shares"] == pytest.approx({c: (highest > float(c)).mean() for c in ("0.5", "0.7", "0.9")})
        assert kinds[f"{kind}_shuffled"]["shares"] == {"0.5": 0, "0.7": 0, "0.9": 0}
    line, = [line.split() for line in printed.splitlines() if line.startswith("  masked by large  ")]
    assert line[-7:] == ["2", "1", "0", "1", "0", "0", "0"]
    first = re.search(r"feature 0 .*\n.*masked by small.*\n(.*\n.*\n.*\n)", printed).group(1)
    listed = {int(re.search(r"feature (\d+)", line).group(1)): line.split()[2] for line in first.splitlines()}
    assert listed == {4: "1.00", 5: "1.00", 7: "1.00"}
    assert (tmp_path / "sae/scaling/compare.png").stat().st_size > 1000


def test_features_with_many_alike_are_counted_in_groups():
    assert analyze.in_groups(np.array([0, 0, 1, 4, 5, 9, 10, 400])) == [2, 1, 0, 0, 1, 2, 2]


# -----------------------------------------------------------------------------
# complete and scaling

LINE = "foo bar foo, baz\n"  # six tokens: "foo", " bar", " foo", ",", " baz", end of line


def test_a_word_is_where_its_last_token_is(tmp_path):
    """Words of one token and of several, after characters of several bytes, at marks and at line ends."""
    text = "foo (bar) é世 quux foo\nbaz_quux foo1 fooquux naïve " * 12
    this, path = lookup_run(tmp_path, text, np.zeros((V, 4))), tmp_path / "words.txt"
    path.write_text("foo quux bar\nfooquux nowhere oo")
    pieces = [TOKENIZER.decode_single_token_bytes(t) for t in this.tokens]
    bounded = [b"\n" * (p % 32 == 0) + piece for p, piece in enumerate(pieces)]  # contexts are of different places
    places = analyze.word_places(this, str(path))
    assert set(places) == {"foo", "quux", "bar", "fooquux"}
    for word, positions in places.items():
        expected = []
        for match in re.finditer(rb"(?<![A-Za-z])%b(?![A-Za-z])" % word.encode(), b"".join(bounded)):
            expected.append(next(p for p in range(len(pieces)) if len(b"".join(bounded[:p + 1])) >= match.end()))
        assert list(positions) == expected and len(expected) > 5
    assert {pieces[p] for p in places["quux"]} == {b"x"} and {pieces[p] for p in places["foo"]} == {b"foo", b" foo"}


def test_no_word_goes_from_one_context_into_the_next(tmp_path):
    """Of a text of letters alone each context of 32 tokens is one word."""
    this = lookup_run(tmp_path, "quxz" * 100, np.zeros((V, 4)))
    ends = sorted(position for positions in analyze.find_words(this).values() for position in positions)
    assert ends == [*range(31, len(this.tokens), 32)] and len(ends) > 2


def test_without_a_file_words_are_those_that_occur_three_times(tmp_path):
    text = "qu fo fo " + "foo\n" * 20 + "fo qu\n" + "foo\n" * 39
    this = lookup_run(tmp_path, text, np.zeros((V, 4)))
    n_foo = sum(TOKENIZER.decode([t]).strip() == "foo" for t in this.tokens)
    places = analyze.word_places(this, "")
    assert {word: len(positions) for word, positions in places.items()} == {"fo": 3, "foo": n_foo} and n_foo > 40


def test_words_of_one_half_alone_are_left_out(tmp_path):
    """Contexts of 32 tokens, 16 times a word and a comma: bar is in contexts 0 and 2, baz in 1 and 3, foo in 4 and 5."""
    text = " bar," * 16 + " baz," * 16 + " bar," * 16 + " baz," * 16 + " foo," * 32 + "~"
    this = lookup_run(tmp_path, text, np.zeros((V, 4)))
    assert len(this.contexts) == 6
    (tmp_path / "words.txt").write_text("foo bar baz")
    for path in ("", str(tmp_path / "words.txt")):
        places = analyze.word_places(this, path)
        assert list(places) == ["foo"]
        even, odd = analyze.halves(this, places["foo"])
        assert even.tolist() == list(range(128, 160, 2)) and odd.tolist() == list(range(160, 192, 2))


def test_the_best_detector_of_a_word_has_the_f1_that_one_counts_by_hand(tmp_path):
    """
    On 32 lines, six contexts: feature 290 is " bar" alone. Feature 7 leaks, but at 0.3 of its maximum. Feature 5 has
    half of the foos and fires at two wrong tokens for each: F1 = 2 right / (2 right + wrong + missed). Feature 11 is dead.
    """
    table = fires({290: {" bar": 2.0}, 7: {" baz": 1.0, ",": 0.3, "\n": 0.3}, 11: {"~": 1.0},
                   5: {" foo": 1.0, ",": 1.0, "\n": 1.0}})
    this = lookup_run(tmp_path, LINE * 33, table)
    assert len(this.tokens) == 32 * 6
    (tmp_path / "words.txt").write_text("foo bar baz")
    places = analyze.word_places(this, str(tmp_path / "words.txt"))
    f1, feature, alive = analyze.best_detectors(this, places)
    odd = [TOKENIZER.decode([t]) for t in this.tokens.reshape(6, 32)[1::2].flat]
    right, wrong, missed = odd.count(" foo"), odd.count(",") + odd.count("\n"), odd.count("foo")
    foo = round(2 * right / (2 * right + wrong + missed), 6)
    assert dict(zip(places, zip(feature, f1.round(6)))) == {"foo": (5, foo), "bar": (290, 1.0), "baz": (7, 1.0)}
    assert alive == 3 and 0.35 < foo < 0.45
    printed = analyzed(tmp_path, "complete", f"--words={tmp_path / 'words.txt'}", "--show=2")
    assert numbers_in(tmp_path / "sae/scaling/complete.json")["runs"]["scaling"]["found"] == pytest.approx(2 / 3)
    shown = printed[printed.index("F1\n") + 3:].splitlines()
    assert [line.split()[0] for line in shown] == ["bar", "baz", "wrote"]


def test_what_detects_a_word_in_the_half_that_chooses_is_judged_on_the_other(tmp_path):
    """In even contexts foo has a space before it, in odd ones none, and each has its feature: neither detects foo."""
    this = lookup_run(tmp_path, (" foo," * 16 + "foo," * 16) * 3 + "~", fires({5: {" foo": 1.0}, 6: {"foo": 2.0}}))
    f1, feature, _ = analyze.best_detectors(this, analyze.word_places(this, ""))
    assert (f1.tolist(), feature.tolist()) == ([0.0], [5])


def test_detectors_of_random_features_are_the_best_of_one_half_with_the_f1_of_the_other(tmp_path):
    """Against a loop over words, features, thresholds and positions; features of equal F1 may stand for one another."""
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(["ab", "cb", "db", "ac", "bc", "dc", "ad", "foo", "bar"], 300))
    table = rng.random((V, 300)) * (rng.random((V, 300)) < 0.5)
    this = lookup_run(tmp_path, text, table)
    places = analyze.word_places(this, "")
    f1, feature, _ = analyze.best_detectors(this, places)
    acts, odd = table[this.tokens], np.arange(len(this.tokens)) // 32 % 2 == 1
    differ = 0
    for word, judged, i in zip(places, f1, feature):
        there = np.isin(np.arange(len(this.tokens)), places[word])
        scores = []
        for j in range(300):
            for share in (0, 0.25, 0.5):
                fired = acts[:, j] > share * acts[~odd, j].max()
                of_halves = [2 * (fired & there)[h].sum() / (fired[h].sum() + there[h].sum()) for h in (~odd, odd)]
                scores.append((*of_halves, j))
        highest = max(scores)[0]
        best = [score for score in scores if score[0] == highest]
        assert i in [j for _, _, j in best]
        assert any(judged == pytest.approx(other) for _, other, j in best if j == i)
        differ += abs(judged - highest) > 1e-3
    assert len(places) > 5 and differ > 3


def test_the_midpoint_is_where_as_many_are_found_as_not():
    x = np.linspace(-3, 2, 60)
    middle = analyze.midpoint(x, 0.7, 1.8)
    low, high = -3.0, 2.0
    for _ in range(60):  # bisection
        centre = (low + high) / 2
        low, high = (low, centre) if 1 / (1 + math.exp(-0.7 - 1.8 * centre)) > 0.5 else (centre, high)
    assert middle == pytest.approx(10 ** low)
    assert analyze.midpoint(x, 0.0, -1.0) is None  # it falls
    assert analyze.midpoint(x, -40.0, 0.1) is None  # far from all that was seen
    assert analyze.midpoint(x, 0.0, 0.0) is None


def test_the_sigmoid_that_was_drawn_from_is_found():
    rng = np.random.default_rng(0)
    x = rng.uniform(-4, 3, 40_000)
    a, b = analyze.fit_sigmoid(x, (rng.random(40_000) < 1 / (1 + np.exp(-(0.7 + 1.8 * x)))).astype(float))
    assert a == pytest.approx(0.7, abs=0.1) and b == pytest.approx(1.8, abs=0.1)


@pytest.mark.parametrize("found", [lambda x: x > 0, lambda x: x > -9, lambda x: x > 9], ids=["some", "all", "none"])
def test_a_sigmoid_through_what_needs_none_is_finite_and_right(found):
    x = np.linspace(-2, 2.1, 50)
    a, b = analyze.fit_sigmoid(x, found(x).astype(float))
    assert math.isfinite(a) and math.isfinite(b)
    np.testing.assert_array_equal(a + b * x > 0, found(x))


def test_a_power_law_is_found():
    x = np.geomspace(3, 5e12, 9)
    assert analyze.power_law(x, 7.5 * x ** -0.4) == pytest.approx((7.5, -0.4))


def finished(size, rows, loss, rate=1e-3):
    """A run of width 1, so that compute is 12 size rows."""
    return analyze.Finished(1, size, rows, rate, loss, ())


def grid_of(loss_of, sizes, budgets):
    """Runs of every size for every budget of size x rows."""
    return [finished(size, budget // size, loss_of(size, budget // size)) for budget in budgets for size in sizes]


@pytest.mark.parametrize("alpha, beta", [(0.4, 0.3), (0.3, 0.5)])
def test_the_best_sizes_and_their_laws_are_those_of_a_law_with_a_known_optimum(alpha, beta):
    """
    L = a N^-alpha + b S^-beta at a budget B = N S is lowest where alpha a N^-alpha = beta b S^-beta, so at
    N = (alpha a / (beta b))^(1 / (alpha + beta)) B^(beta / (alpha + beta)).
    """
    a, b, budgets = 300.0, 200.0, [2**k for k in (20, 22, 24)]

    def loss_of(size, rows):
        return a * size**-alpha + b * rows**-beta
    runs = grid_of(loss_of, [2**k for k in range(5, 19)], budgets)
    runs += [finished(64, 2**18, 1e-3, 5e-3)]  # at another rate: it does not count
    laws, rate, best, rates = analyze.scaling_laws(runs)
    factor = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    assert rate == 1e-3 and rates == {} and list(best) == [12 * budget for budget in budgets]
    for budget, (size, loss) in zip(budgets, best.values()):
        optimum = factor * budget ** (beta / (alpha + beta))
        assert size == pytest.approx(optimum, rel=0.1)
        assert loss == pytest.approx(loss_of(optimum, budget / optimum), rel=3e-3)
    assert laws["n_features"][1] == pytest.approx(beta / (alpha + beta), abs=0.03)
    assert laws["steps x batch"][1] == pytest.approx(alpha / (alpha + beta), abs=0.03)
    assert laws["loss"][1] == pytest.approx(-alpha * beta / (alpha + beta), abs=2e-3)
    c, k = laws["steps x batch"]
    for compute, (size, _) in best.items():
        assert c * compute**k == pytest.approx(compute / (12 * size), rel=0.1)


def test_a_parabola_in_the_log_of_x_has_its_vertex_found_and_an_end_is_no_optimum():
    points = {x: 3 + 0.2 * math.log(x / 700) ** 2 for x in (4096, 256, 512, 1024, 128)}
    assert analyze.optimum(points) == pytest.approx((700, 3))
    assert analyze.optimum({x: loss for x, loss in points.items() if x <= 512}) is None
    assert analyze.optimum({x: loss for x, loss in points.items() if x >= 256}) == pytest.approx((700, 3))
    assert analyze.optimum({x: loss for x, loss in points.items() if x >= 512}) is None
    assert analyze.optimum({256: 3.0}) is None
    assert analyze.optimum({1: 2.0, 2: 2.0, 4: 2.0}) is None
    assert analyze.optimum({1: 3.0, 2: 2.0, 4: 2.0, 8: 9.0}) == pytest.approx((2 * 2**0.5, 1.875))


def test_budgets_with_one_size_or_the_best_at_an_end_have_no_best_size():
    runs = grid_of(lambda size, rows: 1 / size, [2, 4, 8], [64])
    runs += [finished(4, 1000, 0.5)] + grid_of(lambda size, rows: abs(size - 4) + 1, [2, 4, 8], [2**12])
    assert list(analyze.best_sizes(runs)) == [12 * 2**12]
    laws, *_ = analyze.scaling_laws(runs)
    assert laws == {}


def test_the_best_rate_is_that_of_the_best_size_that_was_swept_and_falls_as_planted():
    """At a budget B the loss is lowest at a rate of 0.3 B^-0.25; the rates of a worse size are best elsewhere."""
    runs = []
    for budget in (2**10, 2**13, 2**16):
        for k in range(3, 18):
            rate = 2.0**-k
            excess = 0.1 * math.log(rate / (0.3 * budget**-0.25)) ** 2
            runs.append(finished(8, budget // 8, 2 + excess, rate))
            runs.append(finished(16, budget // 16, 3 + math.log(rate / 0.01) ** 2, rate))
        runs.append(finished(32, budget // 32, 1.0, 0.25))  # the best of all, but not swept
    laws, _, _, rates = analyze.scaling_laws(runs)
    for compute, rate in rates.items():
        assert rate == pytest.approx(0.3 * (compute / 12) ** -0.25)
    assert len(rates) == 3 and laws["learning_rate"] == pytest.approx((0.3 * 12**0.25, -0.25))


# -----------------------------------------------------------------------------
# what is read, and how it is shown

@pytest.mark.parametrize("input_norm", ["dataset", "token"])
def test_with_center_analyses_clamp_ablate_and_measure_x_less_the_mean(tmp_path, input_norm):
    this, sae = random_run(tmp_path, "resid.0", "scaling", input_norm)
    sae.config.center = True
    sae.mean.copy_(torch.linspace(-20, 30, 8))
    save_sae(tmp_path / "sae/scaling/sae.pt", sae, **load_sae(tmp_path / "sae/scaling/sae.pt").extra)
    this = load(tmp_path)
    x = torch.randn(2, 5, 8) + sae.mean
    f, directions, unit = by_hand(sae, (x - sae.mean).double().numpy())
    np.testing.assert_allclose(this.sae.encode(x), f, rtol=1e-3, atol=1e-4)
    x_hat = f @ directions * unit + sae.b_dec.detach().numpy() * unit / (3 if input_norm == "dataset" else 1)
    np.testing.assert_allclose(this.sae(x) - sae.mean, x_hat, rtol=1e-3, atol=1e-4)
    for i in range(5):
        expected = x.numpy() + (2.5 - f[..., [i]]) * directions[i] * unit
        np.testing.assert_allclose(analyze.clamp(this, [i], 2.5)("resid.0", x), expected, rtol=1e-3, atol=1e-4)
    metrics, _, _ = analyze.measure(this)
    x = torch.cat([activations_at_float(this.gpt, batch) for batch in this.held_out.split(8)])
    error = (sae(x) - x).detach().double().square().sum()
    variance = (x.double() - x.double().mean(0)).square().sum()
    assert metrics["variance_explained"] == pytest.approx(1 - (error / variance).item(), rel=1e-4)


def activations_at_float(gpt, contexts):
    """Of resid.0, as rows (b T, n)."""
    return gpt.activations(contexts[:, :-1], "resid.0").flatten(0, 1)


@pytest.mark.parametrize("n_tokens, expected", [(10**6, range(25)), (8 * 5, [0, 5, 10, 15, 20]), (8 * 2, [0, 12]), (1, [0])])
def test_contexts_come_from_all_of_the_held_out_text(tmp_path, n_tokens, expected):
    random_run(tmp_path, tokens=range(207))  # 25 contexts of 8 tokens and one more that is a target only
    given = []
    with mock.patch.dict(analyze.COMMANDS, feature=analyze.Command(lambda run, args: given.append(run))):
        script("analyze.py", "feature", f"--out_dir={tmp_path}", f"--read_tokens={n_tokens}", f"--eval_tokens={n_tokens}")
    for contexts in (given[0].contexts, given[0].held_out):
        assert contexts.tolist() == [list(range(8 * k, 8 * k + 9)) for k in expected]


def test_a_character_of_several_tokens_is_shown_whole(tmp_path):
    this = lookup_run(tmp_path, "é 漢字 foo\n bar" * 20, fires({7: {" foo": 1.0}}))
    position = TOKENIZER.encode_ordinary("é 漢字 foo\n bar").index(TOKENIZER.encode_ordinary(" foo")[0])
    assert analyze.snippet(this, position, 40).strip().startswith("é 漢字« foo»⏎ baré 漢")
    assert analyze.token_text(this, *TOKENIZER.encode_ordinary("漢")) == "漢"
    parts = TOKENIZER.encode_ordinary("漢")
    assert [analyze.token_text(this, part) for part in parts] == ["\\xe6", "\\xbc", "\\xa2"]
    assert analyze.snippet(this, 4, 40).strip().startswith("é \\xe6«\\xbc»\\xa2字 foo")


@pytest.mark.parametrize("site", ["attn.1", "mlp.1", "resid.0"])
def test_raised_and_lowered_are_the_extremes_about_the_median_among_tokens_that_occur_in_training(tmp_path, site):
    """Tokens occur 99 or 100 times in training; those of 99 have the largest weights and are left out."""
    this, _ = random_run(tmp_path, site)
    text = np.repeat(np.arange(V, dtype=np.uint16), 100)
    rare = np.arange(0, V, 3)
    text = np.delete(text, 100 * rare)  # one of each
    np.random.default_rng(0).permutation(text).tofile(tmp_path / "train.bin")
    np.testing.assert_array_equal(this.token_counts, np.where(np.arange(V) % 3 == 0, 99, 100))
    this.gpt.lm_head.weight[rare] *= 20
    for i in (0, 5):
        weights = this.sae.W_dec[i].double().numpy()
        if site == "mlp.1":
            weights = this.gpt.blocks[1].mlp_proj.weight.double().numpy() @ weights
        weights = (weights - weights.mean()) * this.gpt.ln_f.weight.double().numpy()
        weights = this.gpt.lm_head.weight.double().numpy() @ weights * this.inverse_sigma
        weights = 2.5 * (weights - np.median(weights))
        order = [t for t in weights.argsort() if t % 3]
        assert not {*np.abs(weights).argsort()[-16:]} & {*order}  # all of these are rare
        _, (raised, lowered, _) = analyze.related(this, [1, i], [0.1, 2.5], 8)
        for found, expected in ((raised, order[:-9:-1]), (lowered, order[:8])):
            assert [token for token, _ in found] == expected
            np.testing.assert_allclose([value for _, value in found], weights[expected], rtol=1e-3, atol=1e-4)


def test_what_a_short_training_text_has_too_little_of_is_in_no_list_and_without_one_it_is_said(tmp_path):
    this = lookup_run(tmp_path, "bar foo\n" * 60, fires({7: {" foo": 1.0}}))
    often = [t for t in TOKENIZER.encode_ordinary(" foo bar\n")]
    np.array(often * 100 + [V - 1] * 99, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (*both, _), = analyze.related(this, [7], [1.0], 8)
    for pairs in both:
        assert sorted(token for token, _ in pairs) == sorted(often)
    (tmp_path / "train.bin").unlink()
    done = script("analyze.py", "feature", "7", f"--out_dir={tmp_path}", "--device=cpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "train.bin" in done.stderr and "train_gpt.py" in done.stderr


def test_the_bytes_that_a_feature_raises_are_told_apart_in_the_terminal_and_on_the_page(tmp_path, capsys):
    """A feature that raises the three tokens of a character and a backslash, each by another amount."""
    this = lookup_run(tmp_path, "bar foo\n" * 60, fires({7: {" foo": 1.0}}))
    raised = [*TOKENIZER.encode_ordinary("漢"), *TOKENIZER.encode_ordinary("\\")]
    this.gpt.lm_head.weight.zero_()
    space_foo, = TOKENIZER.encode_ordinary(" foo")
    with torch.no_grad():
        this.sae.W_dec[7] = torch.nn.functional.one_hot(torch.tensor(space_foo), V).float()
        for place, token in enumerate(raised):
            this.gpt.lm_head.weight[token, space_foo] = 9.0 - place
    analyze.print_feature(this, 7, this.activations([7])[0], n_tokens=4)
    line, = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("raises")]
    assert re.findall(r"'(\S+)' \+", line) == ["\\xe6", "\\xbc", "\\xa2", "\\"]
    analyze.write_page(this, "title", [], np.zeros(300), np.arange(300))
    page = (tmp_path / "sae/scaling/features.html").read_text(encoding="utf-8")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    shown = [data["vocabulary"][token] for token, _ in data["features"][7]["raised"][:4]]
    assert shown == ["\\xe6", "\\xbc", "\\xa2", "\\"]


# -----------------------------------------------------------------------------
# the page's data

@pytest.mark.parametrize("site, recipe, input_norm", [
    ("resid.0", "scaling", "dataset"), ("resid.0", "towards", "token"), ("mlp.1", "towards", "token"),
    ("attn.1", "scaling", "dataset")])
def test_the_page_tells_activations_and_the_effect_of_ablating_the_feature_on_the_whole_context(
        tmp_path, site, recipe, input_norm):
    """Every active token of every example: log-probability of the next token without the feature minus with it."""
    tokens = np.random.default_rng(0).integers(0, V, 2000)
    this, _ = random_run(tmp_path, site, recipe, input_norm, tokens, block_size=30)
    density = np.arange(14) / 1e6
    analyze.write_page(this, "tiny", [], density, np.arange(14))
    html = (tmp_path / "sae/scaling/features.html").read_text(encoding="utf-8")
    data = json.loads(re.search('id="data">(.*?)</script>', html, re.S).group(1))
    f, _ = all_by_hand(this)
    plain = this.gpt(this.contexts[:, :-1])[0].log_softmax(2).gather(2, this.contexts[:, 1:, None])[..., 0]
    checked = 0
    for i, d in enumerate(data["features"]):
        hook = analyze.clamp(this, [i], 0.0)
        without = this.gpt(this.contexts[:, :-1], hook=hook)[0].log_softmax(2).gather(2, this.contexts[:, 1:, None])
        change = (without[..., 0] - plain).flatten().numpy()
        assert d["density"] == pytest.approx(density[i]) and ("examples" in d) == f[i].any()
        for example in d.get("examples", ()):
            context, marked, active = (example[key] for key in ("context", "marked", "active"))
            start, end = example["window"]
            assert 0 <= start <= marked < end == start + 24 <= 30 and str(marked) in active
            whole = f[i, 30 * context:30 * context + 30]
            assert set(active) == {str(t) for t in np.flatnonzero(whole > 1e-6)}
            for t, (activation, *effect) in active.items():
                assert activation == pytest.approx(whole[int(t)], rel=6e-3)
                assert len(effect) == (start <= int(t) < end)
                if effect:
                    assert effect[0] == pytest.approx(change[30 * context + int(t)], rel=6e-3, abs=2e-5)
                    checked += 1
    assert checked > 300
    assert data["contexts"] == this.contexts[:, :-1].tolist()
    evenly = (0, 9, 18, 27, 37, 46, 55, 65)
    assert [text["tokens"] for text in data["texts"]] == [this.contexts[k, :-1].tolist() for k in evenly]
    for text in data["texts"]:
        k = this.contexts[:, :-1].tolist().index(text["tokens"])
        for t, features in enumerate(text["active"]):
            expected = {i: f[i, 30 * k + t] for i in np.flatnonzero(f[:, 30 * k + t] > 1e-6)}
            assert dict(features) == pytest.approx(expected, rel=6e-3)
            assert [v for _, v in features] == sorted((v for _, v in features), reverse=True)


# -----------------------------------------------------------------------------
# as a user runs them

def numbers_in(path):
    """A command's JSON, which must hold no NaN or Infinity: they are no JSON."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {path.name}"))


def trained_sae(out, *flags):
    done = script("train_sae.py", f"--out_dir={out}", *SMALL_SAE, *flags)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def out(trained, tmp_path_factory):
    """
    `trained` with a smaller autoencoder and, made from the first, one whose features are in another order, one that
    says of itself another lambda, one that says --resample, one that says --center, one that says another --start, one
    of somebody's own activations, one that is not finished, one without a held-out loss; beside it `twin`, trained from
    another seed.
    """
    out = tmp_path_factory.mktemp("runs") / "out"
    shutil.copytree(trained, out)
    trained_sae(out, "--name=small", "--n_features=48")
    sae = load_sae(out / "sae/scaling/sae.pt")
    for name in ("shuffled", "lambda1", "resampled", "own", "halted", "old", "centred", "apart"):
        shutil.copytree(out / "sae/scaling", out / f"sae/{name}")
    save_sae(out / "sae/lambda1/sae.pt", sae, **sae.extra | {"args": sae.extra["args"] | {"l1_coeff": 1.0}})
    save_sae(out / "sae/resampled/sae.pt", sae, **sae.extra | {"args": sae.extra["args"] | {"resample": [30]}})
    save_sae(out / "sae/halted/sae.pt", sae, **sae.extra | {"step": 40, "log": sae.extra["log"][:-1]})
    save_sae(out / "sae/old/sae.pt", sae, **sae.extra | {"log": [sae.extra["log"][0]]})
    sae.config.center = True
    save_sae(out / "sae/centred/sae.pt", sae, **sae.extra)
    sae.config.center, sae.config.start = False, "kaiming"
    save_sae(out / "sae/apart/sae.pt", sae, **sae.extra)
    sae.config.start = "transposed"
    np.save(out.parent / "own.npy", np.ones((40, 64), dtype=np.float32))
    source = own_source([str(out.parent / "own.npy")], out / "sae/own")
    save_sae(out / "sae/own/sae.pt", sae, **sae.extra | {"source": source})
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[:, order].clone())
        sae.b_enc.copy_(sae.b_enc[order].clone())
        sae.W_dec.copy_(sae.W_dec[order].clone())
    save_sae(out / "sae/shuffled/sae.pt", sae, **sae.extra)
    text, twin = trained.parent / "text.txt", out.parent / "twin"
    done = script("train_gpt.py", f"--out_dir={twin}", f"--dataset={text}", *SMALL_GPT, "--seed=7")
    assert done.returncode == 0, done.stderr
    trained_sae(twin, "--seed=7")
    return out


def log_of(out, name):
    return [json.loads(line) for line in (out / f"sae/{name}/log.jsonl").read_text().splitlines()]


def analyzed(out, *arguments):
    """Runs a command that must succeed -> what it printed."""
    done = script("analyze.py", *arguments, f"--out_dir={out}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_cause_measures_how_well_attribution_stands_for_ablation(out):
    """Its targets are the tokens that follow in the held-out text, its ranks those of a plain sort."""
    with mock.patch.object(analyze, "effects", wraps=analyze.effects) as effects:
        printed, numbers = analyzed(out, "cause"), numbers_in(out / "sae/scaling/cause.json")
    this, (_, idx, p, targets) = load(out), effects.call_args.args
    following = {tuple(context[:-1]): context for context in this.contexts.tolist()}
    assert [following[tuple(row)][at + 1] for row, at in zip(idx.tolist(), p)] == targets.tolist()
    e = analyze.effects(this, idx, p, targets)
    assert numbers["active_features"] == len(e.row) and numbers["tokens"] == len(idx) > 100

    def ranks(values):
        order = sorted(range(len(values)), key=values.__getitem__)
        return sorted(range(len(values)), key=order.__getitem__)
    for name in ("attribution", "activation"):
        values = getattr(e, name)
        for kind, a, b in (("pearson", values, e.ablation), ("rank", ranks(values), ranks(e.ablation))):
            assert numbers[name][kind] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-3)
            assert f"{kind} {numbers[name][kind]:+.3f}" in printed.lower()
    shares = {"attribution": [], "activation": [], "chance": []}
    for row in range(len(idx)):
        here = [k for k in range(len(e.row)) if e.row[k] == row]
        if len(here) > 10:
            tops = {name: set(sorted(here, key=lambda k: -abs(getattr(e, name)[k]))[:10])
                    for name in ("attribution", "activation", "ablation")}
            for name in ("attribution", "activation"):
                shares[name].append(len(tops[name] & tops["ablation"]))
            shares["chance"].append(10 * 10 / len(here))
    assert numbers["top_ten"].pop("tokens") == len(shares["chance"]) > 10
    for name, values in shares.items():
        assert numbers["top_ten"][name] == pytest.approx(np.mean(values), abs=0.02)
        assert f"{numbers['top_ten'][name]:.1f} {'by' if name == 'chance' else 'among ' + name}" in printed
    assert (out / "sae/scaling/cause.png").stat().st_size > 1000


def test_cause_lists_the_active_features_at_the_end_of_a_prompt_by_their_ablation_effect(out):
    this, prompt = load(out), "def add_7(self"
    printed = analyzed(out, "cause", f"--prompt={prompt}", "--target=,", "--show=96")
    idx = torch.tensor([this.tokenizer.encode_ordinary(prompt)])
    f = by_hand(this.sae, activations_at(this.gpt, idx, this.site)[0, -1])[0]
    rows = re.findall(r"(\d+\.\d+) +[-+]\d+\.\d+ +([-+]\d+\.\d+) .*feature (\d+)", printed)
    active = {int(i): float(value) for value, _, i in rows}
    assert active == pytest.approx({i: f[i] for i in np.flatnonzero(f)}, abs=6e-3) and len(rows) == len(active) > 1
    sizes = [abs(float(ablation)) for _, ablation, _ in rows]
    assert sizes == sorted(sizes, reverse=True) and "','" in printed


def test_steer_clamps_to_multiples_of_the_maximum_beside_pushes_of_equal_norm_along_random_directions(out):
    """The mean probability over all tokens of the one that follows the feature's examples most often, or of another."""
    this = load(out)
    f, _ = all_by_hand(this)
    dead = int(f.max(1).argmin())
    assert not f[dead].any()
    best = [int(i) for i in f.max(1).argsort()[:-3:-1]]
    printed = analyzed(out, "steer", f"--features={best[0]},{dead},{best[1]}", "--value=-1,0.5,3", "--read_tokens=700")
    numbers = numbers_in(out / "sae/scaling/steer.json")
    assert [row["feature"] for row in numbers["features"]] == best and f"feature {dead}  not active" in printed
    assert printed.count("+3 x max") == 3  # in the table and below it: of several there are no texts
    this.contexts = analyze.spread_contexts(torch.from_numpy(np.fromfile(out / "val.bin", np.uint16).astype(int)), 32, 700)
    f, _ = all_by_hand(this)
    directions = analyze.random_directions(this, 20, 1337)
    assert numbers["random_directions"] == len(directions) == 20
    np.testing.assert_allclose(directions.norm(dim=1), 1, rtol=1e-5)
    counts = []
    for k, multiple in enumerate((-1, 0.5, 3)):
        rows = [result["clamped"][k] for result in numbers["features"]]
        z = np.array([(row["probability"] - row["random_mean"]) / row["random_spread"] for row in rows])
        counts.append({"multiple": multiple, "higher": (z > 2).sum(), "lower": (z < -2).sum()})
        assert f"{multiple:+g} x max  likelier {(z > 2).sum()}, less likely {(z < -2).sum()}\n" in printed
    assert numbers["beyond_random"] == counts
    for result in numbers["features"]:
        i = result["feature"]
        token = analyze.following_token(this, f[i].astype(np.float32))
        assert result["token"] == analyze.token_text(this, token) and f"{i}  '{result['token']}'" in printed
        own = torch.from_numpy(f[i].reshape(-1, 32, 1)).float()

        def chance(multiple, direction):
            def hook(site, x):
                return x + (multiple * own.max() - own) * direction if site == this.site else None
            logits, _ = this.gpt(this.contexts[:, :-1], hook=hook if multiple is not None else None)
            return logits.softmax(2)[..., token].mean().item()
        assert result["unsteered"] == pytest.approx(chance(None, None), rel=1e-3)
        assert [row["multiple"] for row in result["clamped"]] == [-1, 0.5, 3]
        for row in result["clamped"]:
            assert row["probability"] == pytest.approx(chance(row["multiple"], this.sae.W_dec[i]), rel=1e-3)
            control = [chance(row["multiple"], direction) for direction in directions]
            assert row["random_mean"] == pytest.approx(np.mean(control), rel=1e-3)
            assert row["random_spread"] == pytest.approx(np.std(control, ddof=1), rel=1e-2)
            assert f"{row['probability']:.5f}  {row['random_mean']:.5f} ± {row['random_spread']:.5f}" in printed


def test_steer_of_one_feature_writes_texts_as_well(out):
    """Sampled from the prompt with the same draws, clamped and not; --target is measured, its first token."""
    i = int(all_by_hand(load(out))[0].max(1).argmax())
    printed = analyzed(out, "steer", f"--feature={i}", "--value=0,20", "--prompt=def add", "--target= return")
    result, = numbers_in(out / "sae/scaling/steer.json")["features"]
    this = load(out)
    assert result["token"] == analyze.token_text(this, this.tokenizer.encode_ordinary(" return")[0])
    written = dict(re.findall(r"\n\n +(unsteered|\S+ x max)  (.*)", printed))
    start = torch.tensor([this.tokenizer.encode_ordinary("def add")])
    largest = float(this.activations([i]).max())
    for name, value in (("unsteered", None), ("+0 x max", 0.0), ("+20 x max", 20 * largest)):
        hook = None if value is None else analyze.clamp(this, [i], value)
        generator = torch.Generator().manual_seed(1337)
        ids = this.gpt.generate(start, 60, hook=hook, generator=generator)
        assert written[name] == analyze.token_text(this, *ids[0, start.shape[1]:])
    assert len(written) == 3 and written["unsteered"] != written["+20 x max"]


def test_neurons_counts_the_features_that_no_neuron_is_like(out):
    printed = analyzed(out, "neurons")
    numbers = numbers_in(out / "sae/scaling/neurons.json")
    features, neurons = all_by_hand(load(out))
    features, neurons = features[features.any(1)], neurons[neurons.any(1)]
    highest = np.corrcoef(features, neurons)[:len(features), len(features):].max(1)
    assert numbers["share_at_most_03"] == pytest.approx((highest <= 0.3).mean(), abs=1e-6)
    assert numbers["median_correlation"] == pytest.approx(np.median(highest), abs=1e-3)
    assert f"{numbers['share_at_most_03']:.1%}" in printed and (out / "sae/scaling/neurons.png").stat().st_size > 1000


@pytest.mark.parametrize("words", ["", "def self return add nowhere"], ids=["words of the text", "words of a file"])
def test_complete_counts_the_words_with_a_feature_in_every_run(out, tmp_path, words):
    (tmp_path / "words.txt").write_text(words)
    with mock.patch.object(analyze, "load_run", wraps=analyze.load_run) as load_run:
        printed = analyzed(out, "complete", "--names=scaling,small", *[f"--words={tmp_path / 'words.txt'}"] * bool(words))
    assert [call.args[2] for call in load_run.call_args_list] == ["scaling", "small"]  # each once
    numbers = numbers_in(out / "sae/scaling/complete.json")
    assert list(numbers["runs"]) == ["scaling", "small"]
    for name, run in numbers["runs"].items():
        assert not words or set(run["words"]) == {"def", "self", "return", "add"}
        assert run["found"] == np.mean([word["f1"] > numbers["threshold"] for word in run["words"].values()])
        assert 0 < run["alive"] <= {"scaling": 96, "small": 48}[name] and f"{run['alive']} alive" in printed
    x, y = [], []
    for run in numbers["runs"].values():
        for word in run["words"].values():
            x.append(math.log10(word["frequency"] * run["alive"]))
            y.append(word["f1"] > numbers["threshold"])
    middle = -numbers["a"] / numbers["b"]
    chances = 1 / (1 + np.exp(-numbers["a"] - numbers["b"] * np.array(x)))
    assert chances.sum() == pytest.approx(sum(y), abs=0.01)  # as where the likelihood is highest
    if numbers["b"] > 0 and min(x) <= middle <= max(x):
        assert numbers["midpoint"] == pytest.approx(10**middle)
        where = f"a frequency of {10**middle:.2g} / alive features"
    else:
        assert numbers["midpoint"] is None
        where = "none of these frequencies"
    assert f"1/2 at {where} (the paper: slightly below 1 / alive features)" in printed
    assert (out / "sae/scaling/complete.png").stat().st_size > 1000


@pytest.mark.parametrize("recipe", ["scaling", "towards", "tied"])
def test_a_finished_run_keeps_its_loss_on_held_out_rows(out, recipe):
    """The recipe's own loss with the whole lambda, in float64, the mean over all rows of val-000.npy."""
    trained_sae(out, f"--recipe={recipe}", f"--name=kept-{recipe}", "--l1_coeff=3")
    log, sae = log_of(out, f"kept-{recipe}"), load_sae(out / f"sae/kept-{recipe}/sae.pt")
    x = np.load(out / "acts/mlp.0/val-000.npy").astype(np.float64) * sae.scale.item()
    W_enc, b_enc, W_dec = (getattr(sae, name).detach().double().numpy() for name in ("W_enc", "b_enc", "W_dec"))
    b_dec = 0 if recipe == "tied" else sae.b_dec.detach().double().numpy()
    f = np.maximum((x - b_dec if recipe == "towards" else x) @ W_enc + b_enc, 0)
    weights = np.linalg.norm(W_dec, axis=1) if recipe == "scaling" else np.ones(96)
    loss = ((f @ W_dec + b_dec - x) ** 2).sum(1).mean() + 3 * (f * weights).sum(1).mean()
    assert log[-1]["held_out_loss"] == pytest.approx(loss, rel=1e-5) and len(x) == 2**16
    assert all("held_out_loss" not in line for line in log[:-1]) and sae.extra["log"] == log


def test_the_held_out_loss_is_the_mean_over_rows_of_batches_of_unequal_size():
    """Five thousand rows, of which the batches have 4,096 and 904; of an endless store 65,536."""
    sae, rng = SparseAutoencoder(SAEConfig(6, 9, "towards", "none")), np.random.default_rng(0)
    x = rng.standard_normal((70_000, 6)) * np.linspace(1, 3, 70_000)[:, None]
    W_enc, W_dec = (getattr(sae, name).detach().double().numpy() for name in ("W_enc", "W_dec"))
    f = np.maximum(x @ W_enc, 0)
    losses = ((f @ W_dec - x) ** 2).sum(1) + 2 * f.sum(1)
    for rows, read in ((5000, 5000), (math.inf, 65_536)):
        store = mock.Mock(rows=rows, batch=lambda position, n: torch.from_numpy(x[position:position + n]).float())
        found = train_sae.held_out_loss(sae, store, 2.0, torch.device("cpu"))
        assert found == pytest.approx(losses[:read].mean(), rel=1e-4)


def test_a_run_that_streams_is_judged_on_the_rows_of_one_that_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sae, "SHARD_ROWS", 1024)
    monkeypatch.setattr(train_sae, "VAL_ROWS", 512)
    flags = {"acts": "toy", "toy_offset": 0, "site": "mlp", "layer": 0, "shuffle_weights": False, "seed": 3}
    held_out = []
    for stream in (False, True):
        args = SimpleNamespace(out_dir=str(tmp_path), n_acts=1, stream=stream, **flags)
        _, val_store, _ = train_sae.prepare(args, torch.device("cpu"))
        held_out.append(sorted(val_store.batch(0, 512).tolist()))  # those on disk are shuffled once more
    assert held_out[0] == held_out[1]


def test_runs_of_different_seeds_on_own_rows_are_judged_on_the_same_ones(tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(2000.0).reshape(-1, 2))
    held_out = []
    for seed in (1, 2):
        flags = {"acts": str(tmp_path / "*.npy"), "out_dir": str(tmp_path), "name": "own", "seed": seed}
        _, val_store, _ = train_sae.own_stores(SimpleNamespace(**flags), torch.device("cpu"))
        held_out.append(val_store.batch(0, 20))  # some of the 50, as VAL_ROWS are of more
    assert torch.equal(*held_out)


def planted(out, loss_of, sizes, budgets, rates=(2e-3,)):
    """Finished runs on disk with these losses, batches of 10 rows -> their names with commas between."""
    like = load_sae(out / "sae/scaling/sae.pt").extra
    names = []
    for size in sizes:
        for budget in budgets:
            for rate in rates:
                steps = budget // size
                line = {"rows": 10 * steps, "held_out_loss": loss_of(size, steps, rate)}
                changed = {"step": steps, "log": [line], "args": like["args"] | {"learning_rate": rate, "max_iters": steps}}
                names.append(f"p{size}-{steps}-{rate}")
                (out / "sae" / names[-1]).mkdir()
                save_sae(out / "sae" / names[-1] / "sae.pt", SparseAutoencoder(SAEConfig(64, size)), **like | changed)
    return ",".join(names)


def test_scaling_finds_the_law_that_runs_on_disk_follow(out):
    """Loss at N features and S steps 2 + log(N^2 / S)^2: best at N = B^(1/3) of a budget B = N S, steps B^(2/3)."""
    def loss_of(size, steps, rate):
        return 2 + 0.1 * math.log(size**2 / steps) ** 2
    names = planted(out, loss_of, [4, 8, 16, 32], [2**9, 2**11])
    printed = analyzed(out, "scaling", f"--names={names}")
    numbers = numbers_in(out / "sae" / names.split(",")[0] / "scaling.json")
    assert numbers["budgets"] == [12 * 64 * 10 * budget for budget in (2**9, 2**11)]
    np.testing.assert_allclose(numbers["best_sizes"], [2**3, 2 ** (11 / 3)])
    np.testing.assert_allclose(numbers["best_losses"], 2)
    assert numbers["laws"]["n_features"][1] == pytest.approx(1 / 3)
    assert numbers["laws"]["steps x batch"][1] == pytest.approx(2 / 3)
    assert numbers["learning_rate"] == 2e-3 and numbers["best_rates"] == []
    assert "here features grow slower than steps (C^0.33 against C^0.67), in the paper somewhat faster" in printed
    assert "3.93e+06  8 features, loss 2.000" in printed
    for law in numbers["laws"].values():
        assert f"{law[1]:+.3f}" in printed
    assert (out / "sae" / names.split(",")[0] / "scaling.png").stat().st_size > 1000


def test_scaling_says_where_features_grow_faster_than_steps(out):
    """Best at N = B^(2/3)."""
    names = planted(out, lambda size, steps, rate: 2 + math.log(size / steps**2) ** 2, [128, 256, 512, 1024], [2**13, 2**14])
    printed = analyzed(out, "scaling", f"--names={names}")
    assert "here features grow faster than steps (C^0.67 against C^0.33), in the paper somewhat faster" in printed


def test_scaling_lists_what_was_trained_and_says_what_a_law_needs(out):
    printed = analyzed(out, "scaling", "--names=scaling,small")
    for name, features in (("scaling", 96), ("small", 48)):
        numbers = [str(features), "7,680", "1.0e-03", f"{12 * 64 * features * 60 * 128:.2e}",
                   f"{log_of(out, name)[-1]['held_out_loss']:.3f}"]
        assert re.search(rf"^ +{name} +" + " +".join(map(re.escape, numbers)) + "$", printed, re.M), printed
    assert "a law of size and steps needs two budgets" in printed and "grow" not in printed
    numbers = numbers_in(out / "sae/scaling/scaling.json")
    assert numbers["laws"] == {} and numbers["budgets"] == []


def test_scaling_takes_runs_on_toy_data_and_on_own_activations(out):
    trained_sae(out, "--acts=toy", "--name=toy")
    for name in ("toy", "own"):
        loss = log_of(out, name)[-1]["held_out_loss"]
        assert re.search(rf"{name} .*{loss:.3f}\n", analyzed(out, "scaling", f"--name={name}"))


def test_a_shuffled_copy_is_found_identical(out):
    printed, numbers = analyzed(out, "compare", "shuffled", "scaling"), numbers_in(out / "sae/shuffled/compare.json")
    found = numbers["kinds"]["directions"]
    assert set(found["shares"].values()) == {1.0} and found["median"] == pytest.approx(1, abs=1e-5)
    assert found["counts"][0] == 0 and sum(found["counts"]) == 96
    assert "100.0%" in printed and printed.count("feature ") >= 20


@pytest.mark.parametrize("names", [("scaling", "small"), ("small", "scaling")])
def test_the_smaller_of_two_dictionaries_is_looked_up_in_the_larger(out, names):
    analyzed(out, "compare", *names)
    small, large = (load_sae(out / f"sae/{name}/sae.pt").W_dec.detach().double() for name in ("small", "scaling"))
    cosines = torch.cosine_similarity(small[:, None], large[None], dim=2).amax(1).numpy()
    kinds = numbers_in(out / f"sae/{names[0]}/compare.json")["kinds"]
    assert kinds["directions"]["median"] == pytest.approx(np.median(cosines), abs=1e-5)
    assert len(kinds["directions"]["shares"]) > 1
    for threshold, share in kinds["directions"]["shares"].items():
        assert share == pytest.approx((cosines > float(threshold)).mean())

    this = load(out)
    (ours, theirs) = (all_by_hand(replace(this, sae=load_sae(out / f"sae/{name}/sae.pt")))[0] for name in ("small", "scaling"))
    order = np.random.default_rng(1337).permutation(ours.shape[1])
    for suffix, acts in (("", ours), ("_shuffled", ours[:, order])):
        for kind, exact in zip(("masked_by_small", "masked_by_large"), masked_by_hand(acts, theirs)):
            found = kinds[kind + suffix]
            assert found["median"] == pytest.approx(np.median(exact.max(1)), abs=5e-3), kind + suffix
            assert np.dot(found["counts"], range(len(found["counts"]))) == pytest.approx((exact > 0.7).sum(), abs=3)


def test_two_models_are_compared_by_activation_and_logit_weights_features_beside_neurons(out):
    printed = analyzed(out, "compare", "scaling", str(out.parent / "twin/sae/scaling"))
    numbers = numbers_in(out / "sae/scaling/compare.json")
    medians = numbers["medians"]
    this, twin = load(out), load(out.parent / "twin")
    (features, neurons), (others, other_neurons) = map(all_by_hand, (this, twin))
    order = np.random.default_rng(1337).permutation(features.shape[1])
    alive = features.any(1)

    def logit_weights(run):
        directions, W_out, gain, W_U = (w.detach().double().numpy() for w in (
            run.sae.W_dec, run.gpt.blocks[0].mlp_proj.weight, run.gpt.ln_f.weight, run.gpt.lm_head.weight))
        written = directions @ W_out.T
        return (written - written.mean(1, keepdims=True)) * gain @ W_U.T
    for name, moved in (("found", slice(None)), ("shuffled", order)):
        for kind, a, b in (("features", features[alive], others), ("neurons", neurons[neurons.any(1)], other_neurons)):
            pairs = np.corrcoef(a[:, moved], b[b.any(1)])[:len(a), len(a):]
            assert medians[kind][name] == pytest.approx(np.median(pairs.max(1)), abs=5e-3), (kind, name)
            if kind == "features":
                partners = np.flatnonzero(b.any(1))[pairs.argmax(1)]
        ours, theirs = logit_weights(this)[alive], logit_weights(twin)[partners]
        exact = [np.corrcoef(w, v)[0, 1] for w, v in zip(ours, theirs)]
        assert medians["logit weights"][name] == pytest.approx(np.median(exact), abs=0.02), name
    for kind in medians:
        line, = [line for line in printed.splitlines() if line.startswith(f"  {analyze.COMPARED[kind]}  ")]
        assert line.split()[-2:] == [f"{value:.2f}" for value in medians[kind].values()]
    assert medians["features"]["shuffled"] < 0.5 * medians["features"]["found"]
    assert numbers["models"] == "two models" and "two models: mlp.0 (" in printed
    assert (out / "sae/scaling/compare.png").stat().st_size > 1000


def test_two_sites_of_one_model_are_called_so(out):
    """Their neurons are the same, so that nothing is said of these."""
    trained_sae(out, "--name=resid", "--site=resid", "--n_features=40")
    printed = analyzed(out, "compare", "small", "resid")
    numbers = numbers_in(out / "sae/small/compare.json")
    assert re.search(r"two sites of one model: resid.0 \(.* and mlp.0 \(", printed)
    assert "the 40 features of the first are looked up among the 48 of the second\n" in printed
    assert numbers["sites"] == ["resid.0", "mlp.0"] and set(numbers["medians"]) == {"features", "logit weights"}


def test_what_is_always_equally_active_correlates_with_nothing(tmp_path):
    table = fires({1: {"a": 1.0}}, 3)
    table[:, 0] = 0.7
    this = lookup_run(tmp_path, "abcab" * 80, table)
    order = np.random.default_rng(0).permutation(len(this.tokens))
    features, (found, shuffled), _ = analyze.best_partners(this, this, order)
    assert features.tolist() == [0, 1]
    np.testing.assert_allclose(found, [0, 1], atol=1e-5)
    assert shuffled[0] == 0


def test_autoencoders_of_two_models_are_compared_on_rows_that_are_named(out, tmp_path):
    """The models play no part then."""
    rows = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    twin = out.parent / "twin/sae/scaling"
    analyzed(out, "compare", "scaling", str(twin), f"--acts={tmp_path}/rows.npy")
    saes = [load_sae(path / "sae.pt") for path in (out / "sae/scaling", twin)]
    cosines = torch.cosine_similarity(saes[0].W_dec[:, None], saes[1].W_dec[None], dim=2).amax(1)
    kinds = numbers_in(out / "sae/scaling/compare.json")["kinds"]
    assert kinds["directions"]["median"] == pytest.approx(cosines.quantile(0.5).item(), abs=1e-5)


@pytest.mark.parametrize("command", [("compare", "scaling"), ("complete", "--names=scaling,")])
def test_texts_of_other_contexts_are_not_compared(out, tmp_path, command):
    """Of one model and tokenizer, but of a held-out text that was exchanged; nor is the first one searched before."""
    other = tmp_path / "other"
    shutil.copytree(out, other, ignore=shutil.ignore_patterns("acts"))
    np.fromfile(out / "val.bin", dtype=np.uint16)[::-1].tofile(other / "val.bin")
    *start, last = command
    second = str(other / "sae/small")
    arguments = [*command, second] if command[0] == "compare" else [*start, last + second]
    with mock.patch.object(analyze.Run, "activations") as read:
        done = script("analyze.py", *arguments, f"--out_dir={out}", "--device=cpu")
    assert done.returncode == 2 and "text" in done.stderr and done.stderr.count("\n") == 1 and not read.called


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An out_dir with two autoencoders, `scaling` and `small`, of the same rows of somebody's own, and these rows."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((20, 12))
    rows = (rng.exponential(1, (6000, 20)) * (rng.random((6000, 20)) < 0.1)) @ directions
    np.save(folder / "rows.npy", rows.astype(np.float32))
    np.save(folder / "others.npy", rows[::-1].astype(np.float32))
    for name, n_features, path in (("scaling", 64, "rows"), ("small", 24, "rows"), ("others", 64, "others")):
        trained_sae(folder, f"--acts={folder}/{path}.npy", f"--name={name}", f"--n_features={n_features}", "--l1_coeff=1")
    return folder, rows[5700:].astype(np.float32).astype(float)


def test_autoencoders_of_ones_own_rows_are_compared_like_those_of_one_model(own):
    folder, rows = own
    printed = analyzed(folder, "compare", "scaling", "small")
    kinds = numbers_in(folder / "sae/scaling/compare.json")["kinds"]
    saes = [load_sae(folder / f"sae/{name}/sae.pt") for name in ("small", "scaling")]
    ours, theirs = (by_hand(sae, rows)[0].T for sae in saes)
    exact = [(ours.any(1)[:, None] * masked).max(1) for masked in masked_by_hand(ours, theirs)]
    cosines = torch.cosine_similarity(saes[0].W_dec[:, None], saes[1].W_dec[None], dim=2).amax(1)
    assert ours.any(1).mean() > 0.9
    assert kinds["directions"]["median"] == pytest.approx(cosines.median().item(), abs=0.05)
    for kind, highest in zip(("masked_by_small", "masked_by_large"), exact):
        assert kinds[kind]["median"] == pytest.approx(np.median(highest), abs=5e-3)
        assert kinds[f"{kind}_shuffled"]["median"] < 0.8 * kinds[kind]["median"]
    assert "24 features of " in printed and printed.count("feature ") >= 20
    assert (folder / "sae/scaling/compare.png").stat().st_size > 1000


def test_features_of_ones_own_rows_are_compared_with_the_columns(own):
    folder, rows = own
    printed, numbers = analyzed(folder, "neurons"), numbers_in(folder / "sae/scaling/neurons.json")
    features = by_hand(load_sae(folder / "sae/scaling/sae.pt"), rows)[0].T
    features = features[features.any(1)]
    highest = np.corrcoef(features, rows.T)[:len(features), len(features):].max(1)
    assert numbers["share_at_most_03"] == pytest.approx((highest <= 0.3).mean(), abs=0.02)
    assert numbers["median_correlation"] == pytest.approx(np.median(highest), abs=1e-3)
    assert numbers["n_neurons"] == 12 and "against the 12 columns of the rows" in printed
    assert "explained" not in numbers and "token" not in printed
    assert (folder / "sae/scaling/neurons.png").stat().st_size > 1000


@pytest.mark.parametrize("arguments, words", [
    (("compare", "scaling", "others"), "same rows of your own"), (("neurons", "--read_tokens=1"), "--read_tokens")])
def test_what_cannot_be_said_of_ones_own_rows_is_one_line(own, arguments, words):
    folder, _ = own
    done = script("analyze.py", *arguments, f"--out_dir={folder}", "--device=cpu")
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments, words", [
    (("steer", "--feature=96"), ["96", "0 to 95"]),
    (("steer", "--features=1,96"), ["'96'", "0 to 95"]),
    (("steer", "--features=1,,2"), ["''", "0 to 95"]),
    (("steer",), ["feature"]),
    (("steer", "--feature=ALIVE", "--value=much"), ["--value", "much"]),
    (("steer", "--feature=ALIVE", "--value=1,,2"), ["--value"]),
    (("steer", "--feature=ALIVE", "--value=nan"), ["--value", "nan"]),
    (("steer", "--feature=ALIVE", "--value=0,1e30"), ["--value=0,1e30", "less"]),
    (("steer", "--feature=ALIVE", "--value=-1e300"), ["--value=-1e300", "less"]),
    (("steer", "--feature=ALIVE", "--value=1e20"), ["--value=1e20", "less"]),
    (("neurons", "--read_tokens=1"), ["neurons", "--read_tokens"]),
    (("feature", "3", "--texts=nowhere.txt"), ["--texts", "own activations"]),
    (("search",), ["search", "texts"]),
    (("search", ""), ["0 tokens"]),
    (("cause", "--prompt=" + "word " * 50), ["tokens", "1 to 32"]),
    (("cause", "--target=x"), ["--target", "--prompt"]),
    (("cause", "--baseline=x"), ["--baseline", "--prompt"]),
    (("cause", "--prompt=def", "--target=x", "--baseline=x"), ["--baseline", "'x'", "another"]),
    (("complete", "--names=scaling,nobody"), ["nobody", "train_sae.py"]),
    (("complete", "--names=scaling,own"), ["own", "model"]),
    (("complete", "--words=nowhere.txt"), ["words", "held-out"]),
    (("complete", "--words=missing.txt"), ["missing.txt"]),
    (("complete", "--read_tokens=1"), ["complete", "--read_tokens"]),
    (("scaling", "--names=scaling,nobody"), ["nobody", "train_sae.py"]),
    (("scaling", "--names=scaling,lambda1"), ["lambda", "--names"]),
    (("scaling", "--names=scaling,resampled"), ["resampling", "--names"]),
    (("scaling", "--names=scaling,centred"), ["normalisation", "--names"]),
    (("scaling", "--names=scaling,apart"), ["start", "--names"]),
    (("scaling", "--names=scaling,halted"), ["halted", "not finished", "--resume"]),
    (("scaling", "--names=scaling,old"), ["old", "held_out_loss", "train_sae.py again"]),
    (("complete", "small", "scaling"), ["complete", "flags", "small"]),
    (("neurons", "--names=small,scaling"), ["--names", "complete, scaling, frontier", "neurons"]),
    (("compare", "small", "scaling", "--names=small"), ["--names", "complete, scaling, frontier", "compare"]),
    (("compare",), ["compare", "two"]),
    (("compare", "small"), ["compare", "two"]),
    (("compare", "small", ""), ["compare", "two"]),
    (("compare", "small", "scaling", "shuffled"), ["compare", "two"]),
    (("compare", "small", "nobody"), ["nobody", "train_sae.py"]),
    (("compare", "scaling", "own"), ["compare", "model"]),
], ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "")
def test_a_mistake_is_one_line_and_harms_nothing(out, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere.txt").write_text("nowhere, neither")
    if "--feature=ALIVE" in arguments:
        alive = all_by_hand(load(out))[0].max(1).argmax()
        arguments = [argument.replace("ALIVE", str(alive)) for argument in arguments]
    before = hashes(out)
    done = script("analyze.py", *arguments, f"--out_dir={out}", "--device=cpu")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert hashes(out) == before


@pytest.mark.parametrize("arguments, words", [
    (("search",), "search takes texts"),
    (("compare", "--show=3", "small"), "compare takes two names"),
    (("report", "--names=a,b"), "--names is for"),
])
def test_what_a_command_takes_is_told_before_anything_is_loaded(tmp_path, arguments, words):
    done = script("analyze.py", *arguments, f"--out_dir={tmp_path / 'new'}")
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags", [["--value=much"], ["--vector", "foo"], ["--target=" + "word " * 50], ["--prompt=" + "word " * 50]])
def test_flags_of_steer_are_judged_before_activations_are_read_and_nothing_is_compiled(out, flags):
    with mock.patch.object(analyze.Run, "activations") as read, mock.patch("model.can_compile") as can_compile:
        done = script("analyze.py", "steer", "--compile=yes", "--feature=1", *flags, f"--out_dir={out}", "--device=cpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not read.called and not can_compile.called


@pytest.mark.parametrize("change, words", [
    ({"source": {}}, "--acts"),
    ({"source": {"gpt": "GPT"}}, "--acts"),
    ({"source": {"site": "own", "contents": ["a"]}}, "--acts"),
    ({"source": {"site": "toy"}}, "--acts"),
    ({"source": {"site": "mlp.7", "gpt": "GPT"}}, "no site mlp.7"),
    ({"source": {"site": ["mlp.0"], "gpt": "GPT"}}, "no site"),
    ({"source": {"site": "resid.0", "gpt": "GPT"}}, "width 64, resid.0 has 16"),
    ({"W_enc": float("nan")}, "NaN"),
    ({"b_dec": float("inf")}, "infinity"),
    ({"scale": 0.0}, "NaN"),
], ids=str)
def test_a_file_that_says_too_little_or_holds_no_numbers_is_one_line(out, tmp_path, change, words):
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("acts"))
    path = tmp_path / "out/sae/scaling/sae.pt"
    checkpoint = torch.load(path, weights_only=True)
    for key, value in change.items():
        if key == "source" and "gpt" in value:
            value = value | {"gpt": checkpoint["source"]["gpt"]}
        if key in checkpoint["weights"]:
            checkpoint["weights"][key][..., 0] = value
        else:
            checkpoint[key] = value
    torch.save(checkpoint, path)
    for arguments in (("feature", "3"), ("cause",)):
        done = script("analyze.py", *arguments, f"--out_dir={tmp_path / 'out'}", "--device=cpu")
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command, spoiled", [
    ("report", "sae/scaling/log.jsonl"), ("report", "page.html"), ("report", "train.bin"), ("frontier", "train.bin")])
def test_a_file_that_is_needed_at_the_end_is_read_before_anything_is_measured(out, tmp_path, monkeypatch, command, spoiled):
    shutil.copytree(out, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("acts"))
    if spoiled == "page.html":  # it is missing
        monkeypatch.setattr(analyze, "PAGE", str(tmp_path / spoiled))
    else:
        (tmp_path / spoiled).write_bytes(b"{}")
    with mock.patch.object(analyze, "measure") as measure:
        done = script("analyze.py", command, f"--out_dir={tmp_path}", "--device=cpu")
    assert done.returncode == 2 and spoiled in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert re.search("put it back|train_sae.py writes it|delete it and run", done.stderr) and not measure.called


def test_a_command_that_is_added_changes_no_other(out):
    own = ("--name=own", f"--out_dir={out}", "--device=cpu")
    before = script("analyze.py", "cause", *own).stderr
    assert before.endswith("choose from report, feature, neurons, scaling, compare\n")
    given = []
    count = analyze.Command(lambda run, args: given.append((run.n_features, args.arguments)), takes="texts")
    with mock.patch.dict(analyze.COMMANDS, count=count):
        assert script("analyze.py", "cause", *own).stderr == before
        assert "choose from" in script("analyze.py", "count", "these", *own).stderr
        assert script("analyze.py", "count", "these", "words", f"--out_dir={out}", "--device=cpu").returncode == 0
    assert given == [(96, ["these", "words"])]


@pytest.mark.parametrize("arguments", [("cause",), ("cause", "--prompt=foo"), ("steer", "--feature=0"), ("neurons",),
                                       ("search", "foo"), ("complete",), ("feature", "0")], ids=" ".join)
def test_an_autoencoder_whose_features_are_all_dead_is_said_to_be_so(tmp_path, arguments):
    this, sae = random_run(tmp_path, tokens=TOKENIZER.encode_ordinary(LINE * 33))
    torch.nn.init.constant_(sae.b_enc, -1e6)
    save_sae(tmp_path / "sae/scaling/sae.pt", sae, source=this.source)
    done = script("analyze.py", *arguments, f"--out_dir={tmp_path}", "--device=cpu")
    assert done.returncode in (0, 2), done.stderr
    assert (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1) if done.returncode else not done.stderr
    assert re.search("dead|(no feature is|not) active", done.stderr + done.stdout)
    for path in (tmp_path / "sae/scaling").glob("*.json"):
        numbers_in(path)


def test_a_text_without_frequent_words_is_a_mistake_too(tmp_path):
    lookup_run(tmp_path, "1 2 3 4 " * 40, fires({7: {"1": 1.0}}))
    done = script("analyze.py", "complete", f"--out_dir={tmp_path}", "--device=cpu")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_a_large_dictionary_has_its_most_energetic_features_on_the_page_and_says_so(tmp_path, monkeypatch):
    """Of 14 features 5: the others are null, not dead."""
    monkeypatch.setattr(analyze, "ON_PAGE", 5)
    this, _ = random_run(tmp_path, tokens=np.random.default_rng(0).integers(0, V, 900))
    printed = analyzed(tmp_path, "report")
    text = "of 14 features, those that carry most of the reconstruction"
    assert f"features.html: open it in a browser\n  it has 5 {text}\n" in printed
    html = (tmp_path / "sae/scaling/features.html").read_text(encoding="utf-8")
    data = json.loads(re.search('id="data">(.*?)</script>', html, re.S).group(1))
    energy = (all_by_hand(this)[0]**2).mean(1)
    kept = [i for i, feature in enumerate(data["features"]) if feature]
    assert len(data["features"]) == 14 and kept == sorted(np.argsort(-energy)[:5])
    assert all("examples" in data["features"][i] for i in kept)
    assert data["summary"][-1] == ["on this page", "5", text]
