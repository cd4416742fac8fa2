"""The language model, its hook, its tokenizer and its files, against references written out by hand."""

import math
import random
import re
import shutil
import time

import numpy as np
import pytest
import torch

import model
from model import (
    END_OF_TEXT,
    GPT,
    PATTERN,
    GPTConfig,
    Progress,
    UserError,
    bpe_tokenizer,
    load_gpt,
    load_tokenizer,
    save_checkpoint,
    save_tokenizer,
)
from sae import load_sae
from train_gpt import WordChain, count_words, learn_bpe


def small_gpt(n_layer=2, seed=0):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=n_layer, n_head=2, n_embd=8)).double()
    for p in gpt.parameters():  # biases and gains too, so that a forgotten one shows
        torch.nn.init.normal_(p, std=0.3)
    return gpt


def layer_norm(x, gain, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain + bias


def numpy_forward(gpt, idx, change=lambda site, x: x):
    """The transformer once more, in float64 numpy, one head and one query at a time. change: what a hook would do."""
    w = {name: p.detach().numpy() for name, p in gpt.named_parameters()}
    C, heads = gpt.config.n_embd, gpt.config.n_head
    d = C // heads
    out = []
    for row in idx.numpy():
        x = w["wte.weight"][row] + w["wpe.weight"][: len(row)]
        for L in range(gpt.config.n_layer):
            b = f"blocks.{L}."
            h = layer_norm(x, w[b + "ln_1.weight"], w[b + "ln_1.bias"])
            qkv = h @ w[b + "c_attn.weight"].T + w[b + "c_attn.bias"]
            mixed = np.zeros_like(x)
            for head in range(heads):
                q, k, v = (qkv[:, part * C + head * d : part * C + (head + 1) * d] for part in range(3))
                for t in range(len(row)):
                    scores = q[t] @ k[: t + 1].T / math.sqrt(d)
                    weights = np.exp(scores - scores.max())
                    mixed[t, head * d : (head + 1) * d] = weights / weights.sum() @ v[: t + 1]
            x = x + change(f"attn.{L}", mixed @ w[b + "attn_proj.weight"].T + w[b + "attn_proj.bias"])
            h = layer_norm(x, w[b + "ln_2.weight"], w[b + "ln_2.bias"])
            neurons = change(f"mlp.{L}", np.maximum(h @ w[b + "c_fc.weight"].T + w[b + "c_fc.bias"], 0))
            x = change(f"resid.{L}", x + neurons @ w[b + "mlp_proj.weight"].T + w[b + "mlp_proj.bias"])
        out.append(layer_norm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["lm_head.weight"].T)
    return np.stack(out)


def test_logits_and_loss_are_those_of_a_transformer_written_in_numpy():
    gpt, idx = small_gpt(), torch.randint(31, (3, 11))
    targets = torch.randint(31, (3, 11))
    logits, no_loss = gpt(idx)
    no_logits, loss = gpt(idx, targets)
    assert no_loss is None and no_logits is None
    expected = numpy_forward(gpt, idx)
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-9, atol=1e-10)
    logp = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logp, targets.numpy()[..., None], -1).mean()
    assert loss.item() == pytest.approx(nll, rel=1e-5)  # the loss is taken in float32


