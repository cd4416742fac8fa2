"""The three scripts: their parts against hand-made references, then as a user runs them, mistakes included."""

import csv
import gzip
import hashlib
import http.server
import json
import lzma
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import analyze
import model
import sae as sae_module
import train_gpt
import train_sae
from conftest import ROOT, SMALL_GPT, SMALL_SAE, TEXT, script
from model import END_OF_TEXT, GPT, GPTConfig, UserError, content_hash, load_gpt, save_json, save_jsonl
from sae import SHARD_ROWS, ActivationStream, SAEConfig, SparseAutoencoder, load_sae, save_sae

train_save = train_sae.save  # a test puts another in its place


# -----------------------------------------------------------------------------
# train_gpt.py: files -> documents -> tokens -> batches


def texts_of(*sources):
    skipped = []
    paths = train_gpt.source_files(",".join(map(str, sources)), "unused")
    return sorted(train_gpt.documents(paths, "reading", skipped)), len(skipped)


def test_documents_come_from_files_folders_and_archives_and_binaries_are_counted(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one\n", encoding="utf-8")
    (folder / "deep" / "b.py").write_text(f"two\n{END_OF_TEXT}\nthree ünï\n", encoding="utf-8")
    (folder / ".hidden").write_text("not this")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "binary").write_bytes(b"\0\1\2")
    with gzip.open(tmp_path / "c.txt.gz", "wt", encoding="utf-8") as f:
        f.write("four\n")
    with lzma.open(tmp_path / "d.txt.xz", "wt", encoding="utf-8") as f:
        f.write(f"five\n{END_OF_TEXT}\n\n{END_OF_TEXT}\n")
    texts, skipped = texts_of(folder, tmp_path / "c.txt.gz", tmp_path / "d.txt.xz")
    assert texts == sorted(["one\n", "two\n", "three ünï\n", "four\n", "five\n"]) and skipped == 2


def test_rows_of_jsonl_and_csv_are_documents_compressed_or_not(tmp_path):
    texts = ["one", "two\nlines, and a comma", '"three" ünï', "x" * 200_000, f"no\n{END_OF_TEXT}\nend", "", "  "]
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    with open(tmp_path / "t.csv", "w", encoding="utf-8-sig", newline="") as f:
        writer = csv.DictWriter(f, ["text", "id"])
        writer.writeheader()
        writer.writerows(rows)
    with gzip.open(tmp_path / "t.csv.gz", "wb") as f:
        f.write((tmp_path / "t.csv").read_bytes())
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    with lzma.open(tmp_path / "t.jsonl.xz", "wb") as f:
        f.write((tmp_path / "t.jsonl").read_bytes())
    for name in ("t.csv", "t.csv.gz", "t.jsonl", "t.jsonl.xz"):
        assert texts_of(tmp_path / name) == (sorted(texts[:5]), 0), name
    (tmp_path / "t.txt").write_bytes((tmp_path / "t.jsonl").read_bytes())  # under this name it is what it is
    assert texts_of(tmp_path / "t.txt")[0][0].startswith('{"id": 0')
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 9_000_000}) + '\n{"text": "\\ud800"}')
    parts, skipped = texts_of(tmp_path / "long.jsonl")
    assert sum(map(len, parts)) == 9_000_000 and max(map(len, parts)) == 2**22 and skipped == 1
    (tmp_path / "latin.csv").write_bytes(b"text\ncaf\xe9\nok\n")
    assert texts_of(tmp_path / "latin.csv") == (["ok"], 1)


def test_a_mark_of_the_byte_order_is_no_text_and_suffixes_may_be_in_capitals(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + f"{END_OF_TEXT} \r\none {END_OF_TEXT}\n{END_OF_TEXT}\ntwo".encode())
    (tmp_path / "b.JSONL").write_bytes(mark + b'{"text": "three"}\n')
    with gzip.open(tmp_path / "c.CSV.GZ", "wb") as f:
        f.write(mark + b"text,id\nfour,1\nfive,2,\n")
    (tmp_path / "d.ndjson").write_text('{"text": "six"}\n')
    assert texts_of(tmp_path) == (sorted([f"one {END_OF_TEXT}\n", "two", "three", "four", "five", "six"]), 0)


