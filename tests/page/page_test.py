"""The page as people get it: opened in a real browser, without a network."""

import json
import pathlib
import re

import pytest

from ternax import page
from ternax.errors import UsageError
from tests.page.browser import CHROMIUM, Browser
from tests.page.settings import differences, draw, python_says

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "roofline.html"
    file.write_text(page.build(), encoding="utf-8")
    return file.as_uri()


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


def shown(browser) -> dict:
    """Field -> the number behind each output on the page."""
    return browser.run(
        "Object.fromEntries([...document.querySelectorAll('output')]"
        ".map((o) => [o.dataset.of, o.dataset.value]))"
    )


def test_one_small_file_that_loads_nothing():
    text = page.build()
    assert len(text.encode()) < 300_000
    assert "{{" not in text
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|@import|url\(|fetch\(|import\(", text)
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", text)


def test_the_readme_says_how_large_it_is():
    root = pathlib.Path(__file__).resolve().parents[2]
    size = len((root / "docs" / "roofline.html").read_bytes())
    assert f"one file of {size / 1000:.0f} kB" in (root / "README.md").read_text()


def test_what_it_starts_with():
    data = re.search(r'id="data">(.*?)</script>', page.build(model="8b", batch=8))[1]
    start = json.loads(data)["start"]
    assert (start["model"], start["batch"], start["device"]) == ("8b", 8, "h100-sxm")
    for wrong, says in (
        ({"model": "tiny-llama"}, "model must be one of 1b"),
        ({"batch": 5000}, "batch goes from 1 to 4096, found 5000"),
        ({"efficiency": 0}, "efficiency goes from 0.05 to 1"),
    ):
        with pytest.raises(UsageError, match=says):
            page.build(**wrong)


@in_browser
def test_a_thousand_settings_are_pythons(browser, address):
    settings = draw(1000, seed=1)
    browser.open(address)
    answers = browser.run(f"{json.dumps(settings)}.map((setting) => predict(tables, setting))")
    found = [
        (setting, wrong)
        for setting, answer in zip(settings, answers, strict=True)
        if (wrong := differences(python_says(setting), answer))
    ]
    assert len(answers) == 1000 and found == []


@in_browser
def test_what_is_shown_is_what_python_says(browser, address):
    """By the address, as a shared link comes; every output, through the page's own code."""
    for number, setting in enumerate(draw(20, seed=2)):
        query = "&".join(f"{name}={value}" for name, value in setting.items())
        browser.open(f"{address}?{number}#{query}")
        expected = python_says(setting)
        for name, text in shown(browser).items():
            value = expected[name]
            if value is None or value == float("inf"):
                assert text == {"usd_per_million_tokens": "null"}.get(name, "Infinity")
            else:
                assert float(text) == pytest.approx(value, rel=1e-6), (setting, name)
    assert browser.problems == []
    assert {request.partition("?")[0] for request in browser.requests} == {address}


@in_browser
@pytest.mark.parametrize(
    "address_says, told",
    [
        ("batch=4&context=512", ""),
        ("batch=4&colour=red", "Left out of the address: colour=red (no such key)."),
        ("batch=4&model=70c&toString=1", "model=70c, toString=1 (no such key)."),
        ("batch=4&efficiency=2&context=0.5", "efficiency=2, context=0.5."),
        ("batch=4&device=m2-ultra&devices=8", "devices=8 (m2-ultra has no link)."),
        ("batch=4&a=1&b=2&c=3&d=4&e=5", "c=3 (no such key) and 2 more."),
    ],
)
def test_what_the_address_asks_for_and_is_not_there_is_told(browser, address, address_says, told):
    browser.open(f"{address}?{address_says}#{address_says}")
    message = "document.getElementById('message').textContent"
    assert browser.run(f"[setting.batch, {message}]")[0] == 4
    assert browser.run(message).endswith(told) and bool(told) == bool(browser.run(message))
    assert browser.run("document.getElementById('message').offsetHeight > 0") == bool(told)
    browser.run("change({ batch: 8 })")
    assert browser.run(message) == "" and browser.problems == []


def test_the_page_and_the_gallery_name_the_keys_of_the_address():
    keys = ", ".join(page.START)
    assert f"keys, behind # and with &amp; between: {keys};" in page.build()
    gallery = pathlib.Path(__file__).resolve().parents[2] / "docs" / "gallery.md"
    named = re.search(r"Keys of\s+its address: (.*?);", gallery.read_text(), re.S)[1]
    assert re.findall(r"`(\w+)`", named) == list(page.START)


@in_browser
def test_first_look(browser, address):
    """70b in trits on an H100: 19.9 GB at 3,350 GB/s; painted within a second."""
    paints = []
    for _ in range(3):
        browser.open(address)
        browser.screenshot(whole=False)  # a frame
        paints.append(
            browser.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        )
    assert min(paints) < 1000, paints
    words = browser.run("document.body.innerText")
    assert re.search(r"168\s+tokens/s", words) and "predicted bound" in words
    assert "reading the projections takes 86.1 %" in words
    titles = browser.run("[...document.querySelectorAll('h2')].map((h) => h.innerText)")
    assert len(titles) == 5 and all("predicted" in title for title in titles)


@in_browser
@pytest.mark.parametrize("batch", [1, 16, 512])
def test_the_point_lies_on_the_line_that_is_reached(browser, address, batch):
    """In pixels, between the corners of the dashed line, which the efficiency alone decides."""
    setting = f"model=8b&device=rtx3090&efficiency=0.6&context=128&batch={batch}"
    browser.open(f"{address}?point{batch}#{setting}")
    line = browser.run("document.querySelector('.reached').getAttribute('points')")
    place = browser.run("document.querySelector('.point').style.transform")
    x, y = (float(number) for number in re.findall(r"[\d.]+", place))
    corners = [tuple(map(float, pair.split(","))) for pair in line.split()]
    (x0, y0), (x1, y1) = corners[:2] if x < corners[1][0] else corners[1:]
    assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), abs=0.3)
    assert (x > corners[1][0]) == (batch == 512)


@in_browser
def test_controls_by_keyboard_and_by_hand(browser, address):
    browser.open(f"{address}?keys")
    unnamed = browser.run(
        "[...document.querySelectorAll('input, select')]"
        ".filter((c) => !c.labels.length && !c.ariaLabel).map((c) => c.id)"
    )
    assert unnamed == []
    browser.run("document.getElementById('batch-range').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.run("[setting.batch, document.getElementById('batch').value]") == [3, "3"]
    assert "batch=3" in browser.run("location.hash")
    expected = python_says(page.START | {"batch": 3})
    assert float(shown(browser)["tokens_per_s"]) == pytest.approx(expected["tokens_per_s"])
    browser.press("Tab")
    assert browser.run("document.activeElement.id") == "batch"

    typed = (
        "b = document.getElementById('batch'); b.value = '0'; b.dispatchEvent(new Event('input'))"
    )
    browser.run(typed)
    assert browser.run("document.getElementById('message').textContent") == (
        "batch: from 1 to 4096, found “0”"
    )
    assert browser.run("setting.batch") == 3
    browser.run(typed.replace("'0'", "'7'"))
    assert browser.run("[setting.batch, document.getElementById('message').textContent]") == [7, ""]
    # A lever is a change of the setting; a device without a link stands alone.
    browser.run(
        "[...document.querySelectorAll('#levers button')].find("
        "(b) => b.textContent === '2 devices').click()"
    )
    assert browser.run("setting.devices") == 2
    browser.run(
        "d = document.getElementById('device'); d.value = 'm2-ultra';"
        "d.dispatchEvent(new Event('change'))"
    )
    assert browser.run("[setting.devices, document.getElementById('devices').disabled]") == [
        1,
        True,
    ]
    assert "no price known" in browser.run("document.body.innerText")
    assert browser.problems == []


@in_browser
def test_a_phone_in_the_dark(address):
    light = "getComputedStyle(document.body).backgroundColor"
    with Browser(360, 740, dark=True) as phone:
        phone.open(f"{address}#model=405b&devices=8&batch=4096&context=131072&device=b200")
        assert phone.run("document.documentElement.scrollWidth") <= 360
        assert phone.run(light) == "rgb(16, 19, 24)"
        # Nothing to press is too small for a finger.
        small = (
            "[...document.querySelectorAll('input, select, button, summary')]"
            ".filter((c) => c.getBoundingClientRect().height < 32).map((c) => c.id || c.innerText)"
        )
        assert phone.run(small) == []
        # The roof is drawn for this width: a unit of the picture is a pixel.
        assert phone.run("document.getElementById('roof').viewBox.baseVal.width") == phone.run(
            "document.getElementById('roof').clientWidth"
        )
        assert phone.problems == []
