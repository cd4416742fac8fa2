"""
A sparse autoencoder -> numbers, plots, a page to browse, and what the papers do with the
features.

    python analyze.py                                 # metrics, features, plots, features.html
    python analyze.py feature 1407                    # one feature in full
    python analyze.py cause --prompt="def __init__("  # which features cause the next token?
    python analyze.py steer --feature=304             # text with a feature held at some value
    python analyze.py steer --features=3,17,304       # ... and a table, beside random directions
    python analyze.py steer --feature=304 --vector "with" --without "w/o"  # beside their difference
    python analyze.py search "import numpy as" --without "import os"
    python analyze.py neurons                         # do features differ from neurons?
    python analyze.py explain                         # how much of the model do tokens explain?
    python analyze.py complete --names=small,large    # which words have a feature of their own?
    python analyze.py scaling --names=a,b,c           # loss against compute, of many finished runs
    python analyze.py frontier --names=a,b,c --l0=10  # lambdas and sizes beside PCA and neurons
    python analyze.py compare small large             # splitting; across two models: universality
    python analyze.py study 924 --proxy='token: self'  # is one feature what it seems to be?
    python analyze.py automata                        # which features switch one another on?
    python analyze.py toy --name=toy                  # how many known directions were found?
    python analyze.py feature 5 --name=own --texts=lines.txt  # of activations without a model

Everything is measured on held-out tokens (val.bin), or on the last twentieth of somebody's own
rows, except which features are dead: that takes more tokens, those of the training text. Numbers
and plots go to out_dir/sae/<name>/.

What a command computes comes from functions that return it, for those who import them; a
function show_... prints, draws and saves it. To add a command, write these and append a line to
COMMANDS.
"""
import json
import keyword
import math
import os
import re
import shlex
import shutil
import tokenize
import warnings
from bisect import bisect
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Callable

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from model import GPT, UserError, at_least, content_hash, load_gpt, load_tokens, make_parser
from model import run as run_script  # below, a run is an autoencoder with what belongs to it
from model import reading, save_json, setup, shuffled_weights, tracked, write_atomic
from sae import (HELD_OUT, MASSIVE, TRAINED_ON, ActivationStore, SAEConfig, SparseAutoencoder,
                 active_entries, csr, explained_share, find_files, load_sae, massive_share,
                 matching_files, squared_norms, where_float64_is)

# Bricken et al. ("feature density histograms") set apart an "ultra-low density cluster": features
# that are active on fewer than one token in a million.
ULTRA_LOW = 1e-6
ENOUGH = 10 / ULTRA_LOW  # tokens on which a feature of that density is active ten times
DENSITY_WORK = 5e11      # multiplications, some 7 to 20 s of two CPU cores

# Tokens that occur less often in the training text are in no list of raised or lowered ones.
# Their row of the unembedding is arbitrary: on the default run, rows of tokens that never occur
# are all alike (cosine 0.999), with logit weights three times as spread as others'. From 100
# occurrences on they are as spread as those of frequent tokens.
RARE = 100


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("command", nargs="?", choices=list(COMMANDS),
                        help="what to do, by default report")
    parser.add_argument("arguments", nargs="*",
                        help="feature, study: number; search: texts; compare: two names or "
                        "folders")
    add = parser.add_argument_group("analysis").add_argument
    add("--name", default=SAEConfig.recipe, help="folder under out_dir/sae, or a path to one")
    add("--names", default="",
        help="complete, scaling, frontier: several of them, with commas between; the first one's "
        "folder takes what is written")
    add("--acts", type=os.path.expanduser, default="",
        help="judge it on your own activations, a quoted pattern of .npy files: on all their "
        "rows, or the last twentieth where they are what it was trained on")
    add("--texts", type=os.path.expanduser, default="",
        help="of your own activations: a text file with a line for each row of all their files "
        "in order, to be shown beside the rows")
    add("--eval_tokens", type=at_least(1), default=2**18,
        help="report, frontier (at most 32,768): held-out tokens, or rows, of the metrics")
    add("--density_tokens", type=at_least(1),
        help="report: tokens of the training text, or rows trained on, on which dead features "
        "are never active; by default as many as take some 20 s on two CPU cores")
    add("--read_tokens", type=at_least(1), default=2**17,
        help="held-out tokens, or rows, whose activations are kept in memory, for examples and "
        "all other analyses; frontier: tokens of the training text that PCA is fitted to")
    add("--show", type=at_least(1), default=10,
        help="how many features to print (report: of each kind); complete: how many words; "
        "study: how many properties; automata: how many edges, loops, chains")
    add("--prompt", default="", help="cause, steer: text to start from")
    add("--target", default="",
        help="cause: token to explain, by default the most likely one; steer: token whose "
        "probability is measured, by default the one that most often follows the feature's "
        "top examples")
    add("--baseline", default="",
        help="cause: explain the target's logit less this token's, not less the mean logit")
    add("--feature", "--features", default="",
        help="steer: which feature, or several with commas between")
    add("--value", default="-2,0,1,2,4",
        help="steer: clamp to these multiples of its maximum, as --value=-2,0,1")
    add("--vector", nargs="*", default=[],
        help="steer: texts that have a concept; their mean activation less that of the texts of "
        "--without is a direction to steer along, beside the feature's; of a text with «...» the "
        "marked token counts alone")
    add("--without", nargs="*", default=[],
        help="search, steer: texts that lack the concept; search shows no feature active on one")
    add("--l0", type=at_least(1e-3, float),
        help="frontier: how much is explained at so many active features a token, by each size")
    add("--words", default="",
        help="complete: file of words (ASCII letters), by default words of the held-out text")
    add("--proxy", default="",
        help="study: the property that the feature is to stand for, by default the best of many: "
        "a regular expression on the text, such as [\\u0590-\\u05ff], or the name of one: "
        f"{', '.join(PATTERNS)}; token:STRING, a token that is exactly that, its leading space "
        f"too; of Python text: {', '.join(CLASSES)}")
    add("--other", type=os.path.expanduser, default="",
        help="study: the run in which to look for the feature's twin, a name or a folder such as "
        "out2/sae/NAME")
    args = parser.parse_intermixed_args()  # a number or a text may follow a flag, too
    args.command = args.command or "report"
    return args


# -----------------------------------------------------------------------------
# a run: one autoencoder, and what it is judged on


