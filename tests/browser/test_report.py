"""report.html, opened from disk."""
import pytest

from runtime import report
from tests.browser.conftest import fits
from tests.runtime.test_report import EVIL, write_run


@pytest.mark.parametrize("steps, finished", [(10, True), (7, False), (1, False), (1, True),
                                             (0, False)])
def test_it_opens_without_a_problem(open_page, tmp_path, steps, finished):
    """Of a finished run, an interrupted one, and one of a single step."""
    write_run(tmp_path / "run", steps, finished)
    report.main([str(tmp_path / "run")])
    watched = open_page((tmp_path / "run" / "report.html").as_uri())
    state = "finished, " if finished else "not finished, "
    assert state in watched.page.inner_text("body")
    for name in ("Result", "Curves", "Cost", "Samples", "Skipped samples", "Settings"):
        assert watched.page.get_by_role("heading", name=name, exact=True).is_visible()
    watched.page.set_viewport_size({"width": 360, "height": 700})
    assert fits(watched.page)
    watched.assert_clean()


def test_a_click_on_a_heading_sorts_the_table(open_page, tmp_path):
    write_run(tmp_path / "run")
    lines = [f"{step}\tz{step % 7}.jpg\treason" for step in (30, 4, 200, 100)]
    (tmp_path / "run" / "bad-samples.txt").write_text("\n".join(lines))
    report.main([str(tmp_path / "run")])
    watched = open_page((tmp_path / "run" / "report.html").as_uri())
    table = watched.page.locator("table", has_text="reason")

    def column(n: int) -> list[str]:
        return table.locator(f"tbody td:nth-child({n})").all_inner_texts()
    button = table.get_by_role("button", name="step")
    button.click()
    assert column(1) == ["4", "30", "100", "200"]  # as numbers
    button.press("Enter")                          # and with the keyboard
    assert column(1) == ["200", "100", "30", "4"]
    assert table.locator("th").first.get_attribute("aria-sort") == "descending"
    table.get_by_role("button", name="sample").click()
    assert column(2) == sorted(column(2))
    watched.assert_clean()


def test_a_script_tag_in_a_caption_stays_text(open_page, tmp_path):
    name = EVIL.replace("/", "-")
    write_run(tmp_path / name, text=EVIL, data=EVIL)
    write_run(tmp_path / "other", text=EVIL)
    path = tmp_path / "report.html"
    report.write_report([str(tmp_path / name), str(tmp_path / "other")], str(path))
    watched = open_page(path.as_uri())
    assert watched.page.title() == f"Report of {name}, other"
    assert watched.page.inner_text("body").count(EVIL) >= 10
    assert watched.page.locator(".samples svg").count() == 6
    watched.assert_clean()
