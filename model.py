"""
The language model: its settings, one block, the transformer, and how to load a trained one.
Nothing here knows about sparse autoencoders; what they need from it is one argument, `hook`.

    def without_mlp(site, x):
        return torch.zeros_like(x) if site == "mlp.0" else None

    gpt, tokenizer = load_gpt("out", "cpu")
    _, loss = gpt(idx, targets, hook=without_mlp)

Notable:
- pre-LayerNorm blocks, learned positions, ReLU in the MLP and one layer by default: the model
  of Bricken et al. 2023
- embedding and unembedding are separate matrices, so "which tokens does this direction raise?"
  is asked of W_U alone
- one `hook(site, x)` serves dumping, splicing, ablation and steering
- byte-pair merges are learned by train_gpt.py but run by tiktoken, so every string round-trips
  at tiktoken's speed
- checkpoints hold tensors and plain values only, are moved into place when complete, and load
  with weights_only=True
"""
import argparse
import copy
import ctypes
import hashlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import uuid
import warnings
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

try:
    import fcntl  # file locks
except ImportError:
    fcntl = None  # on Windows

# torch warns of an old pickle format before it refuses the file: our one line says enough
warnings.filterwarnings("ignore", "Detected pickle protocol")


@dataclass
class GPTConfig:
    """What one model is made from. It is saved and restored as a whole."""
    block_size: int = 128  # longest context, in tokens
    vocab_size: int = 2048
    n_layer: int = 1
    n_head: int = 4
    n_embd: int = 128  # width of the residual stream; the MLP is four times as wide

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


