"""What values may be, and what is said when they may not."""

import json
import re
import unittest

import yaml
from helm_python import HelmError
from helm_python import lint

import generate
from chart import CHART, TOP, chart, containers, env, objects, pods, render, required, value_sets


def without_description(schema, path=""):
    """Paths in the schema that say nothing about themselves, but for maps that only hold others."""
    properties = schema.get("properties", {})
    missing = [] if "description" in schema or properties else [path]
    return missing + [it for name, inner in properties.items() for it in without_description(inner, f"{path}.{name}")]


class Schema(unittest.TestCase):
    def refused(self, values):
        with self.assertRaises(HelmError) as raised:
            render(values)
        return str(raised.exception)

    def test_every_value_is_described(self):
        self.assertEqual(without_description(chart().schema), [])

    def test_a_misspelt_value_is_named(self):
        for values, names in [
            ({"replicaCount": 3}, ["replicaCount"]),
            ({"worker": {"replica": 3}}, ["worker", "replica"]),
            ({"settings": {"concurency": 3}}, ["settings", "concurency"]),
            ({"worker": {"settings": {"poolsize": 3}}}, ["worker/settings", "poolsize"]),
            ({"metrics": {"podMonitor": {"enable": True}}}, ["metrics/podMonitor", "enable"]),
        ]:
            with self.subTest(values):
                said = self.refused({**required(), **values})
                for name in names:
                    self.assertIn(name, said)

    def test_a_wrong_value_is_named(self):
        for path, value in [
            ("image__pullPolicy", "Sometimes"),
            ("image__digest", "sha256:12"),
            ("worker__replicas", "three"),
            ("worker__autoscaling__type", "vpa"),
            ("worker__autoscaling__minReplicas", 0),
            ("setup__mode", "job"),
            ("http__port", 80),
            ("settings__gracePeriod", "60"),
            ("settings__concurrency", 7),
            ("settings__topology", "declare"),
            ("settings__queues", ["acme"]),
            ("settings__jobMaxBytes", "8 MiB"),
            ("networkPolicy__except", ["10.0.0.0"]),
            ("storage__url", "bucket"),
        ]:
            with self.subTest(path):
                self.assertIn(f"/{path.replace('__', '/')}", self.refused(required(**{path: value})))

    def test_labels_of_the_chart_cannot_be_replaced(self):
        self.assertIn("app.kubernetes.io/name", self.refused(required(commonLabels={"app.kubernetes.io/name": "x"})))

    def test_authorities_of_the_broker_need_tls(self):
        ca = {"rabbitmq__ca__secret": "broker-ca"}
        self.assertIn("rabbitmq.ca needs rabbitmq.tls", self.refused(required(**ca)))
        for more in ({"rabbitmq__tls": True}, {"rabbitmq__urlKey": "url"}):
            with self.subTest(more):
                render(required(**ca, **more))

    def test_a_missing_secret_is_asked_for(self):
        for name in ("rabbitmq", "postgres", "keys"):
            with self.subTest(name):
                self.assertIn(f"{name}.secret is required", self.refused(required(**{f"{name}__secret": ""})))

    def test_what_does_not_go_together_is_refused(self):
        monitors = required(metrics__podMonitor__enabled=True, metrics__serviceMonitor__enabled=True, metrics__service__enabled=True)
        self.assertIn("take one", self.refused(monitors))
        self.assertIn("metrics.service.enabled", self.refused(required(metrics__serviceMonitor__enabled=True)))
        scale = required(worker__autoscaling__type="keda", worker__autoscaling__minReplicas=5, worker__autoscaling__maxReplicas=4)
        self.assertIn("worker.autoscaling.minReplicas", self.refused(scale))

    def test_the_schema_is_understood_by_old_and_new_validators(self):
        text = (CHART / "values.schema.json").read_text()
        self.assertIn("draft-07", text)
        for newer in ("$defs", "prefixItems", "unevaluatedProperties", "dependentSchemas", "$dynamicRef"):
            self.assertNotIn(f'"{newer}"', text)

    def test_the_defaults_fit_the_schema(self):
        chart().validate_schema({})

    def test_helm_lint_has_nothing_to_say(self):
        for name, values in value_sets().items():
            with self.subTest(name):
                report = lint(CHART, values, strict=True, kube_version="1.34.0")
                found = [it for it in report["messages"] if "icon is recommended" not in json.dumps(it)]
                self.assertEqual(found, [], report)

    def test_helm_uses_the_subset_that_version_3_18_has(self):
        """Functions that came with Helm 4 are not used; Chart.yaml is of the form that both read."""
        templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
        for newer in ("mustToToml", "toYamlPretty", "fromToml"):
            self.assertNotIn(newer, templates)
        self.assertIn("apiVersion: v2\n", (CHART / "Chart.yaml").read_text())


