"""The chat page in a real browser: it streams, colours tokens by experts, says errors, fetches nothing from elsewhere, fits a phone."""

import itertools
import json
import math
import re
import shutil

import pytest

from anabranch.serving.ui.page import HEADERS, page
from fake_engine import Script
from serving_thread import serving
from waiting import until as wait

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
)
WAIT_S = 15


@pytest.fixture(scope="module")
def server():
    with serving(Script(say="Over the weir, and back again: 日本.", delay_s=0.002)) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1100,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def until(browser, script):
    """The value of the script once it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, WAIT_S, 0.05).until(lambda driver: driver.execute_script(f"return {script}"))


def ask(browser, server, text="hello"):
    """Open the page and ask; wait for the end of the answer."""
    browser.get(f"{server.url}/")
    until(browser, "document.getElementById('state').textContent.includes('fake')")
    browser.find_element("id", "text").send_keys(text)
    browser.find_element("id", "send").click()
    until(browser, "document.querySelector('article.assistant footer, article .error') !== null")


def test_the_page_is_one_file_that_may_load_nothing(server):
    status, headers, body = server.ask("/")
    assert status == 200
    assert body == page()
    assert headers["content-security-policy"] == HEADERS["content-security-policy"]
    assert b"http://www.w3.org/2000/svg" in body
    assert body.count(b"http") == body.count(b"http-equiv") + 1 + body.count(b"https")
    with serving(page=False) as closed:
        assert closed.ask("/")[0] == 404


@in_browser
def test_an_answer_is_streamed_and_coloured(server, browser):
    ask(browser, server)
    said = browser.execute_script("return document.querySelector('article.assistant div').textContent")
    assert said == "Over the weir, and back again: 日本."
    assert browser.execute_script("return document.querySelectorAll('article.assistant .token.colour').length") >= 30
    assert "tokens/s" in browser.execute_script("return document.querySelector('article.assistant footer').textContent")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@in_browser
def test_a_token_tells_its_experts(server, browser):
    ask(browser, server)
    browser.execute_script("document.querySelector('article.assistant .token').click()")
    shown = until(browser, "!document.getElementById('tip').hidden && document.getElementById('tip').innerText")
    first = ord("O")
    for layer in (1, 3):
        assert f"layer {layer}: {first % 4}, {(first + 1) % 4}" in shown


@in_browser
def test_another_layer_and_none_can_be_chosen(server, browser):
    ask(browser, server)
    options = browser.execute_script("return [...document.querySelectorAll('#layer option')].map((at) => at.value)")
    assert options == ["none", "1", "3"]
    choose = (
        "const at = document.getElementById('layer'); at.value = arguments[0]; at.dispatchEvent(new Event('change'))"
    )
    browser.execute_script(choose, "none")
    assert browser.execute_script("return document.querySelectorAll('.token.colour').length") == 0
    browser.execute_script(choose, "1")
    assert browser.execute_script("return document.querySelectorAll('.token.colour').length") >= 30
    shares = browser.execute_script("return [...document.querySelectorAll('#legend li')].map((at) => at.textContent)")
    assert len(shares) == 4
    assert 98 <= sum(int(share.split()[1].rstrip("%")) for share in shares) <= 102


def oklab(colour):
    """Of ``rgb(...)``, and its luminance by WCAG."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    rows = ((0.41222, 0.53633, 0.05145), (0.21190, 0.68070, 0.10740), (0.08830, 0.28172, 0.62998))
    x, y, z = ((r * red + g * green + b * blue) ** (1 / 3) for r, g, b in rows)
    lab = (
        0.21045 * x + 0.79362 * y - 0.00407 * z,
        1.97800 * x - 2.42859 * y + 0.45059 * z,
        0.02590 * x + 0.78277 * y - 0.80868 * z,
    )
    return lab, 0.2126 * red + 0.7152 * green + 0.0722 * blue


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_tell_64_experts_apart_and_leave_text_readable(browser, scheme):
    emulated = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    # One token for each expert.
    with serving(Script(say="".join(map(chr, range(32, 96))), layers={0: 64})) as running:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
        try:
            ask(browser, running)
            found = browser.execute_script(
                "return [...document.querySelectorAll('.token')].map((at) => [at.experts[0][0], getComputedStyle(at).backgroundColor,"
                " getComputedStyle(at).color])"
            )
        finally:
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    fills = {expert: oklab(fill) for expert, fill, _ in found}
    assert set(fills) == set(range(64))
    # About twice what an eye just tells apart, 0.02; 0.003 before, by hues alone.
    assert min(math.dist(a, b) for (a, _), (b, _) in itertools.combinations(fills.values(), 2)) > 0.04
    # The first eight, which are all that small models have, are far apart.
    few = [fills[expert][0] for expert in range(8)]
    assert min(itertools.starmap(math.dist, itertools.combinations(few, 2))) > 0.12
    (ink,) = {oklab(colour)[1] for _, _, colour in found}
    for _, fill in fills.values():
        # WCAG AA.
        assert (max(ink, fill) + 0.05) / (min(ink, fill) + 0.05) > 4.5