@dataclass
class Run:
    """
    One autoencoder, with the model and the held-out text on which it is judged.

    In shapes, N is the number of contexts (held_out has one, contexts another), T their length in
    tokens, n the width of the activations, m the number of features.
    """
    folder: str             # where sae.pt is and where all that is written goes
    sae: SparseAutoencoder  # folded: unit directions, activations in raw units (see fold)
    source: dict            # what train_sae.py noted of the rows: "site", "gpt", ...
    held_out: torch.Tensor | None = None  # for metrics: contexts (N, T + 1), or rows (N, n)
    # only where the activations are those of a model:
    gpt: GPT | None = None
    tokenizer: tiktoken.Encoding | None = None
    # (N, T + 1) token ids, for all other analyses; the last token of each is a target only
    contexts: torch.Tensor | None = None
    # what x() has read, site -> activations; runs of one model may share it
    kept: dict = field(default_factory=dict)
    # only where the activations are somebody's own rows:
    store: ActivationStore | None = None  # those that were not trained on
    trained_on: ActivationStore | None = None  # the others, or the same where there are none
    places: np.ndarray | None = None      # (N,) in the store, for all analyses but the metrics
    texts: list | None = None             # the line of text that goes with each of these rows

    @property
    def site(self):
        """The activations' site, such as "mlp.0"; "own" or "toy" where there is no model."""
        return self.source["site"]

    @property
    def site_in_words(self):
        """The site, and whether the model is the control of train_sae.py --shuffle_weights."""
        return f"{self.site}, weights shuffled" if self.source.get("shuffled") else self.site

    @property
    def kind(self):
        """What the activations are of: "model", "own" or "toy"."""
        return self.site if self.site in ("own", "toy") else "model"

    @property
    def unit(self):
        """What one vector of activations belongs to."""
        return "token" if self.gpt else "row"

    @property
    def counted(self):
        """What trained_x yields; rows that --acts names are not always rows trained on."""
        return "training tokens" if self.gpt else "rows"

    @property
    def n_countable(self):
        """How many vectors trained_x can yield, those of whole contexts."""
        if not self.gpt:
            return self.trained_on.rows
        T = self.gpt.config.block_size
        return len(self.training_text) // T * T

    @property
    def device(self):
        """Where the autoencoder and the model are."""
        return self.sae.W_dec.device

    @property
    def n_features(self):
        """The size of the dictionary, m."""
        return self.sae.config.n_features

    @property
    def T(self):
        """The length of a context in tokens, without the one that is only a target."""
        return self.contexts.shape[1] - 1

    @property
    def out_dir(self):
        """Where the model and its text are: the folder is out_dir/sae/<name>."""
        return os.path.dirname(os.path.dirname(os.path.abspath(self.folder)))

    @cached_property
    def training_text(self):
        """The token ids of the training text (many,), mapped from the disk."""
        return load_tokens(self.out_dir, "train", self.gpt.config)

    @cached_property
    def token_counts(self):
        """How often each token occurs in the training text -> (vocab_size,), numpy."""
        text = self.training_text
        counts = np.zeros(self.gpt.config.vocab_size, dtype=int)
        for start in range(0, len(text), 2**22):  # bincount takes 8 bytes a token
            counts += np.bincount(text[start:start + 2**22], minlength=len(counts))
        return counts

    @cached_property
    def tokens(self):
        """The tokens of all contexts in a row (N T,), numpy. A position is an index into it."""
        return self.contexts[:, :-1].reshape(-1).numpy()

    @cached_property
    def token_pairs(self):
        """
        The distinct pairs of a token and the one before it, of which a context's first token has
        none: which pair stands at each place (N, T), and each pair's current token (pairs,).
        """
        none = self.tokenizer.n_vocab
        tokens = self.tokens.reshape(-1, self.T)                                   # (N, T)
        previous = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=none)  # (N, T)
        pairs, pair_of = np.unique(previous * none + tokens, return_inverse=True)
        return pair_of.reshape(-1, self.T), pairs % none

    def batches(self, label, contexts):
        """Yields contexts (b, T + 1), or rows, some 2,048 tokens at a time, and prints progress."""
        # logits of more tokens are too large for memory that is used again for the next
        size = max(1, 2048 // (contexts.shape[1] - 1)) if self.gpt else 2048
        unit = "contexts" if self.gpt else "rows"
        for batch in tracked(label, contexts.split(size), unit):
            yield batch.to(self.device)

    def trained_x(self, n_tokens, label="counting activity"):
        """
        Yields activations (b, n) of n_tokens tokens of the training text, from all of it, in whole
        contexts, or of as many rows of trained_on; of all if there are fewer. Prints progress.
        """
        if not self.gpt:
            n = min(n_tokens, self.n_countable)
            starts = range(0, n, 4096)
            for start in tracked(label, starts, "pieces", lambda start: 1):
                yield self.trained_on.batch(start, min(4096, n - start)).to(self.device)
            return
        text = self.training_text
        T = self.gpt.config.block_size
        n_contexts = self.n_countable // T
        n = min(n_contexts, math.ceil(n_tokens / T))  # no fewer: ENOUGH is to be enough
        starts = T * (np.arange(n) * n_contexts // n)  # evenly spread
        # some 4,096 tokens at a time
        pieces = np.array_split(starts, min(n, math.ceil(n * T / 4096)))
        for piece in tracked(label, pieces, "contexts"):
            idx = torch.from_numpy(text[piece[:, None] + np.arange(T)].astype(np.int64))
            yield self.gpt.activations(idx.to(self.device), self.site).flatten(0, 1)

    def x(self, site=None):
        """
        Activations (N T, n) of the contexts at a site, by default this run's, on its device; of
        somebody's own rows those at `places` (N, n).
        """
        site = site or self.site
        if site in self.kept:
            return self.kept[site]
        if site == "own":
            self.kept[site] = self.store.at(self.places).float().to(self.device)
        else:
            parts = []
            for batch in self.batches(f"reading {site}", self.contexts):
                x = self.gpt.activations(batch[:, :-1], site)  # (b, T, n)
                parts.append(x.flatten(0, 1))
            self.kept[site] = torch.cat(parts)  # 256 MB for the default's 131,072 x 512
        return self.kept[site]

    @cached_property
    def inverse_sigma(self):
        """The mean of 1 / sigma over the tokens that reach the last LayerNorm."""
        stream = self.x(f"resid.{self.gpt.config.n_layer - 1}")  # (N T, n_embd)
        variance = stream.var(1, correction=0) + self.gpt.ln_f.eps
        return variance.rsqrt().mean().item()

    def activations(self, features):
        """What some features (k numbers) do on every token or row -> (k, N T) float32, numpy."""
        pieces = self.x().split(8192)  # what encode makes of the whole would be as large as x
        parts = [self.sae.encode(piece, features).t().cpu() for piece in pieces]  # (k, 8192)
        return torch.cat(parts, 1).numpy()

    def by_blocks(self, label):
        """
        Yields all features, some at a time, as their numbers (block,) and what they do on every
        token or row (block, N T), and prints progress.
        """
        for block in tracked(label, blocks(self.n_features), "features"):
            yield block, self.activations(block)

    @property
    def neuron_sites(self):
        """
        Where the neurons are that features are compared with: at an mlp site its own; elsewhere
        those of all layers whose MLP has written into what the site reads, which are the ones
        that Templeton et al. compare the residual stream with. At attn.0 there are none. Of
        somebody's own rows the columns stand for neurons.
        """
        if self.kind == "own":
            return ["own"]
        kind, layer = self.site.split(".")
        if kind == "mlp":
            return [self.site]
        n_before = int(layer) + (kind == "resid")  # resid comes after its layer's MLP
        return [f"mlp.{before}" for before in range(n_before)]

    def neurons(self):
        """What the neurons at neuron_sites do on every token -> (N T, n_neurons), on the CPU."""
        none = torch.empty(len(self.x()), 0)
        return torch.cat([none] + [self.x(site).cpu() for site in self.neuron_sites], 1)

    @property
    def in_last_layer(self):
        """Whether all that comes after the site treats each token by itself."""
        _, layer = self.site.split(".")
        return int(layer) == self.gpt.config.n_layer - 1

    def feature_number(self, text):
        """A user's text -> the number of a feature, or a UserError when there is none."""
        if text.isdecimal() and int(text) < self.n_features:
            return int(text)
        last = self.n_features - 1
        raise UserError(
            f"give the number of a feature of {self.folder}, 0 to {last}, not {text!r}"
        )

    def all_dead(self):
        """The error of an analysis that needs active features where there are none."""
        return UserError(f"{self.folder}: every feature is dead on these {self.unit}s")


def folder_of(args, name):
    """A name under out_dir/sae, or a folder such as other_out/sae/small -> folder."""
    if os.path.dirname(name):
        return os.path.normpath(name)
    return os.path.normpath(os.path.join(args.out_dir, "sae", name))


def load_run(args, device, name):
    """
    A name or folder -> Run. UserError where files are missing, hold NaN or do not belong
    together.
    """
    folder = folder_of(args, name)
    sae = load_sae(os.path.join(folder, "sae.pt"), device)
    source = sae.extra.get("source")
    if not isinstance(source, dict):  # somebody else's note, or none
        source = {}
    if args.acts:  # of a model that it may have been trained on nothing is asked then
        source = {"site": "own", "contents": source.get("contents")}
    elif not source.keys() >= noted(source):  # another program or version wrote it
        raise UserError(
            f"{folder}/sae.pt does not say what it was trained on: "
            "name activations to judge it on, as --acts='my/*.npy'"
        )
    folded = sae.fold().requires_grad_(False)
    if not all(weights.isfinite().all() for weights in folded.parameters()):
        raise UserError(f"{folder}/sae.pt holds NaN or infinity: train it again")
    loaded = Run(folder, folded, source)
    if COMMANDS[args.command].logs_only:
        return loaded
    if loaded.kind == "model":
        load_model(loaded, args)
    if loaded.kind == "own":
        load_rows(loaded, args)
    return loaded


def same_model(a, b):
    """Whether two Runs read activations of one model; of rows without a model there is none."""
    return a.source.get("gpt") == b.source.get("gpt")


def same_positions(a, b):
    """Whether what two Runs are judged on is the same text, or are the same rows."""
    if a.gpt and b.gpt:  # contexts, not tokens: they may be of another length
        return torch.equal(a.contexts, b.contexts)
    return a.kind == b.kind and torch.equal(a.x(), b.x())


def load_beside(run, args, name):
    """
    A name or folder -> a Run on the same text or rows as a first one; if it is of the same model,
    they share that and what was read. UserError when its text or rows are others.
    """
    other = load_run(args, run.device, name)
    if not same_positions(run, other):
        raise UserError(
            f"{name} does not go with {run.folder}: {args.command} needs autoencoders on models "
            "with the same tokenizer, held-out text and length of context, or all on the same "
            "rows of your own"
        )
    if same_model(run, other):
        other.gpt, other.kept = run.gpt, run.kept
    return other


def noted(source):
    """The keys that train_sae.py writes into a source of its kind and that are needed here."""
    if source.get("site") == "own":
        return {"site", "contents", "paths"}
    if source.get("site") == "toy":
        return {"site", "truth"}
    return {"site", "gpt"}


def load_model(loaded, args):
    """Adds the model, its tokenizer and the held-out text to a Run."""
    if args.texts:
        raise UserError("--texts is for your own activations: those of a model have its text")
    out_dir = loaded.out_dir
    loaded.gpt, loaded.tokenizer = load_gpt(out_dir, loaded.device)
    if loaded.source.get("shuffled"):  # train_sae.py --shuffle_weights
        loaded.gpt = shuffled_weights(loaded.gpt)
    if loaded.gpt.fingerprint() != loaded.source["gpt"]:
        raise UserError(
            f"{loaded.folder}/sae.pt was trained on another gpt.pt than {out_dir} has now: "
            "put that one back, or train on this one with another --name"
        )
    width = loaded.gpt.site_width(loaded.site)  # UserError where there is no such site
    if width != loaded.sae.config.d_in:
        raise UserError(
            f"{loaded.folder}/sae.pt takes width {loaded.sae.config.d_in}, "
            f"{loaded.site} has {width}: train it again"
        )
    tokens = load_tokens(out_dir, "val", loaded.gpt.config)
    tokens = torch.from_numpy(tokens.astype(np.int64))
    loaded.held_out = spread_contexts(tokens, loaded.gpt.config.block_size, args.eval_tokens)
    loaded.contexts = spread_contexts(tokens, loaded.gpt.config.block_size, args.read_tokens)


def load_rows(loaded, args):
    """
    Adds somebody's own rows to a Run, those that it was not trained on: the last twentieth of its
    own files, or all of other ones, which --acts names. UserError when they are of another width,
    or when some of them were trained on.
    """
    part = HELD_OUT
    if args.acts:  # which may be the rows it was trained on, or others
        paths = matching_files(args.acts)
        contents = [content_hash(path) for path in paths]
        trained_on = loaded.source.get("contents") or []  # another program notes none
        if contents != trained_on:
            part = (0, 1)
            if any(content in trained_on for content in contents):
                raise UserError(
                    f"--acts={args.acts} names files that {loaded.folder}/sae.pt was trained on: "
                    "give all of these, in the order of training, or none of them"
                )
    else:
        paths = find_files(loaded.source, loaded.folder)
    loaded.store = ActivationStore(paths, part=part)
    if loaded.store.width != loaded.sae.config.d_in:
        raise UserError(
            f"{paths[0]} has rows of width {loaded.store.width}, "
            f"{loaded.folder}/sae.pt takes {loaded.sae.config.d_in}: give other --acts"
        )
    # of rows that it was not trained on at all, all serve for everything
    others = TRAINED_ON if part == HELD_OUT else part
    loaded.trained_on = ActivationStore(paths, part=others)
    loaded.held_out = loaded.store.at(loaded.store.spread(args.eval_tokens))
    loaded.places = loaded.store.spread(args.read_tokens)
    if args.texts:
        loaded.texts = read_lines(args.texts, loaded.store, loaded.places)


def read_lines(path, store, places):
    """
    A text file with a line for each row of all files of a store -> the lines of the rows at
    places (k,), a list of str. UserError when there are more lines than rows, or fewer.
    """
    wanted = set((store.first + places).tolist())
    lines = []
    n_lines = 0
    with open(path, encoding="utf-8-sig", errors="backslashreplace", newline="\n") as file:
        for line in file:  # not all are kept
            if n_lines in wanted:
                lines.append(line.rstrip("\r\n"))
            n_lines += 1
    if n_lines != store.total:
        raise UserError(
            f"{path} has {n_lines:,} lines for {store.total:,} rows: "
            "--texts takes a line for each row of all files in order"
        )
    return lines


def spread_contexts(tokens, T, n_tokens):
    """tokens (many,) -> contexts (N, T + 1) of some n_tokens tokens, from all of the text."""
    contexts = tokens.unfold(0, T + 1, T)  # the last token of one is the first of the next
    n = min(len(contexts), max(1, n_tokens // T))
    evenly = torch.arange(n) * len(contexts) // n
    return contexts[evenly]


def need_two_contexts(run, does):
    """UserError unless a Run has a context to judge on beside one that an analysis learns from."""
    if len(run.contexts) < 2:
        raise UserError(
            f"{does} one context of {run.T} tokens and judges on another: "
            "raise --read_tokens, or hold out more text"
        )


# -----------------------------------------------------------------------------
# measuring


def measure(run):
    """
    What run.held_out tells -> metrics, a dict of plain numbers; and of each feature (m,) its
    density, the share of the tokens that it is active on, and its energy, the mean of its squared
    activation, which is what it carries of x_hat.

    variance explained = 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2

    loss recovered = (zero - spliced) / (zero - plain)

    The losses are those of the model as it is (plain), with x_hat in the place of x (spliced), and
    with 0 there (Bricken et al., "How much of the model does our interpretation explain?").
    Each is None where it would be divided by nothing.
    """
    sae = run.sae
    if run.gpt:
        mean = run.x().mean(0).to(sae.W_dec).view(1, 1, -1)  # for mean-ablation
    first = (run.x() if run.gpt else run.held_out)[0].to(run.device)
    origin = where_float64_is(first).double()  # (n,): see variance_of
    losses = Counter()
    n_tokens = 0
    sums = []  # of each batch, over its tokens: nothing of size (tokens x features) is kept
    for batch in run.batches("measuring", run.held_out):
        if run.gpt:
            stream, at_site = run.gpt.before(batch[:, :-1], run.site)  # (b, T, n_embd), (b, T, n)
            x = at_site.flatten(0, 1)
        else:
            x = batch.float()
        n_tokens += len(x)
        f = sparse_where_it_pays(sae, x)           # (tokens, m)
        x_hat = sae.decode(f, sae.input_scale(x))  # (tokens, n), as x
        away = where_float64_is(x).double() - origin
        residual = where_float64_is(x_hat - x).double()
        by_coordinate = (away, away.square(), residual.square())  # (tokens, n) each
        sums.append([*activity(f), *[values.sum(0).cpu() for values in by_coordinate]])
        if run.gpt:
            replacements = {
                "plain": at_site,
                "spliced": x_hat.view_as(at_site),
                "mean_ablated": mean,
                "zero_ablated": torch.zeros_like(mean),
            }
            for name, replacement in replacements.items():
                loss = loss_with(run, stream, replacement, batch[:, 1:])
                losses[f"loss_{name}"] += loss * len(batch) / len(run.held_out)

    # means over all tokens, in float64: of features (m,) and of coordinates of x (n,)
    means = [torch.stack(batches).sum(0).numpy() / n_tokens for batches in zip(*sums)]
    density, energy, center, mean_square, error = means
    variance = (mean_square - center**2).sum()  # about the mean, not about the origin
    metrics = {
        "tokens": n_tokens,
        "l0": density.sum(),
        "variance_explained": explained_share(error.sum(), variance),
        "n_features": run.n_features,
        **losses,
    }
    if run.gpt:
        metrics["loss_recovered"] = loss_recovered(losses)
    return metrics, density, energy


def count_active(run, n_tokens=None):
    """
    On what share of some n_tokens tokens of the training text each feature is active (m,), and
    how many tokens these were. It takes no more than the model up to the site and the encoder,
    so ten million are a matter of minutes. None: as many as DENSITY_WORK allows.
    """
    if n_tokens is None:
        # multiplications: a weight takes one a token
        work = run.sae.W_enc.numel()
        if run.gpt:
            work += sum(p.numel() for p in run.gpt.blocks.parameters())
        faster = 1 if run.device.type == "cpu" else 100
        n_tokens = int(faster * DENSITY_WORK / work)
    counts = np.zeros(run.n_features)
    n_seen = 0
    for x in run.trained_x(n_tokens):
        n_active, _ = activity(sparse_where_it_pays(run.sae, x))
        counts += n_active.numpy()
        n_seen += len(x)
    return counts / n_seen, n_seen


def density_metrics(density, n_tokens):
    """
    What shares of the features are dead (never active) and of ultra-low density. Templeton et al.
    call dead what is not active on 10^7 tokens, Bricken et al. on 10^8. The second share is None
    where the tokens are too few to tell.
    """
    ultra_low = (density > 0) & (density < ULTRA_LOW)
    return {
        "density_tokens": n_tokens,
        "dead": (density == 0).mean(),
        "ultra_low": ultra_low.mean() if n_tokens >= ENOUGH else None,
    }


def massive_metrics(run):
    """
    What share of the squared norm the largest 1 % of the rows of run.x() hold and, where it is
    more than MASSIVE, the variance explained of the others: an autoencoder may explain the few
    and nothing else.
    """
    x = where_float64_is(run.x())
    share = massive_share(x)
    if not share > MASSIVE:  # of zeros alone it is NaN
        return {"massive_share": share}
    # the others, and the sums of squares about their mean, not about that of all
    squares = squared_norms(x)
    ordinary = x[squares < squares.topk(math.ceil(len(x) / 100)).values[-1]]
    mean = ordinary.mean(0, dtype=torch.float64)
    variance = error = 0.0
    for piece in ordinary.split(8192):
        x_hat = run.sae(piece.to(run.device)).to(x.device)
        error += (x_hat - piece).double().square().sum().item()
        variance += (piece.double() - mean).square().sum().item()
    return {"massive_share": share, "explained_without": explained_share(error, variance)}


def loss_recovered(losses, replacement="spliced"):
    """See `measure`. None where zero-ablation costs the model nothing, or less than rounding."""
    plain, zero = losses["loss_plain"], losses["loss_zero_ablated"]
    if zero - plain <= 1e-6 * plain:
        return None
    return (zero - losses[f"loss_{replacement}"]) / (zero - plain)


def loss_with(run, stream, x, targets):
    """
    The model's loss on targets (b, T) with x (b, T, n) at the site, or at each token the same
    (1, 1, n), where the residual stream is stream (b, T, n_embd): what comes before the site is
    not computed anew.
    """
    logits = run.gpt.lm_head(run.gpt.after(run.site, stream, x))
    logits = logits.expand(*targets.shape, -1)  # (b, T, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()


def sparse_where_it_pays(sae, x):
    """
    sae.encode(x), x (b, n) -> (b, m). On a CPU, where few features are active, it is a sparse
    matrix: finding its entries and all that is done with them takes a fraction of the time.
    """
    scaled = sae.scaled(x)
    if not sae.sparse_pays(scaled):
        return sae.encode(x)
    entries = active_entries(sae.encoder_input(scaled), sae.W_enc, sae.b_enc)
    return csr(*entries, (len(x), len(sae.b_enc)))


def activity(f):
    """
    On how many vectors of f (b, m), of sparse_where_it_pays, each feature is active, and the sum
    of its squared activations: (m,) each, float64 on the CPU. (Sums of a dense f are float32's.)
    """
    if f.layout != torch.sparse_csr:
        return [part.sum(0).cpu().double() for part in (f > 0, f.square())]
    m = f.shape[1]
    features = f.col_indices()  # of each entry, all of them active
    squares = torch.bincount(features, f.values().double().square(), m)
    return [torch.bincount(features, minlength=m).double(), squares]


def blocks(n, size=256):
    """0 .. n - 1 in blocks: so many features' activations on all tokens fit into memory."""
    return [np.arange(start, min(start + size, n)) for start in range(0, n, size)]


def logit_effects(run, directions):
    """
    What directions (k, n) at the site do to the logits (k, vocab_size) per unit of
    activation, about their median over the vocabulary (Bricken et al., logit weights in the
    feature browser), which a few extreme ones do not move.

    A direction goes through the site's output matrix and along the residual stream to the
    last LayerNorm, which is taken as linear: centred, its gain, and the mean 1 / sigma of
    held-out tokens. The bare direction's own sigma would mean nothing. Then through the
    unembedding. What else reads the stream in between (later blocks; for attn this block's
    MLP) is passed by.
    """
    kind, layer = run.site.split(".")
    if kind == "mlp":
        W_out = run.gpt.blocks[int(layer)].mlp_proj.weight  # (n_embd, n)
        directions = directions @ W_out.t()                 # (k, n_embd)
    centred = directions - directions.mean(1, keepdim=True)
    logits = run.gpt.lm_head(centred * run.gpt.ln_f.weight * run.inverse_sigma)
    # torch's median of an even number is the lower of the two in the middle
    lower = logits.median(1, keepdim=True).values
    upper = -(-logits).median(1, keepdim=True).values
    return logits - (lower + upper) / 2


def unit_columns(a):
    """a (tokens, k), columns about their means, of unit norm: products are Pearson correlations."""
    a = a - a.mean(0)
    # squares of what is far from 1, as somebody's own rows can be, would leave float32
    a /= torch.maximum(a.amax(0), -a.amin(0)).clip(1e-30)
    norms = a.square().sum(0).sqrt()  # torch's norm adds in plain order: a thousandth off here
    a /= norms.clip(1e-15)            # a constant column stays 0: it correlates with nothing
    return a


def centred_norms(rows):
    """
    The norms (k,) of the rows of a sparse matrix (k, n) about their means; infinite for what is
    constant, which then correlates with nothing.
    """
    n = rows.shape[1]
    rows = rows.double()
    ones = torch.ones(n, 1, dtype=torch.double)
    sums = (rows @ ones)[:, 0].numpy()
    squares = (rows * rows @ ones)[:, 0].numpy()
    variances = squares - sums**2 / n
    return np.sqrt(np.where(variances > 1e-9 * squares, variances, np.inf))


def closest(acts, others):
    """
    The highest of the Pearson correlations of activations (k, tokens) with others, unit_columns
    (tokens, l) -> (k,); -inf where there are none. Of activations few are not 0: a product with
    those is soon done.
    """
    sparse = torch.from_numpy(acts).to_sparse_csr()
    products = (sparse @ others).numpy()  # (k, l)
    # others are about their means and of norm 1, these are not yet
    return (products / centred_norms(sparse)[:, None]).max(1, initial=-np.inf)


def highest_correlations(run, others):
    """
    Returns the numbers of the alive features, the highest correlation of each with any of others,
    unit_columns (N T, l), and their densities. UserError when no feature is alive.
    """
    best = np.zeros(run.n_features)
    density = np.zeros(run.n_features)
    for block, acts in run.by_blocks("correlating"):
        best[block] = closest(acts, others)
        density[block] = (acts > 0).mean(1)
    alive = np.flatnonzero(density)
    if len(alive) == 0:
        raise run.all_dead()
    return alive, best[alive], density[alive]


def means_given_tokens(run, acts):
    """
    The means of activations (k, N T) given the current token, and given the previous and the
    current token -> by_token, by_pair: (k, pairs) each, a column for each distinct pair of
    run.token_pairs.

    They are learned on every other context, the first, third and so on. What was not seen there
    falls back to the coarser mean. by_pair[:, pair_of[1::2]] is what they predict on the others.
    """
    pair_of, token_of = run.token_pairs
    V = run.tokenizer.n_vocab
    learn = pair_of[::2].ravel()
    # sums over pairs tell all: those over tokens are sums of them
    pair_counts = np.bincount(learn, minlength=len(token_of))
    token_counts = np.bincount(token_of, pair_counts, V)
    by_token = np.empty((len(acts), len(token_of)))
    by_pair = np.empty_like(by_token)
    for k, row in enumerate(acts.reshape(len(acts), -1, run.T)):
        learned = row[::2].ravel()
        pair_sums = np.bincount(learn, learned, len(token_of))
        token_means = np.bincount(token_of, pair_sums, V) / token_counts.clip(1)
        by_token[k] = np.where(token_counts > 0, token_means, learned.mean())[token_of]
        by_pair[k] = np.where(pair_counts > 0, pair_sums / pair_counts.clip(1), by_token[k])
    return by_token, by_pair


def explained_by_tokens(run, acts):
    """
    How well activations (k, N T) are predicted by their mean given the current token, and
    given the previous and the current token -> R^2 (k, 2).

    Means are learned on every other context and judged on the rest: see means_given_tokens.
    High: "fires on this token (after that one)" says it all. It says nothing of what a feature
    does, and a feature of a topic, which no one or two tokens show, scores low though it is
    clear.
    """
    pair_of, token_of = run.token_pairs
    judge = pair_of[1::2].ravel()
    counts = np.bincount(judge, minlength=len(token_of))  # of each pair
    scores = []
    for row in acts:  # one by one: what there is of each stays in the cache
        guesses = np.concatenate(means_given_tokens(run, row[None]))  # (2, pairs)
        judged = row.reshape(-1, run.T)[1::2].ravel()
        on = np.flatnonzero(judged != 0)
        truth = judged[on].astype(np.float64)
        squares = truth @ truth
        total = squares - truth.sum()**2 / max(1, len(judge))
        # sum (truth - guess)^2, multiplied out: most of the truth is 0
        errors = [squares - 2 * truth @ g[judge[on]] + counts @ np.square(g) for g in guesses]
        # NaN: never active there, or always as much
        scores.append(1 - np.array(errors) / (total if total > 1e-12 * squares else np.nan))
    return np.array(scores)


# -----------------------------------------------------------------------------
# showing

BLUE = "#2a6f97"
RED = "#d1495b"
GREY = "#888888"
LIGHT = "#d5dbe0"


@contextmanager
def figure(run, name, panels=1, width=6.0, height=3.6, rows=1):
    """
    with figure(run, "density") as ax: draws on one panel, or on an array of them; at the end it is
    written to density.png in the autoencoder's folder.
    """
    fig = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no screen needed
    axes = fig.subplots(rows, panels)  # an array where there are several: in rows, or in one
    yield axes
    for ax in np.atleast_1d(axes).flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        _, labels = ax.get_legend_handles_labels()
        if labels:
            ax.legend(frameon=False, fontsize="small")
    path = os.path.join(run.folder, f"{name}.png")
    write_atomic(path, lambda file: fig.savefig(file, format="png", dpi=120))


def save(run, name, **numbers):
    """Writes a command's numbers to the autoencoder's folder, beside its plot if it has one."""
    save_json(os.path.join(run.folder, f"{name}.json"), numbers)
    print(f"wrote {name}.* to {run.folder}")


def or_undefined(number, form, word="undefined"):
    """A number in a format such as "+.3f"; what has no meaning, None, as a word."""
    return word if number is None else f"{number:{form}}"


def token_text(run, *tokens):
    """
    Tokens as one printable line, with \\xe2 for a byte of a character that they hold in part.
    """
    raw = run.tokenizer.decode_bytes([int(token) for token in tokens])
    return printable(raw.decode(errors="backslashreplace"))


def printable(text):
    """Text as one line: ⏎ and ⇥ for white space, · for other control characters."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    # a terminal must not obey what a text holds: escape codes, marks that turn its direction
    return "".join(character if character.isprintable() else "·" for character in text)


def quoted(run, *tokens):
    """token_text in quotes."""
    return repr(token_text(run, *tokens)).replace("\\\\", "\\")  # repr doubles backslashes


def place_name(run, position):
    """The file of somebody's own row, less the folders that all files are in, and its index."""
    path, index = run.store.file_and_row(run.places[position])
    common = os.path.commonprefix([other for other, _, _ in run.store.slices])
    return f"{printable(path[common.rfind(os.sep) + 1:])} {index}"


def snippet(run, position, width):
    """
    The token at a position, «marked», with what stands around it in its context. Of somebody's
    own rows the row's name and its text, if there is one.
    """
    if not run.gpt:
        text = run.texts[position][:width] if run.texts else ""
        return f"{place_name(run, position):<20}  {printable(text)}"[:width].rstrip()
    context = run.contexts[position // run.T]
    t = position % run.T
    left = token_text(run, *context[:t])
    token = token_text(run, context[t])
    right = token_text(run, *context[t + 1:-1])
    room = max(10, width - len(token))
    room_left = room * 2 // 3  # what comes before explains more
    return f"{left[-room_left:].rjust(room_left)}«{token}»{right[:room // 3]}"


def histogram(acts):
    """Counts of activations in 24 bins from 0, those of 0 left out, to the largest."""
    on = acts[acts > 0]
    counts, _ = np.histogram(on, bins=24, range=(0, acts.max()))
    return counts.tolist()


def common_token(run, acts):
    """
    The token most common at the 50 largest activations of acts (N T,), where they are not 0; at
    how many of these it is; and how many they are.
    """
    on = np.flatnonzero(acts)
    best = on[np.argsort(-acts[on], kind="stable")[:50]]  # positions, the largest first
    token, n_times = Counter(run.tokens[best].tolist()).most_common(1)[0]
    return token, n_times, len(best)


def title(run, i, acts):
    """One line on what feature i, with activations acts (N T,), is about."""
    on = np.flatnonzero(acts)
    if len(on) == 0:
        return f"feature {i}  not active on any of {len(acts):,} held-out {run.unit}s"
    common = ""
    if run.gpt:
        token, n, n_top = common_token(run, acts)
        common = f"'{token_text(run, token)}' at {n} of its top {n_top}  "
    counts = histogram(acts)
    # roots, or only the first bars would be seen: most activations are small
    heights = [math.sqrt(count / max(counts)) for count in counts]
    bars = "".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * height)] for height in heights)
    return (
        f"feature {i}  density {len(on) / len(acts):.2%}  max {acts.max():.2f}  "
        f"{common}{bars}"
    )


def top_examples(run, acts, n):
    """Positions of the n largest activations, each with other tokens just before and after it."""
    on = np.flatnonzero(acts > 0)  # of a float array it takes ten times as long
    ranked = on[np.argsort(-acts[on], kind="stable")][:200].tolist()  # enough to choose from
    if not run.gpt:  # rows have no tokens
        return ranked[:n]
    seen = set()
    positions = []
    for position in ranked:
        if len(positions) == n:
            break
        around = run.tokens[max(0, position - 4):position + 2].tobytes()
        if around not in seen:
            seen.add(around)
            positions.append(position)
    return positions


def examples(run, acts, n_top, n_intervals, each, rng):
    """
    Where a feature is active: its n_top largest activations, and `each` random ones from
    n_intervals evenly spaced intervals of its activation, the highest first (Bricken et al.,
    the intervals of the feature browser). acts: (N T,) -> list of (label, position)
    """
    chosen = [("top", position) for position in top_examples(run, acts, n_top)]
    on = np.flatnonzero(acts > 0)
    edges = np.linspace(0, acts.max(), n_intervals + 1)
    for k in reversed(range(n_intervals)):
        # intervals of the activation itself, as wide as one another, not of its rank
        inside = on[(acts[on] > edges[k]) & (acts[on] <= edges[k + 1])]
        inside = np.setdiff1d(inside, [position for _, position in chosen])
        label = f"{100 * k // n_intervals}-{100 * (k + 1) // n_intervals}%"
        for position in rng.permutation(inside)[:each]:
            chosen.append((label, int(position)))
    return chosen


def ranked_pairs(values, by, n, numbers=None):
    """
    values, by: (k, c) -> for each of the k rows [(number, value)] of the n entries largest in
    `by`. numbers: (c,), those of the columns, by default 0, 1, 2 ...
    """
    best = by.topk(min(n, by.shape[1])).indices     # (k, n)
    chosen = values.gather(1, best)
    if numbers is not None:
        best = numbers[best]
    pairs = zip(best.tolist(), chosen.tolist())     # two lists a row
    return [list(zip(*both)) for both in pairs]


def related(run, features, largest, n):
    """
    For each of some features (k numbers) with their largest activations (k,) the n tokens that it
    raises most there, the n that it lowers most (rare ones left out: see RARE), and its n nearest
    neurons: a list of k such triples, of lists of (number, logit or cosine).

    Neurons are those of the site's own layer, numbered within it, and nearest by the cosine of
    directions. `rival_neurons` seeks by correlation, and in all layers before the site.
    """
    kind, layer = run.site.split(".")
    directions = run.sae.W_dec[features]  # (k, n)
    largest = torch.as_tensor(largest).to(directions)
    logits = logit_effects(run, directions) * largest[:, None]  # (k, vocab_size)
    frequent = torch.from_numpy(np.flatnonzero(run.token_counts >= RARE)).to(run.device)
    logits = logits[:, frequent]  # of these alone
    cosines = directions  # at an mlp site the neurons are the axes
    if kind != "mlp":
        W_out = run.gpt.blocks[int(layer)].mlp_proj.weight    # (n_embd, n_neurons)
        cosines = directions @ F.normalize(W_out, dim=0)      # with what each neuron writes
    raised = ranked_pairs(logits, logits, n, frequent)
    lowered = ranked_pairs(logits, -logits, n, frequent)
    nearest = ranked_pairs(cosines, cosines.abs(), n)
    return list(zip(raised, lowered, nearest))


def print_feature(run, i, acts, n_top=5, n_intervals=4, each=1, n_tokens=8, note=""):
    """
    Prints feature i with activations acts (N T,): density, histogram, examples, and what
    print_related prints.
    """
    print(f"\n{title(run, i, acts)}{note}")
    if not acts.any():
        return
    columns = shutil.get_terminal_size((120, 24)).columns
    width = min(160, columns) - 22  # 22: label and activation
    previous = ""
    chosen = examples(run, acts, n_top, n_intervals, each, np.random.default_rng(i))
    for label, position in chosen:
        shown = label if label != previous else ""  # a label once for all its examples
        print(f"  {shown:>8} {acts[position]:8.2f}  {snippet(run, position, width)}")
        previous = label
    print_related(run, i, acts.max().item(), n_tokens)


def print_related(run, i, largest, n):
    """
    Prints n tokens that feature i at its largest activation raises most, n that it lowers most,
    and its n nearest neurons; without a model the n largest columns of its direction.
    """
    axes = "neurons" if run.gpt else "columns"
    if run.gpt:
        (raised, lowered, nearest), = related(run, [i], [largest], n)
        for label, pairs in (("raises", raised), ("lowers", lowered)):
            texts = [f"{quoted(run, token)} {logit:+.1f}" for token, logit in pairs]
            print(f"  {label:>8}  " + "  ".join(texts))
    else:
        direction = run.sae.W_dec[[i]]
        nearest, = ranked_pairs(direction, direction.abs(), n)
    texts = [f"{number} {cosine:+.2f}" for number, cosine in nearest]
    print(f"  {axes:>8}  " + "  ".join(texts))


# -----------------------------------------------------------------------------
# report, feature, toy


def summary(run, metrics):
    """Metrics as rows (name, value, note) of text, for the terminal and for the page."""
    def row(name, key, note, reason):  # of a share, or why there is none
        share = metrics[key]
        return (name, "undefined", reason) if share is None else (name, f"{share:.3f}", note)

    rows = [
        ("L0", f"{metrics['l0']:.1f}", f"active features a {run.unit}"),
        row("variance explained", "variance_explained", "about the mean", "no two rows differ"),
    ]
    if "explained_without" in metrics:  # few rows hold most of the norm
        note = f"the largest 1% of {run.unit}s, which hold {metrics['massive_share']:.1%} of norm^2"
        rows.append(row("explained without", "explained_without", note, f"{note}: none differ"))

    m = metrics["n_features"]
    n_dead = round(metrics["dead"] * m)
    never = f"{n_dead:,} of {m:,} never active on {metrics['density_tokens']:,} {run.counted}"
    rows.append(("dead", f"{metrics['dead']:.2%}", never))
    value, note = "undefined", f"on fewer than 1 in {1 / ULTRA_LOW:,.0f}"
    if metrics["ultra_low"] is not None:
        value = f"{metrics['ultra_low']:.2%}"
    elif run.n_countable >= ENOUGH:
        note = f"{note}: to tell takes --density_tokens={ENOUGH:.0f}"
    else:  # the flag would not help
        needed = f"{ENOUGH:,.0f} {run.counted}"
        note = f"{note}: to tell takes {needed}, there are {run.n_countable:,}"
    rows.append(("ultra-low density", value, note))

    if run.gpt:  # what becomes of its predictions
        others = (
            f"spliced {metrics['loss_spliced']:.3f}, "
            f"mean-ablated {metrics['loss_mean_ablated']:.3f}, "
            f"zero-ablated {metrics['loss_zero_ablated']:.3f} nats a token"
        )
        rows.append(("loss", f"{metrics['loss_plain']:.3f}", others))
        note, reason = "of what zero-ablation costs", "zero-ablation costs the model nothing"
        rows.append(row("loss recovered", "loss_recovered", note, reason))
    return rows


def draw_density(run, density, n_tokens):
    """The histogram of log10 density that Bricken et al. watch, the ultra-low features apart."""
    alive = density[density > 0]
    ordinary = alive[alive >= ULTRA_LOW]
    ultra_low = alive[alive < ULTRA_LOW]  # of few tokens it is empty
    lowest = alive.min(initial=ULTRA_LOW if n_tokens >= ENOUGH else 1)
    bins = np.linspace(np.log10(lowest) - 0.1, 0, 60)
    with figure(run, "density") as ax:
        ax.hist(np.log10(ordinary), bins=bins, color=BLUE, label=f"alive: {len(ordinary):,}")
        if n_tokens >= ENOUGH:
            label = f"ultra-low: {len(ultra_low):,}"
            ax.hist(np.log10(ultra_low), bins=bins, color=RED, label=label)
            ax.axvline(math.log10(ULTRA_LOW), color=RED, lw=1, ls=":")
        n_dead = len(density) - len(alive)
        ax.plot([], [], " ", label=f"dead: {n_dead:,}")  # no log10 of 0: in the legend alone
        ax.set_xlabel(f"log10 of feature density on {n_tokens:,} {run.counted}")
        ax.set_ylabel("features")


def read_log(folder):
    """
    An autoencoder's log.jsonl -> {name: array (lines,)}, empty where there is no such file.
    UserError where it is damaged.
    """
    path = os.path.join(folder, "log.jsonl")
    if not os.path.exists(path):
        return {}
    hint = "train_sae.py writes it: copy it from where the autoencoder was trained"
    names = ("step", "l0", "dead", "variance_explained")
    with reading(path, hint), open(path, encoding="utf-8") as file:
        log = [json.loads(line) for line in file]
        columns = {}
        for name in names:
            columns[name] = np.array([row[name] for row in log], float)
        return columns


def draw_training(run):
    """How variance explained, L0 and the share of dead features went, where there is a log."""
    log = read_log(run.folder)
    if not log:
        print(f"no log.jsonl in {run.folder}, so no training.png")
        return
    with figure(run, "training", panels=3, width=9, height=2.8) as axes:
        for ax, name in zip(axes, ("variance_explained", "l0", "dead")):
            ax.plot(log["step"], log[name], color=BLUE)
            ax.set(xlabel="step", title=name.replace("_", " "))
            logarithmic = name == "l0" and log[name].any()  # of zeros alone there is no log
            ax.set_yscale("log" if logarithmic else "linear")
            if name == "dead":
                ax.set_ylim(bottom=0)


def show_report(run, args):
    """Metrics, their plots, the most important features and some drawn at random, and the page."""
    # files that are needed at the end: one that is damaged is refused now, not after a minute
    read_log(run.folder)
    if run.gpt:
        fill_page({})
        run.training_text  # a property that reads

    # measurements
    metrics, held_out_density, energy = measure(run)
    density, n_tokens = count_active(run, args.density_tokens)
    metrics |= density_metrics(density, n_tokens) | massive_metrics(run)

    # numbers
    name = os.path.basename(run.folder)
    recipe = run.sae.config.recipe
    headline = f"{name} · {recipe} recipe · {run.site_in_words} · {run.n_features:,} features"
    rows = summary(run, metrics)
    print(f"\n{headline}, on {metrics['tokens']:,} held-out {run.unit}s")
    for row_name, value, note in rows:
        print(f"  {row_name:<20}{value:>9}   {note}")

    # pictures
    draw_density(run, density, n_tokens)
    draw_training(run)

    # features
    best = np.argsort(-energy, kind="stable")
    alive = np.flatnonzero(held_out_density > 0)
    drawn = np.random.default_rng(args.seed).permutation(alive)
    print_features(run, "that carry most of the reconstruction", best[:args.show])
    print_features(run, "drawn at random", drawn[:args.show])
    print()
    if run.gpt:
        write_page(run, headline, rows, density, np.sort(best[:ON_PAGE]))
        print(f"wrote {os.path.join(run.folder, 'features.html')}: open it in a browser")
        if run.n_features > ON_PAGE:
            print(f"  it has {ON_PAGE:,} {most_energetic(run)}")
    save(run, "metrics", **metrics)


def print_features(run, heading, numbers):
    """Several features below a heading. numbers: (k,) numpy."""
    print("\n" + f" features {heading} ".center(100, "─"))
    for i, acts in zip(numbers.tolist(), run.activations(numbers)):
        print_feature(run, i, acts)


def show_feature(run, args):
    """One feature in full."""
    i = run.feature_number(args.arguments[0])
    acts = run.activations([i])[0]
    print_feature(run, i, acts, n_top=20, n_intervals=10, each=3, n_tokens=12)


def highest_cosines(run):
    """For each true direction of toy data its highest cosine with a feature -> (directions,)."""
    truth = run.source["truth"].to(run.sae.W_dec)  # (directions, n), unit rows, as W_dec's are
    return (truth @ run.sae.W_dec.t()).amax(1).cpu().numpy()


def show_toy(run, args):
    """How many true directions have a feature of their own, one with a cosine over 0.9."""
    cosines = highest_cosines(run)
    found = cosines > 0.9
    print(
        f"{found.sum()} of {len(found)} true directions found ({found.mean():.1%}): "
        f"cosine with a feature over 0.9; mean of the highest cosines {cosines.mean():.3f}"
    )
    quarters = np.array_split(found, 4)  # the first direction is the most frequent
    for name, quarter in zip(("most frequent", "frequent", "rare", "rarest"), quarters):
        print(f"  {name:>14} quarter  {quarter.mean():7.1%}")
    save(
        run,
        "metrics",
        true_directions=len(found),
        found=float(found.mean()),
        mean_max_cosine=float(cosines.mean()),
    )


# -----------------------------------------------------------------------------
# cause: which features make the model say what it says


def encode_text(run, text):
    """Text -> token ids (1, T); UserError when it is empty or longer than a context."""
    ids = run.tokenizer.encode_ordinary(text)
    longest = run.gpt.config.block_size
    if not 0 < len(ids) <= longest:
        raise UserError(f"{text[:40]!r} has {len(ids)} tokens: give 1 to {longest}")
    return torch.tensor([ids], device=run.device)


def first_token(run, text):
    """The first token of a user's text -> (1,)."""
    return encode_text(run, text)[0, :1]


@dataclass
class Effects:
    """What active features do to a later prediction: arrays (k,), one entry a token and feature."""
    row: np.ndarray          # which of the contexts
    position: np.ndarray     # at which of its tokens the feature is active
    feature: np.ndarray      # its number
    activation: np.ndarray   # f_i there, in raw units
    attribution: np.ndarray  # logits: the estimate of the next
    ablation: np.ndarray     # logits: what the target loses without the feature


def effects(run, contexts, places, targets, baselines=None, everywhere=False):
    """
    What active features do to the logit of targets[k] after token places[k] of contexts[k]
    (b, T), measured against the logit of baselines[k], by default against the mean logit
    -> Effects (Templeton et al., "Features as Computational Intermediates").

    Features count where they are active at that token itself; with everywhere=True at any token
    up to it, each token on its own.

    ablation: that difference minus the one without the feature, its f_i W_dec_i subtracted from
    x at the one token.

    attribution: the first-order estimate of that, f_i W_dec_i . gradient. One backward pass
    serves all features.
    """
    stream, x = run.gpt.before(contexts, run.site)  # (b, T, n_embd), (b, T, n)

    def contrast(rows, x):  # of r contexts, contexts[rows], with x (r, T, n) at the site: (r,)
        after = run.gpt.after(run.site, stream[rows], x)  # (r, T, n_embd)
        each = torch.arange(len(x), device=x.device)
        logits = run.gpt.lm_head(after[each, places[rows]])  # (r, vocab_size)
        of_target = logits.gather(1, targets[rows, None])[:, 0]
        if baselines is None:
            return of_target - logits.mean(1)
        return of_target - logits.gather(1, baselines[rows, None])[:, 0]

    # one backward pass gives the gradient at every token of every context
    with torch.enable_grad():
        before = contrast(slice(None), x.requires_grad_())
        gradient, = torch.autograd.grad(before.sum(), x)  # (b, T, n)
    x = x.detach()
    before = before.detach()

    # every pair of a token and a feature that is active on it
    positions = torch.arange(contexts.shape[1], device=contexts.device)
    last = places[:, None]
    counted = positions <= last if everywhere else positions == last  # (b, T)
    tokens = x[counted]                              # (tokens, n)
    f = run.sae.encode(tokens)                       # (tokens, m)
    token, feature = f.nonzero(as_tuple=True)        # (k,) each: active pairs
    row, position = counted.nonzero()[token].t()     # (k,) each
    activation = f[token, feature]
    scale = run.sae.input_scale(tokens)[token]                   # (k, 1)
    parts = activation[:, None] * run.sae.W_dec[feature] / scale  # (k, n), in raw units
    attribution = (parts * gradient[row, position]).sum(1)

    # one forward pass for each pair, with the feature's part taken out at that token alone
    ablation = torch.zeros(len(row), device=contexts.device)
    for block in tracked("ablating", blocks(len(row)), "features"):
        rows = row[block]
        changed = x[rows]  # a copy
        changed[torch.arange(len(block)), position[block]] -= parts[block]
        ablation[block] = before[rows] - contrast(rows, changed)
    arrays = (row, position, feature, activation, attribution, ablation)
    return Effects(*(array.cpu().numpy() for array in arrays))


def drawn_effects(run, seed, n_tokens):
    """effects at n_tokens tokens drawn from all contexts, of the token that follows in the text."""
    rng = np.random.default_rng(seed)
    contexts = run.contexts[rng.integers(0, len(run.contexts), n_tokens)].to(run.device)
    places = torch.from_numpy(rng.integers(0, run.T, n_tokens)).to(run.device)
    targets = contexts.gather(1, places[:, None] + 1)[:, 0]
    return effects(run, contexts[:, :-1], places, targets)


def mean_ranks(values):
    """The place of each of values (k,) among them when sorted; equal ones share their mean."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum() - 1  # place of the last one of each distinct value
    return (last - (counts - 1) / 2)[which]


def correlations(a, b):
    """Pearson's and the rank (Spearman's) correlation of a, b (k,): None where one is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None, None
    pearson = np.corrcoef(a, b)[0, 1]
    rank = np.corrcoef(mean_ranks(a), mean_ranks(b))[0, 1]
    return float(pearson), float(rank)


def top_overlaps(found, n=10):
    """
    How many of a token's n features with the strongest effects by ablation are among its n
    strongest by attribution, by activation, and (on average) among n drawn at random.

    Returns these as means over the tokens of Effects where more than n features are active, and
    the number of such tokens. Without any the means are None. Strong is what is far from 0.
    """
    def strongest(values):
        return set(np.argsort(-np.abs(values), kind="stable")[:n].tolist())

    shared = {"attribution": [], "activation": [], "chance": []}
    for row in np.unique(found.row):  # one token after the other
        here = found.row == row
        if here.sum() > n:  # of ten or fewer all are among the ten
            ablated = strongest(found.ablation[here])
            shared["attribution"].append(len(ablated & strongest(found.attribution[here])))
            shared["activation"].append(len(ablated & strongest(found.activation[here])))
            shared["chance"].append(n * n / here.sum())
    n_tokens = len(shared["chance"])
    means = {kind: float(np.mean(of)) if of else None for kind, of in shared.items()}
    return {"tokens": n_tokens, **means}


def show_cause(run, args, n_tokens=400):
    """How well attribution, or the activation, stands for ablation; or one prediction explained."""
    if args.prompt:
        show_cause_of_prompt(run, args)
        return
    if args.target or args.baseline:
        raise UserError("--target and --baseline are of one prediction: give --prompt as well")
    found = drawn_effects(run, args.seed, n_tokens)
    if len(found.row) == 0:
        raise run.all_dead()
    numbers = {"tokens": n_tokens, "active_features": len(found.row)}
    # a dot is one active feature at one of the tokens
    with figure(run, "cause", panels=2, width=8) as axes:
        for ax, name in zip(axes, ("attribution", "activation")):
            values = getattr(found, name)
            pearson, rank = correlations(values, found.ablation)
            numbers[name] = {"pearson": pearson, "rank": rank}
            both = f"Pearson {or_undefined(pearson, '+.3f')}, rank {or_undefined(rank, '+.3f')}"
            print(f"{name:>12} with ablation effect: {both}")
            ax.scatter(values, found.ablation, s=4, alpha=0.4, color=BLUE)
            ax.set(xlabel=name, ylabel="ablation effect", title=both)
    print(f"{len(found.row):,} active features at {n_tokens} held-out tokens")
    overlaps = top_overlaps(found)
    print(
        "of a token's ten strongest by ablation: "
        f"{or_undefined(overlaps['attribution'], '.1f')} among attribution's ten, "
        f"{or_undefined(overlaps['activation'], '.1f')} among activation's, "
        f"{or_undefined(overlaps['chance'], '.1f')} by chance\n"
        f"(means over the {overlaps['tokens']} tokens with more than ten active features)"
    )
    save(run, "cause", **numbers, top_ten=overlaps)


def show_cause_of_prompt(run, args):
    """The features behind what comes after a prompt, the largest ablation effect first."""
    idx = encode_text(run, args.prompt)
    last = torch.tensor([idx.shape[1] - 1], device=run.device)  # the place of the last token
    logits, _ = run.gpt(idx)
    probabilities = logits[0, -1].softmax(0)
    target = probabilities.argmax(keepdim=True)
    if args.target:
        target = first_token(run, args.target)
    baseline = None
    against = "the mean logit"
    if args.baseline:
        baseline = first_token(run, args.baseline)
        against = f"{quoted(run, baseline)} with {probabilities[baseline].item():.3f}"
        if torch.equal(baseline, target):
            raise UserError(f"--baseline is the target, {quoted(run, target)}: give another")
    print(
        f"after {args.prompt!r}: {quoted(run, target)} "
        f"with probability {probabilities[target].item():.3f}"
    )
    # earlier tokens reach the last one through the attention of later blocks alone
    found = effects(run, idx, last, target, baseline, everywhere=not run.in_last_layer)
    if len(found.row) == 0:
        print("no feature is active")
        return
    print(f"its logit, against {against}, by feature: activation, attribution, ablation, token")
    top = np.argsort(-np.abs(found.ablation))[:args.show]
    for k, acts in zip(top, run.activations(found.feature[top])):
        numbers = (
            f"{found.activation[k]:6.2f}  {found.attribution[k]:+7.3f}  {found.ablation[k]:+7.3f}"
        )
        place = found.position[k]
        token = f"{place:3} {quoted(run, idx[0, place]):<10}"
        print(f"  {numbers}  {token}  {title(run, int(found.feature[k]), acts)}")


# -----------------------------------------------------------------------------
# steer: a feature held at a value


def clamp(run, features, value, directions=None):
    """
    A hook that holds features[k] in context k (or one feature in all contexts) at `value` on
    every token and keeps the reconstruction error (Templeton et al., methods: steering).

    x + (value - f_i) W_dec_i is SAE(x) with f_i clamped, plus x - SAE(x). With 0 it is the
    ablation of Bricken et al.'s feature browser.

    As a control, directions (b, n) of unit norm take the place of W_dec_i: pushes as long.
    """
    features = torch.as_tensor(features, device=run.device)[:, None]  # (b, 1)
    along = run.sae.W_dec[features] if directions is None else directions[:, None]  # (b, 1, n)

    def hook(site, x):  # (b, T, n)
        if site != run.site:
            return None
        f = run.sae.encode(x, features)  # (b, T, 1)
        return x + (value - f) * along / run.sae.input_scale(x)

    return hook


def parse_multiples(text):
    """--value -> a list of floats, or a UserError."""
    try:
        return np.asarray_chkfinite(text.split(","), float).tolist()  # no NaN, no infinity
    except ValueError:
        raise UserError(
            f"--value takes multiples of the feature's maximum with commas between, not {text}"
        )


def random_directions(run, n, seed):
    """n directions of unit norm at the site, drawn evenly from all -> (n, width)."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
    drawn = torch.randn(n, run.sae.config.d_in, generator=generator)
    return F.normalize(drawn, dim=1).to(run.device)


def mean_activation(run, texts):
    """
    Activations at the site (n,), the mean over texts: of each its marked token's, see
    read_marked, or the mean over its tokens.
    """
    means = []
    for text in texts:
        x, place = read_marked(run, text)  # (T, n)
        means.append(x.mean(0) if place is None else x[place])
    return torch.stack(means).mean(0)


def difference_of_means(run, texts, without):
    """
    The direction (n,), of unit norm, from the mean activation of texts without a concept to that
    of texts with it: what one would steer along without features. UserError when there is none.
    """
    difference = mean_activation(run, texts) - mean_activation(run, without)
    if not difference.any():
        raise UserError("the texts of --vector and of --without have the same mean activation")
    return F.normalize(difference, dim=0)


def following_token(run, acts, n=50):
    """The token that most often comes after the n top examples of a feature, acts (N T,)."""
    following = run.contexts[:, 1:].flatten().numpy()  # of each position the token after it
    after = following[top_examples(run, acts, n)]
    return Counter(after.tolist()).most_common(1)[0][0]


def steered(run, i, acts, token, multiples, contexts, directions, vector=None):
    """
    The mean probability of a token over all places of contexts (b, T + 1), and their loss, with
    feature i, of activations acts (N T,), clamped to multiples of its maximum; with the same
    pushes along each of directions (k, n) in its place, as mean and standard deviation; and along
    a vector (n,), if given -> dict, to be saved
    """
    def outcome(hook=None):  # probability and loss
        logits, _ = run.gpt(contexts[:, :-1], hook=hook)  # (b, T, vocab_size)
        loss = F.cross_entropy(logits.flatten(0, 1), contexts[:, 1:].flatten())
        return logits.softmax(-1)[..., token].mean().item(), loss.item()

    clamped = []  # of each multiple
    for multiple in tracked(f"feature {i}", multiples, "values", lambda _: 1):
        value = multiple * acts.max().item()
        probability, loss = outcome(clamp(run, [i], value))
        # the control takes off and adds as much, but along another direction
        hooks = [clamp(run, [i], value, direction[None]) for direction in directions]
        control = np.array([outcome(hook) for hook in hooks])  # (k, 2)
        random_mean, random_loss = control.mean(0).tolist()
        random_spread, random_loss_spread = control.std(0, ddof=1).tolist()
        row = {
            "multiple": multiple,
            "probability": probability,
            "random_mean": random_mean,
            "random_spread": random_spread,
            "loss": loss,
            "random_loss": random_loss,
            "random_loss_spread": random_loss_spread,
        }
        if vector is not None:
            along = clamp(run, [i], value, vector[None])
            row["vector_probability"], row["vector_loss"] = outcome(along)
        clamped.append(row)
    unsteered, plain = outcome()
    result = {
        "feature": i,
        "token": token_text(run, token),
        "unsteered": unsteered,
        "loss": plain,
        "clamped": clamped,
    }
    if vector is not None:
        result["cosine"] = (vector @ run.sae.W_dec[i]).item()
    return result


def beyond_random(results):
    """
    For how many features of `steered` the token is likelier, and for how many less likely, than
    along random directions by over two standard deviations -> a dict for each multiple
    """
    counts = []
    for rows in zip(*[result["clamped"] for result in results]):  # one row a feature
        away = [row["probability"] - row["random_mean"] for row in rows]
        spreads = [2 * row["random_spread"] for row in rows]
        higher = sum(a > spread for a, spread in zip(away, spreads))
        lower = sum(-a > spread for a, spread in zip(away, spreads))
        counts.append({"multiple": rows[0]["multiple"], "higher": higher, "lower": lower})
    return counts


def of_maximum(multiple):
    """A multiple of a feature's maximum in words."""
    return f"{multiple:+g} x max"


def print_steered(results, counts, n_directions):
    """The table of what `steered` found of each feature and `beyond_random` of several."""
    print(
        f"\nfeature  token         clamped to  probability  "
        f"along {n_directions} random directions"
    )
    for result in results:
        token = f"'{result['token']}'"
        print(f"{result['feature']:7}  {token:<14} unsteered  {result['unsteered']:11.5f}")
        for row in result["clamped"]:
            value = of_maximum(row["multiple"])
            print(
                f"{value:>33}  {row['probability']:11.5f}  "
                f"{row['random_mean']:.5f} ± {row['random_spread']:.5f}"
            )
    if len(results) > 1:
        print(f"\nfurther than 2 standard deviations from these, of {len(results)} features:")
        for row in counts:
            value = of_maximum(row["multiple"])
            print(f"{value:>12}  likelier {row['higher']}, less likely {row['lower']}")


def print_beside_vector(results, n_directions):
    """The table of what `steered` with a vector found: probabilities and losses."""
    along = f"{'feature':>10}{'means':>9}{f'{n_directions} random':>20}"
    print(
        f"\n{'':33}{'probability of the token':>39}{'loss on held-out text':>39}\n"
        f"feature  token         clamped to{along}{along}"
    )
    for result in results:
        token = f"'{result['token']}'"
        plain = f"{result['unsteered']:10.5f}{result['loss']:39.3f}"
        print(f"{result['feature']:7}  {token:<14} unsteered{plain}")
        for row in result["clamped"]:
            value = of_maximum(row["multiple"])
            random = f"{row['random_mean']:.5f} ± {row['random_spread']:.5f}"
            random_loss = f"{row['random_loss']:.3f} ± {row['random_loss_spread']:.3f}"
            print(
                f"{value:>33}"
                f"{row['probability']:10.5f}{row['vector_probability']:9.5f}{random:>20}"
                f"{row['loss']:10.3f}{row['vector_loss']:9.3f}{random_loss:>20}"
            )
    for result in results:
        print(f"cosine of feature {result['feature']} with the means: {result['cosine']:+.2f}")


def show_steer(run, args, n_directions=20):
    """
    How likely a token becomes when a feature is clamped to multiples of its maximum, beside
    pushes of equal norm along random directions. Of a single feature texts as well. With
    --vector also along the difference of mean activations between texts with and without a
    concept, and what each costs on text that has nothing to do with it.

    The feature's own logit weights must not choose the token, or any direction would be seen to
    work: it is the one that follows in the text where the feature is active, or the user's.
    """
    if not args.feature:
        raise UserError("steer takes a feature, as in: python analyze.py steer --feature=120")
    if bool(args.vector) != bool(args.without):
        raise UserError("steer takes texts with a concept and without: --vector and --without")
    features = [run.feature_number(text) for text in args.feature.split(",")]
    multiples = parse_multiples(args.value)
    target = first_token(run, args.target).item() if args.target else None
    stride = max(1, len(run.contexts) // 16)  # some 16 contexts from all of the text
    contexts = run.contexts[::stride].to(run.device)
    start = encode_text(run, args.prompt) if args.prompt else contexts[:1, :16]
    vector = difference_of_means(run, args.vector, args.without) if args.vector else None
    all_acts = run.activations(features)
    # beyond that LayerNorm, which squares, leaves float32: it would make NaN, or 0 of everything
    if max(map(abs, multiples)) * all_acts.max().item() > 1e15:
        raise UserError(f"--value={args.value} is more than the model can hold: give less")
    for i, acts in zip(features, all_acts):
        print(title(run, i, acts))
    directions = random_directions(run, n_directions, args.seed)
    results = []
    for i, acts in zip(features, all_acts):
        if acts.any():  # of a dead one the title says so
            token = following_token(run, acts) if target is None else target
            results.append(
                steered(run, i, acts, token, multiples, contexts, directions, vector)
            )
    if not results:
        return
    counts = beyond_random(results)
    if vector is None:
        print_steered(results, counts, n_directions)
    else:
        print_beside_vector(results, n_directions)
    if len(features) == 1:
        print_steered_texts(run, features[0], all_acts[0], multiples, start, args.seed, vector)
    save(run, "steer", random_directions=n_directions, features=results, beyond_random=counts)


def print_steered_texts(run, i, acts, multiples, start, seed, vector):
    """
    What the model writes after token ids start (1, T), feature i clamped and not, and with the
    same pushes along a vector (n,), if given.
    """
    hooks = [("unsteered", None)]
    for multiple in multiples:
        value = multiple * acts.max().item()
        hooks.append((of_maximum(multiple), clamp(run, [i], value)))
        if vector is not None:
            hooks.append(("along means", clamp(run, [i], value, vector[None])))
    for name, hook in hooks:
        # the same draws for all, so that two texts differ by the feature alone
        generator = torch.Generator(run.device).manual_seed(seed)
        ids = run.gpt.generate(start, 60, hook=hook, generator=generator)
        print(f"\n{name:>12}  {token_text(run, *ids[0, start.shape[1]:])}")


# -----------------------------------------------------------------------------
# search: the features of a concept


def read_marked(run, text):
    """
    Activations x (T, n) at the site on a text, and the place of the token that holds the last
    character marked with «...»; None without a mark.
    """
    plain = re.sub("[«»]", "", text)
    idx = encode_text(run, plain)
    x = run.gpt.activations(idx, run.site)[0]
    marked = re.search("«.+?»", text, re.S)  # the first one
    if not marked:
        return x, None
    upto = re.sub("[«»]", "", text[:marked.end()])
    _, starts = run.tokenizer.decode_with_offsets(idx[0].tolist())  # in characters
    return x, bisect(starts, len(upto) - 1) - 1


def search_scores(run, texts, without=()):
    """
    Returns scores (m,), a feature's activation on each text's marked token (else its last) plus
    its mean over the text, averaged over the texts; and on how many of them it is active (m,).
    Both are 0 for what is active anywhere in a text without the concept (Templeton et al.,
    "Searching for Specific Features").
    """
    scores = []
    active = []
    for text in texts:
        x, place = read_marked(run, text)
        f = run.sae.encode(x)  # (T, m)
        scores.append(f[-1 if place is None else place] + f.mean(0))
        active.append(f.amax(0) > 0)
    absent = torch.ones_like(active[0])  # from all texts without the concept
    for text in without:
        x, _ = read_marked(run, text)
        absent &= run.sae.encode(x).amax(0) == 0
    scores = torch.stack(scores).mean(0) * absent
    n_active = torch.stack(active).sum(0) * absent
    return scores.cpu().numpy(), n_active.cpu().numpy()


def show_search(run, args):
    """
    The features of a concept: those active on the most texts that have it come first, the
    highest scores among them, and none that is active on a text without it.
    """
    scores, n_active = search_scores(run, args.arguments, args.without)
    ranked = np.lexsort((-scores, -n_active)).tolist()  # by n_active, the equal ones by score
    hits = [i for i in ranked if n_active[i] > 0][:args.show]
    if not hits:
        addition = " but not on the texts without it" if args.without else ""
        print(f"no feature is active there{addition}")
    n_texts = len(args.arguments)
    for i, acts in zip(hits, run.activations(hits)):
        note = f"  score {scores[i]:.2f}"
        if n_texts > 1:
            note += f", active on {n_active[i]} of {n_texts} texts"
        print_feature(run, i, acts, n_top=4, n_intervals=0, each=0, note=note)
    scored = [[i, float(scores[i]), int(n_active[i])] for i in hits]
    save(run, "search", texts=args.arguments, without=args.without, hits=scored)


# -----------------------------------------------------------------------------
# neurons: do features differ from them?


def cut_to_density(acts, density):
    """acts (k, tokens) less a threshold of each row's own, so that a share `density` is above 0."""
    thresholds = np.quantile(acts, 1 - density, axis=1, keepdims=True)
    return np.maximum(acts - thresholds, 0)


def explainability(run, alive, mlp, density, rng, n_sample):
    """
    explained_by_tokens for n_sample alive features, neurons (of mlp (N T, n_neurons)) and random
    directions, over the whole range of their activations and cut by a threshold to a density
    -> {kind: {"whole": R^2 (n_sample, 2), "cut": R^2 (n_sample, 2)}}

    The two tell different things: of a neuron, tokens explain most of its many small activations,
    less of the few highest. Bricken et al. judge features and neurons over their whole range.
    """
    # as many of each kind, drawn at random
    directions = rng.standard_normal((run.sae.config.d_in, n_sample)).astype(np.float32)
    features = rng.permutation(alive)[:n_sample]
    neurons = rng.permutation(mlp.shape[1])[:n_sample]
    acts = {
        "features": run.activations(features),
        "neurons": mlp[:, neurons].t().numpy(),
        "random directions": (run.x().cpu().numpy() @ directions).T,
    }
    scores = {}
    for kind, rows in acts.items():
        scores[kind] = {
            "whole": explained_by_tokens(run, rows),
            "cut": explained_by_tokens(run, cut_to_density(rows, density)),
        }
    return scores


def median_scores(scores):
    """
    R^2 (n_sample, 2) -> its two medians, without the NaN of what was never active on the
    contexts that are judged; None where nothing else is left.
    """
    known = scores[np.isfinite(scores).all(1)]
    return np.median(known, axis=0).tolist() if len(known) else [None, None]


def show_explained_by_tokens(scores, density):
    """Prints the medians of explainability's scores and returns them, as its dict of dicts."""
    print(
        "\nvariance of the activation that tokens explain (R^2 on other contexts), median over\n"
        f"the whole range, and cut to the highest {density:.2%}\n"
        f"{'':22}{'current token':>20}{'':4}{'previous and current':>20}\n"
        f"{'':22}{'whole':>10}{'cut':>10}{'':4}{'whole':>10}{'cut':>10}"
    )
    medians = {}
    for kind, parts in scores.items():
        whole, cut = median_scores(parts["whole"]), median_scores(parts["cut"])
        medians[kind] = {"whole": whole, "cut": cut}
        shown = [or_undefined(median, ".2f") for median in (whole[0], cut[0], whole[1], cut[1])]
        print("  {:<20}{:>10}{:>10}    {:>10}{:>10}".format(kind, *shown))
    return medians


def show_neurons(run, args, n_sample=256):
    """
    Do features differ from neurons, and are they more explainable? Templeton et al., "Features
    vs. Neurons", compare features of the residual stream with the neurons of all layers before
    it: 82 % have a correlation of 0.3 or less with each of them. See Run.neuron_sites.
    """
    if not run.neuron_sites:
        raise UserError(f"{run.folder} is of {run.site}, which no neuron comes before")
    if run.gpt:
        need_two_contexts(run, "neurons learns from")
    if len(run.x()) < 2:
        raise UserError("a correlation needs two rows: raise --read_tokens, or give more rows")

    # are they the same?
    mlp = run.neurons()
    alive, best, density = highest_correlations(run, unit_columns(mlp))
    share = float((best <= 0.3).mean())
    median = float(np.median(best))
    neurons = neurons_in_words(run, mlp.shape[1])
    print(
        f"{len(alive):,} alive features of {run.site_in_words} against {neurons}:\n"
        f"{share:.1%} have no correlation above 0.3; median of the highest {median:.2f}"
    )
    numbers = {
        "site": run.site,
        "against": run.neuron_sites,
        "n_neurons": mlp.shape[1],
        "share_at_most_03": share,
        "median_correlation": median,
        "density": float(np.median(density)),
    }

    # which of them do the tokens explain?
    scores = {}
    if run.gpt:  # somebody's own rows have no tokens
        rng = np.random.default_rng(args.seed)
        scores = explainability(run, alive, mlp, numbers["density"], rng, n_sample)
        numbers["explained"] = show_explained_by_tokens(scores, numbers["density"])
    draw_neurons(run, best, share, scores)
    save(run, "neurons", **numbers)


def neurons_in_words(run, n_neurons):
    """What the neurons at neuron_sites are."""
    if run.kind == "own":
        return f"the {n_neurons:,} columns of the rows"
    if run.site in run.neuron_sites:
        return f"the {n_neurons:,} neurons of the same layer"
    layers = [site.split(".")[1] for site in run.neuron_sites]
    return f"the {n_neurons:,} neurons of all layers before ({', '.join(layers)})"


def draw_neurons(run, best, share, scores):
    """The features' highest correlations with a neuron; how much tokens explain of each kind."""
    panels = 2 if scores else 1
    with figure(run, "neurons", panels, 4.5 * panels) as axes:
        left = axes[0] if scores else axes
        left.hist(best, bins=40, color=BLUE)
        left.axvline(0.3, color=RED, ls=":")
        column = "column" if run.kind == "own" else "neuron"
        left.set(xlabel=f"highest correlation with a {column}", ylabel="features")
        left.set_title(f"{share:.0%} at 0.3 or less")
        if scores:
            draw_explained(axes[1], scores)


def draw_explained(ax, scores):
    """The cumulative shares of explainability's scores, given the previous and current token."""
    for (kind, parts), colour in zip(scores.items(), (BLUE, RED, GREY)):
        for name, style in (("whole", "-"), ("cut", ":")):
            values = parts[name][:, 1]
            values = np.sort(values[np.isfinite(values)])  # the NaN are left out: see median_scores
            shares = np.linspace(0, 1, len(values))
            label = kind if name == "whole" else f"{kind}, cut"
            ax.plot(values, shares, style, color=colour, label=label)
    ax.set(xlabel="R^2 given previous and current token", ylabel="cumulative share")
    ax.set_xlim(-0.2, 1)


# -----------------------------------------------------------------------------
# explain: how much of the model is "fires on this token, after that one"?


def token_tables(run, x):
    """
    x (N T, n), a vector for each token -> its means given the current token, and given the
    previous and the current one, a row for each pair: two (pairs, n). See means_given_tokens.
    """
    means = means_given_tokens(run, x.t().cpu().numpy())  # of each coordinate
    return [torch.from_numpy(table.T.astype(np.float32)).to(run.device) for table in means]


def explanation_losses(run):
    """
    How much of the model do tokens explain, by way of the features? Every feature is set to its
    mean given the current token, or the previous and the current one; what the decoder makes of
    these means takes the place of the activations. Means are learned on every other context
    and the losses are those on the rest, as in explained_by_tokens. The reconstruction error
    does not stay in: the measure is the autoencoder's own splice.

    The decoder is linear, and all features are known from the same tokens, so what it makes of
    their means is the mean of x_hat: no feature is looked at. (With --input_norm=token the means
    are of activations in the units of x.) The same of x itself tells what the features add.

    Returns losses as `measure` has them, and the share of judged tokens whose pair of tokens
    occurs in the contexts learned from.
    """
    x = run.x()  # (N T, n)
    x_hat = torch.cat([run.sae(piece) for piece in x.split(2048)])
    features_by_token, features_by_pair = token_tables(run, x_hat)
    x_by_token, x_by_pair = token_tables(run, x)
    mean = x.view(len(run.contexts), run.T, -1)[::2].mean((0, 1))  # (n,)

    losses = Counter()
    pair_of = torch.from_numpy(run.token_pairs[0]).to(run.device)
    learn, judge = pair_of[::2], pair_of[1::2]  # (N - N // 2, T), (N // 2, T)
    start = 0
    for batch in run.batches("splicing", run.contexts[1::2]):
        places = judge[start:start + len(batch)]  # (b, T)
        start += len(batch)
        stream, at_site = run.gpt.before(batch[:, :-1], run.site)  # (b, T, n_embd), (b, T, n)
        replacements = {
            "plain": at_site,
            "spliced": run.sae(at_site),
            "features_by_pair": features_by_pair[places],
            "features_by_token": features_by_token[places],
            "x_by_pair": x_by_pair[places],
            "x_by_token": x_by_token[places],
            "mean_ablated": mean.expand_as(at_site),
            "zero_ablated": torch.zeros_like(at_site),
        }
        for name, replacement in replacements.items():
            loss = loss_with(run, stream, replacement, batch[:, 1:])
            losses[f"loss_{name}"] += loss * len(batch) / len(judge)
    return losses, torch.isin(judge, learn).float().mean().item()


# what explanation_losses puts in the place of the activations, in words
IN_PLACE = {
    "plain": "nothing: the model as it is",
    "spliced": "the autoencoder's reconstruction",
    "features_by_pair": "features by previous and current token",
    "features_by_token": "features by current token",
    "x_by_pair": "activations by previous and current token",
    "x_by_token": "activations by current token",
    "mean_ablated": "their mean",
    "zero_ablated": "zeros",
}


def show_explain(run, args):
    """
    The loss of the model with each feature as its tokens predict it, beside that with the
    autoencoder's reconstruction (Bricken et al., "How much of the model does our interpretation
    explain?", leave open how to measure this).
    """
    need_two_contexts(run, "explain learns from")
    losses, seen = explanation_losses(run)
    recovered = {name: loss_recovered(losses, name) for name in IN_PLACE}
    n_judged = len(run.contexts) // 2 * run.T
    print(
        f"{run.folder}, on {n_judged:,} held-out tokens, with means learned on the other "
        f"{len(run.tokens) - n_judged:,},\n"
        f"where {seen:.1%} of these have their pair of tokens, too\n\n"
        f"{'in the place of the activations':<44}{'loss':>8}{'recovered':>12}"
    )
    for name, words in IN_PLACE.items():
        share = or_undefined(recovered[name], ".3f")
        print(f"  {words:<42}{losses[f'loss_{name}']:8.3f}{share:>12}")
    save(run, "explain", tokens=n_judged, seen_pairs=seen, recovered=recovered, **losses)


# -----------------------------------------------------------------------------
# complete: which concepts have a feature of their own?


def find_words(run):
    """Every word of the held-out text, all its tokens -> {word: positions of its last token}."""
    tokenizer = run.tokenizer
    pieces = []  # the bytes of each token
    for position, token in enumerate(run.tokens.tolist()):
        piece = b"\n"  # so that no word goes from one document into the next
        if token != tokenizer.eot_token:
            piece = tokenizer.decode_single_token_bytes(token)
        if position % run.T == 0:
            piece = b"\n" + piece  # nor from one context into the next, which is of elsewhere
        pieces.append(piece)
    last_bytes = defaultdict(list)  # where in the text each word's last byte is
    for match in re.finditer(rb"[A-Za-z]{2,}", b"".join(pieces)):
        last_bytes[match.group().decode()].append(match.end() - 1)
    ends = np.cumsum([len(piece) for piece in pieces])
    return {word: np.searchsorted(ends, at, side="right") for word, at in last_bytes.items()}


def word_places(run, path, n=240):
    """
    The concepts that are looked for -> {word: positions of its last token}: the words of a
    file, or n of the words with 3 or more occurrences, evenly spaced in the log of their
    rank. Of both kinds only words that occur in both halves of the text.
    """
    places = {}
    for word, positions in find_words(run).items():
        even, odd = halves(run, positions)
        if len(even) and len(odd):
            places[word] = positions
    if path:
        with open(path, encoding="utf-8", errors="replace") as file:
            wanted = [word for word in file.read().split() if word in places]
    else:
        frequent = [word for word in places if len(places[word]) > 2]
        ranked = sorted(frequent, key=lambda word: (-len(places[word]), word))
        ranks = np.geomspace(1, len(ranked) + 1, n).astype(int) - 1
        ranks = np.unique(ranks)[:-1]  # small ranks came more than once; the last is beyond
        wanted = [ranked[rank] for rank in ranks]
    return {word: places[word] for word in wanted}


def halves(run, positions):
    """
    Positions (k,) -> those in even and those in odd contexts: no context is in both halves.

    Documents can be: a piece of one that is held out has up to 4,096 tokens, so several contexts. A
    first and a second half would share one piece at most, but words would be more frequent in one
    half than in the other, and F1 depends on how frequent the word is.
    """
    odd = positions // run.T % 2 == 1
    return positions[~odd], positions[odd]


def best_detectors(run, places):
    """
    For each word the feature that detects it best -> F1 (words,), feature (words,), number of
    alive features. A feature detects a token when its activation is over 0, 1/4 or 1/2 of its
    maximum, whichever serves the word best.

    Feature and threshold are chosen on one half of the text, and the F1 is that of the other:
    among so many features, one suits a word with few occurrences by chance.
    """
    choosing, judging = halves(run, np.arange(len(run.tokens)))
    split = [halves(run, positions) for positions in places.values()]
    chosen_f1 = np.zeros(len(places))  # on the half that chooses
    judged_f1 = np.zeros(len(places))
    best = np.zeros(len(places), dtype=int)
    n_alive = 0
    for block, acts in run.by_blocks("looking for words"):
        n_alive += int(acts.any(1).sum())
        highest = acts[:, choosing].max(1, keepdims=True)
        for threshold in (0, 0.25, 0.5):
            fired = acts > threshold * highest  # (features, N T)
            n_choosing = fired[:, choosing].sum(1)
            n_judging = fired[:, judging].sum(1)
            for k, (choose, judge) in enumerate(split):
                scores = f1_score(fired[:, choose].sum(1), n_choosing, len(choose))
                i = scores.argmax()
                if scores[i] > chosen_f1[k]:
                    chosen_f1[k] = scores[i]
                    judged_f1[k] = f1_score(fired[i, judge].sum(), n_judging[i], len(judge))
                    best[k] = block[i]
    return judged_f1, best, n_alive


def f1_score(n_right, n_fired, n_there):
    """The harmonic mean of precision, n_right / n_fired, and recall, n_right / n_there."""
    return 2 * n_right / (n_fired + n_there)


def sigmoid(x, a, b):
    """The chance at x (n,), where the log of its odds is a + b x."""
    log_odds = (a + b * x).clip(-30, 30)  # beyond, exp would overflow
    return 1 / (1 + np.exp(-log_odds))


def fit_sigmoid(x, y):
    """
    Logistic regression by Newton's method: x (n,), y (n,) in {0, 1} -> a, b of
    P(y = 1) = sigmoid(a + b x).
    """
    ridge = 1e-6  # keeps a, b finite where all are 0, or all are 1
    X = np.stack([np.ones_like(x), x], axis=1)  # (n, 2)
    w = np.zeros(2)                             # a and b
    for _ in range(50):
        p = sigmoid(x, *w)
        gradient = X.T @ (y - p) - ridge * w  # of the log-likelihood
        hessian = X.T @ (X * (p * (1 - p))[:, None]) + ridge * np.eye(2)
        w = w + np.linalg.solve(hessian, gradient)
    return w


def midpoint(x, a, b):
    """
    10^x where sigmoid(a + b x) is 1/2; None where it falls, or is 1/2 outside of the range of
    x (n,), the values it was fitted to.
    """
    if b <= 0 or not x.min() <= -a / b <= x.max():
        return None
    return float(10 ** (-a / b))


def completeness(run, places, frequency, threshold):
    """
    Finds which words have a feature of their own, one whose F1 is over the threshold. frequency:
    (words,). Returns the numbers to be saved, a dict, and found, bool (words,).
    """
    f1, best, n_alive = best_detectors(run, places)
    if n_alive == 0:
        raise run.all_dead()
    found = f1 > threshold
    words = {}  # what is saved of each
    for k, word in enumerate(places):
        words[word] = {
            "frequency": frequency[k].item(),
            "feature": best[k].item(),
            "f1": f1[k].item(),
        }
    return {"alive": n_alive, "found": float(found.mean()), "words": words}, found


def draw_complete(run, frequency, found, alive, a, b):
    """The share of words with a feature, by frequency, in six groups of as many words each."""
    groups = np.array_split(frequency.argsort(), min(6, len(frequency)))  # indices of words
    middles = [np.exp(np.log(frequency[group]).mean()) for group in groups]
    fitted = np.sort(frequency)
    with figure(run, "complete") as ax:
        for name, hits in found.items():
            shares = [hits[group].mean() for group in groups]
            line, = ax.plot(middles, shares, "o-", label=f"{name}: {alive[name]:,} alive")
            chances = sigmoid(np.log10(fitted * alive[name]), a, b)
            ax.plot(fitted, chances, ":", color=line.get_color())
        ax.set(xlabel="frequency of the word", ylabel="share with a feature")
        ax.set(xscale="log", ylim=(-0.02, 1.02))


def show_complete(run, args, threshold=0.5):
    """
    Which words have a feature of their own? The share rises with the word's frequency and
    with the number of alive features: a sigmoid in the log of their product (Templeton et
    al., "Feature Completeness"). In the paper it is 1/2 at a frequency slightly below the
    inverse of the number of alive features.
    """
    need_two_contexts(run, "complete chooses on")
    runs = [run]
    for name in args.names[1:]:
        runs.append(load_beside(run, args, name))
        if not same_model(run, runs[-1]):
            raise UserError(f"{name} is of another model than {args.names[0]}: leave it out")
    places = word_places(run, args.words)
    if not places:
        if args.words:
            raise UserError("the held-out text has none of these words in both of its halves")
        raise UserError("the held-out text is too short")
    counts = [len(positions) for positions in places.values()]
    frequency = np.array(counts) / len(run.tokens)  # (words,), of all tokens
    results = {}
    found = {}
    for name, other in zip(args.names, runs):
        results[name], found[name] = completeness(other, places, frequency, threshold)
        share = results[name]["found"]
        print(
            f"{name}: {share:.1%} of {len(places)} words have a feature with F1 over {threshold} "
            f"({results[name]['alive']:,} alive features)"
        )
    # one sigmoid through the words of all runs
    alive = {name: result["alive"] for name, result in results.items()}
    x = np.concatenate([np.log10(frequency * n) for n in alive.values()])
    a, b = fit_sigmoid(x, np.concatenate(list(found.values())))
    middle = midpoint(x, a, b)
    where = "none of these frequencies"
    if middle is not None:
        where = f"a frequency of {middle:.2g} / alive features"
    print(
        f"P(found) = sigmoid({a:.2f} + {b:.2f} log10(frequency x alive features))\n"
        f"1/2 at {where} (the paper: slightly below 1 / alive features)"
    )
    print_words(results[args.names[-1]]["words"], args.show)
    draw_complete(run, frequency, found, alive, a, b)
    save(run, "complete", threshold=threshold, a=a, b=b, midpoint=middle, runs=results)


def print_words(words, n):
    """The n words that have the best detectors."""
    print("\n        word  frequency  feature     F1")
    for word in sorted(words, key=lambda word: -words[word]["f1"])[:n]:
        row = words[word]
        print(f"{word:>12}  {row['frequency']:9.5f}  {row['feature']:7}  {row['f1']:5.2f}")


# -----------------------------------------------------------------------------
# scaling: loss against compute


@dataclass
class Finished:
    """A finished run of train_sae.py, one point of the scaling laws."""
    d_in: int             # width of the activations
    n_features: int       # size of the dictionary
    rows: int             # steps x batch
    learning_rate: float  # before any decay
    loss: float           # on held-out rows, at the end
    settings: tuple       # what must agree between runs that are compared

    @property
    def compute(self):
        """
        Operations: encoder and decoder, two per weight and row, and twice that for their
        gradients.
        """
        return 12.0 * self.d_in * self.n_features * self.rows


def read_finished(args, name):
    """A run, by name or folder, as a Finished. UserError where it is none."""
    folder = folder_of(args, name)
    path = os.path.join(folder, "sae.pt")
    sae = load_sae(path)
    if not sae.extra.keys() >= {"args", "source"}:
        raise UserError(f"{path} does not say how it was trained: leave it out")
    config = sae.config
    with reading(path, "run train_sae.py again"):
        flags = sae.extra["args"]
        source = sae.extra["source"]
        log = sae.extra["log"]
        # only at the end of a run, where the rate has fallen, is its loss what it can reach
        if sae.extra["step"] < flags["max_iters"]:
            raise UserError("the run is not finished: run train_sae.py again with --resume")
        contents = tuple(source.get("contents", ()))  # of somebody's own rows
        data = (source.get("gpt"), source["site"], source.get("offset"), contents)
        # all of the autoencoder's settings but its size and the norm it starts with
        recipe = replace(config, n_features=0, decoder_norm=0)
        told = [flags[flag] for flag in ("l1_coeff", "resample", "dead_steps")]
        return Finished(
            d_in=config.d_in,
            n_features=config.n_features,
            rows=log[-1]["rows"],
            learning_rate=flags["learning_rate"],
            loss=log[-1]["held_out_loss"],
            settings=(*data, recipe, *told),
        )


def power_law(x, y):
    """Least squares in logs: y = c x^k -> c, k."""
    k, log_c = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(log_c)), float(k)


def optimum(points):
    """
    {x: loss} -> the x at which the loss is lowest, and that loss: of the parabola in log x through
    the lowest point and its two neighbours. None where the lowest has one neighbour or none: what
    is best may then lie beyond all that was tried.
    """
    x = np.array(sorted(points))
    losses = np.array([points[value] for value in x])
    k = losses.argmin()
    if k in (0, len(x) - 1):
        return None
    near = slice(k - 1, k + 2)
    curvature, slope, loss = np.polyfit(np.log(x[near] / x[k]), losses[near], 2)
    best = x[k] * np.exp(-slope / (2 * curvature))
    return float(best), float(loss - slope**2 / (4 * curvature))


def by_budget(runs):
    """Groups of runs of equal compute -> {compute: list of runs}, the smallest first."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.compute):
        groups[f"{run.compute:.2g}"].append(run)  # two digits: nearly the same is the same
    return {group[0].compute: group for group in groups.values()}


def best_sizes(runs):
    """
    Of runs at one learning rate the best size for each budget of compute, as far as `optimum`
    knows one -> {compute: (n_features, loss)}
    """
    best = {}
    for compute, group in by_budget(runs).items():
        # of equal runs, which differ in the seed, the last counts
        found = optimum({run.n_features: run.loss for run in group})
        if found:
            best[compute] = found
    return best


def best_rates(runs):
    """
    The best learning rate for each budget of compute at which three or more were tried at one
    size -> {compute: rate}. Of several such sizes the one with the lowest loss counts.
    """
    rates = {}
    for compute, group in by_budget(runs).items():
        losses = defaultdict(dict)  # n_features -> {rate: loss}
        for run in group:
            losses[run.n_features][run.learning_rate] = run.loss
        swept = [tried for tried in losses.values() if len(tried) > 2]
        if swept:
            best = optimum(min(swept, key=lambda tried: min(tried.values())))
            if best:
                rates[compute] = best[0]
    return rates


def scaling_laws(runs):
    """
    Power laws of compute C (Templeton et al., "Scaling Laws") -> {what: (c, k) of c C^k}, and what
    they are fitted to: the learning rate that most runs have, best_sizes of the runs with it,
    best_rates. As in the paper, the rate is fixed for the sizes and swept afterwards.
    """
    # the best sizes, at one rate
    counts = Counter(run.learning_rate for run in runs)
    fixed_rate = counts.most_common(1)[0][0]
    best = best_sizes([run for run in runs if run.learning_rate == fixed_rate])
    laws = {}
    if len(best) > 1:
        budgets = np.array(list(best))
        sizes, losses = np.array(list(best.values())).T
        rows = budgets / (12 * runs[0].d_in * sizes)  # what the rest of the budget buys
        laws["n_features"] = power_law(budgets, sizes)
        laws["steps x batch"] = power_law(budgets, rows)
        laws["loss"] = power_law(budgets, losses)
    # the best rate, of runs of one size and length
    rates = best_rates(runs)
    if len(rates) > 1:
        laws["learning_rate"] = power_law(list(rates), list(rates.values()))
    return laws, fixed_rate, best, rates


def draw_scaling(run, runs, best):
    """Runs at one learning rate: loss against size, a line a budget, and against compute."""
    groups = by_budget(runs)
    with figure(run, "scaling", panels=2, width=9) as (left, right):
        for rank, (compute, group) in enumerate(groups.items(), 1):  # the larger the darker
            group = sorted(group, key=lambda other: other.n_features)
            sizes = [other.n_features for other in group]
            losses = [other.loss for other in group]
            style = {"color": BLUE, "alpha": rank / len(groups)}
            left.plot(sizes, losses, "o-", lw=1, label=f"{compute:.1e} operations", **style)
            right.plot([compute] * len(losses), losses, "o", **style)
        if best:
            sizes, losses = zip(*best.values())
            left.plot(sizes, losses, "x", color=RED)
            right.plot(list(best), losses, "x:", color=RED, label="best size")
        left.set(xscale="log", xlabel="features", ylabel="held-out loss")
        right.set(xscale="log", xlabel="compute (operations)", ylabel="held-out loss")
        all_sizes = sorted({other.n_features for other in runs})
        left.set_xticks(all_sizes, all_sizes)
        right.set_xticks(list(groups), [f"{compute:.1e}" for compute in groups])
        for ax in (left, right):
            ax.minorticks_off()  # their labels would overlap


def show_scaling(run, args):
    """Loss against compute: finished runs that differ in size, steps or learning rate."""
    # the runs
    print(f"{'run':>20}  features  steps x batch        lr   compute  held-out loss")
    runs = []
    for name in args.names:
        other = read_finished(args, name)
        runs.append(other)
        print(
            f"{name:>20}  {other.n_features:8,}  {other.rows:13,}  {other.learning_rate:8.1e}  "
            f"{other.compute:.2e}  {other.loss:13.3f}"
        )
    if any(other.settings != runs[0].settings for other in runs):
        raise UserError(
            "these runs differ in data, site, recipe, normalisation, start, lambda or resampling: "
            "give --names that agree"
        )

    # what they tell
    laws, fixed_rate, best, rates = scaling_laws(runs)
    print(f"\nat learning rate {fixed_rate:g}, of runs of equal compute the best:")
    at_fixed_rate = [other for other in runs if other.learning_rate == fixed_rate]
    for compute in by_budget(at_fixed_rate):
        found = "none that lies between others that were tried"
        if compute in best:
            size, loss = best[compute]
            found = f"{size:,.0f} features, loss {loss:.3f}"
        print(f"  {compute:.2e}  {found}")
    print_laws(laws)
    draw_scaling(run, at_fixed_rate, best)
    save(
        run,
        "scaling",
        laws=laws,
        learning_rate=fixed_rate,
        budgets=list(best),
        best_sizes=[size for size, _ in best.values()],
        best_losses=[loss for _, loss in best.values()],
        best_rates=list(rates.items()),
    )


def print_laws(laws):
    """The power laws, how sizes and steps grow beside the paper, or what is needed to tell."""
    for name, (c, k) in laws.items():
        print(f"best {name} for a budget C: {c:.3g} x C^{k:+.3f}")
    if "n_features" not in laws:
        print(
            "a law of size and steps needs two budgets, each spent by three sizes or more of "
            "which one in the middle is best (compute is that of n_features x max_iters)"
        )
        return
    k, steps_k = laws["n_features"][1], laws["steps x batch"][1]
    compared = "faster" if k > steps_k else "slower"
    print(
        f"here features grow {compared} than steps (C^{k:.2f} against C^{steps_k:.2f}), "
        "in the paper somewhat faster"
    )


# -----------------------------------------------------------------------------
# compare: splitting and universality


SIMILAR = 0.7  # a cosine over which two features count as alike


def show_compare(run, args):
    """Two autoencoders of one site or of the same rows, of two sites, or of two models."""
    small = run
    large = load_beside(run, args, args.names[1])
    # the smaller is looked up in the larger, in whichever order they were named
    if small.n_features > large.n_features:
        small, large = large, small
    rng = np.random.default_rng(args.seed)
    if small.site == large.site and same_model(small, large):
        show_splitting(run, small, large, args.show, rng)
    else:
        show_universality(run, small, large, rng)


def sparse_and_shuffled(run, order):
    """
    What all features do on every token, in units of the largest, and below that the same with
    the tokens in another order (N T,), which is what chance gives -> (2 m, N T), sparse: of a
    trained dictionary few entries are not 0, and a product with those is soon done.
    """
    plain = []
    shuffled = []
    for _, acts in run.by_blocks("reading features"):
        acts = torch.from_numpy(acts)
        plain.append(acts.to_sparse())
        shuffled.append(acts[:, order].to_sparse())
    both = torch.cat(plain + shuffled).to_sparse_csr()
    if len(both.values()):
        both.values().div_(both.values().max())  # squares of large ones would leave float32
    return both


def masked_cosines(a, b):
    """
    The cosine of two features' activations, over only those tokens on which one of the two is
    active (Bricken et al., "Feature Splitting"). a: (k, tokens), dense or sparse, b: (l,
    tokens), dense. Returns two arrays (k, l): the one of the two is a's, and it is b's. 0
    where one is never active.

    Where a_i is active: the square is the share of the sum of a_i^2 that the best multiple of
    b_j explains. Of three equal pieces of a_i each has 1 / sqrt(3).

    Where b_j is active: 1 for all that is active nowhere but where a_i is, in proportion to
    it, such as any piece into which a_i has been split. A b_j that is rarely active has a high
    one by chance with a dense a_i.
    """
    a_squares = a * a
    b_values = b.t().contiguous()  # (tokens, l): sparse products read rows
    b_squares = b_values.square()
    a_whole = a_squares @ torch.ones(len(b_values), 1)  # (k, 1)
    a_masked = a_squares @ (b_values > 0).float()       # sums of a_i^2 where b_j is active
    b_masked = a.sgn() @ b_squares                      # sums of b_j^2 where a_i is active
    products = a @ b_values                             # (k, l), like those two
    by_a = products / (a_whole * b_masked).sqrt().clip(1e-30)
    by_b = products / (a_masked * b_squares.sum(0)).sqrt().clip(1e-30)
    return by_a.numpy(), by_b.numpy()


def splitting(small, large, order):
    """
    How alike the features of Run `small` (m of them) are to all of Run `large` -> {kind:
    (highest (m,), how many are over SIMILAR (m,))}, of five kinds: the cosine of directions, the
    two masked cosines, and these again with the small one's tokens in another order (N T,),
    which is what chance gives.
    """
    m = small.n_features
    acts = sparse_and_shuffled(small, order)
    highest = defaultdict(lambda: np.full(m, -np.inf))  # of each kind
    n_similar = defaultdict(lambda: np.zeros(m, dtype=int))
    for block, theirs in large.by_blocks("comparing"):
        theirs = torch.from_numpy(theirs)
        theirs /= theirs.max().clip(1e-30)  # as those of small
        cosines = small.sae.W_dec @ large.sae.W_dec[block].t()
        by_small, by_large = masked_cosines(acts, theirs)
        kinds = {  # (m, block) each
            "directions": cosines.cpu().numpy(),
            "masked_by_small": by_small[:m],
            "masked_by_large": by_large[:m],
            "masked_by_small_shuffled": by_small[m:],
            "masked_by_large_shuffled": by_large[m:],
        }
        for kind, values in kinds.items():
            highest[kind] = np.maximum(highest[kind], values.max(1))
            n_similar[kind] += (values > SIMILAR).sum(1)
    return {kind: (highest[kind], n_similar[kind]) for kind in highest}


def show_splitting(run, small, large, n_shown, rng):
    """
    How many features have a counterpart, and into what the smaller dictionary's split (Bricken et
    al., "Feature Splitting").
    """
    found = splitting(small, large, rng.permutation(len(small.x())))
    # a table of all, then what became of those that were split most
    print(
        f"{small.n_features:,} features of {small.folder}, each with all "
        f"{large.n_features:,} of {large.folder}:\n"
        f"cosines of directions, and masked: of activations, on those {run.unit}s where the small "
        "(large)\none's feature is active; shuffled: the same by chance\n"
    )
    kinds = show_similarities(found)
    draw_splitting(run, found)
    _, n_similar = found["directions"]
    for i in np.argsort(-n_similar, kind="stable")[:n_shown].tolist():
        show_nearest(small, large, i, min(6, max(1, n_similar[i])))
    save(run, "compare", of=[small.folder, large.folder], similar=SIMILAR, kinds=kinds)


# how many large features a small one may have over SIMILAR, in groups from one number to the next
GROUPS = {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "5-9": 5, "10+": 10}


def in_groups(n_similar):
    """How many features fall into each of GROUPS -> list of numbers."""
    group = np.searchsorted(list(GROUPS.values()), n_similar, side="right") - 1
    return np.bincount(group, minlength=len(GROUPS)).tolist()


def show_similarities(found):
    """Prints what splitting found, a kind a line, and returns it as a dict of plain numbers."""
    print(
        f"{'':30}highest:   share of features over   features with so many over {SIMILAR}\n"
        f"{'':31}median      0.5    0.7    0.9   {''.join(f'{name:>6}' for name in GROUPS)}"
    )
    kinds = {}
    for kind, (highest, n_similar) in found.items():
        # the shares of features with a counterpart, by what counts as one
        shares = {f"{cosine}": float((highest > cosine).mean()) for cosine in (0.5, 0.7, 0.9)}
        kinds[kind] = {
            "median": float(np.median(highest)),
            "shares": shares,
            "counts": np.bincount(n_similar).tolist(),  # of features with 0, 1, 2 ... alike
        }
        listed = "".join(f"{share:7.1%}" for share in shares.values())
        numbers = "".join(f"{n:6}" for n in in_groups(n_similar))
        name = kind.replace("_", " ").replace(" shuffled", ", shuffled")
        print(f"  {name:<28}{kinds[kind]['median']:7.2f}  {listed}   {numbers}")
    return kinds


def show_nearest(small, large, i, n):
    """Prints feature i of a small dictionary and the n of a large one that are nearest to it."""
    acts = small.activations([i])
    cosines = (large.sae.W_dec @ small.sae.W_dec[i]).cpu().numpy()  # (m of large,)
    nearest = np.argsort(-cosines, kind="stable")[:n]
    theirs = large.activations(nearest)
    unit = max(acts.max(), theirs.max(), 1e-30)
    ours = torch.from_numpy(acts / unit)
    (by_small,), (by_large,) = masked_cosines(ours, torch.from_numpy(theirs / unit))
    print(f"\n{title(small, i, acts[0])}\n   directions  masked by small  by large")
    for k, j in enumerate(nearest.tolist()):
        numbers = f"{cosines[j]:13.2f}  {by_small[k]:15.2f}  {by_large[k]:8.2f}"
        print(f"{numbers}  {title(large, j, theirs[k])}")


def draw_splitting(run, found):
    """The distribution of the highest of each kind; how many features have how many alike."""
    colours = {"directions": BLUE, "masked_by_small": GREY, "masked_by_large": RED}
    with figure(run, "compare", panels=2, width=9) as (left, right):
        for place, (kind, colour) in enumerate(colours.items()):
            highest, n_similar = found[kind]
            # sorted, they are their own cumulative distribution
            shares = np.linspace(0, 1, len(highest))
            label = kind.replace("_", " ")
            left.plot(np.sort(highest), shares, color=colour, label=label)
            if kind != "directions":
                shuffled, _ = found[f"{kind}_shuffled"]
                label = f"{label}, shuffled"
                left.plot(np.sort(shuffled), shares, ":", color=colour, label=label)
            where = np.arange(len(GROUPS)) + 0.27 * (place - 1)  # bars side by side
            right.bar(where, in_groups(n_similar), 0.25, color=colour)
        left.set(xlabel="highest cosine with a feature of the larger", ylabel="cumulative share")
        right.set_xticks(range(len(GROUPS)), list(GROUPS))
        right.set(xlabel=f"features of the larger over {SIMILAR}", ylabel="features")


def best_partners(a, b, order):
    """
    For each alive feature of Run a the feature of Run b whose activations on the same text
    correlate with its own most. Returns the alive ones' numbers (k,), the correlations (2, k) and
    the numbers in b (2, k): of both the second row is with a's tokens in another order (N T,).
    """
    both = sparse_and_shuffled(a, order)  # (2 m, N T)
    alive = np.flatnonzero(both.crow_indices().diff()[:a.n_features])
    if len(alive) == 0:
        raise a.all_dead()
    norms = centred_norms(both)  # (2 m,)
    highest = np.full(len(norms), -np.inf)
    partner = np.zeros(len(norms), dtype=int)
    for block, theirs in b.by_blocks("correlating"):
        # about their means, so those of a need not be
        columns = unit_columns(torch.from_numpy(theirs).t().contiguous())  # (N T, block)
        values = (both @ columns).numpy() / norms[:, None]
        best = values.max(1)
        partner = np.where(best > highest, block[values.argmax(1)], partner)
        highest = np.maximum(highest, best)
    return alive, highest.reshape(2, -1)[:, alive], partner.reshape(2, -1)[:, alive]


def logit_correlations(a, b, features, partners):
    """Pearson's correlation of the logit weights of features of a and of b, pairs (k,) -> (k,)."""
    parts = []
    for block in blocks(len(features)):
        ours = logit_effects(a, a.sae.W_dec[features[block]])  # (block, vocab_size)
        theirs = logit_effects(b, b.sae.W_dec[partners[block]])
        products = unit_columns(ours.t()) * unit_columns(theirs.t())  # (vocab_size, block)
        parts.append(products.sum(0).cpu().numpy())
    return np.concatenate(parts)


