"""What the page's text promises by itself: data that cannot end its element, and colours that can be read."""

import json
import re
from importlib import resources

import pytest

from rkv_sglang.view.page import page_html
from tests.cache.trace_cases import random_history
from tests.view.expected import trace_of

STYLE = resources.files("rkv_sglang.view").joinpath("page.css").read_text()


def test_the_data_stays_in_its_element_and_nothing_outside_is_named(rng):
    history = random_history(rng, num_layers=2, num_kv_heads=2, budget=9, buffer=4, num_tokens=40)
    nasty = ["</script>", "<!--", "<script>", "</SCRIPT >", "@@JS@@", "@@POLICY@@", "\u2028", "\ud83d"]
    trace = trace_of(history, rng, tokens=[rng.choice(nasty) for _ in range(40)], prompt="</script><!--", model="<!--")
    page = page_html([trace, trace])
    page.encode()
    assert len(re.findall(r"<script", page)) == len(re.findall(r"</script>", page)) == 3
    assert "<!--" not in page
    (data,) = re.findall(r'id="data">(.*?)</script>', page)
    shown = json.loads(data)[1]
    assert (shown["tokens"], shown["prompt"], shown["ids"]) == (trace.tokens, trace.prompt, trace.token_ids)
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(|@@", page.replace(data, ""))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def colours(style: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", style))


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme):
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    found = colours(light) if scheme == "light" else colours(light) | colours(dark)
    pairs = [(f"s{number}-ink", f"s{number}") for number in range(1, 9)]
    pairs += [(ink, back) for ink in ("ink", "muted", "accent") for back in ("card", "page")]
    pairs += [("gone", "gone-back"), ("future", "card")]
    for ink, back in pairs:
        bright, dim = sorted((luminance(found[ink]), luminance(found[back])), reverse=True)
        # 4.5 is what the Web Content Accessibility Guidelines ask of running text.
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, back)
    steps = [luminance(found[f"s{number}"]) for number in range(1, 9)]
    assert steps == sorted(steps, reverse=scheme == "light")
