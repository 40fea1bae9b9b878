"""In a real browser the page shows what lists of positions say, asks the network for nothing, and hides no failure."""

import base64
import hashlib
import json
from pathlib import Path

import pytest

from rkv_sglang.view.page import page_html
from rkv_sglang.view.trace import Trace
from tests.cache.trace_cases import History, random_history
from tests.view import expected
from tests.view.browser import INSTALL, Visit, find_browser, visit
from tests.view.expected import Shown, all_held, at_compaction, at_length, trace_of

pytestmark = pytest.mark.skipif(find_browser() is None, reason=INSTALL)

NASTY = [
    *("</script><script>document.title='owned'</script>", "<!--", "<!--<script>", "-->", "]]>", "&lt;b&gt;", "\"'`"),
    *(
        "<img src=x onerror=alert(1)>",
        "@@DATA@@",
        "@@JS@@",
        "\\u003c/script>",
        "\u2028\u2029",
        "\u202eabc",
        "質問",
        "🌟",
    ),
    *(" ", "", "\n", "a\nb\n\n", "${1}", "{{x}}", "\\", "\ufffd", "__proto__"),
]


def open_page(folder: Path, traces: list[Trace], fragment: str = "") -> Visit:
    page = folder / "page.html"
    page.write_text(page_html(traces), encoding="utf-8")
    seen = visit(page, fragment)
    assert_clean(seen)
    return seen


def assert_clean(seen: Visit) -> None:
    assert (seen.one(id="errors").text, seen.console, seen.requests) == ("", [], [])
    assert seen.elements[0].attributes.get("data-ready") == "true"