def best_matches(a, b, order):
    """
    How alike Runs a and b are on the same text: {kind: {"found": (k,), "shuffled": (k,)}}, the
    second with one's tokens in another order (N T,), which is what chance gives.

    features: of each alive one of a the highest activation correlation with any of b. logit
    weights: their correlation for these same pairs, which were not chosen by them. neurons: of
    each the highest activation correlation, where the models are two (Bricken et al.,
    "Universality").
    """
    features, highest, partners = best_partners(a, b, order)
    best = {"features": {}, "logit weights": {}}
    for k, name in enumerate(("found", "shuffled")):
        best["features"][name] = highest[k]
        best["logit weights"][name] = logit_correlations(a, b, features, partners[k])
    if not same_model(a, b) and a.neuron_sites and b.neuron_sites:
        # the same question of the neurons
        mlp = a.neurons()
        mlp = unit_columns(mlp[:, mlp.any(0)])  # dead ones correlate with nothing
        others = unit_columns(b.neurons())
        best["neurons"] = {
            "found": (mlp.t() @ others).amax(1).numpy(),
            "shuffled": (mlp[order].t() @ others).amax(1).numpy(),
        }
    return best


# what best_matches compares, in words
COMPARED = {
    "features": "features, activations",
    "logit weights": "the same pairs, logit weights",
    "neurons": "neurons, activations",
}


