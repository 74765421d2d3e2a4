"""The page of demo.py: everything on it is clicked, in a browser."""
import time

import pytest
from playwright.sync_api import Page, expect

import demo
from tests.browser.conftest import fits
from tests.helpers.encoders import random_image, untrained_run
from tests.test_demo import serving


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of scenes, and another that reads all patches."""
    folder = tmp_path_factory.mktemp("runs")
    untrained_run(str(folder / "masked"))
    untrained_run(str(folder / "unmasked"), keep_ratio=1.0)
    return [str(folder / "masked"), str(folder / "unmasked")]


@pytest.fixture(scope="module")
def address(runs):
    with serving(runs) as server:
        yield "http://{}:{}/".format(*server.server_address)


def settled(page: Page) -> None:
    """Waits until no answer is under way."""
    expect(page.locator("section.busy")).to_have_count(0)
    expect(page.locator("section").last.locator(".caption button").first).to_be_visible()


def section(page: Page, name: str):
    return page.locator("section", has=page.get_by_role("heading", name=name, exact=True))


def pixels(page: Page, canvas: int = 0) -> str:
    return page.locator("canvas").nth(canvas).evaluate("c => c.toDataURL()")


def test_it_starts_with_the_captions_of_a_scene_by_all_runs(open_page, address):
    watched = open_page(address)
    page = watched.page
    settled(page)
    for name, words in (("masked", "3 of 9"), ("unmasked", "9 of 9")):
        run = section(page, name)
        expect(run.locator("figcaption").first).to_contain_text(f"reads {words} patches")
        for text in ("Caption without the image", "True caption: ", "Score: "):
            expect(run).to_contain_text(text)
        expect(run.locator(".caption small").first).to_contain_text("%")
        expect(run.locator(".blind small").first).to_contain_text("%")
    assert page.locator("#examples button").count() == demo.NUM_EXAMPLES
    watched.assert_clean()


def test_the_image_is_a_scene_an_example_or_an_upload(open_page, address, tmp_path):
    watched = open_page(address)
    page = watched.page
    settled(page)
    truth = section(page, "masked").locator(".truth")
    seen = [truth.inner_text()]

    def assert_new() -> None:
        expect(truth).not_to_have_text(seen[-1])
        settled(page)
        assert truth.inner_text() not in seen
        seen.append(truth.inner_text())
    page.get_by_role("button", name="Next scene").click()
    assert_new()
    page.get_by_label("Scene", exact=True).fill("12")
    page.get_by_role("button", name="Show").click()
    assert_new()
    page.get_by_label("Scene", exact=True).fill("13")
    page.get_by_label("Scene", exact=True).press("Enter")
    assert_new()
    page.get_by_role("button", name="Example 5").click()
    assert_new()
    before = pixels(page)
    random_image().save(tmp_path / "mine.png")
    page.get_by_label("Upload").set_input_files(tmp_path / "mine.png")
    expect(truth).to_have_text("")
    settled(page)
    assert pixels(page) != before and section(page, "masked").locator(".score").inner_text() == ""
    watched.assert_clean()


def test_the_slider_and_the_draw_change_the_kept_patches(open_page, address):
    watched = open_page(address)
    page = watched.page
    settled(page)
    words = section(page, "masked").locator("figcaption").first
    slider = page.get_by_label("Keep ratio")
    assert page.locator("#ratio").inner_text() == "35%, 100%, as trained"
    slider.fill("60")
    expect(words).to_contain_text("reads 5 of 9")
    expect(section(page, "unmasked").locator("figcaption").first).to_contain_text("reads 5 of 9")
    assert page.locator("#ratio").inner_text() == "60%"
    settled(page)
    pictures = {pixels(page)}
    for _ in range(4):
        page.get_by_role("button", name="New draw").click()
        settled(page)
        pictures.add(pixels(page))
    assert len(pictures) > 2
    slider.press("End")
    expect(words).to_contain_text("reads 9 of 9")
    page.get_by_role("button", name="As trained").click()
    expect(words).to_contain_text("reads 3 of 9")
    for ratio in range(10, 101, 10):  # a slider that moves: the last position counts
        slider.fill(str(ratio))
    expect(words).to_contain_text("reads 9 of 9")
    settled(page)
    watched.assert_clean()


def test_pointing_at_a_token_shows_where_the_decoder_looked(open_page, address):
    watched = open_page(address)
    page = watched.page
    settled(page)
    run = section(page, "masked")
    tokens = run.locator(".caption button")
    assert tokens.count() > 3
    maps = set()
    for n in range(4):
        tokens.nth(n).hover()
        expect(tokens.nth(n)).to_have_attribute("aria-pressed", "true")
        text = tokens.nth(n).evaluate("b => b.firstChild.textContent")
        expect(run.locator(".facts")).to_contain_text(f"“{text}” has a probability of")
        expect(run.locator(".facts")).to_contain_text("without the image: ")
        expect(run.locator(".facts")).to_contain_text("of the attention goes to the image")
        maps.add(pixels(page, 1))
    assert len(maps) == 4
    tokens.nth(1).click()  # a tap on a phone
    expect(tokens.nth(1)).to_have_attribute("aria-pressed", "true")
    watched.assert_clean()


def test_the_keyboard_reaches_everything(open_page, address):
    watched = open_page(address)
    page = watched.page
    settled(page)
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.type"))
    expected = ["scene", "show", "next", *["button"] * 8, "upload", "keep", "trained", "draw"]
    assert reached[:len(expected)] == expected
    tokens = section(page, "masked").locator(".caption button")
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    expect(tokens.nth(2)).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("ArrowLeft")
    expect(tokens.nth(1)).to_have_attribute("aria-pressed", "true")
    draw = page.get_by_role("button", name="New draw")
    draw.focus()
    with page.expect_response("**/caption?*draw=1*"):
        page.keyboard.press("Enter")
    watched.assert_clean()


def test_an_error_is_a_sentence_in_the_page(open_page, address, tmp_path):
    page = open_page(address).page
    settled(page)
    problem = page.get_by_role("alert")
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.get_by_label("Upload").set_input_files(tmp_path / "broken.png")
    expect(problem).to_contain_text("Image cannot be opened: it is not a complete")
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(demo.MAX_UPLOAD_BYTES + 1)
    page.get_by_label("Upload").set_input_files(tmp_path / "long.png")
    expect(problem).to_contain_text("bytes, and the demo reads at most 10,485,760")
    page.get_by_label("Scene", exact=True).fill("-4")
    page.get_by_role("button", name="Show").click()
    expect(problem).to_contain_text("Scene must be a whole number")
    page.get_by_role("button", name="Example 1").click()  # and it goes on
    expect(problem).to_have_text("")
    settled(page)


def test_a_server_that_has_ended_is_named(open_page, runs):
    with serving(runs[:1]) as server:
        page = open_page("http://{}:{}/".format(*server.server_address)).page
        settled(page)
    page.get_by_role("button", name="New draw").click()
    expect(page.get_by_role("alert")).to_have_text(
        "The server does not answer: start demo.py again.")


def test_it_fits_a_phone(open_page, address):
    watched = open_page(address, width=360)
    settled(watched.page)
    assert fits(watched.page)
    boxes = [run.bounding_box() for run in watched.page.locator("section").all()]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] < boxes[1]["y"]  # one below the other
    watched.page.set_viewport_size({"width": 1000, "height": 900})
    boxes = [run.bounding_box() for run in watched.page.locator("section").all()]
    assert boxes[0]["y"] == boxes[1]["y"]                                    # side by side


def test_captions_come_soon(open_page, address):
    """The limit is wide, for a busy machine."""
    page = open_page(address).page
    settled(page)
    start = time.time()
    for _ in range(5):
        page.get_by_role("button", name="New draw").click()
        settled(page)
    assert (time.time() - start) / 5 < 3