class Documentation(unittest.TestCase):
    page = (TOP / "docs/kubernetes.md").read_text()

    def test_values_in_the_documentation_render(self):
        blocks = re.findall(r"^```yaml\n(.*?)^```", self.page, re.M | re.S)
        blocks += re.findall(r"--values - <<'EOF'\n(.*?)^EOF", self.page, re.M | re.S)
        self.assertGreater(len(blocks), 2)
        for block in blocks:
            with self.subTest(block):
                objects({**required(), **yaml.safe_load(block)})

    def test_values_named_in_the_documentation_exist(self):
        values = yaml.safe_load((CHART / "values.yaml").read_text())
        names = re.findall(r"`((?:\w+\.)+\w+)(?:: [^`]*)?`", self.page)
        names = [name for name in names if name.split(".")[0] in values]
        self.assertGreater(len(names), 15)
        settings = {generate.camel(variable) for variable, *_ in generate.setting_rows()}
        for name in names:
            place = values
            for part in name.split("."):
                with self.subTest(name):
                    self.assertIn(part, settings if place == {} else place)
                place = place.get(part) if place else None

    def test_a_cluster_may_choose_the_user(self):
        found = objects(required(podSecurityContext={"runAsUser": None, "runAsGroup": None}))
        for pod in pods(found):
            self.assertEqual(set(pod["spec"]["securityContext"]), {"runAsNonRoot", "seccompProfile"})


class Settings(unittest.TestCase):
    def value_of(self, name, value):
        found = objects(required(**{f"settings__{name}": value}))
        (worker,) = [it for it in found if it["metadata"]["name"] == "post-postroom-worker" and it["kind"] == "Deployment"]
        env = worker["spec"]["template"]["spec"]["containers"][0]["env"]
        variable = re.sub("([A-Z])", r"_\1", name).upper()
        variable = variable if variable.startswith("OTEL_") else f"POSTROOM_{variable}"
        return [it["value"] for it in env if it["name"] == variable]

    def test_large_numbers_are_not_floating_point(self):
        self.assertEqual(self.value_of("jobMaxBytes", 15728640), ["15728640"])
        self.assertEqual(self.value_of("connectionMaxMessages", 1000000), ["1000000"])
        self.assertEqual(self.value_of("webhookRetryScale", 0.25), ["0.25"])

    def test_lists_are_joined(self):
        self.assertEqual(self.value_of("egressAllow", ["10.0.0.0/8", "fd00::/8"]), ["10.0.0.0/8,fd00::/8"])

    def test_every_setting_becomes_its_variable(self):
        samples = {"NUMBER": 8, "DURATION": "7s", "SIZE": "7MiB", "FACTOR": 2, "MILLISECONDS": 7, "RATIO": 1, "true|false": True}
        for variable, form, _, _ in generate.setting_rows():
            if variable in generate.ELSEWHERE:
                continue
            sample = samples.get(form, "high:q" if form.startswith("LEVEL:") else form.split("|")[0].removesuffix(",…"))
            value = [sample] if form.endswith(",…") else sample
            with self.subTest(variable):
                self.assertEqual(self.value_of(generate.camel(variable), value), [sample if isinstance(sample, str) else json.dumps(sample)])

    def of_containers(self, name, **values):
        """The variables of every container of this name."""
        return [env(it) for pod in pods(objects(required(**values))) for it in containers(pod) if it["name"] == name]

    def test_what_a_component_has_of_its_own_wins_whatever_it_is(self):
        for variable, shared, own, text in [
            ("OTEL_SDK_DISABLED", True, False, "false"),
            ("OTEL_TRACES_SAMPLER_ARG", 1, 0, "0"),
            ("POSTROOM_EGRESS_ALLOW", ["10.0.0.0/8"], [], ""),
            ("POSTROOM_CONCURRENCY", 9, 8, "8"),
        ]:
            with self.subTest(variable, own=own):
                name = generate.camel(variable)
                values = {f"settings__{name}": shared, f"worker__settings__{name}": own}
                ((worker,), (bridge,)) = (self.of_containers(it, **values) for it in ("worker", "bridge"))
                self.assertEqual(worker[variable], text)
                self.assertEqual(bridge[variable], self.value_of(name, shared)[0])

    def test_setup_works_with_the_names_that_workers_have(self):
        own = {"prefix": "own", "queues": ["high:own.q", "low:own.p"], "databaseSchema": "own"}
        values = {"settings__prefix": "shared", "settings__queues": ["high:shared.q"], "setup__topology": True, "tests__enabled": True}
        values |= {f"worker__settings__{name}": value for name, value in own.items()}
        names = {"topology": ("POSTROOM_PREFIX", "POSTROOM_QUEUES"), "migrate": ("POSTROOM_DATABASE_SCHEMA",), "database": ("POSTROOM_DATABASE_SCHEMA",)}
        for mode in ("hook", "init"):
            (worker,) = self.of_containers("worker", setup__mode=mode, **values)
            for name, variables in names.items():
                found = self.of_containers(name, setup__mode=mode, **values)
                self.assertTrue(found)
                for variable in variables:
                    with self.subTest(mode=mode, container=name, variable=variable):
                        self.assertEqual({it[variable] for it in found}, {worker[variable]})
