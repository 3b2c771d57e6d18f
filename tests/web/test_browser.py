"""What a person does in a browser, in headless Chromium, without any script of ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from shardkit.local import LocalCluster
from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.outages import home_of, servers_of, without
from tests.fixtures.service import PASSWORD, Person, Service

pytestmark = [pytest.mark.web, pytest.mark.integration]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium on PATH")
        pytest.skip("no Chromium on PATH")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, service: Service) -> Iterator[Callable[..., Page]]:
    """Open pages, each a person's own browser; what a page complains about fails the test."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(**options: object) -> Page:
        context = browser.new_context(base_url=service.url, **options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.extend(failure(request)))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def failure(request: Request) -> list[str]:
    """Return why a request failed, unless the browser left the page before the answer."""
    why = request.failure or ""
    return [] if "ERR_ABORTED" in why else [f"{request.url}: {why}"]


def sign_up(page: Page, username: str) -> None:
    page.goto("/")
    page.get_by_role("link", name="Sign up").first.click()
    page.get_by_label("Username", exact=True).fill(username)
    page.get_by_label("Name", exact=True).fill(username.title())
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Create account").click()
    expect(page.get_by_role("link", name=username, exact=True)).to_be_visible()


def upload(page: Page, file: Path, caption: str) -> str:
    page.get_by_role("link", name="Upload").first.click()
    page.get_by_label("Photo").set_input_files(file)
    page.get_by_label("Caption").fill(caption)
    page.get_by_role("button", name="Share").click()
    expect(page.locator("article.photo")).to_be_visible()
    number = page.locator("article.photo").get_attribute("data-photo")
    assert number is not None
    return number


def is_decoded(page: Page, selector: str) -> bool:
    return bool(
        page.locator(selector).evaluate("img => img.decode().then(() => img.naturalWidth > 0)")
    )


def test_sign_up_upload_follow_and_see(visit: Callable[..., Page], tmp_path: Path) -> None:
    file = tmp_path / "morning.jpg"
    file.write_bytes(pictures.jpeg(gps=True, orientation=6))

    ana = visit()
    sign_up(ana, "web.ana")
    number = upload(ana, file, "Morning light")
    assert is_decoded(ana, "article.photo img")

    ben = visit()
    sign_up(ben, "web.ben")
    expect(ben.get_by_text("Nothing here yet")).to_be_visible()
    ben.get_by_role("searchbox").fill("Web.Ana")
    ben.keyboard.press("Enter")
    expect(ben.get_by_role("heading", name="web.ana")).to_be_visible()
    ben.get_by_role("button", name="Follow").click()
    expect(ben.get_by_role("button", name="Unfollow")).to_be_visible()

    ben.get_by_role("link", name="Home").click()
    card = ben.locator(f'article[data-photo="{number}"]')
    expect(card).to_contain_text("Morning light")
    assert is_decoded(ben, f'article[data-photo="{number}"] img')

    card.get_by_role("button", name="Like this photo").click()
    expect(ben.locator(f"#p{number}")).to_contain_text("1 like")
    ben.locator(f"#p{number}").get_by_role("link", name="Comments", exact=True).click()
    ben.get_by_label("Your comment").fill("Wish I was there.")
    ben.get_by_role("button", name="Post").click()
    expect(ben.locator("#comments")).to_contain_text("Wish I was there.")

    ana.goto(f"/p/{number}")
    expect(ana.locator("#comments")).to_contain_text("Wish I was there.")
    ana.get_by_role("button", name="Delete the comment of web.ben").click()
    expect(ana.locator("#comments")).to_contain_text("No comments yet.")
    ana.get_by_text("Delete", exact=True).click()
    ana.get_by_role("button", name="Delete for ever").click()
    expect(ana.get_by_text("No photos yet.")).to_be_visible()

    ben.get_by_role("link", name="Home").click()
    expect(ben.get_by_text("Nothing here yet")).to_be_visible()
    ben.get_by_role("button", name="Log out").click()
    expect(ben.get_by_role("link", name="Log in").first).to_be_visible()
    ben.goto("/upload")
    expect(ben.get_by_role("heading", name="Log in")).to_be_visible()
    ben.get_by_label("Username", exact=True).fill("web.ben")
    ben.get_by_label("Password").fill(PASSWORD)
    ben.get_by_role("button", name="Log in").click()
    expect(ben.get_by_role("heading", name="Upload a photo")).to_be_visible()