def test_a_folder_that_may_not_be_read_does_not_count_as_empty(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("open")
    scandir = os.scandir

    def refuse(place):
        if str(place).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        texts_of(tmp_path)


def test_a_home_folder_is_found_and_the_next_command_can_be_pasted(tmp_path, monkeypatch):
    home = tmp_path / "a home"
    home.mkdir()
    (home / "text.txt").write_text(TEXT)
    np.save(home / "rows.npy", np.random.default_rng(0).random((300, 8), dtype=np.float32))
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.chdir(tmp_path)
    done = script("train_gpt.py", "--dataset=~/text.txt", "--out_dir=~/out", *SMALL_GPT, "--max_iters=1")
    assert shlex.split(done.stdout.splitlines()[-1])[-2:] == ["train_sae.py", f"--out_dir={home}/out"]
    done = script("train_sae.py", "--acts=~/rows.npy", "--out_dir=~/out", *SMALL_SAE, "--max_iters=1", "--name=own")
    assert shlex.split(done.stdout.splitlines()[-1])[-2:] == ["--name=own", f"--out_dir={home}/out"]
    assert (home / "out/sae/own/sae.pt").exists() and not (tmp_path / "~").exists()


def test_measuring_takes_the_mean_of_the_same_batches_and_shows_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(model.time, "time", iter(range(0, 10**6, 10)).__next__)  # ten seconds pass at every look
    monkeypatch.setattr(model.Progress, "last", -100)
    training = SimpleNamespace(gpt=torch.nn.Linear(1, 1), step=7, log=[])
    args = SimpleNamespace(seed=3, eval_iters=4, batch_size=2, block_size=5)
    seen = []

    def loss_on(split, seed, rank):
        seen.append((split, seed, rank))
        return torch.tensor(10.0 * (split == "val") + seed[2])

    assert train_gpt.measure(training, loss_on, args) == "step 7  train loss 1.500  val loss 11.500"
    assert training.log == [{"step": 7, "tokens": 70, "train": 1.5, "val": 11.5}]
    assert seen == [(split, (3, 1, i), 0) for split in ("train", "val") for i in range(4)]
    assert "measuring val loss 3/4 batches" in capsys.readouterr().out


def test_a_disk_that_is_full_of_tokens_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)

    def full(texts, tokenizer, path):
        open(path, "wb").close()
        raise OSError(28, "No space left on device")  # the system names no file here

    monkeypatch.setattr(train_gpt, "write_tokens", full)
    done = script("train_gpt.py", f"--dataset={tmp_path / 'text.txt'}", f"--out_dir={tmp_path / 'out'}", *SMALL_GPT)
    assert done.returncode == 2 and "tokens.part" in done.stderr and "No space left" in done.stderr
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_a_folder_that_cannot_be_made_is_found_before_the_activations(trained, tmp_path):
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "sae").write_text("a file in the folder's place")
    for folder, name in (("file", "x"), ("new", "n" * 300)):
        flags = ("--acts=toy", *SMALL_SAE, f"--out_dir={tmp_path / folder}", f"--name={name}")
        done = script("train_sae.py", *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout


def test_a_comma_in_a_name_that_exists_parts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b,c", "d,e,f"):
        (tmp_path / name).write_text(name)
    assert texts_of("a", "b,c", "d,e,f") == (["a", "b,c", "d,e,f"], 0)
    assert train_gpt.split_sources(" b,c , a,,x,python,https://y/z") == ["b,c", "a", "x", "python", "https://y/z"]


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("linked")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.txt").write_text("here")
    try:
        (folder / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (folder / "deep" / "circle").symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("needs links")
    assert texts_of(folder) == (["here", "linked"], 0)


def test_the_offline_default_has_ten_million_bytes_and_always_the_same_order():
    paths = train_gpt.source_files("python", "unused")
    assert sum(p.stat().st_size for p in paths) >= 10_000_000
    assert paths == train_gpt.source_files("python", "unused")
    assert all(p.suffix == ".py" for p in paths) and len({p.parent for p in paths}) > 50


def test_long_documents_are_cut_at_the_end_of_a_line(tmp_path):
    lines = [f"{i:09}\n".encode() for i in range(1_000_000)]
    (tmp_path / "long.txt").write_bytes(b"".join(lines[:700_000]) + b"<|endoftext|>\n" + b"".join(lines[700_000:]))
    parts = [document for document, _ in train_gpt.read_documents(tmp_path / "long.txt")]
    assert b"".join(parts) == b"".join(lines) and len(parts) == 3 and len(parts[0] + parts[1]) == 7_000_000
    assert all(part.endswith(b"\n") for part in parts)


def test_whoever_changes_the_tokens_of_a_text_raises_the_version_of_the_reading(tmp_path):
    endless = "".join(str(i * i) for i in range(3000)) + "x" * 1000 + "=" * 1000 + " " * 1000
    (tmp_path / "a.txt").write_text(f"\ufeff{TEXT * 3}\n{END_OF_TEXT}\n{endless}\n漢字 naïve\n", encoding="utf-8", newline="\n")
    (tmp_path / "b.csv").write_text("id,text\n1,one\n2,two\n")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n')
    args = SimpleNamespace(
        dataset=str(tmp_path), out_dir=str(tmp_path / "out"), tokenizer="bpe", vocab_size=500, block_size=32
    )
    (tmp_path / "out").mkdir()
    train_gpt.prepare(args)
    files = b"".join((tmp_path / "out" / name).read_bytes() for name in ("train.bin", "val.bin"))
    # another hash? then add it here under a new version, and give that to READING
    assert hashlib.sha256(files).hexdigest()[:16] == {3: "e9fcbc5cab8c176d"}[train_gpt.READING]


def test_a_file_is_told_by_what_it_holds_and_a_large_one_by_samples(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(bytes(2**20))
    other.write_bytes(bytes(2**20))
    assert content_hash(path) == content_hash(other)
    for size in (1, 2**20, 2**20 + 1, 2**24):
        seen = set()
        for changed in (None, 0, size // 2 if size <= 2**20 else 1000, size - 1):
            content = bytearray(size)
            if changed is not None:
                content[changed] = 1
            path.write_bytes(content)
            seen.add(content_hash(path))
        assert len(seen) == min(size + 1, 4)
        path.write_bytes(bytes(size + 1))
        assert content_hash(path) not in seen


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_line_of_any_length_is_read_in_blocks_and_cut_between_characters(tmp_path, suffix):
    line = "x" + "漢😀é" * 1_200_000 + END_OF_TEXT  # 10.8 MB; what stands at its end is no separator
    text = f"{line}\n{END_OF_TEXT}\nlast\r\n{END_OF_TEXT}\r\n{line[:600_000]}"
    path = tmp_path / f"line.txt{suffix}"
    with {"": open, ".gz": gzip.open, ".xz": lambda path, mode: lzma.open(path, mode, preset=0)}[suffix](path, "wb") as f:
        f.write(text.encode())
    read = list(train_gpt.read_documents(path))
    parts = [document.decode() for document, _ in read]  # would fail within a character
    assert parts[-2:] == ["last\r\n", line[:600_000]] and "".join(parts[:-2]) == line + "\n"
    assert max(len(document) for document, _ in read) < 5.3e6 and len(parts) == 5
    positions = [position for _, position in read]
    assert positions == sorted(positions) and positions[-1] == os.path.getsize(path)
    assert suffix or positions[0] < 5.3e6  # these archives are shorter than what is read of them at once


def test_bytes_that_are_no_text_are_read_in_blocks_too(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\x80" * 2**23)
    texts, skipped = texts_of(tmp_path / "bytes")
    assert texts == [] and skipped == 2


def test_contexts_of_three_tokens_and_what_is_too_large_for_the_memory(tmp_path):
    (tmp_path / "text.txt").write_text("ab cd\n" * 2000)
    flags = [f"--dataset={tmp_path / 'text.txt'}", f"--out_dir={tmp_path / 'out'}", "--vocab_size=257", "--device=cpu"]
    flags += ["--n_embd=8", "--max_iters=2", "--eval_iters=1"]
    assert script("train_gpt.py", *flags, "--block_size=3").returncode == 0
    done = script("train_gpt.py", *flags, "--n_embd=4000000000000")
    assert done.returncode == 2 and "memory" in done.stderr and done.stderr.count("\n") == 1


def test_token_files_hold_every_document_once_and_hold_out_a_twentieth(tmp_path):
    documents = [f"document {i} " + "word " * (i % 50) for i in range(400)]
    (tmp_path / "t.txt").write_text(f"\n{END_OF_TEXT}\n".join(documents), encoding="utf-8")
    args = SimpleNamespace(
        dataset=str(tmp_path / "t.txt"), out_dir=str(tmp_path), tokenizer="bpe", vocab_size=300, block_size=8
    )
    tokenizer, made_from = train_gpt.prepare(args)
    split = {
        name: tokenizer.decode(np.fromfile(tmp_path / f"{name}.bin", dtype=np.uint16).tolist()).split(END_OF_TEXT)[:-1]
        for name in ("train", "val")
    }
    assert Counter(text.rstrip("\n") for text in split["train"] + split["val"]) == Counter(documents)
    assert len(split["val"]) == 20 and split["val"][0].rstrip("\n") == documents[19]
    before = os.stat(tmp_path / "train.bin").st_mtime_ns
    again, same = train_gpt.prepare(args)
    assert again.n_vocab == tokenizer.n_vocab and same == made_from
    assert os.stat(tmp_path / "train.bin").st_mtime_ns == before
    whole = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(whole[:-100])  # a copy that broke off, say
    train_gpt.prepare(args)
    assert (tmp_path / "train.bin").read_bytes() == whole
    args.vocab_size = 290
    other, differs = train_gpt.prepare(args)
    assert other.n_vocab == 290 and differs != made_from
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.tmp"))


def random_lengths(seed, n, longest):
    return np.random.default_rng(seed).integers(1, longest, n).tolist()


@pytest.mark.parametrize(
    "lengths",
    [
        [19 * 4096 + 61],
        [19 * 4096 + 1],
        [3000] * 35 + [50],
        [3000] * 19 + [50] + [3000] * 16,
        ([4095] * 19 + [1]) * 30,  # each 20th piece is one token
        ([1] * 19 + [4096]) * 30,
        [4097] * 100,
        [50] * 1000,
        [100_000_000],
        [5000],
        *[random_lengths(seed, 30, 20_000) for seed in range(5)],
        *[random_lengths(seed, 3000, 90) for seed in range(5)],
    ],
    ids=lambda lengths: f"{len(lengths)} of {sum(lengths)}",
)
def test_about_a_twentieth_is_held_out_evenly_whatever_the_lengths(lengths):
    pieces, held_out = train_gpt.hold_out(lengths, block_size=32)
    ends = set(np.cumsum(pieces).tolist())
    assert sum(pieces) == sum(lengths) and set(np.cumsum(lengths).tolist()) <= ends  # none goes over a document's end
    pieces, held_out = np.array(pieces), np.array(held_out)
    assert pieces.max() <= 4096 and 0.0375 <= pieces[held_out].sum() / sum(lengths) <= 0.0625
    assert pieces[held_out].sum() > 2 * 32
    halves = np.cumsum(pieces) <= sum(lengths) / 2
    assert abs(pieces[held_out & halves].sum() - pieces[held_out & ~halves].sum()) <= max(2 * 4096, 0.01 * sum(lengths))


def test_of_many_pieces_every_twentieth_is_held_out_and_of_few_tokens_two_contexts():
    lengths = random_lengths(0, 4000, 20_000)
    pieces, held_out = train_gpt.hold_out(lengths, block_size=128)
    assert pieces == train_gpt.pieces_of(lengths, 4096) and [i for i, held in enumerate(held_out) if held] == list(
        range(19, len(pieces), 20)
    )
    assert train_gpt.pieces_of([10_000, 3, 4096], 4096) == [4096, 4096, 1808, 3, 4096]
    for n_tokens in range(33 * 4, 1400, 7):
        pieces, held_out = train_gpt.hold_out([n_tokens], block_size=32)
        n_held_out = sum(np.array(pieces)[held_out])
        assert 33 <= n_held_out <= 33 * 2.5 + n_tokens / 16 and n_tokens - n_held_out > 32
    assert train_gpt.hold_out([], 32) == ([], []) and train_gpt.hold_out([1], 32)[0] == [1]


@pytest.mark.parametrize("lengths", [[19 * 4096 + 61], [3000] * 35 + [50]], ids=["one document", "36 documents"])
def test_every_token_is_in_one_of_the_files_and_a_longer_context_gets_a_new_split(tmp_path, lengths):
    documents = [chr(33 + i) * (length - 1) for i, length in enumerate(lengths)]  # a byte is a token
    (tmp_path / "t.txt").write_text(f"\n{END_OF_TEXT}\n".join(documents))
    args = SimpleNamespace(
        dataset=str(tmp_path / "t.txt"), out_dir=str(tmp_path), tokenizer="bpe", vocab_size=257, block_size=128
    )
    train_gpt.prepare(args)
    train, val = (np.fromfile(tmp_path / f"{name}.bin", dtype=np.uint16) for name in ("train", "val"))
    written = sum(lengths) + len(lengths) - 1  # each but the last has the end of its line, too
    assert len(train) + len(val) == written and 0.04 * written < len(val) < 0.06 * written
    if len(lengths) > 1:  # whole documents, so that nothing of a text is in both
        assert not set(train) & set(val) - {10, 256}
    args.block_size = 6000
    train_gpt.prepare(args)
    assert os.path.getsize(tmp_path / "val.bin") > 2 * 6000 and not list(tmp_path.glob("*.part"))


def test_a_batch_is_a_function_of_its_seed_and_targets_are_inputs_one_token_on():
    tokens, args = np.arange(1000, dtype=np.uint16), SimpleNamespace(block_size=16, batch_size=4)
    x, y = train_gpt.get_batch(tokens, args, (1, 2))
    assert x.shape == y.shape == (4, 16) and torch.equal(x + 1, y)
    assert torch.equal(x, train_gpt.get_batch(tokens, args, (1, 2))[0])
    assert not torch.equal(x, train_gpt.get_batch(tokens, args, (1, 3))[0])
    starts = np.concatenate([train_gpt.get_batch(np.arange(20), args, i)[0][:, 0] for i in range(50)])
    assert set(starts) == set(range(4))  # 20 tokens hold 4 contexts of 16 + 1, first and last among them


def test_the_learning_rate_rises_over_two_percent_and_falls_to_zero():
    rates = [train_gpt.learning_rate(step, 1000, 2.0) for step in range(1001)]
    assert rates[0] == pytest.approx(2.0 / 20) and rates[19] == 2.0 and max(rates) == 2.0
    assert rates[510] == pytest.approx(1.0) and rates[1000] == 0
    assert train_gpt.learning_rate(0, 1, 2.0) == 2.0


def test_weight_decay_is_for_matrices_alone():
    gpt = GPT(GPTConfig(8, 20, 1, 2, 8))
    optimizer = train_gpt.make_optimizer(gpt, 1e-3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in gpt.named_parameters():
        assert decay[id(p)] == (0.1 if name.endswith("weight") and not re.search("wte|wpe|ln_", name) else 0.0), name


@pytest.fixture
def server():
    """An HTTP server on this machine that announces 100 bytes and sends the first `limit` of them."""

    class Handler(http.server.BaseHTTPRequestHandler):
        limit, requests, kind = 40, [], "application/octet-stream"

        def do_GET(self):
            self.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", Handler.kind)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(bytes(range(100))[: Handler.limit])

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        Handler.url = f"http://127.0.0.1:{httpd.server_port}/a/te*xt.txt?x=1"
        yield Handler
        httpd.shutdown()


def test_a_broken_download_is_never_taken_for_whole(tmp_path, server):
    with pytest.raises(UserError, match="40 out of 100 bytes"):
        train_gpt.download(server.url, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".part"]
    server.limit = 100
    path = train_gpt.download(server.url, tmp_path)
    assert Path(path).read_bytes() == bytes(range(100)) and path.endswith("-te_xt.txt")
    assert [p.name for p in tmp_path.iterdir()] == [os.path.basename(path)]
    assert train_gpt.download(server.url, tmp_path) == path and len(server.requests) == 2
    long = train_gpt.download(server.url.replace("te*xt.txt", "x" * 300 + ".jsonl"), tmp_path)
    assert Path(long).read_bytes() == bytes(range(100)) and long.endswith("x.jsonl")


def test_the_page_around_a_file_is_not_taken_for_the_file(tmp_path, server):
    server.limit, server.kind = 100, "text/html; charset=utf-8"
    with pytest.raises(UserError, match="web page"):
        train_gpt.download(server.url, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".part"]


# -----------------------------------------------------------------------------
# train_sae.py: the dump


def tiny_gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8)).eval().requires_grad_(False)


@pytest.mark.parametrize("T", [1, 3, 16])
def test_no_token_gives_a_second_row_before_all_have_given_one(T):
    n_contexts, n_kept = 40, max(1, T // 2)
    epoch = n_contexts * n_kept * (T // n_kept)  # with T = 3 one of each context's tokens after the other
    rows = train_sae.row_places(n_contexts, T, 0, 2 * epoch)
    for half in (rows[:epoch], rows[epoch:]):
        assert sorted(half) == list(range(n_contexts * T)) and half.tolist() != sorted(half)
    assert T == 1 or rows[:epoch].tolist() != rows[epoch:].tolist()  # in another order
    # in each round every context gives as many
    for start in range(0, 2 * epoch, n_contexts * n_kept):
        contexts, counts = np.unique(rows[start : start + n_contexts * n_kept] // T, return_counts=True)
        assert len(contexts) == n_contexts and set(counts) == {n_kept}
    for start, n in ((0, 1), (epoch - 7, 20), (3, 2 * epoch - 5)):  # any part, with nothing to remember
        assert train_sae.row_places(n_contexts, T, start, n).tolist() == rows[start : start + n].tolist()


def test_which_tokens_a_context_gives_first_is_drawn_for_each():
    rows = train_sae.row_places(400, 16, 0, 400 * 8).reshape(400, 8) % 16
    counts = np.bincount(rows.ravel(), minlength=16)
    assert counts.min() > 150 and counts.max() < 250  # of 200 expected
    assert len({tuple(sorted(row)) for row in rows}) > 8


@pytest.mark.parametrize("site", ["attn.0", "mlp.1", "resid.1"])
def test_dumped_rows_are_what_the_hook_gives_at_their_places(site):
    gpt, tokens = tiny_gpt(), np.random.default_rng(0).integers(0, 50, 500).astype(np.uint16)
    start, n, kept = 70, 1200, {}  # two rounds and a half over 31 contexts: several rows of one token
    rows = train_sae.gpt_rows(gpt, tokens, site, start, n).float()
    contexts = torch.from_numpy(tokens[: 31 * 16].astype(np.int64)).view(31, 16)
    gpt(contexts, hook=lambda s, x: kept.update({s: x}))
    places = train_sae.row_places(31, 16, start, n)
    expected = kept[site].flatten(0, 1)[torch.from_numpy(places)]
    order = np.random.default_rng(start).permutation(n)  # they are shuffled
    assert rows.shape == (n, gpt.site_width(site))
    torch.testing.assert_close(rows, expected[torch.from_numpy(order)], rtol=1e-3, atol=3e-3)


def rows_of(split, start, n):
    """Stands in for a model: rows that tell their split, the shard's first row and their place."""
    place, rest = torch.arange(float(n))[:, None], torch.tensor([float(split == "val"), start])
    return torch.cat([place, rest.expand(n, 2)], dim=1).half()


META = {"width": 3}


def test_a_dump_is_whole_shards_whatever_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sae, "SHARD_ROWS", 1024)
    made = []

    def make(split, start, n):
        made.append((split, start, n))
        return rows_of(split, start, n)

    train, val = train_sae.dump(str(tmp_path), META, make, 2500)
    assert [np.load(path).shape for path in train + val] == [(1024, 3)] * 4
    assert np.load(val[0])[5].tolist() == [5, 1, 0] and np.load(train[2])[1].tolist() == [1, 0, 2048]
    assert np.load(train[2]).dtype == np.float16
    assert made == [("train", 0, 1024), ("train", 1024, 1024), ("train", 2048, 1024), ("val", 0, 1024)]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # fewer: the others stay for whoever reads them; more: those that are missing are added
    assert train_sae.dump(str(tmp_path), META, make, 1) == (train[:1], val) and len(made) == 4
    more, _ = train_sae.dump(str(tmp_path), META, make, 3073)
    assert more[:3] == train and made[4:] == [("train", 3072, 1024)]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("found", ["same", "other"])
def test_shards_are_kept_while_they_go_with_the_rest(tmp_path, monkeypatch, found):
    monkeypatch.setattr(train_sae, "SHARD_ROWS", 1024)
    train, val = train_sae.dump(str(tmp_path), META, rows_of, 2500)
    os.remove(train[1])
    meta = json.loads((tmp_path / "meta.json").read_text())
    changes = {"gpt": "another"} if found == "other" else {}
    (tmp_path / "meta.json").write_text(json.dumps(meta | changes))
    model.LOCKS.clear()  # as if another process had made them, and been killed while it wrote
    (tmp_path / "train-001.npy.0123abcd.tmp").write_bytes(b"half a file")
    stamps = {path: os.stat(path).st_mtime_ns for path in (train[0], train[2], *val)}
    again = train_sae.dump(str(tmp_path), META, rows_of, 2500)
    assert again == (train, val) and np.load(train[1]).shape == (1024, 3)
    assert not list(tmp_path.glob("*.tmp"))
    kept = {path for path, stamp in stamps.items() if os.stat(path).st_mtime_ns == stamp}
    assert kept == (set() if found == "other" else set(stamps))
    assert json.loads((tmp_path / "meta.json").read_text()) == meta


def test_a_kill_while_old_shards_go_leaves_none_that_pass_as_new(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sae, "SHARD_ROWS", 1024)
    train_sae.dump(str(tmp_path), META | {"gpt": "another"}, lambda split, start, n: torch.ones(n, 3), 2500)
    model.LOCKS.clear()
    removed = []

    def remove(path, really=os.remove):
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path)
        really(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "remove", remove)
        train_sae.dump(str(tmp_path), META, rows_of, 2500)
    model.LOCKS.clear()
    train, val = train_sae.dump(str(tmp_path), META, rows_of, 2500)
    assert all((np.load(path)[:, 1] == (split == "val")).all() for split, paths in (("train", train), ("val", val))
               for path in paths)  # fmt: skip


def test_an_interrupted_dump_leaves_its_finished_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sae, "SHARD_ROWS", 1024)

    def make(split, start, n):
        if start == 1024:
            raise KeyboardInterrupt
        return rows_of(split, start, n)

    with pytest.raises(KeyboardInterrupt):
        train_sae.dump(str(tmp_path), META, make, 2500)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "meta.json", "train-000.npy"]


def test_a_stream_is_the_shards_of_a_dump_one_after_the_other():
    stream = ActivationStream(partial(rows_of, "train"), 3, shard_rows=100)
    rows = torch.cat([stream.batch(position, 70) for position in range(0, 700, 70)])
    assert rows.dtype == torch.float32 and rows[:, 0].tolist() == [i % 100 for i in range(700)]
    assert rows[:, 2].tolist() == [i // 100 * 100 for i in range(700)]
    assert torch.equal(stream.batch(250, 200), rows[250:450])  # any place, with nothing to remember
    assert stream.rows == math.inf and stream.sample(50, (7, 5)).shape == (50, 3)


@pytest.mark.parametrize("bad", [math.nan, 70_000.0])
def test_what_float16_cannot_hold_is_an_error_that_names_the_site(bad):
    gpt = tiny_gpt()
    gpt.blocks[0].attn_proj.bias[3] = bad
    with pytest.raises(UserError, match=r"attn\.0"):
        train_sae.gpt_rows(gpt, np.arange(40, dtype=np.uint16), "attn.0", 0, 100)


def test_a_dump_too_large_for_the_disk_is_refused_before_anything_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sae, "SHARD_ROWS", 1024)
    train_sae.dump(str(tmp_path), META, rows_of, 50)
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    monkeypatch.setattr(train_sae.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="lower --n_acts"):
        train_sae.dump(str(tmp_path), META, rows_of, 50_000)
    assert before == sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())


def test_toy_features_are_as_rare_and_as_strong_as_they_should_be():
    truth = np.eye(256, dtype=np.float32)  # orthogonal directions: the rows show which are on
    rows = train_sae.toy_rows(truth, 0, 8192, 0).float().numpy()
    on = (rows > 0).mean(0)
    assert on.sum() == pytest.approx(3, rel=0.03)
    assert on[:32].sum() / on[-32:].sum() == pytest.approx(np.exp(2 * 224 / 255), rel=0.1)
    assert rows[rows > 0].mean() == pytest.approx(0.5, abs=0.01) and rows.max() <= 1
    offset = np.arange(256, dtype=np.float32) / 256
    moved = train_sae.toy_rows(truth, offset, 8192, 0).float().numpy()  # the same, and the offset
    np.testing.assert_allclose(moved - rows, np.tile(offset, (8192, 1)), atol=1e-3)


# -----------------------------------------------------------------------------
# analyze.py: the numbers


def perfect_sae(width):
    """Reconstructs everything: one feature for each neuron's positive and one for its negative part."""
    sae = SparseAutoencoder(SAEConfig(width, 2 * width))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(width), -torch.eye(width)]))
        sae.W_enc.copy_(sae.W_dec.t())
    return sae


