"""The page of a run: whole, true to the record, safe, and right in a browser whatever the record lacks."""

import os
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench.browser import browser, installed
from jactus import JactusError
from jactus.app import charts, page, words
from jactus.app.record import Layer, Point, Run, Score, Stage, Swept, Version

REAL = Run.load(Path(__file__).parent / "files/run")
FEW = replace(REAL, layers=REAL.layers[:4])  # where layers are not what a test is about
EVIL = "<script>alert(1)</script> & \"quoted\" 'too' $x_1$ {{ 71 * 77 }}"
VOID = {"br", "col", "meta", "wbr", "link", "img", "hr", "input"}
CSS = Path(page.__file__).with_name("page.css").read_text(encoding="utf-8")


def layer(name, m=64, n=64, rank=32, top=1e-3):
    at = [1, 2, 4, 8, 16, 32, 64]
    return Layer(name, m, n, rank, 64 if rank is None else rank, at, [top / a**2 for a in at])


def blocks(depth, kinds):
    return [layer(f"model.layers.{b}.{kind}", rank=16 + b % 48) for b in range(depth) for kind in kinds]


def scored(metric, *values):
    names = ("dense", "compressed", "trained", "reloaded")
    return replace(FEW, metric=metric, scores=[Score(of, v, loss) for of, (v, loss) in zip(names, values)])


