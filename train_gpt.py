"""
Text -> tokens -> a small trained transformer.

    python train_gpt.py                                          # this machine's Python sources: offline, minutes
    python train_gpt.py --dataset=shakespeare --out_dir=plays    # a public text by name
    python train_gpt.py --dataset=folder,text.xz --out_dir=mine  # your own text
    python train_gpt.py --tokenizer=gpt2 --block_size=256 --batch_size=64 --max_iters=20000    # with a GPU
    python train_gpt.py --resume                                 # go on after a kill or Ctrl-C
    torchrun --nproc_per_node=2 train_gpt.py --batch_size=16     # on two GPUs or two CPUs, 16 contexts each

Writes to out_dir: tokenizer.json, train.bin and val.bin (uint16 token ids), gpt.pt, gpt.jsonl, gpt_loss.png.
"""
import gzip
import hashlib
import lzma
import os
import random
import re
import socket
import sysconfig
import urllib.request
from contextlib import nullcontext
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from model import (ANEW, BLUE, END_OF_TEXT, GPT, RED, GPTConfig, Progress, UserError, at_least, bpe_tokenizer,
                   check_finite, figure, gpt2_tokenizer, learn_bpe, load_json, load_tokenizer, load_tokens, make_parser,
                   rank_0_first, reading, resumable, run, save_checkpoint, save_json, save_jsonl, save_tokenizer, setup,
                   steps)

URLS = {
    "shakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinystories": "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
}


def parse_args():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="python",
                       help="python (the standard library, numpy and matplotlib of this interpreter), shakespeare, "
                       "tinystories, or text files, folders and URLs with commas between; .gz and .xz are read as they "
                       f"are; a line {END_OF_TEXT} separates documents")
    group.add_argument("--tokenizer", default="bpe", choices=["bpe", "gpt2"],
                       help="bpe: byte-pair merges learned from the data set; gpt2: tiktoken's")
    group.add_argument("--vocab_size", type=at_least(1), default=2048, help="tokens of the bpe tokenizer, 257 to 65536")
    group = parser.add_argument_group("model")
    group.add_argument("--block_size", type=at_least(1), default=128, help="longest context, in tokens")
    group.add_argument("--n_layer", type=at_least(1), default=1, help="transformer blocks")
    group.add_argument("--n_head", type=at_least(1), default=4, help="attention heads a block")
    group.add_argument("--n_embd", type=at_least(1), default=128, help="width of the residual stream")
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=at_least(1), default=32, help="contexts a step, of each rank")
    group.add_argument("--max_iters", type=at_least(1), default=1000, help="steps")
    group.add_argument("--learning_rate", type=at_least(0, float), default=3e-3,
                       help="peak of AdamW's rate: reached after 2%% of the steps, then falls linearly to 0")
    group.add_argument("--eval_interval", type=at_least(1), default=100, help="steps between measurements of loss")
    group.add_argument("--eval_iters", type=at_least(1), default=20, help="batches a measurement")
    group.add_argument("--save_interval", type=at_least(1), default=500, help="steps between checkpoints")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    return parser.parse_args()


# -----------------------------------------------------------------------------
# data: files -> documents -> tokens

def download(url, folder):
    """URL -> path of a complete file in `folder`, as long as the server says it is."""
    name = re.sub(r"[^\w.-]", "_", url.rstrip("/").split("/")[-1].split("?")[0])
    path = os.path.join(folder, hashlib.sha256(url.encode()).hexdigest()[:8] + "-" + name)
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    progress = Progress(f"downloading {url}", 0, "bytes")

    def show(blocks, block_size, total):
        progress.total = max(total, blocks * block_size)  # -1: it does not say
        progress.show(blocks * block_size)
    socket.setdefaulttimeout(60)  # seconds of silence
    try:
        urllib.request.urlretrieve(url, path + ".part", show)  # raises an error when it came to less than announced
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"{url} cannot be downloaded ({error}): run again, or give a file as --dataset")
    os.replace(path + ".part", path)
    return path


def source_files(dataset, out_dir):
    """--dataset -> list of Paths: folders searched through and sorted, then shuffled the same way every time."""
    paths = []
    for source in filter(None, (part.strip() for part in dataset.split(","))):
        if source == "python":
            folders = [Path(sysconfig.get_paths()["stdlib"])]
            folders += [Path(find_spec(package).origin).parent for package in ("numpy", "matplotlib")]
            skip = {"site-packages", "dist-packages", "test", "tests", "encodings"}  # the last: tables, no code
            for folder in folders:
                paths += [p for p in sorted(folder.rglob("*.py")) if not skip & set(p.relative_to(folder).parts)]
        elif source in URLS or "://" in source:
            paths.append(Path(download(URLS.get(source, source), os.path.join(out_dir, "downloads"))))
        elif os.path.isdir(source):
            own = Path(out_dir).resolve()  # what the scripts write is no data
            paths += [p for p in sorted(Path(source).rglob("*")) if p.is_file() and own not in p.resolve().parents
                      and not any(part.startswith(".") for part in p.relative_to(source).parts)]
        elif os.path.isfile(source):
            paths.append(Path(source))
        else:
            raise UserError(f"data set {source} not found: --dataset takes python, {', '.join(URLS)}, files, folders")
    random.Random(0).shuffle(paths)
    return paths