@pytest.mark.parametrize("site", ["attn.0", "mlp.0", "resid.0", "attn.1", "mlp.1", "resid.1"])
def test_what_a_hook_returns_takes_the_place_of_the_activations_at_its_site_and_nowhere_else(site):
    gpt, idx = small_gpt(), torch.randint(31, (2, 9))
    hooked, _ = gpt(idx, hook=lambda s, x: 0.5 * x + 1 if s == site else None)
    expected = numpy_forward(gpt, idx, lambda s, x: 0.5 * x + 1 if s == site else x)
    np.testing.assert_allclose(hooked.detach().numpy(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("site", ["attn.0", "mlp.0", "resid.0", "attn.1", "mlp.1", "resid.1"])
def test_what_comes_after_a_site_goes_on_from_any_activations_there(site):
    gpt, idx = small_gpt(), torch.randint(31, (2, 9))
    stream, x = gpt.before(idx, site)
    for factor in (1, 0.5):  # several x follow one stream
        logits = gpt.lm_head(gpt.after(site, stream, factor * x + 1)).detach()
        expected = numpy_forward(gpt, idx, lambda s, x: factor * x + 1 if s == site else x)
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-9, atol=1e-10)
    if site.endswith(".1"):  # of the last layer's tokens each goes on by itself
        some = gpt.lm_head(gpt.after(site, stream[:, [7, 2]], 0.5 * x[:, [7, 2]] + 1)).detach()
        np.testing.assert_allclose(some.numpy(), expected[:, [7, 2]], rtol=1e-9, atol=1e-10)


def test_a_hook_that_returns_nothing_sees_every_site_once_in_order_and_changes_nothing():
    gpt, idx, seen = small_gpt(), torch.randint(31, (2, 9)), []
    logits, _ = gpt(idx, hook=lambda site, x: seen.append((site, tuple(x.shape))))
    assert seen == [
        (f"{kind}.{layer}", (2, 9, 32 if kind == "mlp" else 8))
        for layer in range(2)
        for kind in ("attn", "mlp", "resid")
    ]
    assert torch.equal(logits, gpt(idx)[0])


def test_a_later_token_changes_no_earlier_logit():
    gpt, idx = small_gpt(), torch.randint(31, (1, 12))
    other = idx.clone()
    other[0, 8] = (idx[0, 8] + 1) % 31
    a, b = gpt(idx)[0], gpt(other)[0]
    assert torch.equal(a[:, :8], b[:, :8]) and not torch.equal(a[:, 8:], b[:, 8:])


def test_a_fresh_model_has_no_opinion_and_a_stream_that_depth_does_not_swell():
    for n_layer in (1, 8):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=n_layer, n_head=4, n_embd=64))
        idx, streams = torch.randint(500, (8, 32)), {}
        loss = gpt(idx, idx, lambda site, x: streams.update({site: x.std().item()}))[1].item()
        assert loss == pytest.approx(math.log(500), abs=0.05)
        assert streams[f"resid.{n_layer - 1}"] < 2


