"""What is written once and wanted in several places.

Descriptions: the comments in values.yaml. Settings: the tables of docs/configuration.md. From these: values.schema.json,
the tables in the chart's README, and the golden renders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from chart import CHART, GOLDEN, TOP, Object, text, value_sets

# Variables that have a place of their own in values.yaml.
ELSEWHERE = {
    "POSTROOM_AMQP_URL": "rabbitmq",
    "POSTROOM_AMQP_CA_FILE": "rabbitmq.ca",
    "POSTROOM_DATABASE_URL": "postgres",
    "POSTROOM_DATABASE_CA_FILE": "postgres.ca",
    "POSTROOM_ENCRYPTION_KEYS": "keys.encryptionKey",
    "POSTROOM_OVERRIDE_KEYS": "keys.overrideKey",
    "POSTROOM_SMTP_CA_FILE": "smtp.ca",
    "POSTROOM_STORAGE_URL": "storage.url",
    "POSTROOM_STORAGE_PUBLIC_URL": "storage.publicUrl",
    "POSTROOM_LINK_LIFETIME": "storage.linkLifetime",
    "POSTROOM_HTTP_ADDR": "http",
    "OTEL_EXPORTER_OTLP_HEADERS": "traces.headers",
}

# Objects of Kubernetes: taken over as they are, and checked by Kubernetes.
FREE = {
    "podSecurityContext", "securityContext", "resources", "strategy", "behavior", "startup", "liveness", "readiness",
    "commonLabels", "commonAnnotations", "annotations", "podAnnotations", "podLabels", "labels", "alertLabels",
    "nodeSelector", "affinity", "fallback", "env",
}  # fmt: skip
TEXT_MAPS = {
    "commonLabels", "commonAnnotations", "annotations", "podAnnotations", "podLabels", "labels", "alertLabels",
    "nodeSelector", "env",
}  # fmt: skip
OURS = {"not": {"pattern": "^(app\\.kubernetes\\.io|helm\\.sh)/"}}
NAME = {"pattern": "^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$"}
KEY = {"pattern": "^[A-Za-z0-9._-]+$"}
PORTS = {"items": {"type": "integer", "minimum": 1, "maximum": 65535}}
NETWORKS = {"items": {"type": "string", "pattern": "^[0-9a-fA-F:.]+/[0-9]{1,3}$"}}
DURATION = "([0-9]+(ms|s|m|h|d))+"
INTEGER_OR_PERCENT = {"type": ["integer", "string"], "pattern": "^[0-9]+%$", "minimum": 0}

# What a default value does not tell, by the end of the path.
MORE: dict[str, Object] = {
    "commonLabels": {"propertyNames": OURS},
    "podLabels": {"propertyNames": OURS},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "image.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "image.repository": {"minLength": 1},
    "imagePullSecrets": {"items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}, "additionalProperties": False}},
    "secret": NAME,
    "configMap": NAME,
    "rabbitmq.urlKey": {"pattern": "^[A-Za-z0-9._-]*$"},
    "headers.key": KEY, "usernameKey": KEY, "passwordKey": KEY, "hostKey": KEY, "portKey": KEY, "postgres.urlKey": KEY, "ca.key": KEY,
    "encryptionKey": KEY,
    "overrideKey": {"pattern": "^[A-Za-z0-9._-]*$"},
    "rabbitmq.vhost": {"minLength": 1},
    "maxConnections": {"minimum": 0},
    "storage.url": {"pattern": "^((s3|gs|az|file)://.+)?$"},
    "publicUrl": {"pattern": "^(https?://.+)?$"},
    "linkLifetime": {"pattern": f"^({DURATION})?$"},
    "http.port": {"minimum": 1024, "maximum": 65535},
    "http.address": {"pattern": "^([0-9.]+|\\[[0-9a-fA-F:.]+\\])$"},
    "setup.mode": {"enum": ["hook", "init", "none"]},
    "grantTo": {"maxLength": 63},
    "backoffLimit": {"minimum": 0},
    "activeDeadlineSeconds": {"minimum": 1},
    "ttlSecondsAfterFinished": {"minimum": 0},
    "replicas": {"minimum": 0},
    "autoscaling.type": {"enum": ["none", "keda", "hpa"]},
    "minReplicas": {"minimum": 1},
    "maxReplicas": {"minimum": 1},
    "pollingInterval": {"minimum": 1},
    "bridge.autoscaling.keda.queueLength": {"minimum": 1},
    "queueLength.immediate": {"minimum": 1}, "queueLength.high": {"minimum": 1},
    "queueLength.medium": {"minimum": 1}, "queueLength.low": {"minimum": 1},
    "runnableJobs": {"minimum": 1},
    "terminationGracePeriodSeconds": {"minimum": 0},
    "maxUnavailable": INTEGER_OR_PERCENT,
    "interval": {"pattern": f"^{DURATION}$"}, "scrapeTimeout": {"pattern": f"^{DURATION}$"},
    "ports": PORTS, "smtpPorts": PORTS, "webPorts": PORTS,
    "except": NETWORKS, "exceptIPv6": NETWORKS,
    "prometheusRule.disabled": {"items": {"type": "string"}},
    "extraObjects": {"items": {"type": ["object", "string"]}},
}  # fmt: skip

# Keys that may be given without being in values.yaml.
ADDED = {
    "podDisruptionBudget": {
        "minAvailable": {**INTEGER_OR_PERCENT, "description": "Pods that must be there; wins over maxUnavailable."}
    }
}


def comments(source: str) -> dict[str, str]:
    """The comment above each key of values.yaml, by the key's path."""
    found: dict[str, str] = {}
    above: list[str] = []
    path: list[tuple[int, str]] = []
    for line in source.splitlines():
        if match := re.match(r" *# ?(.*)", line):
            above.append(match[1])
            continue
        if match := re.match(r"( *)([A-Za-z0-9_]+):", line):
            indent = len(match[1])
            path = [it for it in path if it[0] < indent] + [(indent, match[2])]
            if above:
                found[".".join(name for _, name in path)] = " ".join(above)
        above = []
    return found


