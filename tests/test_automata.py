"""Features that switch one another on: planted automata, the numbers against plain numpy, the mistakes of a user."""

import itertools
import re
from unittest import mock

import numpy as np
import pytest
import torch

import analyze
from conftest import script
from sae import save_sae
from test_analyses import TOKENIZER, V, all_by_hand, analyzed, fires, load, lookup_run, made_run, numbers_in, random_run

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning:matplotlib")

TOKENS = {7: " foo", 280: "$", 5: " baz", 3: "x", 4: "y"}  # what each feature is on
RAISES = {7: ("$", 0.28), 280: (" baz", 0.32), 5: (" foo", 0.3), 3: ("y", 0.3)}  # by how much; 7, 280, 5 are a loop


def token(text):
    number, = TOKENIZER.encode_ordinary(text)
    return number


def planted_text(n=1200, seed=0):
    """Text in which " foo", "$", " baz" follow one another for a while, and y is common but never after x."""
    rng = np.random.default_rng(seed)
    return "".join(rng.choice([" foo$ baz foo$ baz foo$ baz", "x~", "y~", "k", "l", "m", "n"], n))


def planted_run(out, text):
    """A run of TOKENS and RAISES: a feature's direction is its token's one-hot vector, which raises another's logit."""
    this = lookup_run(out / "lookup", text, fires({k: {on: 1.0} for k, on in TOKENS.items()}))
    this.gpt.lm_head.weight.zero_()
    for k, on in TOKENS.items():
        this.sae.W_dec[k] = torch.nn.functional.one_hot(torch.tensor(token(on)), V)
    for k, (raised, weight) in RAISES.items():
        this.gpt.lm_head.weight[token(raised), token(TOKENS[k])] = weight
    return made_run(out / "out", this.gpt, this.sae, "resid.0", TOKENIZER.encode_ordinary(text))


def test_a_planted_loop_is_found_with_its_tokens_and_what_the_text_does_not_bear_out_is_marked(tmp_path):
    planted_run(tmp_path, planted_text())
    printed = analyzed(tmp_path / "out", "automata")
    numbers = numbers_in(tmp_path / "out/sae/scaling/automata.json")
    assert numbers["edges"] == 4 and numbers["held"] == 0.75
    loop, = numbers["loops"]
    steps = {(row["from"], row["to"]): row["tokens"] for row in loop}
    assert steps == {(7, 280): ["'$'"], (280, 5): ["' baz'"], (5, 7): ["' foo'"]} and all(row["held"] for row in loop)
    assert [row["to"] for row in loop] == [row["from"] for row in loop[1:] + loop[:1]]
    wrong, = [row for row in numbers["strongest"] if not row["held"]]
    assert (wrong["from"], wrong["to"], wrong["times"]) == (3, 4, 0) and wrong["of"] > 20
    assert numbers["chains"] == numbers["self_loops"] == [] and "a loop of 3" in printed
    assert re.search(r" 3 'x' → 4 'y' .* 'y'  not borne out\n", printed) and printed.count("not borne out") == 1
    assert (tmp_path / "out/sae/scaling/automata.png").stat().st_size > 5000
    assert [row["from"] for row in numbers["strongest"]][::3] == [280, 7]  # of four, in order
    # one token of equally many becomes e^logit times as likely as the others
    one_hot = np.eye(V)[0]
    ratio = np.exp(0.3 * (1 - 1 / V) / np.sqrt(one_hot.var() + 1e-5))
    assert wrong["predicted"] == pytest.approx(V * ratio / (ratio + V - 1), rel=2e-3)


