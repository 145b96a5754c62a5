"""What the tests read off a page of `python -m runtime report`, and the machine that it is made for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import result_of
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from runtime.cli.machine import machine_options
from runtime.commands.report import report as command

MACHINE = {"device_bandwidth": (272.0,), "cpu_bandwidth": 25.0, "sync_us": 0.1}
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\u2028\"'&{{ 7 * 7 }}"


def report(model: Path, out: Path, force: bool = False, as_json: bool = False, **machine: Any) -> None:
    """The page of `model`; machine: options as on the command line."""
    command(model, out, machine_options(**machine), force, as_json)


def facts_in(driver: Chrome) -> dict[str, Any]:
    found: dict[str, Any] = driver.execute_script("return JSON.parse(document.getElementById('facts').textContent)")
    return found


def text(driver: Chrome, selector: str) -> str:
    return str(driver.find_element(By.CSS_SELECTOR, selector).text)


def cells(driver: Chrome, name: str) -> list[list[str]]:
    """A table's cells, whether its <details> are open or not."""
    script = "return [...document.querySelectorAll(`#table-${arguments[0]} tbody tr`)].map(r => [...r.cells].map(c => c.textContent))"
    found: list[list[str]] = driver.execute_script(script, name)
    return found


def rectangles(driver: Chrome, chart: str, kind: str) -> list[float]:
    """Heights of a chart's rectangles of one kind."""
    script = "return [...document.querySelectorAll(`#chart-${arguments[0]} rect.${arguments[1]}`)].map(r => r.height.baseVal.value)"
    found: list[float] = driver.execute_script(script, chart, kind)
    return found


def percent(share: float) -> str:
    return f"{share * 100:.1f}%"


def check_placement(driver: Chrome, model: Path) -> dict[str, Any]:
    """Compare what is shown with what the command on the page says; returns that."""
    command = shlex.split(text(driver, "#command"))
    assert command[:4] == ["python", "-m", "runtime", "plan"]
    assert command[4] == model.name
    planned = result_of("runtime", "plan", model, *command[5:])
    neurons = [layer["neurons"] for layer in planned["layers"]]
    shown = cells(driver, "layers")
    assert [row[2].replace(",", "") for row in shown] == [str(layer["hot"][0]) for layer in planned["layers"]]
    assert [row[1] for row in shown] == ["device" if la["attention_on_device"] else "CPU" for la in planned["layers"]]
    assert [row[6] for row in shown] == [layer["limit"] for layer in planned["layers"]]
    for row, layer in zip(shown, planned["layers"], strict=True):
        assert float(row[4].removesuffix("%")) / 100 == pytest.approx(layer["activations"], abs=1.1e-3)
        assert float(row[5].replace(",", "")) == pytest.approx(layer["seconds"] * 1e6, rel=0.01)
    assert float(text(driver, "#tokens-per-s").replace(",", "")) == pytest.approx(planned["tokens_per_s"], rel=5e-3)
    used = planned["devices"][0]["bytes"]
    assert text(driver, "#on-device") == (f"{used / 2**30:.2f} GiB" if used >= 2**30 else f"{used / 2**20:.1f} MiB")
    assert text(driver, "#limit") == planned["limit"]
    hot = np.array([layer["hot"][0] for layer in planned["layers"]]) / neurons
    drawn, rest = (np.array(rectangles(driver, "split", f"{kind}:not(.strip)")) for kind in ("hot", "pale"))
    assert drawn / (drawn + rest) == pytest.approx(hot, abs=1e-4)
    attention = sum(layer["attention_on_device"] for layer in planned["layers"])
    assert len(rectangles(driver, "split", "hot.strip")) == attention
    assert text(driver, "#hot-share") == percent(float(hot.mean()))
    return planned
