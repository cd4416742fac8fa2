"""
A sparse autoencoder -> numbers, plots, a page to browse, and what the papers do with the features.

    python analyze.py                                 # report on out/sae/scaling: metrics, features, features.html
    python analyze.py feature 1407                    # one feature in full
    python analyze.py cause --prompt="def __init__("  # which features cause the next token: ablation and attribution
    python analyze.py steer --feature=304             # text written with a feature clamped to multiples of its maximum
    python analyze.py search "import numpy as" --without "import os"
    python analyze.py neurons                         # do features differ from neurons, and are they more explainable?
    python analyze.py complete --names=small,large    # which words have a feature of their own?
    python analyze.py scaling --names=a,b,c           # loss against compute, from the logs of many runs
    python analyze.py compare small large             # splitting; with a folder of another model, universality
    python analyze.py toy --name=toy                  # after train_sae.py --acts=toy: how many directions were found

Everything is measured on held-out tokens (val.bin). Numbers and plots go to out_dir/sae/<name>/.
"""
import json
import math
import os
import re
import shutil
from bisect import bisect
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from model import (BLUE, RED, UserError, at_least, figure, load_gpt, load_tokens, make_parser, reading, run, save_json,
                   setup, tracked, write_atomic)
from sae import ActivationStore, load_sae

ULTRA_LOW = 1e-5  # density that sets apart the "ultra-low density cluster" of Towards Monosemanticity


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("command", nargs="?", default="report", choices=list(COMMANDS), help="what to do")
    parser.add_argument("arguments", nargs="*", help="feature: number; search: texts; compare: two names or folders")
    group = parser.add_argument_group("analysis")
    group.add_argument("--name", default="scaling", help="folder under out_dir/sae")
    group.add_argument("--names", default="", help="complete, scaling: several names, with commas between")
    group.add_argument("--eval_tokens", type=at_least(1), default=2**18, help="report: held-out tokens of its metrics")
    group.add_argument("--read_tokens", type=at_least(1), default=2**17,
                       help="held-out tokens whose activations are kept in memory, for examples and all other analyses")
    group.add_argument("--show", type=at_least(1), default=10, help="how many features to print (report: of each kind)")
    group.add_argument("--prompt", default="", help="cause, steer: text to start from")
    group.add_argument("--target", default="", help="cause: token to explain; default: the most likely one")
    group.add_argument("--feature", default="", help="steer: which feature")
    group.add_argument("--value", default="-2,0,1,2,4",
                       help="steer: clamp to these multiples of its maximum, as --value=-2,0,1")
    group.add_argument("--without", nargs="*", default=[], help="search: texts that lack the concept")
    group.add_argument("--words", default="",
                       help="complete: file of words (ASCII letters); default: words of the held-out text")
    return parser.parse_args()


# -----------------------------------------------------------------------------
# loading

def folder_of(args, name):
    """A name under out_dir/sae, or a folder such as other_out/sae/scaling -> folder."""
    return os.path.normpath(name if os.path.dirname(name) else os.path.join(args.out_dir, "sae", name))


