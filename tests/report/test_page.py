"""The pages in a real browser, without a network, and what they hold before one opens them."""

import itertools
import json
import math
import re
import shutil
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from conftest import in_process, tiny

from simlab.analysis.curve import Curves
from simlab.analysis.headline import headline
from simlab.analysis.verdict import judge
from simlab.experiment import run
from simlab.report.growth_figure import growth_figure
from simlab.report.page import build, sweep
from simlab.report.page.quantities import BY_SUBLAYER, DRAWABLE
from simlab.store import plain_values, read_csv

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
OPTIONS = [  # what a browser needs in a container; it looks nothing up
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SMALL = ["model=small", "width=64", "heads=4", "d_ff=128", "device=cpu"]


def read(folder):
    frame = read_csv(folder / "curve.csv")
    frame["block"] = frame["block"].astype("Int64")
    return frame, json.loads((folder / "summary.json").read_text())


def data_of(html):
    """The data of a page, as its script reads it."""
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', html, re.S)[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint's run, one with gradients, a sweep, and a check of recorded curves."""
    top = tmp_path_factory.mktemp("pages")
    for overrides in (
        ["source=demo", "seeds=4", "inputs.batch=1", "inputs.length=32", "hydra.run.dir=demo"],
        [*SMALL, "depth=3", "seeds=3", "gradients=true", "inputs.length=16", "hydra.run.dir=run"],
        ["-m", *SMALL, "engine=theory", "depth=2,4", "norm=reordered,pre", "hydra.sweep.dir=sweep"],
    ):
        done = in_process(*overrides, cwd=top)
        assert done.returncode == 0, done.stderr
    return top


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("needs Chromium, which isn't installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def look(browser, made):
    """Open a page; at the end of a test nothing was asked of a network and nothing went wrong."""
    wrong, contexts = [], []

    def look(name, width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True,
            has_touch=width < 600,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: wrong.append(request.url) if request.url.startswith("http") else None,
        )
        page.goto((made / name / "report.html").as_uri())
        return page

    yield look
    for context in contexts:
        context.close()
    assert wrong == []


def drawn(page):
    """The lines of the figure."""
    return page.eval_on_selector_all(
        "#plot g[clip-path] > path", "all => all.map(e => e.getAttribute('d'))"
    )


def test_hover_and_keys_read_values(look, made):
    page = look("demo")
    box = page.locator("#plot svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 15, box["y"] + 100)  # the last sublayer
    tip = page.locator(".tip").inner_text()
    frame, _ = read(made / "demo")
    last = frame[frame["curve"] == "checkpoint"]["mean_square"].iloc[-1]
    assert "sublayer 48, mlp of block 24" in tip
    assert f"{last:.4g}" in tip
    page.focus("#plot svg")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    said = page.locator("#said").text_content()
    assert said.startswith("sublayer 1, attention of block 1: ")
    assert "checkpoint" in said
    assert "random init" in said


def test_every_quantity_is_drawn(look):
    page = look("run")
    offered = page.eval_on_selector_all("#quantity option", "all => all.map(o => o.value)")
    assert {"mean_square", "rms", "gradient_rms", "lambda_pairwise", "mean_abs", "cosine"} <= set(
        offered
    )
    for name in offered:
        page.select_option("#quantity", name)
        assert any(drawn(page)), name
        assert DRAWABLE[name].label in page.locator("#plot svg").get_attribute("aria-label")


SWITCHES = {  # a control, and what takes its change back
    "[data-scale=log]": "[data-scale=linear]",
    "[data-seeds=lines]": "[data-seeds=band]",
    "[data-seeds=none]": "[data-seeds=band]",
    "#relative": "#relative",
    "#fit": "#fit",
    "#closer": "#wider",
    ".key >> nth=0": ".key >> nth=0",
    "[data-rows=sublayer]": "[data-rows=block]",
}


def test_switches(look):
    """Each changes the lines, or the table's rows, and takes it back."""
    page = look("demo")
    before, rows = drawn(page), page.locator("#table tbody tr").count()
    for switch, back in SWITCHES.items():
        page.click(switch)
        of_table = "rows" in switch
        assert (drawn(page) != before) != of_table, switch
        assert (page.locator("#table tbody tr").count() != rows) == of_table, switch
        if switch.startswith("[data"):
            assert page.get_attribute(switch, "aria-pressed") == "true"
        page.click(back)
        assert drawn(page) == before, back


def test_drag_zooms(look):
    page = look("demo")
    before = drawn(page)
    box = page.locator("#plot svg").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 600, box["y"] + 210)
    page.mouse.up()
    assert drawn(page) != before
    page.keyboard.press("Escape")
    assert drawn(page) == before