class Block(nn.Module):
    """
    x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)). There is no forward: GPT.trunk takes
    each half in two steps, read and write, with the hook in between.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C)
        self.c_attn = nn.Linear(C, 3 * C)  # query, key, value of all heads at once
        self.attn_proj = nn.Linear(C, C)
        self.ln_2 = nn.LayerNorm(C)
        self.c_fc = nn.Linear(C, 4 * C)
        self.mlp_proj = nn.Linear(4 * C, C)

    def attention(self, x):
        """Causal self-attention of x (B, T, C); the result is (B, T, C), too."""
        B, T, C = x.shape
        head = C // self.n_head                   # width of one
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, self.n_head, head).transpose(1, 2)          # (B, n_head, T, head)
        k = k.view(B, T, self.n_head, head).transpose(1, 2)          # (B, n_head, T, head)
        v = v.view(B, T, self.n_head, head).transpose(1, 2)          # (B, n_head, T, head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, n_head, T, head)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.attn_proj(y)

    def read(self, kind, stream):
        """The activations at a kind of site, made from the residual stream (B, T, C) there."""
        if kind == "attn":
            return self.attention(self.ln_1(stream))     # (B, T, C)
        if kind == "mlp":
            return F.relu(self.c_fc(self.ln_2(stream)))  # (B, T, 4 C): the neurons
        return stream                                    # resid: itself

    def write(self, kind, stream, x):
        """The residual stream (B, T, C) once the activations x at a kind of site are in it."""
        if kind == "attn":
            return stream + x
        if kind == "mlp":
            return stream + self.mlp_proj(x)
        return x  # resid


class GPT(nn.Module):
    """
    A decoder-only transformer.

    Every matrix starts as N(0, 1 / fan_in), which keeps the variance of what flows through
    it. There are two exceptions. The matrices that write into the residual stream are
    divided by sqrt(2 n_layer), so that the stream's variance does not grow with depth
    (Radford et al. 2019). The unembedding starts at a tenth, so that the first loss is
    close to log(vocab_size), that of a model which has no opinion.

    Embeddings have a standard deviation of 0.02. Adam's steps, all of one size, soon outgrow
    that random start. They do not outgrow a standard deviation of 1, with which the loss ended
    at 4.06 instead of 3.76. Biases are 0.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # W_U: not tied to wte, so that it alone says which tokens a direction raises
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """Draws the parameters anew, as the class says. LayerNorm's gains stay at 1."""
        for name, p in self.named_parameters():
            keeps_variance = p.shape[-1] ** -0.5  # 1 / sqrt(fan_in)
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "wte" in name or "wpe" in name:
                nn.init.normal_(p, std=0.02)
            elif "lm_head" in name:
                nn.init.normal_(p, std=keeps_variance / 10)
            elif "proj" in name:  # writes into the residual stream
                nn.init.normal_(p, std=keeps_variance / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=keeps_variance)

    @property
    def sites(self):
        """
        Where the hook is called, in order: a list of (site, its kind, its block). Each kind of
        site writes into the stream once, so another way to cut the MLP takes the place of "mlp".
        """
        found = []
        for layer, block in enumerate(self.blocks):
            for kind in ("attn", "mlp", "resid"):
                found.append((f"{kind}.{layer}", kind, block))
        return found

    def embed(self, idx):
        """The residual stream (B, T, C) before the first layer, of token ids idx (B, T)."""
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        return self.wte(idx) + self.wpe(positions)

    def trunk(self, idx, hook=None):
        """
        Everything before the unembedding: token ids idx (B, T) become (B, T, n_embd), after
        the last LayerNorm. hook is forward's.
        """
        stream = self.embed(idx)  # (B, T, C)
        for site, kind, block in self.sites:
            x = block.read(kind, stream)
            replacement = hook(site, x) if hook else None
            stream = block.write(kind, stream, x if replacement is None else replacement)
        return self.ln_f(stream)

    def before(self, idx, site):
        """
        The part of trunk up to a site: the residual stream (B, T, C) there and the activations
        (B, T, site_width), on token ids idx (B, T).
        """
        stream = self.embed(idx)
        for name, kind, block in self.sites:
            x = block.read(kind, stream)
            if name == site:
                return stream, x
            stream = block.write(kind, stream, x)

    def after(self, site, stream, x):
        """
        The rest of trunk, with x (B, T, site_width) at the site; (1, 1, site_width) is the same
        x at every token. Several x can follow one `before`. In the last layer all that is left
        treats each token by itself: B and T may then be any.
        """
        names = [name for name, _, _ in self.sites]
        for name, kind, block in self.sites[names.index(site):]:
            if name != site:  # there, x is given
                x = block.read(kind, stream)
            stream = block.write(kind, stream, x)
        return self.ln_f(stream)

    def activations(self, idx, site):
        """
        The activations (B, T, site_width) at a site, on token ids idx (B, T). Nothing that
        comes after the site is computed.
        """
        _, x = self.before(idx, site)
        return x

    def forward(self, idx, targets=None, hook=None):
        """
        Without targets: the logits (B, T, vocab_size) for token ids idx (B, T), and None. With
        targets (B, T): None, and the mean cross-entropy in nats. Nobody needs both, and a compiled
        model would make a gradient of zeros, as large as the logits, where they are not used.

        hook(site, x) is called at three sites of every layer L: "attn.L" (attention output,
        width n_embd), "mlp.L" (MLP activations after the ReLU, width 4 n_embd) and
        "resid.L" (residual stream after the block, width n_embd). What it returns takes the
        place of x; None keeps x.
        """
        logits = self.lm_head(self.trunk(idx, hook))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        flat = logits.float().flatten(0, 1)  # (B T, vocab_size), never bfloat16
        loss = F.cross_entropy(flat, targets.flatten())
        return None, loss

    @torch.no_grad()
    def generate(self, idx, n_tokens, temperature=0.8, top_k=50, hook=None, generator=None):
        """Appends n_tokens sampled tokens to idx (B, T), which gives (B, T + n_tokens)."""
        for _ in range(n_tokens):
            context = idx[:, -self.config.block_size:]  # there are no positions beyond
            logits, _ = self(context, hook=hook)
            logits = logits[:, -1] / temperature  # (B, vocab_size): of the next token
            k = min(top_k, logits.shape[-1])
            kth_largest = logits.topk(k).values[:, -1:]  # (B, 1)
            logits = logits.masked_fill(logits < kth_largest, -math.inf)
            probs = logits.softmax(-1)
            next_token = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
            idx = torch.cat([idx, next_token], dim=1)
        return idx

    def site_width(self, site):
        """The width of the activations at a site. UserError when there is no such site."""
        names = [name for name, _, _ in self.sites]
        if site not in names:
            raise UserError(f"the model has no site {site}: it has {', '.join(names)}")
        if site.startswith("mlp"):
            return 4 * self.config.n_embd
        return self.config.n_embd

    def fingerprint(self):
        """
        16 hexadecimal digits that change with any weight. They tell the activations and
        autoencoders of one model from another's.
        """
        weights = [p.cpu().numpy().tobytes() for p in self.state_dict().values()]
        return hashlib.sha256(b"".join(weights)).hexdigest()[:16]