def show_universality(run, a, b, rng):
    """
    Does another model, or another site, have the same features, more than it has the same
    neurons? (Bricken et al., "Universality")
    """
    # tokens enough for a correlation, and the activations of all features on them fit into memory
    n_contexts = max(1, 2**16 // a.T)
    a = replace(a, contexts=a.contexts[:n_contexts], kept={})
    b = replace(b, contexts=b.contexts[:n_contexts], kept={})
    best = best_matches(a, b, rng.permutation(len(a.x())))
    models = "two sites of one model" if same_model(a, b) else "two models"
    print(
        f"{models}: {a.site_in_words} ({a.folder}) and {b.site_in_words} ({b.folder})\n"
        f"the {a.n_features:,} features of the first are looked up among the {b.n_features:,} of "
        "the second\n"
        f"median of each one's highest correlation  {'found':>12}{'shuffled':>12}"
    )
    medians = {}
    for kind, values in best.items():
        medians[kind] = {name: float(np.median(parts)) for name, parts in values.items()}
        found, shuffled = medians[kind].values()
        print(f"  {COMPARED[kind]:<40}{found:12.2f}{shuffled:12.2f}")
    draw_universality(run, best)
    sites = [a.site, b.site]
    save(run, "compare", of=[a.folder, b.folder], sites=sites, models=models, medians=medians)


def draw_universality(run, best):
    """The distributions of the correlations that best_matches found."""
    with figure(run, "compare") as ax:
        bins = np.linspace(-1, 1, 81)
        style = {"density": True, "histtype": "step"}
        for (kind, values), colour in zip(best.items(), (BLUE, GREY, RED)):
            ax.hist(values["found"], bins, color=colour, label=COMPARED[kind], **style)
            ax.hist(values["shuffled"], bins, color=colour, ls=":", **style)
        ax.set(xlabel="correlation (dotted: shuffled)", ylabel="density", yscale="log")


# -----------------------------------------------------------------------------
# study: one feature in detail, beside a property of tokens that it may stand for (Bricken et al.,
# "Detailed Investigations of Individual Features")


# Properties that --proxy knows by name. A token has one when a match in the text of its context
# overlaps any of its characters.
PATTERNS = {
    "latin": r"[A-Za-z\u00c0-\u024f]",
    "greek": r"[\u0370-\u03ff\u1f00-\u1fff]",
    "cyrillic": r"[\u0400-\u052f]",
    "hebrew": r"[\u0590-\u05ff\ufb1d-\ufb4f]",
    "arabic": r"[\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc]",
    "devanagari": r"[\u0900-\u097f]",
    "thai": r"[\u0e00-\u0e7f]",
    "han": r"[\u3400-\u4dbf\u4e00-\u9fff]",
    "kana": r"[\u3041-\u30ff]",
    "hangul": r"[\uac00-\ud7a3]",
    "digits": r"[0-9]+",
    "capitals": r"[A-Z]{2,}",
    "lines": r"\n",
    "url": r"https?://[^\s<>\"']+",
    "hex": r"(?i:\b(?:0x)?(?=[a-f]*[0-9])[0-9a-f]{8,}\b)",
    "base64": r"[A-Za-z0-9+/]{40,}={0,2}",
}

# ... and those of Python text. The patterns are those of the standard library's `tokenize`, which
# itself stops at the first error, and a file that is held out in part is full of them.
CLASSES = ("comment", "string", "number", "keyword", "name", "op")
PYTHON = re.compile(
    rf"(?P<comment>{tokenize.Comment})"
    # a long string that the end of the text cuts off goes on up to there
    rf"|(?P<string>{tokenize.StringPrefix}"
    rf"""(?:\"{{3}}(?:{tokenize.Double3}|.*)|'{{3}}(?:{tokenize.Single3}|.*)"""
    r"""|"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'[^'\\\n]*(?:\\.[^'\\\n]*)*'))"""
    rf"|(?P<number>{tokenize.Number})"
    rf"|(?P<name>{tokenize.Name})"
    r"|(?P<op>!=|[-+*/%@&|^~<>=:.,;()\[\]{}])"
    r"|(?P<error>[^\s\\])",  # what no Python has, such as ? or a quote that is not closed
    re.S,
)
PIECE = 4096  # train_gpt.py cuts long documents into pieces of so many tokens and holds some out


def python_spans(text):
    """
    What stands where in a piece of Python text -> [(class, start, end)], in characters, with the
    class as an index into CLASSES, of which len(CLASSES) is beyond: what no Python has.

    The piece may begin inside a comment or string. It is read as code, and as if one of these had
    been opened, and the reading with the least that no Python has counts; of equal ones the one
    with the least in comments and strings, as a long string that is wrongly opened hides all.
    """
    def unlikely(spans):
        errors = sum(kind == len(CLASSES) for kind, _, _ in spans)
        texts = (CLASSES.index("comment"), CLASSES.index("string"))
        hidden = sum(end - start for kind, start, end in spans if kind in texts)
        return errors, hidden

    readings = []
    for opening in ("", "'", '"', '"""', "'''", "#"):
        if opening in text:
            readings.append(python_reading(opening, text))
    return min(readings, key=unlikely)


def python_reading(opening, text):
    """`python_spans` of a text that goes on what an opening, such as a quote, began."""
    kinds = (*CLASSES, "error")
    whole = opening + text
    spans = []
    name_end = len(whole)  # of the name before, if it was one
    for match in PYTHON.finditer(whole):
        word = match.group()
        kind = "keyword" if keyword.iskeyword(word) else match.lastgroup
        start, end = match.span()
        if kind == "name" and whole[name_end:start] == " ":
            kind = "error"  # prose, where a name follows another
        spans.append((kinds.index(kind), max(0, start - len(opening)), end - len(opening)))
        # ... as it may do after "match" and "case"
        is_name = kind == "name" and not keyword.issoftkeyword(word)
        name_end = end if is_name else len(whole)
    return spans


def overlapped(run, tokens, find, n_kinds):
    """
    Which of tokens (n,) share a character, or a byte of one, with something that is found in
    their text -> bool (n_kinds, n). find(text) gives a list of (kind, start, end), in characters.

    Documents, and the pieces of long ones, are searched one by one. The end of a text is not part
    of it and has no property.
    """
    bytes_of = run.tokenizer.decode_single_token_bytes
    end_of_text = run.tokenizer.eot_token
    marks = np.zeros((n_kinds, len(tokens)), dtype=bool)
    ends = np.flatnonzero(tokens == end_of_text) + 1
    for document in np.split(np.arange(len(tokens)), ends):
        for first in range(0, len(document), PIECE):
            piece = document[first:first + PIECE]  # positions
            ids = tokens[piece].tolist()
            parts = [b"" if token == end_of_text else bytes_of(token) for token in ids]
            marks[:, piece] = touched(parts, find, n_kinds)
    return marks


def touched(parts, find, n_kinds):
    """`overlapped` of a single text, whose tokens are these parts, bytes."""
    # what is no UTF-8, such as half a character, becomes a character for each byte
    text = b"".join(parts).decode(errors="surrogateescape")
    widths = [len(character.encode(errors="surrogateescape")) for character in text]  # in bytes
    first_byte = np.cumsum([0] + widths)  # of each character, and where the text ends
    token_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])  # of each byte
    marks = np.zeros((n_kinds, len(parts)), dtype=bool)
    for kind, start, end in find(text):
        marks[kind, token_of[first_byte[start]:first_byte[end]]] = True
    return marks