def test_in_shuffled_text_no_edge_is_borne_out(tmp_path):
    ids = TOKENIZER.encode_ordinary(planted_text())
    shuffled = np.random.default_rng(1).permutation(ids).tolist()
    this = planted_run(tmp_path / "whole", planted_text())
    made_run(tmp_path / "out", this.gpt, this.sae, "resid.0", shuffled)
    printed = analyzed(tmp_path / "out", "automata")
    numbers = numbers_in(tmp_path / "out/sae/scaling/automata.json")
    assert numbers["edges"] == 4 and numbers["held"] == 0
    assert numbers["loops"] == numbers["chains"] == numbers["self_loops"] == []
    assert printed.count("not borne out") == 4 and "a loop of" not in printed


# -----------------------------------------------------------------------------
# the numbers

def pairs_by_hand(this):
    """
    predicted, times, expected (m, m), fired (m,), the least of the three numbers of tokens a feature is active on (m,),
    and how each shifts the next token, with each one's mean on it, two (m, V); in float64.
    """
    gpt, sae, T = this.gpt, this.sae, this.T
    f, _ = all_by_hand(this)
    contexts = f.reshape(len(f), -1, T)
    tokens = this.contexts[:, :-1].numpy()
    learned, learned_tokens = contexts[:, ::2].reshape(len(f), -1), tokens[::2].ravel()
    means = np.zeros((len(f), V))
    for v in np.unique(learned_tokens):
        means[:, v] = learned[:, learned_tokens == v].mean(1)
    # what each raises
    W_dec, W_out, gain, W_U = (w.double().numpy() for w in (
        sae.W_dec, gpt.blocks[0].mlp_proj.weight, gpt.ln_f.weight, gpt.lm_head.weight))
    stream = {}
    gpt(this.contexts[:, :-1], hook=lambda site, x: stream.update({site: x.double().numpy()}))
    inverse = (1 / np.sqrt(stream["resid.1"].var(-1) + gpt.ln_f.eps)).mean()
    written = W_dec @ W_out.T
    logits = (written - written.mean(1, keepdims=True)) * gain * inverse @ W_U.T * learned.max(1)[:, None]
    counts = np.bincount(np.fromfile(f"{this.out_dir}/train.bin", dtype=np.uint16), minlength=V)
    q = np.where(counts >= 100, counts, 0) / counts[counts >= 100].sum()
    p = q * np.exp(logits)
    p /= p.sum(1, keepdims=True)
    predicted = (p @ means.T) / (q @ means.T)
    # what follows what
    on = contexts[:, 1::2] > 0
    first, second = on[..., :-1].reshape(len(f), -1), on[..., 1:].reshape(len(f), -1)
    times = np.array([[(a & b).sum() for b in second] for a in first])
    expected = first.sum(1)[:, None] * second.mean(1)
    rarest = np.min([(learned > 0).sum(1), first.sum(1), second.sum(1)], axis=0)
    return predicted, times, expected, first.sum(1), rarest, (p - q, means)


@pytest.fixture(scope="module")
def random_pairs(tmp_path_factory):
    """A run of random weights, in whose training text ten tokens are rare and others more frequent; all by hand."""
    out = tmp_path_factory.mktemp("random")
    rng = np.random.default_rng(0)
    this, sae = random_run(out / "small", tokens=rng.integers(0, 60, 4000))
    this.gpt.lm_head.weight *= 20  # or what they raise would hardly differ
    out = out / "large"
    made_run(out, this.gpt, sae, "mlp.0", this.tokens)
    text = np.concatenate([np.tile(np.arange(V), 99), np.arange(10, V), rng.integers(30, 60, 9000)])
    text.astype(np.uint16).tofile(out / "train.bin")
    this = load(out)
    return this, pairs_by_hand(this)


