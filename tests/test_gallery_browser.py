"""The page in a real browser, from a file: what a reader with a mouse, a keyboard, a phone or a printer does with it."""

import base64

import pytest
from browser import Browser

from llm.gallery import page
from llm.gallery.catalog import entries, picture
from llm.gallery.compare import marks
from llm.gallery.png import INSTALL, find_browser

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"Chromium is not installed: {INSTALL}")
URL = page.PAGE.as_uri()
SHOWN = "[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[0].textContent)"
COLUMN = "[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[{}].textContent)"
# Texts in pictures that leave the box they stand in, or run into another text of it
SPILLED = """[...document.querySelectorAll('.picture g')].flatMap((group) => {
  const rect = group.querySelector(':scope > rect'), texts = [...group.querySelectorAll(':scope > text')];
  const outer = rect?.getBoundingClientRect(), inner = texts.map((text) => text.getBoundingClientRect());
  const out = texts.filter((_, i) => outer && (inner[i].left < outer.left || inner[i].right > outer.right + 0.5 ||
    inner[i].top < outer.top - 2 || inner[i].bottom > outer.bottom + 2));
  const met = texts.filter((_, i) => inner.some((other, j) => j < i && other.left < inner[i].right - 1 &&
    inner[i].left < other.right - 1 && other.top < inner[i].bottom - 5 && inner[i].top < other.bottom - 5));
  return [...out, ...met].map((text) => text.textContent); })"""
# Elements of the page that are wider than the window
WIDE = """[...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, .pictures, pre, svg, .skip') &&
  e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.id || e.className || e.tagName)"""
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (colour) => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (colour) => rgb(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (c !== 'rgba(0, 0, 0, 0)' && c !== 'transparent') return c; } return 'white'; };
  const poor = [];
  for (const text of document.querySelectorAll('.picture text')) {
    const rect = text.parentElement.querySelector(':scope > rect'), fill = rect && getComputedStyle(rect).fill;
    const ground = fill && fill !== 'none' ? fill : behind(text);
    if (ratio(getComputedStyle(text).fill, ground) < 4.5) poor.push(text.textContent);
  }
  for (const e of document.querySelectorAll('main *, header *')) {
    if (e.closest('svg') || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || !e.checkVisibility()) continue;
    if (ratio(getComputedStyle(e).color, behind(e)) < 4.5) poor.push(e.textContent.slice(0, 40));
  }
  return poor; })()"""


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
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
    assert tab.run(SHOWN) == ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3"]
    tab.run("$('search').value = ''; $('search').dispatchEvent(new Event('input', { bubbles: true }))")
    tab.run("const s = document.querySelector('[data-filter=\"feed-forward\"]'); s.value = 'MoE, 4 of 32'; "
            "s.dispatchEvent(new Event('input', { bubbles: true }))")  # fmt: skip
    assert tab.run(SHOWN) == ["gpt-oss-20b"]
    assert tab.run("$('count').textContent") == f"1 of {len(everything)} pictures"
    tab.open(URL)
    tab.click("#table thead th:nth-child(8) button")  # parameters, the largest first
    assert tab.run(SHOWN)[0] == "deepseek-v3"
    assert tab.run("document.querySelector('#table thead th:nth-child(8)').getAttribute('aria-sort')") == "descending"
    tab.click("#table thead th:nth-child(3) button")
    dates = tab.run(COLUMN.format(2))
    assert dates == sorted(dates)


def test_every_model_opens_and_none_of_its_text_is_cut(tab):
    for name in entries():
        tab.run(f"location.hash = '{name}'")
        tab.wait(f"$('model-title').textContent === '{name}' && document.querySelector('.picture')")
        assert tab.run(SPILLED) == [], name
        assert tab.run("document.querySelectorAll('[data-part]').length") > 5
    assert tab.run(WIDE) == []


def test_two_models_side_by_side_by_a_link_that_can_be_shared(tab):
    tab.open(f"{URL}#qwen3-8b&vs=llama3.1-8b")
    assert tab.run("document.querySelectorAll('.picture').length") == 2
    differs = "[...document.querySelectorAll('#differences tr.differs th')].map((th) => th.textContent)"
    assert tab.run(differs) == ["position", "mixer", "parameters", "active"]
    tab.run("$('versus').value = 'qwen3-30b-a3b'; $('versus').dispatchEvent(new Event('change'))")
    tab.wait("location.hash === '#qwen3-8b&vs=qwen3-30b-a3b' && $('model-title').textContent.endsWith('qwen3-30b-a3b')")
    assert "feed-forward" in tab.run(differs)
    assert tab.run(SPILLED) == []


@pytest.mark.parametrize("name, other", [("qwen3-8b", "llama3.1-8b"), ("gemma2", "baseline"), ("post_norm", "deepseek-v3")])
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
    unnamed = "[...document.querySelectorAll('a, button, input, select, [role], [tabindex=\"0\"]')].filter((e) => " \
        "!(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length || e.getAttribute('aria-labelledby')))"  # fmt: skip
    assert tab.run(f"{unnamed}.map((e) => e.outerHTML.slice(0, 80))") == []


def test_headings_are_in_order(tab):
    tab.open(f"{URL}#gpt_oss")
    levels = tab.run("[...document.querySelectorAll('h1, h2, h3')].filter((h) => h.checkVisibility()).map((h) => +h.tagName[1])")
    assert levels[:2] == [1, 2] and set(levels[2:]) == {3}


@pytest.mark.parametrize("address", ["", "#timeline", "#tree", "#deepseek-v3", "#gemma3-1b&vs=qwen3-8b", "#parallel_block"])
def test_a_phone_shows_all_within_its_width(tab, address):
    tab.size(390, 844, phone=True)
    tab.open(URL + address)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    assert tab.run(WIDE) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("address", ["", "#timeline", "#tree", "#gpt-oss-20b&vs=mixtral-8x7b", "#latent"])
def test_text_has_contrast_in_both_themes(tab, theme, address):
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    tab.open(URL + address)
    assert tab.run("document.documentElement.className") == theme
    assert tab.run(CONTRAST) == []


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