def setting_rows() -> list[tuple[str, str, str, str]]:
    """Variable, form, default and meaning of every setting."""
    page = (TOP / "docs/configuration.md").read_text()
    rows = re.findall(r"^\| `((?:POSTROOM|OTEL)_\w+)` \| `--[\w-]+` \| `(.*?)` \| (.*?) \| (.*?) \|$", page, re.M)
    return [(name, form.replace("\\|", "|"), default.strip("`"), meaning) for name, form, default, meaning in rows]


def camel(variable: str) -> str:
    first, *rest = variable.removeprefix("POSTROOM_").lower().split("_")
    return first + "".join(word.capitalize() for word in rest)


def setting_schema(form: str) -> Object:
    if form == "NUMBER":
        return {"type": "integer", "minimum": 1}
    if form == "MILLISECONDS":
        return {"type": "integer", "minimum": 1, "maximum": 60000}
    if form == "RATIO":
        return {"type": "number", "minimum": 0, "maximum": 1}
    if form == "true|false":
        return {"type": "boolean"}
    if form == "DURATION":
        return {"type": "string", "pattern": f"^{DURATION}$"}
    if form == "SIZE":
        return {"type": ["integer", "string"], "pattern": "^[0-9]+([KMG]i?B)?$", "minimum": 1}
    if form == "FACTOR":
        return {"type": "number", "exclusiveMinimum": 0}
    if form.endswith(",…"):
        return {"type": "array", "items": {"type": "string", "minLength": 1, "pattern": queue_or_any(form)}}
    if re.fullmatch(r"[a-z_/]+(\|[a-z_/]+)*", form):
        return {"enum": form.split("|")}
    return {"type": "string", "minLength": 1}


def queue_or_any(form: str) -> str:
    return "^(immediate|high|medium|low):[^,]+$" if form.startswith("LEVEL:") else "^[^,]+$"