def test_predicted_lift_and_rates_on_held_out_text_are_those_of_plain_numpy(random_pairs):
    this, (predicted, times, expected, fired, rarest, _) = random_pairs
    often = int(np.sort(rarest)[5])  # five are left out
    with mock.patch.object(analyze, "OFTEN", often):
        found = list(analyze.all_pairs(this, analyze.read_firing(this)))
    edges, = found
    able = np.flatnonzero(rarest >= often)
    assert len(able) == 9
    assert list(zip(edges.source, edges.target)) == list(itertools.product(able, able))
    at = edges.source, edges.target
    np.testing.assert_allclose(edges.predicted, predicted[at], rtol=1e-3)
    np.testing.assert_array_equal(edges.times, times[at])
    np.testing.assert_allclose(edges.expected, expected[at], rtol=1e-5)
    np.testing.assert_array_equal(edges.fired, fired[edges.source])
    np.testing.assert_allclose(edges.lift, times[at] / expected[at], rtol=1e-5)
    assert np.ptp(predicted[at]) > 0.1 and np.ptp(edges.lift) > 0.1


def test_blocks_of_features_do_not_matter(random_pairs):
    this, (predicted, *_) = random_pairs
    small_blocks = [np.arange(start, min(start + 5, 14)) for start in (0, 5, 10)]
    with mock.patch.object(analyze, "blocks", lambda n: small_blocks), mock.patch.object(analyze, "OFTEN", 1):
        parts = list(analyze.all_pairs(this, analyze.read_firing(this)))
    assert len(parts) == 3
    for edges in parts:
        np.testing.assert_allclose(edges.predicted, predicted[edges.source, edges.target], rtol=1e-3)


def test_an_edge_goes_by_the_tokens_that_add_most_to_what_it_predicts(random_pairs):
    this, (*_, (shift, means)) = random_pairs
    firing = analyze.read_firing(this)
    n_few = 0
    for i, j in itertools.product(range(14), repeat=2):
        added = shift[i] * means[j]
        best = np.argsort(-added)[:3]
        few = best[added[best] > 0.1 * added.max()]
        assert analyze.carriers(this, firing, i, j) == few.tolist()
        n_few += len(few) < 3
    assert 0 < n_few < 14 * 14


def test_the_strongest_of_each_feature_and_the_table_are_those_of_all_pairs(random_pairs):
    this, (predicted, times, expected, _, rarest, _) = random_pairs
    least = np.quantile(predicted, 0.8)
    limits = {"OFTEN": 1, "STRONGEST": 3, "PREDICTED": least, "LIFTS": [0.95, 1, 1.1]}
    with mock.patch.multiple(analyze, **limits):
        edges, selves, table = analyze.find_edges(this, analyze.read_firing(this))
    assert (rarest >= 1).all()
    expected_edges = []
    for i in range(14):
        best = sorted([(-predicted[i, j], i, j) for j in range(14) if j != i and predicted[i, j] >= least])
        expected_edges += best[:3]
    assert list(zip(edges.source, edges.target)) == [(i, j) for _, i, j in sorted(expected_edges)]
    assert 14 < len(edges.source) < min(42, (predicted >= least).sum() - 5)
    assert sorted(selves.source) == list(range(14)) and (selves.source == selves.target).all()
    assert (np.diff(selves.predicted) <= 0).all()
    other = ~np.eye(14, dtype=bool)
    held = (times >= 5) & (times >= 2 * expected) & (times - expected >= 4 * np.sqrt(expected))
    bounds = [-np.inf, 0.95, 1, 1.1, np.inf]
    for row, low, high in zip(table, bounds, bounds[1:]):
        inside = other & (predicted >= low) & (predicted < high)
        assert row == pytest.approx([inside.sum(), times[inside].sum(), expected[inside].sum(), held[inside].sum()])
        assert inside.any()


def made_edges(pairs):
    """Edges, the strongest first, of which find_loops and find_chains read no more than this."""
    source, target = np.array(pairs).T
    zeros = np.zeros(len(pairs))
    return analyze.Edges(source, target, zeros, zeros, zeros, zeros)


