"""
The language model: tokenizer, GPT, and how both are kept on disk. Nothing here knows about sparse autoencoders;
what they need from the model is one argument, `hook`.

    gpt, tokenizer = load_gpt("out", "cpu")
    logits, loss = gpt(idx, targets, hook=lambda site, x: torch.zeros_like(x) if site == "mlp.0" else None)

Notable:
- pre-LayerNorm blocks, learned positions, ReLU in the MLP and one layer by default: the model of Bricken et al. 2023
- embedding and unembedding are separate matrices, so "which tokens does this direction raise?" is asked of W_U alone
- one `hook(site, x)` serves dumping, splicing, ablation and steering
- byte-pair merges are learned here but run by tiktoken, so every string round-trips at tiktoken's speed
- checkpoints hold tensors and plain values only, are moved into place when complete, and load with weights_only=True
"""
import argparse
import hashlib
import heapq
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

# -----------------------------------------------------------------------------
# GPT

@dataclass
class GPTConfig:
    block_size: int = 128   # longest context, in tokens
    vocab_size: int = 2048
    n_layer: int = 1
    n_head: int = 4
    n_embd: int = 128       # width of the residual stream; the MLP is four times as wide

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} must be 1 or more, not {value}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x))."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C)
        self.c_attn = nn.Linear(C, 3 * C)    # query, key, value of all heads at once
        self.attn_proj = nn.Linear(C, C)
        self.ln_2 = nn.LayerNorm(C)
        self.c_fc = nn.Linear(C, 4 * C)
        self.mlp_proj = nn.Linear(4 * C, C)

    def attention(self, x):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)       # (B, n_head, T, C / n_head)
        return self.attn_proj(y.transpose(1, 2).reshape(B, T, C))         # (B, T, C)

    def forward(self, x, hook, layer):
        x = x + hook(f"attn.{layer}", self.attention(self.ln_1(x)))
        neurons = hook(f"mlp.{layer}", F.relu(self.c_fc(self.ln_2(x))))   # (B, T, 4 C): what an SAE on the MLP reads
        return hook(f"resid.{layer}", x + self.mlp_proj(neurons))


class GPT(nn.Module):
    """
    Decoder-only transformer.

    Initialisation: every matrix N(0, 1 / fan_in), which keeps the variance of what flows through it. Two exceptions:
    the matrices that write into the residual stream are divided by sqrt(2 n_layer), so that the stream's variance
    does not grow with depth (Radford et al. 2019), and the unembedding starts at a tenth, so that the first loss is
    close to log(vocab_size), that of a model which has no opinion. Embeddings are N(0, 0.02): Adam's steps, all of one
    size, soon outgrow that random start, and not one of N(0, 1) (final loss 4.06 instead of 3.76). Biases are 0.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # W_U, not tied to wte
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "wte" in name or "wpe" in name:
                nn.init.normal_(p, std=0.02)
            elif p.dim() == 2:
                shrink = 10 if "lm_head" in name else math.sqrt(2 * config.n_layer) if "proj" in name else 1
                nn.init.normal_(p, std=p.shape[1] ** -0.5 / shrink)

    def trunk(self, idx, hook=None):
        """Everything before the unembedding. idx: (B, T) token ids -> (B, T, n_embd), after the last LayerNorm."""
        def call(site, x):
            y = hook(site, x) if hook is not None else None
            return x if y is None else y
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, call, layer)
        return self.ln_f(x)

    def activations(self, idx, site):
        """Activations (B, T, site_width) at a site on idx (B, T) token ids."""
        kept = {}
        self.trunk(idx, lambda name, x: kept.update({name: x}))
        return kept[site]

    def forward(self, idx, targets=None, hook=None):
        """
        idx, targets: (B, T) token ids -> logits (B, T, vocab_size), loss: mean cross-entropy in nats, None without
        targets. hook(site, x) is called at "attn.L" (attention output, width n_embd), "mlp.L" (MLP activations after
        the ReLU, width 4 n_embd) and "resid.L" (residual stream after the block) of every layer L; what it returns
        takes the place of x, None keeps x.
        """
        logits = self.lm_head(self.trunk(idx, hook))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, n_tokens, temperature=0.8, top_k=50, hook=None, generator=None):
        """Appends n_tokens sampled tokens to idx (B, T) -> (B, T + n_tokens)."""
        for _ in range(n_tokens):
            logits, _ = self(idx[:, -self.config.block_size:], hook=hook)
            logits = logits[:, -1] / temperature
            kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            probs = logits.masked_fill(logits < kth, -math.inf).softmax(-1)
            idx = torch.cat([idx, torch.multinomial(probs, 1, generator=generator)], dim=1)
        return idx

    def site_width(self, site):
        """Width of the activations at a site; UserError when the model has no such site."""
        sites = [f"{kind}.{layer}" for layer in range(self.config.n_layer) for kind in ("attn", "mlp", "resid")]
        if site not in sites:
            raise UserError(f"the model has no site {site}: it has {', '.join(sites)}")
        return self.config.n_embd * (4 if site.startswith("mlp") else 1)

    def fingerprint(self):
        """16 hex digits that change with any weight: tells activations and SAEs of one model from another's."""
        digest = hashlib.sha256()
        for name, p in self.state_dict().items():
            digest.update(name.encode() + p.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_gpt(out_dir, device="cpu"):
    """-> (GPT in eval mode, tiktoken.Encoding), as train_gpt.py left them in out_dir. UserError if it did not."""
    path, hint = os.path.join(out_dir, "gpt.pt"), "run python train_gpt.py first"
    checkpoint, data = load_checkpoint(path, device, ["model", "config"], hint), os.path.join(out_dir, "data.json")
    try:
        gpt = GPT(GPTConfig(**checkpoint["config"])).to(device)
        gpt.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError):
        raise UserError(f"{path} is not a checkpoint of this project's GPT: {hint}")
    tokenizer = load_tokenizer(os.path.join(out_dir, "tokenizer.json"))
    if tokenizer.n_vocab != gpt.config.vocab_size:
        raise UserError(f"{path} has {gpt.config.vocab_size} tokens, tokenizer.json {tokenizer.n_vocab}: {hint}")
    if "data" in checkpoint and os.path.exists(data) and load_json(data, hint).get("made_from") != checkpoint["data"]:
        raise UserError(f"{path} was trained on other data than {out_dir} has now: run python train_gpt.py again")
    return gpt.eval().requires_grad_(False), tokenizer