def settings_schema() -> Object:
    properties = {}
    for name, form, default, meaning in setting_rows():
        if name not in ELSEWHERE:
            note = "" if default == "–" else f" Default: {default}."
            schema = {**setting_schema(form), "description": f"{name}: {meaning}{note}"}
            if least := re.search(r"\bat least (\d+):", meaning):
                schema["minimum"] = int(least[1])
            properties[camel(name)] = schema
    return {"type": "object", "additionalProperties": False, "properties": properties}


def more(path: str) -> Object:
    for end, extra in MORE.items():
        if path == end or path.endswith("." + end):
            return extra
    return {}


def schema_of(path: str, value: Any, described: dict[str, str]) -> Object:
    name = path.rsplit(".", 1)[-1]
    found: Object = {}
    if path in described:
        found["description"] = described[path]
    if name == "settings":
        found["allOf"] = [{"$ref": "#/definitions/settings"}]
        return found
    if isinstance(value, bool):
        found["type"] = "boolean"
    elif isinstance(value, int):
        found["type"] = "integer"
    elif isinstance(value, str):
        found["type"] = "string"
    elif isinstance(value, list):
        found["type"] = "array"
    elif name in FREE:
        found["type"] = "object"
        if name in TEXT_MAPS:
            found["additionalProperties"] = {"type": "string"}
    else:
        found["type"] = "object"
        found["additionalProperties"] = False
        found["properties"] = {key: schema_of(f"{path}.{key}".lstrip("."), it, described) for key, it in value.items()}
        found["properties"].update(ADDED.get(name, {}))
    found.update(more(path))
    return found


def schema(source: str) -> str:
    values = yaml.safe_load(source)
    found = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart postroom",
        "description": "Made by `make chart`: edit values.yaml, docs/configuration.md or tests/helm/generate.py.",
        **schema_of("", values, comments(source)),
        "definitions": {"settings": settings_schema()},
    }
    # Helm and Argo CD give charts a map of this name.
    found["properties"]["global"] = {"type": "object", "description": "Not used; Helm gives it to every chart."}
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def leaves(path: str, value: Any, described: dict[str, str]) -> list[tuple[str, Any, str]]:
    name = path.rsplit(".", 1)[-1]
    if isinstance(value, dict) and value and name not in FREE:
        return [row for key, it in value.items() for row in leaves(f"{path}.{key}".lstrip("."), it, described)]
    return [(path, value, described.get(path, ""))]


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def values_table(source: str) -> str:
    rows = leaves("", yaml.safe_load(source), comments(source))
    lines = [f"| `{path}` | `{cell(json.dumps(value))}` | {cell(meaning)} |" for path, value, meaning in rows]
    return "\n".join(["| value | default | meaning |", "|---|---|---|", *lines])


def settings_table() -> str:
    rows = [row for row in setting_rows() if row[0] not in ELSEWHERE]
    lines = [f"| `{camel(name)}` | {cell(form_of(form))} | {default_of(default)} | {cell(meaning)} |" for name, form, default, meaning in rows]
    return "\n".join(["| setting | value | default | meaning |", "|---|---|---|---|", *lines])


def form_of(form: str) -> str:
    return f"list of `{form.removesuffix(',…')}`" if form.endswith(",…") else f"`{form}`"


def default_of(default: str) -> str:
    return default if default == "–" else f"`{default}`"


def readme(old: str, source: str) -> str:
    for name, table in (("values", values_table(source)), ("settings", settings_table())):
        begin, end = f"<!-- {name}: made by `make chart` -->", f"<!-- end of {name} -->"
        head, rest = old.split(begin)
        _, tail = rest.split(end)
        old = f"{head}{begin}\n{table}\n{end}{tail}"
    return old


def generated() -> dict[Path, str]:
    """All files that are made, but for golden renders, which need those."""
    source = (CHART / "values.yaml").read_text()
    page = CHART / "README.md"
    return {CHART / "values.schema.json": schema(source), page: readme(page.read_text(), source)}


def golden() -> dict[Path, str]:
    return {GOLDEN / f"{name}.yaml": text(values) for name, values in value_sets().items()}


def main() -> None:
    for make in (generated, golden):
        for path, content in make().items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)


if __name__ == "__main__":
    main()