def with_patterns(run, patterns):
    """Which tokens of the contexts overlap a match of each of k patterns -> bool (k, N, T + 1)."""
    def find(text):
        spans = []
        for kind, pattern in enumerate(patterns):
            spans += [(kind, *match.span()) for match in re.finditer(pattern, text)]
        return spans

    contexts = run.contexts.numpy()
    marks = [overlapped(run, context, find, len(patterns)) for context in contexts]
    return np.stack(marks, axis=1)


def with_classes(run):
    """
    Which tokens of the contexts have each of CLASSES -> bool (classes, N, T + 1), and the share
    of the held-out text's tokens that no Python has. It is read in pieces as long as they are held
    out, not context by context: a quote alone does not tell whether it opens or closes.
    """
    text = load_tokens(run.out_dir, "val", run.gpt.config).astype(np.int64)
    *marks, errors = overlapped(run, text, python_spans, len(CLASSES) + 1)
    places = spread_contexts(torch.arange(len(text)), run.T, len(run.contexts) * run.T)
    return np.stack(marks)[:, places.numpy()], float(errors.mean())


def with_string(run, string):
    """
    Which tokens of the contexts are exactly a string -> bool (N, T + 1). It may be written as it
    is printed, with ⏎ for a line's end. UserError when no token is.
    """
    texts = [token_text(run, token) for token in range(run.tokenizer.n_vocab)]
    wanted = printable(string)
    tokens = [token for token, text in enumerate(texts) if text == wanted]
    if not tokens:
        alike = [repr(text) for text in texts if wanted and text.strip() == wanted.strip()]
        parts = [repr(token_text(run, token)) for token in run.tokenizer.encode_ordinary(string)]
        hint = f"there is {', '.join(alike or parts)}" if string else "give one"
        raise UserError(f"--proxy: no token is {string!r}: {hint}")
    return np.isin(run.contexts.numpy(), tokens)