def load_run(args, device, name):
    """
    -> namespace of what an analysis needs: folder, sae (folded), recipe, site, source, held_out (contexts (N, T + 1) of
    token ids, or rows of one's own activations), and for activations of a model gpt, tokenizer, contexts for all other
    analyses and their tokens (N T,).
    """
    folder = folder_of(args, name)
    sae = load_sae(os.path.join(folder, "sae.pt"), device)
    if "source" not in sae.extra:
        raise UserError(f"{folder}/sae.pt does not say what it was trained on: only train_sae.py's can be analyzed")
    source = sae.extra["source"]
    this = SimpleNamespace(folder=folder, sae=sae.fold().requires_grad_(False), recipe=sae.recipe, gpt=None,
                           site=source["site"], source=source, cache={})
    if this.site == "own" and args.command == "report":
        store = ActivationStore(source["acts"], sae.extra["args"]["seed"], (0.95, 1))
        this.held_out = store.sample(args.eval_tokens, args.seed)
    if this.site in ("own", "toy"):
        return this
    out_dir = os.path.dirname(os.path.dirname(os.path.abspath(folder)))
    this.gpt, this.tokenizer = load_gpt(out_dir, device)
    if this.gpt.fingerprint() != source["gpt"]:
        raise UserError(f"{folder}/sae.pt was trained on another gpt.pt than {out_dir} has now: run train_sae.py again")
    T = this.gpt.config.block_size
    tokens = torch.from_numpy(load_tokens(out_dir, "val", this.gpt.config).astype(np.int64))
    contexts = tokens.unfold(0, T + 1, T)                       # the last token of each is a target only

    def spread(n_tokens):  # contexts from all of the held-out text
        n = min(len(contexts), max(1, n_tokens // T))
        return contexts[torch.arange(n) * len(contexts) // n]
    this.held_out, this.contexts = spread(args.eval_tokens), spread(args.read_tokens)
    this.tokens = this.contexts[:, :-1].reshape(-1).numpy()
    return this


def known(this, text):
    """Text -> number of a feature, or a UserError when there is none."""
    if not (text.isdecimal() and int(text) < this.sae.n_features):
        raise UserError(f"give the number of a feature of {this.folder}, 0 to {this.sae.n_features - 1}, not {text!r}")
    return int(text)


def all_dead(this):
    return UserError(f"{this.folder}: every feature is dead on these tokens")


# -----------------------------------------------------------------------------
# measuring: one stream over the held-out tokens, sums kept, nothing of size (tokens x features)

def batches(this, label, what):
    """Yields contexts (b, T + 1), or rows, some 4,096 tokens of them at a time, and prints progress."""
    size = max(1, 4096 // (what.shape[1] - 1)) if this.gpt else 4096
    for some in tracked(label, what.split(size), "contexts" if this.gpt else "rows"):
        yield some.to(this.sae.W_dec.device)


def measure(this):
    """
    -> metrics (plain numbers), and per feature: density (share of tokens it is active on), energy (mean square).

    variance explained = 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2; loss recovered = (zero - spliced) / (zero -
    plain), the model's loss as it is, with x_hat, and with 0 in the place of x at the same site (Towards
    Monosemanticity, "How much of the model does our interpretation explain?").
    """
    sae, sums, losses = this.sae, [], Counter()
    n = len(this.held_out) * (this.held_out.shape[1] - 1 if this.gpt else 1)
    mean = read(this).mean(0).to(sae.W_dec) if this.gpt else None
    for some in batches(this, "measuring", this.held_out):
        def loss(name, hook):
            value = this.gpt(some[:, :-1], some[:, 1:], hook)[1].item()
            losses[f"loss_{name}"] += value * len(some) / len(this.held_out)
        kept = {}
        if this.gpt:
            loss("plain", lambda site, x: kept.update({site: x}))
        x = kept[this.site] if this.gpt else some.float()
        f = sae.encode(x)
        x_hat = sae.decode(f, sae.input_scale(x))
        parts = (f > 0, f.square(), x, x.square(), (x_hat - x).square())
        sums.append([part.flatten(0, -2).sum(0).cpu().double() for part in parts])
        if this.gpt:  # the model's loss with something in the place of x
            zeros = torch.zeros_like(x)
            for name, put in (("spliced", x_hat), ("mean_ablated", mean.expand_as(x)), ("zero_ablated", zeros)):
                loss(name, lambda site, _: put if site == this.site else None)
    density, energy, center, square, error = (torch.stack(parts).sum(0).numpy() / n for parts in zip(*sums))
    metrics = {"tokens": n, "l0": density.sum(), "variance_explained": 1 - error.sum() / (square - center**2).sum(),
               "n_features": sae.n_features, "dead": (density == 0).mean(),
               "ultra_low": ((density > 0) & (density < ULTRA_LOW)).mean(), **losses}
    if this.gpt:
        zero = metrics["loss_zero_ablated"]
        metrics["loss_recovered"] = (zero - metrics["loss_spliced"]) / (zero - metrics["loss_plain"])
    return metrics, SimpleNamespace(density=density, energy=energy)


def read(this, site=None):
    """Activations x (tokens, n) of this.contexts at a site (default: the autoencoder's), kept in memory."""
    site = site or this.site
    if site not in this.cache:
        parts = batches(this, f"reading {site}", this.contexts)
        this.cache[site] = torch.cat([this.gpt.activations(some[:, :-1], site).flatten(0, 1).cpu() for some in parts])
    return this.cache[site]


def activations_of(this, features):
    """Activations of some features on every held-out token -> (len(features), tokens) float32."""
    x, W, b = read(this), this.sae.W_enc[:, features].cpu(), this.sae.b_enc[features].cpu()
    if this.sae.input_norm == "token":
        x = x * this.sae.input_scale(x)
    return torch.addmm(b[:, None], W.t(), x.t()).relu_().numpy()


def blocks(n, size=256):
    """0 .. n in blocks, so that activations of a block of features on all tokens fit into memory."""
    return [np.arange(i, min(i + size, n)) for i in range(0, n, size)]


def logit_effects(this, directions):
    """
    What directions (k, n) at the site do to the logits (k, vocab_size) per unit of activation, about their mean over
    the vocabulary: through the site's output matrix and along the residual stream to the last LayerNorm, which is taken
    as linear (centred, its gain, the mean 1 / sigma of held-out tokens; not applied to the bare direction), then
    through the unembedding (Towards Monosemanticity, logit weights). What else reads the stream in between (later
    blocks, for attn this block's MLP) is passed by.
    """
    kind, layer = this.site.split(".")
    if kind == "mlp":
        directions = directions @ this.gpt.blocks[int(layer)].mlp_proj.weight.t()       # (k, n_embd)
    centred = directions - directions.mean(1, keepdim=True)
    if "inverse_sigma" not in this.cache:
        stream = read(this, f"resid.{this.gpt.config.n_layer - 1}")
        this.cache["inverse_sigma"] = (stream.var(1, correction=0) + this.gpt.ln_f.eps).rsqrt().mean().item()
    logits = this.gpt.lm_head(centred * this.gpt.ln_f.weight * this.cache["inverse_sigma"])
    return logits - logits.mean(1, keepdim=True)


def neuron_activations(this):
    """Activations of the layer's MLP neurons on every held-out token -> (n_neurons, tokens) float32."""
    return read(this, "mlp." + this.site.split(".")[1]).t().contiguous().numpy()


def unit_rows(a):
    """Rows of a (k, tokens) about their means and of unit norm: products of two such rows are Pearson correlations."""
    a = a - a.mean(1, keepdims=True)
    return a / np.linalg.norm(a, axis=1, keepdims=True).clip(1e-15)


def highest_correlations(this, others):
    """-> numbers of the alive features, their highest correlations with any of others (unit_rows), densities."""
    best, density = np.zeros(this.sae.n_features), np.zeros(this.sae.n_features)
    for block in tracked("correlating", blocks(len(best)), "features"):
        acts = activations_of(this, block)
        best[block], density[block] = (unit_rows(acts) @ others.T).max(1), (acts > 0).mean(1)
    alive = np.flatnonzero(density)
    if not len(alive):
        raise all_dead(this)
    return alive, best[alive], density[alive]


def explained_by_tokens(this, acts):
    """
    How well an activation is predicted by its mean given the current token, and given the previous and the current
    token -> R^2 (k, 2) of acts (k, tokens). Means are learned on every other context and judged on the rest; what was
    not seen falls back to the coarser mean. High: "fires on this token (after that one)" says it all. It says nothing
    of what a feature does, and a feature of a topic, which no one or two tokens show, scores low though it is clear.
    """
    T, V = this.contexts.shape[1] - 1, this.tokenizer.n_vocab
    tokens = this.tokens.reshape(-1, T)
    previous = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=V)                    # V: nothing comes before
    pairs, group = np.unique(previous * V + tokens, return_inverse=True)
    learn, judge = (group.reshape(-1, T)[k::2].ravel() for k in (0, 1))
    counts, token_of, scores = np.bincount(learn, minlength=len(pairs)), pairs % V, []    # sums over pairs do it all
    token_counts = np.bincount(token_of, counts, V)
    for row in acts.reshape(len(acts), -1, T):
        learned, truth = row[::2].ravel(), row[1::2].ravel().astype(np.float64)
        sums = np.bincount(learn, learned, len(pairs))
        token_means = np.bincount(token_of, sums, V) / token_counts.clip(1)
        by_token = np.where(token_counts > 0, token_means, learned.mean())[token_of]
        by_pair = np.where(counts > 0, sums / counts.clip(1), by_token)
        total = np.square(truth - truth.sum() / max(1, len(truth))).sum()
        errors = [np.square(truth - guess[judge]).sum() for guess in (by_token, by_pair)]
        scores.append(1 - np.array(errors) / (total or np.nan))                               # NaN: never active there
    return np.array(scores)


# -----------------------------------------------------------------------------
# showing

def token_text(this, *tokens):
    """Tokens as one printable line: ⏎ and ⇥ for white space, · for other control characters, � for parts of one."""
    text = this.tokenizer.decode([int(token) for token in tokens]).replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "·" for c in text)


def snippet(this, position, width):
    """The held-out token at `position` (counted through all contexts), «marked», within its context."""
    T = this.contexts.shape[1] - 1
    context, t = this.contexts[position // T], position % T
    left, token, right = (token_text(this, *some) for some in (context[:t], context[t:t + 1], context[t + 1:-1]))
    room = max(10, width - len(token))
    return f"{left[-(room * 2 // 3):].rjust(room * 2 // 3)}«{token}»{right[:room // 3]}"


def title(this, i, acts):
    """One line on what feature i, with activations acts (tokens,), is about."""
    on = np.flatnonzero(acts)
    if not len(on):
        return f"feature {i}  not active on any of {len(acts):,} held-out tokens"
    best = on[np.argsort(-acts[on], kind="stable")[:50]]
    token, n = Counter(this.tokens[best].tolist()).most_common(1)[0]
    counts = histogram(acts)
    bars = (" ▁▂▃▄▅▆▇█"[math.ceil(8 * math.sqrt(count / max(counts)))] for count in counts)  # a root, so that few show
    return (f"feature {i}  density {len(on) / len(acts):.2%}  max {acts.max():.2f}  '{token_text(this, token)}' at {n} "
            f"of its top {len(best)}  {''.join(bars)}")


def histogram(acts):
    """Counts of activations in 24 bins from 0, those of 0 left out, to the largest."""
    return np.histogram(acts[acts > 0], bins=24, range=(0, acts.max()))[0].tolist()


def examples(this, acts, n_top, n_intervals, each, rng):
    """
    Where a feature is active: positions of its n_top largest activations, each with another text around it, and of
    `each` random ones from n_intervals evenly spaced intervals of its activation, the highest first (Towards
    Monosemanticity, feature browser). acts: (tokens,) -> list of (label, position)
    """
    on, top, edges = np.flatnonzero(acts), {}, np.linspace(0, acts.max(), n_intervals + 1)
    for position in on[np.argsort(-acts[on], kind="stable")][:200].tolist():  # one of those with the same tokens around
        top.setdefault(this.tokens[max(0, position - 4):position + 2].tobytes(), ("top", position))
    chosen = list(top.values())[:n_top]
    for k in reversed(range(n_intervals)):
        inside = np.setdiff1d(on[(acts[on] > edges[k]) & (acts[on] <= edges[k + 1])], [place for _, place in chosen])
        chosen += [(f"{100 * k // n_intervals}-{100 * (k + 1) // n_intervals}%", int(position))
                   for position in rng.permutation(inside)[:each]]
    return chosen


def related(this, i, largest, n):
    """-> [(id, value)] of tokens that feature i at its largest activation raises, lowers; of its nearest neurons."""
    (kind, layer), direction = this.site.split("."), this.sae.W_dec[i]
    effects, cosines = logit_effects(this, direction[None])[0] * largest, direction     # at mlp neurons are the axes
    if kind != "mlp":                                                                   # else what they write there
        cosines = direction @ F.normalize(this.gpt.blocks[int(layer)].mlp_proj.weight, dim=0)
    kinds = ((effects, effects), (effects, -effects), (cosines, cosines.abs()))
    return [[(j, values[j].item()) for j in by.topk(min(n, len(by))).indices.tolist()] for values, by in kinds]


def print_feature(this, i, acts, n_top=5, n_intervals=4, each=1, n_tokens=8, note=""):
    """Prints feature i: density, histogram, examples, tokens raised and lowered, nearest neurons. acts: (tokens,)"""
    print(f"\n{title(this, i, acts)}{note}")
    if not acts.any():
        return
    width, previous = min(160, shutil.get_terminal_size((120, 24)).columns) - 22, ""
    for label, position in examples(this, acts, n_top, n_intervals, each, np.random.default_rng(i)):
        print(f"  {label if label != previous else '':>8} {acts[position]:8.2f}  {snippet(this, position, width)}")
        previous = label
    *tokens, neurons = related(this, i, acts.max().item(), n_tokens)
    for label, some in zip(("raises", "lowers"), tokens):
        print(f"  {label:>8}  " + "  ".join(f"{token_text(this, t)!r} {effect:+.1f}" for t, effect in some))
    print(f"  {'neurons':>8}  " + "  ".join(f"{n} {cosine:+.2f}" for n, cosine in neurons))


def save(this, name, **numbers):
    """Writes a command's numbers to the autoencoder's folder, beside its plot if it has one."""
    save_json(os.path.join(this.folder, f"{name}.json"), numbers)
    print(f"wrote {name}.* to {this.folder}")


def read_log(folder):
    path = os.path.join(folder, "log.jsonl")
    with reading(path, f"run python train_sae.py --name={os.path.basename(folder)}"), open(path, encoding="utf-8") as f:
        log = [json.loads(line) for line in f]
        return {key: np.array([row[key] for row in log], float)
                for key in ("step", "rows", "mse", "l1", "l0", "dead", "variance_explained")}


# -----------------------------------------------------------------------------
# commands: report, feature, toy

def report(this, args):
    """Metrics, their plots, the most important features and some drawn at random, and the page."""
    metrics, features = measure(this)
    m, alive = metrics["n_features"], features.density[features.density > 0]
    headline = f"{os.path.basename(this.folder)} · {this.recipe} recipe · {this.site} · {m:,} features"
    rows = [("L0", f"{metrics['l0']:.1f}", "active features a token"),
            ("variance explained", f"{metrics['variance_explained']:.3f}", "about the mean"),
            ("dead", f"{metrics['dead']:.2%}", f"{m - len(alive):,} of {m:,} never active here"),
            ("ultra-low density", f"{metrics['ultra_low']:.2%}", f"on at fewer than 1 in {1 / ULTRA_LOW:,.0f} tokens")]
    if this.gpt:
        rows += [("loss", f"{metrics['loss_plain']:.3f}", f"spliced {metrics['loss_spliced']:.3f}, mean-ablated "
                  f"{metrics['loss_mean_ablated']:.3f}, zero-ablated {metrics['loss_zero_ablated']:.3f} nats a token"),
                 ("loss recovered", f"{metrics['loss_recovered']:.3f}", "of what zero-ablation costs")]
    print(f"\n{headline}, on {metrics['tokens']:,} held-out {'tokens' if this.gpt else 'rows'}")
    for name, value, note in rows:
        print(f"  {name:<20}{value:>9}   {note}")
    with figure(os.path.join(this.folder, "density.png")) as ax:
        bins = np.linspace(min(math.log10(ULTRA_LOW) - 0.5, np.log10(alive.min(initial=1)) - 0.1), 0, 60)
        for which, colour, label in ((alive >= ULTRA_LOW, BLUE, "alive"), (alive < ULTRA_LOW, RED, "ultra-low")):
            ax.hist(np.log10(alive[which]), bins=bins, color=colour, label=f"{label}: {which.sum():,}")
        ax.axvline(math.log10(ULTRA_LOW), color=RED, lw=1, ls=":")
        ax.plot([], [], " ", label=f"dead: {m - len(alive):,}")
        ax.set(xlabel=f"log10 of feature density on {metrics['tokens']:,} held-out tokens", ylabel="features")
    log = read_log(this.folder)
    with figure(os.path.join(this.folder, "training.png"), panels=3, width=9, height=2.8) as axes:
        for ax, key in zip(axes, ("variance_explained", "l0", "dead")):
            ax.plot(log["step"], log[key], color=BLUE)
            ax.set(xlabel="step", title=key.replace("_", " "), yscale="log" if key == "l0" else "linear")
    if this.gpt:
        best = np.argsort(-features.energy, kind="stable")[:args.show]
        drawn = np.random.default_rng(args.seed).permutation(np.flatnonzero(features.density > 0))[:args.show]
        for heading, numbers in (("that carry most of the reconstruction", best), ("drawn at random", drawn)):
            print("\n" + f" features {heading} ".center(100, "─"))
            for i, acts in zip(numbers.tolist(), activations_of(this, numbers)):
                print_feature(this, i, acts)
        print()
        write_page(this, headline, rows)
        print(f"wrote {os.path.join(this.folder, 'features.html')}: open it in a browser")
    save(this, "metrics", **metrics)


def feature(this, args):
    """One feature in full."""
    i = known(this, " ".join(args.arguments))
    print_feature(this, i, activations_of(this, [i])[0], n_top=20, n_intervals=10, each=3, n_tokens=12)


def toy(this, args):
    """How many true directions have a feature of their own: the highest cosine with any decoder row is over 0.9."""
    cosines = (this.source["truth"].to(this.sae.W_dec) @ this.sae.W_dec.t()).amax(1).cpu().numpy()
    found = cosines > 0.9
    print(f"{found.sum()} of {len(found)} true directions found ({found.mean():.1%}): cosine with a feature over 0.9; "
          f"mean of the highest cosines {cosines.mean():.3f}")
    for name, part in zip(("most frequent", "frequent", "rare", "rarest"), np.array_split(found, 4)):
        print(f"  {name:>14} quarter  {part.mean():7.1%}")
    save(this, "metrics", true_directions=len(found), found=float(found.mean()), mean_max_cosine=float(cosines.mean()))


# -----------------------------------------------------------------------------
# commands: cause, steer, search

def encode_text(this, text):
    """Text -> token ids (1, T); UserError when it is empty or longer than a context."""
    ids = this.tokenizer.encode_ordinary(text)
    if not 0 < len(ids) <= this.gpt.config.block_size:
        raise UserError(f"{text[:40]!r} has {len(ids)} tokens: give 1 to {this.gpt.config.block_size}")
    return torch.tensor([ids], device=this.sae.W_dec.device)


def logits_at(this, idx, p, x=None):
    """Logits (b, vocab_size) at token p[b] of each context idx[b] (b, T), with x (b, T, n), if given, at the site."""
    stream = this.gpt.trunk(idx, lambda site, _: x if site == this.site else None)
    return this.gpt.lm_head(stream[torch.arange(len(idx), device=idx.device), p])


def effects(this, idx, p, targets):
    """
    What each feature that is active at token p[b] of context idx[b] (b, T) does there to the logit of targets[b],
    measured against the mean logit (Towards Monosemanticity, Scaling Monosemanticity: ablations and attributions).
    ablation: that logit minus the logit without the feature, f_i W_dec_i subtracted from x. attribution: its
    first-order estimate f_i W_dec_i . gradient; one backward pass serves all features.
    -> namespace of arrays (k,): row, feature, activation, attribution, ablation
    """
    rows, x = torch.arange(len(idx), device=idx.device), this.gpt.activations(idx, this.site)

    def contrast(r, x):  # of contexts r with x at the site: the target's logit, about the mean
        logits = logits_at(this, idx[r], p[r], x)
        return logits.gather(1, targets[r, None])[:, 0] - logits.mean(1)
    with torch.enable_grad():
        before = contrast(rows, x.requires_grad_())
        gradient, = torch.autograd.grad(before.sum(), x)
    x, before = x.detach(), before.detach()
    f, scale = this.sae.encode(x[rows, p]), this.sae.input_scale(x[rows, p])                  # (b, m), (b, 1)
    row, feature = f.nonzero(as_tuple=True)
    part = f[row, feature, None] * this.sae.W_dec[feature] / scale[row]                       # (k, n), in raw units
    ablation = torch.zeros(len(row), device=idx.device)
    for k in tracked("ablating", blocks(len(row)), "features"):
        r, changed = row[k], x[row[k]]                                                        # a copy
        changed[torch.arange(len(k)), p[r]] -= part[k]
        ablation[k] = before[r] - contrast(r, changed)
    arrays = {"row": row, "feature": feature, "activation": f[row, feature], "ablation": ablation,
              "attribution": (part * gradient[rows, p][row]).sum(1)}
    return SimpleNamespace(**{name: value.cpu().numpy() for name, value in arrays.items()})


def cause(this, args, n_tokens=400):
    """Attribution and ablation of the features behind one prediction, and how well one stands for the other."""
    if args.prompt:
        idx = encode_text(this, args.prompt)
        p = torch.tensor([idx.shape[1] - 1], device=idx.device)
        probs = logits_at(this, idx, p).softmax(1)[0]
        target = encode_text(this, args.target)[0, :1] if args.target else probs.argmax(keepdim=True)
        e = effects(this, idx, p, target)
        print(f"after {args.prompt!r}: {token_text(this, target)!r} with probability {probs[target].item():.3f}\n"
              + ("its logit, by feature: activation, attribution, ablation" if len(e.row) else "no feature is active"))
        top = np.argsort(-np.abs(e.ablation))[:args.show]
        for k, acts in zip(top, activations_of(this, e.feature[top])):
            print(f"  {e.activation[k]:6.2f}  {e.attribution[k]:+7.3f}  {e.ablation[k]:+7.3f}  "
                  f"{title(this, int(e.feature[k]), acts)}")
        return
    rng = np.random.default_rng(args.seed)
    contexts = this.contexts[rng.integers(0, len(this.contexts), n_tokens)].to(this.sae.W_dec.device)
    p = torch.from_numpy(rng.integers(0, contexts.shape[1] - 1, n_tokens)).to(contexts.device)
    e = effects(this, contexts[:, :-1], p, contexts.gather(1, p[:, None] + 1)[:, 0])
    if not len(e.row):
        raise all_dead(this)
    numbers = {"tokens": n_tokens, "active_features": len(e.row)}
    with figure(os.path.join(this.folder, "cause.png"), panels=2, width=8) as axes:
        for ax, name in zip(axes, ("attribution", "activation")):
            values = getattr(e, name)
            ranks = [a.argsort().argsort() for a in (values, e.ablation)]
            pearson, rank = (float(np.corrcoef(*pair)[0, 1]) for pair in ((values, e.ablation), ranks))
            numbers[name] = {"pearson": pearson, "rank": rank}
            print(f"{name:>12} with ablation effect: Pearson {pearson:+.3f}, rank {rank:+.3f}")
            ax.scatter(values, e.ablation, s=4, alpha=0.4, color=BLUE)
            ax.set(xlabel=name, ylabel="ablation effect", title=f"rank correlation {rank:.2f}")
    print(f"{len(e.row):,} active features at {n_tokens} held-out tokens")
    save(this, "cause", **numbers)


def clamp(this, features, value):
    """
    Hook that holds one feature, or features[b] in context b, at `value` on every token and keeps the reconstruction
    error: x + (value - f_i) W_dec_i is SAE(x) with f_i clamped, plus x - SAE(x) (Scaling Monosemanticity, Methods:
    steering). value None: f_i's own. With 0 it is the ablation of Towards Monosemanticity's feature browser.
    """
    encoder, decoder = this.sae.W_enc.t()[features], this.sae.W_dec[features]             # (b, n)

    def hook(site, x):  # (b, T, n)
        if site == this.site:
            scale = this.sae.input_scale(x)
            f = F.relu((x * scale) @ encoder[:, :, None] + this.sae.b_enc[features, None, None])   # (b, T, 1)
            return x + ((f if value is None else value) - f) * decoder[:, None] / scale
    return hook


def steer(this, args):
    """Text with a feature clamped to multiples of its maximum, and how likely the token it raises most becomes."""
    i, device = known(this, args.feature), this.sae.W_dec.device
    try:
        multiples = np.asarray_chkfinite(args.value.split(","), float).tolist()
    except ValueError:
        raise UserError(f"--value takes multiples of the feature's maximum with commas between, not {args.value}")
    acts = activations_of(this, [i])[0]
    print(title(this, i, acts))
    if not acts.any():
        return
    token = logit_effects(this, this.sae.W_dec[i:i + 1]).argmax().item()
    idx = this.contexts[::max(1, len(this.contexts) // 16), :-1].to(device)
    start, clamped = encode_text(this, args.prompt) if args.prompt else idx[:1, :16], []
    for multiple in [None] + multiples:
        hook = None if multiple is None else clamp(this, [i], multiple * acts.max().item())
        probability = this.gpt(idx, hook=hook)[0].softmax(-1)[..., token].mean().item()
        clamped.append({"multiple": multiple, "probability": probability})
        generator = torch.Generator(device).manual_seed(args.seed)
        ids = this.gpt.generate(start, 60, hook=hook, generator=generator)[0, start.shape[1]:]
        name = "unsteered" if multiple is None else f"{multiple:+g} x max"
        print(f"\n{name:>12}  {token_text(this, token)!r} has probability {probability:.4f}\n"
              f"{'':14}{token_text(this, *ids)}")
    save(this, "steer", feature=i, token=token_text(this, token), clamped=clamped)


def search_scores(this, texts, without=()):
    """
    -> scores (m,): a feature's activation on each text's token marked with «...» (else its last), plus its mean over
    the text, averaged over the texts; minus twice the highest it reaches on any text without the concept.
    """
    def activations(text):  # f (T, m), and the place of the token that holds the last marked character
        marked = re.search("«.+?»", text, re.S)
        upto, plain = (re.sub("[«»]", "", part) for part in (text[:marked.end()] if marked else text, text))
        idx = encode_text(this, plain)
        starts = this.tokenizer.decode_with_offsets(idx[0].tolist())[1]                       # in characters
        return this.sae.encode(this.gpt.activations(idx, this.site))[0], bisect(starts, len(upto) - 1) - 1
    found = [f[at] + f.mean(0) for f, at in map(activations, texts)]
    elsewhere = [f.amax(0) for f, _ in map(activations, without)] or [torch.zeros_like(found[0])]
    return (torch.stack(found).mean(0) - 2 * torch.stack(elsewhere).amax(0)).cpu().numpy()


def search(this, args):
    """Features most active on texts with a concept and not on texts without it."""
    if not args.arguments:
        raise UserError('search takes texts, as in: python analyze.py search "import numpy" --without "import os"')
    scores = search_scores(this, args.arguments, args.without)
    hits = [int(i) for i in np.argsort(-scores, kind="stable")[:args.show] if scores[i] > 0]
    if not hits:
        print("no feature is active there" + (" but not on the texts without it" if args.without else ""))
    for i, acts in zip(hits, activations_of(this, hits)):
        print_feature(this, i, acts, n_top=4, n_intervals=0, each=0, note=f"  score {scores[i]:.2f}")
    save(this, "search", texts=args.arguments, without=args.without, hits=[[i, float(scores[i])] for i in hits])


# -----------------------------------------------------------------------------
# commands: neurons, complete, scaling, compare

def neurons(this, args, n_sample=256):
    """
    Do features differ from neurons, and are they more explainable? Each feature's highest Pearson correlation with any
    MLP neuron of the layer (82% had 0.3 or less in Scaling Monosemanticity), and explained_by_tokens for features,
    neurons and random directions, the last two cut by a threshold to the features' median density.
    """
    rng, mlp = np.random.default_rng(args.seed), neuron_activations(this)
    alive, best, density = highest_correlations(this, unit_rows(mlp))
    keep, share = np.median(density), float((best <= 0.3).mean())
    print(f"{share:.1%} of {len(alive):,} alive features have no neuron that they correlate with above 0.3; "
          f"median of the highest correlations {np.median(best):.2f}")

    def cut(acts):  # to the same density
        return np.maximum(acts - np.quantile(acts, 1 - keep, axis=1, keepdims=True), 0)
    directions = rng.standard_normal((this.sae.d_in, n_sample)).astype(np.float32)
    kinds = {"features": activations_of(this, rng.permutation(alive)[:n_sample]), "neurons": cut(mlp[:n_sample]),
             "random directions": cut((read(this).numpy() @ directions).T)}
    scores = {kind: explained_by_tokens(this, acts) for kind, acts in kinds.items()}
    medians = {kind: np.nanmedian(score, axis=0).tolist() for kind, score in scores.items()}
    print(f"\nvariance of the activation that tokens explain (R^2 on other contexts), at density {keep:.2%}: median\n"
          f"{'':24}current token   previous and current")
    for kind, (by_token, by_pair) in medians.items():
        print(f"  {kind:<20}{by_token:15.2f}{by_pair:23.2f}")
    with figure(os.path.join(this.folder, "neurons.png"), panels=2, width=9) as (left, right):
        left.hist(best, bins=40, color=BLUE)
        left.axvline(0.3, color=RED, ls=":")
        left.set(xlabel="highest correlation with a neuron", ylabel="features", title=f"{share:.0%} at 0.3 or less")
        for (kind, score), colour in zip(scores.items(), (BLUE, RED, "#888888")):
            right.plot(np.sort(score[:, 1]), np.linspace(0, 1, len(score)), color=colour, label=kind)
        right.set(xlabel="R^2 given previous and current token", ylabel="cumulative share", xlim=(-0.2, 1))
    save(this, "neurons", share_at_most_03=share, median_correlation=float(np.median(best)), density=float(keep),
         explained=medians)


def word_places(this, path, n=240):
    """
    Words -> positions of their last token in the held-out text (a concept is a word with all its tokens): those of a
    file, or n of the words with 3 or more occurrences, evenly spaced in the log of their rank (ranks come once).
    """
    pieces = [this.tokenizer.decode_single_token_bytes(t) if t != this.tokenizer.eot_token else b"\n"
              for t in this.tokens.tolist()]
    ends, places = np.cumsum([len(piece) for piece in pieces]), defaultdict(list)
    for match in re.finditer(rb"[A-Za-z]{2,}", b"".join(pieces)):
        places[match.group().decode()].append(match.end() - 1)
    if path:
        with open(path, encoding="utf-8", errors="replace") as f:
            wanted = [word for word in f.read().split() if word in places]
    else:
        ranked = sorted((word for word in places if len(places[word]) > 2), key=lambda word: (-len(places[word]), word))
        wanted = [ranked[k] for k in np.unique(np.geomspace(1, len(ranked) + 1, n).astype(int) - 1)[:-1]]
    return {word: np.searchsorted(ends, places[word], side="right") for word in wanted}


def best_detectors(this, places):
    """
    For each word the feature that detects it best -> F1 (words,), feature (words,), number of alive features. A feature
    detects a token when its activation is over 0, 1/4 or 1/2 of its maximum, whichever serves the word best.
    """
    f1, feature, alive = np.zeros(len(places)), np.zeros(len(places), dtype=int), 0
    for block in tracked("looking for words", blocks(this.sae.n_features), "features"):
        acts = activations_of(this, block)
        highest = acts.max(1, keepdims=True)
        alive += int((highest > 0).sum())
        for threshold in (0, 0.25, 0.5):
            fired = acts > threshold * highest
            n_fired = fired.sum(1)
            for k, positions in enumerate(places.values()):
                scores = 2 * fired[:, positions].sum(1) / (n_fired + len(positions))
                if scores.max() > f1[k]:
                    f1[k], feature[k] = scores.max(), block[scores.argmax()]
    return f1, feature, alive


def sigmoid(x, a, b):
    return 1 / (1 + np.exp(-(a + b * x).clip(-30, 30)))


def fit_sigmoid(x, y, n_iters=50):
    """Logistic regression by Newton's method: y (n,) in {0, 1} -> a, b of P(y = 1) = sigmoid(a + b x)."""
    X, w = np.stack([np.ones_like(x), x], axis=1), np.zeros(2)
    for _ in range(n_iters):
        p = sigmoid(x, *w)
        w = w + np.linalg.solve(X.T @ (X * (p * (1 - p))[:, None]) + 1e-6 * np.eye(2), X.T @ (y - p) - 1e-6 * w)
    return w


def complete(this, args, threshold=0.5):
    """
    Which words have a feature of their own (F1 over the threshold)? The share rises with the word's frequency and with
    the number of alive features: a sigmoid in the log of their product (Scaling Monosemanticity, Feature Completeness).
    """
    results, found, x, places = {}, {}, {}, word_places(this, args.words)
    if not places:
        raise UserError("the held-out text has none of these words" if args.words else "the held-out text is too short")
    frequency = np.array([len(positions) for positions in places.values()]) / len(this.tokens)
    for name in args.names:
        run = load_run(args, this.sae.W_dec.device, name)
        if run.source.get("gpt") != this.source["gpt"]:
            raise UserError(f"{name} was trained on activations of another model than {args.names[0]}")
        run.cache = this.cache  # activations of the same model on the same contexts
        f1, feature, alive = best_detectors(run, places)
        if not alive:
            raise all_dead(run)
        found[name], x[name] = f1 > threshold, np.log10(frequency * alive)
        table = zip(places, frequency.tolist(), feature.tolist(), f1.tolist())
        results[name] = {"alive": alive, "found": float(found[name].mean()),
                         "words": {word: {"frequency": n, "feature": i, "f1": score} for word, n, i, score in table}}
        print(f"{name}: {found[name].mean():.1%} of {len(f1)} words have a feature with F1 over {threshold} "
              f"({alive:,} alive features)")
    a, b = fit_sigmoid(np.concatenate(list(x.values())), np.concatenate(list(found.values())))
    print(f"P(found) = sigmoid({a:.2f} + {b:.2f} log10(frequency x alive features)): 1/2 at {10 ** (-a / b):.2g}")
    last = results[args.names[-1]]["words"]
    print("\n        word  frequency  feature     F1")
    for word in sorted(last, key=lambda word: -last[word]["f1"])[:2 * args.show]:
        print(f"{word:>12}  {last[word]['frequency']:9.5f}  {last[word]['feature']:7}  {last[word]['f1']:5.2f}")
    with figure(os.path.join(this.folder, "complete.png")) as ax:
        groups = np.array_split(frequency.argsort(), min(6, len(frequency)))                  # as many words in each
        middle = [np.exp(np.log(frequency[group]).mean()) for group in groups]
        for name, hit in found.items():
            shares, label = [hit[group].mean() for group in groups], f"{name}: {results[name]['alive']:,} alive"
            line, = ax.plot(middle, shares, "o-", label=label)
            ax.plot(np.sort(frequency), sigmoid(np.sort(x[name]), a, b), ":", color=line.get_color())
        ax.set(xscale="log", xlabel="frequency of the word", ylabel="share with a feature", ylim=(-0.02, 1.02))
    save(this, "complete", threshold=threshold, a=a, b=b, runs=results)


def power_law(x, y):
    """Least squares in logs: y = c x^k -> c, k."""
    k, log_c = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(log_c)), float(k)


def frontier(runs, n_budgets=24):
    """
    The best of many runs for each budget that any of them was at: runs are dicts with compute and loss (arrays along
    the run) -> budgets, index of the run with the lowest loss there, that loss.
    """
    budgets = np.geomspace(min(r["compute"][0] for r in runs), max(r["compute"][-1] for r in runs), n_budgets)
    losses = np.array([np.interp(np.log(budgets), np.log(r["compute"]), r["loss"], left=np.inf, right=np.inf)
                       for r in runs])
    some = np.isfinite(losses).any(0)
    return budgets[some], losses.argmin(0)[some], losses.min(0)[some]


def scaling(this, args):
    """
    Loss against compute from the logs of runs that differ in size, steps or learning rate (Scaling Monosemanticity,
    Scaling Laws). compute = 12 d_in n_features rows: encoder and decoder, two operations per weight and row, and twice
    that for their gradients. loss = mse + lambda l1 with the full lambda from the first step on.
    """
    runs, ends, laws = [], defaultdict(list), {}
    print(f"{'run':>16}  features        lr   compute      loss")
    for name in args.names:
        sae, log = load_sae(os.path.join(folder_of(args, name), "sae.pt")), read_log(folder_of(args, name))
        used, source, m = sae.extra["args"], sae.extra["source"], sae.n_features
        lr, l1_coeff = used["learning_rate"], used["l1_coeff"]
        compute, loss = 12.0 * sae.d_in * m * log["rows"], log["mse"] + l1_coeff * log["l1"]
        same = source.get("gpt"), source["site"], sae.recipe, sae.input_norm, l1_coeff
        runs.append({"same": same, "n_features": m, "compute": compute, "loss": loss})
        ends[f"{compute[-1]:.2g}"].append((loss[-1], lr))
        print(f"{name:>16}  {m:8,}  {lr:8.1e}  {compute[-1]:.2e}  {loss[-1]:8.3f}")
    if len({r["same"] for r in runs}) > 1:
        raise UserError("these runs differ in data, site, recipe, normalisation or lambda: give --names that agree")
    budgets, best, losses = frontier(runs)
    sizes = np.array([runs[k]["n_features"] for k in best])
    if len(runs) > 1 and budgets[-1] > budgets[0]:
        rows = budgets / (12 * sae.d_in * sizes)
        for name, values in (("n_features", sizes), ("steps x batch", rows), ("loss", losses)):
            laws[name] = power_law(budgets, values)
    rates = {float(budget): min(group)[1] for budget, group in ends.items() if len({lr for _, lr in group}) > 1}
    if len(rates) > 1:  # of the runs that end at one budget the one with the lowest loss has the best learning rate
        laws["learning_rate"] = power_law(np.array(list(rates)), np.array(list(rates.values())))
    for name, (c, k) in laws.items():
        print(f"best {name} for a budget C: {c:.3g} x C^{k:+.3f}")
    with figure(os.path.join(this.folder, "scaling.png")) as ax:
        shades = {n: k for k, n in enumerate(sorted({r["n_features"] for r in runs}), 1)}
        for n, k in shades.items():  # the larger the darker
            for r in (r for r in runs if r["n_features"] == n):
                line, = ax.plot(r["compute"], r["loss"], color=BLUE, alpha=k / len(shades), lw=1)
            line.set_label(f"{n:,} features")
        ax.plot(budgets, losses, ":", color=RED, label="frontier")
        ax.set(xscale="log", xlabel="compute (operations)", ylabel="loss")
    save(this, "scaling", laws=laws, budgets=budgets.tolist(), best_sizes=sizes.tolist(), best_losses=losses.tolist())


def compare(this, args):
    """
    Two autoencoders. Of one model: how many features have a counterpart, by cosine, and into what the smaller one's
    features split (Towards Monosemanticity, Feature Splitting). Of two models: each feature's highest activation
    correlation with any of the other's on the same text, beside that of neurons (Universality).
    """
    if len(args.names) != 2:
        raise UserError("compare takes two names, or folders such as other_out/sae/scaling")
    a, b = sorted((this, load_run(args, this.sae.W_dec.device, args.names[1])), key=lambda run: run.sae.n_features)
    if None in (a.gpt, b.gpt) or a.tokens.shape != b.tokens.shape or (a.tokens != b.tokens).any():
        raise UserError("compare needs two autoencoders on models with the same tokenizer and held-out text")
    if a.source["gpt"] == b.source["gpt"] and a.site == b.site:
        b.cache = a.cache  # activations of the same model on the same contexts
        cosines = (a.sae.W_dec @ b.sae.W_dec.t()).cpu().numpy()
        best = cosines.max(1)
        shares = {f"{c}": float((best > c).mean()) for c in (0.5, 0.7, 0.9)}
        print(f"{len(best):,} features of {a.folder} among {cosines.shape[1]:,} of {b.folder}: highest cosine over "
              + ", ".join(f"{c} for {share:.1%}" for c, share in shares.items()) + f"; median {np.median(best):.2f}")
        for i in np.argsort(-(cosines > 0.5).sum(1), kind="stable")[:args.show].tolist():
            print(f"\n{title(a, i, activations_of(a, [i])[0])}")
            near = np.argsort(-cosines[i])[:min(6, max(1, (cosines[i] > 0.5).sum()))]
            for j, acts in zip(near.tolist(), activations_of(b, near)):
                print(f"   {cosines[i, j]:.2f}  {title(b, j, acts)}")
        save(this, "compare", of=[a.folder, b.folder], shares=shares, median=float(np.median(best)))
        return
    for one in (a, b):  # tokens enough for a correlation; the activations of all features on them fit into memory
        one.contexts = one.contexts[:max(1, 2**16 // one.gpt.config.block_size)]
    mlp = neuron_activations(a)
    best = {"features": highest_correlations(a, unit_rows(activations_of(b, slice(None))))[1],
            "neurons": (unit_rows(mlp[mlp.any(1)]) @ unit_rows(neuron_activations(b)).T).max(1)}
    medians = {kind: float(np.median(values)) for kind, values in best.items()}
    print(f"median of the highest correlation with the other model: features {medians['features']:.2f}, "
          f"neurons {medians['neurons']:.2f}")
    with figure(os.path.join(this.folder, "compare.png")) as ax:
        bins, style = np.linspace(0, 1, 41), {"density": True, "histtype": "step"}
        ax.hist(best.values(), bins, color=[BLUE, RED], label=list(best), **style)
        ax.set(xlabel="highest activation correlation across models", ylabel="density")
    save(this, "compare", of=[a.folder, b.folder], medians=medians)


# -----------------------------------------------------------------------------
# the page

PAGE = r"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>features</title>
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --accent: light-dark(#a0480a, #f4a85c); --heat: 240 135 40; scroll-padding-top: 45vh }
body { margin: 0; font: 15px/1.5 system-ui } header { display: flex; gap: 24px; padding: 12px 20px }
header, #head, #active, .bars { border-bottom: 1px solid #8884 } #title { flex: 1; font-weight: 600 }
h2, p { font: 13px/1.5 system-ui; margin: 24px 0 4px; color: light-dark(#666, #aaa) } b + p { margin: 0 }
a, bdi, bdi::after, input, select { color: inherit; text-decoration: none; border: 0; border-radius: 4px }
:is(a, button):hover, [aria-current=true] { color: var(--accent) } button::after { content: attr(data-arrow) }
input, select, bdi, a.row:is(:hover, [aria-current=true]) { background: #8882 }
input, select { font: inherit; height: 34px; margin: 12px 0 12px 20px; padding: 0 8px } select { margin-right: 20px }
aside { display: grid; grid: auto minmax(0, 1fr) / minmax(0, 1fr) auto } nav { grid-column: 1 / 3 }
nav, #active { max-height: 40vh; overflow-y: auto; scroll-padding-top: 27px } main, #active { padding: 0 20px 20px }
#active, #head { position: sticky; top: 0; z-index: 1; background: Canvas } h1 { margin: 0; padding-top: 20px }
button { all: unset; width: 7ch; text-align: end; cursor: pointer; outline: revert } #i { width: 5ch } #d { width: 9ch }
.row, .share, .text { font: 13px/26px ui-monospace, monospace; white-space: pre }
.row, .share { outline-offset: -2px; display: flex; justify-content: space-between; align-items: center; height: 26px }
.row { padding: 0 20px; content-visibility: auto } .row bdi, .share *, #i { margin-right: auto; overflow: hidden }
.share { background: linear-gradient(rgb(var(--heat) / .7) 0 0) no-repeat 0 100% / calc(var(--a) * 100%) 2px }
.panels { display: grid; grid-template-columns: repeat(var(--columns, 2), minmax(0, 1fr)); gap: 0 40px }
.bars { display: flex; align-items: end; height: 208px } i { flex: 1; margin-right: 1px } b { font-size: 20px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0; color: inherit } #texts p { margin: 20px 0 32px }
bdi, .text a { unicode-bidi: isolate; line-height: 20px; padding: 2px 0 } .text bdi { background: none }
bdi[style], i { background: rgb(var(--heat) / calc(.15 + .55 * var(--a))) }
.marked, .text [aria-current=true] { box-shadow: 0 0 0 1.5px } nav::after { content: attr(aria-label); padding: 20px }
[aria-description]:is(:hover, :focus)::after { content: attr(aria-description); background: CanvasText; color: Canvas }
bdi::after { position: fixed; bottom: 20px; left: 20px; width: 230px; padding: 6px 10px; white-space: pre-line }
.texts :is(#browse, #feature), body:not(.texts) :is(#active, #texts) { display: none }
@media (min-width: 900px) { nav, #active { max-height: none } header { grid-column: 1 / 3 }
  body { display: grid; grid: auto minmax(0, 1fr) / 440px minmax(0, 1fr); height: 100dvh; --columns: 4 }
  main { position: relative; overflow-y: auto; padding: 0 40px 40px } .text { margin-right: 200px }
  bdi::after { position: absolute; inset: auto; margin-top: 28px } aside { border-right: 1px solid #8884 } }
</style>
<header><a href="#" id="title"></a><a href="#texts">example texts</a></header><aside id="browse">
  <input id="search" type="search" placeholder="token text" aria-label="only features with this text in a token">
  <select id="kind" aria-label="kind of feature"><option>all<option>alive<option>ultra-low<option>dead</select>
  <nav><div id="head" class="row"><button id="i">no.</button><button id="d">density</button><button id="m">max</button>
    <button id="e">R²</button><button id="n">neuron</button></div><div id="list"></div></nav></aside>
<aside id="active" aria-live="polite"></aside><main><div id="feature"></div><div id="texts"></div></main>
<script type="application/json" id="data">__DATA__</script>
<script>
const $ = id => document.getElementById(id), D = JSON.parse($("data").textContent);
const number = x => x < 999 ? x.toPrecision(3) : x.toFixed(), fixed = x => x?.toFixed(2).replace("-", "−") ?? "–";
const signed = x => (x > 0 ? "+" : "") + fixed(x);
function make(tag, properties, ...children) {  // strings become text, never markup
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const token = (id, properties) => make("bdi", properties, D.vocab[id]);
const label = f => [`${f.i} `.padStart(6), f.x?.[0] ? token(f.x[0][1][f.x[0][2]]) : ""];  // in lists
const panel = (title, ...children) => make("section", {}, make("h2", {}, title), ...children);
const ranked = (list, name, show = signed) => list.map(([what, value]) => make("div",
  { className: "share", style: `--a: ${Math.abs(value / list[0][1])}` }, name(what), show(value)));

function example([, tokens, marked, active], max) {  // a line of text, shaded by the feature's activation
  return make("p", { className: "text" }, ...tokens.map((id, k) => {
    const [activation, effect] = active[k] ?? [0], className = k === marked ? "marked" : "";
    const tip = `activation ${number(activation)}\nablated, next token's log-probability changes by ${signed(effect)}`;
    const shade = { ariaDescription: tip, tabIndex: 0, style: `--a: ${activation / max}` };
    return token(id, { className, ...(active[k] && shade) });
  }));
}

function show({ title, summary, d, m, h, up, down, near, x = [] }) {  // a feature, or the summary of all
  const panels = summary.map(([name, value, note = ""]) => panel(name, make("b", {}, value), make("p", {}, note)));
  const bar = (n, k) => make("i", { style: `--a: ${k / h.length}; height: ${100 * Math.sqrt(n / Math.max(...h))}%` });
  if (d) panels.push(panel(`√ histogram, 0 to ${number(m)}`, make("div", { className: "bars" }, ...h.map(bar))),
    panel("raised tokens, logits", ...ranked(up, token)), panel("lowered tokens, logits", ...ranked(down, token)),
    panel("neurons, cosine", ...ranked(near, n => make("span", {}, n))));
  $("feature").replaceChildren(make("h1", {}, title), make("div", { className: "panels" }, ...panels),
    ...Object.entries(Object.groupBy(x, x => x[0])).map(([name, all]) => panel(name, ...all.map(x => example(x, m)))));
}

D.features.forEach((f, i) => {
  const { x = [], up = [] } = f, ids = [...x.map(([, tokens, marked]) => tokens[marked]), ...up.map(([id]) => id)];
  Object.assign(f, { i, title: `feature ${i}`, words: ids.map(id => D.vocab[id]).join("\n").toLowerCase() });
  f.kinds = ["all", f.d ? "alive" : "dead", f.d && f.d < D.ultra && "ultra-low"];
  f.summary = f.d ? [["density", +(100 * f.d).toPrecision(2) + "%"], ["largest activation", number(f.m)],
    ["explainability R²", fixed(f.e)], ["neuron correlation", fixed(f.n)]] : [["density", "0%", "dead: never active"]];
  f.row = make("a", { href: `#${i}`, className: "row", tabIndex: -1, f }, ...label(f),
    f.summary.map(([, text], k) => text.padStart(k ? 7 : 9)).join(""));
});
$("texts").append(...D.texts.map(([tokens, active], t) => make("p", { className: "text" }, ...tokens.map((id, k) =>
  make("a", { href: `#texts/${t}/${k}`, tabIndex: -1, active: active[k] }, D.vocab[id].replaceAll("⏎", "⏎\n"))))));
let here, key, sign;

function arrange({ target }) {  // the list: filtered and sorted
  if (target.matches("button")) [key, sign] = [target.id, target.id === key ? -sign : -1];
  const query = $("search").value.toLowerCase(), kind = $("kind").value;
  const shown = D.features.filter(f => f.kinds.includes(kind) && f.words.includes(query));
  shown.sort((f, g) => (f[key] == null) - (g[key] == null) || sign * (f[key] - g[key]));
  $("list").replaceChildren(...shown.map(f => f.row));
  Object.assign($("list").parentNode, { scrollTop: 0, ariaLabel: `${shown.length} features` });
  for (const button of $("head").children) button.dataset.arrow = key === button.id ? " ↑↓".at(sign) : "";
}

function go() {  // to the place in the address
  here?.setAttribute("aria-current", "false");
  here = [...D.features.map(f => f.row), ...document.links].find(a => a.hash === location.hash);
  here?.setAttribute("aria-current", "true");
  document.body.className = location.hash.startsWith("#texts") ? "texts" : "";
  show(here?.f ?? D);
  const link = i => make("a", { href: `#${i}` }, ...label(D.features[i]));
  $("active").replaceChildren(panel("click a token for its features", ...ranked(here?.active ?? [], link, number)));
  for (const element of [here, $("feature").firstChild]) element?.scrollIntoView({ block: "nearest" });
}

addEventListener("keydown", event => {  // arrows step through the list, or through the tokens of a text
  const side = { ArrowLeft: "previous", ArrowUp: "previous", ArrowRight: "next", ArrowDown: "next" }[event.key];
  const to = here?.closest("nav, p") ? here[side + "ElementSibling"] : document.querySelector("body:not(.texts) a.row");
  if (!side || !to || event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input, select")) return;
  event.preventDefault();
  to.focus({ preventScroll: true });
  to.click();
});
$("head").onclick = $("browse").oninput = arrange;
document.title = $("title").textContent = D.title;
onhashchange = go;
$("d").click();
go();
</script>
"""


def fill_page(data):
    """The page with its data: JSON in which no `<` is left, so that nothing in it can end the script that holds it."""
    return PAGE.replace("__DATA__", json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def write_page(this, headline, rows, n_texts=8):
    """
    features.html, one file: every feature with its examples, and some held-out texts with every token's features. An
    example token's effect is how the next token's log-probability changes when the feature is ablated on the whole
    context (Towards Monosemanticity, feature browser).
    """
    T, mlp, features, windows = this.contexts.shape[1] - 1, unit_rows(neuron_activations(this)), [], []
    width, device = min(24, T), this.sae.W_dec.device

    def short(x):  # three digits are enough to look at
        return float(f"{x:.3g}") if np.isfinite(x) else None
    for block in tracked("describing", blocks(this.sae.n_features), "features"):
        acts = activations_of(this, block)
        nearest, explained = (unit_rows(acts) @ mlp.T).max(1), explained_by_tokens(this, acts)[:, 1]
        for i, a, n, e in zip(block.tolist(), acts, nearest, explained):
            features.append({"d": short((a > 0).mean())})
            if not a.any():
                continue
            shown, rng = [], np.random.default_rng(i)
            for label, position in examples(this, a, n_top=6, n_intervals=4, each=1, rng=rng):
                start = position - position % T + min(max(0, position % T - 15), T - width)
                shown.append([label, this.tokens[start:start + width].tolist(), position - start, {}])
                windows.append((i, start, a[start:start + width].copy(), shown[-1][3]))
            pairs = zip(("up", "down", "near"), related(this, i, a.max().item(), 8))
            features[i] |= {key: [[j, short(value)] for j, value in pair] for key, pair in pairs}
            features[i] |= {"m": short(a.max()), "e": short(e), "n": short(n), "h": histogram(a), "x": shown}

    def log_probabilities(contexts, t, hook=None):  # of the tokens after t (b, k) in contexts (b, T + 1)
        row = torch.arange(len(t), device=device)[:, None]
        logits = this.gpt.lm_head(this.gpt.trunk(contexts[:, :int(t.max()) + 1], hook)[row, t])
        return logits.log_softmax(2).gather(2, contexts[row, t + 1, None])[..., 0].cpu()
    plain = torch.cat([log_probabilities(some, torch.arange(T, device=device).expand(len(some), -1))
                       for some in batches(this, "log-probabilities", this.contexts)]).flatten()
    windows.sort(key=lambda window: window[1] % T)                # tokens after a window need no computing
    for block in tracked("ablating", blocks(len(windows)), "examples"):
        numbers, starts, acts, shown = zip(*(windows[k] for k in block))
        at = torch.tensor(starts)[:, None] + torch.arange(width)  # (b, width)
        ablate = clamp(this, list(numbers), 0.0)
        after = log_probabilities(this.contexts[at[:, 0] // T].to(device), (at % T).to(device), ablate)
        for a, change, on in zip(acts, (after - plain[at]).tolist(), shown):
            on.update({j: [short(a[j]), short(change[j])] for j in np.flatnonzero(a).tolist()})
    texts = []
    for k in np.unique(np.linspace(0, len(this.contexts) - 1, n_texts).astype(int)).tolist():
        f = this.sae.encode(read(this)[k * T:(k + 1) * T].to(device)).sort(1, descending=True)
        ranked = [[[j, short(v)] for j, v in zip(*row) if v > 0] for row in zip(f.indices.tolist(), f.values.tolist())]
        texts.append([this.contexts[k, :-1].tolist(), ranked])
    data = {"title": headline, "summary": rows, "features": features, "texts": texts, "ultra": ULTRA_LOW,
            "vocab": [token_text(this, t) for t in range(this.tokenizer.n_vocab)]}
    write_atomic(os.path.join(this.folder, "features.html"), lambda f: f.write(fill_page(data).encode()))


COMMANDS = {"report": report, "feature": feature, "cause": cause, "steer": steer, "search": search, "neurons": neurons,
            "complete": complete, "scaling": scaling, "compare": compare, "toy": toy}


def main():
    args = parse_args()
    device, *_ = setup(args)
    if args.arguments and args.command not in ("feature", "search", "compare"):
        raise UserError(f"{args.command} takes flags only, not {args.arguments[0]!r}")
    names = args.arguments if args.command == "compare" else args.names.split(",")
    args.names = list(filter(None, names)) or [args.name]
    this = load_run(args, device, args.names[0])
    able = {"own": ["report", "scaling"], "toy": ["toy", "scaling"]}.get(this.site, [*COMMANDS][:-1])
    if args.command not in able:
        raise UserError(f"{this.folder} was trained on {this.site} activations: choose from {', '.join(able)}")
    with torch.no_grad():
        COMMANDS[args.command](this, args)


if __name__ == "__main__":
    run(main)
