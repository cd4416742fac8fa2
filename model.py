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
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a file that is then refused

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
            y = hook(site, x) if hook else None
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
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) if targets is not None else None
        return logits, loss

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
        weights = b"".join(p.cpu().numpy().tobytes() for p in self.state_dict().values())
        return hashlib.sha256(weights).hexdigest()[:16]


def load_gpt(out_dir, device="cpu"):
    """-> (GPT in eval mode, tiktoken.Encoding), as train_gpt.py left them in out_dir. UserError if it did not."""
    path, hint = os.path.join(out_dir, "gpt.pt"), "run python train_gpt.py first"
    with reading(path, hint):
        checkpoint = load_checkpoint(path, device)
        gpt = GPT(GPTConfig(**checkpoint["config"])).to(device)
        gpt.load_state_dict(checkpoint["model"])
    if load_json(os.path.join(out_dir, "data.json"), hint).get("made_from") != checkpoint.get("data"):
        raise UserError(f"{path} was trained on other data than {out_dir} has now: run python train_gpt.py again")
    return gpt.eval().requires_grad_(False), load_tokenizer(os.path.join(out_dir, "tokenizer.json"))


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
    words, freqs = [list(word.encode()) for word in counts], list(counts.values())
    pair_counts, where, touched = Counter(), defaultdict(set), set()  # (a, b) -> how often; -> words that hold it

    def count(i, times):
        for pair in zip(words[i], words[i][1:]):
            pair_counts[pair] += times
            where[pair].add(i)
            touched.add(pair)

    for i, freq in enumerate(freqs):
        count(i, freq)
    ranks, heap = {bytes([i]): i for i in range(256)}, []
    tokens, progress = list(ranks), Progress("merging", vocab_size, "tokens", 256)
    while len(tokens) < vocab_size - 1:
        for pair in touched:
            heapq.heappush(heap, (-pair_counts[pair], pair))  # ties: the smaller pair of ranks, on any machine
        touched.clear()
        while heap and -heap[0][0] != pair_counts[heap[0][1]]:
            heapq.heappop(heap)  # an old count: the pair was pushed again when it changed
        if not heap or heap[0][0] > -2:
            break  # what occurs once is not worth a token
        pair = heap[0][1]
        merged = tokens[pair[0]] + tokens[pair[1]]
        if merged not in ranks:
            ranks[merged] = len(tokens)
            tokens.append(merged)
        for i in where.pop(pair):
            count(i, -freqs[i])
            word, words[i] = words[i], []
            for token in word:
                if words[i] and (words[i][-1], token) == pair:
                    words[i][-1] = ranks[merged]
                else:
                    words[i].append(token)
            count(i, freqs[i])
        progress.show(len(tokens))
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
    """Readable JSON: the tokens as text in order of rank; bytes that are no valid UTF-8 as \\udc80 to \\udcff."""
    saved = {"kind": tokenizer.name}
    if tokenizer.name == "bpe":
        tokens = map(tokenizer.decode_single_token_bytes, range(tokenizer.n_vocab - 1))
        saved |= {"pattern": PATTERN, "tokens": [token.decode(errors="surrogateescape") for token in tokens]}
    save_json(path, saved)


def load_tokens(out_dir, split, config):
    """out_dir/train.bin or val.bin, as train_gpt.py left them for a GPTConfig -> memory-mapped ids (n,) uint16."""
    path, hint = os.path.join(out_dir, f"{split}.bin"), "run python train_gpt.py again"
    with reading(path, hint):
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
    if len(tokens) <= config.block_size or tokens.max() >= config.vocab_size:
        raise UserError(f"{path} is too short for a context or of another vocabulary than the model: {hint}")
    return tokens


def load_tokenizer(path):
    hint = "run python train_gpt.py again"
    saved = load_json(path, hint)
    if saved.get("kind") == "gpt2":
        return gpt2_tokenizer()
    with reading(path, hint):
        return bpe_tokenizer({token.encode(errors="surrogateescape"): i for i, token in enumerate(saved["tokens"])})


# -----------------------------------------------------------------------------
# what every script needs: errors in one line, the common flags, progress, atomic files

class UserError(Exception):
    """A mistake that its user can mend: the scripts print it as one line and exit with status 2."""