# -----------------------------------------------------------------------------
# tokenizer

# GPT-2's way to cut text into words, in the syntax that Python's `re` and tiktoken's Rust engine share:
#   contractions | letters | digits | anything else, each with the space before it | white space
# (256 bounds the engine's backtracking: a megabyte of blanks would overflow its stack).
# Merges never cross a cut, so " self", "self" and "_" are candidates for a token, "self._" is not.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s{1,256}(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


def learn_bpe(texts, vocab_size):
    """
    Byte-pair encoding (Sennrich et al. 2016): start from the 256 bytes; again and again make the most frequent
    adjacent pair one token. Each distinct word is counted once, and a merge updates only the words it touches.

    texts: iterable of str;  -> dict {bytes: rank} of at most vocab_size - 1 tokens (one is kept for END_OF_TEXT)
    """
    counts = Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text))
    words = [list(word.encode("utf-8", "replace")) for word in counts]
    freqs = list(counts.values())
    pair_counts, where = defaultdict(int), defaultdict(set)  # (a, b) -> how often; -> indices of words that hold it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += freqs[i]
            where[pair].add(i)

    ranks = {bytes([i]): i for i in range(256)}
    tokens = list(ranks)
    heap = [(-count, pair) for pair, count in pair_counts.items()]  # ties: the smaller pair of ranks, on any machine
    heapq.heapify(heap)
    progress = Progress("merging", vocab_size, "tokens", len(tokens))
    while len(tokens) < vocab_size - 1 and heap:
        if progress.due():
            progress.show(len(tokens))
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            continue  # an old count: the pair was pushed again when it changed
        if -count < 2:
            break  # what occurs once is not worth a token
        merged = tokens[pair[0]] + tokens[pair[1]]
        if merged not in ranks:
            ranks[merged] = len(tokens)
            tokens.append(merged)
        touched = set()
        for i in where.pop(pair):
            word = words[i]
            old = list(zip(word, word[1:]))
            j = 0
            while j < len(word) - 1:
                if (word[j], word[j + 1]) == pair:
                    word[j:j + 2] = [ranks[merged]]
                j += 1
            new = list(zip(word, word[1:]))
            for p in old:
                pair_counts[p] -= freqs[i]
            for p in new:
                pair_counts[p] += freqs[i]
                where[p].add(i)
            touched.update(old, new)
        for p in touched:
            if pair_counts[p] > 0:
                heapq.heappush(heap, (-pair_counts[p], p))
    return ranks