def load_gpt(out_dir, device="cpu"):
    """
    Loads what train_gpt.py left in out_dir: the GPT, in eval mode and without gradients,
    and its tokenizer (a tiktoken.Encoding). UserError when they are missing, damaged, or do
    not belong together.
    """
    path = os.path.join(out_dir, "gpt.pt")
    hint = "run python train_gpt.py first"
    with reading(path, hint):
        checkpoint = load_checkpoint(path, device)
        gpt = GPT(GPTConfig(**checkpoint["config"])).to(device)
        gpt.load_state_dict(checkpoint["model"])
    # a run killed between new data and its first checkpoint leaves an older model beside them
    data = load_json(os.path.join(out_dir, "data.json"), hint)
    if data.get("made_from") != checkpoint.get("data"):
        raise UserError(f"{path} was trained on other data than {out_dir} has now: "
                        "run python train_gpt.py again")
    tokenizer = load_tokenizer(os.path.join(out_dir, "tokenizer.json"))
    return gpt.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def shuffled_weights(gpt):
    """
    A copy of a GPT with the entries of each weight matrix in random order: the control of
    Bricken et al., "Do features tell us about the model or the data?". It has the sizes of
    the trained model's weights and nothing of what was learned, so whatever is found in it
    comes from the text.

    Embeddings and the unembedding are matrices, too; biases and LayerNorm's gains are not,
    and stay. The order is drawn by the model's own fingerprint: each model has one shuffled
    copy, and those of two models share no order.
    """
    rng = np.random.default_rng(int(gpt.fingerprint(), 16))
    shuffled = copy.deepcopy(gpt)
    for name, p in shuffled.named_parameters():
        if p.dim() < 2:
            continue
        # query, key and value are matrices of their own, each with its own size of entries
        for matrix in p.chunk(3 if "c_attn" in name else 1):
            order = torch.from_numpy(rng.permutation(matrix.numel())).to(p.device)
            matrix.copy_(matrix.flatten()[order].view_as(matrix))
    return shuffled


# =============================================================================
# the model ends here; what follows is shared plumbing and says nothing about the papers
# =============================================================================

# -----------------------------------------------------------------------------
# tokenizer

# GPT-2's way to cut text into words, in the syntax that Python's `re` and tiktoken's Rust
# engine share. A word is the first of the alternatives that fits.
# Merges never cross a cut: " self", "self" and "_" may become tokens, "self._" may not.
# The bounds are far beyond the words of any language. They are for texts that never stop, DNA
# or a line of ten million dashes: the engines would overflow their stacks or take quadratic
# time. (128, since a Rust engine refuses 256 letters: too many states.)
# The two engines cut alike but for marks that combine with letters (letters in Rust, symbols in
# Python) and signs like ² (the other way round): there, no merge is learned across.
# Whoever changes the pattern raises READING in train_gpt.py.
PATTERN = "|".join([
    r"'(?:[sdmt]|ll|ve|re)",    # the end of a contraction, "'s" or "'ll"
    r" ?[^\W\d_]{1,128}",       # letters, with the space before them
    r" ?\d{1,128}",             # digits, with the space before them
    r" ?(?:[^\s\w]|_){1,128}",  # anything else that shows, with the space before it
    r"\s{1,256}(?!\S)",         # white space; if a word follows, the last blank is left to it
    r"\s",                      # that blank, if a word cannot begin with it: a new line, say
])
END_OF_TEXT = "<|endoftext|>"


def bpe_tokenizer(ranks):
    """Makes a tiktoken.Encoding of {bytes: rank}, with END_OF_TEXT as its last token."""
    special_tokens = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens=special_tokens)


