"""
Text -> tokens -> a small trained transformer.

    python train_gpt.py                                          # this machine's Python sources
    python train_gpt.py --dataset=shakespeare --out_dir=plays    # a public text by name
    python train_gpt.py --dataset=folder,text.xz --out_dir=mine  # your own text
    python train_gpt.py --tokenizer=gpt2 --block_size=256 --batch_size=64 --max_iters=20000  # GPU
    python train_gpt.py --resume                                 # go on after a kill or Ctrl-C
    torchrun --nproc_per_node=2 train_gpt.py --batch_size=16     # two GPUs or CPUs, 16 each

The first needs no network and takes minutes on a CPU. Writes to out_dir: tokenizer.json,
train.bin and val.bin (uint16 token ids), data.json, gpt.pt, gpt.jsonl, gpt_loss.png.
"""
# A first reader: `train`, near the end, is the loop, and `get_batch` its data. How tokens are
# learned stands above WordChain. All else brings text of many kinds into two files of tokens.
import codecs
import csv
import gzip
import hashlib
import heapq
import io
import json
import lzma
import os
import random
import re
import shlex
import socket
import sysconfig
import urllib.request
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from model import (
    ANEW, END_OF_TEXT, GPT, PATTERN, GPTConfig, Progress, UserError, at_least, average_gradients,
    bpe_tokenizer, check_finite, content_hash, gpt2_tokenizer, interval, load_json,
    load_tokenizer, load_tokens, lock_alone, make_parser, rank_0_first, reading, resumable, run,
    same_on_all_ranks, save_checkpoint, save_json, save_jsonl, save_tokenizer, setup, step_count,
    steps, to_device, write_atomic)

GITHUB = "https://raw.githubusercontent.com"
HUGGING_FACE = "https://huggingface.co/datasets"
URLS = {
    "shakespeare": f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinystories": f"{HUGGING_FACE}/roneneldan/TinyStories/resolve/main/"
                   "TinyStoriesV2-GPT4-train.txt",
}

# Whoever changes what tokens come of the same files (how they are read, cut into words, merged
# or held out) raises this number: tokens made by other rules are then made anew.
READING = 3

# by a file's last suffix, in small letters; any other file is read as it is
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def parse_args():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="python",
                       help="python (the standard library, numpy and matplotlib of this "
                       "interpreter), shakespeare, tinystories, or text files, folders and URLs "
                       "with commas between; .gz and .xz are read as they are; "
                       f"a line {END_OF_TEXT} separates documents; of .jsonl and .csv every "
                       "row's \"text\" is one")
    group.add_argument("--tokenizer", default="bpe", choices=["bpe", "gpt2"],
                       help="bpe: byte-pair merges learned from the data set; gpt2: tiktoken's")
    group.add_argument("--vocab_size", type=at_least(1), default=2048,
                       help="tokens of the bpe tokenizer, 257 to 65536")
    group = parser.add_argument_group("model")
    group.add_argument("--block_size", type=at_least(1), default=128,
                       help="longest context, in tokens")
    group.add_argument("--n_layer", type=at_least(1), default=1, help="transformer blocks")
    group.add_argument("--n_head", type=at_least(1), default=4, help="attention heads a block")
    group.add_argument("--n_embd", type=at_least(1), default=128,
                       help="width of the residual stream")
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=at_least(1), default=32,
                       help="contexts a step, of each rank")
    group.add_argument("--max_iters", type=at_least(1), default=1000, help="steps")
    group.add_argument("--learning_rate", type=at_least(0, float), default=3e-3,
                       help="peak of AdamW's rate: reached after 2%% of the steps, "
                       "then falls linearly to 0")
    group.add_argument("--eval_interval", type=step_count, default="auto",
                       help="steps between measurements of loss; auto: 200, or a "
                       "hundredth of a long run")
    group.add_argument("--eval_iters", type=at_least(1), default=20,
                       help="batches a measurement")
    group.add_argument("--save_interval", type=step_count, default="auto",
                       help="steps between checkpoints; auto: 500, or a twentieth of a "
                       "long run")
    group.add_argument("--resume", action="store_true",
                       help="go on from the last checkpoint, if there is one")
    return parser.parse_args()


# -----------------------------------------------------------------------------
# data: --dataset -> files -> documents

def download(url, folder):
    """
    The path of a URL's file in `folder`, downloaded unless it is there. UserError when it
    cannot be had, is shorter than the server said, or is a page around the file.
    """
    name = url.rstrip("/").split("/")[-1].split("?")[0]
    name = re.sub(r"[^\w.-]", "_", name)[-100:]  # with the suffix, which says how to read it
    prefix = hashlib.sha256(url.encode()).hexdigest()[:8]  # many a URL ends in input.txt
    path = os.path.join(folder, f"{prefix}-{name}")
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    progress = Progress(f"downloading {url}", 0, "bytes")

    def show(blocks, block_size, total):
        done = blocks * block_size
        progress.total = max(total, done)  # total is -1 where the server does not say
        progress.show(done)

    socket.setdefaulttimeout(60)  # seconds of silence, after which a server counts as dead
    try:
        # raises an error when fewer bytes came than were announced
        _, headers = urllib.request.urlretrieve(url, path + ".part", show)
    except (OSError, ValueError, HTTPException) as error:  # no network, no URL, no HTTP
        raise UserError(f"{url} cannot be downloaded ({error}): "
                        "run again, or give a file as --dataset")
    if headers.get_content_type() == "text/html":
        raise UserError(f"{url} is a web page: give the address of the file itself, "
                        "or save the page and give its path")
    os.replace(path + ".part", path)  # what has its final name is whole
    return path