def walk(folder: Path, traces: list[Trace], metrics: list[str], tokens: list[int]) -> dict:
    """Open the page with a script that goes through all moments, and return its notes."""
    html = page_html(traces)
    script = f"const WALK = {json.dumps({'metrics': metrics, 'tokens': tokens})};\n"
    script += Path(__file__).with_name("walk.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    head, tail = html.rsplit("</body>", 1)
    page = folder / "walk.html"
    page.write_text(f"{head}<script>{script}</script></body>{tail}", encoding="utf-8")
    seen = visit(page)
    assert_clean(seen)
    return json.loads(seen.one(id="walk").text)


def table(cells: list) -> dict:
    return {(layer, head): value for layer, head, value in cells}


def assert_moment(seen: dict, index: int, history: History, shown: Shown, token: int) -> None:
    """Compare what one pane showed at one moment."""
    assert seen["numbers"][index] == expected.numbers(shown)
    assert seen["counts"][index] == [expected.count(shown, other) for other in range(history.num_tokens)]
    for metric, figure in (("age", expected.age), ("agreement", expected.agreement)):
        values = table(seen["values"][metric][index])
        assert values.keys() == set(history.pairs)
        for pair, value in values.items():
            assert float(value) == pytest.approx(figure(shown, pair)), (metric, pair)
    until, held = table(seen["until"][index]), table(seen["held"][index])
    for pair in history.pairs:
        assert int(until[pair] or 0) == expected.until(history, pair, token, shown.compaction), pair
        assert int(held[pair]) == (token in shown.held[pair]), pair


def test_every_moment_shows_what_lists_of_positions_say(tmp_path, rng):
    history = random_history(
        rng, num_layers=4, num_kv_heads=3, budget=12, buffer=5, num_tokens=70, computed_again=(44,)
    )
    tokens = [0, 10, 30, 43, 20]
    notes = walk(tmp_path, [trace_of(history, rng)], ["age", "agreement"], tokens)
    last = len(history.held)
    assert len(notes["seen"]) == last + 1 and notes["end"] == f"#c={last}"
    for moment, seen in enumerate(notes["seen"]):
        shown = at_compaction(history, moment)
        token = tokens[moment % len(tokens)]
        assert (seen["hash"], seen["chosenHash"]) == (f"#c={moment}", f"#c={moment}&t={token}")
        assert seen["moment"] == {"moment": str(moment), "length": str(shown.length)}
        assert_moment(seen, 0, history, shown, token)


def test_two_traces_share_the_slider_and_their_overlap_is_right(tmp_path, rng):
    shape = {"num_layers": 3, "num_kv_heads": 2}
    first = random_history(rng, **shape, budget=12, buffer=5, num_tokens=70)
    second = random_history(rng, **shape, budget=9, buffer=8, num_tokens=52)
    common = 33
    ids = [rng.randrange(1000) for _ in range(70)]
    other_ids = [*ids[:common], ids[common] + 1, *ids[common + 1 : 52]]
    traces = [trace_of(first, rng, ids=ids), trace_of(second, rng, ids=other_ids, policy="random")]
    tokens = [0, 16, 31]
    notes = walk(tmp_path, traces, ["age", "agreement", "overlap"], tokens)
    lengths = sorted({*first.lengths, *second.lengths})
    assert len(notes["seen"]) == len(lengths) + 1
    for moment, (length, seen) in enumerate(zip([lengths[0], *lengths], notes["seen"], strict=True)):
        shown = [at_length(history, length) if moment else all_held(history, length) for history in (first, second)]
        assert seen["moment"] == {"moment": str(moment), "length": str(length)}
        for index, history in enumerate((first, second)):
            assert_moment(seen, index, history, shown[index], tokens[moment % len(tokens)])
        both, either = expected.overlap(shown, common, first.pairs)
        assert float(seen["overlap"]) == pytest.approx(both / either)
        for values in seen["values"]["overlap"]:
            for pair, value in table(values).items():
                both, either = expected.overlap(shown, common, [pair])
                assert value == "" if either == 0 else float(value) == pytest.approx(both / either)


def test_the_address_opens_a_state_and_no_token_text_can_break_the_page(tmp_path, rng):
    history = random_history(rng, num_layers=2, num_kv_heads=2, budget=9, buffer=4, num_tokens=40)
    tokens = [rng.choice(NASTY) for _ in range(40 - len(NASTY))] + NASTY
    trace = trace_of(history, rng, tokens=tokens, prompt="</pre><script>1</script>\n<!--", model="<b>/&amp;")
    seen = open_page(tmp_path, [trace], "#c=2&t=7")
    shown = at_compaction(history, 2)
    assert {
        box.attributes["data-number"]: float(box.attributes["data-value"]) for box in seen.all(data_number=None)
    } == (expected.numbers(shown))
    spans = seen.all(data_token=None, data_count=None)
    assert [int(span.attributes["data-count"]) for span in spans] == [expected.count(shown, i) for i in range(40)]
    for span, token in zip(spans, tokens, strict=True):
        assert span.text == (token.replace("\n", "\u21b5\n") or "\u00b7")
    assert ["selected" in span.attributes["class"].split() for span in spans] == [token == 7 for token in range(40)]
    assert [element.text for element in seen.elements if element.tag == "title"] == ["rkv 9: KV cache view"]
    assert trace.prompt in [element.text for element in seen.elements if element.tag == "pre"]
    for cell in seen.all(data_layer=None):
        pair = int(cell.attributes["data-layer"]), int(cell.attributes["data-head"])
        assert int(cell.attributes["data-until"] or 0) == expected.until(history, pair, 7, 2)


def test_a_document_is_shown_as_what_stayed_of_it(tmp_path, rng):
    history = random_history(rng, num_layers=2, num_kv_heads=3, budget=9, buffer=21, num_tokens=30)
    trace = trace_of(history, rng, subject="document", prompt="", prompt_len=0)
    seen = open_page(tmp_path, [trace], "#c=1")
    shown = at_compaction(history, 1)
    counts = [int(span.attributes["data-count"]) for span in seen.all(data_token=None, data_count=None)]
    assert counts == [expected.count(shown, token) for token in range(30)]
    text = seen.one(id="panes").text
    assert "of the 30 tokens of the document each pair keeps 9, the last 1 among them; 2 layers x 3 KV heads" in text
    assert "generated" not in text and "30 tokens of the document" in seen.one(id="moment").text
    assert "always kept" not in text


def test_a_state_that_does_not_exist_opens_the_nearest_and_many_compactions_are_told_apart(tmp_path, rng):
    history = random_history(rng, num_layers=1, num_kv_heads=2, budget=3, buffer=1, num_tokens=310)
    assert len(history.held) > 2**8
    seen = open_page(tmp_path, [trace_of(history, rng)], "#c=99999&t=&m=nonsense&x")
    assert seen.one(id="moment").attributes["data-moment"] == str(len(history.held))
    shown = at_compaction(history, len(history.held))
    counts = [int(span.attributes["data-count"]) for span in seen.all(data_token=None, data_count=None)]
    assert counts == [expected.count(shown, token) for token in range(310)]


def test_an_answer_that_was_never_compacted_and_one_of_another_shape_are_shown(tmp_path, rng):
    short = random_history(rng, num_layers=2, num_kv_heads=2, budget=30, buffer=4, num_tokens=20)
    other = random_history(rng, num_layers=3, num_kv_heads=1, budget=30, buffer=4, num_tokens=25)
    seen = open_page(tmp_path, [trace_of(short, rng), trace_of(other, rng)], "#t=22&m=overlap")
    values = [box.attributes["data-value"] for box in seen.all(data_number=None)]
    assert values == ["20", "20", "0", "20", "0", "25", "25", "0", "25", "0"]
    assert "no overlap" in seen.one(id="overlap").text


def test_the_browser_tells_of_a_request_and_of_an_error(tmp_path, rng):
    history = random_history(rng, num_layers=1, num_kv_heads=1, budget=3, buffer=2, num_tokens=20)
    html = page_html([trace_of(history, rng)])
    image = "http://127.0.0.1:9/x.png"
    page = tmp_path / "page.html"
    policy_start = html.index('<meta http-equiv="Content-Security-Policy"')
    policy_end = html.index(">", policy_start) + 1
    page.write_text((html[:policy_start] + html[policy_end:]).replace("</main>", f"</main><img src={image}>"))
    assert visit(page).requests == [image]
    # The page's own policy forbids the same request, and a page that lost its data says that it failed.
    page.write_text(html.replace("</main>", f"</main><img src={image}>").replace('"lives":"', '"lives":"AAAA'))
    seen = visit(page)
    assert seen.requests == []
    errors = seen.one(id="errors")
    assert "hidden" not in errors.attributes and int(errors.attributes["data-count"]) == 2
    assert "forbids" in errors.text and "TypeError" in errors.text
    assert len(seen.console) == 2