def gpt2_tokenizer():
    """tiktoken's gpt2. UserError where its vocabulary is neither cached nor to be had."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' many exceptions, or a bad cache
        raise UserError("tiktoken cannot load or download its gpt2 vocabulary "
                        f"({type(error).__name__}): use --tokenizer=bpe, "
                        "or set TIKTOKEN_CACHE_DIR to a folder that holds it")


def save_tokenizer(path, tokenizer):
    """
    Writes a tokenizer as readable JSON: of a learned one, the tokens as text in order of
    rank. Bytes that are no valid UTF-8 become \\udc80 to \\udcff.
    """
    saved = {"kind": tokenizer.name}
    if tokenizer.name == "bpe":
        ranks = range(tokenizer.n_vocab - 1)  # all but END_OF_TEXT, which bpe_tokenizer adds
        tokens = [tokenizer.decode_single_token_bytes(rank) for rank in ranks]
        saved["pattern"] = PATTERN
        saved["tokens"] = [token.decode(errors="surrogateescape") for token in tokens]
    save_json(path, saved)


def load_tokenizer(path, hint="run python train_gpt.py again"):
    """
    Loads what save_tokenizer wrote: a tiktoken.Encoding. UserError when it is no such file.
    """
    saved = load_json(path, hint)
    if saved.get("kind") == "gpt2":
        return gpt2_tokenizer()
    with reading(path, hint):
        ranks = {}
        for rank, token in enumerate(saved["tokens"]):
            ranks[token.encode(errors="surrogateescape")] = rank
        return bpe_tokenizer(ranks)


def load_tokens(out_dir, split, config):
    """
    The token ids (n,) of out_dir/train.bin or val.bin as train_gpt.py left them: uint16,
    mapped from the disk. UserError when they are missing, not as many as data.json says, or
    do not fit a model of this GPTConfig.
    """
    path = os.path.join(out_dir, f"{split}.bin")
    hint = "run python train_gpt.py again"
    with reading(path, hint):
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
    data = load_json(os.path.join(out_dir, "data.json"), hint)
    n_tokens = data.get(split, len(tokens))
    if len(tokens) != n_tokens:  # a copy broke off, say
        raise UserError(f"{path} holds {len(tokens):,} tokens, and data.json says "
                        f"{n_tokens}: delete it and {hint}")
    if len(tokens) <= config.block_size or tokens.max() >= config.vocab_size:
        raise UserError(f"{path} is too short for a context or of another vocabulary "
                        f"than the model: delete it and {hint}")
    return tokens


# -----------------------------------------------------------------------------
# errors in one line

class UserError(Exception):
    """A mistake that its user can mend: the scripts print one line and exit with status 2."""


@contextmanager
def reading(path, hint):
    """Whatever fails in its block becomes a UserError: the file's name, and what to run."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} not found: {hint}")
    except UserError as error:  # a better reason than the one below
        raise UserError(f"{path}: {error}")
    except Exception as error:  # readers refuse wrong bytes in a dozen ways
        # in their own words, too: whoever has added a parameter finds its name there
        words = " ".join(str(error).split())[:100]
        what = f"is damaged or of another kind ({type(error).__name__}: {words})"
        if getattr(error, "strerror", None):  # the system's reason, such as "Permission denied"
            what = f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {what}: {hint}")


def run(main):
    """
    Calls a script's main(). A user's mistake is `error: ...` on stderr and exit status 2.
    """
    finished = False
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # Windows writes files in code pages
    try:
        main()
        finished = True
        return
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # or Python complains when it flushes at the end
        return
    except (UserError, OSError) as error:  # an OSError names the file and the system's reason
        reason = f"error: {error}"
        status = 2
    except (MemoryError, RuntimeError, ValueError) as error:
        # torch's words, and those of torch and numpy for sizes beyond any memory
        words = "out of memory|allocate memory|calculation overflowed|array is too big"
        if not isinstance(error, MemoryError) and not re.search(words, str(error)):
            raise
        reason = f"error: too large for the memory: {str(error).splitlines()[0]}"
        status = 2
    except KeyboardInterrupt as stop:
        reason = "interrupted: run the same command again"
        if stop.args:  # from a training loop, which says how far it came
            reason = (f"interrupted at {stop}, which is saved: "
                      "go on with the same command and --resume")
        status = 130
    finally:
        for file in LOCKS.values():
            file.close()
        LOCKS.clear()
        leave_ranks(finished)
    # one line, whatever a file's name or a flag holds
    print("".join(map(escaped, reason)), file=sys.stderr)
    sys.exit(status)


def escaped(character):
    """A character, or its escape if it has no sign of its own: \\n for a new line."""
    return character if character.isprintable() else repr(character)[1:-1]


# -----------------------------------------------------------------------------
# the common flags

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter,
                    argparse.RawDescriptionHelpFormatter):
    """Shows a script's docstring as it is and every flag with its default, if it has one."""

    def _get_help_string(self, action):
        if action.default is False or action.default in ("", None, []):
            return action.help
        return super()._get_help_string(action)