def test_pages_work_on_a_phone_with_a_keyboard(visit: Callable[..., Page], tmp_path: Path) -> None:
    file = tmp_path / "square.png"
    file.write_bytes(pictures.png(400, 400))
    page = visit(
        viewport={"width": 360, "height": 740}, color_scheme="dark", java_script_enabled=False
    )
    sign_up(page, "web.cleo")
    upload(page, file, "Pocket size")

    for path in ("/", "/explore", "/u/web.cleo", "/upload", "/settings"):
        page.goto(path)
        wide = page.locator("main").bounding_box()
        assert wide is not None
        assert wide["width"] <= 360, f"{path} scrolls sideways"
        assert page.locator("img:not([alt])").count() == 0
    page.goto("/u/web.cleo")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()


def test_a_feed_that_is_not_whole_says_so(
    visit: Callable[..., Page],
    join: Callable[[str], Person],
    app_cluster: LocalCluster,
    service: Service,
) -> None:
    found: dict[str, Person] = {}
    for _ in range(64):
        person = join("web")
        found.setdefault(home_of(person), person)
        if len(found) == 2:
            break
    reader, author = found["alpha"], found["beta"]
    author.upload(pictures.jpeg(), "Over there").raise_for_status()
    reader.upload(pictures.jpeg(), "Over here").raise_for_status()
    reader.http.put(f"/api/v1/users/{author.username}/follow").raise_for_status()

    page = visit()
    session = {"name": "session", "value": reader.http.cookies["session"], "url": service.url}
    page.context.add_cookies([session])  # type: ignore[list-item]
    page.goto("/")
    expect(page.locator("article.card")).to_have_count(2)
    expect(page.locator("[data-partial]")).to_have_count(0)
    # With the cache, the page would be whole.
    lost = ("memcached", *reversed(servers_of(app_cluster, "beta")))
    with without(app_cluster, service, *lost):
        page.goto("/")
        expect(page.locator("article.card")).to_have_count(1)
        note = page.get_by_role("status")
        expect(note).to_contain_text("Some photos are missing here.")
        assert note.bounding_box() is not None
        if folder := os.environ.get("SCREENSHOTS"):
            for path, name in (("/", "feed"), ("/explore", "explore")):
                page.goto(path)
                page.screenshot(path=f"{folder}/{name}.png", full_page=True)
            page.goto("/")
    page.get_by_role("link", name="Try again").click()
    expect(page.locator("article.card")).to_have_count(2)
    expect(page.locator("[data-partial]")).to_have_count(0)


def test_a_form_that_is_sent_twice_counts_once(visit: Callable[..., Page], tmp_path: Path) -> None:
    file = tmp_path / "twice.jpg"
    file.write_bytes(pictures.jpeg(64, 64))
    page = visit()
    sign_up(page, "web.twice")
    # Two windows, so that the browser waits for both answers: on one page, the second click
    # takes the first one's away, and whether that was sent already is chance.
    in_windows = "forms => forms.forEach(form => form.target = '_blank')"
    page.get_by_role("link", name="Upload").first.click()
    page.get_by_label("Photo").set_input_files(file)
    page.get_by_label("Caption").fill("Twice")
    page.locator("form").evaluate_all(in_windows)
    shown = []
    for _ in range(2):
        with page.context.expect_page() as opened:
            page.get_by_role("button", name="Share").click()
        expect(opened.value.locator("article.photo")).to_be_visible()
        shown.append(opened.value.url)
    assert shown[0] == shown[1]
    page.goto("/u/web.twice")
    expect(page.locator("ul.grid li")).to_have_count(1)

    page.goto(shown[0])
    page.get_by_label("Your comment").fill("Said once")
    page.locator("form").evaluate_all(in_windows)
    for _ in range(2):
        with page.context.expect_page() as opened:
            page.get_by_role("button", name="Post").click()
        expect(opened.value.locator("#comments")).to_contain_text("Said once")
    page.goto(shown[0])
    expect(page.locator("#comments li")).to_have_count(1)
    # Impatient, in one window: a second click while the first is on its way.
    page.get_by_label("Your comment").fill("Said impatiently")
    page.get_by_role("button", name="Post").dblclick()
    expect(page.locator("#comments")).to_contain_text("Said impatiently")
    expect(page.locator("#comments li")).to_have_count(2)