@in_browser
def test_one_expert_can_be_seen_alone(server, browser):
    ask(browser, server)
    dimmed = "return [...document.querySelectorAll('.token.other')].map((at) => at.experts[$('layer').value])"
    assert browser.execute_script(dimmed) == []
    browser.execute_script("document.querySelector('#legend button').click()")
    pressed = browser.execute_script(
        "return [...document.querySelectorAll('#legend [aria-pressed=true]')].map((at) => at.textContent)"
    )
    expert = int(pressed[0].split(":")[0])
    others = browser.execute_script(dimmed)
    assert others
    assert all(expert not in chosen for chosen in others)
    assert len(others) < browser.execute_script("return document.querySelectorAll('.token').length")
    browser.execute_script("document.querySelector('#legend [aria-pressed=true]').click()")
    assert browser.execute_script(dimmed) == []


@in_browser
def test_a_gauge_shows_the_cache_of_experts_where_there_is_one(server, browser):
    ask(browser, server)
    assert browser.execute_script("return document.getElementById('cache').hidden")
    gauges = {"expert_all_bytes": 6.0 * 2**20, "expert_resident_bytes": 1.5 * 2**20, "expert_budget_bytes": 2.0 * 2**20}
    with serving(Script(say="abc", gauges=gauges)) as running:
        ask(browser, running)
        told = until(
            browser,
            "document.getElementById('cache').innerText.includes('since') && document.getElementById('cache').innerText",
        )
        assert told == "experts in memory: 1.5 of 6.0 MiB · 100% of those wanted since the last answer were there"
        assert (
            browser.execute_script("return document.getElementById('cache').style.getPropertyValue('--share')") == "25%"
        )


@in_browser
def test_the_conversation_goes_on(server, browser):
    ask(browser, server)
    browser.find_element("id", "text").send_keys("and then?")
    browser.find_element("id", "send").click()
    until(browser, "document.querySelectorAll('article.assistant footer').length === 2")
    asked = bytes(server.script.requests[-1].prompt).decode()
    assert "hello" in asked
    assert "Over the weir" in asked
    assert asked.endswith("User: and then?\nAssistant:")


@in_browser
def test_an_error_is_told_and_a_long_answer_can_be_stopped(browser):
    with serving(Script(delay_s=0.01, endless=True, say="on and ")) as running:
        browser.get(f"{running.url}/")
        until(browser, "document.getElementById('state').textContent.includes('fake')")
        browser.execute_script("document.getElementById('most').value = 100000")
        browser.find_element("id", "text").send_keys("x")
        browser.find_element("id", "send").click()
        assert "tokens" in until(browser, "document.querySelector('article .error')?.textContent")
        browser.execute_script("document.getElementById('most').value = 2000")
        browser.find_element("id", "text").send_keys("x")
        browser.find_element("id", "send").click()
        until(browser, "document.querySelectorAll('.token').length > 5")
        browser.find_element("id", "stop").click()
        wait(lambda: not running.engine.running)
        wait(lambda: len(running.engine.aborted) == 1)


@in_browser
def test_a_key_is_asked_for(browser):
    with serving(Script(say="yes"), api_keys=("me=secret",)) as running:
        browser.get(f"{running.url}/")
        until(browser, "!document.getElementById('ask-key').hidden")
        browser.find_element("id", "key").send_keys("secret")
        until(browser, "document.getElementById('state').textContent.includes('fake')")


@in_browser
def test_nothing_comes_from_elsewhere(server, browser):
    browser.get_log("performance")
    ask(browser, server)
    found = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in found if event["method"] == "Network.requestWillBeSent"}
    assert urls
    assert {url for url in urls if not url.startswith((server.url, "data:"))} == set()


@in_browser
def test_it_fits_a_phone(server, browser):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        ask(browser, server, "a long word without end " + "x" * 200)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        box = browser.execute_script("return document.getElementById('send').getBoundingClientRect().toJSON()")
        assert box["right"] <= 390
        assert box["bottom"] <= 844
        small = "[...document.querySelectorAll('body *')].filter((at) => !at.children.length && at.innerText?.trim())"
        sizes = browser.execute_script(f"return {small}.map((at) => parseFloat(getComputedStyle(at).fontSize))")
        assert min(sizes) >= 11
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