def python_files():
    """The Python sources that every machine with these requirements has, at least 10 MB."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for package in ("numpy", "matplotlib"):
        folders.append(Path(find_spec(package).origin).parent)
    skipped = {
        "site-packages", "dist-packages",  # they differ from machine to machine
        "test", "tests",                   # they repeat themselves
        "encodings",                       # tables, no code
    }
    paths = []
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if not skipped & set(path.relative_to(folder).parts):
                paths.append(path)
    return paths


def folder_files(folder, out_dir):
    """
    All files below a folder, sorted, but for hidden ones and those below out_dir. Links to
    folders are followed, but no folder is read twice. UserError when there are no files,
    OSError for a folder that may not be read.
    """
    def refuse(error):  # else a folder that may not be read would count as empty
        raise error

    out_dir = Path(out_dir).resolve()
    paths = []
    seen = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link may lead back to where it stands
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(place, name)
            written_here = out_dir in path.resolve().parents  # what the scripts write is no data
            if path.is_file() and not name.startswith(".") and not written_here:
                paths.append(path)
    if not paths:
        raise UserError(f"folder {folder} holds no file that is neither hidden nor below "
                        f"--out_dir={out_dir}, where the scripts write: give another out_dir")
    return sorted(paths)


def split_sources(dataset):
    """
    The sources between the commas. A comma in the name of a file that exists separates nothing.
    A source may begin with ~, the home folder: shells see to the first one at most.
    """
    parts = dataset.split(",")
    sources = []
    while parts:
        # the longest name that exists, or else what stands before the first comma
        for end in range(len(parts), 0, -1):
            source = os.path.expanduser(",".join(parts[:end]).strip())
            if os.path.exists(source) or end == 1:
                break
        if source:
            sources.append(source)
        parts = parts[end:]
    return sources


def check_readable(path):
    """UserError for a file that cannot be read twice, or is known to be no text."""
    if not path.is_file():  # <(command) gives a pipe
        raise UserError(f"{path} is no file but a pipe or device, and the text is read twice: "
                        "write it to a file first")
    if path.suffix.lower() == ".parquet":
        raise UserError(f"{path}: .parquet is not read: write its text to a .jsonl file, with "
                        "pandas: read_parquet(...).to_json(..., orient='records', lines=True)")


def source_files(dataset, out_dir):
    """
    The files of --dataset as a list of Paths, shuffled the same way every time: what is
    held out is then of all kinds. UserError for a source that does not exist.
    """
    paths = []
    sources = split_sources(dataset)
    if not sources:
        raise UserError("--dataset is empty: leave it out, or name files or folders")
    for source in sources:
        if source == "python":
            paths += python_files()
        elif source in URLS or "://" in source:
            url = URLS.get(source, source)
            downloads = os.path.join(out_dir, "downloads")
            paths.append(Path(download(url, downloads)))
        elif os.path.isdir(source):
            paths += folder_files(source, out_dir)
        elif os.path.exists(source):
            paths.append(Path(source))
        else:
            raise UserError(f"data set {source} not found: "
                            f"--dataset takes python, {', '.join(URLS)}, files, folders")
    for path in paths:
        check_readable(path)
    random.Random(0).shuffle(paths)  # not by --seed: all seeds share one data set
    return paths


def read_lines(file):
    """
    Yields the lines of a binary file. One of more than 1 MB comes in blocks of 1 MB, cut
    between two characters of UTF-8: it may be larger than the memory.
    """
    while block := file.readline(2**20):
        for _ in range(3):  # a character's first byte is followed by three at most
            following = file.peek(1)[:1]
            if block.endswith(b"\n") or not b"\x80" <= following < b"\xc0":
                break
            block += file.read(1)
        yield block


def plain_documents(file):
    """
    Yields the documents of a binary file of plain text, as bytes. A document ends at a line
    END_OF_TEXT, or where it has grown to 4 MB: a large file is never in memory as a whole.
    """
    lines = []
    size = 0  # bytes in lines
    starts_a_line = True
    for line in read_lines(file):
        # a file from Windows ends its lines with \r\n
        is_separator = starts_a_line and line.strip() == END_OF_TEXT.encode()
        if is_separator or size > 2**22:
            yield b"".join(lines)
            lines = []
            size = 0
        if not is_separator:
            lines.append(line)
            size += len(line)
        starts_a_line = line.endswith(b"\n")
    yield b"".join(lines)  # what follows the last separator


def numbered(rows):
    """Yields (number, row), from 1 on. UserError with the number of one that cannot be read."""
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield number, row
    except (ValueError, RecursionError, csv.Error) as error:
        reason = getattr(error, "msg", error)  # json adds a line and column of the row alone
        raise UserError(f"row {number + 1:,} cannot be read ({reason}): mend it or take it out")


def row_documents(rows):
    """
    Yields the texts of rows, which are dicts, as bytes: a document each, or several where
    one has more than 4 million characters. UserError for a row without a text.
    """
    for number, row in numbered(rows):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f"row {number:,} has no \"text\": add it, "
                            "or rename the file to .txt to read it as it stands")
        if any(row.get(None, ())):  # where csv puts the fields beyond those that have a name
            raise UserError(f"row {number:,} has more fields than the first line has names: "
                            "put a text with commas between double quotes")
        for start in range(0, len(text), 2**22):
            # what no UTF-8 can say goes through, and is then skipped as no text
            yield text[start:start + 2**22].encode(errors="surrogatepass")


def jsonl_documents(file):
    """Yields the documents of a binary file with one JSON object a line, {"text": ...}."""
    filled = (line for line in file if line.strip())
    return row_documents(map(json.loads, filled))


def csv_documents(file):
    """Yields the documents of a binary .csv file, whose first line names a column "text"."""
    csv.field_size_limit(2**31 - 1)  # else 131,072 characters
    lines = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    # strict: without it, a quote that is not closed would take all rows after it for one text
    return row_documents(csv.DictReader(lines, strict=True))


# by a file's last suffix, or the one before .gz and .xz; any other holds plain text
READERS = {".jsonl": jsonl_documents, ".ndjson": jsonl_documents, ".csv": csv_documents}


def format_of(path):
    """How a file is read: a suffix of READERS and one of OPENERS, "" for each it has not."""
    packed = path.suffix.lower()
    if packed in OPENERS:
        path = path.with_suffix("")
    else:
        packed = ""
    suffix = path.suffix.lower()
    return suffix if suffix in READERS else "", packed


def read_documents(path):
    """
    Yields the documents of one file as bytes, each with the number of bytes of the file
    that have been read, compressed ones if it is compressed.
    """
    suffix, packed = format_of(path)
    reader = READERS.get(suffix, plain_documents)
    opener = OPENERS.get(packed, nullcontext)  # nullcontext gives the file itself
    with open(path, "rb") as raw, opener(raw) as file:
        if file.peek(3).startswith(codecs.BOM_UTF8):  # a mark that Windows' programs write
            file.read(3)
        for document in reader(file):
            yield document, raw.tell()


def decoded(document):
    """A document's bytes as str; None when they are no UTF-8 text."""
    try:
        text = document.decode()
    except UnicodeDecodeError:
        return None
    if "\0" in text:  # valid UTF-8, but in binary files alone
        return None
    return text