def browse(visit: Callable[..., Page], person: Person, service: Service) -> Page:
    """Open a browser in which somebody is logged in."""
    page = visit()
    cookie = {"name": "session", "value": person.http.cookies["session"], "url": service.url}
    page.context.add_cookies([cookie])  # type: ignore[list-item]
    return page


def keep(page: Page, name: str) -> None:
    assert page.locator("img:not([alt])").count() == 0
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def test_a_story_is_posted_and_seen(
    visit: Callable[..., Page], join: Callable[[str], Person], service: Service, tmp_path: Path
) -> None:
    ana, ben = join("round"), join("robin")
    ben.http.put(f"/api/v1/users/{ana.username}/follow").raise_for_status()
    file = tmp_path / "story.jpg"
    file.write_bytes(pictures.jpeg())
    mine = browse(visit, ana, service)
    mine.goto("/")
    mine.get_by_role("link", name="Your story").click()
    mine.get_by_label("Picture").set_input_files(file)
    mine.get_by_label("Caption").fill("On the way")
    keep(mine, "story_new")
    mine.get_by_role("button", name="Share for a day").click()
    expect(mine.get_by_text("Seen by 0")).to_be_visible()

    page = browse(visit, ben, service)
    page.goto("/")
    keep(page, "tray")
    page.locator(f'[data-story="{ana.username}"]').click()
    expect(page.get_by_text("On the way")).to_be_visible()
    assert is_decoded(page, "article.story img")
    keep(page, "story")

    mine.goto(f"/stories/{ana.username}")
    mine.get_by_text("Seen by 1").click()
    expect(mine.locator("article.story")).to_contain_text(ben.username)
    mine.get_by_text("Delete", exact=True).click()
    mine.get_by_role("button", name="Delete this story").click()
    expect(mine.locator(f'[data-story="{ana.username}"]')).to_have_count(0)


def test_what_is_around_a_photo(
    visit: Callable[..., Page], join: Callable[[str], Person], service: Service
) -> None:
    ana, ben = join("round"), join("robin")
    tag = f"dusk{ana.username}"
    photo = ana.upload(pictures.jpeg(), f"Evening #{tag} with @{ben.username}").json()["id"]
    page = browse(visit, ben, service)
    page.goto(f"/p/{photo}")
    page.get_by_role("button", name="Save this photo").click()
    expect(page.get_by_role("button", name="Keep this photo no longer")).to_be_visible()
    page.get_by_label("Your comment").fill(f"What a #{tag}!")
    page.get_by_role("button", name="Post").click()
    page.get_by_text("Reply", exact=True).click()
    page.get_by_role("button", name="Answer").click()
    expect(page.locator("li.below")).to_contain_text(f"@{ben.username}")
    page.get_by_role("button", name="Like this photo").click()
    keep(page, "thread")
    page.get_by_role("link", name=f"#{tag}").first.click()
    expect(page.get_by_role("heading", name=f"#{tag}")).to_be_visible()
    expect(page.locator("ul.grid li")).to_have_count(1)
    keep(page, "tag")
    page.goto("/saved")
    expect(page.locator("ul.grid li")).to_have_count(1)
    keep(page, "saved")

    def told() -> bool:
        answer = ana.http.get("/api/v1/me/notifications").json()
        return {item["kind"]: item["count"] for item in answer["items"]} == {
            "like": 1,
            "comment": 1,
        }

    wait_until(told, 30.0, "the relay tells of like and comments")
    mine = browse(visit, ana, service)
    mine.goto("/notifications")
    expect(mine.locator("li.unread")).to_have_count(2)
    keep(mine, "activity")
    mine.get_by_role("button", name="Mark as read").click()
    expect(mine.locator("li.unread")).to_have_count(0)
    mine.get_by_role("searchbox").fill("robi")
    mine.keyboard.press("Enter")
    expect(mine.get_by_role("link", name=ben.username)).to_be_visible()
    keep(mine, "search")


