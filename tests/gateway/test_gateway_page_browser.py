"""The page in a real browser: it fills, refreshes, filters, explains, fetches nothing from elsewhere, and fits a phone."""

import json
import shutil
import urllib.request

import pytest

from gateway_process import served

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
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
)
WAIT_S = 15


@pytest.fixture(scope="module")
def server():
    with served() as running:
        for model, text in (
            ("auto/rules", "Write a function that sorts a list."),
            ("small", "hello"),
            ("auto/cheapest", "hi"),
        ):
            ask(running, model, text)
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def ask(server, model, text, **fields):
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}], **fields}).encode()
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers["x-request-id"]


def until(browser, script):
    """The value of the script once it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, WAIT_S, 0.1).until(lambda driver: driver.execute_script(f"return {script}"))


def text_of(browser, css):
    return browser.execute_script("return document.querySelector(arguments[0]).innerText", css)


def test_the_page_shows_what_has_happened(server, browser):
    browser.get(f"{server.url}/ui")
    assert until(browser, "document.querySelectorAll('#decisions details').length >= 3")
    assert "small" in text_of(browser, "#spend")
    assert text_of(browser, "#tiles li:first-child b") == "3"
    assert until(browser, "document.querySelectorAll('#latency rect.column').length > 0")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_nothing_comes_from_elsewhere(server, browser):
    browser.get_log("performance")
    browser.get(f"{server.url}/ui")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    # The browser's own first page may be late; what an address holds itself comes from nowhere.
    urls = {url for url in urls if not url.startswith(("chrome:", "chrome-untrusted:", "data:"))}
    assert urls
    assert {url for url in urls if not url.startswith(f"{server.url}/ui")} == set()


def test_a_new_request_appears_without_reloading_and_what_is_open_stays_open(server, browser):
    browser.get(f"{server.url}/ui")
    browser.execute_script("document.querySelector('#decisions details').open = true; window.untouched = 1")
    opened = browser.execute_script("return document.querySelector('details[open]').id")
    made = ask(server, "auto/rules", "What is the longest river?")
    assert until(browser, f"document.getElementById('r-{made}') !== null")
    assert browser.execute_script("return [...document.querySelectorAll('details[open]')].map((row) => row.id)") == [
        opened
    ]
    assert browser.execute_script("return window.untouched") == 1


def test_the_inspector_says_why(server, browser):
    made = ask(server, "auto/rules", "def f(x):\n    return x\nWhat does this code do?")
    browser.get(f"{server.url}/ui")
    browser.execute_script(f"document.getElementById('r-{made}').open = true")
    shown = text_of(browser, f"#r-{made}")
    assert made in shown
    assert "candidate" in shown
    assert "def f(x)" not in browser.page_source  # what was asked is not kept


def test_the_filter_hides_what_does_not_match(server, browser):
    browser.get(f"{server.url}/ui")
    browser.find_element("id", "filter").send_keys("auto/cheapest")
    shown = "[...document.querySelectorAll('#decisions details')].filter((row) => !row.hidden)"
    until(browser, f"{shown}.length === 1")
    assert "auto/cheapest" in browser.execute_script(f"return {shown}[0].innerText")


def test_it_fits_a_phone(server, browser):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.get(f"{server.url}/ui")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        small = (
            "[...document.querySelectorAll('main *')].filter((at) => at.children.length === 0 && at.textContent.trim())"
        )
        sizes = browser.execute_script(f"return {small}.map((at) => parseFloat(getComputedStyle(at).fontSize))")
        assert min(sizes) >= 11
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


TESTED = """
require_key = false
store = "{folder}/gateway.db"
[[models]]
name = "x"
deployments = [{{ provider = {{ kind = "mock", model = "x" }} }}]
[strategies.the-strategy-that-was-there-before]
kind = "static"
[strategies.learned]
kind = "random"
[ab.a-test-with-a-long-name]
a = "the-strategy-that-was-there-before"
b = "learned"
metric = "success"
answers = 1
"""


def test_the_page_of_tests_shows_both_arms_and_fits_a_phone(browser, tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_text(TESTED.format(folder=tmp_path))
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    with served("--config", str(path)) as running:
        for number in range(12):
            ask(running, "auto/a-test-with-a-long-name", "hello", user=f"user {number}")
        browser.get(f"{running.url}/ui")
        assert text_of(browser, "#status a") == "A/B tests"
        browser.get_log("browser")
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            browser.get(f"{running.url}/ui/ab")
            assert "the-strategy-that-was-there-before" in text_of(browser, "tbody")
            assert "12 keys with 1 answer each" in text_of(browser, "section p")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
            assert browser.execute_script("return document.querySelectorAll('svg.chart circle').length") == 2
            assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_says_when_the_gateway_is_gone(browser):
    with served() as running:
        browser.get(f"{running.url}/ui")
        until(browser, "document.getElementById('live') !== null")
    assert until(browser, "document.getElementById('live').classList.contains('stale')")