def documents(paths, label, skipped):
    """
    Yields every document of every file as str and shows progress. What is no UTF-8 text is
    left out, and its path is added to the list `skipped`.
    """
    n_bytes = sum(path.stat().st_size for path in paths)
    progress = Progress(label, n_bytes, "bytes")
    before = 0  # bytes of the files before this one
    for path in paths:
        with reading(path, "mend it or leave it out of --dataset"):
            for document, position in read_documents(path):
                progress.show(before + position)
                text = decoded(document)
                if text is None:
                    skipped.append(path)
                elif text.strip():  # a blank one teaches nothing
                    yield text
        before += path.stat().st_size


def skipped_note(skipped):
    """The end of a sentence: how many documents were left out, if any, and where one is."""
    if not skipped:
        return ""
    return (f"; {len(skipped):,} documents are left out, since they are no UTF-8 text: "
            f"see {min(skipped)}")


# -----------------------------------------------------------------------------
# byte-pair encoding (Sennrich et al. 2016)
#
# Start with the 256 bytes as tokens. Again and again, find the two tokens that stand side by
# side most often, and merge them everywhere: the two become one new token. Tokens are numbered
# in the order in which they are made: that is a token's rank, and its id. In the words "banana"
# and "bandana", "a" and "n" are merged first, then "b" and "an":
#     b a n a n a      b an an a      ban an a
#     b a n d a n a    b an d an a    ban d an a
#
# The text is first cut into words (PATTERN in model.py), and pairs are counted within a word,
# never across. To count all pairs anew for every merge would be slow. Three things spare that:
# - a word that occurs a thousand times is kept once, with its frequency
# - every pair comes with the places where it stands, so that a merge touches these places and
#   their neighbours alone, however many words there are and however long they are
# - a heap has the most frequent pair on top, so that no merge has to search for it
#
# A pair is written as one number, left * 65536 + right: numpy sorts these, and a smaller
# number is a smaller pair.

NO_TOKEN = 255  # the byte 0xff, which no UTF-8 text holds: it stands between two words
MOST_WORDS = 2**24  # bytes of distinct words, which take a gigabyte; 20 MB of Python have 0.7