@contextmanager
def reading(path, hint):
    """with reading(path, hint): whatever fails inside is a UserError that says what to run."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} not found: {hint}")
    except Exception:  # whatever the bytes are, torch's, numpy's and json's readers refuse them in a dozen ways
        raise UserError(f"{path} is damaged or of another kind: {hint}")


def run(main):
    """Calls a script's main() and turns a user's mistake into `error: ...` on stderr and exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # Windows writes files in code pages
    try:
        return main()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        return os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:  # OSError: the file's name and the system's reason say it all
        reason, status = f"error: {error}", 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        reason, status = f"error: too large for the memory: {str(error).splitlines()[0]}", 2
    except KeyboardInterrupt as stop:
        reason, status = "interrupted: run the same command again", 130
        if stop.args:
            reason = f"interrupted at {stop}, which is saved: go on with the same command and --resume"
    print(reason, file=sys.stderr)
    sys.exit(status)


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
    os.makedirs(args.out_dir, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out_dir).close()  # an error now rather than after an hour
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
    """show(done, note) prints one line every five seconds, or `now`: done of total, note(), rate, time left."""
    def __init__(self, label, total, unit, done=0):
        self.label, self.total, self.unit, self.first = label, total, unit, done
        self.start = self.last = time.time()

    def show(self, done, note=str, now=False):
        if not now and time.time() - self.last < 5.0:
            return
        self.last = time.time()
        rate = (done - self.first) / max(self.last - self.start, 1e-9)
        left = int((self.total - done) / rate) if rate else 0
        speed = f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s  {left // 60}m{left % 60:02}s left" if rate else ""
        print(f"{self.label} {done:,}/{self.total:,} {self.unit}  {note()}  {speed}", flush=True)


def tracked(label, parts, unit, size=len):
    """Yields the parts of some work, each of a size, and prints progress."""
    progress, done = Progress(label, sum(map(size, parts)), unit), 0
    for part in parts:
        yield part
        done += size(part)
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
    text = json.dumps(obj, ensure_ascii=False, indent=1)
    write_atomic(path, lambda f: f.write(text.encode(errors="backslashreplace")))  # \\udc80: JSON's own escape


def load_json(path, hint):
    """JSON object at `path`. UserError with `hint` (what to run) when it is missing or no JSON object."""
    with reading(path, hint), open(path, encoding="utf-8") as f:
        return json.load(f) | {}  # a TypeError unless it is an object


def save_jsonl(path, rows):
    write_atomic(path, lambda f: f.writelines(json.dumps(row).encode() + b"\n" for row in rows))


def save_checkpoint(path, **contents):
    write_atomic(path, lambda f: torch.save(contents, f))


def load_checkpoint(path, device):
    """Dict of tensors and plain values, nothing unpickled; some error, for `reading`, where there is no such thing."""
    return torch.load(path, map_location=device, weights_only=True) | {}


ANEW = "run without --resume to start anew"


def resumable(path, args, device):
    """
    The checkpoint from which --resume goes on, None where there is none yet. UserError when a flag differs that would
    make the result another than the uninterrupted run's; leaves the script when the run is finished.
    """
    if not (args.resume and os.path.exists(path)):
        return None
    free = ("resume", "out_dir", "name", "device", "compile", "save_interval")
    with reading(path, ANEW):
        checkpoint = load_checkpoint(path, device)
        step, was = checkpoint["step"], dict(checkpoint["args"])
        more = args.max_iters - was["max_iters"]
    for key, value in vars(args).items():
        if more < 0 if key == "max_iters" else key not in free and value != was.get(key):
            raise UserError(f"--{key}={value}, but {path} was trained with {was.get(key)}: {ANEW}")
    if more:
        print(f"--max_iters={args.max_iters} instead of {was['max_iters']}: from here on with its schedules")
    if step == args.max_iters:
        print(f"{path} is finished: all {step:,} steps are done")
        sys.exit(0)
    print(f"going on from {path}, step {step:,}")
    return checkpoint


def steps(start, stop):
    """Yields start .. stop - 1, but no more after Ctrl-C or SIGTERM reached any rank: the caller saves."""
    came, which = torch.zeros(1), (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda *_: came.fill_(1)) for number in which]
    try:
        for step in range(start, stop):
            yield step
            stopped = came.clone()
            if dist.is_initialized():
                dist.all_reduce(stopped)  # all after the same step, or one would wait for another
            if stopped:
                return
    finally:
        for number, handler in zip(which, handlers):
            signal.signal(number, handler)


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