def make_parser(doc):
    """
    Makes an argparse parser with the flags that all three scripts share. Its errors are
    UserErrors of one line instead of argparse's dump of the usage.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(message):
        raise UserError(f"{message} (--help lists the flags)")

    parser.error = error
    group = parser.add_argument_group("common")
    # expanduser: after a "=", most shells leave ~ as it is
    group.add_argument("--out_dir", type=os.path.expanduser, default="out",
                       help="folder of everything that is written")
    group.add_argument("--device", default="auto",
                       help="cpu, cuda, cuda:1, mps; auto: cuda if there is one")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                       help="of training's products; weights stay float32; "
                       "auto: bfloat16 on cuda, else float32")
    group.add_argument("--compile", default="auto", choices=["auto", "yes", "no"],
                       help="torch.compile the training step; auto: on cuda")
    group.add_argument("--seed", type=at_least(0), default=1337,
                       help="same seed, same machine: same files")
    return parser


def at_least(low, kind=int):
    """An argparse type: a finite number of a kind, int or float, that is low or more."""
    def number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < 2**63:  # NaN fails this, too; torch's integers end at 2^63
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"must be {noun}, at least {low} and below 2^63, not {text!r}")
        return value
    return number


def step_count(text):
    """An argparse type: auto, or a whole number of steps."""
    return text if text == "auto" else at_least(1)(text)


@dataclass(frozen=True)
class Machine:
    """What a script runs on."""
    device: torch.device
    autocast: AbstractContextManager  # around a forward pass: bfloat16 products, or nothing
    compiled: bool                    # whether to torch.compile what is trained
    rank: int                         # number of this process: 0 without torchrun
    ranks: int                        # how many processes there are: 1 without torchrun


def setup(args, precision="high"):
    """
    Makes out_dir, seeds torch, joins the other ranks where torchrun started several, and
    returns the Machine that the common flags ask for. UserError when there is no such
    device, OSError when nothing can be written to out_dir.

    precision: of float32 products on CUDA, "high" (TF32) or "highest" (float32).
    """
    torch.set_float32_matmul_precision(precision)
    keep_freed_memory()
    rank, ranks, local_rank = torchrun_ranks()
    device = find_device(args.device, local_rank)
    if device.type == "cpu":
        use_faster_products()
    os.makedirs(args.out_dir, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out_dir).close()  # an error now rather than after an hour
    torch.manual_seed(args.seed)

    on_cuda = device.type == "cuda"
    autocast = nullcontext()
    if args.dtype == "bfloat16" or (args.dtype == "auto" and on_cuda):
        autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    if ranks > 1:
        join_ranks(device, rank)
    compiled = args.compile == "yes" or (args.compile == "auto" and on_cuda)
    compiled = compiled and can_compile(device)
    return Machine(device, autocast, compiled, rank, ranks)


def keep_freed_memory():
    """
    Tells glibc to keep what is freed for the next tensor. As it is, it gives every large block
    back to the system and asks for it again, and each new page costs a page fault: a quarter of
    the language model's step on a CPU. Where there is no glibc nothing happens.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # numbers of malloc.h
    with suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(M_MMAP_MAX, 0)               # no block is mapped on its own
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the heap never shrinks


def use_faster_products():
    """
    On an AMD processor with AVX-512, products of float32 matrices by oneDNN instead of MKL, as
    exact and faster, since MKL uses AVX-512 on Intel's processors alone: they take 0.43 of the
    time on Zen 5, and 0.85 on Zen 4, whose units for AVX-512 are half as wide.

    torch has no switch for that, but it leaves products to oneDNN where bfloat16 would do, and
    oneDNN computes in float32 all the same where the processor has no units for bfloat16
    matrices (AMX). Nobody promises that, so it is tried out.
    """
    # an older torch does not say what the processor can do
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if "AMD" not in processor.get("cpu_name", "") or not processor.get("avx512_f"):
        return
    # oneDNN keeps a kernel, of a megabyte or so, for each of the last 1,024 shapes of a product
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    torch.set_float32_matmul_precision("medium")  # bfloat16 would do
    x = torch.arange(2**16).sin().view(256, 256)
    exact = x.double() @ x.double()
    error = (x @ x - exact).norm() / exact.norm()
    if error > 1e-5:  # 6e-7 in float32, 3e-2 in bfloat16
        torch.set_float32_matmul_precision("highest")
        return
    # torch's flash attention multiplies in pieces too small for oneDNN
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's too, in spite of the name


