"""The page, driven in headless Chromium against a real server with a real worker. Its screenshots lie in test-output/."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from app.embedded import EmbeddedServer
from app.keys import create_key

CHROMIUM = Path("/usr/bin/chromium")
REPOSITORY = Path(__file__).parents[2]
SCREENSHOTS = REPOSITORY / "test-output"
READY_MS = 60_000
JOB_MS = 120_000
DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
LOOKS = {"light": DESK, "dark": {**DESK, "color_scheme": "dark"}, "phone": PHONE, "phone-dark": {**PHONE, "color_scheme": "dark"}}


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
def open_page(browser: Browser, console_errors: list[str]) -> Iterator[Callable[..., Page]]:
    """`open_page(url, **look)`: a browser that has never seen the page."""
    contexts: list[BrowserContext] = []

    def open_(url: str, *, ready: bool = True, **look: Any) -> Page:
        context = browser.new_context(**(look or DESK))
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        page = context.new_page()
        page.on("console", lambda message: console_errors.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: console_errors.append(str(error)))
        page.goto(url)
        if ready:
            expect_ready(page)
        return page

    yield open_
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page: Callable[..., Page], base_url: str) -> Page:
    return open_page(base_url)


def expect_ready(page: Page) -> None:
    expect(page.locator("#service")).to_have_attribute("data-state", "ready", timeout=READY_MS)
    expect(page.locator("#generate")).to_have_attribute("aria-disabled", "false")


def open_more(page: Page) -> None:
    if page.locator("#request details").get_attribute("open") is None:
        page.click("#request summary")


def choose(page: Page, name: str) -> None:
    page.fill("#class-label", name)
    page.press("#class-label", "Enter")


def ask(page: Page, *, label: str = "Cat", steps: int | None = 4, seed: int | None = 7, count: int = 1) -> None:
    choose(page, label)
    open_more(page)
    page.fill("#steps", "" if steps is None else str(steps))
    page.fill("#seed", "" if seed is None else str(seed))
    page.fill("#num-images", str(count))
    page.click("#generate")


def expect_status(page: Page, state: str) -> None:
    expect(page.locator("#status")).to_have_attribute("data-state", state, timeout=JOB_MS)


def expect_pictures(page: Page, count: int) -> None:
    expect(page.locator("figure.picture img")).to_have_count(count, timeout=JOB_MS)


def screenshot(page: Page, name: str, *, full_page: bool = False) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"page-{name}.png", full_page=full_page)


def bytes_of(picture: Locator, base_url: str) -> bytes:
    job, index = picture.get_attribute("data-job"), picture.get_attribute("data-index")
    response = picture.page.request.get(f"{base_url}/jobs/{job}/images/{index}")
    assert response.headers["content-type"] == "image/png"
    return response.body()


def pixels(png: bytes) -> bytes:
    """Without the text inside, which tells the whole request and the picture's place in it."""
    return Image.open(BytesIO(png)).tobytes()