def read_documents(path):
    """Yields the documents of one file, cut into some 4 MB each, as bytes, and how much of the file was read."""
    opener, lines, size = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, nullcontext), [], 0
    with open(path, "rb") as raw, opener(raw) as f:
        for line in f:
            ends = line.rstrip(b"\r\n") == END_OF_TEXT.encode()
            if ends or size > 2**22:
                yield b"".join(lines), raw.tell()
                lines, size = [], 0
            if not ends:
                lines.append(line)
                size += len(line)
        yield b"".join(lines), raw.tell()


def documents(paths, label, skipped):
    """Yields every document of every file as str, with progress; what is no UTF-8 text is left out and `skipped`."""
    progress, before = Progress(label, sum(p.stat().st_size for p in paths), "bytes"), 0
    for path in paths:
        with reading(path, "mend it or leave it out of --dataset"):
            for n, (document, position) in enumerate(read_documents(path)):
                progress.show(before + position)
                try:
                    text = document.decode()
                except UnicodeDecodeError:
                    text = "\0"
                if "\0" in text:
                    skipped.add((path, n))
                elif text.strip():
                    yield text
        before += path.stat().st_size


def write_tokens(texts, tokenizer, train_path, val_path):
    """
    Tokenizes texts into two files of uint16. Every 20th piece of 4,096 tokens at most (a document or a part of one) is
    held out; of a small data set its end. -> number of bytes of the texts
    """
    n_bytes = pieces = 0
    with open(train_path, "wb") as train, open(val_path, "wb") as val:
        for text in texts:
            n_bytes += len(text.encode())
            ids = np.array(tokenizer.encode_ordinary(text) + [tokenizer.eot_token], dtype=np.uint16)
            for start in range(0, len(ids), 4096):
                (val if pieces % 20 == 19 else train).write(ids[start:start + 4096].tobytes())
                pieces += 1
    if pieces < 20:  # too few to leave one out: the last tenth is held out
        ids = np.fromfile(train_path, dtype=np.uint16)
        cut = len(ids) - len(ids) // 10
        ids[cut:].tofile(val_path)
        ids[:cut].tofile(train_path)
    return n_bytes


