from beingvl.artefact.request import Request


def test_a_request_says_how_another_differs() -> None:
    asked = Request(seed=1, grid=(4, 4), name="a")
    assert asked.difference({"seed": 1, "grid": [4, 4], "name": "a"}) is None
    assert asked.difference({"seed": 2, "grid": [4, 4], "name": "a"}) == (
        "different seed (found 2, asked for 1)"
    )
    assert asked.difference({"seed": 1, "grid": [4, 4]}) == (
        "different name (found None, asked for 'a')"
    )
    changed = Request(json="blake3:12").difference({"json": "blake3:34"})
    assert changed == "different json (its content differs)"
    assert Request().difference({"more": 0}) == "different more (found 0, asked for None)"