def find_device(flag, local_rank):
    """The torch.device that --device asks for. Every rank of a machine gets its own GPU."""
    name = flag
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        # torch.device alone does not ask whether it exists, or holds values: "meta" does not
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"--device={flag} is not available here: {first_line}")
    return device


def can_compile(device):
    """
    Whether torch.compile works on a device: it needs a C compiler on the CPU and on CUDA. Where
    it does not, a line says so and why.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # of Inductor, of Triton or of the compiler they call
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"torch.compile does not work here, so this run goes on without: {reason}")
        return False
    return True


def to_device(array, device):
    """
    Copies a numpy array, which may be mapped from a file, to a device. On its way to a GPU it is
    put in pinned memory, from which the GPU takes it while the CPU goes on.
    """
    if device.type != "cuda":
        return torch.from_numpy(array).to(device)
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    pinned = torch.empty(array.shape, dtype=dtype, pin_memory=True)
    pinned.numpy()[...] = array
    return pinned.to(device, non_blocking=True)


# -----------------------------------------------------------------------------
# several ranks: processes that train one model together, each on its share of every batch

def torchrun_ranks():
    """The number of this process, how many there are, and its number on this machine."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun sets it
        return 0, 1, 0
    rank = int(os.environ["RANK"])
    ranks = int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    return rank, ranks, local_rank


def join_ranks(device, rank):
    """Joins the process group, and silences all ranks but 0."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo too: `steps` adds up tensors on the CPU
    patience = timedelta(days=1)  # rank 0 may prepare data for hours
    dist.init_process_group(backend, timeout=patience)
    if rank:
        sys.stdout = open(os.devnull, "w")  # one voice


def leave_ranks(finished):
    """
    Ends the process group, without which gloo aborts now and then when the process ends. NCCL
    would wait for the other ranks; when this one has not finished, they may never come.
    """
    if dist.is_initialized() and (finished or not torch.cuda.is_initialized()):
        dist.destroy_process_group()


@contextmanager
def rank_0_first():
    """The other ranks enter its block when rank 0 has left it, and find the files it wrote."""
    several = dist.is_initialized()
    if several and dist.get_rank() > 0:
        dist.barrier()
    yield
    if several and dist.get_rank() == 0:
        dist.barrier()


@torch.no_grad()
def same_on_all_ranks(tensors):
    """Every rank takes the values of rank 0's tensors. With one rank nothing happens."""
    if not dist.is_initialized():
        return
    for tensor in tensors:
        values = tensor.contiguous()  # a copy of a transposed matrix: it cannot be sent as it is
        dist.broadcast(values, 0)
        tensor.copy_(values)


def average_gradients(module):
    """
    Every rank gets the mean of all ranks' gradients, so that all make the same step. To be
    called between loss.backward() and the optimizer. With one rank nothing happens.
    """
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in module.parameters()]
    # One message instead of one for each parameter. A gradient may be transposed in memory:
    # flatten() reads it row by row all the same, and copy_() writes it so.
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat /= dist.get_world_size()
    dist.all_reduce(flat)  # the sum of all ranks'
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, flat.split(sizes)):
        gradient.copy_(mean.view(gradient.shape))


# -----------------------------------------------------------------------------
# progress

class Progress:
    """Tells how far some work has come: what is done of the total, the rate, the time left."""

    # when the last line of any work was printed: each by its own clock, many short works in a
    # row would print none
    last = time.time()

    def __init__(self, label, total, unit, done=0):
        self.label = label
        self.total = total
        self.unit = unit
        self.first = done  # done by an earlier run: no part of this one's rate
        self.start = time.time()

    def show(self, done, note=None, now=False):
        """
        Prints one line when five seconds have passed since the last one, or `now`. note()
        gives some words of it; it is called for that line alone, since it may have to wait
        for a GPU.
        """
        if not now and time.time() - Progress.last < 5.0:
            return
        Progress.last = time.time()
        seconds = max(Progress.last - self.start, 1e-9)
        rate = (done - self.first) / seconds
        speed = ""
        if rate:
            digits = 0 if rate >= 10 else 1
            left = int((self.total - done) / rate)
            minutes_left = f"{left // 60}m{left % 60:02}s left"
            speed = f"{rate:,.{digits}f} {self.unit}/s  {minutes_left}"
        counted = f"{done:,}/{self.total:,} {self.unit}"
        words = note() if note else ""
        print(f"{self.label} {counted}  {words}  {speed}", flush=True)


