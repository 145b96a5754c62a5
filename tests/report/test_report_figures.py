"""The report's figures beside those of the other commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from in_process import result_of
from report_page import cells, facts_in, percent, rectangles, text
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

from runtime.model_file.reader import GgufFile


def test_its_facts_are_those_of_the_other_commands(fitted_gguf: Path, opened: Chrome) -> None:
    facts, inspected = facts_in(opened), result_of("runtime", "inspect", fitted_gguf)
    for name in ("bytes", "groups", "tokenizer", "general"):
        assert facts[name] == inspected[name]
    for name, value in inspected["structure"].items():
        assert facts["structure"][name] == pytest.approx(value)
    assert facts["sparsity"]["layer_shares"] == pytest.approx(inspected["sparsity"]["layer_shares"])
    assert facts["bytes_per_token"] == pytest.approx(inspected["bytes_per_token"])
    for layer, expected in zip(facts["layers"], result_of("runtime", "sparsity", fitted_gguf)["layers"], strict=True):
        assert {name: layer[name] for name in expected} == pytest.approx(expected)
    for mode in facts["modes"]:
        assert sum(mode["parts"].values()) == pytest.approx(mode["bytes"])
    assert facts["model"] == fitted_gguf.name  # and not where it lies


def test_curves_are_the_frequencies_added_up(fitted_gguf: Path, opened: Chrome) -> None:
    with GgufFile(fitted_gguf) as file:
        for i, curve in enumerate(facts_in(opened)["curves"]):
            freq = file.read(f"blk.{i}.ffn_neuron_freq").view(np.float32).astype(np.float64)
            expected = [freq[: round(n * 10.24)].sum() / freq.sum() for n in range(101)]
            assert curve == pytest.approx(expected, abs=5.1e-4)


def test_what_is_read_on_the_page(fitted_gguf: Path, opened: Chrome) -> None:
    inspected = result_of("runtime", "inspect", fitted_gguf)
    traffic, shares = inspected["bytes_per_token"], inspected["sparsity"]["layer_shares"]
    verdict = text(opened, ".verdict")
    for expected in (
        percent(inspected["sparsity"]["share"]),
        f"{traffic['dense'] / 1e6:.2f} MB",
        f"{traffic['exact_calibrated'] / 1e6:.2f} MB",
        f"{traffic['predicted_calibrated'] / 1e6:.2f} MB",
        f"{traffic['dense'] / traffic['predicted_calibrated']:.2f} times",
    ):
        assert expected in verdict
    assert [row[3] for row in cells(opened, "parts")[:2]] == [
        f"{g['bytes'] / 1e6:.2f} MB" for g in inspected["groups"][:2]
    ]
    assert [row[1] for row in cells(opened, "neurons")] == [percent(share) for share in shares]
    with GgufFile(fitted_gguf) as file:
        recall, ranks = file.metadata["lazyneuron.predictor.recall"], file.structure.predictor_rank
        parameters = sum(
            np.prod(t.ne)
            for name, t in file.tensors.items()
            if "neuron" not in name and "predictor" not in name and "_t." not in name
        )
    for row, share, rank in zip(cells(opened, "predictors"), recall, ranks, strict=True):
        assert row[1:3] == ([f"q4_0 rank {rank}", percent(float(share))] if rank else ["none", "-"])
    for row, mode in zip(cells(opened, "bounds"), ("dense", "exact_calibrated", "predicted_calibrated"), strict=True):
        assert row[2:] == [f"{25e9 / traffic[mode]:,.0f}", f"{272e9 / traffic[mode]:,.0f}"]
    assert f"{parameters / 1e6:.3g} million parameters" in text(opened, ".subtitle")


def test_bars_are_as_high_as_what_they_show(opened: Chrome) -> None:
    shares = facts_in(opened)["sparsity"]["layer_shares"]
    heights = rectangles(opened, "firing", "hot") + rectangles(opened, "firing", "cold")
    assert np.array(heights) / heights[0] == pytest.approx(np.array(shares) / shares[0], abs=0.01)
    assert len(opened.find_elements(By.CSS_SELECTOR, "#chart-quality circle.recall")) == 6
    assert len(opened.find_elements(By.CSS_SELECTOR, "#chart-modes g.row")) == 3


def test_a_layer_is_chosen_by_slider_or_bar(opened: Chrome) -> None:
    path = "return document.querySelector('#chart-curves path.hot').getAttribute('d')"
    first = opened.execute_script(path)
    opened.find_element(By.ID, "layer").send_keys(Keys.ARROW_RIGHT)
    second = opened.execute_script(path)
    assert text(opened, "#layer-name") == f"1: {percent(facts_in(opened)['layers'][1]['active'])} fire"
    bar = opened.find_elements(By.CSS_SELECTOR, "#chart-firing rect")[4]
    ActionChains(opened).move_to_element(bar).click().perform()
    assert text(opened, "#layer-name").startswith("4: ")
    assert len({first, second, opened.execute_script(path)}) == 3


@pytest.mark.parametrize(
    "name", ["parts", "modes", "curves", "firing", "quality", "candidates", "split", "speed", "times", "bounds"]
)
def test_every_chart_says_its_values_to_keys_and_pointer(opened: Chrome, name: str) -> None:
    chart = opened.find_element(By.CSS_SELECTOR, f"#chart-{name} svg")
    assert chart.get_attribute("aria-label")
    assert len(chart.find_elements(By.CSS_SELECTOR, "text.axis")) >= 1
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    chart.send_keys(Keys.HOME)
    first = text(opened, f"#chart-{name} .readout")
    chart.send_keys(Keys.ARROW_RIGHT)
    second = text(opened, f"#chart-{name} .readout")
    assert "" not in (first, second)
    assert first != second
    ActionChains(opened).move_to_element_with_offset(chart, 0, -20).perform()
    assert any(c.isdigit() for c in text(opened, f"#chart-{name} .readout"))