NOTHING = Run("", "m", "t", "loss", {}, {}, {}, 0, "", "", {}, 0.0)
LLAMA = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
RUNS = {
    "real": REAL,
    "nothing in it": NOTHING,
    "no training": replace(FEW, training=[], scores=REAL.scores[:2]),
    "no sweep, no checks, no stages": replace(FEW, sweep=[], checks=[], stages=[]),
    "no validation while training": replace(FEW, training=[replace(p, metric=None) for p in REAL.training]),
    "one point of everything": replace(FEW, training=REAL.training[-1:], sweep=REAL.sweep[:1]),
    "one layer in no block": replace(REAL, layers=[layer("classifier")]),
    "one layer in a block": replace(REAL, layers=blocks(1, ["dense"])),
    "one direction": replace(REAL, layers=[Layer("one", 1, 1, 1, 1, [1], [0.5])]),
    "224 layers": replace(REAL, layers=blocks(32, LLAMA)),
    "13 kinds": replace(REAL, layers=blocks(4, [f"kind_{i}.of_a_long_name" for i in range(13)])),
    "60 kinds in 4 stages": replace(REAL, layers=blocks(4, [f"blocks.{i}.mlp.fc{j}" for i in range(30) for j in "12"])),
    "nothing compressed": replace(REAL, layers=[replace(each, rank=None) for each in REAL.layers]),
    "no layers": replace(REAL, layers=[]),
    "nothing matters": replace(REAL, layers=[replace(x, energies=[0.0] * len(x.at)) for x in REAL.layers], predicted=0),
    "losses near the least double": replace(
        REAL, layers=[layer("a.0.b", top=1e-305)], sweep=[Swept(0.5, 9, 1e-300)], predicted=1e-300
    ),
    "huge losses": replace(
        scored("perplexity", (1e9, 20.7), (1e300, 690.8), (1e12, 27.6), (1e12, 27.6)),
        layers=[layer("a.0.b", top=1e200)],
        sweep=[Swept(0.5, 9, 1e12), Swept(0.9, 12, 1e11)],
        training=[Point(i, i / 9, 1e9 / i, 1e12 / i) for i in range(1, 10)],
    ),
    "a perplexity": scored("perplexity", (39.92, 3.69), (55.02, 4.01), (41.91, 3.74), (41.91, 3.74)),
    "one class": scored("accuracy", (1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)),
    "it went badly": scored("accuracy", (0.9, 0.3), (0.6, 0.9), (0.5, 1.2), (0.4, 1.9)),
    "no budget will do": replace(FEW, sweep=[replace(swept, predicted=1.0 + swept.budget) for swept in REAL.sweep]),
    "seven billions": replace(
        FEW,
        sizes=[Version("dense", 6_738_415_616, 0, 13_476_831_232, 812.4), Version("deployed", 10**9, 0, 2 * 10**9)],
        stages=[Stage("train", 123_456.0), Stage("fold", 0.01)],
    ),
    "evil": replace(
        FEW,
        **dict.fromkeys(("command", "base", "task", "created", "machine"), EVIL),
        data={EVIL: {EVIL: [EVIL]}},
        config={EVIL: {EVIL: [EVIL]}},
        recipe={EVIL: EVIL},
        versions={EVIL: EVIL},
        checks=[EVIL],
        stages=[Stage(EVIL, 1.0)],
        scores=[*REAL.scores, Score(EVIL, 0.5, 0.5)],
        sizes=[*REAL.sizes, Version(EVIL, 5, 5, 5)],
        layers=[layer(f"{EVIL}.0.{EVIL}"), layer(EVIL)],
    ),
    "long words": replace(
        FEW, base="m" * 300, task="t" * 200, command="c" * 400, checks=["x" * 300], data={"p" * 90: "q" * 400}
    ),
}


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and collects what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words, self.tables = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append(Counter())
        if "table" in self.open:
            self.tables[-1][f"{tag} {dict(attributes).get('scope', '')}".strip()] += 1

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def pages():
    return {name: page.html(run) for name, run in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_every_page_is_whole_and_needs_nothing_else(pages, name):
    parsed = Page(pages[name])
    assert pages[name].startswith("<!doctype html>")
    assert {"script", "img", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in parsed.elements)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = re.findall(r'href="([^"]*)"|url\(([^)]*)\)|src="', pages[name])
    assert {a or b for a, b in asked} <= {f"#{each}" for each in ids}
    assert not any(key.startswith("on") for _, attributes in parsed.elements for key in attributes)
    assert not re.search(r"\b(nan|inf|None|undefined)\b", parsed.text.replace(EVIL, "")), parsed.text


@pytest.mark.parametrize("name", RUNS)
def test_tables_have_headers_and_pictures_words(pages, name):
    parsed = Page(pages[name])
    for table in parsed.tables:
        assert table["th col"] >= 2
        assert table["th row"] >= 1
    assert all(a.get("aria-label") and a["role"] == "img" for tag, a in parsed.elements if tag == "svg")
    assert sum(tag == "h1" for tag, _ in parsed.elements) == 1


def test_a_tag_that_is_not_closed_would_be_seen(pages):
    for wrong in (pages["real"].replace("</table>", "", 1), pages["real"].replace("</p>", "</p></p>", 1)):
        with pytest.raises(AssertionError):
            Page(wrong)


def test_the_page_says_what_the_record_says(pages):
    text = Page(pages["real"]).text
    for score in REAL.scores:
        assert f"{100 * score.metric:.1f}%" in text
        assert f"{score.loss:.4f}" in text
    for version in REAL.sizes:
        assert f"{version.parameters / 1e6:.2f}" in text
        assert f"{version.bytes / 1e6:.1f}" in text
        assert version.milliseconds is None or f"{version.milliseconds:.3g}" in text
    for each in REAL.layers:
        assert re.search(rf"{re.escape(each.name)} {each.m}×{each.n} {each.rank} ", re.sub(r"\. ", ".", text))
    for swept in REAL.sweep:
        assert re.search(rf"{swept.budget:g} {swept.parameters / 1e6:.2f} M {swept.predicted:.6f}", text)
    for point in REAL.training:
        assert re.search(rf" {point.step} {point.epoch:.2f} {point.loss:.4f}", text)
    for sentence in (*REAL.checks, REAL.command, REAL.base, REAL.machine, *map(str, REAL.versions.values())):
        assert sentence in text
    assert f"predicted {REAL.predicted:.5f}" in text
    measured = REAL.scores[1].loss - REAL.scores[0].loss
    fell = " (it fell)" if measured < 0 else ""
    assert f"measured{fell} {words.aligned([REAL.predicted, measured])[1]}" in text


def test_every_layer_has_its_field_with_its_rank():
    layers = blocks(5, LLAMA)
    found = page.grid(layers)
    assert (found.across, found.down) == (LLAMA, list("01234"))
    assert [found.of[b, kind] for b in found.down for kind in found.across] == layers
    many = page.grid(RUNS["60 kinds in 4 stages"].layers)
    assert len(many.across) == 4
    assert len(many.of) == 240
    alone = [layer("pooler"), layer("a.0.b")]
    assert page.grid(alone).alone == alone[:1]


def test_nothing_in_a_record_becomes_markup(pages):
    text = pages["evil"]
    assert "<script" not in text
    assert "5467" not in re.findall(r"\{\{.*?\}\}|\b5467\b", text)
    assert Page(text).text.count(EVIL) >= 15


def test_what_is_not_in_the_record_is_said_and_not_drawn(pages):
    text = Page(pages["nothing in it"]).text
    for word in ("No score", "not recorded", "No layer", "not measured", "No other budget", "not trained", "no check"):
        assert word in text
    assert "<svg" not in pages["nothing in it"]
    assert "no spectrum" in Page(pages["nothing matters"]).text


def test_the_suggested_budget_is_the_smallest_within_the_limit():
    sweep = [Swept(0.9, 90, 0.001), Swept(0.5, 50, page.TOLERATED), Swept(0.7, 70, 0.01), Swept(0.3, 30, 0.3)]
    found = page.advice(replace(REAL, sweep=sweep), None)
    assert found.chosen == sweep[1]
    assert not found.smallest
    assert page.advice(replace(REAL, sweep=sweep[:3]), None).smallest
    assert page.advice(replace(REAL, sweep=sweep[3:]), None).chosen is None
    assert page.advice(NOTHING, None) is None


def test_verdicts_say_when_it_went_badly():
    good, bad = (page.verdicts(RUNS[name], {s.of: s for s in RUNS[name].scores}) for name in ("real", "it went badly"))
    assert [well for well, _ in bad] == [False] * 3
    assert good[2][0]
    assert "the same model" in good[2][1]
    language = page.verdicts(RUNS["a perplexity"], {s.of: s for s in RUNS["a perplexity"].scores})
    assert language[1][0], "a perplexity that falls is better"


def test_the_standard_error_is_that_of_a_share():
    rows, points = page.chance(replace(scored("accuracy", (0.5, 1.0)), data={"rows": {"validation": 100}}))
    assert rows == 100
    assert points == pytest.approx(5.0)
    assert page.chance(RUNS["a perplexity"]) is None
    assert page.chance(replace(REAL, data={})) is None


def test_lora_is_computed_where_the_record_has_none():
    layers = [layer("a.0.b", 64, 64), layer("a.1.b", 256, 64)]
    sizes = {"dense": Version("dense", 1000, 0, 4000, 5.0)}
    run = replace(REAL, layers=layers)
    assert page.lora(run, sizes) == [Version(page.LORA, 1000, 16 * 128 + 16 * 320, 4000)]
    assert page.lora(run, {**sizes, "LoRA": sizes["dense"]}) == page.lora(run, {}) == page.lora(NOTHING, sizes) == []


@pytest.mark.parametrize(
    "values, written",
    [
        ([0.0123, 0.4], ["0.0123", "0.4000"]),
        ([0.000021, 1.0], ["0.000021", "1.000000"]),
        ([1e-9, 0.0, -1e-9], ["<0.000001", "0.000000", ">−0.000001"]),
        ([-0.01, 12.5], ["−0.010", "12.500"]),
        ([123456.7], ["123,457"]),
        ([], []),
    ],
)
def test_a_column_of_losses_is_aligned(values, written):
    assert words.aligned(values) == written


def test_a_change_has_its_sign():
    assert words.change("accuracy", 0.774, 0.832) == "+5.8"
    assert words.change("accuracy", 0.5, 0.5) == "0.0"
    assert words.change("perplexity", 41.82, 42.82) == "+1.00"
    assert words.change("loss", 0.49, 0.4877) == "−0.0023"


def test_a_cut_stands_on_its_line():
    found = Layer("a", 64, 64, 16, 4, [1, 2, 8, 64], [8.0, 4.0, 1.0, 0.1])
    assert charts._at(found, 2, found.energies) == 4.0
    assert charts._at(found, 4, found.energies) == pytest.approx(4 * (1 / 4) ** (2 / 6))
    assert charts._at(found, 64, found.energies) == 0.1


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def mixed(a, b, part):
    return "#" + "".join(
        f"{round(part * int(a[i : i + 2], 16) + (1 - part) * int(b[i : i + 2], 16)):02x}" for i in (1, 3, 5)
    )


@pytest.mark.parametrize("scheme", range(3), ids=["light", "dark", "print"])
def test_text_stands_out_from_its_ground(scheme):
    """WCAG's 4.5 to 1, in the fullest fields of the rank map too; 3 to 1 for the marks of pictures."""
    found = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)[scheme]
    colours = {
        name: c if len(c) > 4 else "#" + "".join(2 * x for x in c[1:])
        for name, c in re.findall(r"--(\w+): (#\w+)", found)
    }
    tint = int(re.search(r"--tint: (\d+)%", found)[1]) / 100
    grounds = [colours["paper"], colours["panel"]]
    pairs = [(colours[ink], ground, 4.5) for ink in ("ink", "muted", "accent") for ground in grounds]
    pairs += [(colours["ink"], mixed(colours["accent"], colours["panel"], tint), 4.5), (colours["warm"], grounds[0], 3)]
    for ink, ground, least in pairs:
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, (ink, ground)


