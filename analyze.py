"""
A sparse autoencoder -> numbers, plots and readable features.

    python analyze.py                             # report on out/sae/scaling: metrics, best and random features
    python analyze.py report --name=towards       # another one
    python analyze.py feature 1407                # one feature in full
    python analyze.py toy --name=toy              # after train_sae.py --acts=toy: how many true directions were found

Everything is measured on held-out tokens (val.bin). Writes metrics.json and PNG plots to out_dir/sae/<name>/.
"""
import json
import math
import os
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from model import Progress, UserError, load_gpt, make_parser, positive, run, save_json, setup
from sae import ActivationStore, load_sae

ULTRA_LOW = 1e-5  # density that sets apart the "ultra-low density cluster" of Towards Monosemanticity


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("command", nargs="?", default="report", choices=["report", "feature", "toy"], help="what to do")
    parser.add_argument("arguments", nargs="*", help="feature: its number")
    group = parser.add_argument_group("analysis")
    group.add_argument("--name", default="scaling", help="folder under out_dir/sae")
    group.add_argument("--eval_tokens", type=positive, default=2**18, help="held-out tokens to measure on, at most")
    group.add_argument("--show", type=positive, default=10, help="report: how many best and how many random features to print")
    return parser.parse_args()


def load_run(args, device):
    """
    -> namespace of what an analysis needs: sae (folded), folder, log, and either gpt, tokenizer, site and contexts
    (N, T + 1) of held-out token ids, or for activations without a model rows, an ActivationStore of held-out ones.
    """
    folder = os.path.join(args.out_dir, "sae", args.name)
    sae = load_sae(os.path.join(folder, "sae.pt"), device)
    source = sae.extra["source"]
    this = SimpleNamespace(folder=folder, sae=sae.fold().requires_grad_(False), recipe=sae.recipe, site=source["site"], source=source, gpt=None)
    if this.site == "toy":
        return this
    if this.site == "own":
        this.rows = ActivationStore(source["acts"], sae.extra["args"]["seed"], (0.95, 1))
        return this
    this.gpt, this.tokenizer = load_gpt(args.out_dir, device)
    if this.gpt.fingerprint() != source["gpt"]:
        raise UserError(f"{folder}/sae.pt was trained on another gpt.pt than {args.out_dir} has now: "
                        f"run python train_sae.py --name={args.name} again")
    tokens, T = np.fromfile(os.path.join(args.out_dir, "val.bin"), dtype=np.uint16).astype(np.int64), this.gpt.config.block_size
    n = max(1, min(args.eval_tokens, len(tokens) - 1) // T)
    this.contexts = torch.from_numpy(np.stack([tokens[i * T:(i + 1) * T + 1] for i in range(n)]))
    return this


# -----------------------------------------------------------------------------
# measuring: one stream over the held-out tokens, sums kept, nothing of size (tokens x features)

def batches(this, label, tokens_a_batch=4096):
    """Yields (contexts (b, T + 1) or None, activations x (b, T, n) at the site) for all held-out data, with progress."""
    device = this.sae.W_dec.device
    if this.gpt is None:
        total = this.rows.rows
        progress = Progress(label, total, "rows")
        for start in range(0, total, tokens_a_batch):
            yield None, this.rows.batch(start, min(tokens_a_batch, total - start)).to(device)[None]
            if progress.due():
                progress.show(start)
        return
    T = this.gpt.config.block_size
    progress = Progress(label, len(this.contexts) * T, "tokens")
    for i, contexts in enumerate(this.contexts.split(max(1, tokens_a_batch // T))):
        kept = {}
        contexts = contexts.to(device)
        this.gpt.trunk(contexts[:, :-1], lambda site, x: kept.update({site: x}))
        this.sigma = (kept[f"resid.{this.gpt.config.n_layer - 1}"].var(-1, correction=0) + 1e-5).sqrt()  # the last LayerNorm's
        yield contexts, kept[this.site]
        if progress.due():
            progress.show(i * max(1, tokens_a_batch // T) * T)


def splice(this, replace):
    """Hook that puts replace(x) in the place of the activations x at the autoencoder's site."""
    return lambda site, x: replace(x) if site == this.site else None


@torch.no_grad()
def measure(this):
    """
    -> metrics (plain numbers), and per feature: density (share of tokens it is active on), max, energy (mean square).

    variance explained = 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2. Loss recovered = (zero - spliced) / (zero - plain)
    with the model's loss as it is, with x_hat in the place of x, and with 0 in the place of x at the same site
    (Towards Monosemanticity, "How much of the model does our interpretation explain?").
    """
    sae, m = this.sae, this.sae.n_features
    active, largest, energy = torch.zeros(m), torch.zeros(m), torch.zeros(m, dtype=torch.float64)
    total, squares, error, n_tokens = torch.zeros(sae.d_in, dtype=torch.float64), 0.0, 0.0, 0
    losses, inverse_sigma = Counter(), 0.0
    for contexts, x in batches(this, "measuring"):
        f = sae.encode(x)
        x_hat = sae.decode(f, sae.input_scale(x))
        rows, f = x.flatten(0, 1), f.flatten(0, 1)
        n_tokens += len(rows)
        active += (f > 0).sum(0).cpu()
        largest = torch.maximum(largest, f.amax(0).cpu())
        energy += f.square().sum(0).double().cpu()
        total += rows.sum(0).double().cpu()
        squares += rows.double().square().sum().item()
        error += (x_hat - x).double().square().sum().item()
        if contexts is not None:
            idx, targets = contexts[:, :-1], contexts[:, 1:]
            inverse_sigma += (1 / this.sigma).sum().item()
            for name, hook in (("plain", None), ("spliced", splice(this, lambda _: x_hat)),
                               ("zero_ablated", splice(this, torch.zeros_like))):
                losses[name] += this.gpt(idx, targets, hook)[1].item() * len(rows)
    metrics = {"tokens": n_tokens, "l0": active.sum().item() / n_tokens,
               "variance_explained": 1 - error / (squares - total.square().sum().item() / n_tokens),
               "n_features": m, "dead": (active == 0).sum().item() / m,
               "ultra_low": ((active > 0) & (active < ULTRA_LOW * n_tokens)).sum().item() / m}
    if this.gpt is not None:
        mean = (total / n_tokens).to(sae.W_dec)
        for contexts, x in batches(this, "mean ablation"):
            loss = this.gpt(contexts[:, :-1], contexts[:, 1:], splice(this, lambda x: mean.expand_as(x)))[1]
            losses["mean_ablated"] += loss.item() * x[..., 0].numel()
        metrics |= {f"loss_{name}": loss / n_tokens for name, loss in losses.items()}
        metrics["loss_recovered"] = ((metrics["loss_zero_ablated"] - metrics["loss_spliced"])
                                     / (metrics["loss_zero_ablated"] - metrics["loss_plain"]))
        this.inverse_sigma = inverse_sigma / n_tokens
    return metrics, SimpleNamespace(density=(active / n_tokens).numpy(), max=largest.numpy(), energy=(energy / n_tokens).numpy())


@torch.no_grad()
def activations_of(this, features):
    """Activations of a few features on every held-out token -> (tokens, len(features)) float32."""
    W, b = this.sae.W_enc[:, features], this.sae.b_enc[features]
    parts, inverse_sigma = [], 0.0
    for _, x in batches(this, "reading features"):
        scale = this.sae.input_scale(x)
        parts.append(F.relu(x * scale @ W + b).flatten(0, 1).cpu().numpy())
        inverse_sigma += (1 / this.sigma).mean().item() * len(parts[-1])
    this.inverse_sigma = inverse_sigma / sum(map(len, parts))
    return np.concatenate(parts)


@torch.no_grad()
def logit_effects(this, directions):
    """
    What directions (k, n) at the site do to the logits (k, vocab_size) per unit of activation, about their mean over the
    vocabulary: through the site's output matrix and along the residual stream to the last LayerNorm, which is taken as
    linear (centred, its gain, the mean 1 / sigma of held-out tokens; not applied to the bare direction), then through
    the unembedding (Towards Monosemanticity, logit weights). Later blocks, if any, are passed by.
    """
    kind, layer = this.site.split(".")
    if kind == "mlp":
        directions = directions @ this.gpt.blocks[int(layer)].mlp_proj.weight.t()       # (k, n_embd)
    centred = directions - directions.mean(1, keepdim=True)
    logits = this.gpt.lm_head(centred * this.gpt.ln_f.weight * this.inverse_sigma)
    return logits - logits.mean(1, keepdim=True)


def neuron_directions(this):
    """Unit vectors (n_neurons, n) of the layer's MLP neurons at the site: themselves, or what they write to the stream."""
    kind, layer = this.site.split(".")
    if kind == "mlp":
        return torch.eye(this.sae.d_in, device=this.sae.W_dec.device)
    return F.normalize(this.gpt.blocks[int(layer)].mlp_proj.weight.t(), dim=1)


# -----------------------------------------------------------------------------
# showing

COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ
BARS = " ▁▂▃▄▅▆▇█"


def paint(text, code):
    return f"\033[{code}m{text}\033[0m" if COLOUR else text


def token_text(this, token):
    """A token as one printable line: ⏎ and ⇥ for white space, · for other control characters, � for parts of one."""
    text = this.tokenizer.decode_single_token_bytes(int(token)).decode("utf-8", "replace")
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "·" for c in text)


def bars(counts):
    """Counts -> a line of bars, on a square-root scale so that small ones show."""
    top = max(1, max(counts))
    return "".join(BARS[math.ceil(8 * math.sqrt(count / top))] for count in counts)


def snippet(this, position, width):
    """The held-out token at `position` (counted through all contexts), marked, within its context, `width` characters."""
    T = this.contexts.shape[1] - 1
    context, t = this.contexts[position // T], position % T
    left = "".join(token_text(this, token) for token in context[max(0, t - 40):t])
    right = "".join(token_text(this, token) for token in context[t + 1:t + 30])
    token = token_text(this, context[t])
    room = max(10, width - len(token) - 2)
    left = left[-(room * 2 // 3):].rjust(room * 2 // 3)
    return left + paint(f"«{token}»", "1;33") + right[:room - len(left)]


def examples(this, acts, n_top, n_intervals, each, rng):
    """
    Where a feature is active: positions of its n_top largest activations, each with another text around it, and of
    `each` random ones from n_intervals evenly spaced intervals of its activation, the highest first (Towards
    Monosemanticity, feature browser). acts: (tokens,) -> list of (label, position)
    """
    def around(position):  # two examples with the same tokens here show the same thing twice
        return tuple(tokens[max(0, position - 4):position + 2])
    tokens = this.contexts[:, :-1].reshape(-1).tolist()
    chosen, seen = [], set()
    for position in np.argsort(-acts, kind="stable")[:max(200, 4 * n_top)]:
        if acts[position] > 0 and around(position) not in seen and len(chosen) < n_top:
            chosen.append(("top" if not chosen else "", int(position)))
            seen.add(around(position))
    edges = np.linspace(0, acts.max(), n_intervals + 1)
    for k in reversed(range(n_intervals)):
        inside = np.flatnonzero((acts > edges[k]) & (acts <= edges[k + 1]))
        label = f"{100 * k // n_intervals}-{100 * (k + 1) // n_intervals}%"
        for i, position in enumerate(rng.permutation(inside)[:each]):
            chosen.append((label if i == 0 else "", int(position)))
    return chosen


def print_feature(this, i, acts, n_top=5, n_intervals=4, each=1, n_tokens=8):
    """Prints one feature: density, histogram, examples, tokens raised and lowered, nearest neurons. acts: (tokens,)"""
    on = acts[acts > 0]
    if len(on) == 0:
        print(f"\n{paint(f'feature {i}', '1')}  not active on any of {len(acts):,} held-out tokens")
        return
    width = min(160, shutil.get_terminal_size((120, 24)).columns) - 22
    tokens = this.contexts[:, :-1].reshape(-1)
    best = np.argsort(-acts, kind="stable")[:min(50, len(on))]
    (token, count), = Counter(tokens[best].tolist()).most_common(1)
    histogram, _ = np.histogram(on, bins=24, range=(0, on.max()))
    print(f"\n{paint(f'feature {i}', '1')}  density {len(on) / len(acts):.2%}  max {on.max():.2f}  "
          f"'{token_text(this, token)}' at {count} of its top {len(best)}  {paint(bars(histogram), '36')}")
    for label, position in examples(this, acts, n_top, n_intervals, each, np.random.default_rng(i)):
        print(f"  {label:>8} {acts[position]:8.2f}  {snippet(this, position, width)}")
    effects = logit_effects(this, this.sae.W_dec[i:i + 1])[0] * float(on.max())
    for label, order, colour in (("raises", effects.argsort(descending=True), "32"), ("lowers", effects.argsort(), "31")):
        print(f"  {label:>8}  " + "  ".join(f"{paint(repr(token_text(this, t)), colour)} {effects[t]:+.1f}" for t in order[:n_tokens]))
    cosines = neuron_directions(this) @ this.sae.W_dec[i]
    print(f"  {'neurons':>8}  " + "  ".join(f"{n} {cosines[n]:+.2f}" for n in cosines.abs().argsort(descending=True)[:6].tolist()))


def plots(this, metrics, features):
    """density.png: log10 histogram of feature density, the ultra-low ones marked. training.png: the log."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    alive = features.density[features.density > 0]
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    low = min(math.log10(ULTRA_LOW) - 0.5, math.log10(alive.min()) - 0.1) if len(alive) else -6
    bins = np.linspace(low, 0, 60)
    for part, colour, label in ((alive[alive >= ULTRA_LOW], "#2a6f97", "alive"), (alive[alive < ULTRA_LOW], "#d1495b", "ultra-low")):
        ax.hist(np.log10(part), bins=bins, color=colour, label=f"{label}: {len(part):,}")
    ax.axvline(math.log10(ULTRA_LOW), color="#d1495b", lw=1, ls=":")
    ax.plot([], [], " ", label=f"dead: {metrics['n_features'] - len(alive):,}")
    ax.set(xlabel=f"log10 of feature density ({metrics['tokens']:,} held-out tokens)", ylabel="features", title=os.path.basename(this.folder))
    ax.legend(frameon=False)
    fig.savefig(os.path.join(this.folder, "density.png"), dpi=120)

    with open(os.path.join(this.folder, "log.jsonl"), encoding="utf-8") as f:
        log = [json.loads(line) for line in f]
    fig, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for ax, key, label in zip(axes, ("variance_explained", "l0", "dead"), ("variance explained", "L0", "share of dead features")):
        ax.plot([row["step"] for row in log], [row[key] for row in log], color="#2a6f97")
        ax.set(xlabel="step", title=label, yscale="log" if key == "l0" else "linear")
        ax.grid(alpha=0.3)
    fig.savefig(os.path.join(this.folder, "training.png"), dpi=120)


def report(this, args):
    metrics, features = measure(this)
    save_json(os.path.join(this.folder, "metrics.json"), metrics)
    plots(this, metrics, features)
    m = metrics["n_features"]
    print(f"\n{paint(os.path.basename(this.folder), '1')}: {this.recipe} recipe at {this.site}, {this.sae.d_in} -> {m:,} features, "
          f"measured on {metrics['tokens']:,} held-out {'tokens' if this.gpt else 'rows'}")
    rows = [("L0", f"{metrics['l0']:.1f}", "active features a token"),
            ("variance explained", f"{metrics['variance_explained']:.3f}", "about the mean"),
            ("dead", f"{metrics['dead']:.2%}", f"{round(m * metrics['dead']):,} of {m:,} never active here"),
            ("ultra-low density", f"{metrics['ultra_low']:.2%}", f"active on fewer than 1 in {1 / ULTRA_LOW:,.0f} tokens")]
    if this.gpt:
        rows += [("loss", f"{metrics['loss_plain']:.3f}", f"spliced {metrics['loss_spliced']:.3f}, mean-ablated "
                  f"{metrics['loss_mean_ablated']:.3f}, zero-ablated {metrics['loss_zero_ablated']:.3f} nats a token"),
                 ("loss recovered", f"{metrics['loss_recovered']:.3f}", "of what zero-ablation costs")]
    for name, value, note in rows:
        print(f"  {name:<20}{paint(f'{value:>9}', '1;36')}   {note}")
    print(f"\n  log10 density   -6 {bars(np.histogram(np.log10(features.density.clip(1e-6)), bins=48, range=(-6, 0))[0])} 0")
    if this.gpt:
        best = np.argsort(-features.energy, kind="stable")[:args.show]
        alive = np.flatnonzero(features.density > 0)
        drawn = np.random.default_rng(args.seed).permutation(alive)[:args.show]
        acts = activations_of(this, np.concatenate([best, drawn]))
        for k, i in enumerate(np.concatenate([best, drawn])):
            if k in (0, len(best)):
                title = "features that carry most of the reconstruction" if k == 0 else "features drawn at random"
                print(f"\n{paint(f'{title:-^100}', '2')}")
            print_feature(this, int(i), acts[:, k])
    print(f"\nwrote metrics.json, density.png and training.png to {this.folder}")


def feature(this, args):
    if this.gpt is None:
        raise UserError("feature shows text, which only an autoencoder trained on this model's activations has")
    try:
        i, = map(int, args.arguments)
    except ValueError:
        raise UserError("feature takes one number, as in: python analyze.py feature 12")
    if not 0 <= i < this.sae.n_features:
        raise UserError(f"there is no feature {i}: {this.folder} has 0 to {this.sae.n_features - 1}")
    print_feature(this, i, activations_of(this, [i])[:, 0], n_top=20, n_intervals=10, each=3, n_tokens=12)


def toy(this, args):
    """How many of the true directions have a feature of their own: the highest cosine with any decoder row, over 0.9."""
    if this.site != "toy":
        raise UserError(f"{this.folder} was not trained on toy data: run python train_sae.py --acts=toy --name=toy first")
    cosines = (this.source["truth"].to(this.sae.W_dec) @ this.sae.W_dec.t()).amax(1).cpu().numpy()
    found = cosines > 0.9
    save_json(os.path.join(this.folder, "metrics.json"), {"true_directions": len(found), "found": float(found.mean()),
                                                          "mean_max_cosine": float(cosines.mean())})
    print(f"{found.sum()} of {len(found)} true directions found ({found.mean():.1%}): cosine with a feature over 0.9; "
          f"mean of the highest cosines {cosines.mean():.3f}")
    for k, part in enumerate(np.array_split(found, 4)):
        print(f"  {('most frequent', 'frequent', 'rare', 'rarest')[k]:>14} quarter  {part.mean():7.1%}")


def main():
    args = parse_args()
    device, _, _ = setup(args)
    this = load_run(args, device)
    {"report": report, "feature": feature, "toy": toy}[args.command](this, args)


if __name__ == "__main__":
    run(main)
