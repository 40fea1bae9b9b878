"""What helps to deploy fits what it deploys: alerts ask for series that exist, image and chart start a server."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rkv_sglang import __version__
from rkv_sglang.integration.hooking.releases import SUPPORTED_SGLANG
from rkv_sglang.integration.runtime.metrics import COUNTERS, GAUGES, PREFIX, SECONDS
from rkv_sglang.patching.folders import installed_folder
from tests.docs.pages import ROOT, page

DEPLOY = ROOT / "docs" / "deploy"
ALERTS = DEPLOY / "alerts.yaml"
CHART = DEPLOY / "chart"
RULES = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
OURS = (
    {f"{PREFIX}{name}_total" for name in COUNTERS}
    | {PREFIX + name for name in GAUGES}
    | {f"{PREFIX}{SECONDS[0]}_{part}" for part in ("bucket", "count", "sum")}
)


def test_alerts_ask_for_series_that_exist() -> None:
    asked = set(re.findall(r"\b(?:rkv|sglang):\w+", " ".join(rule["expr"] for rule in RULES)))
    assert {name for name in asked if name.startswith(PREFIX)} <= OURS
    folder = installed_folder()
    assert folder is not None
    source = (folder / "srt" / "observability" / "metrics_collector.py").read_text()
    assert [name for name in asked - OURS if f'"{name}"' not in source] == []
    text = page("docs/deploy/README.md")
    assert [rule["alert"] for rule in RULES if f"`{rule['alert']}`" not in text] == []


# Of each series what raises every alert, and what raises none; a value a minute.
SERIES = {
    "rkv:requests_aborted_total": ("0x5 1x55", "7x60"),
    "rkv:requests_restored_total": ("0+60x60", "0+1x60"),
    "rkv:compaction_seconds_sum": ("0+12x60", "0+1x60"),
    "rkv:side_buffer_bytes": ("1024x60", "1024x60"),
    "rkv:logical_tokens": ("100x60", "300x60"),
    "rkv:resident_tokens": ("100x60", "100x60"),
    "sglang:token_usage": ("0.99x60", "0.5x60"),
    "sglang:num_queue_reqs": ("3x60", "3x60"),
}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, is not installed")
def test_each_alert_is_raised_by_what_it_is_for_and_not_by_a_healthy_server(tmp_path: Path) -> None:
    for rule in RULES:
        annotations = {key: text.replace("{{ $labels.model_name }}", "m") for key, text in rule["annotations"].items()}
        raised = {"exp_labels": {"model_name": "m", **rule["labels"]}, "exp_annotations": annotations}
        moment = "10m" if "for" not in rule else "45m"
        tests = [
            {
                "interval": "1m",
                "input_series": [
                    {"series": f'{name}{{model_name="m"}}', "values": values[is_healthy]}
                    for name, values in SERIES.items()
                ],
                "alert_rule_test": [
                    {"eval_time": moment, "alertname": rule["alert"], "exp_alerts": [] if is_healthy else [raised]}
                ],
            }
            for is_healthy in (False, True)
        ]
        file = tmp_path / f"{rule['alert']}.yaml"
        file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}))
        done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def rendered(template: str) -> Any:
    """Fill a template in as Helm does with the two constructs that the chart uses; anything else stays and is found."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    objects = {"Values": VALUES, "Chart": {"Name": chart["name"]}, "Release": {"Name": "release"}}

    def look_up(path: str) -> Any:
        found: Any = objects
        for part in path.strip(".").split("."):
            found = found[part]
        return found

    def block(match: re.Match[str]) -> str:
        indent = " " * int(match[2])
        return "\n" + "\n".join(indent + line for line in yaml.safe_dump(look_up(match[1])).splitlines())

    template = re.sub(r"\s*\{\{- toYaml ([\w.]+) \| nindent (\d+) \}\}", block, template)
    template = re.sub(r"\{\{ ([\w.]+) \}\}", lambda match: str(look_up(match[1])), template)
    assert "{{" not in template, template
    return yaml.safe_load(template)


def test_the_chart_starts_a_server_of_the_image_with_flags_that_exist() -> None:
    deployment, service = (rendered((CHART / "templates" / f"{name}.yaml").read_text()) for name in KINDS)
    assert [deployment["kind"], service["kind"]] == list(KINDS.values())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f'"--port", "{port["containerPort"]}"' in dockerfile and f"EXPOSE {port['containerPort']}\n" in dockerfile
    assert f"-t {container['image']} ." in dockerfile
    # Prometheus is told where to look, and there is something.
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    assert "--enable-metrics" in container["args"] and all(isinstance(word, str) for word in container["args"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}


KINDS = {"deployment": "Deployment", "service": "Service"}


def test_image_and_chart_are_of_the_versions_there_are() -> None:
    dockerfile, sglang = (DEPLOY / "Dockerfile").read_text(), SUPPORTED_SGLANG[-1]
    assert f"ARG SGLANG_VERSION={sglang}\n" in dockerfile
    assert VALUES["image"]["tag"] == f"{__version__}-sglang{sglang}"
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