def test_ask_accept_choose_and_block(visit: Callable[..., Page], tmp_path: Path) -> None:
    file = tmp_path / "shy.jpg"
    file.write_bytes(pictures.jpeg())
    ana, ben = visit(), visit()
    sign_up(ana, "shy.ana")
    number = upload(ana, file, "For friends")
    ana.goto("/settings")
    ana.get_by_label("Private").check()
    ana.get_by_role("button", name="Save").click()
    expect(ana.get_by_text("private", exact=True)).to_be_visible()

    sign_up(ben, "shy.ben")
    ben.goto("/u/shy.ana")
    expect(ben.get_by_text("This account is private")).to_be_visible()
    ben.get_by_role("button", name="Ask to follow").click()
    expect(ben.get_by_role("button", name="Take request back")).to_be_visible()

    def is_asked() -> bool:
        ana.goto("/requests")
        return ana.get_by_role("button", name="Accept").count() == 1

    wait_until(is_asked, 20.0, "the relay tells of the request")
    ana.get_by_role("button", name="Accept").click()
    expect(ana.get_by_text("Nobody is waiting")).to_be_visible()

    ben.goto("/")
    expect(ben.locator(f'article[data-photo="{number}"]')).to_contain_text("For friends")
    ben.get_by_role("button", name="For you").click()
    expect(ben.get_by_role("button", name="For you")).to_have_attribute("aria-pressed", "true")
    expect(ben.locator(f'article[data-photo="{number}"]')).to_be_visible()

    ana.goto("/u/shy.ben")
    ana.get_by_text("Block", exact=True).click()
    ana.get_by_role("button", name="Block shy.ben").click()
    expect(ana.get_by_text("You block shy.ben")).to_be_visible()
    ben.goto("/")
    expect(ben.locator(f'article[data-photo="{number}"]')).to_have_count(0)


def test_the_head_tells_how_much_is_unread(
    visit: Callable[..., Page], join: Callable[[str], Person], service: Service
) -> None:
    ana, ben = join("unread"), join("teller")
    photo = ana.upload(pictures.jpeg(640, 480)).json()["id"]
    page = browse(visit, ana, service)
    page.goto("/")
    badge = page.locator("header .badge")
    expect(badge).to_have_count(0)
    ben.http.put(f"/api/v1/photos/{photo}/like").raise_for_status()
    ben.http.put(f"/api/v1/users/{ana.username}/follow").raise_for_status()
    told = "/api/v1/me/notifications/unread"
    wait_until(lambda: ana.http.get(told).json() == {"unread": 2}, 60.0, "ana is told")
    page.goto("/explore")
    expect(badge).to_have_text("2 unread")
    keep(page, "badge")
    seq = ana.http.get("/api/v1/me/notifications").json()["items"][0]["seq"]
    ana.http.put("/api/v1/me/notifications/read", json={"seq": seq}).raise_for_status()
    wait_until(lambda: ana.http.get(told).json() == {"unread": 0}, 60.0, "it is read")
    page.context.clear_cookies(name="shardkit-token")
    wait_until(lambda: page.goto("/") is not None and badge.count() == 0, 60.0, "no badge")