def test_an_edge_is_held_that_comes_often_twice_as_often_as_by_chance_and_beyond_its_noise():
    cases = [(5, 0.1, True), (4, 0.01, False), (11, 6, False), (20, 10, False), (22, 10, False), (23, 10, True),
             (199, 100, False), (200, 100, True), (0, 0, False)]
    times, expected, held = np.array(cases).T
    zeros = np.zeros(len(cases))
    assert analyze.Edges(zeros, zeros, zeros, zeros, times, expected).held.tolist() == held.astype(bool).tolist()


def simple_loops(pairs, longest):
    """Every simple loop of 2 to `longest` features -> {features in order: rank of its weakest edge}."""
    rank = {pair: k for k, pair in enumerate(pairs)}
    features = sorted({feature for pair in pairs for feature in pair})
    found = {}
    for length in range(2, longest + 1):
        for loop in itertools.permutations(features, length):
            steps = list(zip(loop, loop[1:] + loop[:1]))
            if loop[0] == min(loop) and all(step in rank for step in steps):
                found[loop] = max(rank[step] for step in steps)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_loops_are_those_whose_weakest_edge_is_strongest_one_after_the_other(seed):
    rng = np.random.default_rng(seed)
    pairs = list(itertools.permutations(range(8), 2))
    pairs = [pairs[k] for k in rng.permutation(len(pairs))[:14]]
    loops = analyze.find_loops(made_edges(pairs))
    left = simple_loops(pairs, 6)
    for loop in loops:
        steps = [pairs[k] for k in loop]
        assert [target for _, target in steps] == [source for source, _ in steps[1:] + steps[:1]]
        assert max(loop) == min(left.values())
        used = {source for source, _ in steps}
        assert len(used) == len(steps)
        left = {other: weakest for other, weakest in left.items() if not used & set(other)}
    assert not left


def test_a_loop_longer_than_the_longest_is_none():
    def ring(n):
        return made_edges([(i, (i + 1) % n) for i in range(n)])
    assert [len(loop) for loop in analyze.find_loops(ring(6))] == [6]
    assert analyze.find_loops(ring(7)) == []


def test_chains_go_on_with_the_strongest_edge_and_share_no_feature():
    pairs = [(1, 2), (8, 9), (2, 4), (2, 3), (4, 1), (4, 5), (9, 8), (5, 6), (6, 7), (7, 20), (10, 5), (11, 12), (12, 30)]
    chains = analyze.find_chains(made_edges(pairs), {30})
    # 1 2 4 5 6 7 and no further; 8 9 is one edge, 11 12 too, as 30 is taken; 10 would have to lead to 5
    assert [[pairs[k] for k in chain] for chain in chains] == [[(1, 2), (2, 4), (4, 5), (5, 6), (6, 7)]]
    chains = analyze.find_chains(made_edges(pairs), {4})
    assert [[pairs[k] for k in chain] for chain in chains] == [
        [(1, 2), (2, 3)], [(5, 6), (6, 7), (7, 20)], [(11, 12), (12, 30)]]


# -----------------------------------------------------------------------------
# mistakes

def refused(out, *flags):
    """The one line that automata says and stops."""
    done = script("analyze.py", "automata", f"--out_dir={out}", "--device=cpu", *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (out / "sae/scaling/automata.json").exists()
    return done.stderr


def test_where_automata_cannot_be_judged_one_line_says_why(tmp_path):
    this, sae = random_run(tmp_path, tokens=range(200))
    assert "--read_tokens" in refused(tmp_path, "--read_tokens=1")
    assert "--read_tokens" in refused(tmp_path, "--read_tokens=20")
    np.tile(np.arange(V, dtype=np.uint16), 99).tofile(tmp_path / "train.bin")
    assert "occurs 100 times" in refused(tmp_path)
    np.tile(np.arange(V, dtype=np.uint16), 100).tofile(tmp_path / "train.bin")
    torch.nn.init.constant_(sae.b_enc, -1e6)
    save_sae(tmp_path / "sae/scaling/sae.pt", sae, source=this.source)
    assert "every feature is dead" in refused(tmp_path)
