"""The page in a real browser, from a file: what a reader does with mouse, keyboard, phone and printer."""

import base64
from pathlib import Path

import pytest
from browser import Browser

from llm.analysis.accounting import units
from llm.gallery import page
from llm.gallery.catalog import entries, picture
from llm.gallery.compare import marks
from llm.gallery.png import INSTALL, find_browser

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"Chromium is not installed: {INSTALL}")
URL = page.PAGE.as_uri()
SHOWN = "[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[0].textContent)"
COLUMN = "[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[{}].textContent)"
CHECKS = Path(__file__).with_name("gallery_checks.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=CHECKS)
    yield browser
    browser.close()


@pytest.fixture
def tab(browser):
    browser.errors.clear()
    browser.size(1400, 900)
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
    browser.open(URL)
    yield browser
    browser.run("1")  # what was reported until now
    assert browser.errors == []


def test_search_filter_and_sort(tab):
    everything = tab.run(SHOWN)
    assert everything == list(entries())
    tab.click("#search")
    tab.type("latent attention yarn")
    found = ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "kimi-k2", "deepseek-v3.2"]
    assert tab.run(SHOWN) == found
    tab.run("$('search').value = ''; $('search').dispatchEvent(new Event('input', { bubbles: true }))")
    tab.run("const s = document.querySelector('[data-filter=\"feed-forward\"]'); s.value = 'MoE, 4 of 32'; "
            "s.dispatchEvent(new Event('input', { bubbles: true }))")  # fmt: skip
    assert tab.run(SHOWN) == ["gpt-oss-20b"]
    assert tab.run("$('count').textContent") == f"1 of {len(everything)} pictures"
    tab.open(URL)
    tab.click("#table thead th:nth-child(8) button")  # parameters, the largest first
    assert tab.run(SHOWN)[0] == "kimi-k2"
    assert tab.run("document.querySelector('#table thead th:nth-child(8)').getAttribute('aria-sort')") == "descending"
    tab.click("#table thead th:nth-child(3) button")
    dates = tab.run(COLUMN.format(2))
    assert dates == sorted(dates)


def test_every_model_opens_and_none_of_its_text_is_cut(tab):
    for name in entries():
        tab.run(f"location.hash = '{name}'")
        tab.wait(f"$('model-title').textContent === '{name}' && !!document.querySelector('.picture')")
        assert tab.run("spilled()") == [], name
        assert tab.run("document.querySelectorAll('[data-part]').length") > 5
    assert tab.run("wide()") == []


def test_two_models_side_by_side_by_a_link_that_can_be_shared(tab):
    tab.open(f"{URL}#qwen3-8b&vs=llama3.1-8b")
    assert tab.run("document.querySelectorAll('.picture').length") == 2
    differs = "[...document.querySelectorAll('#differences tr.differs th')].map((th) => th.textContent)"
    assert tab.run(differs) == ["position", "mixer", "parameters", "active"]
    tab.run("$('versus').value = 'qwen3-30b-a3b'; $('versus').dispatchEvent(new Event('change'))")
    tab.wait("location.hash === '#qwen3-8b&vs=qwen3-30b-a3b' && $('model-title').textContent.endsWith('qwen3-30b-a3b')")
    assert "feed-forward" in tab.run(differs)
    assert tab.run("spilled()") == []


def test_from_the_table_to_the_differences_of_two_models_in_three_steps(tab):
    tab.click("#search")
    tab.type("kimi-k2")
    tab.click("#table tbody a[href='#kimi-k2']")
    tab.wait("$('model-title').textContent === 'kimi-k2'")
    for other, rows in (
        ("deepseek-v3", [["n_heads", "64", "128"], ["n_experts", "384", "256"], ["n_dense_layers", "1", "3"]]),
        ("qwen3-235b-a22b", [["n_experts", "384", "128"], ["d_model", "7168", "4096"]]),
    ):
        tab.run(f"$('versus').value = '{other}'; $('versus').dispatchEvent(new Event('change'))")
        tab.wait(f"$('model-title').textContent === 'kimi-k2 beside {other}'")
        cells = (
            "[...document.querySelectorAll('#config tr.differs')].map((r) => [...r.cells].map((c) => c.textContent))"
        )
        assert all(row in tab.run(cells) for row in rows)
    assert tab.run("$('differences').textContent").count("Latent attention") >= 1


@pytest.mark.parametrize(
    "name, other", [("qwen3-8b", "llama3.1-8b"), ("gemma2", "baseline"), ("post_norm", "deepseek-v3")]
)
def test_the_page_colours_what_the_command_colours(tab, name, other):
    known = entries()
    first = picture(known[name])
    tab.open(f"{URL}#{name}&vs={other}")
    found = tab.run(f"Object.fromEntries(marks(byName.get('{name}'), byName.get('{other}')))")
    assert found == {str(key): mark for key, mark in marks(first, picture(known[other])).items()}
    drawn = "document.querySelector('.pictures figure').querySelectorAll('.changed, .new, .resized').length"
    assert tab.run(drawn) == len(found)


def test_a_box_tells_its_equation_its_costs_and_its_source(tab):
    tab.open(f"{URL}#qwen3-8b")
    tab.click(".mixer[data-part] > text")
    box = tab.run("$('box').textContent")
    assert "head_h = Attention(x W_q^h" in box and "q_proj 4096 → 4096" in box and "36 layers" in box
    links = tab.run("[...document.querySelectorAll('#box a')].map((a) => a.getAttribute('href'))")
    assert "https://arxiv.org/abs/1706.03762" in links
    assert any(link.startswith("../../llm/modules/attention/multi_head.py#L") for link in links)
    tab.click(".block")
    assert "x = x + mixer(mixer_norm(x))" in tab.run("$('box').textContent")


