"""The documentation's links, its table of contents and its reference, read without mkdocs."""

import re
from pathlib import Path

import yaml

import simlab
from simlab.report.page.quantities import BY_SUBLAYER

ROOT = Path(__file__).parents[1]
ABOVE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PAGES = [*map(ROOT.joinpath, ABOVE), *sorted((ROOT / "docs").glob("*.md"))]


def links(page):
    """The relative links and images of a page, without their anchors."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link.split("#")[0] for link in found if not re.match(r"https?:|#", link)]


def test_links_lead_to_files_of_the_site():
    seen = 0
    for page in PAGES:
        for link in links(page):
            target = page.parent / link
            assert target.is_file(), f"{page.name}: {link}"
            assert target != page, f"{page.name} links to itself"
            there = target.resolve()
            assert link in ABOVE or there.is_relative_to(ROOT / "docs"), f"{page.name}: {link}"
            seen += 1
    assert seen > 20


def test_site_has_every_page():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w-]+\.md", str(nav))
    assert sorted(listed) == sorted([*ABOVE.values(), *(page.name for page in PAGES[len(ABOVE) :])])


def test_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    described = re.findall(r"^::: simlab[\w.]*\.(\w+)$", text, flags=re.M)
    assert set(simlab.__all__) - {"__version__"} <= set(described)


def test_docstrings_of_the_python_api():
    """Each function has an example, what it gives and what it raises; each class its attributes."""
    from simlab.results import Comparison, Result, SweepResult

    names = ("measure", "compare", "multirun", "load", "load_run", "load_sweep", "plot")
    plots = [kind.plot for kind in (Result, SweepResult, Comparison)]
    for function in [
        *(getattr(simlab, name) for name in names),
        *plots,
        Result.save,
        SweepResult.job,
    ]:
        for part in ("Example:\n", "Returns", "Raises ConfigError"):
            assert part in function.__doc__, (function.__qualname__, part)
    for kind in (Result, SweepResult, Comparison):
        assert "Example:\n" in kind.__doc__
        assert "Attributes:\n" in kind.__doc__


def test_columns_are_explained():
    page = (ROOT / "docs" / "columns.md").read_text(encoding="utf-8")
    assert [name for name in BY_SUBLAYER if f"`{name}`" not in page] == ["rms"]  # of plots alone


def test_readme_python_runs(tmp_path, monkeypatch):
    """Its two examples, with a small model in the place of what would be downloaded or large."""
    import transformers

    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen3Config(vocab_size=1000, **shape, **heads)
    small = transformers.Qwen3ForCausalLM(config)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: small)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block.replace('"olmo2_7b"', '"small", depth=2').replace("seeds=8", "seeds=2"), names)
    assert (tmp_path / "growth.png").is_file()
    assert len(names["rows"]) == 5  # the embedding and two blocks of two sublayers


def test_python_guide_runs(tmp_path, monkeypatch, capsys):
    """Its examples on smaller models, but for the sweep and the demo, which other tests run."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    names: dict = {}
    for block in blocks:
        if not re.search("multirun|demo", block):
            small = re.sub(
                r"depth=\d+, seeds=\d", "depth=2, seeds=1, width=64, heads=4, d_ff=128", block
            )
            exec(small, names)
    assert len(blocks) > 5
    assert "did you mean pre?" in capsys.readouterr().out
