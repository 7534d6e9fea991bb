"""The chart, rendered by Helm's own code, and ways to look at what comes out."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

TOP = Path(__file__).resolve().parent.parent.parent
CHART = TOP / "helm/postroom"
GOLDEN = TOP / "tests/helm/golden"
TOOLS = Path(os.environ["POSTROOM_TEST_CHART_TOOLS"])

Object = dict[str, Any]


@cache
def chart() -> Chart:
    return Chart.load(CHART)


def value_sets() -> dict[str, Object]:
    """The main ways to install: helm/postroom/ci/NAME-values.yaml."""
    found = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
    return {name: yaml.safe_load(path.read_text()) for name, path in found.items()}


def required(**more: Any) -> Object:
    """The values without which nothing renders, and more; dots in names are levels."""
    values: Object = {"rabbitmq": {"secret": "r"}, "postgres": {"secret": "p"}, "keys": {"secret": "k"}}
    for path, value in more.items():
        merge(values, path.split("__"), value)
    return values


def merge(values: Object, path: list[str], value: Any) -> None:
    for name in path[:-1]:
        values = values.setdefault(name, {})
    values[path[-1]] = value


def render(values: Object, **options: Any) -> dict[str, str]:
    return chart().render(values, **{"name": "post", "namespace": "mail", **options})


def text(values: Object) -> str:
    """All that is rendered, in the order of file names, without empty files."""
    files = sorted((name, content.strip()) for name, content in render(values).items())
    return "".join(f"# Source: {name}\n{content.removeprefix('---').strip()}\n---\n" for name, content in files if content)


def objects(values: Object) -> list[Object]:
    files = {name: content for name, content in render(values).items() if name.endswith(".yaml")}
    return [found for name in sorted(files) for found in yaml.load_all(files[name], Strict) if found]


def notes(values: Object) -> str:
    return render(values)["postroom/templates/NOTES.txt"]


class Strict(yaml.CSafeLoader):
    """A key that is there twice is an error: Kubernetes would take the last one silently, or refuse it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"twice in one map: {twice}{node.start_mark}")
        return super().construct_mapping(node, deep)


def one(found: list[Object], kind: str, suffix: str = "") -> Object:
    """The only object of the kind whose name has that end."""
    (it,) = [x for x in found if x["kind"] == kind and x["metadata"]["name"].endswith(suffix)]
    return it


def pods(found: list[Object]) -> list[Object]:
    """Every pod, and every pod template as a pod."""
    for it in found:
        if it["kind"] == "Pod":
            yield it
        elif it["kind"] in ("Deployment", "Job"):
            yield {"metadata": {**it["spec"]["template"]["metadata"], "name": it["metadata"]["name"]}, "spec": it["spec"]["template"]["spec"]}


def containers(pod: Object) -> list[Object]:
    return pod["spec"].get("initContainers", []) + pod["spec"]["containers"]


def env(container: Object) -> dict[str, Any]:
    return {it["name"]: it.get("value", it.get("valueFrom")) for it in container.get("env", [])}