def read_proxy(run, text):
    """
    --proxy -> which tokens of the contexts have the property, bool (N, T + 1). UserError where
    it is no regular expression, or where no token of the contexts has it, or every one.
    """
    if text.startswith("token:"):
        has = with_string(run, text.removeprefix("token:"))
    elif text in CLASSES:
        classes, errors = with_classes(run)
        print(f"read as Python, {errors:.2%} of the held-out tokens are errors")
        has = classes[CLASSES.index(text)]
    else:
        try:
            has, = with_patterns(run, [PATTERNS.get(text, text)])
            if text not in PATTERNS:
                print("--proxy is read as a regular expression (--help lists names that it knows)")
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"--proxy={text} is no regular expression: {error}")
    share = has[:, :-1].mean()
    if share in (0, 1):
        which = "every" if share else "no"
        raise UserError(f"--proxy={text}: {which} held-out token has it, so it tells nothing")
    return has


def held_by(acts, has):
    """The share of the sum of activations (n,) that lies on tokens with a property, bool (n,)."""
    return acts[has].sum(dtype=float) / acts.sum(dtype=float)


def divergence(q, p):
    """
    What one learns of something of probability p, in nats, by hearing that it is q; p is neither
    0 nor 1.
    """
    yes = q * np.log(np.maximum(q, 1e-300) / p)
    no = (1 - q) * np.log(np.maximum(1 - q, 1e-300) / (1 - p))
    return yes + no


def candidates(run, acts, n_strings=20, most_errors=0.01):
    """
    Properties that a feature of activations acts (N T,) may stand for, the likeliest first ->
    [(name, has (N, T + 1), share, share by activation, gain)].

    They are PATTERNS, the classes of Python where the held-out text is Python, and the strings of
    the tokens that hold most of the activation. The gain is the log-likelihood, in nats a token,
    that the property of a token gains where the feature is active, each token weighted by its
    activation: large where the feature is on the property alone and the property is rare.
    """
    tried = dict(zip(PATTERNS, with_patterns(run, PATTERNS.values())))
    classes, errors = with_classes(run)
    if errors <= most_errors:
        tried |= dict(zip(CLASSES, classes))
    held = np.bincount(run.tokens, acts)  # how much activation is on each token
    for token in np.argsort(-held, kind="stable")[:n_strings]:
        tried[f"token:{token_text(run, token)}"] = run.contexts.numpy() == token

    found = []
    for name, has in tried.items():
        here = has[:, :-1].ravel()
        share = here.mean()
        by_activation = held_by(acts, here)
        if 0 < share < by_activation:  # those that it raises
            gain = divergence(by_activation, share)
            found.append((name, has, float(share), float(by_activation), float(gain)))
    return sorted(found, key=lambda row: -row[-1])


def choose_proxy(run, acts, n_shown):
    """The best of `candidates`, of which it prints some -> name, has (N, T + 1)."""
    found = candidates(run, acts)
    if not found:
        raise UserError("no property that is known here goes with the feature: give --proxy")
    print(
        "\nproperties that it may stand for: how many tokens have each, the same weighted by\n"
        "activation, and what that tells of a token, in nats (--proxy chooses)"
    )
    for name, _, share, by_activation, gain in found[:n_shown]:
        if gain < 0.001 and name != found[0][0]:
            break
        flag = f"--proxy={shlex.quote(name)}"  # as one would type it
        print(f"  {flag:<28}{share:8.2%}{by_activation:9.1%}{gain:8.3f}")
    name, has, *_ = found[0]
    return name, has


def likelihood_ratios(tokens, has):
    """
    log P(token | property) / P(token) of each of tokens (n,), from counts -> (n,).

    The paper has it of strings, whose probability is the product over their tokens; here each is
    a single token. One occurrence with the property is added, spread over all tokens as they are
    in the text, or the log of what never has it would be that of 0.
    """
    share = np.bincount(tokens) / len(tokens)
    given = (np.bincount(tokens, has) + share) / (has.sum() + 1)
    return np.log(given[tokens] / share[tokens])


def ratio(part, whole):
    """part / whole, arrays (k,), as a list, with None where it would be divided by 0."""
    pairs = zip(part.tolist(), whole.tolist())
    return [a / b if b else None for a, b in pairs]


def assess(acts, has, ratios, n_levels=10):
    """
    How well activations (n,) go with a property, bool (n,), whose log-likelihood ratio is given
    for every token, ratios (n,) -> dict, to be saved.

    Levels are n_levels equal intervals of the activation; what is listed by level has one entry
    more, the first, for tokens where it is off. Precision and recall are of saying that the
    property is where the activation is over the threshold, the lower end of each interval.
    "lowest" and "highest" are the shares at the lowest and highest level that have tokens.
    """
    edges = np.linspace(0, acts.max(), n_levels + 1)
    level = np.digitize(acts, edges, right=True)  # 0: off, or below
    tokens = np.bincount(level, minlength=n_levels + 1)
    with_it = np.bincount(level, has, n_levels + 1)
    sums = np.bincount(level, ratios, n_levels + 1)
    over = len(acts) - tokens.cumsum()[:-1]            # (n_levels,): over each threshold
    over_with_it = has.sum() - with_it.cumsum()[:-1]
    share = ratio(with_it, tokens)
    known = [part for part in share[1:] if part is not None]  # of levels that have tokens
    return {
        "pearson": correlations(acts, has.astype(float))[0],
        "share_by_activation": float(held_by(acts, has)),
        "edges": edges.tolist(),
        "tokens": tokens.tolist(),
        "share": share,
        "lowest": known[0],
        "highest": known[-1],
        "log_likelihood_ratio": ratio(sums, tokens),
        "precision": (over_with_it / over).tolist(),  # the maximum is over every threshold
        "recall": (over_with_it / has.sum()).tolist(),
    }


def entries_with(run, has):
    """
    Which entries of the vocabulary have a property: those with it in most of their occurrences in
    the contexts, of which has (N, T + 1) tells -> bool (vocab_size,), and which are known: those
    that occur, and are not RARE.
    """
    V = run.gpt.config.vocab_size
    tokens = run.contexts.flatten().numpy()
    counts = np.bincount(tokens, minlength=V)
    with_it = np.bincount(tokens, has.ravel(), V)
    return 2 * with_it > counts, (counts > 0) & (run.token_counts >= RARE)