def test_generation_goes_on_past_the_context_and_repeats_with_the_seed():
    gpt, start = small_gpt(), torch.randint(31, (1, 10))
    a, b = (gpt.generate(start, 20, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.shape == (1, 30) and torch.equal(a, b) and torch.equal(a[:, :10], start)


@pytest.mark.parametrize("wrong", [dict(n_embd=10, n_head=3)])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(UserError):
        GPTConfig(**wrong)


# -----------------------------------------------------------------------------
# tokenizer


def slow_bpe(text, n_merges):
    """Byte-pair encoding with no clever part: count all pairs anew for every merge. Cuts words as the fast one does."""
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(PATTERN, text)]
    ranks = {bytes([i]): i for i in range(256)}
    for _ in range(n_merges):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        a, b = min(counts, key=lambda pair: (-counts[pair], ranks[pair[0]], ranks[pair[1]]))
        ranks.setdefault(a + b, len(ranks))
        for word in words:
            j = 0
            while j < len(word) - 1:
                if (word[j], word[j + 1]) == (a, b):
                    word[j : j + 2] = [a + b]
                j += 1
    return ranks


TEXT = "def banana(self, bandana):\n    return self.banana + 'bananas' * 12345  # naïve 漢字 aaaaaaa\n" * 3


def test_the_merges_are_those_of_a_slow_byte_pair_encoding():
    assert learn_bpe([TEXT], 256 + 40 + 1) == slow_bpe(TEXT, 40)


@pytest.mark.parametrize("letters", ["ab", "aaab", "ACGT", "abcdefghijklmnopqrstuvwxyz", "漢字文", "^", "0123456789", "-="])
def test_the_merges_of_words_that_never_end_are_those_of_a_slow_encoding_too(letters):
    text = "".join(random.Random(0).choices(letters, k=1500))
    slow = slow_bpe(text, 50 if len(letters) > 1 else 7)
    assert learn_bpe([text], len(slow) + 1) == slow


def test_a_merge_touches_the_places_of_its_pair_and_no_others(monkeypatch):
    touched = []
    pairs_at = WordChain.pairs_at
    monkeypatch.setattr(WordChain, "pairs_at", lambda self, at: touched.append(len(at)) or pairs_at(self, at))
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    assert len(learn_bpe([text], 1000)) == 999
    assert sum(touched) < 15 * len(text)  # 743 merges; the words that hold the pair have 40 million letters


def test_of_words_without_end_new_ones_are_taken_while_there_is_room(monkeypatch, capsys):
    texts = ["ab cd ab", " cd ef", "ab cd ef gh", "gh ab"]
    assert count_words(texts)[0] == [b"ab", b" cd", b" ab", b" ef", b" gh", b"gh"] and not capsys.readouterr().out
    monkeypatch.setattr("train_gpt.MOST_WORDS", 10)  # bytes: the second text goes beyond it and is the last whole one
    assert count_words(texts) == ([b"ab", b" cd", b" ab", b" ef"], [2, 3, 2, 2])
    assert "4 distinct words, not from all" in capsys.readouterr().out


@pytest.mark.parametrize("character", ["a", "é", "漢", "😀", "7", "٣", "-", "_", " ", "\n"])
def test_pieces_are_bounded_and_the_same_in_both_engines(character):
    doubled = [character.encode() * 2**k for k in range(10)]  # tokens that would cross a cut if there were none
    tokens = dict.fromkeys([bytes([b]) for b in range(256)] + [doubled[0][:2], doubled[0][:3]] + doubled)
    tokenizer = bpe_tokenizer({token: rank for rank, token in enumerate(tokens)})
    for n in (1, 2, 127, 128, 129, 255, 256, 257, 1000):
        for text in (character * n, " " + character * n, character * n + "x", "x" + character * n + "'s y"):
            pieces = re.findall(PATTERN, text)
            assert "".join(pieces) == text and max(map(len, pieces)) <= (256 if character.isspace() else 129)
            assert tokenizer.encode_ordinary(text) == sum(map(tokenizer.encode_ordinary, pieces), [])


def test_learning_from_one_text_or_from_its_documents_gives_the_same_tokens():
    assert learn_bpe([TEXT + "\n", TEXT], 300) == learn_bpe([TEXT + "\n" + TEXT], 300)


def test_every_string_survives_the_tokenizer():
    tokenizer = bpe_tokenizer(learn_bpe([TEXT], 300))
    rng = random.Random(0)
    strings = [
        "",
        " ",
        "\n\n \t x",
        "👩‍👩‍👧 🏳️‍🌈",
        "\x00\x01\x7f\x85\u2028\ufeff\u202e",
        "²½Ⅷ٣",
        "'s 'S it's",
        END_OF_TEXT,
        "_a__b_1",
        " " * 100_000 + "x",
        *[character * 100_000 for character in "a漢7^_"],
        "\n" * 1000,
        "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(5000)),
    ]
    for s in strings:
        assert tokenizer.decode(tokenizer.encode_ordinary(s)) == s
    assert tokenizer.eot_token == tokenizer.n_vocab - 1 not in tokenizer.encode_ordinary(END_OF_TEXT)


def test_a_text_with_nothing_to_merge_gives_the_bytes_alone():
    assert len(learn_bpe(["abc"], 1000)) == 256


def test_a_saved_tokenizer_is_the_same_and_its_file_readable(tmp_path):
    tokenizer = bpe_tokenizer(learn_bpe([TEXT * 5], 400))
    save_tokenizer(tmp_path / "t.json", tokenizer)
    again = load_tokenizer(tmp_path / "t.json")
    assert (
        again.encode_ordinary(TEXT + "\xff🙂") == tokenizer.encode_ordinary(TEXT + "\xff🙂")
        and again.n_vocab == tokenizer.n_vocab
    )
    text = (tmp_path / "t.json").read_text(encoding="utf-8")
    assert '"banana"' in text and "漢" in text


def test_short_works_one_after_the_other_are_not_silent_together(monkeypatch, capsys):
    monkeypatch.setattr(Progress, "last", time.time() - 4)
    Progress("first", 10, "x").show(1)
    monkeypatch.setattr(Progress, "last", time.time() - 6)
    Progress("second", 10, "x").show(1)
    Progress("third", 10, "x").show(1)
    assert capsys.readouterr().out.startswith("second 1/10 x ") and time.time() - Progress.last < 1


# -----------------------------------------------------------------------------
# files


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_of_code_or_of_anything_else_is_refused_and_nothing_in_it_runs(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    for load, path in ((lambda: load_gpt(out), out / "gpt.pt"), (lambda: load_sae(path), out / "sae/scaling/sae.pt")):
        load()
        torch.save(torch.load(path, weights_only=True) | {"more": Evil(tmp_path / "written by a pickle")}, path)
        with pytest.raises(UserError, match="damaged.*run (python )?train"):
            load()
        assert not (tmp_path / "written by a pickle").exists()
        for content in ([1, 2], {"a": 1}):
            save_checkpoint(path, content=content)
            with pytest.raises(UserError, match="damaged"):
                load()
        path.write_bytes(b"no checkpoint at all")
        with pytest.raises(UserError, match="damaged"):
            load()
        path.unlink()
        with pytest.raises(UserError, match="not found: run python train"):
            load()
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_saved_model_comes_back_and_its_fingerprint_tells_it_from_any_other(trained):
    gpt, tokenizer = load_gpt(trained)
    assert not gpt.training and gpt.config.vocab_size == tokenizer.n_vocab
    before = gpt.fingerprint()
    assert before == load_gpt(trained)[0].fingerprint()
    gpt.ln_f.bias[0] += 1e-6
    assert gpt.fingerprint() != before


# -----------------------------------------------------------------------------
# products of float32 matrices


@pytest.fixture
def as_found():
    """Leaves torch's settings as they were."""
    precision, flash = torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_flash_sdp(flash)


def on_processor(monkeypatch, **capabilities):
    """Pretends that torch found such a processor."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_flash_sdp(True)
    model.use_faster_products()
    return torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(
    "capabilities",
    [{}, {"cpu_name": "Intel Xeon", "avx512_f": True}, {"cpu_name": "AMD Ryzen", "avx512_f": False}],
)
def test_other_processors_multiply_as_torch_would(monkeypatch, as_found, capabilities):
    assert on_processor(monkeypatch, **capabilities) == ("highest", True)


def test_products_that_are_rounded_to_bfloat16_are_not_used(monkeypatch, as_found):
    exact = torch.Tensor.__matmul__

    def rounded(a, b):
        if a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return exact(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert on_processor(monkeypatch, cpu_name="AMD EPYC", avx512_f=True) == ("highest", True)


@pytest.mark.parametrize("n", [1, 7, 33, 512, 1000])
def test_faster_products_are_as_exact_as_float32_is(monkeypatch, as_found, n):
    """Of any shape and layout, and with the gradients that go through them."""
    if on_processor(monkeypatch, cpu_name="AMD EPYC", avx512_f=True) != ("medium", False):
        pytest.skip("this processor rounds to bfloat16 where it may")
    rng = torch.Generator().manual_seed(n)
    x = torch.randn(n, 96, generator=rng, requires_grad=True)
    W = torch.randn(40, 96, generator=rng, requires_grad=True)
    bias = torch.randn(40, generator=rng)
    y = torch.nn.functional.linear(x, W, bias)
    (y + (x @ W.t()).relu()).square().sum().backward()
    x64, W64 = x.detach().double().requires_grad_(), W.detach().double().requires_grad_()
    z = x64 @ W64.t()
    (z + bias + z.relu()).square().sum().backward()
    for found, expected in ((y, z + bias), (x.grad, x64.grad), (W.grad, W64.grad)):
        assert (found - expected).norm() < 1e-6 * expected.norm()
