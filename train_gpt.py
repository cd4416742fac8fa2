"""
Text -> tokens -> a small trained transformer.

    python train_gpt.py                                          # this machine's Python sources: offline, minutes
    python train_gpt.py --dataset=shakespeare --max_iters=500    # a public text by name
    python train_gpt.py --dataset=my_folder,more.txt.xz          # your own text
    python train_gpt.py --tokenizer=gpt2 --block_size=256 --batch_size=64 --max_iters=20000    # with a GPU

Writes to out_dir: tokenizer.json, train.bin and val.bin (uint16 token ids), gpt.pt, gpt.jsonl, gpt_loss.png.
"""
import gzip
import hashlib
import json
import lzma
import math
import os
import random
import sysconfig
import urllib.request
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from model import (BLUE, END_OF_TEXT, GPT, RED, GPTConfig, Progress, UserError, bpe_tokenizer, figure, gpt2_tokenizer,
                   learn_bpe, load_json, load_tokenizer, load_tokens, make_parser, not_negative, positive, run,
                   save_checkpoint, save_json, save_tokenizer, setup)

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
    group.add_argument("--vocab_size", type=positive, default=2048, help="tokens of the bpe tokenizer, 257 to 65,536")
    group = parser.add_argument_group("model")
    group.add_argument("--block_size", type=positive, default=128, help="longest context, in tokens")
    group.add_argument("--n_layer", type=positive, default=1, help="transformer blocks")
    group.add_argument("--n_head", type=positive, default=4, help="attention heads a block")
    group.add_argument("--n_embd", type=positive, default=128, help="width of the residual stream")
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=positive, default=32, help="contexts a step")
    group.add_argument("--max_iters", type=positive, default=1000, help="steps")
    group.add_argument("--learning_rate", type=not_negative, default=3e-3,
                       help="peak of AdamW's rate: reached after 2%% of the steps, then falls linearly to 0")
    group.add_argument("--eval_interval", type=positive, default=100, help="steps between measurements of both losses")
    group.add_argument("--eval_iters", type=positive, default=20, help="batches a measurement")
    group.add_argument("--save_interval", type=positive, default=500, help="steps between checkpoints")
    return parser.parse_args()


# -----------------------------------------------------------------------------
# data: files -> documents -> tokens

def download(url, folder):
    """URL -> path of a complete file in `folder`; an interrupted download goes on where it stopped."""
    name = hashlib.sha256(url.encode()).hexdigest()[:8] + "-" + (url.rstrip("/").split("/")[-1].split("?")[0] or "text")
    path, part = os.path.join(folder, name), os.path.join(folder, name + ".part")
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    have = os.path.getsize(part) if os.path.exists(part) else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.status != 206:  # the server sends all of it again
                have = 0
            total = have + int(response.headers.get("Content-Length") or 0)
            progress = Progress(f"downloading {url}", total, "bytes")
            with open(part, "ab" if have else "wb") as f:
                while block := response.read(1 << 20):
                    f.write(block)
                    if progress.due():
                        progress.show(f.tell())
        if total > have and os.path.getsize(part) != total:
            raise OSError("the connection broke off")
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
        raise UserError(f"{url} cannot be downloaded ({error}): run again to go on, or give a file as --dataset")
    os.replace(part, path)
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
            paths += [p for p in sorted(Path(source).rglob("*"))
                      if p.is_file() and not any(part.startswith(".") for part in p.relative_to(source).parts)]
        elif os.path.isfile(source):
            paths.append(Path(source))
        else:
            raise UserError(f"data set {source} not found: --dataset takes python, {', '.join(URLS)}, files, folders")
    random.Random(0).shuffle(paths)
    return paths