def prepare(args, checkpoint=None):
    """
    The data set as out_dir/train.bin and val.bin, unless they are there already, made from the same files -> tokenizer
    (tiktoken.Encoding), what all was made from. data.json tells the latter; it is written last: without it, nothing is
    whole.
    """
    paths, skipped = source_files(args.dataset, args.out_dir), set()
    made_from = {"tokenizer": args.tokenizer, "vocab_size": args.vocab_size, "files": hashlib.sha256(
        repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]).encode()).hexdigest()}
    file = {name: os.path.join(args.out_dir, name) for name in ("tokenizer.json", "train.bin", "val.bin", "data.json")}
    there = all(map(os.path.exists, file.values()))
    if checkpoint and checkpoint["data"] != made_from:
        raise UserError(f"gpt.pt was trained on other files than --dataset={args.dataset}: run without --resume")
    if there and load_json(file["data.json"], "delete it").get("made_from") == made_from:
        print(f"data: {file['train.bin']} and val.bin are there, made from the same files")
        return load_tokenizer(file["tokenizer.json"]), made_from

    print(f"data: {len(paths):,} files, {sum(p.stat().st_size for p in paths) / 1e6:.1f} MB")
    if args.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer()
    else:
        if not 257 <= args.vocab_size <= 65536:
            raise UserError(f"--vocab_size must be 257 to 65,536 (bytes, {END_OF_TEXT}, merges), not {args.vocab_size}")
        tokenizer = bpe_tokenizer(learn_bpe(documents(paths, "counting words", skipped), args.vocab_size))
    part = {split: file[f"{split}.bin"] + ".part" for split in ("train", "val")}
    try:
        n_bytes = write_tokens(documents(paths, "tokenizing", skipped), tokenizer, part["train"], part["val"])
        counts = {split: os.path.getsize(path) // 2 for split, path in part.items()}
        if skipped:
            print(f"data: skipped {len(skipped):,} documents that are not UTF-8 text")
        if min(counts.values()) <= args.block_size:
            raise UserError(f"data set {args.dataset} has {counts['train']:,} tokens to train on, {counts['val']:,} "
                            f"held out: both must be more than --block_size={args.block_size}")
        if os.path.exists(file["data.json"]):
            os.remove(file["data.json"])
        for split, path in part.items():
            os.replace(path, file[f"{split}.bin"])
    finally:
        for path in filter(os.path.exists, part.values()):
            os.remove(path)
    save_tokenizer(file["tokenizer.json"], tokenizer)
    save_json(file["data.json"], {"made_from": made_from, "dataset": args.dataset, **counts})
    print(f"data: {counts['train']:,} tokens for training, {counts['val']:,} held out, "
          f"{n_bytes / sum(counts.values()):.2f} bytes a token, vocabulary {tokenizer.n_vocab:,}")
    return tokenizer, made_from


def get_batch(tokens, args, seed, rank=0, ranks=1):
    """
    batch_size random contexts of a token file, decided by seed
    -> this rank's share of them: inputs and targets (batch_size / ranks, block_size)
    """
    starts = np.random.default_rng(seed).integers(0, len(tokens) - args.block_size, (ranks, args.batch_size // ranks))
    starts = starts[rank]
    rows = torch.from_numpy(np.stack([tokens[s:s + args.block_size + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


# -----------------------------------------------------------------------------
# training

def learning_rate(step, max_iters, peak):
    """Linear warm-up over the first 2% of steps, then linear decay that would reach 0 at step max_iters."""
    warmup = max(1, round(0.02 * max_iters))
    return peak * min((step + 1) / warmup, (max_iters - step) / max(1, max_iters - warmup))


def make_optimizer(gpt, peak):
    """AdamW; weight decay on matrices only, not on biases, LayerNorm gains and embeddings."""
    decayed, rest = [], []
    for name, p in gpt.named_parameters():
        (decayed if p.dim() == 2 and not re.match("wte|wpe", name) else rest).append(p)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=p.device.type != "mps")


def main():
    args = parse_args()
    device, autocast, compiled, rank, ranks = setup(args)
    args.batch_size *= ranks
    path = os.path.join(args.out_dir, "gpt.pt")
    checkpoint = resumable(path, args, device)
    config = GPTConfig(args.block_size, 257, args.n_layer, args.n_head, args.n_embd)  # refuses bad sizes at once
    with rank_0_first(ranks):
        tokenizer, made_from = prepare(args, checkpoint)
    config.vocab_size = tokenizer.n_vocab
    data = {split: load_tokens(args.out_dir, split, config) for split in ("train", "val")}

    gpt = GPT(config).to(device)
    optimizer, first, log = make_optimizer(gpt, args.learning_rate), 0, []
    if checkpoint:
        with reading(path, ANEW):
            gpt.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            first, log = checkpoint["step"], checkpoint["log"]
    loss_of = torch.compile(gpt) if compiled else gpt
    if ranks > 1:
        loss_of = DistributedDataParallel(loss_of)
    print(f"gpt: {sum(p.numel() for p in gpt.parameters()):,} parameters, on {device}")
    tokens_a_step = args.batch_size * args.block_size
    progress = Progress("training", args.max_iters * tokens_a_step, "tokens", first * tokens_a_step)

    def loss_on(name, *share):
        x, y = get_batch(data[name], args, *share)
        with autocast:
            return loss_of(x.to(device), y.to(device))[1]

    @torch.no_grad()
    def measure(step):  # on the same batches each time, so that two measurements differ by the model alone
        seeds = [(args.seed, 1, i) for i in range(args.eval_iters)]
        train, val = (sum(loss_on(name, seed, 0, ranks).item() for seed in seeds) / len(seeds) for name in data)
        check_finite(train, gpt, step, optimizer, path)
        log.append({"step": step, "tokens": step * tokens_a_step, "train": train, "val": val})
        progress.show(step * tokens_a_step, lambda: f"step {step:,}  train loss {train:.3f}  val loss {val:.3f}", True)

    def save(step, loss):  # the checkpoint last: where it says that the run is finished, all is there
        check_finite(loss.item(), gpt, step, optimizer, path)
        if rank:
            return
        save_jsonl(os.path.join(args.out_dir, "gpt.jsonl"), log)
        save_checkpoint(path, model=gpt.state_dict(), config=vars(config), optimizer=optimizer.state_dict(),
                        step=step, log=log, args=vars(args), data=made_from)

    done = first
    for step in steps(first, args.max_iters):
        if step % args.eval_interval == 0:
            measure(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.max_iters, args.learning_rate)
        loss = loss_on("train", (args.seed, 0, step), rank, ranks)  # a function of (seed, step): nothing to remember
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        progress.show(done * tokens_a_step, lambda: f"step {done:,}  loss {loss.item():.3f}")
        if done % args.save_interval == 0 and done < args.max_iters:
            save(done, loss)
    if done == args.max_iters:
        measure(done)
    if not rank:
        with figure(os.path.join(args.out_dir, "gpt_loss.png")) as ax:
            for name, colour in (("train", BLUE), ("val", RED)):
                ax.plot([row["step"] for row in log], [row[name] for row in log], color=colour, label=name)
            ax.set(xlabel="step", ylabel="loss (nats a token)", title=f"language model: {log[-1]['val']:.3f} held out")
    save(done, loss)
    if done < args.max_iters:
        raise KeyboardInterrupt(f"step {done:,}")

    start = torch.from_numpy(data["val"][None, :max(1, args.block_size // 4)].astype(np.int64)).to(device)
    text = tokenizer.decode(gpt.eval().generate(start, 200)[0].tolist())
    print(f"\nsample, continued from {start.shape[1]} held-out tokens:\n{'-' * 80}\n{text}\n{'-' * 80}")
    print(f"val loss {log[-1]['val']:.3f}; wrote {path}; next: python train_sae.py --out_dir={args.out_dir}")


if __name__ == "__main__":
    run(main)