def run_on(gpt, sae, site, contexts):
    folded = sae.fold().requires_grad_(False)
    return analyze.Run("unused", folded, {"site": site}, contexts, gpt, contexts=contexts)


@pytest.mark.parametrize("site", ["attn.0", "mlp.0", "mlp.1", "resid.0"])
def test_a_perfect_autoencoder_changes_no_loss_and_an_empty_one_is_zero_ablation(site):
    gpt, generator = tiny_gpt(), torch.Generator().manual_seed(0)
    gpt.lm_head.weight *= 10  # with an opinion, and on a text of its own, so that zeros cost something
    start = torch.randint(50, (40, 1), generator=generator)
    contexts = gpt.generate(start, 16, temperature=1.0, generator=generator)
    width = gpt.site_width(site)
    metrics, _, _ = analyze.measure(run_on(gpt, perfect_sae(width), site, contexts))
    assert metrics["loss_spliced"] == pytest.approx(metrics["loss_plain"], rel=1e-6)
    assert metrics["loss_plain"] == pytest.approx(gpt(contexts[:, :-1], contexts[:, 1:])[1].item(), rel=1e-5)
    assert metrics["loss_recovered"] == pytest.approx(1, abs=1e-3) and metrics["variance_explained"] == pytest.approx(
        1, abs=1e-6
    )

    empty = SparseAutoencoder(SAEConfig(width, 4))
    with torch.no_grad():
        empty.b_enc.fill_(-1e6)
    metrics, density, energy = analyze.measure(run_on(gpt, empty, site, contexts))
    by_hand = gpt(contexts[:, :-1], contexts[:, 1:], lambda s, x: 0 * x if s == site else None)[1].item()
    assert metrics["loss_spliced"] == metrics["loss_zero_ablated"] == pytest.approx(by_hand, rel=1e-5)
    assert metrics["loss_recovered"] == 0 and metrics["l0"] == 0 and not density.any()