def tracked(label, parts, unit, size=len):
    """Yields the parts of some work, size(part) units each, and shows progress in between."""
    progress = Progress(label, sum(map(size, parts)), unit)
    done = 0
    for part in parts:
        yield part
        done += size(part)
        progress.show(done)


# -----------------------------------------------------------------------------
# files

def write_atomic(path, write):
    """
    Calls write(binary file), then moves the file into place: a reader never sees half of
    one, nor do two writers of one file meet. UserError when it cannot be written.
    """
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"  # two writers have two
    try:
        with open(temporary, "wb") as f:
            write(f)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when the disk is full
        if os.path.lexists(temporary):
            os.remove(temporary)
        reason = getattr(error, "strerror", None) or "is the disk full?"  # torch's has none
        raise UserError(f"cannot write {path} ({reason}): make room and run again; "
                        "what was there before is unharmed")


LOCKS = {}  # folder -> the open file whose lock says that this process uses it


def lock_alone(folder):
    """
    Makes a folder this process's own, until `run` ends or lock_shared lets others in. Returns
    False when another process uses it already. What a killed process left half-written there is
    removed.

    The system drops the lock with the process, however that ends. Where there are no locks, on
    Windows and some network disks, everybody is told True.
    """
    file = open(os.path.join(folder, ".lock"), "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    except OSError:  # this disk has no locks
        return True
    LOCKS[folder] = file
    for name in os.listdir(folder):
        if fcntl and re.search(r"\.[0-9a-f]{8}\.tmp$", name):  # write_atomic's
            os.remove(os.path.join(folder, name))
    return True


def lock_shared(folder):
    """The folder is in use by this process and any others, but nobody may have it alone."""
    if folder not in LOCKS:
        LOCKS[folder] = open(os.path.join(folder, ".lock"), "a")
    with suppress(OSError):  # this disk has no locks
        if fcntl:
            fcntl.flock(LOCKS[folder], fcntl.LOCK_SH)  # waits while another has it alone


def without_nan(obj):
    """
    A copy of obj that JSON can hold: NaN and infinity, for which it has no word, become None (its
    null), and numpy's arrays and numbers become Python's lists and numbers.
    """
    if isinstance(obj, (np.ndarray, np.generic)):
        obj = obj.tolist()
    if isinstance(obj, dict):
        return {key: without_nan(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [without_nan(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def save_json(path, obj):
    """Writes obj as JSON that is meant to be read: UTF-8, one value a line."""
    text = json.dumps(without_nan(obj), ensure_ascii=False, indent=1, allow_nan=False)
    encoded = text.encode(errors="backslashreplace")  # \udc80 as JSON itself escapes it
    write_atomic(path, lambda f: f.write(encoded))


def load_json(path, hint):
    """The JSON object at path, a dict. UserError with the hint when it is missing or none."""
    with reading(path, hint), open(path, encoding="utf-8") as f:
        contents = json.load(f)
        if not isinstance(contents, dict):
            raise TypeError("no object")  # for `reading`, which says it in its own words
        return contents


def save_jsonl(path, rows):
    """Writes one JSON object a line."""
    lines = []
    for row in rows:
        lines.append(json.dumps(without_nan(row), allow_nan=False).encode() + b"\n")
    write_atomic(path, lambda f: f.writelines(lines))


def content_hash(path):
    """
    Tells a file from others by what it holds, not by its name or time: a hash of its size
    and contents. Of more than 1 MB, 64 samples of 16 KB stand for the whole, evenly spread,
    its beginning and end among them: a terabyte takes no longer.
    """
    size = os.path.getsize(path)
    content = hashlib.sha256(f"{size} bytes".encode())
    with open(path, "rb") as file:
        if size <= 2**20:
            content.update(file.read())
        else:
            for sample in range(64):
                file.seek(sample * (size - 2**14) // 63)
                content.update(file.read(2**14))
    return content.hexdigest()


# -----------------------------------------------------------------------------
# checkpoints and resuming

ANEW = "run without --resume to start anew"

# flags that may differ when a run goes on: where it runs, what it is called, how often something
# is written down, and where its text or its activations lie (the scripts compare what files hold)
FREE_FLAGS = (
    "resume", "out_dir", "name", "device", "compile", "dataset", "acts",
    "save_interval", "log_interval", "eval_interval")


def save_checkpoint(path, **contents):
    """Writes tensors and plain Python values under the names given."""
    write_atomic(path, lambda f: torch.save(contents, f))


def load_checkpoint(path, device):
    """
    The dict that save_checkpoint wrote, its tensors on a device. Nothing is unpickled. Call
    it inside `reading`: it raises all kinds of errors where there is no such thing.
    """
    contents = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(contents, dict):
        raise TypeError("no checkpoint")
    return contents


def resumable(path, args, device):
    """
    The checkpoint from which --resume goes on, None where there is none yet. UserError when
    a flag differs that would make the result another than the uninterrupted run's. When the
    run is finished, it says so and leaves the script.
    """
    if not (args.resume and os.path.exists(path)):
        return None
    with reading(path, ANEW):
        checkpoint = load_checkpoint(path, device)
        if "step" not in checkpoint:  # somebody's own, not to be trained over
            raise UserError("training did not save it, so there is nothing to go on from: "
                            "choose another --out_dir (of train_sae.py, or another --name)")
        step = checkpoint["step"]
        saved_args = dict(checkpoint["args"])
        more_steps = args.max_iters - saved_args["max_iters"]
        if step not in range(saved_args["max_iters"] + 1):
            raise ValueError("no such step")  # for `reading`, which says it in its own words

    for flag, value in vars(args).items():
        saved_value = saved_args.get(flag)
        if flag == "max_iters":
            refused = more_steps < 0
        else:
            # a flag that a later version brought, and that is off, changes nothing
            newer = flag not in saved_args and not value
            refused = value != saved_value and flag not in FREE_FLAGS and not newer
        if refused:
            raise UserError(
                f"--{flag}={value}, but {path} was trained with {saved_value}: {ANEW}")

    if more_steps:
        print(f"--max_iters={args.max_iters} instead of {saved_args['max_iters']}: "
              "from here on with its schedules")
    if step == args.max_iters:
        print(f"{path} is finished: all {step:,} steps are done")
        sys.exit(0)
    print(f"going on from {path}, step {step:,}")
    return checkpoint


def interval(flag, max_iters, shortest, times):
    """
    How many steps lie between two checkpoints, lines of a log or measurements: as many as
    their flag says. auto: `shortest`, which short runs keep to; a longer run has `times` of
    them, so that they never take a larger share of it.
    """
    if flag == "auto":
        return max(shortest, max_iters // times)
    return flag


def steps(start, stop):
    """
    Yields start, start + 1, ... stop - 1, but no more after Ctrl-C or SIGTERM reached any
    rank: the caller's loop ends, and it can save. Several ranks ask one another after every
    16th step only, since they wait for the answer.
    """
    several = dist.is_initialized()
    stop_requested = torch.zeros(1)  # a tensor, so that the ranks can add theirs up

    def request_stop(signal_number, frame):
        stop_requested.fill_(1)

    previous_handlers = {}
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        previous_handlers[signal_number] = signal.signal(signal_number, request_stop)
    try:
        for step in range(start, stop):
            yield step
            if several and step % 16 != 15:
                continue
            ranks_stopping = stop_requested.clone()
            if several:
                # all stop after the same step, or one would wait for another
                dist.all_reduce(ranks_stopping)
            if ranks_stopping > 0:
                return
    finally:
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)


def check_finite(loss, module, training):
    """
    UserError when the loss or a weight is NaN or infinite, before a checkpoint holds it.
    training: a script's Training, with step, optimizer and path.
    """
    weights_finite = all(p.isfinite().all() for p in module.parameters())
    if math.isfinite(loss) and weights_finite:
        return
    good = "there is no checkpoint yet"
    if os.path.exists(training.path):
        good = f"{training.path} is the last good checkpoint"
    rate = training.optimizer.param_groups[0]["lr"]
    raise UserError(f"the loss is {loss} or a weight infinite at step {training.step:,}, "
                    f"learning rate {rate:.2g}: lower --learning_rate, or look at the data and "
                    f"at what was changed in the loss; {good}")