def test_it_is_written_whole_or_not_at_all(tmp_path):
    page.write(REAL, tmp_path / "new" / "page.html")
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["page.html"]
    (tmp_path / "file").touch()
    with pytest.raises(JactusError, match="could not write"):
        page.write(REAL, tmp_path / "file" / "page.html")


@pytest.fixture(scope="module")
def chromium():
    if installed() is None and not os.environ.get("CI"):
        pytest.skip("Chromium is not installed; apt-get install chromium")
    with browser() as running:
        yield running


def faults(chromium, file, width=360):
    """What is wrong with a page in the browser: console messages, requests, what reaches over the right edge in light or
    dark; and the two grounds."""
    found, grounds = [], []
    tab = chromium.new_page(viewport={"width": width, "height": 740})
    tab.on("console", lambda message: found.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: found.append(f"error: {error}"))
    tab.on("request", lambda request: found.append(f"request: {request.url}") if request.url != file.as_uri() else None)
    tab.goto(file.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        reach = tab.evaluate("document.documentElement.scrollWidth")
        if reach > width:
            found.append(f"{reach} wide on a screen of {width}, {scheme}")
        grounds.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    tab.close()
    return found, grounds


@pytest.mark.parametrize("name", RUNS)
def test_a_browser_shows_it_on_a_phone_in_light_and_dark(chromium, pages, name, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(pages[name], encoding="utf-8")
    found, grounds = faults(chromium, file)
    assert found == []
    assert len(set(grounds)) == 2, "both schemes look alike"


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("<div style='width:900px'>wide</div>", "wide on"),
        ("<img src='https://example.org/x.png' alt='x'>", "console"),
        ("<script>console.error('x')</script>", "console"),
    ],
)
def test_the_browser_sees_what_is_wrong(chromium, pages, wrong, said, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(pages["nothing in it"].replace("</main>", f"{wrong}</main>"), encoding="utf-8")
    assert any(said in fault for fault in faults(chromium, file)[0])
    if "img" in wrong:  # without the page's own refusal of it, it would be asked for
        file.write_text(file.read_text().replace("default-src 'none'", "default-src *"), encoding="utf-8")
        assert any("request" in fault for fault in faults(chromium, file)[0])