def bpe_tokenizer(ranks):
    """{bytes: rank} -> tiktoken.Encoding with END_OF_TEXT as its last token."""
    return tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def gpt2_tokenizer():
    """tiktoken's gpt2. UserError where its vocabulary is neither cached nor to be downloaded."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' many exceptions, a bad cache
        raise UserError(f"tiktoken cannot load or download its gpt2 vocabulary ({type(error).__name__}): use "
                        "--tokenizer=bpe, or set TIKTOKEN_CACHE_DIR to a folder that holds it")


def save_tokenizer(path, tokenizer):
    """Readable JSON: the tokens in order of rank, each as text, or as a list of bytes where it is no valid UTF-8."""
    saved = {"kind": tokenizer.name, "vocab_size": tokenizer.n_vocab}
    if tokenizer.name == "bpe":
        tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab - 1)]
        saved |= {"pattern": PATTERN, "tokens": [text if (text := token.decode(errors="replace")).encode() == token
                                                 else list(token) for token in tokens]}
    save_json(path, saved)


def load_tokens(out_dir, split, config):
    """out_dir/train.bin or val.bin, as train_gpt.py left them for a GPTConfig -> memory-mapped ids (n,) uint16."""
    path, hint = os.path.join(out_dir, f"{split}.bin"), "run python train_gpt.py again"
    load_json(os.path.join(out_dir, "data.json"), hint)  # written when both are whole
    try:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
    except (FileNotFoundError, ValueError):
        raise UserError(f"{path} is missing or empty: {hint}")
    if len(tokens) <= config.block_size or tokens.max() >= config.vocab_size:
        raise UserError(f"{path} is too short for a context or of another vocabulary than the model: {hint}")
    return tokens


def load_tokenizer(path):
    saved = load_json(path, "run python train_gpt.py first")
    if saved.get("kind") == "gpt2":
        return gpt2_tokenizer()
    try:
        tokens = [token.encode() if isinstance(token, str) else bytes(token) for token in saved["tokens"]]
        return bpe_tokenizer({token: rank for rank, token in enumerate(tokens)})
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged or not a file of this project: run python train_gpt.py again")


# -----------------------------------------------------------------------------
# what every script needs: errors in one line, the common flags, progress, atomic files

class UserError(Exception):
    """A mistake that its user can mend: the scripts print it as one line and exit with status 2."""


def run(main):
    """Calls a script's main() and turns a user's mistake into `error: ...` on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # no space, no permission: the file's name and the system's reason say it all
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"interrupted at {stop}, which is saved: go on with the same command and --resume" if stop.args else
              "interrupted: run the same command again", file=sys.stderr)
        sys.exit(130)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a script's docstring as it is and every flag with its default."""


def make_parser(doc):
    """-> argparse parser with the flags that all three scripts share; its errors are UserErrors, not usage dumps."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(message):
        raise UserError(f"{message} (--help lists the flags)")
    parser.error = error
    group = parser.add_argument_group("common")
    group.add_argument("--out_dir", default="out", help="folder of everything that is written")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda if there is one")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                       help="of training's products; weights stay float32; auto: bfloat16 on cuda, else float32")
    group.add_argument("--compile", default="auto", choices=["auto", "yes", "no"],
                       help="torch.compile the training step; auto: on cuda")
    group.add_argument("--seed", type=at_least(0), default=1337, help="same seed, same machine: same files")
    return parser


def at_least(low, kind=int):
    """-> argparse type: a finite number of a kind, low or more."""
    def number(text):
        if not low <= kind(text) < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {low} and below 2^63, not {text}")
        return kind(text)
    return number


def setup(args):
    """
    Common flags -> device, autocast context manager, whether to compile, rank and number of ranks (0 and 1 unless
    torchrun started it; then it joins the process group). Seeds torch, makes `out_dir`.
    """
    rank, ranks, local_rank = 0, 1, 0
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun
        rank, ranks, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={args.device} is not available here: {str(error).splitlines()[0]}")
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out_dir).close()
    except OSError as error:
        raise UserError(f"cannot write to --out_dir={args.out_dir}: {error.strerror}")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32 on cuda; float32 on the CPU is not affected
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if half else nullcontext()
    compiled = args.compile == "yes" or (args.compile == "auto" and device.type == "cuda")
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        if rank:
            sys.stdout = open(os.devnull, "w")  # one voice
    return device, autocast, compiled, rank, ranks


@contextmanager
def rank_0_first(ranks):
    """with rank_0_first(ranks): the others do it when rank 0 has, and find its files."""
    if ranks > 1 and dist.get_rank():
        dist.barrier()
    yield
    if ranks > 1 and not dist.get_rank():
        dist.barrier()


class Progress:
    """Every five seconds, when due(), show(done, note) prints one line: done of total, the note, rate, time left."""
    def __init__(self, label, total, unit, done=0):
        self.label, self.total, self.unit, self.first = label, total, unit, done
        self.start = self.last = time.time()

    def due(self):
        return time.time() - self.last >= 5.0

    def show(self, done, note=""):
        self.last = time.time()
        rate = (done - self.first) / max(self.last - self.start, 1e-9)
        left = int((self.total - done) / rate) if rate else 0
        speed = f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s  {left // 60}m{left % 60:02}s left" if rate else ""
        print(f"{self.label} {done:,}/{self.total:,} {self.unit}  {note}{'  ' if note else ''}{speed}", flush=True)


def tracked(label, parts, unit):
    """Yields the parts of some work, each of a length, and prints progress."""
    progress, done = Progress(label, sum(map(len, parts)), unit), 0
    for part in parts:
        yield part
        done += len(part)
        if progress.due():
            progress.show(done)


def write_atomic(path, write):
    """Calls write(binary file), then moves the file into place: a reader never sees half of one."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            write(f)
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when the disk is full
        if os.path.lexists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {path} ({reason}): make room and run again; what was there before is unharmed")