def test_the_metrics_are_those_of_plain_numpy():
    gpt, contexts = (
        tiny_gpt(),
        torch.randint(50, (300, 17), generator=torch.Generator().manual_seed(1)),
    )  # several batches
    torch.manual_seed(1)
    sae = SparseAutoencoder(SAEConfig(32, 20))
    with torch.no_grad():
        sae.scale.fill_(3.0)
        sae.b_enc.uniform_(-0.3, 0.2)
        sae.b_dec.uniform_(-0.1, 0.3)
        sae.b_enc[3] = -1e6
    kept = {}
    gpt(contexts[:, :-1], hook=lambda s, x: kept.update({s: x}))
    x = kept["mlp.0"].reshape(-1, 32).double().numpy()
    W_enc, b_enc, W_dec, b_dec = (p.detach().double().numpy() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    f = np.maximum(3.0 * x @ W_enc + b_enc, 0)
    x_hat = (f @ W_dec + b_dec) / 3.0
    metrics, density, energy = analyze.measure(run_on(gpt, sae, "mlp.0", contexts))
    assert metrics["tokens"] == 4800 and metrics["l0"] == pytest.approx((f > 0).sum(1).mean(), rel=1e-4)
    assert metrics["variance_explained"] == pytest.approx(
        1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4
    )
    np.testing.assert_allclose(density, (f > 0).mean(0), atol=1e-3)
    expected_energy = (f**2).mean(0) * np.linalg.norm(W_dec, axis=1) ** 2 / 9.0
    np.testing.assert_allclose(energy, expected_energy, rtol=1e-4, atol=1e-6)
    mean = torch.from_numpy(x.mean(0)).float()
    for name, put in (
        ("spliced", torch.from_numpy(x_hat).float().view(300, 16, 32)),
        ("zero_ablated", torch.zeros(300, 16, 32)),
        ("mean_ablated", mean.expand(300, 16, 32)),
    ):
        loss = gpt(contexts[:, :-1], contexts[:, 1:], lambda s, _: put if s == "mlp.0" else None)[1].item()
        assert metrics[f"loss_{name}"] == pytest.approx(loss, rel=1e-5), name
    plain, spliced, zero = (metrics[f"loss_{name}"] for name in ("plain", "spliced", "zero_ablated"))
    assert metrics["loss_recovered"] == pytest.approx((zero - spliced) / (zero - plain))

    picked = run_on(gpt, sae, "mlp.0", contexts).activations([7, 2])
    np.testing.assert_allclose(picked, (f * np.linalg.norm(W_dec, axis=1) / 3.0)[:, [7, 2]].T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("site", ["mlp.1", "resid.1", "attn.1"])
def test_logit_effects_are_the_directions_pushed_through_a_layernorm_linearised_on_real_tokens(site):
    gpt, contexts = tiny_gpt(), torch.randint(50, (50, 17), generator=torch.Generator().manual_seed(2))
    torch.nn.init.normal_(gpt.ln_f.weight)
    this = run_on(gpt, SparseAutoencoder(SAEConfig(gpt.site_width(site), 6)), site, contexts)
    kept = {}
    gpt(contexts[:, :-1], hook=lambda s, x: kept.update({s: x}))
    stream = kept["resid.1"].reshape(-1, 8).double().numpy()
    directions = this.sae.W_dec.detach().double().numpy()
    if site == "mlp.1":
        directions = directions @ gpt.blocks[1].mlp_proj.weight.double().numpy().T
    centred = directions - directions.mean(1, keepdims=True)
    expected = (
        (1 / np.sqrt(stream.var(1) + 1e-5)).mean()
        * centred
        * gpt.ln_f.weight.double().numpy()
        @ gpt.lm_head.weight.double().numpy().T
    )
    assert expected.shape[1] % 2 == 0  # the median of an even number is the mean of two
    expected -= np.median(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(
        analyze.logit_effects(this, this.sae.W_dec).detach().numpy(), expected, rtol=1e-3, atol=1e-5
    )


def test_interval_examples_are_evenly_spaced_in_activation_not_in_rank():
    rng = np.random.default_rng(0)
    this = SimpleNamespace(tokens=rng.integers(0, 1000, 10_000), gpt=True)
    acts = np.where(rng.random(10_000) < 0.3, rng.exponential(1.0, 10_000), 0).astype(np.float32)
    chosen = analyze.examples(this, acts, n_top=5, n_intervals=4, each=3, rng=rng)
    top, rest = chosen[:5], chosen[5:]
    assert [position for _, position in top] == np.argsort(-acts)[:5].tolist()
    for label, position in rest:
        low, high = (int(part) / 100 * acts.max() for part in label[:-1].split("-"))
        assert low < acts[position] <= high
    assert len({position for _, position in chosen}) == len(chosen)
    others = np.delete(acts, [position for _, position in top])
    counts = [int(((others > k / 4 * acts.max()) & (others <= (k + 1) / 4 * acts.max())).sum()) for k in (3, 2, 1, 0)]
    assert Counter(label for label, _ in rest) == {
        label: min(3, count) for label, count in zip(["75-100%", "50-75%", "25-50%", "0-25%"], counts) if count
    }


# -----------------------------------------------------------------------------
# as a user runs them


def hashes(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def test_the_scripts_leave_what_the_interface_promises(trained):
    for name in (
        "tokenizer.json",
        "train.bin",
        "val.bin",
        "gpt.pt",
        "gpt.jsonl",
        "gpt_loss.png",
        "acts/mlp.0/train-000.npy",
        "acts/mlp.0/val-000.npy",
        "acts/mlp.0/meta.json",
        "sae/scaling/sae.pt",
        "sae/scaling/log.jsonl",
    ):
        assert (trained / name).stat().st_size > 0, name
    meta = json.loads((trained / "acts/mlp.0/meta.json").read_text())
    rows = np.load(trained / "acts/mlp.0/train-000.npy", allow_pickle=False)
    assert rows.dtype == np.float16 and rows.shape == (SHARD_ROWS, 64) and meta["width"] == 64
    assert meta["gpt"] == load_gpt(trained)[0].fingerprint() and (meta["site"], meta["layer"]) == ("mlp", 0)
    log = [json.loads(line) for line in (trained / "sae/scaling/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [20, 40, 60] and log[-1]["rows"] == 60 * 128
    sae = load_sae(trained / "sae/scaling/sae.pt")
    assert sae.scale.item() == pytest.approx(math.sqrt(64 / (rows.astype(np.float64) ** 2).sum(1).mean()), rel=1e-3)


def test_report_and_feature_print_and_save_what_they_measured(trained):
    done = script("analyze.py", "report", f"--out_dir={trained}", "--show=3", "--device=cpu")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((trained / "sae/scaling/metrics.json").read_text())
    assert f"{metrics['variance_explained']:.3f}" in done.stdout and f"{metrics['loss_recovered']:.3f}" in done.stdout
    assert done.stdout.count("raises") >= 3 and "\033[" not in done.stdout
    assert {"density.png", "training.png"} <= set(os.listdir(trained / "sae/scaling"))
    done = script("analyze.py", "feature", f"--out_dir={trained}", "5")  # after a flag as well as before it
    assert done.returncode == 0 and "feature 5" in done.stdout, done.stderr


@pytest.mark.parametrize("recipe", ["scaling", "towards", "tied"])
def test_the_same_seed_gives_the_same_bytes(trained, recipe, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    for name in "ab":
        done = script("train_sae.py", f"--out_dir={out}", f"--recipe={recipe}", f"--name={name}", *SMALL_SAE)
        assert done.returncode == 0, done.stderr
    a, b = (torch.load(out / f"sae/{name}/sae.pt", weights_only=True) for name in "ab")
    assert all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])
    assert (out / "sae/a/log.jsonl").read_bytes() == (out / "sae/b/log.jsonl").read_bytes()
    if recipe == "scaling":  # the whole language model too
        done = script(
            "train_gpt.py", f"--out_dir={tmp_path / 'again'}", f"--dataset={trained.parent / 'text.txt'}", *SMALL_GPT
        )
        assert done.returncode == 0 and hashes(tmp_path / "again")["gpt.jsonl"] == hashes(out)["gpt.jsonl"]
        assert load_gpt(tmp_path / "again")[0].fingerprint() == load_gpt(out)[0].fingerprint()


def test_activations_are_reused_while_they_match_and_redone_when_the_model_changed(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    shard = out / "acts/mlp.0/train-000.npy"
    before = shard.stat().st_mtime_ns
    assert (
        "2 of 2 files are there" in script("train_sae.py", f"--out_dir={out}", *SMALL_SAE).stdout
        and shard.stat().st_mtime_ns == before
    )
    checkpoint = torch.load(out / "gpt.pt", weights_only=True)
    checkpoint["model"]["wte.weight"] += 0.01
    torch.save(checkpoint, out / "gpt.pt")
    done = script("analyze.py", f"--out_dir={out}")
    assert done.returncode == 2 and "another gpt.pt" in done.stderr
    assert script("train_sae.py", f"--out_dir={out}", *SMALL_SAE).returncode == 0 and shard.stat().st_mtime_ns > before
    assert script("analyze.py", f"--out_dir={out}", "--show=1").returncode == 0


def test_towards_resamples_at_the_tenths_of_a_short_run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    done = script("train_sae.py", f"--out_dir={tmp_path / 'out'}", "--recipe=towards", "--l1_coeff=100", *SMALL_SAE)
    assert re.findall(r"step (\d+): resampled", done.stdout) == ["24", "30", "36", "42", "48", "54"]
    done = script("train_sae.py", f"--out_dir={tmp_path / 'out'}", "--recipe=towards", "--resample=none", *SMALL_SAE)
    assert done.returncode == 0 and "resampled" not in done.stdout


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_anybodys_own_activations_train_without_a_model(tmp_path, dtype):
    rows = np.random.default_rng(0).exponential(1.0, (600, 24)).astype(dtype)
    np.save(tmp_path / "a.npy", rows[:250])
    np.save(tmp_path / "b.npy", rows[250:])
    done = script("train_sae.py", f"--acts={tmp_path}/*.npy", f"--out_dir={tmp_path / 'out'}", *SMALL_SAE)
    assert done.returncode == 0, done.stderr
    done = script("analyze.py", f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/sae/scaling/metrics.json").read_text())["tokens"] == 30
    assert script("analyze.py", "steer", "--feature=1", f"--out_dir={tmp_path / 'out'}").returncode == 2


@pytest.mark.parametrize("recipe", ["scaling", "towards", "tied"])
def test_with_center_an_offset_changes_nothing_and_without_it_is_said_to_do_harm(tmp_path, recipe):
    """Activations 50 standard deviations away from 0, and the same ones about 0."""
    rows = np.random.default_rng(0).exponential(1.0, (3000, 24)) - 1
    np.save(tmp_path / "near.npy", rows.astype(np.float32))
    np.save(tmp_path / "far.npy", (rows + 50).astype(np.float32))
    # towards starts from nothing as published: in so few steps it would explain little either way
    flags = (f"--recipe={recipe}", "--start=transposed", f"--out_dir={tmp_path}", *SMALL_SAE, "--max_iters=200")
    notes, explained = {}, {}
    for name, own in (("near", ()), ("far", ()), ("far", ("--center",))):
        done = script("train_sae.py", f"--acts={tmp_path}/{name}.npy", f"--name={name}", *flags, *own)
        assert done.returncode == 0, done.stderr
        notes[name, own], = re.findall("the mean holds .*", done.stdout)
        explained[name, own] = float(re.search(r"rows: variance explained (\S+)", done.stdout).group(1))
    near, far, centred = notes.values()
    assert re.fullmatch(r"the mean holds 0\.\d% of the activations' squared norm", near)
    assert far.startswith("the mean holds 100.0% of") and "--center" in far
    assert centred.startswith("the mean holds 100.0% of") and centred.endswith("it is taken off")
    near, far, centred = explained.values()
    assert centred == pytest.approx(near, abs=0.02) and far < near - 0.2

    assert script("analyze.py", f"--out_dir={tmp_path}", "--name=far").returncode == 0  # of the last one
    metrics = json.loads((tmp_path / "sae/far/metrics.json").read_text())
    assert metrics["variance_explained"] == pytest.approx(centred, abs=2e-3)
    done = script("train_sae.py", f"--acts={tmp_path}/far.npy", "--name=far", *flags, "--resume")
    assert done.returncode == 2 and "--center=False" in done.stderr


@pytest.mark.parametrize("norm", ["dataset", "token"])
def test_a_run_with_center_goes_on_as_if_it_had_not_stopped(tmp_path, norm):
    np.save(tmp_path / "a.npy", (DRAWN + 30).astype(np.float32))
    flags = (f"--acts={tmp_path}/a.npy", "--recipe=towards", "--center", f"--input_norm={norm}", f"--out_dir={tmp_path}")
    flags = (*flags, *SMALL_SAE, "--resample=20,35", "--dead_steps=2")
    assert script("train_sae.py", *flags, "--name=whole").returncode == 0
    stop = mock.Mock(side_effect=[*[None] * 2, KeyboardInterrupt])
    with mock.patch.object(train_sae, "save", lambda *args: (stop(), train_save(*args))):
        script("train_sae.py", *flags, "--name=parts", "--save_interval=15")
    assert script("train_sae.py", *flags, "--name=parts", "--save_interval=15", "--resume").returncode == 0
    whole, parts = (load_sae(tmp_path / f"sae/{name}/sae.pt") for name in ("whole", "parts"))
    assert torch.equal(whole.mean, parts.mean) and torch.equal(whole.scale, parts.scale)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


def goes_on_without_it_alone(out, flag):
    """An autoencoder of SMALL_SAE, whose checkpoint does not know a flag, is refused with it and resumed without."""
    flags = (f"--out_dir={out}", *SMALL_SAE, "--max_iters=70", "--resume")
    done = script("train_sae.py", *flags, f"--{flag}")
    assert done.returncode == 2 and f"--{flag}=True" in done.stderr
    done = script("train_sae.py", *flags)
    step = load_sae(out / "sae/scaling/sae.pt").extra["step"]
    assert done.returncode == 0 and "going on from" in done.stdout and step == 70


def test_a_checkpoint_from_before_center_goes_on_without_it_alone(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    path = out / "sae/scaling/sae.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["mean"], checkpoint["config"]["center"], checkpoint["args"]["center"]
    torch.save(checkpoint, path)
    goes_on_without_it_alone(out, "center")


def judged_by_numpy(out, rows):
    """Variance explained of rows (N, n) by the autoencoder in an out_dir, its x_hat taken, all else in float64."""
    x = torch.from_numpy(rows.astype(np.float32))
    x_hat = load_sae(out / "sae/scaling/sae.pt")(x).detach().double().numpy()
    x = x.double().numpy()
    return 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


def loaded_run(out, *flags):
    """analyze.py's Run of the autoencoder `scaling`, and its flags."""
    with mock.patch.object(sys, "argv", ["analyze.py", f"--out_dir={out}", *flags]):
        args = analyze.parse_args()
    return analyze.load_run(args, torch.device("cpu"), "scaling"), args


@pytest.mark.parametrize("bias, sparse", [(-1.5, True), (0.3, False)])
def test_features_are_a_sparse_matrix_where_few_are_active_and_the_same(bias, sparse):
    torch.manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(8, 50, decoder_norm=1.0)).fold().requires_grad_(False)
    sae.b_enc += bias
    sae.b_dec.uniform_(-1, 1)
    x = torch.randn(700, 8)
    exact = np.maximum(x.double().numpy() @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy(), 0)
    f = analyze.sparse_where_it_pays(sae, x)
    assert (f.layout == torch.sparse_csr) == sparse and exact.any()
    np.testing.assert_allclose(f.to_dense(), exact, atol=1e-5)
    n_active, squares = analyze.activity(f)
    np.testing.assert_allclose(n_active, (exact > 1e-6).sum(0), atol=1)
    np.testing.assert_allclose(squares, (exact**2).sum(0), rtol=1e-4)
    x_hat = exact @ sae.W_dec.double().numpy() + sae.b_dec.numpy()
    np.testing.assert_allclose(sae.decode(f), x_hat, atol=1e-5)


def test_the_density_pass_counts_every_token_of_the_training_text_once(trained):
    run, _ = loaded_run(trained)
    tokens = np.fromfile(trained / "train.bin", dtype=np.uint16).astype(np.int64)
    contexts = torch.from_numpy(tokens[: len(tokens) // 32 * 32].reshape(-1, 32))
    kept = {}
    run.gpt(contexts, hook=lambda s, x: kept.update({s: x}))
    f = run.sae.encode(kept["mlp.0"].flatten(0, 1)).numpy()
    density, n_tokens = analyze.count_active(run)  # the text is short: all of it fits
    assert n_tokens == len(f) == contexts.numel() and 0 < (density > 0).sum()
    np.testing.assert_allclose(density, (f > 0).mean(0), atol=3 / len(f))
    some, n_some = analyze.count_active(run, 90)  # three contexts from all of the text, no fewer tokens
    few = f.reshape(len(contexts), 32, -1)[[0, len(contexts) // 3, len(contexts) * 2 // 3]]
    assert n_some == 96 and some.tolist() == (few.reshape(96, -1) > 0).mean(0).tolist()


@pytest.mark.parametrize("n_tokens, expected", [(1, 5000), (5001, 10000), (10**6, 15000)])
def test_the_density_pass_takes_contexts_that_are_longer_than_its_pieces(tmp_path, n_tokens, expected):
    """Of a text of little more than three contexts."""
    (np.arange(15_001) % 7).astype(np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "data.json").write_text("{}")
    gpt = SimpleNamespace(config=GPTConfig(5000, 7), activations=lambda idx, site: torch.eye(7)[idx])
    run = analyze.Run(str(tmp_path / "sae/a"), SparseAutoencoder(SAEConfig(7, 3)), {"site": "mlp.0"}, gpt=gpt)
    x = torch.cat(list(run.trained_x(n_tokens)))
    assert x.shape == (expected, 7) and x.sum(0).tolist() == [len(range(k, expected, 7)) for k in range(7)]


def test_of_rows_of_zeros_no_share_is_massive(tmp_path):
    run = SimpleNamespace(x=lambda: torch.zeros(300, 3))
    found = analyze.massive_metrics(run)
    assert set(found) == {"massive_share"} and math.isnan(found["massive_share"])


def test_dead_and_ultra_low_are_told_on_tokens_enough():
    density = np.array([0, 0, 5e-7, 2e-6, 0.1])
    enough, few = analyze.density_metrics(density, 10**7), analyze.density_metrics(density, 10**7 - 1)
    assert enough == {"density_tokens": 10**7, "dead": 0.4, "ultra_low": 0.2}
    assert few == {"density_tokens": 10**7 - 1, "dead": 0.4, "ultra_low": None}


@pytest.mark.parametrize("n_tokens, advice", [
    (10**7 + 15, "to tell takes --density_tokens=10000000"),  # 15: no whole context
    (10**7 - 1, "to tell takes 10,000,000 training tokens, there are 9,999,984"),
])
def test_more_density_tokens_are_asked_for_where_the_text_has_them(n_tokens, advice):
    contexts = torch.zeros(2, 17, dtype=torch.long)
    run = run_on(tiny_gpt(), SparseAutoencoder(SAEConfig(8, 5)), "resid.0", contexts)
    run.training_text = np.broadcast_to(np.uint16(0), n_tokens)
    metrics, *_ = analyze.measure(run)
    rows = analyze.summary(run, metrics | analyze.density_metrics(np.array([0.1]), 100))
    assert [note.partition(": ")[2] for name, _, note in rows if name == "ultra-low density"] == [advice]


@pytest.mark.parametrize("factor", [1, 1e4, 1e20])
def test_variance_explained_is_told_without_massive_rows_too(factor):
    """An autoencoder that gives back the 1 % of large rows and nothing of the others."""
    x = torch.from_numpy(DRAWN[:500].astype(np.float32))
    x[::100] *= 50
    x *= factor

    class Run(SimpleNamespace):
        def x(self):
            return x

    limit = 20 * x.double().norm(dim=1).median()
    large = (x.double().norm(dim=1) > limit).numpy()
    run = Run(device="cpu", sae=lambda rows: rows * (rows.double().norm(dim=1, keepdim=True) > limit))
    found = analyze.massive_metrics(run)
    rest = x.numpy().astype(np.float64)[~large]
    expected = 1 - (rest**2).sum() / ((rest - rest.mean(0)) ** 2).sum()  # about 0: nothing is explained
    assert large.sum() == 5 and found["explained_without"] == pytest.approx(expected, rel=1e-6)
    squares = x.double().numpy() ** 2
    assert found["massive_share"] == pytest.approx(squares[large].sum() / squares.sum(), rel=1e-5)
    x /= x.double().norm(dim=1, keepdim=True)
    assert analyze.massive_metrics(run) == {"massive_share": pytest.approx(0.01)}


def test_massive_rows_are_said_to_be_there_at_the_start_and_in_the_report(tmp_path):
    x = DRAWN.astype(np.float32)
    x[30::60] *= 200
    np.save(tmp_path / "a.npy", x)
    flags = (f"--acts={tmp_path}/a.npy", f"--out_dir={tmp_path}", *SMALL_SAE)
    done = script("train_sae.py", *flags)
    assert re.search(r"the largest 1% of the rows hold \d\d\.\d% of .* try --input_norm=token", done.stdout)
    done = script("analyze.py", f"--out_dir={tmp_path}")
    metrics = json.loads((tmp_path / "sae/scaling/metrics.json").read_text())
    assert f"explained without   {metrics['explained_without']:9.3f}" in done.stdout, done.stdout
    assert metrics["explained_without"] < metrics["variance_explained"]
    done = script("train_sae.py", *flags, "--input_norm=token")
    assert "each is divided by its own" in done.stdout


def test_activations_of_three_dimensions_are_flattened_and_the_script_says_so(tmp_path):
    cube = DRAWN.reshape(30, 20, 24).astype(">f4")
    np.save(tmp_path / "a.npy", cube)
    done = script("train_sae.py", f"--acts={tmp_path}/a.npy", f"--out_dir={tmp_path / 'cube'}", *SMALL_SAE)
    assert done.returncode == 0 and "a.npy: shape (30, 20, 24) is read as rows of 24" in done.stdout, done.stderr
    assert script("analyze.py", f"--out_dir={tmp_path / 'cube'}").returncode == 0
    np.save(tmp_path / "a.npy", DRAWN.astype(np.float32))
    done = script("train_sae.py", f"--acts={tmp_path}/a.npy", f"--out_dir={tmp_path / 'flat'}", *SMALL_SAE)
    assert "is read as" not in done.stdout
    cube, flat = (load_sae(tmp_path / name / "sae/scaling/sae.pt").state_dict() for name in ("cube", "flat"))
    assert all(torch.equal(cube[name], flat[name]) for name in flat)


SLOPES = {
    "penalty": dict(penalty=torch.sqrt, norms_in_penalty=True),
    "activation": dict(activation=lambda z: torch.where(z > 0, z.sqrt(), 0 * z)),
    "loss": dict(penalty=lambda f: f / 0.0),
}


@pytest.mark.parametrize("kind", SLOPES)
def test_a_slope_that_is_not_finite_is_found_before_the_first_step(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sae_module.RECIPES, "other", sae_module.Recipe("nobody", **SLOPES[kind]))
    np.save(tmp_path / "a.npy", DRAWN.astype(np.float32))
    flags = (f"--acts={tmp_path}/a.npy", f"--out_dir={tmp_path}", *SMALL_SAE)
    done = script("train_sae.py", "--recipe=other", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "before the first step" in done.stderr and "penalty" in done.stderr and "activation" in done.stderr
    assert os.listdir(tmp_path / "sae/other") == [".lock"]


def other_equations(self, x, features=None):
    """An encoder whose columns are of unit norm: neither the fast step nor fold() knows of it."""
    W_enc = torch.nn.functional.normalize(self.W_enc, dim=0)
    z = self.encoder_input(x) @ W_enc + self.encoder_bias()
    return z if features is None else z[..., features]


def with_a_threshold(z):
    """ReLU from 1 on, which is ReLU to nobody, and so without a fast step."""
    return torch.relu(z) * (z > 1)


@pytest.mark.parametrize(
    "fields, encoder, words",
    [
        (dict(penalty=lambda f: (f > 0).float()), None, "lambda changes nothing"),
        (dict(), other_equations, "SparseStep computes another loss"),
        (dict(activation=with_a_threshold), other_equations, "fold\\(\\) gives other reconstructions"),
    ],
)
def test_a_change_that_would_silently_do_nothing_is_found_before_the_first_step(monkeypatch, fields, encoder, words):
    monkeypatch.setitem(sae_module.RECIPES, "other", sae_module.Recipe("nobody", **fields))
    sae = sae_module.SparseAutoencoder(sae_module.SAEConfig(24, 96, "other"))
    sae.fit_to(torch.from_numpy(DRAWN).float())
    x = torch.from_numpy(DRAWN[:256]).float()
    if encoder:
        train_sae.try_out(sae, x, 0.5)  # without it nothing is wrong
        monkeypatch.setattr(sae_module.SparseAutoencoder, "pre_activations", encoder)
    with pytest.raises(train_sae.UserError, match=words):
        train_sae.try_out(sae, x, 0.5)


def test_a_term_of_the_loss_that_resampling_does_not_see_is_found_before_the_first_step(monkeypatch):
    sae = sae_module.SparseAutoencoder(sae_module.SAEConfig(24, 96, "towards"))
    sae.fit_to(torch.from_numpy(DRAWN).float())
    x = torch.from_numpy(DRAWN[:256]).float()
    train_sae.try_out(sae, x, 0.5)  # without it nothing is wrong
    plain = sae_module.SparseAutoencoder.loss

    def with_a_term(self, *args, **kwargs):
        loss, stats = plain(self, *args, **kwargs)
        return loss + self.W_dec.square().sum(), stats

    monkeypatch.setattr(sae_module.SparseAutoencoder, "loss", with_a_term)
    with pytest.raises(train_sae.UserError, match="`losses`, which resampling draws by"):
        train_sae.try_out(sae, x, 0.5)


def test_the_report_of_an_autoencoder_that_is_all_dead_warns_of_nothing(tmp_path):
    np.save(tmp_path / "a.npy", DRAWN.astype(np.float32))
    flags = (f"--acts={tmp_path}/a.npy", f"--out_dir={tmp_path}", *SMALL_SAE)
    assert script("train_sae.py", *flags).returncode == 0
    folder = tmp_path / "sae/scaling"
    sae = load_sae(folder / "sae.pt")
    torch.nn.init.constant_(sae.b_enc, -1e6)
    save_sae(folder / "sae.pt", sae, **sae.extra)
    save_jsonl(folder / "log.jsonl", [line | {"l0": 0.0} for line in sae.extra["log"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = script("analyze.py", f"--out_dir={tmp_path}")
    assert done.returncode == 0 and done.stderr == "" and "100.00%   96 of 96" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_folder_whose_name_is_no_utf8_gets_its_page(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    strange = out / "sae" / os.fsdecode(b"caf\xe9")
    (out / "sae/scaling").rename(strange)
    command = [sys.executable, os.path.join(ROOT, "analyze.py"), "--show=1", f"--name={strange}"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": "C", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    page = (strange / "features.html").read_text(encoding="utf-8")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["title"].startswith("caf\udce9 · scaling")


def no_json(name):
    raise AssertionError(f"{name} is no JSON")


DRAWN = np.random.default_rng(0).exponential(1.0, (600, 24))
FAR = {
    "a constant column": np.where(np.arange(24) == 3, 60_000, DRAWN).astype(np.float16),
    "an offset": (DRAWN / 10 + 1000).astype(np.float32),
    "large": (DRAWN * 1e18).astype(np.float32),
    "small": (DRAWN * 1e-18).astype(np.float32),
}


@pytest.mark.parametrize("kind", FAR)
def test_variance_explained_is_numpys_however_far_the_activations_are_from_0(tmp_path, kind):
    np.save(tmp_path / "a.npy", FAR[kind])
    done = script("train_sae.py", f"--acts={tmp_path}/a.npy", f"--out_dir={tmp_path}", *SMALL_SAE)
    assert done.returncode == 0, done.stderr
    expected = judged_by_numpy(tmp_path, FAR[kind][570:])
    printed = float(re.search(r"held-out rows: variance explained (\S+) at", done.stdout).group(1))
    assert printed == pytest.approx(expected, rel=1e-4, abs=5e-4)
    assert script("analyze.py", f"--out_dir={tmp_path}").returncode == 0
    metrics = json.loads((tmp_path / "sae/scaling/metrics.json").read_text(), parse_constant=no_json)
    assert metrics["variance_explained"] == pytest.approx(expected, rel=1e-4)
    if kind in ("large", "small"):  # the same rows but for their units: the same autoencoder
        np.save(tmp_path / "a.npy", DRAWN.astype(np.float32))
        done = script("train_sae.py", f"--acts={tmp_path}/a.npy", f"--out_dir={tmp_path}", *SMALL_SAE)
        ordinary = judged_by_numpy(tmp_path, DRAWN[570:])
        assert ordinary == pytest.approx(expected, rel=1e-3) and metrics["dead"] < 0.6


@pytest.mark.parametrize("rows", [20, 600])
def test_one_held_out_row_or_equal_ones_have_no_variance_and_the_json_says_null(tmp_path, rows):
    x = DRAWN[:rows].astype(np.float32)
    x[rows * 95 // 100:] = x[0]
    np.save(tmp_path / "a.npy", x)
    batch = ("--batch_size=16", "--max_iters=20", "--device=cpu")
    done = script("train_sae.py", f"--acts={tmp_path}/a.npy", f"--out_dir={tmp_path}", *batch)
    assert done.returncode == 0 and "variance explained undefined (no two rows differ)" in done.stdout, done.stderr
    done = script("analyze.py", f"--out_dir={tmp_path}")
    assert done.returncode == 0 and re.search("variance explained +undefined +no two rows differ", done.stdout)
    metrics = json.loads((tmp_path / "sae/scaling/metrics.json").read_text(), parse_constant=no_json)
    assert metrics["variance_explained"] is None and metrics["tokens"] == rows // 20


def test_a_batch_without_variance_is_null_in_the_log_and_the_log_can_be_read(tmp_path):
    sae = SparseAutoencoder(SAEConfig(3, 4))
    x = torch.ones(5, 3)
    training = SimpleNamespace(sae=sae, step=7, optimizer=torch.optim.Adam(sae.parameters()))
    loss, stats = sae.loss(x, 1.0)
    line = train_sae.log_line(training, x, loss, stats, torch.zeros(4), 1.0, SimpleNamespace(batch_size=5))
    assert line["variance_explained"] is None and "variance explained undefined" in train_sae.log_note(line)
    save_jsonl(tmp_path / "log.jsonl", [line, line | {"variance_explained": 0.5}])
    assert np.isnan(analyze.read_log(tmp_path)["variance_explained"]).tolist() == [True, False]


@pytest.mark.parametrize("text", ['{"step": 1}\n[2]\n', '{"step": 1, "l0": 2'], ids=["shape", "half"])
def test_a_damaged_log_is_said_to_be_so(tmp_path, text):
    assert analyze.read_log(tmp_path) == {}
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match="log.jsonl .*: train_sae.py writes it"):
        analyze.read_log(tmp_path)


@pytest.mark.parametrize("plain, zero, expected", [
    (4.0, 5.0, 0.75), (4.0, 4.0, None), (4.0, 3.0, None), (4.0, 4.000001, None), (4.0, 4.0001, -2499)])
def test_where_zero_ablation_costs_nothing_no_loss_is_recovered(plain, zero, expected):
    losses = {"loss_plain": plain, "loss_spliced": 4.25, "loss_zero_ablated": zero}
    assert analyze.loss_recovered(losses) == (None if expected is None else pytest.approx(expected, rel=1e-6))


def test_json_never_holds_what_json_has_no_word_for(tmp_path):
    held = {"a": [1.5, math.nan, (np.float64(math.inf), {"b": -math.inf})], "c": 2, "d": None, "e": "NaN"}
    expected = {"a": [1.5, None, [None, {"b": None}]], "c": 2, "d": None, "e": "NaN"}
    held |= {"f": np.array([[1, 2]]), "g": np.array([0.5, np.nan], dtype=np.float32), "h": np.int64(3)}
    expected |= {"f": [[1, 2]], "g": [0.5, None], "h": 3}
    save_json(tmp_path / "a.json", held)
    save_jsonl(tmp_path / "a.jsonl", [held, held])
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    for text in [(tmp_path / "a.json").read_text(), *lines]:
        assert json.loads(text, parse_constant=no_json) == expected


def test_a_model_of_width_1_is_reported_on(trained, tmp_path):
    """LayerNorm of a single number is constant: so are the activations, and zeros in their place cost nothing."""
    sizes = ("--n_embd=1", "--n_head=1", "--max_iters=3")
    flag = f"--out_dir={tmp_path}"
    done = script("train_gpt.py", f"--dataset={trained.parent / 'text.txt'}", *SMALL_GPT, *sizes, flag)
    assert done.returncode == 0, done.stderr
    done = script("train_sae.py", *SMALL_SAE, "--site=resid", flag)
    assert done.returncode == 0, done.stderr
    done = script("analyze.py", "--show=1", flag)
    assert done.returncode == 0, done.stderr
    assert re.search("loss recovered +undefined +zero-ablation costs the model nothing", done.stdout)
    metrics = json.loads((tmp_path / "sae/scaling/metrics.json").read_text(), parse_constant=no_json)
    assert metrics["loss_recovered"] is None and metrics["variance_explained"] is not None
    page = (tmp_path / "sae/scaling/features.html").read_text(encoding="utf-8")
    assert "zero-ablation costs the model nothing" in page


def test_toy_data_is_made_trained_on_and_judged(tmp_path):
    flags = (
        "--acts=toy",
        "--name=toy",
        "--n_features=512",
        "--n_acts=20000",
        "--batch_size=512",
        "--max_iters=150",
        f"--out_dir={tmp_path}",
    )
    assert script("train_sae.py", *flags).returncode == 0
    done = script("analyze.py", "toy", "--name=toy", f"--out_dir={tmp_path}")
    found = json.loads((tmp_path / "sae/toy/metrics.json").read_text())["found"]
    assert done.returncode == 0 and f"{found:.1%}" in done.stdout and 0 <= found < 1
    refused = script("analyze.py", "--name=toy", f"--out_dir={tmp_path}")
    assert refused.returncode == 2 and "choose from toy" in refused.stderr


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_npy(folder, **arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)


TEXT_MISTAKES = {  # case: the file's name, what it holds, words that the one line must hold
    "row without text": ("t.jsonl", '{"text": "one"}\n{"txt": "two"}\n', ["row 2", '"text"', ".txt"]),
    "row that is no object": ("t.jsonl", '{"text": "one"}\n\n["two"]\n', ["row 2", '"text"']),
    "text that is no text": ("t.jsonl", '{"text": 1}', ["row 1", '"text"']),
    "row that is no JSON": ("t.jsonl", "plain text\n", []),
    "column without text": ("t.csv", "title,body\none,two\n", ["row 1", '"text"', ".txt"]),
    "short row": ("t.csv", "title,text\none,two\nthree\n", ["row 2", '"text"']),
    "parquet": ("t.parquet", "PAR1", [".jsonl", "to_json"]),
    "parquet in capitals": ("t.PARQUET", "PAR1", [".jsonl", "to_json"]),
    "half a row": ("t.jsonl", '{"text": "one"}\n{"text": "tw', ["row 2", "Unterminated string"]),
    "deep row": ("t.jsonl", "[" * 200_000, ["row 1"]),
    "quote that is not closed": ("t.csv", 'text\none\n"two\nthree\n', ["row 2", "unexpected end"]),
    "comma without quotes": ("t.csv", "text\none, two\n", ["row 1", "quotes"]),
    "UTF-16": ("t.txt", TEXT.encode("utf-16").decode("latin-1"), ["1 documents", "no UTF-8"]),
}


CHECKPOINT_MISTAKES = {  # case: the checkpoint to resume, what is wrong in it
    "step that is no number": ("gpt.pt", "step", None),
    "step below 0": ("gpt.pt", "step", -1),
    "step beyond the last": ("sae/scaling/sae.pt", "step", 10**6),
    "log that is no list": ("gpt.pt", "log", None),
    "log of other things": ("sae/scaling/sae.pt", "log", ["x"]),
    "text that is not known": ("gpt.pt", "data", None),
}


def spoil(case, out, folder):
    """Makes a mistake -> script, flags, words that the one line must hold."""
    text, flag = folder / "text.txt", f"--out_dir={out}"
    floats = np.random.default_rng(0).random((300, 8), dtype=np.float32)
    acts = ("train_sae.py", flag, f"--acts={folder}/*.npy", *SMALL_SAE)
    if case == "no model":
        return ("train_sae.py", f"--out_dir={folder / 'empty'}"), ["gpt.pt not found", "train_gpt.py"]
    if case == "no autoencoder":
        return ("analyze.py", flag, "--name=nobody"), ["sae.pt not found", "train_sae.py"]
    if case == "foreign model":
        (out / "gpt.pt").write_bytes(b"something else")
        return ("train_sae.py", flag), ["gpt.pt", "train_gpt.py"]
    if case == "truncated autoencoder":
        path = out / "sae/scaling/sae.pt"
        path.write_bytes(path.read_bytes()[:1000])
        return ("analyze.py", flag), ["sae.pt", "train_sae.py"]
    if case == "broken tokenizer":
        (out / "tokenizer.json").write_text("[1, 2")
        return ("analyze.py", flag), ["tokenizer.json", "train_gpt.py"]
    if case == "no data set":
        return ("train_gpt.py", flag, "--dataset=nowhere.txt"), ["nowhere.txt", "not found"]
    if case == "empty data set":
        text.write_text("")
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", f"--dataset={text}"), ["text.txt", "--block_size"]
    if case == "short data set":
        text.write_text("too short")
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", f"--dataset={text}"), ["text.txt", "--block_size"]
    if case == "damaged archive":
        (folder / "t.xz").write_bytes(b"not xz")
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", f"--dataset={folder / 't.xz'}"), ["t.xz"]
    if case in TEXT_MISTAKES:
        name, content, words = TEXT_MISTAKES[case]
        (folder / name).write_text(content, encoding="latin-1", newline="")
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", f"--dataset={folder / name}"), [name, *words]
    if case == "no name of data":
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", "--dataset= , "), ["--dataset", "empty"]
    if case == "width beyond any memory":
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", f"--dataset={text}", "--n_embd=4611686018427387904"), ["memory"]
    if case == "batch beyond any memory":
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", f"--dataset={text}", f"--batch_size={2**62}"), ["memory"]
    if case == "features beyond any memory":
        return ("train_sae.py", flag, *SMALL_SAE, f"--n_features={2**62}"), ["memory"]
    if case == "device that holds no values":
        return ("train_sae.py", flag, "--device=meta"), ["--device=meta"]
    if case == "name of two lines":
        return ("train_sae.py", flag, "--name=a\nb"), [r"--name=a\nb", "letters"]
    if case == "broken tokenizer of prepared data":
        (out / "tokenizer.json").write_text("[1, 2")
        return ("train_gpt.py", flag, *SMALL_GPT, f"--dataset={text}"), ["tokenizer.json", "delete it"]
    if case == "folder in a file's place":
        (out / "data.json").unlink()
        (out / "data.json").mkdir()
        return ("analyze.py", flag), ["data.json", "cannot be read"]
    if case == "two rows":
        write_npy(folder, a=floats[:2])
        return (*acts, "--batch_size=1"), ["all the same"]
    if case == "more than float32 holds":
        write_npy(folder, a=floats.astype(float) * 1e300)
        return acts, ["a.npy", "float32"]
    if case == "negative number of rows":
        write_npy(folder, a=floats)
        (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes().replace(b"(300", b"(-30"))
        return acts, ["a.npy", "no .npy file"]
    if case == "out_dir is the folder of text":
        (folder / "texts").mkdir()
        text.rename(folder / "texts" / "text.txt")
        return ("train_gpt.py", f"--out_dir={folder / 'texts'}", f"--dataset={folder / 'texts'}"), ["texts", "--out_dir"]
    if case == "pipe":
        os.mkfifo(folder / "pipe")
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", f"--dataset={folder / 'pipe'}"), ["pipe", "file"]
    if case == "no gpt2 vocabulary":
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", "--tokenizer=gpt2", f"--dataset={text}"), [
            "gpt2",
            "--tokenizer=bpe",
        ]
    if case == "heads":
        return ("train_gpt.py", flag, "--n_embd=100", "--n_head=3"), ["n_embd", "n_head"]
    if case == "zero size":
        return ("train_gpt.py", flag, "--batch_size=0"), ["--batch_size"]
    if case == "negative size":
        return ("train_sae.py", flag, "--n_features=-5"), ["--n_features"]
    if case == "vocabulary":
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", "--vocab_size=100", f"--dataset={text}"), [
            "--vocab_size",
            "257",
        ]
    if case == "recipe":
        return ("train_sae.py", flag, "--recipe=topk"), ["topk", "towards"]
    if case == "site":
        return ("train_sae.py", flag, "--site=mpl"), ["--site", "resid"]
    if case == "layer":
        return ("train_sae.py", flag, "--layer=3"), ["mlp.3", "mlp.0"]
    if case == "feature":
        return ("analyze.py", "feature", "96", flag), ["96", "0 to 95"]
    if case == "feature, no number":
        return ("analyze.py", "feature", "x", flag), ["feature", "number"]
    if case == "no feature":
        return ("analyze.py", "feature", flag), ["feature takes one number", "analyze.py feature 120"]
    if case == "steer, no feature":
        return ("analyze.py", "steer", flag), ["steer --feature=120"]
    if case == "steer, no flag":
        return ("analyze.py", "steer", "3", flag), ["flags only", "'3'", "--help"]
    if case == "unknown flag":
        return ("train_sae.py", flag, "--lambda=5"), ["--lambda", "--help"]
    if case == "device":
        return ("train_sae.py", flag, "--device=abacus"), ["--device=abacus"]
    if case == "out_dir":
        return ("train_gpt.py", f"--out_dir={text}/below a file"), ["below a file"]
    if case == "batch":
        return ("train_sae.py", flag, *SMALL_SAE, "--batch_size=200000"), ["--batch_size=200000", "131,072"]
    if case == "no .npy":
        return acts, ["no file matches"]
    if case == "malicious model":  # a pickle that would make a folder when loaded
        (out / "gpt.pt").write_bytes(pickle.dumps(Bomb(folder / "harm")))
        return ("train_sae.py", flag), ["gpt.pt", "train_gpt.py"]
    if case == "malicious autoencoder":
        torch.save({"weights": Bomb(folder / "harm")}, out / "sae/scaling/sae.pt")
        return ("analyze.py", flag), ["sae.pt", "train_sae.py"]
    if case == "malicious checkpoint to resume":
        torch.save({"args": Bomb(folder / "harm")}, out / "sae/scaling/sae.pt")
        return ("train_sae.py", flag, *SMALL_SAE, "--resume"), ["sae.pt", "without --resume"]
    if case == "malicious .npy":
        np.save(folder / "a.npy", np.array([[Bomb(folder / "harm")]]), allow_pickle=True)
        return acts, ["a.npy", "objects"]
    if case == "archive":
        np.savez(folder / "a.npz", a=floats)
        (folder / "a.npz").rename(folder / "a.npy")
        return acts, ["a.npy", "archive"]
    if case in CHECKPOINT_MISTAKES:
        name, key, value = CHECKPOINT_MISTAKES[case]
        path = out / name
        torch.save(torch.load(path, weights_only=True) | {key: value}, path)
        flags = {"gpt.pt": SMALL_GPT, "sae/scaling/sae.pt": SMALL_SAE}[name]
        command = "train_gpt.py" if name == "gpt.pt" else "train_sae.py"
        dataset = [f"--dataset={text}"] if name == "gpt.pt" else []
        return (command, flag, *flags, *dataset, "--max_iters=70", "--resume"), [path.name, "without --resume"]
    if case == "list for a model":
        torch.save([1, 2], out / "gpt.pt")
        return ("train_sae.py", flag), ["gpt.pt", "train_gpt.py"]
    if case == "model of other sizes":
        checkpoint = torch.load(out / "gpt.pt", weights_only=True)
        torch.save(checkpoint | {"config": checkpoint["config"] | {"n_embd": 32}}, out / "gpt.pt")
        return ("train_sae.py", flag), ["gpt.pt", "train_gpt.py"]
    if case == "weights missing":
        checkpoint = torch.load(out / "sae/scaling/sae.pt", weights_only=True)
        del checkpoint["weights"]["b_enc"]
        torch.save(checkpoint, out / "sae/scaling/sae.pt")
        return ("analyze.py", flag), ["sae.pt", "train_sae.py"]
    if case == "list for meta.json":
        (out / "acts/mlp.0/meta.json").write_text("[]")
        return ("train_sae.py", flag, *SMALL_SAE), ["meta.json", "delete"]
    if case == "no data.json":
        (out / "data.json").unlink()
        return ("analyze.py", flag), ["data.json", "train_gpt.py"]
    if case == "no tokens":
        (out / "val.bin").write_bytes(b"")
        return ("analyze.py", flag), ["val.bin", "train_gpt.py"]
    if case == "tokens of another tokenizer":
        np.full(4000, 60_000, np.uint16).tofile(out / "val.bin")
        return ("analyze.py", flag), ["val.bin", "train_gpt.py"]
    if case == "half the held-out tokens":
        path = out / "val.bin"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 4 * 2])
        return ("analyze.py", flag), ["val.bin", "data.json says", "train_gpt.py"]
    if case == "few held-out tokens":
        (out / "data.json").write_text((out / "data.json").read_text().replace('"val":', '"value":'))
        np.zeros(20, np.uint16).tofile(out / "val.bin")
        return ("analyze.py", flag), ["val.bin", "train_gpt.py"]
    if case == "tokenizer of another shape":
        (out / "tokenizer.json").write_text('{"kind": "bpe", "tokens": [{"a": 1}]}')
        return ("analyze.py", flag), ["tokenizer.json", "train_gpt.py"]
    if case == "log of another shape":
        path = out / "sae/scaling/sae.pt"
        sae = load_sae(path)
        save_sae(path, sae, **sae.extra | {"log": [2]})
        return ("analyze.py", "scaling", flag), ["sae.pt", "train_sae.py"]
    if case == "name that leaves out_dir":
        return ("train_sae.py", flag, *SMALL_SAE, "--name=../../elsewhere"), ["--name", "letters"]
    if case == "name that some systems cannot hold":
        return ("train_sae.py", flag, *SMALL_SAE, "--name=a:b"), ["--name=a:b", "letters"]
    if case == "no URL":
        return ("train_gpt.py", f"--out_dir={folder / 'new'}", "--dataset=http://127.0.0.1:9/x"), ["127.0.0.1:9", "again"]
    if case == "constant activations":
        write_npy(folder, a=np.ones((300, 8), np.float32))
        return acts, ["all the same"]
    if case == "no learning rate":
        return ("train_sae.py", flag, "--learning_rate=nan"), ["--learning_rate"]
    if case == "negative seed":
        return ("train_sae.py", flag, *SMALL_SAE, "--seed=-1"), ["--seed", "-1"]
    if case == "decoder of norm 0":
        return ("train_sae.py", flag, *SMALL_SAE, "--decoder_norm=0"), ["--decoder_norm", "0"]
    if case == "resampling steps":
        return ("train_sae.py", flag, *SMALL_SAE, "--resample=5,,7"), ["--resample", "whole number"]
    if case == "a bias that tied weights lack":
        return ("train_sae.py", flag, *SMALL_SAE, "--recipe=tied", "--pre_bias=yes"), ["--pre_bias", "tied"]
    if case == "bfloat16":
        write_npy(folder, a=np.ones((300, 8), "V2"))
        return acts, ["a.npy", "bfloat16? save it as float32"]
    if case == "one context for two":
        return ("analyze.py", "neurons", flag, "--read_tokens=1"), ["neurons", "--read_tokens"]
    if case == "truncated .npy":
        write_npy(folder, a=floats)
        (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-50])
        return acts, ["a.npy", "truncated"]
    arrays = {
        "widths": dict(a=floats, b=floats[:, :5]),
        "integers": dict(a=np.ones((300, 8), int)),
        "objects": dict(a=np.array([[object()]])),
        "shape": dict(a=floats[0]),
        "nan": dict(a=np.where(floats > 0.9, np.nan, floats)),
        "no rows": dict(a=floats[:0]),
    }[case]
    write_npy(folder, **arrays)
    return acts, {
        "widths": ["b.npy", "5", "8"],
        "integers": ["a.npy", "int64", "float"],
        "objects": ["a.npy", "objects"],
        "shape": ["a.npy", "(rows, width)"],
        "nan": ["a.npy", "NaN"],
        "no rows": ["a.npy", "(0, 8)"],
    }[case]


@pytest.mark.parametrize(
    "case",
    [
        "no model",
        "no autoencoder",
        "foreign model",
        "truncated autoencoder",
        "broken tokenizer",
        "no data set",
        "empty data set",
        "short data set",
        "damaged archive",
        *TEXT_MISTAKES,
        "out_dir is the folder of text",
        pytest.param("pipe", marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")),
        "no gpt2 vocabulary",
        "heads",
        "zero size",
        "negative size",
        "vocabulary",
        "recipe",
        "site",
        "layer",
        "feature",
        "feature, no number",
        "no feature",
        "steer, no feature",
        "steer, no flag",
        "unknown flag",
        "device",
        "out_dir",
        "batch",
        "no .npy",
        "truncated .npy",
        "widths",
        "integers",
        "objects",
        "shape",
        "nan",
        "no rows",
        "malicious model",
        "malicious autoencoder",
        "malicious checkpoint to resume",
        "malicious .npy",
        "archive",
        *CHECKPOINT_MISTAKES,
        "list for a model",
        "model of other sizes",
        "weights missing",
        "list for meta.json",
        "no data.json",
        "no tokens",
        "tokens of another tokenizer",
        "half the held-out tokens",
        "few held-out tokens",
        "tokenizer of another shape",
        "log of another shape",
        "name that leaves out_dir",
        "name that some systems cannot hold",
        "no URL",
        "constant activations",
        "no learning rate",
        "negative seed",
        "decoder of norm 0",
        "resampling steps",
        "a bias that tied weights lack",
        "bfloat16",
        "one context for two",
        "no name of data",
        "width beyond any memory",
        "batch beyond any memory",
        "features beyond any memory",
        "device that holds no values",
        "name of two lines",
        "broken tokenizer of prepared data",
        "folder in a file's place",
        "two rows",
        "more than float32 holds",
        "negative number of rows",
    ],
)
def test_a_mistake_is_one_line_and_harms_nothing(trained, tmp_path, case, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there: offline
    command, words = spoil(case, out, tmp_path)
    before = hashes(out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        done = script(*command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert hashes(out) == before and not (tmp_path / "harm").exists()
