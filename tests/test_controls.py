"""The controls: a model with shuffled weights, and how much of the model its tokens explain."""

import json
import os
import re
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch

from conftest import SMALL_SAE, script
from model import GPT, GPTConfig, load_gpt, save_checkpoint, shuffled_weights
from sae import load_sae
from test_analyses import activations_at, by_hand, random_run
from test_scripts import goes_on_without_it_alone, hashes

SHUFFLED = (*SMALL_SAE, "--shuffle_weights", "--name=shuffled")


def numbers_in(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def out(trained, tmp_path):
    """A copy of the tiny run, its activations and autoencoder included."""
    return shutil.copytree(trained, tmp_path / "out")


# -----------------------------------------------------------------------------
# shuffled weights


def random_gpt(seed):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=8))
    with torch.no_grad():
        for p in gpt.parameters():  # no two entries alike, so that an order shows
            p.copy_(torch.randn_like(p))
    return gpt


def matrices(gpt):
    """{name: matrix} of all matrices, query, key and value apart; numpy."""
    found = {}
    for name, p in gpt.state_dict().items():
        if p.dim() == 2:
            parts = np.split(p.numpy(), 3) if name.endswith("c_attn.weight") else [p.numpy()]
            found |= {f"{name} {k}": part for k, part in enumerate(parts)}
    return found


def test_shuffled_weights_are_the_same_entries_in_another_order_and_vectors_stay():
    gpt = random_gpt(0)
    before = {name: p.clone() for name, p in gpt.state_dict().items()}
    shuffled = shuffled_weights(gpt)
    assert all(torch.equal(p, before[name]) for name, p in gpt.state_dict().items())  # it is a copy
    now = matrices(shuffled)
    assert len(now) == 2 + 2 * 6 + 1  # embeddings; q, k, v, three more a block; the unembedding
    for name, matrix in matrices(gpt).items():
        np.testing.assert_array_equal(np.sort(now[name], axis=None), np.sort(matrix, axis=None))
        moved = (now[name] != matrix).mean()
        assert moved > 0.9, name
        # from row to row and from column to column: no row has kept its entries
        rows, columns = [], []
        for value in matrix.flat:
            row, column = np.argwhere(now[name] == value)[0]
            rows.append(row)
            columns.append(column)
        old_rows, old_columns = np.indices(matrix.shape).reshape(2, -1)
        for old, new in ((old_rows, rows), (old_columns, columns)):
            assert abs(np.corrcoef(old, new)[0, 1]) < 0.4, name
    for name, p in shuffled.state_dict().items():
        assert p.dim() == 2 or torch.equal(p, before[name]), name


def test_the_order_is_the_models_own_and_two_models_share_none():
    first, again, other = random_gpt(0), random_gpt(0), random_gpt(1)
    assert shuffled_weights(first).fingerprint() == shuffled_weights(again).fingerprint()
    assert shuffled_weights(first).fingerprint() != first.fingerprint()

    def order(gpt):
        before = gpt.lm_head.weight.flatten().tolist()
        return [before.index(value) for value in shuffled_weights(gpt).lm_head.weight.flatten().tolist()]

    orders = np.array([order(first), order(other)])
    assert (orders[0] == orders[1]).mean() < 0.05


