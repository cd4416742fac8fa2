"""The page of features in a real headless browser, with mouse and keyboard. Skipped where no Chromium is installed."""

import itertools
import json
import math
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from analyze import PAGE, fill_page
from conftest import SMALL_GPT, SMALL_SAE, script

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium or google-chrome on the path")

# -----------------------------------------------------------------------------
# data with a bit of everything: dead, ultra-low and unexplained features, and tokens that would like to be markup

OPENING = '<script type="application/json" id="data">'
HOSTILE = [
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=1</script>",
    "\"'",
    "</textarea>",
    "&lt;",
    "<img src=x onerror=window.hacked=1>",
    OPENING,
    "\u202eevil",
    "\x00\x1b[2J",
    "�",
    "a\u2028b",
    "x" * 300,
]
VOCAB = ["def", " self", "⏎    ", "Return", " ", *HOSTILE]
SEEN = [re.sub("[\u202e\x00\x1b\u2028]", "·", text) for text in VOCAB]  # what is invisible becomes a dot
#           density, max, explainability, neuron correlation, marked token, raised token
FEATURES = [
    (0.02, 3.0, 0.5, 0.30, 0, 3),
    (0.3, 1.5, None, 0.90, 1, 0),
    None,
    (4e-6, 9.0, 0.1, 0.20, 2, 4),
    (2e-5, 0.0456, 0.8, None, 3, 4),
    (0.05, 1234.0, -0.02, 0.10, 4, 2),
    None,
    *((1e-4 * token, 2.0 + token, 0.01 * token, 0.05, token, token) for token in range(5, len(VOCAB))),
]
COLUMNS = {
    "number": range(len(FEATURES)),
    "density": [f[0] if f else 0 for f in FEATURES],
    **{key: [f and f[k] for f in FEATURES] for key, k in (("max", 1), ("explained", 2), ("neuron_correlation", 3))},
}


MOTIFS = ["single token", "token in context", "context"]


def alive(number, density, m, explained, neuron, marked, raised):
    examples = [
        {
            "label": label,
            "context": number,
            "marked": 32,
            "window": [30, 35],
            "active": {"32": [m * share, -0.25], "33": [m / 10, None], "2": [m / 4], "40": [m / 2]},
        }
        for label, share in (("top", 1), ("top", 0.75), ("50-75%", 0.5), ("0-25%", 0.125))
    ]
    return {
        "density": density,
        "map": [number / len(FEATURES), (7 * number % len(FEATURES)) / len(FEATURES)],
        "max": m,
        "explained": explained,
        "explained_by_token": explained and explained / 2,
        "motif": MOTIFS[number % 3] if explained else None,
        "neuron_correlation": neuron,
        "nearest": [[(number + k) % len(FEATURES), 0.9 / k] for k in (1, 2, 3)],
        "together": [[0, 0.5]] if number else [],
        "histogram": [4**k for k in reversed(range(24))],
        "examples": examples,
        "raised": [[raised, 2.5], [9, 1.25]],
        "lowered": [[0, -3.0], [3, -0.004]],
        "neurons": [[77, -0.5], [8, 0.25]],
    }


DATA = {
    "title": "tiny · mlp.0",
    "summary": [["L0", "10.5", "active features a token"]],
    "vocabulary": SEEN,
    "ultra_low": 1e-5,
    "training": {
        "step": [100, 200, 400],
        "variance_explained": [0.5, 0.75, 1.0],
        "l0": [250.0, None, 50.0],
        "dead": [0.0, 0.0, 0.0],
    },
    "contexts": [[4] * 5 + [1] * 25 + [0, 1, f[4] if f else 0, 2, 3] + [2] * 30 for f in FEATURES],
    "features": [alive(i, *f) if f else {"density": 0} for i, f in enumerate(FEATURES)],
    "texts": [
        {"tokens": [0, 1, 2, 3], "active": [[[1, 2.0], [0, 0.5]], [], [[5, 617.25]], [[4, 0.01], [2, 0.001]]]},
        {"tokens": list(range(len(VOCAB))), "active": [[[0, 1.0]]] * len(VOCAB)},
    ],
}
SAMPLE = json.loads(Path(PAGE).read_text(encoding="utf-8").split(OPENING)[1].split("</script>")[0])  # of the template


# -----------------------------------------------------------------------------
# the browser