def test_table_sorts(look):
    page = look("demo")
    head = page.locator("#table th button", has_text="checkpoint")

    def column():
        cells = page.eval_on_selector_all(
            "#table tbody tr", "all => all.map(r => r.children[3].textContent)"
        )
        return [float(cell.replace("·10⁻⁴", "e-4")) for cell in cells]

    head.click()
    assert column() == sorted(column())
    head.click()
    assert column() == sorted(column(), reverse=True)
    assert page.locator("#table th[aria-sort=descending]").count() == 1


def test_jobs_one_by_one(look):
    page = look("sweep")
    together = drawn(page)
    page.click("[data-mode=one]")
    first = drawn(page)
    page.focus("#job")
    page.keyboard.press("ArrowRight")
    assert page.locator("#jobname").input_value() == "1"
    assert len({str(together), str(first), str(drawn(page))}) == 3
    assert "norm pre" in page.locator("#chart-title").inner_text()
    page.click("[data-mode=all]")
    assert drawn(page) == together


def test_blocks_of_other_sublayers(look, made):
    """A row per block has each model's own end of it; what models don't share isn't said of both."""
    frame, summary = read(made / "run")
    frame = frame[frame["seed"] == 0]
    parallel = frame[frame["kind"] != "attention"]
    parallel = parallel.assign(sublayer=(parallel["sublayer"] + 1) // 2)
    models = {"serial": frame[frame["sublayer"] < 5], "parallel": parallel}
    jobs = [build.PageJob(name, rows, summary, {"model": name}) for name, rows in models.items()]
    table = pd.DataFrame({"job": [0, 1], "curve": "random", "mean_square": 1.0, "shape": "none"})
    table["model"] = list(models)
    (made / "mixed").mkdir()
    html = sweep.sweep_page(jobs, table, "t", [], "c", "w")
    (made / "mixed" / "report.html").write_text(html, encoding="utf-8")
    page = look("mixed")

    def rows():
        cells = "all => all.map(r => [...r.children].map(c => c.textContent))"
        return page.eval_on_selector_all("#table tbody tr", cells)

    _, *blocks = rows()
    ends = frame.loc[frame["kind"] == "mlp", "mean_square"].to_numpy()
    np.testing.assert_allclose([float(row[4]) for row in blocks], ends, rtol=6e-4)  # four digits
    np.testing.assert_allclose([float(row[3]) for row in blocks[:2]], ends[:2], rtol=6e-4)
    assert blocks[2][3] == ""
    assert [row[:3] for row in rows()] == [
        ["0", "", "embedding"], ["", "1", "mlp"], ["", "2", "mlp"], ["3", "3", "mlp"],
    ]  # fmt: skip
    page.click("[data-rows=sublayer]")
    assert [row[:3] for row in rows()][:2] == [["0", "", "embedding"], ["1", "1", ""]]


@pytest.mark.parametrize("name", ["demo", "run", "sweep"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_fits_and_is_readable(look, name, width, scheme):
    page = look(name, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    colours = (
        "getComputedStyle(document.body).color + getComputedStyle(document.body).backgroundColor"
    )
    before = page.evaluate(colours)
    page.click("#theme")
    assert page.evaluate(colours) != before
    unnamed = """all => all.filter(e => !(e.textContent.trim() || e.getAttribute('aria-label')
        || e.closest('label'))).map(e => e.outerHTML)"""
    assert page.eval_on_selector_all("button, select, input", unnamed) == []
    if width == 390:
        top = page.locator("#plot").bounding_box()["y"]
        assert top < 600, "the figure is on the first screen of a phone"
        page.touchscreen.tap(200, top + 100)
        assert page.locator(".tip").is_visible()


def test_sweep_answers(made):
    html = (made / "sweep" / "report.html").read_text(encoding="utf-8")
    data = data_of(html)
    assert data["command"].startswith("python -m simlab.run -m model=small")
    assert "depth=2,4" in data["command"]
    said = r"The mean square at the end is between \S+ \(depth 2, norm pre\) and \S+ \(depth 4,"
    assert re.match(said, data["headline"])
    assert [job["label"] for job in data["jobs"]] == [
        "depth 2, norm reordered", "depth 2, norm pre", "depth 4, norm reordered", "depth 4, norm pre",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def twelve(made):
    """A page of 12 jobs: the init's std makes decades, the norm a factor of 2, depth only length."""
    frame, summary = read(made / "run")
    jobs = []
    for depth, std, norm in itertools.product((2, 3), (0.01, 0.1, 1.0), ("pre", "reordered")):
        rows = frame[frame["sublayer"] <= 2 * depth]
        rows = rows.assign(mean_square=rows["mean_square"] * std**2 * (1 + (norm == "pre")))
        values = {"depth": depth, "init.std": std, "norm_placement": norm}
        jobs.append(build.PageJob(f"depth {depth}, {std}, {norm}", rows, summary, values))
    table = pd.DataFrame([{"job": i, "curve": "random", "mean_square": 1.0, "shape": "none", **j.values}
                          for i, j in enumerate(jobs)])  # fmt: skip
    html = sweep.sweep_page(jobs, table, "t", [], "c", "w")
    (made / "twelve").mkdir()
    (made / "twelve" / "report.html").write_text(html, encoding="utf-8")
    return data_of(html)


def test_no_two_curves_look_alike_at_first(twelve):
    assert [key["look"] for key in twelve["keys"]] == ["", "colour", "dash"]
    assert twelve["hide"] == ["depth=2"]
    shown = [look for look, job in zip(twelve["looks"], twelve["jobs"], strict=True)
             if job["values"][0] == "3"]  # fmt: skip
    assert len(shown) == len({tuple(look.items()) for look in shown}) == 6


def test_values_switch_their_jobs(look, twelve):
    page = look("twelve")
    lines = "#plot g[clip-path] > path[style*='stroke-width']"
    assert page.get_attribute("[data-scale=log]", "aria-pressed") == "true"  # std: four decades
    assert page.locator(lines).count() == 6
    page.click("[data-value='depth=2']")
    assert page.locator(lines).count() == 12
    page.click("[data-value='norm=pre']")
    assert page.locator(lines).count() == 6
    page.click("#each-title")
    page.locator("#keys .key", has_text="depth 3, 1.0, pre").click()  # one more than its values say
    assert page.locator(lines).count() == 7


def test_numbers_are_those_of_the_files(made):
    """Mean, least and most over the seeds, at five digits; λ as analysis has it."""
    frame, summary = read(made / "run")
    (job,) = data_of((made / "run" / "report.html").read_text(encoding="utf-8"))["jobs"]
    (curve,) = job["curves"]
    table = frame.pivot(index="seed", columns="sublayer", values="branch_mean_square").to_numpy()
    for name, how in (("mean", np.mean), ("low", np.min), ("high", np.max)):
        got = np.array(curve[name]["branch_mean_square"][1:], dtype=float)
        np.testing.assert_allclose(
            got, how(table, axis=0)[1:], rtol=6e-5
        )  # half of the fifth digit
    root = np.sqrt(frame.pivot(index="seed", columns="sublayer", values="mean_square")).to_numpy()
    np.testing.assert_allclose(curve["mean"]["rms"], root.mean(0), rtol=6e-5)
    exponents = summary["lambda"]["random"]
    np.testing.assert_allclose(
        curve["mean"]["lambda_pairwise"], exponents["lambda_pairwise"], rtol=6e-5
    )
    law = next(law for law in job["laws"] if law["key"] == "additive")
    of_file = frame.groupby("sublayer")["law_additive"].mean()
    np.testing.assert_allclose(law["mean"]["mean_square"], of_file, rtol=6e-5)
    assert "variance" not in law["mean"]  # no law is about it


def many(depth, seeds):
    """A frame of every column, as large as asked."""
    n = 2 * depth + 1
    kinds = ["embedding", *["attention", "mlp"] * depth]
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "curve": "random", "seed": np.repeat(range(seeds), n), "sublayer": np.tile(range(n), seeds),
            "block": pd.array([pd.NA, *np.repeat(range(depth), 2)] * seeds, dtype="Int64"),
            "kind": kinds * seeds,
        }
    )  # fmt: skip
    for name in (*BY_SUBLAYER, "law_additive", "law_sqrt2", "law_mean_field", "band_mean_field"):
        frame[name] = draw.lognormal(size=len(frame))
    return frame


def test_size(made):
    _, summary = read(made / "run")
    frame = many(64, 9)
    summary["config"]["model"] |= {"depth": 64}
    html = build.run_page(frame, summary, "t", "c", "w")
    assert len(html.encode()) <= 3e6
    (job,) = data_of(html)["jobs"]
    assert set(BY_SUBLAYER) <= set(job["curves"][0]["mean"])
    assert len(job["curves"][0]["seeds"]) == 9
    one = frame[frame["seed"] == 0]
    jobs = [build.PageJob(f"depth {i}", one, summary, {"depth": i}) for i in range(130)]
    table = pd.DataFrame({"job": range(130), "curve": "random", "mean_square": 1.0, "shape": "none",
                          "depth": range(130)})  # fmt: skip
    html = sweep.sweep_page(jobs, table, "t", ["An answer."], "c", "w")
    assert len(html.encode()) <= 3e6
    lines = data_of(html)["lines"]
    assert lines[0] == "An answer."
    assert re.match(r"The figure has \d+ of the 130 jobs", lines[1])


def test_texts_stay_texts(made):
    """Whatever a path or a name holds, it ends no element of the page."""
    frame, summary = read(made / "run")
    evil = "</script><script>alert(1)</script><!-- &amp; \u2028"
    summary["verdict"]["random"]["sentence"] = evil
    summary["config"]["inputs"]["kind"] = evil
    html = build.run_page(frame, summary, evil, evil, "w")
    assert html.count("<script>") == 1
    assert html.count("</script>") == 2
    data = data_of(html)
    assert (data["title"], data["command"], data["lines"][0]) == (evil, evil, evil)


def test_values_that_are_not_finite(made):
    frame, summary = read(made / "run")
    at = frame["sublayer"] > 3
    frame.loc[at & (frame["seed"] == 1), ["mean_square", "norm"]] = np.inf
    frame.loc[at, "gradient_rms"] = np.nan
    frame = frame[~(at & (frame["seed"] == 2))]  # a curve that ends early
    summary["overflow"] = [{"curve": "random", "seed": 2, "sublayer": 4, "kind": "mlp", "block": 1}]
    data = data_of(build.run_page(frame, summary, "t", "c", "w"))
    curve = data["jobs"][0]["curves"][0]
    assert curve["mean"]["gradient_rms"][4:] == [None] * 3
    one = frame[(frame["seed"] == 0) & (frame["sublayer"] == 6)]["mean_square"].iloc[0]
    assert curve["mean"]["mean_square"][6] == pytest.approx(one, rel=6e-5)
    assert any("first non-finite value at sublayer 4" in text for text in data["warnings"])


HEADLINES = {
    (
        "norm=reordered",
    ): r"At init, theory predicts that the residual stream's mean square grows linearly, "
    r"by \d\.\d+ per sublayer; √2 per sublayer is off by a factor of \d+\.",
    ("norm=post",): r".* stays at \S+\.",
    (
        "norm=swin_renorm",
        "norm.every=3",
    ): r".* is a saw-tooth: each re-norm sets it back to \S+, from peaks "
    r"of up to \S+\.",
    ("norm=none", "init.std=0.3"): r".* goes from \S+ at the embedding to \S+ in too few "
    r"rows to name a shape\.",  # seeds soon differ too much
}


@pytest.mark.parametrize("norm", ["reordered", "pre"])
def test_warns_of_eps_where_a_norm_acts_on_the_branch(norm):
    """Both have branches far below eps, but pre-norm's are added as they come."""
    result = run(tiny(f"norm={norm}", "init.std=0.001", "seeds=1"))
    assert (result.curve["eps_factor"][1:] < 0.5).any()
    texts = list(build.warnings(result.curve, plain_values(result.summary)))
    assert any("its eps shrinks the output" in text for text in texts) == (norm == "reordered")


@pytest.mark.parametrize("overrides", HEADLINES)
def test_headline(overrides):
    config = tiny("engine=theory", "depth=12", "inputs.length=16", *overrides)
    result = run(config)
    text = headline(result.curve, plain_values(result.summary))
    assert re.fullmatch(HEADLINES[overrides], text), text
    assert growth_figure(result.curve, "title", [text])  # whatever laws there are


def test_title_and_verdict_name_one_start():
    """The row that the word is about, not the embedding, whose value the verdict tells apart."""
    v = [1e-3, 2, 20, 2, 21, 1, 30, 2, 9, 8]
    eps, kinds = np.ones((1, 10)), ["embedding", *["attention", "mlp"] * 4, "attention"]
    curves = Curves(kinds, np.array([v]), eps, [1.0] * 10, [None] * 10, {}, None, 10)
    verdict = judge(curves, "float32", "checkpoint")
    frame = pd.DataFrame(
        {"curve": "checkpoint", "seed": 0, "sublayer": range(10), "mean_square": v}
    )
    frame = frame.assign(massive=0, block=[math.nan, *np.repeat(range(5), 2)[:9]])
    summary = {"departure": None, "sublayers": 9, "theories": {"checkpoint": {}}}
    summary["verdict"] = {"checkpoint": {"fit": asdict(verdict.shape)}}
    said = " goes from 2 at sublayer 1 to 8 in no simple shape"
    assert said in headline(frame, summary)
    assert f"{said}: neither" in verdict.sentence


LEFT = {"first": 3, "sublayer": 7, "block": 3, "kind": "attention", "ratio": 4.0, "last": 10}
DEPARTED = {
    "above": (
        {},
        "ends 4× above a random init's; it is outside their band for good from sublayer 7 on",
    ),
    "below": ({"ratio": 0.25}, "ends 4× below a random init's"),
    "never": (
        {"first": None, "sublayer": None, "ratio": 1.1},
        "every sublayer (at the end its mean square is 1.1× above their mean).",
    ),
    "near": ({"ratio": 0.98}, "ends 2 % below a random init's"),
    "equal": ({"first": None, "sublayer": None, "ratio": 1.00001}, "is equal to their mean)."),
    "back": ({"sublayer": None}, "leaves the random inits' band at sublayer 3 and ends within it"),
    "early": ({"last": 6}, "is at sublayer 6 4× above"),
    "infinite": ({"ratio": None}, "far above"),
    "embedding": ({"sublayer": 0}, "from the embedding on"),
}


@pytest.mark.parametrize("case", DEPARTED)
def test_headline_of_a_checkpoint(case):
    change, said = DEPARTED[case]
    summary = {"departure": LEFT | change, "config": {"model": {"depth": 5}}}
    assert said in headline(pd.DataFrame(), summary)