class WordChain:
    """
    All distinct words in one array of tokens, with NO_TOKEN around each. A merge leaves its
    token in the left one's place and NO_TOKEN in the right one's. Such holes are not closed,
    which would move all that follows: `after` and `before` lead from token to token past them.
    """

    def __init__(self, words, frequencies):
        row = b"\xff" + b"".join(word + b"\xff" for word in words)
        self.tokens = np.frombuffer(row, np.uint8).astype(np.uint16)  # a byte's rank is its value
        places = np.arange(len(row), dtype=np.int32)
        self.after = places + 1   # place of the next token, or of the word's end
        self.before = places - 1  # place of the last token, or of the word's beginning
        lengths = [len(word) + 1 for word in words]
        # how often a place occurs in the text: as often as its word
        self.frequency = np.repeat(np.array([0, *frequencies], np.int64), [1, *lengths])

    def pairs_at(self, places):
        """The pairs that start at these places."""
        left = self.tokens[places].astype(np.uint32)
        right = self.tokens[self.after[places]]
        return left * 65536 + right  # (len(places),)

    def count(self, places):
        """How often all these places together occur in the text."""
        return int(self.frequency[places].sum())

    def grouped(self, places):
        """Each pair that starts at some of these places, with those where it does."""
        ends_a_word = self.tokens[self.after[places]] == NO_TOKEN
        places = places[~ends_a_word & (self.tokens[places] != NO_TOKEN)]
        pairs = self.pairs_at(places)
        order = np.argsort(pairs, kind="stable").astype(np.int32)  # equal ones side by side
        pairs = pairs[order]
        changes = np.flatnonzero(np.diff(pairs)) + 1  # where another pair begins
        return zip(np.unique(pairs).tolist(), np.split(places[order], changes))

    def merge(self, places, merged):
        """
        Puts `merged` in place of the pair that starts at these places, which are sorted.
        Returns where pairs start that are new: the same places and the tokens before them.
        """
        pair = self.pairs_at(places[:1])
        if pair // 65536 == pair % 65536:
            places = self.not_overlapping(places)
        right = self.after[places]
        self.tokens[places] = merged
        self.tokens[right] = NO_TOKEN
        self.after[places] = self.after[right]
        self.before[self.after[right]] = places
        neighbours = self.before[places]
        neighbours = neighbours[self.tokens[neighbours] != merged]  # those are in places, too
        return np.concatenate([neighbours, places])

    def not_overlapping(self, places):
        """Of the three places where "aa" starts in "aaaa", the first and the third."""
        kept = []
        taken = None  # the right token's place of the last pair that was kept
        for place, right in zip(places.tolist(), self.after[places].tolist()):
            if place != taken:
                kept.append(place)
                taken = right
        return np.array(kept, dtype=np.int32)


def count_words(texts):
    """
    Cuts an iterable of str into words. Returns the distinct ones as bytes, and in a second
    list how often each occurs. Of texts whose words hardly ever come again, a genome say, no
    new words are taken once there are MOST_WORDS: the merges would not be better for them.
    """
    frequencies = Counter()
    n_bytes = 0  # of the distinct words
    for text in texts:
        found = re.findall(PATTERN, text)
        if n_bytes > MOST_WORDS:
            found = [word for word in found if word in frequencies]
        else:
            new = [word for word in set(found) if word not in frequencies]
            n_bytes += sum(len(word.encode()) for word in new)
        frequencies.update(found)
    if n_bytes > MOST_WORDS:
        print(f"data: merges are learned from {len(frequencies):,} distinct words, not from all")
    words = [word.encode() for word in frequencies]
    return words, list(frequencies.values())


def add_pairs(heap, places_of, chain, places):
    """
    Counts the pairs that start at these places. Each goes to the heap, as (-count, pair):
    the smallest is on top of a heap, hence the minus. Its places go to places_of[pair].
    """
    for pair, starts in chain.grouped(places):
        count = chain.count(starts)
        if count > 1:  # what occurs once is not worth a token
            places_of[pair] = starts
            heapq.heappush(heap, (-count, pair))


def most_frequent(heap, places_of, chain):
    """
    Takes the most frequent pair off the heap, of equally frequent ones the smaller: the same
    on any machine. Returns it and its places. None and None when no pair occurs twice.
    """
    while heap:
        negative_count, pair = heapq.heappop(heap)
        # merges around it have taken some of its places, and given it none; a pair that was
        # pushed twice has none left at its second turn
        places = places_of.pop(pair, np.empty(0, dtype=np.int32))
        places = places[chain.pairs_at(places) == pair]
        count = chain.count(places)
        if count == -negative_count:
            return pair, places
        if count > 1:  # fewer than when it was pushed: there may be a more frequent one
            places_of[pair] = places
            heapq.heappush(heap, (-count, pair))
    return None, None