class Browser:
    """A page of headless Chromium, spoken to over two pipes: JSON messages that end in a zero byte."""

    def __init__(self, folder):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        command = [PROGRAM, *flags, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        pipes = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >&2'  # it reads from 3 and writes to 4
        self.process = subprocess.Popen(
            ["sh", "-c", pipes, *command],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.numbers, self.rest, self.events, self.session = itertools.count(), b"", [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self):
        while b"\0" not in self.rest:
            assert select.select([self.process.stdout], [], [], 30)[0], "the browser says nothing"
            self.rest += self.process.stdout.read(2**16) or pytest.fail("the browser is gone")
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        message = {"id": next(self.numbers), "method": method, "params": params} | self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != message["id"]:
            self.events.append(answer)
        return answer["result"]

    def js(self, expression):
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def expect(self, expression, expected):
        """Asserts that the expression has the expected value, at the latest in a while."""
        end = time.monotonic() + 2
        while (value := self.js(expression)) != expected and time.monotonic() < end:
            time.sleep(0.01)
        assert value == expected

    def open(self, place=""):
        self.events.clear()
        self.url = f"{self.path.as_uri()}?{next(self.numbers)}"  # never the same, so that it loads anew
        self.call("Page.navigate", url=self.url + place)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def mouse(self, selector, nth=0, kinds=("mouseMoved",)):
        x, y = self.js(f"""(element => {{ element.scrollIntoView({{ block: "center" }});
            const box = element.getClientRects()[0]; return [box.x + box.width / 2, box.y + box.height / 2];
            }})(document.querySelectorAll({json.dumps(selector)})[{nth}])""")
        for kind in kinds:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click(self, selector, nth=0):
        self.mouse(selector, nth, ("mouseMoved", "mousePressed", "mouseReleased"))

    def key(self, key, modifiers=0):
        code = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
        typed = {"text": "\r"} if key == "Enter" else {}  # without it, Enter presses no button
        for kind in ("keyDown" if typed else "rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers, **typed
            )

    def filter(self, text="", kind="all"):
        self.js(f"kind.value = {json.dumps(kind)}; kind.dispatchEvent(new Event('input', {{ bubbles: true }}))")
        self.js("search.focus(); search.select(); document.execCommand('delete')")
        self.call("Input.insertText", text=text)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a page with # and ünicode")
    browser = Browser(folder / "profile")
    browser.path = folder / "features.html"
    browser.path.write_text(fill_page(DATA), encoding="utf-8")
    yield browser
    browser.process.terminate()
    browser.process.wait(20)


@pytest.fixture
def page(browser):
    """The page, newly opened. After every test: nothing failed in it, and it has asked for nothing but itself."""
    browser.open()
    yield browser
    browser.call("Emulation.clearDeviceMetricsOverride")
    browser.call("Emulation.setEmulatedMedia", features=[])
    events = [(event["method"], event["params"]) for event in browser.events if "method" in event]
    assert [p for name, p in events if name == "Runtime.exceptionThrown"] == []
    assert [p for name, p in events if name == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert")] == []
    assert [p for name, p in events if name == "Log.entryAdded" and p["entry"]["level"] == "error"] == []
    assert {p["request"]["url"] for name, p in events if name == "Network.requestWillBeSent"} <= {browser.url}


HEADING, ROWS = "document.querySelector('h1').textContent", "[...list.children].map(a => +a.hash.slice(1))"
CURRENT = "[...document.querySelectorAll('[aria-current=true]')].map(a => a.hash)"
VALUES = "[...document.querySelectorAll('.value')].map(value => value.textContent)"
ACTIVE = """[...document.querySelectorAll('#active .ranked')].map(line =>
    [line.querySelector('a').hash, line.lastChild.textContent, +line.style.getPropertyValue('--share')])"""


def ordered(key, sign, among=range(len(FEATURES))):
    """The features `among` as a list sorted by a column is to show them: those without a value come last."""
    values = COLUMNS[key]
    return sorted(among, key=lambda i: (values[i] is None, sign * (values[i] or 0), i))


# -----------------------------------------------------------------------------
# opening it


def test_it_opens_as_a_file_with_the_summary_and_all_features_by_density(page):
    sent = [event["params"] for event in page.events if event.get("method") == "Network.requestWillBeSent"]
    assert [params["request"]["url"] for params in sent] == [page.url] and page.url.startswith("file:")
    assert page.js("document.title") == page.js(HEADING) == "tiny · mlp.0"
    summary = page.js("feature.querySelector('.panels section').innerText.split(/\\n+/)")
    assert summary == ["L0", "10.5", "active features a token"]
    assert page.js(ROWS) == ordered("density", -1)


def test_it_may_load_nothing_from_anywhere(page):
    blocked = page.js("""Promise.race([new Promise(stop => setTimeout(stop, 2000)), new Promise(stop => {
        addEventListener("securitypolicyviolation", event => stop(event.violatedDirective));
        new Image().src = "picture.png"; })])""")
    assert blocked == "img-src"
    page.events.clear()  # the error that this has caused


def test_the_template_opens_by_itself_with_its_sample(page, monkeypatch):
    monkeypatch.setattr(page, "path", Path(PAGE))
    page.open()
    assert page.js("document.title") == page.js(HEADING) == SAMPLE["title"]
    assert len(page.js(ROWS)) == len(SAMPLE["features"]) > 2
    for number in range(len(SAMPLE["features"])):
        page.js(f"location.hash = '#{number}'")
        page.expect(HEADING, f"feature {number}")
    page.js("location.hash = '#texts/0/0'")
    page.expect(ACTIVE + ".length", len(SAMPLE["texts"][0]["active"][0]))
    assert page.js("document.querySelectorAll('[id=data]').length") == 1


def test_the_sample_has_the_keys_of_a_page_that_is_filled_with_a_run():
    keys = {"title", "summary", "ultra_low", "training", "vocabulary", "contexts", "features", "texts"}
    assert set(SAMPLE) == set(DATA) == keys and set(SAMPLE["training"]) == set(DATA["training"])
    numbers = {"density", "max", "explained", "explained_by_token", "motif", "neuron_correlation"}
    lists = {"map", "histogram", "examples", "raised", "lowered", "neurons", "nearest", "together"}
    for feature in SAMPLE["features"]:
        assert set(feature) == (numbers | lists if feature["density"] else {"density"})
        for example in feature.get("examples", ()):
            assert set(example) == {"label", "context", "marked", "window", "active"}
            start, end = example["window"]
            assert start <= example["marked"] < end <= len(SAMPLE["contexts"][example["context"]])
            assert str(example["marked"]) in example["active"]
    assert all(set(text) == {"tokens", "active"} for text in SAMPLE["texts"])


def test_an_address_selects_its_feature(page):
    page.open("#4")
    assert page.js(HEADING) == "feature 4" and page.js(CURRENT) == ["#4"]
    assert page.js(VALUES) == ["0.002%", "0.0456", "0.80", "–"]
    page.js("location.hash = '#5'")
    page.expect(HEADING, "feature 5")
    assert page.js(CURRENT) == ["#5"]
    assert page.js(VALUES) == ["5%", "1234", "−0.02", "0.10"]


def test_an_address_that_there_is_not_shows_the_summary_and_does_no_harm(page):
    page.open("#99")
    for place in ("", "#-1", "#04", "#1e0", "#length", "#__proto__", "#%E0%A4%A", "#<img src=x>'\""):
        assert page.js(HEADING) == "tiny · mlp.0" and page.js(ROWS) == ordered("density", -1)
        page.js("location.hash = '#4'")
        page.expect(HEADING, "feature 4")
        page.js(f"location.hash = {json.dumps(place)}")
        page.expect(HEADING, "tiny · mlp.0")


def test_an_address_of_no_token_shows_the_texts(page):
    for place in ("#texts/9/0", "#texts/0/99", "#texts/0", "#texts/item/0", "#texts/0/0/0"):
        page.js(f"location.hash = {json.dumps(place)}")
        page.expect("texts.checkVisibility() && !feature.checkVisibility()", True)
        assert page.js(ACTIVE) == []
        page.js("location.hash = ''")
        page.expect("feature.checkVisibility()", True)


def test_back_and_forward_go_to_the_places_visited(page):
    for place in ("#1", "#3", "#texts", "#texts/0/0"):
        page.js(f"location.hash = '{place}'")
    page.expect(CURRENT, ["#texts/0/0"])
    for step, place in ((-1, "#texts"), (-1, "#3"), (-1, "#1"), (1, "#3")):
        page.js(f"history.go({step})")
        page.expect(CURRENT, [place])
    assert page.js(HEADING) == "feature 3" and page.js("feature.checkVisibility() && !texts.checkVisibility()")


# -----------------------------------------------------------------------------
# the list


@pytest.mark.parametrize("key", COLUMNS)
def test_a_click_on_a_heading_sorts_by_it_and_another_the_other_way(page, key):
    if key == "density":
        page.click("#number")
    page.click(f"#{key}")
    assert page.js(ROWS) == ordered(key, -1)
    page.click(f"#{key}")
    assert page.js(ROWS) == ordered(key, 1)
    assert page.js("[...document.querySelectorAll('button')].filter(b => b.dataset.arrow).map(b => b.id)") == [key]


def test_text_keeps_the_features_with_it_in_a_marked_or_raised_token(page):
    tokens = [f and [SEEN[token].lower() for token in (f[4], f[5], 9)] for f in FEATURES]
    for text in ("SELF", " s", "turn", "⏎", "<SCRIPT>", "·", "hacked=1</s", "no such token", " "):
        kept = [i for i, own in enumerate(tokens) if own and any(text.lower() in token for token in own)]
        assert len(kept) < 10, "the text has to filter something out"
        page.filter(text)
        assert page.js(ROWS) == ordered("density", -1, kept)
        assert page.js("getComputedStyle(list.parentNode, '::after').content") == f'"{len(kept)} features"'
    page.filter("")
    assert page.js(ROWS) == ordered("density", -1)


def test_a_kind_keeps_its_features(page):
    alive = [i for i, f in enumerate(FEATURES) if f]
    motifs = [(motif, [i for i in alive if DATA["features"][i]["motif"] == motif]) for motif in MOTIFS]
    for kind, kept in (("alive", alive), ("ultra-low", [3]), ("dead", [2, 6]), *motifs, ("all", COLUMNS["number"])):
        page.filter("", kind)
        assert page.js(ROWS) == ordered("density", -1, kept)
    page.filter("self", "dead")
    assert page.js(ROWS) == []


def test_arrow_keys_step_through_the_list_as_it_is_sorted_and_filtered(page):
    page.open("#0")
    page.click("#max")
    page.filter("hacked")  # feature 0 is not among these
    order = ordered("max", -1, [7, 8, 12])
    page.js("document.activeElement.blur()")
    keys = ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowLeft")
    for key, at in zip(keys, (0, 1, 2, 2, 1, 0)):
        page.key(key)
        page.expect(HEADING, f"feature {order[at]}")
        assert page.js(CURRENT) == page.js("[document.activeElement.hash]") == [f"#{order[at]}"]
    page.filter("")
    page.js("document.activeElement.blur()")
    page.key("ArrowRight")  # the feature has other neighbours now
    page.expect(HEADING, f"feature {ordered('max', -1)[ordered('max', -1).index(order[0]) + 1]}")


def test_arrow_keys_do_not_step_while_typing_or_with_alt(page):
    page.open("#0")
    page.js("visited = []; addEventListener('hashchange', () => visited.push(location.hash))")
    page.filter("lt")
    order = page.js(ROWS)
    page.key("ArrowLeft")
    page.js("kind.focus()")
    page.key("ArrowLeft")
    page.js("document.activeElement.blur()")
    page.key("ArrowLeft", modifiers=1)
    page.key("ArrowRight")  # this one does
    page.expect("visited", [f"#{order[order.index(0) + 1]}"])


# -----------------------------------------------------------------------------
# a feature


def test_a_feature_shows_its_effects_neurons_and_histogram(page):
    page.open("#0")
    line = "[...line.childNodes].map(part => part.textContent).concat(+line.style.getPropertyValue('--share'))"
    panels = page.js(f"""Object.fromEntries([...feature.querySelectorAll("section")].map(panel => [
        panel.querySelector("h2").textContent, [...panel.querySelectorAll(".ranked")].map(line => {line})]))""")
    assert panels["raised tokens, logits about median"] == [["Return", "+2.50", 1], ["&lt;", "+1.25", 0.5]]
    assert panels["lowered tokens, logits about median"] == [["def", "−3.00", 1], ["Return", "−0.00", pytest.approx(0.004 / 3)]]
    assert panels["neurons, cosine"] == [["77", "−0.50", 1], ["8", "+0.25", 0.5]]
    heights = page.js("[...document.querySelectorAll('.bars .bar')].map(bar => bar.getBoundingClientRect().height)")
    assert heights[0] > 100 and heights[:8] == pytest.approx([heights[0] / 2**k for k in range(8)], abs=0.5)  # a root


def test_examples_stand_in_groups_shaded_by_activation_with_the_marked_token_outlined(page):
    page.open("#3")
    groups = page.js("""[...feature.children].filter(part => part.querySelector(":scope > .text")).map(part => [
        part.querySelector("h2").textContent, [...part.querySelectorAll(".text")].map(line =>
            [...line.querySelectorAll(":scope > bdi")].map(token => token.textContent).join(""))])""")
    line = "def self⏎    ⏎    Return"
    assert groups == [["top", [line, line]], ["50-75%", [line]], ["0-25%", [line]]]
    each = "[...feature.querySelectorAll('.text')].map(line => [...line.querySelectorAll(':scope > bdi')].map(t => +(%s)))"
    shares = page.js(each % "t.style.getPropertyValue('--share')")
    assert shares == [[0, 0, share, 0.1, 0] for share in (1, 0.75, 0.5, 0.125)]
    alphas = page.js(each % "getComputedStyle(t).backgroundColor.match(/[\\d.]+/g)[3]")
    assert all(a == 0 for line in alphas for a in (line[0], line[1], line[4]))
    assert alphas[0][2] > alphas[1][2] > alphas[2][2] > alphas[3][2] > alphas[3][3] > 0.05
    outlined = "[...feature.querySelectorAll('.text')[0].querySelectorAll(':scope > bdi')].map(t => getComputedStyle(t).boxShadow !== 'none')"
    assert page.js(outlined) == [False, False, True, False, False]


@pytest.mark.parametrize("how", ["mouse", "keyboard"])
def test_a_tooltip_tells_activation_and_effect(page, how):
    page.open("#0")
    tips = """[...feature.querySelectorAll('.text')[1].querySelectorAll(':scope > bdi')].map(t =>
        getComputedStyle(t, '::after').content)"""
    assert page.js(tips) == ["none"] * 5
    page.js("feature.querySelectorAll('.text button')[0].focus()")  # from here, Tab goes to the next that is active
    for nth, activation, effect in ((2, "2.25", "−0.25"), (3, "0.300", "–")):
        if how == "mouse":
            page.mouse(".text:nth-of-type(2) > bdi", nth)
        else:
            page.key("Tab")
        shown = page.js(tips)
        assert shown[nth].startswith(f'"activation {activation}\\a ') and shown[nth].endswith(f' {effect}"')
        assert [tip for k, tip in enumerate(shown) if k != nth] == ["none"] * 4


def test_a_dead_feature_says_so(page):
    page.open("#2")
    assert page.js(HEADING) == "feature 2" and "dead: never active" in page.js("feature.innerText")
    assert page.js("feature.querySelectorAll('.text, .ranked, .bar').length") == 0


def test_what_is_active_in_training_alone_says_so_and_what_only_the_held_out_text_has_is_dead(
        page, monkeypatch, tmp_path):
    """By density, that on training tokens, features are dead or of ultra-low density."""
    lone = {"nearest": [], "together": []}
    first, second = (feature | lone for feature in DATA["features"][:2])
    features = [first, {"density": 3e-6, "map": [0, 1]}, second | {"density": 0}]
    (tmp_path / "features.html").write_text(fill_page(DATA | {"features": features, "texts": []}), encoding="utf-8")
    monkeypatch.setattr(page, "path", tmp_path / "features.html")
    page.open("#1")
    assert page.js(VALUES) == ["0.0003%"] and "not active on the held-out text" in page.js("feature.innerText")
    for kind, kept in (("alive", [0, 1]), ("ultra-low", [1]), ("dead", [2])):
        page.filter("", kind)
        assert page.js(ROWS) == kept
    page.js("location.hash = '#2'")
    page.expect(HEADING, "feature 2")
    assert page.js(VALUES)[:2] == ["0%", "1.50"] and "dead: never active" in page.js("feature.innerText")
    assert page.js("feature.querySelectorAll('.text').length") == 4


def test_features_that_are_not_on_the_page_have_no_row_and_no_link(page, monkeypatch, tmp_path):
    """Of a large dictionary the page has some; the others keep their numbers."""
    features = [None, DATA["features"][1], None, *DATA["features"][3:6]]
    texts = [{"tokens": [0, 1], "active": [[[0, 2.0], [1, 0.5]], []]}]
    data = DATA | {"features": features, "texts": texts}
    (tmp_path / "features.html").write_text(fill_page(data), encoding="utf-8")
    monkeypatch.setattr(page, "path", tmp_path / "features.html")
    page.open("#texts/0/0")
    assert page.js(ROWS) == ordered("density", -1, [1, 3, 4, 5])
    lines = "[...document.querySelectorAll('#active .ranked')].map(line => [line.firstChild.hash, line.textContent])"
    (no_link, first), (link, second) = page.js(lines)
    assert first == "0 (not on this page)2.00" and link == "#1" and second.endswith("0.500") and no_link is None
    page.js("location.hash = '#0'")
    page.expect(HEADING, "tiny · mlp.0")
    assert page.js("dots.map(feature => feature.number)") == [1, 3, 4, 5]


def test_a_new_feature_and_a_new_order_are_shown_from_the_top(page):
    page.call("Emulation.setDeviceMetricsOverride", width=1200, height=500, deviceScaleFactor=1, mobile=False)
    page.open("#0")
    page.js("document.querySelector('main').scrollTop = 200")
    assert page.js("document.querySelector('main').scrollTop") == 200
    page.key("ArrowDown")
    page.expect("document.querySelector('main').scrollTop", 0)
    page.js("list.parentNode.scrollTop = 100")
    assert page.js("list.parentNode.scrollTop") == 100
    page.js("max.click()")
    page.expect("list.parentNode.scrollTop", 0)


def test_the_lines_around_a_window_are_shown_and_a_click_unfolds_the_whole_context(page):
    page.open("#0")
    example = "feature.querySelector('.text')"
    around = f"[...{example}.querySelectorAll('.around')].map(part => part.textContent)"
    assert page.js(around) == [" self" * 24, "⏎    " * 24]
    alpha = "getComputedStyle(%s).backgroundColor.match(/[\\d.]+/g)[3]"
    assert float(page.js(alpha % f"{example}.querySelectorAll('.around')[1].children[5]")) == pytest.approx(0.425, abs=0.01)

    def unfolded():
        return page.js(f"[...{example}.children].filter(part => part.tagName !== 'BUTTON').map(part => part.textContent)")

    words = [SEEN[token].replace("⏎", "⏎\n") for token in DATA["contexts"][0]]
    page.click(".text .around")
    assert unfolded() == words and page.js(f"{example}.querySelector('button').ariaExpanded") == "true"
    shaded = f"[...{example}.children].map((part, k) => part.classList.contains('shaded') ? k : -1).filter(k => k >= 0)"
    assert page.js(shaded) == [2, 32, 33, 40]
    page.click(".text .shaded")  # shows its tooltip
    assert unfolded() == words and "–" in page.js(f"getComputedStyle({example}.children[2], '::after').content")
    page.js(f"{example}.querySelector('button').focus()")
    page.key("Enter")
    assert page.js(around)[0] == " self" * 24
    page.key("Enter")  # the button keeps the focus
    assert unfolded() == words
    page.click(".text button")
    assert page.js(around)[0] == " self" * 24
    assert "hacked" not in page.js("Object.keys(window)")


def test_a_feature_links_to_its_neighbours_and_tells_its_motif(page):
    page.open("#3")
    lines = """[...feature.querySelectorAll('section')].filter(panel => panel.querySelector('h2').title).map(panel => [
        panel.querySelector('h2').textContent, [...panel.querySelectorAll('.ranked')].map(line =>
            [line.querySelector('a').hash, line.lastChild.textContent, +line.style.getPropertyValue('--share')])])"""
    panels = dict(page.js(lines))
    assert panels["nearest features, cosine"] == [
        ["#4", "+0.90", 1],
        ["#5", "+0.45", 0.5],
        ["#6", "+0.30", pytest.approx(1 / 3)],
    ]
    assert panels["active together, correlation"] == [["#0", "+0.50", 1]]
    assert "single token: 0.05 by the token alone" in page.js("feature.innerText")
    page.click("#feature .ranked a")
    page.expect(HEADING, "feature 4")


# -----------------------------------------------------------------------------
# the first view

DOTS = [i for i, f in enumerate(FEATURES) if f]


def colour_at(page, number):
    """The colour of the canvas in the middle of a feature's dot: red, green, blue, alpha."""
    return page.js(f"""(() => {{ const {{ x, y }} = dotOf(features[{number}]), scale = devicePixelRatio;
        return [...canvas.getContext("2d").getImageData(scale * x, scale * y, 1, 1).data]; }})()""")


def point_at(page, number, kinds=("mouseMoved",)):
    x, y = page.js(f"""(() => {{ canvas.scrollIntoView({{ block: "center" }}); const box = canvas.getBoundingClientRect();
        const dot = dotOf(features[{number}]); return [box.x + dot.x, box.y + dot.y]; }})()""")
    for kind in kinds:
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    return x, y


def test_the_map_has_a_dot_for_every_feature_but_the_dead_ones(page):
    assert page.js("dots.map(feature => feature.number)") == DOTS
    size = page.js("canvas.clientWidth")
    assert size == page.js("canvas.clientHeight") > 300
    for i in DOTS:
        x, y = (10 + (size - 20) * place for place in DATA["features"][i]["map"])
        assert page.js(f"Object.values(dotOf(features[{i}])).slice(0, 2)") == pytest.approx([x, y])
        assert colour_at(page, i)[3] > 150
    radii = page.js("dots.map(feature => dotOf(feature).radius)")
    densities = [FEATURES[i][0] for i in DOTS]
    assert [radii[k] for k in sorted(range(len(DOTS)), key=densities.__getitem__)] == sorted(radii)


def test_a_dot_under_the_mouse_tells_its_token_and_a_click_opens_its_feature(page):
    point_at(page, 3)
    page.expect("pointedView.textContent", "feature 3 ⏎    \ndensity 0.0004%\nsingle token\nraises   &lt;")
    assert page.js("pointedView.checkVisibility() && canvas.style.cursor") == "pointer"
    box = page.js("(({ left, right }) => [left, right])(pointedView.getBoundingClientRect())")
    assert page.js("document.querySelector('main').getBoundingClientRect().left") <= box[0] < box[1] <= page.js("innerWidth")
    point_at(page, 3, ("mouseMoved", "mousePressed", "mouseReleased"))
    page.expect(HEADING, "feature 3")
    assert page.js(CURRENT) == ["#3"]
    page.mouse("h1")
    page.js("history.back()")
    page.expect("canvas.checkVisibility() && !pointedView.checkVisibility()", True)
    point_at(page, 0)
    page.expect("pointedView.checkVisibility()", True)
    page.mouse("h1")
    page.expect("pointedView.checkVisibility()", False)


def test_a_tap_on_a_dot_shows_its_tooltip_and_a_tap_on_that_opens_the_feature(page):
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    page.open()

    def tap(x, y):
        page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    tap(*point_at(page, 5, ()))
    page.expect("pointedView.hash + pointedView.checkVisibility()", "#5true")
    assert page.js(HEADING) == "tiny · mlp.0"
    tap(*page.js("(box => [box.x + box.width / 2, box.y + box.height / 2])(pointedView.getBoundingClientRect())"))
    page.expect(HEADING, "feature 5")
    page.call("Emulation.setTouchEmulationEnabled", enabled=False)


def test_the_search_lights_its_dots_up_and_the_list_rings_one(page):
    page.filter("hacked")
    shown = page.js(ROWS)
    assert sorted(shown) == [7, 8, 12]
    for i in DOTS:
        assert (colour_at(page, i)[3] > 150) == (i in shown), i
    assert page.js("featureAt(dotOf(features[0]).x, dotOf(features[0]).y)") is None  # what is dimmed cannot be hit
    page.mouse("#list a", 1)
    page.expect("pointed?.number", shown[1])
    ring = page.js("""(() => { const { x, y, radius } = dotOf(pointed);
        return [...canvas.getContext("2d").getImageData(x + radius, y, 1, 1).data]; })()""")
    assert max(ring[:3]) < 60 and ring[3] > 150  # as dark as the text
    page.filter("")
    assert all(colour_at(page, i)[3] > 150 for i in DOTS)


@pytest.mark.parametrize("token, expected", [
    ("⏎⏎    ", "white space"), ("⇥", "white space"), ("", "white space"), ("  ", "white space"),
    (" 10", "number"), ("2", "number"), ("٣", "number"),
    ("self", "word"), ("x1", "word"), ("é", "word"), ("_a", "word"), (" the", "word after a space"), (" __x", "word after a space"),
    ("漢", "other script"), (" это", "other script"), ("\\xe2\\x80", "other script"), ("של", "other script"),
    ("):", "punctuation"), (" =", "punctuation"), ("\\", "punctuation"), ("�", "punctuation"), ("_", "punctuation"),
])
def test_a_token_is_of_the_class(page, token, expected):
    assert page.js(f"(data.vocabulary.push({json.dumps(token)}), classOf(data.vocabulary.length - 1))") == expected


def test_dots_are_coloured_by_names_or_between_the_smallest_and_the_largest_number(page):
    def choose(name):
        page.js(f"colouring.value = {json.dumps(name)}; colouring.dispatchEvent(new Event('input'))")
        return page.js("dots.map(feature => feature.colour)"), page.js("legend.innerText.split(/\\n+/).slice(-7)")

    def opaque(colour):
        return [int(part) for part in re.findall(r"\d+", colour)]

    # a name has a colour of its own, and the legend tells how many dots have it
    colours, lines = choose("motif")
    motifs = [DATA["features"][i]["motif"] for i in DOTS]
    for motif in {*motifs}:
        assert len({colour for colour, own in zip(colours, motifs) if own == motif}) == 1
        assert any(f"{motif or 'none'} {motifs.count(motif)}" in line for line in lines), (motif, lines)
    assert len(set(colours)) == len({*motifs})
    # a number lies between the ends
    colours, lines = choose("neuron correlation")
    values = [FEATURES[i][3] for i in DOTS]
    low, high = min(filter(None, values)), max(filter(None, values))
    first, last = opaque(page.js("mixColour(0)")), opaque(page.js("mixColour(1)"))
    for colour, value in zip(colours, values):
        if value is None:
            assert colour == page.js("noColour")
            continue
        share = (value - low) / (high - low)
        assert opaque(colour) == pytest.approx([a + share * (b - a) for a, b in zip(first, last)], abs=0.51)
    assert "0.05" in "".join(lines) and "0.90" in "".join(lines)
    for name in page.js("Object.keys(colourings)"):
        choose(name)
        assert colour_at(page, 0)[3] > 150


def test_the_charts_are_those_of_the_densities_and_of_the_log(page):
    heights = page.js("[...document.querySelectorAll('#charts .bar')].map(bar => parseFloat(bar.style.height))")
    logs = [math.log10(FEATURES[i][0]) for i in DOTS]
    counts = [sum(math.floor(5 * (log + 6)) == k for log in logs) for k in range(30)]
    assert heights == pytest.approx([100 * count / max(counts) for count in counts], rel=1e-4)
    text = page.js("charts.innerText")
    assert f"density of {len(DOTS)} features" in text and "0.0001%" in text and "step 400" in text
    lines = page.js("[...charts.querySelectorAll('polyline')].map(line => line.getAttribute('points'))")
    assert lines == ["25,97 50,50 100,3", "25,3 100,97", "25,97 50,97 100,97"]  # a null has no point


def test_without_a_log_or_a_living_feature_the_first_view_has_what_there_is(page, monkeypatch, tmp_path):
    monkeypatch.setattr(page, "path", tmp_path / "features.html")
    page.path.write_text(fill_page(DATA | {"training": {}}), encoding="utf-8")
    page.open()
    assert page.js("[charts.querySelectorAll('.bars').length, charts.querySelectorAll('svg').length]") == [1, 0]
    page.path.write_text(fill_page(DATA | {"features": [DATA["features"][0] | {"density": 1}]}), encoding="utf-8")
    page.open()
    assert page.js("[...document.querySelectorAll('#charts .bar')].map(bar => bar.style.height)") == ["0%"] * 4 + ["100%"]
    page.path.write_text(fill_page(DATA | {"features": [{"density": 0}], "texts": []}), encoding="utf-8")
    page.open()
    assert page.js("[document.querySelectorAll('canvas, svg').length, list.children.length]") == [0, 1]
    assert page.js(HEADING) == "tiny · mlp.0" and page.js(VALUES) == ["10.5"]


# -----------------------------------------------------------------------------
# the example texts


def test_a_click_on_a_token_lists_its_features_and_a_click_on_one_goes_there(page):
    page.click("header a", nth=1)
    page.expect("texts.checkVisibility()", True)
    page.click("#texts a", nth=0)
    page.expect(ACTIVE, [["#1", "2.00", 1], ["#0", "0.500", 0.25]])
    assert page.js(CURRENT) == ["#texts/0/0"]
    page.click("#texts a", nth=1)
    page.expect(ACTIVE, [])
    page.click("#texts a", nth=3)
    page.expect(ACTIVE, [["#4", "0.0100", 1], ["#2", "0.00100", 0.1]])
    page.click("#active a", nth=0)
    page.expect(HEADING, "feature 4")
    assert page.js("feature.checkVisibility() && !texts.checkVisibility()")
    page.js("history.back()")
    page.expect(CURRENT, ["#texts/0/3"])
    assert page.js(ACTIVE)[0][0] == "#4"


def test_arrow_keys_step_through_the_tokens_of_a_text(page):
    page.open("#texts")
    page.key("ArrowDown")  # no token is chosen yet: this scrolls
    page.click("#texts a", nth=1)
    page.expect(CURRENT, ["#texts/0/1"])
    for key, place in (("ArrowRight", "#texts/0/2"), ("ArrowLeft", "#texts/0/1"), ("ArrowUp", "#texts/0/0")):
        page.key(key)
        page.expect(CURRENT, [place])


# -----------------------------------------------------------------------------
# tokens that would like to be more


def test_hostile_tokens_stay_text_wherever_they_are_shown(page):
    page.open("#texts/1/0")
    assert page.js("[...texts.children[1].children].map(a => a.textContent)") == [t.replace("⏎", "⏎\n") for t in SEEN]
    for i in range(7, len(FEATURES)):
        page.js(f"location.hash = '#{i}'")
        page.expect(HEADING, f"feature {i}")
        text = SEEN[FEATURES[i][4]]
        assert page.js("document.querySelector('#list [aria-current=true] bdi').textContent") == text
        assert page.js("feature.querySelector('.ranked bdi').textContent") == text
        assert page.js("[...feature.querySelectorAll('.text')[0].querySelectorAll(':scope > bdi')].map(t => t.textContent)") == [
            "def",
            " self",
            text,
            "⏎    ",
            "Return",
        ]
        assert page.js("document.querySelectorAll('img, textarea, script').length") == 2  # its own data and script
    assert page.js("'hacked' in window") is False


@pytest.mark.parametrize("place", ["#14", "#texts/1/0"])
def test_every_token_is_isolated_and_has_room_on_the_page(page, place):
    page.open(place)
    tokens = "[...document.querySelectorAll('bdi, .text a')].filter(t => t.checkVisibility())"
    styles = page.js(f"{tokens}.map(t => [getComputedStyle(t).unicodeBidi, t.getBoundingClientRect().width > 5])")
    assert len(styles) > 15 and all(style == ["isolate", True] for style in styles)
    blank = f"{tokens}.filter(t => t.textContent[0] === ' ')"  # which must not collapse
    assert set(page.js(f"{blank}.map(t => getComputedStyle(t).whiteSpace.slice(0, 3))")) == {"pre"}
    assert page.js("/[^\\P{C}\\n]|[\\u2028\\u2029]/u.test(document.body.innerText)") is False


# -----------------------------------------------------------------------------
# how it looks


@pytest.mark.parametrize("place", ["", "#0", "#2", "#18", "#texts/1/16"])
def test_nothing_is_wider_than_a_phone(page, place):
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    page.open(place)
    assert page.js("[innerWidth, document.scrollingElement.scrollWidth]") == [390, 390]
    assert page.js("[...document.querySelectorAll('main, aside, nav, .text')].every(e => e.scrollWidth <= 390)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page, scheme):
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(text, over, alpha, under):
        low, high = sorted((luminance(text), luminance([alpha * a + (1 - alpha) * b for a, b in zip(over, under)])))
        return (high + 0.05) / (low + 0.05)

    def colours(selector):
        style = f"getComputedStyle(document.querySelector({json.dumps(selector)}))"
        both = page.js(f"[{style}.color, {style}.backgroundColor]")
        return [[float(x) for x in re.findall(r"[\d.]+", colour)] for colour in both]

    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.open("#0")
    paper = colours("#headings")[1]
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for selector in ("h1", "h2", "#list a", "#list [aria-current=true]", "bdi.shaded", ".ranked bdi", "input"):
        text, over = colours(selector)
        assert contrast(text, over[:3], over[3] if len(over) > 3 else 1, paper) >= 4.5, selector


def test_a_hostile_corpus_runs_nothing_from_text_to_page(browser, tmp_path, monkeypatch):
    lines = [
        "<script>window.hacked = 1</script>",
        "</textarea>\"'`<img src=x onerror=window.hacked=1>",
        "\u202eevil\u2066 \x07\x1b[31m",
    ]
    (tmp_path / "text.txt").write_text(
        "".join(f"{line} {i % 9}\n" for i in range(600) for line in lines), encoding="utf-8"
    )
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe no utf-8")
    flags = (f"--out_dir={tmp_path / 'out'}",)
    for command in (
        ("train_gpt.py", f"--dataset={tmp_path / 'text.txt'},{tmp_path / 'bytes.txt'}", *SMALL_GPT),
        ("train_sae.py", *SMALL_SAE),
        ("analyze.py", "--show=2"),
    ):
        done = script(*command, *flags)
        assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout  # the terminal is spared, too
    monkeypatch.setattr(browser, "path", tmp_path / "out" / "sae" / "scaling" / "features.html")
    browser.open("#texts")
    assert "<script>" in browser.js("document.getElementById('texts').textContent")
    assert browser.js("typeof window.hacked") == "undefined"
    troubles = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    assert not [event for event in browser.events if event.get("method") in troubles]
