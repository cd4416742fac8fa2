"""One feature beside a property: planted features with known figures, each proxy by slow references, as users run it."""

import ast
import io
import json
import keyword
import os
import re
import shutil
import tokenize
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
from conftest import ROOT, script
from sae import load_sae, save_sae
from test_analyses import TOKENIZER, V, WORDS, by_hand, fires, lookup_run, random_run

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a user would see numpy's warnings, too

WORD = [word.decode() for word in WORDS]  # "foo", " foo", " bar", " baz"


def study(out, *flags):
    """Runs the command -> what it printed, and study.json."""
    done = script("analyze.py", "study", *flags, f"--out_dir={out}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    path = os.path.join(out, "sae/scaling/study")
    assert open(path + ".png", "rb").read(4) == b"\x89PNG"
    with open(path + ".json", encoding="utf-8") as file:
        return done.stdout, json.load(file)


def refused(out, *flags):
    done = script("analyze.py", "study", *flags, f"--out_dir={out}", "--device=cpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# -----------------------------------------------------------------------------
# specificity, sensitivity

# One feature: 4 on " foo", 3 on "foo", 1 on " bar"; another on " baz" alone. The property is: the token " foo".
ACTS = {0: {" foo": 4.0, "foo": 3.0, " bar": 1.0}, 1: {" baz": 2.0}}


def words(n, seed=0):
    """Random words, "foo" at the start of a line: what stands before it would not let it be a token."""
    return "".join(np.random.default_rng(seed).choice(["\nfoo", *WORD[1:]], n, p=[0.2, 0.3, 0.1, 0.4]).tolist())


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A run on random words, and the strings of the tokens on which it is judged."""
    this = lookup_run(tmp_path_factory.mktemp("planted"), words(1000), fires(ACTS))
    return this, [TOKENIZER.decode([token]) for token in this.contexts[:, :-1].flatten().tolist()]


def test_a_planted_feature_has_the_specificity_and_sensitivity_that_counting_gives(planted):
    this, tokens = planted
    _, found = study(this.out_dir, "0", "--proxy=token: foo")
    n = {word: tokens.count(word) for word in WORD}
    feature = found["detectors"]["feature"]
    assert found["proxy"] == "token: foo" and found["share"] == pytest.approx(n[" foo"] / len(tokens))
    assert feature["edges"] == pytest.approx([0.4 * k for k in range(11)])
    # off; 1 is in the third of ten intervals up to 4, 3 in the eighth, 4 in the tenth
    assert feature["tokens"] == [n[" baz"] + tokens.count("\n"), 0, 0, n[" bar"], 0, 0, 0, 0, n["foo"], 0, n[" foo"]]
    assert feature["share"] == [0, None, None, 0, None, None, None, None, 0, None, 1]
    assert (feature["lowest"], feature["highest"]) == (0, 1)
    held = 4 * n[" foo"] + 3 * n["foo"] + n[" bar"]
    assert feature["share_by_activation"] == pytest.approx(4 * n[" foo"] / held, rel=1e-6)
    below_1 = n[" foo"] / (n[" foo"] + n["foo"] + n[" bar"])
    below_3 = n[" foo"] / (n[" foo"] + n["foo"])
    assert feature["precision"] == pytest.approx([below_1] * 3 + [below_3] * 5 + [1, 1])
    assert feature["recall"] == [1.0] * 10


def test_log_likelihood_ratios_are_those_of_counts(planted):
    this, tokens = planted
    printed, found = study(this.out_dir, "0", "--proxy=o+")  # "foo" and " foo" have it
    assert "--proxy is read as a regular expression" in printed
    P = {word: tokens.count(word) / len(tokens) for word in WORD}
    n_with = tokens.count("foo") + tokens.count(" foo")
    expected = {word: np.log((tokens.count(word) * ("o" in word) + P[word]) / (n_with + 1) / P[word]) for word in WORD}
    got = found["detectors"]["feature"]["log_likelihood_ratio"]
    assert expected["foo"] > 0 > expected[" bar"] == pytest.approx(expected[" baz"])  # and it is that of line ends
    assert [got[k] for k in (0, 3, 8, 10)] == pytest.approx([expected[word] for word in (" baz", " bar", "foo", " foo")])
    assert got[1] is None


def test_the_correlation_with_the_proxy_is_pearsons_and_none_of_what_is_constant(planted):
    this, tokens = planted
    _, found = study(this.out_dir, "0", "--proxy=token: foo")
    acts = [ACTS[0].get(token, 0) for token in tokens]
    has = [token == " foo" for token in tokens]
    assert found["detectors"]["feature"]["pearson"] == pytest.approx(np.corrcoef(acts, has)[0, 1], abs=1e-6)
    one = analyze.assess(np.ones(4, np.float32), np.array([True, False, True, False]), np.zeros(4))
    assert one["pearson"] is None and one["share"][-1] == 0.5


def test_what_is_printed(planted):
    this, tokens = planted
    printed, _ = study(this.out_dir, "0", "--proxy=token: foo")
    assert "regular expression" not in printed
    n, n_foo = len(tokens), tokens.count(" foo")
    assert f"\n{n_foo / n:.2%} of {n:,} held-out tokens are with the property: token: foo\n" in printed
    top = re.search(r"^ *3\.60 to 4\.00 +(\d+) +100\.0% +\+\d\.\d\d +100\.0% +100\.0%$", printed, re.M)
    assert int(top[1]) == n_foo
    assert re.search(r"^ *0\.00 to 0\.40 {9}0 {20} {12}\d\d\.\d% {11}100\.0%$", printed, re.M)  # no token: blank
    assert "--other=FOLDER" in printed and "\n  best neuron " in printed


# -----------------------------------------------------------------------------
# proxies

def python_truth(text):
    """The class of every character by the standard library's tokenize, with whole f-strings as strings; or None."""
    kinds = {tokenize.COMMENT: "comment", tokenize.STRING: "string", tokenize.NUMBER: "number", tokenize.OP: "op"}
    lines = text.split("\n")
    starts = np.cumsum([0] + [len(line) + 1 for line in lines])
    classes, opened = [None] * len(text), []
    for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
        first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
        name = tokenize.tok_name[token.type]
        kind = kinds.get(token.type)
        if name == "NAME":
            kind = "keyword" if keyword.iskeyword(token.string) else "name"
        if name in ("FSTRING_START", "TSTRING_START"):  # Python 3.12 and later
            opened.append(first)
        elif name in ("FSTRING_END", "TSTRING_END"):
            first, kind = opened.pop(), "string"
        if kind and not opened:
            classes[first:last] = [kind] * (last - first)
    return classes


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def classes_of(text):
    found = [None] * len(text)
    for kind, start, end in analyze.python_spans(text):
        found[start:end] = [(*analyze.CLASSES, "error")[kind]] * (end - start)
    return found


@pytest.mark.parametrize("path", [os.path.join(ROOT, "analyze.py"), os.path.join(ROOT, "sae.py"), ast.__file__,
                                  tokenize.__file__, io.__file__, re.__file__, os.__file__])
def test_python_is_read_as_the_standard_librarys_tokenize_reads_it(path):
    text = read(path)
    assert classes_of(text) == python_truth(text) and len(set(classes_of(text))) >= 6


@pytest.mark.parametrize("quotes", ['"""', "'''"])
def test_a_piece_may_begin_or_end_inside_a_long_string(quotes):
    before = "def f(x):\n    " + quotes
    string = "It's what the caller's x is: \"x\"? Don't ask!\n    More of it.\n    " + quotes
    code = "\n    return x + 1  # done\n\n\nclass A:\n    " + quotes + "An end that isn't there"
    cut = len(before)
    whole, found = classes_of(before + string + code), classes_of(string + code)
    assert found == whole[cut:] and "error" not in whole
    assert set(found[:len(string)]) == {"string"} == set(found[-20:])
    assert found[found.index("keyword"):][:6] == ["keyword"] * 6 and found.count("comment") == len("# done")


@pytest.mark.parametrize("before, rest", [("# It's a", " comment, isn't it?"), ("x = 'It is a", " text of mine, isn\\'t it?'"),
                                          ('x = "It\'s', ' a text, isn\'t it?"')])
def test_a_piece_may_begin_inside_a_comment_or_a_short_string(before, rest):
    rest += '\n\n\ndef f(x):\n    """It\'s a function."""\n    return "x" + x  # and more\n'
    whole = classes_of(before + rest)
    assert classes_of(rest) == whole[len(before):] and "error" not in whole


def test_of_readings_without_an_error_the_one_that_hides_least_counts():
    """The piece begins inside a comment; as if inside a long string, all up to the quotes would be string, without error."""
    before, rest = "# (that is", " what he said)\nx = y + 1  # more\nz = '''text'''\n"
    assert classes_of(rest) == classes_of(before + rest)[len(before):]
    assert classes_of(rest).count("string") == len("'''text'''")
    end = 'text that ends\n"""\nx = y + 1\n'  # and here it does begin inside a long string
    assert classes_of(end) == classes_of('"""' + end)[3:]


def test_of_pieces_cut_anywhere_next_to_nothing_is_misread():
    text = read(os.path.join(ROOT, "analyze.py"))
    whole = classes_of(text)
    wrong = total = 0
    for start in range(1000, len(text) - 9000, 3701):
        piece = classes_of(text[start:start + 9000])
        wrong += sum(a != b for a, b in zip(piece, whole[start:]))
        total += len(piece)
    assert total > 200_000 and wrong < 0.002 * total


def test_prose_is_no_python():
    assert classes_of("what? it has been seen").count("error") == len("?" "has" "seen")
    assert "error" not in classes_of("match x:\n    case y:\n        z = int\n")


def test_a_pattern_has_every_token_that_it_touches_and_none_beyond_a_document(tmp_path):
    text = "ab-cd\u05d0\u05d1 foo"  # each Hebrew letter is two tokens of a byte each
    tokens = TOKENIZER.encode_ordinary(text) + [TOKENIZER.eot_token] + TOKENIZER.encode_ordinary("end foo" + " baz" * 30)
    this, _ = random_run(tmp_path / "out", tokens=tokens, block_size=32)
    def marked(pattern):
        has, = analyze.with_patterns(this, [pattern])
        return [place for place in np.flatnonzero(has[0]).tolist() if place < 15]
    assert [len(part) for part in (text, tokens[:11])] == [11, 11]
    assert marked("[\u0590-\u05ff]") == marked(r"[\u0590-\u05ff]") == marked(analyze.PATTERNS["hebrew"]) == [5, 6, 7, 8]
    assert marked("b-c") == [1, 2, 3] and marked("\u05d1") == [7, 8]
    assert marked("fo") == [9, 14] and marked("end") == [11, 12, 13]  # a part of " foo" is enough
    assert marked("endoftext") == [] == marked("(?s)foo.+end") and marked("x*") == []
    # half a letter at the edge of a context is still a token, and no letter
    touched = analyze.touched([b"\x90", b"\xd7", b"a\xd7\x90", b"\xd7"], lambda text: [(0, text.index("a"), 5)], 1)
    assert touched.tolist() == [[False, False, True, True]]


def test_a_token_is_exactly_its_string(planted, tmp_path):
    this, tokens = planted
    for string in WORD:
        has = analyze.read_proxy(this, f"token:{string}")[:, :-1].ravel()
        assert has.tolist() == [token == string for token in tokens]
    error = refused(this.out_dir, "0", "--proxy=token:bar")
    assert "no token is 'bar': there is ' bar'" in error
    letters = [TOKENIZER.decode([token]) for token in TOKENIZER.encode_ordinary("quux")]
    error = refused(this.out_dir, "0", "--proxy=token:quux")
    assert len(letters) > 1 and f"no token is 'quux': there is {', '.join(map(repr, letters))}\n" in error
    assert "no token is '': give one" in refused(this.out_dir, "0", "--proxy=token:")
    this = lookup_run(tmp_path / "out", "a\nb" * 40, fires({0: {"\n": 1.0}}))
    assert analyze.read_proxy(this, "token:⏎").sum() == analyze.read_proxy(this, "token:\n").sum() > 10


def test_classes_are_those_of_the_whole_text_at_the_tokens_of_the_contexts(tmp_path):
    text = '"""A module: it\'s long.\n' + "More of what it says here, foo bar.\n" * 30 + '"""\nx = 12  # foo\n' * 9
    text = text + "import os\n" * 20
    this = lookup_run(tmp_path / "out", text, fires({0: {"foo": 1.0}}))
    truth = classes_of(text)
    starts = np.cumsum([0] + [len(TOKENIZER.decode([token])) for token in TOKENIZER.encode_ordinary(text)])
    for name in ("string", "comment", "number", "keyword", "name", "op"):
        has = analyze.read_proxy(this, name)
        for row, context in enumerate(has[:, :-1]):  # the contexts are the text here, in order
            for t, value in enumerate(context.tolist()):
                k = row * this.T + t
                assert value == (name in truth[starts[k]:starts[k + 1]])
    assert this.contexts.numel() > 200


def test_a_property_that_tells_nothing_and_what_is_none_is_refused_in_one_line(planted, tmp_path):
    this, _ = planted
    assert "no held-out token has it" in refused(this.out_dir, "0", "--proxy=Z")
    assert "every held-out token has it" in refused(this.out_dir, "0", "--proxy=(?s).")
    assert "no regular expression: unterminated" in refused(this.out_dir, "0", "--proxy=[a")
    assert "no held-out token has it" in refused(this.out_dir, "0", "--proxy=comment")
    assert "not active on any" in refused(this.out_dir, "7", "--proxy=foo")
    assert "give the number of a feature" in refused(this.out_dir, "x", "--proxy=foo")
    for numbers in ([], ["1", "2"]):
        assert "study takes one number of a feature" in refused(this.out_dir, *numbers, "--proxy=foo")
    assert "(there are scaling)" in refused(this.out_dir, "0", "--name=nobody")
    lookup_run(tmp_path / "out", words(1000, seed=1), fires(ACTS))
    error = refused(this.out_dir, "0", "--proxy=foo", f"--other={tmp_path / 'out/sae/scaling'}")
    assert "held-out text" in error
    assert "not found" in refused(this.out_dir, "0", "--proxy=foo", "--other=nowhere/at/all")


# -----------------------------------------------------------------------------
# the proposal

def test_the_proposal_is_the_planted_property(planted):
    this, tokens = planted
    printed, found = study(this.out_dir, "1")
    assert found["proxy"] == "token: baz" and "--proxy='token: baz'" in printed
    share = tokens.count(" baz") / len(tokens)
    assert f"{share:8.2%}{1:9.1%}{np.log(1 / share):8.3f}" in printed  # nats: it was p and is now certain


CODE = "".join(f"x{i} = {i * 37}  # foo {i * 53}\nif x{i}:\n    y = 'foo {i * 71} \u05d0\u05d1'\n" for i in range(60))


@pytest.mark.parametrize("name", ["comment", "string", "number", "keyword", "hebrew"])
def test_the_proposal_is_the_planted_class(tmp_path, name):
    this = lookup_run(tmp_path / "out", CODE, fires({0: {"7": 1.0}}))
    has = analyze.read_proxy(this, name)
    acts = np.random.default_rng(0).uniform(0.5, 1, len(this.tokens)) * has[:, :-1].ravel()
    best, *others = analyze.candidates(this, acts.astype(np.float32), n_strings=0)
    assert best[0] == name and (best[1] == has).all() and others
    share = has[:, :-1].mean()
    assert best[2:] == pytest.approx((share, 1, np.log(1 / share)))
    assert all(gain <= best[4] for *_, gain in others)


def test_the_gain_is_the_log_likelihood_that_the_property_gains_where_the_feature_is_active():
    p, q = 0.2, 0.7  # of 10 tokens where it is active 7 have the property, of all a fifth
    labels = [True] * 7 + [False] * 3
    after = sum(np.log(q if label else 1 - q) for label in labels)
    before = sum(np.log(p if label else 1 - p) for label in labels)
    assert analyze.divergence(q, p) == pytest.approx((after - before) / 10)
    assert analyze.divergence(1.0, p) == pytest.approx(np.log(5)) and analyze.divergence(0.0, p) == pytest.approx(-np.log(0.8))


def test_text_that_is_no_python_has_no_classes_proposed(tmp_path):
    this = lookup_run(tmp_path / "out", "isn't foo? it can't be ! " * 60, fires({0: {" foo": 1.0}}))
    names = {name for name, *_ in analyze.candidates(this, this.activations([0])[0])}
    assert names == {"token: foo", "latin"}  # a word of Python would be a name, too


# -----------------------------------------------------------------------------
# effect

@pytest.mark.parametrize("site", ["mlp.0", "resid.1", "attn.0"])
def test_ablations_effect_is_that_of_the_model_without_the_feature(tmp_path, site):
    rng = np.random.default_rng(0)
    this, sae = random_run(tmp_path / "out", site, tokens=rng.integers(0, V, 200))
    acts = this.activations(range(this.n_features))
    i = int(np.argsort((acts > 0).mean(1))[this.n_features // 2])  # neither dead nor everywhere
    has = this.contexts.numpy() % 3 == 0
    entries = np.arange(V) % 3 == 0
    found = analyze.ablate(this, i, acts[i], has, entries)

    x = []
    logs = []
    def keep(name, value):
        if name == site:
            x.append(value.double().numpy())
    def without(name, value):
        if name == site:
            f, directions, unit = by_hand(sae, value.double().numpy())
            return value - torch.from_numpy(f[..., [i]] * directions[i] * unit).float()
    contexts = this.contexts[:, :-1]
    for hook in (keep, without):
        logits = this.gpt(contexts, hook=hook)[0].double().numpy()
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    active = by_hand(sae, x[0])[0][..., i] > 0
    assert 0 < active.sum() < active.size and found["places"] == active.sum()
    for side in (0, 1):
        masses = np.exp(logs[side])[..., entries].sum(-1)[active]
        assert found["mass"][side] == pytest.approx(masses.mean(), rel=1e-4)
    following = this.contexts[:, 1:].numpy()
    for name, chosen in (("with", active & has[:, 1:]), ("without", active & ~has[:, 1:])):
        row = found["next"][name]
        assert row["places"] == chosen.sum() > 0
        for side in (0, 1):
            own = np.take_along_axis(logs[side], following[..., None], 2)[..., 0][chosen]
            assert row["log_probability"][side] == pytest.approx(own.mean(), rel=1e-4)
            assert row["probability"][side] == pytest.approx(np.exp(own).mean(), rel=1e-4)
    assert abs(found["mass"][0] / found["mass"][1] - 1) > 1e-5


def test_an_entry_of_the_vocabulary_has_what_most_of_its_occurrences_have(planted):
    this, _ = planted
    contexts = this.contexts.numpy()
    has = np.random.default_rng(0).random(contexts.shape) < np.where(contexts % 2, 0.8, 0.3)
    entries, known = analyze.entries_with(this, has)
    for token in range(V):
        here = contexts == token
        assert known[token] == here.any() and entries[token] == (has[here].sum() > here.sum() / 2)
    logits = np.where(entries, 2.0, -1.0) + np.arange(V) / 1000
    found = analyze.raised_entries(logits, entries, known, n=3)
    inside = logits[known & entries], logits[known & ~entries]
    assert found["median_logits"] == pytest.approx([np.median(part) for part in inside])
    assert (found["top"], found["top_with"]) == (3, min(3, (known & entries).sum()))
    assert found["entries_with"] == pytest.approx(entries[known].mean())
    assert analyze.raised_entries(logits, entries, known & entries)["median_logits"][1] is None


# -----------------------------------------------------------------------------
# neurons, twins

@pytest.mark.parametrize("site", ["mlp.0", "resid.1"])
def test_the_nearest_and_the_best_neuron(tmp_path, capsys, site):
    """Of several layers a name has the layer and the number in it; the table's columns stay below one another."""
    this, _ = random_run(tmp_path / "out", site, tokens=np.random.default_rng(0).integers(0, V, 200))
    acts, has = this.activations([3])[0], this.tokens % 2 == 0
    neurons = this.neurons().T.numpy()
    found = analyze.rival_neurons(this, acts, has)
    with np.errstate(invalid="ignore"):  # of a dead neuron, NaN
        to_feature = [np.corrcoef(acts, row)[0, 1] for row in neurons]
        to_property = [np.corrcoef(has, row)[0, 1] for row in neurons]
    for role, values in (("nearest neuron", to_feature), ("best neuron", to_property)):
        k = int(np.nanargmax(values))
        name = f"neuron {k}" if site == "mlp.0" else f"mlp.{k // 32} neuron {k % 32}"
        assert found[role].name == name and (found[role].acts == neurons[k]).all()
        assert found[role].correlation == pytest.approx(to_feature[k], abs=1e-5)
    judged = {}
    for role, one in found.items():
        ratios = np.zeros(len(acts))
        judged[role] = {"name": one.name, "correlation": 0.0} | analyze.assess(one.acts, has, ratios)
    capsys.readouterr()  # what was read may have been said
    analyze.print_detectors(judged, None)
    heading, *rows = capsys.readouterr().out.splitlines()[2:5]
    assert {row.index(" 0.00") for row in rows} == {heading.index("feature") + 4}
    judged["best neuron"]["pearson"] = None  # of a property that all tokens have
    analyze.print_detectors(judged, None)
    without = capsys.readouterr().out.splitlines()[4]
    assert len(without.split()) == len(rows[1].split()) and without.index("%") == rows[1].index("%")


def twins(folder, order, noise=0.0):
    """A second autoencoder of planted's model whose feature order[k] is its feature k, with some noise."""
    table = fires(ACTS)
    other = table[:, :2] + noise * np.random.default_rng(3).random((V, 2)) * (table[:, :2] > 0)
    table[:, :2], table[:, order] = 0, other
    return lookup_run(folder, words(1000), table)


def test_the_twin_is_found_and_its_logit_weights_compared(planted, tmp_path):
    this, tokens = planted
    other = twins(tmp_path / "out", [41, 17], noise=0.5)
    _, found = study(this.out_dir, "0", "--proxy=foo", f"--other={other.folder}")
    twin = found["twin"]
    assert (twin["run"], twin["feature"]) == (other.folder, 41)
    ours, theirs = this.activations([0])[0], other.activations([41])[0]
    assert twin["activations"] == pytest.approx(np.corrcoef(ours, theirs)[0, 1], abs=1e-5) and twin["activations"] < 0.9999
    assert found["detectors"]["twin"]["correlation"] == twin["activations"]
    # resid.0 is the last: centred, the gain (1 at the start), the unembedding
    U = this.gpt.lm_head.weight.double().numpy()
    weights = [U @ (row - row.mean()) for row in (this.sae.W_dec[0].double().numpy(), other.sae.W_dec[41].double().numpy())]
    assert twin["logit_weights"] == pytest.approx(np.corrcoef(*weights)[0, 1], abs=1e-5)
    has = ["foo" in token for token in tokens]
    assert found["detectors"]["twin"]["pearson"] == pytest.approx(np.corrcoef(theirs, has)[0, 1], abs=1e-6)


def test_what_is_never_active_is_no_rival(planted, tmp_path):
    """Even where all that is active correlates negatively, which a dead one, at 0, would be above."""
    acts, has = np.array([0, 0, 1, 3], np.float32), np.array([False, False, True, True])
    neurons = np.array([[0, 0, 0, 0], [1, 2, 0, 0], [1, 0, 0, 0]], np.float32)
    columns = torch.from_numpy(neurons.T)
    found = analyze.rival_neurons(SimpleNamespace(neurons=lambda: columns, neuron_sites=["mlp.0"]), acts, has)
    assert [one.name for one in found.values()] == ["neuron 2", "neuron 2"]
    assert found["best neuron"].correlation == pytest.approx(np.corrcoef(acts, neurons[2])[0, 1])
    assert analyze.rival_neurons(SimpleNamespace(neurons=lambda: 0 * columns), acts, has) == {}
    this, _ = planted
    other = twins(tmp_path / "out", [41, 17], noise=0.5)
    path = os.path.join(other.folder, "sae.pt")
    sae = load_sae(path)
    sae.b_enc.data.fill_(-100)
    save_sae(path, sae, **sae.extra)
    assert "every feature is dead" in refused(this.out_dir, "0", "--proxy=foo", f"--other={other.folder}")


def test_the_command_on_a_trained_run_with_a_twin_and_at_a_site_without_neurons(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    printed, found = study(out, best_feature(out), "--other=scaling")
    # on every token it is active, and a mean far above its spread is all but cancelled in float32
    assert found["twin"]["activations"] == pytest.approx(1, abs=3e-6)
    assert found["twin"]["logit_weights"] == pytest.approx(1)
    assert set(found["detectors"]) == {"feature", "nearest neuron", "best neuron", "twin"}
    assert "NaN" not in (out / "sae/scaling/study.json").read_text() and "properties that it may stand for" in printed


def best_feature(out):
    """The number of a feature that the report shows first."""
    done = script("analyze.py", f"--out_dir={out}", "--show=1", "--device=cpu", "--eval_tokens=500")
    return re.search(r"^feature (\d+) ", done.stdout, re.M)[1]


def test_at_attention_there_are_no_neurons(tmp_path):
    this, _ = random_run(tmp_path / "out", "attn.0", tokens=np.random.default_rng(0).integers(0, V, 200))
    alive = int(this.activations(range(this.n_features)).any(1).argmax())
    printed, found = study(tmp_path / "out", str(alive), r"--proxy=[\x00-\x1f]")
    assert list(found["detectors"]) == ["feature"] and "neuron  " not in printed and found["twin"] is None