def test_the_costs_on_the_page_are_written_as_the_scripts_write_them(tab):
    """For every model and context: the numbers, which test_gallery.py holds to accounting.py, with its `units`."""
    tab.open(f"{URL}#qwen3-8b")
    shown = tab.run(
        "data.models.map((m) => [m.name, [...data.contexts.keys()].map((k) => { shown = m; $('context').value = k; "
        "showCosts(); return [...document.querySelectorAll('#costs table td')].map((td) => td.textContent); })])"
    )
    models = {model["name"]: model["costs"] for model in page.unpack(page.PAGE.read_text(encoding="utf-8"))["models"]}
    for name, rows in shown:
        costs = models[name]
        size, active = (units(costs[key]).replace("G", "B").strip() for key in ("parameters", "active"))
        for k, row in enumerate(rows):
            context, cache = 1024 * 2**k, costs["cache"][k]
            if cache is None:
                assert row == [size, active, *["no such position"] * 3], name
                continue
            held = [f"{units(value)}B" for value in (cache, cache / context)]
            assert row == [size, active, f"{units(costs['flops'][k])}FLOPs", *held], (name, context)


def test_what_it_sees_and_what_it_does_are_drawn(tab):
    for name, words, lines in (
        ("alibi", "ALiBi, added to the scores", 16),
        ("t5_bias", "before training: each step is a number", 1),
        ("relative_position", "it depends on the query", 3),
        ("mamba2", "what is left of its state", 16),
    ):
        tab.open(f"{URL}#{name}")
        assert words in tab.run("$('sights').textContent")
        assert tab.run("document.querySelectorAll('#sights .chart path:not(.axis)').length") == lines
    tab.run("shown.results = [{ page: 'docs/results/ladder.jsonl', title: 'Trained', head: ['', 'equal FLOPs'], "
            "rows: [['eval loss', '1.234']] }]; showResults()")  # fmt: skip
    cells = "[...document.querySelectorAll('#results th, #results td')].map((cell) => cell.textContent)"
    assert tab.run(cells) == ["", "equal FLOPs", "eval loss", "1.234"]


def test_the_slider_moves_the_costs(tab):
    tab.open(f"{URL}#qwen3-8b")
    assert "147 kB" in tab.run("$('costs').textContent")
    tab.run("$('context').focus()")
    tab.key("End")
    assert tab.run("$('context-label').textContent") == "Context: 1 M tokens"
    costs = tab.run("$('costs').textContent")
    assert "155 GB" in costs and "made for 40,960 tokens" in costs  # 147 kB times 2^20
    tab.run("location.hash = 'mistral-7b-v0.1'")
    tab.wait("$('model-title').textContent === 'mistral-7b-v0.1'")
    assert "537 MB" in tab.run("$('costs').textContent")  # the window's


def test_a_keyboard_is_enough(tab):
    tab.run("$('search').focus()")
    tab.type("qwen3-8b")
    for _ in range(60):
        tab.key("Tab")
        if tab.run("document.activeElement.textContent") == "qwen3-8b":
            break
    tab.key("Enter")
    tab.wait("$('model-title').textContent === 'qwen3-8b'")
    for _ in range(30):
        tab.key("Tab")
        if "Grouped-query" in (tab.run("document.activeElement.getAttribute('aria-label')") or ""):
            break
    assert tab.run("getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth") == "3px"
    tab.key("Enter")
    assert tab.run("$('box').querySelector('h3').textContent") == "Grouped-query attention"
    assert tab.run("unnamed()") == []


def test_headings_are_in_order(tab):
    tab.open(f"{URL}#gpt_oss")
    levels = tab.run(
        "[...document.querySelectorAll('h1, h2, h3')].filter((h) => h.checkVisibility()).map((h) => +h.tagName[1])"
    )
    assert levels[:2] == [1, 2] and set(levels[2:]) == {3}


@pytest.mark.parametrize(
    "address", ["", "#timeline", "#tree", "#deepseek-v3", "#gemma3-1b&vs=qwen3-8b", "#parallel_block"]
)
def test_a_phone_shows_all_within_its_width(tab, address):
    tab.size(390, 844, phone=True)
    tab.open(URL + address)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    assert tab.run("wide()") == []
    assert tab.run("tiny()") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("address", ["", "#timeline", "#tree", "#gpt-oss-20b&vs=mixtral-8x7b", "#latent"])
def test_text_has_contrast_in_both_themes(tab, theme, address):
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    tab.open(URL + address)
    assert tab.run("document.documentElement.className") == theme
    assert tab.run("faint()") == []


def test_the_theme_can_be_chosen(tab):
    tab.click("#theme")
    tab.click("#theme")
    assert tab.run("[document.documentElement.className, $('theme').textContent]") == ["dark", "Theme: dark"]
    tab.click("#theme")


def test_it_prints(tab):
    tab.open(f"{URL}#qwen3-8b")
    pdf = base64.b64decode(tab.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 10_000
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.run("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_time_line_and_family_tree_lead_to_every_model(tab):
    for view in ("timeline", "tree"):
        tab.run(f"location.hash = '{view}'")
        tab.wait(f"!$('view-{view}').hidden")
        names = tab.run(f"[...document.querySelectorAll('#{view} a')].map((a) => a.textContent)")
        assert sorted(names) == sorted(entries())
    rope = "[...document.querySelectorAll('#tree li')].find((li) => li.querySelector('a')?.textContent === 'rope')"
    assert "its own make_mixer; adds rope_theta" in tab.run(f"{rope}.textContent")


def test_an_unknown_address_shows_the_table(tab):
    tab.open(f"{URL}#no-such-model")
    assert not tab.run("$('view-table').hidden")