def read_documents(path):
    """Yields the documents of one file as bytes, streamed: memory stays at one document's size."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    lines = []
    with opener(path, "rb") as f:
        for line in f:
            if line.rstrip(b"\r\n") == END_OF_TEXT.encode():
                yield b"".join(lines)
                lines = []
            else:
                lines.append(line)
    yield b"".join(lines)


def documents(paths, skipped):
    """Yields every document of every file as str; what is not UTF-8 text is left out and named in `skipped`."""
    for path in paths:
        try:
            for n, document in enumerate(read_documents(path)):
                try:
                    text = document.decode()
                    if "\0" in text:
                        raise ValueError("a binary file")
                except ValueError:
                    skipped.add((path, n))
                    continue
                if text.strip():
                    yield text
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise UserError(f"{path} cannot be read: {error}")


def prepare(args):
    """
    Tokenizes the data set into out_dir/train.bin and val.bin, unless they are there already, from the same files.
    Every 20th piece of 4,096 tokens at most (a document or a part of one) is held out; of a small data set its end.
    -> tiktoken.Encoding
    """
    paths = source_files(args.dataset, args.out_dir)
    described = {"tokenizer": args.tokenizer, "vocab_size": args.vocab_size, "files": hashlib.sha256(
        repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]).encode()).hexdigest()}
    file = {name: os.path.join(args.out_dir, name) for name in ("tokenizer.json", "train.bin", "val.bin", "data.json")}
    if all(map(os.path.exists, file.values())) and load_json(file["data.json"], "delete it")["made_from"] == described:
        print(f"data: {file['train.bin']} and val.bin are there, made from the same files")
        return load_tokenizer(file["tokenizer.json"])
    if os.path.exists(file["data.json"]):
        os.remove(file["data.json"])  # from here on the four files do not belong together

    size = sum(p.stat().st_size for p in paths)
    skipped = set()

    def texts(label):  # all documents, with progress
        progress, done = Progress(label, size, "bytes"), 0
        for text in documents(paths, skipped):
            yield text
            done += len(text)
            if progress.due():
                progress.show(min(done, size))

    print(f"data: {len(paths):,} files, {size / 1e6:.1f} MB")
    if args.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer()
    else:
        if not 257 <= args.vocab_size <= 65536:
            raise UserError(f"--vocab_size must be 257 to 65,536 (bytes, {END_OF_TEXT}, merges), not {args.vocab_size}")
        tokenizer = bpe_tokenizer(learn_bpe(texts("counting words"), args.vocab_size))
    with open(file["train.bin"], "wb") as train, open(file["val.bin"], "wb") as val:
        pieces = 0
        for text in texts("tokenizing"):
            ids = np.array(tokenizer.encode_ordinary(text) + [tokenizer.eot_token], dtype=np.uint16)
            for start in range(0, len(ids), 4096):
                (val if pieces % 20 == 19 else train).write(ids[start:start + 4096].tobytes())
                pieces += 1
    if pieces < 20:  # too few to leave one out: the last tenth is held out
        ids = np.fromfile(file["train.bin"], dtype=np.uint16)
        cut = len(ids) - len(ids) // 10
        ids[cut:].tofile(file["val.bin"])
        ids[:cut].tofile(file["train.bin"])
    counts = {name: os.path.getsize(file[f"{name}.bin"]) // 2 for name in ("train", "val")}
    if skipped:
        print(f"data: skipped {len(skipped):,} documents that are not UTF-8 text")
    if min(counts.values()) <= args.block_size:
        raise UserError(f"data set {args.dataset} has {counts['train']:,} tokens for training and {counts['val']:,} "
                        f"held out: both must be more than --block_size={args.block_size}")
    save_tokenizer(file["tokenizer.json"], tokenizer)
    save_json(file["data.json"], {"made_from": described, "dataset": args.dataset, **counts})
    print(f"data: {counts['train']:,} tokens for training, {counts['val']:,} held out, "
          f"{size / sum(counts.values()):.2f} bytes a token, vocabulary {tokenizer.n_vocab:,}")
    return tokenizer


def get_batch(tokens, args, seed):
    """Random contexts of a token file -> inputs, targets (batch_size, block_size). The seed decides all of it."""
    starts = np.random.default_rng(seed).integers(0, len(tokens) - args.block_size, args.batch_size)
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
    decayed = [p for name, p in gpt.named_parameters() if p.dim() == 2 and "wte" not in name and "wpe" not in name]
    ids = {id(p) for p in decayed}
    rest = [p for p in gpt.parameters() if id(p) not in ids]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=decayed[0].device.type != "mps")


def main():
    args = parse_args()
    device, autocast, compiled = setup(args)
    config = GPTConfig(args.block_size, 257, args.n_layer, args.n_head, args.n_embd)  # refuses bad sizes at once
    tokenizer = prepare(args)
    config.vocab_size = tokenizer.n_vocab
    data = {split: load_tokens(args.out_dir, split) for split in ("train", "val")}

    gpt = GPT(config).to(device)
    optimizer = make_optimizer(gpt, args.learning_rate)
    loss_of = torch.compile(gpt) if compiled else gpt
    print(f"gpt: {sum(p.numel() for p in gpt.parameters()):,} parameters, on {device}")

    def loss_on(name, seed):
        x, y = get_batch(data[name], args, seed)
        with autocast:
            return loss_of(x.to(device), y.to(device))[1]

    @torch.no_grad()
    def measure(name):  # the same batches each time, so that two measurements differ by the model alone
        return sum(loss_on(name, (args.seed, 1, i)).item() for i in range(args.eval_iters)) / args.eval_iters

    log = []
    progress = Progress("training", args.max_iters * args.batch_size * args.block_size, "tokens")
    for step in range(args.max_iters + 1):
        tokens = step * args.batch_size * args.block_size
        last = step == args.max_iters
        if step % args.eval_interval == 0 or last:
            log.append({"step": step, "tokens": tokens, "train": measure("train"), "val": measure("val")})
            progress.show(tokens, f"step {step:,}  train loss {log[-1]['train']:.3f}  val loss {log[-1]['val']:.3f}")
            if not math.isfinite(log[-1]["train"]):
                raise UserError(f"the loss is {log[-1]['train']} at step {step}: try a lower --learning_rate")
        if step and step % args.save_interval == 0 or last:
            save_checkpoint(os.path.join(args.out_dir, "gpt.pt"), model=gpt.state_dict(), config=asdict(config),
                            optimizer=optimizer.state_dict(), step=step, log=log, args=vars(args))
        if last:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.max_iters, args.learning_rate)
        loss = loss_on("train", (args.seed, 0, step))  # a batch is a function of (seed, step): nothing to remember
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        if progress.due():
            progress.show(tokens, f"step {step:,}  loss {loss.item():.3f}")

    with open(os.path.join(args.out_dir, "gpt.jsonl"), "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in log)
    with figure(os.path.join(args.out_dir, "gpt_loss.png")) as ax:
        for name, colour in (("train", BLUE), ("val", RED)):
            ax.plot([row["step"] for row in log], [row[name] for row in log], color=colour, label=name)
        ax.set(xlabel="step", ylabel="loss (nats a token)", title=f"language model: {log[-1]['val']:.3f} held out")
    start = torch.from_numpy(data["val"][None, :args.block_size // 4].astype(np.int64)).to(device)
    text = tokenizer.decode(gpt.eval().generate(start, 200)[0].tolist())
    print(f"\nsample, continued from {start.shape[1]} held-out tokens:\n{'-' * 80}\n{text}\n{'-' * 80}")
    print(f"val loss {log[-1]['val']:.3f}; wrote {os.path.join(args.out_dir, 'gpt.pt')}; next: python train_sae.py")


if __name__ == "__main__":
    run(main)