def save_json(path, obj):
    write_atomic(path, lambda f: f.write(json.dumps(obj, ensure_ascii=False, indent=1).encode("utf-8", "replace")))


def load_json(path, hint):
    """JSON object at `path`. UserError with `hint` (what to run) when it is missing or no JSON object."""
    try:
        with open(path, encoding="utf-8") as f:
            obj = json.load(f)
    except FileNotFoundError:
        raise UserError(f"{path} not found: {hint}")
    except ValueError:
        obj = None
    if not isinstance(obj, dict):
        raise UserError(f"{path} is damaged or not a file of this project: {hint}")
    return obj


def save_jsonl(path, rows):
    write_atomic(path, lambda f: f.writelines(json.dumps(row).encode() + b"\n" for row in rows))


def save_checkpoint(path, **contents):
    write_atomic(path, lambda f: torch.save(contents, f))


def load_checkpoint(path, device, keys, hint):
    """Dict of tensors and plain values at `path`, nothing unpickled. UserError with `hint` when it lacks `keys`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which pickle it is
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} not found: {hint}")
    except Exception:  # whatever the bytes are, torch's reader refuses them in a dozen ways
        checkpoint = None
    if not isinstance(checkpoint, dict) or not set(keys) <= set(checkpoint):
        raise UserError(f"{path} is damaged or not a checkpoint of this project: {hint}")
    return checkpoint


def resumable(path, args, device):
    """
    The checkpoint from which --resume goes on, None where there is none yet. UserError when a flag differs that would
    make the result another than the uninterrupted run's; leaves the script when the run is finished.
    """
    if not (args.resume and os.path.exists(path)):
        return None
    hint = "run without --resume to start anew"
    free = ("resume", "out_dir", "name", "device", "compile", "save_interval", "max_iters")
    checkpoint = load_checkpoint(path, device, ["args", "step", "log", "optimizer"], hint)
    step, was = checkpoint["step"], checkpoint["args"]
    if not isinstance(was, dict) or "max_iters" not in was:
        raise UserError(f"{path} is damaged or not a checkpoint of this project: {hint}")
    for key, value in vars(args).items():
        if key not in free and was.get(key) != value:
            raise UserError(f"--{key}={value}, but {path} was trained with {was.get(key)}: {hint}")
    if args.max_iters < was["max_iters"]:
        raise UserError(f"--max_iters={args.max_iters}, but {path} was started for {was['max_iters']}: {hint}")
    if args.max_iters > was["max_iters"]:
        print(f"--max_iters={args.max_iters} instead of {was['max_iters']}: from here on with its schedules")
    if step == args.max_iters:
        print(f"{path} is finished: all {step:,} steps are done")
        sys.exit(0)
    print(f"going on from {path}, step {step:,}")
    return checkpoint


def restore(path, checkpoint, module, weights, optimizer):
    """Puts a checkpoint's weights and its optimizer's state back. UserError when they do not fit."""
    try:
        module.load_state_dict(weights)
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (KeyError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: run without --resume to start anew")


def steps(start, stop):
    """Yields start .. stop - 1, but no more after Ctrl-C or SIGTERM: the caller saves. A second one stops at once."""
    came = []

    def note(number, frame):
        came.append(number)
        for which, handler in before.items():
            signal.signal(which, handler)
    before = {which: signal.signal(which, note) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in range(start, stop):
            yield step
            signals = torch.tensor(len(came))
            if dist.is_initialized():
                dist.all_reduce(signals)  # all ranks stop after the same step
            if signals:
                return
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def check_finite(loss, module, step, optimizer, path):
    """UserError when the loss or a weight is NaN or infinite: before a checkpoint would be written with it."""
    if not (math.isfinite(loss) and all(p.isfinite().all() for p in module.parameters())):
        good = f"{path} is the last good checkpoint" if os.path.exists(path) else "there is no checkpoint yet"
        raise UserError(f"the loss is {loss} or a weight infinite at step {step:,}, learning rate "
                        f"{optimizer.param_groups[0]['lr']:.2g}: lower --learning_rate; {good}")


BLUE, RED = "#2a6f97", "#d1495b"


@contextmanager
def figure(path, panels=1, width=6.0, height=3.6):
    """with figure(path) as ax: draws on one panel (or a list of them); the picture is written at the end."""
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(1, panels)
    yield axes
    for ax in np.atleast_1d(axes):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(frameon=False, fontsize="small")
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=120))