def learn_bpe(texts, vocab_size):
    """
    Learns a byte-pair encoding from an iterable of str. Returns {bytes: rank}, with
    vocab_size - 1 tokens, since END_OF_TEXT will be the last, or fewer where no pair occurs
    twice any more.
    """
    chain = WordChain(*count_words(texts))
    heap = []
    places_of = {}  # {pair: the places where it starts, sorted}
    add_pairs(heap, places_of, chain, np.arange(len(chain.tokens) - 1, dtype=np.int32))

    tokens = [bytes([byte]) for byte in range(256)]  # a token's bytes, by its rank
    ranks = {token: rank for rank, token in enumerate(tokens)}
    progress = Progress("merging", vocab_size, "tokens", 256)
    while len(tokens) < vocab_size - 1:
        # 1. take the most frequent pair
        pair, places = most_frequent(heap, places_of, chain)
        if pair is None:
            break

        # 2. make it a token, unless two other halves have given the same bytes before
        left, right = divmod(pair, 65536)
        merged = tokens[left] + tokens[right]
        is_new = merged not in ranks
        if is_new:
            ranks[merged] = len(tokens)
            tokens.append(merged)

        # 3. merge it wherever it stands
        starts = chain.merge(places, ranks[merged])

        # 4. push the pairs that have come of it; those that lost places are counted again
        # when they are on top
        if not is_new:  # rare: its pairs of before have won places, so they are all looked up
            old = np.flatnonzero(chain.tokens == ranks[merged]).astype(np.int32)
            starts = np.union1d(chain.before[old], old)
        add_pairs(heap, places_of, chain, starts)
        progress.show(len(tokens))
    return ranks


# -----------------------------------------------------------------------------
# tokens: documents -> train.bin and val.bin -> batches

def write_tokens(texts, tokenizer, path):
    """
    Tokenizes texts into one file of uint16. Returns the number of bytes that they had, and
    of each the number of its tokens.
    """
    n_bytes = 0
    lengths = []
    with open(path, "wb") as file:
        for text in texts:
            n_bytes += len(text.encode())
            ids = tokenizer.encode_ordinary(text)
            ids.append(tokenizer.eot_token)  # the model learns where documents end
            ids = np.array(ids, dtype=np.uint16)  # no vocabulary here is larger than 65,536
            file.write(ids.tobytes())
            lengths.append(len(ids))
    return n_bytes, lengths


