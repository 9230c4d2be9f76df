"""What a reader does with the page of `beingvl serve`, in headless Chromium; prints what was
seen as JSON.

python browse_page.py CHROMIUM URL PICTURE NO_PICTURE LARGE_FILE SCREENSHOT      with playwright
    installed
"""

import json
import sys

from playwright.sync_api import Page, Route, sync_playwright

REMEMBER = """() => {
    window.seen = new Set()
    const look = () => document.querySelectorAll("#chat .bot.message").forEach(
        message => window.seen.add(message.innerText.trim()))
    const all = {subtree: true, childList: true, characterData: true}
    new MutationObserver(look).observe(document.querySelector("#chat"), all)
}"""


def main() -> None:
    chromium, url, picture, no_picture, large, screenshot = sys.argv[1:]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        elsewhere: list[str] = []
        page.on(
            "response",
            lambda response: (
                response.url.startswith((url, "data:", "blob:")) or elsewhere.append(response.url)
            ),
        )
        page.goto(url)
        found: dict = {"elsewhere": elsewhere}
        upload(page, no_picture)
        found["bad"] = toast(page)
        page.wait_for_function("document.querySelector('#words').innerText.includes('cannot')")
        found["bad_words"] = page.inner_text("#words")
        found["bad_gone"] = "text.png" not in page.inner_text("#upload")
        ask(page, "hi", 1)
        found["without"] = messages(page)
        page.reload()
        upload(page, large)
        found["large"] = toast(page)
        page.reload()
        upload(page, picture)
        page.wait_for_selector("#borders img")
        found["width"] = page.evaluate("document.querySelector('#borders img').naturalWidth")
        found["words"] = page.inner_text("#words").strip()
        page.evaluate(REMEMBER)
        found["answers"] = [ask(page, "one", 1), ask(page, "two", 2)]
        found["seen"] = page.evaluate("[...window.seen]")
        page.screenshot(path=f"{screenshot}-1280.png")
        found["before_empty"] = messages(page)
        page.fill("#question textarea", " ")
        page.click("#send")
        found["empty"] = toast(page)
        page.wait_for_timeout(500)
        found["after_empty"] = messages(page)
        page.reload()
        found["raced"] = race(page, picture)
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(500)
        found["phone_width"] = page.evaluate("document.documentElement.scrollWidth")
        page.screenshot(path=f"{screenshot}-390.png", full_page=True)
        browser.close()
    print(json.dumps(found))


def race(page: Page, picture: str) -> list[str]:
    """Ask, twice, while the picture is still on its way to the server."""
    held: list[Route] = []
    page.route("**/gradio_api/upload*", lambda route: held.append(route))
    upload(page, picture)
    page.wait_for_selector("#upload .uploading")
    page.fill("#question textarea", "one")
    for _ in range(2):
        page.press("#question textarea", "Enter")
    page.wait_for_timeout(500)
    assert not messages(page)
    held[0].continue_()
    page.wait_for_selector("#chat .bot.message")
    page.wait_for_timeout(2000)
    return messages(page)


def messages(page: Page) -> list[str]:
    return [
        text.strip()
        for text in page.locator("#chat .message.user, #chat .message.bot").all_inner_texts()
    ]


def upload(page: Page, path: str) -> None:
    page.wait_for_selector("#upload input[type=file]", state="attached")
    page.set_input_files("#upload input[type=file]", path)


def toast(page: Page) -> str:
    return page.wait_for_selector(".toast-body").inner_text()


def ask(page: Page, question: str, number: int) -> str:
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    page.wait_for_function(f"document.querySelectorAll('#chat .bot.message').length == {number}")
    page.wait_for_function("document.querySelector('#question textarea').value == ''")
    page.wait_for_timeout(1500)
    return page.locator("#chat .bot.message").last.inner_text().strip()


main()
