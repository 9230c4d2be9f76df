"""What a reader does with the page of `beingvl serve`, in headless Chromium; prints what was
seen as JSON.

python browse_page.py CHROMIUM URL PICTURE NO_PICTURE LARGE_FILE SCREENSHOT      with playwright
    installed
"""

import json
import sys

from playwright.sync_api import Browser, Page, Route, sync_playwright

VISITORS = 20
DONE = """number => document.querySelectorAll("#chat .bot.message").length == number
    && !document.querySelector("#status")?.innerText.trim()"""
STOP_WHEN_BEGUN = """() => {
    const text = document.querySelector("#chat .bot.message")?.innerText.trim()
    if (!text || text == "…") return false
    document.querySelector("#stop").click()
    return true
}"""
REMEMBER = """() => {
    window.seen = new Set(), window.places = new Set()
    const look = () => document.querySelectorAll("#chat .bot.message").forEach(
        message => window.seen.add(message.innerText.trim()))
    const told = () => window.places.add(document.querySelector("#status")?.innerText.trim())
    const all = {subtree: true, childList: true, characterData: true}
    new MutationObserver(look).observe(document.querySelector("#chat"), all)
    new MutationObserver(told).observe(document.body, all)
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
        found["visitors"], found["places"] = crowd(browser, url)
        page.reload()
        found["example"], found["stopped"] = stop_an_example(page)
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


def crowd(browser: Browser, url: str) -> tuple[list[list[str]], list[str]]:
    """What 20 browsers that ask at the same time are told, and the places in the queue they saw."""
    pages = [browser.new_context().new_page() for _ in range(VISITORS)]
    for page in pages:
        page.set_default_timeout(120_000)
        page.goto(url)
        page.wait_for_selector("#question textarea")
        page.evaluate(REMEMBER)
    for number, page in enumerate(pages):
        page.fill("#question textarea", f"question {number}")
        page.press("#question textarea", "Enter")
    for page in pages:
        page.wait_for_function(DONE, arg=1)
    places = {place for page in pages for place in page.evaluate("[...window.places]")}
    told = [messages(page) for page in pages]
    for page in pages:
        page.context.close()
    return told, [place for place in places if place and "ahead of yours" in place]


def stop_an_example(page: Page) -> tuple[str, str]:
    """The question after a click on an example, and its answer, stopped when it had begun."""
    page.click("text=Describe the picture.")
    question = page.input_value("#question textarea")
    page.click("#send")
    page.wait_for_function(STOP_WHEN_BEGUN)
    page.wait_for_function(DONE, arg=1)
    return question, messages(page)[-1]


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
    page.wait_for_function(DONE, arg=number)
    return page.locator("#chat .bot.message").last.inner_text().strip()


main()