def fits(page: Page) -> bool:
    """Whether nothing makes the page itself scroll sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


# --- pictures ------------------------------------------------------------------------------------------------------------


def test_a_picture_is_made_through_the_page(page: Page, console_errors: list[str]) -> None:
    ask(page, label="Dog", steps=6, seed=41, count=2)
    expect_status(page, "succeeded")
    expect_pictures(page, 2)
    for image in page.locator("figure.picture img").all():
        assert image.evaluate("image => image.naturalWidth") > 0
    for index, seed in enumerate((41, 42)):
        caption = page.locator("figure.picture figcaption").nth(index)
        for text in ("Dog", f"seed {seed}", "guidance 2 · 6 steps", "Again", "Download", "curl"):
            expect(caption).to_contain_text(text)
    assert page.locator("#progress").evaluate("bar => bar.value === bar.max")
    expect(page.locator("#cancel")).to_be_disabled()
    assert console_errors == []


def test_a_first_picture_takes_one_press_of_a_button(page: Page) -> None:
    page.click("#generate")
    expect_pictures(page, 4)
    expect_status(page, "succeeded")


def test_small_pictures_are_enlarged_without_blur(page: Page) -> None:
    ask(page)
    expect_pictures(page, 1)
    image = page.locator("figure.picture img")
    assert image.evaluate("image => image.naturalWidth <= 128 && image.width > image.naturalWidth")
    expect(image).to_have_css("image-rendering", "pixelated")


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(page: Page, base_url: str) -> None:
    for made, seed in enumerate((7, 7, 8), start=1):
        ask(page, seed=seed)
        expect_pictures(page, made)
        expect_status(page, "succeeded")
    third, second, first = page.locator("figure.picture").all()  # the newest is on top
    expect(third).to_have_attribute("data-seed", "8")
    assert bytes_of(first, base_url) == bytes_of(second, base_url) != bytes_of(third, base_url)


def test_again_with_this_seed_makes_the_same_picture(page: Page, base_url: str) -> None:
    ask(page, label="Dog", seed=None, count=2)
    expect_pictures(page, 2)
    expect_status(page, "succeeded")
    page.get_by_role("button", name="Again with this seed").nth(1).click()
    expect(page.locator("#generate")).to_be_focused()
    page.keyboard.press("Enter")
    expect_pictures(page, 3)
    again, _, original = page.locator("figure.picture").all()
    assert pixels(bytes_of(again, base_url)) == pixels(bytes_of(original, base_url))


def test_previews_appear_while_pictures_are_made(page: Page) -> None:
    ask(page, steps=1000, count=64)
    preview = page.locator("figure.pending img.preview").first
    expect(preview).to_have_attribute("src", re.compile("^data:image/"), timeout=JOB_MS)
    expect(page.locator("#step")).to_contain_text("of 1000")
    screenshot(page, "running")
    page.click("#cancel")
    expect_status(page, "canceled")


def test_a_long_job_is_canceled(page: Page) -> None:
    ask(page, steps=1000, count=64)
    expect_status(page, "running")
    expect(page.locator("figure.pending")).not_to_have_count(0)
    page.click("#cancel")
    expect_status(page, "canceled")
    expect(page.locator("#status")).to_contain_text("Canceled")
    expect(page.locator("figure.pending")).to_have_count(0)
    expect(page.locator("#generate")).to_be_focused()
    screenshot(page, "canceled")


def test_a_job_that_waits_tells_its_place(page: Page, open_page: Callable[..., Page], base_url: str) -> None:
    page.route(
        re.compile(r"/jobs/[^/?]+$"),
        lambda route: route.fulfill(json={**route.fetch().json(), "status": "queued", "queue_position": 2, "estimated_wait_s": 12.3}),
    )
    page.route("**/jobs/*/events", lambda route: route.abort())
    ask(page, steps=2)
    expect(page.locator("#status")).to_have_text("Queued, 2 jobs ahead, about 12 s")
    screenshot(page, "queued")


def test_a_picture_is_looked_at_more_closely(page: Page) -> None:
    ask(page, label="Sneaker", steps=5)
    expect_pictures(page, 1)
    page.locator("figure.picture button.frame").press("Enter")
    viewer = page.get_by_role("dialog", name="Sneaker")
    for text in ("Seed", "7", "Steps", "5", "euler", "tiny"):
        expect(viewer).to_contain_text(text)
    screenshot(page, "viewer")
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(page.locator("figure.picture button.frame")).to_be_focused()


def test_a_picture_is_downloaded(page: Page, base_url: str) -> None:
    ask(page, label="Sneaker")
    expect_pictures(page, 1)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "sneaker-7.png"
    assert Path(download.value.path()).read_bytes() == bytes_of(page.locator("figure.picture"), base_url)


def test_the_copied_command_makes_the_same_picture(page: Page, base_url: str, tmp_path: Path) -> None:
    for count in (1, 2):
        ask(page, label="Truck", seed=None, count=count)
        expect_status(page, "succeeded")
        expect_pictures(page, 1 if count == 1 else 3)
        figure = page.locator("figure.picture").nth(count - 1)  # the last of the newest
        figure.get_by_role("button", name="Copy as curl").click()
        expect(figure).to_contain_text("copied")
        command = page.evaluate("navigator.clipboard.readText()")
        file = tmp_path / f"truck-{figure.get_attribute('data-seed')}.png"
        subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True, env={"PATH": os.environ["PATH"], "no_proxy": "*"})
        if count == 1:
            assert file.read_bytes() == bytes_of(figure, base_url)
        assert pixels(file.read_bytes()) == pixels(bytes_of(figure, base_url))


# --- the form ------------------------------------------------------------------------------------------------------------


def test_a_class_is_found_with_the_keyboard(page: Page) -> None:
    picker, options = page.get_by_role("combobox", name="Class"), page.locator("#class-list [role=option]")
    picker.focus()
    page.keyboard.type("lor")  # a lorry is another name of the second one's
    expect(options).to_have_text(["Trucklorry"])
    expect(page.locator("#class-count")).to_have_text("1 class")
    screenshot(page, "picker")
    page.keyboard.press("Enter")
    expect(picker).to_have_value("Truck")
    expect(options).to_have_count(0)
    page.keyboard.press("ArrowDown")
    expect(options).to_have_count(5)
    page.keyboard.press("ArrowUp")
    active = page.locator("[role=option].active")
    expect(active).to_have_text(re.compile("^Sneaker"))
    expect(picker).to_have_attribute("aria-activedescendant", active.get_attribute("id") or "")
    page.keyboard.press("Escape")
    expect(picker).to_have_value("Truck")
    expect(picker).to_have_attribute("aria-expanded", "false")
    picker.fill("zebra")
    expect(page.locator("#class-none")).to_be_visible()
    page.keyboard.press("Tab")
    expect(picker).to_have_value("Truck")


def test_an_unconditional_picture_is_made_with_the_keyboard(page: Page) -> None:
    picker = page.locator("#class-label")
    picker.fill("uncond")
    picker.press("Enter")
    expect(picker).to_have_value("No class")
    page.fill("#num-images", "1")
    page.press("#num-images", "Enter")
    expect_pictures(page, 1)
    expect(page.locator("figure.picture figcaption")).to_contain_text("No class")


def test_every_control_has_a_name_and_none_holds_the_focus(page: Page) -> None:
    open_more(page)
    nameless = page.evaluate(
        """[...document.querySelectorAll("input, select, button, textarea, a")]
           .filter(node => !(node.labels?.length || node.ariaLabel || node.textContent.trim() || node.title)).map(node => node.outerHTML)"""
    )
    assert nameless == []
    seen = []
    page.locator("h1").click()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    for name in ("A", "class-label", "guidance-scale", "seed", "dice", "steps", "sheet-guidance", "generate", "sheet"):
        assert name in seen, seen
    assert seen.count("class-label") >= 1 and max(map(seen.count, seen)) <= 5, seen


def test_steps_out_of_range_are_told_at_their_field(page: Page) -> None:
    ask(page, steps=5000)
    expect(page.locator("#steps-error")).to_contain_text("1000")
    expect(page.locator("#problem[role=alert]")).to_contain_text("Steps:")
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#steps")).to_be_focused()
    screenshot(page, "problem")
    ask(page, steps=3)
    expect_pictures(page, 1)
    expect(page.locator("#problem")).to_be_empty()
    expect(page.locator("#steps-error")).to_be_empty()


def test_a_full_queue_is_told_in_words(page: Page) -> None:
    problem = {"title": "Too many", "status": 429, "detail": "1000 jobs wait already, and 1000 may; try again later"}
    page.route("**/generate**", lambda route: route.fulfill(status=429, headers={"Retry-After": "10"}, json=problem))
    ask(page)
    expect(page.locator("#problem")).to_contain_text("1000 jobs wait already")
    expect(page.locator("#problem")).to_contain_text("Try again in 10 s.")
    expect(page.locator("#generate")).to_have_attribute("aria-disabled", "false")


def test_samples_of_all_classes_are_made_once(page: Page) -> None:
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.url.endswith("/generate") else None)
    page.click("#samples")
    expect(page.locator("#samples")).to_be_hidden(timeout=JOB_MS)
    assert [body["class_label"] for body in sent] == [[0, 1, 2, 3]]
    page.click("#class-label")
    expect(page.locator("[role=option] img")).to_have_count(4)
    screenshot(page, "samples")
    page.reload()
    expect_ready(page)
    expect(page.locator("#samples")).to_be_hidden()
    expect(page.locator("#class-thumb")).to_be_visible()
    assert len(sent) == 1


def test_a_sheet_has_a_column_for_each_guidance_and_a_row_for_each_class(page: Page) -> None:
    open_more(page)
    page.fill("#sheet-guidance", "1, 2.5, 50")
    page.click("#sheet")
    expect(page.locator("#sheet-guidance-error")).to_contain_text("from 1 to 20")
    expect(page.locator("#sheet-guidance")).to_be_focused()
    page.fill("#sheet-guidance", "1, 2.5, 4")
    page.fill("#sheet-classes", "dog; lorry")
    page.click("#sheet")
    table = page.get_by_role("table", name="Class × guidance")
    expect(table.locator("td.picture img")).to_have_count(6, timeout=JOB_MS)
    expect_status(page, "succeeded")
    expect(table.get_by_role("columnheader")).to_have_text(["Guidance", "1", "2.5", "4"])
    expect(table.get_by_role("rowheader")).to_have_text(["Dog", "Truck"])
    page.reload()
    expect(page.locator(".sheet td.picture img")).to_have_count(6)
    page.locator(".sheet td.picture button").nth(4).click()
    expect(page.get_by_role("dialog")).to_contain_text("2.5")


# --- what lasts ----------------------------------------------------------------------------------------------------------


def test_the_gallery_stays_after_a_reload_until_it_is_cleared(page: Page) -> None:
    ask(page, label="Dog", count=3)
    expect_pictures(page, 3)
    expect_status(page, "succeeded")
    page.reload()
    expect_pictures(page, 3)
    assert page.locator("figure.picture img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 16
    expect(page.locator("#kept")).to_have_text("3 pictures")
    page.click("#clear")
    page.get_by_role("dialog").get_by_role("button", name="Clear").click()
    expect_pictures(page, 0)
    page.reload()
    expect_ready(page)
    expect(page.locator("#empty")).to_be_visible()


def test_a_running_job_survives_a_reload(page: Page) -> None:
    ask(page, steps=1000, count=12)
    expect_status(page, "running")
    page.reload()
    expect_status(page, "running")
    expect(page.locator("figure")).to_have_count(12)
    expect(page.locator("#cancel")).to_be_enabled()
    screenshot(page, "reloaded")
    expect_pictures(page, 12)
    expect_status(page, "succeeded")


def test_a_job_begun_elsewhere_is_shown(service: Any, open_page: Callable[..., Page], base_url: str) -> None:
    job_id = service.submit(class_label="Dog", steps=1000, num_images=8, seed=3)
    page = open_page(base_url, ready=False)  # it is busy from the start
    expect(page.locator(f"figure[data-job='{job_id}']")).to_have_count(8)
    page.click("#cancel")
    expect_status(page, "canceled")


# --- trouble -------------------------------------------------------------------------------------------------------------


def test_a_broken_event_stream_is_replaced_by_polling(page: Page) -> None:
    page.route("**/jobs/*/events", lambda route: route.abort())
    ask(page)
    expect_pictures(page, 1)
    expect_status(page, "succeeded")


def test_an_absent_worker_is_told_until_it_is_back(page: Page, base_url: str) -> None:
    page.route("**/readyz", lambda route: route.fulfill(status=503, json={"title": "No worker", "status": 503}))
    page.reload()
    expect(page.locator("#service")).to_have_attribute("data-state", "no-worker")
    expect(page.locator("#generate")).to_have_attribute("aria-disabled", "true")
    screenshot(page, "no-worker")
    page.unroute("**/readyz")
    expect_ready(page)


def test_a_job_survives_its_worker(own_service: Callable[..., Any], open_page: Callable[..., Page]) -> None:
    service = own_service().ready()
    page = open_page(service.url)
    ask(page, steps=1000, count=12)
    expect_status(page, "running")
    os.kill(service.child("app.cli worker"), signal.SIGKILL)
    expect(page.locator("#status")).to_contain_text(re.compile("[Aa]nother one takes over"), timeout=JOB_MS)
    screenshot(page, "worker-killed")
    expect_pictures(page, 12)
    expect_status(page, "succeeded")


def test_a_queue_that_is_away_is_told_until_it_is_back(
    own_service: Callable[..., Any], open_page: Callable[..., Page], tmp_path: Path
) -> None:
    server = EmbeddedServer(tmp_path / "redis")
    server.start()
    try:
        page = open_page(own_service(DIT_REDIS_URL=server.url).ready().url)
        ask(page, steps=1000, count=12)
        expect_status(page, "running")
        server.process.kill()
        server.process.wait()
        expect(page.locator("#status")).to_contain_text("The queue does not answer", timeout=JOB_MS)
        expect(page.locator("#service")).to_have_text("The queue (Redis) does not answer", timeout=READY_MS)
        screenshot(page, "redis-away")
        server.start()
        expect_pictures(page, 12)
        expect_status(page, "succeeded")
        expect_ready(page)
    finally:
        server.stop()


def test_a_key_is_asked_for_when_one_is_needed(own_service: Callable[..., Any], open_page: Callable[..., Page], tmp_path: Path) -> None:
    """A service with a real key file; previews, events and pictures need the key too."""
    _, secret = create_key(tmp_path / "keys.json", "alice", "generate")
    service = own_service(DIT_API_KEYS_FILE=str(tmp_path / "keys.json")).ready()
    page = open_page(service.url, ready=False)
    key = page.get_by_label("API key", exact=True)
    expect(key).to_be_focused()
    expect(page.locator("#service")).to_have_attribute("data-state", "key")
    key.fill("open-barley")
    key.press("Enter")
    expect(page.locator("#key-error")).to_have_text("The server does not know this key.")
    screenshot(page, "key")
    key.fill(secret)
    key.press("Enter")
    expect_ready(page)
    expect(key).to_be_hidden()
    ask(page)
    expect_pictures(page, 1)
    page.reload()
    expect_ready(page)
    expect_pictures(page, 1)
    page.get_by_role("button", name="Copy as curl").click()
    command = page.evaluate("navigator.clipboard.readText()")
    assert "$DIT_API_KEY" in command and secret not in command
    open_more(page)
    page.click("#key-forget")
    expect(key).to_be_visible()


# --- looks ---------------------------------------------------------------------------------------------------------------


def test_the_page_looks_right_in_the_light_in_the_dark_and_on_a_phone(
    own_service: Callable[..., Any], open_page: Callable[..., Page], console_errors: list[str]
) -> None:
    """With the bundled model, whose pictures show something."""
    service = own_service(DIT_CHECKPOINTS=str(REPOSITORY / "checkpoints")).ready()
    for name, look in LOOKS.items():
        page = open_page(service.url, **look)
        screenshot(page, f"{name}-first", full_page=True)
        page.click("#samples")
        expect(page.locator("#samples")).to_be_hidden(timeout=JOB_MS)
        page.click("#class-label")
        expect(page.locator("[role=option] img")).to_have_count(10)
        screenshot(page, f"{name}-picker")
        page.keyboard.press("Escape")
        page.get_by_text("Draft", exact=True).click()
        expect(page.locator("#guidance-scale")).to_have_value("2.5")
        page.fill("#seed", "1")
        page.click("#generate")
        expect_pictures(page, 4)
        expect_status(page, "succeeded")
        page.click("#sheet")
        expect(page.locator(".sheet td.picture")).to_have_count(50, timeout=JOB_MS)
        expect_status(page, "succeeded")
        choose(page, "ankle")
        page.click("#generate")
        expect_pictures(page, 8)
        expect_status(page, "succeeded")
        assert fits(page)
        screenshot(page, name, full_page=True)
        page.locator("figure.picture button.frame").first.click()
        screenshot(page, f"{name}-viewer")
        assert fits(page)
    assert console_errors == []


def test_the_api_documentation_needs_no_other_host(page: Page, base_url: str) -> None:
    elsewhere: list[str] = []
    page.on("request", lambda request: None if request.url.startswith((base_url, "data:")) else elsewhere.append(request.url))
    page.get_by_role("link", name="API").click()
    expect(page.locator(".opblock").first).to_be_visible(timeout=READY_MS)
    screenshot(page, "docs")
    assert elsewhere == []