def ablate(run, i, acts, has, entries, most=2**15):
    """
    What ablating feature i, of activations acts (N T,), does to what the model predicts where it
    is active, on contexts of at most so many tokens -> dict, to be saved. Each pair is of the
    model as it is and of the one without the feature.

    mass: the probability of all entries (vocab_size,), those with the property, together.

    next: the probability of the token that follows in the text, and its mean log, of those that
    have the property themselves by has (N, T + 1), and of those that have not.
    """
    active = torch.from_numpy(acts > 0).view(-1, run.T)
    rows = active.any(1).nonzero()[:, 0]
    n = min(len(rows), max(1, most // run.T))
    rows = rows[torch.arange(n) * len(rows) // n]  # evenly spread
    entries = torch.from_numpy(entries).to(run.device)
    masses = ([], [])  # two sides: of the model as it is, and of the one without the feature
    logs = ([], [])
    for block in tracked("ablating", blocks(n, max(1, 4096 // run.T)), "contexts"):
        contexts = run.contexts[rows[block]].to(run.device)
        here = active[rows[block]].to(run.device)  # (b, T)
        following = contexts[:, 1:][here][:, None]  # (k, 1)
        for side, hook in enumerate((None, clamp(run, [i], 0.0))):
            stream = run.gpt.trunk(contexts[:, :-1], hook)
            log_probs = run.gpt.lm_head(stream[here]).log_softmax(1)  # (k, vocab_size)
            masses[side].append(log_probs.exp()[:, entries].sum(1).cpu())
            logs[side].append(log_probs.gather(1, following)[:, 0].cpu())
    mass = [torch.cat(parts).mean().item() for parts in masses]
    logs = torch.stack([torch.cat(parts) for parts in logs])  # (2, places)
    follows = torch.from_numpy(has[:, 1:])[rows][active[rows]]
    numbers = {"places": len(follows), "mass": mass, "next": {}}
    for name, chosen in (("with", logs[:, follows]), ("without", logs[:, ~follows])):
        known = chosen.shape[1] > 0
        numbers["next"][name] = {
            "places": chosen.shape[1],
            "probability": chosen.exp().mean(1).tolist() if known else None,
            "log_probability": chosen.mean(1).tolist() if known else None,
        }
    return numbers


@dataclass
class Detector:
    """What may detect a property: the feature, a neuron, or the feature's twin in another run."""
    name: str
    correlation: float  # with the feature
    acts: np.ndarray    # (N T,)


def rival_neurons(run, acts, has):
    """
    The neurons that correlate most with acts (N T,), and with a property, bool (N T,) -> {role:
    Detector}; none at attn.0, or where all are dead.

    They are sought in all layers of run.neuron_sites, where `related` stays in the site's own. A
    name has the number within the layer, and where there are several layers the layer's site.
    """
    mlp = run.neurons()
    active = mlp.any(0)  # a dead one detects nothing
    if not active.any():
        return {}
    sought = torch.from_numpy(np.stack([acts, has], 1))    # (N T, 2)
    both = unit_columns(sought).t() @ unit_columns(mlp)    # (2, neurons)
    both[:, ~active] = -math.inf
    found = {}
    n_layers = len(run.neuron_sites)
    for role, k in zip(("nearest neuron", "best neuron"), both.argmax(1).tolist()):
        layer, number = divmod(k, mlp.shape[1] // n_layers)  # all layers have as many
        site = f"{run.neuron_sites[layer]} " if n_layers > 1 else ""
        found[role] = Detector(f"{site}neuron {number}", both[0, k].item(), mlp[:, k].numpy())
    return found


def find_twin(run, other, i, acts):
    """
    The feature of another Run on the same text whose activations correlate most with acts (N T,)
    of feature i (Bricken et al., "Universality") -> Detector, and what is saved of it, a dict.
    UserError when no feature of the other is alive.
    """
    column = torch.from_numpy(acts)[:, None]  # (N T, 1)
    alive, values, _ = highest_correlations(other, unit_columns(column))
    best = values.argmax()
    j = int(alive[best])
    logits, = logit_correlations(run, other, np.array([i]), np.array([j]))
    found = Detector(f"twin {j}", float(values[best]), other.activations([j])[0])
    numbers = {
        "run": other.folder,
        "feature": j,
        "activations": float(values[best]),
        "logit_weights": float(logits),
    }
    return found, numbers


def show_study(run, args):
    """
    Is a feature what it seems to be? Beside a property of tokens: its specificity, sensitivity
    and effect, whether a neuron would do as well, and whether another run has it, too (Bricken
    et al., "Detailed Investigations of Individual Features").
    """
    i = run.feature_number(args.arguments[0])
    acts = run.activations([i])[0]
    if not acts.any():
        raise UserError(f"{title(run, i, acts)}: choose another")
    other = load_beside(run, args, args.other) if args.other else None
    print(title(run, i, acts))
    if args.proxy:
        name, has = args.proxy, read_proxy(run, args.proxy)
    else:
        name, has = choose_proxy(run, acts, args.show)
    here = has[:, :-1].ravel()  # (N T,): the last token of each context is a target only

    # the feature, and what may do as well
    detectors = {"feature": Detector(f"feature {i}", 1.0, acts)} | rival_neurons(run, acts, here)
    twin = None
    if other:
        detectors["twin"], twin = find_twin(run, other, i, acts)
    ratios = likelihood_ratios(run.tokens, here)
    judged = {}
    for role, one in detectors.items():
        judged[role] = {"name": one.name, "correlation": one.correlation}
        judged[role] |= assess(one.acts, here, ratios)

    # what it does
    entries, known = entries_with(run, has)
    logits = logit_effects(run, run.sae.W_dec[[i]])[0].cpu().numpy() * acts.max()
    effect = raised_entries(logits, entries, known) | ablate(run, i, acts, has, entries & known)

    print_levels(name, here, judged["feature"])
    print_effect(effect)
    print_detectors(judged, twin)
    parts = (logits[known & entries], logits[known & ~entries])
    draw_study(run, name, here, detectors, judged, parts)
    save(
        run,
        "study",
        feature=i,
        proxy=name,
        share=float(here.mean()),
        detectors=judged,
        effect=effect,
        twin=twin,
    )


def raised_entries(logits, entries, known, n=20):
    """
    Of the entries of a vocabulary that are known, bool (vocab_size,): how many of the n with the
    highest logits have the property, entries (vocab_size,), how many of all, and the median logits
    of those with it and without.
    """
    logits, entries = logits[known], entries[known]
    top = np.argsort(-logits, kind="stable")[:n]
    medians = []
    for chosen in (logits[entries], logits[~entries]):
        medians.append(float(np.median(chosen)) if len(chosen) else None)
    return {
        "top": len(top),
        "top_with": int(entries[top].sum()),
        "entries_with": float(entries.mean()) if len(entries) else None,
        "median_logits": medians,
    }


def print_levels(name, has, judged):
    """Specificity and sensitivity: of each level of activation what `assess` found."""
    print(
        f"\n{has.mean():.2%} of {len(has):,} held-out tokens are with the property: "
        f"{printable(name)}\n\n"
        "specificity: how many are with it at each level of the activation; log ratio: the mean\n"
        "of log P(token | property) / P(token). Sensitivity: how many of all with it are above\n"
        f"{'activation':>16}{'tokens':>10}{'with it':>9}{'log ratio':>11}"
        f"{'above: with it':>17}{'of all with it':>17}"
    )
    # from the highest level down to where it is off
    edges = judged["edges"]
    for k in reversed(range(len(edges))):
        label = f"{edges[k - 1]:.2f} to {edges[k]:.2f}" if k else "off"
        share = or_undefined(judged["share"][k], ".1%", "")  # blank where there is no token
        log_ratio = or_undefined(judged["log_likelihood_ratio"][k], "+.2f", "")
        line = f"{label:>16}{judged['tokens'][k]:10,}{share:>9}{log_ratio:>11}"
        if k:
            line += f"{judged['precision'][k - 1]:17.1%}{judged['recall'][k - 1]:17.1%}"
        print(line)
    print(
        f"weighted by activation {judged['share_by_activation']:.1%} are with it; Pearson's "
        f"correlation of activation and property {or_undefined(judged['pearson'], '.2f')}"
    )


def print_effect(effect):
    """What the feature does to the tokens with the property and without."""
    with_it, without = [or_undefined(median, "+.2f") for median in effect["median_logits"]]
    before, after = effect["mass"]
    print(
        f"\neffect: {effect['top_with']} of the {effect['top']} tokens whose logits it raises most "
        f"are with it, and {or_undefined(effect['entries_with'], '.1%')} of the vocabulary;\n"
        f"the median logit, at the feature's maximum, is {with_it} with it, {without} without\n"
        f"ablated where it is active ({effect['places']:,} tokens), the probability of\n"
        f"  all tokens with it, together       {before:.3g} -> {after:.3g}"
    )
    for name, row in effect["next"].items():
        if row["places"]:
            before, after = row["probability"]
            change = row["log_probability"][1] - row["log_probability"][0]
            label = f"the next token where {name} it"
            print(
                f"  {label:<33}  {before:.3g} -> {after:.3g} (its log {change:+.3f}, "
                f"{row['places']:,} tokens)"
            )


def print_detectors(judged, twin):
    """The feature beside neurons, and its twin in another run."""
    width = max(12, *[len(row["name"]) for row in judged.values()])  # of the column of names
    print(
        f"\n{'not a neuron, universal:':<{width + 19}}"
        "Pearson with the   with it, of its levels and   over half its maximum\n"
        f"{'':{width + 18}}feature    proxy   lowest  highest      all   with it   of all with it"
    )
    for role, row in judged.items():
        half = len(row["precision"]) // 2
        columns = [
            f"{row['correlation']:10.2f}",
            f"{or_undefined(row['pearson'], '.2f', '-'):>9}",  # the whole word leaves no gap
            f"{row['lowest']:9.1%}",
            f"{row['highest']:9.1%}",
            f"{row['share_by_activation']:9.1%}",
            f"{row['precision'][half]:10.1%}",
            f"{row['recall'][half]:17.1%}",
        ]
        print(f"  {role:<14} {row['name']:<{width}}{''.join(columns)}")
    if twin:
        print(
            f"its twin in {twin['run']} is feature {twin['feature']}: correlation of activations "
            f"{twin['activations']:.2f}, of logit weights {twin['logit_weights']:.2f}"
        )
    else:
        print("--other=FOLDER, such as out2/sae/NAME, looks for its twin in another run")


def draw_study(run, name, has, detectors, judged, logits):
    """
    study.png: the paper's figures of a feature, of the best neuron and of the twin, where there
    are such. logits: of the entries of the vocabulary with the property, and without.
    """
    with figure(run, "study", panels=3, width=9, height=5.2, rows=2) as axes:
        counts, weighted, neuron, shares, effect, twin = axes.flat
        draw_levels(counts, detectors["feature"], has)
        counts.set(title=f"specificity: {printable(name)}", ylabel="tokens")
        draw_levels(weighted, detectors["feature"], has, weighted=True)
        weighted.set(title="weighted by activation", ylabel="sum of activations")
        draw_shares(shares, judged, has.mean())
        # colours in lists: of two in a tuple matplotlib 3.8.0 takes the second for an opacity
        effect.hist(logits, 50, stacked=True, color=[BLUE, LIGHT], label=("with it", "without"))
        effect.set(title="effect: logits at its maximum", yscale="log")
        effect.set(xlabel="logit about the median", ylabel="tokens of the vocabulary")
        if "best neuron" in detectors:
            draw_levels(neuron, detectors["best neuron"], has, weighted=True)
            neuron.set(title="not a neuron: the best one", ylabel="sum of activations")
        else:
            neuron.set_axis_off()
        if "twin" in detectors:
            draw_twin(twin, detectors["feature"], detectors["twin"], has)
        else:
            twin.set_axis_off()


def draw_levels(ax, detector, has, weighted=False):
    """How active a Detector is, on tokens with the property and without, stacked."""
    parts = []
    for chosen in (has, ~has):
        acts = detector.acts[chosen]
        parts.append(acts[acts > 0])
    weights = parts if weighted else None
    colours = {"color": [BLUE, LIGHT], "label": ("with it", "without")}
    ax.hist(parts, 40, weights=weights, stacked=True, **colours)
    ax.set_xlabel(f"activation of {detector.name}")


def draw_shares(ax, judged, share):
    """The share with the property at each level, and the recall, of feature and best neuron."""
    rows = [judged[role] for role in ("feature", "best neuron") if role in judged]
    for row, colour in zip(rows, (BLUE, RED)):
        edges = np.array(row["edges"]) / row["edges"][-1]
        shares = np.array(row["share"][1:], float)  # NaN where there is no token: a gap
        middles = (edges[1:] + edges[:-1]) / 2
        ax.plot(middles, shares, "o-", ms=3, color=colour, label=row["name"])
        ax.plot(edges[:-1], row["recall"], ":", color=colour)
    ax.axhline(share, color="black", lw=0.8, ls="--")
    ax.set(title="shares; dotted: sensitivity", ylim=(-0.02, 1.02))
    ax.set(xlabel="activation / maximum", ylabel="with it; of all with it")


def draw_twin(ax, feature, twin, has):
    """The activations of a feature and of its twin, a dot a token."""
    on = (feature.acts > 0) | (twin.acts > 0)
    for chosen, colour in ((on & ~has, GREY), (on & has, BLUE)):
        ax.scatter(feature.acts[chosen], twin.acts[chosen], s=2, color=colour)
    ax.set(title=f"universal: correlation {twin.correlation:.2f}")
    ax.set(xlabel=f"activation of {feature.name}", ylabel=f"of {twin.name} in the other run")


# -----------------------------------------------------------------------------
# frontier: how much is explained at which L0


@dataclass
class Point:
    """An autoencoder, or something simpler than one, at its L0. None: not known, or no meaning."""
    curve: str                     # points that differ in lambda alone, or in k, are of one curve
    name: str
    l0: float
    variance_explained: float | None
    loss_recovered: float | None
    # of autoencoders alone:
    n_features: int | None = None
    l1_coeff: float | None = None  # lambda
    dead: float | None = None      # share of its features, at the last line of log.jsonl


# What else than size and lambda a run may have been told: where it differs, curves do. Whoever
# adds a flag that changes what is trained adds it here.
CURVE_FLAGS = ("recipe", "input_norm", "center", "decoder_norm", "pre_bias", "start", "resample",
               "dead_steps", "batch_size", "max_iters", "learning_rate")


def was_told(run, flag):
    """A flag of train_sae.py; where a checkpoint is older than the flag, the setting's default."""
    return run.sae.extra["args"].get(flag, getattr(SAEConfig, flag, None))


def curve_name(run, first):
    """The curve of a Run: its size, and what it was told that the first Run was not."""
    name = f"{run.n_features:,} features"
    for flag in CURVE_FLAGS:
        value = was_told(run, flag)
        if value != was_told(first, flag):
            name += f", {flag} {value}"
    return name


def load_comparable(run, args):
    """
    The Runs of --names, the first of which is `run`, all with its model, text and activations.
    UserError when one is of another model or site, or does not say its lambda.
    """
    runs = []
    for name in args.names:
        other = load_run(args, run.device, name) if runs else run
        if other.site != run.site or not same_model(run, other):
            raise UserError(
                f"{name} is of another site or model than {args.names[0]}: "
                "frontier takes autoencoders of the same activations"
            )
        if "l1_coeff" not in other.sae.extra.get("args", {}):
            raise UserError(f"{name} does not say what lambda it was trained with: leave it out")
        runs.append(replace(run, folder=other.folder, sae=other.sae, source=other.source))
    return runs


def measured_point(run, name, first):
    """A Run as a Point, and its metrics."""
    metrics, _, _ = measure(run)
    log = run.sae.extra.get("log")
    point = Point(
        curve=curve_name(run, first),
        name=name,
        l0=float(metrics["l0"]),
        variance_explained=metrics["variance_explained"],
        loss_recovered=metrics["loss_recovered"],
        n_features=run.n_features,
        l1_coeff=run.sae.extra["args"]["l1_coeff"],
        dead=log[-1].get("dead") if log else None,
    )
    return point, metrics


def principal_components(run, n_tokens):
    """
    The mean (n,) of the activations of n_tokens tokens of the training text, and the directions
    (n, n), one a row, along which they vary, those of the largest variance first.
    """
    x = torch.cat(list(run.trained_x(n_tokens, "reading the training text")))  # (n_tokens, n)
    covariance = torch.cov(x.t(), correction=0)
    _, columns = torch.linalg.eigh(where_float64_is(covariance).double())  # the largest last
    return x.mean(0), columns.t().flip(0).to(x)


def without_dictionary(x, mean, directions, ks):
    """
    Explains x (b, T, n) by k numbers a token. Yields for every way and k: the way, k, the numbers,
    and x_hat (b, T, n).

    PCA: the coordinates along the first k principal components. Entries: the k entries of x that
    are largest in magnitude, 0 in the place of the others; at an mlp site these are neurons.
    """
    coordinates = (x - mean) @ directions.t()
    magnitudes = x.abs()
    sizes = magnitudes.sort(descending=True).values
    for k in ks:
        numbers = coordinates[..., :k]
        yield "PCA", k, numbers, mean + numbers @ directions[:k]
        largest = x * (magnitudes >= sizes[..., k - 1:k])
        yield "entries", k, largest, largest


def baseline_points(run, losses, mean, directions, ks):
    """
    What is explained without_dictionary, judged on run.held_out as `measure` judges, which gave
    the losses of the model as it is and with 0 at the site -> list of Points
    """
    n_tokens = len(run.held_out) * run.T
    sums = defaultdict(Counter)  # (way, k) -> sums over all tokens
    center = 0.0  # of x about the mean of the training text: the sum, and of squares
    square = 0.0
    for batch in run.batches("measuring PCA and entries", run.held_out):
        stream, x = run.gpt.before(batch[:, :-1], run.site)  # (b, T, n_embd), (b, T, n)
        away = where_float64_is(x - mean).double()
        center += away.sum((0, 1))
        square += away.square().sum().item()
        for way, k, numbers, x_hat in without_dictionary(x, mean, directions, ks):
            loss = loss_with(run, stream, x_hat, batch[:, 1:])
            found = sums[way, k]
            found["active"] += torch.count_nonzero(numbers).item()
            found["error"] += (x_hat - x).square().sum().item()
            found["loss"] += loss * len(batch)
    variance = square - center.square().sum().item() / n_tokens
    points = []
    for (way, k), found in sums.items():
        curve = "neurons" if way == "entries" and run.site in run.neuron_sites else way
        spliced = {**losses, "loss_spliced": found["loss"] / len(run.held_out)}
        points.append(Point(
            curve=curve,
            name=f"{curve}, k = {k}",
            l0=found["active"] / n_tokens,
            variance_explained=explained_share(found["error"], variance),
            loss_recovered=loss_recovered(spliced),
        ))
    return points


def curves_of(points):
    """{name: points} of each curve, by L0; small dictionaries first, those without one last."""
    curves = defaultdict(list)
    for point in sorted(points, key=lambda point: (point.n_features or math.inf, point.l0)):
        curves[point.curve].append(point)
    return curves


def at_l0(curve, l0):
    """
    A curve, a list of Points by L0, at a wanted L0 -> Point. What lies between two of them is
    linear in log L0. None where all lie on one side.
    """
    l0s = np.array([point.l0 for point in curve])
    if not l0s[0] <= l0 <= l0s[-1]:
        return None

    # L0 is 0 where all is dead: it has no log
    log_l0, *log_l0s = np.log(np.append(l0, l0s).clip(1e-9))
    there = {}
    for key in ("variance_explained", "loss_recovered", "l1_coeff"):
        values = [getattr(point, key) for point in curve]
        there[key] = None if None in values else float(np.interp(log_l0, log_l0s, values))
    name = curve[0].curve
    return Point(name, name, l0, n_features=curve[0].n_features, **there)


def best_at(curves, l0):
    """Every curve that reaches a wanted L0 there, the most variance explained first."""
    points = [at_l0(curve, l0) for curve in curves.values()]
    reached = [point for point in points if point]
    return sorted(reached, key=lambda point: -(point.variance_explained or 0))


def print_points(points, first=()):
    """Points as the rows of a table; on the right what a first curve has at the same L0."""
    width = max(len(point.name) for point in points)
    there = f"  {first[0].curve} at this L0" if first else ""
    columns = "features  lambda      L0  variance explained  loss recovered    dead"
    print(f"{'':{width}}  {columns}{there}")
    for point in points:
        features = or_undefined(point.n_features, ",", "")
        l1_coeff = or_undefined(point.l1_coeff, ".3g", "")
        explained = or_undefined(point.variance_explained, ".3f")
        recovered = or_undefined(point.loss_recovered, ".3f")
        dead = or_undefined(point.dead, ".2%", "")
        row = (
            f"{point.name:<{width}}  {features:>8}  {l1_coeff:>6}  {point.l0:6.1f}  "
            f"{explained:>18}  {recovered:>14}  {dead:>6}"
        )
        beside = at_l0(first, point.l0) if first and point.curve != first[0].curve else None
        if beside:
            explained = or_undefined(beside.variance_explained, ".3f")
            recovered = or_undefined(beside.loss_recovered, ".3f")
            row += f"  {explained} and {recovered}"
        print(row.rstrip())


def print_missing(curves, at, l0):
    """Of which curves a wanted L0 is no point, and the L0 that their runs have."""
    missing = curves.keys() - {point.curve for point in at}
    if missing:
        print(f"\nnot between two runs at L0 {l0:g} (lower --l1_coeff raises L0):")
    for name, curve in curves.items():
        if name in missing:
            print(f"  {name}, L0 {', '.join(f'{point.l0:.1f}' for point in curve)}")


def draw_frontier(run, curves):
    """Variance explained and loss recovered against L0, without a dictionary dashed."""
    with figure(run, "frontier", panels=2, width=9, height=3.8) as axes:
        for ax, key in zip(axes, ("variance_explained", "loss_recovered")):
            lowest = 1.0  # of autoencoders: what is far below them need not be seen
            for name, curve in curves.items():
                l0s = [point.l0 for point in curve]
                values = np.array([getattr(point, key) for point in curve], float)
                if curve[0].n_features:
                    ax.plot(l0s, values, "o-", ms=4, label=name)
                    lowest = min([lowest, *values[np.isfinite(values)]])
                else:
                    colour = GREY if name == "PCA" else "black"
                    ax.plot(l0s, values, "--", color=colour, label=f"{name}, no dictionary")
            ax.set(xscale="log", xlabel="L0", ylabel=key.replace("_", " "))
            ax.set_ylim(lowest - 0.2, 1.02)
            low, high = ax.get_xlim()
            steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
            ticks = [l0 for l0 in steps if low < l0 < high]
            ax.set_xticks(ticks, ticks)
            ax.minorticks_off()


def show_frontier(run, args, n_tokens=2**15):
    """
    Variance explained and loss recovered against L0, of runs of several sizes and lambdas: of two
    at unequal L0 neither need be the better. Beside them what as many numbers a token explain
    without a dictionary.
    """
    # autoencoders, each on fewer tokens than report takes
    stride = math.ceil(len(run.held_out) * run.T / n_tokens)
    run = replace(run, held_out=run.held_out[::stride])
    runs = load_comparable(run, args)
    # first of all, as the training text, from which PCA learns, may be missing
    mean, directions = principal_components(run, args.read_tokens)
    points = []
    for name, other in zip(args.names, runs):
        point, metrics = measured_point(other, name, run)
        points.append(point)

    # what is simpler; the losses of the model itself are in the metrics of each run, so of the last
    width = len(mean)
    ks = sorted({max(1, width >> halved) for halved in range(8)})  # of 512: 4, 8, 16, ... 512
    simple = baseline_points(run, metrics, mean, directions, ks)

    # what both say
    curves = curves_of(points + simple)
    in_order = sum(curves.values(), [])
    print()
    first = curves[curve_name(run, run)]
    print_points(in_order, first if len(first) > 1 else ())
    at = best_at(curves, args.l0) if args.l0 else []
    if at:
        print(f"\nat L0 {args.l0:g}, linear in log L0 between the runs on either side, best first")
        print_points(at)
    if args.l0:
        print_missing(curves, at, args.l0)
    draw_frontier(run, curves)
    save(
        run,
        "frontier",
        tokens=metrics["tokens"],
        points=[vars(point) for point in in_order],
        l0=args.l0,
        at_l0=[vars(point) for point in at],
    )


# -----------------------------------------------------------------------------
# automata: features that switch one another on


OFTEN = 20      # features active on fewer tokens, of those learned from or judged on, are left out
PREDICTED = 2   # the least lift that is a prediction
STRONGEST = 10  # edges from each feature, at most
LONGEST = 6     # features in a loop or a chain, at most

# groups of pairs of features by their predicted lift, from one to the next
LIFTS = [1, 2, 4, 8, 16]


@dataclass
class Firing:
    """
    What all features do, in two parts. On every other context: how active each is on which token.
    On the rest: where it fires, over all pairs of a token and the next one of its context.
    """
    highest: np.ndarray      # (m,) largest activation
    often: np.ndarray        # (m,) bool: active on OFTEN tokens or more of each part
    means: torch.Tensor      # (m, vocab_size), sparse: mean activation on a token
    first: list              # of each of blocks(m): (block, pairs), sparse: 1 where it fires
    second: torch.Tensor     # (m, pairs), sparse: 1 where it fires on the next token
    frequency: torch.Tensor  # (vocab_size,) of tokens in the training text; rare ones: 0


def token_frequency(run):
    """
    The frequency of each token in the training text, 0 of those that are RARE -> (vocab_size,).
    UserError where all are.
    """
    counts = np.where(run.token_counts >= RARE, run.token_counts, 0)
    if not counts.any():
        raise UserError(f"automata needs a training text in which a token occurs {RARE} times")
    return torch.from_numpy(counts / counts.sum()).float()


def means_by_token(acts, tokens, V):
    """Activations (k, n) on tokens (n,) -> the mean on each token (k, V), sparse."""
    feature, at = acts.nonzero()
    cells = feature * V + tokens[at]  # those of one feature and one token are added up
    sums = np.bincount(cells, acts[feature, at], len(acts) * V).reshape(-1, V)
    means = sums / np.bincount(tokens, minlength=V).clip(1)
    return torch.from_numpy(means).float().to_sparse()


def read_firing(run):
    """
    Run -> Firing. UserError where there are too few contexts, where no token is frequent in
    training, or where no feature is active.
    """
    need_two_contexts(run, "automata learns from")
    frequency = token_frequency(run)
    learn, judge = halves(run, np.arange(len(run.tokens)))
    judge = judge[judge % run.T < run.T - 1]  # a pair does not leave its context
    highest = np.zeros(run.n_features, dtype=np.float32)
    often = np.zeros(run.n_features, dtype=bool)
    means, first, second = [], [], []
    for block, acts in run.by_blocks("reading features"):
        learned = acts[:, learn]
        highest[block] = learned.max(1)
        means.append(means_by_token(learned, run.tokens[learn], len(frequency)))
        on_first = acts[:, judge] > 0
        on_second = acts[:, judge + 1] > 0
        counts = [fires.sum(1) for fires in (learned > 0, on_first, on_second)]
        often[block] = np.min(counts, axis=0) >= OFTEN
        first.append(torch.from_numpy(on_first).float().to_sparse())
        second.append(torch.from_numpy(on_second).float().to_sparse())
    if not highest.any():
        raise run.all_dead()
    if not often.any():
        raise UserError(f"no feature is active {OFTEN} times in each half: raise --read_tokens")
    means = torch.cat(means).to_sparse_csr()  # of rows that are soon multiplied
    second = torch.cat(second).to_sparse_csr()
    return Firing(highest, often, means, first, second, frequency)


def next_token(run, firing, features):
    """
    What comes next, if nothing were known but the frequency of tokens and that one of features
    (k,) is at its largest activation: frequency x exp(its logit effects), normalised
    -> probabilities (k, vocab_size), 0 of rare tokens.
    """
    largest = torch.from_numpy(firing.highest[features]).to(run.device)
    logits = logit_effects(run, run.sae.W_dec[features]) * largest[:, None]
    return (firing.frequency.log() + logits.cpu()).softmax(1)


@dataclass
class Edges:
    """Pairs of features, the second of which the first is to switch on: arrays (k,)."""
    source: np.ndarray
    target: np.ndarray
    predicted: np.ndarray  # how many times as active the target is to be after the source
    fired: np.ndarray      # on how many first tokens of a pair the source fires
    times: np.ndarray      # on how many of the second tokens the target does
    expected: np.ndarray   # on how many by chance: fired x density of the target

    @property
    def lift(self):
        """How many times as often as by chance."""
        return self.times / np.maximum(self.expected, 1e-30)

    @property
    def held(self):
        """
        Whether the text bears the edge out: five times or more, twice as often as by chance or
        more, and 4 standard deviations (of a Poisson distribution) more often than by chance.
        """
        more = self.times - self.expected >= 4 * np.sqrt(self.expected)
        return (self.times >= 5) & (self.lift >= 2) & more

    def __getitem__(self, chosen):
        """Some of them, by a mask or indices."""
        return Edges(*(values[chosen] for values in vars(self).values()))

    @classmethod
    def joined(cls, parts):
        """Those of all parts, a list of Edges, one part after the other."""
        arrays = {}
        for name in vars(parts[0]):
            arrays[name] = np.concatenate([vars(part)[name] for part in parts])
        return cls(**arrays)


def all_pairs(run, firing):
    """
    Yields the Edges of all pairs of features that are active OFTEN, themselves included, some
    at a time. An edge is predicted by weights and single tokens, and measured on other text:

    predicted = sum_v p(v) mean_j(v) / sum_v frequency(v) mean_j(v)

    with p the next_token of the source and mean_j(v) the mean activation of the target on token
    v: how many times as active the target is to be as on average.
    """
    m = run.n_features
    n_pairs = firing.second.shape[1]
    usual = (firing.means @ firing.frequency[:, None])[:, 0].numpy()  # (m,)
    density = (firing.second @ torch.ones(n_pairs)).numpy() / n_pairs
    able = firing.often & (usual > 0)  # not those that fire on rare tokens alone
    for block, first in zip(tracked("pairing", blocks(m), "features"), firing.first):
        fires = first.to_dense()  # (block, pairs)
        p = next_token(run, firing, block)
        active = (firing.means @ p.t()).t().numpy()      # (block, m)
        times = (firing.second @ fires.t()).t().numpy()  # (block, m)
        fired = fires.sum(1).numpy()
        row, target = np.nonzero(able[block][:, None] & able)
        yield Edges(
            source=block[row],
            target=target,
            predicted=active[row, target] / usual[target],
            fired=fired[row],
            times=times[row, target],
            expected=fired[row] * density[target],
        )


def strongest(edges):
    """Of Edges those that are predictions, at most STRONGEST from each source."""
    edges = edges[(edges.predicted >= PREDICTED) & (edges.source != edges.target)]
    edges = edges[np.lexsort((-edges.predicted, edges.source))]
    # the place of each among those of its source: sorted by source, they begin at its first
    place = np.arange(len(edges.source)) - np.searchsorted(edges.source, edges.source)
    return edges[place < STRONGEST]


def find_edges(run, firing):
    """
    The predictions of all features -> Edges, the strongest first; the same of each feature and
    itself; and a table of all pairs of two features by LIFTS, a row each of how many, how often
    the second fires and would by chance, how many are held.
    """
    predictions, selves = [], []
    table = np.zeros((len(LIFTS) + 1, 4))
    for edges in all_pairs(run, firing):
        selves.append(edges[edges.source == edges.target])
        predictions.append(strongest(edges))
        others = edges[edges.source != edges.target]
        group = np.digitize(others.predicted, LIFTS)
        columns = (np.ones(len(group)), others.times, others.expected, others.held)
        for k, column in enumerate(columns):
            table[:, k] += np.bincount(group, column, len(table))
    ranked = []
    for parts in (predictions, selves):
        edges = Edges.joined(parts)
        ranked.append(edges[np.argsort(-edges.predicted, kind="stable")])
    return *ranked, table


def shortest_path(following, start, end, used):
    """
    {feature: features that come next} -> the shortest path from start to end, of at most LONGEST
    features, without those in a set `used`; None where there is none.
    """
    seen = used | {start}
    paths = [[start]]
    for path in paths:  # it grows
        if path[-1] == end:
            return path
        if len(path) == LONGEST:
            continue
        for feature in following[path[-1]]:
            if feature not in seen:
                seen.add(feature)
                paths.append(path + [feature])
    return None


def find_loops(edges):
    """
    Edges, the strongest first -> loops, lists of edges (indices), in which each leads to the next
    and the last to the first; no feature is in two. Edges are added one by one: the first that
    closes a loop is the weakest of it, so that loops come in order of their weakest edge.
    """
    following = defaultdict(list)
    number = {}  # (source, target) -> index
    loops = []
    used = set()
    for k, pair in enumerate(zip(edges.source.tolist(), edges.target.tolist())):
        source, target = pair
        number[pair] = k
        if used & {source, target}:
            continue
        path = shortest_path(following, target, source, used)
        following[source].append(target)
        if path:
            used |= set(path)
            loops.append([number[step] for step in zip(path, path[1:] + path[:1])])
    return loops


def find_chains(edges, used):
    """
    Edges, the strongest first -> chains, lists of edges (indices) in which each leads to the
    next: the strongest edge, then the strongest one from where that leads, and so on. No feature
    is in two, nor in the set `used`.
    """
    sources, targets = edges.source.tolist(), edges.target.tolist()
    leaving = defaultdict(list)  # source -> indices
    for k, source in enumerate(sources):
        leaving[source].append(k)
    chains = []
    for k, pair in enumerate(zip(sources, targets)):
        if used & set(pair):
            continue
        chain = [k]
        seen = used | set(pair)
        while len(chain) < LONGEST - 1:
            end = targets[chain[-1]]
            further = [step for step in leaving[end] if targets[step] not in seen]
            if not further:
                break
            chain.append(further[0])
            seen.add(targets[further[0]])
        if len(chain) > 1:
            used = seen
            chains.append(chain)
    return chains


def carriers(run, firing, source, target, n=3):
    """
    The tokens that an edge goes by -> their numbers, at most n: those that add most to its
    predicted lift, as far as they add a tenth of what the first does.
    """
    shift = next_token(run, firing, np.array([source]))[0] - firing.frequency
    added = shift * firing.means[target].to_dense()  # how much more active on each token
    most, tokens = added.topk(n)
    return tokens[most > 0.1 * most[0]].tolist()


def brief(run, token):
    """A token in quotes, its spaces counted where they are many."""
    return re.sub(" {4,}", lambda spaces: f"␣×{len(spaces[0])}", quoted(run, token))


def edge_rows(run, firing, edges):
    """Edges -> a list of dicts, to be saved."""
    rows = []
    for k in range(len(edges.source)):
        source, target = edges.source[k].item(), edges.target[k].item()
        tokens = carriers(run, firing, source, target)
        rows.append({
            "from": source,
            "to": target,
            "tokens": [brief(run, token) for token in tokens],
            "predicted": edges.predicted[k].item(),
            "measured": edges.lift[k].item(),
            "times": int(edges.times[k]),
            "of": int(edges.fired[k]),
            "held": bool(edges.held[k]),
        })
    return rows


def short_names(run, rows):
    """Of every feature in edge_rows its number and most common token -> {number: text}."""
    features = sorted({row["from"] for row in rows} | {row["to"] for row in rows})
    names = {}
    for i, acts in zip(features, run.activations(features)):
        token, _, _ = common_token(run, acts)
        names[i] = f"{i} {brief(run, token)}"
    return names


def print_edges(heading, rows, names):
    """Edges below a heading: predicted and measured lift, and how often the second comes."""
    print(f"\n{heading:<49} predicted  measured       after  by")
    for row in rows:
        ends = f"{names[row['from']]:>22} → {names[row['to']]:<22}"
        lifts = f"{row['predicted']:9.1f} {row['measured']:9.1f}"
        after = f"{row['times']}/{row['of']}"
        mark = "" if row["held"] else "  not borne out"
        print(f"  {ends} {lifts} {after:>11}  {' '.join(row['tokens'])}{mark}")


def print_lifts(table):
    """Prints the table of find_edges -> its rows as dicts, to be saved."""
    print("\npredicted lift    pairs of features   measured lift   borne out")
    bounds = [0, *LIFTS, math.inf]
    rows = []
    for low, high, (n, times, expected, held) in zip(bounds, bounds[1:], table):
        measured = times / expected if expected else None
        share = held / n if n else None
        rows.append({"from": low, "pairs": int(n), "measured": measured, "held": share})
        words = f"{low} or more" if high == math.inf else f"{low} to {high}"
        shown = or_undefined(measured, ".2f")
        print(f"{words:>14} {n:20,.0f} {shown:>15} {or_undefined(share, '.1%'):>11}")
    return rows


def features_of(rows):
    """The features of a loop or chain of edge_rows, in order, each once."""
    return list(dict.fromkeys([rows[0]["from"]] + [row["to"] for row in rows]))


def draw_automata(run, loops, chains, names, most=25):
    """
    Loops and chains, lists of edge_rows, the longest first, as many as have `most` features: each
    on a circle of its own, with the tokens that it goes by. Loops of two come last.
    """
    longer = [rows for rows in loops if len(rows) > 2]
    pairs = [rows for rows in loops if len(rows) == 2]
    groups = sorted(longer, key=len, reverse=True) + sorted(chains, key=len, reverse=True) + pairs
    totals = np.cumsum([len(features_of(rows)) for rows in groups])
    groups = groups[:np.searchsorted(totals, most, side="right")]
    columns = 3
    n_rows = max(1, math.ceil(len(groups) / columns))
    size = {"width": 2.6 * columns, "height": 2.4 * n_rows}
    with warnings.catch_warnings(), figure(run, "automata", **size) as ax:
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font lacks: boxes
        for k, rows in enumerate(groups):
            draw_circle(ax, rows, names, np.array([k % columns, -(k // columns)]))
        ax.set(xlim=(-0.5, columns - 0.5), ylim=(0.5 - n_rows, 0.5))
        ax.set_axis_off()


def draw_circle(ax, rows, names, center):
    """A loop or chain, clockwise from the left on a circle about center (2,)."""
    features = features_of(rows)
    angles = np.pi - 2 * np.pi * np.arange(len(features)) / len(features)
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    places = dict(zip(features, center + 0.35 * around))
    style = {"fontsize": 8, "ha": "center", "va": "center", "parse_math": False}
    for row in rows:
        start, end = places[row["from"]], places[row["to"]]
        arrow = {
            "arrowstyle": "-|>",
            "connectionstyle": "arc3,rad=-0.3",
            "color": GREY,
            "shrinkA": 17,
            "shrinkB": 17,
        }
        ax.annotate("", end, start, arrowprops=arrow)
        # in the middle of the bow, which is to the left of the way
        dx, dy = end - start
        middle = (start + end) / 2 + 0.15 * np.array([-dy, dx])
        box = {"boxstyle": "square,pad=0.1", "color": "white"}
        ax.text(*middle, row["tokens"][0], color=RED, bbox=box, **style)
    for feature, place in places.items():
        label = names[feature].replace(" ", "\n", 1)  # the number above the token
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": BLUE}
        ax.text(*place, label, bbox=box, **style)


def show_automata(run, args):
    """
    Do features work together like finite-state automata? (Bricken et al., "Finite State
    Automata") One raises tokens on which the next is active, which raises others, and so on.
    """
    firing = read_firing(run)
    edges, selves, table = find_edges(run, firing)
    held = edges[edges.held]
    share = float(edges.held.mean()) if len(edges.held) else None
    print(
        f"{len(edges.held):,} edges, at most {STRONGEST} from each feature to others that are to "
        f"be {PREDICTED} times as active or more\non the next token: "
        f"{or_undefined(share, '.1%')} are borne out by other text\n"
        "lift: how many times as active (predicted) or as often active (measured) as on average"
    )
    lifts = print_lifts(table)

    # what the text bears out
    loops = find_loops(held)
    looped = set(held.source[sum(loops, [])].tolist())
    chains = find_chains(held, looped)
    _, best = np.unique(edges.source, return_index=True)  # the first of each, the strongest
    best_rows = edge_rows(run, firing, edges[np.sort(best)[:args.show]])
    self_rows = edge_rows(run, firing, selves[selves.held][:args.show])
    loop_rows = [edge_rows(run, firing, held[loop]) for loop in loops[:args.show]]
    chain_rows = [edge_rows(run, firing, held[chain]) for chain in chains[:args.show]]
    names = short_names(run, best_rows + self_rows + sum(loop_rows + chain_rows, []))
    print_edges("the strongest, one from each feature", best_rows, names)
    print_edges("features that switch themselves on again", self_rows, names)
    for rows in loop_rows:
        print_edges(f"a loop of {len(rows)}", rows, names)
    for rows in chain_rows:
        print_edges(f"a chain of {len(rows) + 1}", rows, names)
    draw_automata(run, loop_rows, chain_rows, names)
    save(
        run,
        "automata",
        edges=len(edges.held),
        held=share,
        by_predicted_lift=lifts,
        n_loops=len(loops),
        n_chains=len(chains),
        strongest=best_rows,
        self_loops=self_rows,
        loops=loop_rows,
        chains=chain_rows,
    )


# -----------------------------------------------------------------------------
# the map of features: t-SNE (van der Maaten & Hinton 2008), exact, of the directions' cosines


def affinities(directions, perplexity):
    """
    How alike directions (m, n) of unit norm are -> P (m, m), symmetric, of sum 1 (van der Maaten &
    Hinton, sections 2 and 3.1): Gaussians of their squared distances 2 - 2 cosine, one about each
    direction, whose width is bisected until 2^entropy is the perplexity, a soft count of
    neighbours.
    """
    m = len(directions)
    P = directions.new_empty(m, m)
    everyone = torch.arange(m, device=directions.device)
    for block in tracked("neighbours", blocks(m), "features"):  # so few stay in the cache
        rows = directions[block]
        itself = everyone[block, None] == everyone
        distances = 2 - 2 * rows @ directions.t()     # (b, m)
        distances.masked_fill_(itself, 4)             # the largest that there is
        distances -= distances.amin(1, keepdim=True)  # no Gaussian is 0 everywhere
        log_precision = distances.new_full((len(rows), 1), 5)  # log2 (1 / (2 width^2))
        for k in range(28):
            p = (-2**log_precision * distances).exp_().masked_fill_(itself, 0)
            p /= p.sum(1, keepdim=True).clip(1e-30)   # of one direction there are no others
            entropy = -torch.xlogy(p, p).sum(1, keepdim=True)
            too_wide = entropy > math.log(perplexity)
            log_precision += torch.where(too_wide, 8 * 0.5**k, -8 * 0.5**k)
        P[block] = p
    return (P + P.t()).div_(2 * m)  # in place: it can be large


def tsne_gradient(P, places, exaggeration=1.0):
    """
    The gradient of KL(P || Q) by the places y (m, 2) -> (m, 2): 4 sum_j (p_ij - q_ij) (y_i - y_j)
    / (1 + |y_i - y_j|^2), where q_ij is in proportion to 1 / (1 + |y_i - y_j|^2) and of sum 1
    (section 3.3). P (m, m) may be exaggerated (section 3.4).
    """
    squares = places.square().sum(1, keepdim=True)
    ones = torch.ones_like(squares)
    left = torch.cat([-2 * places, squares + 1, ones], 1)
    right = torch.cat([places, ones, squares], 1)  # left_i . right_j = 1 + |y_i - y_j|^2
    summed = torch.cat([places, ones], 1)          # w_i . this: sums of w_ij y_j, and of w_ij
    pull = []
    push = []
    total = -len(places)  # a place is not its own neighbour, though its kernel is 1
    for rows, p in zip(left.split(256), P.split(256)):  # in blocks that stay in the cache
        kernel = (rows @ right.t()).reciprocal_()       # (b, m)
        total += kernel.sum()
        pull.append((kernel * p) @ summed)
        push.append(kernel.square_() @ summed)
    force = exaggeration * torch.cat(pull) - torch.cat(push) / total.clip(1e-30)  # (m, 3)
    return 4 * (places * force[:, 2:] - force[:, :2])


def tsne(directions):
    """
    Places (m, 2) in a plane of directions (m, n) of unit norm: those with a high cosine are near
    one another. Each has some 30 neighbours; of directions that are few, a third of the others.
    """
    m = len(directions)
    P = affinities(directions, perplexity=max(1, min(30, (m - 1) / 3)))
    generator = torch.Generator().manual_seed(0)
    places = 1e-4 * torch.randn(m, 2, generator=generator).to(directions)
    velocity = torch.zeros_like(places)
    gains = torch.ones_like(places)
    rate = m / 12  # P is of sum 1: the more places, the smaller is the force on each
    for step in tracked("mapping", range(300), "steps", lambda step: 1):
        gradient = tsne_gradient(P, places, 4 if step < 50 else 1)
        # momentum, and a larger step as long as the gradient keeps its sign: section 3.4
        turned = (gradient > 0) == (velocity > 0)
        gains = torch.where(turned, gains * 0.8, gains + 0.2).clip(0.01)
        velocity = 0.8 * velocity - rate * gains * gradient
        places += velocity
    return places


# -----------------------------------------------------------------------------
# the page: assets/page.html, an ordinary page with a small sample, filled with a run's features

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "page.html")
ON_PAGE = 8192  # features at most: a browser has to hold the page, of some 2.5 kB a feature


def most_energetic(run):
    """What the features are that are on a page which has no room for all."""
    return f"of {run.n_features:,} features, those that carry most of the reconstruction"


def fill_page(data):
    """
    The page with data in the place of its sample: JSON in which no `<` is left, so that
    nothing in it can end the script that holds it.
    """
    opening = '<script type="application/json" id="data">'
    hint = "it comes with analyze.py: put it back"
    with reading(PAGE, hint), open(PAGE, encoding="utf-8") as file:
        parts = file.read().split(opening)
    if len(parts) != 2:
        raise UserError(f"{PAGE} must have {opening} once: the data go there")
    before, rest = parts
    _, closing, after = rest.partition("</script>")
    filled = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return before + opening + filled.replace("<", "\\u003c") + closing + after


def short(number):
    """Three digits are enough to look at; what is no number is null."""
    number = float(number)  # numpy's own numbers take four times as long to format
    return float(f"{number:.3g}") if math.isfinite(number) else None


def short_pairs(pairs):
    """[(number, value)] with short values."""
    return [[number, short(value)] for number, value in pairs]


def motif(by_token, by_pair):
    """
    What makes a feature active, as far as the two R^2 of explained_by_tokens tell: "single token"
    if the current token explains half of the variance of its activations, "token in context" if
    it does together with the one before, else "context"; None where there is no R^2.
    """
    if not np.isfinite(by_token):
        return None
    if by_token >= 0.5:
        return "single token"
    return "token in context" if by_pair >= 0.5 else "context"


def most_alike(likeness):
    """likeness (k, m) of k features with all -> for each its five highest (index, value) over 0."""
    lists = []
    for pairs in ranked_pairs(likeness, likeness, 5):
        lists.append([(other, value) for other, value in pairs if value > 0])
    return lists


def nearest_features(directions):
    """For each of the directions (m, n), of unit norm, the five others with the highest cosine."""
    lists = []
    for block in blocks(len(directions)):
        cosines = directions[block] @ directions.t()  # (b, m)
        cosines[range(len(block)), block] = 0         # not itself
        lists += most_alike(cosines)
    return lists


def active_together(active):
    """
    For each feature the five others that it is most often active together with, by the
    correlation of being active (phi): 1 if always together, 0 if as often as by chance. active:
    (m, N T) of 0 and 1, sparse.
    """
    m, n_tokens = active.shape
    # a product of sparse matrices takes as long as the square of the L0
    sparse = active._nnz() < 0.05 * m * n_tokens
    whole = active if sparse else active.to_dense()
    tokens = whole.t().coalesce() if sparse else whole.t()
    # float64: of what is active on every token, rounding would be divided by almost nothing
    counts = torch.sparse.sum(active, 1).to_dense().double()  # (m,)
    spread = (counts * (1 - counts / n_tokens)).sqrt()
    lists = []
    for block in tracked("pairing", blocks(m, 1024), "features"):
        rows = whole.index_select(0, torch.from_numpy(block))
        both = (rows @ tokens).to_dense()  # on how many tokens (b, m)
        chance = counts[block, None] * counts / n_tokens
        phi = (both - chance) / (spread[block, None] * spread).clip(1e-30)
        phi[range(len(block)), block] = 0  # not itself
        lists += most_alike(phi)
    return lists


def page_examples(run, i, acts):
    """Examples of feature i with activations acts (N T,) as the page wants them, but no effects."""
    width = min(24, run.T)
    shown = []
    for label, position in examples(run, acts, 6, 4, 1, np.random.default_rng(i)):
        context, t = divmod(position, run.T)
        whole = acts[context * run.T:(context + 1) * run.T]
        start = min(max(0, t - 15), run.T - width)  # of a window, which is within the context
        shown.append({
            "label": label,
            "context": context,
            "marked": t,
            "window": [start, start + width],
            # add_effects adds the effects in the window
            "active": {place: [short(whole[place])] for place in np.flatnonzero(whole).tolist()},
        })
    return shown


def add_neighbours(run, features, numbers, active):
    """
    To each of the features, a list of all, that are active here: the nearest of them, and those
    it is active together with. active: (k, N T) of 0 and 1, sparse, of k numbers of features.
    """
    seen = torch.sparse.sum(active, 1).to_dense() > 0
    directions = run.sae.W_dec[numbers].cpu() * seen[:, None]  # of 0: no cosine is over 0
    lists = {"nearest": nearest_features(directions), "together": active_together(active)}
    for name, neighbours in lists.items():
        for k in seen.nonzero().flatten().tolist():
            pairs = [(int(numbers[other]), value) for other, value in neighbours[k]]
            features[numbers[k]][name] = short_pairs(pairs)


def add_map(run, features, numbers, density):
    """To those of the features (numbers) that are not dead: their places in the map, 0 to 1."""
    alive = numbers[density[numbers] > 0]
    if len(alive) == 0:
        return
    places = tsne(run.sae.W_dec[alive])
    low, high = places.aminmax(dim=0)
    places = 0.5 + (places - (low + high) / 2) / (high - low).max().clip(1e-30)
    for i, place in zip(alive.tolist(), places.tolist()):
        features[i]["map"] = [short(x) for x in place]


def training_curves(run):
    """At most 200 lines of the training log, in columns; nothing where there is no log."""
    curves = {}
    for name, column in read_log(run.folder).items():
        stride = len(column) // 200 + 1
        thinned = column[::-stride][::-1]  # with the last line
        curves[name] = [short(value) for value in thinned]
    return curves


def describe_features(run, numbers, density):
    """
    Features (ascending numbers) as the page wants them, a list of all with None for the others.
    density: (m,), that of count_active, as the contexts are too few to tell what is dead or of
    ultra-low density.
    """
    neurons = unit_columns(run.neurons())  # (N T, n_neurons)
    features = [None] * run.n_features
    active = []
    parts = [numbers[block] for block in blocks(len(numbers))]
    for block in tracked("describing", parts, "features"):
        acts = run.activations(block)
        active.append(torch.from_numpy(acts > 0).to_sparse())
        highest = closest(acts, neurons)
        explained = explained_by_tokens(run, acts)
        nearby = related(run, block, acts.max(1), 8)
        for k, i in enumerate(block.tolist()):
            features[i] = {"density": short(density[i])}
            if not acts[k].any():
                continue
            by_token, by_pair = explained[k]
            raised, lowered, nearest = nearby[k]
            features[i] |= {
                "max": short(acts[k].max()),
                "histogram": histogram(acts[k]),
                "examples": page_examples(run, i, acts[k]),
                "explained": short(by_pair),
                "explained_by_token": short(by_token),
                "motif": motif(by_token, by_pair),
                "neuron_correlation": short(highest[k]),
                "raised": short_pairs(raised),
                "lowered": short_pairs(lowered),
                "neurons": short_pairs(nearest),
            }
    add_neighbours(run, features, numbers, torch.cat(active).float())
    return features


def ablated_streams(run, stream, x, numbers, rows, t):
    """
    What reaches the unembedding at places t (w, width) when each of some features (w numbers) is
    ablated on a whole context, which is row rows[k] of the residual stream (b, T, n_embd) and the
    activations x (b, T, n) at the site -> (w, width, n_embd).
    """
    hook = clamp(run, numbers, 0.0)  # its own in each context
    if run.in_last_layer:  # nothing that follows looks at another token
        rows = rows[:, None]
        return run.gpt.after(run.site, stream[rows, t], hook(run.site, x[rows, t]))
    changed = run.gpt.after(run.site, stream[rows], hook(run.site, x[rows]))  # (w, T, n_embd)
    return changed.take_along_dim(t[:, :, None], 1)


def log_probabilities(run, stream, tokens):
    """Of tokens (k,) after what reaches the unembedding, stream (k, n_embd) -> (k,)."""
    return run.gpt.lm_head(stream).log_softmax(1).gather(1, tokens[:, None])[:, 0]


def add_effects(run, features):
    """
    Adds to the activations in each example's window how the next token's log-probability
    changes when the feature is ablated on the whole context (Bricken et al., feature browser).
    """
    by_context = defaultdict(list)  # [(number of the feature, example)]
    for i, feature in enumerate(features):
        for example in (feature or {}).get("examples", []):
            by_context[example["context"]].append((i, example))
    n_before = 0  # contexts of the batches before this one
    for batch in run.batches("ablating", run.contexts):
        stream, x = run.gpt.before(batch[:, :-1], run.site)
        plain = run.gpt.after(run.site, stream, x)  # (b, T, n_embd)
        own = []
        for k in range(len(batch)):
            own += by_context[n_before + k]
        for first in range(0, len(own), 256):
            numbers, shown = zip(*own[first:first + 256])
            rows = torch.tensor([example["context"] - n_before for example in shown])
            t = torch.tensor([range(*example["window"]) for example in shown])  # (w, width)
            rows, t = rows.to(run.device), t.to(run.device)
            ablated = ablated_streams(run, stream, x, numbers, rows, t)

            # of the tokens alone where the feature is active
            entries = []  # (which example, place in the context)
            for k, example in enumerate(shown):
                start, end = example["window"]
                entries += [(k, place) for place in example["active"] if start <= place < end]
            which, place = torch.tensor(entries, device=run.device).t()
            rows, in_window = rows[which], place - t[which, 0]
            following = batch[rows, place + 1]
            with_it = log_probabilities(run, plain[rows, place], following)
            without = log_probabilities(run, ablated[which, in_window], following)
            for (k, place), change in zip(entries, (without - with_it).tolist()):
                shown[k]["active"][place].append(short(change))
        n_before += len(batch)


def example_texts(run):
    """Eight contexts from all of the text, each token with its active features, largest first."""
    texts = []
    chosen = np.unique(np.linspace(0, len(run.contexts) - 1, 8).astype(int))
    for k in chosen.tolist():
        f = run.sae.encode(run.x()[k * run.T:(k + 1) * run.T])  # (T, m)
        active = []  # for each token [feature, activation] of the active ones
        for row in f.cpu():
            largest = row.topk((row > 0).sum())
            pairs = zip(largest.indices.tolist(), largest.values.tolist())
            active.append(short_pairs(pairs))
        texts.append({"tokens": run.contexts[k, :-1].tolist(), "active": active})
    return texts


def write_page(run, headline, rows, density, numbers):
    """
    features.html, one file: features (ascending numbers), all or some, each with its density, of
    all (m,), and its examples, and some held-out texts with every token's features.
    """
    if len(numbers) < run.n_features:
        rows = rows + [("on this page", f"{len(numbers):,}", most_energetic(run))]
    features = describe_features(run, numbers, density)
    add_effects(run, features)
    add_map(run, features, numbers, density)
    data = {
        "title": headline,
        "summary": rows,
        "ultra_low": ULTRA_LOW,
        "training": training_curves(run),
        "contexts": run.contexts[:, :-1].tolist(),
        "vocabulary": [token_text(run, token) for token in range(run.tokenizer.n_vocab)],
        "features": features,
        "texts": example_texts(run),
    }
    page = fill_page(data).encode(errors="backslashreplace")  # a folder's name may be no UTF-8
    write_atomic(os.path.join(run.folder, "features.html"), lambda file: file.write(page))


# -----------------------------------------------------------------------------
# the commands


@dataclass(frozen=True)
class Command:
    """What a command is and what it needs."""
    show: Callable             # (run, args): computes, prints, draws and saves
    kinds: tuple = ("model",)  # which activations it can do with: see Run.kind
    logs_only: bool = False    # whether it needs no activations
    takes: str = ""            # what stands after it: "number", "texts", "names" or nothing
    several: bool = False      # whether it takes --names


# To add a command, append a line: no other line depends on how many there are, or on their order.
# `Run.by_blocks` yields what all features do; position p of it is token p % T of context p // T.
# `snippet` shows a position, `figure` draws, `save` writes.
COMMANDS = {
    "report": Command(show_report, kinds=("model", "own")),
    "feature": Command(show_feature, kinds=("model", "own"), takes="number"),
    "toy": Command(show_toy, kinds=("toy",)),
    "cause": Command(show_cause),
    "steer": Command(show_steer),
    "search": Command(show_search, takes="texts"),
    "neurons": Command(show_neurons, kinds=("model", "own")),
    "explain": Command(show_explain),
    "complete": Command(show_complete, several=True),
    "scaling": Command(show_scaling, ("model", "own", "toy"), logs_only=True, several=True),
    "compare": Command(show_compare, kinds=("model", "own"), takes="names"),
    "study": Command(show_study, takes="number"),
    "frontier": Command(show_frontier, several=True),
    "automata": Command(show_automata),
}


def check_arguments(args, command):
    """UserError where what stands after the command, or --names, is not what it takes."""
    example = f"as in: python analyze.py {args.command}"
    n_arguments = len(args.arguments)
    if n_arguments and not command.takes:
        raise UserError(
            f"{args.command} takes flags only, not {args.arguments[0]!r} (--help lists them)")
    if command.takes == "number" and n_arguments != 1:
        raise UserError(f"{args.command} takes one number of a feature, {example} 120")
    if command.takes == "texts" and not n_arguments:
        raise UserError(f'{args.command} takes texts, {example} "import numpy"')
    if command.takes == "names" and (n_arguments != 2 or "" in args.arguments):
        raise UserError(
            f"{args.command} takes two names, or folders such as other_out/sae/small, "
            f"{example} small large"
        )
    if args.names and not command.several:
        able = [name for name, other in COMMANDS.items() if other.several]
        raise UserError(
            f"--names is for {', '.join(able)}: leave it out of {args.command}, "
            "or choose one run with --name"
        )


def main():
    args = parse_args()
    command = COMMANDS[args.command]
    check_arguments(args, command)
    # the first name is the run that is analyzed; its folder takes what is written
    names = args.arguments if command.takes == "names" else args.names.split(",")
    args.names = [name for name in names if name] or [args.name]

    args.compile = "no"  # nothing is trained here: there is nothing to compile
    machine = setup(args, precision="highest")  # TF32 is for training: effects can be small
    loaded = load_run(args, machine.device, args.names[0])
    if loaded.kind not in command.kinds:
        able = [name for name, other in COMMANDS.items() if loaded.kind in other.kinds]
        raise UserError(
            f"{args.command} is not for {loaded.site} activations, on which {loaded.folder} "
            f"is judged: choose from {', '.join(able)}"
        )
    with torch.no_grad():
        command.show(loaded, args)


if __name__ == "__main__":
    run_script(main)
