"""The page, driven in headless Chromium against a real server with a real worker. Its screenshots lie in test-output/."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.parse import urljoin

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
SCREENSHOTS = Path(__file__).parents[2] / "test-output"
READY_MS = 60_000
JOB_MS = 60_000
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
LOOKS = {"light": {}, "dark": {"color_scheme": "dark"}, "phone": PHONE}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail("install Debian's package chromium")
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield browser
        browser.close()


@pytest.fixture
def console_errors() -> list[str]:
    return []


@pytest.fixture
def page(browser: Browser, base_url: str, console_errors: list[str]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.on("console", lambda message: console_errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: console_errors.append(str(error)))
    open_page(page, base_url)
    yield page
    context.close()


def open_page(page: Page, base_url: str) -> None:
    page.goto(base_url)
    expect(page.locator("#service")).to_have_attribute("data-state", "ready", timeout=READY_MS)


def ask(page: Page, *, class_index: int = 0, steps: int = 4, seed: int | None = 7, count: int = 1) -> None:
    page.select_option("#class-label", index=class_index)
    page.fill("#steps", str(steps))
    page.fill("#seed", "" if seed is None else str(seed))
    page.fill("#num-images", str(count))
    page.click("#generate")


def expect_status(page: Page, state: str) -> None:
    expect(page.locator("#status")).to_have_attribute("data-state", state, timeout=JOB_MS)


def expect_loaded(page: Page, count: int) -> None:
    expect(page.locator("figure.picture img")).to_have_count(count, timeout=JOB_MS)


def screenshot(page: Page, name: str, *, full_page: bool = False) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"page-{name}.png", full_page=full_page)


def bytes_of(picture: Locator, base_url: str) -> bytes:
    url = picture.locator("img").get_attribute("src")
    assert url
    response = picture.page.request.get(urljoin(base_url, url))
    assert response.headers["content-type"] == "image/png"
    return response.body()


def pixels_of(picture: Locator, base_url: str) -> bytes:
    """Without the text inside, which tells the whole request and the picture's place in it."""
    return Image.open(BytesIO(bytes_of(picture, base_url))).tobytes()


def test_a_picture_is_made_through_the_page(page: Page, console_errors: list[str]) -> None:
    label = page.locator("#class-label option").nth(1).text_content()
    ask(page, class_index=1, steps=6, seed=41, count=2)
    expect_status(page, "succeeded")
    expect_loaded(page, 2)
    for image in page.locator("figure.picture img").all():
        assert image.evaluate("image => image.naturalWidth") > 0
    for index, seed in enumerate((41, 42)):
        caption = page.locator("figure.picture figcaption").nth(index)
        for text in (label, f"seed {seed}", "6 steps", "Download"):
            expect(caption).to_contain_text(text)
    assert page.locator("#progress").evaluate("bar => bar.value === bar.max")
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#cancel")).to_be_disabled()
    screenshot(page, "pictures")
    assert console_errors == []


def test_small_pictures_are_enlarged_without_blur(page: Page) -> None:
    ask(page)
    expect_loaded(page, 1)
    image = page.locator("figure.picture img")
    assert image.evaluate("image => image.naturalWidth <= 128 && image.width > image.naturalWidth")
    expect(image).to_have_css("image-rendering", "pixelated")


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(page: Page, base_url: str) -> None:
    for made, seed in enumerate((7, 7, 8), start=1):
        ask(page, seed=seed)
        expect_loaded(page, made)
        expect_status(page, "succeeded")
    third, second, first = page.locator("figure.picture").all()  # the newest is on top
    expect(third).to_have_attribute("data-seed", "8")
    assert bytes_of(first, base_url) == bytes_of(second, base_url) != bytes_of(third, base_url)


def test_the_settings_of_a_picture_come_back_into_the_form(page: Page, base_url: str) -> None:
    ask(page, class_index=1, seed=None, count=2)
    expect_loaded(page, 2)
    expect_status(page, "succeeded")
    page.get_by_role("button", name="Use settings").nth(1).click()
    page.click("#generate")
    expect_loaded(page, 3)
    again, _, original = page.locator("figure.picture").all()
    assert pixels_of(again, base_url) == pixels_of(original, base_url)


def test_an_unconditional_picture_is_made_with_the_keyboard(page: Page) -> None:
    page.select_option("#class-label", label="Unconditional")
    page.fill("#num-images", "1")
    page.fill("#steps", "3")
    page.press("#steps", "Enter")
    expect_loaded(page, 1)
    expect(page.locator("figure.picture figcaption")).to_contain_text("Unconditional")


def test_steps_out_of_range_are_told_in_words(page: Page) -> None:
    ask(page, steps=5000)
    problem = page.locator("#problem[role=alert]")
    expect(problem).to_contain_text("Steps:")
    expect(problem).to_contain_text("1000")
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#steps")).to_be_focused()
    screenshot(page, "problem")
    ask(page, steps=3)
    expect_loaded(page, 1)
    expect(problem).to_be_empty()


def test_a_long_job_is_canceled(page: Page) -> None:
    ask(page, steps=1000, count=64)
    expect_status(page, "running")
    expect(page.locator("figure.pending")).to_have_count(64)
    screenshot(page, "running")
    page.click("#cancel")
    expect_status(page, "canceled")
    expect(page.locator("#status")).to_contain_text("Canceled")
    expect(page.locator("figure.pending")).to_have_count(0)
    screenshot(page, "canceled")
    expect(page.locator("#generate")).to_be_focused()


def test_a_broken_event_stream_is_replaced_by_polling(page: Page) -> None:
    page.route("**/jobs/*/events", lambda route: route.abort())
    ask(page)
    expect_loaded(page, 1)
    expect_status(page, "succeeded")


def test_an_absent_worker_is_told_until_it_is_back(page: Page, base_url: str) -> None:
    page.route("**/readyz", lambda route: route.fulfill(status=503, json={"title": "No worker", "status": 503}))
    page.goto(base_url)
    expect(page.locator("#service")).to_have_attribute("data-state", "no-worker")
    expect(page.locator("#generate")).to_be_disabled()
    screenshot(page, "no-worker")
    page.unroute("**/readyz")
    expect(page.locator("#service")).to_have_attribute("data-state", "ready", timeout=READY_MS)
    expect(page.locator("#generate")).to_be_enabled()


@pytest.mark.parametrize("look", LOOKS)
def test_the_page_fits_its_window(browser: Browser, base_url: str, look: str) -> None:
    context = browser.new_context(**LOOKS[look])
    page = context.new_page()
    open_page(page, base_url)
    ask(page, count=4)
    expect_loaded(page, 4)
    expect_status(page, "succeeded")
    screenshot(page, look, full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()


def test_the_api_documentation_needs_no_other_host(page: Page, base_url: str) -> None:
    elsewhere: list[str] = []
    page.on("request", lambda request: None if request.url.startswith((base_url, "data:")) else elsewhere.append(request.url))
    page.get_by_role("link", name="API").click()
    expect(page.locator(".opblock").first).to_be_visible(timeout=READY_MS)
    screenshot(page, "docs")
    assert elsewhere == []