def pieces_of(lengths, longest):
    """The lengths of documents, those above `longest` cut into pieces of it and a rest."""
    pieces = []
    for length in lengths:
        pieces += [longest] * (length // longest)
        if length % longest:
            pieces.append(length % longest)
    return pieces


def evenly_spread(pieces, share):
    """
    Decides of each piece whether it is held out, so that about a share of all tokens is. Every
    piece adds its share to what is owed, and is held out itself if that brings the debt closer
    to 0: it is never more than half the longest piece. Short pieces are held out more often
    than long ones.
    """
    held_out = []
    owed = 0
    for piece in pieces:
        owed += share * piece
        is_held_out = owed >= piece / 2
        held_out.append(is_held_out)
        if is_held_out:
            owed -= piece
    return held_out


def hold_out(lengths, block_size):
    """
    Decides which tokens of documents of these lengths are held out, evenly spread: about a
    twentieth, or two contexts if that is more, but at most half. Returns the lengths of the
    pieces that the documents are cut into, in order, and whether each is held out.
    """
    n_tokens = sum(lengths)
    two_contexts = 2 * (block_size + 1)
    wanted = max(n_tokens // 20, min(two_contexts, n_tokens // 2))

    def is_about_as_wanted(pieces, held_out):
        return abs(sum(compress(pieces, held_out)) - wanted) <= wanted / 4

    # a long document is cut, or it would be held out as a whole, or not at all; every 20th,
    # whatever its length, since evenly_spread prefers short ones
    pieces = pieces_of(lengths, 4096)
    held_out = [number % 20 == 19 for number in range(len(pieces))]
    if is_about_as_wanted(pieces, held_out):
        return pieces, held_out
    # there are few pieces, or the 20ths are shorter or longer than others
    held_out = evenly_spread(pieces, wanted / n_tokens)
    if is_about_as_wanted(pieces, held_out):
        return pieces, held_out
    # half a piece is now a quarter of what is wanted
    pieces = pieces_of(lengths, min(4096, max(1, wanted // 2)))
    return pieces, evenly_spread(pieces, wanted / n_tokens)


def split_tokens(path, pieces, held_out, train_path, val_path):
    """Copies a file of tokens, piece by piece, into the two that `hold_out` says."""
    with (open(path, "rb") as tokens, open(train_path, "wb") as train_file,
          open(val_path, "wb") as val_file):
        for piece, is_held_out in zip(pieces, held_out):
            file = val_file if is_held_out else train_file
            file.write(tokens.read(2 * piece))  # a uint16 has two bytes


def make_token_files(paths, tokenizer, skipped, args):
    """
    Writes train.bin and val.bin, and puts them in place when both are whole. Returns their
    numbers of tokens, {"train": ..., "val": ...}, and the number of bytes of the text.
    UserError when one is too short for a context.
    """
    splits = ("train", "val")
    final = {split: os.path.join(args.out_dir, f"{split}.bin") for split in splits}
    part = {split: final[split] + ".part" for split in splits}  # until they are whole
    both = os.path.join(args.out_dir, "tokens.part")
    try:
        texts = documents(paths, "tokenizing", skipped)
        n_bytes, lengths = write_tokens(texts, tokenizer, both)
        pieces, held_out = hold_out(lengths, args.block_size)
        n_held_out = sum(compress(pieces, held_out))
        counts = {"train": sum(lengths) - n_held_out, "val": n_held_out}
        if min(counts.values()) <= args.block_size:
            raise UserError(
                f"data set {args.dataset} has {counts['train']:,} tokens to train on, "
                f"{counts['val']:,} held out: both must be more than "
                f"--block_size={args.block_size}{skipped_note(skipped)}")
        split_tokens(both, pieces, held_out, part["train"], part["val"])
        # without data.json, nothing is whole: it goes before the first file is replaced
        data_json = os.path.join(args.out_dir, "data.json")
        if os.path.exists(data_json):
            os.remove(data_json)
        for split in splits:
            os.replace(part[split], final[split])
    except OSError as error:  # of a full disk it does not name the file
        name = error.filename or both
        raise UserError(f"{name}: {error.strerror}: make room and run again")
    finally:
        for path in (both, *part.values()):
            if os.path.exists(path):  # the last two: after an error or Ctrl-C alone
                os.remove(path)
    return counts, n_bytes


def make_tokenizer(paths, args):
    """The tokenizer that --tokenizer asks for: tiktoken's gpt2, or learned from the files."""
    if args.tokenizer == "gpt2":
        return gpt2_tokenizer()
    if not 257 <= args.vocab_size <= 65536:  # from no merge at all to all that uint16 holds
        raise UserError("--vocab_size must be 257 to 65,536 "
                        f"(bytes, {END_OF_TEXT}, merges), not {args.vocab_size}")
    texts = documents(paths, "counting words", skipped=[])  # told when they are tokenized
    return bpe_tokenizer(learn_bpe(texts, args.vocab_size))


def describe(paths, args):
    """
    What the tokens depend on, as a dict. data.json and the checkpoint keep it, and so tell
    whether they belong together.
    """
    files = hashlib.sha256()
    progress = Progress("looking for changes", len(paths), "files")
    for number, path in enumerate(paths):
        with reading(path, "mend it or leave it out of --dataset"):
            files.update(f"{format_of(path)} {content_hash(path)}\n".encode())
        progress.show(number)
    return {
        "tokenizer": args.tokenizer,
        "vocab_size": args.vocab_size,
        "reading": READING,
        "files": files.hexdigest(),
    }


def is_prepared(out_dir, made_from, block_size):
    """
    Whether out_dir has all files of the data set, whole, made from the same sources and with
    more tokens than a context has: what is held out of a short text depends on that.
    """
    # data.json alone says it, but for files that somebody has deleted since
    for name in ("tokenizer.json", "train.bin", "val.bin", "data.json"):
        if not os.path.exists(os.path.join(out_dir, name)):
            return False
    data = load_json(os.path.join(out_dir, "data.json"), "delete it")
    for split in ("train", "val"):
        n_tokens = os.path.getsize(os.path.join(out_dir, f"{split}.bin")) / 2
        if n_tokens <= block_size or n_tokens != data.get(split):
            return False
    return data.get("made_from") == made_from


def prepare(args, checkpoint=None):
    """
    Makes out_dir/train.bin, val.bin and tokenizer.json from --dataset, unless they are
    there already, made from files that hold the same. Returns the tokenizer, a
    tiktoken.Encoding, and the dict of what all was made from. data.json holds that dict and
    is written last, so its presence means that the other files are complete. UserError when
    the checkpoint was trained on other files.
    """
    paths = source_files(args.dataset, args.out_dir)
    made_from = describe(paths, args)
    made_then = checkpoint.get("data") if checkpoint else made_from
    if made_then != made_from:
        other = "other files than"
        if not made_then or made_then.get("reading") != READING:
            other = "tokens that another version of train_gpt.py made of"
        raise UserError(f"gpt.pt was trained on {other} --dataset={args.dataset}: "
                        "run without --resume")
    tokenizer_path = os.path.join(args.out_dir, "tokenizer.json")
    if is_prepared(args.out_dir, made_from, args.block_size):
        train_path = os.path.join(args.out_dir, "train.bin")
        print(f"data: {train_path} and val.bin are there, made from the same files")
        return load_tokenizer(tokenizer_path, "delete it"), made_from

    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    print(f"data: {len(paths):,} files, {megabytes:.1f} MB")
    tokenizer = make_tokenizer(paths, args)
    skipped = []
    counts, n_bytes = make_token_files(paths, tokenizer, skipped, args)
    save_tokenizer(tokenizer_path, tokenizer)
    data = {"made_from": made_from, "dataset": args.dataset, **counts}
    save_json(os.path.join(args.out_dir, "data.json"), data)
    bytes_a_token = n_bytes / sum(counts.values())
    print(f"data: {counts['train']:,} tokens for training, {counts['val']:,} held out, "
          f"{bytes_a_token:.2f} bytes a token, vocabulary {tokenizer.n_vocab:,}"
          f"{skipped_note(skipped)}")
    return tokenizer, made_from


def get_batch(tokens, args, seed, rank=0, ranks=1, device=torch.device("cpu")):
    """
    Cuts batch_size random contexts out of a token file, decided by seed, and returns this
    rank's share of them on a device: inputs and targets, both (batch_size / ranks,
    block_size), the targets one token on.
    """
    T = args.block_size
    share = args.batch_size // ranks
    rng = np.random.default_rng(seed)
    # every rank draws those of all and takes its own: the same batch on any number of ranks
    starts = rng.integers(0, len(tokens) - T, (ranks, share))[rank]         # (share,)
    contexts = np.stack([tokens[start:start + T + 1] for start in starts])  # (share, T + 1)
    contexts = to_device(contexts.astype(np.int64), device)  # embeddings take no uint16
    return contexts[:, :-1], contexts[:, 1:]


# -----------------------------------------------------------------------------
# training

@dataclass
class Training:
    """A run, and what its checkpoint keeps beside the flags: enough to go on from there."""
    path: str        # of the checkpoint
    made_from: dict  # what the data was made from: see `prepare`
    gpt: GPT
    optimizer: torch.optim.Optimizer
    step: int  # how many are done
    log: list  # a dict for each measurement: step, tokens, train, val


def learning_rate(step, max_iters, peak):
    """Linear warm-up over the first 2% of steps, then linear decay to 0 at max_iters."""
    warmup = max(1, round(0.02 * max_iters))
    rising = (step + 1) / warmup  # + 1: a first step of rate 0 would be none
    falling = (max_iters - step) / max(1, max_iters - warmup)
    return peak * min(rising, falling)


def make_optimizer(gpt, peak):
    """AdamW with weight decay on matrices only, not on biases, gains and embeddings."""
    decayed = []
    not_decayed = []
    for name, p in gpt.named_parameters():
        is_embedding = name.startswith(("wte", "wpe"))
        if p.dim() == 2 and not is_embedding:
            decayed.append(p)
        else:
            not_decayed.append(p)
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    fused = p.device.type != "mps"  # one kernel for all parameters; mps has none
    betas = (0.9, 0.95)             # GPT-3's; the default 0.999 remembers a whole short run
    return torch.optim.AdamW(groups, lr=peak, betas=betas, fused=fused)


def begin_training(args, config, machine, made_from, checkpoint):
    """
    A Training at its first step, or where the checkpoint is, the same on all ranks. UserError
    when the checkpoint is damaged.
    """
    path = os.path.join(args.out_dir, "gpt.pt")
    gpt = GPT(config).to(machine.device)
    optimizer = make_optimizer(gpt, args.learning_rate)
    training = Training(path, made_from, gpt, optimizer, step=0, log=[])
    if checkpoint:
        with reading(path, ANEW):
            gpt.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            training.step = checkpoint["step"]
            training.log = [dict(line) for line in checkpoint["log"]]
    same_on_all_ranks(gpt.parameters())
    n_parameters = sum(p.numel() for p in gpt.parameters())
    print(f"gpt: {n_parameters:,} parameters, on {machine.device}")
    return training


@torch.no_grad()
def measure(training, loss_on, args):
    """
    Appends the mean losses, in nats a token, of eval_iters batches of each split to the log,
    and returns them as a line of text. loss_on(split, seed, rank) gives that of one batch.
    UserError when a loss or a weight is not finite.
    """
    training.gpt.eval()  # no difference as it is; with dropout, say, there would be one
    means = {}
    for split in ("train", "val"):
        progress = Progress(f"measuring {split} loss", args.eval_iters, "batches")
        losses = 0.0
        for i in range(args.eval_iters):
            # the same batches each time, so that two measurements differ by the model alone;
            # rank 0's share on all ranks, so that all stop if it is not finite
            losses += loss_on(split, (args.seed, 1, i), rank=0).item()
            progress.show(i + 1)
        means[split] = losses / args.eval_iters
    training.gpt.train()
    step = training.step
    check_finite(means["train"], training.gpt, training)
    tokens = step * args.batch_size * args.block_size
    training.log.append({"step": step, "tokens": tokens, **means})
    return f"step {step:,}  train loss {means['train']:.3f}  val loss {means['val']:.3f}"


def save(training, loss, args, rank):
    """
    Writes gpt.jsonl, and the checkpoint last: where it says that the run is finished, all
    is there. UserError, on all ranks, when the loss or a weight is not finite.
    """
    check_finite(loss.item(), training.gpt, training)
    if rank > 0:
        return
    save_jsonl(os.path.join(args.out_dir, "gpt.jsonl"), training.log)
    save_checkpoint(
        training.path,
        model=training.gpt.state_dict(),
        config=vars(training.gpt.config),
        optimizer=training.optimizer.state_dict(),
        step=training.step,
        log=training.log,
        args=vars(args),
        data=training.made_from,
    )


def plot_losses(path, log):
    """Draws the losses of the log, in nats a token, against the step, as a .png."""
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")  # no pyplot: no screen needed
    ax = figure.subplots()
    steps_measured = [row["step"] for row in log]
    for split, colour in (("train", "#2a6f97"), ("val", "#d1495b")):
        losses = [row[split] for row in log]
        ax.plot(steps_measured, losses, color=colour, label=split)
    final_loss = log[-1]["val"]
    ax.set(xlabel="step", ylabel="loss (nats a token)",
           title=f"language model: {final_loss:.3f} held out")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    write_atomic(path, lambda f: figure.savefig(f, format="png", dpi=120))


def print_sample(gpt, tokenizer, tokens, device):
    """Prints how the model goes on, for 200 tokens, from the start of the held-out ones."""
    n_start = max(1, gpt.config.block_size // 4)
    start = torch.from_numpy(tokens[None, :n_start].astype(np.int64))  # (1, n_start)
    continued = gpt.eval().generate(start.to(device), 200)             # (1, n_start + 200)
    text = tokenizer.decode(continued[0].tolist())
    line = "-" * 80
    print(f"\nsample, continued from {n_start} held-out tokens:\n{line}\n{text}\n{line}")


def train(training, data, args, machine):
    """
    Trains until args.max_iters steps are done or a signal asks to stop, and leaves
    gpt_loss.png, gpt.jsonl and the checkpoint.
    """
    gpt = training.gpt
    optimizer = training.optimizer
    model = torch.compile(gpt) if machine.compiled else gpt  # the parameters are gpt's
    eval_interval = interval(args.eval_interval, args.max_iters, 200, times=100)
    save_interval = interval(args.save_interval, args.max_iters, 500, times=20)
    batch_tokens = args.batch_size * args.block_size
    first_token = training.step * batch_tokens
    progress = Progress("training", args.max_iters * batch_tokens, "tokens", first_token)

    def loss_on(split, seed, rank):
        """The mean loss, in nats a token, on a rank's share of the batch of a seed."""
        inputs, targets = get_batch(
            data[split], args, seed, rank, machine.ranks, machine.device)
        with machine.autocast:
            _, loss = model(inputs, targets)
        return loss

    def measure_and_show():
        line = measure(training, loss_on, args)
        progress.show(training.step * batch_tokens, lambda: line, now=True)

    for step in steps(training.step, args.max_iters):
        if step % eval_interval == 0:
            measure_and_show()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.max_iters, args.learning_rate)
        # a batch is a function of (seed, step): a checkpoint has no position to remember.
        # The 0 between them tells it from those that are measured, which have a 1
        loss = loss_on("train", (args.seed, 0, step), machine.rank)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(gpt)
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)  # no batch moves them too far
        optimizer.step()

        training.step = step + 1
        # a function, since .item() waits for a GPU: it is called only when a line is due
        progress.show(training.step * batch_tokens,
                      lambda: f"step {training.step:,}  loss {loss.item():.3f}")
        if training.step % save_interval == 0 and training.step < args.max_iters:
            save(training, loss, args, machine.rank)

    if training.step == args.max_iters:  # else a signal ended the loop
        measure_and_show()
    if machine.rank == 0:
        plot_losses(os.path.join(args.out_dir, "gpt_loss.png"), training.log)
    save(training, loss, args, machine.rank)


def main():
    args = parse_args()
    machine = setup(args)
    args.batch_size *= machine.ranks  # of all ranks together, here and in the checkpoint
    if machine.rank == 0 and not lock_alone(args.out_dir):
        raise UserError(f"another run is training a model in {args.out_dir}: wait for it, "
                        "or give another --out_dir")
    checkpoint = resumable(os.path.join(args.out_dir, "gpt.pt"), args, machine.device)

    # bad sizes are refused now, not after tokenizing; 257 stands in for a number not known yet
    config = GPTConfig(args.block_size, vocab_size=257, n_layer=args.n_layer,
                       n_head=args.n_head, n_embd=args.n_embd)
    with rank_0_first():
        tokenizer, made_from = prepare(args, checkpoint)
    config.vocab_size = tokenizer.n_vocab  # gpt2's, or fewer than asked for if merges ran out
    data = {split: load_tokens(args.out_dir, split, config) for split in ("train", "val")}

    training = begin_training(args, config, machine, made_from, checkpoint)
    train(training, data, args, machine)
    if training.step < args.max_iters:
        raise KeyboardInterrupt(f"step {training.step:,}")  # `run` says how to go on

    print_sample(training.gpt, tokenizer, data["val"], machine.device)
    final_loss = training.log[-1]["val"]
    print(f"val loss {final_loss:.3f}; wrote {training.path}; "
          f"next: python train_sae.py --out_dir={shlex.quote(args.out_dir)}")


if __name__ == "__main__":
    run(main)