def rows_by_hand(gpt, out):
    """The activations at mlp.0 of all tokens of the training text, in whole contexts: (many, n), numpy."""
    T = gpt.config.block_size
    tokens = np.fromfile(out / "train.bin", dtype=np.uint16)
    idx = tokens[:len(tokens) // T * T].reshape(-1, T).astype(np.int64)
    return gpt.activations(torch.from_numpy(idx), "mlp.0").flatten(0, 1).numpy()


def test_activations_of_the_shuffled_model_have_a_folder_of_their_own(out):
    before = hashes(out / "acts/mlp.0")
    done = script("train_sae.py", f"--out_dir={out}", *SHUFFLED)
    assert done.returncode == 0, done.stderr
    assert hashes(out / "acts/mlp.0") == before and sorted(os.listdir(out / "acts")) == ["mlp.0", "mlp.0-shuffled"]

    gpt, _ = load_gpt(out)
    shuffled = shuffled_weights(gpt)
    meta, source = numbers_in(out / "acts/mlp.0-shuffled/meta.json"), load_sae(out / "sae/shuffled/sae.pt").extra["source"]
    trained = load_sae(out / "sae/scaling/sae.pt").extra["source"]
    assert meta["gpt"] == source["gpt"] == shuffled.fingerprint() != gpt.fingerprint() == trained["gpt"]
    assert source["site"] == "mlp.0" and source["shuffled"] is True and "shuffled" not in trained

    # a row on disk is one of the shuffled model, and none of the trained one
    rows = np.load(out / "acts/mlp.0-shuffled/train-000.npy")[:10].astype(np.float32)
    for model, same in ((shuffled, True), (gpt, False)):
        distances = np.abs(rows[:, None] - rows_by_hand(model, out)[None]).max(2).min(1)
        assert (distances.max() < 2e-3) == same

    # a run of the trained model finds its files as they were, and those of the control stay
    control = hashes(out / "acts/mlp.0-shuffled")
    done = script("train_sae.py", f"--out_dir={out}", *SMALL_SAE, "--name=again")
    assert "1 of 2 files" not in done.stdout and "2 of 2 files are there" in done.stdout
    assert hashes(out / "acts/mlp.0-shuffled") == control


def test_a_streamed_control_is_the_same_and_writes_no_activations(out):
    done = script("train_sae.py", f"--out_dir={out}", *SHUFFLED)
    assert done.returncode == 0, done.stderr
    rows = np.load(out / "acts/mlp.0-shuffled/train-000.npy")
    shutil.rmtree(out / "acts")
    done = script("train_sae.py", f"--out_dir={out}", *SHUFFLED, "--stream", "--name=streamed")
    assert done.returncode == 0 and not (out / "acts").exists(), done.stderr
    written, streamed = (load_sae(out / f"sae/{name}/sae.pt") for name in ("shuffled", "streamed"))
    assert streamed.extra["source"]["gpt"] == written.extra["source"]["gpt"]
    # the scale is measured on other samples of the same rows
    scale = np.sqrt(rows.shape[1] / np.square(rows.astype(float)).sum(1).mean())
    assert streamed.scale.item() == pytest.approx(scale, rel=0.03)
    assert written.scale.item() == pytest.approx(scale, rel=0.03)


def test_resume_goes_on_with_the_same_model_alone(out):
    flags = (f"--out_dir={out}", *SMALL_SAE, "--max_iters=70", "--resume")
    done = script("train_sae.py", *flags, "--shuffle_weights")  # of the trained model's autoencoder
    assert done.returncode == 2 and "--shuffle_weights=True" in done.stderr
    assert done.stderr.count("\n") == 1 and not (out / "acts/mlp.0-shuffled").exists()

    assert script("train_sae.py", f"--out_dir={out}", *SHUFFLED).returncode == 0
    done = script("train_sae.py", *flags, "--name=shuffled")
    assert done.returncode == 2 and "--shuffle_weights=False" in done.stderr
    done = script("train_sae.py", *flags, "--name=shuffled", "--shuffle_weights")
    assert done.returncode == 0 and load_sae(out / "sae/shuffled/sae.pt").extra["step"] == 70


def test_a_checkpoint_from_before_the_flag_goes_on_without_it_alone(out):
    path = out / "sae/scaling/sae.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["args"]["shuffle_weights"]
    torch.save(checkpoint, path)
    goes_on_without_it_alone(out, "shuffle_weights")


@pytest.mark.parametrize("acts", ["toy", "my/*.npy"])
def test_only_a_models_weights_can_be_shuffled(tmp_path, acts):
    done = script("train_sae.py", f"--out_dir={tmp_path}", f"--acts={acts}", "--shuffle_weights")
    assert done.returncode == 2 and "--shuffle_weights" in done.stderr and done.stderr.count("\n") == 1


def test_an_autoencoder_of_the_shuffled_model_is_judged_on_it(out):
    assert script("train_sae.py", f"--out_dir={out}", *SHUFFLED).returncode == 0

    def analyzed(*flags):
        done = script("analyze.py", *flags, f"--out_dir={out}", "--device=cpu")
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = analyzed("--name=shuffled", "--show=1")
    assert "shuffled · scaling recipe · mlp.0, weights shuffled · 96 features" in printed
    metrics = numbers_in(out / "sae/shuffled/metrics.json")

    # by hand: the loss of the shuffled model, as it is, and with zeros at the site
    gpt = shuffled_weights(load_gpt(out)[0])
    tokens = torch.from_numpy(np.fromfile(out / "val.bin", dtype=np.uint16).astype(np.int64))
    contexts = tokens.unfold(0, gpt.config.block_size + 1, gpt.config.block_size)

    def loss_of(hook=None):
        return gpt(contexts[:, :-1], contexts[:, 1:], hook)[1].item()

    assert metrics["loss_plain"] == pytest.approx(loss_of(), rel=1e-5)
    zero = loss_of(lambda site, x: torch.zeros_like(x) if site == "mlp.0" else None)
    assert metrics["loss_zero_ablated"] == pytest.approx(zero, rel=1e-5)
    sae = load_sae(out / "sae/shuffled/sae.pt")
    x = gpt.activations(contexts[:, :-1], "mlp.0")
    error = (sae(x) - x).detach().double().square().sum()
    variance = (x.double() - x.double().mean((0, 1))).square().sum()
    assert metrics["variance_explained"] == pytest.approx(1 - (error / variance).item(), rel=1e-4)

    # the other commands
    alive = sae.encode(x).sum((0, 1)).argmax().item()
    assert f"feature {alive} " in analyzed("feature", alive, "--name=shuffled")
    assert "alive features of mlp.0, weights shuffled against" in analyzed("neurons", "--name=shuffled")
    for command in (("cause",), ("steer", f"--feature={alive}"), ("complete",), ("search", "def add"), ("explain",)):
        analyzed(*command, "--name=shuffled")
    printed = analyzed("compare", "scaling", "shuffled")  # two models, though in one folder
    assert re.search(r"two models: mlp\.0 \(.*\) and mlp\.0, weights shuffled \(", printed)


def test_another_model_in_its_place_is_noticed(out):
    assert script("train_sae.py", f"--out_dir={out}", *SHUFFLED).returncode == 0
    gpt, _ = load_gpt(out)
    checkpoint = torch.load(out / "gpt.pt", weights_only=True)
    checkpoint["model"]["ln_f.weight"][0] += 1
    save_checkpoint(out / "gpt.pt", **checkpoint)
    done = script("analyze.py", "--name=shuffled", f"--out_dir={out}")
    assert done.returncode == 2 and "another gpt.pt" in done.stderr


# -----------------------------------------------------------------------------
# explain: the loss with what tokens predict of each feature


def explained(out):
    done = script("analyze.py", "explain", f"--out_dir={out}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    return done.stdout, numbers_in(out / "sae/scaling/explain.json")


def loss_in_place(this, contexts, replacement):
    """The model's loss on contexts (N, T + 1) with a replacement (N, T, n), numpy, at the site."""
    replacement = torch.from_numpy(replacement.copy()).float()
    hook = lambda site, x: replacement if site == this.site else None  # noqa: E731
    return this.gpt(contexts[:, :-1], contexts[:, 1:], hook)[1].item()


def means_by_hand(tokens, values, n_previous):
    """
    values (N, T, k) -> what their means on even contexts, given the current token and n_previous before it, predict
    on odd ones (N // 2, T, k). A dictionary of lists; what was not seen falls back to fewer tokens.
    """
    def keys(c, t):
        pair = (tokens[c, t - 1] if t else "nothing", tokens[c, t])
        return [pair, pair[1], "all"][1 - n_previous:]

    seen = defaultdict(list)
    for c in range(0, len(tokens), 2):
        for t in range(tokens.shape[1]):
            for key in keys(c, t):
                seen[key].append(values[c, t])
    guesses = np.empty_like(values[1::2])
    for c in range(1, len(tokens), 2):
        for t in range(tokens.shape[1]):
            key = next(key for key in keys(c, t) if key in seen)
            guesses[c // 2, t] = np.mean(seen[key], axis=0)
    return guesses


@pytest.mark.parametrize("site, recipe, input_norm", [
    ("mlp.0", "scaling", "dataset"), ("resid.1", "towards", "dataset"), ("mlp.1", "scaling", "token")])
def test_the_explanation_is_every_features_mean_decoded(tmp_path, site, recipe, input_norm):
    """Rare tokens make odd contexts hold tokens and pairs that were never seen; the number of contexts is odd."""
    tokens = np.minimum(np.random.default_rng(0).geometric(0.15, (61, 7)), 200)
    this, sae = random_run(tmp_path, site, recipe, input_norm, [*tokens.flat, 0], block_size=7)
    x = activations_at(this.gpt, this.contexts[:, :-1], site)
    f, directions, unit = by_hand(sae, x)
    offset = sae.b_dec.detach().double().numpy() / sae.scale.item()
    if input_norm == "token":  # features in the units of x, and so the offset, which differs from token to token
        f, offset = f * unit, sae.b_dec.detach().double().numpy() * unit
    offset = np.broadcast_to(offset, x.shape)
    judged = this.contexts[1::2]

    expected = {"plain": this.gpt(judged[:, :-1], judged[:, 1:])[1].item()}
    for name, n_previous in (("pair", 1), ("token", 0)):
        guess = means_by_hand(tokens, f, n_previous)  # (30, 7, m)
        x_hat = means_by_hand(tokens, offset, n_previous)
        for i in range(sae.config.n_features):  # feature by feature
            x_hat = x_hat + guess[..., [i]] * directions[i]
        expected[f"features_by_{name}"] = loss_in_place(this, judged, x_hat)
        expected[f"x_by_{name}"] = loss_in_place(this, judged, means_by_hand(tokens, x, n_previous))
    expected["spliced"] = loss_in_place(this, judged, (f @ directions + offset)[1::2])
    expected["mean_ablated"] = loss_in_place(this, judged, np.broadcast_to(x[::2].mean((0, 1)), x[1::2].shape))
    expected["zero_ablated"] = loss_in_place(this, judged, np.zeros_like(x[1::2]))

    printed, numbers = explained(tmp_path)
    for name, loss in expected.items():
        assert numbers[f"loss_{name}"] == pytest.approx(loss, rel=1e-5), name
        assert f"{numbers[f'loss_{name}']:.3f}" in printed, name
        cost = expected["zero_ablated"] - expected["plain"]
        recovered = pytest.approx((expected["zero_ablated"] - loss) / cost, abs=2e-3) if cost > 0 else None
        assert numbers["recovered"][name] == recovered, name
    assert cost > 0 or printed.count("undefined") == len(expected)  # zeros can be better than a random layer
    pairs = [{(c[t - 1] if t else None, c[t]) for c in part for t in range(7)} for part in (tokens[::2], tokens[1::2])]
    assert pairs[1] - pairs[0]
    seen = [(c[t - 1] if t else None, c[t]) in pairs[0] for c in tokens[1::2] for t in range(7)]
    assert numbers["tokens"] == 210 and numbers["seen_pairs"] == pytest.approx(np.mean(seen), abs=1e-6)


def test_where_the_pair_decides_all_its_explanation_is_the_autoencoder_itself(tmp_path):
    """In contexts of two tokens what the model does is a function of the previous and the current one."""
    tokens = np.random.default_rng(0).integers(0, 5, 2 * 400 + 1)
    random_run(tmp_path, tokens=tokens, block_size=2)
    _, numbers = explained(tmp_path)
    assert numbers["seen_pairs"] == 1
    recovered = numbers["recovered"]
    assert recovered["features_by_pair"] == pytest.approx(recovered["spliced"], abs=1e-4)
    assert recovered["x_by_pair"] == pytest.approx(1, abs=1e-4)
    for kind, whole in (("features", "spliced"), ("x", "plain")):
        assert abs(numbers[f"loss_{kind}_by_token"] - numbers[f"loss_{whole}"]) > 2e-4


def test_one_context_cannot_be_explained_by_another(tmp_path):
    random_run(tmp_path, tokens=range(9), block_size=8)
    done = script("analyze.py", "explain", f"--out_dir={tmp_path}", "--device=cpu")
    assert done.returncode == 2 and "--read_tokens" in done.stderr and done.stderr.count("\n") == 1
